"""Draw what `inspection.py` and `history.py` find. Only this file needs matplotlib, and only when it draws."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .history import Drift
from .inspection import DEAD, BlockInspection

__all__ = [
    'draw_cosines',
    'draw_drift',
    'draw_energy',
    'draw_positions',
    'draw_reads',
    'draw_retrieval',
    'draw_training',
    'draw_use',
    'require_matplotlib',
]

CELL, GAP = 64, 4  # pixels of an image in a mosaic, and between two
COLUMNS = 16  # of a mosaic
# Title and unit of each number that is drawn over epochs.
NUMBERS = {
    'train_loss': 'train loss',
    'eval_top1': 'top-1 accuracy, %',
    'mean_cosine': 'mean cosine between slots',
    'effective_rank': 'effective rank of the slots',
    'slots_in_use': 'slots in use',
    'varies_over_tokens': 'retrieval varies over tokens, share',
    'balance_loss': 'balance loss',
    'tokens_read': 'tokens that a slot reads',
}


def require_matplotlib() -> None:
    """Raise ImportError where there is none, with the way to get it."""
    if find_spec('matplotlib') is None:
        raise ImportError("the pictures need matplotlib: pip install '.[visualize]' in a checkout of timm_ait")


def _figure(width: float, height: float) -> Any:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained', facecolor='white')


def _panels(titles: Sequence[str], size: tuple[float, float] = (3.0, 2.7)) -> tuple[Any, list[Any]]:
    """A figure with one small diagram for each title."""
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = _figure(max(columns * size[0], 5), rows * size[1])
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure, axes[: len(titles)]


def _of_blocks(blocks: Sequence[BlockInspection]) -> list[str]:
    return [f'block {block.report.block}' for block in blocks]


def draw_cosines(blocks: Sequence[BlockInspection]) -> Any:
    """Cosine between each two slots, one square for each block."""
    figure, axes = _panels(_of_blocks(blocks), size=(3.0, 3.2))
    for axis, block in zip(axes, blocks, strict=True):
        picture = axis.imshow(block.cosines.numpy(), cmap='RdBu_r', vmin=-1, vmax=1)
        _count(axis.xaxis, len(block.use))
        _count(axis.yaxis, len(block.use))
        axis.set(xlabel='slot', ylabel='slot')
    figure.colorbar(picture, ax=axes, label='cosine', shrink=0.7)
    return figure


def _count(axis: Any, length: int) -> None:
    """Whole numbers at an axis, not too many."""
    axis.set_ticks(range(0, length, max(length // 8, 1)))


def draw_use(blocks: Sequence[BlockInspection]) -> Any:
    """Share of the retrieval that each slot gets; dead slots are red, the dashed line is an even share."""
    figure, axes = _panels(_of_blocks(blocks))
    for axis, block in zip(axes, blocks, strict=True):
        even = 100 / len(block.use)
        bars = axis.bar(range(len(block.use)), (100 * block.use).numpy(), color='tab:blue')
        for slot in block.dead():
            bars[slot].set_color('tab:red')
            axis.plot(slot, DEAD * even, 'x', color='tab:red')
        axis.axhline(even, color='black', linestyle='--', linewidth=1)
        _count(axis.xaxis, len(block.use))
        axis.set(xlabel='slot', ylabel='retrieval, %')
    return figure


def draw_energy(blocks: Sequence[BlockInspection]) -> Any:
    """Energy of the tokens over retrieval steps: the mean, and the range of nine tokens out of ten."""
    figure, axes = _panels(_of_blocks(blocks))
    for axis, block in zip(axes, blocks, strict=True):
        energy = block.energy.flatten(0, 1).clamp_min(1e-6).numpy()  # (B*N, K), for the logarithm
        low, high = np.quantile(energy, (0.05, 0.95), axis=0)
        axis.fill_between(range(energy.shape[1]), low, high, color='tab:blue', alpha=0.25)
        axis.plot(energy.mean(axis=0), 'o-', color='tab:blue', markersize=4)
        axis.axvline(block.steps, color='black', linestyle='--', linewidth=1)
        _count(axis.xaxis, energy.shape[1])
        axis.set(yscale='log', xlabel='retrieval step', ylabel='energy')
    return figure


def draw_positions(block: BlockInspection) -> Any:
    """Where in an image each slot of each head reads: gates summed over images, a row for each head."""
    maps = block.on_grid(block.gates.sum(dim=0))  # (S, M, H, W)
    S, M = maps.shape[:2]
    maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return _mosaic([f'head {s}' for s in range(S)], [list(row) for row in maps])


def draw_reads(images: Tensor, block: BlockInspection) -> Any:
    """What each slot reads in each image (B, C, H, W): gates summed over heads. The image is lit where it is read."""
    count = len(images)
    maps = block.on_grid(block.gates[:count].sum(dim=1))  # (B, M, H, W)
    maps = maps / maps.amax(dim=(0, -2, -1), keepdim=True).clamp_min(1e-12)
    light = F.interpolate(maps, (CELL, CELL), mode='nearest').unsqueeze(-1)  # (B, M, CELL, CELL, 1)
    pixels = _pixels(images)
    lit = pixels.unsqueeze(1) * (0.12 + 0.88 * light)  # (B, M, CELL, CELL, 3)
    return _mosaic([f'image {i}' for i in range(count)], [list(row) for row in lit], list(pixels))


def _pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) of any range as pixels of one size in [0, 1]: (B, CELL, CELL, 3)."""
    x = images.detach().float().cpu()
    x = x if x.shape[1] == 3 else x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp_min(1e-12)
    x = F.interpolate(x, (CELL, CELL), mode='bilinear', antialias=True)
    return x.permute(0, 2, 3, 1)  # (B, 3, H, W) -> (B, H, W, 3)


