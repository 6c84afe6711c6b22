"""Read a checkpoint of timm's train.py or of the authors' code, or a file of weights, and build its model."""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import clean_state_dict
from torch import Tensor, nn

from .arguments import WORKSPACE_ARGS
from .convert import fit_pretrained
from .pickles import read_pickle
from .relational import RelationalTransformer
from .transformer import AssociativeTransformer

__all__ = [
    'Checkpoint',
    'build_model',
    'find_checkpoints',
    'is_path',
    'is_run',
    'label_of',
    'load_checkpoint',
    'load_model',
    'read_checkpoint',
]

# What an export keeps of the config that timm wrote beside the weights. KEPT is what says nothing of training images.
KEPT = ('license', 'label_names', 'label_descriptions', 'test_input_size', 'test_crop_pct', 'test_pool_size')
SAVED = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', *KEPT)


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        state_dict: The weights.
        args: Arguments of train.py; empty if the file holds weights alone.
        is_ema: Whether these are averaged weights.
        facts: Validation metric of these weights, if it is known.
    """

    state_dict: dict[str, Tensor]
    args: dict[str, Any]
    is_ema: bool
    facts: dict[str, Any]


def read_checkpoint(path: Path, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint of train.py, of the authors' code, or of weights alone. No code in it is run.

    Args:
        path: The file.
        use_ema: Read the averaged weights if there are any.

    Raises:
        ValueError: If the file is missing, is no checkpoint, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f'there is no checkpoint {path}; train.py writes output/<experiment>/model_best.pth.tar')
    if path.suffix == '.safetensors':
        try:
            weights = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no safetensors file ({error}); was it downloaded whole?') from error
        return Checkpoint(clean_state_dict(weights), _args(None, path), False, {})
    content, state_dict, has_average = read_pickle(path, use_ema)
    is_ema = use_ema and has_average
    metric = content.get('metric')
    if not isinstance(metric, (int, float)) or (has_average and not is_ema):  # train.py's is of the average
        metric = None
    facts = {} if metric is None else {'metric': metric}
    return Checkpoint(clean_state_dict(state_dict), _args(content.get('args'), path), is_ema, facts)


def _args(args: Any, path: Path) -> dict[str, Any]:
    """The arguments of train.py in a checkpoint, or else the config beside it, in the names of train.py's arguments."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args or _saved_args(path.with_name('config.json'))
    is_known = isinstance(args, dict) and isinstance(args.get('model') or '', str)
    if not is_known or not isinstance(args.get('model_kwargs') or {}, dict):
        raise ValueError(
            f'{path} says its model in an unknown way; save the state_dict() of the model alone, and give --model and '
            '--model-kwargs'
        )
    kwargs = dict(args.get('model_kwargs') or {})
    overlay = kwargs.pop('pretrained_cfg_overlay', None)  # with the file that the run started from
    if not overlay:
        return dict(args)
    said = {key: overlay[key] for key in SAVED if key in overlay and not args.get(key)}
    return {**args, 'model_kwargs': kwargs, **said}


