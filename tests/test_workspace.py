"""The global workspace layer: every equation by hand, against a dense reference, and at its limits."""

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ait import GlobalWorkspace, hopfield_energy
from timm_ait.hopfield import HopfieldRetrieval
from timm_ait.selection import Selection, dense_gates, load_balance_loss
from timm_ait.workspace import squash

B, N, E, H = 2, 11, 17, 19  # images, tokens, width, hidden width
M, D, S, K = 7, 13, 3, 5  # slots, width of a slot, write heads, bottleneck
T = B * N

WRITE = {'query.weight', 'key.weight', 'value.weight', 'proj.weight', 'write_norm.weight', 'write_norm.bias'}


def make_layer(**kwargs: Any) -> GlobalWorkspace:
    torch.manual_seed(1)
    sizes = dict(in_features=E, hidden_features=H, num_slots=M, slot_dim=D, write_heads=S, bottleneck=K)
    layer = GlobalWorkspace(**dict(sizes, **kwargs)).train()
    layer.auto_balance = False  # these tests add the balance loss themselves
    return layer


def tokens(seed: int = 0, images: int = B, length: int = N, width: int = E) -> Tensor:
    return torch.randn(images, length, width, generator=torch.Generator().manual_seed(seed))


def train_step(layer: GlobalWorkspace, x: Tensor) -> Tensor:
    """A training forward and backward, with a loss that no symmetry of the output makes flat."""
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    ((out * weights).sum() + out.square().mean() + layer.balance_loss()).backward()
    return out


# Each equation, by hand


def test_the_feed_forward_part_is_timms_mlp() -> None:
    mlp = Mlp(E, H, drop=0.5, norm_layer=nn.LayerNorm)
    nn.init.normal_(mlp.norm.weight)
    layer = make_layer(drop=0.5, norm_layer=nn.LayerNorm)
    for mine, theirs in ((layer.fc1, mlp.fc1), (layer.hidden_norm, mlp.norm), (layer.fc2, mlp.fc2)):
        mine.load_state_dict(theirs.state_dict())
    for training in (True, False):
        outputs = []
        for part in (layer.train(training).feed_forward, mlp.train(training)):
            torch.manual_seed(2)  # for the dropout
            outputs.append(part(tokens()))
        torch.testing.assert_close(*outputs)


def test_squash_lines_up_the_tokens_image_by_image() -> None:
    h = torch.arange(6.0).view(2, 3, 1)
    assert squash(h).tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]


def test_a_slot_attends_to_the_softmax_of_its_k_best_tokens() -> None:
    h = torch.zeros(4, 4)
    h[:, 0] = torch.tensor([2.0, 0.0, 3.0, 1.0]).log().nan_to_num(neginf=-9.0)
    layer = GlobalWorkspace(4, num_slots=1, slot_dim=1, write_heads=1, bottleneck=2)
    with torch.no_grad():
        layer.query.weight.fill_(1.0)
        layer.key.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    gates, tokens, lse = layer.select(torch.ones(1, 1), h)
    torch.testing.assert_close(gates.flatten()[tokens.flatten().argsort()], torch.tensor([2 / 5, 3 / 5]))
    assert sorted(tokens.flatten().tolist()) == [0, 2]
    torch.testing.assert_close(lse, torch.tensor([[math.log(5)]]))


def test_a_folded_query_scores_a_token_as_its_key_would() -> None:
    layer = GlobalWorkspace(2, num_slots=1, slot_dim=4, write_heads=1)
    with torch.no_grad():
        layer.query.weight.copy_(2 * torch.eye(4))  # queries 2 gamma
        layer.key.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]))
    # gamma = (5, 7, 0, 0): 2 gamma . (h0, 3 h1, 0, 0) / sqrt(4) = 5 h0 + 21 h1
    folded = layer.fold_queries(torch.tensor([[5.0, 7.0, 0.0, 0.0]]))
    torch.testing.assert_close(folded, torch.tensor([[[5.0, 21.0]]]))


