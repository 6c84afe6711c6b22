"""Models of the catalogue without their memory, for train.py: what remains is a feed-forward part with a norm after it.

    PYTHONPATH=benchmarks python train.py --config benchmarks/recipes/ait_tiny_conv4_32_cifar10.yaml --data-dir DIR \\
        --device-modules timm_ait controls --model ait_tiny_conv4_32_no_memory
"""

from typing import Any

from timm.models import register_model
from variants import NoMemory

from timm_ait import AssociativeTransformer
from timm_ait.ait import ait_small_patch4_32, ait_tiny_conv4_32


class WithoutMemory(AssociativeTransformer):
    """The same blocks, in which nothing is written and nothing is retrieved."""

    workspace_layer = NoMemory


@register_model
def ait_small_patch4_32_no_memory(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """The control of ait_small_patch4_32."""
    return ait_small_patch4_32(pretrained, **dict(kwargs, write_mode='never', model_class=WithoutMemory))


@register_model
def ait_tiny_conv4_32_no_memory(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """The control of ait_tiny_conv4_32."""
    return ait_tiny_conv4_32(pretrained, **dict(kwargs, write_mode='never', model_class=WithoutMemory))
