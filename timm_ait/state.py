"""The state of a workspace: its memory, when a forward writes it, and what a training step stores."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import hand_out
from .distributed import is_distributed, merge_ranks, sum_over_ranks
from .layers import orthogonalise
from .replay import Replay, out_of_sight

__all__ = ['MemoryState', 'MemoryWrite']


class MemoryWrite(NamedTuple):
    """What one batch does to the memory.

    Attributes:
        memory: (..., M, D) the memory after the write; without graph unless ``write_grad``.
        balance_loss: () the weighted balance loss of this write, differentiable.
        before: (M, D) the memory before the write.
        heads: (..., S, M, D) what each head has read for each slot, without graph.
        lse: (S, M) log-sum-exp of the logits behind ``heads``: their weight beside those of other ranks. Empty for the
            copies of images.
    """

    memory: Tensor
    balance_loss: Tensor
    before: Tensor
    heads: Tensor
    lse: Tensor


class MemoryState(nn.Module):
    """A layer with a memory (M, D): one buffer, in float32 or wider, whatever the dtype of the model.

    A forward changes it in :meth:`store` alone.

    Args:
        num_slots: M.
        slot_dim: D.
        balance_weight: Weight of the balance loss; 0 computes none.
        write_mode: As in :class:`~timm_ait.GlobalWorkspace`, and so are the next two.
    """

    memory: Tensor

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        balance_weight: float,
        write_mode: str,
        write_rule: str,
        write_scope: str,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_slots, self.slot_dim, self.balance_weight = num_slots, slot_dim, balance_weight
        self.write_mode, self.write_rule, self.write_scope = write_mode, write_rule, write_scope
        self.auto_balance = True
        self.process_group: Any = None
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer('memory', torch.empty(num_slots, slot_dim, device=device, dtype=dtype))
        self.replay = Replay()

    def update(self, memory: Tensor, heads: Tensor) -> Tensor:
        """What the heads (S, M, D), having read the tokens, make of the memory (M, D): (M, D)."""
        raise NotImplementedError

    def reset_memory(self) -> None:
        """Forget: random slots N(0, 1) as the authors have them, or orthogonal ones with another rule than theirs."""
        (nn.init.normal_ if self.write_rule == 'published' else nn.init.orthogonal_)(self.memory)

    def is_writing(self) -> bool:
        """Whether a forward would write, in the present mode."""
        if self.write_mode == 'always':
            return True
        # NOTE the authors write in evaluation too: write_mode='always'.
        return self.training and self.write_mode == 'train' and not self._is_frozen()

    def _is_frozen(self) -> bool:
        """Whether the layer has parameters, and all are frozen. FSDP1 and DataParallel keep them elsewhere."""
        if any(p.requires_grad for p in self.parameters()):
            return False
        parameters = list(self.parameters())
        if torch.compiler.is_compiling():
            return bool(parameters)
        if any(map(torch._C._functorch.is_gradtrackingtensor, parameters)):
            return False  # torch.func.jvp: what it differentiates by requires no gradient
        if any(map(torch._C._functorch.is_batchedtensor, parameters)):
            raise ValueError(
                'torch.func.vmap over models hides whether their parameters are trained, and writes no memory; call '
                'eval() on the model, or train one model after the other'
            )
        return bool(parameters)

    def adds_balance_loss(self) -> bool:
        """Whether a backward pass through the next forward would add the gradient of its balance loss."""
        return self.training and self.auto_balance and self.balance_weight > 0 and self.is_writing()

    def balance_loss(self) -> Tensor:
        """Balance loss () of the last write: weighted and differentiable, zero where there was no write.

        With ``auto_balance`` it is differentiable as long as the output of that forward lives. A backward pass of a
        loss that it was added to does not add its gradient a second time.
        """
        loss = self.replay.balance_loss()
        if loss is None:
            return self.memory.new_zeros(())
        return hand_out(loss) if self.auto_balance else loss

    def has_copies(self) -> bool:
        """Whether every image writes and reads its own copy of the memory."""
        return self.write_scope == 'image' and self.write_mode != 'never'

    def is_additive(self) -> bool:
        """Whether a copy is the first memory, which stays as it is, plus all that its slots have read."""
        return self.write_rule == 'additive' or self.write_rule == 'competing'

    def store(self, write: MemoryWrite, x: Tensor) -> None:
        """Store the memory after a write of the tokens ``x``; the only place where a forward changes the memory.

        In distributed training it is the memory that one write of the tokens of all ranks leaves, or the mean direction
        of the copies of all images on all ranks.
        """
        if getattr(self, '_is_replica', False):
            raise ValueError('DataParallel loses what its replicas write into the memory; use DistributedDataParallel')
        has_other_ranks = is_distributed(self.process_group)
        with torch.no_grad(), out_of_sight():
            memory = write.memory
            if self.is_additive() or (x.numel() == 0 and not has_other_ranks):
                memory = write.before
            elif self.has_copies():
                memory = memory.sum(dim=0)  # its direction counts, its length does not
                if has_other_ranks:
                    memory = sum_over_ranks(memory, self.process_group)
                    memory = torch.where(memory.any(), memory, write.before)  # zeros, where no rank has an image
                memory = F.normalize(memory, dim=-1)
                memory = orthogonalise(memory) if self.write_rule == 'distinct' else memory
            elif has_other_ranks:  # NOTE the authors' DataParallel keeps the write of one replica
                memory = self.update(write.before, merge_ranks(write.heads, write.lse, self.process_group))
            self.memory.copy_(memory)
            self.replay.note(write.before, write.balance_loss, x, is_automatic=self.adds_balance_loss())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'MemoryState':
        """Move or cast the module, but never narrow the memory below float32: a write moves it by small steps."""
        before = self.memory
        super()._apply(fn, recurse)
        if self.memory.dtype in (torch.float16, torch.bfloat16):
            self.memory = before.to(self.memory.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the layer. With ``assign=True`` a narrow memory would take the place of this one."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.memory.dtype in (torch.float16, torch.bfloat16):
            self.memory = self.memory.float()
