"""Write the model card of one set of weights, in the format of the Hub."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from .pretrained import FILENAME, HUB_ORGANISATION, sha256_of

__all__ = ['default_repo', 'metadata', 'write_card']

# The arguments of train.py that make a recipe. Paths, names and switches of the machine are private and left out.
RECIPE = (
    'model model_kwargs pretrained img_size input_size num_classes epochs batch_size world_size '
    'opt lr opt_betas opt_eps weight_decay layer_decay clip_grad '
    'sched warmup_epochs warmup_lr cooldown_epochs min_lr grad_accum_steps amp amp_dtype '
    'scale ratio hflip vflip train_crop_mode color_jitter aa reprob mixup cutmix mixup_off_epoch smoothing '
    'drop drop_path bce_loss model_ema model_ema_decay model_ema_warmup seed'
).split()
ARGUMENTS = 'args.yaml'
METRICS = {'top1': 'top-1 accuracy, %', 'top5': 'top-5 accuracy, %', 'metric': 'metric of the training run'}
BODY = """# {name}

An [Associative Transformer](https://arxiv.org/abs/2309.12862) (AiT) for [timm](https://github.com/huggingface/pytorch-image-models):
`{architecture}`, {millions:.1f} M parameters, images of {size}, {classes} classes.

```python
import timm
import timm_ait  # registers the models: pip install timm_ait

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Results

{results}

## Recipe

{recipe}

## Provenance

- Weights: {weights}, sha256 of `{filename}`: `{sha256}`
{trained}- Written with timm_ait {version}, timm {timm}, torch {torch}
"""


def default_repo(folder: Path) -> str:
    """Return the repository of this package that has the name of the folder."""
    return f'{HUB_ORGANISATION}/{folder.name}'


def write_card(
    folder: Path,
    model: nn.Module,
    facts: dict[str, Any],
    args: dict[str, Any],
    dataset: str,
    weights: str,
    commit: str,
    version: str,
) -> None:
    """Write README.md beside config.json and the weights.

    Args:
        folder: Folder of the weights.
        model: The model that holds them.
        facts: Metrics by the names that validate.py and train.py use.
        args: Arguments of train.py.
        dataset: Name of the data set that the metrics were measured on.
        weights: Says which weights of the run these are, averaged or not.
        commit: Commit of the code that trained them, '' if it is not known.
        version: Version of the code that writes the card.
    """
    config = json.loads((folder / 'config.json').read_text())
    body = BODY.format(
        name=folder.name,
        repo=default_repo(folder),
        architecture=config['architecture'],
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        size='x'.join(str(size) for size in config['pretrained_cfg']['input_size']),
        classes=config['num_classes'],
        results=_results(facts, dataset),
        recipe=_recipe(args),
        weights=weights,
        filename=FILENAME,
        sha256=sha256_of(folder / FILENAME),
        trained=f'- Trained with the code at `{commit}`\n' if commit else '',
        version=version,
        timm=timm.__version__,
        torch=torch.__version__,
    )
    accuracies = [(dataset, 'top-1 accuracy', facts['top1'])] if dataset and 'top1' in facts else []
    head = metadata(folder.name, accuracies, config['pretrained_cfg'].get('license', 'apache-2.0'))
    (folder / 'README.md').write_text(f'---\n{head}\n---\n{body}')


def metadata(name: str, accuracies: list[tuple[str, str, float]], license: str = 'apache-2.0') -> str:
    """Write the head of a card, which the Hub reads, as YAML.

    Args:
        name: Name of the model.
        accuracies: Data set, name of the metric, and value in percent, for each result.
        license: Licence of the weights, as the Hub calls it.
    """
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type='imagefolder',
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name=metric,
            metric_value=value,
        )
        for dataset, metric, value in accuracies
    ]
    data = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'timm_ait', 'image-classification'],
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _results(facts: dict[str, Any], dataset: str) -> str:
    lines = [f'- {METRICS[key]}: {facts[key]:.2f}' for key in METRICS if key in facts]
    if not lines:
        return 'No results are given.'
    return '\n'.join([f'On {dataset or "an unnamed data set"}:', '', *lines])


def _recipe(args: dict[str, Any]) -> str:
    given = {key: args[key] for key in RECIPE if args.get(key) not in (None, False, '', {}, ())}
    if 'opt' not in given:
        return 'No recipe is given.'
    return '\n'.join(["Arguments of timm's train.py:", '', '```yaml', *(f'{k}: {v}' for k, v in given.items()), '```'])
