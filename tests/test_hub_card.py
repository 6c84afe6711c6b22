"""The card of a folder says what the model costs, and its Python runs as it stands."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_child import Child
from hub_models import ARGS, make_model, save, sha256
from hub_server import LoopbackHub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_docs import blocks_of

from timm_ait import hub
from timm_ait.card import count_cost
from timm_ait.pretrained import HUB_ORGANISATION

NAME = 'test_ait.toy'


def run_blocks(card: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Run the blocks of a card one after the other, and return the shapes of what they made. It runs in the child."""
    known: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks_of(card):
            exec(compile(block.code, NAME, 'exec'), known)
    if 'the_same' in known:
        assert torch.equal(known['the_same'], known['embedding'])
    return {name: tuple(value.shape) for name, value in known.items() if hasattr(value, 'shape')} | {
        'maps': [tuple(x.shape) for x in known.get('maps', [])]
    }


def export(folder: Path, **kwargs: Any) -> str:
    """Export a toy model, and return its card."""
    model_name = kwargs.pop('model_name', 'test_ait')
    options = kwargs.pop('options', {})
    save(make_model(model_name=model_name, **kwargs), folder / 'saved', **kwargs)
    hub.export(folder / 'saved' / 'model.safetensors', folder / NAME, **options)
    return (folder / NAME / 'README.md').read_text()


@pytest.mark.parametrize(
    ('kwargs', 'parts'),
    [
        ({}, 3),
        (dict(class_token=True, global_pool='token'), 3),
        (dict(in_chans=1, img_size=16, depth=3), 3),
        (dict(num_classes=3, depth=4), 3),
        (dict(global_pool=''), 1),
        (dict(num_classes=0), 1),
        (dict(in_chans=5), 1),
        (dict(model_name='test_ait_relational'), 1),
    ],
)
def test_every_block_of_a_card_runs_as_it_stands_and_makes_the_shapes_that_it_says(
    kwargs: dict[str, Any], parts: int, served: LoopbackHub, child: Child, tmp_path: Path
) -> None:
    card = export(tmp_path, **kwargs)
    assert len(blocks_of(card)) == card.count('```python') == parts
    files = {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir()}
    served.repos, served.faults = {f'{HUB_ORGANISATION}/{NAME}': files}, {}
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / 'image.png')
    made = child(run_blocks, card, tmp_path)
    said = {name: eval(shape) for name, shape in re.findall(r'^ *(\w+) = .*  # (\(.*\))$', card, re.MULTILINE)}
    assert said == {name: made[name] for name in said}
    assert len(said) == (5 if parts == 3 else 1)
    if parts == 3:
        count, shape = re.findall(r'# (\d) times (\(.*\))$', card, re.MULTILINE)[0]
        assert made['maps'] == [eval(shape)] * int(count)


def test_the_cost_is_that_of_timms_results_and_of_a_computation_by_hand() -> None:
    gmacs, activations = count_cost(timm.create_model('vit_base_patch16_224', device='meta'))
    assert (gmacs, activations) == (pytest.approx(17.58, abs=0.02), pytest.approx(23.90, abs=0.01))
    model = timm.create_model('test_ait')
    tokens, width, hidden, slots, slot_dim, heads = 64, 128, 256, 16, 16, 4
    linear = tokens * (3 * width + width + hidden) + tokens * width
    attention, retrieval = tokens * tokens * heads + tokens * width, tokens * slots + tokens * width
    outputs = 4 * (linear + attention + retrieval + slots * width) + tokens * width + 10
    macs = 4 * (4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width)
    macs += 4 * (2 * tokens * slots * width + slots * slot_dim * width) + tokens * 48 * width + tokens * width * 10
    assert count_cost(model) == (pytest.approx(macs / 1e9), pytest.approx(outputs / 1e6))


def test_the_recipe_is_a_file_of_its_own_without_what_is_private(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / NAME)
    text = (folder / 'args.yaml').read_text()
    assert f'```yaml\n{text}```' in (folder / 'README.md').read_text()
    recipe = yaml.safe_load(text)
    assert {'model': 'test_ait', 'opt': 'adamw', 'lr': 0.001, 'epochs': 3}.items() <= recipe.items()
    assert recipe['model_kwargs']['num_slots'] == 7
    assert recipe['smoothing'] == 0.0  # where the script would take another value, a zero must be said
    assert 'amp' not in recipe
    for private in ('somebody', 'mine'):
        assert private not in text
    assert not (hub.export(folder / 'model.safetensors', tmp_path / 'again') / 'args.yaml').exists()


def test_the_recipe_of_a_model_that_began_in_a_folder_names_the_model_and_no_path(tmp_path: Path) -> None:
    model = make_model(global_pool='avg', in_chans=1)
    timm.models.save_for_hf(model, str(tmp_path / 'start'), safe_serialization=True)
    run = dict(model=f'local-dir:{tmp_path / "start"}', opt='adamw', gp='avg', in_chans=1, decay_rate=0.5)
    torch.save({'state_dict': model.state_dict(), 'args': run}, tmp_path / 'last.pth.tar')
    folder = hub.export(tmp_path / 'last.pth.tar', tmp_path / NAME)
    recipe = yaml.safe_load((folder / 'args.yaml').read_text())
    assert recipe == {**run, 'model': 'test_ait'}
    assert str(tmp_path) not in (folder / 'README.md').read_text()


