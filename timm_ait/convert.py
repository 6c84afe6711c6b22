"""Convert checkpoints of the authors' AiT and of timm's ViT to the names and shapes of this package.

Every key of such a checkpoint is renamed, or left out for a reason that stands here. Any other key is an error.
"""

import math
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

from timm.models import clean_state_dict, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .resample import fit_stem, saved_grid

__all__ = [
    'check_npz',
    'checkpoint_filter_fn',
    'choose_layers',
    'convert_authors',
    'convert_vit',
    'fit_pretrained',
    'is_authors',
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
# Left out: parameters that the authors' forward pass never reads, and the decay of their memory, which is an argument
# here and no parameter.
AUTHORS_UNUSED = re.compile(
    r'cls_token|pos_embedding|to_patch_embedding_cnn\.0\.(weight|bias)|transformer\.layers\.\d+\.1\.fn\.memoryupdate\.beta'
)
# The arguments of a model that decide whether it has a parameter.
DECIDED_BY = {
    r'\.mlp\.scale$': 'write_rule, retrieval_scale',
    r'\.attn\.qkv\.bias$': 'qkv_bias',
    r'\.ls[12]\.': 'init_values',
    r'\.(attn\.(proj|qkv\.weight)|norm1\.)': 'attention',
    r'^pos_embed$': 'pos_embed',
    r'^(cls|reg)_token$': 'class_token, reg_tokens',
    r'^(norm|fc_norm)\.': 'global_pool, fc_norm, final_norm',
    r'^question_embed\.': 'question_dim',
    r'^attn_pool\.': "global_pool='map' or 'prr'",
}
# The parameters of a workspace that a ViT does not have. Both have fc1 and fc2.
WORKSPACE_KEYS = re.compile(r'blocks\.\d+\.mlp\.(?!fc[12]\.).+')


def checkpoint_filter_fn(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Convert a checkpoint to the names and shapes of ``model``.

    It may come from this package, from the authors' code or from timm's ViT. A ViT has no workspace: ``model`` then
    keeps the values that its workspaces have now. Positions and patches are resampled to the sizes of ``model``.

    Raises:
        ValueError: If a key is unknown or missing, or if a shape differs. The classifier may differ or be missing.
    """
    return _fit(_rename(state_dict, model), model)


def fit_pretrained(
    state_dict: StateDict,
    model: VisionTransformer,
    source: str,
    replace_head: bool = False,
    strict: bool = True,
) -> StateDict:
    """Convert a checkpoint as :func:`checkpoint_filter_fn` does, and check its values and its classifier.

    timm drops a classifier without a message if its number of classes differs from the config. Here it is an error,
    unless the user asked for another classifier.

    Args:
        state_dict: Content of the file.
        model: The model, with its ``pretrained_cfg``.
        source: Name of the file, for error messages.
        replace_head: Drop the classifier even if its number of classes fits, as for ``features_only``.
        strict: Whether the checkpoint must have all keys of the model and no others but the classifier's.

    Raises:
        ValueError: As :func:`checkpoint_filter_fn`. Also if a value is not finite, or if the classifier fits neither
            the config nor the number of classes that the user asked for.
    """
    try:
        config_classes = model.pretrained_cfg['num_classes']
        replace_head = replace_head or model.num_classes != config_classes
        state_dict = _rename(state_dict, model)
        if replace_head:
            state_dict = _replace_pooling(state_dict, model)
        state_dict = _fit(state_dict, model, strict)
        _check_finite(state_dict)
        _check_head(state_dict, model, config_classes, replace_head)
        if not replace_head:
            _check_flattened(state_dict, model)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    return state_dict


def _rename(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Unpack a checkpoint and rename its keys to those of this package."""
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict.get('model', state_dict)))
    state_dict.pop('n_averaged', None)  # how many models torch's AveragedModel holds
    if is_authors(state_dict):
        return convert_authors(state_dict, model.patch_embed.patch_size)
    is_own = any(re.search(r'\.mlp\.(memory$|linear_transform\.)', key) for key in state_dict)
    return state_dict if is_own else convert_vit(state_dict, model)


