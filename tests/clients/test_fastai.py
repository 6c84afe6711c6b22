"""fastai: batches of its own tensor types, its loss, its learner."""

from typing import Any

import pytest
import torch
from by_hand import LR, Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories

pytest.importorskip('fastai', reason="fastai is missing: pip install -e '.[clients]'")
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorCategory, TensorImage


@pytest.mark.filterwarnings('ignore:timm_ait could not follow how the last loss')  # its losses have a type of their own
def test_a_learner_leaves_the_gradients_of_the_sum() -> None:
    batches = make_batches(3)

    def train(model: Any) -> Trained:
        recorder = Recorder(model.parameters())
        typed = [(TensorImage(images), TensorCategory(target)) for images, target in batches]
        options = dict(loss_func=CrossEntropyLossFlat(), opt_func=lambda *_, **__: OptimWrapper(opt=recorder))
        learner = Learner(DataLoaders(typed, typed), model, **options)
        with learner.no_logging():
            learner.fit(1, lr=LR)
        return Trained(recorder.seen, memories(model))

    assert_trains_like_by_hand(train, batches, make=make_model)


def test_the_next_forward_says_that_the_scale_of_a_loss_of_fastai_is_out_of_sight() -> None:
    ((images, target),) = make_batches(1)
    model = make_model()
    (CrossEntropyLossFlat()(model(images), TensorCategory(target)) / 4).backward()
    with pytest.warns(UserWarning, match='timm_ait could not follow how the last loss'):
        model(images)


def test_images_of_fastai_are_classified_in_evaluation() -> None:
    ((images, _),) = make_batches(1)
    model = make_model().eval()
    with torch.no_grad():
        assert torch.equal(model(TensorImage(images)).as_subclass(torch.Tensor), model(images))


def test_beside_fastai_a_model_compiles_without_the_automatic_balance_loss() -> None:
    ((images, target),) = make_batches(1)
    model = make_model()
    model.auto_balance = False
    logits = torch.compile(model, backend='eager')(images)
    (torch.nn.functional.cross_entropy(logits, target) + model.balance_loss()).backward()
    assert torch.isfinite(model.blocks[0].mlp.fc1.weight.grad).all()
    assert model.blocks[0].mlp.key.weight.grad.norm() > 0
