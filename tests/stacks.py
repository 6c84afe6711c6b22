"""A small model with two blocks, a batch of images, and its gradients: for the tests of what is done to a model."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_ait import AssociativeTransformer

B, CLASSES = 6, 7

torch.manual_seed(0)
IMAGES, TARGET = torch.randn(B, 3, 32, 32), torch.randint(0, CLASSES, (B,))


def make_model(**kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=11, balance_weight=0.1)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    def name_of(name: str) -> str:
        return name.replace('_orig_mod.', '').replace('_checkpoint_wrapped_module.', '')

    return {name_of(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)).item() for k in b)
