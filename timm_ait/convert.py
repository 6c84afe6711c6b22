"""Checkpoints, of others too, read by strict key tables: the authors' AiT and timm's ViT.

Every key of a foreign checkpoint is renamed, left out for a stated reason, or an error that names it.
"""

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor

if TYPE_CHECKING:
    from .transformer import AssociativeTransformer

__all__ = [
    'Checkpoint',
    'checkpoint_filter_fn',
    'choose_layers',
    'convert_authors',
    'convert_vit',
    'fit_pretrained',
    'is_authors',
    'read_checkpoint',
]

StateDict = dict[str, Tensor]

# https://github.com/yuweisunn/associative-transformer (vit_hn.py, ait.py, MHA.py)
AUTHORS_KEYS = {
    'to_patch_embedding.1': 'patch_embed.patch_norm',
    'to_patch_embedding.2': 'patch_embed.proj',
    'to_patch_embedding.3': 'patch_embed.norm',
    'question_to_embedding.0': 'question_embed.0',
    'question_to_embedding.1': 'question_embed.1',
    'question_to_embedding.2': 'question_embed.2',
    'mlp_head.0': 'fc_norm',
    'mlp_head.1': 'head',
}
AUTHORS_BLOCK_KEYS = {
    '0.norm': 'norm1',
    '0.fn.to_qkv': 'attn.qkv',
    '0.fn.to_out.0': 'attn.proj',
    '1.norm': 'norm2',
    '1.fn.fc1': 'mlp.fc1',
    '1.fn.fc2': 'mlp.fc2',
    '1.fn.fc3': 'mlp.linear_transform',
    '1.fn.norm': 'mlp.norm',
    '1.fn.memoryupdate.mha.w_qs': 'mlp.query',
    '1.fn.memoryupdate.mha.w_ks': 'mlp.key',
    '1.fn.memoryupdate.mha.w_vs': 'mlp.value',
    '1.fn.memoryupdate.mha.fc': 'mlp.proj',
    '1.fn.memoryupdate.mha.layer_norm': 'mlp.write_norm',
}
# Parameters that the authors' forward never reads, and their decay, which is an argument here.
AUTHORS_UNUSED = re.compile(
    r'cls_token|pos_embedding|to_patch_embedding_cnn\.0\.(weight|bias)|transformer\.layers\.\d+\.1\.fn\.memoryupdate\.beta'
)
# What a workspace has and a ViT has not: keeps the model's own values.
WORKSPACE_KEYS = re.compile(
    r'blocks\.\d+\.mlp\.((norm|write_norm|linear_transform)\.(weight|bias)|(query|key|value|proj)\.weight|memory|scale)'
)


def checkpoint_filter_fn(state_dict: StateDict, model: 'AssociativeTransformer') -> StateDict:
    """Bring a checkpoint into the names and shapes of ``model``: our own, the authors' or that of a timm ViT.

    A ViT's checkpoint lacks the workspace, which keeps the model's own values. A position embedding is resampled to
    the model's image size.

    Raises:
        ValueError: For keys that the model does not have, or lacks, and for shapes that differ (but for a classifier).
    """
    own = model.state_dict()
    state_dict = _fit_stem(_own_names(state_dict, model), model)
    _check_keys(state_dict, own)
    _check_shapes(state_dict, own)
    return state_dict


def fit_pretrained(
    state_dict: StateDict, model: 'AssociativeTransformer', source: str = '', replace_head: bool = False
) -> StateDict:
    """:func:`checkpoint_filter_fn` for timm's loading, which drops a classifier without a word where classes differ.

    Args:
        state_dict: What the file holds.
        model: The model, with its ``pretrained_cfg``.
        source: Names the file in errors.
        replace_head: Whether the classifier goes whatever the number of classes, as for features alone.

    Raises:
        ValueError: As :func:`checkpoint_filter_fn`, and for values that are not finite, or a classifier that fits
            neither the config nor what was asked for.
    """
    try:
        promised = model.pretrained_cfg['num_classes']
        replace_head = replace_head or model.num_classes != promised
        state_dict = _own_names(state_dict, model)
        if replace_head:
            state_dict = _without_pooling_norm(state_dict, model)
        state_dict = checkpoint_filter_fn(state_dict, model)
        _check_finite(state_dict)
        _check_head(state_dict, model, promised, replace_head)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    return state_dict


def _own_names(state_dict: StateDict, model: 'AssociativeTransformer') -> StateDict:
    """Any known checkpoint under this package's names."""
    state_dict = state_dict.get('state_dict', state_dict.get('model', state_dict))  # type: ignore[assignment]
    state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if is_authors(state_dict):
        return convert_authors(state_dict, model.patch_embed.patch_size)
    if not any(key.endswith('mlp.memory') for key in state_dict):
        return convert_vit(state_dict, model)
    return state_dict


