"""Balanced choices of tokens and experts: a transport plan, of which each token has 1 to give and each expert takes as
much as the others, in the place of the router's probabilities (Liu, Puigcerver and Blondel, ICLR 2023, "Sparsity-
constrained optimal transport", as in google-research/vmoe's ``sparsity_constrained_ot``).

s tokens of a group, e experts; g groups at once. A plan says who goes where; what an answer is weighted by stays the
softmax, so no gradient passes a plan.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Plan = Literal["none", "sinkhorn", "sparse"]

STEPS, RATE, SMALL = 20, 1e-2, 1e-3
"""Of the search for a plan, as in their code: rounds of Sinkhorn, or steps of Adam, its rate, and the length of the
gradient at which it stops.
"""


def sinkhorn(logits: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
    """The plan nearest to exp(logits) in KL divergence: Sinkhorn's rounds, experts first, in logarithms. Rows sum to 1,
    columns to s / e where it has converged.
    """
    rows = torch.zeros_like(logits[..., :1])
    columns = torch.zeros_like(logits[:, :1])
    share = math.log(logits.shape[1] / logits.shape[2])
    for _ in range(STEPS):
        columns = share - torch.logsumexp(logits + rows, 1, keepdim=True)
        rows = -torch.logsumexp(logits + columns, 2, keepdim=True)
    return (logits + rows + columns).exp()


def sparse(p: Float[Tensor, "g s e"], k: int, by: Literal["tokens", "experts"]) -> Float[Tensor, "g s e"]:
    """The plan with at most ``k`` entries above 0 for each token (or for each expert) that has most of the probability
    ``p``, less half of its own squared length: `STEPS` of Adam on the semi-dual (eq. 12 there).
    """
    if by == "tokens":
        totals = p.new_full(p.shape[:1] + p.shape[2:], p.shape[1] / p.shape[2])
        return _semi_dual(p.transpose(1, 2), totals, 1.0, k).transpose(1, 2)
    return _semi_dual(p, torch.ones_like(p[..., 0]), p.shape[1] / p.shape[2], k)


def _semi_dual(sim: Float[Tensor, "g a b"], totals: Float[Tensor, "g a"], amount: float, k: int) -> Tensor:
    """Columns with ``amount`` to give and k entries at most, rows that want their ``totals``."""
    alpha, mean, square = (torch.zeros_like(totals) for _ in range(3))
    running = torch.ones_like(totals[:, :1], dtype=torch.bool)
    for step in range(1, STEPS + 1):
        gradient = amount * nearest(((alpha[..., None] + sim) / amount), k).sum(2) - totals
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
        moved = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        alpha = torch.where(running, alpha - RATE * moved, alpha)
        running = running & (torch.linalg.vector_norm(gradient, dim=1, keepdim=True) > SMALL)
    return amount * nearest((alpha[..., None] + sim) / amount, k)


def nearest(x: Float[Tensor, "g a b"], k: int) -> Float[Tensor, "g a b"]:
    """The nearest point to each column of x of those whose entries are not negative, sum to 1, and of which k at most
    are above 0 (Kyrillidis et al., ICML 2013): that of the simplex for the k largest entries.
    """
    order = torch.argsort(x, dim=1, descending=True, stable=True)[:, :k]
    best = x.gather(1, order)
    count = torch.arange(1, order.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
    excess = (best.cumsum(1) - 1) / count
    last = (best > excess).sum(1, keepdim=True).clamp(min=1) - 1
    return torch.zeros_like(x).scatter(1, order, (best - excess.gather(1, last)).clamp(min=0))
