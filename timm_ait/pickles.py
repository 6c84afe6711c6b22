"""Read a file that torch.save has written, of tensors and plain values alone, or say in a sentence what else it is."""

import argparse
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pretrained import WeightsError, damage_of_pickle

__all__ = ['explained', 'read_pickle']


def read_pickle(path: Path, use_ema: bool = True) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Read a state dict, or a checkpoint that holds one. No code in it is run.

    Args:
        path: The file.
        use_ema: Take the averaged weights if there are any.

    Returns:
        All that the file holds, the weights in it, and whether it holds averaged weights.

    Raises:
        ValueError: If the file is not whole, or holds other things than tensors and plain values.
    """
    if reason := damage_of_pickle(path):
        raise ValueError(f'{path} {reason}: download or copy it again')
    content: Any
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of many kinds: whatever the file holds is taken for a pickle
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        if isinstance(error, OSError):
            raise ValueError(f'{path} breaks off ({error}); was it written whole?') from error
        held = re.search(r'GLOBAL (\S+)', str(error))  # the rest is advice to read it all the same
        raise ValueError(
            f'{path} is no checkpoint of tensors and plain values, so it is not read; save the weights alone'
            + (f' (it holds {held[1]})' if held else '')
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f'expected a state dict or a checkpoint of train.py in {path}, got {type(content).__name__}')
    averaged = next((content[key] for key in ('state_dict_ema', 'model_ema') if content.get(key) is not None), None)
    state_dict: Any = content.get('state_dict', content.get('model', content))
    if use_ema and averaged is not None:
        state_dict = averaged
    named = state_dict.items() if isinstance(state_dict, dict) else [('the weights', state_dict)]
    other = [(key, value) for key, value in named if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise ValueError(
            f'expected tensors by their names in {path}, got {type(other[0][1]).__name__} at {other[0][0]!r}; save the '
            'state_dict() of the model'
        )
    return content, state_dict, averaged is not None


@contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """Where timm cannot read a pickle, read it once more to say why.

    Raises:
        WeightsError: With the file, what it holds and what to do.
    """
    try:
        yield
    except ValueError:  # the file was read, and does not fit
        raise
    except Exception:  # of many kinds, as in read_pickle
        if path is not None and path.suffix not in ('.safetensors', '.npz'):
            try:
                read_pickle(path)
            except ValueError as error:
                raise WeightsError(str(error)) from error
        raise
