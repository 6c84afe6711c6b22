"""Write the model card of one set of weights, in the format of the Hub."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from .pretrained import HUB_ORGANISATION, sha256_of
from .relational import RelationalTransformer
from .transformer import AssociativeTransformer

__all__ = ['Results', 'batch_section', 'batch_table', 'count_cost', 'default_repo', 'metadata', 'usage', 'write_card']

# The arguments of train.py that make a recipe. Paths, names and switches of the machine are private and left out.
RECIPE = (
    'model model_kwargs pretrained img_size in_chans input_size gp num_classes epochs batch_size world_size '
    'opt lr opt_betas opt_eps opt_kwargs momentum weight_decay layer_decay clip_grad clip_mode '
    'sched sched_on_updates warmup_epochs warmup_lr decay_epochs decay_rate cooldown_epochs min_lr '
    'grad_accum_steps amp amp_dtype '
    'scale ratio hflip vflip train_crop_mode train_interpolation color_jitter aa reprob '
    'mixup cutmix mixup_prob mixup_switch_prob mixup_off_epoch smoothing '
    'drop drop_path bce_loss model_ema model_ema_decay model_ema_warmup seed'
).split()
# More of them, with train.py's defaults, at which they are left out.
RARE: dict[str, Any] = dict(
    no_aug=False, aug_repeats=0, aug_splits=0, resplit=False, remode='pixel', recount=1, mixup_mode='batch',
    cutmix_minmax=None, color_jitter_prob=None, grayscale_prob=None, gaussian_blur_prob=None, mean=None, std=None,
    train_img_sizes=None, train_batch_sizes=None, train_size_probs=None, train_size_schedule='constant',
    train_size_schedule_spread=0.65, train_size_random_mix=0.1, variable_batch_loss_scale='none',
    train_batches_per_epoch=None, epoch_repeats=0, warmup_prefix=False, patience_epochs=10,
    decay_milestones=[90, 180, 270], lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, lr_cycle_mul=1.0,
    lr_cycle_decay=0.5, lr_cycle_limit=1, lr_k_decay=1.0, layer_decay_min_scale=0, layer_decay_no_opt_scale=None,
    jsd_loss=False, bce_sum=False, bce_target_thresh=None, bce_pos_weight=None,
    head_init_scale=None, head_init_bias=None, drop_connect=None, drop_block=None, model_dtype=None, fast_norm=False,
    kd_model_name=None, kd_distill_type='logit', kd_loss_type='kl', kd_temperature=4.0, kd_token_distill_type='soft',
    distill_loss_weight=None, task_loss_weight=None,
)  # fmt: skip
ARGUMENTS = 'args.yaml'
METRICS = {'top1': 'top-1 accuracy, %', 'top5': 'top-5 accuracy, %', 'metric': 'metric of the training run'}
MODES = {1: 'L', 3: 'RGB'}  # of an image file, by the channels of a model
aten = torch.ops.aten
COUNTED = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
CITATION = """```bibtex
@inproceedings{sun2025associative,
  title     = {Associative Transformer},
  author    = {Sun, Yuwei and Ochiai, Hideya and Wu, Zhirong and Lin, Stephen and Kanai, Ryota},
  booktitle = {CVPR},
  year      = {2025}
}
```"""
HOW_COUNTED = """\
GMACs and activations are counted for one image, with `torch.utils.flop_counter`: the multiply-adds of convolutions,
linear layers and products of matrices, with attention and retrieval, and the values in the outputs of these. Counted
so, timm's ViT-B/16 has 17.6 GMACs and 23.9 M activations."""
BODY = """# Model card for {name}

An [Associative Transformer](https://arxiv.org/abs/2309.12862) (AiT) for [timm](https://github.com/huggingface/pytorch-image-models):
`{architecture}`.

## Model details

- **Type:** {kind}
- **Parameters (M):** {millions:.1f}
- **GMACs:** {macs:.3g}
- **Activations (M):** {activations:.3g}
- **Image size:** {size}
- **Classes:** {classes}
{trained_on}- **Papers:**
  - Associative Transformer: https://arxiv.org/abs/2309.12862
  - An Image is Worth 16x16 Words: https://arxiv.org/abs/2010.11929
- **Code of the authors:** https://github.com/yuweisunn/associative-transformer

{how_counted}

## Use

{use}

## Results

{results}

## Recipe

{recipe}

## Provenance

- Weights: {weights}
{hashes}
{trained_with}- Written with timm_ait {version}, timm {timm}, torch {torch}

## Citation

{citation}
"""
START = """```python
import timm
import timm_ait  # registers the models: pip install . in a checkout of timm_ait
import torch
"""
USE = """### Classify an image

{start}from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('image.png').convert('{mode}')).unsqueeze(0)  # {shape}
with torch.inference_mode():
    logits = model(image)  # {logits}
best = logits.softmax(dim=1).topk({best})
print(best.indices, best.values)
```

### Feature maps

With `image` from above:

```python
backbone = timm.create_model('{name}', pretrained=True, features_only=True).eval()
with torch.inference_mode():
    maps = backbone(image)
print([tuple(x.shape) for x in maps])  # {maps}
```

### Embeddings

```python
encoder = timm.create_model('{name}', pretrained=True, num_classes=0).eval()
with torch.inference_mode():
    embedding = encoder(image)  # {embedding}
    tokens = model.forward_features(image)  # {tokens}
    the_same = model.forward_head(tokens, pre_logits=True)  # {embedding}
```"""
USE_TENSORS = """{start}
model = timm.create_model('{name}', pretrained=True).eval()
with torch.inference_mode():
    output = model({inputs})  # {logits}
```"""


