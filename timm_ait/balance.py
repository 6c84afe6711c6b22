"""How the balance loss reaches the gradient, although the training loop does not know of it.

A loop computes ``loss = criterion(model(x), target)``, multiplies it by some ``scale`` and calls ``backward``. The
result must be the gradients of ``scale * (criterion(...) + balance_loss)``. The scale counts: train.py divides by its
accumulation steps, and a float16 gradient scaler multiplies by 65,536. A balance loss that ignored them would weigh n
times too much, or 1/65,536 of what it should.

1. Each layer attaches its balance loss to its memory (:func:`attach`). A backward pass that goes through the layer then
   adds the gradient of the balance loss, times the scale of this pass. So it does not matter which output is used.
2. The outputs of a model are :class:`TrackedTensor`. They compute what tensors compute, once, and follow the operations
   up to a loss: a tensor of one element. A hook on each loss tells the scale when a backward pass starts (:class:`Loss`
   says how it is found). Where nothing was followed, the scale is 1.

NOTE Hooks, and not another term in the loss, because an operation can then be run as it is, with all its side effects.
"""

import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves, tree_map

from .scale import Forward, Loss, Part, Term, Track, follow

__all__ = ['TrackedTensor', 'attach', 'hand_out', 'is_backward_running', 'plain', 'track']

# These concern the graph or the object, not the value: they see the tensor itself.
OF_THE_OBJECT = frozenset(
    '__set__ __delete__ backward grad register_hook retain_grad requires_grad_ '
    'register_post_accumulate_grad_hook'.split()
)
# `x.add_(y)`, `x += y` and `x[i] = y`, but not `x.__iter__()`.
IN_PLACE = re.compile(r'\w*[a-z0-9]_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__')


@dataclass(eq=False)
class _Pass:
    """What is known of a running backward pass.

    Attributes:
        scale: Factor of the balance loss.
        loss: Where it was found; None where balance_loss() itself is in the loss.
        asks: Whether it computes the gradient of any parameter, for a compiled layer, which cannot find out by itself.
        is_by_hand: Whether it began with balance_loss() itself, and so counts nothing of what another pass adds.
        thread: Which runs it.
    """

    scale: float | Tensor
    loss: Loss | None
    asks: bool = True
    is_by_hand: bool = False
    thread: int = field(default_factory=get_ident)


# Backward passes that run now, by the number of their graph task: checkpointing starts inner ones, of higher numbers.
# PyTorch's engine alone holds them. So a pass that ends in an error leaves nothing to the next one.
_passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
_pending: set[str] = set()


def is_backward_running() -> bool:
    """Whether a backward pass runs now: a forward inside it is one that gradient checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.compiler.disable  # compiled autograd traces hooks
def _begin(scale: float | Tensor, loss: Loss | None, asks: bool = True, is_by_hand: bool = False) -> None:
    """Note the scale of the running backward pass, until it ends."""
    task = torch._C._current_graph_task_id()
    running = _passes.get(task)
    if running is None:
        running = _passes[task] = _Pass(scale, loss)
        Variable._execution_engine.queue_callback(partial(_end, task, running))
    running.scale, running.loss, running.asks, running.is_by_hand = scale, loss, asks, is_by_hand


def _end(task: int, running: _Pass) -> None:
    _passes.pop(task, None)


def _innermost() -> _Pass | None:
    running = _passes.get(torch._C._current_graph_task_id())
    if running is None:
        outer = [task for task, each in _passes.items() if each.thread == get_ident()]
        running = _passes[max(outer)] if outer else None
    return running


def attach(memory: Tensor, balance_loss: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Return ``memory`` such that a backward pass through it adds the gradient of the balance loss.

    Args:
        memory: (M, D) or (B, M, D), what the retrieval reads.
        balance_loss: (), differentiable. It lives as long as the graph of the result.
        layer: Whose weights count although they are no parameters: an inner step of MAML computes new ones.
    """
    if torch.compiler.is_compiling():
        return _Attach.apply(memory, balance_loss)
    if not is_backward_running():
        _warn_of_last_pass()
    attached = _Attach.apply(memory, balance_loss)
    if layer is not None and attached.grad_fn is not None:
        attached.grad_fn.state.weights = [p.grad_fn for p in layer.parameters() if p.grad_fn is not None]
    return attached