def _mosaic(names: Sequence[str], rows: Sequence[list[Tensor]], first: Sequence[Tensor] = ()) -> Any:
    """Rows of small pictures (H, W) or (H, W, 3) in [0, 1], one for each slot. Long rows go on below.

    Args:
        names: Of the rows.
        rows: Pictures of the slots.
        first: What each row begins with, also where it goes on.
    """
    M, step = len(rows[0]), CELL + GAP
    chunks = [range(i, min(i + COLUMNS, M)) for i in range(0, M, COLUMNS)]
    width = len(chunks[0]) + bool(first)
    figure = _figure(1 + 0.68 * width, len(chunks) * (0.4 + 0.68 * len(rows)))
    for axis, chunk in zip(figure.subplots(len(chunks), 1, squeeze=False).flat, chunks, strict=True):
        canvas = torch.ones(len(rows) * step, width * step, 3)
        for r, row in enumerate(rows):
            for c, picture in enumerate([*first[r : r + 1], *row[chunk.start : chunk.stop]]):
                canvas[r * step : r * step + CELL, c * step : c * step + CELL] = _cell(picture)
        titles = [*(['image'] if first else []), *map(str, chunk)]
        axis.imshow(canvas.numpy())
        axis.set_xticks([c * step + CELL / 2 for c in range(len(titles))], titles)
        axis.set_yticks([r * step + CELL / 2 for r in range(len(rows))], names)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelsize=9)
        axis.spines[:].set_visible(False)
    return figure


def _cell(picture: Tensor) -> Tensor:
    """A map (H, W) in shades of grey, or pixels (CELL, CELL, 3) as they are."""
    if picture.ndim == 3:
        return picture
    return F.interpolate(picture[None, None], (CELL, CELL), mode='nearest')[0, 0].unsqueeze(-1).expand(-1, -1, 3)


def draw_retrieval(images: Tensor, block: BlockInspection) -> Any:
    """The attractor that each token of the images (B, C, H, W) retrieves most, and its weight."""
    count, M = len(images), len(block.use)
    weight, slot = (block.on_grid(x) for x in block.shares[:count].max(dim=-1))  # (B, H, W)
    figure = _figure(1.5 * count + 1.5, 4.8)
    axes = figure.subplots(3, count, squeeze=False)
    pixels, high = _pixels(images).numpy(), float(weight.max())
    for i, (top, middle, bottom) in enumerate(axes.T):
        top.imshow(pixels[i])
        top.set_title(f'image {i}', fontsize=10)
        slots = middle.imshow(slot[i].numpy(), cmap='turbo', vmin=-0.5, vmax=M - 0.5)
        weights = bottom.imshow(weight[i].numpy(), cmap='viridis', vmin=0, vmax=high)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[1:, 0], ('slot', 'weight'), strict=True):
        axis.set_ylabel(name)
    figure.colorbar(slots, ax=axes[:2], ticks=range(0, M, max(M // 8, 1)), label='slot')
    figure.colorbar(weights, ax=axes[2:], label='weight')
    return figure


def draw_drift(drift: Drift) -> Any:
    """Distance of the slots from the first checkpoint and from the one before: the mean, and the range over slots."""
    figure, axes = _panels([f'block {i}' for i in range(drift.since_first.shape[1])])
    steps = range(len(drift.labels))
    for i, axis in enumerate(axes):
        for values, first, name, colour in (
            (drift.since_first[:, i], 0, 'since the first checkpoint', 'tab:blue'),
            (drift.since_last[:, i], 1, 'since the checkpoint before', 'tab:orange'),
        ):
            x, y = steps[first:], values[first:].numpy()
            axis.fill_between(x, y.min(axis=-1), y.max(axis=-1), color=colour, alpha=0.2)
            axis.plot(x, y.mean(axis=-1), 'o-', color=colour, markersize=4, label=name)
        shown = steps[:: max(math.ceil(len(steps) / 6), 1)]
        axis.set_xticks(shown, [drift.labels[t] for t in shown])
        axis.set(xlabel='checkpoint', ylabel='1 - cosine')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure


def draw_training(rows: Sequence[dict[str, Any]]) -> Any:
    """The rows of :func:`timm_ait.history.follow_training` over epochs, a line for each block."""
    figure, axes = _panels(list(NUMBERS.values()))
    blocks = sorted({row['block'] for row in rows if 'block' in row})
    for axis, name in zip(axes, NUMBERS, strict=True):
        if name in ('train_loss', 'eval_top1'):
            of_epoch = {row['epoch']: row[name] for row in rows}
            axis.plot(list(of_epoch), list(of_epoch.values()), 'o-')
        else:
            for block in blocks:
                of_epoch = {row['epoch']: row[name] for row in rows if row.get('block') == block}
                axis.plot(list(of_epoch), list(of_epoch.values()), 'o-', markersize=4, label=f'block {block}')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel('epoch')
    figure.legend(*axes[-1].get_legend_handles_labels(), loc='outside lower center', ncols=6)
    return figure
