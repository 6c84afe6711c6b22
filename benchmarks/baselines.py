"""What the paper compares itself with, in small: models that share stem and head, and differ in what mixes the tokens.

    python benchmarks/baselines.py    # sizes and parameters

:func:`create` makes a model for images, or for images and questions (``question_dim=18`` for Sort-of-CLEVR).
"""

import argparse
from typing import Any

import timm
import torch
from mixers import Coordination, Mixer, Perceiver, SetTransformer, ViT
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_ait import NormalizedPatchEmbed  # and registers the models
from timm_ait.balance import attach, track

HEADS = ('flatten', 'avg')

LIKE_VIT_B: dict[str, Any] = dict(embed_dim=768, num_heads=12, mlp_ratio=4.0)
SMALL: dict[str, Any] = dict(embed_dim=256, depth=4, num_heads=4, mlp_ratio=2.0)
LOW_RANK: dict[str, Any] = dict(num_slots=32, slot_dim=32, top_k=512, across_batch=True, balance_weight=0.01)
# Sizes of Coordination are its own (top_k=5 for Sort-of-CLEVR), those of Set Transformer and Perceiver go with it.
CATALOGUE: dict[str, tuple[type[Mixer], dict[str, Any]]] = {
    'vit_small': (ViT, dict(LIKE_VIT_B, depth=2)),
    'vit_medium': (ViT, dict(LIKE_VIT_B, depth=6)),
    'vit_base': (ViT, dict(LIKE_VIT_B, depth=12)),
    'coordination': (Coordination, dict(SMALL, num_slots=8, slot_dim=256, top_k=20)),
    'coordination_d': (Coordination, dict(SMALL, **LOW_RANK)),
    'coordination_h': (Coordination, dict(SMALL, num_slots=8, slot_dim=256, top_k=20, hopfield=True)),
    'coordination_dh': (Coordination, dict(SMALL, **LOW_RANK, hopfield=True)),
    'set_transformer': (SetTransformer, dict(SMALL, num_slots=32)),
    'perceiver': (Perceiver, dict(SMALL, num_slots=32, latent_depth=2)),
}
# The paper's own models, as timm makes them, and the millions of parameters that the paper gives. Its counts of AiT
# include up to 109,056 parameters that its code never uses.
AIT: dict[str, dict[str, Any]] = {
    'ait_small_patch4_32': {},
    'ait_medium_patch4_32': {},
    'ait_base_patch4_32': {},
    'ait_small_patch4_32, one block': dict(depth=1, embed_dim=256, num_heads=4, mlp_ratio=2.0),
}
PUBLISHED = dict(zip(('vit_base', *AIT), (85.7, 15.8, 45.9, 91.0, 1.0), strict=True))


class Stem(nn.Module):
    """The paper's patches, with a learned position embedding if wanted, after a token for the question if there is one.

    The question goes through LayerNorm, Linear, LayerNorm, as a patch does.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, pos_embed: bool, question_dim: int
    ) -> None:
        super().__init__()
        self.patch_embed = NormalizedPatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches, self.question_dim = self.patch_embed.num_patches, question_dim
        self.pos_embed, self.question_embed = None, None
        if pos_embed:
            self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(num_patches, embed_dim), std=0.02))
        if question_dim:
            self.question_embed = nn.Sequential(
                nn.LayerNorm(question_dim), nn.Linear(question_dim, embed_dim), nn.LayerNorm(embed_dim)
            )
        self.num_tokens = num_patches + (question_dim > 0)

    def forward(self, images: Tensor, question: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), questions (B, Q) -> tokens (B, N, E)."""
        got = None if question is None else tuple(question.shape)
        if (got or (0, 0))[-1] != self.question_dim:
            raise ValueError(f'expected questions of {self.question_dim} bits (0: none), got {got}; see question_dim=')
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.question_embed is not None:
            x = torch.cat([self.question_embed(question)[:, None], x], dim=1)
        return x


class Head(nn.Module):
    """LayerNorm and Linear over the flattened tokens ('flatten') or their mean ('avg')."""

    def __init__(self, pool: str, num_tokens: int, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        if pool not in HEADS:
            raise ValueError(f'expected a head out of {HEADS}, got {pool!r}')
        self.is_mean = pool == 'avg'
        width = embed_dim if self.is_mean else num_tokens * embed_dim
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, E) -> logits (B, num_classes)."""
        x = x.mean(dim=1) if self.is_mean else x.flatten(1)  # (B, N, E) -> (B, E) or (B, N*E)
        return self.fc(self.norm(x))


class Baseline(nn.Module):
    """Stem, what mixes the tokens, and head. In training the logits bring the balance loss to the gradient."""

    def __init__(self, stem: Stem, mixer: nn.Module, head: Head) -> None:
        super().__init__()
        self.stem, self.mixer, self.head = stem, mixer, head

    def forward(self, images: Tensor, question: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), and questions (B, Q) where the model takes them -> logits (B, num_classes)."""
        x, balance = self.mixer(self.stem(images, question))
        logits = self.head(x)
        return track(attach(logits, balance)) if self.training and balance.requires_grad else logits


def create(
    name: str,
    img_size: int = 32,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 10,
    question_dim: int = 0,
    pos_embed: bool = False,
    head: str = 'flatten',
    **sizes: Any,
) -> Baseline:
    """Make a baseline.

    Args:
        name: In the catalogue.
        img_size: Side of the images.
        patch_size: Side of a patch.
        in_chans: Channels of the images.
        num_classes: Classes or answers.
        question_dim: Bits of a question, 0 for no questions.
        pos_embed: Whether tokens say where they are. In the paper they do not.
        head: What the classifier reads: 'flatten' for all tokens, as in the paper, or 'avg'.
        sizes: Instead of those of the catalogue; arguments of the class in `mixers.py`.

    Raises:
        ValueError: For an unknown name or head.
    """
    if name not in CATALOGUE:
        raise ValueError(f'expected a name out of {list(CATALOGUE)}, got {name!r}')
    mixer_class, defaults = CATALOGUE[name]
    sizes = {**defaults, **sizes}
    stem = Stem(img_size, patch_size, in_chans, sizes['embed_dim'], pos_embed, question_dim)
    mixer = mixer_class(**sizes)
    num_tokens = mixer.num_outputs(stem.num_tokens)
    return Baseline(stem, mixer, Head(head, num_tokens, sizes['embed_dim'], num_classes))


def main(argv: list[str] | None = None) -> None:
    """Print the sizes of all models for images of 32x32 in 10 classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    print('| model | depth | width | heads | slots | parameters, M | in the paper, M |\n|---|---|---|---|---|---|---|')
    for name, (_, sizes) in CATALOGUE.items():
        slots = f'{sizes["num_slots"]} x {sizes.get("slot_dim", sizes["embed_dim"])}' if 'num_slots' in sizes else ''
        _print_row(name, create(name), f'{sizes["depth"]} | {sizes["embed_dim"]} | {sizes["num_heads"]} | {slots}')
    for name, sizes in AIT.items():
        model = timm.create_model(name.split(',')[0], **sizes)
        block = model.blocks[0]
        slots = ' x '.join(str(size) for size in block.mlp.memory.shape)
        _print_row(name, model, f'{len(model.blocks)} | {model.embed_dim} | {block.attn.num_heads} | {slots}')


def _print_row(name: str, model: nn.Module, sizes: str) -> None:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'| {name} | {sizes} | {parameters:.2f} | {PUBLISHED.get(name, "")} |')


if __name__ == '__main__':
    main()
