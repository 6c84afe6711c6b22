"""Measure two sides of a comparison in one process, one turn of each after the other."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median, quantiles
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer  # waits for CUDA
from torch.utils.flop_counter import FlopCounterMode

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass
class Side:
    """One side of a comparison: a step of a model, and the number of images or tokens that it processes."""

    model: nn.Module
    step: Callable[[], object]
    items: int

    def work(self) -> tuple[float, float]:
        """Count FLOPs of the matrix work, and bytes of memory traffic, for each item."""
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            self.step()
        return counter.get_total_flops() / self.items, traffic.bytes / self.items


class Traffic(TorchDispatchMode):
    """Count the bytes that the operations of a step read and write, without fused operations and without a cache."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result


Sides = tuple[Callable[[], Side], Callable[[], Side]]  # ours and theirs, not yet built


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: Says what is compared.
        unit: Unit of ``ours`` and ``theirs``, which hold the cost of an image or token in each round.
        goal: Limit of the ratio, None if there is none.
        at_least: Whether the ratio is one of throughputs, with a lower limit. Otherwise it is one of costs, with an
            upper limit.
        flops: FLOPs of the matrix work for each item, ours and theirs; empty if no time is measured.
        moved: Bytes of memory traffic for each item, ours and theirs; empty if no time is measured.
    """

    name: str
    unit: str
    goal: float | None
    at_least: bool
    ours: list[float]
    theirs: list[float]
    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    ratios: list[float] = field(init=False)
    ratio: float = field(init=False)
    quartiles: list[float] = field(init=False)
    floor: float | None = field(init=False)
    traffic: float | None = field(init=False)
    per_second: list[float] = field(init=False)

    def __post_init__(self) -> None:
        power = -1 if self.at_least else 1
        self.ratios = [(a / b) ** power for a, b in zip(self.ours, self.theirs, strict=True)]
        self.ratio = median(self.ratios)
        self.quartiles = quantiles(self.ratios, n=4, method='inclusive')[::2] if len(self.ratios) > 1 else []
        self.floor = (self.flops[0] / self.flops[1]) ** power if self.flops else None
        self.traffic = (self.moved[0] / self.moved[1]) ** power if self.moved else None
        self.per_second = [1 / median(self.ours), 1 / median(self.theirs)] if self.flops else []

    def passes(self) -> bool:
        """Tell whether the ratio reaches its goal, if it has one."""
        return self.goal is None or (self.ratio >= self.goal if self.at_least else self.ratio <= self.goal)


def time_sides(
    name: str,
    sides: Sides,
    rounds: int,
    seconds: float,
    threads: int,
    compiled: bool = False,
    goal: float | None = None,
    at_least: bool = False,
) -> Row:
    """Count the work of both sides, then time them in turns. A turn takes about ``seconds``, and at least one step."""
    torch.set_num_threads(threads)
    built = [build() for build in sides]
    work = [side.work() for side in built]
    if compiled:
        torch.compiler.reset()
        for side in built:
            side.model.compile()
    numbers = [_steps_in(seconds, side) for side in built]
    costs: list[list[float]] = [[], []]
    for _ in range(rounds):
        for side, number, cost in zip(built, numbers, costs, strict=True):
            cost.append(_time(side, number) / side.items)
    flops, moved = map(list, zip(*work, strict=True))
    return Row(name, 'seconds', goal, at_least, costs[0], costs[1], flops, moved)


def _steps_in(seconds: float, side: Side) -> int:
    """Warm a side up, then return how many of its steps fill a turn."""
    _time(side, 3)
    return max(1, round(seconds / _time(side, 1)))


def _time(side: Side, number: int) -> float:
    """Return the mean time of a step, in seconds."""
    start = timer()
    for _ in range(number):
        side.step()
    return (timer() - start) / number


def compare_bytes(name: str, sides: Sides, compiled: bool = False, goal: float | None = None) -> Row:
    """Measure the peak memory of both sides. Only one exists at a time, so that no bytes of the other are counted."""
    costs = []
    for build in sides:
        side = build()
        if compiled:
            torch.compiler.reset()
            side.model.compile()
        costs.append([peak_bytes(side) / side.items])
        del side
        release()
    return Row(name, 'bytes', goal, False, costs[0], costs[1])


def peak_bytes(side: Side) -> int:
    """Measure the peak memory of a step in bytes, without what existed before it (weights, state of the optimizer)."""
    side.step()
    if next(side.model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks of memory, as CUDA's allocator does, instead of returning them to the system.

    A block that was returned costs page faults when it is allocated again. They take several percent of a step, and
    depend on the order of the blocks rather than on the work. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def release() -> None:
    """Free the memory that is not in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: list[Row], peak_tflops: float | None = None) -> str:
    """Write the rows as Markdown. Floor and traffic are the ratios of matrix work and of memory traffic alone."""
    lines = ['| | ratio | quartiles | floor | traffic | goal | ours | theirs |', '|---|---|---|---|---|---|---|---|']
    for row in rows:
        quartiles = ' - '.join(f'{q:.3f}' for q in row.quartiles)
        limits = ' | '.join(f'{limit:.3f}' if limit else '' for limit in (row.floor, row.traffic))
        goal = f'{"at least" if row.at_least else "at most"} {row.goal:g}' if row.goal else ''
        sides = [_side(row, i, peak_tflops) for i in (0, 1)]
        mark = '' if row.passes() else ' (missed)'
        lines.append(f'| {row.name} | {row.ratio:.3f}{mark} | {quartiles} | {limits} | {goal} | {" | ".join(sides)} |')
    return '\n'.join(lines)


