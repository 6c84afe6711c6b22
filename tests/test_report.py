"""The report on memories: each number by hand."""

import math

import pytest
import timm
import torch
from models import ByName, Unread, memories
from timm.layers import Mlp
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_ait import BlockReport, GlobalWorkspace, format_report, memory_report
from timm_ait.report import number_blocks

ORTHOGONAL, EQUAL = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def report(memory: Tensor, h: Tensor) -> BlockReport:
    """Of a workspace whose normalised tokens are ``h`` (B, N, 2) and whose attractors are 40 gamma."""
    layer = GlobalWorkspace(2, num_slots=2, slot_dim=2)
    layer.fc1 = layer.act = layer.fc2 = layer.norm = nn.Identity()
    with torch.no_grad():
        layer.linear_transform.weight.copy_(40 * torch.eye(2))
        layer.linear_transform.bias.zero_()
        layer.memory.copy_(memory)
    (one,) = memory_report(layer, h)
    return one


def test_orthogonal_slots_that_every_token_tells_apart() -> None:
    seen = report(ORTHOGONAL, torch.eye(2)[None])  # one image of two tokens, each retrieves one of two attractors
    assert seen.mean_cosine == pytest.approx(0)
    assert seen.effective_rank == pytest.approx(2)
    assert seen.slots_in_use == pytest.approx(2)
    assert seen.length == pytest.approx(40)
    assert seen.varies_over_tokens == pytest.approx(math.sqrt(0.5))  # length 40, distance 20 sqrt(2) from the mean
    assert seen.varies_over_images == pytest.approx(0, abs=1e-3)


def test_equal_slots_are_a_constant() -> None:
    seen = report(EQUAL, torch.eye(2)[None])
    assert (seen.mean_cosine, seen.effective_rank, seen.slots_in_use) == pytest.approx((1, 1, 2))
    assert (seen.varies_over_tokens, seen.varies_over_images) == pytest.approx((0, 0), abs=1e-3)


def test_slots_that_share_the_tokens_unequally_are_not_all_in_use() -> None:
    one, other = ORTHOGONAL
    assert report(ORTHOGONAL, torch.stack([one, one, one, other])[None]).slots_in_use == pytest.approx(4 / 3**0.75)


def test_images_that_differ_as_wholes_vary_over_images_too() -> None:
    seen = report(ORTHOGONAL, torch.eye(2)[:, None])  # two images of one token
    assert seen.varies_over_images == pytest.approx(seen.varies_over_tokens) == pytest.approx(math.sqrt(0.5))


def test_the_cosines_and_the_rank_of_long_slots_are_those_of_their_directions() -> None:
    layer = GlobalWorkspace(8, num_slots=4, slot_dim=5, write_rule='additive', write_scope='image')
    nn.init.normal_(layer.proj.weight, std=100)
    tokens = torch.randn(3, 12, 8)
    (seen,) = memory_report(layer, tokens)
    copies = layer.write(layer.norm(layer.feed_forward(tokens)), layer.memory).memory
    cosines = torch.stack([torch.corrcoef(torch.cat([copy, -copy], dim=1)) for copy in copies])  # the mean is zero
    assert seen.mean_cosine == pytest.approx(cosines[:, ~torch.eye(4, dtype=torch.bool)].mean().item(), abs=1e-5)
    values = torch.linalg.svdvals(nn.functional.normalize(copies, dim=-1))
    ranks = torch.special.entr(values / values.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()
    assert seen.effective_rank == pytest.approx(ranks.mean().item(), rel=1e-4)


def test_autocast_around_the_report_rounds_none_of_its_numbers() -> None:
    model, images = timm.create_model('test_ait', depth=1), torch.randn(6, 3, 32, 32)
    (exact,) = memory_report(model, images)
    with torch.autocast('cpu', torch.bfloat16):
        (seen,) = memory_report(model, images)
    assert vars(seen) == pytest.approx(vars(exact), rel=0.05)


def test_a_scale_that_is_passed_by_position_counts() -> None:
    class ByPosition(GlobalWorkspace):
        def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
            return self.retrieval(h, h, self.attractors(memory, h.dtype), self.scale)

    layers = [cls(8, num_slots=4, slot_dim=5, write_rule='distinct') for cls in (GlobalWorkspace, ByPosition, ByName)]
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        nn.init.constant_(layer.scale, 3)
    tokens = torch.randn(2, 12, 8)
    ((usual,), *others) = [memory_report(layer, tokens) for layer in layers]
    assert all(vars(one) == pytest.approx(vars(usual)) for (one,) in others)


def test_a_map_of_tokens_is_one_image_of_them_and_tokens_alone_are_one_image() -> None:
    layer = GlobalWorkspace(8, num_slots=4, slot_dim=5)
    tokens = torch.randn(2, 12, 8)
    (lined_up,) = memory_report(layer, tokens)
    (as_map,) = memory_report(layer, tokens.unflatten(1, (3, 4)))
    (alone,) = memory_report(layer, tokens.flatten(0, 1))
    assert vars(as_map) == pytest.approx(vars(lined_up))
    assert vars(alone) == pytest.approx(dict(vars(lined_up), varies_over_images=0), abs=1e-3)


@pytest.mark.parametrize(
    ('names', 'numbers'),
    [
        (['blocks.1.mlp', 'blocks.3.mlp.0'], [1, 3]),
        (['module._orig_mod.blocks.2.inside.mlp'], [2]),
        (['layers.0.blocks.0.mlp', 'layers.0.blocks.1.mlp', 'layers.1.blocks.0.mlp'], [0, 1, 2]),
        (['', 'body.mlp'], [0, 1]),
    ],
    ids=str,
)
def test_a_block_has_the_number_of_its_name_where_that_tells_them_apart(names: list[str], numbers: list[int]) -> None:
    assert number_blocks(names) == numbers


def test_blocks_without_memory_are_left_out() -> None:
    model = timm.create_model('test_ait')
    model.blocks[0].mlp = model.blocks[2].mlp = Mlp(128)
    reports = memory_report(model, torch.randn(2, 3, 32, 32))
    assert [report.block for report in reports] == [1, 3]
    assert [line.split(' | ')[0] for line in format_report(reports).splitlines()[2:]] == ['| 1', '| 3']


def test_a_layer_that_reads_in_another_way_is_named() -> None:
    with pytest.raises(ValueError, match='nothing was retrieved in a workspace of class Unread'):
        memory_report(nn.Sequential(GlobalWorkspace(8), Unread(8)), torch.randn(2, 5, 8))


class WithoutScale(GlobalWorkspace):
    """A layer that leaves out what the retrieval does not need."""

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        return self.retrieval(h, h, self.attractors(memory, h.dtype))


def test_a_layer_that_retrieves_without_a_scale_is_reported_on() -> None:
    layer, plain = WithoutScale(7), GlobalWorkspace(7)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 7)
    assert memory_report(layer, x) == memory_report(plain, x)


