"""Which factor the balance loss gets, for losses written in many ways. One number stands in for the balance loss."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy, JsdCrossEntropy
from torch import Tensor, nn

from timm_ait import balance
from timm_ait.balance import TrackedTensor, attach, track

B, C = 6, 5
torch.manual_seed(0)
Y, WEIGHTS = torch.randint(0, C, (B,)), torch.linspace(0.5, 2, B)
ONE_HOT = F.one_hot(Y, C).float()
SOFT = torch.rand(B, C).softmax(-1)
SCALE, COUNT = torch.tensor(1024.0), torch.tensor(4 * B)
LAM, HALF = torch.tensor(0.3), torch.tensor(0.5)
ce = partial(F.cross_entropy, target=Y)
bce = partial(F.binary_cross_entropy_with_logits, target=ONE_HOT, reduction='sum')


def z(x: Tensor) -> Tensor:
    return x.logsumexp(-1).square().mean()


class Model:
    """Logits (B, C) that carry a balance loss of one number."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.randn(B, C))
        self.balance = nn.Parameter(torch.zeros(()))

    def __call__(self) -> Tensor:
        return track(attach(self.weight * 2, self.balance * 1))

    def factor(self) -> float:
        return 0.0 if self.balance.grad is None else self.balance.grad.item()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not balance._passes, 'a backward pass was not forgotten at its end'


def factor_of(loss: Callable[[Tensor], Tensor]) -> float:
    model = Model()
    loss(model()).backward()
    return model.factor()


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.square().mean()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.ones(B, C)


def accumulated(x: Tensor) -> Tensor:
    total = torch.zeros(())
    total += ce(x)
    return total


def in_place(x: Tensor) -> Tensor:
    loss = ce(x)
    loss /= 4
    return loss


def in_place_as_statement(x: Tensor) -> Tensor:
    loss = ce(x)
    loss.div_(4).mul_(8)
    return loss


def into_an_empty_batch(x: Tensor) -> Tensor:
    logits = torch.zeros(B, 2, C)
    logits[:, 0] = x
    return ce(logits[:, 0])


def into_a_view(x: Tensor) -> Tensor:
    logits = torch.zeros(B, 2, C)
    logits.select(1, 0).copy_(x)
    return ce(logits[:, 0])


def histogram(x: Tensor) -> Tensor:
    places = torch.zeros(C)
    places.scatter_add_(0, Y, x.softmax(-1).amax(-1))
    return places.square().mean()


def into_places(x: Tensor) -> Tensor:
    losses = torch.zeros(B)
    for i in range(B):
        losses[i] = F.cross_entropy(x[i], Y[i])
    return 1 - losses.mean()


