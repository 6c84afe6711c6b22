"""The norm that the backward pass makes again: the same gradients, and nothing of it kept."""

import gc
import weakref
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ait import GlobalWorkspace
from timm_ait.norm import OutputNorm, rebuilt_for_backward

N, E, M = 7, 5, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Counted:
    """Makes a tensor again, and counts how often."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.times = x.detach().clone(), 0

    def __call__(self) -> Tensor:
        self.times += 1
        return self.x.clone()


def test_what_several_operations_saved_is_made_once_and_gives_the_same_gradients() -> None:
    weight = draw(E, M).requires_grad_()
    grads = []
    for is_rebuilt in (False, True):
        leaf = draw(N, E, seed=1).requires_grad_()
        x = 2 * leaf
        make = Counted(x)
        if is_rebuilt:
            with rebuilt_for_backward(x, make):
                loss = (x @ weight).sum() + x.square().sum() + (x[1:].t() @ draw(N - 1, M)).square().sum()
        else:
            loss = (x @ weight).sum() + x.square().sum() + (x[1:].t() @ draw(N - 1, M)).square().sum()
        for _ in range(2):
            grads.append(torch.autograd.grad(loss, [leaf, weight], retain_graph=True))
        assert make.times == (2 if is_rebuilt else 0)  # once a backward pass
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=0)


def test_it_is_not_kept_between_forward_and_backward() -> None:
    norm, layer = OutputNorm(E), nn.Linear(E, M)
    f = draw(N, E).requires_grad_()
    h = norm(f)
    with norm.rebuilt(f, h):
        out = layer(h)
    alive = weakref.ref(h)
    del h
    gc.collect()
    assert alive() is None
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, F.layer_norm(f, (E,)).sum(0).expand(M, E))


def test_tensors_that_are_not_it_are_kept_as_ever() -> None:
    norm = OutputNorm(E)
    f = draw(N, E).requires_grad_()
    h = norm(f)
    with norm.rebuilt(f, h):
        out = h.mul_(2).square()  # changed in place: to make the norm again would be wrong
    (grad,) = torch.autograd.grad(out.sum(), f)
    (expected,) = torch.autograd.grad((2 * F.layer_norm(f, (E,))).square().sum(), f)
    torch.testing.assert_close(grad, expected)


def test_what_a_hook_puts_in_its_place_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    layer = GlobalWorkspace(E, num_slots=M, slot_dim=2, write_heads=1, balance_weight=0.0).train()
    x = draw(1, N, E)

    def gradient(hook: Any) -> Tensor:
        handle, before = layer.norm.register_forward_hook(hook), layer.memory.clone()
        (grad,) = torch.autograd.grad((layer(x) ** 2).sum(), layer.linear_transform.weight)
        handle.remove()
        layer.memory.copy_(before)
        return grad

    by_hook = gradient(lambda _module, _args, h: 3 * h)
    with torch.no_grad():
        layer.norm.weight.mul_(3)
        layer.norm.bias.mul_(3)
    torch.testing.assert_close(gradient(lambda *_: None), by_hook)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast_it_answers_in_the_narrow_dtype(dtype: torch.dtype) -> None:
    norm, f = OutputNorm(E), draw(N, E).to(dtype)
    with torch.autocast('cpu', dtype):
        h = norm(f)
    assert h.dtype == dtype
    torch.testing.assert_close(h.float(), F.layer_norm(f.float(), (E,)), rtol=0.02, atol=0.02)


def test_under_gradient_checkpointing_it_leaves_what_is_kept_to_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError('the norm would keep its input beside what checkpointing keeps')

    model = timm.create_model('test_ait').train()
    monkeypatch.setattr(OutputNorm, 'rebuilt', refuse)
    images = draw(2, 3, 32, 32)
    with pytest.raises(AssertionError, match='keep its input'):
        model(images)
    model.set_grad_checkpointing()
    model(images).sum().backward()
