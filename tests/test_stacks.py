"""What training stacks do to a model: other outputs, compilers, checkpoints, adapters, frozen parts."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from stacks import CLASSES, IMAGES, TARGET, distance, gradients, make_model
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from timm.task import FeatureDistillationTask
from timm.utils import freeze, unfreeze
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad
from torch.testing import assert_close
from torchvision import tv_tensors

from timm_ait import AssociativeTransformer, GlobalWorkspace
from timm_ait.blocks import AssociativeBlock

Step = Callable[[AssociativeTransformer, Tensor], Tensor]


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


@pytest.mark.filterwarnings('ignore:timm_ait could not follow how the last loss')
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


def test_one_block_that_is_frozen_leaves_the_balance_loss_of_the_others_to_the_scale_of_the_loop() -> None:
    def step(model: AssociativeTransformer, x: Tensor) -> Tensor:
        model.blocks[1].mlp.requires_grad_(False)
        return F.cross_entropy(model(x), TARGET) / 4

    assert_like_the_sum(step, scale=1 / 4)


def test_the_balance_loss_of_one_model_by_hand_leaves_that_of_another_alone() -> None:
    student, by_hand, twin = make_model(), make_model(), make_model()
    by_hand.auto_balance = False
    loss = F.cross_entropy(student(IMAGES), TARGET) + F.cross_entropy(by_hand(IMAGES), TARGET)
    (loss + by_hand.balance_loss()).backward()
    F.cross_entropy(twin(IMAGES), TARGET).backward()
    assert distance(gradients(student), gradients(twin)) < 1e-5
    assert distance(gradients(by_hand), gradients(twin)) < 1e-5
