"""The demo runs at toy size, and so do the commands that it prints."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from timm_ait import demo

CHECKOUT = Path(os.environ.get('TIMM_CHECKOUT', ''))


@pytest.fixture(scope='module')
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo for one epoch. Return its folder and its standard output."""
    folder = tmp_path_factory.mktemp('demo')
    args = ['--epochs', '1', '--min-accuracy', '0', '--output', 'out']
    done = subprocess.run([sys.executable, '-m', 'timm_ait.demo', *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, done.stdout


def test_all_digits_of_scikit_learn_are_written_and_split_by_class(ran: tuple[Path, str]) -> None:
    digits = ran[0] / 'out' / 'digits'
    counts = {
        split: Counter(path.parent.name for path in digits.glob(f'{split}/*/*.png')) for split in ('train', 'val')
    }
    assert counts['train'].total() + counts['val'].total() == 1797
    for digit in map(str, range(10)):
        total = counts['train'][digit] + counts['val'][digit]
        assert abs(counts['val'][digit] - total / 5) <= 1
    with Image.open(next(digits.glob('val/7/*.png'))) as image:
        assert (image.size, image.mode) == ((32, 32), 'RGB')


def test_the_seed_decides_the_split_of_the_digits(tmp_path: Path) -> None:
    names = {}
    for run, seed in (('a', 3), ('b', 3), ('c', 5)):
        demo.write_digits(tmp_path / run, seed)
        names[run] = {path.name for path in (tmp_path / run).glob('val/*/*.png')}
    assert names['a'] == names['b'] != names['c']
    demo.write_digits(tmp_path / 'a', 5)  # into the folder of another seed
    train, val = ({path.name for path in (tmp_path / 'a').glob(f'{split}/*/*.png')} for split in ('train', 'val'))
    assert val == names['c']
    assert not train & val


def test_the_reloaded_checkpoint_has_the_accuracy_of_the_trained_model_and_a_picture_is_drawn(
    ran: tuple[Path, str],
) -> None:
    folder, said = ran
    (line,) = (line for line in said.splitlines() if line.startswith('best epoch'))
    # 'best epoch 93.5 %; FILE, reloaded: 93.5 %'
    trained, reloaded = (part.split()[-2] for part in line.split(';', maxsplit=1))
    assert float(trained) == float(reloaded) > 10
    with Image.open(folder / 'out' / 'demo.png') as image:
        assert min(image.size) > 500


def test_the_attention_in_the_picture_is_that_of_the_retrieval() -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_ait', depth=2, embed_dim=32, num_heads=2, num_slots=7, beta=0.3).eval()
    batches = [(torch.randn(b, 3, 32, 32), torch.zeros(b, dtype=torch.long)) for b in (3, 5)]
    images, labels, predictions, usage, reports = demo.look_inside(model, batches, 'cpu')
    assert (images.shape, labels.shape, predictions.shape, usage.shape) == ((8, 3, 32, 32), (8,), (8,), (2, 7))
    in_use = torch.special.entr(usage).sum(dim=-1).exp().tolist()
    assert [report.slots_in_use for report in reports] == pytest.approx(in_use)
    torch.testing.assert_close(usage.sum(dim=-1), torch.ones(2))
    # The mean retrieval over tokens is the mean attention times the attractors.
    mlp, retrieved = model.blocks[1].mlp, []
    mlp.retrieval.register_forward_hook(lambda module, args, out: retrieved.append(out - args[0]))
    with torch.no_grad():
        model(images)
        attractors = mlp.attractors(mlp.slots(), torch.float32)
    torch.testing.assert_close(usage[1] @ attractors, retrieved[0].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('trained', 'reloaded', 'said'),
    [
        (97.0, 97.0, ''),
        (97.0, 97.00000001, 'must have the accuracy of the trained model, 97.0 %'),
        (94.9, 94.9, 'at least 95.0 %, got 94.90 %'),
        (float('nan'), float('nan'), 'must have the accuracy'),
    ],
)
def test_a_wrong_accuracy_is_named(trained: float, reloaded: float, said: str) -> None:
    fault = demo.find_fault(trained, reloaded, 95.0)
    assert said in fault
    assert bool(fault) == bool(said)


def test_a_missing_optional_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, 'find_spec', lambda name: None if name == 'sklearn' else object())
    assert demo.main([]) == 2
    assert "needs sklearn: pip install '.[demo]' in a checkout of timm_ait" in capsys.readouterr().err


def test_the_demo_replaces_its_own_images_and_deletes_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = tmp_path / 'digits'
    demo.write_digits(digits, 0)
    first = set(digits.rglob('*.png'))
    demo.write_digits(digits, 1)
    assert len(set(digits.rglob('*.png'))) == len(first) == 1797
    assert set(digits.rglob('*.png')) != first
    own = digits / 'train' / '7' / 'own.png'
    own.touch()
    (tmp_path / 'mine' / 'digits' / 'train' / '7').mkdir(parents=True)
    other = tmp_path / 'mine' / 'digits' / 'train' / '7' / '0001.png'
    other.touch()
    for path, output in ((own, tmp_path), (other, tmp_path / 'mine')):
        assert demo.main(['--output', str(output)]) == 2
        assert f'error: the demo did not write {path}; remove it, or choose another' in capsys.readouterr().err
        assert path.exists()


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('--epochs', '0', '--epochs must be at least 1, got 0'),
        ('--batch-size', '0', '--batch-size must be at least 1, got 0'),
        ('--threads', '0', '--threads must be at least 1, got 0'),
        ('--workers', '-1', '--workers must be at least 0, got -1'),
        ('--seed', '-1', '--seed must be at least 0, got -1'),
        ('--device', 'foo', 'PyTorch cannot compute on --device foo here; take cpu'),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(
    option: str,
    value: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match='2'):
        demo.main(['--output', str(tmp_path / 'demo'), option, value])
    assert f'error: {message}' in capsys.readouterr().err
    assert not (tmp_path / 'demo').exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').touch()
    assert demo.main(['--output', str(tmp_path / 'file')]) == 2
    assert 'error: [Errno 20] Not a directory' in capsys.readouterr().err


def test_the_demo_prints_the_commands_of_its_run(ran: tuple[Path, str]) -> None:
    args = argparse.Namespace(device='cpu', epochs=1, batch_size=64, workers=1)
    for command in demo.commands(Path('out/digits'), args):
        assert command in ran[1]
    assert '--epochs 1 ' in ran[1]
    assert '--warmup-epochs 0 ' in ran[1], 'the only epoch is no warm-up'


@pytest.mark.skipif(
    not (CHECKOUT / 'train.py').is_file(), reason='TIMM_CHECKOUT must be a checkout of timm with train.py'
)
def test_the_commands_of_the_demo_run_with_timms_scripts(ran: tuple[Path, str]) -> None:
    folder, said = ran
    for script in ('train.py', 'validate.py'):
        shutil.copy(CHECKOUT / script, folder)
    for line in said.splitlines():
        if line.startswith('python '):
            done = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-6000:]
    assert (folder / 'output' / 'own' / 'model_best.pth.tar').is_file()