def test_a_head_reads_the_values_of_its_tokens_weighted_by_its_gates() -> None:
    layer = GlobalWorkspace(1, num_slots=1, slot_dim=2, write_heads=2)
    with torch.no_grad():
        layer.value.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    gates, tokens = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]]), torch.tensor([[[0, 2]], [[1, 0]]])  # (S, M, k)
    h, expected = torch.tensor([[10.0], [-1.0], [20.0]]), torch.tensor([[[17.5, 35.0]], [[-3.0, -4.0]]])
    selection = Selection(gates, tokens, torch.zeros(2, 1))
    torch.testing.assert_close(layer.attend(selection, h), expected)  # read 17.5 and -1
    torch.testing.assert_close(layer.attend(selection, h, values=layer.value(h)), expected)


@pytest.mark.parametrize(
    ('gates', 'chosen', 'loss'),
    [
        # both slots read token 0 of 2: importance and load are (2, 0), mean 1, unbiased variance 2, twice
        ([[[1.0], [1.0]]], [[[0], [0]]], 4.0),
        # each reads its own: importance and load are (1, 1)
        ([[[1.0], [1.0]]], [[[0], [1]]], 0.0),
        # importance (3/2, 1/2): 1/2; load (2, 2): 0
        ([[[0.75, 0.25], [0.75, 0.25]]], [[[0, 1], [0, 1]]], 0.5),
        # a gate that has underflowed is no load: importance and load (1, 0), mean 1/2, variance 1/2, twice
        ([[[1.0, 0.0]]], [[[0, 1]]], 4.0),
        # heads add up: 4 + 0
        ([[[1.0], [1.0]], [[1.0], [1.0]]], [[[0], [0]], [[0], [1]]], 4.0),
    ],
    ids=['crowded', 'spread', 'uneven', 'underflow', 'two heads'],
)
def test_the_balance_loss_of_two_tokens(gates: list[Any], chosen: list[Any], loss: float) -> None:
    selection = Selection(torch.tensor(gates), torch.tensor(chosen), torch.zeros(()))
    assert load_balance_loss(selection, num_tokens=2).item() == pytest.approx(loss)
    of_all_tokens = Selection(dense_gates(selection, num_tokens=2), None, selection.lse)
    assert load_balance_loss(of_all_tokens, num_tokens=2).item() == pytest.approx(loss)


def test_the_gradient_of_the_balance_loss_is_that_of_the_formula_whatever_the_logits() -> None:
    S, M, k, T = 2, 5, 3, 7
    logits = torch.randn(S, M, k, dtype=torch.float64, requires_grad=True)
    tokens = torch.stack([torch.randperm(T)[:k] for _ in range(S * M)]).view(S, M, k)
    gates = logits.softmax(dim=-1)
    (gradient,) = torch.autograd.grad(load_balance_loss(Selection(gates, tokens, torch.zeros(())), T), logits)
    importance = (F.one_hot(tokens, T) * logits.softmax(dim=-1).unsqueeze(-1)).sum(dim=(1, 2))  # (S, M, k, T) -> (S, T)
    formula = (importance.var(dim=-1) / importance.mean(dim=-1).square()).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(formula, logits)[0])


def test_a_write_keeps_nine_tenths_and_normalises() -> None:
    layer = GlobalWorkspace(3, num_slots=1, slot_dim=2, write_heads=1)
    nn.init.eye_(layer.proj.weight)
    memory, heads = torch.tensor([[0.6, 0.8]]), torch.tensor([[[1.0, 0.0]]])
    # gamma_hat = LN((1.6, 0.8)) = (1, -1); 0.9 (0.6, 0.8) + 0.1 (1, -1) = (0.64, 0.62)
    expected = torch.tensor([[0.64, 0.62]]) / math.hypot(0.64, 0.62)
    torch.testing.assert_close(layer.update(memory, heads), expected, rtol=0, atol=1e-6)


