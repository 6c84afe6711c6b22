"""Whatever the loop does, the gradients are those of ``criterion(...) + balance_loss``."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import accuracy
from torch import Tensor, nn

from timm_ait import AssociativeTransformer
from timm_ait.balance import TrackedTensor, track

B, CLASSES = 6, 7
Loss = Callable[[Tensor], Tensor]
Grads = dict[str, Tensor]

torch.manual_seed(0)
IMAGES = torch.randn(B, 3, 32, 32)
TARGET = torch.randint(0, CLASSES, (B,))
SOFT = torch.randn(B, CLASSES).softmax(-1)
TEACHER = torch.randn(B, CLASSES).log_softmax(-1)


def make_model(**kwargs: object) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=11, balance_weight=0.1)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def distill(logits: Tensor) -> Tensor:
    kd = F.kl_div((logits / 4).log_softmax(-1), TEACHER, log_target=True, reduction='batchmean') * 16
    return 0.3 * nn.CrossEntropyLoss()(logits, TARGET) + 0.7 * kd


def with_z_loss(logits: Tensor) -> Tensor:
    logged = [logits.norm(), logits.max(), logits.mean()]  # followed as well, to no effect
    z_loss = 1e-2 * logits.logsumexp(-1).square().mean()
    assert all(isinstance(x.item(), float) for x in logged)
    return z_loss + nn.CrossEntropyLoss()(logits, TARGET)


def by_halves(logits: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits.split(3), TARGET.split(3), strict=True)]).mean()


LOSSES: dict[str, Loss] = {
    'cross entropy': lambda x: nn.CrossEntropyLoss()(x, TARGET),
    'label smoothing': lambda x: LabelSmoothingCrossEntropy(0.1)(x, TARGET),
    'soft target': lambda x: SoftTargetCrossEntropy()(x, SOFT),
    'binary': lambda x: BinaryCrossEntropy()(x, SOFT),
    'binary, summed classes': lambda x: BinaryCrossEntropy(sum_classes=True)(x, TARGET),
    'jsd': lambda x: JsdCrossEntropy(num_splits=3)(x, TARGET),
    'distillation': distill,
    'z-loss and logging': with_z_loss,
    'two halves': by_halves,
    'negated mean': lambda x: -x.log_softmax(-1).gather(1, TARGET[:, None]).mean(),
    'one minus': lambda x: 1 - x.softmax(-1).gather(1, TARGET[:, None]).mean(),
    'times minus one': lambda x: -1 * x.log_softmax(-1).gather(1, TARGET[:, None]).mean(),
    'in-place logits': lambda x: nn.CrossEntropyLoss()(x.div_(2.0), TARGET),
    'regularised': lambda x: nn.CrossEntropyLoss()(x, TARGET) + torch.ones(3, requires_grad=True).square().sum(),
}


def gradients(model: AssociativeTransformer, loss: Loss, explicit: bool | None, call: Callable | None = None) -> Grads:
    """Of the loss as it is, with the balance loss added by hand, or (None) of the criterion alone."""
    model.auto_balance = explicit is False
    model.zero_grad()
    total = loss((model if call is None else call)(IMAGES))
    if explicit:
        total = total + model.balance_loss()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: Grads, b: Grads) -> float:
    """Largest relative distance of a parameter's gradients."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)) for k in b)


