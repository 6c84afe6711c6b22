"""What a look into the memories finds: each array by hand, and nothing changed in the model."""

import math
from typing import Any

import pytest
import timm
import torch
from models import ByName, Unread, assert_same_state, images, make_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_ait import BlockReport, GlobalWorkspace, page
from timm_ait.hopfield import hopfield_energy
from timm_ait.inspection import BlockInspection, inspect

B, N, S, M, K = 5, 16, 3, 7, 11  # of the models of models.py, whose patches are 8 x 8


def by_hand(memory: Tensor, h: Tensor, gain: float = 40, **kwargs: Any) -> BlockInspection:
    """Of a workspace whose normalised tokens are ``h`` (B, N, 2): W_Q = W_K = 1, its attractors are gain * gamma."""
    layer = GlobalWorkspace(2, num_slots=len(memory), slot_dim=2, write_heads=1, **kwargs).eval()
    layer.fc1 = layer.act = layer.fc2 = layer.norm = nn.Identity()
    with torch.no_grad():
        layer.linear_transform.weight.copy_(gain * torch.eye(2))
        layer.linear_transform.bias.zero_()
        layer.query.weight.copy_(torch.eye(2))
        layer.key.weight.copy_(torch.eye(2))
        layer.memory.copy_(memory)
    (one,) = inspect(layer, h)
    return one


def made(slots: Tensor, shares: Tensor | None = None) -> BlockInspection:
    """Of given slots (C, M, D) and shares (B, N, M), by default even ones; the rest is of no meaning."""
    M = slots.shape[1]
    shares = torch.full((2, 4, M), 1 / M) if shares is None else shares
    report = BlockReport(3, 0, 0, 0, 0, 0, 0)
    return BlockInspection(slots, torch.zeros(2, 1, M, 4), shares, torch.ones(2, 4, 5), 2, 3.0, 0.1, (2, 2), report)


@pytest.mark.parametrize('layout', ['paper', 'vit'])
def test_each_slot_of_each_head_selects_k_tokens_whose_gates_sum_to_one(layout: str) -> None:
    prefix = dict(paper=0, vit=1)[layout]
    for block in inspect(make_model(layout), images(B)):
        assert block.gates.shape == (B, S, M, N + prefix)
        assert (block.gates > 0).sum() == S * M * K
        torch.testing.assert_close(block.gates.sum(dim=(0, 3)), torch.ones(S, M))
        assert block.on_grid(block.gates).shape == (B, S, M, 4, 4)
        assert torch.equal(block.on_grid(block.gates).flatten(-2), block.gates[..., prefix:])


def test_with_copies_the_gates_sum_to_one_in_each_image_and_no_image_sees_another() -> None:
    model = make_model(write_scope='image')
    whole, alone = inspect(model, images(B)), inspect(model, images(B)[1:2])
    for a, b in zip(whole, alone, strict=True):
        assert a.slots.shape == (B, M, 5)
        assert a.energy.shape == (B, N, 5)
        torch.testing.assert_close(a.gates.sum(dim=3), torch.ones(B, S, M))
        for name in ('gates', 'shares', 'slots', 'energy'):
            torch.testing.assert_close(getattr(a, name)[1:2], getattr(b, name), rtol=1e-4, atol=1e-5)


def test_a_slot_selects_the_token_that_it_scores_highest() -> None:
    h = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 2.0]]])  # the longest tokens are in image 1
    seen = by_hand(torch.eye(2), h, bottleneck=1)
    assert seen.gates.nonzero().tolist() == [[1, 0, 0, 0], [1, 0, 1, 1]]  # image 1, head 0, slot m reads token m
    assert seen.tokens_read == 1
    both = by_hand(torch.eye(2), h[:1] * 0, bottleneck=2)  # logits 0 and 0
    assert both.gates.flatten().tolist() == pytest.approx([0.5] * 4)
    assert both.tokens_read == pytest.approx(2)
    assert both.balance_loss == pytest.approx(0)


