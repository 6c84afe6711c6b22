"""Associative Transformer: a timm VisionTransformer whose feed-forward part is a global workspace.

Sun, Ochiai, Wu, Lin, Kanai. *Associative Transformer*, CVPR 2025, https://arxiv.org/abs/2309.12862
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model, register_notrace_module
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .balance import carry_balance_loss
from .convert import fit_pretrained
from .distributed import synchronize_memory
from .fused import FusedWorkspace
from .pretrained import fetch_weights, packaged, resolve_cfg
from .workspace import GlobalWorkspace, MemoryWrite

__all__ = ['AssociativeBlock', 'AssociativeTransformer', 'NormalizedPatchEmbed']

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

UPCYCLED: dict[str, Any] = dict(retrieval_scale=0.0)

register_notrace_module(GlobalWorkspace)
register_notrace_module(FusedWorkspace)


@register_notrace_module
class NormalizedPatchEmbed(PatchEmbed):
    """The paper's stem: cut into patches, LayerNorm over the raw patch, Linear, LayerNorm.

    ``proj`` keeps the shape of a convolution, (E, C, P, P), so that timm adapts it to other channel counts; a patch is
    read in the same order, (C, P, P). The authors read (P, P, C), which `convert.py` undoes.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if dynamic_img_pad or output_fmt is not None or not strict_img_size:
            raise ValueError('NormalizedPatchEmbed takes images of one size: leave dynamic_img_size and _pad at False')
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm, bias=bias, device=device, dtype=dtype
        )
        patch_dim = in_chans * self.patch_size[0] * self.patch_size[1]
        self.patch_norm = nn.LayerNorm(patch_dim, device=device, dtype=dtype)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size; the patch is tied to the norm over its pixels and stays."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f'the stem normalises patches of {self.patch_size}, got patch_size={patch_size}; '
                'create the model with the patch size that you want'
            )
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if (H, W) != self.img_size:
            raise ValueError(
                f'expected images of {self.img_size}, got {(H, W)}; resize them or create the model with img_size='
            )
        x = F.unfold(x, kernel_size=self.patch_size, stride=self.patch_size)  # (B, C, H, W) -> (B, C*P*P, N)
        x = self.patch_norm(x.transpose(1, 2))
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, C*P*P) -> (B, N, E)
        return self.norm(x)


