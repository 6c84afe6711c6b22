"""What is drawn of a memory: each array by hand, the command line, and a page that needs nothing but itself."""

import argparse
import base64
import csv
import itertools
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from models import Unread, assert_same_state, images, make_model
from PIL import Image
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_ait import BlockReport, GlobalWorkspace, drawing, page, visualize
from timm_ait.checkpoint import find_checkpoints, load_model
from timm_ait.history import follow_training, measure_drift, read_memories
from timm_ait.inspection import BlockInspection, inspect
from timm_ait.visualize import Page, main

B, SIDE, N, S, M, K = 5, 32, 16, 3, 7, 11  # of the models of models.py, whose patches are 8 x 8
ARGS: dict[str, Any] = dict(depth=2, embed_dim=34, num_heads=2, num_slots=M, slot_dim=5, write_heads=S, bottleneck=K)


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


def drawn_by_hand() -> BlockInspection:
    """Two images of 2 x 3 patches behind a class token, two heads and 18 slots.

    Slot m of head s reads patch (m + s) % 6 of image m % 2. Token n of image b retrieves slot (n - 1) % 6 + 6 b with a
    weight of 0.5 + 0.05 n, and slot 17 with the rest.
    """
    gates, shares = torch.zeros(2, 2, 18, 7), torch.zeros(2, 7, 18)
    for slot, head in itertools.product(range(18), range(2)):
        gates[slot % 2, head, slot, 1 + (slot + head) % 6] = 1
    for image, token in itertools.product(range(2), range(7)):
        weight = 0.5 + 0.05 * token
        shares[image, token, (token - 1) % 6 + 6 * image], shares[image, token, 17] = weight, 1 - weight
    report = BlockReport(3, 0, 0, 0, 0, 0, 0)
    return BlockInspection(torch.eye(18)[None], gates, shares, torch.ones(2, 7, 5), 2, 3.0, 0.1, (2, 3), report)


def patches_in(axis: Any, row: int, column: int) -> list[float]:
    """What a mosaic shows in the middle of each of the 2 x 3 patches of a picture."""
    step = drawing.CELL + drawing.GAP
    pixels = axis.images[0].get_array()[row * step :, column * step :, 0]
    return [pixels[y, x] for y, x in itertools.product((16, 48), (10, 32, 53))]


def save_run(folder: Path, epochs: int = 3) -> Path:
    """What train.py writes: checkpoints of a model that trains, and summary.csv."""
    args = argparse.Namespace(model='test_ait', model_kwargs=ARGS, num_classes=None, gp=None, img_size=None)
    torch.manual_seed(0)
    model = timm.create_model('test_ait', **ARGS).train()
    folder.mkdir()
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters()), args, checkpoint_dir=str(folder))
    lines = ['epoch,train_loss,eval_loss,eval_top1']
    for epoch in range(epochs):
        model(images(B, seed=epoch))
        saver.save_checkpoint(epoch, metric=float(epoch))
        lines.append(f'{epoch},{3 - epoch},9,{10 + epoch}')
    (folder / 'summary.csv').write_text('\n'.join(lines) + '\n')
    return folder


def save_images(folder: Path, count: int = B) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        path = folder / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (SIDE, SIDE, 3), generator=generator).byte().numpy()).save(path)
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp('run') / 'a & b')


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp('photos'))


def parsed(html: str) -> ElementTree.Element:
    """The document; an error if it is not well-formed."""
    return ElementTree.fromstring(html.removeprefix('<!DOCTYPE html>'))


# ---------------------------------------------------------------------------------------------------- inspection


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


# ------------------------------------------------------------------------------------------------------- history


def test_drift_is_one_minus_the_cosine_to_the_first_and_to_the_last_checkpoint() -> None:
    turned = [torch.tensor([[x, [0.0, 3.0]]]) for x in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]  # slot 1 stays
    drift = measure_drift(['a', 'b', 'c'], turned)
    assert drift.since_first[:, 0].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert drift.since_last[:, 0].tolist() == [[0, 0], [1, 0], [1, 0]]
    with pytest.raises(ValueError, match='at least two checkpoints'):
        measure_drift(['a'], turned[:1])
    with pytest.raises(ValueError, match='of one model'):
        measure_drift(['a', 'b'], [turned[0], torch.zeros(1, 3, 2)])