def into_buffer(x: Tensor) -> Tensor:
    losses = torch.zeros(2)
    losses[0], losses[1] = ce(x), z(x)
    return losses.sum()


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    'a mean': ce,
    'a sum': lambda x: ce(x, reduction='sum'),
    'a sum divided by the samples': lambda x: ce(x, reduction='sum') / B,
    'a sum times one over the samples': lambda x: ce(x, reduction='sum') * (1 / B),
    'a sum divided by its elements': lambda x: x.square().sum() / (B * C),
    'a sum divided by the number of positives': lambda x: bce(x) / 7,
    'a weighted mean': lambda x: (WEIGHTS * ce(x, reduction='none')).sum() / WEIGHTS.sum(),
    'a weighted mean by a product': lambda x: ce(x, reduction='none') @ WEIGHTS / WEIGHTS.sum(),
    'a weighted mean by a dot product': lambda x: torch.dot(ce(x, reduction='none'), WEIGHTS) / WEIGHTS.sum(),
    'dice': lambda x: 1 - (2 * (x.sigmoid() * ONE_HOT).sum() + 1) / (x.sigmoid().sum() + ONE_HOT.sum() + 1),
    'the logarithm of a share': lambda x: -((x.sigmoid() * ONE_HOT).sum() / x.sigmoid().sum()).log(),
    'the root of a sum': lambda x: (x - SOFT).square().sum().sqrt(),
    'a weighted sum, divided': lambda x: 0.1 * ce(x, reduction='none').sum() / B,
    'a weighted sum, divided by a number of another kind': lambda x: 0.1 * ce(x, reduction='none').sum() / 4,
    'two weighted sums, divided': lambda x: 0.5 * ce(x, reduction='none').sum() / B + 0.5 * x.square().sum() / B,
    'a mean without what is missing': lambda x: ce(x, reduction='none').nansum() / B,
    'soft labels by einsum': lambda x: -torch.einsum('bc,bc->', SOFT, x.log_softmax(-1)) / B,
    'soft labels, summed, by the samples': lambda x: F.cross_entropy(x, SOFT, reduction='sum') / B,
    'a number before each of two terms': lambda x: 0.5 * ce(x) + 0.3 * z(x),
    'a masked mean': lambda x: (ce(x, reduction='none') * (WEIGHTS > 1)).sum() / (WEIGHTS > 1).sum(),
    'the two sides of CLIP': lambda x: (ce(x) + ce(x.flip(0))) / 2,
    'the two sides of CLIP, divided by a tensor': lambda x: (ce(x) + ce(x.flip(0))) / torch.tensor(2),
    'the two sides of CLIP, each halved': lambda x: ce(x) / 2 + ce(x.flip(0)) / 2,
    'a sum divided by twice the samples': lambda x: x.square().sum() / (2 * B),  # of active pairs, for example
    'a sum divided by twice its elements': lambda x: x.square().sum() / (2 * B * C),
    'the same, by a tensor': lambda x: x.square().sum() / torch.tensor(2 * B * C),
    'SigLIP': lambda x: -F.logsigmoid(x * (2 * ONE_HOT - 1)).sum() / B,
    'samples in a loop': lambda x: sum(F.cross_entropy(x[i], Y[i]) for i in range(B)) / B,
    'mixup of two losses': lambda x: 0.3 * ce(x) + 0.7 * ce(x.flip(0)),
    'task and distillation': lambda x: 0.3 * ce(x) + 0.7 * z(x),
    'task and a small penalty': lambda x: ce(x) + 0.01 * z(x),
    'task and a large weight': lambda x: 10 * ce(x) + z(x),
    'a term divided by a small number': lambda x: ce(x) + z(x) / 0.1,
    'mixup by a tensor': lambda x: LAM * ce(x) + (1 - LAM) * ce(x.flip(0)),
    'mixup by halves in a tensor': lambda x: HALF * ce(x) + HALF * ce(x.flip(0)),
    'a penalty with a tensor for its weight': lambda x: ce(x) + LAM * z(x),
    'a loss times weights, and their mean': lambda x: ((ce(x) + z(x)) * torch.ones(B)).mean(),
    'a loss expanded, and its mean': lambda x: ce(x).expand(3).mean(),
    'a mean of means': lambda x: torch.stack([F.cross_entropy(x[i], Y[i]) for i in range(6)]).view(2, 3).mean(0).mean(),
    'a penalty with a tensor of zero': lambda x: ce(x) + torch.tensor(0.0) * z(x),
    'weights in a tensor': lambda x: WEIGHTS[0] * ce(x) + WEIGHTS[1] * z(x) + WEIGHTS[2] * x.abs().mean(),
    'a mask of one loss': lambda x: ce(x) * torch.isfinite(ce(x)),
    'divided by whether there are labels': lambda x: ce(x) / (Y >= 0).any(),
    'two sums, divided by the samples': lambda x: (ce(x, reduction='sum') + x.square().sum()) / B,
    'the two sums of a VAE': lambda x: (ce(x, reduction='sum') + 0.1 * x.square().sum()) / B,
    'a sum over classes divided by more than its elements': lambda x: bce(x) / (B * C + 1),
    'a sum divided by a weight': lambda x: ce(x, reduction='sum') / (WEIGHTS.sum() + 0.1),
    'a sum and a mean, divided by the samples': lambda x: (ce(x, reduction='sum') + 0.1 * z(x)) / B,
    'two heads': lambda x: ce(x) + 0.4 * ce(x.flip(0)),
    'a stack of two': lambda x: torch.stack([ce(x), ce(x.flip(0))]).mean(),
    'negative mean of logs': lambda x: -x.log_softmax(-1).gather(1, Y[:, None]).mean(),
    'times minus one': lambda x: -1 * x.log_softmax(-1).gather(1, Y[:, None]).mean(),
    'times minus one as a tensor': lambda x: torch.tensor(-1.0) * x.log_softmax(-1).gather(1, Y[:, None]).mean(),
    'times minus one by keyword': lambda x: torch.mul(input=x.log_softmax(-1).gather(1, Y[:, None]).mean(), other=-1),
    'one minus': lambda x: 1 - x.softmax(-1).gather(1, Y[:, None]).mean(),
    'shape (1, 1)': lambda x: ce(x, reduction='none')[:, None].mean((0, 1), keepdim=True),
    'a learned weight': lambda x: ce(x) * torch.full((), 3.0, requires_grad=True) + 1,
    'a number in a tensor, divided by it': lambda x: torch.tensor(4.0) / ce(x),
    'one of two terms divided': lambda x: ce(x) + z(x) / 4,
    'a sum divided by a count of fewer samples': lambda x: ce(x, reduction='sum') / torch.tensor(4),
    'a sum over classes divided by its elements': lambda x: bce(x) / (B * C),
    'a sum over classes divided by a count of its elements': lambda x: bce(x) / torch.tensor(B * C),
    'a sum over classes divided by a count of positives': lambda x: bce(x) / torch.tensor(7),
    'a sum over classes divided by a weight': lambda x: bce(x) / torch.tensor(2.0 * B),
    'the mean of a sum, divided by the samples': lambda x: ce(x, reduction='sum').mean() / B,
    'a custom function': Custom.apply,
    'added to a tensor in place': accumulated,
    'written into a tensor': into_buffer,
    'logits written into a batch': into_an_empty_batch,
    'logits copied into a view': into_a_view,
    'logits added to a tensor': lambda x: ce(torch.zeros(B, C).add_(x)),
    'a histogram': histogram,
    'losses of samples written into places': into_places,
    'a tensor iterated over': lambda x: torch.stack([F.cross_entropy(a, b) for a, b in zip(x, Y, strict=True)]).mean(),
    'the mean taken off': lambda x: (x - x.mean()).square().mean(),
    'divided by the norm': lambda x: (x / x.norm()).square().mean(),
    'a parameter norm added': lambda x: ce(x) + torch.ones(3, requires_grad=True).square().sum(),
    'logits changed in place': lambda x: ce(x.div_(4.0)),
    'a temperature': lambda x: ce(x / 4),
    'timm, asymmetric': lambda x: AsymmetricLossMultiLabel()(x, ONE_HOT),
    'timm, binary, classes summed': lambda x: BinaryCrossEntropy(sum_classes=True)(x, Y),
    'timm, jsd': lambda x: JsdCrossEntropy(num_splits=3)(x, Y),
}
SCALED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    'accumulation': (lambda x: ce(x) / 4, 1 / 4),
    'accumulation in place': (in_place, 1 / 4),
    'accumulation twice': (lambda x: ce(x) / 4 / 2, 1 / 8),
    'a scaler twice': (lambda x: ce(x) * 2 * 4, 8),
    'two factors in tensors': (lambda x: ce(x) * torch.tensor(0.25) * torch.tensor(2.0), 1 / 2),
    'accumulation of the two sides of CLIP, each': (lambda x: (ce(x) / 4 + ce(x.flip(0)) / 4) / 2, 1 / 4),
    'accumulation of the two sides of CLIP, by a tensor': (
        lambda x: (ce(x) + ce(x.flip(0))) / torch.tensor(2) / torch.tensor(4),
        1 / 4,
    ),
    'accumulation of a sum over classes, by all samples': (lambda x: bce(x) / (4 * B), 1 / 4),
    'the same, by a count of samples': (lambda x: bce(x) / torch.tensor(4 * B), 1 / 4),
    'accumulation of a sum over classes, by all targets': (lambda x: bce(x) / (3 * B * C), 1 / 3),
    'the same, by a count': (lambda x: bce(x) / torch.tensor(3 * B * C), 1 / 3),
    'the same, by a count in floating point': (lambda x: bce(x) / torch.tensor(3.0 * B * C), 1 / 3),
    'accumulation of two sums over other numbers of samples': (
        lambda x: (ce(x, reduction='sum') + F.cross_entropy(x[:2], Y[:2], reduction='sum')) / 14,
        B / 14,
    ),
    'divided by a function': (lambda x: torch.divide(ce(x), 4), 1 / 4),
    'multiplied by a function': (lambda x: torch.multiply(ce(x), 4), 4),
    'a sum, times a number': (lambda x: ce(x, reduction='sum') * 10, 10),
    'in place as a statement': (in_place_as_statement, 2.0),
    'accumulation of each term': (lambda x: ce(x) / 4 + z(x) / 4, 1 / 4),
    'accumulation of the sum': (lambda x: (ce(x) + z(x)) / 4, 1 / 4),
    'accumulation over 2, each term': (lambda x: ce(x) / 2 + z(x) / 2, 1 / 2),
    'accumulation over 2, the sum': (lambda x: (ce(x) + z(x)) / 2, 1 / 2),
    'accumulation over 2 of a mixture by tensors': (lambda x: (LAM * ce(x) + (1 - LAM) * ce(x.flip(0))) / 2, 1 / 2),
    'accumulation of distillation': (lambda x: (0.3 * ce(x) + 0.7 * z(x)) / 4, 1 / 4),
    'accumulation of the two sides of CLIP': (lambda x: (ce(x) + ce(x.flip(0))) / 2 / 4, 1 / 4),
    'accumulation of a sum': (lambda x: ce(x, reduction='sum') / B / 4, 1 / 4),
    'half a sum, divided by the samples': (lambda x: 0.5 * ce(x, reduction='sum') / B, 1 / 2),
    'accumulation of a sum, at once': (lambda x: ce(x, reduction='sum') / (4 * B), 1 / 4),
    'accumulation of a sum, by a count of all items': (lambda x: ce(x, reduction='sum') / COUNT, 1 / 4),
    'accumulation of a sum, by a count in floating point': (lambda x: ce(x, reduction='sum') / COUNT.float(), 1 / 4),
    'accumulation of uneven batches': (lambda x: ce(x, reduction='sum') / 14, B / 14),
    'accumulation of uneven batches, by a count': (lambda x: ce(x, reduction='sum') / torch.tensor(14.0), B / 14),
    'accumulation to as many samples as logits': (lambda x: ce(x, reduction='sum') / (B * C), 1 / C),
    'accumulation to as many samples, by a count': (lambda x: ce(x, reduction='sum') / torch.tensor(B * C), 1 / C),
    'a scaler': (lambda x: ce(x) * SCALE, 1024),
    'a scaler on each term': (lambda x: ce(x) * SCALE + z(x) * SCALE, 1024),
    'a scaler on distillation': (lambda x: (0.3 * ce(x) + 0.7 * z(x)) * SCALE, 1024),
    'a scaler as a number': (lambda x: ce(x) * 1024 + z(x) * 1024, 1024),
    'a scaler on terms with weights in tensors': (lambda x: (ce(x) + LAM * z(x)) * SCALE, 1024),
    'a scaler as a number on such terms': (lambda x: (ce(x) + LAM * z(x)) * 1024, 1024),
    'accumulation of two sums, at once': (lambda x: (ce(x, reduction='sum') + 0.1 * x.square().sum()) / (4 * B), 1 / 4),
    'accumulation and a scaler': (lambda x: ce(x) / 4 * SCALE, 256),
    'a stack, summed': (lambda x: torch.stack([ce(x) / 4, z(x) / 4]).sum(), 1 / 4),
    'a loss added to a scaled tensor in place': (lambda x: torch.zeros(()).add_(ce(x)) / 4, 1 / 4),
    'a constant taken off': (lambda x: ce(x) / 4 - 0.5, 1 / 4),
    'accumulation beside a term with the weight 0': (lambda x: ce(x) / 4 + 0 * z(x), 1 / 4),
    'nothing': (lambda x: 0 * ce(x), 0),
}


