"""Small tools around PyTorch's layers: dtypes under autocast, layers that somebody has changed, orthogonal rows."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    'OutputNorm',
    'call_wide',
    'is_hooked',
    'is_plain',
    'orthogonalise',
    'rms_norm',
    'unit_rows',
    'without_autocast',
]

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
        type(layer) in PLAIN and type(layer.weight) in (nn.Parameter, Tensor) and not is_hooked(layer)
        for layer in layers
    )


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call of the layer does more than its class says: it has hooks, or somebody has replaced its forward."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks) or 'forward' in vars(layer)


def call_wide(layer: Any, x: Tensor) -> Tensor:
    """A norm or a linear layer without bias. Its result has the dtype of its input; a plain one computes in it too."""
    if not is_plain(layer):
        like = next((p for p in layer.parameters() if p.is_floating_point()), x)  # a quantised layer may have none
        return layer(x.to(like.dtype)).to(x.dtype)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)
    return F.linear(x, layer.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """Rows (..., D) whose elements are brought to a mean square of 1; zeros stay zeros."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out a branch, but not half of a condition
        if torch.onnx.is_in_onnx_export():  # the older exporter lacks the norm
            return x / x.square().mean(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
    return F.rms_norm(x, [x.shape[-1]], eps=1e-24)


def unit_rows(x: Tensor) -> Tensor:
    """Rows (..., D) brought to length 1; zeros stay zeros.

    For what is trained: PyTorch has one operation each way for this norm on a GPU, and many for ``F.normalize``.
    Without gradients ``F.normalize`` is the shorter one on a CPU.
    """
    return rms_norm(x) * x.shape[-1] ** -0.5


def orthogonalise(slots: Tensor) -> Tensor:
    """Turn slots (..., M, D) towards the nearest orthogonal ones, by five Newton-Schulz steps, with unit rows.

    Each step ``X <- 1.5 X - 0.5 X X^T X`` brings the singular values nearer to 1. More than D slots of width D cannot
    be orthogonal: they become evenly spread.
    """
    x = slots.reshape(-1, slots.shape[-2], slots.shape[-1])  # (B, M, D), for products and sums in one operation
    gram = torch.bmm(x, x.transpose(1, 2))
    bound = gram.abs().sum(dim=-1).amax(dim=-1).clamp_min(1).sqrt()  # of the largest singular value
    x = x / bound.unsqueeze(-1).unsqueeze(-1)
    for _ in range(5):
        x = torch.baddbmm(x, torch.bmm(x, x.transpose(1, 2)), x, beta=1.5, alpha=-0.5)
    return unit_rows(x).view(slots.shape)
