"""transformers: its Trainer around a small wrapper, and around its own wrapper of timm models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import CLASSES, Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories
from torch import Tensor, nn

transformers = pytest.importorskip('transformers', reason="transformers is missing: pip install -e '.[clients]'")
SIZE = 6


class Wrapper(nn.Module):
    """A model as the Trainer wants it: the loss is its first output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {'logits': logits} if labels is None else {'loss': F.cross_entropy(logits, labels), 'logits': logits}


def of_timm_wrapper(model: Any) -> Any:
    """Wrapped as transformers wraps models of timm, without network, with ``model`` inside."""
    config = transformers.TimmWrapperConfig(
        architecture='test_ait',
        num_labels=CLASSES,
        model_args=dict(depth=2, embed_dim=32, num_heads=2, bottleneck=11, balance_weight=0.1),
    )
    wrapped = transformers.TimmWrapperForImageClassification(config)
    wrapped.timm_model = model
    return wrapped


def fit(
    module: nn.Module, batches: list[Any], folder: Path, resume: Any = None, loss: Any = None, **kwargs: Any
) -> Any:
    args = dict(
        per_device_train_batch_size=SIZE, num_train_epochs=1, max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy='no', disable_tqdm=True, logging_strategy='no', lr_scheduler_type='constant',
        dataloader_drop_last=True, train_sampling_strategy='sequential',
    )  # fmt: skip
    optimizer = Recorder([p for p in module.parameters() if p.requires_grad])
    trainer = transformers.Trainer(
        module,
        transformers.TrainingArguments(output_dir=str(folder), **dict(args, **kwargs)),
        train_dataset=[
            {'pixel_values': image, 'labels': label} for x, y in batches for image, label in zip(x, y, strict=True)
        ],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        compute_loss_func=loss,
    )
    trainer.train(resume_from_checkpoint=resume)
    return optimizer


def train(module: nn.Module, batches: list[Any], folder: Path, **kwargs: Any) -> Trained:
    optimizer = fit(module, batches, folder, **kwargs)
    return Trained(optimizer.seen, memories(module))


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('wrap', [Wrapper, of_timm_wrapper])
def test_the_trainer_leaves_the_gradient_of_the_sum(wrap: Any, accumulate: int, tmp_path: Path) -> None:
    batches = make_batches(6)
    assert_trains_like_by_hand(
        lambda model: train(wrap(model), batches, tmp_path, gradient_accumulation_steps=accumulate),
        batches,
        accumulate=accumulate,
    )


def test_a_sum_over_all_items_of_accumulated_batches_leaves_the_gradient_of_the_sum(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return F.cross_entropy(outputs['logits'], labels, reduction='sum') / num_items_in_batch

    batches = make_batches(6)
    assert_trains_like_by_hand(
        lambda model: train(of_timm_wrapper(model), batches, tmp_path, gradient_accumulation_steps=3, loss=loss),
        batches,
        accumulate=3,
    )


def test_bf16_leaves_the_gradient_of_the_sum(tmp_path: Path) -> None:
    batches = make_batches(4)
    assert_trains_like_by_hand(
        lambda model: train(Wrapper(model), batches, tmp_path, gradient_accumulation_steps=2, bf16=True),
        batches,
        tolerance=1e-4,
        accumulate=2,
        autocast=torch.bfloat16,
    )


def test_compiled_by_the_trainer_it_leaves_the_gradient_of_the_sum(tmp_path: Path) -> None:
    batches = make_batches(4)
    options = dict(torch_compile=True, torch_compile_backend='aot_eager', gradient_accumulation_steps=2)
    assert_trains_like_by_hand(
        lambda model: train(Wrapper(model), batches, tmp_path, **options), batches, tolerance=1e-4, accumulate=2
    )


def test_gradient_checkpointing_by_the_trainer_changes_nothing(tmp_path: Path) -> None:
    batches = make_batches(2)
    assert_trains_like_by_hand(
        lambda model: train(of_timm_wrapper(model), batches, tmp_path, gradient_checkpointing=True), batches
    )


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path: Path) -> None:
    batches = make_batches(4)
    whole, resumed = Wrapper(make_model()), Wrapper(make_model())
    fit(whole, batches, tmp_path / 'whole')
    fit(Wrapper(make_model()), batches, tmp_path, max_steps=2, save_strategy='steps', save_steps=2)
    fit(resumed, batches, tmp_path, resume=str(tmp_path / 'checkpoint-2'))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_saved_wrapper_brings_the_memory_along(tmp_path: Path) -> None:
    wrapped = of_timm_wrapper(make_model())
    images = make_batches(1)[0][0]
    wrapped(images)
    wrapped.eval().save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, wrapped(images).logits)
