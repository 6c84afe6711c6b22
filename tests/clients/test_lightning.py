"""Lightning: its Trainer steps, accumulates, lowers the precision, saves and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories, train_by_hand
from torch import Tensor
from torch.utils.data import DataLoader

lightning = pytest.importorskip('lightning', reason="lightning is missing: pip install -e '.[clients]'")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402


class Classifier(lightning.LightningModule):
    def __init__(self, model: Any, compiles_step: bool = False) -> None:
        super().__init__()
        self.model = model
        self.loss = torch.compile(self.compute_loss, backend='eager') if compiles_step else self.compute_loss

    def compute_loss(self, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), target)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.log('loss', loss)
        return loss

    def configure_optimizers(self) -> Recorder:
        return Recorder(self.model.parameters())


def fit(module: Classifier, batches: list[Any], resume: Path | None = None, **kwargs: Any) -> Any:
    args = dict(accelerator='cpu', max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(**dict(args, enable_checkpointing=False, **kwargs))
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume)
    return trainer


def train(model: Any, batches: list[Any], compiles_step: bool = False, **kwargs: Any) -> Trained:
    trainer = fit(Classifier(model, compiles_step), batches, **kwargs)
    return Trained(trainer.optimizers[0].seen, memories(model))


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('compiles_step', [False, True])
def test_the_trainer_leaves_the_gradient_of_the_sum(accumulate: int, compiles_step: bool) -> None:
    batches = make_batches(6)
    assert_trains_like_by_hand(
        lambda model: train(model, batches, compiles_step, accumulate_grad_batches=accumulate),
        batches,
        tolerance=1e-4 if compiles_step else 1e-5,  # compiled operations round otherwise, and six steps carry it on
        accumulate=accumulate,
    )


def test_bf16_mixed_leaves_the_gradient_of_the_sum() -> None:
    batches = make_batches(4)
    assert_trains_like_by_hand(
        lambda model: train(model, batches, precision='bf16-mixed', accumulate_grad_batches=2),
        batches,
        tolerance=1e-4,
        accumulate=2,
        autocast=torch.bfloat16,
    )


def test_a_gradient_scaler_scales_the_balance_loss() -> None:
    batches = make_batches(2)  # one step: float16 rounds weights, and then another token is selected

    def train_scaled(model: Any) -> Trained:
        scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
        plugin = MixedPrecision('16-mixed', device='cpu', scaler=scaler)
        return train(model, batches, plugins=[plugin], accumulate_grad_batches=2)

    assert_trains_like_by_hand(train_scaled, batches, tolerance=1e-3, accumulate=2, autocast=torch.float16)


def test_clipping_sees_the_balance_loss() -> None:
    batches = make_batches(2)
    model = make_model()
    clipped = train(model, batches, gradient_clip_val=0.01)
    assert all(float(gradient.norm()) == pytest.approx(0.01, rel=1e-3) for gradient in clipped.gradients)
    wanted = train_by_hand(make_model(), batches[:1], adds_balance_loss=True).gradients[0]
    assert F.cosine_similarity(clipped.gradients[0], wanted, dim=0) > 1 - 1e-5  # 0.9984 without the balance loss


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path: Path) -> None:
    batches = make_batches(4)
    whole = make_model()
    fit(Classifier(whole), batches, max_epochs=2)
    trainer = fit(Classifier(make_model()), batches, max_epochs=1)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    resumed = make_model()
    fit(Classifier(resumed), batches, resume=tmp_path / 'last.ckpt', max_epochs=2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
