"""The factor by which a training loop has multiplied its loss, read off the operations that lead to the loss.

A loop multiplies for two reasons, which look alike: to scale the loss (accumulation steps, a gradient scaler), which
the balance loss must follow, and to weigh or average terms inside the loss, which it must not. The rules:

- a tensor of one element that was computed from larger outputs is a loss of scale 1;
- ``loss / n`` and ``loss * tensor`` scale; ``loss * number`` scales too, unless the product becomes a term of a sum;
- a sum has the scale that its terms share: ``a / 4 + b / 4`` has 1/4, ``a + 0.1 * b``, ``a + b / 0.1`` and
  ``0.3 * a + 0.7 * b`` have 1, with numbers and with tensors;
- the first division of a sum over elements takes their mean: ``x.sum() / n`` has 1 for any n above 1, so has
  ``cross_entropy(..., reduction='sum') / B`` for B samples, but B/N for a whole number N above B, as that of all
  samples of an accumulated batch (where each sample has several targets, for a multiple of B or of all these targets);
  other terms may stand beside the sum, and sums of several forwards share the samples evenly;
- terms of several forwards whose weights add up to 1 are averaged: n forwards have 1/n each;
- n losses of one kind, summed and divided by n, are averaged: ``(loss(x, y) + loss(x.T, y)) / 2`` has 1;
- a number that multiplies a sum before that division is a weight; a share of sums, as in dice, is no sum;
- a loss that meets larger outputs again, as in ``x - x.mean()``, was a statistic of them, and no loss;
- the sign does not matter, and neither does a term that is no loss.

What cannot be told apart counts as scaling.
"""

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

__all__ = ['Forward', 'Loss', 'Part', 'Term', 'Track', 'follow']

# Names of torch functions and of the operators of tensors, without underscores, by what they do to a loss.
OPERATIONS = {
    **dict.fromkeys(('mul', 'rmul', 'imul', 'multiply'), 'mul'),
    **dict.fromkeys(('div', 'truediv', 'itruediv', 'true_divide', 'divide'), 'div'),
    **dict.fromkeys(('add', 'radd', 'iadd', 'sub', 'rsub', 'isub', 'subtract'), 'add'),
}
# These return the same numbers, elsewhere or in another order. They do not make a loss another kind of loss.
MOVES = frozenset(
    'clone contiguous to float double half bfloat16 cpu cuda view view_as reshape flatten unflatten squeeze unsqueeze '
    'expand expand_as get t transpose permute movedim flip roll getitem select narrow index_select split chunk unbind '
    'neg stack cat setitem copy index_put index_copy scatter masked_scatter'.split()
)
# What these make of a sum is no sum, and is not averaged.
CURVES = frozenset('pow square sqrt rsqrt reciprocal exp expm1 log log1p log2 log10'.split())
# These sum over elements.
SUMS = frozenset('sum nansum dot vdot inner matmul rmatmul einsum tensordot trace'.split())


class Part:
    """A loss as it was first computed, before anything scaled it or added others.

    Attributes:
        is_statistic: Whether it has met larger outputs again.
    """

    is_statistic = False


class Forward:
    """One forward of a model.

    Attributes:
        counted: Parts of the loss whose backward pass has added the balance loss; empty before that.
    """

    def __init__(self) -> None:
        self.counted: frozenset[Part] = frozenset()


@dataclass(frozen=True)
class Term:
    """A term of a loss.

    Attributes:
        kind: The operations that computed it.
        forwards: The forwards behind it.
        scale: Product of the numbers that divided it, inverted.
        weight: Product of the numbers that multiplied it.
        factor: Product of the tensors that multiplied it; None for 1.
        summed: Where it is a sum that was not averaged yet: how many elements, and of how many items (samples), on
            average over several forwards; 0 items where only a criterion would know.
        is_sum_of_losses: Whether these elements are losses.
    """

    kind: tuple[str, ...]
    forwards: frozenset[Forward]
    scale: float = 1.0
    weight: float = 1.0
    factor: Tensor | None = None
    summed: tuple[float, float] | None = None
    is_sum_of_losses: bool = False


