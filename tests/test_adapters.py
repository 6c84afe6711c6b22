"""Layers inside a workspace that somebody has changed: adapters, hooks, other weights."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from stacks import IMAGES, TARGET, make_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from timm_ait import AssociativeTransformer


class Adapter(nn.Module):
    """A layer with a low-rank addition, as adapters have it."""

    def __init__(self, base: nn.Linear | nn.Conv2d, scale: float) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight  # as adapters show the weight of their base
        self.extra = copy.deepcopy(base)
        nn.init.normal_(self.extra.weight, std=0.2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        extra = self.extra(x) if self.extra.bias is None else self.extra(x) - self.extra(torch.zeros_like(x))
        return self.base(x) + self.scale * extra


def adapt(model: AssociativeTransformer, scale: float) -> AssociativeTransformer:
    torch.manual_seed(2)
    for block in model.blocks:
        for name in ('query', 'key', 'value', 'proj', 'linear_transform'):
            setattr(block.mlp, name, Adapter(getattr(block.mlp, name), scale))
    model.patch_embed.proj = Adapter(model.patch_embed.proj, scale)
    return model


def test_a_layer_that_is_called_computes_what_the_formula_reads_from_a_plain_one() -> None:
    plain, called = make_model(), adapt(make_model(), scale=0.0)
    torch.testing.assert_close(called(IMAGES).detach(), plain(IMAGES).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(memories(called), memories(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(called.balance_loss().detach(), plain.balance_loss().detach(), rtol=1e-4, atol=1e-5)


def test_every_adapter_acts_and_gets_a_gradient() -> None:
    model = adapt(make_model(), scale=1.0)
    weak = adapt(make_model(), scale=0.5)
    assert not torch.allclose(model(IMAGES), weak(IMAGES), atol=1e-2)
    assert not torch.allclose(memories(model)[0], memories(weak)[0], atol=1e-3)
    F.cross_entropy(model(IMAGES), TARGET).backward()
    without = [name for name, p in model.named_parameters() if 'extra.weight' in name and not p.grad.abs().max() > 0]
    assert not without


def test_a_hook_on_a_layer_of_the_write_runs_and_counts() -> None:
    layer, x = make_model().blocks[0].mlp, torch.randn(2, 11, 32)
    twin, seen = copy.deepcopy(layer), []
    twin.value.register_forward_hook(lambda module, args, out: seen.append(1) or 2 * out)
    layer.value.weight.data *= 2
    layer(x)
    twin(x)
    assert seen == [1]
    torch.testing.assert_close(twin.memory, layer.memory, rtol=1e-4, atol=1e-5)


def test_a_parametrised_layer_of_the_write_counts() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer, x = make_model().blocks[0].mlp, torch.randn(2, 11, 32)
    twin = copy.deepcopy(layer)
    parametrize.register_parametrization(twin.key, 'weight', Doubled())
    layer.key.weight.data *= 2
    layer(x)
    twin(x)
    torch.testing.assert_close(twin.memory, layer.memory, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_weight_is_packed_into_integers_is_called_with_floats() -> None:
    class Packed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(layer.weight.data.view(torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.view(torch.float32).to(x.dtype))

    model, plain = make_model(), make_model()
    for block in model.blocks:
        for name in ('query', 'key', 'value', 'proj'):
            setattr(block.mlp, name, Packed(getattr(block.mlp, name)))
    torch.testing.assert_close(model(IMAGES).detach(), plain(IMAGES).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(memories(model), memories(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*torch.ao.quantization is deprecated:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*quantized tensor.*:UserWarning')
@pytest.mark.parametrize('name', ['test_ait', 'ait_tiny_conv4_32'])  # the second one has a memory for each image
def test_a_dynamically_quantised_model_answers_nearly_alike(name: str) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, found = model(IMAGES), quantised(IMAGES)
    assert float((found - expected).norm() / expected.norm()) < 0.1