def _fit(state_dict: StateDict, model: VisionTransformer, strict: bool = True) -> StateDict:
    """Resample the stem of a renamed checkpoint, then check all keys, if ``strict``, and shapes."""
    own = model.state_dict()
    state_dict = fit_stem(state_dict, model)
    if strict:
        _check_keys(state_dict, own)
    first_conv = getattr(model, 'pretrained_cfg', {}).get('first_conv', 'patch_embed.proj')
    _check_shapes(state_dict, own, f'{first_conv}.weight')
    return state_dict


def is_authors(state_dict: StateDict) -> bool:
    """Tell whether the keys are those of the authors' model."""
    return any(key.startswith('transformer.layers.') for key in state_dict)


def convert_authors(state_dict: StateDict, patch_size: tuple[int, int]) -> StateDict:
    """Convert a checkpoint of the authors' code.

    Beside the names, two layouts differ. Their patches have the pixel order (P, P, C), ours (C, P, P). The input of
    their ``W_O`` has the order (D, S) of slot width and heads, ours (S, D).

    Args:
        state_dict: Keys and values as in the authors' file.
        patch_size: Height and width P of a patch, in pixels.

    Raises:
        ValueError: If the authors' model has no such key.
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
    """Reorder the pixels of a patch: (..., P*P*C) -> (..., C, P, P), or (C*P*P,) for a norm over one patch."""
    if value.shape[-1] % math.prod(patch_size):
        raise ValueError(
            f'the checkpoint has patches of {value.shape[-1]} numbers, no multiple of {tuple(patch_size)} pixels; '
            'create the model with the patch_size of the checkpoint'
        )
    pixels = value.unflatten(-1, (*patch_size, -1)).movedim(-1, -3)  # (..., P*P*C) -> (..., C, P, P)
    return pixels.flatten() if value.ndim == 1 else pixels.contiguous()


def convert_vit(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Add the workspace parameters of ``model``, which a ViT does not have, to the checkpoint of a ViT.

    A model with ``retrieval_scale`` may have fewer blocks than the ViT, see :func:`choose_layers`.
    """
    state_dict = {
        key.replace('.mlp.norm.', '.mlp.hidden_norm.'): value for key, value in _timm_names(state_dict, model).items()
    }
    blocks = {int(key.split('.')[1]) for key in state_dict if key.startswith('blocks.')}
    if model.blocks[0].mlp.retrieval_scale is not None and len(blocks) > len(model.blocks):
        place = {layer: i for i, layer in enumerate(choose_layers(len(blocks), len(model.blocks)))}
        moved = {_move(key, place): value for key, value in state_dict.items()}
        state_dict = {key: value for key, value in moved.items() if key}
    own = {key: value for key, value in model.state_dict().items() if WORKSPACE_KEYS.fullmatch(key)}
    return {**own, **state_dict}