@pytest.mark.parametrize('loss', ONE.values(), ids=ONE)
def test_a_loss_counts_once_however_it_is_written(loss: Callable[[Tensor], Tensor]) -> None:
    assert factor_of(loss) == pytest.approx(1)


@pytest.mark.parametrize(('loss', 'expected'), SCALED.values(), ids=SCALED)
def test_the_scale_of_the_loop_is_followed(loss: Callable[[Tensor], Tensor], expected: float) -> None:
    assert factor_of(loss) == pytest.approx(expected)


@pytest.mark.parametrize('name', [name for name in ONE if name not in ('a custom function', 'the two sides of CLIP')])
def test_a_loss_divided_by_accumulation_steps_counts_in_proportion(name: str) -> None:
    # The first division of a sum takes its mean.
    assert factor_of(lambda x: ONE[name](x) / 4) == pytest.approx(1 if name == 'a sum' else 1 / 4)


@pytest.mark.parametrize('samples', [1, 2])
def test_the_mean_of_sums_over_classes_is_a_mean_for_one_sample_too(samples: int) -> None:
    model = Model()
    loss = model()[:samples].square().sum(dim=-1).mean() / 4
    loss.backward()
    assert model.factor() == pytest.approx(1 / 4)


def test_a_target_without_gradient_stays_a_plain_tensor() -> None:
    x, seen = Model()(), torch.zeros(B, C)
    with torch.no_grad():
        seen.copy_(x)
    assert type(seen) is Tensor


