"""If the Hub refuses or breaks off, ``push`` and ``publish`` say what was done, and go on when repeated."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_child import Child
from hub_models import edited, make_model, save
from hub_server import LoopbackHub

from timm_ait import hub, publish
from timm_ait.pretrained import HUB_ORGANISATION

TOKEN = 'hf_onlyForThisTestOfLoopback'
GOES_ON = '. Run the same command again, it goes on'


@pytest.fixture(scope='module')
def impatient(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A client that waits one second for the head of an answer."""
    child = Child(tmp_path_factory.mktemp('home'), HF_ENDPOINT=served.url, HF_HUB_ETAG_TIMEOUT='1')
    yield child
    child.pool.shutdown()


@pytest.fixture
def faulty(served: LoopbackHub) -> Iterator[LoopbackHub]:
    served.repos, served.faults, served.collections, served.blobs = {}, {}, {}, {}
    yield served
    served.broken, served.reason = {}, ''


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('weights')
    for seed, name in enumerate(('one', 'two')):
        save(make_model(seed), folder / '.saved' / name)
        hub.export(folder / '.saved' / name / 'model.safetensors', folder / f'test_ait.{name}')
    return folder


def fails(*arguments: str) -> str | int | None:
    """Run a command that must end with SystemExit, and return its message. It runs in the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', TOKEN)
        with pytest.raises(SystemExit) as caught:
            hub.main(list(arguments))
    return caught.value.code


def published(folder: Path) -> list[str]:
    """Publish as 'me'. It runs in the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', TOKEN)
        return publish.publish('me', folder)


REPO = 'me/test_ait.two'
UPLOADING = f'uploading to {REPO} failed: '
AS_BEFORE = 'its files are all as before, or all new'


@pytest.mark.parametrize(
    ('request_', 'status', 'said', 'state'),
    [
        ('HEAD .*two', 500, f'looking at {REPO} failed: the Hub answered 500, ', 'nothing was changed in it'),
        ('HEAD .*two', 0, f'looking at {REPO} failed: no answer (', 'nothing was changed in it'),
        ('HEAD .*two', -2, f'looking at {REPO} failed: no answer (', 'nothing was changed in it'),
        ('two/preupload', 401, f'{UPLOADING}the Hub answered 401, it does not accept your token: run `', AS_BEFORE),
        ('two/preupload', 403, f'{UPLOADING}the Hub answered 403, you may not write there: take a token', AS_BEFORE),
        ('two/preupload', 404, f'{UPLOADING}the Hub answered 404, it knows no such organisation or rep', AS_BEFORE),
        ('two.git/info/lfs', 503, f'{UPLOADING}the Hub answered 503, ', AS_BEFORE),
        ('two/commit', 500, f'{UPLOADING}the Hub answered 500, ', AS_BEFORE),
        ('two/commit', 0, f'{UPLOADING}no answer (', AS_BEFORE),
        ('POST /api/collections$', 403, 'collecting in me failed: the Hub answered 403, you may', 'all weights are on'),
        ('collections/.*/items', 500, 'collecting in me failed: the Hub answered 500, ', 'all weights are on the Hub'),
    ],
)
def test_publish_says_what_failed_and_what_was_done_and_goes_on(
    request_: str, status: int, said: str, state: str, faulty: LoopbackHub, impatient: Child, weights: Path
) -> None:
    faulty.broken = {request_: status}
    message = impatient(fails, 'publish', '--organisation', 'me', '--folder', str(weights))
    assert isinstance(message, str)
    assert message.startswith(f'python -m timm_ait.hub: {said}')
    assert f'; {state}' in message
    assert GOES_ON in message
    assert f'. Done before: published: {faulty.url}/me/test_ait.one' in message
    assert len(message.splitlines()) == 1
    assert TOKEN not in message
    faulty.broken = {}
    both = ['unchanged: me/test_ait.one', f'published: {faulty.url}/{REPO}']
    if 'collecting' in said:
        both[1] = f'unchanged: {REPO}'
    assert impatient(published, weights)[:2] == both
    assert [*faulty.collections.values()] == [['me/test_ait.one', REPO]]


