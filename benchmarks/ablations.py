"""The Associative Transformer with one part changed.

    python benchmarks/ablations.py    # what each of them changes, and its parameters

:func:`create` makes models with the stem and the head of `baselines.py`, for images or for images and questions.
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from baselines import HEADS, LIKE_VIT_B, Baseline, Head, Stem
from mixers import ViT
from runs import count_parameters
from torch import Tensor, nn
from variants import (
    ADDITIVE,
    COMPETING,
    IMAGE,
    CompetingSlots,
    CosineLogits,
    CrossAttentionRead,
    FaintLogits,
    NoMemory,
    OrthogonalMemory,
    ResetMemory,
    SeparateAttractors,
    UnitLogits,
)

from timm_ait import AssociativeTransformer, GlobalWorkspace, NormalizedPatchEmbed, RelationalTransformer

ALL_TOKENS = 2**31  # a bottleneck that no batch reaches
SIZES: dict[str, Any] = dict(LIKE_VIT_B, depth=2)  # of the paper's ablations
REGISTERS = 'vit_registers'


class RegisterViT(ViT):
    """A ViT that has as many register tokens as the workspace has slots (Darcet et al., arXiv:2309.16588)."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, num_slots: int = 32) -> None:
        super().__init__(embed_dim, depth, num_heads, mlp_ratio)
        self.registers = nn.Parameter(nn.init.normal_(torch.empty(num_slots, embed_dim), std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, E) -> (B, N, E), without the registers, and a balance loss () of zero."""
        registers = self.registers.expand(len(x), -1, -1)
        return self.blocks(torch.cat([registers, x], dim=1))[:, len(self.registers) :], x.new_zeros(())


@dataclass(frozen=True)
class Ablation:
    """What changes.

    Attributes:
        text: In words.
        layer: The workspace.
        args: Keywords of the model.
    """

    text: str
    layer: type[GlobalWorkspace] = GlobalWorkspace
    args: dict[str, Any] = field(default_factory=dict)


ABLATIONS: dict[str, Ablation] = {
    'ait': Ablation('the published rule with a trained write'),
    'ait_detached': Ablation('no gradient reaches the write, as in the published code', args=dict(write_grad=False)),
    'ait_no_bottleneck': Ablation('slots attend to all tokens', args=dict(bottleneck=ALL_TOKENS)),
    'ait_no_memory': Ablation('no memory', NoMemory, dict(write_mode='never')),
    'ait_cross_attention': Ablation('cross-attention reads the memory', CrossAttentionRead, dict(retrieval_scale=None)),
    'ait_no_balance': Ablation('no balance loss', args=dict(balance_weight=0.0)),
    'ait_reset': Ablation('the memory starts anew every epoch', ResetMemory),
    'ait_frozen': Ablation('orthogonal slots that nothing writes', OrthogonalMemory, dict(write_mode='never')),
    'ait_distinct': Ablation('a write that leaves the slots distinct', args=dict(write_rule='distinct')),
    'ait_image': Ablation('the same, for each image', args=IMAGE),
    'ait_additive': Ablation('a copy for each image that adds what it reads', args=ADDITIVE),
    'ait_image_logits': Ablation("ait_image with the logits of 'additive'", UnitLogits, IMAGE),
    'ait_additive_sum': Ablation('ait_additive with the logits of ait_image', FaintLogits, ADDITIVE),
    'ait_image_competing': Ablation('ait_image with slots that compete for tokens', CompetingSlots, IMAGE),
    'ait_additive_competing': Ablation('ait_additive with slots that compete for tokens', args=COMPETING),
    'ait_additive_cosine': Ablation('ait_additive with cosines for logits', CosineLogits, ADDITIVE),
    'ait_additive_separate': Ablation('ait_additive and a loss that parts attractors', SeparateAttractors, ADDITIVE),
    'ait_beta_4': Ablation('beta 4 in the place of 1', args=dict(beta=4.0)),
    'ait_slots_128': Ablation('128 slots in the place of 32', args=dict(num_slots=128)),
    'ait_slot_dim_8': Ablation('slots of width 8 in the place of 32', args=dict(slot_dim=8)),
    'ait_bottleneck_64': Ablation('slots read 64 tokens in the place of 512', args=dict(bottleneck=64)),
    'ait_decay_half': Ablation('a decay of 0.5 in the place of 0.9', args=dict(memory_decay=0.5)),
    'ait_steps_3': Ablation('three steps of the retrieval in the place of one', args=dict(retrieval_steps=3)),
}
ABLATIONS |= {
    f'ait_no_attention{name.removeprefix("ait")}': replace(
        ablation, text=f'no self-attention; {ablation.text}', args=dict(ablation.args, attention=False)
    )
    for name, ablation in ABLATIONS.items()
    if name in ('ait', 'ait_no_memory', 'ait_frozen', 'ait_distinct') or name.startswith(('ait_image', 'ait_additive'))
}
NAMES = (*ABLATIONS, REGISTERS)


def without_memory(name: str) -> str | None:
    """Name of the model that has no memory and is the same in all else; None if there is none."""
    control = 'ait_no_attention_no_memory' if name.startswith('ait_no_attention') else 'ait_no_memory'
    return control if name in ABLATIONS and name != control else None


def create(
    name: str,
    img_size: int = 32,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 10,
    question_dim: int = 0,
    pos_embed: bool = False,
    head: str = 'flatten',
    **given: Any,
) -> nn.Module:
    """Make a model, with the arguments of :func:`baselines.create`.

    Args:
        name: In :data:`NAMES`.
        img_size: Side of the images.
        patch_size: Side of a patch.
        in_chans: Channels of the images.
        num_classes: Classes or answers.
        question_dim: Bits of a question, 0 for no questions.
        pos_embed: Whether tokens say where they are. In the paper they do not.
        head: What the classifier reads: 'flatten' for all tokens, as in the paper, or 'avg' for their mean.
        given: Sizes instead of those of AiT-Small; other keywords of the model.

    Raises:
        ValueError: For an unknown name or head, and for a keyword that the model sets itself.
    """
    if name not in NAMES:
        raise ValueError(f'expected a name out of {NAMES}, got {name!r}')
    if head not in HEADS:
        raise ValueError(f'expected a head out of {HEADS}, got {head!r}')
    sizes = {**SIZES, **given}
    if name == REGISTERS:
        stem = Stem(img_size, patch_size, in_chans, sizes['embed_dim'], pos_embed, question_dim)
        last = Head(head, stem.num_tokens, sizes['embed_dim'], num_classes)
        return Baseline(stem, RegisterViT(**sizes), last)
    ablation = ABLATIONS[name]
    if fixed := sorted(ablation.args.keys() & given.keys()):
        raise ValueError(f'{name} sets {", ".join(fixed)} itself; leave it out')
    if question_dim:
        sizes['question_dim'] = question_dim
    base = RelationalTransformer if question_dim else AssociativeTransformer
    return type(base.__name__, (base,), {'workspace_layer': ablation.layer})(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        pos_embed='learn' if pos_embed else 'none',
        no_embed_class=True,
        class_token=False,
        qkv_bias=False,
        final_norm=head == 'avg',  # timm puts it after the mean
        global_pool=head,
        pool_include_prefix=True,
        weight_init='skip',
        embed_layer=NormalizedPatchEmbed,
        norm_layer=nn.LayerNorm,
        **{**sizes, **ablation.args},
    )


def main(argv: list[str] | None = None) -> None:
    """Print what each model changes, and its parameters, for images of 32x32 in 10 classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    print('| model | what changes | trained parameters, M | beside AiT, M |\n|---|---|---|---|')
    texts = {name: ablation.text for name, ablation in ABLATIONS.items()}
    texts[REGISTERS] = 'a ViT with 32 register tokens'
    counts = {name: count_parameters(create(name)) / 1e6 for name in texts}
    for name, text in texts.items():
        print(f'| {name} | {text} | {counts[name]:.2f} | {counts[name] - counts["ait"]:+.2f} |')


if __name__ == '__main__':
    main()
