"""Products with the tokens that a bottleneck has selected, and their gradients.

``selected`` (Q, k) holds, for each of Q queries, the indices of k out of T tokens. Consider one number, which is linear
in each of its three arguments:

    F(weights, y, x) = sum_qi weights[q, i] <y[q], x[selected[q, i]]>     (Q, k), (Q, E), (T, E) -> ()

:func:`gather` is its derivative by ``y``, :func:`scatter` by ``x``. The gradient of each consists of the other one and
of the derivative by ``weights``. Without them autograd would save a matrix of Q x T. :func:`top_gates` lets it do so,
as an image has few tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = [
    'Selection',
    'dense_gates',
    'gather',
    'load_balance_loss',
    'scatter',
    'top_gates',
    'top_logits',
]


class Selection(NamedTuple):
    """Which tokens each slot of each head attends to.

    Attributes:
        gates: (..., S, M, k) attention weights, which sum to 1 over k.
        tokens: (..., S, M, k) indices of the selected tokens, in [0, T). None where the gates (..., S, M, T) are those
            of all tokens, zero for a token that is not selected.
        lse: (S, M) log-sum-exp of the selected logits, without graph, by which ranks merge what they have read. Empty
            where they do not.
    """

    gates: Tensor
    tokens: Tensor | None
    lse: Tensor


class Costs(NamedTuple):
    """How much longer a selected token takes than a token of a dense product over all tokens, on an eager CPU.

    A GPU multiplies faster than it gathers. A compiler optimises dense products better.
    """

    gather: int = 4
    scatter: int = 5
    sample: int = 6


COSTS = {torch.float16: Costs(0, 0, 0), torch.bfloat16: Costs(5, 6, 18)}  # CPUs are slow at products in float16


def top_logits(queries: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest products of each query with a token, and the indices of these tokens, in no order.

    Args:
        queries: (Q, E).
        tokens: (T, E), in the dtype of the queries or a narrower one. Gradients are computed in the dtype of the
            tokens. Products are computed in the dtype of the queries on a CPU, in that of the tokens on a GPU.
        k: At most T.

    Returns:
        logits (Q, k) in the dtype of the queries, selected (Q, k) in [0, T).
    """
    return _TopLogits.apply(queries, tokens, k)


def gather(weights: Tensor, selected: Tensor, x: Tensor) -> Tensor:
    """Weighted sum of the selected rows of ``x`` for each query: (Q, k), (Q, k), (T, E) -> (Q, E)."""
    return _Derivative.apply(weights, None, x, selected, len(x))


def scatter(weights: Tensor, selected: Tensor, y: Tensor, num_tokens: int) -> Tensor:
    """For each token, the weighted sum of ``y`` over the queries that selected it: (Q, k), (Q, k), (Q, E) -> (T, E)."""
    return _Derivative.apply(weights, y, None, selected, num_tokens)


def top_gates(logits: Tensor, k: int) -> Selection:
    """Select k tokens by the logits (..., S, M, T) of all: gates (..., S, M, T), zero for the others."""
    T = logits.shape[-1]
    if k == T:
        gates = logits.softmax(dim=-1)
    else:
        logits, tokens = logits.topk(k, dim=-1, sorted=False)
        gates = dense(logits.softmax(dim=-1), tokens, T)
    return Selection(gates, None, gates.new_empty(0))


def dense_gates(selection: Selection, num_tokens: int) -> Tensor:
    """The gates of all tokens, zero for those that are not selected: (..., S, M, T)."""
    gates, tokens, _ = selection
    return gates if tokens is None else dense(gates, tokens, num_tokens)


def dense(weights: Tensor, selected: Tensor, num_tokens: int) -> Tensor:
    """The weights of the selected tokens, and zeros for the others: (..., k), (..., k) -> (..., T)."""
    shape = weights.shape[:-1] + (num_tokens,)  # noqa: RUF005  TorchScript knows no star
    return torch.zeros(shape, dtype=weights.dtype, device=weights.device).scatter_(-1, selected, weights)