@pytest.mark.parametrize(
    ('request_', 'status', 'said'),
    [
        ('repos/create', 403, 'making the repository me/test_ait.one failed: the Hub answered 403, you may not write'),
        ('repos/create', 0, 'making the repository me/test_ait.one failed: no answer ('),
        ('PUT', 403, 'uploading to me/test_ait.one failed: the Hub answered 403, you may not write there: take a'),
        ('PUT', 0, 'uploading to me/test_ait.one failed: no answer ('),
        ('HEAD .*/model', 500, 'checking me/test_ait.one failed: the Hub answered 500, '),
    ],
)
def test_push_says_what_failed_and_stores_all_files_or_none(
    request_: str, status: int, said: str, faulty: LoopbackHub, impatient: Child, weights: Path
) -> None:
    faulty.broken = {request_: status}
    message = impatient(fails, 'push', str(weights / 'test_ait.one'), 'me/test_ait.one')
    assert isinstance(message, str)
    assert message.startswith(f'python -m timm_ait.hub: {said}')
    assert message.endswith(GOES_ON)
    assert len(faulty.repos.get('me/test_ait.one', {})) == (3 if 'checking' in said else 0)
    faulty.broken = {}
    assert impatient(published, weights)[0].endswith('me/test_ait.one')
    assert len(faulty.repos['me/test_ait.one']) == 3


@pytest.mark.parametrize(
    ('request_', 'status', 'reason', 'said'),
    [
        ('validate-yaml', 400, '"license" must be one of [mit]', '400 (Invalid metadata in README.md. "license" must '),
        (
            'two/commit',
            403,
            'Private repository storage limit reached',
            '403 (Private repository storage limit reached)',
        ),
        ('repos/create', 429, 'You have exceeded\nour limit', '429 (You have exceeded our limit); '),
    ],
)
def test_what_the_hub_says_of_its_refusal_is_passed_on(
    request_: str, status: int, reason: str, said: str, faulty: LoopbackHub, impatient: Child, weights: Path
) -> None:
    faulty.broken, faulty.reason = {request_: status}, reason
    message = impatient(fails, 'push', str(weights / 'test_ait.two'), REPO)
    assert isinstance(message, str)
    assert f' failed: the Hub answered {said}' in message
    assert status != 403 or ', you may not write there: take a token' in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ('repo', 'said'),
    [
        (
            'me/my model',
            r"got 'me/my model' \(Repo id must use alphanumeric chars.*\); give another, or rename the fold",
        ),
        ('https://huggingface.co/me/x', r"got 'https://huggingface.co/me/x' \(it needs one /\); give another"),
        ('test_ait.one', r"got 'test_ait.one' \(it needs one /\); give another"),
    ],
)
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_done(
    repo: str, said: str, weights: Path
) -> None:
    with pytest.raises(SystemExit, match=f'expected ORGANISATION/NAME, {said}'):
        hub.main(['push', str(weights / 'test_ait.one'), repo])


def test_a_dry_run_refuses_a_folder_whose_name_the_hub_does_not_take(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / 'test_ait.one', tmp_path / 'test_ait.my run')
    with pytest.raises(SystemExit, match=f"expected ORGANISATION/NAME, got '{HUB_ORGANISATION}/test_ait.my run'"):
        hub.main(['publish', '--dry-run', '--folder', str(tmp_path)])


def test_a_command_without_a_hub_ends_with_one_line_and_code_1(weights: Path, tmp_path: Path) -> None:
    settings = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path), 'HF_TOKEN': TOKEN}
    command = [sys.executable, '-m', 'timm_ait.hub', 'publish', '--organisation', 'me', '--folder', str(weights)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, '')
    (line,) = done.stderr.splitlines()
    assert line.startswith('python -m timm_ait.hub: looking at me/test_ait.one failed: no answer (')
    assert line.endswith('. Done before: nothing')


@pytest.mark.parametrize('name', ['ait_small.one', 'test_ait_large.one', 'test_ait', 'test_ait.'])
def test_a_folder_that_is_named_after_another_model_is_refused(name: str, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / 'test_ait.one', tmp_path / name)
    with pytest.raises(SystemExit, match=f'/{name} holds a model test_ait, so its name must be test_ait.TAG; rename'):
        hub.main(['publish', '--dry-run', '--folder', str(tmp_path)])


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(architecture='no_such'), r'does not load \(Unknown model \(no_such\)\); write it again with export'),
        (dict(model_args={'no_such': 1}), r"does not load \(.*'no_such'\); write it again with export"),
        (dict(model_args={'num_slots': 17}), r'does not load \(.*blocks\.0\.mlp\.memory has the shape \(7, 5\).*\);'),
        (dict(pretrained_cfg={'notes': []}), r'does not load \(no sha256 in the notes of config\.json\); write it'),
    ],
)
def test_a_folder_whose_config_was_changed_is_refused(
    change: dict[str, Any], said: str, weights: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(weights / 'test_ait.one', tmp_path / 'test_ait.one')
    (folder / 'config.json').write_bytes(edited((folder / 'config.json').read_bytes(), **change))
    for command in (['publish', '--dry-run', '--folder', str(tmp_path)], ['push', str(folder)]):
        with pytest.raises(SystemExit, match=said):
            hub.main(command)
