"""The output norm under autocast, rows of unit length, and which layers may be read without a call."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from timm_ait.layers import OutputNorm, is_plain, rms_norm, unit_rows

N, E = 7, 5


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_output_norm_answers_in_the_dtype_of_its_input_under_autocast(dtype: torch.dtype) -> None:
    norm, f = OutputNorm(E), draw(N, E).to(dtype)
    with torch.autocast('cpu', dtype):
        h = norm(f)
    assert h.dtype == dtype
    torch.testing.assert_close(h.float(), F.layer_norm(f.float(), (E,)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16])
def test_rows_get_unit_length_whatever_their_size_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    x = draw(3, N, E).to(dtype)
    x[0] *= 1e-3
    x[1, 0] = 0
    rows = unit_rows(x)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, F.normalize(x.double(), dim=-1).to(dtype))
    assert torch.equal(rows[1, 0], torch.zeros(E, dtype=dtype))


def test_the_derivatives_of_unit_rows_are_those_of_finite_differences() -> None:
    x = draw(N, E).double().requires_grad_()
    assert torch.autograd.gradcheck(unit_rows, x)
    assert torch.autograd.gradgradcheck(unit_rows, x)


def test_for_the_older_onnx_exporter_the_norm_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(N, E)
    x[0] = 0
    expected = rms_norm(x)
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    torch.testing.assert_close(rms_norm(x), expected)


@pytest.mark.parametrize('make', [lambda: nn.Linear(3, 5), lambda: nn.LayerNorm(3), lambda: nn.Conv2d(2, 3, 5)])
def test_pytorchs_own_layers_are_plain(make: Callable[[], nn.Module]) -> None:
    assert is_plain(make())
    assert is_plain(make().requires_grad_(False).to(torch.bfloat16), make())


def replace_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def replace_weight(layer: nn.Linear) -> None:
    subclass = type('Packed', (Tensor,), {})  # as quantised weights are
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(subclass))


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    'a forward hook': lambda layer: layer.register_forward_hook(lambda *_: None),
    'a hook before forward': lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    'a backward hook': lambda layer: layer.register_full_backward_hook(lambda *_: None),
    'a hook before backward': lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    'another forward': replace_forward,
    'a weight of another class': replace_weight,
    'pruning': lambda layer: prune.l1_unstructured(layer, 'weight', amount=0.5),
    'a parametrisation': parametrizations.spectral_norm,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_layer_that_somebody_has_changed_is_not_plain(change: Callable[[nn.Linear], object]) -> None:
    layer = nn.Linear(3, 5)
    change(layer)
    assert not is_plain(layer)
    assert not is_plain(nn.Linear(3, 5), layer)


def test_a_layer_of_another_class_is_not_plain() -> None:
    assert not is_plain(nn.Sequential(nn.Linear(3, 5)))
    assert not is_plain(type('Own', (nn.Linear,), {})(3, 5))
