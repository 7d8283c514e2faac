"""Auxiliary losses of routers: what a training loss adds so that the load is spread; never part of what an attack
climbs.

Each is a function of one `Routing`; p are the softmax of its logits, P their mean over the batch's items. Over several
processes P is that of the global batch, and the gradients' average over the processes is the global gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe import distributed
from robustmoe.routing import Routing, Trace

BalanceLoss = Literal["switch", "entropy", "importance", "column_entropy"]


def load_balance(routing: Routing) -> Float[Tensor, ""]:
    """e * sum over experts of (share of the decisions) * P - 1: 0 when balanced, at most e - 1 (Fedus et al. 2021,
    Switch).

    The shares carry no gradient.
    """
    share = routing.chosen().float().mean((0, 1)) / routing.k
    share = distributed.all_reduce_sum(share.detach()) / distributed.world()
    return routing.num_experts * (share * torch.softmax(routing.logits, -1).mean((0, 1))).sum() - 1


def entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean of H(p) - H(P), in nats: minus the information that the expert carries of the item (arXiv 2509.05086).

    -log e where every item is decided for one expert and every expert has its share; 0 where all p are equal,
    be they uniform or collapsed: it asks for sure decisions, which differ.
    """
    log_p = torch.log_softmax(routing.logits, -1)
    return _entropy(log_p.exp(), log_p).mean() + column_entropy(routing)


def column_entropy(routing: Routing) -> Float[Tensor, ""]:
    """-H(P), in nats: -log e when balanced, 0 when one expert has all probability (arXiv 2509.05086)."""
    mean = _mean_probability(routing)
    return -_entropy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny).log())


def importance(routing: Routing) -> Float[Tensor, ""]:
    """The squared coefficient of variation, over the experts, of the sum of p (Shazeer et al. 2017): 0 when balanced,
    e - 1 when one expert has all probability. As P sums to 1 it is e * sum P^2 - 1.
    """
    return routing.num_experts * _mean_probability(routing).square().sum() - 1


BALANCE_LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": load_balance,
    "entropy": entropy,
    "importance": importance,
    "column_entropy": column_entropy,
}


def auxiliary(trace: Trace, weight: float, loss: BalanceLoss = "switch") -> Tensor | float:
    """``weight`` times the loss, summed over the routers; 0.0 without a weight or a router."""
    return weight * sum((BALANCE_LOSSES[loss](routing) for routing in trace.values()), 0.0) if weight else 0.0


def check_balance_loss(loss: str) -> None:
    """Raises ValueError where there is no loss of that name."""
    if loss not in BALANCE_LOSSES:
        raise ValueError(f"balance_loss must be one of {', '.join(BALANCE_LOSSES)}; got {loss!r}")


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """Over the last axis. The logarithm comes from log space, or is held above that of the smallest number, so that a
    p of 0 adds 0 and has the gradient 0.
    """
    return -(p * log_p).sum(-1)


def _mean_probability(routing: Routing) -> Float[Tensor, " e"]:
    """P of the global batch in value; backward, this process's items, counted as often as there are processes."""
    local = torch.softmax(routing.logits, -1).mean((0, 1))
    total = distributed.all_reduce_sum(local.detach().clone()) / distributed.world()
    return total + (local - local.detach())
