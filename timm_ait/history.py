"""Follow the memories of a model over the checkpoints of a training: how far they move, and what they do."""

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import find_checkpoints, label_of, load_checkpoint, read_checkpoint
from .inspection import inspect

__all__ = [
    'Drift',
    'follow_training',
    'measure_drift',
    'read_memories',
    'write_csv',
]


@dataclass
class Drift:
    """How far the slots of L blocks move over T checkpoints, as 1 - cosine: 0 unmoved, 1 at right angles, 2 opposite.

    Attributes:
        labels: Name of each checkpoint.
        since_first: (T, L, M) distance of each slot from the same slot in the first checkpoint.
        since_last: (T, L, M) the same from the checkpoint before; 0 in the first.
    """

    labels: list[str]
    since_first: Tensor
    since_last: Tensor


def measure_drift(labels: Sequence[str], memories: Sequence[Tensor]) -> Drift:
    """Compare the memories of several checkpoints.

    Args:
        labels: Their names.
        memories: Of each checkpoint (L, M, D), as :func:`read_memories` gives them.

    Raises:
        ValueError: If there are fewer than two, or if they are not of one shape.
    """
    shapes = [tuple(memory.shape) for memory in memories]
    if len(shapes) < 2 or len(set(shapes)) > 1:
        raise ValueError(
            f'drift needs at least two checkpoints of one model, got memories (L, M, D) of shapes {shapes}'
        )
    slots = F.normalize(torch.stack(list(memories)).double(), dim=-1)  # (T, L, M, D)
    before = torch.cat([slots[:1], slots[:-1]])
    return Drift(list(labels), 1 - (slots * slots[:1]).sum(dim=-1), 1 - (slots * before).sum(dim=-1))


def read_memories(path: Path) -> Tensor:
    """The memories (L, M, D) of all blocks in a checkpoint.

    Raises:
        ValueError: If the file is no checkpoint, or holds no memory.
    """
    weights = read_checkpoint(path).state_dict
    names = [key for key in weights if key.split('.')[-1] == 'memory']
    # by number: a safetensors file has block 10 before block 2
    names.sort(key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', key)])
    memories = [weights[name] for name in names]
    if not memories:
        raise ValueError(f'{path} holds no memory; give checkpoints of an Associative Transformer')
    return torch.stack(memories)


def follow_training(run: Path, images: Tensor) -> list[dict[str, Any]]:
    """What the memories did in a training, by epoch and block.

    Args:
        run: Output folder of train.py, with summary.csv and checkpoints.
        images: (B, C, H, W), normalised; the same for all checkpoints.

    Returns:
        A row for each block of each epoch: what summary.csv says of the epoch (``epoch``, ``train_loss``,
        ``eval_top1``), then the fields of :class:`timm_ait.BlockReport`, ``balance_loss`` and ``tokens_read``. An epoch
        whose checkpoint train.py has not kept has one row, without block.

    Raises:
        ValueError: If there is no summary.csv or no checkpoint.
    """
    checkpoints = {int(label_of(path)): path for path in find_checkpoints(run)}
    summary = run / 'summary.csv'
    if not summary.is_file():
        raise ValueError(f'{run} holds no summary.csv, which train.py writes after each epoch')
    with summary.open(newline='') as file:  # a training that was resumed has written its heading twice
        epochs = {int(row['epoch']): row for row in csv.DictReader(file) if row['epoch'].isdigit()}
    rows: list[dict[str, Any]] = []
    for epoch in sorted(epochs.keys() | checkpoints.keys()):
        known = {name: float(epochs.get(epoch, {}).get(name) or 'nan') for name in ('train_loss', 'eval_top1')}
        blocks = inspect(load_checkpoint(checkpoints[epoch]), images) if epoch in checkpoints else []
        numbers = [{**asdict(x.report), 'balance_loss': x.balance_loss, 'tokens_read': x.tokens_read} for x in blocks]
        rows += [{'epoch': epoch, **known, **each} for each in numbers or [{}]]
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of :func:`follow_training`."""
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)
