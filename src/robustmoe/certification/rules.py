"""From bounds of experts and routers to bounds of the mixture: the propositions of docs/certification.md, as functions
of tensors.

Letters: n images, e experts, c classes; y the class that is certified. ``lower`` and ``upper`` bound margins over a
ball, m_j = output of class y minus output of class j; entry y is 0 throughout. ``least`` and ``most`` (n, e, e) bound
the differences of router logits, [i, k] of g_i - g_k. Ties count against the certificate everywhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Margins = Float[Tensor, "... c"]


def probability_margins(lower: Margins, upper: Margins, y: Int[Tensor, ...]) -> Margins:
    """CERT-0: lower bounds of p_y - p_j, p = softmax of the logits, from bounds of the logit margins z_y - z_j.

    (1 - exp(-l_j)) / (1 + sum_k exp(-l_k)) where l_j >= 0, and below 0 with u_k in the place of l_k, k != j. In a form
    that does not overflow: p_y at its smallest, and p_j at its largest.
    """
    others = torch.zeros_like(lower, dtype=torch.bool).scatter_(-1, y[..., None], True)
    down, up = (-lower).masked_fill(others, 0.0), (-upper).masked_fill(others, 0.0)
    whole = torch.logsumexp(down, -1, keepdim=True)  # log of 1 + sum over k != y of exp(-l_k)
    positive = torch.exp(-whole) - torch.exp(down - whole)
    c = lower.shape[-1]
    alone = torch.eye(c, dtype=torch.bool, device=lower.device)
    mixed = torch.where(alone, down[..., None, :], up[..., None, :])  # row j: l_j, and u_k for the others
    whole = torch.logsumexp(mixed, -1)
    negative = torch.exp(-whole) - torch.exp(down - whole)
    return torch.where(lower >= 0, positive, negative).masked_fill(others, 0.0)


def reachable(most: Float[Tensor, "n e e"], k: int = 1) -> Bool[Tensor, "n e"]:
    """CERT-2, CERT-3: the experts that a top-k router could choose somewhere in the ball: all but those that k others
    lead everywhere, most[i, k'] = max of g_i - g_k' < 0.
    """
    behind = (most < 0) & ~torch.eye(most.shape[-1], dtype=torch.bool, device=most.device)
    return behind.sum(-1) < k


def averaged(lower: Float[Tensor, "n e c"], k: int) -> Float[Tensor, "n c"]:
    """CERT-3 for weights of 1/k: the mean of the k lowest margins, class by class; inf for experts out of reach. Any k
    experts that can be chosen together have no lower mean.
    """
    return lower.sort(1).values[:, :k].mean(1)


def soft_weights(
    least: Float[Tensor, "n e e"], most: Float[Tensor, "n e e"], temperature: float = 1.0
) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
    """CERT-4: the smallest and largest softmax weight of each expert, 1 / (1 + sum over k != i of exp((g_k - g_i) /
    T)).

    ``least[i, i]`` and ``most[i, i]`` must be 0.
    """
    small, large = (1 / torch.exp(-each / temperature).sum(-1) for each in (least, most))
    return small, large


def weighed(
    lower: Float[Tensor, "n e c"], small: Float[Tensor, "n e"], large: Float[Tensor, "n e"]
) -> Float[Tensor, "n c"]:
    """CERT-4: min of sum_i a_i lower_i over weights of sum 1 between ``small`` and ``large``, class by class: start
    from the small ones, and pour the rest into the expert of the lowest margin first.
    """
    order = lower.argsort(1)
    room = (large - small).clamp(min=0.0)[:, :, None].expand_as(lower).gather(1, order)
    rest = (1 - small.sum(1)).clamp(min=0.0)[:, None, None]
    before = room.cumsum(1) - room
    poured = torch.minimum(room, (rest - before).clamp(min=0.0))
    ordered: Tensor = lower.gather(1, order)
    lowest: Tensor = (small[:, :, None] * lower).sum(1) + (poured * ordered).sum(1)
    return lowest


def dual_margins(
    standard: Float[Tensor, "n c"], robust: Float[Tensor, "n c"], alpha: float | Tensor
) -> Float[Tensor, "n c"]:
    """CERT-8: (1 - alpha) max(standard, -1) + alpha robust, from lower bounds of the halves' probability margins. With
    standard = -1 it is CERT-7, which holds for any standard half.
    """
    return (1 - alpha) * standard.clamp(min=-1.0) + alpha * robust


def threshold(alpha: float) -> float:
    """CERT-7: what the robust half's probability margin must exceed, (1 - alpha) / alpha, whatever the standard half
    is; at alpha <= 1/2 no margin does.
    """
    return float("inf") if alpha <= 0 else (1 - alpha) / alpha
