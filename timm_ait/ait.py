"""The catalogue of Associative Transformers: configs of their weights, then entry points.

Sun, Ochiai, Wu, Lin, Kanai. *Associative Transformer*, CVPR 2025, https://arxiv.org/abs/2309.12862
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .convert import fit_pretrained
from .pickles import explained
from .pretrained import fetch_weights, packaged, resolve_cfg
from .stems import ConvEmbed, NormalizedPatchEmbed
from .transformer import AssociativeTransformer

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

UPCYCLED: dict[str, Any] = dict(retrieval_scale=0.0)


def create_ait(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    model_class: type[AssociativeTransformer] = AssociativeTransformer,
    **kwargs: Any,
) -> AssociativeTransformer:
    """Build a variant; timm reads its weights from a file that was verified before."""
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    cfg = resolve_cfg(variant, pretrained_cfg, pretrained_cfg_overlay, kwargs.get('pretrained_model_args'))
    weights = fetch_weights(cfg, cache_dir) if pretrained else None
    with explained(weights):
        model = build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            pretrained_cfg=replace(cfg, source=None, file=str(weights)) if weights else cfg,
            pretrained_filter_fn=partial(
                fit_pretrained,
                source=str(weights or 'weights'),
                replace_head=kwargs.get('features_only', False),
                strict=kwargs.get('pretrained_strict', True),
            ),
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
            cache_dir=cache_dir,
            **kwargs,
        )
    # Where the weights came from, but not their hash, which does not hold for what is trained or saved from here on.
    for part in (model, getattr(model, 'model', model)):  # features_only has the model inside, with a config of its own
        part.pretrained_cfg.update(source=cfg.source, file=cfg.file, notes=None)
    return model


def make_cfg(**kwargs: Any) -> dict[str, Any]:
    """The config of weights in timm's form, with what all models here share."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': IMAGENET_INCEPTION_MEAN,
        'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_name': 'Associative Transformer',
        'paper_ids': 'arXiv:2309.12862',
        'origin_url': 'https://github.com/yuweisunn/associative-transformer',
        **kwargs,
    }