def load_balance_loss(selection: Selection, num_tokens: int) -> Tensor:
    """Squared coefficients of variation of the tokens' importance and load, summed over heads (section 3.2).

    ``importance_j = sum_m g_mj`` and ``load_j = #{m : g_mj > 0}``; the load has no gradient.

    Args:
        selection: What the slots attend to. The gates of a slot sum to 1, so that the mean importance has no gradient.
        num_tokens: T, tokens that compete.

    Returns:
        (), the mean over images with ``write_scope='image'``; zero for fewer than two tokens.
    """
    gates, tokens, _ = selection
    if num_tokens <= 1 or gates.numel() == 0:
        return gates.new_zeros(())

    if tokens is None:
        load = (gates > 0).sum(dim=-2, dtype=gates.dtype)
        totals = torch.stack((gates.sum(dim=-2), load))  # (..., S, M, T) -> (2, ..., S, T)
    else:
        shares = torch.stack((gates, gates.detach().sign())).flatten(-2)  # (2, ..., S, M, k) -> (2, ..., S, M*k)
        zeros = shares.new_zeros(*shares.shape[:-1], num_tokens)
        totals = zeros.scatter_add_(-1, tokens.flatten(-2).expand_as(shares), shares)  # (2, ..., S, T)
    variance, mean = torch.var_mean(totals, dim=-1)
    mean = mean.detach()  # that of the importance is M / T for any gates, and the load has no gradient
    return (variance / (mean.square() + 1e-10)).sum(dim=(0, -1)).mean()  # (2, ..., S) -> (...) -> ()


class _TopLogits(Function):
    @staticmethod
    def forward(queries: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dtype = queries.dtype if tokens.device.type == 'cpu' else tokens.dtype
        logits, selected = (queries.to(dtype) @ tokens.to(dtype).t()).topk(k, dim=-1, sorted=False)
        # NOTE compiled by torch 2.11, an output of `to` that had nothing to do would lose its gradient
        return logits if dtype == queries.dtype else logits.to(queries.dtype), selected

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        queries, tokens, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros would be made for the indices
        ctx.save_for_backward(queries, tokens, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        queries, tokens, selected = ctx.saved_tensors
        needs_queries, needs_tokens, _ = ctx.needs_input_grad
        narrow = grad.to(tokens.dtype)
        return (
            gather(narrow, selected, tokens).to(queries.dtype) if needs_queries else None,
            scatter(narrow, selected, queries.to(tokens.dtype), len(tokens)) if needs_tokens else None,
            None,
        )


class _Derivative(Function):
    """Derivative of F by that one of ``weights``, ``y`` and ``x`` which is None."""

    @staticmethod
    def forward(weights: Any, y: Any, x: Any, selected: Tensor, num_tokens: int) -> Tensor:
        if weights is None:
            return _by_weights(y, x, selected)
        if y is None:
            return _by_y(weights, x, selected)
        return _by_x(weights, y, selected, num_tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arguments, selected, ctx.num_tokens = inputs
        ctx.save_for_backward(*arguments, selected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, selected = ctx.saved_tensors
        filled = [grad if argument is None else argument for argument in arguments]

        def by(i: int) -> Tensor:
            return _Derivative.apply(*filled[:i], None, *filled[i + 1 :], selected, ctx.num_tokens)

        return *(by(i) if is_needed else None for i, is_needed in enumerate(ctx.needs_input_grad[:3])), None, None


def _by_y(weights: Tensor, x: Tensor, selected: Tensor) -> Tensor:
    if _is_sparse(selected, len(x), _costs(x).gather):
        return F.embedding_bag(selected, x, mode='sum', per_sample_weights=weights)
    return dense(weights, selected, len(x)) @ x


def _by_x(weights: Tensor, y: Tensor, selected: Tensor, num_tokens: int) -> Tensor:
    if not _is_sparse(selected, num_tokens, _costs(y).scatter):
        return dense(weights, selected, num_tokens).t() @ y
    tokens, order = selected.flatten().sort()  # (Q, k) -> (Q*k,)
    starts = torch.searchsorted(tokens, torch.arange(num_tokens, device=tokens.device))
    queries = order // selected.shape[1]
    return F.embedding_bag(queries, y, starts, mode='sum', per_sample_weights=weights.flatten().index_select(0, order))


def _by_weights(y: Tensor, x: Tensor, selected: Tensor) -> Tensor:
    if not _is_sparse(selected, len(x), _costs(x).sample):
        return (y @ x.t()).gather(1, selected)
    Q, k = selected.shape
    starts = torch.arange(0, Q * k, k)
    queries = torch.arange(Q).repeat_interleave(k)
    # PyTorch runs this for the gradient of embedding_bag by its weights. It has no public name.
    op = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return op(y, x, selected.flatten(), starts, queries, 0).view(Q, k)  # (Q*k,) -> (Q, k)


def _costs(x: Tensor) -> Costs:
    return COSTS.get(x.dtype, Costs())


def _is_sparse(selected: Tensor, num_tokens: int, cost: int) -> bool:
    """Whether to touch the selected tokens alone, rather than all in a dense product."""
    is_eager_cpu = selected.device.type == 'cpu' and not torch.compiler.is_compiling()
    return is_eager_cpu and selected.shape[1] > 0 and cost * selected.shape[1] <= num_tokens