class AssociativeBlock(Block):
    """timm's pre-norm block around a :class:`GlobalWorkspace`.

    It checkpoints itself, since the memory before the write is an input of what the backward pass recomputes, and the
    write itself must happen once.
    """

    grad_checkpointing: bool = False

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``x + attention(LN(x))``: (B, N, E) -> (B, N, E)."""
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``x + workspace(LN(x))`` on top of :meth:`attend`: (B, N, E) -> (B, N, E)."""
        if not torch.jit.is_scripting() and self.is_checkpointing():
            return self.forward_checkpointed(x, attn_mask, is_causal)
        return self.transform(x, attn_mask, is_causal)

    def transform(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The whole block, kept apart from :meth:`forward` so that it can be recomputed."""
        x = self.attend(x, attn_mask, is_causal)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.unused
    def is_checkpointing(self) -> bool:
        """Whether a forward would keep its inputs alone. A method, since TorchScript reads no attribute of a class."""
        return self.grad_checkpointing and torch.is_grad_enabled()

    @torch.jit.unused
    def step(
        self, x: Tensor, memory: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The block as a function of tokens (B, N, E) and memory (M, D): tokens and the parts of the write."""
        x = self.attend(x, attn_mask, is_causal)
        update, write = self.mlp.step(self.norm2(x), memory, is_checkpointed=True)
        return x + self.drop_path2(self.ls2(update)), *write

    @torch.jit.unused
    def forward_checkpointed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """:meth:`forward`, keeping its inputs alone for the backward pass."""
        if not self.mlp.is_writing():
            return checkpoint(self.transform, x, attn_mask, is_causal)
        x, *write = checkpoint(self.step, x, self.mlp.memory.clone(), attn_mask, is_causal)
        self.mlp.commit(MemoryWrite(*write))
        return x


class AssociativeTransformer(VisionTransformer):
    """Associative Transformer (AiT).

    Everything but the workspace is timm's VisionTransformer, whose arguments it takes beside its own.

    In training mode the logits carry the balance loss to whatever loss is computed from them, see `balance.py`;
    ``model.auto_balance = False`` turns that off, for loops that add :meth:`balance_loss` themselves.

    Args:
        num_slots: Memory slots M of each block.
        slot_dim: Width D of a slot.
        write_heads: Heads S of the write.
        bottleneck: Tokens k that a slot may read per head, out of all tokens of the batch.
        beta: Inverse temperature of the retrieval.
        memory_decay: Share of the old memory that a write keeps.
        balance_weight: Weight of the balance loss.
        retrieval_steps: Hopfield updates per token.
        write_mode: 'train', 'always' or 'never'.
        write_grad: Whether the task trains the write.
        retrieval_scale: None for the paper's blocks; a number keeps a ViT's own path, see the layer.
        global_pool: One of timm's, or 'flatten': the classifier reads all tokens side by side, as in the paper.
        fc_norm: As in timm; with 'flatten' a LayerNorm over the flattened tokens unless False.
        weight_init: As in timm; 'skip' keeps PyTorch's own initialisation, which is the authors'.
        **vit_args: Arguments of ``VisionTransformer``, which raises TypeError for those it does not know.

    Raises:
        ValueError: For an argument out of range or sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_slots: int = 32,
        slot_dim: int = 32,
        write_heads: int = 8,
        bottleneck: int = 512,
        beta: float = 1.0,
        memory_decay: float = 0.9,
        balance_weight: float = 0.01,
        retrieval_steps: int = 1,
        write_mode: str = 'train',
        write_grad: bool = True,
        retrieval_scale: float | None = None,
        global_pool: str = 'token',
        fc_norm: bool | None = None,
        weight_init: str = '',
        **vit_args: Any,
    ) -> None:
        _check_divisible(img_size, patch_size, vit_args.get('dynamic_img_pad', False))
        flatten = global_pool == 'flatten'
        if flatten:
            _check_fixed_tokens(vit_args.get('dynamic_img_size', False), vit_args.get('patch_drop_rate', 0.0))
        workspace = partial(
            GlobalWorkspace,
            num_slots=num_slots,
            slot_dim=slot_dim,
            write_heads=write_heads,
            bottleneck=bottleneck,
            beta=beta,
            memory_decay=memory_decay,
            balance_weight=balance_weight,
            retrieval_steps=retrieval_steps,
            write_mode=write_mode,
            write_grad=write_grad,
            retrieval_scale=retrieval_scale,
        )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool='' if flatten else global_pool,
            fc_norm=False if flatten else fc_norm,
            weight_init='skip',
            block_fn=AssociativeBlock,
            mlp_layer=workspace,
            **vit_args,
        )
        self.auto_balance = True
        if flatten:
            self._tie_to_tokens(norm=fc_norm is not False)
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        self.init_weights(needs_reset=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Classify images (B, C, H, W): logits (B, num_classes)."""
        if not torch.jit.is_scripting():
            self._check_input(x)
        x = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.forward_head(x)
        if not torch.jit.is_scripting() and self.training:
            x = self._finish_step(x)
        return x

    @torch.jit.unused
    def _finish_step(self, logits: Tensor) -> Tensor:
        """After the last block: one memory on all ranks, and the balance loss on its way to the gradient."""
        synchronize_memory(self)
        return carry_balance_loss(logits, self.balance_loss()) if self.auto_balance else logits

    @torch.jit.unused
    def balance_loss(self) -> Tensor:
        """Balance loss () of the last training forward: weighted, summed over blocks, differentiable, plain."""
        return torch.stack([block.mlp.balance_loss() for block in self.blocks]).sum()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off. The flag lives in the blocks, each of which recomputes itself."""
        for block in self.blocks:
            block.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where ``global_pool`` names another ('flatten' included)."""
        is_flat = self.global_pool == 'flatten'
        flatten = is_flat if global_pool is None else global_pool == 'flatten'
        if flatten and not is_flat:
            _check_fixed_tokens(dynamic_img_size=self.dynamic_img_size)
            if not isinstance(self.fc_norm, nn.Identity):  # type: ignore[has-type]
                self.norm = self.fc_norm  # type: ignore[has-type]  # as at creation: the final norm stands before the tokens are flattened
            self._tie_to_tokens(norm=True)
        elif is_flat and not flatten:
            self.fc_norm = nn.Identity()  # the norm over the flattened tokens goes with them
            self.pool_include_prefix = False
            self.num_features = self.head_hidden_size = self.embed_dim
        super().reset_classifier(num_classes, '' if flatten else global_pool)  # notes the norms, for saved models
        if flatten:
            self._flatten()
        like = self.patch_embed.proj.weight
        dd = {'device': like.device, 'dtype': like.dtype}
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._set_mode_of_head()

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change image or patch size as timm does; a classifier over flattened tokens is tied to their number."""
        new_img, new_patch = img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size
        _check_divisible(new_img, new_patch, self.patch_embed.dynamic_img_pad)
        (h, w), (p, q) = to_2tuple(new_img), to_2tuple(new_patch)
        is_resized = self.global_pool == 'flatten' and (h // p) * (w // q) != self.patch_embed.num_patches
        if is_resized and self.num_classes > 0:
            raise ValueError(
                f'the classifier reads {self.patch_embed.num_patches} flattened tokens, img_size={new_img} with '
                f'patch_size={new_patch} gives {(h // p) * (w // q)}; create the model with img_size={new_img}, or '
                "leave 'flatten' first: reset_classifier(num_classes, global_pool='avg')"
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if is_resized:  # no classifier, but a norm over the flattened tokens
            is_trained = all(p.requires_grad for p in self.fc_norm.parameters())
            self._tie_to_tokens(norm=isinstance(self.fc_norm, nn.LayerNorm))
            self.fc_norm.requires_grad_(is_trained)
            self._set_mode_of_head()

    def _tie_to_tokens(self, norm: bool) -> None:
        """Make the classifier read all tokens side by side: (B, N, E) -> (B, N*E)."""
        like = self.patch_embed.proj.weight
        dd = {'device': like.device, 'dtype': like.dtype}
        width = (self.patch_embed.num_patches + self.num_prefix_tokens) * self.embed_dim
        self.fc_norm = nn.LayerNorm(width, **dd) if norm else nn.Identity()  # type: ignore[assignment]
        self.head_hidden_size = width
        self.head = nn.Linear(width, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()
        self._flatten()

    def _flatten(self) -> None:
        """Flatten in the place of timm's pooling."""
        self.global_pool = 'flatten'
        self.attn_pool, self.pool_include_prefix = nn.Flatten(1), True  # timm's place for a pooling module
        # timm: num_features is what a model without classifier hands on
        self.num_features = self.embed_dim if self.num_classes > 0 else self.head_hidden_size

    def _set_mode_of_head(self) -> None:
        """Put what was made anew for the head in the mode of the model."""
        for module in (self.attn_pool, self.fc_norm, self.head):
            if module is not None:
                module.train(self.training)

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and (x.ndim != 4 or x.shape[1] != self.in_chans):
            raise ValueError(
                f'expected images of shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}; '
                'convert them or create the model with in_chans='
            )


def _check_divisible(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], padded: bool) -> None:
    (h, w), (p, q) = to_2tuple(img_size), to_2tuple(patch_size)
    if not padded and (h % p or w % q):
        raise ValueError(
            f'img_size must be divisible by patch_size, got {(h, w)} and {(p, q)}; '
            f'the nearest sizes below are {(h // p * p, w // q * q)}'
        )