def test_heads_stand_side_by_side_before_w_o() -> None:
    layer = GlobalWorkspace(3, num_slots=1, slot_dim=2, write_heads=2, memory_decay=0.0)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))  # reads head 1 alone
    heads = torch.tensor([[[5.0, -5.0]], [[-7.0, 7.0]]])  # (S, M, D)
    new = layer.update(torch.zeros(1, 2), heads)
    torch.testing.assert_close(new, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [(dict(beta=0.0), 'beta must be a finite number above 0'), (dict(steps=0), 'retrieval_steps must')],
)
def test_a_retrieval_that_does_nothing_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HopfieldRetrieval(**kwargs)


@pytest.mark.parametrize(('steps', 'expected'), [(1, 0.5), (2, math.tanh(math.log(3) / 4))])
def test_retrieval_adds_the_softmax_of_attractors_step_by_step(steps: int, expected: float) -> None:
    # from (1, 0), softmax(+-ln(3) / 2) = (3/4, 1/4) of the attractors (1, 0) and (-1, 0) gives 1/2
    base, h = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[[1.0, 0.0]]])
    attractors = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    retrieval = HopfieldRetrieval(beta=math.log(3) / 2, steps=steps)
    for own in (attractors, attractors[None]):  # of all images, of each image
        r = retrieval(base, h, own, scale=torch.tensor([2.0, 7.0]))
        torch.testing.assert_close(r, torch.tensor([[[10 + 2 * expected, 20.0]]]))


def test_slots_count_as_unit_rows_and_the_linear_transform_adds_its_bias() -> None:
    layer = GlobalWorkspace(2, num_slots=2, slot_dim=1)
    with torch.no_grad():
        layer.linear_transform.weight.copy_(torch.tensor([[2.0], [3.0]]))
        layer.linear_transform.bias.copy_(torch.tensor([0.5, 0.25]))
        layer.memory.copy_(torch.tensor([[5.0], [-0.1]]))
    attractors = layer.attractors(layer.slots(), torch.float32)
    torch.testing.assert_close(attractors, torch.tensor([[2.5, 3.25], [-1.5, -2.75]]))


@pytest.mark.parametrize(
    ('state', 'attractors', 'beta', 'energy'),
    [
        ([1.0, 0.0], [[1.0, 0.0]], 1.0, 0.0),  # a state that is stored: -1 + 1/2 + 0 + 1/2
        ([0.0, 0.0], [[3.0, 4.0]], 2.0, 12.5),  # far from it: half its squared length
        ([1.0, 0.0], [[1.0, 0.0], [-1.0, 0.0]], 1.0, 1 + math.log(2) - math.log(math.e + 1 / math.e)),
        ([0.0, 2.0], [[1.0, 0.0], [-1.0, 0.0]], 4.0, 2.5),  # -ln(2)/4 + 2 + ln(2)/4 + 1/2
    ],
)
def test_the_energy_of_few_attractors(
    state: list[float], attractors: list[list[float]], beta: float, energy: float
) -> None:
    assert hopfield_energy(torch.tensor(state), torch.tensor(attractors), beta).item() == pytest.approx(energy)


def test_the_energy_of_images_with_patterns_of_their_own_is_that_of_each() -> None:
    state, attractors = tokens(), torch.randn(B, M, E) * torch.tensor([1.0, 5.0]).view(B, 1, 1)
    each = [hopfield_energy(one, patterns) for one, patterns in zip(state, attractors, strict=True)]
    torch.testing.assert_close(hopfield_energy(state, attractors), torch.stack(each))