def test_a_token_retrieves_the_softmax_of_its_products_with_the_attractors() -> None:
    seen = by_hand(torch.eye(2), torch.tensor([[[math.log(3), 0.0]]]), gain=1)
    assert seen.shares.flatten().tolist() == pytest.approx([0.75, 0.25])
    assert seen.use.tolist() == pytest.approx([0.75, 0.25])
    assert seen.grid == (1, 1)


def test_tokens_of_a_map_and_of_later_stages_have_their_own_grid() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = make_model('vit').patch_embed  # a grid of 4 x 4
            self.first, self.second, self.third = (GlobalWorkspace(34, num_slots=3, slot_dim=5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.patch_embed(x))
            x = self.second(x[:, :4])
            return self.third(x.unflatten(1, (1, 4)))

    torch.manual_seed(0)
    blocks = inspect(Stages(), images(B))
    assert [block.grid for block in blocks] == [(4, 4), (2, 2), (1, 4)]
    assert blocks[2].on_grid(blocks[2].shares.transpose(1, 2)).shape == (B, 3, 1, 4)


def test_a_stem_that_does_not_know_its_grid_gives_a_row_of_tokens() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 8, 8, stride=8)
            self.workspace = GlobalWorkspace(8, num_slots=3, slot_dim=5)

        def forward(self, x: Tensor) -> Tensor:
            return self.workspace(self.patch_embed(x).flatten(2).mT)

    assert [block.grid for block in inspect(Plain(), images(B))] == [(1, N)]


def test_images_that_are_not_finite_are_refused() -> None:
    broken = images(B)
    broken[1, 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match='expected images of finite values, got NaN or infinity'):
        inspect(make_model(), broken)


def test_a_layer_that_reads_in_another_way_is_named() -> None:
    with pytest.raises(ValueError, match='nothing was retrieved in a workspace of class Unread'):
        inspect(Unread(8), torch.randn(2, 5, 8))


def test_the_energy_falls_along_the_steps_and_is_the_one_of_the_paper() -> None:
    seen = by_hand(torch.eye(2), torch.tensor([[[math.log(3), 0.0]]]), gain=1, retrieval_steps=7)
    first, second = seen.energy[0, 0, :2].tolist()
    assert seen.energy.shape == (1, 1, 8)
    assert first == pytest.approx(-math.log(4) + math.log(3) ** 2 / 2 + math.log(2) + 0.5)
    lse = math.log(math.exp(0.75) + math.exp(0.25))  # the state after one step is (0.75, 0.25)
    assert second == pytest.approx(-lse + (0.75**2 + 0.25**2) / 2 + math.log(2) + 0.5)
    for block in inspect(make_model(beta=1.3, retrieval_steps=2), images(B)):
        assert (block.energy.diff(dim=-1) <= 1e-9).all()
        assert block.energy.shape[-1] == 5
        assert block.steps == 2


def test_equal_slots_are_twins_and_a_slot_that_no_token_retrieves_is_dead() -> None:
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    seen = by_hand(memory, torch.tensor([[[1.0, 0.0]]]))
    assert seen.twins() == [[0, 2]]
    assert seen.cosines[0].tolist() == pytest.approx([1, 0, 1])
    assert seen.dead() == [1]
    assert 'slots 0, 2 are twins' in page._alike(seen)
    assert 'dead slots are 1' in page._alike(seen)
    healthy = by_hand(torch.eye(2), torch.eye(2)[None])
    assert (healthy.twins(), healthy.dead()) == ([], [])
    assert 'no two slots are twins' in page._alike(healthy)
    assert 'no slot is dead' in page._alike(healthy)
    assert 'all slots are twins' in page._alike(by_hand(torch.ones(3, 2), torch.eye(2)[None]))


@pytest.mark.parametrize('kwargs', [{}, {'write_scope': 'image'}, {'write_mode': 'always'}, {'write_mode': 'never'}])
def test_a_look_changes_nothing_in_the_model(kwargs: dict[str, Any]) -> None:
    model, same = make_model(**kwargs), make_model(**kwargs)
    model.blocks[0].attn.eval()
    modes = [module.training for module in model.modules()]
    inspect(model, images(B))
    assert_same_state(model, same)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert model.blocks[0].mlp.store.__func__ is GlobalWorkspace.store
    assert model.balance_loss() == 0


