"""``publish`` brings all folders of weights to the Hub, once, and says what to write into the catalogue."""

import socket
from pathlib import Path

import pytest
import timm
from hub_child import Child, fingerprint, load
from hub_models import logits, make_model, sha256
from hub_server import LoopbackHub

from timm_ait import hub, publish
from timm_ait.pretrained import HUB_ORGANISATION, WeightsError

TAGS = ('test_ait.one', 'test_ait.two')
FOLDERS = sorted((Path(__file__).parents[1] / 'benchmarks' / 'weights').glob('*.*'))
SLUG = 'me/associative-transformer-0123456789abcdef01234567'


@pytest.fixture
def weights(checkpoint: Path, tmp_path: Path) -> Path:
    """Two folders for the Hub: the averaged weights, then those as trained; and what does not count."""
    for name, use_ema in zip(TAGS, (True, False), strict=True):
        hub.export(checkpoint, tmp_path / 'weights' / name, use_ema=use_ema)
    (tmp_path / 'weights' / 'README.md').write_text('about all of them')
    (tmp_path / 'weights' / '.cache').mkdir()
    return tmp_path / 'weights'


@pytest.fixture
def empty(served: LoopbackHub) -> LoopbackHub:
    served.repos, served.faults, served.collections = {}, {}, {}
    return served


def publish_with_token(folder: Path) -> list[str]:
    """Publish as 'me'. It runs in the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', 'hf_onlyForThisTestOfLoopback')
        return hub.publish('me', folder)


def listings(weights: Path) -> list[str]:
    return [f"**published('{tag}', '{sha256((weights / tag / 'model.safetensors').read_bytes())}')" for tag in TAGS]


def uploads(served: LoopbackHub) -> list[str]:
    return [line for line in served.requests if line.startswith('PUT') or '/commit/' in line]


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_this_checkout_is_what_its_tag_loads(folder: Path) -> None:
    by_tag, by_folder = (timm.create_model(name, pretrained=True) for name in (folder.name, f'local-dir:{folder}'))
    assert fingerprint(by_tag) == fingerprint(by_folder)
    assert logits(by_tag) == logits(by_folder)


def test_all_folders_are_published_once_and_collected(
    empty: LoopbackHub, child: Child, weights: Path, hub_cache: Path
) -> None:
    done = child(publish_with_token, weights)
    assert done == [
        *(f'published: {empty.url}/me/{tag}' for tag in TAGS),
        f'collection: {empty.url}/collections/{SLUG}',
        'to list them as pretrained, import published in timm_ait/ait.py and write at their tags:',
        *listings(weights),
        "and in timm_ait/pretrained.py: HUB_ORGANISATION = 'me'",
    ]
    assert list(empty.repos) == [f'me/{tag}' for tag in TAGS]
    assert empty.collections == {SLUG: [f'me/{tag}' for tag in TAGS]}
    for tag, seed in zip(TAGS, (2, 1), strict=True):
        assert set(empty.repos[f'me/{tag}']) == {'model.safetensors', 'config.json', 'README.md', 'args.yaml'}
        loaded = child(load, f'hf-hub:me/{tag}', cache_dir=hub_cache)
        assert loaded['fingerprint'] == fingerprint(make_model(seed))
    empty.requests.clear()
    again = child(publish_with_token, weights)
    assert again[:2] == [f'unchanged: me/{tag}' for tag in TAGS]
    assert again[2:] == done[2:]
    assert uploads(empty) == []
    assert empty.collections == {SLUG: [f'me/{tag}' for tag in TAGS]}


@pytest.mark.parametrize(
    ('name', 'old', 'new'),
    [
        ('model.safetensors', b'blocks.0', b'blocks.1'),
        ('config.json', b'"crop_pct": 0.9', b'"crop_pct": 0.8'),
        ('README.md', b'card for test_ait.two', b'card for test_ait.old'),
    ],
)
def test_a_repository_with_one_other_file_is_published_again(
    name: str, old: bytes, new: bytes, empty: LoopbackHub, child: Child, weights: Path
) -> None:
    child(publish_with_token, weights)
    published = dict(empty.repos['me/test_ait.two'])
    empty.repos['me/test_ait.two'][name] = published[name].replace(old, new)
    assert empty.repos['me/test_ait.two'] != published
    empty.requests.clear()
    done = child(publish_with_token, weights)
    assert done[:2] == ['unchanged: me/test_ait.one', f'published: {empty.url}/me/test_ait.two']
    assert empty.repos['me/test_ait.two'] == published
    assert not any('test_ait.one' in line for line in uploads(empty))


def test_weights_that_did_not_arrive_are_an_error_and_are_not_collected(
    empty: LoopbackHub, child: Child, weights: Path
) -> None:
    child(publish_with_token, weights)
    empty.repos['me/test_ait.two']['model.safetensors'] = b'others'
    empty.faults['me/test_ait.two'], empty.collections = 'deaf', {}
    with pytest.raises(
        WeightsError, match=r'model\.safetensors in me/test_ait\.two has the sha256 \w+, not that of .*two: push again'
    ):
        child(publish_with_token, weights)
    assert empty.collections == {}


def test_a_dry_run_needs_neither_login_nor_network_and_prints_what_would_be_done(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, 'get_token', lambda: pytest.fail('asked for a login'))
    monkeypatch.setattr(socket.socket, 'connect', lambda *args: pytest.fail('used the network'))
    hub.main(['publish', '--dry-run', '--folder', str(weights)])
    assert capsys.readouterr().out.splitlines() == [
        *(f'{weights / t}: would create or update {HUB_ORGANISATION}/{t}, unless it is the same' for t in TAGS),
        f"would add 2 to the collection 'Associative Transformer' of {HUB_ORGANISATION}",
        'to list them as pretrained, import published in timm_ait/ait.py and write at their tags:',
        *listings(weights),
    ]
    (weights / TAGS[1] / 'memory.png').touch()
    (weights / TAGS[1] / 'LICENSE').touch()
    hub.main(['publish', '--dry-run', '--folder', str(weights), '--organisation', 'me'])
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith('would create or update me/test_ait.one, unless it is the same')
    assert f'not uploaded from {weights / TAGS[1]}: LICENSE, memory.png' in said
    assert said[-1] == "and in timm_ait/pretrained.py: HUB_ORGANISATION = 'me'"


def test_without_a_login_or_whole_folders_nothing_is_uploaded_and_the_reason_is_said(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, '_upload', lambda *args: pytest.fail('uploaded'))
    monkeypatch.setattr(publish, 'get_token', lambda: None)

    def fails(folder: Path, said: str) -> None:
        with pytest.raises(SystemExit, match=said):
            hub.main(['publish', '--folder', str(folder)])

    fails(weights, 'you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN')
    monkeypatch.setattr(publish, 'get_token', lambda: pytest.fail('asked for a login'))
    fails(tmp_path / 'gone', r'there is no folder .*/gone; write folders MODEL\.TAG into it with export')
    fails(weights / '.cache', r'\.cache holds no folder MODEL\.TAG; write one with export')
    path = weights / 'test_ait.two' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    fails(
        weights,
        r'two does not load \(.*/model\.safetensors has the sha256 \w+, but \w+ was published: .*write it again',
    )
    path.unlink()
    (weights / 'test_ait.two' / 'README.md').unlink()
    fails(weights, r'test_ait\.two has no model\.safetensors, README\.md; write it again with export')