def test_several_batches_count_as_one_and_the_model_stays_as_it_was() -> None:
    model = timm.create_model('test_ait', depth=2, retrieval_steps=2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(6, 3, 32, 32)
    whole, parts = memory_report(model, images), memory_report(model, [(images[:2], None), (images[2:], None)])
    assert len(whole) == 2
    for a, b in zip(whole, parts, strict=True):
        assert vars(a) == pytest.approx(vars(b), rel=1e-3)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert format_report(whole).count('\n') == 3


def test_each_number_stands_under_its_heading() -> None:
    head, _, row = format_report([BlockReport(1, 0.2, 3.0, 4.0, 0.5, 0.6, 7.0)]).splitlines()
    cells = zip(*([cell.strip() for cell in line.strip('|').split('|')] for line in (head, row)), strict=True)
    assert dict(cells) == {
        'block': '1',
        'slots: mean cosine': '0.2000',
        'effective rank': '3.0',
        'in use': '7.0',
        'retrieval / token, length': '4.000',
        'varies over tokens, %': '50.00',
        'over images, %': '60.00',
    }


def test_small_and_large_batches_of_copies_count_by_their_images() -> None:
    model = timm.create_model('test_ait', depth=2, write_scope='image')
    images = torch.randn(9, 3, 32, 32)
    images[8] = images[8].mean() + torch.arange(32) / 8
    whole, parts = memory_report(model, images), memory_report(model, [images[:8], images[8:]])
    for a, b in zip(whole, parts, strict=True):
        assert vars(a) == pytest.approx(vars(b), rel=1e-3)


def test_the_gain_is_a_part_of_the_retrieval() -> None:
    layer, x = GlobalWorkspace(8, num_slots=4, slot_dim=4, write_rule='distinct'), torch.randn(2, 5, 8)
    (before,) = memory_report(layer, x)
    with torch.no_grad():
        layer.scale.fill_(3.0)
    assert memory_report(layer, x)[0].length == pytest.approx(3 * before.length)


def test_a_compiled_model_is_reported_on_as_often_as_is_asked() -> None:
    model, images = timm.create_model('test_ait', depth=2).eval(), torch.randn(2, 3, 32, 32)
    expected = memory_report(model, images)
    compiled = torch.compile(model, backend='eager')
    compiled(images)
    for _ in range(2):
        assert memory_report(compiled, images) == expected


class Merging(nn.Linear):
    """An adapter that acts when its mode changes."""

    merged = False

    def train(self, mode: bool = True) -> 'Merging':
        self.merged = not mode
        return super().train(mode)


def test_a_layer_that_acts_when_its_mode_changes_is_told_that_it_trains_again() -> None:
    model = nn.Sequential(GlobalWorkspace(8, num_slots=4, slot_dim=4), Merging(8, 8)).train()
    memory_report(model, torch.randn(2, 5, 8))
    assert (model[1].training, model[1].merged) == (True, False)


def test_a_relational_model_is_shown_images_and_questions() -> None:
    model = timm.create_model('test_ait_relational')
    image, question, answer = torch.randn(4, 3, 75, 75), torch.randn(4, 18), torch.arange(4)
    whole = memory_report(model, [(image, question, answer)], inputs=2)
    assert len(whole) == 2
    other = memory_report(model, [(image, question.flip(0), answer)], inputs=2)
    assert vars(whole[0]) != vars(other[0])


def test_a_memory_that_writes_in_evaluation_and_a_part_in_another_mode_stay_as_they_were() -> None:
    model = timm.create_model('test_ait', depth=2, write_mode='always').train()
    model.blocks[0].attn.eval()
    before = memories(model)
    memory_report(model, torch.randn(3, 3, 32, 32))
    assert all(map(torch.equal, before, memories(model)))
    assert model.training
    assert not model.blocks[0].attn.training


def test_what_cannot_be_reported_on_is_said() -> None:
    with pytest.raises(ValueError, match='no GlobalWorkspace to report on; a fused model has none'):
        memory_report(reparameterize_model(timm.create_model('test_ait')), torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match='at least one batch of images'):
        memory_report(timm.create_model('test_ait'), [])
    for batch, got in (({'image': 0}, 'dict'), ([[1.0]], 'list'), (torch.randn(0, 3, 32, 32), r'\(0, 3, 32, 32\)')):
        with pytest.raises(ValueError, match=rf'expected batches of images .*, got {got}'):
            memory_report(timm.create_model('test_ait'), [batch])
