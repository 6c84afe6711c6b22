"""Associative Transformers that answer a question about an image, for Sort-of-CLEVR.

The question becomes one token before those of the image, as in the authors' code. ``timm.list_models`` finds the models
with ``module='relational'``, and not with ``module='ait'``: timm's own model tests give a model an image alone.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .ait import TEST_ARGS, create_ait, make_cfg, paper_args
from .arguments import is_count
from .balance import plain
from .transformer import AssociativeTransformer, without_subclass

__all__ = ['RelationalTransformer']


class RelationalTransformer(AssociativeTransformer):
    """An :class:`AssociativeTransformer` of images and questions.

    ``LayerNorm``, ``Linear``, ``LayerNorm`` make one token of the question. It stands before the tokens of the image,
    after class and register tokens if there are any. It has no position embedding, as these have none.

    Args:
        img_size: As in timm.
        patch_size: As in timm.
        question_dim: Q, bits of a question.
        global_pool: As in :class:`AssociativeTransformer`.
        fc_norm: As in :class:`AssociativeTransformer`.
        no_embed_class: Must be True.
        **vit_args: Keywords of :class:`AssociativeTransformer`.

    Raises:
        ValueError: For an argument out of range or sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 75,
        patch_size: int | tuple[int, int] = 15,
        question_dim: int = 18,
        global_pool: str = 'flatten',
        fc_norm: bool | None = None,
        no_embed_class: bool = True,
        **vit_args: Any,
    ) -> None:
        if not is_count(question_dim):
            raise ValueError(f'question_dim must be an integer of at least 1, got {question_dim!r}; 18 is usual')
        if not no_embed_class:
            raise ValueError('only patches have a position here, got no_embed_class=False; leave it out')
        fix_init = vit_args.pop('fix_init', False)  # scales once, when all parts are there
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool=global_pool,
            fc_norm=fc_norm,
            no_embed_class=True,
            **vit_args,
        )
        dd = self._factory()
        self.question_dim = question_dim
        self.question_embed = nn.Sequential(
            nn.LayerNorm(question_dim, **dd),
            nn.Linear(question_dim, self.embed_dim, **dd),
            nn.LayerNorm(self.embed_dim, **dd),
        )
        self.num_prefix_tokens += 1
        if global_pool == 'flatten':
            self._flatten_tokens(norm=fc_norm is None or bool(fc_norm))
        head = self.head
        del self.head
        self.head = head  # the last of the parameters, as timm's clipping without the classifier expects
        self.fix_init = fix_init
        self.init_weights(needs_reset=False)  # once more, with the parts that are new

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        question: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Answer questions (B, Q) about images (B, C, H, W): logits (B, num_classes)."""
        if torch.jit.is_scripting():
            if self.training:
                raise ValueError('a scripted model only evaluates, its memory is fixed; call eval() on it')
            return self.forward_head(self.run_blocks(x, question, attn_mask, is_causal))
        else:
            x = plain(self.forward_features(x, question, attn_mask=attn_mask, is_causal=is_causal))
            return self._track(self.forward_head(x))

    def forward_features(  # type: ignore[override]
        self,
        x: Tensor,
        question: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Tokens (B, N, E) of images (B, C, H, W) and questions (B, Q), after all blocks and the final norm."""
        self._check_input(x)
        question = without_subclass(self._check_question(x, question))
        return self._track(self.run_blocks(without_subclass(x), question, attn_mask=attn_mask, is_causal=is_causal))

    def run_blocks(self, x: Tensor, question: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """:meth:`forward_features` without its checks: (B, C, H, W), (B, Q) -> (B, N, E)."""
        if question is None:
            raise ValueError('expected a question for every image, got none')
        x = self.patch_drop(self._pos_embed(self.patch_embed(x)))
        x = self.norm_pre(self.insert_question(x, question))
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.norm(x)

    def insert_question(self, x: Tensor, question: Tensor) -> Tensor:
        """Put the token of the question before those of the patches: (B, N-1, E), (B, Q) -> (B, N, E)."""
        first = self.num_prefix_tokens - 1
        token = self.question_embed(question.to(x.dtype)).unsqueeze(1)  # (B, Q) -> (B, E) -> (B, 1, E)
        return torch.cat([x[:, :first], token, x[:, first:]], dim=1)

    def forward_intermediates(self, x: Tensor, question: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The outputs of several blocks, with the other arguments and the results of timm's method of this name."""
        checked = self._check_question(x, question)
        # timm's method knows images alone: the question enters after the last of its steps that are about patches
        handle = self.patch_drop.register_forward_hook(lambda module, inputs, kept: self.insert_question(kept, checked))
        try:
            return super().forward_intermediates(x, *args, **kwargs)
        finally:
            handle.remove()

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: this older form of :meth:`forward_intermediates` has no place for a question."""
        raise ValueError('get_intermediate_layers knows no question; take forward_intermediates(image, question)')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name the groups for layer decay as timm does, with the layers of the question in the stem."""
        groups = super().group_matcher(coarse)
        return dict(groups, stem=f'{groups["stem"]}|question_embed')

    def _check_question(self, x: Tensor, question: Any) -> Tensor:
        got = tuple(question.shape) if isinstance(question, Tensor) else question
        if not isinstance(question, torch.fx.Proxy) and got != (x.shape[0], self.question_dim):
            raise ValueError(
                f'expected a question for every image, shape {(x.shape[0], self.question_dim)}, got {got}; call '
                'model(image, question), or create the model with question_dim='
            )
        return question


def _sort_of_clevr_cfg() -> dict[str, Any]:
    pixels = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # in [0, 1], as the authors' are
    return make_cfg(num_classes=10, input_size=(3, 75, 75), crop_pct=1.0, **pixels)


default_cfgs = generate_default_cfgs(
    {
        'ait_small_relational_75.sort_of_clevr': _sort_of_clevr_cfg(),
        'ait_base_relational_75.sort_of_clevr': _sort_of_clevr_cfg(),
        'test_ait_relational.sort_of_clevr': _sort_of_clevr_cfg(),
    }
)


def _create_relational(variant: str, pretrained: bool, depth: int, kwargs: dict[str, Any]) -> Any:
    if kwargs.get('features_only'):
        raise ValueError(
            f'features_only takes images alone, and {variant} answers questions about them; call '
            'model.forward_intermediates(image, question)'
        )
    model_args = paper_args(depth, dict(dict(patch_size=15), **kwargs))
    return create_ait(variant, pretrained, model_class=RelationalTransformer, **model_args)


@register_model
def ait_small_relational_75(pretrained: bool = False, **kwargs: Any) -> RelationalTransformer:
    """AiT-Small of the paper's relational experiments: depth 2, 15.8 M parameters."""
    return _create_relational('ait_small_relational_75', pretrained, 2, kwargs)


@register_model
def ait_base_relational_75(pretrained: bool = False, **kwargs: Any) -> RelationalTransformer:
    """AiT-Base of the paper's relational experiments: depth 12, 91.0 M parameters."""
    return _create_relational('ait_base_relational_75', pretrained, 12, kwargs)


@register_model
def test_ait_relational(pretrained: bool = False, **kwargs: Any) -> RelationalTransformer:  # noqa: PT028
    """The relational model in small, for tests: depth 2, width 128."""
    return _create_relational('test_ait_relational', pretrained, 2, dict(TEST_ARGS, **kwargs))
