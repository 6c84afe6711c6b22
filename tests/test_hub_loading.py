"""Published weights load through timm, from the Hub, its cache, a folder or this package."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_child import Child, fingerprint, images, load
from hub_models import ARGS, NAME, REPO, assert_same_logits, edited, make_model, overlay, save, sha256
from hub_server import LoopbackHub
from timm.models import save_for_hf
from torch import nn

from timm_ait import ait, pretrained
from timm_ait.pretrained import WeightsError, packaged


def test_an_hf_hub_name_loads_the_weights_bit_for_bit(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    loaded = child(load, NAME, cache_dir=hub_cache)
    assert loaded['fingerprint'] == fingerprint(make_model())
    assert_same_logits(loaded, make_model())
    assert loaded['cfg'] == {'hf_hub_id': REPO, 'source': 'hf-hub', 'file': None, 'notes': None}


def test_a_published_tag_loads_once_and_then_from_the_cache(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    args = dict(ARGS, pretrained_cfg_overlay=overlay(remote), cache_dir=hub_cache)
    for _ in range(2):
        assert child(load, 'test_ait', **args)['fingerprint'] == fingerprint(make_model())
    path = f'/{REPO}/resolve/main/model.safetensors'
    assert remote.requests == [f'HEAD {path}', f'GET {path}', f'HEAD {path}']


def test_a_pinned_revision_is_loaded_again_without_a_request(
    remote: LoopbackHub, child: Child, hub_cache: Path
) -> None:
    name = f'{NAME}@{remote.commit(REPO)}'
    first = child(load, name, cache_dir=hub_cache)
    remote.requests.clear()
    assert child(load, name, cache_dir=hub_cache) == first
    assert remote.requests == []


def test_offline_the_cache_is_loaded_and_a_missing_file_is_named(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    args = dict(ARGS, cache_dir=hub_cache)
    cached = child(load, 'test_ait', pretrained_cfg_overlay=overlay(remote), **args)
    assert child(load, NAME, cache_dir=hub_cache)['fingerprint'] == cached['fingerprint']
    offline = Child(tmp_path / 'offline', HF_ENDPOINT=remote.url, HF_HUB_OFFLINE='1')
    remote.requests.clear()
    assert offline(load, NAME, cache_dir=hub_cache)['fingerprint'] == cached['fingerprint']
    assert offline(load, 'test_ait', pretrained_cfg_overlay=overlay(remote), **args) == cached
    absent = dict(overlay(remote), hf_hub_id='someone/else')
    said = offline.fails('test_ait', pretrained_cfg_overlay=absent, **args)
    assert 'someone/else/resolve/main/model.safetensors: the Hub was not reached (OfflineModeIsEnabled: ' in said
    assert 'and the file is not in the cache: connect once' in said
    assert remote.requests == []
    snapshot = next(hub_cache.glob('models--*/snapshots/*'))
    (snapshot / 'model.safetensors').rename(snapshot / 'pytorch_model.bin')
    said = offline.fails(NAME, cache_dir=hub_cache)
    assert 'the cache holds pytorch_model.bin, a pickle, which is not read in its place: save the model with' in said
    assert f"pretrained_cfg_overlay=dict(file='{snapshot}/pytorch_model.bin')" in said
    offline.pool.shutdown()


def test_another_number_of_classes_gives_a_fresh_head_on_the_same_trunk(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    assert child(load, NAME, cache_dir=hub_cache, num_classes=7)['shape'] == (2, 7)
    folder = tmp_path / 'saved'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    own, saved = model.state_dict(), make_model().state_dict()
    differ = {key for key in own if not torch.equal(own[key], saved.get(key, torch.empty(0)))}
    assert differ == {'head.weight', 'head.bias'}


def test_a_model_of_one_channel_sums_the_stem_weights_of_three(
    remote: LoopbackHub, child: Child, hub_cache: Path, tmp_path: Path
) -> None:
    assert child(load, NAME, cache_dir=hub_cache, in_chans=1)['shape'] == (2, 11)
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, in_chans=1)
    torch.testing.assert_close(
        model.patch_embed.proj.weight, make_model().patch_embed.proj.weight.sum(1, keepdim=True), rtol=1e-6, atol=1e-7
    )


def test_another_image_size_resamples_the_position_embedding(tmp_path: Path) -> None:
    layout = dict(class_token=True, pos_embed='learn', global_pool='token', weight_init='')
    model = make_model(**layout)
    with torch.no_grad():  # the same at every position, so that resampling changes nothing
        model.pos_embed.copy_(model.pos_embed.mean(dim=1, keepdim=True).expand_as(model.pos_embed))
    save(model, tmp_path, **layout)
    larger = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=48).eval()
    assert larger.pos_embed.shape == (1, 1 + 12 * 12, 32)
    torch.testing.assert_close(larger.pos_embed[:, :1].expand(1, 145, 32), larger.pos_embed, rtol=0, atol=1e-5)
    assert larger(images(size=48)).shape == (2, 11)


def test_features_only_loads_without_the_head(remote: LoopbackHub, child: Child, hub_cache: Path) -> None:
    loaded = child(load, NAME, cache_dir=hub_cache, features_only=True, out_indices=[1])
    with torch.no_grad():
        expected = make_model().forward_intermediates(images(), indices=[1], norm=False, intermediates_only=True)
    assert loaded['shape'] == [(2, 32, 8, 8)]
    torch.testing.assert_close(torch.tensor(loaded['logits'][0]), expected[0])


def test_the_model_inside_features_is_saved_without_the_old_hash(tmp_path: Path) -> None:
    inner = timm.create_model('test_ait', pretrained=True, features_only=True).model
    nn.init.zeros_(inner.blocks[0].norm1.weight)
    save_for_hf(inner, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert not loaded.blocks[0].norm1.weight.any()


def test_a_flattened_head_takes_another_image_size_only_with_another_number_of_classes(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"fc_norm\.\w+ has the shape \(2048,\) .* img_size for global_pool='flatten'"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=16)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=16, num_classes=7).eval()
    assert model(images(size=16)).shape == (2, 7)
    torch.testing.assert_close(model.blocks[1].mlp.memory, make_model().blocks[1].mlp.memory, rtol=0, atol=0)


def test_weights_inside_the_package_load_without_the_hub_and_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = safetensors.torch.save({key: value.half() for key, value in make_model().state_dict().items()})
    (tmp_path / 'test_ait.toy.safetensors').write_bytes(content)
    monkeypatch.setattr(pretrained, 'WEIGHTS', tmp_path)
    monkeypatch.setattr(pretrained, 'hf_hub_download', lambda *args, **kwargs: pytest.fail('asked the Hub'))
    keys = dict(packaged('test_ait.toy', sha256(content)), num_classes=11)
    model = timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=keys, **ARGS)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, make_model().head.weight.half().float())
    keys['notes'] = ('sha256:0000',)
    with pytest.raises(WeightsError, match=r'test_ait\.toy\.safetensors has the sha256 .*, but 0000 was published'):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=keys, **ARGS)


def test_timm_lists_as_pretrained_exactly_the_tags_with_weights_and_those_in_the_package_load() -> None:
    cfgs = {f'{name}.{tag}': cfg for name, all_ in ait.default_cfgs.items() for tag, cfg in all_.cfgs.items()}
    assert {name for name, cfg in cfgs.items() if cfg.has_weights} == set(
        timm.list_models(module='ait', pretrained=True)
    )
    for name, cfg in cfgs.items():
        if cfg.file:
            path = Path(cfg.file)
            assert pretrained.sha256_of(path) == pretrained.pinned_sha256(cfg)
            assert path.stat().st_size <= 4_000_000
            timm.create_model(name, pretrained=True)
        if cfg.hf_hub_id:
            organisation, _, model = cfg.hf_hub_id.partition('/')
            assert cfg.hf_hub_filename == 'model.safetensors'
            assert organisation == 'timm' or (
                organisation == pretrained.HUB_ORGANISATION and pretrained.pinned_sha256(cfg)
            )
            assert model


def test_a_model_that_was_trained_further_is_saved_without_the_old_hash(remote: LoopbackHub, tmp_path: Path) -> None:
    config = tmp_path / 'saved' / 'config.json'
    notes = [f'sha256:{sha256(remote.repos[REPO]["model.safetensors"])}']
    config.write_bytes(edited(config.read_bytes(), pretrained_cfg={'notes': notes}))
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    nn.init.zeros_(model.head.bias)
    save(model, tmp_path / 'trained')
    assert 'notes' not in json.loads((tmp_path / 'trained' / 'config.json').read_text())['pretrained_cfg']
    assert not timm.create_model(f'local-dir:{tmp_path / "trained"}', pretrained=True).head.bias.any()
