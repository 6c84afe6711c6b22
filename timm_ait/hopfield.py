"""The continuous Hopfield network that reads the memory: its update and its energy.

Ramsauer et al., *Hopfield Networks is All You Need*, https://arxiv.org/abs/2008.02217, as used in section 3.3 of Sun et
al., *Associative Transformer*, https://arxiv.org/abs/2309.12862.
"""

import math

import torch
from torch import Tensor, nn

from .arguments import check_limits

__all__ = ['HopfieldRetrieval', 'hopfield_energy']


class HopfieldRetrieval(nn.Module):
    """Add to each token what it retrieves: ``base + scale * r`` with ``r = softmax(beta h a^T) a`` (section 3.3).

    The softmax is a submodule. A forward hook on ``retrieval.softmax`` reads which attractors a token retrieves, as
    (..., T, M), once for each update of the state.

    Args:
        beta: Inverse temperature, above 0.
        steps: Updates of the state of each token, at least 1.

    Raises:
        ValueError: For an argument out of range.
    """

    def __init__(self, beta: float = 1.0, steps: int = 1) -> None:
        super().__init__()
        check_limits(dict(beta=beta, retrieval_steps=steps))
        self.beta, self.steps = float(beta), steps
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, base: Tensor, h: Tensor, attractors: Tensor, scale: Tensor | None = None) -> Tensor:
        """Retrieve for every token.

        Args:
            base: (B, N, E), (T, E) or (E,), what to add to.
            h: As ``base``: the tokens, which are the first states of the network.
            attractors: (M, E) stored patterns ``a``, or (B, M, E) with patterns of its own for every image.
            scale: (E,), None for 1.

        Returns:
            As ``base``.
        """
        E = h.shape[-1]
        state = h if attractors.ndim == 3 else h.reshape(-1, E)  # (B, N, E) -> (B*N, E), one product for all images
        patterns = attractors if self.beta == 1 else self.beta * attractors
        keys = patterns.transpose(-2, -1)  # (..., M, E) -> (..., E, M)
        for _ in range(self.steps - 1):
            state = torch.matmul(self.softmax(torch.matmul(state, keys)), attractors)
        shares = self.softmax(torch.matmul(state, keys))  # (..., T, M)
        if scale is not None:
            attractors = attractors * scale.to(attractors.dtype)
        shares = shares.to(attractors.dtype)
        if attractors.ndim == 3:
            return torch.baddbmm(base, shares, attractors)
        return torch.addmm(base.reshape(-1, E), shares, attractors).view_as(base)  # (B*N, E) -> (B, N, E)

    def extra_repr(self) -> str:
        return f'beta={self.beta:g}, steps={self.steps}'


def hopfield_energy(state: Tensor, attractors: Tensor, beta: float = 1.0) -> Tensor:
    """Energy of the continuous Hopfield network, which no retrieval step raises (section 3.3).

    ``E(xi) = -lse(beta, a xi) + xi.xi / 2 + ln(M) / beta + max_i |a_i|^2 / 2``

    Args:
        state: (..., E) states ``xi``, or (B, N, E) with the patterns of images.
        attractors: (M, E) stored patterns ``a``, or (B, M, E) with patterns of its own for every image.
        beta: Inverse temperature, > 0.

    Returns:
        (...) energies, at least zero.
    """
    lse = torch.logsumexp(beta * state @ attractors.mT, dim=-1) / beta
    norm = attractors.square().sum(dim=-1).amax(dim=-1)
    norm = norm.unsqueeze(-1) if attractors.ndim == 3 else norm  # (B,) -> (B, 1)
    return -lse + 0.5 * state.square().sum(dim=-1) + math.log(attractors.shape[-2]) / beta + 0.5 * norm
