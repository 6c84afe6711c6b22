"""The runner of the tables: every path at toy size."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import batch_sizes
import memory
import numpy as np
import pytest
import tables
import torch
from PIL import Image

from timm_ait import GlobalWorkspace

TOY = '--width 16 --depth 1 --train 20 --test 20 --epochs 2 --batch-size 5 --threads 1'.split()
BOTH = ['--rows', 'ait', 'vit_small']


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 in small: three images in each class and split."""
    data, rng = tmp_path_factory.mktemp('cifar10'), np.random.default_rng(0)
    for split in ('train', 'test'):
        for label in range(10):
            (data / split / str(label)).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / str(label) / f'{i}.jpg')
    return data


def results(out: Path) -> dict[str, Any]:
    records = (json.loads(path.read_text()) for path in out.glob('*.json'))
    return {f'{record["row"]}-{record["seed"]}': record for record in records}


def measured(out: Path) -> dict[str, Any]:
    return {name: (record['top1'], record['log']) for name, record in results(out).items()}


def test_cifar10_runs_resumes_and_is_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ['cifar10', str(folder), *TOY, *BOTH, '--seeds', '1', '2', '--out', str(tmp_path)]
    tables.main(command)
    found = results(tmp_path)
    assert found.keys() == {'ait-1', 'ait-2', 'vit_small-1', 'vit_small-2'}
    record = found['ait-2']
    assert len(record['log']) == 2
    assert {'commit', 'cpu', 'torch', 'timm', 'python', 'seed', 'command', 'arguments'} <= record.keys()
    assert record['command'].startswith('python benchmarks/tables.py cifar10 DIR --width 16 --depth 1')
    assert record['arguments']['width'] == 16
    assert str(folder) not in json.dumps(record)
    assert record['command'].endswith('--out OUT')
    assert not list((tmp_path / 'checkpoints').iterdir())

    capsys.readouterr()
    monkeypatch.setattr(tables, 'fit', None)  # nothing is left to train
    tables.main(command)
    assert 'all is there' in capsys.readouterr().out
    tables.main(['--show', str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')][1:]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert [row[0] for row in cells] == ['ait', 'vit_small']
    accuracies = [found[f'ait-{seed}']['top1'] for seed in (1, 2)]
    mean, half = (float(number) for number in cells[0][3].split(' ± '))
    assert (cells[0][2], mean) == ('2', pytest.approx(sum(accuracies) / 2, abs=0.006))
    assert half == pytest.approx(12.706 * abs(accuracies[0] - accuracies[1]) / 2, abs=0.006)  # t of one degree
    assert float(cells[0][1]) == pytest.approx(found['ait-1']['parameters'] / 1e6, abs=0.005)
    assert len(list(tmp_path.glob('cifar10-*.png'))) == 1


@pytest.mark.parametrize(
    'table',
    [
        ['sort_of_clevr', '--questions', 'binary'],
        ['sort_of_clevr', '--questions', 'binary', '--turn'],
        ['sort_of_clevr', '--questions', 'all'],
        ['triangle', '--steps', '3'],
        ['recall', '--grid', '4', '--pairs', '2'],
        ['recall', '--grid', '4', '--pairs', '15', '--joined'],
        ['recall', '--grid', '7', '--pairs', '48', '--joined'],
    ],
    ids=' '.join,
)
def test_drawn_tables_run(table: list[str], tmp_path: Path) -> None:
    size = ['--train', '2', '--test', '1'] if table[0] == 'sort_of_clevr' else []
    tables.main([*table, *TOY, *size, *BOTH, '--seeds', '3', '--out', str(tmp_path)])
    found = results(tmp_path)
    assert found.keys() == {'ait-3', 'vit_small-3'}
    assert all(0 <= record['top1'] <= 100 for record in found.values())
    settings = found['ait-3']['arguments']
    assert settings.get('questions') == (table[2] if table[0] == 'sort_of_clevr' else None)
    assert ('grid' in settings) == (table[0] == 'recall')
    assert ('steps' in settings) == (table[0] == 'triangle')


@pytest.mark.parametrize('row', tables.ROWS)
@pytest.mark.parametrize('table', tables.TASKS)
def test_every_row_can_be_made_for_every_table(table: str, row: str) -> None:
    args = tables.complete(tables.make_parser().parse_args([table, '--width', '64', '--depth', '1']), [])
    with torch.device('meta'):
        model = tables.create(row, args)
    (classes,) = {tables.TASKS[table].num_classes}
    heads = [module for name, module in model.named_modules() if name in ('head', 'head.fc')]
    assert heads[-1].out_features == classes


def test_the_time_budget_stops_a_run_and_the_next_calls_end_as_if_it_had_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ['cifar10', str(folder), *TOY, '--rows', 'ait_reset', '--seeds', '1', '--out']
    tables.main([*command, str(tmp_path / 'whole')])
    parts = tmp_path / 'parts'
    for step in range(1, 8):
        tables.main([*command, str(parts), '--minutes', '0'])
        assert f'stopped after step {step} of 8; the same command goes on' in capsys.readouterr().out
        assert not results(parts)
    tables.main([*command, str(parts), '--minutes', '0'])
    assert measured(parts) == measured(tmp_path / 'whole')


def test_a_killed_run_loses_no_finished_row(folder: Path, tmp_path: Path) -> None:
    start = ['cifar10', str(folder), *TOY, '--rows', 'ait', '--out', str(tmp_path), '--seeds']
    command = [*start, *map(str, range(1, 40))]
    process = subprocess.Popen([sys.executable, tables.__file__, *command], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob('*.json'))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = measured(tmp_path)  # all of them can be read
    assert 2 <= len(before) < 39
    seeds = [str(seed) for seed in range(1, len(before) + 2)]
    tables.main([*start, *seeds])
    after = measured(tmp_path)
    assert len(after) == len(before) + 1
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize('script', [tables, memory], ids=['tables', 'memory'])
def test_what_another_process_has_run_meanwhile_is_not_run_again(
    script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is tables:
        command = ['cifar10', str(folder), *TOY, '--rows', 'ait', '--out', str(tmp_path), '--seeds']
    else:
        sizes = '--width 16 --depth 1 --images 2 --test-images 2 --epochs 1 --batch-size 5 --threads 1'.split()
        command = [str(folder), *sizes, '--variants', 'none', '--out', str(tmp_path), '--seeds']
    run, calls = script.run, []

    def run_beside_another(*args: Any) -> float:
        calls.append(args)
        top1 = run(*args)
        if len(calls) == 1:
            script.main([*command, '2'])
        return float(top1)

    monkeypatch.setattr(script, 'run', run_beside_another)
    script.main([*command, '1', '2', '3'])
    assert len(calls) == len(list(tmp_path.glob('*.json'))) == 3


def test_results_of_other_settings_never_mix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width, seeds in (('16', '1'), ('32', '12')):
        words = ['--width', width, '--rows', 'ait', '--seeds', *seeds, '--out', str(tmp_path)]
        tables.main(['cifar10', str(folder), *TOY, *words])
    capsys.readouterr()
    tables.main(['--show', str(tmp_path)])
    shown = capsys.readouterr().out
    assert len(list(tmp_path.glob('*.json'))) == 3
    assert shown.count('| ait |') == 2
    assert 'width 16' in shown
    assert 'width 32' in shown
    assert len(list(tmp_path.glob('*.png'))) == 1, 'of two seeds; one is better read than looked at'


def test_results_of_other_images_never_mix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ['cifar10', str(folder), *TOY, '--out', str(tmp_path), '--seeds', '1', '--rows']
    tables.main([*command, 'ait', '--minutes', '0'])  # stops after a step
    other = shutil.copytree(folder, tmp_path / 'other')
    Image.new('RGB', (32, 32)).save(next((other / 'train').glob('*/*.jpg')))
    with pytest.raises(SystemExit):
        tables.main([command[0], str(other), *command[2:], 'ait'])
    assert 'is of a run with data=' in capsys.readouterr().err
    tables.main([*command, 'ait'])
    with pytest.raises(SystemExit):
        tables.main([command[0], str(other), *command[2:], 'vit_small'])
    assert 'use the same settings and images' in capsys.readouterr().err
    shutil.rmtree(other / 'train')
    (other / 'train').symlink_to(folder / 'train')
    Image.new('RGB', (32, 32)).save(next((other / 'test').glob('*/*.jpg')))
    with pytest.raises(SystemExit):
        tables.main([command[0], str(other), *command[2:], 'vit_small'])
    assert 'is of a run with test_data=' in capsys.readouterr().err


def test_the_recorded_command_names_no_folder_of_one_machine() -> None:
    for words in (['/a/data/', '--out', '/b/out/'], ['/a/data', '--out=/b/out'], ['/a/x=y/', '--out=/b/x=y/']):
        command = ['cifar10', *words, '--lr=0.1']
        args = tables.complete(tables.make_parser().parse_args(command), command)
        assert args.command.replace('--out=', '--out ') == (
            'python benchmarks/tables.py cifar10 DIR --out OUT --lr=0.1'
        )


def test_too_few_images_or_classes_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = shutil.copytree(folder, tmp_path / 'few')
    for split in ('train', 'test'):
        shutil.rmtree(sorted((few / split).iterdir())[0])
    for data, arguments, message in (
        (folder, ['--train', '5000'], 'images of each class of'),
        (folder, ['--train', '25'], '--train must be a multiple of the ten classes, got 25'),
        (few, [], 'cifar10 has ten classes, got 9'),
    ):
        with pytest.raises(SystemExit):
            tables.main(['cifar10', str(data), *TOY, *arguments, '--rows', 'ait', '--out', str(tmp_path / 'out')])
        assert message in capsys.readouterr().err


def test_wrong_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, foreign = tmp_path / 'broken', tmp_path / 'foreign'
    unknown = tmp_path / 'unknown'
    record = dict(row='mine', seed=1, top1=50.0, parameters=1, arguments={'table': 'triangle'}, log=[])
    for path, text in ((broken, '{'), (foreign, '{"variant": "none"}'), (unknown, json.dumps(record))):
        path.mkdir()
        (path / f'{path.name}.json').write_text(text)
    wrong = {
        'give a table, or --show': [],
        'cifar10 needs a folder of images': ['cifar10'],
        'expected results in': ['--show', str(tmp_path)],
        "invalid choice: 'ait_base'": ['triangle', '--rows', 'ait_base'],
        'together with --width': ['triangle', '--heads', '4'],
        'give --heads, at least 1': ['triangle', '--width', '64', '--heads', '0'],
        'which it must divide': ['triangle', '--width', '64', '--heads', '3'],
        'expected a width that num_heads=3 divides, got 200': ['triangle', *TOY, '--width', '200'],
        '--mlp-ratio must be above 0, got -1.0': ['triangle', '--mlp-ratio', '-1'],
        'got vit_small, without slots': ['triangle', '--rows', 'vit_small', '--num-slots', '8'],
        'for --rows that have slots; got 0': ['triangle', '--rows', 'ait', '--num-slots', '0'],
        'of ait may be slot_dim,': ['triangle', '--rows', 'ait', '--model-kwargs', 'num_slots=8'],
        'of vit_small may be none, as it is no AiT; got beta': [
            *('triangle', '--rows', 'ait', 'vit_small', '--model-kwargs', 'beta=2')
        ],
        'expected KEY=VALUE, got beta': ['triangle', '--rows', 'ait', '--model-kwargs', 'beta'],
        'got write_rule': ['triangle', '--rows', 'ait_additive', '--model-kwargs', 'write_rule=published'],
        'bottleneck must be an integer of at least 1, got 0': [
            *('triangle', *TOY, '--rows', 'ait', '--model-kwargs', 'bottleneck=0')
        ],
        'other answers change': ['sort_of_clevr', '--questions', 'all', '--turn'],
        'for sort_of_clevr --questions binary': ['triangle', '--turn'],
        "invalid choice: 'no_such_optimizer'": ['triangle', '--opt', 'no_such_optimizer'],
        'lower batch_size': ['triangle', *TOY, '--batch-size', '21'],
        'steps must be at least 1, got 0': ['triangle', *TOY, '--steps', '0'],
        'batch_size must be at least 1, got 0': ['triangle', *TOY, '--batch-size', '0'],
        'No such file or directory': ['cifar10', str(tmp_path / 'nowhere'), *TOY],
        'broken.json is no JSON': ['--show', str(broken)],
        'holds no row, seed': ['--show', str(foreign)],
        "unknown.json is of a row 'mine' that is not known here": ['--show', str(unknown)],
        'got -5': ['cifar10', '--test', '-5'],
    }
    for message, arguments in wrong.items():
        with pytest.raises(SystemExit):
            tables.main([*arguments, '--out', str(tmp_path / 'out')])
        assert message in capsys.readouterr().err


# Batch sizes


def test_the_looped_workspace_with_our_weights_is_ours_while_it_writes() -> None:
    torch.manual_seed(0)
    ours = tables.create('ait', tables.complete(tables.make_parser().parse_args(['cifar10', *TOY]), [])).eval()
    for block in ours.blocks:  # unit rows, as after a write
        block.mlp.memory.copy_(torch.nn.functional.normalize(block.mlp.memory, dim=-1))
        block.mlp.write_mode = 'always'
    theirs, images = batch_sizes.loop_heads(ours), torch.randn(11, 3, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('table', ['cifar10', 'sort_of_clevr'])
def test_only_our_logits_are_the_same_at_every_batch_size(
    table: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_sizes, 'BATCH_SIZES', (1, 3, 7, 20))  # of 20 images
    data = [str(folder)] if table == 'cifar10' else []
    size = ['--train', '2', '--test', '2'] if table == 'sort_of_clevr' else []
    batch_sizes.main([table, *data, *TOY, *size, '--lr', '0.01', '--out', str(tmp_path)])
    record = json.loads((tmp_path / 'batch_sizes.json').read_text())
    assert record['command'].startswith(f'python benchmarks/batch_sizes.py {table}')
    ours, theirs = record['batch_sizes'].values()
    assert list(ours) == ['1', '3', '7', '20']
    assert len({size['top1'] for size in ours.values()}) == 1
    assert max(size['difference'] for size in ours.values()) < 1e-4
    assert min(size['difference'] for name, size in theirs.items() if name != '1') > 1e-3
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == '| batch size | 1 | 3 | 7 | 20 |'
    assert len(rows) == 5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['sort_of_clevr', '--questions', 'all', '--turn'], 'other answers change as the scene turns'),
        ([], 'give a table and one seed'),
        (['cifar10', '--seeds', '1', '2'], 'give a table and one seed'),
        (['cifar10', '--weights', 'no_such_model'], 'expected the name of a model'),
        (['cifar10', '--rows', 'vit_small', '--minutes', '1'], '--rows, --minutes: this script trains ait alone'),
        (
            ['cifar10', '--weights', 'test_ait', '--bfloat16', '--model-kwargs', 'beta=2'],
            '--model-kwargs, --bfloat16: this script evaluates test_ait as it is; leave them out',
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        batch_sizes.main([*arguments, '--out', str(tmp_path)])
    assert message in capsys.readouterr().err


def test_the_accuracy_of_packaged_weights_is_the_same_at_every_batch_size(folder: Path, tmp_path: Path) -> None:
    batch_sizes.main(['cifar10', str(folder), '--weights', 'test_ait', '--test', '20', '--out', str(tmp_path)])
    record = json.loads((tmp_path / 'batch_sizes.json').read_text())
    assert record['arguments'] == {'table': 'cifar10', 'test': 20, 'weights': 'test_ait'}
    ours, theirs = record['batch_sizes'].values()
    assert len({size['top1'] for size in ours.values()}) == 1
    assert theirs['64']['difference'] > max(size['difference'] for size in ours.values())
    with pytest.raises(SystemExit):
        batch_sizes.main(['cifar10', str(folder), '--weights', 'test_ait', '--test', '10', '--out', str(tmp_path)])
    assert json.loads((tmp_path / 'batch_sizes.json').read_text()) == record


@pytest.mark.parametrize(
    ('words', 'more'),
    [
        (['--weights', 'test_ait', '--grid', '8', '--test', '10'], ['--pairs', '3', '--joined']),
        ([*TOY, '--grid', '4', '--pairs', '1'], ['--seeds', '2']),
    ],
    ids=['images', 'seed'],
)
def test_a_result_of_other_images_or_another_seed_is_of_other_arguments(
    words: list[str], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ['recall', *words, '--out', str(tmp_path)]
    batch_sizes.main(command)
    for added, kind in (([], 'these arguments'), (more, 'other arguments')):
        with pytest.raises(SystemExit):
            batch_sizes.main([*command, *added])
        assert f'holds what was measured with {kind}' in capsys.readouterr().err


def test_a_memory_that_is_not_the_papers_is_measured_in_our_way_alone(folder: Path, tmp_path: Path) -> None:
    batch_sizes.main(['cifar10', str(folder), '--weights', 'ait_tiny_conv4_32', '--test', '20', '--out', str(tmp_path)])
    ((way, measured),) = json.loads((tmp_path / 'batch_sizes.json').read_text())['batch_sizes'].items()
    assert way == 'ours'
    assert len({size['top1'] for size in measured.values()}) == 1
    assert max(size['difference'] for size in measured.values()) < 1e-4


@pytest.mark.parametrize(
    ('kwargs', 'is_published'),
    [
        ({}, True),
        (dict(num_slots=5, bottleneck=4), True),
        (dict(beta=4.0), False),
        (dict(memory_decay=0.0), False),
        (dict(retrieval_steps=3), False),
        (dict(write_scope='image'), False),
    ],
)
def test_only_what_the_looped_workspace_computes_is_compared_with_it(
    kwargs: dict[str, Any], is_published: bool
) -> None:
    torch.manual_seed(0)
    ours = GlobalWorkspace(16, 32, slot_dim=6, write_heads=2, **kwargs).train()
    ours.memory.copy_(torch.nn.functional.normalize(ours.memory, dim=-1))
    assert batch_sizes.is_published(ours) is is_published
    theirs, tokens = batch_sizes.looped(ours), torch.randn(3, 7, 16)
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-5) is is_published


def test_the_published_tables_are_those_of_the_results() -> None:
    folder = Path(tables.__file__).parent
    text = ''.join((folder / name).read_text() for name in ('MEMORY.md', 'PAPER.md'))
    found = tables.gather(folder / 'results' / 'tables')
    assert found
    for heading, rows in found.items():
        assert f'{heading}\n\n{tables.format_table(rows)}' in text


def test_a_published_result_is_found_again_by_its_command() -> None:
    folder = Path(tables.__file__).parent / 'results' / 'tables'
    for path in folder.glob('*.json'):
        record = json.loads(path.read_text())
        words = shlex.split(record['command'])[2:]
        args = tables.complete(tables.make_parser().parse_args(words), words)
        assert tables.title(args, record['row'], record['seed']) == path.stem


def test_the_number_of_heads_and_the_optimizer_make_another_run() -> None:
    def parse(*words: str) -> Any:
        args = tables.make_parser().parse_args(['recall', '--rows', 'ait', '--width', '64', *words])
        return tables.complete(args, [])

    with torch.device('meta'):
        heads = [tables.create('ait', args).blocks[0].attn.num_heads for args in (parse(), parse('--heads', '4'))]
    assert heads == [1, 4]
    others = ((), ('--heads', '4'), ('--opt', 'muon'), ('--num-slots', '64'), ('--model-kwargs', 'beta=2'))
    assert len({tables.title(parse(*words), 'ait', 1) for words in others}) == 5


def test_keywords_of_the_workspace_reach_it_and_stand_in_the_result(tmp_path: Path) -> None:
    words = ['triangle', *TOY, '--rows', 'ait', '--seeds', '1', '--out', str(tmp_path)]
    tables.main([*words, '--model-kwargs', 'beta=2', 'retrieval_steps=2'])
    (result,) = tmp_path.glob('*.json')
    assert json.loads(result.read_text())['arguments']['model_kwargs'] == {'beta': 2, 'retrieval_steps': 2}
    assert "model_kwargs {'beta': 2, 'retrieval_steps': 2}" in next(iter(tables.gather(tmp_path)))
    args = tables.complete(tables.make_parser().parse_args([*words, '--model-kwargs', 'slot_dim=9']), words)
    assert tables.create('ait', args).blocks[0].mlp.slot_dim == 9


def test_the_number_of_slots_is_that_of_every_model_with_slots() -> None:
    rows = [row for row in tables.ROWS if tables.has_slots(row) and row != 'ait_slots_128']
    words = ['recall', '--grid', '2', '--width', '64', '--num-slots', '7', '--rows', *rows]
    args = tables.complete(tables.make_parser().parse_args(words), words)
    for row in rows:
        with torch.device('meta'):
            model = tables.create(row, args)
        names = ('memory', 'first_slots', 'points', 'latents', 'registers')
        slots = [x for name, x in (*model.named_parameters(), *model.named_buffers()) if name.endswith(names)]
        assert slots, row
        assert all(7 in x.shape for x in slots), row
