"""What the models of the catalogue are compared with, for train.py.

Without its memory, what remains of a workspace is a feed-forward part with a norm after it. The ViT is timm's own.

    PYTHONPATH=benchmarks python train.py --config benchmarks/recipes/ait_tiny_conv4_32_cifar10.yaml --data-dir DIR \\
        --device-modules timm_ait controls --model ait_tiny_conv4_32_no_memory
"""

from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from variants import NoMemory

from timm_ait import AssociativeTransformer
from timm_ait.ait import CIFAR10_MEAN, CIFAR10_STD, TINY_ARGS, ait_small_patch4_32, ait_tiny_conv4_32

default_cfgs = generate_default_cfgs(
    {
        'vit_tiny_conv4_32.untrained': dict(
            num_classes=10,
            input_size=(3, 32, 32),
            fixed_input_size=True,
            crop_pct=1.0,
            interpolation='bicubic',
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
            first_conv='patch_embed.backbone.0.conv',
            classifier='head',
        )
    }
)


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


@register_model
def vit_tiny_conv4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT beside ait_tiny_conv4_32: its stem, width, depth and head, with a wider MLP: 1.7 M parameters too."""
    model_args = dict(TINY_ARGS, mlp_ratio=3)
    return build_model_with_cfg(VisionTransformer, 'vit_tiny_conv4_32', pretrained, **dict(model_args, **kwargs))