def _check_fixed_tokens(dynamic_img_size: bool, patch_drop_rate: float = 0.0) -> None:
    if dynamic_img_size or patch_drop_rate > 0:
        raise ValueError(
            f"global_pool='flatten' needs a fixed number of tokens, got dynamic_img_size={dynamic_img_size} and "
            f"patch_drop_rate={patch_drop_rate:g}; leave them out, or take global_pool='avg'"
        )


def _create_ait(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> AssociativeTransformer:
    """Build a variant; timm reads its weights from a file that was verified before."""
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    cfg = resolve_cfg(variant, pretrained_cfg, pretrained_cfg_overlay, kwargs.get('pretrained_model_args'))
    weights = fetch_weights(cfg, cache_dir) if pretrained else None
    model = build_model_with_cfg(
        AssociativeTransformer,
        variant,
        pretrained,
        pretrained_cfg=replace(cfg, source=None, file=str(weights)) if weights else cfg,
        pretrained_filter_fn=partial(
            fit_pretrained, source=str(weights or 'weights'), replace_head=kwargs.get('features_only', False)
        ),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        cache_dir=cache_dir,
        **kwargs,
    )
    # Where the weights came from, but not their hash, which does not hold for what is trained or saved from here on.
    model.pretrained_cfg.update(source=cfg.source, file=cfg.file, notes=None)
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
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
    return _cfg(**dict(cifar, **kwargs))


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
        f'{name}.{tag}': _cfg(
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
        'ait_small.untrained': _cfg(),
        'ait_medium.untrained': _cfg(),
        'ait_base.untrained': _cfg(),
        'ait_small_patch4_32.cifar10': _cifar_cfg(),
        'ait_medium_patch4_32.cifar10': _cifar_cfg(),
        'ait_base_patch4_32.cifar10': _cifar_cfg(),
        **_vit_cfgs('ait_vit_small_patch16_224'),
        **_vit_cfgs('ait_vit_medium_patch16_224'),
        **_vit_cfgs('ait_vit_base_patch16_224'),
        'test_ait.cifar10': _cifar_cfg(
            **packaged('test_ait.cifar10', 'a3f6c2df772f85bb9d4e6b48965d6dd6fdac68c2193ac0c4ada43aeff84b4fe0')
        ),
    }
)