UNFOLLOWED = r'could not follow how the last loss .* took 1 for the scale of its balance loss\. It saw no accumulation'


def test_a_vector_and_a_cached_gradient_count_once_and_the_next_forward_says_so() -> None:
    for start in (lambda x: ce(x, reduction='none').backward(WEIGHTS), lambda x: x.backward(ONE_HOT)):
        model = Model()
        start(model())
        assert model.factor() == pytest.approx(1)
        with pytest.warns(UserWarning, match=UNFOLLOWED):
            model()


@pytest.mark.filterwarnings('error')
def test_the_gradient_of_images_alone_needs_no_scale() -> None:
    model, images = Model(), torch.randn(B, C, requires_grad=True)
    torch.autograd.grad(track(images * attach(torch.ones(()), model.balance)), images, ONE_HOT)
    model()


NORMED: dict[str, Callable[[Tensor], Tensor]] = {
    'mean and deviation': lambda x: (x - x.mean()) / x.std(),
    'norm, with a small number': lambda x: x / (x.norm() + 1e-6),
    'root of a mean': lambda x: x / x.square().mean().sqrt(),
    'largest': lambda x: x - x.max(),
}


@pytest.mark.parametrize('norm', NORMED.values(), ids=NORMED)
def test_statistics_before_a_loss_that_cannot_be_followed_tell_no_scale(norm: Callable[[Tensor], Tensor]) -> None:
    model = Model()
    norm(model()).backward(ONE_HOT)
    assert model.factor() == pytest.approx(1)


