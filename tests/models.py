"""Small models and images for the tests of several files."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ait import AssociativeTransformer, GlobalWorkspace

CLASSES, SIDE = 13, 32
PAPER = ['ait_small_patch4_32', 'ait_medium_patch4_32', 'ait_base_patch4_32', 'test_ait']
VIT = ['ait_small', 'ait_medium', 'ait_base']
CONV = 'ait_tiny_conv4_32'
SMALL = dict(
    img_size=SIDE, patch_size=8, embed_dim=34, depth=2, num_heads=2, num_classes=CLASSES,
    num_slots=7, slot_dim=5, write_heads=3, bottleneck=11,
)  # fmt: skip
LAYOUTS = pytest.mark.parametrize('layout', ['paper', 'vit'])


class ByName(GlobalWorkspace):
    """A layer that calls its retrieval by keyword."""

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        return self.retrieval(base=h, h=h, attractors=self.attractors(memory, h.dtype), scale=self.scale)


class Unread(GlobalWorkspace):
    """A layer that retrieves nothing."""

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        return h


def make_model(layout: str = 'paper', **kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    name = dict(paper='ait_small_patch4_32', vit='ait_small')[layout]
    return timm.create_model(name, **dict(SMALL, **kwargs)).train()


def images(count: int = 3, seed: int = 0, side: int = SIDE, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def memories(model: nn.Module) -> list[Tensor]:
    """Also of a model that something has wrapped."""
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith('.memory')]


def train_step(model: nn.Module, seed: int = 0) -> Tensor:
    logits = model(images(seed=seed))
    F.cross_entropy(logits, torch.arange(len(logits))).backward()
    return logits


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
