"""The workspace for evaluation alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .hopfield import hopfield_retrieval

if TYPE_CHECKING:
    from .workspace import GlobalWorkspace

__all__ = ['FusedWorkspace']


class FusedWorkspace(nn.Module):
    """A :class:`GlobalWorkspace` that reads alone: its attractors are computed, and what writes is left out.

    Args:
        workspace: Whose layers it shares.

    Raises:
        ValueError: If ``workspace`` writes in evaluation too.
    """

    attractors: Tensor

    def __init__(self, workspace: 'GlobalWorkspace') -> None:
        super().__init__()
        if workspace.write_mode == 'always':
            raise ValueError("only a workspace that reads alone can be fused, got write_mode='always'; take 'train'")
        self.beta, self.retrieval_steps, self.scale = workspace.beta, workspace.retrieval_steps, workspace.scale
        self.fc1, self.act, self.fc2 = workspace.fc1, workspace.act, workspace.fc2
        self.hidden_norm, self.norm = workspace.hidden_norm, workspace.norm
        with torch.no_grad():
            self.register_buffer('attractors', workspace.attractors(workspace.memory))

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory that the workspace had: (B, N, E) -> (B, N, E)."""
        f = self.fc2(self.hidden_norm(self.act(self.fc1(x))))
        h = self.norm(f)
        base = h if self.scale is None else f
        return hopfield_retrieval(base, h, self.attractors, self.beta, self.retrieval_steps, self.scale)

    def is_writing(self) -> bool:
        """As of a workspace: never."""
        return False

    @torch.jit.unused
    def balance_loss(self) -> Tensor:
        """As of a workspace that has not written: zero."""
        return self.attractors.new_zeros(())