def test_an_operation_runs_once_with_all_its_effects() -> None:
    model = Model()
    loss, total = ce(model()), torch.zeros(())
    total += loss
    assert total.item() == loss.item()
    buffer = torch.ones(())
    buffer.add_(ce(model()))
    assert buffer.item() == pytest.approx(1 + loss.item())


def test_two_losses_with_a_backward_pass_each_count_once_in_all() -> None:
    model = Model()
    x = model()
    ce(x).backward(retain_graph=True)
    z(x).backward()
    assert model.factor() == pytest.approx(1)


def test_a_pass_that_has_counted_one_of_two_forwards_leaves_the_other_to_the_next() -> None:
    first, second = Model(), Model()
    x = first()
    ce(x).backward(retain_graph=True)
    (z(x) + ce(second())).backward()
    assert (first.factor(), second.factor()) == (1, 1)


def test_the_items_of_a_segmentation_are_its_pixels() -> None:
    model, labels = Model(), torch.zeros(1, 2, B, dtype=torch.long)
    pixels = model().t()[None, :, None].expand(1, C, 2, B)  # one image of 2 x B pixels
    (F.cross_entropy(pixels, labels, reduction='sum') / (3 * labels.numel())).backward()
    assert model.factor() == pytest.approx(1 / 3)


def test_two_losses_in_one_backward_pass_count_once() -> None:
    model = Model()
    x = model()
    torch.autograd.backward([ce(x), z(x)])
    assert model.factor() == pytest.approx(1)


