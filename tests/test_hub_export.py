"""``export`` writes a checkpoint as a folder that loads bit for bit, or nothing at all."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import timm
import torch
from authors_names import as_authors
from hub_child import fingerprint
from hub_models import ARGS, edited, logits, make_model, save, sha256
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

import timm_ait
from timm_ait import hub
from timm_ait.pretrained import WeightsError


def test_a_training_checkpoint_becomes_a_folder_that_loads_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / 'results.json'
    results.write_text(json.dumps({'model': 'test_ait', 'top1': 70.5, 'top5': 97.25}))
    folder = hub.export(checkpoint, tmp_path / 'out' / 'test_ait.toy', results=results, dataset='CIFAR-10 (JPEG)')
    assert {path.name for path in folder.iterdir()} == {'model.safetensors', 'config.json', 'README.md', 'args.yaml'}
    assert (folder / 'model.safetensors').stat().st_mode == (folder / 'config.json').stat().st_mode
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert fingerprint(loaded) == fingerprint(make_model(2))
    assert logits(loaded) == logits(make_model(2))
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'test_ait'
    expected = {'num_slots': 7, 'beta': 1.0, 'write_mode': 'train', 'num_classes': 11}
    assert expected.items() <= config['model_args'].items()
    assert config['pretrained_cfg']['notes'] == [f'sha256:{sha256((folder / "model.safetensors").read_bytes())}']
    assert config['pretrained_cfg']['crop_pct'] == 0.9
    assert config['pretrained_cfg']['mean'] == [0.5, 0.4, 0.3]
    assert config['pretrained_cfg']['tag'] == 'toy'


def test_the_card_has_metrics_recipe_commit_and_hash_but_no_paths(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / 'test_ait.toy', commit='c0ffee', dataset='CIFAR-10 (JPEG)')
    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm'
    assert card.data.license == 'apache-2.0'
    digest = sha256((folder / 'model.safetensors').read_bytes())
    for fact in ('import timm_ait', '71.25', 'CIFAR-10 (JPEG)', 'opt: adamw', 'lr: 0.001', 'c0ffee', digest, 'EMA'):
        assert fact in card.text
    assert 'somebody' not in (folder / 'README.md').read_text() + (folder / 'config.json').read_text()


def test_the_weights_as_trained_and_half_precision_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / 'raw', use_ema=False, dtype='float16')
    loaded, trained = timm.create_model(f'local-dir:{folder}', pretrained=True), make_model(1)
    assert torch.equal(loaded.head.weight, trained.head.weight.half().float())
    assert torch.equal(loaded.blocks[1].mlp.memory, trained.blocks[1].mlp.memory)
    stored = safetensors.torch.load_file(folder / 'model.safetensors')
    assert '71.25' not in (folder / 'README.md').read_text()  # which train.py measured with the averaged weights
    memories = {'blocks.0.mlp.memory', 'blocks.1.mlp.memory'}
    assert {key for key, value in stored.items() if value.dtype != torch.float16} == memories


def test_a_checkpoint_of_the_authors_is_exported_as_a_folder_that_loads_bit_for_bit(tmp_path: Path) -> None:
    torch.save(as_authors(make_model()), tmp_path / 'authors.pth')
    kwargs = {key: value for key, value in ARGS.items() if key != 'num_classes'}
    folder = hub.export(tmp_path / 'authors.pth', tmp_path / 'out', 'test_ait', kwargs)
    assert fingerprint(timm.create_model(f'local-dir:{folder}', pretrained=True)) == fingerprint(make_model())


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        (
            'half.safetensors',
            b'half of a file',
            r'half\.safetensors is no safetensors file .*; was it down',
        ),
        ('tensor.pth', torch.zeros(3), 'expected a state dict or a checkpoint of train.py in .*, got Tensor'),
        ('list.pth', [1, 2], 'expected a state dict or a checkpoint of train.py in .*, got list'),
        (
            'pointer.pth',
            b'version https://git-lfs.github.com/spec/v1\noid sha256:166e\n',
            r'pointer\.pth is no whole checkpoint: download or copy it ag',
        ),
        ('page.pth', b'<html>', r'page\.pth is no whole checkpoint: download or copy it ag'),
        ('summary.csv', b'epoch,train_loss\n0,2.3\n', r'summary\.csv is no whole checkpoint: download or copy it ag'),
        ('args.yaml', b'aa: null\namp: false\n', r'args\.yaml is no whole checkpoint: download or copy it ag'),
        ('short.pth', b'hi\n', r'short\.pth is no whole checkpoint: download or copy it ag'),
        ('empty.pth', b'', r'empty\.pth is no whole checkpoint: download or copy it ag'),
        (
            'nested.pth',
            {'state_dict': [1]},
            r"by their names in .*nested\.pth, got list at 'the weights'; save the state_",
        ),
        ('numbers.pth', {'state_dict': {'a': 1}}, r"by their names in .*numbers\.pth, got int at 'a'; save the state_"),
        ('unnamed.pth', {1: torch.zeros(1)}, r'by their names in .*unnamed\.pth, got Tensor at 1; save the state_'),
        (
            'said.pth',
            {'state_dict': {}, 'args': 'mine'},
            r'said\.pth says its model in an unknown way; save the state_',
        ),
        ('third.pth', {'state_dict': {}, 'args': {'model': 3}}, 'says its model in an unknown way'),
        ('list.pth', {'state_dict': {}, 'args': {'model_kwargs': [1]}}, 'says its model in an unknown way'),
    ],
)
def test_what_is_no_checkpoint_is_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        hub.read_checkpoint(path)


def test_a_damaged_config_beside_the_weights_is_named(tmp_path: Path) -> None:
    save_file({'weight': torch.zeros(1)}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"architecture": ')
    with pytest.raises(ValueError, match=r'config\.json is no JSON .*; copy it once more, or remove it'):
        hub.read_checkpoint(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(('key', 'is_ema'), [('state_dict_ema', True), ('model_ema', True), ('state_dict_old', False)])
def test_the_averaged_weights_are_those_that_timm_takes(key: str, is_ema: bool, tmp_path: Path) -> None:
    content = {'state_dict': {'module.weight': torch.zeros(1)}, key: {'module.weight': torch.ones(1)}}
    torch.save(content, tmp_path / 'model.pth')
    read = hub.read_checkpoint(tmp_path / 'model.pth')
    assert (read.state_dict['weight'].item(), read.is_ema) == (is_ema, is_ema)
    torch.save({**content, key: None}, tmp_path / 'model.pth')
    assert not hub.read_checkpoint(tmp_path / 'model.pth').is_ema


def test_the_prefix_of_a_wrapper_is_taken_off_a_safetensors_file(tmp_path: Path) -> None:
    model = make_model(2)
    save_file({f'module.{key}': value for key, value in model.state_dict().items()}, tmp_path / 'model.safetensors')
    folder = hub.export(tmp_path / 'model.safetensors', tmp_path / 'out', 'test_ait', ARGS)
    assert fingerprint(timm.create_model(f'local-dir:{folder}', pretrained=True)) == fingerprint(model)


def test_what_a_saved_folder_says_of_its_images_and_licence_is_kept(tmp_path: Path) -> None:
    overlay = dict(license='cc-by-nc-4.0', crop_mode='squash', mean=(0.1, 0.2, 0.3), crop_pct=0.7)
    model = make_model(img_size=16, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    config['model_args'].pop('img_size')  # older versions of timm wrote it below alone
    assert config['pretrained_cfg']['input_size'] == [3, 16, 16]
    (tmp_path / 'saved' / 'config.json').write_text(json.dumps(config))
    folder = hub.export(tmp_path / 'saved' / 'model.safetensors', tmp_path / 'test_ait.toy')
    kept = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert {key: kept[key] for key in overlay} == {**overlay, 'mean': [0.1, 0.2, 0.3]}
    assert kept['input_size'] == [3, 16, 16]
    assert ModelCard.load(folder / 'README.md').data.license == 'cc-by-nc-4.0'


def test_all_that_a_saved_folder_says_of_its_pixels_is_kept(tmp_path: Path) -> None:
    said: dict[str, Any] = dict(
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='nearest', crop_pct=0.7, test_crop_pct=0.8,
        test_pool_size=[2, 3],
    )  # fmt: skip
    config = save(make_model(), tmp_path / 'saved')['config.json']
    (tmp_path / 'saved' / 'config.json').write_bytes(edited(config, pretrained_cfg=said))
    folder = hub.export(tmp_path / 'saved' / 'model.safetensors', tmp_path / 'test_ait.toy')
    kept = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert {key: kept[key] for key in said} == said


def test_a_run_that_began_with_a_file_of_its_own_is_exported_without_its_path(tmp_path: Path) -> None:
    overlay = {'file': '/home/somebody/own.pth', 'std': [0.1, 0.2, 0.3]}
    args = {'model': 'test_ait', 'opt': 'adamw', 'model_kwargs': {**ARGS, 'pretrained_cfg_overlay': overlay}}
    torch.save({'state_dict': make_model().state_dict(), 'args': args}, tmp_path / 'last.pth.tar')
    folder = hub.export(tmp_path / 'last.pth.tar', tmp_path / 'test_ait.toy')
    assert 'somebody' not in ''.join(path.read_text() for path in folder.iterdir() if path.suffix != '.safetensors')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded.pretrained_cfg['std'] == overlay['std']
    assert logits(loaded) == logits(make_model())


def test_a_pickle_of_the_older_format_is_read(tmp_path: Path) -> None:
    model = make_model()
    torch.save(model.state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert torch.equal(hub.read_checkpoint(tmp_path / 'old.pth').state_dict['head.weight'], model.head.weight)
    overlay = dict(file=str(tmp_path / 'old.pth'), num_classes=11)
    loaded = timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=overlay, **ARGS)
    assert logits(loaded) == logits(model)


def test_labels_and_the_config_of_tests_are_kept(tmp_path: Path) -> None:
    labels = [f'class {i}' for i in range(11)]
    facts: dict[str, Any] = {'label_names': labels, 'label_descriptions': {labels[0]: 'the first'}}
    said: dict[str, Any] = dict(model_config=dict(facts), data_config=dict(crop_pct=0.8, test_crop_pct=1.0))
    timm.models.save_for_hf(make_model(), str(tmp_path / 'saved'), safe_serialization=True, **said)
    folder = hub.export(tmp_path / 'saved' / 'model.safetensors', tmp_path / 'test_ait.toy')
    kept = timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg
    assert {key: kept[key] for key in (*facts, 'test_crop_pct')} == {**facts, 'test_crop_pct': 1.0}


def test_the_config_beside_a_pickle_is_read_as_beside_safetensors(tmp_path: Path) -> None:
    model = make_model(write_scope='image', beta=5.0)
    timm.models.save_for_hf(model, str(tmp_path / 'saved'))
    folder = hub.export(tmp_path / 'saved' / 'pytorch_model.bin', tmp_path / 'test_ait.toy')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert (loaded.blocks[0].mlp.write_scope, loaded.blocks[0].mlp.retrieval.beta) == ('image', 5.0)
    assert fingerprint(loaded) == fingerprint(model)


def test_values_beyond_the_range_of_the_type_are_told(tmp_path: Path) -> None:
    model = make_model()
    model.head.weight.data.fill_(1e6)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'head.weight of .* beyond the range of float16; take bfloat16'):
        hub.export(tmp_path / 'model.safetensors', tmp_path / 'out', 'test_ait', ARGS, dtype='float16')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', ['[]', '3', '{"top1": "88"}'])
def test_results_that_hold_nothing_are_named(content: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ValueError, match='json holds no results'):
        hub.export(checkpoint, tmp_path / 'out', results=tmp_path / 'results.json')


def write_results(path: Path, *results: dict[str, Any]) -> Path:
    path.write_text(json.dumps([{'model': 'test_ait', **one} for one in results]))
    return path


@pytest.mark.parametrize(
    'others',
    [
        [dict(top1=99.5, checkpoint='out/checkpoint-2.pth.tar')],
        [dict(top1=99.5, model='test_vit')],
        [dict(top1=99.5, model='local-dir:another'), dict(top1=98.5, checkpoint='other/last.pth.tar')],
    ],
)
@pytest.mark.parametrize('own', [dict(checkpoint='out/model_best.pth.tar'), dict(model='test_ait.toy')])
def test_of_several_results_the_card_shows_its_own(
    own: dict[str, Any], others: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / 'results.json', *others, dict(top1=41.25, **own))
    card = (hub.export(checkpoint, tmp_path / 'out', results=results) / 'README.md').read_text()
    assert 'top-1 accuracy, %: 41.25' in card


@pytest.mark.parametrize(
    'found',
    [
        [dict(checkpoint='checkpoint-2.pth.tar'), dict(checkpoint='checkpoint-3.pth.tar')],
        [dict(), dict(model='test_ait.other')],
    ],
)
def test_several_results_of_which_none_or_two_are_its_own_are_refused(
    found: list[dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / 'results.json', *(dict(one, top1=1.0) for one in found))
    with pytest.raises(
        ValueError, match=r'results\.json holds 2 results, \d of them of model_best.* or test_ait; leave'
    ):
        hub.export(checkpoint, tmp_path / 'out', results=results)
    with pytest.raises(ValueError, match=r'results\.json holds 2 results; leave the one'):
        hub.export(checkpoint, tmp_path / 'out', compare={'another': str(results)})


def test_the_results_of_another_model_are_refused_and_may_be_compared(checkpoint: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / 'results.json', dict(top1=41.25, model='test_vit.toy'))
    with pytest.raises(
        ValueError, match=r'is of test_vit\.toy, but the checkpoint holds test_ait; give the results of'
    ):
        hub.export(checkpoint, tmp_path / 'out', results=results)
    card = (hub.export(checkpoint, tmp_path / 'out', compare={'ViT': str(results)}) / 'README.md').read_text()
    assert '| ViT |  | 41.25 |' in card


@pytest.mark.parametrize('name', ['local-dir:folder', 'hf-hub:me/test_ait.toy'])
def test_the_results_of_a_folder_or_a_repository_are_taken(name: str, checkpoint: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / 'results.json', dict(top1=41.25, model=name))
    assert '%: 41.25' in (hub.export(checkpoint, tmp_path / 'out', results=results) / 'README.md').read_text()


def test_a_result_that_is_not_finite_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / 'results.json', dict(top1=float('nan'), top5=50.0))
    with pytest.raises(ValueError, match=r'results\.json gives top1=nan, expected a finite number; validate it again'):
        hub.export(checkpoint, tmp_path / 'out', results=results)


def test_a_checkpoint_may_hold_no_arguments(tmp_path: Path) -> None:
    torch.save({'model': {'weight': torch.zeros(1)}, 'args': None}, tmp_path / 'model.pth')
    assert hub.read_checkpoint(tmp_path / 'model.pth').args == {}


def test_a_config_of_another_library_beside_the_weights_says_nothing(tmp_path: Path) -> None:
    save_file({'weight': torch.zeros(1)}, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
    assert hub.read_checkpoint(tmp_path / 'model.safetensors').args == {}


def test_the_image_size_of_train_py_is_that_of_the_model(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    content['args'].input_size, content['args'].gp = [3, 16, 64], 'avg'
    model = timm.create_model('test_ait', global_pool='avg', img_size=(16, 64), **ARGS)
    content['state_dict_ema'] = model.state_dict()
    torch.save(content, checkpoint)
    model, args = hub.build_model(hub.read_checkpoint(checkpoint), checkpoint, '', {})
    assert (model.patch_embed.img_size, args['img_size']) == ((16, 64), [16, 64])


OBLONG = dict(ARGS, patch_size=56)  # of an image of 112 x 448: as many patches as in one of 224 x 224


@pytest.mark.parametrize(
    ('said', 'given'),
    [
        (dict(model_kwargs=OBLONG, input_size=[3, 112, 448]), {}),
        (dict(model_kwargs=OBLONG, img_size=[112, 448]), {}),
        (dict(model_kwargs=dict(OBLONG, img_size=[112, 448])), {}),
        (None, dict(OBLONG, img_size=(112, 448))),
    ],
    ids=['input_size', 'img_size', 'model_kwargs', 'state dict alone'],
)
def test_positions_of_an_oblong_grid_are_not_taken_for_those_of_a_square_one(
    said: dict[str, Any] | None, given: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(model_name='ait_small', **dict(OBLONG, img_size=(112, 448)))
    nn.init.normal_(model.pos_embed)
    weights, path = model.state_dict(), tmp_path / 'last.pth'
    torch.save(weights if said is None else {'state_dict': weights, 'args': {'model': 'ait_small', **said}}, path)
    built, _ = hub.build_model(hub.read_checkpoint(path), path, 'ait_small', given)
    folder = hub.export(path, tmp_path / 'out', 'ait_small', given)
    for loaded in (built, timm.create_model(f'local-dir:{folder}', pretrained=True)):
        assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_positions_of_a_square_grid_are_resampled_to_the_oblong_one_that_is_asked_for(tmp_path: Path) -> None:
    model = make_model(model_name='ait_small', **OBLONG)
    nn.init.normal_(model.pos_embed)
    path = tmp_path / 'last.pth'
    args = {'model': 'ait_small', 'model_kwargs': OBLONG}
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    built, _ = hub.build_model(hub.read_checkpoint(path), path, '', {'img_size': (112, 448)})
    assert built.patch_embed.grid_size == (2, 8)
    assert not torch.equal(built.pos_embed, model.pos_embed)


def test_the_channels_of_train_py_are_those_of_the_model(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    vars(content['args']).update(input_size=[1, 32, 32], in_chans=None, mean=[0.5], std=[0.25])
    content['state_dict_ema'] = make_model(in_chans=1).state_dict()
    torch.save(content, checkpoint)
    model, args = hub.build_model(hub.read_checkpoint(checkpoint), checkpoint, '', {})
    assert model.in_chans == args['in_chans'] == 1


def test_a_file_that_must_not_be_opened_is_not_called_damaged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(PermissionError):
        hub.read_checkpoint(checkpoint)


def test_a_model_of_other_channels_is_no_model_of_this_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit test_ait with .*'in_chans': 1.*; give its arguments"):
        hub.build_model(hub.read_checkpoint(checkpoint), checkpoint, 'test_ait', {'in_chans': 1})


def test_a_checkpoint_of_another_model_is_named(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match='holds test_ait, and you named ait_tiny_conv4_32'):
        hub.build_model(hub.read_checkpoint(checkpoint), checkpoint, 'ait_tiny_conv4_32', {})


def test_the_version_names_no_commit_of_a_project_around_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / 'project' / '.venv' / 'timm_ait'
    package.mkdir(parents=True)
    for command in ('init -q', '-c user.name=a -c user.email=a@b commit -q --allow-empty -m x'):
        subprocess.run(['git', *command.split()], cwd=tmp_path / 'project', check=True)
    monkeypatch.setattr(hub, '__file__', str(package / 'hub.py'))
    assert hub._code_version() == timm_ait.__version__
    monkeypatch.setattr(hub, '__file__', str(tmp_path / 'project' / 'timm_ait' / 'hub.py'))  # its own checkout
    assert re.fullmatch(rf'{re.escape(timm_ait.__version__)} \([0-9a-f]{{40}}\)', hub._code_version())
    monkeypatch.setenv('PATH', '')
    assert hub._code_version() == timm_ait.__version__


def test_a_file_that_breaks_off_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, 'load', Mock(side_effect=OSError(22, 'Invalid argument')))
    with pytest.raises(ValueError, match=rf'{checkpoint.name} breaks off \(.*Invalid argument\); was it written whole'):
        hub.read_checkpoint(checkpoint)


def test_half_a_file_is_named(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf'{checkpoint.name} is no whole checkpoint: download or copy it again'):
        hub.read_checkpoint(checkpoint)


def test_an_export_that_fails_leaves_no_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hub, 'write_card', full)
    with pytest.raises(OSError, match='No space left on device'):
        hub.export(checkpoint, tmp_path / 'out' / 'toy')
    assert list((tmp_path / 'out').iterdir()) == []


def test_an_export_that_does_not_load_back_is_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, '_load', lambda folder: make_model(3))
    with pytest.raises(WeightsError, match=r'toy does not load back as it was written: \S+ differs; export it again'):
        hub.export(checkpoint, tmp_path / 'out' / 'toy')
    assert list((tmp_path / 'out').iterdir()) == []
