"""Gradient checkpointing, around a layer or a model and by the blocks: one write, and the same gradients."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from stacks import IMAGES, TARGET, B, distance, gradients, make_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from timm_ait import GlobalWorkspace, replay
from timm_ait.blocks import AssociativeBlock


def run_checkpointed(wrap: Callable[[nn.Module, Tensor], Tensor], forwards: int) -> tuple[Any, Any]:
    model = make_model().double()
    torch.manual_seed(5)
    batches = [torch.randn(B, 3, 32, 32).double().requires_grad_() for _ in range(forwards)]
    sum(F.cross_entropy(wrap(model, x), TARGET) for x in batches).backward()
    return gradients(model), memories(model)


def wrap_blocks(model: nn.Module) -> None:
    for name, block in model.blocks.named_children():
        if isinstance(block, AssociativeBlock):  # not yet
            setattr(model.blocks, name, checkpoint_wrapper(block))


def compile_workspaces(model: nn.Module) -> None:
    for block in model.blocks:
        if isinstance(block.mlp, GlobalWorkspace):  # not yet
            block.mlp = torch.compile(block.mlp, backend='eager')


WRAPPED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    'its own': lambda m, x: (m.set_grad_checkpointing(), m(x))[1],
    'around the model': lambda m, x: checkpoint(m, x, use_reentrant=False),
    'around the model, reentrant': lambda m, x: checkpoint(m, x, use_reentrant=True),
    'around the model, keeping products': lambda m, x: checkpoint(
        m, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    ),
    'around the model, keeping copies': lambda m, x: checkpoint(
        m,
        x,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.clone.default]),
    ),
    'around each block': lambda m, x: m.forward_head(
        checkpoint(m.blocks[1], checkpoint(m.blocks[0], m.patch_embed(x), use_reentrant=False), use_reentrant=False)
    ),
    'its own, and around the model': lambda m, x: (
        m.set_grad_checkpointing(),
        checkpoint(m, x, use_reentrant=False),
    )[1],
    'its own, and around the model, reentrant': lambda m, x: (
        m.set_grad_checkpointing(),
        checkpoint(m, x, use_reentrant=True),
    )[1],
    'its own, and wrappers around blocks': lambda m, x: (m.set_grad_checkpointing(), wrap_blocks(m), m(x))[2],
    'its own, with compiled workspaces': lambda m, x: (m.set_grad_checkpointing(), compile_workspaces(m), m(x))[2],
}


@pytest.mark.filterwarnings('ignore:timm_ait could not follow how the last loss')  # through a reentrant checkpoint
@pytest.mark.parametrize('forwards', [1, 3])
@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED)
def test_checkpointing_from_outside_writes_once_and_changes_nothing(
    wrap: Callable[[nn.Module, Tensor], Tensor], forwards: int
) -> None:
    expected, expected_memories = run_checkpointed(lambda m, x: m(x), forwards)
    found, found_memories = run_checkpointed(wrap, forwards)
    assert distance(found, expected) < 1e-9
    torch.testing.assert_close(found_memories, expected_memories, rtol=0, atol=1e-12)


def run_twice(wrap: Callable[[nn.Module, Tensor], Tensor], batches: list[Tensor], at_once: bool, **kwargs: Any) -> Any:
    model = make_model(**kwargs).double()
    if at_once:
        sum(F.cross_entropy(wrap(model, x), TARGET) for x in batches).backward()
    else:
        for x in batches:
            F.cross_entropy(wrap(model, x), TARGET).backward()
    return gradients(model)


@pytest.mark.parametrize('at_once', [True, False])
@pytest.mark.parametrize('kwargs', [{}, dict(attention=False), dict(attention=False, write_scope='image')], ids=str)
def test_checkpointing_from_outside_tells_forwards_of_like_images_apart(kwargs: dict[str, Any], at_once: bool) -> None:
    other = IMAGES.double().flip(0)
    other[:, :, 24:] = IMAGES.double()[:, :, 24:] = 0.5  # the last row of patches is the same in all images
    batches = [x.clone().requires_grad_() for x in (IMAGES.double(), IMAGES.double(), other)]
    expected = run_twice(lambda m, x: m(x), batches, at_once, **kwargs)
    found = run_twice(lambda m, x: checkpoint(m, x, use_reentrant=False), batches, at_once, **kwargs)
    assert distance(found, expected) < 1e-9


def test_inputs_that_differ_in_one_channel_are_told_apart() -> None:
    seen, x = replay.Replay(), torch.zeros(16, 64, 64)
    other = x.clone()
    other[..., 1] = 1
    memory, later = torch.zeros(1), torch.ones(1)
    seen.note(memory, torch.zeros(()), x, is_automatic=False)
    seen.note(later, torch.zeros(()), other, is_automatic=False)
    assert seen.memory_before(x) is memory


def test_an_input_that_is_overwritten_after_its_forward_is_known_when_it_comes_again() -> None:
    seen, x, memory = replay.Replay(), torch.ones(2, 3, 5), torch.zeros(1)
    seen.note(memory, torch.zeros(()), x, is_automatic=False)
    x.zero_()
    assert seen.memory_before(torch.ones(2, 3, 5)) is memory


def test_checkpointing_from_outside_passes_over_a_forward_without_gradients() -> None:
    def consistent(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        logits = forward(IMAGES)
        with torch.no_grad():
            target = model(IMAGES)
        F.mse_loss(logits, target).backward()
        return gradients(model)

    model, twin = make_model(), make_model()
    found = consistent(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert distance(found, consistent(twin, twin)) < 1e-5


def test_checkpointing_from_outside_tells_shapes_and_devices_apart() -> None:
    grads = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        layer = GlobalWorkspace(8, num_slots=4, slot_dim=5, device='meta')
        layer(torch.empty(2, 8, 8, device='meta'))
        layer.to_empty(device='cpu')
        for module in layer.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        call = partial(checkpoint, layer, use_reentrant=False) if is_checkpointed else layer
        x = torch.randn(2, 8, 8).requires_grad_()
        outputs = [call(x), call(x.view(4, 4, 8))]  # as many elements, and the same
        sum(out.square().sum() for out in outputs).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpointing_from_outside_refuses_a_mode_that_changed_before_the_backward_pass(use_reentrant: bool) -> None:
    model = timm.create_model('test_ait').eval()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = checkpoint(model, images, use_reentrant=use_reentrant)
    model.train()
    before = memories(model)
    with pytest.raises(RuntimeError, match='no such forward came before it'):
        logits.sum().backward()
    assert_close(memories(model), before, rtol=0, atol=0)


def test_checkpointing_from_outside_warns_where_it_has_forgotten_the_forward() -> None:
    model = make_model(depth=1)
    batches = torch.randn(replay.MOST_FORWARDS + 1, B, 3, 32, 32)
    outputs = [checkpoint(model, x, use_reentrant=False) for x in batches]
    outputs[-1].sum().backward()
    with pytest.warns(UserWarning, match='not among the last 64 of a layer of timm_ait'):
        outputs[0].sum().backward()


def test_checkpointing_from_outside_bears_images_that_are_not_finite() -> None:
    model = make_model(depth=1)
    sum(checkpoint(model, x, use_reentrant=False).sum() for x in (IMAGES, IMAGES * torch.nan)).backward()
    assert all(memory.isfinite().all() for memory in memories(model))


def test_with_its_own_checkpointing_hooks_on_a_workspace_are_called_as_on_any_layer() -> None:
    model = make_model()
    expected, seen = copy.deepcopy(model), []
    model.set_grad_checkpointing()
    model.blocks[0].mlp.register_forward_hook(lambda *args: seen.append(args))
    for twin in (model, expected):
        F.cross_entropy(twin(IMAGES), TARGET).backward()
    assert seen
    assert distance(gradients(model), gradients(expected)) < 1e-5
    torch.testing.assert_close(memories(model), memories(expected))


def test_its_own_checkpointing_repeats_the_step_of_a_compiled_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError('the step has its memory as an input, and need not look for it')

    model = make_model()
    model.set_grad_checkpointing()
    compile_workspaces(model)
    monkeypatch.setattr(replay.Replay, 'memory_before', refuse)
    F.cross_entropy(model(IMAGES), TARGET).backward()


@pytest.mark.parametrize('mode', ['train', 'never'])
@pytest.mark.parametrize('kwargs', [{}, dict(write_rule='additive', write_scope='image')], ids=str)
def test_checkpointed_blocks_without_self_attention_need_not_write(kwargs: dict[str, Any], mode: str) -> None:
    model = make_model(attention=False, write_mode=mode, **kwargs)
    model.train(mode == 'never')
    expected = copy.deepcopy(model)
    model.set_grad_checkpointing()
    for twin in (model, expected):
        F.cross_entropy(twin(IMAGES), TARGET).backward()
    assert distance(gradients(model), gradients(expected)) < 1e-5
