"""What the memories of a model hold, and what its tokens retrieve, in a few numbers."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import without_autocast
from .workspace import GlobalWorkspace

__all__ = ['BlockReport', 'format_report', 'memory_report']


@dataclass
class BlockReport:
    """One workspace. Lengths are root mean squares over tokens.

    Attributes:
        block: Number of the block, as in ``model.blocks``; without such a list, its place among the workspaces.
        mean_cosine: Mean cosine between two slots: 1 where all slots are one point, 0 where they are orthogonal.
        effective_rank: Number of directions that the slots use: exp of the entropy of their singular values, 1 to M or
            D, whichever is less.
        length: Length of the retrieval, relative to the length of a token.
        varies_over_tokens: Share of the length that remains when the mean over all tokens is taken off, 0 to 1. With 0
            the retrieval is a constant.
        varies_over_images: The same for the means of the images.
        slots_in_use: How many slots get an even share of the retrieval: exp of the entropy of their shares, 1 to M.
    """

    block: int
    mean_cosine: float
    effective_rank: float
    length: float
    varies_over_tokens: float
    varies_over_images: float
    slots_in_use: float


class Sums:
    """Sums over all tokens that pass one workspace."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.cosines: list[Tensor] = []
        self.ranks: list[Tensor] = []
        self.shares: Any = 0
        self.tokens = self.images = 0
        self.squares: Any = 0
        self.states: Any = 0
        self.mean: Any = 0
        self.means_squared: Any = 0
        self.means: Any = 0
        self.last_slots: Tensor | None = None
        self.last_shares: Tensor | None = None

    def see_slots(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook on the linear transform, which gets the slots: (M, D) or (B, M, D)."""
        slots = self.last_slots = F.normalize(args[0].float(), dim=-1)
        M = slots.shape[-2]
        with without_autocast(slots):
            cosines = slots @ slots.transpose(-2, -1)
        mean = (cosines.sum(dim=(-2, -1)) - M) / max(M * (M - 1), 1)
        values = torch.linalg.svdvals(slots)
        rank = torch.special.entr(values / values.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()
        self.cosines.append(mean.flatten())  # () or (B,) -> (1,) or (B,)
        self.ranks.append(rank.flatten())

    def see_shares(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook on the softmax of the retrieval; the last update counts: (T, M) or (B, N, M)."""
        self.last_shares = output

    def see_retrieval(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Hook on the retrieval."""
        given = by_name(module, args, kwargs)
        is_known = given.keys() >= {'h', 'attractors'}
        if self.last_slots is None or self.last_shares is None or not is_known:  # a class that reads in another way
            return
        h, attractors, scale = by_image(given['h']), given['attractors'], given.get('scale')
        shares = self.last_shares.float().view(*h.shape[:-1], -1)  # (T, M) or (B, N, M) -> (B, N, M)
        with without_autocast(h):
            r = shares @ attractors.float() * (1 if scale is None else scale)  # (B, N, E)
        means = r.mean(dim=1)
        self.shares = self.shares + shares.sum(dim=(0, 1))
        self.tokens += h.shape[0] * h.shape[1]
        self.images += len(h)
        self.squares = self.squares + r.square().sum()
        self.states = self.states + h.float().square().sum()
        self.mean = self.mean + r.sum(dim=(0, 1))
        self.means = self.means + means.sum(dim=0)
        self.means_squared = self.means_squared + means.square().sum()

    def report(self) -> BlockReport:
        """The numbers behind the sums."""
        square = self.squares / self.tokens
        over_tokens = square - (self.mean / self.tokens).square().sum()
        over_images = self.means_squared / self.images - (self.means / self.images).square().sum()
        return BlockReport(
            block=self.block,
            mean_cosine=torch.cat(self.cosines).mean().item(),
            effective_rank=torch.cat(self.ranks).mean().item(),
            length=(self.squares / self.states).sqrt().item(),
            varies_over_tokens=(over_tokens / square).clamp_min(0).sqrt().item(),
            varies_over_images=(over_images / square).clamp_min(0).sqrt().item(),
            slots_in_use=torch.special.entr(self.shares / self.tokens).sum().exp().item(),
        )


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[GlobalWorkspace, Sums]]:
    """Inside it, a model evaluates, stores nothing in its memories, and sums what passes its workspaces.

    Raises:
        ValueError: If the model has no workspace.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, GlobalWorkspace)}
    sums = {module: Sums(block) for module, block in zip(names, number_blocks(names.values()), strict=True)}
    if not sums:
        raise ValueError(
            'the model has no GlobalWorkspace to report on; a fused model has none: report before you fuse'
        )
    hooks = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for workspace, seen in sums.items():
            vars(workspace)['store'] = lambda *_: None  # a workspace may write in evaluation too
            hooks.append(workspace.linear_transform.register_forward_hook(seen.see_slots))
            hooks.append(workspace.retrieval.softmax.register_forward_hook(seen.see_shares))
            hooks.append(workspace.retrieval.register_forward_hook(seen.see_retrieval, with_kwargs=True))
        with torch.compiler.set_stance('force_eager'):  # a graph that is compiled already calls no hooks
            yield sums
    finally:
        for workspace in sums:
            vars(workspace).pop('store', None)
        for module, mode in modes.items():  # from the root down; some adapters act when their mode changes
            if module.training != mode:
                module.train(mode)
        for hook in hooks:
            hook.remove()


def number_blocks(names: Iterable[str]) -> list[int]:
    """Numbers of the blocks that hold the modules of these names; their places if the names do not tell them apart."""
    found = [re.findall(r'(?:^|\.)blocks\.(\d+)\.', name) for name in names]
    numbers = [int(number) for one in found for number in one]
    is_told = all(len(one) == 1 for one in found) and len(set(numbers)) == len(found)
    return numbers if is_told else list(range(len(found)))


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a hook on ``module`` is given, by the names of its parameters."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def by_image(h: Tensor) -> Tensor:
    """Tokens as (B, N, E): those of a map (B, H, W, E) side by side, and (T, E) as those of one image."""
    return h.unsqueeze(0) if h.ndim == 2 else h.flatten(1, -2)


def check_all_read(sums: dict[GlobalWorkspace, Sums]) -> None:
    """Raise ValueError unless every workspace has retrieved something."""
    silent = sorted({type(workspace).__name__ for workspace, seen in sums.items() if not seen.images})
    if silent:
        raise ValueError(
            f'nothing was retrieved in a workspace of class {", ".join(silent)}: the model does not call it, or it '
            'reads without self.linear_transform and self.retrieval, which the report watches'
        )


@torch.no_grad()
def memory_report(model: nn.Module, batches: Tensor | Iterable[Any], inputs: int = 1) -> list[BlockReport]:
    """Run some images through a model in evaluation mode, and report on each of its workspaces.

    Args:
        model: With at least one :class:`GlobalWorkspace`. Its mode and its memory stay as they are.
        batches: Images (B, C, H, W), or several batches of them, alone or as the first of a tuple. A few hundred images
            are enough.
        inputs: How many tensors of a tuple the model takes, for instance 2 for images and questions.

    Returns:
        One report for each workspace, from the first block to the last.

    Raises:
        ValueError: If the model has no workspace or one that retrieves nothing, if there are no images, or if a batch
            is something else.
    """
    count = 0
    with watch(model) as sums:
        device = next(iter(sums)).memory.device
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            model(*(x.to(device) for x in _inputs_of(batch, inputs)))
            count += 1
    if not count:
        raise ValueError('expected at least one batch of images, got none')
    check_all_read(sums)
    return [seen.report() for seen in sums.values()]


def _inputs_of(batch: Any, count: int) -> list[Tensor]:
    """The first tensors of a batch, of one image at least."""
    parts = list(batch[:count]) if isinstance(batch, (tuple, list)) else [batch]
    if not all(isinstance(x, Tensor) and len(x) > 0 for x in parts):
        got = ', '.join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in parts)
        raise ValueError(f'expected batches of images (B, C, H, W), alone or as the first of a tuple, got {got}')
    return parts


def format_report(reports: list[BlockReport]) -> str:
    """The reports as a Markdown table, one line for each block."""
    heading = (
        '| block | slots: mean cosine | effective rank | in use | retrieval / token, length | varies over tokens, % '
    )
    lines = [f'{heading}| over images, % |', '|---|---|---|---|---|---|---|']
    for report in reports:
        cells = (
            f'{report.block}',
            f'{report.mean_cosine:.4f}',
            f'{report.effective_rank:.1f}',
            f'{report.slots_in_use:.1f}',
            f'{report.length:.3f}',
            f'{100 * report.varies_over_tokens:.2f}',
            f'{100 * report.varies_over_images:.2f}',
        )
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)
