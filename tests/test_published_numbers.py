"""What makes the published numbers: which images train and test, and which settings and seeds reach the training."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import batch_sizes
import loop
import memory
import pytest
import tables
import timm
import torch
import upcycle
from images import load, sample_folder
from loop import Settings, weight_sum
from PIL import Image
from runs import count_parameters
from torch import Tensor, nn

from timm_ait.datasets import AssociativeRecall, SortOfClevr

TOY = '--width 16 --depth 1 --batch-size 5 --threads 1'.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of three training and two test images. A pixel says which one it is: split, class and number."""
    for (split, first, count), label in itertools.product((('train', 0, 3), ('test', 200, 2)), range(10)):
        (tmp_path / split / str(label)).mkdir(parents=True)
        for i in range(count):
            colour = (first, 20 * label, 50 * i)
            Image.new('RGB', (32, 32), colour).save(tmp_path / split / str(label) / f'{i}.png')
    return tmp_path


def numbers(images: Tensor) -> list[list[int]]:
    """What the first pixel of each image says."""
    return images[:, :, 0, 0].tolist()


def test_of_every_class_the_images_from_the_first_one_on_are_read(folder: Path) -> None:
    images, labels = load(folder / 'train', 1, 2)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert numbers(images) == [[0, 20 * label, 50 * i] for label in range(10) for i in (1, 2)]


def test_a_sample_is_spread_over_all_classes(folder: Path) -> None:
    sample = sample_folder(folder / 'train', timm.create_model('test_ait'), 10)
    assert len({label for _, label in sample}) >= 9


# The runners of the tables


class Spies:
    """In the place of training and test: what they were given, and the first weights of each model."""

    def __init__(self, script: Any, patch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[Any, Settings]] = []
        self.tested: list[Any] = []
        self.weights: list[float] = []
        patch.setattr(script, 'fit', self.fit)
        patch.setattr(script, 'evaluate', self.evaluate)

    def fit(self, model: nn.Module, data: Any, settings: Settings, *args: Any, **kwargs: Any) -> Any:
        self.trained.append((data, settings))
        self.weights.append(weight_sum(model))
        return Mock(record=dict)

    def evaluate(self, model: nn.Module, data: Any, settings: Settings, **kwargs: Any) -> float:
        self.tested.append(data)
        return 50.0


def run_table(words: list[str], out: Path, patch: pytest.MonkeyPatch) -> Spies:
    spies = Spies(tables, patch)
    tables.main([*words, *TOY, '--rows', 'ait', '--seeds', '5', '6', '--out', str(out)])
    return spies


def test_a_row_is_trained_on_training_images_with_its_own_settings_and_seed_and_tested_on_test_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = '--train 30 --test 20 --opt muon --lr 0.25 --weight-decay 0.125 --epochs 7 --bfloat16'.split()
    spies = run_table(['cifar10', str(folder), *words], tmp_path / 'out', monkeypatch)
    wanted = Settings(0.25, 7, None, 5, 'muon', 0.125, flip=True, shift=4, turn=False, bfloat16=True)
    assert [settings for _, settings in spies.trained] == [replace(wanted, seed=seed) for seed in (5, 6)]
    assert {len(data[1]) for data, _ in spies.trained} == {30}
    assert {red for data, _ in spies.trained for red, *_ in numbers(data[0])} == {0}
    assert {red for data in spies.tested for red, *_ in numbers(data[0])} == {200}
    assert spies.weights[0] != spies.weights[1]


@pytest.mark.parametrize('words', [['binary'], ['binary', '--turn'], ['nonrelational'], ['all']], ids=' '.join)
def test_scenes_are_those_of_their_split_and_questions_and_are_turned_on_demand_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ['--train', '2', '--test', '3']
    spies = run_table(['sort_of_clevr', '--questions', *words, *sizes], tmp_path, monkeypatch)
    (trained, settings), tested = spies.trained[0], spies.tested[0]
    assert (settings.flip, settings.turn, settings.shift) == ('--turn' in words, '--turn' in words, 0)
    kinds = ('nonrelational', 'binary', 'ternary') if words == ['all'] else words[:1]
    all_wanted = SortOfClevr('train', 2, kinds=kinds), SortOfClevr('test', 3, kinds=kinds)
    for scenes, wanted in zip((trained, tested), all_wanted, strict=True):
        assert torch.equal(scenes.images, wanted.images)
        assert torch.equal(scenes.questions, wanted.questions)