def _cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    cifar = dict(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return make_cfg(**dict(cifar, **kwargs))


def _vit_cfgs(name: str) -> dict[str, dict[str, Any]]:
    """Tags of ``name`` whose weights are those of timm's ViT-B/16 on the Hub, the best first.

    Files of other owners can be replaced by them, so no hash is pinned: the Hub's own is checked.
    """
    imagenet = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    tags: dict[str, dict[str, Any]] = {
        'augreg2_in21k_ft_in1k': {},
        'augreg_in21k_ft_in1k': {},
        'orig_in21k_ft_in1k': {},
        'sam_in1k': {},
        'augreg_in1k': {},
        'augreg_in21k': dict(num_classes=21843),
        'dino': dict(num_classes=0, **imagenet),
        'mae': dict(num_classes=0, license='cc-by-nc-4.0', **imagenet),
    }
    return {
        f'{name}.{tag}': make_cfg(
            hf_hub_id=f'timm/vit_base_patch16_224.{tag}',
            hf_hub_filename='model.safetensors',
            description='The weights of a ViT, not trained as an AiT: a start for fine-tuning',
            **changes,
        )
        for tag, changes in tags.items()
    }


# A tag has weights, for timm.list_pretrained and pretrained=True, where its config names their file.
default_cfgs = generate_default_cfgs(
    {
        'ait_small.untrained': make_cfg(),
        'ait_medium.untrained': make_cfg(),
        'ait_base.untrained': make_cfg(),
        'ait_small_patch4_32.cifar10': _cifar_cfg(),
        'ait_medium_patch4_32.cifar10': _cifar_cfg(),
        'ait_base_patch4_32.cifar10': _cifar_cfg(),
        **_vit_cfgs('ait_vit_small_patch16_224'),
        **_vit_cfgs('ait_vit_medium_patch16_224'),
        **_vit_cfgs('ait_vit_base_patch16_224'),
        'ait_tiny_conv4_32.cifar10': _cifar_cfg(
            first_conv='patch_embed.backbone.0.conv',
            **packaged('ait_tiny_conv4_32.cifar10', '8c68587bc3efc1f01d1f520757d6fe806ed5c64c0a0594ea5677d7ea736be902'),
        ),
        'test_ait.cifar10': _cifar_cfg(
            **packaged('test_ait.cifar10', '166e22d2bf87f0e21c0bee95c88e22802ffce3ab3b62759deaec6305560bd51c')
        ),
    }
)


def _vit_b16(depth: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the layout of timm's ViT-B/16."""
    return dict(dict(patch_size=16, embed_dim=768, depth=depth, num_heads=12), **kwargs)


def paper_args(depth: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the paper's CIFAR models: no class token, position embedding, final norm or qkv bias."""
    model_args: dict[str, Any] = dict(
        patch_size=4,
        embed_dim=768,
        depth=depth,
        num_heads=12,
        qkv_bias=False,
        class_token=False,
        pos_embed='none',
        final_norm=False,
        global_pool='flatten',
        weight_init='skip',
        embed_layer=NormalizedPatchEmbed,
        norm_layer=nn.LayerNorm,
    )
    return dict(model_args, **kwargs)


# A small model in today's style; benchmarks/controls.py makes a ViT of it too.
TINY_ARGS: dict[str, Any] = dict(
    patch_size=1,  # of the stem's feature map
    embed_dim=192,
    depth=3,
    num_heads=6,
    class_token=False,
    global_pool='avg',
    embed_layer=ConvEmbed,
)
# The sizes of the models for tests.
TEST_ARGS = dict(embed_dim=128, num_heads=4, mlp_ratio=2.0, num_slots=16, slot_dim=16, write_heads=4)


@register_model
def ait_small(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small in ViT-B/16 layout: depth 2."""
    return create_ait('ait_small', pretrained, **_vit_b16(2, kwargs))


@register_model
def ait_medium(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium in ViT-B/16 layout: depth 6."""
    return create_ait('ait_medium', pretrained, **_vit_b16(6, kwargs))


@register_model
def ait_base(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base in ViT-B/16 layout: depth 12."""
    return create_ait('ait_base', pretrained, **_vit_b16(12, kwargs))


@register_model
def ait_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small of the paper's CIFAR experiments: depth 2, 15.7 M parameters."""
    return create_ait('ait_small_patch4_32', pretrained, **paper_args(2, kwargs))


@register_model
def ait_medium_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium of the paper's CIFAR experiments: depth 6, 45.8 M parameters."""
    return create_ait('ait_medium_patch4_32', pretrained, **paper_args(6, kwargs))


@register_model
def ait_base_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base of the paper's CIFAR experiments: depth 12, 90.9 M parameters."""
    return create_ait('ait_base_patch4_32', pretrained, **paper_args(12, kwargs))


@register_model
def ait_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small that starts from blocks 0 and 11 of a ViT-B/16: depth 2. To be fine-tuned before it is of use."""
    return create_ait('ait_vit_small_patch16_224', pretrained, **_vit_b16(2, dict(UPCYCLED, **kwargs)))


@register_model
def ait_vit_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium that starts from blocks 0, 2, 4, 7, 9, 11 of a ViT-B/16. To be fine-tuned before it is of use."""
    return create_ait('ait_vit_medium_patch16_224', pretrained, **_vit_b16(6, dict(UPCYCLED, **kwargs)))


@register_model
def ait_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base that starts as a ViT-B/16, with its logits: each block keeps the ViT's path, retrieval grows from 0."""
    return create_ait('ait_vit_base_patch16_224', pretrained, **_vit_b16(12, dict(UPCYCLED, **kwargs)))


@register_model
def ait_tiny_conv4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """A small AiT in today's style for images of 32x32: depth 3, 1.7 M parameters.

    Convolutions in place of the patches (Xiao et al., https://arxiv.org/abs/2106.14881), positions, the mean of the
    tokens before the classifier, and a memory for each image, whose slots stay distinct.
    """
    model_args = dict(
        TINY_ARGS, mlp_ratio=2, write_rule='distinct', write_scope='image', write_heads=4, memory_decay=0.5
    )
    return create_ait('ait_tiny_conv4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def test_ait(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:  # noqa: PT028
    """The paper's CIFAR model in small, for tests: depth 4, width 128, 0.7 M parameters."""
    return create_ait('test_ait', pretrained, **paper_args(4, dict(TEST_ARGS, **kwargs)))
