"""What a layer remembers of its last writes: for the balance loss, and for gradient checkpointing around it."""

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ['Replay', 'snapshot']

MOST_FORWARDS = 64  # between a forward and its backward pass


def snapshot(memory: Tensor) -> Tensor:
    """A copy of the memory before a write, which the backward pass reads.

    NOTE A compiler takes a clone for something that it can compute again in the backward pass, and would then read the
    memory after the write. It does not look into an operation of our own.
    """
    return torch.ops.timm_ait.snapshot(memory) if torch.compiler.is_compiling() else memory.clone()


@torch.library.custom_op('timm_ait::snapshot', mutates_args=())
def _snapshot(memory: Tensor) -> Tensor:
    return memory.clone()


@_snapshot.register_fake
def _(memory: Tensor) -> Tensor:
    return torch.empty_like(memory)


class Replay:
    """The memory before the last writes, and the balance loss of the last one.

    Gradient checkpointing around a layer or a model runs a forward a second time, inside the backward pass. The second
    run must start from the same memory, and must not write. One token of the input tells which forward it repeats.

    Where a backward pass adds the balance loss by itself, its graph lives no longer than the output of the forward:
    here is a weak reference, and the value. Else it lives until the next forward, for whoever adds it to a loss.
    """

    def __init__(self) -> None:
        self._tokens: deque[Tensor] = deque(maxlen=MOST_FORWARDS)
        self._memories: deque[Tensor] = deque(maxlen=MOST_FORWARDS)
        self._loss: Any = None
        self._value: Tensor | None = None

    def note(self, before: Tensor, balance_loss: Tensor, x: Tensor, is_automatic: bool) -> None:
        """Note a write of the tokens ``x`` (B, N, E) into the memory ``before`` (M, D)."""
        self._value = balance_loss.detach()
        if torch.compiler.is_compiling():
            self._loss = balance_loss
            return
        self._loss = weakref.ref(balance_loss) if is_automatic else balance_loss
        self._tokens.append(x.detach().flatten(0, -2)[-1].clone())  # (B, N, E) -> (B*N, E) -> (E,)
        self._memories.append(before)

    def memory_before(self, x: Tensor) -> Tensor:
        """The memory (M, D) from which the forward of the tokens ``x`` (B, N, E) started.

        Raises:
            RuntimeError: If there was none.
        """
        if not self._tokens:
            raise RuntimeError(
                'a backward pass runs this layer in training mode, but no forward came before it; for gradient '
                'checkpointing of a compiled model call model.set_grad_checkpointing() instead'
            )
        token = x.detach().flatten(0, -2)[-1]
        distance = (torch.stack(list(self._tokens)) - token).abs().sum(dim=-1)  # (F, E) -> (F,)
        return torch.stack(list(self._memories)).index_select(0, distance.argmin().view(1)).squeeze(0)

    def balance_loss(self) -> Tensor | None:
        """The balance loss of the last write; without graph when the output of its forward is gone."""
        loss = self._loss() if isinstance(self._loss, weakref.ref) else self._loss
        return self._value if loss is None else loss

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Replay':
        return Replay()  # the graph belongs to a step, not to a module

    def __reduce__(self) -> tuple[Any, ...]:
        return Replay, ()
