"""Resample positions and patches of a checkpoint to the image size, patch size and channels of a model."""

import math

from timm.layers import HybridEmbed, resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .stems import NormalizedPatchEmbed

__all__ = ['fit_stem', 'saved_grid']

StateDict = dict[str, Tensor]


def fit_stem(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Fit positions, patches and the norm over their pixels to ``model``. timm itself adapts the channels of patches.

    Raises:
        ValueError: If the positions are no grid that can be resampled.
    """
    return _fit_channels(_fit_patches(_fit_positions(state_dict, model), model), model)


def _fit_positions(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Resample the position embedding to the grid of the model."""
    pos_embed = state_dict.get('pos_embed')
    if pos_embed is None or model.pos_embed is None:
        return state_dict
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    count = pos_embed.shape[1] - prefix
    saved = saved_grid(model, count, state_dict.get('patch_embed.proj.weight'))
    if count == math.prod(grid) and saved in (None, grid):
        return state_dict
    if saved is None and not _is_square(count):
        raise ValueError(_odd_positions(state_dict, model, prefix))
    resampled = resample_abs_pos_embed(pos_embed, new_size=grid, old_size=saved, num_prefix_tokens=prefix)
    return {**state_dict, 'pos_embed': resampled}


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


def _odd_positions(state_dict: StateDict, model: VisionTransformer, prefix: int) -> str:
    """What is wrong with positions that are no square grid behind those of ``prefix`` tokens, and what to do."""
    total = state_dict['pos_embed'].shape[1]
    if _is_square(total):
        return (
            f'pos_embed has {total} positions, of patches alone, but the model has {prefix} more tokens; create the '
            'model with the class_token and reg_tokens of the checkpoint, or with no_embed_class=True'
        )
    given = sum(state_dict[key].shape[1] for key in ('cls_token', 'reg_token') if key in state_dict)
    own = sum(token.shape[1] for token in (model.cls_token, model.reg_token) if token is not None)
    if given != own:
        return (
            f'the checkpoint has {given} class and register tokens, and the model has {own}; create the model with the '
            'class_token and reg_tokens of the checkpoint'
        )
    if model.no_embed_class and _is_square(total - given):
        return (
            f'pos_embed has {total} positions, also of the {given} class and register tokens; create the model with '
            'no_embed_class=False'
        )
    return (
        f'pos_embed has {total - prefix} positions. Only a square grid can be resampled to '
        f'{model.patch_embed.grid_size}; create the model with the img_size of the checkpoint, then call set_input_size'
    )


def saved_grid(model: VisionTransformer, count: int, kernel: Tensor | None = None) -> tuple[int, int] | None:
    """Rows and columns of ``count`` patches in the images of the config; None if the config is of other images.

    ``kernel`` is the projection of the checkpoint, if its patches may have another size.
    """
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    size = size or (getattr(model, 'pretrained_cfg', {}).get('input_size') or ())[1:]
    if not size:
        return None
    stem = model.patch_embed
    saved = stem.patch_size if kernel is None or kernel.ndim != 4 else kernel.shape[2:]
    sizes = zip(to_2tuple(size), stem.grid_size, stem.patch_size, stem.img_size, saved, strict=True)
    rows, columns = (pixels * patches * own // (image * given) for pixels, patches, own, image, given in sizes)
    return (rows, columns) if rows * columns == count else None


def _fit_patches(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Resample the projection to the patch size of the model, as timm does, if it reads plain patches."""
    kernel, size = state_dict.get('patch_embed.proj.weight'), model.patch_embed.proj.weight.shape[2:]
    is_plain = not isinstance(model.patch_embed, (HybridEmbed, NormalizedPatchEmbed))
    if kernel is None or not is_plain or kernel.ndim != 4 or kernel.shape[2:] == size:
        return state_dict
    return {**state_dict, 'patch_embed.proj.weight': resample_patch_embed(kernel, size)}


def _fit_channels(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Average the norm over the pixels of a patch if the model has another number of channels.

    timm adapts the projection behind it by itself.
    """
    pixels = model.patch_embed.patch_size[0] * model.patch_embed.patch_size[1]
    for key in ('patch_embed.patch_norm.weight', 'patch_embed.patch_norm.bias'):
        size = state_dict[key].numel() if key in state_dict else 0
        if size != model.in_chans * pixels and size % pixels == 0 < size:
            per_pixel = state_dict[key].view(-1, pixels).mean(dim=0)  # (C*P*P,) -> (P*P,)
            state_dict = {**state_dict, key: per_pixel.repeat(model.in_chans)}
    return state_dict
