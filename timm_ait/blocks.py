"""The blocks: timm's pre-norm block with a workspace as its feed-forward part, with self-attention and without."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models import checkpoint, register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .balance import is_backward_running
from .fused import FusedWorkspace
from .layers import is_hooked
from .replay import in_present_mode, snapshot
from .state import MemoryWrite
from .workspace import GlobalWorkspace

__all__ = ['AssociativeBlock', 'AttentionFreeBlock', 'workspaces_in']

register_notrace_module(GlobalWorkspace)
register_notrace_module(FusedWorkspace)


class AssociativeBlock(Block):
    """timm's pre-norm block around a :class:`GlobalWorkspace`.

    With gradient checkpointing the block recomputes itself: the memory before the write is an input of what the
    backward pass repeats, and the write itself happens once.
    """

    grad_checkpointing: bool = False

    def __init__(self, *args: Any, mlp_layer: Callable[..., nn.Module] = GlobalWorkspace, **kwargs: Any) -> None:
        super().__init__(*args, mlp_layer=mlp_layer, **kwargs)
        if not isinstance(self.mlp, GlobalWorkspace):
            raise ValueError(f'a block of AiT needs a workspace, got {self.mlp}; give mlp_layer=GlobalWorkspace')

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``x <- x + attention(LN(x))``, then ``x <- x + workspace(LN(x))``: (B, N, E) -> (B, N, E)."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.grad_checkpointing and torch.is_grad_enabled():
                return self.forward_checkpointed(x, attn_mask, is_causal)
        return self.forward_once(x, attn_mask, is_causal)

    def forward_once(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """:meth:`forward` without checkpointing: (B, N, E) -> (B, N, E)."""
        x = self.attend(x, attn_mask, is_causal)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """``x + attention(LN(x))``: (B, N, E) -> (B, N, E)."""
        if (attn_mask is not None or is_causal) and self.has_copies():
            self.refuse_mask(attn_mask, "with write_scope='image' every token reads what all others wrote")
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))

    def has_copies(self) -> bool:
        """Whether every image writes and reads a copy of the memory in this block."""
        if torch.jit.is_scripting():
            if hasattr(self.mlp, 'has_copies'):
                return self.mlp.has_copies()
            return False
        else:
            return any(workspace.has_copies() for workspace in workspaces_in(self.mlp))

    def refuse_mask(self, attn_mask: Tensor | None, why: str) -> None:
        """Raise a ValueError, except while torch.fx traces."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(attn_mask, torch.fx.Proxy):  # torch.fx makes proxies of arguments that are left out too
                return
        raise ValueError(why + ': leave out attn_mask and is_causal')

    def forward_checkpointed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """:meth:`forward`, which saves its inputs alone for the backward pass."""
        workspace: Any = getattr(self.mlp, '_orig_mod', self.mlp)  # a compiled layer's forward is replaced: no hook
        is_own = isinstance(workspace, GlobalWorkspace) and not is_hooked(workspace)
        if not is_own or workspace.overrides('forward'):  # wrappers and hooks belong to a call of the layer
            return checkpoint(in_present_mode(self, self.forward_once), x, attn_mask, is_causal)
        if not workspace.is_writing():
            function = in_present_mode(self, self.look_up)
            return checkpoint(function, x, snapshot(workspace.memory), attn_mask, is_causal)
        function = in_present_mode(self, self.step)
        if is_backward_running():  # of a checkpoint around this block
            return checkpoint(function, x, workspace.replay.memory_before(x), attn_mask, is_causal)[0]
        new, *write = checkpoint(function, x, snapshot(workspace.memory), attn_mask, is_causal)
        workspace.store(MemoryWrite(*write), x)
        return new

    def look_up(self, x: Tensor, memory: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The block where it stores nothing, as a function of tokens (B, N, E) and memory (M, D): (B, N, E)."""
        x = self.attend(x, attn_mask, is_causal)
        return x + self.drop_path2(self.ls2(self.mlp.look_up(self.norm2(x), memory)))

    def step(self, x: Tensor, memory: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, ...]:
        """The block as a function of tokens (B, N, E) and memory (M, D): new tokens, and the parts of the write."""
        x = self.attend(x, attn_mask, is_causal)
        update, write = self.mlp.step(self.norm2(x), memory)
        return x + self.drop_path2(self.ls2(update)), *write


class AttentionFreeBlock(AssociativeBlock):
    """The block without self-attention: the workspace alone mixes tokens, at a cost that is linear in their number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, 'num_heads': 1})  # for an attention that is dropped: any width will do
        self.norm1, self.attn, self.ls1, self.drop_path1 = (nn.Identity() for _ in range(4))

    def attend(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """``x``: (B, N, E) -> (B, N, E)."""
        if attn_mask is not None or is_causal:
            self.refuse_mask(attn_mask, 'blocks without self-attention take no mask')
        return x


def workspaces_in(module: nn.Module) -> Iterator[GlobalWorkspace]:
    """The workspaces of a module, those that somebody has wrapped among them."""
    return (part for part in module.modules() if isinstance(part, GlobalWorkspace))