@pytest.mark.parametrize('table', ['triangle', 'triangle_small_patches', 'recall'])
def test_drawn_images_are_those_of_their_split(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_recall = '--grid 6 --pairs 9 --joined'.split() if table == 'recall' else []
    spies = run_table([table, *of_recall, '--train', '7', '--test', '6'], tmp_path, monkeypatch)
    (trained, settings), tested = spies.trained[0], spies.tested[0]
    assert (settings.flip, settings.turn, settings.shift) == (False, False, 0)
    assert (trained.split, len(trained), tested.split, len(tested)) == ('train', 7, 'test', 6)
    if isinstance(trained, AssociativeRecall):
        shown = {(one.grid, one.num_pairs, one.num_keys, one.joined) for one in (trained, tested)}
        assert shown == {(6, 9, 32, True)}


def make_row(row: str, *words: str) -> Any:
    args = tables.complete(tables.make_parser().parse_args([*words, '--rows', row]), [])
    with torch.device('meta'):
        return tables.create(row, args)


def test_the_sizes_head_and_positions_of_the_command_line_reach_the_model() -> None:
    words = ['recall', '--width', '16', '--depth', '3', '--mlp-ratio', '3', '--head', 'flatten', '--no-pos-embed']
    ait, vit = make_row('ait', *words), make_row('vit_small', *words)
    assert (len(ait.blocks), ait.global_pool, ait.pos_embed) == (3, 'flatten', None)
    assert (len(vit.mixer.blocks), vit.head.is_mean, vit.stem.pos_embed) == (3, False, None)
    assert ait.blocks[0].mlp.fc1.out_features == vit.mixer.blocks[0].mlp.fc1.out_features == 48
    ait, vit = make_row('ait', *words[:5]), make_row('vit_small', *words[:5])
    assert (ait.global_pool, vit.head.is_mean) == ('avg', True)
    assert ait.pos_embed is not None
    assert vit.stem.pos_embed is not None


def test_a_slot_of_coordination_reads_twenty_tokens_and_five_of_a_scene() -> None:
    for row in ('coordination', 'coordination_h'):
        top_k = [make_row(row, table).mixer.blocks[0].write.top_k for table in ('cifar10', 'sort_of_clevr')]
        assert top_k == [20, 5]


def test_the_models_of_the_published_results_start_as_they_did() -> None:
    results = Path(tables.__file__).parent / 'results'
    found = {}
    for path in sorted((results / 'tables').glob('*.json')):
        one = json.loads(path.read_text())
        found[one['row'], path.stem.rsplit('-', 1)[1]] = one  # one seed of each
    for one in found.values():
        words = shlex.split(one['command'])[2:]
        args = tables.complete(tables.make_parser().parse_args(words), words)
        torch.manual_seed(one['seed'])
        model = tables.create(one['row'], args)
        assert count_parameters(model) == one['parameters'], one['command']
        if 'first_weights' in one:
            assert weight_sum(model) == pytest.approx(one['first_weights'], rel=1e-4), one['command']
    for path in sorted((results / 'memory').glob('*-1.json')):
        one = json.loads(path.read_text())
        sizes = (one['arguments'][name] for name in ('attention', 'width', 'depth'))
        assert count_parameters(memory.create(one['variant'], *sizes)) == one['parameters'], path


# The experiment on the memory


def test_a_variant_is_trained_with_its_own_settings_and_seed_and_tested_on_test_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spies, reported = Spies(memory, monkeypatch), []
    monkeypatch.setattr(memory, 'memory_report', lambda model, images: reported.append(images) or [])
    words = '--variants published --images 3 --test-images 2 --epochs 7 --lr 0.25 --seeds 5 6'.split()
    memory.main([str(folder), *TOY, *words, '--out', str(tmp_path / 'out')])
    wanted = Settings(0.25, 7, batch_size=5)
    assert [settings for _, settings in spies.trained] == [replace(wanted, seed=seed) for seed in (5, 6)]
    assert {red for data, _ in spies.trained for red, *_ in numbers(data[0])} == {0}
    assert {red for data in spies.tested for red, *_ in numbers(data[0])} == {200}
    assert spies.weights[0] != spies.weights[1]
    torch.testing.assert_close(reported[0], loop.normalize(spies.tested[0][0], wanted))


def test_the_pictures_show_accuracies_and_what_they_are_above_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, list[float]]] = []
    for script in (memory, tables):
        monkeypatch.setattr(script, 'draw_rows', lambda axes, rows: drawn.append(rows))
    rows = {'none': {1: {'top1': 50.0}, 2: {'top1': 60.0}}, 'image': {1: {'top1': 51.0}, 2: {'top1': 63.0}}}
    memory.draw({'a setting': rows}, tmp_path / 'memory.png')
    tables.draw(rows, 'a heading', tmp_path / 'table.png')
    assert drawn == [{'image': [1.0, 3.0]}, {'none': [50.0, 60.0], 'image': [51.0, 63.0]}]


