"""One memory on all ranks of a distributed training. A ``group`` is a process group; None stands for all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['is_distributed', 'merge_heads', 'merge_ranks', 'sum_over_ranks']

# The name from torch 2.14 on, and the one before.
gather_single: Any = getattr(dist, 'all_gather_single', None) or getattr(dist, 'all_gather_into_tensor', None)


def is_distributed(group: Any = None) -> bool:
    """Whether there are other ranks in the group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def merge_ranks(heads: Tensor, lse: Tensor, group: Any = None) -> Tensor:
    """What the heads have read from the tokens of all ranks, by one collective of S*M*(D + 1) numbers.

    The result is that of one attention over the tokens that the ranks selected, k on each rank. So a rank with more or
    heavier tokens counts for more, and a rank with NaN or inf counts for nothing.

    Args:
        heads: (S, M, D) what each head has read for each slot on this rank.
        lse: (S, M) log-sum-exp of the logits behind ``heads``.
        group: The ranks that share the memory.

    Returns:
        (S, M, D), the same on all ranks; NaN if no rank's is finite.
    """
    lse = lse.where(heads.sum().isfinite(), -torch.inf)  # no weight, where a token of this rank is not finite
    local = torch.cat([heads, lse.unsqueeze(-1)], dim=-1)  # (S, M, D + 1)
    ranks = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    gather_single(ranks, local, group=group)
    ranks = ranks.unflatten(0, (-1, len(local)))  # (R*S, M, D + 1) -> (R, S, M, D + 1)
    return merge_heads(ranks[..., :-1], ranks[..., -1])


def merge_heads(heads: Tensor, lse: Tensor) -> Tensor:
    """Merge what the heads of R ranks have read: (R, S, M, D), (R, S, M) -> (S, M, D); NaN if no rank's is finite."""
    return (lse.softmax(dim=0).unsqueeze(-1) * heads.nan_to_num()).sum(dim=0)


def sum_over_ranks(x: Tensor, group: Any = None) -> Tensor:
    """The sum of ``x`` over the ranks of the group, in the shape of ``x``."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x
