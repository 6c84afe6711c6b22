"""Loading and publishing through timm, with the real Hub client against a small Hub on loopback.

huggingface_hub reads its environment when it is imported, so what it does here runs in one child process per setting.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_child import Child, blobs, fingerprint, images, load
from hub_server import LoopbackHub
from huggingface_hub import ModelCard
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from timm_ait import ait, convert, hub, pretrained
from timm_ait.pretrained import WeightsError, packaged, published

REPO = 'someone/test_ait.toy'
NAME = f'hf-hub:{REPO}'
# Distinct primes where they can be: slots 7 of width 5, 3 heads, 11 classes.
ARGS: dict[str, Any] = dict(
    depth=2, embed_dim=32, num_heads=2, num_slots=7, slot_dim=5, write_heads=3, bottleneck=13, num_classes=11
)
TOKEN = 'hf_onlyForThisTestOfLoopback'


def make_model(seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('test_ait', **dict(ARGS, **kwargs)).eval()


def save(model: nn.Module, folder: Path, **model_args: Any) -> dict[str, bytes]:
    """What timm itself writes for a model, as a Hub keeps it."""
    save_for_hf(model, str(folder), model_args=dict(ARGS, **model_args), safe_serialization=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(config: bytes, **changes: Any) -> bytes:
    content = json.loads(config)
    content['pretrained_cfg'].update(changes.pop('pretrained_cfg', {}))
    content['model_args'].update(changes.pop('model_args', {}))
    return json.dumps(dict(content, **changes)).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def logits(model: nn.Module, channels: int = 3, size: int = 32) -> list[Any]:
    return model.eval()(images(channels, size)).tolist()


def assert_same_logits(loaded: dict[str, Any], model: nn.Module) -> None:
    """To float rounding: another process may compute with another number of threads."""
    torch.testing.assert_close(torch.tensor(loaded['logits']), torch.tensor(logits(model)))


@pytest.fixture
def remote(served: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """The Hub with one repository, :data:`REPO`."""
    served.repos, served.faults = {REPO: save(make_model(), tmp_path / 'saved')}, {}
    served.requests.clear()
    served.tokens.clear()
    return served


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / 'cache'


def overlay(remote: LoopbackHub, **changes: Any) -> dict[str, Any]:
    """A tag of test_ait whose weights lie on the Hub, pinned, as ``published`` writes it."""
    keys = published('test_ait.toy', sha256(remote.repos[REPO]['model.safetensors']))
    return dict(keys, hf_hub_id=REPO, num_classes=11, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def test_a_hub_name_loads_the_very_weights(remote: LoopbackHub, child: Child, cache: Path) -> None:
    loaded = child(load, NAME, cache_dir=cache)
    assert loaded['fingerprint'] == fingerprint(make_model())
    assert_same_logits(loaded, make_model())
    assert loaded['cfg'] == {'hf_hub_id': REPO, 'source': 'hf-hub', 'file': None, 'notes': None}


def test_a_published_tag_loads_once_and_then_from_the_cache(remote: LoopbackHub, child: Child, cache: Path) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=cache)
    for _ in range(2):
        assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())
    path = f'/{REPO}/resolve/main/model.safetensors'
    assert remote.requests == [f'HEAD {path}', f'GET {path}', f'HEAD {path}']


def test_a_pinned_revision_is_loaded_again_without_a_request(remote: LoopbackHub, child: Child, cache: Path) -> None:
    name = f'{NAME}@{remote.commit(REPO)}'
    first = child(load, name, cache_dir=cache)
    remote.requests.clear()
    assert child(load, name, cache_dir=cache) == first
    assert remote.requests == []


def test_what_is_cached_loads_offline_and_what_is_not_says_so(
    remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, cache_dir=cache)
    cached = child(load, 'test_ait', pretrained_cfg_overlay=overlay(remote), **args)
    assert child(load, NAME, cache_dir=cache)['fingerprint'] == cached['fingerprint']
    offline = Child(tmp_path / 'offline', HF_ENDPOINT=remote.url, HF_HUB_OFFLINE='1')
    remote.requests.clear()
    assert offline(load, NAME, cache_dir=cache)['fingerprint'] == cached['fingerprint']
    assert offline(load, 'test_ait', pretrained_cfg_overlay=overlay(remote), **args) == cached
    absent = dict(overlay(remote), hf_hub_id='someone/else')
    assert 'someone/else/resolve/main/model.safetensors: the Hub was not reached and the file is not in the cache' in (
        offline.fails('test_ait', pretrained_cfg_overlay=absent, **args)
    )
    assert remote.requests == []
    offline.pool.shutdown()


def test_another_number_of_classes_gives_a_fresh_head_on_the_same_trunk(
    remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path
) -> None:
    assert child(load, NAME, cache_dir=cache, num_classes=7)['shape'] == (2, 7)
    folder = tmp_path / 'saved'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    own, saved = model.state_dict(), make_model().state_dict()
    assert {key for key in own if not torch.equal(own[key], saved.get(key, torch.empty(0)))} == {
        'head.weight',
        'head.bias',
    }


def test_one_channel_sums_the_weights_of_three(remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path) -> None:
    assert child(load, NAME, cache_dir=cache, in_chans=1)['shape'] == (2, 11)
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, in_chans=1)
    torch.testing.assert_close(
        model.patch_embed.proj.weight, make_model().patch_embed.proj.weight.sum(1, keepdim=True), rtol=1e-6, atol=1e-7
    )


def test_another_image_size_resamples_the_position_embedding(tmp_path: Path) -> None:
    layout = dict(class_token=True, pos_embed='learn', global_pool='token', weight_init='')
    model = make_model(**layout)
    with torch.no_grad():  # constant over space: what a resampling keeps
        model.pos_embed.copy_(model.pos_embed.mean(dim=1, keepdim=True).expand_as(model.pos_embed))
    save(model, tmp_path, **layout)
    larger = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=48).eval()
    assert larger.pos_embed.shape == (1, 1 + 12 * 12, 32)
    torch.testing.assert_close(larger.pos_embed[:, :1].expand(1, 145, 32), larger.pos_embed, rtol=0, atol=1e-5)
    assert larger(images(size=48)).shape == (2, 11)


def test_features_alone_need_no_head(remote: LoopbackHub, child: Child, cache: Path) -> None:
    loaded = child(load, NAME, cache_dir=cache, features_only=True, out_indices=[1])
    with torch.no_grad():
        expected = make_model().forward_intermediates(images(), indices=[1], norm=False, intermediates_only=True)
    assert loaded['shape'] == [(2, 32, 8, 8)]
    torch.testing.assert_close(torch.tensor(loaded['logits'][0]), expected[0])


def test_a_flattened_head_takes_another_image_size_with_other_classes_only(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"fc_norm\.\w+ has the shape \(2048,\) .* img_size for global_pool='flatten'"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=16)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=16, num_classes=7).eval()
    assert model(images(size=16)).shape == (2, 7)
    torch.testing.assert_close(model.blocks[1].mlp.memory, make_model().blocks[1].mlp.memory, rtol=0, atol=0)


def test_weights_inside_the_package_load_without_any_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = safetensors.torch.save({key: value.half() for key, value in make_model().state_dict().items()})
    (tmp_path / 'test_ait.toy.safetensors').write_bytes(content)
    monkeypatch.setattr(pretrained, 'WEIGHTS', tmp_path)
    monkeypatch.setattr(pretrained, 'hf_hub_download', lambda *args, **kwargs: pytest.fail('asked the Hub'))
    keys = dict(packaged('test_ait.toy', sha256(content)), num_classes=11)
    model = timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=keys, **ARGS)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, make_model().head.weight.half().float())
    keys['notes'] = ('sha256:0000',)
    with pytest.raises(WeightsError, match=r'test_ait\.toy\.safetensors has the sha256 .* where 0000 was published'):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=keys, **ARGS)


def test_listed_as_pretrained_is_what_has_weights_and_the_packaged_ones_are_there() -> None:
    cfgs = {f'{name}.{tag}': cfg for name, all_ in ait.default_cfgs.items() for tag, cfg in all_.cfgs.items()}
    assert {name for name, cfg in cfgs.items() if cfg.has_weights} == set(
        timm.list_models(module='ait', pretrained=True)
    )
    for name, cfg in cfgs.items():
        if cfg.file:
            path = Path(cfg.file)
            assert pretrained.sha256_of(path) == pretrained.pinned_sha256(cfg)
            assert path.stat().st_size <= 2_000_000
            timm.create_model(name, pretrained=True)
        if cfg.hf_hub_id:
            organisation, _, model = cfg.hf_hub_id.partition('/')
            assert cfg.hf_hub_filename == 'model.safetensors'
            assert organisation == 'timm' or (
                organisation == pretrained.HUB_ORGANISATION and pretrained.pinned_sha256(cfg)
            )
            assert model


def test_the_hash_of_a_file_does_not_outlive_its_weights(remote: LoopbackHub, tmp_path: Path) -> None:
    config = tmp_path / 'saved' / 'config.json'
    notes = [f'sha256:{sha256(remote.repos[REPO]["model.safetensors"])}']
    config.write_bytes(edited(config.read_bytes(), pretrained_cfg={'notes': notes}))
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    nn.init.zeros_(model.head.bias)
    save(model, tmp_path / 'trained')
    assert 'notes' not in json.loads((tmp_path / 'trained' / 'config.json').read_text())['pretrained_cfg']
    assert not timm.create_model(f'local-dir:{tmp_path / "trained"}', pretrained=True).head.bias.any()


# ----------------------------------------------------------------------------------------------------------------------
# Faults, each with what the user sees


@pytest.mark.parametrize('name', ['ait_small', 'ait_base_patch4_32.cifar10'])
def test_without_published_weights_the_message_says_what_to_do(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        timm.create_model(name, pretrained=True)
    said = str(caught.value)
    assert said.startswith(f'no weights have been published for {name}')
    for way_out in ('benchmarks/recipes', "pretrained_cfg_overlay=dict(file='PATH')", "'ait_vit_base_patch16_224'"):
        assert way_out in said


def test_a_missing_repository_is_named(remote: LoopbackHub, child: Child, cache: Path) -> None:
    said = child.fails(
        'test_ait', cache_dir=cache, pretrained_cfg_overlay=dict(overlay(remote), hf_hub_id='no/such'), **ARGS
    )
    assert said.startswith(
        f'no weights from {remote.url}/no/such/resolve/main/model.safetensors: there is no such repository'
    )
    assert 'hf auth login' in said


def test_a_gated_repository_tells_the_way_in(remote: LoopbackHub, child: Child, cache: Path) -> None:
    remote.faults[REPO] = 'gated'
    said = child.fails('test_ait', cache_dir=cache, pretrained_cfg_overlay=overlay(remote), **ARGS)
    assert 'accept the terms on its page, then log in' in said


def test_a_missing_revision_is_named(remote: LoopbackHub, child: Child, cache: Path) -> None:
    keys = dict(overlay(remote), hf_hub_id=f'{REPO}@v9')
    said = child.fails('test_ait', cache_dir=cache, pretrained_cfg_overlay=keys, **ARGS)
    assert f'{REPO}/resolve/v9/model.safetensors: the repository has no such revision' in said


def test_a_pickle_in_place_of_the_file_is_not_even_asked_for(remote: LoopbackHub, child: Child, cache: Path) -> None:
    remote.repos[REPO]['pytorch_model.bin'] = remote.repos[REPO].pop('model.safetensors')
    said = child.fails(NAME, cache_dir=cache)
    assert f'{REPO}/resolve/main/model.safetensors: the repository has no such file, and pickles' in said
    assert not any('pytorch_model' in request for request in remote.requests)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth'])
def test_a_file_that_is_no_safetensors_by_name_is_refused(remote: LoopbackHub, name: str) -> None:
    with pytest.raises(WeightsError, match=f'{name} of {REPO} is no safetensors file: name another'):
        timm.create_model(
            'test_ait', pretrained=True, pretrained_cfg_overlay=dict(overlay(remote), hf_hub_filename=name)
        )


def test_a_server_that_is_gone_is_said_at_once_and_the_cache_still_serves(
    remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote))
    cached = child(load, 'test_ait', cache_dir=cache, **args)
    with remote.gone():
        assert child(load, 'test_ait', cache_dir=cache, **args) == cached
        said = child.fails('test_ait', cache_dir=tmp_path / 'empty', **args)
    assert f'{REPO}/resolve/main/model.safetensors: the Hub was not reached' in said
    assert "pretrained_cfg_overlay=dict(file='PATH')" in said


def test_a_connection_dropped_before_any_answer_falls_back_on_the_cache(
    remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote))
    cached = child(load, 'test_ait', cache_dir=cache, **args)
    remote.faults[REPO] = 'drop'
    assert child(load, 'test_ait', cache_dir=cache, **args) == cached
    said = child.fails('test_ait', cache_dir=tmp_path / 'empty', **args)
    # which of the two depends on whether the client takes it for a failed connection
    assert re.search(rf'{REPO}/resolve/main/model\.safetensors: the (connection broke|Hub was not reached)', said)


def test_a_connection_cut_in_the_middle_leaves_nothing_behind(remote: LoopbackHub, child: Child, cache: Path) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=cache)
    remote.faults[REPO] = 'cut'
    said = child.fails('test_ait', **args)
    assert 'the connection broke' in said
    assert 'nothing half was kept: try again' in said
    assert not blobs(cache)
    remote.faults.clear()
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


@pytest.mark.parametrize(
    ('fault', 'said'),
    [
        (
            'short',
            'is no whole safetensors file (Error while deserializing header: incomplete metadata, file not fully',
        ),
        ('flip', 'has the sha256 '),
    ],
)
@pytest.mark.parametrize('is_pinned', [True, False])
def test_a_damaged_download_is_refused_and_not_kept(
    fault: str, said: str, is_pinned: bool, remote: LoopbackHub, child: Child, cache: Path
) -> None:
    keys = overlay(remote) if is_pinned else overlay(remote, notes=None)
    args = dict(ARGS, pretrained_cfg_overlay=keys, cache_dir=cache)
    remote.faults[REPO] = fault
    message = child.fails('test_ait', **args)
    assert message.startswith(f'{remote.url}/{REPO}/resolve/main/model.safetensors {said}')
    assert 'it was not kept' in message
    assert not blobs(cache)
    remote.faults.clear()
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


def test_a_cache_that_rots_heals_itself(remote: LoopbackHub, child: Child, cache: Path) -> None:
    child(load, NAME, cache_dir=cache)
    (blob,) = blobs(cache)
    good = blob.read_bytes()
    blob.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    assert child(load, NAME, cache_dir=cache)['fingerprint'] == fingerprint(make_model())
    assert blob.read_bytes() == good
    assert 'downloading it again' in child.log.read_text()
    blob.write_bytes(good[:999])
    with remote.gone():
        keys = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=cache)
        said = child.fails('test_ait', **keys)
    assert 'is no whole safetensors file' in said
    assert 'was removed, but getting it again failed' in said


def test_other_weights_than_those_pinned_are_refused(
    remote: LoopbackHub, child: Child, cache: Path, tmp_path: Path
) -> None:
    keys = overlay(remote)
    remote.repos[REPO] = save(make_model(seed=2), tmp_path / 'others')
    said = child.fails('test_ait', pretrained_cfg_overlay=keys, cache_dir=cache, **ARGS)
    assert f'where {keys["notes"][0][7:]} was published' in said
    assert not blobs(cache)


def test_a_full_disk_is_named_with_the_folder(remote: LoopbackHub, child: Child, cache: Path) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=cache)
    said = child.fails('test_ait', file_limit=20_000, **args)
    assert f'{cache} cannot take it (File too large): free space there, or set HF_HOME or cache_dir=' in said
    assert not blobs(cache)
    assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())


def broken_folder(tmp_path: Path, **changes: Any) -> Path:
    """A local folder as a Hub keeps it, with other contents for some of its files."""
    files = save(make_model(), tmp_path / 'folder')
    for name, change in changes.items():
        path = {'config': 'config.json', 'weights': 'model.safetensors'}[name]
        (tmp_path / 'folder' / path).write_bytes(change(files[path]))
    return tmp_path / 'folder'


def load_folder(folder: Path, **kwargs: Any) -> str:
    with pytest.raises((WeightsError, ValueError)) as caught:
        timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    return str(caught.value)


def test_a_config_with_other_slots_names_file_key_and_shapes(tmp_path: Path) -> None:
    said = load_folder(broken_folder(tmp_path, config=lambda c: edited(c, model_args={'num_slots': 17})))
    assert said.startswith(f'{tmp_path}/folder/model.safetensors: blocks.0.mlp.memory has the shape (7, 5)')
    assert '(17, 5) in the model' in said
    assert 'num_slots' in said


def test_a_config_of_another_architecture_names_what_does_not_fit(tmp_path: Path) -> None:
    said = load_folder(
        broken_folder(tmp_path, config=lambda c: edited(c, architecture='ait_small', model_args={'patch_size': 4}))
    )
    assert said.startswith(f'{tmp_path}/folder/model.safetensors: the checkpoint does not fit the model: unknown keys')
    assert 'missing keys' in said


def test_a_config_that_contradicts_itself_about_classes_is_no_random_head(tmp_path: Path) -> None:
    said = load_folder(broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13)))
    # timm does not hand on the second one before 1.0.31; then the file's own classifier tells
    assert re.search(
        'num_classes=13, but 11 in its model_args|has 11 classes as the model has, its config says 13', said
    )


def test_classes_that_the_user_names_settle_a_contradiction(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay=dict(num_classes=11))
    assert fingerprint(model) == fingerprint(make_model())
    fresh = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay=dict(num_classes=-1))
    assert not torch.equal(fresh.head.weight, make_model().head.weight)


def test_a_config_with_other_classes_than_the_file_names_both(tmp_path: Path) -> None:
    said = load_folder(
        broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13, model_args={'num_classes': 13}))
    )
    assert 'a classifier of shape (11, 2048), the model one of (13, 2048) for the 13 classes of its config' in said


def test_a_classifier_that_would_be_lost_in_silence_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(make_model().state_dict(), file)
    create = dict(ARGS, pretrained=True)
    with pytest.raises(ValueError, match=r'w\.safetensors: the checkpoint has 11 classes as the model has, its config'):
        timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file)), **create)
    kept = timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file), num_classes=11), **create)
    assert fingerprint(kept) == fingerprint(make_model())
    dropped = timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file), num_classes=-1), **create)
    assert not torch.equal(dropped.head.weight, make_model().head.weight)


def without(content: bytes, key: str) -> bytes:
    return safetensors.torch.save({k: v for k, v in safetensors.torch.load(content).items() if k != key})


@pytest.mark.parametrize('classes', [11, 7])
def test_a_missing_key_is_an_error_whether_or_not_the_head_changes(classes: int, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, weights=lambda w: without(w, 'blocks.1.mlp.linear_transform.bias'))
    assert (
        'model.safetensors: the checkpoint does not fit the model: unknown keys none, missing keys blocks.1.mlp.linear_transform'
        in (load_folder(folder, num_classes=classes))
    )


def test_a_value_that_is_not_finite_names_its_key(tmp_path: Path) -> None:
    model = make_model()
    nn.init.constant_(model.blocks[1].mlp.linear_transform.bias, float('nan'))
    save(model, tmp_path)
    assert 'model.safetensors: NaN or infinite values in blocks.1.mlp.linear_transform.bias' in load_folder(tmp_path)


def test_a_pickle_under_the_name_of_safetensors_is_not_opened(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    torch.save(make_model().state_dict(), folder / 'model.safetensors')
    assert load_folder(folder).startswith(f'{folder}/model.safetensors is a pickle, which is never opened here')


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    assert load_folder(folder).startswith(f'there is no file {folder}/model.safetensors')


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / 'was here'),)

    torch.save({'head.weight': Payload()}, tmp_path / 'evil.pth')
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'evil.pth')))
    assert not (tmp_path / 'was here').exists()


# ----------------------------------------------------------------------------------------------------------------------
# Publishing


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What timm's train.py leaves of a run: weights of seed 1, their average of seed 2, its arguments."""
    args = argparse.Namespace(
        model='test_ait', num_classes=None, model_kwargs={k: v for k, v in ARGS.items() if k != 'num_classes'}, gp=None,
        img_size=None, in_chans=None, input_size=None, crop_pct=0.9, mean=[0.5, 0.4, 0.3], opt='adamw', lr=1e-3,
        epochs=3, data_dir='/home/somebody/secret/path', experiment='mine',
    )  # fmt: skip
    model, average = make_model(1), make_model(2)
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args,
        ModelEmaV3(average),
        checkpoint_dir=str(tmp_path),
        max_history=1,
    )
    saver.save_checkpoint(5, metric=71.25)
    return tmp_path / 'model_best.pth.tar'


