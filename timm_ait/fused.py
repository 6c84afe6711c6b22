"""The workspace for evaluation alone."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['FusedWorkspace']


class FusedWorkspace(nn.Module):
    """A :class:`~timm_ait.GlobalWorkspace` that only reads: it holds the attractors, and nothing of the write.

    Args:
        workspace: It shares its layers. All its images read one memory, which evaluation does not change.
    """

    attractors: Tensor

    def __init__(self, workspace: Any) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = workspace.fc1, workspace.act, workspace.fc2
        self.hidden_norm, self.norm = workspace.hidden_norm, workspace.norm
        self.retrieval, self.scale = workspace.retrieval, workspace.scale
        self.has_vit_path = workspace.retrieval_scale is not None
        with torch.no_grad():
            dtype = workspace.norm.weight.dtype
            self.register_buffer('attractors', workspace.attractors(workspace.slots(), dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Retrieve from the memory that the workspace had: (B, N, E) -> (B, N, E)."""
        f = self.fc2(self.hidden_norm(self.act(self.fc1(x))))
        h = self.norm(f)
        return self.retrieval(f if self.has_vit_path else h, h, self.attractors, scale=self.scale)
