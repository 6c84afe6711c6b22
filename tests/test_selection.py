"""Products with selected tokens: against dense matrices, both ways to compute them, gradients of gradients included."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from timm_ait import selection
from timm_ait.selection import gather, scatter, top_gates, top_logits

Q, E, K = 3, 5, 2
DENSE, SPARSE = 7, 13  # tokens T: below and above six times K


@pytest.fixture(params=[DENSE, SPARSE], ids=['dense', 'sparse'])
def num_tokens(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def select(num_tokens: int) -> Tensor:
    """Of T tokens, some in every row, some in one, some in none: (Q, K)."""
    return torch.tensor([[0, num_tokens - 1], [2, 0], [0, 2]])


def one_hot(selected: Tensor, num_tokens: int) -> Tensor:
    return torch.nn.functional.one_hot(selected, num_tokens).double()  # (Q, K, T)


def test_both_ways_are_taken() -> None:
    for cost in selection.Costs():
        assert selection._is_sparse(select(SPARSE), SPARSE, cost)
        assert not selection._is_sparse(select(DENSE), DENSE, cost)
    for cost in selection.COSTS[torch.float16]:
        assert selection._is_sparse(select(DENSE), DENSE, cost)


def test_they_are_the_derivatives_of_one_form(num_tokens: int) -> None:
    weights, y, x, selected = draw(Q, K), draw(Q, E), draw(num_tokens, E), select(num_tokens)
    form = torch.einsum('qk,qkt,qe,te->', weights, one_hot(selected, num_tokens), y, x)
    by_weights, by_y, by_x = torch.autograd.grad(form, [weights, y, x])
    torch.testing.assert_close(selection._Derivative.apply(None, y, x, selected, num_tokens), by_weights)
    torch.testing.assert_close(gather(weights, selected, x), by_y)
    torch.testing.assert_close(scatter(weights, selected, y, num_tokens), by_x)


@pytest.mark.parametrize('k', [K, DENSE - 1, DENSE])
def test_the_gates_of_an_image_are_zero_but_for_its_top_logits(k: int) -> None:
    logits = draw(2, 3, Q, DENSE).detach()
    gates, tokens, _ = top_gates(logits, k)
    assert tokens is None
    expected = torch.zeros_like(logits)
    for index in itertools.product(range(2), range(3), range(Q)):
        chosen = logits[index].argsort(descending=True)[:k]
        expected[index][chosen] = logits[index][chosen].softmax(dim=0)
    torch.testing.assert_close(gates, expected)


def test_the_top_logits_are_the_highest_products(num_tokens: int) -> None:
    queries, x = draw(Q, E), draw(num_tokens, E)
    logits, selected = top_logits(queries, x, K)
    products = queries @ x.t()
    torch.testing.assert_close(logits, products.gather(1, selected))
    assert torch.equal(logits.sort(descending=True).values, products.topk(K).values)
    assert not selected.requires_grad


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('num_tokens', [DENSE, 19 * K])
def test_products_with_narrow_tokens_are_as_wide_as_the_queries(dtype: torch.dtype, num_tokens: int) -> None:
    queries, x = draw(Q, E, dtype=torch.float32), draw(num_tokens, E, dtype=torch.float32).detach().to(dtype)
    x.requires_grad_()
    logits, selected = top_logits(queries, x, K)
    exact = queries @ x.float().t()
    assert torch.equal(logits, exact.gather(1, selected))
    assert torch.equal(logits.sort(descending=True).values, exact.topk(K).values)
    gradients = torch.autograd.grad(logits.square().sum(), [queries, x])
    assert [grad.dtype for grad in gradients] == [torch.float32, dtype]
    for grad, wide in zip(
        gradients, torch.autograd.grad(exact.topk(K).values.square().sum(), [queries, x]), strict=True
    ):
        torch.testing.assert_close(grad.float(), wide.float(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize('name', ['gather', 'scatter', 'by_weights', 'top_logits'])
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str, num_tokens: int) -> None:
    selected = select(num_tokens)
    weights, y, x = draw(Q, K), draw(Q, E), draw(num_tokens, E)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        'gather': (lambda weights, x: gather(weights, selected, x), (weights, x)),
        'scatter': (lambda weights, y: scatter(weights, selected, y, num_tokens), (weights, y)),
        'by_weights': (lambda y, x: selection._Derivative.apply(None, y, x, selected, num_tokens), (y, x)),
        'top_logits': (lambda y, x: top_logits(y, x, K)[0], (y, x)),
    }
    function, inputs = functions[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_a_gradient_that_is_one_number_expanded_is_taken(num_tokens: int) -> None:
    weights, x, selected = draw(Q, K), draw(num_tokens, E), select(num_tokens)
    (by_weights,) = torch.autograd.grad(gather(weights, selected, x).sum(), weights)
    torch.testing.assert_close(by_weights, x[selected].sum(dim=-1))


def test_no_gradient_is_computed_that_nobody_asks_for(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ('_by_weights', '_by_y', '_by_x'):
        function = getattr(selection, name)
        monkeypatch.setattr(selection, name, lambda *args, f=function: called.append(f.__name__) or f(*args))
    logits, chosen = top_logits(draw(Q, E).detach(), draw(num_tokens, E), K)
    logits.sum().backward()
    gather(draw(Q, K), chosen, draw(num_tokens, E).detach()).sum().backward()
    assert called == ['_by_x', '_by_y', '_by_weights']


def test_compiled_they_are_dense_and_the_same(num_tokens: int) -> None:
    weights, x, selected = draw(Q, K), draw(num_tokens, E), select(num_tokens)
    compiled = torch.compile(gather, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(weights, selected, x), gather(weights, selected, x))
