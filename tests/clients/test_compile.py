"""torch.compile around the model, around the criterion, and around both."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, memories
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
ACCUMULATE = 3


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def around_model(model: Any, backend: str) -> Loss:
    compiled = torch.compile(model, backend=backend)
    return lambda images, target: F.cross_entropy(compiled(images), target)


def around_criterion(model: Any, backend: str) -> Loss:
    criterion = torch.compile(F.cross_entropy, backend=backend)
    return lambda images, target: criterion(model(images), target)


def around_model_and_criterion(model: Any, backend: str) -> Loss:
    return torch.compile(lambda images, target: F.cross_entropy(model(images), target), backend=backend)


def around_both_apart(model: Any, backend: str) -> Loss:
    return around_criterion(torch.compile(model, backend=backend), backend)


PLACES = [around_model, around_criterion, around_model_and_criterion, around_both_apart]


def train(model: Any, place: Callable[[Any, str], Loss], backend: str, batches: list[Any]) -> Trained:
    loss, optimizer = place(model, backend), Recorder(model.parameters())
    for i, (images, target) in enumerate(batches, start=1):
        (loss(images, target) / ACCUMULATE).backward()
        if i % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
    return Trained(optimizer.seen, memories(model))


# In torch 2.14 no graph of 'aot_eager' takes a subclass of a tensor, whichever; those of 'inductor' do.
@pytest.mark.parametrize(
    ('place', 'backend'),
    [*((place, 'eager') for place in PLACES), (around_model, 'aot_eager'), (around_model_and_criterion, 'aot_eager')],
)
def test_compiled_and_accumulated_it_leaves_the_gradient_of_the_sum(place: Any, backend: str) -> None:
    batches = make_batches(2 * ACCUMULATE)
    assert_trains_like_by_hand(
        lambda model: train(model, place, backend, batches), batches, tolerance=1e-4, accumulate=ACCUMULATE
    )


@pytest.mark.parametrize('place', [around_both_apart, around_model_and_criterion])
def test_inductor_leaves_the_gradient_of_the_sum(place: Any) -> None:
    batches = make_batches(ACCUMULATE)
    assert_trains_like_by_hand(
        lambda model: train(model, place, 'inductor', batches), batches, tolerance=1e-3, accumulate=ACCUMULATE
    )