def _timm_names(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Rename what timm renames for its ViT, for instance in files of DINOv2. Positions and patches stay as they are."""
    kernels = (
        value for key, value in state_dict.items() if key.endswith('patch_embed.proj.weight') and value.ndim == 4
    )
    proj = SimpleNamespace(weight=next(kernels, model.patch_embed.proj.weight))
    like = SimpleNamespace(patch_embed=SimpleNamespace(proj=proj), pos_embed=None, head=model.head)
    return dict(vision_transformer.checkpoint_filter_fn(dict(state_dict), like))


def choose_layers(available: int, depth: int) -> list[int]:
    """Choose the blocks of a deeper ViT that a shallower model starts from.

    They are evenly spread, with the first and the last among them. Out of 12 blocks these are 0, 2, 4, 7, 9, 11 for
    depth 6, and 0, 11 for depth 2. The first block was trained to read the stem, and the last one to serve the final
    norm and the classifier. DistilBERT (arXiv:1910.01108) starts from BERT in a similar way.
    """
    if depth == 1:
        return [available - 1]
    # i * (available - 1) / (depth - 1), rounded to the nearest integer
    return [(2 * i * (available - 1) + depth - 1) // (2 * (depth - 1)) for i in range(depth)]


def check_npz(path: Path, depth: int) -> None:
    """Refuse Google's file of a ViT for a model of another depth: timm would take the first blocks of it.

    Raises:
        ValueError: If the numbers of blocks differ.
    """
    with zipfile.ZipFile(path) as file:
        blocks = {found[1] for name in file.namelist() if (found := re.search(r'encoderblock_(\d+)/', name))}
    if len(blocks) not in (0, depth):
        raise ValueError(
            f'expected a ViT of {depth} blocks in {path}, got {len(blocks)}; load it into a ViT of timm, save the '
            "state_dict() of that, and give its file with pretrained_cfg_overlay=dict(file='PATH')"
        )


def _move(key: str, place: dict[int, int]) -> str:
    """Rename a parameter to the new place of its block; '' if the block is left out."""
    block = re.fullmatch(r'blocks\.(\d+)\.(.+)', key)
    if block is None:
        return key
    return f'blocks.{place[int(block[1])]}.{block[2]}' if int(block[1]) in place else ''


def _check_keys(state_dict: StateDict, own: StateDict) -> None:
    unknown = sorted(set(state_dict) - set(own) - {'head.weight', 'head.bias'})
    missing = sorted(set(own) - set(state_dict) - {'head.weight', 'head.bias'})
    if unknown or missing:
        raise ValueError(
            f'the checkpoint does not fit the model: unknown keys {_some(unknown)}, missing keys {_some(missing)}; '
            f'{_remedy(unknown, missing)}'
        )


def _remedy(unknown: list[str], missing: list[str]) -> str:
    """What to do about keys that a checkpoint has and a model has not, or the other way round."""
    keys, first = unknown + missing, 'blocks.0.mlp.fc1.weight'
    if all(key.startswith('fc_norm.') for key in keys):
        return (
            'create the model with the pooling of the checkpoint, then change it with reset_classifier(num_classes, '
            'global_pool); or drop its classifier: num_classes=N and pretrained_cfg_overlay=dict(num_classes=-1)'
        )
    if all(key.endswith('.mlp.memory') for key in keys):
        return 'the memory is a buffer: save the state_dict() of the model, and not its parameters alone'
    if all('.aux_bn.' in key for key in keys):
        return "it was trained with --split-bn: run timm's clean_checkpoint.py --clean-aux-bn on it"
    if prefixes := [key.removesuffix(first) for key in unknown if key.endswith(f'.{first}')]:
        return f'take {" or ".join(map(repr, prefixes))} off the names of its parameters, and leave out all others'
    if any('.mlp.lift.' in key for key in unknown):
        return 'it is of version 0.1: rename lift to linear_transform in the names of its parameters'
    if unknown and first in missing and not any('.' in key for key in unknown):
        return 'save the state_dict() of the model alone'
    if first in keys:
        return 'give the checkpoint of an AiT or of a ViT'
    if any(key.endswith('.attractors') for key in keys):
        return 'a model that was reparameterised has lost its memory; save it before reparameterize_model'
    if any(re.fullmatch(r'blocks\.\d+\.mlp\.fc1\.weight', key) for key in keys):
        return 'create the model with the depth of the checkpoint'
    found = ', '.join(name for pattern, name in DECIDED_BY.items() if any(re.search(pattern, key) for key in keys))
    return 'create the model with the arguments of the checkpoint' + (f' ({found})' if found else '')


def _check_shapes(state_dict: StateDict, own: StateDict, first_conv: str) -> None:
    for key, value in state_dict.items():
        if key.startswith('head.') or key not in own or value.shape == own[key].shape:
            continue
        if key == first_conv and value.shape[2:] == own[key].shape[2:] and len(value) == len(own[key]):
            continue  # another number of channels: timm adapts it
        raise ValueError(
            f'{key} has the shape {tuple(value.shape)} in the checkpoint and {tuple(own[key].shape)} in the model; '
            'create the model with the arguments of the checkpoint (num_slots, slot_dim, write_heads, embed_dim, '
            "mlp_ratio, patch_size, reg_tokens, question_dim, and img_size for global_pool='flatten')"
        )


def _check_finite(state_dict: StateDict) -> None:
    bad = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f'NaN or infinite values in {_some(bad)}; use the checkpoint of an earlier epoch')


def _check_head(state_dict: StateDict, model: VisionTransformer, config_classes: int, replace_head: bool) -> None:
    """Check that the classifier of the checkpoint fits the model, unless the user asked for another one."""
    weight, own = state_dict.get('head.weight'), model.state_dict().get('head.weight')
    if not replace_head and own is not None and (weight is None or weight.shape != own.shape):
        found = 'no classifier' if weight is None else f'a classifier of shape {tuple(weight.shape)}'
        raise ValueError(
            f'the checkpoint has {found}. The config has {config_classes} classes, so the model expects the shape '
            f'{tuple(own.shape)}; give the number of classes of the checkpoint with '
            'pretrained_cfg_overlay=dict(num_classes=...), and the number that you want with num_classes='
        )
    if replace_head and weight is not None and len(weight) == model.num_classes != config_classes >= 0:
        raise ValueError(
            f'the checkpoint and the model have {len(weight)} classes, but the config has {config_classes}, so timm '
            f'would drop the classifier; pass pretrained_cfg_overlay=dict(num_classes={len(weight)}) to load it, '
            'or -1 to drop it'
        )


def _check_flattened(state_dict: StateDict, model: VisionTransformer) -> None:
    """Check that a classifier over all tokens finds them in the rows and columns that it was trained with."""
    saved = _other_grid(model)
    if saved and {'head.weight', 'fc_norm.weight'} & state_dict.keys():
        raise ValueError(
            f'the checkpoint reads a grid of {saved} flattened tokens, and the model has '
            f'{model.patch_embed.grid_size}; create the model with the img_size of the checkpoint'
        )


def _other_grid(model: VisionTransformer) -> tuple[int, int] | None:
    """The grid of a checkpoint whose flattened tokens are as many as the model's, in other places; else None."""
    grid = model.patch_embed.grid_size
    saved = saved_grid(model, math.prod(grid))
    return saved if model.global_pool == 'flatten' and saved != grid else None


def _replace_pooling(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Treat pooling and norm before a replaced classifier as a part of it: where they do not fit, take the model's own.

    A model with another pooling has its one norm in another place: the norm of the checkpoint moves there. A pooling
    with parameters starts anew only before a classifier that does, and never as the end of an encoder.
    """
    wanted, given = model.state_dict(), dict(state_dict)
    to, came = ('norm.', 'fc_norm.') if 'norm.weight' in wanted else ('fc_norm.', 'norm.')
    for leaf in ('weight', 'bias'):
        shape = [x[to + leaf].shape if to + leaf in x else None for x in (wanted, given)]
        if came + leaf in given and given[came + leaf].shape == shape[0] != shape[1]:
            given[to + leaf] = given.pop(came + leaf)
    part = ('fc_norm.', 'attn_pool.')
    given = {key: value for key, value in given.items() if key in wanted or not key.startswith(part)}
    new = part if model.num_classes > 0 else part[:1]
    own = {key: value for key, value in wanted.items() if key.startswith(new)}
    fitting = {key for key, value in own.items() if key in given and given[key].shape == value.shape}
    if _other_grid(model):
        fitting -= {'fc_norm.weight', 'fc_norm.bias'}
    return {**given, **{key: value for key, value in own.items() if key not in fitting}}


def _some(keys: list[str]) -> str:
    return ', '.join(keys[:5]) + (f' and {len(keys) - 5} more' if len(keys) > 5 else '') if keys else 'none'