def _saved_args(path: Path) -> dict[str, Any]:
    """Read the config that timm wrote beside the weights; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}); copy it once more, or remove it') from error
    if not isinstance(config, dict) or 'architecture' not in config:  # of another library
        return {}
    facts = {**(config.get('pretrained_cfg') or {}), **config}  # the labels stand beside the rest
    kept = {key: facts.get(key) for key in SAVED}
    return {'model': config['architecture'], 'model_kwargs': config.get('model_args', {}), **kept}


def build_model(
    read: Checkpoint, path: Path, model_name: str, model_kwargs: dict[str, Any]
) -> tuple[AssociativeTransformer, dict[str, Any]]:
    """Build the model of a checkpoint, with its weights. Return it and the arguments of its constructor.

    Args:
        read: Content of the checkpoint.
        path: Its file, for error messages.
        model_name: Entry point, or '' if the checkpoint says it.
        model_kwargs: Arguments of the model, beside those in the checkpoint.

    Raises:
        ValueError: If the checkpoint does not say its model, or does not fit it.
    """
    args = read.args
    name = model_name or args.get('model')
    if not name:
        raise ValueError(f'{path} does not say which model it holds; give its name with --model')
    head = next((read.state_dict[key] for key in ('head.weight', 'mlp_head.1.weight') if key in read.state_dict), None)
    size = tuple(args.get('input_size') or ())
    known = {
        'num_classes': 0 if head is None else len(head),
        'in_chans': args.get('in_chans') or (size[0] if size else None),
        'img_size': args.get('img_size') or size[1:] or None,
        'global_pool': args.get('gp'),
    }
    stated = {**known, **(args.get('model_kwargs') or {})}
    kwargs = {**stated, **model_kwargs}
    overlay = {'num_classes': kwargs['num_classes'], **{key: args[key] for key in KEPT if args.get(key)}}
    try:
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, TypeError) as error:  # no such model, no such tag, no such argument
        raise ValueError(f'timm cannot make {name} with {kwargs}: {error}') from error
    if not isinstance(model, AssociativeTransformer):
        raise ValueError(f'{name} is no model of this package; timm.models.push_to_hf_hub publishes others')
    img_size = (stated if args.get('model') else kwargs)['img_size']
    if img_size:  # of the checkpoint; without it, positions of an oblong grid would be taken for those of a square one
        model.pretrained_cfg['input_size'] = (model.in_chans, *to_2tuple(img_size))
    try:
        model.load_state_dict(fit_pretrained(read.state_dict, model, str(path)))
    except RuntimeError as error:
        raise ValueError(f'{path} does not fit {name} with {kwargs}; give its arguments ({error})') from error
    except ValueError as error:
        said = str(args.get('model') or name)
        if said.partition('.')[0] == name.partition('.')[0]:
            raise
        raise ValueError(f'the checkpoint holds {said}, and you named {name} ({error})') from error
    args = {**args, 'input_size': (model.in_chans, *model.patch_embed.img_size)}
    model.pretrained_cfg.update(resolve_data_config(args, pretrained_cfg=model.pretrained_cfg, model=model))
    return model, {**kwargs, **_model_args(model)}


def _model_args(model: AssociativeTransformer) -> dict[str, Any]:
    """List the arguments of the workspaces in full, for later versions with other defaults, and the sizes."""
    args = {name: getattr(model.blocks[0].mlp, name) for name in WORKSPACE_ARGS}
    args |= {'num_classes': model.num_classes, 'in_chans': model.in_chans, 'global_pool': model.global_pool}
    return {**args, 'img_size': list(model.patch_embed.img_size)}


def find_checkpoints(folder: Path) -> list[Path]:
    """The files ``checkpoint-<epoch>.pth.tar`` that timm's train.py has left in ``folder``, by epoch.

    Raises:
        ValueError: If there are none.
    """
    paths = [path for path in folder.glob('checkpoint-*.pth.tar') if re.fullmatch(r'\d+', label_of(path))]
    if not paths:
        raise ValueError(f'{folder} holds no checkpoint-<epoch>.pth.tar; give the output folder of train.py')
    return sorted(paths, key=lambda path: int(label_of(path)))


def label_of(path: Path) -> str:
    """The epoch in the name of a checkpoint of train.py, or what stands in its place."""
    return path.name.removeprefix('checkpoint-').removesuffix('.pth.tar')


def load_checkpoint(path: Path) -> nn.Module:
    """The model of a checkpoint of train.py, which says its name and its arguments, with its weights.

    Raises:
        ValueError: If the file is no such checkpoint.
    """
    read = read_checkpoint(path)
    if not read.args.get('model'):
        raise ValueError(f'{path} does not say which model it holds; name the model, and give --checkpoint {path}')
    return build_model(read, path, '', {})[0]


def load_model(name: str, checkpoint: Path | None = None) -> nn.Module:
    """The model that the command line names: a name in timm, a checkpoint, or the folder of train.py or of an export.

    Raises:
        ValueError: If there is no such model, or if it has no memory.
    """
    path = Path(name)
    if is_path(name):
        if checkpoint is not None:
            raise ValueError(
                f'--checkpoint goes with the name of a model, but {name} is a file or folder; leave one out'
            )
        if is_run(name):
            path = find_checkpoints(path)[-1]
        elif path.is_dir():
            return load_model(f'local-dir:{name}')
        return _check(name, load_checkpoint(path))
    is_elsewhere = name.startswith(('hf-hub:', 'local-dir:'))
    if not is_elsewhere and ('/' in name or not timm.is_model(name)):
        raise ValueError(
            f'expected the name of a model, a checkpoint, or the folder of train.py or of an export, got {name}'
        )
    try:
        _check(name, timm.create_model(name))
    except RuntimeError as error:  # no such tag
        raise ValueError(f'timm cannot make {name}: {error}') from error
    if checkpoint is not None:
        return build_model(read_checkpoint(checkpoint), checkpoint, name, {})[0]
    if not is_elsewhere and not timm.models.get_pretrained_cfg(name).has_weights:
        raise ValueError(f'{name} has no weights of its own; name the file of a training or give --checkpoint FILE')
    return timm.create_model(name, pretrained=True)


def is_path(name: str) -> bool:
    """Whether the command line names a file or folder. One that is called MODEL.TAG comes before those weights."""
    return Path(name).exists() and ('.' in name or not timm.is_model(name))


def is_run(name: str) -> bool:
    """Whether the command line names the folder of train.py, and not one that holds weights and their config."""
    return is_path(name) and Path(name).is_dir() and not (Path(name) / 'config.json').is_file()


def _check(name: str, model: nn.Module) -> nn.Module:
    """The model, if it has memories and takes images alone."""
    if not isinstance(model, AssociativeTransformer):
        raise ValueError(f'{name} has no memory to look into; name a model of this package, such as test_ait')
    if isinstance(model, RelationalTransformer):
        raise ValueError(
            f'{name} answers questions, and a folder of images holds none; in Python call '
            'timm_ait.visualize.visualize(model, images, questions)'
        )
    return model
