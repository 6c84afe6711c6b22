"""One memory on all ranks of a distributed training."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .workspace import GlobalWorkspace, MemoryWrite

__all__ = ['synchronize_memory']


@torch.no_grad()
def synchronize_memory(model: nn.Module) -> None:
    """Replace the writes that each rank has made in its last forward by one write of all ranks' tokens.

    The ranks' messages are merged as if one attention had run over the tokens that they selected, k on each rank, so
    that a rank that sees more or heavier tokens counts for more, and one with NaN or inf for nothing. It takes one
    collective of L*S*M*(D + 1) numbers for the L workspaces of a model. A model of this package calls it after its last
    block; whoever puts :class:`GlobalWorkspace` in another model calls it after the forward, on every rank.

    Without an initialised process group, or alone in it, there is nothing to do.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    layers = [m for m in model.modules() if isinstance(m, GlobalWorkspace) and m.is_writing() and m.last_write]
    if not layers:
        return
    local = torch.stack([_pack(layer.last_write) for layer in layers])  # (L, S, M, D + 1)
    ranks = local.new_empty(dist.get_world_size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(ranks, local)
    for layer, gathered in zip(layers, ranks.unflatten(0, (-1, len(layers))).unbind(1), strict=True):
        layer.rewrite(merge_messages(gathered[..., :-1], gathered[..., -1]))


def _pack(write: MemoryWrite | None) -> Tensor:
    assert write is not None
    return torch.cat([write.message, write.log_mass.unsqueeze(-1)], dim=-1)


def merge_messages(messages: Tensor, log_mass: Tensor) -> Tensor:
    """One message out of those of R ranks: (R, S, M, D), (R, S, M) -> (S, M, D); NaN if no rank's is finite."""
    return (log_mass.softmax(dim=0).unsqueeze(-1) * messages.nan_to_num()).sum(dim=0)
