"""What a layer remembers of its last writes: for the balance loss, and for gradient checkpointing around it."""

import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = ['Replay', 'in_present_mode', 'out_of_sight', 'snapshot']

MOST_FORWARDS = 64  # between a forward and its backward pass
FAR = 0.5  # above this part of their mean size, the mean distance of two inputs is no rounding: they are not the same
FORGOTTEN = (
    f'gradient checkpointing repeats a forward that is not among the last {MOST_FORWARDS} of a layer of timm_ait, or '
    'repeats it with other random numbers; its gradients may be wrong. Call model.set_grad_checkpointing() instead'
)


def out_of_sight() -> AbstractContextManager[Any]:
    """For operations that a forward has and its repetition has not, or the other way round.

    Selective checkpointing keeps results of the forward by the number of their operation. So it must not see these.
    """
    if not torch.compiler.is_compiling():
        selective = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
        if any(isinstance(mode, selective) for mode in _get_current_dispatch_mode_stack()):
            return _disable_current_modes()
    return nullcontext()


def snapshot(memory: Tensor) -> Tensor:
    """A copy of the memory before a write, which the backward pass reads.

    NOTE A compiler takes a clone for something that it can compute again in the backward pass, and would then read the
    memory after the write. It does not look into an operation of our own.
    """
    if torch.compiler.is_compiling():
        return torch.ops.timm_ait.snapshot(memory)
    with out_of_sight():
        return memory.clone()


@torch.library.custom_op('timm_ait::snapshot', mutates_args=())
def _snapshot(memory: Tensor) -> Tensor:
    return memory.clone()


@_snapshot.register_fake
def _(memory: Tensor) -> Tensor:
    return torch.empty_like(memory)


def in_present_mode(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a module, which a backward pass repeats with all its parts in the mode that they have now."""
    if torch.compiler.is_compiling():  # a graph has its mode
        return function
    modes = {part: part.training for part in module.modules()}

    def repeat(*args: Any) -> Any:
        before = {part: part.training for part in modes}
        try:
            _set_modes(modes)
            return function(*args)
        finally:
            _set_modes(before)

    return repeat


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for part, is_training in modes.items():
        if part.training != is_training:
            part.training = is_training


@dataclass
class _Forward:
    """A forward that wrote.

    Attributes:
        shape: Of its input.
        sample: (n,) some elements of its input.
        before: (M, D) the memory before the write.
        has_graph: Whether it ran with gradients.
        repeats: How often it was repeated.
    """

    shape: torch.Size
    sample: Tensor
    before: Tensor
    has_graph: bool
    repeats: int = 0


def _sample(x: Tensor) -> Tensor:
    """About a thousand elements from all over ``x``. The step is odd, so that they lie in different channels."""
    return x.detach().flatten()[:: x.numel() // 1024 | 1]


class Replay:
    """The memory before the last writes, and the balance loss of the last one.

    Gradient checkpointing around a layer or a model runs a forward a second time, inside the backward pass. The second
    run must start from the same memory, and must not write. A sample of the input tells which forward it repeats; of
    several with the same input, the newest one with gradients that was repeated least.

    Where a backward pass adds the balance loss by itself, its graph lives no longer than the output of the forward:
    here is a weak reference, and the value. Else it lives until the next forward, for whoever adds it to a loss.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=MOST_FORWARDS)
        self._loss: Any = None
        self._value: Tensor | None = None

    def note(self, before: Tensor, balance_loss: Tensor, x: Tensor, is_automatic: bool) -> None:
        """Note a write of the tokens ``x`` (B, N, E) into the memory ``before`` (M, D)."""
        self._value = balance_loss.detach()
        if torch.compiler.is_compiling():
            self._loss = balance_loss
            return
        self._loss = weakref.ref(balance_loss) if is_automatic else balance_loss
        self._forwards.append(_Forward(x.shape, _sample(x).clone(), before, has_graph=x.requires_grad))

    def memory_before(self, x: Tensor) -> Tensor:
        """The memory (M, D) from which the forward of the tokens ``x`` (B, N, E) started.

        Raises:
            RuntimeError: If there was none.
        """
        like = x.shape, x.device
        alike = [forward for forward in reversed(self._forwards) if (forward.shape, forward.sample.device) == like]
        if not alike:
            raise RuntimeError(
                'a backward pass runs this layer in training mode, but no such forward came before it; call train() or '
                'eval() before the forward, and for a compiled model model.set_grad_checkpointing()'
            )
        with out_of_sight():
            samples, sample = torch.stack([forward.sample for forward in alike]), _sample(x)
            distances = (samples - sample).abs().mean(dim=-1).nan_to_num(math.inf, math.inf).tolist()  # (F, n) -> (F,)
            nearest, size = min(distances), sample.abs().mean().item()
        if nearest > FAR * size:
            warnings.warn(FORGOTTEN, stacklevel=2)
        repeats = [forward for forward, distance in zip(alike, distances, strict=True) if distance == nearest]
        # Backward passes go from the newest to the oldest. A forward without gradients is seldom repeated.
        repeated = min(repeats, key=lambda forward: (not forward.has_graph, forward.repeats))
        repeated.repeats += 1
        return repeated.before

    def balance_loss(self) -> Tensor | None:
        """The balance loss of the last write; without graph when the output of its forward is gone."""
        loss = self._loss() if isinstance(self._loss, weakref.ref) else self._loss
        return self._value if loss is None else loss

    def __reduce__(self) -> tuple[Any, ...]:
        return Replay, ()  # copied or saved it is empty: a graph belongs to a step, not to a module
