"""The Associative Transformer: timm's VisionTransformer with a global workspace as the feed-forward part of its blocks.

Sun, Ochiai, Wu, Lin, Kanai. *Associative Transformer*, CVPR 2025, https://arxiv.org/abs/2309.12862
"""

import math
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .arguments import WORKSPACE_ARGS
from .balance import plain, track
from .blocks import AssociativeBlock, AttentionFreeBlock, workspaces_in
from .convert import check_npz
from .stems import check_divisible
from .workspace import GlobalWorkspace

__all__ = ['AssociativeTransformer']

POOLS = ('', 'avg', 'avgmax', 'max', 'token', 'flatten')  # what a model can change to
POOLS_AT_CREATION = (*POOLS, 'map', 'prr')


def _renamed(function: FunctionType, name: str) -> Any:
    """A copy of a function under another name. TorchScript knows no super(), and finds a method by its own name."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return copy


class AssociativeTransformer(VisionTransformer):
    """Associative Transformer (AiT).

    Everything but the workspace is timm's VisionTransformer, whose arguments it takes beside its own. The keywords of
    :class:`GlobalWorkspace` in ``WORKSPACE_ARGS`` go to the workspaces of all blocks.

    In training mode a backward pass adds the gradient of the balance loss to that of any loss, see `balance.py`.
    ``model.auto_balance = False`` turns that off. A subclass with another ``workspace_layer`` has other workspaces.

    Args:
        img_size: As in timm.
        patch_size: As in timm.
        global_pool: One of timm's, or 'flatten': the classifier reads all tokens side by side, as in the paper.
        fc_norm: As in timm; with 'flatten' a LayerNorm over the flattened tokens unless False.
        attention: Whether the blocks have self-attention. Without it only a memory of each image,
            ``write_scope='image'``, mixes the tokens of an image in evaluation.
        weight_init: As in timm; 'skip' leaves PyTorch's own initialisation, which is the authors'.
        **vit_args: Keywords of the workspaces, and of ``VisionTransformer``, which raises TypeError for unknown ones.

    Raises:
        ValueError: For an argument out of range or sizes that do not fit together.
    """

    workspace_layer: type[GlobalWorkspace] = GlobalWorkspace
    run_blocks = _renamed(VisionTransformer.forward_features, 'run_blocks')

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        global_pool: str = 'token',
        fc_norm: bool | None = None,
        attention: bool = True,
        weight_init: str = '',
        **vit_args: Any,
    ) -> None:
        check_divisible(img_size, patch_size, vit_args.get('dynamic_img_pad', False))
        if not isinstance(attention, bool):
            raise ValueError(f'attention must be True or False, got {attention!r}')
        for name in ('block_fn', 'mlp_layer'):
            if name in vit_args:
                raise ValueError(f'{name} is fixed here; take attention=, or set workspace_layer in a subclass')
        pools = _pools(POOLS_AT_CREATION, vit_args.get('class_token', True))
        if global_pool not in pools:
            raise ValueError(f'global_pool must be one of {pools} in this model, got {global_pool!r}')
        flatten = global_pool == 'flatten'
        if flatten:
            _check_fixed_tokens(vit_args.get('dynamic_img_size', False), vit_args.get('patch_drop_rate', 0.0))
        workspace_args = {name: vit_args.pop(name) for name in WORKSPACE_ARGS if name in vit_args}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool='' if flatten else global_pool,
            fc_norm=False if flatten else fc_norm,
            weight_init='skip',
            block_fn=AssociativeBlock if attention else AttentionFreeBlock,
            mlp_layer=partial(self.workspace_layer, **workspace_args),
            **vit_args,
        )
        if flatten:
            self._flatten_tokens(norm=fc_norm is None or bool(fc_norm))
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        self.init_weights(needs_reset=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Classify images (B, C, H, W): logits (B, num_classes)."""
        if torch.jit.is_scripting():
            if self.training:
                raise ValueError('a scripted model only evaluates, its memory is fixed; call eval() on it')
            return self.forward_head(self.run_blocks(x, attn_mask, is_causal))
        else:
            x = plain(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
            return self._track(self.forward_head(x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, E) of images (B, C, H, W), after all blocks and the final norm."""
        self._check_input(x)
        return self._track(self.run_blocks(without_subclass(x), attn_mask=attn_mask, is_causal=is_causal))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The outputs of several blocks, with the arguments and results of timm's method of this name."""
        self._check_input(x)
        return self._track(super().forward_intermediates(without_subclass(x), *args, **kwargs))

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: a copy of the model whose workspaces store nothing."""
        methods = 'write', 'keys_and_values', 'select', 'attend', 'update', 'fold_queries'
        for workspace in workspaces_in(self):
            if workspace.overrides('look_up') or (workspace.has_copies() and workspace.overrides(*methods)):
                name = type(workspace).__name__
                raise ValueError(
                    f'TorchScript computes as GlobalWorkspace does, and {name} in another way; use torch.export'
                )
        return reparameterize_model(self)

    def _track(self, outputs: Any) -> Any:
        """Outputs such that a loss computed from them tells by which factor the training loop scales it."""
        if not torch.is_grad_enabled() or _is_exporting():
            return outputs
        if not any(workspace.adds_balance_loss() for workspace in workspaces_in(self)):
            return outputs
        if not torch.compiler.is_compiling():
            outputs = tree_map(without_subclass, outputs)  # of a mask or a question
        return track(outputs)

    @property
    def auto_balance(self) -> bool:
        """Whether a backward pass adds the gradient of the balance loss by itself."""
        return all(workspace.auto_balance for workspace in workspaces_in(self))

    @auto_balance.setter
    def auto_balance(self, is_automatic: bool) -> None:
        for workspace in workspaces_in(self):
            workspace.auto_balance = is_automatic

    __jit_unused_properties__ = ('auto_balance',)

    def balance_loss(self) -> Tensor:
        """Balance loss () of the last training forward: weighted, summed over blocks, differentiable.

        Whoever adds it to a loss himself gets it once: such a backward pass does not add it a second time.
        """
        losses = [workspace.balance_loss() for workspace in workspaces_in(self)]
        if not losses:
            return self.patch_embed.proj.weight.new_zeros(())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load Google's file of a ViT as timm does, if it has as many blocks as this model."""
        check_npz(Path(checkpoint_path), len(self.blocks))
        super().load_pretrained(checkpoint_path, prefix)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off.

        The flag lives in the blocks, each of which recomputes itself. That of the model stays False, for timm would
        recompute the blocks once more.
        """
        for module in self.modules():
            if isinstance(module, AssociativeBlock):
                module.grad_checkpointing = enable
        if hasattr(self.patch_embed, 'set_grad_checkpointing'):
            self.patch_embed.set_grad_checkpointing(enable)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where ``global_pool`` names another ('flatten' included).

        Raises:
            ValueError: For a number of classes that is none, and for a pooling that this model cannot change to. The
                model stays as it was.
        """
        if not hasattr(num_classes, '__index__'):
            raise ValueError(f'num_classes must be an integer, got {num_classes!r}; 0 leaves the classifier out')
        self._check_pool(global_pool)
        is_flat = self.global_pool == 'flatten'
        flatten = is_flat if global_pool is None else global_pool == 'flatten'
        if flatten and not is_flat:
            _check_fixed_tokens(self.dynamic_img_size, getattr(self.patch_drop, 'prob', 0.0))
            if not isinstance(self.fc_norm, nn.Identity):  # type: ignore[has-type]
                self.norm = self.fc_norm  # type: ignore[has-type]  # as at creation: the final norm stands before the tokens are flattened
            self._flatten_tokens(norm=True)
        elif is_flat and not flatten:
            self.fc_norm = nn.Identity().train(self.training)  # the norm over the flattened tokens goes with them
            self.pool_include_prefix = False
            self.num_features = self.head_hidden_size = self.embed_dim
        super().reset_classifier(num_classes, '' if flatten else global_pool)  # notes the norms, for saved models
        if flatten:
            self._flatten()

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change image or patch size as timm does.

        Raises:
            ValueError: If the patches do not fill the image, or if a classifier reads another grid of flattened tokens.
        """
        new_img, new_patch = img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size
        p, q = to_2tuple(new_patch)
        y, x = getattr(self.patch_embed, 'feature_ratio', (1, 1))  # a convolutional stem makes the image smaller
        check_divisible(new_img, (y * p, x * q), self.patch_embed.dynamic_img_pad)
        h, w = to_2tuple(new_img)
        old, grid = self.patch_embed.grid_size, (h // y // p, w // x // q)
        is_resized = self.global_pool == 'flatten' and grid != old
        if is_resized and self.num_classes > 0:
            raise ValueError(
                f'the classifier reads a grid of {old} flattened tokens, img_size={new_img} with '
                f'patch_size={new_patch} gives {grid}; create the model with img_size={new_img}, or '
                "leave 'flatten' first: reset_classifier(num_classes, global_pool='avg')"
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if is_resized:  # no classifier, but a norm over the flattened tokens
            is_trained = all(p.requires_grad for p in self.fc_norm.parameters())
            self._flatten_tokens(norm=isinstance(self.fc_norm, nn.LayerNorm))
            self.fc_norm.requires_grad_(is_trained)

    def fix_init_weight(self) -> None:
        """Scale the last layer of both parts of a block down by its depth, as timm does, where the block has both."""
        for depth, block in enumerate(self.blocks, start=1):
            for part in (getattr(block.attn, 'proj', None), block.mlp.fc2):
                if part is not None:
                    part.weight.data.div_(math.sqrt(2 * depth))

    def _flatten_tokens(self, norm: bool) -> None:
        """Make the classifier read all tokens side by side: (B, N, E) -> (B, N*E)."""
        width = (self.patch_embed.num_patches + self.num_prefix_tokens) * self.embed_dim
        self.fc_norm = nn.LayerNorm(width, **self._factory()) if norm else nn.Identity()  # type: ignore[assignment]
        self.head_hidden_size = width
        self._flatten()

    def _flatten(self) -> None:
        """Flatten in the place of timm's pooling, and make a classifier of that width."""
        self.global_pool = 'flatten'
        self.attn_pool, self.pool_include_prefix = nn.Flatten(1), True  # timm's place for a pooling module
        width, classes = self.head_hidden_size, self.num_classes
        self.head = nn.Linear(width, classes, **self._factory()) if classes > 0 else nn.Identity()
        # timm's num_features is the width of what a model without classifier returns
        self.num_features = self.embed_dim if classes > 0 else width
        for module in (self.attn_pool, self.fc_norm, self.head):  # made anew, in the mode of the model
            module.train(self.training)

    def _factory(self) -> dict[str, Any]:
        """Device and dtype of the model, for a new layer."""
        like = self.patch_embed.proj.weight
        return {'device': like.device, 'dtype': like.dtype}

    def _check_pool(self, global_pool: str | None) -> None:
        if global_pool is None or global_pool == self.global_pool:
            return
        pools = _pools(POOLS, self.has_class_token)
        if global_pool not in pools:
            raise ValueError(
                f'global_pool must be one of {pools} in this model, got {global_pool!r}; create another one with '
                'global_pool='
            )

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and (x.ndim != 4 or x.shape[1] != self.in_chans):
            raise ValueError(
                f'expected images of shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}; '
                'convert them or create the model with in_chans='
            )
        size = self.patch_embed.img_size
        if isinstance(x, Tensor) and self.patch_embed.strict_img_size and tuple(x.shape[-2:]) != size:
            raise ValueError(
                f'expected images of {size}, got {tuple(x.shape[-2:])}; resize them or create the model with img_size='
            )
        if _is_exporting() and any(workspace.is_writing() for workspace in workspaces_in(self)):
            raise ValueError(
                'an exported model cannot write its memory, but in its present mode this one does; call model.eval() '
                "before you export it, and create it with write_mode='train' or 'never'"
            )


def _pools(pools: tuple[str, ...], class_token: bool) -> list[str]:
    """The poolings that a model with or without class token can have."""
    return [pool for pool in pools if pool != 'token' or class_token]


def _check_fixed_tokens(dynamic_img_size: bool, patch_drop_rate: float) -> None:
    if dynamic_img_size or patch_drop_rate > 0:
        raise ValueError(
            f"global_pool='flatten' needs a fixed number of tokens, got dynamic_img_size={dynamic_img_size} and "
            f"patch_drop_rate={patch_drop_rate:g}; leave them out, or take global_pool='avg'"
        )


def _is_exporting() -> bool:
    # torch.compiler.is_exporting() reads this flag, but the compiler of torch 2.9 takes it for true in any graph.
    return torch.jit.is_tracing() or bool(torch.compiler._is_exporting_flag)


def without_subclass(x: Tensor) -> Tensor:
    """Images without what a subclass of a tensor adds (fastai's, MONAI's, torchvision's): operations would copy it."""
    is_annotated = isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter)
    return x.as_subclass(Tensor) if is_annotated and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ else x