def is_authors(state_dict: StateDict) -> bool:
    """Whether these are the names of the authors' model."""
    return any(key.startswith('transformer.layers.') for key in state_dict)


def convert_authors(state_dict: StateDict, patch_size: tuple[int, int]) -> StateDict:
    """Rename a checkpoint of the authors' code, undo its pixel order and the interleaved heads before ``W_O``.

    Raises:
        ValueError: For a key that their model does not have.
    """
    converted = {}
    for key, value in state_dict.items():
        if AUTHORS_UNUSED.fullmatch(key):
            continue
        new_key = _authors_key(key)
        if new_key in ('patch_embed.patch_norm.weight', 'patch_embed.patch_norm.bias', 'patch_embed.proj.weight'):
            value = _channels_first(value, patch_size)
        elif new_key.endswith('mlp.proj.weight'):
            value = value.unflatten(1, (value.shape[0], -1)).transpose(1, 2).flatten(1)  # (D, D*S) -> (D, S*D)
        converted[new_key] = value
    return converted


def _authors_key(key: str) -> str:
    block = re.fullmatch(r'transformer\.layers\.(\d+)\.(.+)', key)
    if block and block[2] == '1.fn.memoryupdate.memory':
        return f'blocks.{block[1]}.mlp.memory'
    stem, _, leaf = (block[2] if block else key).rpartition('.')
    table = AUTHORS_BLOCK_KEYS if block else AUTHORS_KEYS
    if stem not in table:
        raise ValueError(f"the authors' model has no parameter {key!r}; is this a checkpoint of their AiT?")
    return f'blocks.{block[1]}.{table[stem]}.{leaf}' if block else f'{table[stem]}.{leaf}'


