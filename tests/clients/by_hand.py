"""What a training loop must leave: the gradients of ``scale * (criterion + balance_loss)``, by a loop written out.

A client trains a model and returns what its optimizer has seen. It does so twice: as users do, and with
``auto_balance = False``. The second run must leave the gradients of the criterion alone. So a test that passes would
fail without the mechanism.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ait import AssociativeTransformer

B, CLASSES, SIDE, LR = 6, 7, 32, 0.1
Batch = tuple[Tensor, Tensor]


class Trained(NamedTuple):
    """What a training leaves.

    Attributes:
        gradients: (P,) for each step of the optimizer: the gradients of all parameters, one after the other.
        memories: (M, D) for each block, after the last step.
    """

    gradients: list[Tensor]
    memories: list[Tensor]


class Recorder(torch.optim.SGD):
    """SGD that notes the gradients of each of its steps."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, lr=lr)
        self.seen: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append(flat_gradient(p for group in self.param_groups for p in group['params']))
        super().step()
        return loss


def flat_gradient(params: Iterable[Tensor]) -> Tensor:
    """(P,) gradients of all that is trained; zeros where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params if p.requires_grad]
    return torch.cat([grad.detach().flatten().float().clone() for grad in grads])


def make_model(**kwargs: Any) -> Any:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=11, balance_weight=0.1)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def make_batches(count: int, size: int = B, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, SIDE, SIDE, generator=generator), torch.arange(size).roll(i) % CLASSES)
        for i in range(count)
    ]


def set_auto_balance(model: nn.Module, is_automatic: bool) -> None:
    """Set it on the model itself: a wrapper, peft's for example, would take the attribute for its own."""
    for module in model.modules():
        if isinstance(module, AssociativeTransformer):
            module.auto_balance = is_automatic


def memories(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith('.memory')]


def train_by_hand(
    model: Any,
    batches: list[Batch],
    adds_balance_loss: bool,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
) -> Trained:
    """Train on ``batches``, with ``balance_loss()`` in the loss or without, and a step after each ``accumulate``."""
    set_auto_balance(model, False)
    optimizer = Recorder(model.parameters())
    for i, (images, target) in enumerate(batches, start=1):
        with torch.autocast('cpu', dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = criterion(model(images), target)
            if adds_balance_loss:
                loss = loss + model.balance_loss()
        (loss / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return Trained(optimizer.seen, memories(model))


def distance(a: Trained, b: Trained) -> float:
    """The largest relative distance of two trainings' gradients."""
    assert len(a.gradients) == len(b.gradients) > 0
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a.gradients, b.gradients, strict=True))


def assert_trains_like_by_hand(
    train: Callable[[Any], Trained],
    batches: list[Batch],
    tolerance: float = 1e-5,
    make: Callable[[], Any] = make_model,
    **by_hand: Any,
) -> None:
    """Fail unless a client trains a model like the loop by hand, with the balance loss and with it turned off.

    Args:
        train: What the client does with a model.
        batches: What it trains on.
        tolerance: Largest relative distance of the gradients of a step.
        make: Makes a model, each time the same.
        **by_hand: Keywords of :func:`train_by_hand`.
    """
    wanted = {}
    for is_automatic in (True, False):
        model = make()
        set_auto_balance(model, is_automatic)
        trained = train(model)
        wanted[is_automatic] = train_by_hand(make(), batches, adds_balance_loss=is_automatic, **by_hand)
        assert distance(trained, wanted[is_automatic]) < tolerance, f'auto_balance={is_automatic}'
        for memory, expected in zip(trained.memories, wanted[is_automatic].memories, strict=True):
            torch.testing.assert_close(memory, expected, rtol=0, atol=max(tolerance, 1e-6))
    assert distance(wanted[False], wanted[True]) > 10 * tolerance, 'the balance loss must weigh enough to be seen'
