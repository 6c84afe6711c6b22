"""What is written beside every result: machine, versions, commit and arguments."""

import argparse
import json
import subprocess
from pathlib import Path

import loop
import pytest
import record
import timm
import torch
from record import check_device, check_new, environment, read_records, told, write_record

from timm_ait.pretrained import WeightsError


def test_the_environment_names_versions_machine_and_commit() -> None:
    found = environment()
    assert set(found) == {'cpu', 'gpu', 'system', 'python', 'torch', 'timm', 'commit'}
    assert (found['torch'], found['timm']) == (torch.__version__, timm.__version__)
    assert found['cpu']
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (found['commit'] or '').removesuffix('-dirty') == git.stdout.strip()[:12]


def test_a_record_holds_environment_arguments_and_results(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'result.json'
    write_record(path, {'out': tmp_path, 'seeds': 3}, {'accuracy': [70.5, 71.25]})
    record = json.loads(path.read_text())
    assert record['arguments'] == {'out': str(tmp_path), 'seeds': 3}
    assert record['accuracy'] == [70.5, 71.25]
    assert environment().items() <= record.items()


@pytest.mark.parametrize('name', ['heads.json', 'heads[test].json'])
def test_a_result_is_not_written_over_whatever_its_name(name: str, tmp_path: Path) -> None:
    check_new(tmp_path / name, {'images': 20})
    write_record(tmp_path / name, {'images': 20}, {})
    for images, kind in ((20, 'these'), (40, 'other')):
        with pytest.raises(ValueError, match=f'holds what was measured with {kind} arguments'):
            check_new(tmp_path / name, {'images': images})


@pytest.mark.parametrize('text', ['7', '[]', '"row"'])
def test_a_file_that_is_no_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / 'other.json').write_text(text)
    with pytest.raises(ValueError, match=r'other\.json is no result, got (int|list|str); remove it'):
        read_records(tmp_path, ['row'])


@pytest.mark.parametrize(
    ('error', 'said'),
    [(FileNotFoundError(), 'FileNotFoundError()'), (WeightsError('no network'), 'no network')],
    ids=['without words', 'weights'],
)
def test_an_error_of_the_user_ends_in_a_sentence(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'), told(argparse.ArgumentParser()):
        raise error
    assert capsys.readouterr().err.endswith(f'error: {said}\n')


def test_a_folder_that_cannot_be_written_ends_the_script_before_its_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='2'), told(argparse.ArgumentParser(), tmp_path / 'file'):
        pytest.fail('hours of work')
    assert 'File exists' in capsys.readouterr().err


@pytest.mark.parametrize('device', ['foo', 'meta', 'lazy'])
def test_a_device_that_computes_nothing_here_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f'cannot compute on --device {device} here; take cpu'):
        check_device(device)


def test_a_commit_says_whether_the_code_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        subprocess.run(['git', *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(record, '__file__', str(tmp_path / 'record.py'))
    (tmp_path / 'record.py').write_text('a = 1\n')
    git('init')
    git('add', '.')
    git('commit', '-m', 'first')
    assert not (record.commit() or '-dirty').endswith('-dirty')
    (tmp_path / 'record.py').write_text('a = 2\n')
    assert (record.commit() or '').endswith('-dirty')
    assert str(record.environment()['commit']).endswith('-dirty')
    assert loop.commit is record.commit
