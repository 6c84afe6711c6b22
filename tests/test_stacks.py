"""What training stacks do to a model: other outputs, compilers, checkpoints, adapters, frozen parts."""

import ast
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from timm.task import FeatureDistillationTask
from timm.utils import freeze, unfreeze
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchvision import tv_tensors

import timm_ait
from timm_ait import AssociativeTransformer, GlobalWorkspace, replay
from timm_ait.transformer import AssociativeBlock

B, CLASSES = 6, 7
Step = Callable[[AssociativeTransformer, Tensor], Tensor]

torch.manual_seed(0)
IMAGES, TARGET = torch.randn(B, 3, 32, 32), torch.randint(0, CLASSES, (B,))


def make_model(**kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=11, balance_weight=0.1)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    def name_of(name: str) -> str:
        return name.replace('_orig_mod.', '').replace('_checkpoint_wrapped_module.', '')

    return {name_of(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)).item() for k in b)


def assert_like_the_sum(step: Step, scale: float = 1.0, bound: float = 1e-5, **kwargs: Any) -> None:
    """The gradients of ``step`` are those of its loss plus the balance loss, times ``scale`` where it scales."""
    model = make_model(**kwargs)
    by_hand, alone = copy.deepcopy(model), copy.deepcopy(model)
    step(model, IMAGES).backward()
    by_hand.auto_balance = alone.auto_balance = False
    loss = step(by_hand, IMAGES)
    (loss + scale * by_hand.balance_loss()).backward()
    assert distance(gradients(model), gradients(by_hand)) < bound
    step(alone, IMAGES).backward()
    summed = gradients(by_hand)
    bare = {key: gradients(alone).get(key, torch.zeros_like(value)) for key, value in summed.items()}
    assert distance(bare, summed) > 1e-3, 'without the mechanism the gradients differ'


# Other outputs than logits


