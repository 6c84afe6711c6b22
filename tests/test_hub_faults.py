"""Faults of the Hub, the connection and the disk: no wrong weights are loaded, and the error says what to do."""

import errno
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from hub_child import Child, blobs, fingerprint, load
from hub_models import ARGS, NAME, REPO, make_model, overlay, save
from hub_server import LoopbackHub

from timm_ait import pretrained
from timm_ait.pretrained import WeightsError


def last_step(message: str) -> str:
    """Return what is said of the Hub: the last place of a list, without its number, or all of an error of one line."""
    head, *steps = message.splitlines()
    return steps[-2].partition('. ')[2] if steps else head  # a line of advice follows the places


@pytest.mark.parametrize('name', ['ait_small', 'ait_base_patch4_32.cifar10'])
def test_a_model_without_published_weights_says_what_to_do(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        timm.create_model(name, pretrained=True)
    said = str(caught.value)
    assert said.startswith(f'no weights have been published for {name}')
    for way_out in (
        'leave out pretrained=True and train it',
        "pretrained_cfg_overlay=dict(file='PATH')",
        "'ait_vit_base_patch16_224'",
    ):
        assert way_out in said


def test_a_missing_repository_is_named(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    keys = dict(overlay(remote), hf_hub_id='no/such')
    said = child.fails('test_ait', cache_dir=hub_cache, pretrained_cfg_overlay=keys, **ARGS)
    url = f'{remote.url}/no/such/resolve/main/model.safetensors'
    assert last_step(said).startswith(f'no weights from {url}: there is no such repository')
    assert 'hf auth login' in said


def test_a_gated_repository_says_how_to_get_access(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    remote.faults[REPO] = 'gated'
    said = child.fails('test_ait', cache_dir=hub_cache, pretrained_cfg_overlay=overlay(remote), **ARGS)
    assert 'accept the terms on its page, then log in' in said


def test_a_missing_revision_is_named(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    keys = dict(overlay(remote), hf_hub_id=f'{REPO}@v9')
    said = child.fails('test_ait', cache_dir=hub_cache, pretrained_cfg_overlay=keys, **ARGS)
    assert f'{REPO}/resolve/v9/model.safetensors: the repository has no such revision' in said


def test_a_repository_with_a_pickle_alone_is_refused_without_a_download(
    remote: LoopbackHub, child: Child, hub_cache: Path
) -> None:
    remote.repos[REPO]['pytorch_model.bin'] = remote.repos[REPO].pop('model.safetensors')
    said = child.fails(NAME, cache_dir=hub_cache)
    assert f'{REPO}/resolve/main/model.safetensors: the repository has no such file, and a pickle is not read' in said
    assert not any('pytorch_model' in request for request in remote.requests)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth'])
def test_a_file_name_that_is_not_safetensors_is_refused(remote: LoopbackHub, name: str) -> None:
    keys = dict(overlay(remote), hf_hub_filename=name)
    with pytest.raises(
        WeightsError, match=f'{name} of {REPO} is no safetensors file: give another name in hf_hub_file'
    ):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=keys)


def test_without_a_server_the_cache_is_loaded_and_a_missing_file_is_named(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote))
    cached = child(load, 'test_ait', cache_dir=hub_cache, **args)
    with remote.gone():
        assert child(load, 'test_ait', cache_dir=hub_cache, **args) == cached
        said = child.fails('test_ait', cache_dir=tmp_path / 'empty', **args)
    assert f'{REPO}/resolve/main/model.safetensors: the Hub was not reached' in said
    assert "pretrained_cfg_overlay=dict(file='PATH')" in said


def test_a_connection_dropped_before_an_answer_loads_the_cache_and_names_a_missing_file(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote))
    cached = child(load, 'test_ait', cache_dir=hub_cache, **args)
    remote.faults[REPO] = 'drop'
    assert child(load, 'test_ait', cache_dir=hub_cache, **args) == cached
    said = child.fails('test_ait', cache_dir=tmp_path / 'empty', **args)
    # the version of the client decides which of the two it is
    assert re.search(rf'{REPO}/resolve/main/model\.safetensors: the (connection broke|Hub was not reached)', said)


def test_a_connection_cut_within_a_file_leaves_no_part_of_it_in_the_cache(
    remote: LoopbackHub, child: Child, hub_cache: Path
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=hub_cache)
    remote.faults[REPO] = 'cut'
    said = child.fails('test_ait', **args)
    assert 'the connection broke' in said
    assert 'so nothing was loaded: try again' in said
    assert not blobs(hub_cache)
    remote.faults.clear()
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


@pytest.mark.parametrize(
    ('fault', 'said'),
    [
        ('short', 'is no whole safetensors file (Error while deserializing header: incomplete metadata'),
        ('flip', 'has the sha256 '),
    ],
)
@pytest.mark.parametrize('is_pinned', [True, False])
def test_a_damaged_download_is_refused_and_removed_from_the_cache(
    fault: str, said: str, is_pinned: bool, remote: LoopbackHub, child: Child, hub_cache: Path
) -> None:
    keys = overlay(remote) if is_pinned else overlay(remote, notes=None)
    args = dict(ARGS, pretrained_cfg_overlay=keys, cache_dir=hub_cache)
    remote.faults[REPO] = fault
    message = child.fails('test_ait', **args)
    assert last_step(message).startswith(f'{remote.url}/{REPO}/resolve/main/model.safetensors {said}')
    assert 'it was removed; try again' in message
    assert not blobs(hub_cache)
    remote.faults.clear()
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


def test_a_damaged_file_in_the_cache_is_downloaded_again(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    child(load, NAME, cache_dir=hub_cache)
    (blob,) = blobs(hub_cache)
    good = blob.read_bytes()
    blob.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    assert child(load, NAME, cache_dir=hub_cache)['fingerprint'] == fingerprint(make_model())
    assert blob.read_bytes() == good
    assert 'downloading it again' in child.log.read_text()
    blob.write_bytes(good[:999])
    with remote.gone():
        keys = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=hub_cache)
        said = child.fails('test_ait', **keys)
    assert 'is no whole safetensors file' in said
    assert 'model.safetensors is no whole safetensors file' in said
    assert ', and the second download failed: no weights from ' in said
    assert 'the connection broke (Connect' in said
    assert blob.read_bytes() == good[:999]  # never removed: another process may just have replaced it


def test_processes_that_mend_one_damaged_file_do_not_remove_it_for_each_other(
    remote: LoopbackHub, child: Child, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = hub_cache / 'model.safetensors', []
    good = remote.repos[REPO]['model.safetensors']
    path.parent.mkdir()
    path.write_bytes(good[:999])

    def download(*args: Any, force_download: bool, **kwargs: Any) -> str:
        asked.append(force_download)
        assert path.is_file()
        if force_download:
            path.write_bytes(good)
        return str(path)

    monkeypatch.setattr(pretrained, 'hf_hub_download', download)
    timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=overlay(remote), **ARGS)
    assert asked == [False, True]


def test_a_damaged_file_that_another_process_has_removed_is_an_error_of_its_own(
    remote: LoopbackHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub_cache / 'model.safetensors'
    path.parent.mkdir()

    def damaged(file: Path, sha256: str) -> str:
        file.unlink(missing_ok=True)
        return 'is damaged'

    monkeypatch.setattr(pretrained, 'hf_hub_download', lambda *args, **kwargs: str(path))
    monkeypatch.setattr(pretrained, '_damage', damaged)
    with pytest.raises(WeightsError, match='is damaged: it was removed; try again'):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=overlay(remote), **ARGS)


@pytest.mark.parametrize(
    ('status', 'said'),
    [
        (401, 'model.safetensors: it does not accept your token: run `hf auth login`, or set HF_TOKEN'),
        (403, 'the Hub sent no file (HfHubHTTPError: 403 Forbidden: None.) and the file is not in the cache: try ag'),
        (503, 'the Hub sent no file (HfHubHTTPError: '),
    ],
)
def test_an_answer_of_the_hub_that_is_no_file_is_named(
    status: int, said: str, remote: LoopbackHub, child: Child, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote.broken, 'HEAD .*/model.safetensors', status)
    message = child.fails('test_ait', cache_dir=hub_cache, pretrained_cfg_overlay=overlay(remote), **ARGS)
    assert said in message
    assert str(status) in message or status == 401
    assert 'not reached' not in message
    assert 'connection broke' not in message


def test_a_cache_that_cannot_take_a_newer_file_is_said_and_used(
    remote: LoopbackHub,
    child: Child,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = overlay(remote)
    child(load, 'test_ait', cache_dir=hub_cache, pretrained_cfg_overlay=keys, **ARGS)
    monkeypatch.setattr(pretrained, 'hf_hub_download', Mock(side_effect=PermissionError(13, 'Permission denied')))
    timm.create_model('test_ait', pretrained=True, cache_dir=hub_cache, pretrained_cfg_overlay=keys, **ARGS)
    (line,) = caplog.messages
    assert line.startswith('nothing new was loaded from the Hub (PermissionError: [Errno 13] Permission denied); using')


def test_weights_with_another_hash_than_the_tag_are_refused(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    keys = overlay(remote)
    remote.repos[REPO] = save(make_model(seed=2), tmp_path / 'others')
    said = child.fails('test_ait', pretrained_cfg_overlay=keys, cache_dir=hub_cache, **ARGS)
    assert f', but {keys["notes"][0][7:]} was published: install a newer timm_ait' in said
    assert len(blobs(hub_cache)) == 1  # it is whole, and may serve another version of this package


@pytest.mark.parametrize('share', [0.0, 0.5])
def test_a_broken_file_that_is_no_safetensors_is_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / 'model.pth'
    torch.save(make_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r'model.pth is no whole checkpoint: download or copy it again'):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **ARGS)


def test_offline_a_damaged_file_of_the_cache_is_named_and_stays(
    remote: LoopbackHub, child: Child, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=hub_cache)
    child(load, 'test_ait', **args)
    (blob,) = blobs(hub_cache)
    blob.write_bytes(blob.read_bytes()[:-1])
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match='HF_HUB_OFFLINE forbids to download it again'):
        timm.create_model('test_ait', pretrained=True, **args)
    assert len(blobs(hub_cache)) == 1


def test_a_full_disk_names_the_folder_of_the_cache(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=hub_cache)
    said = child.fails('test_ait', file_limit=20_000, **args)
    assert f'{hub_cache} has no space for it (File too large): free some, or set HF_HOME or cache_dir=' in said
    assert not blobs(hub_cache)
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


@pytest.mark.parametrize(
    ('numbers', 'said'),
    [
        ((errno.ENOSPC, errno.EDQUOT), 'cache has no space for it'),
        ((errno.EACCES, errno.EPERM, errno.EROFS), 'it cannot be stored'),
    ],
)
def test_a_file_that_cannot_be_stored_is_no_broken_connection(
    numbers: tuple[int, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = pretrained.resolve_cfg('test_ait', None, dict(hf_hub_id='no/such'))
    for number in numbers:
        monkeypatch.setattr(pretrained, 'hf_hub_download', Mock(side_effect=OSError(number, 'a reason')))
        with pytest.raises(WeightsError, match=rf'{said} \(.*a reason\): .*set HF_HOME or cache_dir='):
            pretrained.fetch_weights(cfg, tmp_path / 'cache')
