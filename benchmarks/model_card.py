"""Write MODEL_CARD.md: ``python benchmarks/model_card.py``. With ``--check``, fail if the file is out of date.

The card is made from the registered models with their configs, and from the results in ``results/weights.json``, a list
of objects with the keys of :data:`FACT`.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import tables
import timm
from timm.models import PretrainedCfg

from timm_ait.ait import default_cfgs
from timm_ait.card import CITATION, HOW_COUNTED, batch_section, count_cost, metadata, usage
from timm_ait.convert import choose_layers

ROOT = Path(__file__).parents[1]
CARD = ROOT / 'MODEL_CARD.md'
RESULTS = ROOT / 'benchmarks' / 'results' / 'weights.json'
# Of tables.py and batch_sizes.py. The card has what is there.
TABLES = RESULTS.with_name('tables')
BATCH_SIZES = RESULTS.with_name('batch_sizes.json')
COMPARED = ('ait', 'ait_no_memory', 'vit_small')
# What every published number must come with, so that it can be measured again.
FACT = ('weights', 'data', 'metric', 'value', 'command', 'commit', 'seed', 'machine')
VIT_DEPTH = 12

BODY = """# Associative Transformers for timm

Vision Transformers with a small memory in each block. The tokens of the whole batch compete to write into it through a
bottleneck, and every token reads it by Hopfield retrieval. The paper is Sun, Ochiai, Wu, Lin, Kanai, *Associative
Transformer*, CVPR 2025, [arXiv:2309.12862](https://arxiv.org/abs/2309.12862). This card is for the models that classify
images. Those that take a question beside the image (`*_relational*`) have no weights.

## Models

{models}

`ait_*_patch4_32` and `test_ait` have the paper's layout: a stem that normalises patches, no class token, no position
embedding, and a classifier that reads all tokens, flattened. `ait_small`, `ait_medium` and `ait_base` have the layout
of timm's ViT-B/16. `ait_vit_*` compute what a ViT computes, and add the retrieval times a scale that starts at zero.
`ait_tiny_conv4_32` is no model of the paper: it has a convolutional stem, a position embedding, the mean of the tokens
before the classifier, and a memory for each image whose slots stay distinct.

{how_counted}

## Weights

{weights}

The sha256 of a file is verified before it is loaded. The expected one stands in the code beside the tag, or in
config.json, or else is the one under which the Hub stores the file. Downloaded files must be safetensors.

### Weights of ViTs

The tags of `ait_vit_*` load weights of **ViTs, not trained as AiT**, from timm's repositories on the Hub:

{vits}

Before fine-tuning, `ait_vit_base_patch16_224` gives the logits of the ViT (tested to 1e-5 with random weights), so it
has the accuracy of the ViT. The shallower models take some of its {depth} blocks, evenly spread: {layers}.
**Fine-tune them before you use their classifier.** The weights have the licence of their owners: those of `mae` are for
non-commercial use only.

## Results

{results}

## Use

{use}

To fine-tune with timm's train.py: `--device-modules timm_ait --model ait_vit_base_patch16_224 --pretrained`.

## What to know before use

- In training mode a forward pass writes the memory. In evaluation the memory stays as it is. With `write_scope='image'`
  each image then writes into its own copy. So the logits of an image do not depend on the other images of its batch.
- The memory is a running average over training images, and a part of the weights. If the images are private, treat the
  memory as private too.
- **The slots of a memory become alike.** The write, as published, makes them so; in some models they become one point.
  In an untrained `ait_small_patch4_32` the mean cosine between two slots is 0.75 after 10 batches and 1.0000 after 100
  (`python benchmarks/slots.py --writes 100 --model ait_small_patch4_32`). In `test_ait.cifar10` they are one point too:
  the retrieval adds the same vector to every token, a bias. `write_rule='distinct'` keeps them apart. Do not say that
  an accuracy comes from the memory unless `slots.py` and a control without memory show it.
- A memory was shown to gain more than a wider MLP only without self-attention: `attention=False, write_scope='image'`
  and `write_rule='competing'` or `'additive'`. No weights of such a model are published.
- The models are for image classification and for features of images. Fairness, robustness to attacks, and images unlike
  the training data were not measured.

## Citation

{citation}
"""


def main(argv: list[str] | None = None) -> None:
    """Write the card, or with ``--check`` compare it with the file.

    Raises:
        SystemExit: With ``--check``, if the file is out of date.
    """
    parser = argparse.ArgumentParser(description='Write MODEL_CARD.md from the models and results/weights.json.')
    parser.add_argument('--check', action='store_true', help='write nothing; fail if the file is out of date')
    args = parser.parse_args(argv)
    card = make_card(read_facts(RESULTS))
    if not args.check:
        CARD.write_text(card)
    elif not CARD.is_file() or CARD.read_text() != card:
        sys.exit(f'{CARD.name} is out of date: run python benchmarks/model_card.py')


def read_facts(path: Path) -> list[dict[str, Any]]:
    """Read the results.

    Raises:
        ValueError: If a result lacks one of the keys, or if its weights have no tag.
    """
    facts = json.loads(path.read_text())
    for fact in facts:
        lacking = [key for key in FACT if fact.get(key) in (None, '')]
        if lacking:
            raise ValueError(f'{path.name}: {fact.get("weights")} lacks {", ".join(lacking)}; give all of {FACT}')
        if fact['weights'] not in configs():
            raise ValueError(f'{path.name}: {fact["weights"]} is no tag of a model; use one of {", ".join(configs())}')
    return list(facts)


def configs() -> dict[str, PretrainedCfg]:
    """Return all configs by 'model.tag'."""
    return {f'{name}.{tag}': cfg for name, entry in default_cfgs.items() for tag, cfg in entry.cfgs.items()}


def make_card(facts: list[dict[str, Any]]) -> str:
    """Write the text of the card."""
    shallower = [m for m in timm.list_models('ait_vit_*', module='ait') if m != 'ait_vit_base_patch16_224']
    layers = [f'{_layers(depth)} at depth {depth}' for depth in sorted(len(_on_meta(m).blocks) for m in shallower)]
    body = BODY.format(
        models=_models(),
        weights=_own_weights(),
        vits=_vits(),
        depth=VIT_DEPTH,
        layers='; '.join(layers),
        how_counted=HOW_COUNTED,
        results='\n\n'.join(filter(None, [_results(facts), _comparison(), _batch_sizes()])),
        use=usage(_on_meta('test_ait'), 'test_ait'),
        citation=CITATION,
    )
    accuracies = [
        (fact['data'], f'{fact["metric"]}, {fact["weights"]}', fact['value'])
        for fact in facts
        if 'accuracy' in fact['metric']
    ]
    return f'---\n{metadata("timm_ait", accuracies)}\n---\n{body}'


@cache
def _on_meta(name: str) -> Any:
    return timm.create_model(name, device='meta')


@cache
def _cost(name: str) -> tuple[str, ...]:
    return tuple(f'{count:.3g}' for count in count_cost(_on_meta(name)))


def _layers(depth: int) -> str:
    return ', '.join(map(str, choose_layers(VIT_DEPTH, depth)))


def _models() -> str:
    rows = [
        '| model | depth | width | slots | parameters, M | GMACs | activations, M | image | classes |',
        f'|{"---|" * 9}',
    ]
    for name in timm.list_models(module='ait'):
        model = _on_meta(name)
        cells = (
            f'`{name}`',
            len(model.blocks),
            model.embed_dim,
            'x'.join(map(str, model.blocks[0].mlp.memory.shape)),
            f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}',
            *_cost(name),
            'x'.join(map(str, model.pretrained_cfg['input_size'][1:])),
            model.num_classes,
        )
        rows.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(rows)


def _own_weights() -> str:
    own = {name: cfg for name, cfg in configs().items() if not (cfg.hf_hub_id or '').startswith('timm/')}
    lines = [f'- `{name}`: {_place(cfg)}' for name, cfg in own.items() if cfg.has_weights]
    without = sorted({f'`{name.partition(".")[0]}`' for name, cfg in own.items() if not cfg.has_weights})
    head = 'Trained as AiT:' if lines else 'No weights that were trained as AiT are published yet.'
    return '\n'.join([head, '', *lines, *([''] if lines else []), f'Without weights: {", ".join(without)}.'])


def _place(cfg: PretrainedCfg) -> str:
    note = ', '.join(cfg.notes or ())
    place = f'inside the package, {Path(cfg.file).name}' if cfg.file else f'on the Hub, {cfg.hf_hub_id}'
    return f'{place} ({note})'


def _vits() -> str:
    rows = ['| tag | repository | classes | licence |', '|---|---|---|---|']
    for tag, cfg in default_cfgs['ait_vit_base_patch16_224'].cfgs.items():
        link = f'[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})'
        rows.append(f'| `{tag}` | {link} | {cfg.num_classes or "none"} | {cfg.license} |')
    return '\n'.join(rows)


def _results(facts: list[dict[str, Any]]) -> str:
    if not facts:
        return 'Nothing was measured on published weights.'
    rows = ['| weights | data | metric | value |', '|---|---|---|---|']
    rows += [f'| `{fact["weights"]}` | {fact["data"]} | {fact["metric"]} | {fact["value"]} |' for fact in facts]
    origins = [
        f'- `{fact["weights"]}`, {fact["metric"]}: `{fact["command"]}`'
        + (f', trained by `{fact["training"]}`,' if 'training' in fact else '')
        + f' at commit `{fact["commit"]}`, seed {fact["seed"]}, {fact["machine"]}'
        for fact in facts
    ]
    return '\n'.join([*rows, '', 'How each was measured:', '', *origins])


def _comparison() -> str:
    """Set the model beside the one without memory and a ViT, once for each setting that was run."""
    parts = []
    for heading, rows in tables.gather(TABLES).items():
        compared = {row: seeds for row, seeds in rows.items() if row in COMPARED}
        if heading.startswith('cifar10') and 'ait' in compared and len(compared) > 1:
            parts.append(f'Trained from scratch, {heading}:\n\n{tables.format_table(compared)}')
    if parts:
        note = '`vit_small` is a ViT of the width and depth above. An interval that holds zero shows no difference.'
        parts.append(note)
    return '\n\n'.join(parts)


def _batch_sizes() -> str:
    if not BATCH_SIZES.is_file():
        return ''
    record = json.loads(BATCH_SIZES.read_text())
    origin = f'`{record["command"]}` at commit `{record["commit"]}`, {record["cpu"]}'
    return f'{batch_section(record["batch_sizes"])}\n\n{origin}'


if __name__ == '__main__':
    main()