def test_gradients_of_each_task_sum_to_one_balance_loss() -> None:
    model = Model()
    x = model()
    gradients = [
        torch.autograd.grad(loss, [model.balance, model.weight], retain_graph=True)[0]
        for loss in (ce(x), z(x), x.abs().mean())
    ]
    assert sum(gradients).item() == pytest.approx(1)


def test_gradients_of_a_term_that_are_only_looked_at_take_nothing_from_the_sum() -> None:
    model = Model()
    x = model()
    first, second = ce(x), z(x)
    torch.autograd.grad(first, [model.weight, model.balance], retain_graph=True)
    (first + second).backward()
    assert model.factor() == pytest.approx(1)


def test_a_pass_that_cannot_be_followed_beside_one_that_can_counts_nothing_more() -> None:
    orders = ('followed', 'hidden'), ('hidden', 'followed'), ('by hand', 'followed'), ('by hand', 'hidden')
    for first, second in orders:
        balance._pending.clear()  # these warnings have a test of their own
        model = Model()
        loss = model.balance * 1
        hidden = attach(model.weight * 2, loss)
        x = track(hidden)
        passes = {
            'followed': lambda x=x: ce(x),
            'hidden': lambda hidden=hidden: hidden.square().mean(),
            'by hand': lambda x=x, loss=loss: ce(x) + balance.hand_out(loss),
        }
        passes[first]().backward(retain_graph=True)
        passes[second]().backward()
        assert model.factor() == pytest.approx(1), (first, second)


def test_an_inner_step_that_an_outer_one_differentiates_counts_once() -> None:
    model = Model()
    inner = torch.autograd.grad(ce(model()), [model.weight, model.balance], create_graph=True)
    (z(model()) + inner[0].square().mean()).backward()
    assert inner[1].item() == pytest.approx(1)
    assert model.factor() == pytest.approx(1)


def test_the_same_loss_twice_counts_twice_as_it_does_itself() -> None:
    model = Model()
    loss = ce(model())
    loss.backward(retain_graph=True)
    loss.backward()
    assert model.factor() == pytest.approx(2)


def test_every_forward_of_one_loss_counts() -> None:
    model = Model()
    sum(ce(model()) / 2 for _ in range(2)).backward()
    assert model.factor() == pytest.approx(2 / 2)


@pytest.mark.parametrize(
    'loss',
    [
        lambda a, b: ce(a) + 10 * z(b),  # a loss of images without labels
        lambda a, b: ce(a) + 6 / B * F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction='sum'),
        lambda a, b: ce(a) + 6 * ((1 / B) * F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction='sum')),  # TRADES
        lambda a, b: ce(a) + z(b) / 0.1,
        lambda a, b: ce(a) + torch.tensor(10.0) * z(b),
    ],
)
@pytest.mark.parametrize('steps', [1, 4])
def test_a_large_weight_of_another_forward_does_not_weigh_the_balance_loss(
    loss: Callable[[Tensor, Tensor], Tensor], steps: int
) -> None:
    first, second = Model(), Model()
    (loss(first(), second()) / steps).backward()
    assert first.factor() == second.factor() == pytest.approx(1 / steps)


def sum_of(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction='sum')


@pytest.mark.parametrize(
    ('total', 'expected'),
    [
        (lambda pairs: sum(sum_of(x, y) for x, y in pairs) / 11, 1 / 3),
        (lambda pairs: sum(sum_of(x, y) for x, y in pairs) / 22, 1 / 6),  # two such passes in a step
        (lambda pairs: sum(F.cross_entropy(x, y) * (len(y) / 11) for x, y in pairs), 1 / 3),
    ],
    ids=['sums', 'sums of two passes', 'weighted means'],
)
def test_forwards_of_unequal_size_in_one_pass_count_once_together(
    total: Callable[..., Tensor], expected: float
) -> None:
    models = {size: Model() for size in (6, 4, 1)}
    total([(model()[:size], Y[:size]) for size, model in models.items()]).backward()
    assert [model.factor() for model in models.values()] == pytest.approx([expected] * 3)


