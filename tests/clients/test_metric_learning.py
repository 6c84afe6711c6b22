"""pytorch-metric-learning: all of its losses of embeddings and labels, with a miner and a memory bank too."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories
from torch import Tensor, nn

pytest.importorskip('pytorch_metric_learning', reason="pytorch-metric-learning is missing: pip install -e '.[clients]'")
from pytorch_metric_learning import losses

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
WIDTH = 32  # of an embedding
SIZES = {'num_classes': 3, 'embedding_size': WIDTH}
KEYWORDS: dict[str, dict[str, Any]] = {
    'P2SGradLoss': {'num_classes': 3, 'descriptors_dim': WIDTH},
    'ArcFaceLoss': SIZES,
    'CosFaceLoss': SIZES,
    'SubCenterArcFaceLoss': SIZES,
    'RankedListLoss': {'margin': 0.4, 'Tn': 10},
    'ThresholdConsistentMarginLoss': {'lambda_plus': 1.0, 'lambda_minus': 1.0, 'margin_plus': 0.9, 'margin_minus': 0.2},
}
# Base classes, wrappers that take a loss, and one that takes no labels
OTHERS = {
    'BaseLossWrapper', 'BaseMetricLossFunction', 'CrossBatchMemory', 'GenericPairLoss', 'MultipleLosses',
    'SelfSupervisedLoss', 'ManifoldLoss',
}  # fmt: skip
# These take a second view of each image.
OF_TWO_VIEWS = {'VICRegLoss'}


def loss_names() -> list[str]:
    classes = {name: kind for name, kind in vars(losses).items() if inspect.isclass(kind)}
    return sorted(name for name, kind in classes.items() if issubclass(kind, nn.Module) and name not in OTHERS)


def make_loss(name: str) -> nn.Module:
    torch.manual_seed(7)
    kind = getattr(losses, name)
    wanted = [n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty and n in SIZES]
    return kind(**KEYWORDS.get(name, {key: SIZES[key] for key in wanted}))


def make() -> Any:
    return make_model(num_classes=0, global_pool='avg')


def train(model: Any, batches: list[Any], criterion: Callable[[Tensor, Tensor], Tensor], accumulate: int) -> Trained:
    optimizer = Recorder(model.parameters())
    for images, _ in batches:
        (criterion(model(images), LABELS) / accumulate).backward()
    optimizer.step()
    return Trained(optimizer.seen, memories(model))


@pytest.mark.parametrize('name', loss_names())
def test_the_loss_leaves_the_gradient_of_the_sum(name: str) -> None:
    batches = make_batches(1)

    def criterion(x: Tensor, y: Tensor) -> Tensor:  # made anew: one of the losses remembers the last batch
        loss = make_loss(name)
        return loss(x, ref_emb=x.roll(1, 0).detach()) if name in OF_TWO_VIEWS else loss(x, y)

    assert_trains_like_by_hand(
        lambda model: train(model, batches, criterion, 1),
        batches,
        tolerance=1e-5,
        make=make,
        criterion=lambda x, y: criterion(x, LABELS),
    )