# Batch sizes


def test_the_accuracies_at_batch_sizes_are_of_test_images_from_the_seed_and_the_pixels_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Settings]] = []

    def note(model: nn.Module, data: Any, settings: Settings) -> dict[str, Any]:
        seen.append((data, settings))
        return {'1': dict(top1=50.0, difference=0.0)}

    monkeypatch.setattr(batch_sizes, 'measure', note)
    words = ['cifar10', str(folder), '--test', '20', '--out']
    batch_sizes.main([*words, str(tmp_path / 'a'), '--weights', 'ait_tiny_conv4_32'])
    pixels = timm.data.resolve_model_data_config(timm.create_model('ait_tiny_conv4_32'))
    (data, settings), *_ = seen
    assert (settings.mean, settings.std) == (pixels['mean'], pixels['std'])
    assert {red for red, *_ in numbers(data[0])} == {200}
    spies = Spies(tables, monkeypatch)
    batch_sizes.main([*words, str(tmp_path / 'b'), *TOY, '--train', '30', '--seeds', '6'])
    assert [settings.seed for _, settings in spies.trained] == [6]


def test_every_batch_size_starts_from_the_same_memory_and_the_largest_difference_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer('calls', torch.zeros(()))
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # as the authors' memory moves in evaluation
            return torch.stack([torch.full((len(x),), 2.5), self.calls.expand(len(x))], dim=1)

    monkeypatch.setattr(batch_sizes, 'BATCH_SIZES', (1, 2, 4))
    found = batch_sizes.measure(Counting(), (torch.zeros(4, 3, 2, 2), torch.zeros(4).long()), Settings(lr=0.0))
    # the batches count 1 2 3 4, 1 1 2 2, and 1 1 1 1
    assert {size: one['difference'] for size, one in found.items()} == {'1': 0.0, '2': 2.0, '4': 3.0}
    assert {size: one['top1'] for size, one in found.items()} == {'1': 50.0, '2': 100.0, '4': 100.0}  # up to call 2


# A ViT that becomes an AiT


def test_all_starts_are_fine_tuned_on_other_images_with_the_seed_of_each_and_tested_on_test_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spies, heads = Spies(upcycle, monkeypatch), []
    monkeypatch.setattr(upcycle, 'SHAPE', dict(upcycle.SHAPE, embed_dim=16, depth=1))
    monkeypatch.setattr(upcycle, 'checkpoint_of', lambda *args: Mock())
    create = timm.create_model

    def note(name: str, **kwargs: Any) -> nn.Module:
        model = create(name, **kwargs)
        layer = model.blocks[0].mlp
        heads.append((layer.write_rule, layer.write_scope, layer.memory_decay) if 'ait' in name else None)
        return model

    monkeypatch.setattr(upcycle.timm, 'create_model', note)
    sizes = '--pretrain-images 2 --finetune-images 1 --test-images 2 --epochs 5 3 --batch-size 5 --seeds 2'.split()
    upcycle.main([str(folder), *sizes, '--threads', '1', '--out', str(tmp_path / 'out')])
    (first, pretrain), *others = spies.trained
    assert {number for _, _, number in numbers(first[0])} == {0, 50}
    assert {number for data, _ in others for _, _, number in numbers(data[0])} == {100}
    assert {red for data in spies.tested for red, *_ in numbers(data[0])} == {200}
    assert (pretrain.lr, pretrain.epochs) == (1e-3, 5)
    wanted = Settings(3e-4, 3, batch_size=5, warmup_lr=3e-4 / 100)
    assert [settings for _, settings in others] == [replace(wanted, seed=seed) for seed in (1, 2) for _ in range(4)]
    starts = [None, ('published', 'batch', 0.9), ('distinct', 'batch', 0.9), ('distinct', 'image', 0.5)]
    assert heads == [None, *starts, *starts]
    assert spies.weights[2] != spies.weights[6]  # the same AiT with another memory