@dataclass(frozen=True)
class Loss:
    """A loss, as the sum of its terms.

    Attributes:
        terms: At least one.
        parts: All the losses that it was computed from.
        size: How many losses stand side by side in the tensor.
    """

    terms: tuple[Term, ...]
    parts: frozenset[Part] = field(default_factory=lambda: frozenset({Part()}))
    size: int = 1

    @property
    def is_statistic(self) -> bool:
        """Whether all of it were statistics of larger outputs."""
        return all(part.is_statistic for part in self.parts)

    def scale(self, grad: Tensor) -> float | Tensor:
        """Factor of the balance loss in a backward pass.

        Args:
            grad: The gradient of what the pass began with, by this loss: one element.

        Returns:
            A number or (); 0 where a pass from another loss has counted the balance loss of every forward.
        """
        if all(forward.counted and not forward.counted & self.parts for forward in self._forwards()):
            return 0.0
        term = _merge(self.terms)
        wide = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
        scale = wide.sum() * (term.scale * term.weight)
        return scale if term.factor is None else scale * term.factor.to(scale.device)

    def count(self) -> None:
        """Note that the running backward pass adds the balance loss."""
        for forward in self._forwards():
            if not forward.counted:
                forward.counted = self.parts

    def _forwards(self) -> frozenset[Forward]:
        return frozenset().union(*(term.forwards for term in self.terms))

    def averaged(self) -> 'Loss':
        """The loss as one term that no later division averages."""
        return replace(self, terms=(replace(_merge(self.terms), summed=None),))

    def scaled(self, by: Any, is_division: bool) -> 'Loss':
        """The loss times ``by``, a number or a tensor, or divided by it."""
        if isinstance(by, Tensor) and (by.requires_grad or by.numel() != 1):
            return self
        scale = _scaled_by_tensor if isinstance(by, Tensor) else _scaled_by_number
        return replace(self, terms=(scale(_merge(self.terms), by, is_division),))


def _scaled_by_number(term: Term, by: Any, is_division: bool) -> Term:
    by = abs(float(by))
    divisor = by if is_division else (1 / by if by else math.inf)
    if divisor in (0.0, math.inf):
        return replace(term, weight=0.0 if divisor else term.weight)
    elements, items = term.summed or (0, 0)
    is_weight = divisor <= 1 or (not is_division and divisor < items)
    if term.summed and not is_weight and (not term.is_sum_of_losses or math.isclose(divisor, elements)):
        times = divisor / items if items else 0
        if elements == items:
            is_share = times >= 1 and _is_whole(divisor)
        else:  # a number of something else, such as boxes, seldom is a multiple
            times = divisor / elements if items and _is_whole(divisor / elements) else times
            is_share = _is_whole(times)
        is_mean = is_division or items or math.isclose(divisor, elements)  # or else a weight: the mean is still to come
        return replace(term, scale=term.scale / (times if is_share else 1), summed=None if is_mean else term.summed)
    return replace(term, scale=term.scale / by) if is_division else replace(term, weight=term.weight * by)


def _is_whole(number: float) -> bool:
    return number >= 1 and math.isclose(number, round(number))


def _scaled_by_tensor(term: Term, by: Tensor, is_division: bool) -> Term:
    by = by.detach().reshape(())
    by = by.float() if by.dtype == torch.bool else by.abs()
    factor = 1 / by if is_division else by.float()
    if is_division and term.summed:
        elements, items = term.summed
        if term.is_sum_of_losses:
            factor = torch.where(by == elements, 1.0, factor)
        elif elements == items:
            factor = torch.where((by == by.round()) & (by >= items), items * factor, 1.0)
        elif items:
            is_of_items = (by % items == 0) & (by > 0) & (not by.is_floating_point())
            is_of_elements = (by % elements == 0) & (by > 0)
            factor = torch.where(is_of_elements, elements * factor, torch.where(is_of_items, items * factor, 1.0))
        else:
            factor = torch.ones_like(factor)
        term = replace(term, summed=None)
    return replace(term, factor=factor if term.factor is None else factor * term.factor.to(factor.device))


@dataclass(frozen=True)
class Track:
    """What is known of a tensor that was computed from outputs of a model.

    Attributes:
        forwards: The forwards behind it.
        kind: The operations that computed it.
        loss: None for what is no loss yet.
    """

    forwards: frozenset[Forward]
    kind: tuple[str, ...] = ()
    loss: Loss | None = None


