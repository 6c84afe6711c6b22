"""On a GPU: what the CPU computes, without a wait of the CPU for the GPU, compiled and as CUDA graphs too."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_same_state, images, make_model, memories
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_ait import memory_report

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

B = 16
TARGET = torch.arange(B) % 13
KINDS: dict[str, dict[str, Any]] = {
    'published': dict(),
    'detached': dict(write_grad=False),
    'distinct': dict(write_rule='distinct'),
    'image': dict(write_rule='distinct', write_scope='image'),
    'additive': dict(write_rule='additive', write_scope='image'),
    'competing': dict(write_rule='competing', write_scope='image'),
}
kinds = pytest.mark.parametrize('kwargs', KINDS.values(), ids=KINDS)


def train(model: nn.Module, steps: int = 3, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Train in the way of a loop that knows nothing of the balance loss; return loss, gradients and memories."""
    weight = next(model.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    results = []
    for step in range(steps):
        optimizer.zero_grad()
        logits = (model if call is None else call)(images(B, seed=step).to(weight))
        loss = F.cross_entropy(logits, TARGET.to(weight.device))
        loss.backward()
        optimizer.step()
        results += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        results += memories(model)
    return [x.cpu() for x in results]


def assert_near(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    """No tensor is farther from its twin than ``bound``, relative to its length."""
    for x, y in zip(ours, theirs, strict=True):
        assert float((x.double() - y.double()).norm()) <= bound * float(y.double().norm()) + 1e-12


@pytest.mark.parametrize('layout', ['paper', 'vit'])
@kinds
def test_training_steps_are_those_of_the_cpu(layout: str, kwargs: dict[str, Any]) -> None:
    model = make_model(layout, **kwargs).double()
    assert_near(train(copy.deepcopy(model).cuda()), train(model), 1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@kinds
def test_mixed_precision_is_near_float32(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    def mixed(x: Tensor) -> Tensor:
        with torch.autocast('cuda', dtype):
            return model(x).float()

    model = make_model(**kwargs).cuda()
    wide = copy.deepcopy(model)
    loss, *rest = train(model, 1, mixed)
    expected, *others = train(wide, 1)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    memory, other = rest[-len(model.blocks) :], others[-len(model.blocks) :]
    assert all(x.dtype == torch.float32 for x in memory)
    assert_near(memory, other, 0.1)


def test_a_gradient_scaler_of_float16_scales_the_balance_loss_too() -> None:
    def gradients(is_followed: bool) -> list[Tensor]:
        model = make_model(balance_weight=0.1).cuda()
        model.auto_balance = is_followed
        scaler = torch.amp.GradScaler('cuda', init_scale=1024.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with torch.autocast('cuda', torch.float16):
            loss = F.cross_entropy(model(images(B).cuda()), TARGET.cuda())
        scaler.scale(loss if is_followed else loss + model.balance_loss()).backward()
        scaler.unscale_(optimizer)
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_near(gradients(True), gradients(False), 1e-3)


@pytest.fixture
def no_wait() -> Iterator[Callable[[], None]]:
    """Call it, and from then on every wait of the CPU for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode('error')
    torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@kinds
def test_a_training_step_never_waits_for_the_gpu(
    kwargs: dict[str, Any], dtype: torch.dtype, no_wait: Callable[[], None]
) -> None:
    model, x, target = make_model(**kwargs).cuda(), images(B).cuda(), TARGET.cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for step in range(3):
        if step == 1:
            no_wait()
        with torch.autocast('cuda', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite()


@pytest.mark.filterwarnings('ignore:TensorFloat32 tensor cores:UserWarning')
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
@kinds
def test_compiled_training_is_that_of_eager_mode(kwargs: dict[str, Any], mode: str) -> None:
    torch._dynamo.reset()
    model = make_model(**kwargs).cuda()
    twin = copy.deepcopy(model)
    assert_near(train(model, 4, torch.compile(model, mode=mode, fullgraph=True)), train(twin, 4), 1e-3)


@pytest.mark.parametrize('is_fused', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_evaluation_is_captured_as_a_cuda_graph(is_fused: bool, dtype: torch.dtype) -> None:
    model = make_model('vit').eval()
    model = (reparameterize_model(model) if is_fused else model).to('cuda', dtype)
    x = images(B).to('cuda', dtype)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x)
        x.copy_(images(B, seed=7))
        graph.replay()
        torch.testing.assert_close(logits, model(x))


@kinds
def test_gradient_checkpointing_changes_nothing(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs).cuda().double()
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing()
    assert_near(train(model), train(twin), 1e-9)


@pytest.mark.parametrize('kwargs', [KINDS['published'], KINDS['image']], ids=['published', 'image'])
def test_the_logits_of_an_image_do_not_depend_on_its_batch(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs).cuda()
    train(model)
    model.eval()
    x = images(B).cuda()
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), model(x), rtol=1e-4, atol=1e-5)


def test_reports_and_state_move_between_gpu_and_cpu() -> None:
    model = make_model().cuda()
    train(model)
    on_cpu = copy.deepcopy(model).cpu()
    (ours, _), (theirs, _) = memory_report(model, images(B)), memory_report(on_cpu, images(B))
    assert ours.effective_rank == pytest.approx(theirs.effective_rank, rel=1e-3)
    other = make_model().cuda()
    other.load_state_dict(on_cpu.state_dict())
    assert_same_state(other, model)