def _side(row: Row, side: int, peak_tflops: float | None) -> str:
    if not row.flops:
        return f'{(row.ours, row.theirs)[side][0] / 1e6:.3f} MB'
    rate, flops = row.per_second[side], row.flops[side]
    share = f', {rate * flops / peak_tflops / 1e10:.0f} % of peak' if peak_tflops else ''
    return f'{rate:,.0f} /s, {flops / 1e6:,.2f} MFLOP{share}'


def draw(rows: list[Row], title: str) -> Figure:
    """Draw each ratio with its quartiles, floor, traffic and goal; first the costs, then the throughputs."""
    kinds = [kind for at_least in (False, True) if (kind := [row for row in rows if row.at_least == at_least])]
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(rows)), layout='constrained')
    figure.suptitle(title)
    heights = [1 + len(kind) for kind in kinds]
    for axes, kind in zip(figure.subplots(len(kinds), squeeze=False, height_ratios=heights)[:, 0], kinds, strict=True):
        _draw_rows(axes, kind)
    labelled = (axes.get_legend_handles_labels() for axes in figure.axes)
    marks = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    figure.legend(marks.values(), marks, loc='outside lower center', ncols=4, fontsize='small')
    return figure


def _draw_rows(axes: Any, rows: list[Row]) -> None:
    marks = {'floor': ('x', 'black', 'matrix work alone'), 'traffic': ('+', 'black', 'memory traffic alone')}
    marks |= {'goal': ('<>'[rows[0].at_least], 'tab:green', 'goal'), 'ratio': ('o', 'tab:blue', 'measured')}
    for y, row in enumerate(rows):
        axes.plot(row.quartiles, [y] * len(row.quartiles), color='tab:blue', linewidth=3, alpha=0.4)
        for name, (marker, colour, label) in marks.items():
            if (value := getattr(row, name)) is not None:
                axes.plot(value, y, marker, color=colour, label=label)
    axes.axvline(1, color='grey', linewidth=0.5)
    kind = 'throughput, more is better' if rows[0].at_least else 'cost, less is better'
    axes.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], xlabel=f'ratio of {kind}')
    axes.invert_yaxis()