@pytest.mark.parametrize('write_grad', [True, False])
@pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)
def test_the_gradient_is_that_of_the_sum_although_the_loop_adds_nothing(loss: Loss, write_grad: bool) -> None:
    model = make_model(write_grad=write_grad).double()
    images = IMAGES.double()
    results = []
    for explicit in (False, True, None):
        twin = copy.deepcopy(model)
        results.append(gradients(twin, loss, explicit, call=lambda _, twin=twin: twin(images)))
    followed, summed, bare = results
    assert distance(followed, summed) < 1e-12
    bare = {k: bare.get(k, torch.zeros_like(v)) for k, v in summed.items()}
    assert distance(bare, summed) > 1e-3  # without the mechanism this test fails


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('loss', [LOSSES['cross entropy'], LOSSES['jsd']], ids=['cross entropy', 'jsd'])
def test_under_autocast(dtype: torch.dtype, loss: Loss) -> None:
    def cast(x: Tensor, model: AssociativeTransformer) -> Tensor:
        with torch.autocast('cpu', dtype):
            return model(x)

    results = []
    for explicit in (False, True, None):
        model = make_model()
        results.append(gradients(model, loss, explicit, call=partial(cast, model=model)))
    followed, summed, bare = results
    assert distance(followed, summed) < 1e-6
    assert distance(bare, summed) > 1e-2


@pytest.mark.parametrize('steps', [1, 3])
def test_with_a_float16_scaler_whose_scale_changes_and_accumulated_steps(steps: int) -> None:
    """The update that a step of the optimizer sees, over three steps of the scaler."""

    def updates(explicit: bool | None) -> list[Grads]:
        model = make_model()
        model.auto_balance = explicit is False
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler('cpu', init_scale=65536.0)
        seen = []
        for next_scale in (8192.0, 512.0, 65536.0):
            optimizer.zero_grad()
            for _ in range(steps):
                with torch.autocast('cpu', torch.float16):
                    loss = nn.CrossEntropyLoss()(model(IMAGES), TARGET)
                if explicit:
                    loss = loss + model.balance_loss()
                if steps > 1:
                    loss /= steps  # as timm does, in place
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            seen.append({k: p.grad.clone() for k, p in model.named_parameters()})
            scaler.step(optimizer)
            scaler.update(next_scale)
        return seen

    for followed, summed, bare in zip(updates(False), updates(True), updates(None), strict=True):
        assert all(torch.isfinite(g).all() for g in summed.values())
        assert distance(followed, summed) < 1e-6
        assert distance(bare, summed) > 1e-2


def test_losses_of_several_forwards_have_the_balance_loss_of_each() -> None:
    def run(explicit: bool) -> Grads:
        model = make_model()
        model.auto_balance = not explicit
        total: Tensor | float = 0.0
        for images in (IMAGES[:3], IMAGES[3:]):
            loss = nn.CrossEntropyLoss()(model(images), TARGET[:3])
            total = total + (loss + model.balance_loss() if explicit else loss) / 2
        assert isinstance(total, Tensor)
        total.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters()}

    assert distance(run(False), run(True)) < 1e-6


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = make_model(), make_model()
    checkpointed.set_grad_checkpointing()
    summed = gradients(plain, LOSSES['cross entropy'], True)
    assert distance(gradients(checkpointed, LOSSES['cross entropy'], False), summed) < 1e-6


