"""What a forward leaves behind: the memory, which a frozen layer keeps, and a graph, which goes with its output."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import memories
from stacks import IMAGES, TARGET, distance, gradients, make_model
from timm.utils import freeze
from torch import nn


def test_the_graph_of_a_forward_goes_with_its_output() -> None:
    model = make_model()
    kept: list[Any] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    output = model(IMAGES)
    assert model.balance_loss().requires_grad
    value = model.balance_loss().item()
    del output
    gc.collect()
    assert kept[0]() is None
    assert not model.balance_loss().requires_grad
    assert model.balance_loss().item() == value


def test_without_the_mechanism_the_balance_loss_outlives_the_output() -> None:
    model = make_model()
    model.auto_balance = False
    model(IMAGES)
    model.balance_loss().backward()
    assert model.blocks[0].mlp.query.weight.grad.abs().max() > 0


def test_the_balance_loss_alone_and_then_the_loss_count_twice_in_all_blocks() -> None:
    model, by_hand = make_model(), make_model()
    loss = F.cross_entropy(model(IMAGES), TARGET)
    model.balance_loss().backward(retain_graph=True)
    loss.backward()
    by_hand.auto_balance = False
    loss = F.cross_entropy(by_hand(IMAGES), TARGET)
    (loss + 2 * by_hand.balance_loss()).backward()
    assert distance(gradients(model), gradients(by_hand)) < 1e-5


def test_a_frozen_model_writes_nothing_in_training_mode_and_a_part_of_it_does() -> None:
    model = make_model()
    before = memories(model)
    freeze(model)
    model(IMAGES)
    assert all(map(torch.equal, memories(model), before))
    model.blocks[1].mlp.fc1.requires_grad_(True)
    model(IMAGES)
    assert torch.equal(memories(model)[0], before[0])
    assert not torch.equal(memories(model)[1], before[1])


def test_a_frozen_model_that_always_writes_goes_on() -> None:
    model = make_model(write_mode='always')
    before = memories(model)
    freeze(model)
    model(IMAGES)
    assert not any(map(torch.equal, memories(model), before))


def test_on_the_meta_device_a_training_step_gives_shapes() -> None:
    model = make_model(device='meta')
    F.cross_entropy(model(IMAGES.to('meta')), TARGET.to('meta')).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def keep_parameters_elsewhere(layer: nn.Module) -> None:
    """As DataParallel and FSDP1 do: the weights become attributes."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter * 1)


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = make_model()
    model.blocks[0].mlp = model.blocks[0].mlp._replicate_for_data_parallel()  # as DataParallel copies each module
    with pytest.raises(ValueError, match='use DistributedDataParallel'):
        model(IMAGES)


def test_a_layer_whose_parameters_are_kept_elsewhere_writes() -> None:
    model, twin = make_model(), make_model()
    for block in model.blocks:
        keep_parameters_elsewhere(block.mlp)
    for each in (model, twin):
        F.cross_entropy(each(IMAGES), TARGET).backward()
    torch.testing.assert_close(memories(model), memories(twin))
    left = gradients(model)
    assert distance(left, {name: grad for name, grad in gradients(twin).items() if name in left}) < 1e-5
