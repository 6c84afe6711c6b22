"""An AiT that starts from the weights of a ViT. A small Hub on loopback stands for timm's repositories."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import upcycle
from hub_child import Child, blobs
from hub_server import LoopbackHub
from photographs import write_noise
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from timm_ait import ait
from timm_ait.convert import choose_layers
from timm_ait.pretrained import WeightsError

VIT = 'vit_base_patch16_224'
MODELS = {'ait_vit_base_patch16_224': 12, 'ait_vit_medium_patch16_224': 6, 'ait_vit_small_patch16_224': 2}
TAGS = list(ait.default_cfgs['ait_vit_base_patch16_224'].cfgs)
BEST = f'timm/{VIT}.augreg2_in21k_ft_in1k'
# A small ViT-B/16: widths and image size differ, layout and names are the same.
TOY: dict[str, Any] = dict(embed_dim=24, num_heads=3, img_size=32, patch_size=16)
MEMORY: dict[str, Any] = dict(num_slots=7, slot_dim=5, write_heads=2, bottleneck=11)


def make_vit(**kwargs: Any) -> nn.Module:
    """Make a ViT whose parameters are all random, so that none can be left out unnoticed."""
    torch.manual_seed(5)
    vit = timm.create_model(VIT, **dict(TOY, **kwargs)).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(name: str, channels: int = 3, **kwargs: Any) -> Tensor:
    """Load pretrained weights and return logits. It runs in the child."""
    size = kwargs.get('img_size', 224)
    return timm.create_model(name, pretrained=True, **kwargs).eval()(images(size)[:, :channels]).numpy()


@pytest.fixture
def vit_hub(served: LoopbackHub) -> LoopbackHub:
    """The small Hub, with timm's repository of a toy ViT."""
    served.repos = {BEST: {'model.safetensors': safetensors.torch.save(make_vit().state_dict())}}
    served.requests.clear()
    return served


@torch.no_grad()
def test_the_upcycled_models_logits_are_those_of_the_vit(vit_hub: LoopbackHub, child: Child, tmp_path: Path) -> None:
    upcycled = child(logits_of, 'ait_vit_base_patch16_224', cache_dir=tmp_path, **TOY, **MEMORY)
    expected = make_vit()(images())
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(upcycled), expected, rtol=0, atol=1e-5)
    path = f'/{BEST}/resolve/main/model.safetensors'
    assert vit_hub.requests == [f'HEAD {path}', f'GET {path}']


@torch.no_grad()
def test_the_upcycled_models_logits_are_those_of_the_vit_at_full_size_and_224_pixels(tmp_path: Path) -> None:
    torch.manual_seed(5)
    vit = timm.create_model(VIT).eval()
    nn.init.normal_(vit.head.weight, std=0.1)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    x, expected = images(224)[:1], vit(images(224)[:1])
    del vit
    file = dict(file=str(tmp_path / 'vit.safetensors'))
    model = timm.create_model('ait_vit_base_patch16_224', pretrained=True, pretrained_cfg_overlay=file).eval()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('tag', TAGS)
def test_each_tag_has_the_config_of_timms_vit(tag: str) -> None:
    theirs = get_pretrained_cfg(f'{VIT}.{tag}')
    assert theirs is not None
    for name in MODELS:
        ours = get_pretrained_cfg(f'{name}.{tag}')
        assert ours is not None
        assert ours.hf_hub_id == theirs.hf_hub_id.rstrip('/') + (f'/{VIT}.{tag}' if theirs.hf_hub_id == 'timm/' else '')
        assert ours.hf_hub_filename == 'model.safetensors'
        for field in ('mean', 'std', 'crop_pct', 'interpolation', 'num_classes', 'input_size', 'license', 'crop_mode'):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert (ours.first_conv, ours.classifier) == (theirs.first_conv, theirs.classifier)
        assert 'not trained as an AiT' in str(ours.description)


def test_the_best_vit_is_the_default_tag_and_all_tags_are_listed_as_pretrained() -> None:
    listed = timm.list_models('ait_vit_*', module='ait', pretrained=True)
    assert set(listed) == {f'{name}.{tag}' for name in MODELS for tag in TAGS}
    for name in MODELS:
        assert timm.create_model(name, **TOY).pretrained_cfg['tag'] == 'augreg2_in21k_ft_in1k'


