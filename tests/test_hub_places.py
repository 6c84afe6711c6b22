"""A published tag loads from the package, a mirror, a checkout or the Hub, in this order, each time verified."""

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from hub_child import Child, fingerprint, load
from hub_models import ARGS, REPO, make_model, overlay, save, sha256
from hub_server import LoopbackHub
from timm.models import generate_default_cfgs, register_model
from torch import nn

from timm_ait import ait, pretrained
from timm_ait.pretrained import WeightsError, packaged, published

NAME = 'test_ait.toy'


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def cut(content: bytes) -> bytes:
    return content[:999]


def lengthen(content: bytes) -> bytes:
    return content + b'\0'


def other(content: bytes) -> bytes:
    """The whole file of another model."""
    return content.replace(content[-400:], content[-800:-400])


class Places:
    """The four places, each with its own copy of one file."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = save(make_model(), root / 'saved')['model.safetensors']
        self.keys = dict(published(NAME, sha256(self.content)), num_classes=11)
        mirrors = [root / 'first mirror', root / 'second mirror']
        self.package = root / 'checkout' / 'timm_ait' / 'weights' / f'{NAME}.safetensors'
        self.mirrors = [mirror / NAME / 'model.safetensors' for mirror in mirrors]
        self.checkout = root / 'checkout' / 'benchmarks' / 'weights' / NAME / 'model.safetensors'
        self.hub = root / 'hub' / 'model.safetensors'
        self.all = [self.package, *self.mirrors, self.checkout, self.hub]
        for path in self.all:
            path.parent.mkdir(parents=True)
            path.write_bytes(self.content)
        self.asked: list[str] = []
        monkeypatch.setattr(pretrained, 'WEIGHTS', self.package.parent)
        monkeypatch.setattr(pretrained, 'hf_hub_download', self.download)
        monkeypatch.setenv('TIMM_AIT_WEIGHTS', os.pathsep.join(map(str, mirrors)))

    def download(self, repo: str, filename: str, **kwargs: object) -> str:
        self.asked.append(repo)
        if not self.hub.is_file():
            raise ConnectionError('no network')
        return str(self.hub)

    def load(self) -> nn.Module:
        return timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=self.keys, **ARGS)

    def found(self) -> Path | None:
        cfg = pretrained.resolve_cfg('test_ait', None, self.keys)
        return pretrained.fetch_weights(cfg)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(tmp_path, monkeypatch)


@pytest.mark.parametrize('spoil', [cut, flip, lengthen, other])
def test_the_first_whole_copy_is_loaded_and_each_damaged_one_before_it_is_a_warning(
    spoil: Callable[[bytes], bytes], places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    for number, path in enumerate(places.all):
        caplog.clear()
        assert places.found() == path
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * number
        assert all(str(p) in line for p, line in zip(places.all[:number], caplog.messages, strict=True))
        assert fingerprint(places.load()) == fingerprint(make_model())
        assert bool(places.asked) == (path == places.hub)
        path.write_bytes(spoil(places.content))


def test_a_model_that_a_place_does_not_offer_is_looked_for_in_the_next_without_a_warning(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    for path in places.all[:-1]:
        path.unlink()
        if path != places.package:
            path.parent.rmdir()
    assert places.found() == places.hub
    assert not caplog.messages
    places.mirrors[0].parent.parent.rmdir()
    assert places.found() == places.hub
    (said,) = caplog.messages
    assert said.startswith(f'{places.mirrors[0]} is missing: check TIMM_AIT_WEIGHTS')


def test_a_folder_without_the_file_and_a_file_that_cannot_be_read_are_warnings(
    places: Places, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrained.sha256_of

    def read(path: Path) -> str:
        if path == places.mirrors[1]:
            raise OSError(errno.EIO, 'Input/output error')
        return whole(path)

    monkeypatch.setattr(pretrained, 'sha256_of', read)
    places.package.unlink()
    places.mirrors[0].unlink()
    assert places.found() == places.checkout
    first, second = caplog.messages
    assert first.startswith(f'{places.mirrors[0]} is missing')
    assert second.startswith(f'{places.mirrors[1]} cannot be read ([Errno {errno.EIO}] Input/output error)')


def test_a_mirror_may_lie_in_the_home_of_the_user(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('TIMM_AIT_WEIGHTS', '~/second mirror')
    places.package.unlink()
    assert places.found() == places.mirrors[1]


def test_a_home_that_is_not_there_and_a_folder_without_permission_are_warnings(
    places: Places, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path == places.mirrors[0]:
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return is_file(path)

    monkeypatch.setattr(Path, 'is_file', refuse)
    monkeypatch.setenv('TIMM_AIT_WEIGHTS', os.pathsep.join(['~nobodyxx/weights', str(places.mirrors[0].parents[1])]))
    places.package.unlink()
    places.mirrors[0].unlink()
    places.mirrors[0].parent.rmdir()
    assert places.found() == places.checkout
    first, second = caplog.messages
    assert first.startswith(f'~nobodyxx/weights/{NAME}/model.safetensors is missing: check TIMM_AIT_WEIGHTS')
    assert second.startswith(f'{places.mirrors[0]} cannot be read ([Errno {errno.EACCES}] Permission denied')


def test_when_no_place_has_the_weights_the_error_lists_all_in_order_and_says_what_to_do(places: Places) -> None:
    places.package.unlink()
    places.mirrors[0].write_bytes(cut(places.content))
    places.mirrors[1].write_bytes(flip(places.content))
    places.checkout.unlink()
    places.hub.unlink()
    with pytest.raises(WeightsError) as caught:
        places.found()
    head, *steps, advice = str(caught.value).splitlines()
    assert head == f'no weights for {NAME}. Tried in this order:'
    spoiled, good = sha256(flip(places.content)), sha256(places.content)
    expected = (
        f'1. {places.package} is missing: only small models come with the package',
        f'2. {places.mirrors[0]} is no whole safetensors file (',
        f'3. {places.mirrors[1]} has the sha256 {spoiled}, but {good} was published: check TIMM_AIT_WEIGHTS, or copy',
        f'4. {places.checkout} is missing: get it again',
        f'5. no weights from https://huggingface.co/timm-ait/{NAME}/resolve/main/model.safetensors: the connection',
    )
    assert len(steps) == len(expected)
    for step, start in zip(steps, expected, strict=True):
        assert step.startswith(start)
    assert f'set TIMM_AIT_WEIGHTS to a folder that holds {NAME}/model.safetensors; or load a file of your' in advice


def test_a_damaged_file_of_the_package_is_replaced_by_a_mirror_but_never_by_a_repository_without_a_name(
    places: Places,
) -> None:
    places.keys = dict(packaged(NAME, sha256(places.content)), num_classes=11)
    places.package.unlink()
    assert places.found() == places.mirrors[0]
    for path in places.all[1:]:
        path.write_bytes(flip(places.content))
    with pytest.raises(WeightsError, match=r'1\. .*test_ait\.toy\.safetensors is missing: install timm_ait again\n'):
        places.found()
    assert places.asked == []


def test_a_file_of_the_user_is_loaded_or_refused_but_not_replaced(places: Places, tmp_path: Path) -> None:
    own = tmp_path / f'{NAME}.safetensors'
    own.write_bytes(places.content)
    places.keys = {'file': str(own), 'notes': (f'sha256:{sha256(places.content)}',), 'num_classes': 11}
    assert places.found() == own
    own.write_bytes(flip(places.content))
    with pytest.raises(WeightsError, match='was published: download or copy it again'):
        places.found()


def test_without_a_checkout_and_without_mirrors_the_package_and_the_hub_alone_are_tried(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TIMM_AIT_WEIGHTS', '')
    places.checkout.unlink()
    places.checkout.parent.rmdir()
    places.checkout.parents[1].rmdir()
    places.package.unlink()
    places.hub.unlink()
    with pytest.raises(WeightsError) as caught:
        places.found()
    assert [line[:2] for line in str(caught.value).splitlines()[1:-1]] == ['1.', '2.']


def publish_toy(digest: str) -> list[str]:
    """Add the tag ``toy`` to the catalogue. It runs in the child. Return the tags that timm lists."""
    entry = ait._cifar_cfg(**published(NAME, digest), num_classes=11)
    ait.default_cfgs.update(generate_default_cfgs({NAME: entry}))
    register_model(ait.test_ait)
    return timm.list_pretrained('test_ait*')


def test_a_published_tag_is_listed_and_loads_from_a_mirror_without_network_and_without_a_cache(
    places: Places, tmp_path: Path
) -> None:
    mirror = str(places.mirrors[0].parents[1])
    settings = {'HF_HOME': '/dev/null/home', 'HF_HUB_OFFLINE': '1', 'TIMM_AIT_WEIGHTS': mirror}
    offline = Child(tmp_path / 'offline', **settings)
    assert NAME in offline(publish_toy, sha256(places.content))
    arguments = {key: value for key, value in ARGS.items() if key != 'num_classes'}
    assert offline(load, NAME, **arguments)['fingerprint'] == fingerprint(make_model())
    places.mirrors[0].write_bytes(flip(places.content))
    said = offline.fails(NAME, **arguments)
    assert f'{places.mirrors[0]} has the sha256' in said
    assert re.search(r'4\. no weights from .*: (it cannot be stored|the Hub was not reached)', said)
    offline.pool.shutdown()


def test_a_cache_that_cannot_be_written_is_named(remote: LoopbackHub, child: Child) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir='/dev/null/cache')
    said = child.fails('test_ait', **args)
    assert f'{REPO}/resolve/main/model.safetensors: it cannot be stored' in said
    assert 'set HF_HOME or cache_dir= to a folder that you may write to' in said


def test_a_damaged_file_in_a_cache_that_cannot_be_written_is_named(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, 'Read-only file system')

    for path in places.all:
        path.write_bytes(flip(places.content))
    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(WeightsError, match=r'hub/model\.safetensors is damaged and cannot be removed \(Read-only file'):
        places.found()