def test_one_token_without_an_image_reads_the_memory() -> None:
    layer = make_layer().eval()
    torch.testing.assert_close(layer(tokens()[0, 0]), layer(tokens())[0, 0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    slots=st.integers(1, 13),
    width=st.integers(1, 17),
    beta=st.floats(1e-3, 1e2),
    spread=st.floats(1e-2, 1e2),
    seed=st.integers(0, 2**31),
)
def test_no_retrieval_step_raises_the_energy(slots: int, width: int, beta: float, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    attractors = spread * torch.randn(slots, width, dtype=torch.float64)
    state = spread * torch.randn(5, 2, width, dtype=torch.float64)
    before = hopfield_energy(state, attractors, beta)
    for steps in (1, 2, 3):
        retrieved = HopfieldRetrieval(beta, steps)(torch.zeros_like(state), state, attractors)
        after = hopfield_energy(retrieved, attractors, beta)
        assert (after <= before + 1e-9 * (1 + before.abs())).all()
        before = after
    assert (before >= -1e-9 * (1 + attractors.square().sum())).all()


# The whole layer against a dense reference


def reference(layer: GlobalWorkspace, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One training forward as the equations stand, slot by slot and with dense gates: output, memory, balance loss."""
    f = layer.fc2(F.gelu(layer.fc1(x)))
    h = layer.norm(f)
    flat, gamma, d = h.reshape(-1, h.shape[-1]), layer.memory, layer.slot_dim
    heads, loss = [], torch.zeros((), dtype=x.dtype)
    for s in range(layer.write_heads):
        rows = slice(s * d, (s + 1) * d)
        q, k, v = (
            gamma @ layer.query.weight[rows].t(),
            flat @ layer.key.weight[rows].t(),
            flat @ layer.value.weight[rows].t(),
        )
        gates = []
        for slot in range(len(gamma)):
            logits = k @ q[slot] / math.sqrt(d)
            mask = torch.full_like(logits, -torch.inf)
            mask[logits.argsort(descending=True)[: layer.bottleneck]] = 0
            gates.append((logits + mask).softmax(0))
        dense = torch.stack(gates)  # (M, T)
        heads.append(dense @ v)
        for share in (dense.sum(0), (dense > 0).to(x.dtype).sum(0)):
            if len(share) > 1:
                loss = loss + share.var() / (share.mean() ** 2 + 1e-10)
    update = layer.write_norm(torch.cat(heads, dim=1) @ layer.proj.weight.t() + gamma)
    new = layer.memory_decay * gamma + (1 - layer.memory_decay) * update
    new = new / new.norm(dim=1, keepdim=True)
    attractors = layer.linear_transform(new)
    r = h
    for _ in range(layer.retrieval_steps):
        r = (layer.beta * r @ attractors.t()).softmax(-1) @ attractors
    out = h + r if layer.scale is None else f + layer.scale * r
    return out, new, layer.balance_weight * loss


EDGES: dict[str, dict[str, Any]] = {
    'the usual': {},
    'k beyond the tokens': dict(bottleneck=512),
    'k of one': dict(bottleneck=1),
    'one slot': dict(num_slots=1),
    'one head': dict(write_heads=1),
    'slots of width two': dict(slot_dim=2),
    'everything of the write': dict(memory_decay=0.0),
    'three retrieval steps': dict(retrieval_steps=3),
    'sharp retrieval': dict(beta=23.0),
    'heavy balance': dict(balance_weight=3.0),
    "a ViT's own path": dict(retrieval_scale=0.5),
    'no bias': dict(bias=False),
}


@pytest.mark.parametrize('images', [1, B])
@pytest.mark.parametrize('kwargs', EDGES.values(), ids=EDGES)
def test_forward_memory_loss_and_gradients_are_those_of_the_dense_equations(
    kwargs: dict[str, Any], images: int
) -> None:
    layer, x = make_layer(**kwargs).double(), tokens(images=images).double().requires_grad_()
    out, memory, loss = reference(layer, x)
    direction = torch.randn_like(out)
    params = [p for p in layer.parameters() if p.requires_grad]
    expected = torch.autograd.grad((out * direction).sum() + loss, [x, *params])
    got = layer(x)
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(layer.memory, memory)
    torch.testing.assert_close(layer.balance_loss(), loss)
    grads = torch.autograd.grad((got * direction).sum() + layer.balance_loss(), [x, *params])
    torch.testing.assert_close(grads, expected)


def test_a_single_token_has_nothing_to_balance_and_finite_gradients() -> None:
    layer, x = make_layer(), tokens(images=1, length=1)
    train_step(layer, x)
    assert layer.balance_loss().item() == 0
    assert layer.memory.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('kwargs', [{}, dict(retrieval_scale=0.5), dict(retrieval_steps=2)], ids=str)
def test_gradients_through_write_and_retrieval_pass_gradcheck(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    layer = GlobalWorkspace(3, 2, num_slots=2, slot_dim=3, write_heads=2, bottleneck=2, **kwargs).double().train()
    layer.auto_balance = False
    names, params = zip(*layer.named_parameters(), strict=True)
    x, memory = tokens(images=2, length=2, width=3).double().requires_grad_(), layer.memory.clone()

    def forward(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        out = functional_call(layer, {**dict(zip(names, params, strict=True)), 'memory': memory.clone()}, (x,))
        return out, layer.balance_loss()

    inputs = (x, *[p.detach().clone().requires_grad_() for p in params])
    assert torch.autograd.gradcheck(forward, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(forward, inputs, atol=1e-6, fast_mode=True)


# What trains, and what is frozen


@pytest.mark.parametrize(
    ('kwargs', 'frozen'),
    [
        ({}, set()),
        (dict(balance_weight=0.0), set()),
        (dict(write_mode='always'), set()),
        (dict(retrieval_scale=0.5), set()),
        (dict(write_grad=False), WRITE - {'query.weight', 'key.weight'}),
        (dict(write_grad=False, balance_weight=0.0), WRITE),
        (dict(write_mode='never'), WRITE),
        (dict(write_mode='never', write_grad=False), WRITE),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else str(len(x)),  # the order within a set is another in each process
)
def test_frozen_is_what_can_get_no_gradient_and_all_else_gets_one(kwargs: dict[str, Any], frozen: set[str]) -> None:
    layer = make_layer(**kwargs)
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == frozen
    train_step(layer, tokens())
    for name, p in layer.named_parameters():
        assert (p.grad is None) == (name in frozen), name
        assert name in frozen or p.grad.abs().max() > 0, name


def test_a_write_without_gradient_leaves_the_memory_and_the_output_as_with_it() -> None:
    with_grad, without = make_layer(), make_layer(write_grad=False)
    assert torch.equal(with_grad(tokens()), without(tokens()))
    assert torch.equal(with_grad.memory, without.memory)
    assert not without.step(tokens(), without.memory)[1].memory.requires_grad


def test_what_other_ranks_get_of_a_write_has_no_graph() -> None:
    layer = make_layer()
    write = layer.step(tokens(), layer.memory.clone())[1]
    assert write.memory.requires_grad
    assert not write.heads.requires_grad
    assert not write.lse.requires_grad


def test_without_gradients_a_write_builds_no_graph() -> None:
    layer = make_layer()
    with torch.no_grad():
        assert not layer.step(tokens(), layer.memory.clone())[1].memory.requires_grad


def test_two_forwards_before_one_backward_have_the_gradients_of_each() -> None:
    both, single = make_layer(), make_layer()
    outs = [both(tokens(seed)) for seed in (0, 1)]
    losses = [out.square().mean() for out in outs]
    (losses[0] + losses[1] + both.balance_loss()).backward()
    for seed in (0, 1):  # the second starts from the memory that the first has left
        loss = single(tokens(seed)).square().mean()
        (loss + single.balance_loss() if seed else loss).backward()
    assert torch.equal(both.memory, single.memory)
    for (name, p), q in zip(both.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# When the memory is written


@pytest.mark.parametrize(
    ('mode', 'training', 'writes'),
    [
        ('train', True, True),
        ('train', False, False),
        ('always', True, True),
        ('always', False, True),
        ('never', True, False),
        ('never', False, False),
    ],
)
@pytest.mark.parametrize('grad', [True, False])
def test_the_memory_is_written_when_the_mode_says_so(mode: str, training: bool, writes: bool, grad: bool) -> None:
    layer = make_layer(write_mode=mode).train(training)
    before = layer.memory.clone()
    with torch.set_grad_enabled(grad):
        layer(tokens())
    assert torch.equal(layer.memory, before) != writes
    assert layer.balance_loss().item() > 0 if writes else layer.balance_loss().item() == 0


def test_evaluation_treats_every_token_by_itself_and_repeats_to_the_bit() -> None:
    layer, x = make_layer().eval(), tokens()
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    torch.testing.assert_close(layer(x[1:, 3:5]), whole[1:, 3:5])


@pytest.mark.parametrize('poison', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('bottleneck', [1, K, 512])
def test_a_batch_that_is_not_finite_never_enters_the_memory(poison: float, bottleneck: int) -> None:
    layer = make_layer(bottleneck=bottleneck)
    layer(tokens(1))
    healthy, twin = layer.memory.clone(), copy.deepcopy(layer)
    bad = tokens(2)
    bad[1, 3, 5] = poison
    layer(bad)
    assert torch.equal(layer.memory, healthy)
    assert torch.equal(layer(tokens(3)), twin(tokens(3)))
    assert torch.equal(layer.memory, twin.memory)


def test_one_slot_that_is_not_finite_stops_the_whole_write() -> None:
    layer = make_layer()
    heads = torch.randn(S, M, D)
    heads[0, 1, 2] = math.nan
    assert torch.equal(layer.update(layer.memory, heads), layer.memory)


def test_an_overflow_inside_the_write_never_enters_the_memory() -> None:
    layer = make_layer()
    before = layer.memory.clone()
    layer.value.weight.data.mul_(1e38).mul_(1e4)
    layer(tokens())
    assert torch.equal(layer.memory, before)


def test_the_memory_has_unit_rows_from_the_first_write_on() -> None:
    layer = make_layer()
    assert not torch.allclose(layer.memory.norm(dim=-1), torch.ones(M), atol=0.1)
    for seed in range(3):
        layer(tokens(seed))
        torch.testing.assert_close(layer.memory.norm(dim=-1), torch.ones(M))


# Precision


class Recorder(TorchDispatchMode):
    """Every tensor that an operation returns, and the storage of every tensor that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, torch.Size, torch.dtype]] = []
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.read |= {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        self.outputs += [(func.overloadpacket.__name__, x.shape, x.dtype) for x in _tensors(out)]
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def recording() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast_selection_softmax_and_memory_stay_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer()
    with recording() as recorder, torch.autocast('cpu', dtype):
        out = layer(tokens())
        loss = layer.balance_loss()
    dtypes = {
        name: {d for n, _, d in recorder.outputs if n == name and d.is_floating_point}
        for name in ('topk', 'logsumexp', 'scatter_add_', 'lerp')
    }
    assert set(dtypes) == {name for name, seen in dtypes.items() if seen == {torch.float32}}, dtypes
    gates = {d for name, shape, d in recorder.outputs if name == '_softmax' and shape[-1] == K}
    assert gates == {torch.float32}
    assert dtype in {d for _, _, d in recorder.outputs}  # autocast did work elsewhere
    assert layer.memory.dtype == loss.dtype == torch.float32
    assert layer.memory.isfinite().all()
    exact = make_layer()
    torch.testing.assert_close(out.float(), exact(tokens()), rtol=0.05, atol=0.1)
    torch.testing.assert_close(layer.memory, exact.memory, rtol=0, atol=0.02)


def test_on_the_meta_device_which_knows_no_autocast_it_gives_shapes() -> None:
    layer = make_layer(device='meta')
    for mode in (True, False):
        assert layer.train(mode)(tokens().to('meta')).shape == (B, N, E)


@pytest.mark.parametrize(
    ('dtype', 'kept'),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_a_cast_never_narrows_the_memory(dtype: torch.dtype, kept: torch.dtype) -> None:
    layer = make_layer()
    before = layer.memory.clone()
    layer.to(dtype)
    assert layer.memory.dtype == kept
    assert torch.equal(layer.memory.float(), before)
    assert layer(tokens().to(dtype)).dtype == dtype
    assert layer.memory.dtype == kept
    assert make_layer(dtype=dtype).memory.dtype == kept
    assert 'memory' in dict(layer.named_buffers())


def test_a_narrow_cast_to_another_device_moves_the_memory_too() -> None:
    memory = make_layer().to('meta', torch.bfloat16).memory
    assert (memory.device.type, memory.dtype) == ('meta', torch.float32)


def test_the_memory_is_as_wide_as_the_default_dtype() -> None:
    try:
        torch.set_default_dtype(torch.float64)
        assert make_layer().memory.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ['query', 'key', 'value', 'proj', 'write_norm'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_one_hook_on_a_layer_of_the_write_is_called_and_changes_nothing(name: str, dtype: torch.dtype) -> None:
    layer, hooked = make_layer().to(dtype), make_layer().to(dtype)
    calls: list[nn.Module] = []
    getattr(hooked, name).register_forward_hook(lambda module, *_: calls.append(module))
    x = tokens().to(dtype)
    layer(x), hooked(x)
    assert calls == [getattr(hooked, name)]
    assert hooked.memory.dtype == torch.float32
    torch.testing.assert_close(hooked.memory, layer.memory, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


# What it costs


@pytest.mark.parametrize('backward', [False, True])
def test_no_tensor_has_slots_by_tokens_or_slots_by_choices_by_width(backward: bool) -> None:
    """Sizes are distinct primes, so the factors of a tensor's number of elements tell its axes."""
    layer, x = make_layer(), tokens()
    with recording() as recorder:
        train_step(layer, x) if backward else layer(x)
    for name, shape, _ in recorder.outputs:
        count = math.prod(shape)
        assert not any(count and count % (M * n * width) == 0 for n in (N, K) for width in (D, E, H)), (name, shape)


def test_the_gates_are_never_dense() -> None:
    layer = make_layer()
    with recording() as recorder:
        layer(tokens())
    assert [name for name, shape, _ in recorder.outputs if math.prod(shape) == S * M * T] == ['mm']  # the logits
    assert ('topk', (S * M, K)) in {(name, tuple(shape)) for name, shape, _ in recorder.outputs}


@pytest.mark.parametrize('training', [True, False])
def test_evaluation_does_no_work_of_the_write(training: bool) -> None:
    layer = make_layer().train(training)
    with recording() as recorder:
        layer(tokens())
    read = {name for name, p in layer.named_parameters() if p.untyped_storage().data_ptr() in recorder.read}
    everything = {name for name, _ in layer.named_parameters()}
    assert read == (everything if training else everything - WRITE)
    assert ('topk' in {name for name, _, _ in recorder.outputs}) == training


# As a module


def test_it_is_a_drop_in_for_the_feed_forward_part_of_timms_vit() -> None:
    workspace = partial(GlobalWorkspace, num_slots=M, slot_dim=D, write_heads=S, bottleneck=K)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=34, depth=2, num_heads=2, num_classes=5, mlp_layer=workspace,
        proj_drop_rate=0.1, scale_mlp_norm=True, act_layer=nn.ReLU,
    )  # fmt: skip
    assert isinstance(vit.blocks[1].mlp.hidden_norm, nn.LayerNorm)
    assert isinstance(vit.blocks[1].mlp.act, nn.ReLU)
    assert vit.blocks[1].mlp.drop1.p == 0.1
    before = vit.blocks[1].mlp.memory.clone()
    assert vit(torch.randn(3, 3, 16, 16)).shape == (3, 5)
    assert not torch.equal(vit.blocks[1].mlp.memory, before)


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=['copy', 'pickle']
)
def test_a_copy_after_a_step_goes_on_alike_without_the_graph(copied: Any) -> None:
    layer = make_layer()
    train_step(layer, tokens())
    layer(tokens(1))  # whose graph is alive
    twin = copied(layer)
    assert twin.balance_loss().item() == 0
    assert torch.equal(twin(tokens(2)), layer(tokens(2)))
    assert torch.equal(twin.memory, layer.memory)
    assert twin.memory.data_ptr() != layer.memory.data_ptr()


def test_the_memory_is_the_one_thing_beside_parameters_that_a_state_dict_holds() -> None:
    layer = make_layer()
    assert set(layer.state_dict()) - {name for name, _ in layer.named_parameters()} == {'memory'}
    assert layer.memory.shape == (M, D)


def test_init_weights_starts_anew() -> None:
    layer = make_layer(retrieval_scale=0.25)
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    layer.init_weights()
    assert layer.memory.isfinite().all()
    assert layer.scale.unique().tolist() == [0.25]
    fresh = {'fc1', 'fc2', 'norm'}  # a model's own initialisation has filled those before
    for name, p in layer.named_parameters():
        assert p.isfinite().all() != (name.split('.')[0] in fresh), name


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(bottleneck=0), 'bottleneck must be an integer of at least 1, got 0; leave it out for the default'),
        (dict(num_slots=0), 'num_slots must be an integer of at least 1, got 0'),
        (dict(slot_dim=2.5), 'slot_dim must be an integer of at least 1, got 2.5'),
        (dict(write_heads=-1), 'write_heads must be an integer of at least 1, got -1'),
        (dict(retrieval_steps=0), 'retrieval_steps must be an integer of at least 1, got 0'),
        (dict(num_slots=True), 'num_slots must be an integer of at least 1, got True'),
        (dict(beta=0.0), 'beta must be a finite number above 0, got 0.0; the paper uses 1.0'),
        (dict(beta=-1), 'beta must be a finite number above 0, got -1'),
        (dict(beta=math.nan), 'beta must be a finite number above 0, got nan'),
        (dict(beta='1'), "beta must be a finite number above 0, got '1'"),
        (dict(memory_decay=1.5), r'memory_decay must be a number in \[0, 1\], got 1.5; the paper uses 0.9'),
        (dict(memory_decay=-0.1), r'memory_decay must be a number in \[0, 1\], got -0.1'),
        (dict(memory_decay=math.nan), r'memory_decay must be a number in \[0, 1\], got nan'),
        (dict(balance_weight=-1.0), 'balance_weight must be a finite number of at least 0, got -1.0; 0 turns it off'),
        (dict(balance_weight=math.inf), 'balance_weight must be a finite number of at least 0, got inf'),
        (
            dict(retrieval_scale=math.nan),
            'retrieval_scale must be a finite number, got nan; None gives the',
        ),
        (dict(retrieval_scale='1'), "retrieval_scale must be a finite number, got '1'"),
        (dict(write_grad='no'), "write_grad must be True or False, got 'no'"),
        (dict(write_mode='eval'), r"write_mode must be one of \('train', 'always', 'never'\), got 'eval'"),
    ],
    ids=str,
)
def test_a_wrong_argument_says_what_was_expected_and_what_came(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**kwargs)