def follow(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Any], result: Tensor) -> Track:
    """What is known of the result of an operation.

    Args:
        name: Of the operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tracked: Those among them that have a ``track``, at least one.
        result: A floating-point tensor.
    """
    op = OPERATIONS.get(name.strip('_'), name.strip('_'))
    forwards = frozenset().union(*(x.track.forwards for x in tracked))
    kind = tuple(dict.fromkeys(step for x in tracked for step in x.track.kind))
    losses = [x.track.loss for x in tracked if x.track.loss is not None]
    is_statistic = result.numel() > 1 and any(x.numel() > 1 and x.track.loss is None for x in tracked)
    if losses and not is_statistic:
        loss = losses[0] if len(losses) == 1 else _sum(losses, is_side_by_side=op in MOVES)
        others = [x for x in (*args, *kwargs.values()) if isinstance(x, (Real, Tensor)) and not hasattr(x, 'track')]
        is_inverse = op == 'div' and others and args and others[0] is args[0]  # number / loss
        if op in ('mul', 'div') and len(losses) == len(others) == 1 and not is_inverse:
            loss = loss.scaled(others[0], is_division=op == 'div')
        elif op == 'mean' and result.numel() == 1:
            loss = loss.scaled(loss.size, is_division=True)
            if tracked[0].ndim > 0:  # of one sample too: what divides it from now on scales it
                loss = loss.averaged()
        elif op in CURVES or (op in ('mul', 'div') and (is_inverse or len(losses) > 1)):
            loss = loss.averaged()
        return Track(forwards, kind, replace(loss, size=1) if result.numel() == 1 else loss)
    for part in (part for loss in losses for part in loss.parts):
        part.is_statistic = True
    kind = kind if op in MOVES else (*kind, op)
    if result.numel() > 1 or (tracked[0].numel() == 1 and (op in MOVES or op in ('mul', 'div', 'add'))):
        return Track(forwards, kind)
    summed = None
    if op in SUMS:
        summed = (tracked[0].numel(), 0)
    elif kwargs.get('reduction') == 'sum':
        labels = [x for x in args[1:2] if isinstance(x, Tensor) and not x.is_floating_point()]
        items = labels[0].numel() if labels else tracked[0].shape[0] if tracked[0].ndim else 1
        summed = (items if labels else tracked[0].numel(), max(items, 1))
    return Track(forwards, kind, Loss((Term(kind, forwards, summed=summed),)))


def _sum(losses: list[Loss], is_side_by_side: bool) -> Loss:
    terms = tuple(term for loss in losses for term in loss.terms)
    size = (sum if is_side_by_side else max)(loss.size for loss in losses)
    return Loss(terms, frozenset().union(*(loss.parts for loss in losses)), size)


def _merge(terms: tuple[Term, ...]) -> Term:
    """The terms of a sum as one: the scale that they share. One with the weight 0 has none."""
    terms = tuple(term for term in terms if term.weight) or terms
    first, n = terms[0], len(terms)
    if n == 1:
        return first
    is_one_forward = all(term.forwards == first.forwards for term in terms)
    is_alike = is_one_forward and all(term.kind == first.kind for term in terms)
    scales, weights = [term.scale for term in terms], [term.weight for term in terms]
    is_even = all(math.isclose(term.scale * term.weight, first.scale * first.weight) for term in terms)
    merged = Term(
        kind=tuple(dict.fromkeys(step for term in terms for step in term.kind)),
        forwards=frozenset().union(*(term.forwards for term in terms)),
        scale=_shared_number(scales),
        weight=1.0 if is_one_forward and len(set(weights)) > 1 else _shared_number(weights),
        factor=_shared_factor([term.factor for term in terms], is_one_forward),
        summed=_shared_sum(terms, is_one_forward),
        is_sum_of_losses=first.is_sum_of_losses,
    )
    if is_one_forward and math.isclose(sum(weights), 1):
        return replace(merged, weight=1.0)
    if not is_one_forward and not merged.summed and math.isclose(sum(term.scale * term.weight for term in terms), 1):
        return replace(merged, scale=1 / n, weight=1.0)  # a mean over forwards, each with its share of the samples
    if is_alike and is_even and math.isclose(n * first.scale * first.weight, 1):
        return replace(merged, scale=1.0, weight=1.0)
    if is_alike and is_even and not merged.summed and all(term.factor is None for term in terms):
        return replace(merged, summed=(n, n), is_sum_of_losses=True)
    return merged


def _shared_number(numbers: list[float]) -> float:
    """The number of all terms. Where they differ, the largest, but at most 1: a larger one is the weight of a term."""
    return numbers[0] if len(set(numbers)) == 1 else min(max(numbers), 1.0)


def _shared_factor(factors: list[Tensor | None], is_one_forward: bool) -> Tensor | None:
    """The tensor that multiplies all terms; 1 where they are weights: where they differ, or where they add up to 1."""
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(factors):
        return None
    values = torch.stack([factor.to(known[0].device) for factor in known])
    is_weight = (values != values[0]).any()
    if is_one_forward:
        is_weight = is_weight | ((values.sum() - 1).abs() < 1e-4)
    return torch.where(is_weight, 1.0, values[0])


def _shared_sum(terms: tuple[Term, ...], is_one_forward: bool) -> tuple[float, float] | None:
    """Elements and items of a sum of which at least one term was not averaged yet."""
    sums = [term.summed for term in terms if term.summed]
    if len(sums) == len(terms) and len(set(sums)) == 1:
        return sums[0]
    if not sums or any(term.is_sum_of_losses for term in terms):
        return None
    elements, items = zip(*sums, strict=True)
    if is_one_forward:
        return max(elements), max(items)
    return (fmean(elements), fmean(items)) if len(sums) == len(terms) else None  # of one of the forwards
