"""How the balance loss reaches the gradient through a training loop that does not know of it.

A loop computes ``loss = criterion(model(x), target)``, scales it, and calls ``backward``. What must come out are the
gradients of ``criterion(...) + balance_loss``, scaled alike. So the model returns its logits as a tensor that *carries*
the balance loss, and every scalar computed from them is *tied* to it: its value stays what it is, its gradient reaches
the balance loss with weight one.

- What is computed from several scalars of one forward (cross entropy + z-loss, a weighted sum with a distillation loss)
  is tied anew, with weight one: the balance loss counts once for the sum.
- What only rescales one scalar (a division by accumulation steps, the factor of a gradient scaler) rescales the tie.
- Scalars that are merely logged are tied too, but nobody calls backward on them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ['CarrierTensor', 'carry_balance_loss']

# Linear in the scalar with a positive slope: its tie goes along, rescaled.
RESCALING = frozenset(
    'mul __mul__ __rmul__ multiply div __truediv__ true_divide divide add __add__ __radd__ sub __sub__ '
    'mul_ __imul__ div_ __itruediv__ add_ __iadd__ sub_ __isub__ '
    'to float double half bfloat16 cpu cuda clone contiguous mean sum squeeze unsqueeze view reshape flatten'.split()
)
# These concern the graph, not the value: they see the tied tensor.
AUTOGRAD = frozenset('backward grad register_hook retain_grad __set__ __delete__'.split())


class _Tie(torch.autograd.Function):
    """A copy of ``x`` whose gradient also reaches ``balance``, times ``weight``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, balance: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, (balance.device, balance.dtype)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        device, dtype = ctx.like
        if ctx.weight == 0:  # a zero, not None: DistributedDataParallel must see every parameter's gradient
            return grad, torch.zeros((), device=device, dtype=dtype), None
        return grad, (ctx.weight * grad).to(device=device, dtype=dtype), None


class CarrierTensor(Tensor):
    """Logits, or something computed from them, on their way to a loss.

    Attributes:
        balances: The balance losses it carries, one for each forward behind it.
        untied: The same value without their gradient; None where there is none to leave out (not a scalar).
    """

    balances: tuple[Tensor, ...]
    untied: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        carriers = list(_carriers((args, kwargs)))
        balances = _unique(carriers)
        with torch._C.DisableTorchFunctionSubclass():
            if name in AUTOGRAD:
                return func(*args, **kwargs)
            if name == '__get__':  # of an attribute: `data` and `shape` alike
                return _carry(func(*args), balances)
            result = func(*_plain(args), **_plain(kwargs))
            if _keeps_ties(name, carriers, args):
                tied = func(*[_plain(x) if _shares(x, carriers[0]) else x for x in args], **kwargs)
                return _wrap(tied, balances, result) if tied.ndim == 0 and tied.requires_grad else tied
            return _carry(result, balances, always=func is Tensor.clone)  # DDP clones logits without gradients

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).__deepcopy__(memo)


def carry_balance_loss(logits: Tensor, balance: Tensor) -> Tensor:
    """Return ``logits`` so that a loss computed from them has the gradient of the loss plus ``balance``.

    Args:
        logits: Any shape. What is not a plain tensor that requires a gradient (a traced proxy, say) comes back as is.
        balance: (), differentiable.
    """
    if type(logits) is not Tensor or not balance.requires_grad or not torch.is_grad_enabled() or _is_exporting():
        return logits
    # A tie of weight zero: DistributedDataParallel looks for the parameters in use from the logits.
    return _wrap(_Tie.apply(logits, balance, 0.0), (balance,), None)


def _is_exporting() -> bool:
    # The flag behind torch.compiler.is_exporting(), which older compilers (torch 2.9) take for true in any graph.
    is_exporting = bool(torch.compiler._is_exporting_flag)
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or is_exporting


def _wrap(x: Tensor, balances: tuple[Tensor, ...], untied: Tensor | None) -> CarrierTensor:
    carrier = x if isinstance(x, CarrierTensor) else x.as_subclass(CarrierTensor)
    carrier.balances, carrier.untied = balances, untied
    return carrier


def _carry(result: Any, balances: tuple[Tensor, ...], always: bool = False) -> Any:
    """Tie the scalars among the results of an operation, and let the other tensors go on carrying."""
    if isinstance(result, (tuple, list)):
        return _rebuild(result, [_carry(x, balances) for x in result])
    if not isinstance(result, Tensor) or not (result.requires_grad or always):
        return result
    if result.ndim > 0 or not result.requires_grad:
        return _wrap(result, balances, None)
    tied = result
    for balance in balances:
        tied = _Tie.apply(tied, balance, 1.0)
    return _wrap(tied, balances, result)


def _keeps_ties(name: str, carriers: list[CarrierTensor], args: tuple[Any, ...]) -> bool:
    """Whether the result has the ties of its operands, rather than a new one of weight one."""
    if any(carrier.untied is None for carrier in carriers):
        return False
    if len(carriers) > 1:  # losses of several forwards, or an update in place, which cannot be tied anew
        in_place = name.startswith('__i') or (name.endswith('_') and not name.endswith('__'))
        return in_place or len(_unique(carriers)) == sum(len(carrier.balances) for carrier in carriers)
    operands = [x for x in args if x is not carriers[0]]
    if 'sub' in name and args[0] is not carriers[0]:  # constant - loss
        return False
    is_negative = bool(operands) and isinstance(operands[0], (int, float)) and operands[0] < 0
    return name in RESCALING and not (is_negative and ('mul' in name or 'div' in name))


def _shares(x: Any, carrier: CarrierTensor) -> bool:
    """Whether ``x`` is another carrier of one of the carrier's balance losses."""
    return (
        isinstance(x, CarrierTensor)
        and x is not carrier
        and len(_unique([x, carrier])) < len(x.balances) + len(carrier.balances)
    )


def _unique(carriers: list[CarrierTensor]) -> tuple[Tensor, ...]:
    """Each balance loss that the carriers carry, once."""
    return tuple({id(balance): balance for carrier in carriers for balance in carrier.balances}.values())


def _carriers(tree: Any) -> Iterator[CarrierTensor]:
    if isinstance(tree, CarrierTensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from _carriers(x)
    elif isinstance(tree, dict):
        yield from _carriers(tuple(tree.values()))


def _plain(tree: Any) -> Any:
    """The plain tensors in the place of carriers, without ties."""
    if isinstance(tree, CarrierTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tree.as_subclass(Tensor) if tree.untied is None else tree.untied
    if isinstance(tree, (tuple, list)):
        return _rebuild(tree, [_plain(x) for x in tree])
    if isinstance(tree, dict):
        return {key: _plain(x) for key, x in tree.items()}
    return tree


def _rebuild(like: Any, items: list[Any]) -> Any:
    """A sequence of the type of ``like``: a list, a tuple, a named tuple or one of torch's named results."""
    if type(like) in (tuple, list):
        return type(like)(items)
    return type(like)(*items) if hasattr(like, '_fields') else type(like)(items)
