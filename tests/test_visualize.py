"""What is drawn of a memory: its history, each picture by hand, a page that needs nothing but itself, the command."""

import argparse
import base64
import csv
import itertools
import math
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from matplotlib.colors import same_color
from models import images, make_model
from PIL import Image
from safetensors.torch import save_file
from timm.utils import CheckpointSaver
from torch import Tensor

from timm_ait import BlockReport, drawing, visualize
from timm_ait.checkpoint import find_checkpoints, load_model
from timm_ait.history import follow_training, measure_drift, read_memories, write_csv
from timm_ait.hub import export
from timm_ait.inspection import BlockInspection, inspect
from timm_ait.visualize import Page, main

B, SIDE, N, S, M, K = 5, 32, 16, 3, 7, 11  # of the models of models.py, whose patches are 8 x 8
ARGS: dict[str, Any] = dict(depth=2, embed_dim=34, num_heads=2, num_slots=M, slot_dim=5, write_heads=S, bottleneck=K)


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


def test_the_blocks_of_a_checkpoint_come_by_number(tmp_path: Path) -> None:
    model = timm.create_model('test_ait', depth=12, embed_dim=16, num_heads=2, num_slots=5, slot_dim=3)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    save_file(model.state_dict(), tmp_path / 'a.safetensors')  # sorts block 10 before block 2
    wanted = torch.stack([block.mlp.memory for block in model.blocks])
    assert torch.equal(read_memories(tmp_path / 'a.pth'), wanted)
    assert torch.equal(read_memories(tmp_path / 'a.safetensors'), wanted)


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


def test_the_table_has_all_columns_where_the_first_checkpoint_is_gone(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run')
    (folder / 'checkpoint-0.pth.tar').unlink()
    write_csv(tmp_path / 'training.csv', follow_training(folder, images(B)))
    with (tmp_path / 'training.csv').open(newline='') as file:
        assert [row['block'] for row in csv.DictReader(file)] == ['', '0', '1', '0', '1']


def test_a_run_may_lack_the_validation_or_the_line_of_an_epoch(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run', epochs=2)
    (folder / 'summary.csv').write_text('epoch,train_loss\n0,3\n')
    rows = follow_training(folder, images(B))
    assert [(row['epoch'], row['block']) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row['train_loss'] for row in rows] == pytest.approx([3, 3, math.nan, math.nan], nan_ok=True)
    assert all(math.isnan(row['eval_top1']) for row in rows)


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


def test_reads_are_compared_over_images_in_a_picture_and_slot_by_slot_in_the_mosaic() -> None:
    block = drawn_by_hand()
    block.gates[1, :, 0] = block.gates[0, :, 0] / 4  # slot 0 reads image 1 a quarter as much as image 0
    block.gates[1, :, 1] /= 4  # slot 1 reads little
    white = torch.ones(2, 3, 64, 64)
    white[:, :, 0, 0] = 0  # an image of one colour has no range
    assert patches_in(drawing.draw_reads(white, block).axes[0], 1, 1)[0] == pytest.approx(0.12 + 0.88 / 4)
    assert max(patches_in(drawing.draw_positions(block).axes[0], 0, 1)) == pytest.approx(1)


def test_pixels_keep_their_colours() -> None:
    x = torch.zeros(1, 3, 64, 64)
    x[:, 0], x[:, 1] = 2, 1
    x[:, 0, 32:] = 1
    assert drawing._pixels(x)[0, 5, 5].tolist() == pytest.approx([1, 0.5, 0])


def test_the_slot_that_a_token_retrieves_most_is_drawn_with_its_weight() -> None:
    axes = drawing.draw_retrieval(torch.rand(2, 3, 20, 30), drawn_by_hand()).axes
    maps = [axis.images[0].get_array().flatten().tolist() for axis in axes[2:6]]
    assert maps[:2] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert maps[2] == maps[3] == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75, 0.8])


def test_each_bar_is_the_use_of_its_slot() -> None:
    block = drawn_by_hand()
    bars = drawing.draw_use([block]).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx((100 * block.use).tolist(), abs=1e-4)


def test_dead_slots_are_red_beside_a_line_at_the_even_share() -> None:
    block = drawn_by_hand()
    block.shares = torch.tensor([0.01, 0.3, 0.69]).expand(2, 7, 3)
    axis = drawing.draw_use([block]).axes[0]
    assert [same_color(bar.get_facecolor(), 'tab:red') for bar in axis.patches] == [True, False, False]
    assert axis.lines[-1].get_ydata()[0] == pytest.approx(100 / 3)


def test_cosines_have_the_number_of_their_block_and_colours_from_minus_one_to_one() -> None:
    axis = drawing.draw_cosines([drawn_by_hand()]).axes[0]
    assert axis.get_title() == 'block 3'
    assert axis.images[0].get_clim() == (-1, 1)


def test_the_energy_is_drawn_as_a_mean_over_tokens_in_a_band_with_a_line_at_the_steps_of_the_layer() -> None:
    block = drawn_by_hand()
    block.energy = torch.arange(1.0, 15).view(2, 7, 1).expand(2, 7, 5)
    axis = drawing.draw_energy([block]).axes[0]
    mean, dashed = axis.lines
    assert list(mean.get_ydata()) == pytest.approx([7.5] * 5)
    assert dashed.get_xdata()[0] == block.steps
    (band,) = axis.collections
    assert band.get_datalim(axis.transData).ymin == pytest.approx(1 + 0.05 * 13)


