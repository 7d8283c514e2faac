"""CERT-2, corollary (c): bounds of an expert on the part of the ball where a top-1 router chooses it.

There g_i >= g_k for every k, so that for all prices l_k >= 0 the least margin on the region is at least the least over
the ball of m + sum_k l_k (g_k - g_i) (weak duality). With linear lower bounds of m and of g_k - g_i this is a linear
function, whose minimum is known; good prices are searched, and any are sound. An empty region shows as a bound that
grows with the prices.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.graph import record
from robustmoe.models.parts import Function

RATE = 0.3
"""Of the search (Adam, on prices of logits)."""


def region_margins(
    network: Function,
    router: Function,
    expert: int,
    ball: Ball,
    y: Int[Tensor, " n"],
    how: Bounding = "crown_ibp",
    steps: int = 20,
) -> Float[Tensor, "n c"]:
    """Lower bounds of the margins of the classes ``y`` where ``router`` chooses ``expert``, whose ``network`` it is;
    the class's own entry is 0 at no price.
    """
    answer, gate = (Bounded(record(function, ball.x), ball, how) for function in (network, router))
    c, e = answer.graph.output.shape[1], gate.graph.output.shape[1]
    unit = torch.eye(c, dtype=ball.x.dtype, device=ball.x.device)
    margin, offset = answer.linear(unit[y][None] - unit[:, None])
    unit = torch.eye(e, dtype=ball.x.dtype, device=ball.x.device)
    rivals = torch.tensor([k for k in range(e) if k != expert], device=ball.x.device)
    lead, lead_offset = gate.linear((unit[rivals] - unit[expert])[:, None].expand(-1, len(y), -1))

    def bound(price: Tensor) -> Tensor:
        slope = margin + torch.einsum("rsn,rn...->sn...", price, lead)
        return ball.lowest(slope) + offset + torch.einsum("rsn,rn->sn", price, lead_offset)

    price = torch.zeros(e - 1, c, len(y), dtype=ball.x.dtype, device=ball.x.device)
    best = bound(price)
    search = torch.optim.Adam([price], betas=(0.9, 0.99), eps=1e-12, maximize=True)
    for step in range(steps):
        with torch.enable_grad():
            at = price.clone().requires_grad_(True)
            price.grad = torch.autograd.grad(bound(at).sum(), at)[0]
        search.param_groups[0]["lr"] = RATE * (1 - step / steps)
        search.step()
        price.clamp_(min=0.0)
        best = torch.maximum(best, bound(price.clone()))
    return best.T