def _channels_first(value: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Pixels of a patch from the authors' order to that of a convolution: (..., P*P*C) -> (..., C, P, P)."""
    pixels = value.unflatten(-1, (*patch_size, -1)).movedim(-1, -3)  # (..., P*P*C) -> (..., C, P, P)
    return pixels.flatten() if value.ndim == 1 else pixels.contiguous()


def convert_vit(state_dict: StateDict, model: 'AssociativeTransformer') -> StateDict:
    """Add to the checkpoint of a ViT what a workspace needs beside it, with the model's own values.

    A model that keeps the ViT's own path (``retrieval_scale``) may have fewer blocks, see :func:`choose_layers`.
    """
    blocks = {int(key.split('.')[1]) for key in state_dict if key.startswith('blocks.')}
    if model.blocks[0].mlp.retrieval_scale is not None and len(blocks) > len(model.blocks):
        place = {layer: i for i, layer in enumerate(choose_layers(len(blocks), len(model.blocks)))}
        state_dict = {_moved(key, place): value for key, value in state_dict.items() if _moved(key, place)}
    own = {key: value for key, value in model.state_dict().items() if WORKSPACE_KEYS.fullmatch(key)}
    return {**own, **state_dict}


def choose_layers(available: int, depth: int) -> list[int]:
    """Which blocks of a deeper ViT a shallower model starts from: evenly spread, the first and the last among them.

    Out of 12 these are 0, 2, 4, 7, 9, 11 for depth 6, and 0, 11 for depth 2. The first block was trained to read the
    stem, the last to write for the final norm and the classifier; DistilBERT (arXiv:1910.01108) halves BERT so.
    """
    if depth == 1:
        return [available - 1]
    return [(2 * i * (available - 1) + depth - 1) // (2 * (depth - 1)) for i in range(depth)]  # rounded


def _moved(key: str, place: dict[int, int]) -> str:
    """The name of a parameter after its block has moved, '' where the block is left out."""
    block = re.fullmatch(r'blocks\.(\d+)\.(.+)', key)
    if block is None:
        return key
    return f'blocks.{place[int(block[1])]}.{block[2]}' if int(block[1]) in place else ''


def _fit_stem(state_dict: StateDict, model: 'AssociativeTransformer') -> StateDict:
    """Resample a position embedding to the model's grid, and a norm over the pixels of a patch to its channels."""
    pos_embed = state_dict.get('pos_embed')
    if pos_embed is not None and model.pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = model.patch_embed.grid_size
        count = pos_embed.shape[1] - prefix
        if math.isqrt(count) ** 2 != count:
            raise ValueError(
                f'pos_embed has {count} positions, which is no square that could be resampled to {grid}; '
                'create the model with the img_size of the checkpoint, then call set_input_size'
            )
        pos_embed = resample_abs_pos_embed(pos_embed, new_size=grid, num_prefix_tokens=prefix)
        state_dict = {**state_dict, 'pos_embed': pos_embed}
    pixels = model.patch_embed.patch_size[0] * model.patch_embed.patch_size[1]
    for key in ('patch_embed.patch_norm.weight', 'patch_embed.patch_norm.bias'):
        size = state_dict[key].numel() if key in state_dict else 0
        if size != model.in_chans * pixels and size % pixels == 0 < size:
            per_pixel = state_dict[key].view(-1, pixels).mean(dim=0)  # timm sums or repeats the projection itself
            state_dict = {**state_dict, key: per_pixel.repeat(model.in_chans)}
    return state_dict


def _check_keys(state_dict: StateDict, own: StateDict) -> None:
    unknown = sorted(set(state_dict) - set(own) - {'head.weight', 'head.bias'})
    missing = sorted(set(own) - set(state_dict) - {'head.weight', 'head.bias'})
    if unknown or missing:
        raise ValueError(
            f'the checkpoint does not fit the model: unknown keys {_some(unknown)}, missing keys {_some(missing)}; '
            'create the model that it was made with (depth, global_pool, class_token, slots)'
        )


def _check_shapes(state_dict: StateDict, own: StateDict) -> None:
    for key, value in state_dict.items():
        if key.startswith('head.') or key not in own or value.shape == own[key].shape:
            continue
        if key == 'patch_embed.proj.weight' and value.shape[2:] == own[key].shape[2:] and len(value) == len(own[key]):
            continue  # another number of channels, which timm adapts
        raise ValueError(
            f'{key} has the shape {tuple(value.shape)} in the checkpoint, {tuple(own[key].shape)} in the model; create '
            'the model that it was made with (num_slots, slot_dim, write_heads, embed_dim, patch_size, and img_size '
            "for global_pool='flatten')"
        )


def _check_finite(state_dict: StateDict) -> None:
    bad = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f'NaN or infinite values in {_some(bad)}; take the checkpoint of an earlier epoch')


def _check_head(state_dict: StateDict, model: 'AssociativeTransformer', promised: int, replace_head: bool) -> None:
    """The classifier of the checkpoint is either the model's, or was asked to change."""
    weight, own = state_dict.get('head.weight'), model.state_dict().get('head.weight')
    if not replace_head and own is not None and (weight is None or weight.shape != own.shape):
        found = 'no classifier' if weight is None else f'a classifier of shape {tuple(weight.shape)}'
        raise ValueError(
            f'the checkpoint has {found}, the model one of {tuple(own.shape)} for the {promised} classes of its '
            'config; name those of the checkpoint with pretrained_cfg_overlay=dict(num_classes=...), and those that '
            'you want with num_classes='
        )
    if replace_head and weight is not None and promised >= 0 and len(weight) == model.num_classes != promised:
        raise ValueError(
            f'the checkpoint has {len(weight)} classes as the model has, its config says {promised}, so the classifier '
            f'would be lost; pass pretrained_cfg_overlay=dict(num_classes={len(weight)}) to keep it, -1 to drop it'
        )


def _without_pooling_norm(state_dict: StateDict, model: 'AssociativeTransformer') -> StateDict:
    """The norm before a classifier that is replaced goes with it where it does not fit."""
    own = model.state_dict()
    norm = {key: value for key, value in own.items() if key.startswith('fc_norm.')}
    kept = {key: value for key, value in state_dict.items() if not (key.startswith('fc_norm.') and key not in own)}
    return {**kept, **{key: value for key, value in norm.items() if kept.get(key, value).shape != value.shape}}


def _some(keys: list[str]) -> str:
    return ', '.join(keys[:5]) + (f' and {len(keys) - 5} more' if len(keys) > 5 else '') if keys else 'none'


class Checkpoint(NamedTuple):
    """What a training run has left.

    Attributes:
        state_dict: The weights.
        args: Arguments of train.py; empty where the file holds weights alone.
        is_ema: Whether the weights are the averaged ones.
        facts: Epoch and validation metric, where they are known.
    """

    state_dict: dict[str, Tensor]
    args: dict[str, Any]
    is_ema: bool
    facts: dict[str, Any]


def read_checkpoint(path: Path, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint without running any code in it; averaged weights come first where there are any.

    Raises:
        ValueError: For a file that is missing, no checkpoint, or more than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f'there is no checkpoint {path}; train.py writes output/<experiment>/model_best.pth.tar')
    if path.suffix == '.safetensors':
        return Checkpoint(safetensors.torch.load_file(path), {}, False, {})
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f'{path} is no checkpoint of tensors and plain values, and is not opened: {error}') from error
    is_ema = use_ema and 'state_dict_ema' in content
    state_dict = content.get('state_dict_ema' if is_ema else 'state_dict', content.get('model', content))
    facts = {'epoch': content.get('epoch'), content.get('metric_name', 'metric'): content.get('metric')}
    facts = {key: value for key, value in facts.items() if isinstance(value, (int, float))}
    return Checkpoint(clean_state_dict(state_dict), vars(content.get('args', argparse.Namespace())), is_ema, facts)
