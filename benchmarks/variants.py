"""Workspaces with one part changed, each through the methods that a workspace has for that.

:data:`IMAGE`, :data:`ADDITIVE` and :data:`COMPETING` are the keywords of the memories that each image has of its own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from mixers import CrossAttention
from torch import Tensor, nn

from timm_ait import GlobalWorkspace
from timm_ait.layers import rms_norm
from timm_ait.selection import Selection, top_gates
from timm_ait.state import MemoryWrite

IMAGE: dict[str, Any] = dict(write_rule='distinct', write_scope='image', memory_decay=0.5)
ADDITIVE: dict[str, Any] = dict(write_rule='additive', write_scope='image')
COMPETING: dict[str, Any] = dict(ADDITIVE, write_rule='competing')


class NoMemory(GlobalWorkspace):
    """The block without any memory: the LayerNorm on the output of the feed-forward part remains.

    What no token reads is not trained: DistributedDataParallel would wait for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_transform.requires_grad_(False)
        if self.scale is not None:
            self.scale.requires_grad_(False)
        if self.retrieval_scale is not None:
            self.norm.requires_grad_(False)

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        """Return what a retrieval would be added to."""
        return h if self.retrieval_scale is None else f


class WideGain(GlobalWorkspace):
    """The gain on the retrieval starts at sqrt(D): what a token retrieves is then about as long as the token."""

    def reset_parameters(self) -> None:
        """Start from sqrt(D) and not from 1."""
        super().reset_parameters()
        nn.init.constant_(self.scale, self.slot_dim**0.5)


class WholeCopy(GlobalWorkspace):
    """A copy keeps what all its slots have read alike; only the memory that starts every copy is orthogonalised."""

    def update(self, memory: Tensor, heads: Tensor) -> Tensor:
        """The rule 'distinct' without centring and orthogonalisation: (M, D), (B, S, M, D) -> (B, M, D)."""
        heads = heads.transpose(-3, -2).flatten(-2)  # (B, S, M, D) -> (B, M, S*D)
        update = self.write_norm(self.proj(heads) + memory)
        new = torch.lerp(memory.expand_as(update), F.normalize(update, dim=-1), 1 - self.memory_decay)
        return F.normalize(new, dim=-1)


class CrossAttentionRead(GlobalWorkspace):
    """Tokens read the memory by attention with projections, in ``write_heads`` heads, and not by Hopfield retrieval."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_transform.requires_grad_(False)  # nothing reads it
        self.cross_attention = CrossAttention(self.in_features, self.slot_dim, self.write_heads)

    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        """``h + attention(h, gamma)``: (B, N, E)."""
        return h + self.cross_attention(h, memory.to(h.dtype).expand(len(h), -1, -1))  # (M, D) -> (B, M, D)


class ResetMemory(GlobalWorkspace):
    """The memory starts anew with every epoch."""

    def start_epoch(self) -> None:
        """Forget; `loop.py` calls this."""
        self.reset_memory()


class OrthogonalMemory(GlobalWorkspace):
    """The memory starts with orthogonal slots."""

    def reset_parameters(self) -> None:
        """Start from orthogonal slots; more than ``slot_dim`` of them cannot all be orthogonal."""
        super().reset_parameters()
        nn.init.orthogonal_(self.memory)


class UnitLogits(GlobalWorkspace):
    """Slots score tokens with logits of unit variance from the start, as with the rule 'additive'."""

    def address(self, memory: Tensor) -> Tensor:
        """What W_Q reads for the slots (M, D)."""
        return 3 * rms_norm(memory)


class FaintLogits(GlobalWorkspace):
    """Slots score tokens with the small logits that rows of unit length give, whatever the rule."""

    def address(self, memory: Tensor) -> Tensor:
        """What W_Q reads for the slots (M, D)."""
        return memory


class CompetingSlots(GlobalWorkspace):
    """Slots compete for tokens as with the rule 'competing', whatever the rule."""

    def compete(self, logits: Tensor) -> Tensor:
        """Logarithms of the shares that each slot has in the tokens: (B, S, M, N)."""
        return logits.log_softmax(dim=-2)


class CosineLogits(GlobalWorkspace):
    """Slots score tokens by the cosine with their query, times a scale that each head learns (as in Swin V2).

    The scale starts at sqrt(E), so that logits have unit variance at first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_scale = nn.Parameter(torch.full((self.write_heads,), math.log(self.in_features) / 2))

    def select(self, memory: Tensor, h: Tensor, keys: Tensor | None = None) -> Selection:
        """Slots (M, D) and tokens (B, N, E) of images: gates (B, S, M, N)."""
        queries = self.log_scale.exp().view(-1, 1, 1) * F.normalize(self.fold_queries(memory), dim=-1)  # (S, M, E)
        logits = queries @ F.normalize(h.to(memory.dtype), dim=-1).unsqueeze(1).mT  # (B, S, M, N)
        return top_gates(logits, min(self.bottleneck, h.shape[-2]))


class SeparateAttractors(GlobalWorkspace):
    """A loss parts what tokens read: the mean squared cosine between two attractors, with the weight 0.1."""

    def write(self, h: Tensor, memory: Tensor) -> MemoryWrite:
        """The write of the rule, with that loss beside the balance loss."""
        write = super().write(h, memory)
        if not self.is_writing():
            return write
        a = F.normalize(self.attractors(write.memory, memory.dtype), dim=-1)  # (..., M, E)
        pairs = self.num_slots * (self.num_slots - 1)
        overlap = ((a @ a.mT).square().sum(dim=(-2, -1)) - self.num_slots) / pairs  # a slot and itself have 1
        return write._replace(balance_loss=write.balance_loss + 0.1 * overlap.mean())
