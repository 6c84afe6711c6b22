"""accelerate: accumulation, backward, mixed precision, checkpoints and offloading."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories

accelerate = pytest.importorskip('accelerate', reason="accelerate is missing: pip install -e '.[clients]'")
from accelerate.state import AcceleratorState  # noqa: E402


@pytest.fixture(autouse=True)
def _forget_other_settings() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model: Any, batches: list[Any], accelerator: Any) -> Trained:
    recorder = Recorder(model.parameters())
    prepared, optimizer = accelerator.prepare(model, recorder)
    for images, target in batches:
        with accelerator.accumulate(prepared):
            with accelerator.autocast():
                loss = F.cross_entropy(prepared(images), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return Trained(recorder.seen, memories(model))


@pytest.mark.parametrize(('precision', 'dtype'), [('no', None), ('bf16', torch.bfloat16)])
@pytest.mark.parametrize('accumulate', [1, 3])
def test_accumulate_and_backward_leave_the_gradient_of_the_sum(accumulate: int, precision: str, dtype: Any) -> None:
    batches = make_batches(6)

    def train_prepared(model: Any) -> Trained:
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        return train(model, batches, accelerator)

    assert_trains_like_by_hand(
        train_prepared, batches, tolerance=1e-4 if dtype else 1e-5, accumulate=accumulate, autocast=dtype
    )


def test_clip_and_gather_for_metrics_take_the_outputs_of_a_training_forward() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(make_model())
    ((images, target),) = make_batches(1)
    logits = model(images)
    accelerator.backward(F.cross_entropy(logits, target))
    accelerator.clip_grad_norm_(model.parameters(), 0.01)
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert float(norms.norm()) == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(accelerator.gather_for_metrics(logits.detach()), logits)


def test_a_saved_state_brings_the_memory_back(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(make_model())
    model(make_batches(1)[0][0])
    accelerator.save_state(str(tmp_path))
    saved = memories(model)
    model(make_batches(1, seed=2)[0][0])
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(memories(model), saved, strict=True))


@pytest.mark.parametrize('model_name', ['test_ait', 'ait_small'])
def test_offloaded_to_the_cpu_it_returns_the_same_logits(model_name: str) -> None:
    torch.manual_seed(1)
    args: dict[str, Any] = dict(img_size=32, embed_dim=32, num_heads=2, num_classes=7)
    model = timm.create_model(model_name, **dict(args, patch_size=8)).eval()
    images = make_batches(1)[0][0]
    with torch.no_grad():
        expected = model(images)
        accelerate.cpu_offload(model, execution_device='cpu')
        torch.testing.assert_close(model(images), expected)
