"""Attacks: threats, objectives that know what a router is, FGSM and PGD."""

from __future__ import annotations

from collections.abc import Callable

from robustmoe import spec as specs
from robustmoe.attacks.base import Attack, evaluating
from robustmoe.attacks.objectives import (
    ExpertsOnly,
    Joint,
    Objective,
    RouterOnly,
    Score,
    Targeted,
    experts_only,
    joint,
    kl,
    router_only,
    targeted,
)
from robustmoe.attacks.pgd import FGSM, PGD, NotFiniteError
from robustmoe.attacks.surrogate import Surrogate, exact_of, missed
from robustmoe.attacks.threat import Threat, l1, l2, linf, size

ATTACKS: dict[str, Callable[..., Attack]] = {"fgsm": FGSM, "pgd": PGD}
THREATS: dict[str, Callable[..., Threat]] = {"linf": linf, "l2": l2, "l1": l1}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "joint": joint,
    "targeted": targeted,
    "experts_only": experts_only,
    "router_only": router_only,
}


def build_attack(spec: str | Attack) -> Attack:
    """The attack written as ``spec``: ``build_attack("pgd(linf(8/255), steps=50, objective=router_only)")``."""
    attack: Attack = specs.build(spec, "attack") if isinstance(spec, str) else spec
    return attack


__all__ = [
    "ATTACKS",
    "FGSM",
    "OBJECTIVES",
    "PGD",
    "THREATS",
    "Attack",
    "ExpertsOnly",
    "Joint",
    "NotFiniteError",
    "Objective",
    "RouterOnly",
    "Score",
    "Surrogate",
    "Targeted",
    "Threat",
    "build_attack",
    "evaluating",
    "exact_of",
    "experts_only",
    "joint",
    "kl",
    "l1",
    "l2",
    "linf",
    "missed",
    "router_only",
    "size",
    "targeted",
]