def test_the_layers_of_a_shallower_model_are_evenly_spread_with_the_first_and_the_last() -> None:
    assert choose_layers(12, 12) == list(range(12))
    assert choose_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert choose_layers(12, 2) == [0, 11]
    assert choose_layers(12, 1) == [11]
    for available in range(2, 30):
        for depth in range(2, available + 1):
            layers = choose_layers(available, depth)
            assert len(set(layers)) == depth
            assert (layers[0], layers[-1]) == (0, available - 1)
            assert all(abs(layer - i * (available - 1) / (depth - 1)) <= 0.5 for i, layer in enumerate(layers))


@pytest.mark.parametrize('name', ['ait_vit_medium_patch16_224', 'ait_vit_small_patch16_224'])
@torch.no_grad()
def test_a_shallower_model_has_the_logits_of_the_vit_without_the_other_layers(
    name: str, vit_hub: LoopbackHub, child: Child, tmp_path: Path
) -> None:
    vit = make_vit()
    vit.blocks = nn.Sequential(*[vit.blocks[i] for i in choose_layers(12, MODELS[name])])
    upcycled = child(logits_of, name, cache_dir=tmp_path, **TOY, **MEMORY)
    torch.testing.assert_close(torch.from_numpy(upcycled), vit(images()), rtol=0, atol=1e-5)


def test_a_vit_is_loaded_for_other_classes_channels_and_image_sizes(
    vit_hub: LoopbackHub, child: Child, tmp_path: Path
) -> None:
    args = dict(TOY, **MEMORY, cache_dir=tmp_path)
    name = 'ait_vit_base_patch16_224'
    assert child(logits_of, name, num_classes=7, **args).shape == (3, 7)
    assert child(logits_of, name, channels=1, in_chans=1, **args).shape == (3, 1000)
    larger = child(logits_of, name, **dict(args, img_size=64))
    vit = timm.create_model(VIT, **dict(TOY, img_size=64)).eval()
    state = {**make_vit().state_dict()}
    state['pos_embed'] = timm.layers.resample_abs_pos_embed(state['pos_embed'], [4, 4])
    vit.load_state_dict(state)
    torch.testing.assert_close(torch.from_numpy(larger), vit(images(64)).detach(), rtol=0, atol=1e-5)


def test_a_vit_without_a_head_gives_features_and_takes_any_new_head(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_vit(num_classes=0).state_dict(), tmp_path / 'dino.safetensors')
    args = dict(TOY, **MEMORY, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'dino.safetensors')))
    features = timm.create_model('ait_vit_base_patch16_224.dino', **args).eval()
    torch.testing.assert_close(features(images()), make_vit(num_classes=0)(images()), rtol=0, atol=1e-5)
    assert timm.create_model('ait_vit_base_patch16_224.dino', num_classes=7, **args)(images()).shape == (3, 7)


def test_fine_tuning_moves_the_scale_from_zero_and_then_the_linear_transform(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_vit().state_dict(), tmp_path / 'vit.safetensors')
    args = dict(TOY, **MEMORY, pretrained=True, num_classes=7)
    overlay = dict(file=str(tmp_path / 'vit.safetensors'))
    model = timm.create_model('ait_vit_small_patch16_224', pretrained_cfg_overlay=overlay, **args).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = [block.mlp.scale for block in model.blocks]
    assert not any(scale.any() for scale in scales)
    moved: list[bool] = []
    for _ in range(2):
        nn.functional.cross_entropy(model(images()), torch.tensor([0, 3, 6])).backward()
        moved.append(any(block.mlp.linear_transform.weight.grad.any().item() for block in model.blocks))
        optimizer.step()
        optimizer.zero_grad()
    assert all(scale.any() for scale in scales)
    assert moved == [False, True]  # the retrieval gets a gradient once the scale is not zero


def test_a_vit_of_another_shape_is_an_error_that_names_the_file(
    vit_hub: LoopbackHub, child: Child, tmp_path: Path
) -> None:
    said = child.fails('ait_vit_base_patch16_224', cache_dir=tmp_path, **dict(TOY, embed_dim=36), **MEMORY)
    assert re.search(
        r'model\.safetensors: \S+ has the shape \(.*24.*\) in the checkpoint and \(.*36.*\) in the model', said
    )


def test_a_vit_with_more_parameters_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_vit(init_values=0.1, depth=2).state_dict(), tmp_path / 'layer_scale.safetensors')
    overlay = dict(file=str(tmp_path / 'layer_scale.safetensors'))
    with pytest.raises(ValueError, match=r'layer_scale\.safetensors: .* unknown keys blocks\.0\.ls1\.gamma'):
        timm.create_model('ait_vit_small_patch16_224', pretrained=True, pretrained_cfg_overlay=overlay, **TOY, **MEMORY)