def test_the_facts_on_a_card_are_those_of_the_model_and_of_its_results(tmp_path: Path) -> None:
    (tmp_path / 'results.json').write_text('{"top1": 41.25, "top5": 80.5}')
    export(tmp_path, img_size=(16, 24), options=dict(results=tmp_path / 'results.json', dataset='toys'))
    model = make_model(img_size=(16, 24))
    gmacs, activations = count_cost(model)
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    facts = {
        'Parameters (M)': f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}',
        'GMACs': f'{gmacs:.3g}',
        'Activations (M)': f'{activations:.3g}',
        'Image size': '16x24',
        'Classes': '11',
    }
    assert dict(re.findall(r'^- \*\*(.+):\*\* (.+)$', card.text, re.MULTILINE)).items() >= facts.items()
    assert f', timm {timm.__version__}, torch {torch.__version__}\n' in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == ('toys', 'top-1 accuracy', 41.25)


def test_a_recipe_says_what_was_given_and_no_default_of_a_rare_option(tmp_path: Path) -> None:
    given = dict(opt='adamw', no_aug=True, aug_repeats=3, mixup_mode='elem', bce_sum=True)
    defaults = dict(remode='pixel', recount=1, lr_cycle_limit=1, decay_milestones=[90, 180, 270], jsd_loss=False)
    args = {'model': 'test_ait', **given, **defaults, 'mean': None, 'kd_model_name': 'local-dir:/home/somebody/teacher'}
    torch.save({'state_dict': make_model().state_dict(), 'args': {**args, 'model_kwargs': ARGS}}, tmp_path / 'last.pth')
    folder = hub.export(tmp_path / 'last.pth', tmp_path / NAME)
    recipe = yaml.safe_load((folder / 'args.yaml').read_text())
    assert recipe == {'model': 'test_ait', 'model_kwargs': ARGS, **given}


def test_a_model_without_classes_is_for_features(tmp_path: Path) -> None:
    save_file(make_model(num_classes=0).state_dict(), tmp_path / 'model.safetensors')
    hub.export(tmp_path / 'model.safetensors', tmp_path / NAME, 'test_ait', {**ARGS, 'num_classes': 0})
    card = ModelCard.load(tmp_path / NAME / 'README.md')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    assert '- **Type:** feature backbone\n' in card.text


def test_the_card_has_the_hash_of_every_other_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = hub.export(checkpoint, tmp_path / NAME)
    card = (folder / 'README.md').read_text()
    for name in ('model.safetensors', 'config.json', 'args.yaml'):
        assert f'- sha256 of `{name}`: `{sha256((folder / name).read_bytes())}`' in card


def test_a_comparison_has_a_row_for_each_result_that_is_given(tmp_path: Path) -> None:
    facts = {'mine': {'top1': 71.5, 'param_count': 0.67}, 'vit': {'top1': 70.25, 'top5': 97.5, 'param_count': 0.66}}
    for name, content in facts.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    card = export(tmp_path / 'one', options=dict(results=tmp_path / 'mine.json'))
    assert '| model |' not in card
    card = export(
        tmp_path / 'two', options=dict(results=tmp_path / 'mine.json', compare={'ViT': tmp_path / 'vit.json'})
    )
    table = '| model | parameters, M | top-1, % | top-5, % |\n| --- | --- | --- | --- |\n'
    assert f'{table}| {NAME} | 0.67 | 71.5 |  |\n| ViT | 0.66 | 70.25 | 97.5 |\n' in card


@pytest.mark.parametrize('option', ['results', 'compare'])
def test_a_file_without_results_is_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / 'other.json').write_text(json.dumps({'acc': 71.5}))
    wrong = tmp_path / 'other.json' if option == 'results' else {'ViT': tmp_path / 'other.json'}
    with pytest.raises(ValueError, match=r'other\.json holds no top1 or top5 or metric; is it the result of another'):
        export(tmp_path / 'one', options={option: wrong})


def test_a_card_says_how_its_results_were_measured(tmp_path: Path) -> None:
    (tmp_path / 'mine.json').write_text(json.dumps({'top1': 71.5}))
    options: dict[str, Any] = dict(results=tmp_path / 'mine.json')
    assert 'Measured with' not in export(tmp_path / 'one', options=options)
    options['measured'] = '`validate.py --pretrained` on one core'
    assert '- top-1 accuracy, %: 71.50\n\nMeasured with `validate.py --pretrained` on one core.' in export(
        tmp_path / 'two', options=options
    )


def test_a_card_shows_the_accuracy_at_each_batch_size_of_the_evaluation(tmp_path: Path) -> None:
    ways = {'ours': {'1': {'top1': 70.5, 'difference': 0.0}, '64': {'top1': 70.5, 'difference': 1e-6}}}
    (tmp_path / 'sizes.json').write_text(json.dumps({'batch_sizes': ways}))
    assert 'batch size' not in export(tmp_path / 'one')
    card = export(tmp_path / 'two', options=dict(batch_sizes=tmp_path / 'sizes.json'))
    assert '| batch size | 1 | 64 |\n|---|---|---|\n| ours: top-1, % | 70.50 | 70.50 |' in card
    for wrong in ({'top1': 70.5}, {'batch_sizes': {}}, {'batch_sizes': [1]}, {'batch_sizes': {'ours': {'1': 70.5}}}):
        (tmp_path / 'wrong.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r'wrong\.json holds no batch sizes; benchmarks/batch_sizes\.py writes it'):
            export(tmp_path / 'three', options=dict(batch_sizes=tmp_path / 'wrong.json'))
    assert not (tmp_path / 'three' / NAME).exists()
