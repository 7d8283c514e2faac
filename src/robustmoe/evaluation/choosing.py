"""What an evaluation runs: the attacks for a model, their seeds and radii, and what they are called in files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from robustmoe import spec as specs
from robustmoe.attacks import (
    PGD,
    Attack,
    ExpertTransition,
    Joint,
    Objective,
    RouteBeam,
    Threat,
    build_attack,
    changed,
    experts_only,
    image_routers,
    joint,
    linf,
    router_only,
    targeted,
)
from robustmoe.certification import Certifier
from robustmoe.errors import UserError
from robustmoe.models.base import Output
from robustmoe.progress import note
from robustmoe.routing import Trace

Kind = TypeVar("Kind", bound=Attack)

CURVE = (0.25, 0.5, 1.5, 2.0)
"""Radii of the accuracy curve, as multiples of the attack's own, unless told."""


def attacks_for(output: Output, given: Sequence[Attack], threat: Threat) -> list[Attack]:
    """The attacks to run on the model that gave ``output``, each once: the given ones, or the default; those that need
    a router are left out for a dense model, and that is said. A dense model meets as many attacks by default as a
    routed one: a comparison of worst cases is fair.
    """
    trace = output.trace
    wanted: list[Attack] = []
    default = _of_a_routed(trace, threat) if trace else _of_a_dense(output.logits.shape[1], threat)
    for attack in given or default:
        if attack not in wanted:
            wanted.append(attack)
    if trace:
        return wanted
    whole = [attack for attack in wanted if not attack.needs_router]
    if not whole:
        raise UserError(
            "the model has no router, and every attack asked for is on the routers or the experts "
            "alone; add one on the whole model, such as pgd(linf(8/255), steps=20)"
        )
    if given and len(whole) < len(wanted):
        note(f"the model has no router: {len(wanted) - len(whole)} attack(s) on experts or routers alone left out")
    return whole


def _of_a_routed(trace: Trace, threat: Threat) -> list[Attack]:
    """PGD-20 on the whole model, on the experts and on the routers, and an attack on the routing."""
    objectives: tuple[Objective, ...] = (joint(), experts_only(), router_only())
    routers = image_routers(trace)
    regions = math.prod(routing.num_experts for routing in routers.values())
    every = len(routers) == 1 or 1 < regions <= ExpertTransition.regions  # no region is left out
    last: Attack = ExpertTransition(threat) if every else RouteBeam(threat)
    return [*(PGD(threat, steps=20, objective=each) for each in objectives), last]


def _of_a_dense(classes: int, threat: Threat) -> list[Attack]:
    """PGD-20 on the cross-entropy, on the margin, and towards the two likeliest wrong classes."""
    ranks = [rank for rank in (2, 3) if rank <= classes]
    objectives: list[Objective] = [joint(), joint("margin"), *(targeted(rank, "margin") for rank in ranks)]
    return [PGD(threat, steps=20, objective=each) for each in objectives]


def one_norm(attacks: Sequence[Attack], certified: Mapping[int, float] | None) -> None:
    """UserError where radii of one norm are given for attacks of several."""
    norms = {attack.threat.norm for attack in attacks}
    if certified and len(norms) > 1:
        raise UserError(
            f"the certified radii are of one norm, the attacks of {' and '.join(sorted(norms))}; evaluate one norm "
            "at a time"
        )


def pgd_on_the_whole(attack: str | Attack | None, default: PGD, what: str) -> PGD:
    """The one attack that ``what`` ("a dissection") makes all its attacks from. UserError for another kind."""
    built = default if attack is None else build_attack(attack)
    if not isinstance(built, PGD) or not isinstance(built.objective, Joint):
        raise UserError(
            f"{what} makes its attacks from one pgd on the whole model; got {spec_or_repr(built)}, expected such as "
            "pgd(linf(8/255), steps=20)"
        )
    return built


def climb_of(attack: PGD) -> dict[str, Any]:
    """Returns how ``attack`` climbs, as the arguments that attacks of the same cost and ball take."""
    return {name: getattr(attack, name) for name in ("threat", "steps", "step_size", "restarts", "seed")}


def seeded(attack: Kind, seed: int) -> Kind:
    """Returns the attack with ``seed``, unless its spec gives one of its own."""
    return attack if attack.seed else changed(attack, seed=seed)  # type: ignore[return-value]


def threat_of(config: dict[str, Any]) -> Threat:
    """The threat a run was trained for, as ``config.json`` says it; linf 8/255 where it says none. The training method
    is not built: a run outlives it.
    """
    if config.get("method") and "threat" not in config:
        note("config.json does not say for which ball this run was trained: what is not told is linf(8/255)")
    threat: Threat = specs.build(config["threat"], "threat") if config.get("threat") else linf(8 / 255)
    return threat


def radii_of(threat: Threat, radii: Sequence[float] | None) -> list[float]:
    """The radii of a curve around ``threat``, without its own and without 0. UserError for one its norm cannot have."""
    top = 1.0 if threat.norm == "linf" else math.inf
    if radii is None:
        radii = [threat.eps * factor for factor in CURVE if threat.eps * factor <= top]
    for radius in radii:
        if not 0 <= radius <= top or radius == math.inf:
            limits = "from 0 to 1" if threat.norm == "linf" else "0 or more"
            raise UserError(
                f"{radius:g} is no radius of the {threat.norm} curve; expected numbers {limits}, in pixels of [0, 1] "
                "(8/255)"
            )
    return [radius for radius in dict.fromkeys(radii) if radius > 0 and abs(radius - threat.eps) > 1e-12]


def spec_or_repr(attack: Attack | Certifier) -> str:
    """The spec of an attack or certifier; for a user's own class, which has none, its representation (its name where
    that would hold an address).
    """
    try:
        return specs.text(attack)
    except UserError:
        return repr(attack) if dataclasses.is_dataclass(attack) else type(attack).__name__


def files_of(thing: Attack | Certifier) -> dict[str, str]:
    """The files of a user's own that an attack or certifier is written with, and their SHA-256. None for one that has
    no spec: Python alone has made it.
    """
    try:
        text = specs.text(thing)
    except UserError:
        return {}
    return specs.files(text)
