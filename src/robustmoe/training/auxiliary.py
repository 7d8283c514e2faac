"""Auxiliary losses of routers: what a training loss adds so that the load is spread; never part of what an attack
climbs.

Each is a function of one `Routing`; p are the softmax of its logits, P their mean over the batch's items. Over several
processes P is that of the global batch, and the gradients' average over the processes is the global gradient. V-MoE's
code (Riquelme et al. 2021) takes means over groups of some images and averages the losses; here the batch is the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe import distributed
from robustmoe.errors import UserError
from robustmoe.routing import Routing, Trace

BalanceLoss = Literal[
    "switch", "switch_best", "variance", "entropy", "importance", "column_entropy", "load", "vmoe", "gshard", "z"
]


def load_balance(routing: Routing) -> Float[Tensor, ""]:
    """e * sum over experts of (share of the decisions) * P - 1: 0 when balanced, at most e - 1 (Fedus et al. 2021,
    Switch).

    The shares carry no gradient.
    """
    share = _over_processes(routing.chosen().float().mean((0, 1)) / routing.k)
    return routing.num_experts * (share * torch.softmax(routing.logits, -1).mean((0, 1))).sum() - 1


def switch_best(routing: Routing) -> Float[Tensor, ""]:
    """`load_balance` with the share of the items whose largest logit is the expert's, whatever noise, room or k made of
    it (the "switch" of the released code of arXiv 2509.05086): 0 when balanced, at most e - 1.
    """
    best = torch.zeros_like(routing.logits).scatter_(-1, routing.logits.argmax(-1, keepdim=True), 1.0)
    share = _over_processes(best.mean((0, 1)))
    return routing.num_experts * (share * torch.softmax(routing.logits, -1).mean((0, 1))).sum() - 1


def variance(routing: Routing) -> Float[Tensor, ""]:
    """`switch_best` plus 1, minus the mean over the experts of the deviation of p over the items (arXiv 2509.05086,
    released code): decisions that are balanced and differ. Unbiased; of a single item the deviation is 0.
    """
    p = torch.softmax(routing.logits, -1)
    items = p.shape[0] * p.shape[1] * distributed.world()
    spread = _global_mean((p - _over_processes(p.mean((0, 1)))).square()) * items / max(1, items - 1)
    return switch_best(routing) + 1 - spread.clamp(min=torch.finfo(p.dtype).tiny).sqrt().mean()


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
    """Returns the squared coefficient of variation, over the experts, of the sum of p (Shazeer et al. 2017): 0 when
    balanced, e - 1 when one expert has all probability. As P sums to 1 it is e * sum P^2 - 1.
    """
    return routing.num_experts * _mean_probability(routing).square().sum() - 1


def load(routing: Routing) -> Float[Tensor, ""]:
    """Returns the squared coefficient of variation, over the experts, of the mean probability of being chosen, were a
    router's training noise drawn anew (Riquelme et al. 2021): 0 when balanced.

    Expert i's probability is 1 - Phi(e * (threshold - logit i)): e, as the noise has deviation 1/e; the threshold is
    the k-th largest logit with noise and has a gradient, the logit is the one without. Raises UserError for a router
    that decided without noise.
    """
    if routing.noisy is None:
        raise UserError(
            "balance_loss 'load' (and 'vmoe', half of which it is) needs the training noise of the router, and this "
            "one decides without; expected token choice with gating vmoe, renormalised or hard and noise=True; else "
            "take balance_loss=importance or gshard"
        )
    threshold = routing.noisy.topk(routing.k, dim=-1).values[..., -1:]
    chance = torch.special.ndtr((routing.logits - threshold) * routing.num_experts)
    mean = _global_mean(chance)
    return mean.var(correction=0) / mean.mean().square()


def vmoe(routing: Routing) -> Float[Tensor, ""]:
    """(importance + load) / 2: V-MoE's loss, whose weight was 0.01 (in its code, 0.005 for each)."""
    return (importance(routing) + load(routing)) / 2


def gshard(routing: Routing) -> Float[Tensor, ""]:
    """e * sum over experts of (share of the items whose best expert it is) * P, with the training noise in both where
    there is any (Lepikhin et al. 2021, as V-MoE's code has it): 1 when balanced, at most e.

    The shares carry no gradient. V-MoE's code takes this loss for 2 experts, with weight 0.01.
    """
    best = torch.zeros_like(routing.logits).scatter_(-1, routing.index[..., :1], 1.0)
    share = _over_processes(best.mean((0, 1)))
    p = torch.softmax(routing.logits if routing.noisy is None else routing.noisy, -1)
    return routing.num_experts * (share * p.mean((0, 1))).sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean of logsumexp(logits)^2: keeps the logits small, and spreads nothing (ST-MoE, Zoph et al. 2022)."""
    return torch.logsumexp(routing.logits, -1).square().mean()


BALANCE_LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": load_balance,
    "switch_best": switch_best,
    "variance": variance,
    "entropy": entropy,
    "importance": importance,
    "column_entropy": column_entropy,
    "load": load,
    "vmoe": vmoe,
    "gshard": gshard,
    "z": z_loss,
}


def auxiliary(trace: Trace, weight: float, loss: BalanceLoss = "switch") -> Tensor | float:
    """``weight`` times the loss, summed over the routers; 0.0 without a weight or a router."""
    return weight * sum((BALANCE_LOSSES[loss](routing) for routing in trace.values()), 0.0) if weight else 0.0


def check_balance_loss(loss: str) -> None:
    """Raises ValueError where there is no loss of that name."""
    if loss not in BALANCE_LOSSES:
        raise ValueError(f"balance_loss must be one of {', '.join(BALANCE_LOSSES)}; got {loss!r}")


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """Returns the entropy over the last axis. The logarithm comes from log space, or is held above that of the smallest
    number, so that a p of 0 adds 0 and has the gradient 0.
    """
    return -(p * log_p).sum(-1)


def _mean_probability(routing: Routing) -> Float[Tensor, " e"]:
    return _global_mean(torch.softmax(routing.logits, -1))


def _global_mean(each: Float[Tensor, "n t e"]) -> Float[Tensor, " e"]:
    """Returns the mean over the items of the global batch in value; backward, over this process's items, counted as
    often as there are processes.
    """
    return in_global_batch(each.mean((0, 1)))


def in_global_batch(mean: Tensor) -> Tensor:
    """Returns a mean over this process's items, as the one over all processes' in value (their shares are equal), and
    backward as it was: the average over the processes of a function's gradients is then that of the global batch.
    """
    return _over_processes(mean) + (mean - mean.detach())


def _over_processes(mean: Tensor) -> Tensor:
    return distributed.all_reduce_sum(mean.detach().clone()) / distributed.world()
