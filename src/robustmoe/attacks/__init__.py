"""Attacks: threats, objectives that know what a router is, and attacks that climb them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from robustmoe import spec as specs
from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.autoattack import AutoAttack, AutoAttackRouting
from robustmoe.attacks.base import Attack, Suite, Wrapped, changed, evaluating, part_noise
from robustmoe.attacks.fab import FAB
from robustmoe.attacks.finite import NotFiniteError
from robustmoe.attacks.fmn import FMN, accuracy_curve
from robustmoe.attacks.folding import Folded
from robustmoe.attacks.half import Bf16
from robustmoe.attacks.losses import kl
from robustmoe.attacks.noisy import Noisy
from robustmoe.attacks.objectives import (
    Diluted,
    ExpertsOnly,
    Held,
    Joint,
    Objective,
    RouterOnly,
    Score,
    Targeted,
    experts_only,
    joint,
    router_only,
    targeted,
)
from robustmoe.attacks.pgd import FGSM, PGD, vmoe_pgd
from robustmoe.attacks.quick import QuickVerdict
from robustmoe.attacks.routes import (
    ExpertTransition,
    JointNormalised,
    OtherRoutes,
    RouteBeam,
    RouteFlip,
    RouterHinge,
    RoutingLoss,
    router_hinge,
)
from robustmoe.attacks.square import Square
from robustmoe.attacks.surrogate import Surrogate, exact_of, missed
from robustmoe.attacks.threat import Threat, l1, l2, linf, size
from robustmoe.attacks.undivided import Undivided
from robustmoe.attacks.views import (
    VIEWS,
    Exact,
    ExpertView,
    HalfView,
    Soft,
    StraightThrough,
    View,
    Viewed,
    at_radius,
    attack_view,
    each_expert,
    halves,
    image_routers,
    sole_router,
)
from robustmoe.errors import UserError

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "vmoe_pgd": vmoe_pgd,
    "apgd": APGD,
    "apgd_t": TargetedAPGD,
    "fab": FAB,
    "square": Square,
    "fmn": FMN,
    "autoattack": AutoAttack,
    "autoattack_routing": AutoAttackRouting,
    "quick_verdict": QuickVerdict,
    "route_flip": RouteFlip,
    "expert_transition": ExpertTransition,
    "route_beam": RouteBeam,
    "other_routes": OtherRoutes,
    "through": Viewed,
    "bf16": Bf16,
    "folded": Folded,
    "undivided": Undivided,
    "noisy": Noisy,
}
THREATS: dict[str, Callable[..., Threat]] = {"linf": linf, "l2": l2, "l1": l1}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "joint": joint,
    "targeted": targeted,
    "experts_only": experts_only,
    "router_only": router_only,
    "router_hinge": router_hinge,
    "joint_normalised": JointNormalised,
    "diluted": Diluted,
}


def build_attack(spec: str | Attack) -> Attack:
    """The attack written as ``spec``: ``build_attack("pgd(linf(8/255), steps=50, objective=router_only)")``."""
    attack: Attack = specs.build(spec, "attack") if isinstance(spec, str) else spec
    if not dataclasses.is_dataclass(attack):
        kind = type(attack).__name__
        raise UserError(f"the attack {kind} is no frozen dataclass; write @dataclass(frozen=True) above its class")
    return attack


__all__ = [
    "APGD",
    "ATTACKS",
    "FAB",
    "FGSM",
    "FMN",
    "OBJECTIVES",
    "PGD",
    "THREATS",
    "VIEWS",
    "Attack",
    "AutoAttack",
    "AutoAttackRouting",
    "Bf16",
    "Diluted",
    "Exact",
    "ExpertTransition",
    "ExpertView",
    "ExpertsOnly",
    "Folded",
    "HalfView",
    "Held",
    "Joint",
    "JointNormalised",
    "Noisy",
    "NotFiniteError",
    "Objective",
    "OtherRoutes",
    "QuickVerdict",
    "RouteBeam",
    "RouteFlip",
    "RouterHinge",
    "RouterOnly",
    "RoutingLoss",
    "Score",
    "Soft",
    "Square",
    "StraightThrough",
    "Suite",
    "Surrogate",
    "Targeted",
    "TargetedAPGD",
    "Threat",
    "Undivided",
    "View",
    "Viewed",
    "Wrapped",
    "accuracy_curve",
    "at_radius",
    "attack_view",
    "build_attack",
    "changed",
    "each_expert",
    "evaluating",
    "exact_of",
    "experts_only",
    "halves",
    "image_routers",
    "joint",
    "kl",
    "l1",
    "l2",
    "linf",
    "missed",
    "part_noise",
    "router_hinge",
    "router_only",
    "size",
    "sole_router",
    "targeted",
    "vmoe_pgd",
]
