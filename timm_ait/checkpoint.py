"""Read a checkpoint of timm's train.py or of the authors' code, or a file of weights, and build its model."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor

from .arguments import WORKSPACE_ARGS
from .convert import fit_pretrained
from .transformer import AssociativeTransformer

__all__ = ['Checkpoint', 'build_model', 'read_checkpoint']

# What an export keeps of the config that timm wrote beside the weights.
SAVED = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'license')


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
        return Checkpoint(clean_state_dict(weights), _saved_args(path.with_name('config.json')), False, {})
    content: Any
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds: whatever the file holds is taken for a pickle
        raise ValueError(
            f'{path} is no checkpoint of tensors and plain values, so it is not read; save the weights alone '
            f'({str(error).partition(chr(10))[0]})'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f'expected a state dict or a checkpoint of train.py in {path}, got {type(content).__name__}')
    averaged = next((content[key] for key in ('state_dict_ema', 'model_ema') if content.get(key) is not None), None)
    is_ema = use_ema and averaged is not None
    state_dict = averaged if is_ema else content.get('state_dict', content.get('model', content))
    metric = content.get('metric')
    if not isinstance(metric, (int, float)) or (averaged is not None and not is_ema):  # train.py's is of the average
        metric = None
    facts = {} if metric is None else {'metric': metric}
    args = content.get('args') or {}
    return Checkpoint(clean_state_dict(state_dict), dict(args if isinstance(args, dict) else vars(args)), is_ema, facts)


def _saved_args(path: Path) -> dict[str, Any]:
    """Read the config that timm wrote beside the weights, in the names of train.py's arguments."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}); copy it once more, or remove it') from error
    if 'architecture' not in config:  # of another library
        return {}
    kept = {key: config.get('pretrained_cfg', {}).get(key) for key in SAVED}
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
    kwargs = {**known, **(args.get('model_kwargs') or {}), **model_kwargs}
    overlay = {'num_classes': kwargs['num_classes']}
    if args.get('license'):
        overlay['license'] = args['license']
    try:
        model = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, TypeError) as error:  # no such model, no such tag, no such argument
        raise ValueError(f'timm cannot make {name} with {kwargs}: {error}') from error
    if not isinstance(model, AssociativeTransformer):
        raise ValueError(f'{name} is no model of this package; publish it with timm.models.push_to_hf_hub')
    try:
        model.load_state_dict(fit_pretrained(read.state_dict, model, str(path)))
    except RuntimeError as error:
        raise ValueError(f'{path} does not fit {name} with {kwargs}; give its arguments ({error})') from error
    args = {**args, 'input_size': (model.in_chans, *model.patch_embed.img_size)}
    model.pretrained_cfg.update(resolve_data_config(args, pretrained_cfg=model.pretrained_cfg, model=model))
    return model, {**kwargs, **_model_args(model)}


def _model_args(model: AssociativeTransformer) -> dict[str, Any]:
    """List the arguments of the workspaces in full, for later versions with other defaults, and the sizes."""
    args = {name: getattr(model.blocks[0].mlp, name) for name in WORKSPACE_ARGS}
    args |= {'num_classes': model.num_classes, 'in_chans': model.in_chans, 'global_pool': model.global_pool}
    return {**args, 'img_size': list(model.patch_embed.img_size)}
