"""Associative Transformers for timm. Importing this package registers the models."""

from .ait import AssociativeBlock, AssociativeTransformer, NormalizedPatchEmbed
from .convert import checkpoint_filter_fn
from .distributed import synchronize_memory
from .hopfield import hopfield_energy
from .workspace import GlobalWorkspace

__version__ = '0.1.0'

__all__ = [
    'AssociativeBlock',
    'AssociativeTransformer',
    'GlobalWorkspace',
    'NormalizedPatchEmbed',
    'checkpoint_filter_fn',
    'hopfield_energy',
    'synchronize_memory',
]