def run_hub(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m timm_ait.hub``, as a user types it."""
    return subprocess.run(
        [sys.executable, '-m', 'timm_ait.hub', *map(str, arguments)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_training_checkpoint_becomes_a_folder_that_loads_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / 'results.json'
    results.write_text(json.dumps({'model': 'test_ait', 'top1': 70.5, 'top5': 97.25}))
    folder = hub.export(checkpoint, tmp_path / 'out' / 'test_ait.toy', results=results, dataset='CIFAR-10 (JPEG)')
    assert {path.name for path in folder.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert fingerprint(loaded) == fingerprint(make_model(2))
    assert logits(loaded) == logits(make_model(2))
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'test_ait'
    assert {'num_slots': 7, 'beta': 1.0, 'write_mode': 'train', 'num_classes': 11}.items() <= config[
        'model_args'
    ].items()
    assert config['pretrained_cfg']['notes'] == [f'sha256:{sha256((folder / "model.safetensors").read_bytes())}']
    assert config['pretrained_cfg']['crop_pct'] == 0.9
    assert config['pretrained_cfg']['mean'] == [0.5, 0.4, 0.3]
    assert config['pretrained_cfg']['tag'] == 'toy'


def test_the_card_states_metrics_recipe_commit_and_hash_and_no_paths(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy', commit='c0ffee', dataset='CIFAR-10 (JPEG)')
    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm'
    assert card.data.license == 'apache-2.0'
    digest = sha256((folder / 'model.safetensors').read_bytes())
    for fact in ('import timm_ait', '71.25', 'CIFAR-10 (JPEG)', 'opt: adamw', 'lr: 0.001', 'c0ffee', digest, 'EMA'):
        assert fact in card.text
    assert 'somebody' not in (folder / 'README.md').read_text() + (folder / 'config.json').read_text()


def test_the_raw_weights_and_half_precision_are_a_choice(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / 'raw', use_ema=False, dtype='float16')
    loaded, trained = timm.create_model(f'local-dir:{folder}', pretrained=True), make_model(1)
    assert torch.equal(loaded.head.weight, trained.head.weight.half().float())
    assert torch.equal(loaded.blocks[1].mlp.memory, trained.blocks[1].mlp.memory)
    stored = safetensors.torch.load_file(folder / 'model.safetensors')
    assert {key for key, value in stored.items() if value.dtype != torch.float16} == {
        'blocks.0.mlp.memory',
        'blocks.1.mlp.memory',
    }


def authors_checkpoint() -> dict[str, Tensor]:
    """A model's weights under the authors' names, in their order of pixels and of heads."""
    stems = {ours: theirs for theirs, ours in convert.AUTHORS_KEYS.items()}
    parts = {ours: theirs for theirs, ours in convert.AUTHORS_BLOCK_KEYS.items()}
    out = {}
    for key, value in make_model().state_dict().items():
        if 'patch_norm' in key or key == 'patch_embed.proj.weight':
            value = value.view(-1, 3, 4, 4).movedim(1, -1).flatten(1).view(-1, 48)
            value = value.flatten() if 'patch_norm' in key else value
        if key.endswith('mlp.proj.weight'):
            value = value.view(5, 3, 5).transpose(1, 2).flatten(1)
        if key.startswith('blocks.'):
            _, i, stem = key.split('.', 2)
            stem, _, leaf = stem.rpartition('.')
            name = '1.fn.memoryupdate.memory' if leaf == 'memory' else f'{parts[stem]}.{leaf}'
            out[f'transformer.layers.{i}.{name}'] = value
        else:
            stem, _, leaf = key.rpartition('.')
            out[f'{stems[stem]}.{leaf}'] = value
    return {**out, 'cls_token': torch.zeros(1, 1, 32)}


def test_a_checkpoint_of_the_authors_becomes_such_a_folder_too(tmp_path: Path) -> None:
    torch.save(authors_checkpoint(), tmp_path / 'authors.pth')
    kwargs = [f'{key}={value}' for key, value in ARGS.items() if key != 'num_classes']
    hub.main(
        [
            'export',
            str(tmp_path / 'authors.pth'),
            str(tmp_path / 'out'),
            '--model',
            'test_ait',
            '--model-kwargs',
            *kwargs,
        ]
    )
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert fingerprint(loaded) == fingerprint(make_model())


def test_a_folder_goes_to_the_hub_and_comes_back_bit_for_bit(
    served: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    served.repos, served.faults = {}, {}
    served.tokens.clear()
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy', dtype='float16')
    settings = {'HF_ENDPOINT': served.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
    done = run_hub('push', folder, 'me/test_ait.mine', HF_TOKEN=TOKEN, **settings)
    assert done.returncode == 0, done.stderr
    assert f'published: {served.url}/me/test_ait.mine' in done.stdout
    assert f"**published('test_ait.toy', '{sha256((folder / 'model.safetensors').read_bytes())}')" in done.stdout
    there = served.repos['me/test_ait.mine']
    assert set(there) == {'model.safetensors', 'config.json', 'README.md'}
    assert there['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert json.loads(there['config.json']) == json.loads((folder / 'config.json').read_text())
    assert b"create_model('hf-hub:me/test_ait.mine'" in there['README.md']
    loaded = child(load, 'hf-hub:me/test_ait.mine', cache_dir=cache)
    local = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded['fingerprint'] == fingerprint(local)
    assert_same_logits(loaded, local)
    assert served.tokens == {f'Bearer {TOKEN}'}  # it went to the Hub, and nowhere else
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and TOKEN.encode() in path.read_bytes()]


def push_with_token(folder: Path, repo_id: str) -> str:
    """In the child: upload."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', TOKEN)
        return hub.push(folder, repo_id)


def test_an_upload_that_did_not_arrive_is_noticed(
    remote: LoopbackHub, child: Child, checkpoint: Path, tmp_path: Path
) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    remote.faults[REPO] = 'deaf'
    with pytest.raises(WeightsError, match=rf'{REPO} has a model\.safetensors with the sha256 \w+, .* push again'):
        child(push_with_token, folder, REPO)
    remote.faults.clear()
    assert child(push_with_token, folder, REPO) == f'{remote.url}/{REPO}'
    assert remote.repos[REPO]['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


def test_nothing_is_pushed_without_a_login_or_from_a_damaged_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy')
    monkeypatch.setattr(hub, 'push_to_hf_hub', lambda *args, **kwargs: pytest.fail('uploaded'))
    monkeypatch.setattr(hub, 'get_token', lambda: None)
    with pytest.raises(SystemExit, match='nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN'):
        hub.main(['push', str(folder)])
    monkeypatch.setattr(hub, 'get_token', lambda: TOKEN)
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    with pytest.raises(SystemExit, match=r'model\.safetensors has the sha256 \w+ where \w+ was published'):
        hub.main(['push', str(folder)])


def test_an_export_that_fails_half_way_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hub, 'write_card', full)
    with pytest.raises(SystemExit, match='No space left on device'):
        hub.main(['export', str(checkpoint), str(tmp_path / 'out' / 'toy')])
    assert list((tmp_path / 'out').iterdir()) == []


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['gone.pth', 'out'], r'there is no checkpoint gone\.pth; train\.py writes output/<experiment>/model_best'),
        (['plain.pth', 'out'], r'plain\.pth does not say which model it holds; name it with --model'),
        (['plain.pth', '.'], r'\. exists; name another folder or remove it'),
        (['plain.pth', 'out', '--model', 'test_vit'], 'test_vit is no model of this package'),
        (['plain.pth', 'out', '--model', 'ait_small'], r'plain\.pth: the checkpoint does not fit the model'),
        (
            ['evil.pth', 'out', '--model', 'test_ait'],
            r'evil\.pth is no checkpoint of tensors and plain values, and is not',
        ),
        (['text.pth', 'out', '--model', 'test_ait'], r'text\.pth is no checkpoint of tensors and plain values'),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(make_model().state_dict(), 'plain.pth')
    torch.save({'weights': os.getcwd}, 'evil.pth')
    Path('text.pth').write_text('not a checkpoint')
    with pytest.raises(SystemExit, match=said):
        hub.main(['export', *arguments])
    assert not Path('out').exists()
