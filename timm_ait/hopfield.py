"""The continuous Hopfield network that a workspace reads its memory with: its update and its energy.

Ramsauer et al., *Hopfield Networks is All You Need*, https://arxiv.org/abs/2008.02217, as used in section 3.3 of Sun et
al., *Associative Transformer*, https://arxiv.org/abs/2309.12862.
"""

import math

import torch
from torch import Tensor

__all__ = ['hopfield_energy', 'hopfield_retrieval']


def hopfield_retrieval(
    base: Tensor, h: Tensor, attractors: Tensor, beta: float = 1.0, steps: int = 1, scale: Tensor | None = None
) -> Tensor:
    """Add to each token what it retrieves: ``base + scale * r`` with ``r = softmax(beta h a^T) a`` (section 3.3).

    Args:
        base: (..., E), what to add to.
        h: (..., E), the tokens as states of the network.
        attractors: (M, E) stored patterns ``a``.
        beta: Inverse temperature.
        steps: Updates of the states.
        scale: (E,), None for 1.

    Returns:
        (..., E).
    """
    keys = (attractors if beta == 1 else beta * attractors).t()
    state = h.flatten(0, -2)  # (B, N, E) -> (B*N, E)
    for _ in range(steps - 1):
        state = torch.matmul(torch.matmul(state, keys).softmax(dim=-1), attractors)
    shares = torch.matmul(state, keys).softmax(dim=-1)  # (T, M)
    if scale is not None:
        attractors = attractors * scale
    return torch.addmm(base.flatten(0, -2), shares.to(attractors.dtype), attractors).view_as(base)


def hopfield_energy(state: Tensor, attractors: Tensor, beta: float = 1.0) -> Tensor:
    """Energy of the continuous Hopfield network, which no retrieval step raises (equation 7).

    ``E(xi) = -lse(beta, a xi) + xi.xi / 2 + ln(M) / beta + max_i |a_i|^2 / 2``

    Args:
        state: (..., E) states ``xi``.
        attractors: (M, E) stored patterns ``a``.
        beta: Inverse temperature, > 0.

    Returns:
        (...) energies, at least zero.
    """
    lse = torch.logsumexp(beta * state @ attractors.t(), dim=-1) / beta
    norm = attractors.square().sum(dim=-1).max()
    return -lse + 0.5 * state.square().sum(dim=-1) + math.log(attractors.shape[0]) / beta + 0.5 * norm