def distilled(model: AssociativeTransformer, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    task = FeatureDistillationTask(model, make_model().eval(), criterion=nn.CrossEntropyLoss(), verbose=False)
    return task.train()(x, TARGET)['loss']


OUTPUTS: dict[str, Step] = {
    'logits': lambda m, x: F.cross_entropy(m(x), TARGET),
    'features and head': lambda m, x: F.cross_entropy(m.forward_head(m.forward_features(x)), TARGET),
    'features': lambda m, x: m.forward_features(x).square().mean(),
    'the last of the intermediates': lambda m, x: m.forward_intermediates(x)[0].square().mean(),
    'all intermediates': lambda m, x: sum(
        y.square().mean() for y in m.forward_intermediates(x, intermediates_only=True)
    ),
    'blocks called one by one': lambda m, x: m.blocks(m.patch_embed(x)).square().mean(),
    'feature distillation of timm': distilled,
}


@pytest.mark.parametrize('step', OUTPUTS.values(), ids=OUTPUTS)
def test_any_output_brings_the_balance_loss(step: Step) -> None:
    assert_like_the_sum(step)


@pytest.mark.parametrize('name', ['features and head', 'all intermediates', 'feature distillation of timm'])
def test_any_output_follows_the_scale_of_the_loop(name: str) -> None:
    assert_like_the_sum(lambda m, x: OUTPUTS[name](m, x) / 4, scale=1 / 4)


def test_a_single_logit_is_no_loss_yet() -> None:
    assert_like_the_sum(lambda m, x: (m(x[:1]) / 10 - 1).square().mean(), num_classes=1)


@pytest.mark.parametrize('is_compiled', [False, True])
@pytest.mark.parametrize(('weights', 'scale'), [((0.25, 0.25), 0.25), ((0.5, 0.5), 1), ((0.3, 0.7), 1)])
def test_features_only_brings_the_balance_loss(weights: tuple[float, float], scale: float, is_compiled: bool) -> None:
    args = dict(features_only=True, out_indices=(0, 1), depth=2, embed_dim=32, num_heads=2, balance_weight=0.1)
    results = []
    for is_by_hand in (False, True):
        torch.manual_seed(1)
        features = timm.create_model('test_ait', **args).train()
        features.model.auto_balance = not is_by_hand
        call = torch.compile(features, backend='aot_eager') if is_compiled and not is_by_hand else features
        loss = sum(weight * y.square().mean() for weight, y in zip(weights, call(IMAGES), strict=True))
        (loss + scale * features.model.balance_loss() if is_by_hand else loss).backward()
        results.append(gradients(features))
    assert distance(*results) < (1e-4 if is_compiled else 1e-5)


class Wrapped(nn.Module):
    """A block in a module that knows nothing of it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inside = block

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inside(x, **kwargs)


def wrap_a_layer(model: nn.Module) -> None:
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp, nn.Identity())


def wrap_a_block(model: nn.Module) -> None:
    model.blocks[0] = Wrapped(model.blocks[0])


@pytest.mark.parametrize('is_checkpointed', [False, True])
@pytest.mark.parametrize('wrap', [wrap_a_layer, wrap_a_block])
def test_a_layer_or_block_may_be_wrapped(wrap: Callable[[nn.Module], None], is_checkpointed: bool) -> None:
    results = []
    for change in (lambda model: None, wrap):
        model = make_model()
        change(model)
        model.set_grad_checkpointing(is_checkpointed)
        (F.cross_entropy(model(IMAGES), TARGET) / 4).backward()
        results.append((list(gradients(model).values()), memories(model), model.balance_loss().detach()))
        with torch.no_grad():
            model.eval()(IMAGES, is_causal=True)
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize('is_checkpointed', [False, True])
def test_some_blocks_may_have_no_memory(is_checkpointed: bool) -> None:
    model = make_model(depth=3)
    model.blocks[0].mlp = Mlp(32, 64)
    model.blocks[2] = Block(32, 2)
    model.set_grad_checkpointing(is_checkpointed)
    F.cross_entropy(model(IMAGES), TARGET).backward()
    assert_close(model.balance_loss(), model.blocks[1].mlp.balance_loss())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.auto_balance = False
    assert type(model(IMAGES, is_causal=True)) is Tensor
    model.blocks[1].mlp = Mlp(32, 64)
    assert model.balance_loss().item() == 0


def test_a_copy_of_an_image_behind_a_wrapper_takes_no_mask() -> None:
    model = make_model(write_scope='image')
    wrap_a_layer(model)
    model.blocks[1].mlp = Mlp(32, 64)
    with pytest.raises(ValueError, match="with write_scope='image' every token reads what all others wrote"):
        model(IMAGES, is_causal=True)


def test_a_block_without_a_workspace_is_refused() -> None:
    assert isinstance(AssociativeBlock(32, 2).mlp, GlobalWorkspace)
    with pytest.raises(ValueError, match=r'(?s)needs a workspace, got Mlp\(.*; give mlp_layer=GlobalWorkspace'):
        VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, block_fn=AssociativeBlock)
    model = VisionTransformer(
        img_size=32, embed_dim=32, depth=1, num_heads=2, block_fn=AssociativeBlock, mlp_layer=GlobalWorkspace
    )
    model(IMAGES).sum().backward()
    assert model.blocks[0].mlp.balance_loss() > 0


def test_auto_balance_of_a_model_reaches_a_workspace_that_is_wrapped() -> None:
    model = make_model()
    for block in model.blocks:
        block.mlp = checkpoint_wrapper(block.mlp)
    model.auto_balance = False
    assert type(model(IMAGES)) is Tensor
    assert not any(module.auto_balance for module in model.modules() if isinstance(module, GlobalWorkspace))


def test_auto_balance_of_a_model_is_on_only_where_it_is_on_in_every_workspace() -> None:
    model = make_model()
    assert model.auto_balance
    model.blocks[0].mlp.auto_balance = False
    assert not model.auto_balance


def test_what_gets_no_gradient_is_frozen_and_nothing_is_unfrozen() -> None:
    model = make_model(write_rule='additive', write_scope='image')
    trained = [p.requires_grad for p in model.parameters()]
    freeze(model)
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    for block in model.blocks:
        block.mlp.freeze_untrained()
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not all(trained)
    freeze(model)
    for block in model.blocks:
        block.mlp.freeze_untrained()
    assert not any(p.requires_grad for p in model.parameters())


def test_a_workspace_in_another_model_brings_its_balance_loss() -> None:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES,
        mlp_layer=partial(GlobalWorkspace, num_slots=5, slot_dim=3, write_heads=2, bottleneck=11, balance_weight=0.1),
    )  # fmt: skip
    twin = copy.deepcopy(vit)
    F.cross_entropy(vit(IMAGES), TARGET).backward()
    layers = [block.mlp for block in twin.blocks]
    loss = F.cross_entropy(twin(IMAGES), TARGET)
    (loss + sum(layer.balance_loss() for layer in layers)).backward()  # by hand: counted once, not twice
    assert distance(gradients(vit), gradients(twin)) < 1e-5


class Annotated(Tensor):
    """Images as fastai and MONAI have them: a subclass that copies itself to every result."""


@pytest.mark.parametrize('wrap', [lambda x: x.as_subclass(Annotated), tv_tensors.Image], ids=['subclass', 'tv_tensors'])
def test_images_of_a_tensor_subclass_bring_the_balance_loss(wrap: Callable[[Tensor], Tensor]) -> None:
    assert_like_the_sum(lambda m, x: F.cross_entropy(m(wrap(x)), TARGET) / 4, scale=1 / 4)
    assert_like_the_sum(lambda m, x: m.forward_intermediates(wrap(x))[0].square().mean() / 4, scale=1 / 4)


def test_a_mask_of_a_tensor_subclass_does_so_too() -> None:
    def step(model: AssociativeTransformer, x: Tensor) -> Tensor:
        tokens = model.patch_embed.num_patches
        return F.cross_entropy(model(x, attn_mask=torch.zeros(tokens, tokens).as_subclass(Annotated)), TARGET) / 4

    assert_like_the_sum(step, scale=1 / 4)


# Compilers


def compiled(what: str, backend: str) -> Step:
    ce = nn.CrossEntropyLoss()
    fullgraph = partial(torch.compile, backend=backend, fullgraph=True)

    def step(model: AssociativeTransformer, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        if what == 'model':
            return ce(fullgraph(model)(x), TARGET) / 4
        if what == 'criterion':
            return fullgraph(ce)(model(x), TARGET) / 4
        return fullgraph(lambda x, y: ce(model(x), y))(x, TARGET) / 4

    return step


NEEDS_NEW_DYNAMO = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13),
    reason='torch.compile of 2.9, 2.11 and 2.12 ends in an error for a tracked input',
)


# PyTorch's compiler asks every tensor that enters a graph for its grad, and hides the warning, but not as an error.
ASKS_FOR_GRAD = pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning')


@ASKS_FOR_GRAD
# aot_eager, a backend to debug with, takes no subclass of a tensor as an input of a graph, not even an empty one.
@pytest.mark.parametrize(
    ('what', 'backend'),
    [
        *[('model', backend) for backend in ('eager', 'aot_eager', 'inductor')],
        *[pytest.param('criterion', backend, marks=NEEDS_NEW_DYNAMO) for backend in ('eager', 'inductor')],
        *[('step', backend) for backend in ('eager', 'aot_eager', 'inductor')],
    ],
)
def test_compiled_as_one_graph_the_gradients_follow_the_scale_of_the_loop(what: str, backend: str) -> None:
    assert_like_the_sum(compiled(what, backend), scale=1 / 4, bound=1e-4)


@NEEDS_NEW_DYNAMO
@ASKS_FOR_GRAD
def test_compiled_autograd_takes_a_step_with_its_backward_pass() -> None:
    eager, compiled = make_model(), make_model()
    F.cross_entropy(eager(IMAGES), TARGET).backward()

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(compiled(x), y).backward()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend='aot_eager')(IMAGES, TARGET)
    assert distance(gradients(compiled), gradients(eager)) < 1e-4


# Gradient checkpointing from outside


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


# Threads


def test_trainings_in_two_threads_keep_their_own_scales() -> None:
    both_run = threading.Barrier(2)

    def wait(grad: Tensor) -> None:
        both_run.wait(30)

    def train(model: nn.Module, scale: float) -> dict[str, Tensor]:
        loss = F.cross_entropy(model(IMAGES), TARGET) * scale
        loss.register_hook(wait)
        loss.backward()
        return gradients(model)

    with ThreadPoolExecutor(2) as pool:
        one, many = pool.map(train, (make_model(), make_model()), (1.0, 1024.0))
    assert distance({name: grad * 1024 for name, grad in one.items()}, many) < 1e-4


def test_a_loss_that_cannot_be_followed_takes_no_scale_from_another_thread() -> None:
    model, twin = make_model(), make_model()
    in_the_middle, over = threading.Barrier(2), threading.Event()

    def wait(grad: Tensor) -> None:
        in_the_middle.wait(30)
        assert over.wait(30)

    def train_scaled() -> None:
        logits = make_model()(IMAGES)
        logits.register_hook(wait)
        (F.cross_entropy(logits, TARGET) * 1024).backward()

    def train_unseen() -> None:
        logits = model(IMAGES)
        in_the_middle.wait(30)
        logits.backward(torch.ones_like(logits))
        over.set()

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(train_scaled), pool.submit(train_unseen)]:
            job.result()
    logits = twin(IMAGES)
    logits.backward(torch.ones_like(logits))
    assert distance(gradients(model), gradients(twin)) < 1e-4


# Functions of functions


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_an_ensemble_by_vmap_evaluates_and_is_refused_in_training_mode() -> None:
    models = [make_model().eval() for _ in range(2)]
    params, buffers = torch.func.stack_module_state(models)

    def run(model: nn.Module) -> Tensor:
        return torch.func.vmap(lambda p, b: functional_call(model, (p, b), (IMAGES,)))(params, buffers)

    torch.testing.assert_close(run(models[0]), torch.stack([model(IMAGES) for model in models]))
    with pytest.raises(ValueError, match='vmap over models'):
        run(models[0].train())


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')  # PyTorch's own rules of forward mode
def test_forward_mode_by_parameters_is_refused_in_training_mode_and_right_in_evaluation() -> None:
    model = make_model(attention=False).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}

    def run(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (IMAGES,)).logsumexp(-1).mean()

    _, tangent = torch.func.jvp(run, (params,), (tangents,))
    grads = torch.func.grad(run)(params)
    torch.testing.assert_close(tangent, sum((grads[name] * tangents[name]).sum() for name in grads))
    model.train()
    with pytest.raises(NotImplementedError, match='jvp'):
        torch.func.jvp(run, (params,), (tangents,))


def test_torch_func_grad_in_training_mode_gives_the_gradients_of_backward() -> None:
    model = make_model()
    params, buffers = dict(model.named_parameters()), {k: v.clone() for k, v in model.named_buffers()}

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, (params, buffers), (IMAGES,)), TARGET)

    found = grad(loss)(params, buffers)
    F.cross_entropy(model(IMAGES), TARGET).backward()
    assert distance(found, gradients(model)) < 1e-5


@pytest.mark.parametrize('steps', [1, 3])
def test_inner_steps_that_an_outer_one_differentiates_have_the_gradients_of_the_sum(steps: int) -> None:
    model, by_hand = make_model(), make_model()
    for block in (*model.blocks, *by_hand.blocks):
        block.attn.fused_attn = False  # PyTorch has no second derivative of it
    by_hand.auto_balance = False

    def train(model: AssociativeTransformer, balance: Callable[[], Tensor | float]) -> Tensor:
        weights = dict(model.named_parameters())
        trained = [name for name, weight in weights.items() if weight.requires_grad]
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, weights, (IMAGES,)), TARGET) + balance()
            inner = torch.autograd.grad(loss, [weights[name] for name in trained], create_graph=True)
            weights |= {name: weights[name] - 0.1 * grad for name, grad in zip(trained, inner, strict=True)}
        (F.cross_entropy(functional_call(model, weights, (IMAGES,)), TARGET) + balance()).backward()
        return torch.cat([grad.detach().flatten() for grad in inner])

    found, expected = train(model, lambda: 0.0), train(by_hand, by_hand.balance_loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert distance(gradients(model), gradients(by_hand)) < 1e-4


def test_a_gradient_penalty_in_training_mode_holds_no_balance_loss() -> None:
    def penalty(model: AssociativeTransformer) -> Tensor:
        x = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    model, twin = make_model(), make_model()
    twin.auto_balance = False
    assert penalty(model).item() == pytest.approx(penalty(twin).item(), rel=1e-5)


# Layers that somebody has changed


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


# Memory of the machine, and frozen parts


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


def test_one_block_that_is_frozen_leaves_the_balance_loss_of_the_others_to_the_scale_of_the_loop() -> None:
    def step(model: AssociativeTransformer, x: Tensor) -> Tensor:
        model.blocks[1].mlp.requires_grad_(False)
        return F.cross_entropy(model(x), TARGET) / 4

    assert_like_the_sum(step, scale=1 / 4)


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
    keep_parameters_elsewhere(model.blocks[0].mlp)
    model.blocks[0].mlp._is_replica = True  # as torch.nn.parallel.replicate marks its copies
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


def test_the_balance_loss_of_one_model_by_hand_leaves_that_of_another_alone() -> None:
    student, by_hand, twin = make_model(), make_model(), make_model()
    by_hand.auto_balance = False
    loss = F.cross_entropy(student(IMAGES), TARGET) + F.cross_entropy(by_hand(IMAGES), TARGET)
    (loss + by_hand.balance_loss()).backward()
    F.cross_entropy(twin(IMAGES), TARGET).backward()
    assert distance(gradients(student), gradients(twin)) < 1e-5
    assert distance(gradients(by_hand), gradients(twin)) < 1e-5


# Private names of PyTorch: which file needs them

PRIVATE = {
    'torch._C._current_graph_task_id': 'balance.py: the number of the running backward pass',
    'torch._C._will_engine_execute_node': 'balance.py: whether a pass computes the gradient of a parameter',
    'torch._C._functorch.is_batchedtensor': 'workspace.py: whether vmap hides that parameters are trained',
    'torch._C._functorch.is_gradtrackingtensor': 'workspace.py: whether jvp differentiates by parameters',
    'torch._C.DisableTorchFunctionSubclass': 'balance.py: operations on what is inside a tracked tensor',
    'torch.autograd.Variable._execution_engine.queue_callback': 'balance.py: the end of a backward pass',
    'torch.utils._pytree.tree_map': 'balance.py: outputs in lists and dicts',
    'torch.utils._pytree.tree_leaves': 'balance.py: arguments in lists and dicts',
    'torch.utils._python_dispatch._disable_current_modes': 'replay.py: what selective checkpointing must not see',
    'torch.utils._python_dispatch._get_current_dispatch_mode_stack': 'replay.py: whether it runs',
    'torch.utils.checkpoint._CachedTorchDispatchMode': 'replay.py: whether it runs',
    'torch.utils.checkpoint._CachingTorchDispatchMode': 'replay.py: whether it runs',
    'torch.compiler._is_exporting_flag': 'transformer.py: outputs stay plain while a model is exported',
    'torch.ops.aten._embedding_bag_per_sample_weights_backward': 'selection.py: gradient of the gates on a CPU',
    'torch.nn.Module._forward_hooks': 'layers.py: whether somebody has changed a layer',
}


@pytest.mark.parametrize('name', PRIVATE)
def test_a_private_name_of_pytorch_is_still_there(name: str) -> None:
    place: Any = torch
    for part in name.split('.')[1:]:
        if place is nn.Module:
            place = nn.Module()
        assert hasattr(place, part), f'{name} is gone; it is needed in {PRIVATE[name]}'
        place = getattr(place, part)


def test_no_other_private_name_of_pytorch_is_used() -> None:
    known = {part for name in PRIVATE for part in name.split('.') if part.startswith('_')}
    known |= {'_apply', '_backward_hooks', '_forward_pre_hooks', '_backward_pre_hooks', '__torch_dispatch__'}
    found = set()
    for path in Path(timm_ait.__file__).parent.glob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'torch':
                parts = (*node.module.split('.'), *(imported.name for imported in node.names))
                found |= {part for part in parts if part.startswith('_')}
            if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if names & {'torch', 'Variable', 'layer'} and node.attr not in defined:
                    found.add(node.attr)
    assert found <= known, found - known
