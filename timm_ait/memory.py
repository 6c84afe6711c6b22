"""The memory in a file of its own, for weights that are saved without it.

An adapter, LoRA's for example, saves the parameters that it trains, and no buffers. But a memory moves in training even
where the parameters beside it are frozen.
"""

import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .workspace import GlobalWorkspace

__all__ = ['load_memory', 'save_memory']

# Names that wrappers add to the path of a module: peft, DistributedDataParallel, torch.compile, checkpointing, FSDP.
WRAPPERS = frozenset(
    'base_model model module base_layer _orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module'.split()
)


def save_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save the memories of all workspaces in ``model``, and nothing else.

    Args:
        model: An Associative Transformer, or any module that contains one. Where there are several ranks, call this on
            one of them: all hold the same memory.
        path: The new safetensors file. It holds (M, D) under the name of each memory in the unwrapped model, such as
            ``blocks.0.mlp.memory``.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If ``model`` has no workspace, or no values.
    """
    memories = _memories(model)
    for name, memory in memories.items():
        if memory.is_meta:
            raise ValueError(f'{name} is on the meta device and holds nothing; load the model before you save it')
    copies = {name: memory.detach().cpu() for name, memory in memories.items()}
    copies = {name: memory.clone(memory_format=torch.contiguous_format) for name, memory in copies.items()}
    try:
        save_file(copies, path, metadata={'format': 'pt'})
    except SafetensorError as error:
        raise OSError(f'{path} cannot be written ({error})') from error


def load_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_memory` has saved, from the same model or from one that is wrapped as a whole.

    A memory is found by the end of its name, so a layer or a block that is wrapped has another one. Each one in the
    file must fit one of the model, and the other way round.

    Args:
        model: An Associative Transformer, or any module that contains one. Nothing changes if there is an error.
        path: The safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds something else, values that are not finite, or names and shapes that do not fit.
    """
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f'{path} is no safetensors file ({error}); expected one that save_memory has written'
        ) from error
    memories = _memories(model)
    names = {name: _find(name, saved) for name in memories}
    claimed = list(names.values())
    missing = [name for name, found in names.items() if found is None or claimed.count(found) > 1]
    unknown = sorted(saved.keys() - set(names.values()))
    if missing or unknown:
        raise ValueError(
            f'{path} must hold the memories of this model: missing or ambiguous are {missing or "none"}, unknown are '
            f'{unknown or "none"}; create the model as it was when its memory was saved'
        )
    for name, found in names.items():
        old, new = memories[name], saved[str(found)]
        if old.is_meta:
            raise ValueError(
                f'{name} is on the meta device, where nothing can be loaded; use model.to_empty(device=...) first'
            )
        if not new.isfinite().all():
            raise ValueError(f'{name} has NaN or infinite values in {path}; take the memory of an earlier epoch')
        if old.shape != new.shape:
            sizes = f'num_slots={new.shape[0]} and slot_dim={new.shape[1]}' if new.ndim == 2 else 'other sizes'
            raise ValueError(
                f'{name} has shape {tuple(old.shape)}, but in {path} it has shape {tuple(new.shape)}; create the model '
                f'with {sizes}'
            )
    with torch.no_grad():
        for name, found in names.items():
            memories[name].copy_(saved[str(found)])


def _memories(model: nn.Module) -> dict[str, Tensor]:
    """The memories (M, D) of all workspaces in ``model``, by their names without those of wrappers."""
    memories = {}
    for path, module in model.named_modules():
        parts = path.split('.')
        if isinstance(module, GlobalWorkspace) and 'original_module' not in parts:  # peft's, beside the one in use
            if 'modules_to_save' in parts:  # peft: followed by the name of an adapter
                i = parts.index('modules_to_save')
                del parts[i : i + 2]
            name = '.'.join([*(part for part in parts if part and part not in WRAPPERS), 'memory'])
            if name in memories:
                raise ValueError(f'two memories are named {name}; pass one of the models that contain them')
            memories[name] = module.memory
    if not memories:
        raise ValueError(f'expected a model with workspaces, got {type(model).__name__} without; pass an AiT')
    return memories


def _find(name: str, saved: dict[str, Tensor]) -> str | None:
    """The one name in ``saved`` that is ``name``, or else ends with it or is its end; None if there is not one."""
    if name in saved:
        return name
    fitting = [x for x in saved if f'.{x}'.endswith(f'.{name}') or f'.{name}'.endswith(f'.{x}')]
    return fitting[0] if len(fitting) == 1 else None
