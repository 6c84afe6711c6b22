"""Runs of several models over seeds: one after the other until the time is over, sizes, and means with intervals."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from loop import DivergedError, OutOfTimeError
from scipy.stats import t  # comes with scikit-learn
from torch import nn


def run_each(todo: Iterable[tuple[str, int]], run: Callable[[str, int], float]) -> None:
    """Run each of these names with its seed, and print its accuracy; stop where ``run`` is out of time.

    Raises:
        ValueError: After the other runs, if some of them had a loss that is not finite.
    """
    diverged: list[str] = []
    for name, seed in todo:
        try:
            top1 = run(name, seed)
        except DivergedError as error:
            diverged.append(f'{name}, seed {seed}: {error}')
            print(diverged[-1], flush=True)
            continue
        except OutOfTimeError as error:
            print(f'{name}, seed {seed}: {error}; the same command goes on from there')
            return
        print(f'{name}, seed {seed}: {top1:.2f} %', flush=True)
    if diverged:
        raise ValueError('; '.join(diverged))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def top1_of(seeds: dict[int, Any]) -> dict[int, float]:
    """Test accuracies in percent, by seed."""
    return {seed: record['top1'] for seed, record in seeds.items()}


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def gains(top1: dict[int, float], control: dict[int, float]) -> list[float]:
    """Differences over the seeds that both have."""
    return [value - control[seed] for seed, value in top1.items() if seed in control]


def format_mean(values: list[float], sign: str = '') -> str:
    """Their mean with half of its 95 % interval, and with '+' as ``sign`` always with one; '' if there is none."""
    half = f' ± {interval(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.2f}{half}' if values else ''


def draw_rows(axes: Any, rows: dict[str, list[float]]) -> None:
    """Draw each value as a point, and the mean of each row with its interval; the first row on top."""
    for y, values in enumerate(rows.values()):
        axes.plot(values, [y] * len(values), 'o', color='tab:gray', alpha=0.6)
        if values:
            half = interval(values) if len(values) > 1 else None
            axes.errorbar(statistics.mean(values), y, xerr=half, fmt='s', color='tab:blue', capsize=4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
