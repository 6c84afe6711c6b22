"""MONAI: its losses, and batches that carry metadata."""

from typing import Any

import pytest
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, memories

monai = pytest.importorskip('monai', reason="monai is missing: pip install -e '.[clients]'")
from monai.data import MetaTensor  # noqa: E402
from monai.losses import DiceCELoss, DiceLoss, FocalLoss  # noqa: E402

LOSSES = {
    'dice': DiceLoss(to_onehot_y=True, softmax=True),
    'dice and cross entropy': DiceCELoss(to_onehot_y=True, softmax=True),
    'focal': FocalLoss(to_onehot_y=True, use_softmax=True),
}


def as_maps(loss: Any) -> Any:
    """MONAI's losses want maps: (B, K) and (B,) -> (B, K, 1, 1) and (B, 1, 1, 1)."""
    return lambda logits, target: loss(logits[:, :, None, None], target[:, None, None, None])


@pytest.mark.parametrize('name', LOSSES)
def test_batches_with_metadata_leave_the_gradient_of_the_sum(name: str) -> None:
    batches, loss = make_batches(2), as_maps(LOSSES[name])

    def train(model: Any) -> Trained:
        optimizer = Recorder(model.parameters())
        for images, target in batches:
            optimizer.zero_grad()
            loss(model(MetaTensor(images)), MetaTensor(target)).backward()
            optimizer.step()
        return Trained(optimizer.seen, memories(model))

    assert_trains_like_by_hand(train, batches, criterion=loss)