def test_checkpoints_come_by_epoch_and_hold_the_memory_that_was_trained(run: Path, tmp_path: Path) -> None:
    for epoch in (9, 10, 2):
        (tmp_path / f'checkpoint-{epoch}.pth.tar').touch()
    assert [path.name.split('.')[0] for path in find_checkpoints(tmp_path)] == [f'checkpoint-{i}' for i in (2, 9, 10)]
    memories = [read_memories(path) for path in find_checkpoints(run)]
    assert [x.shape for x in memories] == [(2, M, 5)] * 3
    assert not torch.equal(memories[0], memories[1])


def test_the_training_is_followed_by_epoch_and_block(run: Path) -> None:
    rows = follow_training(run, images(B))
    assert [(row['epoch'], row['block']) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    assert [row['train_loss'] for row in rows[::2]] == [3, 2, 1]
    assert [row['eval_top1'] for row in rows[::2]] == [10, 11, 12]
    assert all(1 <= row['tokens_read'] <= K and row['balance_loss'] > 0 for row in rows)


def test_an_epoch_whose_checkpoint_is_gone_keeps_its_loss(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run')
    (folder / 'checkpoint-1.pth.tar').unlink()
    rows = follow_training(folder, images(B))
    assert [row.get('block') for row in rows] == [0, 1, None, 0, 1]
    assert rows[2]['train_loss'] == 2
    drawing.draw_training(rows)


def test_after_a_resume_the_newest_line_of_an_epoch_counts(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run', epochs=1)
    with (folder / 'summary.csv').open('a') as file:
        file.write('epoch,train_loss,eval_loss,eval_top1\n0,99,9,98\n')
    rows = follow_training(folder, images(B))
    assert [(row['train_loss'], row['eval_top1']) for row in rows] == [(99, 98)] * 2


# ------------------------------------------------------------------------------------------------------- pictures


def test_where_a_slot_reads_stands_at_its_place_in_the_mosaic() -> None:
    first, second = drawing.draw_positions(drawn_by_hand()).axes
    for slot, head in itertools.product(range(18), range(2)):
        wanted = [float(patch == (slot + head) % 6) for patch in range(6)]
        assert patches_in(second if slot >= 16 else first, head, slot % 16) == wanted


def test_an_image_is_lit_at_the_patches_that_a_slot_reads() -> None:
    white = torch.ones(2, 3, 64, 64)
    white[:, :, 0, 0] = 0  # an image of one colour has no range
    first, second = drawing.draw_reads(white, drawn_by_hand()).axes
    for image, slot in itertools.product(range(2), range(18)):
        read = (slot % 6, (slot + 1) % 6) if image == slot % 2 else ()
        wanted = [1 if patch in read else 0.12 for patch in range(6)]
        axis = second if slot >= 16 else first
        assert patches_in(axis, image, 1 + slot % 16) == pytest.approx(wanted)
        assert patches_in(axis, image, 0) == pytest.approx([1] * 6)


def test_the_slot_that_a_token_retrieves_most_is_drawn_with_its_weight() -> None:
    axes = drawing.draw_retrieval(torch.rand(2, 3, 20, 30), drawn_by_hand()).axes
    maps = [axis.images[0].get_array().flatten().tolist() for axis in axes[2:6]]
    assert maps[:2] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert maps[2] == maps[3] == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75, 0.8])


def test_each_bar_is_the_use_of_its_slot() -> None:
    block = drawn_by_hand()
    bars = drawing.draw_use([block]).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx((100 * block.use).tolist(), abs=1e-4)


def test_both_drifts_are_drawn_under_their_names() -> None:
    turned = [torch.tensor([[x, [0.0, 3.0]]]) for x in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]
    lines = drawing.draw_drift(measure_drift(['a', 'b', 'c'], turned)).axes[0].lines
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert drawn == {
        'since the first checkpoint': ([0, 1, 2], [0, 0.5, 1]),
        'since the checkpoint before': ([1, 2], [0.5, 0.5]),
    }


def test_each_block_has_a_line_of_its_own_over_the_epochs() -> None:
    names = [name for name in drawing.NUMBERS if name not in ('train_loss', 'eval_top1')]
    rows = [
        dict(epoch=epoch, train_loss=1.0, eval_top1=2.0, block=block, **dict.fromkeys(names, 10 * block + epoch))
        for epoch, block in itertools.product(range(2), range(2))
    ]
    for axis in drawing.draw_training(rows).axes[2:]:
        assert [list(line.get_ydata()) for line in axis.lines] == [[0, 1], [10, 11]]


# -------------------------------------------------------------------------------------------------- page and command


def test_the_page_is_one_well_formed_file_that_asks_for_nothing() -> None:
    html = visualize.visualize(make_model(), images(B), title='<b>&"x', pictures=2)
    tree = parsed(html)
    assert tree.findtext('head/title') == tree.findtext('body/h1') == 'The memory of <b>&"x'
    pictures = list(tree.iter('img'))
    assert len(pictures) == 3 + 3 * 2
    assert len({picture.attrib['alt'] for picture in pictures}) == len(pictures)
    for picture in pictures:
        kind, data = picture.attrib['src'].split(',')
        assert kind == 'data:image/webp;base64'
        assert base64.b64decode(data)[8:12] == b'WEBP'
    words = re.sub('src="data:[^"]*"', '', html)
    assert not re.search(r'https?:|//|<script|<link|url\(|src=|href=', words)
    assert len(list(tree.iter('td'))) == 2 * 7
    shown = parsed(html._repr_html_())
    assert (shown.tag, shown.attrib['srcdoc'].split()) == ('iframe', html.split())
    assert isinstance(html, Page)


def test_each_slot_has_its_place_in_a_mosaic_even_where_the_row_goes_on_below() -> None:
    figure = drawing.draw_reads(images(2), inspect(make_model(num_slots=19), images(B))[0])
    titles = [[label.get_text() for label in axis.get_xticklabels()] for axis in figure.axes]
    assert titles == [['image', *map(str, range(16))], ['image', '16', '17', '18']]


def test_a_run_becomes_a_page_with_drift_and_training_and_a_table(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), str(photos), '--out', str(tmp_path / 'new'), '--pictures', '1'])
    assert capsys.readouterr().out.split() == [str(tmp_path / 'new' / name) for name in ('memory.html', 'training.csv')]
    tree = parsed((tmp_path / 'new' / 'memory.html').read_text(encoding='utf-8'))
    alts = [picture.attrib['alt'] for picture in tree.iter('img')]
    assert alts[-2:] == ['Drift of the memory', 'Training by epoch']
    assert f'{B} images' in (tree.findtext('body/p') or '')
    with (tmp_path / 'new' / 'training.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {'epoch', 'train_loss', 'eval_top1', 'block', 'mean_cosine', 'balance_loss', 'tokens_read'} <= set(rows[0])


def test_a_model_by_name_takes_a_checkpoint_and_checkpoints_for_drift(run: Path, photos: Path, tmp_path: Path) -> None:
    files = [str(path) for path in find_checkpoints(run)]
    main(['test_ait', str(photos), '--checkpoint', files[0], '--checkpoints', *files, '--out', str(tmp_path)])
    assert 'Drift of the memory' in (tmp_path / 'memory.html').read_text()
    assert 'Training by epoch' not in (tmp_path / 'memory.html').read_text()
    assert torch.equal(load_model(files[1]).blocks[1].mlp.memory, read_memories(Path(files[1]))[1])


def test_a_model_without_weights_needs_a_checkpoint() -> None:
    with pytest.raises(ValueError, match='ait_small has no weights of its own; name the file of a training'):
        load_model('ait_small')


def test_a_model_of_one_channel_sees_grey_images(photos: Path) -> None:
    model = timm.create_model('test_ait', in_chans=1, **ARGS)
    x = visualize.read_images(str(photos), model, 2)
    assert x.shape == (2, 1, SIDE, SIDE)
    assert visualize.visualize(model, x, pictures=1)
    with pytest.raises(ValueError, match='pictures must be at least 1, got 0'):
        visualize.visualize(model, x, pictures=0)


def test_a_model_of_other_channels_is_refused_where_a_folder_is_read(photos: Path) -> None:
    with pytest.raises(ValueError, match=r'have 1 or 3 channels, the model takes 6; call .* with a tensor'):
        visualize.read_images(photos, timm.create_model('test_ait', in_chans=6), 2)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    Image.new('RGB', (SIDE, SIDE)).save(tmp_path / 'whole.jpg')
    (tmp_path / 'half.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:100])
    with pytest.raises(ValueError, match=r'half\.jpg cannot be read \(.+\); remove it or copy it once more'):
        visualize.read_images(tmp_path, timm.create_model('test_ait'), 2)


def test_an_image_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new('RGB', (SIDE, SIDE)).save(tmp_path / 'huge.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    with pytest.raises(ValueError, match=r'huge\.png cannot be read \(.*decompression bomb'):
        visualize.read_images(tmp_path, timm.create_model('test_ait'), 1)


def test_the_patches_of_a_wrapped_model_have_rows_and_columns() -> None:
    model = AveragedModel(make_model())
    assert inspect(model, images(2))[0].grid == model.module.patch_embed.grid_size


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['test_ait', 'nowhere'], 'there is no folder nowhere; give a folder of images'),
        (['test_ait', 'empty'], 'empty holds no images'),
        (['test_vit', 'empty'], 'test_vit has no memory to look into'),
        (['test_ait_relational', 'empty'], 'test_ait_relational answers questions, and a folder of images holds none'),
        (['test_ait.no_tag', 'empty'], 'timm cannot make test_ait.no_tag: Invalid pretrained tag'),
        (['no_model', 'empty'], 'expected the name of a model, a checkpoint or the folder of train.py, got no_model'),
        (['empty', 'empty'], 'empty holds no checkpoint-<epoch>.pth.tar'),
        (['plain.pth', 'empty'], 'plain.pth does not say which model it holds; name the model'),
        (['plain.pth', 'empty', '--checkpoint', 'plain.pth'], '--checkpoint goes with the name of a model'),
        (['test_ait', 'empty', '--checkpoint', 'nothing.pth'], 'there is no checkpoint nothing.pth'),
        (['test_ait', 'photos', '--checkpoints', 'plain.pth'], 'plain.pth holds no memory'),
    ],
)
def test_a_wrong_argument_is_said_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    save_images(tmp_path / 'photos', 1)
    torch.save({'head.weight': torch.zeros(3)}, 'plain.pth')
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert str(error.value).startswith(f'python -m timm_ait.visualize: {message}')
    assert not (tmp_path / 'output').exists()


def test_a_run_without_summary_or_with_one_checkpoint_is_met(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run', epochs=1)
    assert visualize._drift([folder]) is None
    (folder / 'summary.csv').unlink()
    with pytest.raises(ValueError, match=r'holds no summary\.csv'):
        follow_training(folder, images(B))


def test_a_missing_matplotlib_is_named_and_importing_the_package_needs_none() -> None:
    script = """
        import sys
        import timm_ait
        assert 'matplotlib' not in sys.modules
        from timm_ait import drawing, visualize
        assert 'matplotlib' not in sys.modules
        drawing.find_spec = lambda name: None
        visualize.main(['test_ait', '.'])
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True, check=False)
    needed = "the pictures need matplotlib: pip install '.[visualize]' in a checkout of timm_ait"
    assert (done.returncode, done.stderr) == (1, f'python -m timm_ait.visualize: {needed}\n')