@pytest.mark.parametrize('backend', ['eager', 'aot_eager', 'inductor'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_model_compiled_as_one_graph_gives_the_same_gradients(backend: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    summed = gradients(make_model(), LOSSES['cross entropy'], True)
    model = make_model()
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert distance(gradients(model, LOSSES['cross entropy'], False, call=compiled), summed) < 1e-4


@pytest.mark.parametrize('what', ['model', 'step'])
def test_gradients_of_images_alone_hold_no_balance_loss_where_it_is_compiled_either(what: str) -> None:
    x, found = IMAGES.clone().requires_grad_(), []
    for is_automatic in (True, False):
        model = make_model().train()
        model.auto_balance = is_automatic
        compiled = torch.compile(model, backend='aot_eager', fullgraph=True) if what == 'model' else model

        def step(x: Tensor, model: nn.Module = compiled) -> Tensor:
            return F.cross_entropy(model(x), TARGET)

        loss = (torch.compile(step, backend='aot_eager', fullgraph=True) if what == 'step' else step)(x)
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_numbers_that_a_user_sees_are_ordinary() -> None:
    model = make_model()
    followed = model(IMAGES)
    plain = followed.detach()
    assert type(followed) is TrackedTensor
    assert type(plain) is type(followed.data) is type(followed.argmax(-1)) is Tensor
    assert followed.norm().item() == plain.norm().item()
    assert repr(followed.norm().detach()) == repr(plain.norm())
    assert f'{followed.max():.5f}' == f'{plain.max():.5f}'
    assert F.cross_entropy(followed, TARGET).item() == F.cross_entropy(plain, TARGET).item()
    assert [x.item() for x in accuracy(followed, TARGET, (1, 3))] == [x.item() for x in accuracy(plain, TARGET, (1, 3))]
    assert followed.detach().numpy().shape == (B, CLASSES)
    with torch.no_grad():
        assert type(F.cross_entropy(followed, TARGET)) is Tensor


@pytest.mark.parametrize('kind', ['logits', 'loss'])
def test_saved_and_copied_they_are_plain_tensors(kind: str) -> None:
    followed = make_model()(IMAGES)
    followed = followed if kind == 'logits' else F.cross_entropy(followed, TARGET)
    file = io.BytesIO()
    torch.save(followed, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is Tensor
    assert torch.equal(loaded, followed.detach())
    assert type(copy.copy(followed)) is Tensor
    with pytest.raises(RuntimeError, match='deepcopy protocol'):  # as for any tensor with a graph
        copy.deepcopy(followed)
    assert type(pickle.loads(pickle.dumps(followed))) is Tensor


def test_the_gradient_of_an_output_can_be_kept_set_and_deleted() -> None:
    logits = make_model()(IMAGES)
    logits.retain_grad()
    logits.sum().backward()
    assert torch.equal(logits.grad, torch.ones(B, CLASSES))
    logits.grad = None
    assert logits.grad is None
    logits.grad = torch.ones(B, CLASSES)
    del logits.grad
    assert logits.grad is None


def test_a_loss_is_freed_with_its_last_name() -> None:
    loss = F.cross_entropy(make_model()(IMAGES), TARGET)
    there = weakref.ref(loss)
    del loss  # a cycle would stay until the garbage collector comes, and hold the graph on the GPU
    assert there() is None


def test_outputs_are_plain_where_no_gradient_can_flow() -> None:
    model = make_model()
    with torch.no_grad():
        assert type(model(IMAGES)) is Tensor
    assert type(model.eval()(IMAGES)) is Tensor
    assert type(make_model(balance_weight=0.0)(IMAGES)) is Tensor
    assert type(make_model(write_mode='never')(IMAGES)) is Tensor


def test_evaluation_that_writes_has_plain_logits_and_the_gradient_of_the_loss_alone() -> None:
    model, twin = make_model(write_mode='always').eval(), make_model(write_mode='always').eval()
    twin.auto_balance = False
    logits = model(IMAGES)
    assert type(logits) is Tensor
    logits.square().sum().backward()
    twin(IMAGES).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_switch_leaves_plain_logits_and_a_plain_balance_loss() -> None:
    model = make_model()
    model.auto_balance = False
    assert type(model(IMAGES)) is Tensor
    assert type(model.balance_loss()) is Tensor
    assert model.balance_loss().requires_grad


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
def test_traced_scripted_and_exported_models_return_plain_tensors() -> None:
    model = make_model().eval()
    assert type(torch.jit.script(model)(IMAGES)) is Tensor
    assert type(torch.export.export(model, (IMAGES,)).module()(IMAGES)) is Tensor
    graph = torch.fx.Tracer()
    graph.is_leaf_module = lambda module, name: not isinstance(module, (AssociativeTransformer, nn.Sequential))  # type: ignore[method-assign]
    traced = torch.fx.GraphModule(model.train(), graph.trace(model.train()))
    assert type(traced(IMAGES)) is Tensor


def test_what_is_no_plain_tensor_comes_back_as_it_is() -> None:
    proxy = object()
    assert track(proxy) is proxy
