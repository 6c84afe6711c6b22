"""A folder or file of weights that does not fit its config, is damaged or may run code is refused."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_child import fingerprint
from hub_models import ARGS, edited, make_model, save
from torch import nn

from timm_ait.pretrained import WeightsError


def broken_folder(tmp_path: Path, **changes: Any) -> Path:
    """Save a folder, then change some of its files."""
    files = save(make_model(), tmp_path / 'folder')
    for name, change in changes.items():
        path = {'config': 'config.json', 'weights': 'model.safetensors'}[name]
        (tmp_path / 'folder' / path).write_bytes(change(files[path]))
    return tmp_path / 'folder'


def load_folder(folder: Path, **kwargs: Any) -> str:
    with pytest.raises((WeightsError, ValueError)) as caught:
        timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    return str(caught.value)


def test_a_config_with_another_number_of_slots_names_file_key_and_shapes(tmp_path: Path) -> None:
    said = load_folder(broken_folder(tmp_path, config=lambda c: edited(c, model_args={'num_slots': 17})))
    assert said.startswith(f'{tmp_path}/folder/model.safetensors: blocks.0.mlp.memory has the shape (7, 5)')
    assert '(17, 5) in the model' in said
    assert 'num_slots' in said


def test_a_config_of_another_architecture_names_the_keys_that_do_not_fit(tmp_path: Path) -> None:
    said = load_folder(
        broken_folder(tmp_path, config=lambda c: edited(c, architecture='ait_small', model_args={'patch_size': 4}))
    )
    assert said.startswith(f'{tmp_path}/folder/model.safetensors: the checkpoint does not fit the model: unknown keys')
    assert 'missing keys' in said


def test_a_config_with_two_numbers_of_classes_is_refused(tmp_path: Path) -> None:
    said = load_folder(broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13)))
    assert 'num_classes=13, but 11 in its model_args' in said


def test_num_classes_in_the_overlay_decides_if_a_config_has_two_numbers_of_classes(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay=dict(num_classes=11))
    assert fingerprint(model) == fingerprint(make_model())
    fresh = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay=dict(num_classes=-1))
    assert not torch.equal(fresh.head.weight, make_model().head.weight)


def test_a_config_with_another_number_of_classes_than_the_file_names_both_shapes(tmp_path: Path) -> None:
    said = load_folder(
        broken_folder(tmp_path, config=lambda c: edited(c, num_classes=13, model_args={'num_classes': 13}))
    )
    assert (
        'a classifier of shape (11, 2048). The config has 13 classes, so the model expects the shape (13, 2048)' in said
    )


def test_a_classifier_that_timm_would_drop_without_a_message_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(make_model().state_dict(), file)
    create = dict(ARGS, pretrained=True)
    with pytest.raises(ValueError, match=r'w\.safetensors: the checkpoint and the model have 11 classes, but the'):
        timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file)), **create)
    kept = timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file), num_classes=11), **create)
    assert fingerprint(kept) == fingerprint(make_model())
    dropped = timm.create_model('test_ait', pretrained_cfg_overlay=dict(file=str(file), num_classes=-1), **create)
    assert not torch.equal(dropped.head.weight, make_model().head.weight)


def without(content: bytes, key: str) -> bytes:
    return safetensors.torch.save({k: v for k, v in safetensors.torch.load(content).items() if k != key})


@pytest.mark.parametrize('classes', [11, 7])
def test_a_missing_key_is_an_error_with_the_same_head_and_with_a_new_one(classes: int, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, weights=lambda w: without(w, 'blocks.1.mlp.linear_transform.bias'))
    said = load_folder(folder, num_classes=classes)
    assert 'model.safetensors: the checkpoint does not fit the model: unknown keys none, missing keys' in said
    assert 'blocks.1.mlp.linear_transform' in said


def test_a_file_with_a_value_that_is_not_finite_names_its_key(tmp_path: Path) -> None:
    model = make_model()
    nn.init.constant_(model.blocks[1].mlp.linear_transform.bias, float('nan'))
    save(model, tmp_path)
    assert 'model.safetensors: NaN or infinite values in blocks.1.mlp.linear_transform.bias' in load_folder(tmp_path)


def test_a_pickle_named_safetensors_is_not_read(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    torch.save(make_model().state_dict(), folder / 'model.safetensors')
    assert load_folder(folder).startswith(f'{folder}/model.safetensors is a pickle, which is never read here')


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    said = load_folder(folder)
    assert said.startswith(
        f'there is no file {folder}/model.safetensors, but pytorch_model.bin, a pickle, which is not'
    )
    assert f"safe_serialization=True, or load this file with pretrained_cfg_overlay=dict(file='{folder}/pytorch" in said


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / 'was here'),)

    torch.save({'head.weight': Payload()}, tmp_path / 'evil.pth')
    with pytest.raises(
        RuntimeError, match=r'evil\.pth is no checkpoint .*; save the weights alone \(it holds .*mkdir\)$'
    ):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'evil.pth')))
    assert not (tmp_path / 'was here').exists()


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ([1, 2], 'expected a state dict or a checkpoint of train.py in .*wrong.pth, got list'),
        (torch.zeros(3), 'expected a state dict or a checkpoint of train.py in .*wrong.pth, got Tensor'),
        (nn.Linear(2, 3), r'wrong.pth is no checkpoint .*; save the weights alone \(it holds torch\.nn\..*Linear\)'),
        ({'state_dict': [1]}, r"expected tensors by their names in .*wrong.pth, got list at 'the weights'; save the"),
    ],
    ids=['list', 'tensor', 'module', 'nested'],
)
def test_a_pickle_of_other_things_is_named_with_what_it_holds(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / 'wrong.pth')
    with pytest.raises(WeightsError, match=said) as caught:
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'wrong.pth')))
    assert 'weights_only' not in str(caught.value)


def test_an_archive_of_other_files_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'wrong.pth', 'w') as archive:
        archive.writestr('a.txt', 'hello')
    with pytest.raises(
        WeightsError, match=r'wrong\.pth is no checkpoint of tensors and plain values, so it is not rea'
    ):
        timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'wrong.pth')))