class _Attach(Function):
    @staticmethod
    def forward(memory: Tensor, balance_loss: Tensor) -> Tensor:
        return memory.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, balance_loss = inputs
        ctx.like = (balance_loss.device, balance_loss.dtype)
        ctx.state = None if torch.compiler.is_compiling() else _State(balance_loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = ctx.like
        if ctx.state is None:
            return grad, torch.ops.timm_ait.balance_scale(grad).to(device=device, dtype=dtype)
        # Zero where it must not count, but never None: DistributedDataParallel waits for every parameter's gradient.
        return grad, _as_scalar(ctx.state.scale(), device, dtype)


def _as_scalar(scale: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.detach().to(device=device, dtype=dtype)
    return torch.full((), scale, device=device, dtype=dtype)


class _State:
    """Of one forward of one layer: the balance loss, and which pass has counted it.

    Attributes:
        counted: Parts of the loss of that pass, empty where it is not known; None before the first pass.
        weights: The nodes that have computed weights of the layer.
    """

    def __init__(self, balance_loss: Tensor) -> None:
        self.balance_loss = balance_loss
        self.weights: list[Any] = []
        self.counted: frozenset[Part] | None = None
        self.is_half = _is_half(balance_loss)

    def scale(self) -> float | Tensor:
        """Factor of the balance loss in the running backward pass; 0 where a pass from another loss has counted it."""
        if not _asks_for_parameters(self.balance_loss) and not any(map(_is_computed, self.weights)):
            return 0.0
        running = _innermost()
        if running is not None and running.is_by_hand:
            return 0.0
        if running is None and self.is_half:
            _pending.add(UNKNOWN_SCALE)
        loss = None if running is None else running.loss
        parts = frozenset() if loss is None else loss.parts
        if self.counted is not None and not self.counted & parts:
            if running is None:
                _pending.add(COUNTED_ONCE)
            return 0.0
        if self.counted is None:
            self.counted = parts
        if loss is not None:
            loss.count()
        return 1.0 if running is None else running.scale


def _is_half(x: Tensor) -> bool:
    """Whether float16 autocast is on for the device of ``x``. The meta device knows no autocast."""
    device = x.device.type
    return not x.is_meta and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


UNKNOWN_SCALE = (
    'timm_ait could not follow how the last loss was computed from the outputs of the model, and took 1 for the scale '
    'of its balance loss. It saw no accumulation steps, no weight and no gradient scaler. Set '
    'model.auto_balance = False and add model.balance_loss() to the loss before it is scaled'
)
COUNTED_ONCE = (
    'Two backward passes went through one forward of the model, and timm_ait could not follow how their losses were '
    'computed. It added the balance loss in the first pass alone. To choose yourself, set model.auto_balance = False '
    'and add model.balance_loss() to one loss'
)


def _warn_of_last_pass() -> None:
    """Warn of what a backward pass could not tell, now that it is over."""
    while _pending:
        warnings.warn(_pending.pop(), stacklevel=4)


@torch.library.custom_op('timm_ait::balance_scale', mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _balance_scale(like: Tensor) -> Tensor:
    """The scale of the running backward pass, for compiled graphs: () in float32 on the device of ``like``."""
    running = _innermost() or _Pass(1.0, None)
    if not running.asks:
        return like.new_zeros((), dtype=torch.float32)
    if running.loss is not None:
        running.loss.count()
    return _as_scalar(running.scale, like.device, torch.float32).clone()


@_balance_scale.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.float32)


def _asks_for_parameters(x: Tensor) -> bool:
    """Whether the running backward pass computes the gradient of any parameter behind ``x``.

    ``torch.autograd.grad(loss, images)`` does not. What it returns is then the gradient of the loss alone.
    """
    parameters = 0
    for node in _leaves(x):
        if isinstance(node.variable, nn.Parameter):
            parameters += 1
            if _is_computed(node):
                return True
    return not parameters


def _leaves(x: Tensor) -> Iterator[Any]:
    """The nodes of all leaves behind ``x``, the nearest first."""
    nodes, seen = [x.grad_fn], set()
    for node in nodes:
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
        if hasattr(node, 'variable'):
            yield node


def _is_computed(leaf: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # PyTorch refuses to answer for a leaf that torch.autograd.grad was asked for
        return True


def hand_out(balance_loss: Tensor) -> Tensor:
    """The balance loss for whoever adds it to a loss himself: then no backward pass through it adds it once more."""
    handed = balance_loss.view_as(balance_loss)
    if handed.requires_grad:
        handed.register_hook(_add_nothing)
    return handed


def _add_nothing(grad: Tensor) -> None:
    running = _passes.get(torch._C._current_graph_task_id())
    _begin(0.0, None, is_by_hand=running is None or running.is_by_hand)


class TrackedTensor(Tensor):
    """An output of a model, or something computed from outputs, on its way to a loss.

    Attributes:
        track: What is known of it. The outputs of a compiled model have none until something is computed from them.
    """

    _track: Track

    @property
    def track(self) -> Track:
        with torch._C.DisableTorchFunctionSubclass():
            if '_track' not in vars(self):  # compiled together with the model, or its logits
                _tracked(self, _start(_forward_of_graph(self), is_loss=self.ndim == 0))
            return self._track

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, (TrackedTensor,), args, kwargs)
        name = func.__name__
        if name == '__iter__':
            return iter(args[0].unbind())
        with torch._C.DisableTorchFunctionSubclass():
            if name in OF_THE_OBJECT:
                if name in ('backward', 'grad'):  # the loss of a step that was compiled as a whole has no hook yet
                    for x in tree_leaves((args, kwargs)):
                        getattr(x, 'track', None)
                return func(*args, **kwargs)
            is_in_place = bool(args) and bool(IN_PLACE.fullmatch(name))
            is_itself = is_in_place or name == '__get__'  # an attribute, such as `T` or `grad`
            target, others = (args[:1], args[1:]) if is_itself else ((), args)
            result = func(*target, *plain(others), **plain(kwargs))
            tracked = [x for x in tree_leaves((args, kwargs)) if isinstance(x, TrackedTensor)]

            def wrap(x: Any) -> Any:
                if not isinstance(x, Tensor) or not (x.requires_grad or func is Tensor.clone):  # DDP clones outputs
                    return x
                return _tracked(x, follow(name, args, kwargs, tracked, x), is_changed=is_in_place)

            if is_in_place:
                tree_map(wrap, [args[0], args[0]._base])
                return result
            return result if isinstance(result, torch.Size) else tree_map(wrap, result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return plain(self).__deepcopy__(memo)


def track(outputs: Any) -> Any:
    """The outputs of a training forward such that a loss computed from them tells the scale of the training loop.

    Args:
        outputs: A tensor of any shape, or a tuple, list or dict of such tensors. What is no plain tensor that requires
            a gradient, a traced proxy for example, stays as it is.
    """
    if torch.compiler.is_compiling():
        return tree_map(lambda x: x.as_subclass(TrackedTensor) if type(x) is Tensor else x, outputs)
    start = _start(Forward())

    def wrap(x: Any) -> Any:
        if type(x) is not Tensor or not x.requires_grad:
            return x
        x.register_hook(partial(_notice_unseen, weakref.ref(x)))
        return _tracked(x, start, is_changed=True)  # not viewed: an operation in place would take FSDP2's hook off it

    return tree_map(wrap, outputs)


def _forward_of_graph(output: Tensor) -> Forward:
    """The forward of a compiled graph, which all its outputs share."""
    node: Any = output.grad_fn
    while type(node).__name__ == 'AliasBackward0':  # from a tensor to a subclass
        node = node.next_functions[0][0]
    return node.metadata.setdefault('timm_ait', Forward()) if isinstance(node, BackwardCFunction) else Forward()


def _start(forward: Forward, is_loss: bool = False) -> Track:
    """What is known of the output of a forward, or of a loss that was computed out of sight."""
    forwards = frozenset({forward})
    return Track(forwards, loss=Loss((Term((), forwards),)) if is_loss else None)


def plain(tree: Any) -> Any:
    """The same tensors, tracked no longer. A compiler cannot do that, and need not: it removes the tracking itself."""
    if torch.compiler.is_compiling():
        return tree

    def unwrap(x: Any) -> Any:
        return x.as_subclass(Tensor) if isinstance(x, TrackedTensor) else x

    with torch._C.DisableTorchFunctionSubclass():
        return tree_map(unwrap, tree)


def _tracked(x: Tensor, known: Track, is_changed: bool = False) -> TrackedTensor:
    if is_changed and type(x) is Tensor:  # written into: whoever holds this tensor must hold a tracked one
        x.__class__ = TrackedTensor
    tensor = x if isinstance(x, TrackedTensor) else x.as_subclass(TrackedTensor)
    tensor._track = known
    if known.loss is not None and x.requires_grad and x.numel() == 1:
        tensor.register_hook(partial(_report, known.loss, weakref.ref(tensor)))
    return tensor


def _notice_unseen(tensor: Any, grad: Tensor) -> None:
    """Note that a backward pass reaches an output of a model and no loss has told its scale."""
    output = tensor()
    if _innermost() is None and (output is None or _asks_for_parameters(output)):
        _pending.add(UNKNOWN_SCALE)


def _report(loss: Loss, tensor: Any, grad: Tensor) -> None:
    """Tell the scale of the running backward pass, unless a loss that stands nearer to its start has done so."""
    if torch._C._current_graph_task_id() in _passes or loss.is_statistic:
        return
    found = tensor()
    _begin(loss.scale(grad), loss, asks=found is None or _asks_for_parameters(found))