def test_digits_are_cropped_a_little_and_never_mirrored(ran: tuple[Path, str]) -> None:
    args = argparse.Namespace(batch_size=1, workers=0)
    loader = demo.make_loader(timm.create_model('test_ait'), ran[0] / 'out' / 'digits', 'train', args)
    transform = repr(loader.dataset.transform)
    assert 'scale=(0.7, 1.0)' in transform
    assert 'Flip' not in transform


def test_the_learning_rate_goes_on_over_the_epochs() -> None:
    layer, steps = nn.Linear(2, 3), []
    task = Mock(side_effect=lambda x, y: {'loss': nn.functional.cross_entropy(layer(x), y)}, device='cpu')
    loader = [(torch.ones(5, 2), torch.zeros(5, dtype=torch.long))] * 3
    scheduler = Mock(step_update=steps.append)
    for epoch in range(2):
        demo.train_epoch(task, loader, torch.optim.SGD(layer.parameters(), lr=0.1), scheduler, epoch, 2)
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(('minimum', 'status'), [('94', 0), ('94.5', 1)])
def test_the_demo_fails_below_its_accuracy(
    minimum: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = dict(write_digits=None, fit=94.0, make_loader=None, validate=94.0, look_inside=([],), draw=None)
    for name, result in dict(results, format_report='').items():
        monkeypatch.setattr(demo, name, Mock(return_value=result))
    monkeypatch.setattr(demo.timm, 'create_model', Mock(return_value=nn.Linear(2, 3)))
    monkeypatch.setattr(demo.torch, 'set_num_threads', Mock())
    assert demo.main(['--output', str(tmp_path), '--min-accuracy', minimum]) == status


def test_wrong_digits_are_drawn_first_and_in_red() -> None:
    figure, labels = Figure(), torch.tensor([3, 5, 7])
    demo._draw_digits(figure, torch.rand(3, 3, 32, 32), labels, torch.tensor([3, 6, 7]))
    titles = [(axis.title.get_text(), axis.title.get_color()) for axis in figure.axes]
    assert titles[0] == ('6 (is 5)', 'tab:red')
    assert set(titles[1:]) == {('3', 'tab:green'), ('7', 'tab:green')}