def test_a_file_of_jax_for_another_depth_or_by_its_name_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'vit.npz'
    np.savez(path, **{f'Transformer/encoderblock_{i}/LayerNorm_0/bias': np.zeros(24) for i in range(12)})
    load: Any = partial(timm.create_model, 'ait_vit_small_patch16_224', pretrained=True, **TOY)
    with pytest.raises(
        ValueError, match=r'expected a ViT of 2 blocks in .*vit\.npz, got 12; load it into a ViT of timm'
    ):
        load(pretrained_cfg_overlay=dict(file=str(path), custom_load=True))
    with pytest.raises(ValueError, match='expected a ViT of 2 blocks'):
        timm.create_model('ait_vit_small_patch16_224', checkpoint_path=str(path), **TOY)
    with pytest.raises(
        WeightsError, match=r'vit\.npz is a file of JAX: add custom_load=True to pretrained_cfg_overlay'
    ):
        load(pretrained_cfg_overlay=dict(file=str(path)))


def test_a_model_of_the_paper_refuses_a_deeper_vit(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_vit().state_dict(), tmp_path / 'vit.safetensors')
    overlay = dict(file=str(tmp_path / 'vit.safetensors'))
    with pytest.raises(ValueError, match=r'vit\.safetensors: .* unknown keys blocks\.10\.'):
        timm.create_model('ait_small', pretrained=True, pretrained_cfg_overlay=overlay, **TOY, **MEMORY)


def test_the_file_of_a_vit_must_have_the_hash_of_the_hub(vit_hub: LoopbackHub, child: Child, tmp_path: Path) -> None:
    vit_hub.faults[BEST] = 'flip'
    said = child.fails('ait_vit_base_patch16_224', cache_dir=tmp_path, **TOY, **MEMORY)
    vit_hub.faults.clear()
    assert f'{BEST}/resolve/main/model.safetensors has the sha256' in said
    assert not blobs(tmp_path)


def test_the_comparison_with_the_vit_records_all_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (('train', 3), ('test', 2)):
        write_noise(tmp_path / split, range(10), count)
    sizes = {'--pretrain-images': 2, '--finetune-images': 1, '--test-images': 2, '--batch-size': 5, '--seeds': 2}
    args = [str(x) for pair in sizes.items() for x in pair]
    run = partial(
        upcycle.main, [str(tmp_path), '--epochs', '1', '1', '--threads', '1', *args, '--out', str(tmp_path / 'out')]
    )
    tables_checkpoint = tmp_path / 'out' / 'checkpoints' / 'cifar10-ait-1.pt'
    tables_checkpoint.parent.mkdir(parents=True)
    tables_checkpoint.touch()
    run()
    result = tmp_path / 'out' / 'upcycle.json'
    record = json.loads(result.read_text())
    assert list(tables_checkpoint.parent.iterdir()) == [tables_checkpoint]
    with pytest.raises(SystemExit):
        run()
    assert 'holds what was measured with these arguments; remove it' in capsys.readouterr().err
    result.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(upcycle, 'evaluate', Mock(side_effect=[0.0, 0.0, 0.0, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            run()
    left = {path.stem for path in tables_checkpoint.parent.iterdir()}
    assert left == {tables_checkpoint.stem, 'upcycle-vit-0', 'upcycle-vit-1'}
    run()
    assert json.loads(result.read_text())['finetuned'] == record['finetuned']
    assert {record[f'{name} at the start'] for name in upcycle.STARTS} == {record['vit']}  # what the ViT computes
    assert {name: len(values) for name, values in record['finetuned'].items()} == dict.fromkeys(upcycle.STARTS, 2)
    assert {'cpu', 'torch', 'timm', 'commit', 'arguments', 'seconds'} <= record.keys()
    assert str(tmp_path) not in json.dumps(record['arguments']).replace(str(tmp_path / 'out'), '')


def test_images_of_another_size_or_of_other_classes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ('train', 'test'):
        write_noise(tmp_path / split, range(12), 2)
    sizes = '--pretrain-images 1 --finetune-images 1 --test-images 1 --out'.split()
    with pytest.raises(SystemExit):
        upcycle.main([str(tmp_path), *sizes, str(tmp_path / 'out')])
    assert 'expected images of (32, 32) in 10 classes in ' in (said := capsys.readouterr().err)
    assert said.endswith('got (32, 32) in 12\n')