def test_numbers_of_numpy_are_numbers() -> None:
    assert make_layer(num_slots=np.int64(3), beta=np.float32(2)).slots().shape == (3, D)


def test_what_the_retrieval_is_set_to_is_what_the_layer_says() -> None:
    layer = make_layer(beta=2.0, retrieval_steps=3)
    assert (layer.beta, layer.retrieval_steps) == (2.0, 3)
    layer.retrieval.beta = 5.0
    assert layer.beta == 5.0
    with pytest.raises(AttributeError, match='beta'):
        layer.beta = 1.0  # type: ignore[misc]


def test_a_memory_of_each_image_asks_for_images() -> None:
    layer = make_layer(write_scope='image')
    before = layer.memory.clone()
    with pytest.raises(ValueError, match=r"'image' needs the tokens of each image, shape \(B, N, E\), got \(5, \d+\)"):
        layer(torch.randn(5, layer.in_features))
    assert torch.equal(layer.memory, before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('assign', [True, False])
def test_a_narrow_memory_in_a_state_dict_is_made_wide(assign: bool, dtype: torch.dtype) -> None:
    layer = make_layer()
    narrow = {name: value.to(dtype) for name, value in layer.state_dict().items()}
    layer.load_state_dict(narrow, assign=assign)
    assert layer.memory.dtype == torch.float32
    torch.testing.assert_close(layer.memory, narrow['memory'].float())


def test_the_limits_of_the_decay_are_allowed() -> None:
    frozen = make_layer(memory_decay=1.0)
    before = F.normalize(frozen.memory, dim=-1)
    frozen(tokens())
    torch.testing.assert_close(frozen.memory, before)