def test_an_error_inside_the_model_leaves_it_as_it_was() -> None:
    model = make_model()
    with pytest.raises(ValueError, match='expected images of'):
        inspect(model, images(B, side=16))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_relational_model_is_looked_into_with_its_questions() -> None:
    model = timm.create_model('test_ait_relational', depth=2)
    questions = torch.randint(2, (2, 18), generator=torch.Generator().manual_seed(0)).float()
    blocks = inspect(model, images(2, side=75), questions)
    assert blocks[0].gates.shape[-1] == 26  # 5 x 5 patches and the question
    assert blocks[0].grid == (5, 5)


def test_the_balance_loss_counts_with_its_weight() -> None:
    light, heavy = (inspect(make_model(balance_weight=weight), images(B))[0] for weight in (0.01, 0.5))
    assert heavy.balance_loss == pytest.approx(50 * light.balance_loss)


def test_a_slot_is_dead_beside_an_even_share() -> None:
    shares = torch.tensor([0.03, 0.04, 0.93]).expand(2, 4, 3)  # a tenth of an even share is 0.033
    assert made(torch.eye(3)[None], shares).dead() == [0]


def test_the_use_of_a_slot_is_a_mean_over_all_images() -> None:
    shares = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).unsqueeze(1).expand(2, 4, 3)
    assert made(torch.eye(3)[None], shares).use.tolist() == [0.5, 0.5, 0]


def test_cosines_are_the_mean_over_copies() -> None:
    copies = torch.stack([torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
    assert made(copies).cosines.tolist() == [[1, 0.5], [0.5, 1]]


def test_twins_are_near_the_first_of_them_and_no_opposites() -> None:
    assert made(torch.tensor([[[1.0, 0], [-1, 0], [0, 1]]])).twins() == []
    angles = torch.tensor([0.0, 0.1, 0.2])  # cosines 0.995 between neighbours, 0.980 between the ends
    assert made(torch.stack([angles.cos(), angles.sin()], dim=1)[None]).twins() == [[0, 1]]


def test_the_energy_has_the_beta_of_the_layer() -> None:
    h = torch.tensor([[[0.3, 0.8], [1.0, -0.4]]])
    seen = by_hand(torch.eye(2), h, gain=1, beta=3.0)
    first = h.double()
    for step, state in enumerate((first, torch.softmax(3 * first, dim=-1))):
        torch.testing.assert_close(seen.energy[..., step], hopfield_energy(state, torch.eye(2).double(), 3.0))


def test_tokens_read_is_exp_of_the_mean_entropy() -> None:
    seen = by_hand(torch.eye(2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), bottleneck=2)
    gates = torch.softmax(torch.tensor([2**-0.5, 0.0]), dim=0)  # of slot 0; slot 1 reads both tokens alike
    entropy = (torch.special.entr(gates).sum() + math.log(2)) / 2
    assert seen.tokens_read == pytest.approx(entropy.exp().item())


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match='expected at least one image'):
        inspect(make_model(), images(0))


def test_a_layer_that_calls_the_retrieval_by_keyword_is_looked_into() -> None:
    layers = [kind(8, num_slots=4, slot_dim=5).eval() for kind in (GlobalWorkspace, ByName)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 12, 8)
    (plain,), (by_name,) = (inspect(layer, x) for layer in layers)
    for name in ('gates', 'shares', 'energy'):
        torch.testing.assert_close(getattr(by_name, name), getattr(plain, name))


def test_under_autocast_the_gates_are_as_wide_as_those_of_the_write() -> None:
    model = timm.create_model('test_ait', pretrained=True).eval()
    wide = inspect(model, images(B))
    with torch.autocast('cpu', torch.bfloat16):
        narrow = inspect(model, images(B))
        assert all(block.cosines.dtype == torch.float32 for block in narrow)
    for a, b in zip(wide, narrow, strict=True):
        assert b.gates.dtype == torch.float32
        assert b.tokens_read == pytest.approx(a.tokens_read, rel=1e-3)


def test_the_patches_of_a_wrapped_model_have_rows_and_columns() -> None:
    model = AveragedModel(make_model())
    assert inspect(model, images(2))[0].grid == model.module.patch_embed.grid_size
