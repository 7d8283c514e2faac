"""Validation after an epoch, and the health of the routers: who gets the images, and who is dead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from robustmoe import distributed
from robustmoe.attacks import Attack
from robustmoe.certification import Certifier
from robustmoe.data import Batch, ImageSet, batches
from robustmoe.models.base import RoutedModel
from robustmoe.models.norm import answers, full_precision
from robustmoe.noise import Noise
from robustmoe.routing import Routing


class Validation(NamedTuple):
    """Accuracies on ``n`` images (``robust`` None without an attack, ``certified`` without a certifier). Of each
    router: ``load``, the share of its decisions that went to each expert (what found no room went to none); ``gap``,
    best minus second logit, the mean over decisions; ``consistency``, the share of decisions that are the same under
    the attack ({} without one).
    """

    clean: float
    robust: float | None
    n: int
    load: dict[str, list[float]]
    gap: dict[str, float]
    consistency: dict[str, float]
    certified: float | None = None


def validate(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack | None,
    batch_size: int,
    device: torch.device,
    seed: int,
    autocast: torch.dtype | None = None,
    certifier: Certifier | None = None,
) -> Validation:
    """Clean accuracy, accuracy under ``attack`` and the one that ``certifier`` proves at its eps, each process on its
    share of the images. Leaves the model in eval mode.

    An image counts as robust where it is right both before and after the attack, and as wrong where its logits are
    not finite.
    """
    model.eval()
    mine = _shared(len(images))
    real = int((mine < len(images)).sum())
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    sums: dict[str, Tensor] = {}
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        for batch in batches(images, batch_size, mine % len(images), device):
            right, robust, own = _answers(model, batch, min(real, len(batch.x)), attack, seed)
            real -= len(batch.x)
            for name, values in own.items():
                sums[name] = sums.get(name, 0) + values
            counts += torch.stack([right.sum(), robust.sum(), _proven(model, batch, right, certifier, seed)])
    distributed.all_reduce_sum(counts)
    totals = {name: distributed.all_reduce_sum(sums[name]).tolist() for name in sorted(sums)}
    clean_share, robust_share, certified_share = (counts / len(images)).tolist()
    return Validation(
        clean_share,
        robust_share if attack is not None else None,
        len(images),
        {name: [n / max(1, sum(load)) for n in load] for name, (*load, _, _, _) in totals.items()},
        {name: gap / max(1, n) for name, (*_, n, gap, _) in totals.items()},
        {name: same / max(1, n) for name, (*_, n, _, same) in totals.items()} if attack is not None else {},
        certified_share if certifier is not None else None,
    )


VALIDATION = 4
"""The key under which validation draws its noise: the same in every epoch, so that epochs can be compared."""


def _shared(images: int) -> Tensor:
    """Returns the positions of this process's images. Each process has as many, so that all make the same passes: the
    last may be past the end, and is not counted.
    """
    each = -(-images // distributed.world())
    return torch.arange(each) * distributed.world() + distributed.rank()


def _answers(
    model: RoutedModel, batch: Batch, real: int, attack: Attack | None, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns which images (n,) are right, which are so before and after the attack, and each router's `_sums`; those
    from ``real`` on count as wrong, and in no sum.
    """
    counted = torch.arange(len(batch.x), device=batch.x.device) < real
    with torch.no_grad():
        clean = model.run(batch.x)
    right = _right(clean.logits, batch.y) & counted
    kept = {name: routing[:real] for name, routing in clean.trace.items()}
    if attack is None:
        return right, right, {name: _sums(routing, routing) for name, routing in kept.items()}
    x_adv = attack(model, batch.x, batch.y, Noise.of(batch.index, seed, VALIDATION))
    with torch.no_grad():
        attacked = model.run(x_adv)
    sums = {name: _sums(routing, attacked.trace[name][:real]) for name, routing in kept.items()}
    return right, right & _right(attacked.logits, batch.y), sums


def _right(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y) & answers(logits)


def _proven(model: RoutedModel, batch: Batch, right: Tensor, certifier: Certifier | None, seed: int) -> Tensor:
    """Returns how many of the images that are right are certified at the certifier's eps."""
    if certifier is None:
        return right.new_zeros((), dtype=torch.long)
    with full_precision(batch.x):
        certificates = certifier(model, batch.x, Noise.of(batch.index, seed, VALIDATION))
    labelled = zip(certificates, batch.y.tolist())
    sure = [each.prediction == label and each.radius >= certifier.eps for each, label in labelled]
    return (right & torch.tensor(sure, device=right.device)).sum()


def _sums(clean: Routing, attacked: Routing) -> Tensor:
    """(e + 3,): how often each expert was chosen, the decisions, the sum of their gaps, how many stayed."""
    chosen = clean.chosen().sum((0, 1)).double()
    best = clean.logits.double().topk(min(2, clean.num_experts), dim=-1).values
    same = (clean.chosen() == attacked.chosen()).all(-1)
    rest = torch.stack([best.new_tensor(same.numel()), (best[..., 0] - best[..., -1]).sum(), same.double().sum()])
    return torch.cat([chosen, rest])


def trainable_routers(model: RoutedModel, x: Tensor) -> dict[str, bool]:
    """Returns for each router whether its decision is declared to pass a gradient to it (a "hard" gate does not)."""
    with torch.enable_grad():
        trace = model.eval().run(x).trace
    return {name: routing.weight.requires_grad for name, routing in trace.items()}


class RouterLine(TypedDict):
    """What a line of ``metrics.jsonl`` says of a router (see `router_health`)."""

    load: list[float]
    entropy: float
    dead: list[int]
    gap: float
    consistency: float | None
    grad_norm: float
    moved: bool
    declared_fixed: bool


def router_health(
    validation: Validation, grad: dict[str, float], moved: dict[str, bool], trainable: dict[str, bool]
) -> dict[str, RouterLine]:
    """Returns the routers' part of a metrics line: load, its entropy in nats, dead experts, gap and consistency (None
    without an attack), gradient norm, and whether the router learned.
    """
    return {
        name: {
            "load": shares,
            "entropy": -sum(s * math.log(s) for s in shares if s > 0),
            "dead": [expert for expert, share in enumerate(shares) if share == 0],
            "gap": validation.gap[name],
            "consistency": validation.consistency.get(name),
            "grad_norm": grad.get(name, 0.0),
            "moved": moved[name] and grad.get(name, 0.0) > 0,
            "declared_fixed": not trainable[name],
        }
        for name, shares in validation.load.items()
    }


def complaints(health: Mapping[str, RouterLine]) -> list[str]:
    """Returns what a person should know of the routers at once, one line each."""
    lines = []
    for name, router in health.items():
        if not router["moved"] and not router["declared_fixed"]:
            lines.append(
                f"warning: router {name!r} got no gradient in this epoch, so it does not learn; use a gate that passes "
                "one (straight_through, vmoe, soft), or a phase that moves it"
            )
        if router["dead"]:
            lines.append(f"warning: router {name!r} sends no validation image to expert(s) {router['dead']}")
    return lines
