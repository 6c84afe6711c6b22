"""Associative Transformers for timm. Importing this package registers the models."""

from .blocks import AssociativeBlock, AttentionFreeBlock
from .convert import checkpoint_filter_fn
from .hopfield import HopfieldRetrieval, hopfield_energy
from .memory import load_memory, save_memory
from .relational import RelationalTransformer  # and registers the models
from .report import BlockReport, format_report, memory_report
from .stems import NormalizedPatchEmbed
from .transformer import AssociativeTransformer
from .workspace import GlobalWorkspace

__version__ = '0.2.0.dev0'

__all__ = [
    'AssociativeBlock',
    'AssociativeTransformer',
    'AttentionFreeBlock',
    'BlockReport',
    'GlobalWorkspace',
    'HopfieldRetrieval',
    'NormalizedPatchEmbed',
    'RelationalTransformer',
    'checkpoint_filter_fn',
    'format_report',
    'hopfield_energy',
    'load_memory',
    'memory_report',
    'save_memory',
]
