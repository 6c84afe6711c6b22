"""captum and grad-cam look into a model, torchmetrics counts: none of them moves a memory."""

import pytest
import torch
from by_hand import CLASSES, make_batches, make_model, memories

EXTRA = "pip install -e '.[clients]'"


def test_integrated_gradients_add_up_to_the_difference_of_the_logits() -> None:
    attr = pytest.importorskip('captum.attr', reason=f'captum is missing: {EXTRA}')
    ((images, target),) = make_batches(1)
    model = make_model().eval()
    before = memories(model)
    method = attr.IntegratedGradients(model)
    parts, gap = method.attribute(images, target=target, n_steps=100, return_convergence_delta=True)
    assert parts.shape == images.shape
    assert gap.abs().max() < 0.1
    assert all(map(torch.equal, memories(model), before))


def test_grad_cam_draws_a_map_from_the_norm_before_a_workspace() -> None:
    cam = pytest.importorskip('pytorch_grad_cam', reason=f'grad-cam is missing: {EXTRA}')
    ((images, _),) = make_batches(1)
    model = make_model().eval()
    before = memories(model)

    def to_map(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).unflatten(-1, model.patch_embed.grid_size)  # (B, N, E) -> (B, E, N) -> (B, E, H, W)

    with cam.GradCAM(model, [model.blocks[-1].norm1], reshape_transform=to_map) as method:
        maps = method(images, targets=None)
    assert maps.shape == (len(images), *images.shape[-2:])
    assert maps.max() > 0
    assert all(map(torch.equal, memories(model), before))


def test_metrics_take_the_logits_of_a_training_step() -> None:
    metrics = pytest.importorskip('torchmetrics', reason=f'torchmetrics is missing: {EXTRA}')
    ((images, target),) = make_batches(1)
    accuracy = metrics.classification.MulticlassAccuracy(CLASSES, average='micro')
    logits = make_model().train()(images)
    accuracy.update(logits, target)
    assert accuracy.compute().item() == pytest.approx((logits.argmax(-1) == target).float().mean().item())