def _vit_b16(depth: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the layout of timm's ViT-B/16."""
    return dict(dict(patch_size=16, embed_dim=768, depth=depth, num_heads=12), **kwargs)


def _paper(depth: int, kwargs: dict[str, Any]) -> dict[str, Any]:
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


@register_model
def ait_small(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small in ViT-B/16 layout: depth 2."""
    return _create_ait('ait_small', pretrained, **_vit_b16(2, kwargs))


@register_model
def ait_medium(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium in ViT-B/16 layout: depth 6."""
    return _create_ait('ait_medium', pretrained, **_vit_b16(6, kwargs))


@register_model
def ait_base(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base in ViT-B/16 layout: depth 12."""
    return _create_ait('ait_base', pretrained, **_vit_b16(12, kwargs))


@register_model
def ait_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small of the paper's CIFAR experiments: depth 2, 15.7 M parameters."""
    return _create_ait('ait_small_patch4_32', pretrained, **_paper(2, kwargs))


@register_model
def ait_medium_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium of the paper's CIFAR experiments: depth 6, 45.8 M parameters."""
    return _create_ait('ait_medium_patch4_32', pretrained, **_paper(6, kwargs))


@register_model
def ait_base_patch4_32(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base of the paper's CIFAR experiments: depth 12, 90.9 M parameters."""
    return _create_ait('ait_base_patch4_32', pretrained, **_paper(12, kwargs))


@register_model
def ait_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Small that starts from blocks 0 and 11 of a ViT-B/16: depth 2. To be fine-tuned before it is of use."""
    return _create_ait('ait_vit_small_patch16_224', pretrained, **_vit_b16(2, dict(UPCYCLED, **kwargs)))


@register_model
def ait_vit_medium_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Medium that starts from blocks 0, 2, 4, 7, 9, 11 of a ViT-B/16. To be fine-tuned before it is of use."""
    return _create_ait('ait_vit_medium_patch16_224', pretrained, **_vit_b16(6, dict(UPCYCLED, **kwargs)))


@register_model
def ait_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """AiT-Base that starts as a ViT-B/16, with its logits: each block keeps the ViT's path, retrieval grows from 0."""
    return _create_ait('ait_vit_base_patch16_224', pretrained, **_vit_b16(12, dict(UPCYCLED, **kwargs)))


@register_model
def test_ait(pretrained: bool = False, **kwargs: Any) -> AssociativeTransformer:
    """The paper's CIFAR model in small, for tests and demos: depth 4, width 128, 0.7 M parameters."""
    model_args = dict(
        embed_dim=128,
        num_heads=4,
        mlp_ratio=2.0,
        num_slots=16,
        slot_dim=16,
        write_heads=4,
    )
    return _create_ait('test_ait', pretrained, **_paper(4, dict(model_args, **kwargs)))