def test_gradients_of_inputs_alone_are_those_of_the_loss_alone() -> None:
    inputs, model = torch.randn(B, C, requires_grad=True), Model()

    def output() -> Tensor:
        return track(attach(model.weight * inputs, model.balance + inputs.sum()))

    (grad,) = torch.autograd.grad(ce(output()), inputs)
    (expected,) = torch.autograd.grad(ce(model.weight * inputs), inputs)
    torch.testing.assert_close(grad, expected)
    ce(output()).backward()  # asks for the parameters too
    torch.testing.assert_close(inputs.grad, expected + 1)
    assert model.factor() == pytest.approx(1)


def test_whoever_adds_the_balance_loss_himself_gets_it_once() -> None:
    model = Model()
    loss = model.balance * 1
    x = track(attach(model.weight * 2, loss))
    (ce(x) + 3 * balance.hand_out(loss)).backward()
    assert model.factor() == pytest.approx(3)


@pytest.mark.parametrize('is_first', [True, False])
def test_a_pass_of_the_balance_loss_alone_takes_nothing_from_that_of_the_loss(is_first: bool) -> None:
    model = Model()
    loss = model.balance * 1
    total, by_hand = ce(track(attach(model.weight * 2, loss))), balance.hand_out(loss)
    passes = [by_hand, total] if is_first else [total, by_hand]
    for each in passes:
        each.backward(retain_graph=True)
    assert model.factor() == pytest.approx(2)


def test_the_output_is_no_view_so_that_an_operation_in_place_keeps_its_hooks() -> None:
    output = Model()()
    with torch._C.DisableTorchFunctionSubclass():
        assert not output._is_view()


@pytest.mark.filterwarnings(f'ignore:.*{UNFOLLOWED}')
def test_a_second_pass_that_cannot_be_followed_is_told_at_the_next_forward() -> None:
    model = Model()
    x = model()
    x.backward(ONE_HOT, retain_graph=True)
    x.backward(ONE_HOT)
    assert model.factor() == pytest.approx(1)
    with pytest.warns(
        UserWarning, match=r'in the first pass alone\. To choose yourself, set model\.auto_balance = Fal'
    ):
        model()


def test_behind_a_layer_in_another_model_the_missing_scale_is_told_where_a_scaler_is_likely() -> None:
    model = Model()
    with torch.autocast('cpu', torch.float16):
        x = attach(model.weight * 2, model.balance * 1)
    x.float().backward(ONE_HOT)
    with pytest.warns(UserWarning, match=UNFOLLOWED):
        model()


@pytest.mark.filterwarnings('error')
def test_behind_a_layer_in_another_model_it_is_not_told_where_no_scaler_is_likely() -> None:
    model = Model()
    with torch.autocast('cpu', torch.bfloat16):
        x = attach(model.weight * 2, model.balance * 1)
    x.float().backward(ONE_HOT)
    model()


@pytest.mark.filterwarnings('ignore:.torch.jit.* is deprecated')
@pytest.mark.parametrize('kind', ['scripted', 'traced', 'vmap'])
def test_a_loss_out_of_sight_counts_once_beside_a_division_and_the_next_forward_says_so(kind: str) -> None:
    out_of_sight = {
        'scripted': lambda: torch.jit.script(F.mse_loss),
        'traced': lambda: torch.jit.trace(lambda x, y: (x - y).square(), (torch.ones(B, C), ONE_HOT)),
        'vmap': lambda: torch.func.vmap(F.mse_loss),
    }[kind]()
    model = Model()
    (out_of_sight(model(), ONE_HOT).mean() / 4).backward()
    assert model.factor() == pytest.approx(1)
    with pytest.warns(UserWarning, match=UNFOLLOWED):
        model()


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    model = Model()
    x = model()
    x.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError('broken')))
    with pytest.raises(RuntimeError, match='broken'):
        (ce(x) / 4).backward()
    other = Model()
    other().backward(ONE_HOT)
    assert other.factor() == pytest.approx(1)


def test_the_numbers_that_a_user_sees_are_ordinary() -> None:
    x = Model()()
    assert type(x) is TrackedTensor
    assert type(x.detach()) is type(x.argmax(-1)) is Tensor
    assert 'Tracked' not in repr(x)
    assert x.T.shape == (C, B)
    assert type(x.shape) is type(x.size()) is torch.Size
    assert x.max(dim=1).values.shape == (B,)
    assert type(x.T) is TrackedTensor