def default_repo(folder: Path) -> str:
    """Return the repository of this package that has the name of the folder."""
    return f'{HUB_ORGANISATION}/{folder.name}'


def count_cost(model: VisionTransformer) -> tuple[float, float]:
    """Count what one image costs. Nothing is computed: the model is copied without its values.

    Returns:
        Billions of multiply-adds, and millions of values in the outputs of the operations that do them.
    """
    copy = deepcopy(model).to('meta', torch.float32).eval().requires_grad_(False)

    def outputs(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return math.prod(out_shape)

    found = []
    for mapping in ({}, dict.fromkeys(COUNTED, outputs)):
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            copy(*(torch.empty(shape, device='meta') for shape in _inputs(model)))
        found.append(sum(counter.get_flop_counts()['Global'].values()))
    return found[0] / 2e9, found[1] / 1e6


class Results(NamedTuple):
    """What was measured of a model.

    Attributes:
        facts: Metrics by the names that validate.py and train.py use.
        dataset: Name of the data set that they were measured on.
        measured: How and where: a command, and a machine.
        others: Metrics of other models to compare with, by their names.
        batch_sizes: What benchmarks/batch_sizes.py measured, or nothing.
    """

    facts: dict[str, Any]
    dataset: str
    measured: str
    others: dict[str, dict[str, Any]]
    batch_sizes: dict[str, dict[str, Any]]


def write_card(
    folder: Path,
    model: AssociativeTransformer,
    args: dict[str, Any],
    found: Results,
    weights: str,
    commit: str,
    version: str,
) -> None:
    """Write README.md beside config.json and the weights, and args.yaml if a run of train.py is known.

    Args:
        folder: Folder of the weights.
        model: The model that holds them.
        args: Arguments of train.py.
        found: What was measured of it.
        weights: Says which weights of the run these are, averaged or not.
        commit: Commit of the code that trained them, '' if it is not known.
        version: Version of the code that writes the card.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    if str(args.get('model')).startswith('local-dir:'):  # a path
        args = {**args, 'model': config['architecture']}
    recipe = _recipe(args)
    if recipe:
        (folder / ARGUMENTS).write_text(recipe, encoding='utf-8')
        recipe = f"Arguments of timm's train.py, also in {ARGUMENTS}:\n\n```yaml\n{recipe}```"
    macs, activations = count_cost(model)
    files = sorted(path for path in folder.iterdir() if path.name != 'README.md')
    body = BODY.format(
        name=folder.name,
        architecture=config['architecture'],
        kind='image classification, feature backbone' if model.num_classes else 'feature backbone',
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=macs,
        activations=activations,
        size='x'.join(map(str, model.patch_embed.img_size)),
        classes=model.num_classes,
        trained_on=f'- **Data set:** {found.dataset}\n' if found.dataset else '',
        how_counted=HOW_COUNTED,
        use=usage(model, f'hf-hub:{default_repo(folder)}'),
        results='\n\n'.join(
            filter(None, (_results(found), _comparison(folder.name, found), batch_section(found.batch_sizes)))
        ),
        recipe=recipe or 'No recipe is given.',
        weights=weights,
        hashes='\n'.join(f'- sha256 of `{path.name}`: `{sha256_of(path)}`' for path in files),
        trained_with=f'- Trained with the code at `{commit}`\n' if commit else '',
        version=version,
        timm=timm.__version__,
        torch=torch.__version__,
        citation=CITATION,
    )
    has_accuracy = found.dataset and 'top1' in found.facts
    accuracies = [(found.dataset, 'top-1 accuracy', found.facts['top1'])] if has_accuracy else []
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    head = metadata(folder.name, accuracies, config['pretrained_cfg'].get('license', 'apache-2.0'), task)
    (folder / 'README.md').write_text(f'---\n{head}\n---\n{body}', encoding='utf-8')


def metadata(
    name: str,
    accuracies: list[tuple[str, str, float]],
    license: str = 'apache-2.0',
    task: str = 'image-classification',
) -> str:
    """Write the head of a card, which the Hub reads, as YAML.

    Args:
        name: Name of the model.
        accuracies: Data set, name of the metric, and value in percent, for each result.
        license: Licence of the weights, as the Hub calls it.
        task: What the model is for, as the Hub calls it.
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
        pipeline_tag=task,
        tags=['timm', 'timm_ait', task],
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def batch_section(found: dict[str, dict[str, Any]]) -> str:
    """Write :func:`batch_table` with a sentence before it; '' if nothing was measured."""
    if not found:
        return ''
    others = ', and with the same weights as the authors compute them' if len(found) > 1 else ''
    return f'By the batch size of the evaluation{others}:\n\n{batch_table(found)}'


def batch_table(found: dict[str, dict[str, Any]]) -> str:
    """Write what benchmarks/batch_sizes.py has measured: a row for each way, a column for each batch size."""
    sizes = list(next(iter(found.values())))
    lines = ['| batch size | ' + ' | '.join(sizes) + ' |', '|---' * (len(sizes) + 1) + '|']
    for way, measured in found.items():
        lines.append(f'| {way}: top-1, % | ' + ' | '.join(f'{one["top1"]:.2f}' for one in measured.values()) + ' |')
        differences = ' | '.join(f'{one["difference"]:.1e}' for one in measured.values())
        lines.append(f'| {way}: a logit differs by up to | {differences} |')
    return '\n'.join(lines)


def _inputs(model: VisionTransformer) -> list[tuple[int, ...]]:
    """List the shapes of what a model takes for one image."""
    question = [(1, model.question_dim)] if isinstance(model, RelationalTransformer) else []
    return [(1, model.in_chans, *model.patch_embed.img_size), *question]


def usage(model: AssociativeTransformer, name: str) -> str:
    """Write how to use the weights of a model, in Python that runs as it stands; ``name`` is for create_model."""
    inputs = _inputs(model)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    grid, depth = model.patch_embed.grid_size, len(model.blocks)
    width = model.head_hidden_size
    of = (1,) if model.global_pool else (1, tokens)
    is_usual = model.global_pool and model.num_classes and model.in_chans in MODES and len(inputs) == 1
    template = USE if is_usual else USE_TENSORS
    return template.format(
        start=START,
        name=name,
        mode=MODES.get(model.in_chans),
        shape=inputs[0],
        inputs=', '.join(f'torch.rand({", ".join(map(str, shape))})' for shape in inputs),
        logits=(*of, model.num_classes or width),
        best=min(5, model.num_classes),
        maps=f'{min(3, depth)} times (1, {model.embed_dim}, {grid[0]}, {grid[1]})',
        embedding=(1, width),
        tokens=(1, tokens, model.embed_dim),
    )


def _results(found: Results) -> str:
    lines = [f'- {METRICS[key]}: {found.facts[key]:.2f}' for key in METRICS if key in found.facts]
    if not lines:
        return 'No results are given.'
    how = ['', f'Measured with {found.measured}.'] if found.measured else []
    return '\n'.join([f'On {found.dataset or "an unnamed data set"}:', '', *lines, *how])


def _comparison(name: str, found: Results) -> str:
    """Write a table of this model and others, with what validate.py wrote of each; '' without others."""
    if not found.others:
        return ''
    columns = {'param_count': 'parameters, M', 'top1': 'top-1, %', 'top5': 'top-5, %'}
    rows = [['model', *columns.values()], ['---'] * 4]
    for which, one in {name: found.facts, **found.others}.items():
        rows.append([which, *(str(one.get(key, '')) for key in columns)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _recipe(args: dict[str, Any]) -> str:
    """Write the arguments of a run that train.py was given, as YAML; '' if they are not of a run."""
    rare = [key for key, default in RARE.items() if args.get(key) not in (None, default)]
    values = {key: args.get(key) for key in (*RECIPE, *rare)}
    values = {key: x for key, x in values.items() if not str(x).startswith('local-dir:')}  # a path
    given = {key: x for key, x in values.items() if x not in (None, '', {}, (), []) and x is not False}  # but keep 0
    return str(yaml.safe_dump(given, sort_keys=False)) if 'opt' in given else ''
