"""Small tools around PyTorch's layers: dtypes under autocast, and layers that somebody has changed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['OutputNorm', 'is_plain', 'without_autocast']

PLAIN = (nn.Linear, nn.LayerNorm, nn.Conv2d)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside it, operations on the device of ``x`` do not change dtypes. The meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class OutputNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input. Under autocast, PyTorch's own would return a copy in float32."""

    def forward(self, f: Tensor) -> Tensor:
        """Normalise ``f`` (..., E)."""
        if torch.jit.is_scripting():
            return F.layer_norm(f, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            with without_autocast(f):
                weight, bias = self.weight.to(f.dtype), self.bias.to(f.dtype)
                return F.layer_norm(f, self.normalized_shape, weight, bias, self.eps)


def is_plain(*layers: nn.Module) -> bool:
    """Whether the parameters say all about these layers, so that a formula may read them without a call.

    False for layers of another class (LoRA, quantised, parametrised, sharded), for layers with hooks, and for layers
    whose forward or weight somebody has replaced (offloading, tensor subclasses). These must be called.
    """
    return all(
        type(layer) in PLAIN
        and type(layer.weight) in (nn.Parameter, Tensor)
        and 'forward' not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )
