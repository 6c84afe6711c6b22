"""Look into the memories of a model: what each slot reads, what each token retrieves, and whether slots are alike."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hopfield import HopfieldRetrieval, hopfield_energy
from .layers import without_autocast
from .report import BlockReport, Sums, by_image, by_name, check_all_read, watch
from .selection import dense_gates, load_balance_loss
from .workspace import GlobalWorkspace

__all__ = ['DEAD', 'TWINS', 'BlockInspection', 'inspect']

TWINS = 0.99  # two slots of a larger cosine are twins
DEAD = 0.1  # a slot is dead that gets less than this part of an even share of the retrieval
ENERGY_STEPS = 4  # at least; a layer may do more


@dataclass
class BlockInspection:
    """One workspace and the B images of N tokens that have passed it. All tensors are on the CPU.

    Attributes:
        slots: (C, M, D) the slots that the tokens read, of unit length. C is 1, or B if each image has its own copy.
        gates: (B, S, M, N) the weight of each token for each slot of each write head, 0 if it is not selected. They sum
            to 1 over the tokens that compete: those of all images, or those of one image with ``write_scope='image'``.
        shares: (B, N, M) what each token retrieves, as the weights of the attractors, which sum to 1.
        energy: (B, N, K) Hopfield energy of each token before the first retrieval step and after each of K - 1 steps.
        steps: Retrieval steps that the layer does; the energy may go on for some more.
        tokens_read: How many tokens a slot reads: exp of the mean entropy of the gates, 1 to k.
        balance_loss: The weighted balance loss of these images.
        grid: Rows and columns of the patches, which are the last tokens of an image; fewer in a later stage of a model
            with stages.
        report: The numbers of :func:`timm_ait.memory_report`.
    """

    slots: Tensor
    gates: Tensor
    shares: Tensor
    energy: Tensor
    steps: int
    tokens_read: float
    balance_loss: float
    grid: tuple[int, int]
    report: BlockReport

    @property
    def cosines(self) -> Tensor:
        """Cosines between the slots (M, M), the mean over copies."""
        with without_autocast(self.slots):
            return (self.slots @ self.slots.transpose(1, 2)).mean(dim=0)

    @property
    def use(self) -> Tensor:
        """Share of the retrieval that each slot gets (M,), the mean over all tokens; sums to 1."""
        return self.shares.mean(dim=(0, 1))

    def twins(self, limit: float = TWINS) -> list[list[int]]:
        """Groups of slots, each of a cosine above ``limit`` with the first of its group."""
        groups: list[list[int]] = []
        cosines = self.cosines
        for slot in range(len(cosines)):
            near = next((group for group in groups if cosines[group[0], slot] > limit), None)
            groups.append([slot]) if near is None else near.append(slot)
        return [group for group in groups if len(group) > 1]

    def dead(self, limit: float = DEAD) -> list[int]:
        """Slots that get less than ``limit`` of an even share, 1/M, of the retrieval."""
        return (self.use * len(self.use) < limit).nonzero().flatten().tolist()

    def on_grid(self, values: Tensor) -> Tensor:
        """Values of tokens as maps of the patches, without class token and the like: (..., N) -> (..., H, W)."""
        H, W = self.grid
        return values[..., values.shape[-1] - H * W :].unflatten(-1, (H, W))


@torch.no_grad()
def inspect(model: nn.Module, images: Tensor, *inputs: Tensor) -> list[BlockInspection]:
    """Run a batch of images through a model in evaluation mode, and look into each of its workspaces.

    Modes and memories stay as they are. A layer that does not write in evaluation shows what its slots would read.

    Args:
        model: With at least one :class:`timm_ait.GlobalWorkspace`.
        images: (B, C, H, W), normalised. As in training, the tokens of all images compete.
        *inputs: What else the model takes, as the questions (B, Q) of a relational one.

    Returns:
        One for each workspace, from the first block to the last.

    Raises:
        ValueError: If the model has no workspace or one that retrieves nothing, if there is no image, and for values
            that are not finite.
    """
    if len(images) == 0:
        raise ValueError(f'expected at least one image (B, C, H, W), got {tuple(images.shape)}')
    if not images.isfinite().all():
        raise ValueError('expected images of finite values, got NaN or infinity; look at how they were normalised')
    stems = (getattr(module, 'patch_embed', None) for module in model.modules())  # a wrapper hides it
    patches: Any = next((stem for stem in stems if hasattr(stem, 'dynamic_feat_size')), None)  # timm's know their grid
    grid = patches.dynamic_feat_size(images.shape[-2:]) if patches is not None else None
    found: list[BlockInspection] = []
    with watch(model) as sums:

        def look(workspace: GlobalWorkspace, seen: Sums, module: nn.Module, args: Any, kwargs: Any, _: Tensor) -> None:
            if seen.images:
                given = by_name(module, args, kwargs)
                found.append(_look(workspace, seen, given['h'], given['attractors'], grid))

        hooks = [
            workspace.retrieval.register_forward_hook(partial(look, workspace, seen), with_kwargs=True)
            for workspace, seen in sums.items()
        ]
        try:
            model(*(x.to(next(iter(sums)).memory.device) for x in (images, *inputs)))
        finally:
            for hook in hooks:
                hook.remove()
    check_all_read(sums)
    return found


def _look(
    workspace: GlobalWorkspace, seen: Sums, h: Tensor, attractors: Tensor, grid: tuple[int, int] | None
) -> BlockInspection:
    """What a forward hook on the retrieval finds: its arguments, and what passed the layers before it."""
    grid = _grid_of(h.shape, grid)
    h = by_image(h)
    assert seen.last_slots is not None
    assert seen.last_shares is not None
    B, N, _ = h.shape
    tokens = h if workspace.has_copies() else h.flatten(0, 1)  # (B, N, E) or (T, E)
    keys, _ = workspace.keys_and_values(tokens)
    with without_autocast(tokens):
        selection = workspace.select(workspace.memory, tokens, keys)
        loss = workspace.balance_weight * load_balance_loss(selection, tokens.shape[-2])
    entropy = torch.special.entr(selection.gates).sum(dim=-1).mean()
    return BlockInspection(
        slots=seen.last_slots.reshape(-1, *workspace.memory.shape).cpu(),  # (M, D) or (B, M, D) -> (C, M, D)
        gates=_of_images(dense_gates(selection, tokens.shape[-2]), B).cpu(),
        shares=seen.last_shares.float().view(B, N, -1).cpu(),  # (T, M) or (B, N, M) -> (B, N, M)
        energy=_energy(h.double(), attractors.double(), workspace).cpu(),
        steps=workspace.retrieval.steps,
        tokens_read=entropy.exp().item(),
        balance_loss=loss.item(),
        grid=grid,
        report=seen.report(),
    )


def _grid_of(shape: torch.Size, patches: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of tokens of this shape: those of a map, or those of the patches, which later stages halve."""
    if len(shape) == 4:
        return shape[1], shape[2]
    N = shape[-2]
    if patches is None:
        return 1, N
    H, W = patches
    while H * W > N:
        H, W = H // 2, W // 2
    return (H, W) if H * W else (1, N)


def _of_images(gates: Tensor, images: int) -> Tensor:
    """The gates by image: (S, M, T) or (B, S, M, N) -> (B, S, M, N)."""
    return gates if gates.ndim == 4 else gates.unflatten(-1, (images, -1)).movedim(-2, 0)


def _energy(state: Tensor, attractors: Tensor, workspace: GlobalWorkspace) -> Tensor:
    """Energies (B, N, K) of the tokens (B, N, E) along the steps, for attractors (M, E) or (B, M, E)."""
    beta, steps = workspace.retrieval.beta, max(workspace.retrieval.steps, ENERGY_STEPS)
    step = HopfieldRetrieval(beta)
    energies = [hopfield_energy(state, attractors, beta)]
    for _ in range(steps):
        state = step(torch.zeros_like(state), state, attractors)
        energies.append(hopfield_energy(state, attractors, beta))
    return torch.stack(energies, dim=-1)
