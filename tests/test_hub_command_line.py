"""``python -m timm_ait.hub`` does what its arguments say, or says in one sentence why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_models import ARGS, make_model

from timm_ait import hub, publish


def test_every_option_of_export_reaches_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, averaged = make_model(1), make_model(2)
    torch.save({'state_dict': trained.state_dict(), 'state_dict_ema': averaged.state_dict()}, tmp_path / 'a.pth')
    (tmp_path / 'results.json').write_text(json.dumps([{'top1': 70.5}]))
    kwargs = [f'{key}={value}' for key, value in ARGS.items() if key != 'num_classes']
    options = ['--model', 'test_ait', '--no-ema', '--dtype', 'bfloat16', '--dataset', 'some images']
    options += ['--commit', 'c0ffee', '--results', str(tmp_path / 'results.json'), '--model-kwargs', *kwargs]
    hub.main(['export', str(tmp_path / 'a.pth'), str(tmp_path / 'out'), *options])
    assert capsys.readouterr().out == f'written and loaded back: {tmp_path / "out"}\n'
    weights = safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')
    assert torch.equal(weights['head.weight'], trained.head.weight.bfloat16())
    card = (tmp_path / 'out' / 'README.md').read_text()
    for fact in ('On some images:', 'top-1 accuracy, %: 70.50', 'code at `c0ffee`', 'as trained'):
        assert fact in card


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['gone.pth', 'out'], r'there is no checkpoint gone\.pth; train\.py writes output/<experiment>/model_best'),
        (['plain.pth', 'out'], r'plain\.pth does not say which model it holds; give its name with --model'),
        (['plain.pth', '.'], r'\. exists; choose another folder or remove this one'),
        (['plain.pth', 'out', '--model', 'test_vit'], 'test_vit is no model of this package'),
        (['plain.pth', 'out', '--model', 'no_model'], r'timm cannot make no_model with .*: Unknown model'),
        (['plain.pth', 'out', '--model', 'test_ait.no_tag'], r'timm cannot make test_ait\.no_tag with .*: Invalid'),
        (['plain.pth', 'out', '--model', 'test_ait', '--model-kwargs', 'slots=3'], "timm cannot make .*'slots'"),
        (['plain.pth', 'out', '--model', 'ait_small'], r'plain\.pth: the checkpoint does not fit the model'),
        (
            ['evil.pth', 'out', '--model', 'test_ait'],
            r'evil\.pth is no checkpoint .*; save the weights alone \(it holds .*getcwd\)$',
        ),
        (['text.pth', 'out', '--model', 'test_ait'], r'text\.pth is no whole checkpoint: download or copy it again'),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_said_in_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(make_model().state_dict(), 'plain.pth')
    torch.save({'weights': os.getcwd}, 'evil.pth')
    Path('text.pth').write_text('not a checkpoint')
    with pytest.raises(SystemExit, match=said):
        hub.main(['export', *arguments])
    assert not Path('out').exists()


def test_what_is_no_pair_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        hub.main(['export', 'a.pth', 'out', '--compare', 'results.json'])
    assert 'expected KEY=VALUE, got results.json' in capsys.readouterr().err


def test_a_card_is_the_same_in_every_locale(checkpoint: Path, tmp_path: Path) -> None:
    plain = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    arguments = ['export', str(checkpoint), 'test_ait.toy', '--dataset', 'Blüten']
    command = f'from timm_ait import hub; hub.main({arguments!a})'
    done = subprocess.run([sys.executable, '-c', command], cwd=tmp_path, env=plain, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'Blüten' in (tmp_path / 'test_ait.toy' / 'README.md').read_text(encoding='utf-8')


def test_nothing_is_pushed_without_a_login_or_from_a_damaged_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    monkeypatch.setattr(publish, '_upload', lambda *args: pytest.fail('uploaded'))
    monkeypatch.setattr(publish, 'get_token', lambda: None)
    with pytest.raises(SystemExit, match='you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN'):
        hub.main(['push', str(folder)])
    monkeypatch.setattr(publish, 'get_token', lambda: 'hf_onlyForThisTest')
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    with pytest.raises(SystemExit, match=r'model\.safetensors has the sha256 \w+, but \w+ was published'):
        hub.main(['push', str(folder)])
