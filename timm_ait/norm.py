"""The LayerNorm on the output of the feed-forward part, whose result need not be kept for the backward pass.

A ViT's block has no such norm. Kept, its input and output together would cost 12 % of what such a block keeps.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ['OutputNorm', 'rebuilt_for_backward', 'without_autocast']


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it, operations on the device of ``x`` keep their dtypes. The meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class OutputNorm(nn.LayerNorm):
    """LayerNorm in the dtype of what comes in, under autocast too, where PyTorch's own would keep a wider copy."""

    def forward(self, f: Tensor) -> Tensor:
        """Normalise ``f`` (..., E)."""
        if torch.jit.is_scripting():
            return F.layer_norm(f, self.normalized_shape, self.weight, self.bias, self.eps)
        with without_autocast(f):
            return F.layer_norm(f, *self.arguments(f.dtype))

    @torch.jit.unused
    def arguments(self, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
        """What :func:`torch.nn.functional.layer_norm` takes beside its input."""
        return self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps

    @torch.jit.unused
    def rebuilt(self, f: Tensor, h: Tensor) -> AbstractContextManager[Any]:
        """Within it, ``h``, the norm of ``f``, is not kept for the backward pass: it is made again of ``f``."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what it keeps
            return nullcontext()
        if h.grad_fn is None or h.grad_fn.name() != 'NativeLayerNormBackward0':  # a hook may have put another in
            return nullcontext()
        shape, weight, bias, eps = self.arguments(f.dtype)
        return rebuilt_for_backward(h, partial(F.layer_norm, f.detach(), shape, weight.detach(), bias.detach(), eps))


class rebuilt_for_backward(saved_tensors_hooks):  # noqa: N801  a context manager, called like a function
    """Within it, whatever autograd saves of ``x`` and its views is dropped, and made again in the backward pass.

    It is made once for all the operations that saved it, and let go after the last of them.

    Args:
        x: A tensor that is cheap to compute again.
        make: Computes it, without graph.
    """

    def __init__(self, x: Tensor, make: Callable[[], Tensor]) -> None:
        storage, version = weakref.ref(x.untyped_storage()), x._version
        made: list[Tensor] = []
        views = served = 0

        def pack(saved: Tensor) -> Any:
            nonlocal views
            if saved.untyped_storage() is not storage() or saved._version != version:
                return saved
            views += 1
            return saved.shape, saved.stride(), saved.storage_offset()

        def unpack(packed: Any) -> Tensor:
            nonlocal served
            if isinstance(packed, Tensor):
                return packed
            if not made:
                made.append(make())
            view = made[0].as_strided(*packed)
            served += 1
            if served % views == 0:
                made.clear()
            return view

        super().__init__(pack, unpack)