def test_both_drifts_are_drawn_under_their_names() -> None:
    turned = [torch.tensor([[x, [0.0, 3.0]]]) for x in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]
    lines = drawing.draw_drift(measure_drift(['a', 'b', 'c'], turned)).axes[0].lines
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert drawn == {
        'since the first checkpoint': ([0, 1, 2], [0, 0.5, 1]),
        'since the checkpoint before': ([1, 2], [0.5, 0.5]),
    }
    axis = lines[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ['a', 'b', 'c']
    assert axis.collections[0].get_paths()[0].contains_point((1.5, 0.1))  # slot 1 stays, and the band reaches it


def test_loss_and_accuracy_are_drawn_over_the_epochs() -> None:
    rows = [dict(epoch=epoch, train_loss=3.0 - epoch, eval_top1=10.0 + epoch) for epoch in range(3)]
    loss, accuracy, *_ = drawing.draw_training(rows).axes
    assert list(loss.lines[0].get_ydata()) == [3, 2, 1]
    assert list(accuracy.lines[0].get_ydata()) == [10, 11, 12]


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


def test_the_page_draws_so_many_pictures_and_opens_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[..., Any]:
        draw = getattr(drawing, name)
        return lambda *args: drawn.append((name, len(args[0]) if isinstance(args[0], Tensor) else 0)) or draw(*args)

    names = ['draw_cosines', 'draw_use', 'draw_energy', 'draw_positions', 'draw_reads', 'draw_retrieval']
    for name in names:
        monkeypatch.setattr(drawing, name, noting(name))
    html = visualize.visualize(make_model(), images(B), pictures=3)
    assert drawn == list(zip([*names, *names[3:]], [0, 0, 0, 0, 3, 3, 0, 3, 3], strict=True))
    assert f'{1 / M:.3f}, an even share' in html
    assert html.index('<details open="">') < html.index('<details>')


def test_a_page_takes_questions() -> None:
    model = timm.create_model('test_ait_relational', depth=1)
    assert visualize.visualize(model, images(2, side=75), torch.zeros(2, 18), pictures=1)


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


def test_the_command_takes_so_many_images_and_pictures(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(visualize, 'visualize', lambda _, x, **kwargs: seen.append((len(x), kwargs)) or Page())
    main(['test_ait', str(photos), '--images', '3', '--pictures', '2', '--out', str(tmp_path)])
    assert [(count, kwargs['pictures']) for count, kwargs in seen] == [(3, 2)]


def test_images_are_spread_over_the_folder(tmp_path: Path) -> None:
    for i in range(5):
        Image.new('RGB', (SIDE, SIDE), (50 * i,) * 3).save(tmp_path / f'{i}.{"PNG" if i == 2 else "png"}')
    model = timm.create_model('test_ait', **ARGS)
    whole, three = (visualize.read_images(tmp_path, model, count) for count in (9, 3))
    assert len(whole) == 5
    assert torch.equal(three, whole[::2])


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


def test_of_the_folder_of_a_run_the_last_epoch_is_loaded(tmp_path: Path) -> None:
    folder = save_run(tmp_path / 'run')
    shutil.copy(folder / 'checkpoint-0.pth.tar', folder / 'checkpoint-10.pth.tar')
    first, second = (load_model(str(path)) for path in (folder, folder / 'checkpoint-0.pth.tar'))
    assert torch.equal(first.blocks[0].mlp.memory, second.blocks[0].mlp.memory)


def test_a_file_or_a_folder_that_is_called_model_tag_comes_before_the_weights_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = save_run(tmp_path / 'test_ait.run') / 'checkpoint-2.pth.tar'
    export(own, Path('test_ait.cifar10'))
    shutil.copy(own, 'test_ait.pth.tar')
    Path('test_ait').mkdir()
    wanted = load_model(str(own)).blocks[0].mlp.memory
    for name in ('test_ait.run', 'test_ait.pth.tar', 'test_ait.cifar10', 'test_ait.cifar10/model.safetensors'):
        assert torch.equal(load_model(name).blocks[0].mlp.memory, wanted), name
    assert not torch.equal(load_model('test_ait').blocks[0].mlp.memory, wanted)
    save_images(tmp_path / 'photos')
    for name, is_run in (('test_ait.run', True), ('test_ait.cifar10', False)):
        main([name, 'photos', '--images', '2', '--pictures', '1', '--out', f'out-{name}'])
        assert Path(f'out-{name}', 'training.csv').is_file() == is_run
    with pytest.raises(ValueError, match=r'^expected the name of a model, .*, got test_ait\.mine/model\.safetensors$'):
        load_model('test_ait.mine/model.safetensors')


def test_an_image_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new('RGB', (SIDE, SIDE)).save(tmp_path / 'huge.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    with pytest.raises(ValueError, match=r'huge\.png cannot be read \(.*decompression bomb'):
        visualize.read_images(tmp_path, timm.create_model('test_ait'), 1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['test_ait', 'nowhere'], 'there is no folder nowhere; give a folder of images'),
        (['test_ait', 'empty'], 'empty holds no images'),
        (['test_vit', 'empty'], 'test_vit has no memory to look into'),
        (['test_ait_relational', 'empty'], 'test_ait_relational answers questions, and a folder of images holds none'),
        (['test_ait.no_tag', 'empty'], 'timm cannot make test_ait.no_tag: Invalid pretrained tag'),
        (
            ['no_model', 'empty'],
            'expected the name of a model, a checkpoint, or the folder of train.py or of an export, got no_model',
        ),
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


def test_no_image_and_a_file_in_the_place_of_the_folder_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(['test_ait', str(photos), '--images', '0'])
    assert '--images must be at least 1, got 0' in capsys.readouterr().err
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match=r'python -m timm_ait.visualize: .*file'):
        main(['test_ait', str(photos), '--out', str(tmp_path / 'file')])


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
