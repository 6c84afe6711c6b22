"""``push`` uploads a folder without changes, and fails if the Hub does not hold it afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from hub_child import Child, fingerprint, load
from hub_models import REPO, assert_same_logits, sha256
from hub_server import LoopbackHub

from timm_ait import hub
from timm_ait.pretrained import WeightsError

TOKEN = 'hf_onlyForThisTestOfLoopback'


def test_a_pushed_folder_loads_from_the_hub_bit_for_bit(
    served: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path, hub_cache: Path
) -> None:
    served.repos, served.faults = {}, {}
    served.tokens.clear()
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy', dtype='float16')
    settings = {'HF_ENDPOINT': served.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
    command = [sys.executable, '-m', 'timm_ait.hub', 'push', str(folder), 'me/test_ait.mine']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_TOKEN': TOKEN, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f'published: {served.url}/me/test_ait.mine' in done.stdout
    assert '**published(' not in done.stdout  # the catalogue lists what lies in the organisation of the package
    there = served.repos['me/test_ait.mine']
    assert set(there) == {'model.safetensors', 'config.json', 'README.md', 'args.yaml'}
    assert there['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert json.loads(there['config.json']) == json.loads((folder / 'config.json').read_text())
    assert b"create_model('hf-hub:me/test_ait.mine'" in there['README.md']
    loaded = child(load, 'hf-hub:me/test_ait.mine', cache_dir=hub_cache)
    local = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded['fingerprint'] == fingerprint(local)
    assert_same_logits(loaded, local)
    assert served.tokens == {f'Bearer {TOKEN}'}  # the Hub alone gets the token
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and TOKEN.encode() in path.read_bytes()]


def push_with_token(folder: Path, repo_id: str, private: bool = False, cwd: Path | None = None) -> str:
    """Upload a folder. It runs in the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', TOKEN)
        if cwd is not None:
            patch.chdir(cwd)
        return hub.push(folder, repo_id, private)


@pytest.mark.parametrize('is_private', [False, True])
def test_a_repository_is_as_private_as_was_asked_for(
    is_private: bool, served: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path
) -> None:
    served.repos, served.faults = {}, {}
    served.private.clear()
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    child(push_with_token, folder, 'me/test_ait.mine', is_private)
    assert served.private == ({'me/test_ait.mine'} if is_private else set())


def test_a_folder_that_was_renamed_or_is_the_current_one_gets_a_card_of_its_repository(
    served: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path
) -> None:
    served.repos, served.faults = {}, {}
    results = tmp_path / 'results.json'
    results.write_text('{"top1": 41.25}')
    written = hub.export(
        checkpoint, tmp_path / 'test_ait.my one', results=results, dataset='toys', compare={'other': str(results)}
    )
    folder = written.rename(tmp_path / 'test_ait.two')
    child(push_with_token, folder, 'me/test_ait.two')
    child(push_with_token, Path('.'), 'me/test_ait.three', cwd=folder)
    for repo in ('me/test_ait.two', 'me/test_ait.three'):
        card = served.repos[repo]['README.md'].decode()
        assert card.count(f"create_model('hf-hub:{repo}'") == card.count('hf-hub:') > 0
        for line in ('# Model card for {}', '- name: {}', '| {} |  | 41.25 |  |'):
            assert f'\n{line.format(repo.removeprefix("me/"))}\n' in card
        assert 'my one' not in card


def test_a_folder_for_the_organisation_of_the_package_is_listed(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    (folder / 'LICENSE').touch()
    monkeypatch.setattr(hub, 'push', lambda **args: 'there')
    monkeypatch.chdir(folder)
    hub.main(['push', '.'])
    digest = sha256((folder / 'model.safetensors').read_bytes())
    said = capsys.readouterr().out
    assert f"**published('test_ait.toy', '{digest}')" in said
    assert f'\nnot uploaded from {folder}: LICENSE\n' in said


def test_an_upload_that_did_not_arrive_is_an_error(
    remote: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path
) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    remote.faults[REPO] = 'deaf'
    with pytest.raises(
        WeightsError, match=rf'model\.safetensors in {REPO} has the sha256 \w+, not that of .* push again'
    ):
        child(push_with_token, folder, REPO)
    remote.faults.clear()
    assert child(push_with_token, folder, REPO) == f'{remote.url}/{REPO}'
    assert remote.repos[REPO]['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
