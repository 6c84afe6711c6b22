"""MODEL_CARD.md is made from the registered models and the results, and is up to date."""

import json
from pathlib import Path
from typing import Any

import model_card
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from photographs import needs_photographs, photographs
from PIL import Image
from test_docs import blocks_of
from timm.data import create_transform, resolve_model_data_config

ROOT = Path(__file__).parents[1]
FACTS = json.loads((ROOT / 'benchmarks' / 'results' / 'weights.json').read_text())
FACT: dict[str, Any] = dict(
    weights='ait_vit_base_patch16_224.sam_in1k',
    data='ImageNet-1k, validation',
    metric='top-1 accuracy, %',
    value=12.34,
    command='python -m timm_ait validate.py',
    commit='c0ffee',
    seed=7,
    machine='a toaster',
)


@pytest.fixture(scope='module')
def card() -> str:
    return model_card.make_card([FACT])


def test_the_card_in_the_repository_is_up_to_date() -> None:
    assert model_card.CARD.read_text() == model_card.make_card(model_card.read_facts(model_card.RESULTS)), (
        'MODEL_CARD.md is out of date: run python benchmarks/model_card.py'
    )


@needs_photographs
@pytest.mark.parametrize(
    'fact', [fact for fact in FACTS if fact['metric'] == FACT['metric']], ids=lambda fact: fact['weights']
)
def test_the_weights_are_as_accurate_on_a_tenth_of_the_test_images(fact: dict[str, Any]) -> None:
    model = timm.create_model(fact['weights'], pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    images, labels = photographs('test', 100)
    with torch.inference_mode():
        predictions = model(torch.stack([transform(image) for image in images])).argmax(dim=-1)
    accuracy = (predictions == torch.tensor(labels)).float().mean().item()
    assert abs(100 * accuracy - fact['value']) < 4  # three standard errors


def test_check_fails_for_a_card_that_is_out_of_date_and_passes_after_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, 'CARD', tmp_path / 'MODEL_CARD.md')
    for content in (None, 'yesterday'):
        if content:
            model_card.CARD.write_text(content)
        with pytest.raises(SystemExit, match=r'MODEL_CARD\.md is out of date: run python benchmarks/model_card\.py'):
            model_card.main(['--check'])
    model_card.main([])
    model_card.main(['--check'])


def test_asking_for_help_writes_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, 'CARD', tmp_path / 'MODEL_CARD.md')
    for words in (['--help'], ['--chek'], ['card.md']):
        with pytest.raises(SystemExit):
            model_card.main(words)
    assert not model_card.CARD.exists()


def test_the_card_lists_every_model_and_every_vit(card: str) -> None:
    for name in timm.list_models(module='ait'):
        assert f'| `{name}` |' in card
    assert (
        '| `augreg2_in21k_ft_in1k` | [timm/vit_base_patch16_224.augreg2_in21k_ft_in1k](https://huggingface.co/' in card
    )
    assert '| none | cc-by-nc-4.0 |' in card
    assert 'not trained as AiT' in card
    assert '0, 11 at depth 2; 0, 2, 4, 7, 9, 11 at depth 6' in card


def test_the_hub_reads_the_head_of_the_card(card: str) -> None:
    data = ModelCard(card).data
    assert (data.library_name, data.license) == ('timm', 'apache-2.0')
    assert data.eval_results[0].metric_value == 12.34


def test_a_result_without_its_origin_is_refused_and_its_origin_is_on_the_card(card: str, tmp_path: Path) -> None:
    assert '12.34' in card
    assert '`python -m timm_ait validate.py` at commit `c0ffee`, seed 7, a toaster' in card
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps([dict(FACT, seed=None)]))
    with pytest.raises(ValueError, match=r'weights\.json: ait_vit_base_patch16_224\.sam_in1k lacks seed'):
        model_card.read_facts(path)
    path.write_text(json.dumps([dict(FACT, weights='ait_small.mine')]))
    with pytest.raises(ValueError, match=r'ait_small\.mine is no tag of a model; use one of ait_small\.untrained'):
        model_card.read_facts(path)


def test_every_block_of_the_card_in_the_repository_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 50)).save('image.png')
    blocks = blocks_of(model_card.CARD.read_text())
    assert len(blocks) == model_card.CARD.read_text().count('```python') == 3
    known: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.code, 'MODEL_CARD.md', 'exec'), known)
    assert known['logits'].shape == (1, 10)


def test_only_models_that_were_run_with_the_same_settings_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, 'TABLES', tmp_path / 'none')
    assert 'Trained from scratch' not in model_card.make_card([FACT])
    monkeypatch.setattr(model_card, 'TABLES', tmp_path)
    for row, epochs in (('ait', 5), ('vit_small', 5), ('perceiver', 5), ('ait', 7), ('ait_no_memory', 9)):
        record = {'row': row, 'seed': 1, 'top1': 12.5 + epochs, 'parameters': 2_000_000, 'log': [{'loss': 0.5}]}
        record['arguments'] = {'table': 'cifar10', 'epochs': epochs}
        (tmp_path / f'{row}-{epochs}.json').write_text(json.dumps(record))
    card = model_card.make_card([FACT])
    assert card.count('Trained from scratch') == 1
    assert 'Trained from scratch, cifar10: epochs 5:' in card
    assert '| ait | 2.00 | 1 | 17.50 |  |  | 0.500 |\n| vit_small | 2.00 | 1 | 17.50 | +0.00 |  | 0.500 |\n\n' in card


def test_the_accuracy_at_each_batch_size_is_on_the_card_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, 'BATCH_SIZES', tmp_path / 'sizes.json')
    assert 'batch size |' not in model_card.make_card([FACT])
    ways = {'ours': {'7': {'top1': 70.5, 'difference': 0.0}}}
    record = {'batch_sizes': ways, 'command': 'python it.py', 'commit': 'c0ffee', 'cpu': 'a toaster'}
    model_card.BATCH_SIZES.write_text(json.dumps(record))
    card = model_card.make_card([FACT])
    assert '| batch size | 7 |\n|---|---|\n| ours: top-1, % | 70.50 |' in card
    assert '`python it.py` at commit `c0ffee`, a toaster' in card
