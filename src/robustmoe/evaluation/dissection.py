"""A routed model taken apart: attacks on the whole, on the route, on each expert alone, and what the model answers.

AdvMoE (Zhang et al., ICCV 2023) and the dual model's paper (Zhang et al., ICML 2025) ask which part of an MoE breaks,
the router or the experts; the second names SA, RA, RA-E and RA-R. How far their own attacks go is not known to us: the
metrics here are ours, but for the router's accuracy on y mod E, which is AdvMoE's released code's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import (
    PGD,
    Attack,
    ExpertTransition,
    Joint,
    Objective,
    RouteFlip,
    Score,
    Surrogate,
    Threat,
    exact_of,
    experts_only,
    kl,
    linf,
    missed,
)
from robustmoe.attacks.losses import Loss, climb
from robustmoe.attacks.objectives import Inner, scored, some, some_routes
from robustmoe.attacks.routes import Misroute, Misrouting, countable
from robustmoe.attacks.routes.regions import decisions, lead
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import Attacked, attack_batch, check_inside, clean_forward, predictions, routes
from robustmoe.evaluation.choosing import climb_of, pgd_on_the_whole, seeded, threat_of
from robustmoe.evaluation.meters import Meter
from robustmoe.evaluation.session import (
    Images,
    Labels,
    Session,
    in_hand,
    on_run,
    tell_of_gradient,
)
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.options import DissectOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Answers, Dissection, Header
from robustmoe.records.dissection import CLEAN
from robustmoe.routing import Routing, Trace, detach, rerouted, to_expert
from robustmoe.runs import named
from robustmoe.training.checkpoint import read_config

STEPS = 20
"""Steps of each attack, unless told."""


# ------------------------------------------------------------------------------------------------ what is climbed


@dataclass(frozen=True)
class Rerouting(Objective):
    """`RouterOnly`'s departure of the routers' decisions; ``fooled``: some router of the exact model, at x_adv, decides
    otherwise than on the clean image. So the iterate that an attack keeps is one that moves the route, whatever the
    experts then say.
    """

    name: ClassVar[str] = "router_only"
    aims_at_router: ClassVar[bool] = True
    aims_at_experts: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        exact = exact_of(model)
        with torch.no_grad():
            trace = decisions(exact, x)

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            clean, attacked = some_routes(trace, rows), decisions(model, x_adv, trace)
            parts = [_departure(routing, attacked[name].logits) for name, routing in clean.items()]
            with torch.no_grad():
                moved = rerouted(clean, decisions(exact, x_adv.detach(), trace))
            return Score(torch.stack(parts).mean(0), torch.stack(list(moved.values())).amax(0) > 0)

        return inner


def _departure(clean: Routing, logits: Tensor) -> Tensor:
    """Returns how far one router has left its clean decision, mean over items (n,)."""
    apart = kl(clean.logits, logits) if clean.k == clean.num_experts else -lead(logits, clean.index)
    return apart.mean(-1)


@dataclass(frozen=True)
class Residue(Objective):
    """CE(router logits, y mod E), as AdvMoE's released code attacks its router (``adv_val_router``); mean over routers.
    ``fooled``: some router of the exact model sends the image elsewhere than to expert y mod E. For routers that
    choose one expert an image.
    """

    name: ClassVar[str] = "router_only"
    aims_at_router: ClassVar[bool] = True
    aims_at_experts: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        exact = exact_of(model)
        with torch.no_grad():
            names = list(decisions(exact, x[:1]))

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            label = some(y, rows)
            parts = [_residue_loss(routing, label) for routing in decisions(model, x_adv, names).values()]
            with torch.no_grad():
                routings = decisions(exact, x_adv.detach(), names).values()
                off = [routing.index[:, 0, 0] != label % routing.num_experts for routing in routings]
            return Score(torch.stack(parts).mean(0), torch.stack(off).any(0))

        return inner


def _residue_loss(routing: Routing, label: Tensor) -> Tensor:
    return F.cross_entropy(routing.logits[:, 0], label % routing.num_experts, reduction="none")


@dataclass(frozen=True)
class OneExpert(Objective):
    """A loss of expert ``k`` alone, forced at every router; ``fooled`` is of this forced model."""

    name: ClassVar[str] = "experts_only"
    aims_at_router: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    k: int
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            clean = exact_of(model).run(x)
            trace = to_expert(detach(clean.trace), self.k)
            before = exact_of(model).run(x, forced=trace).logits

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            fixed, label = some_routes(trace, rows), some(y, rows)
            logits = model.run(x_adv, forced=fixed).logits
            aimed = climb(self.loss, logits, label, some(before, rows))
            return scored(aimed, missed(model, x_adv, logits, label, fixed))

        return inner


def parts_of(attack: PGD, trace: Trace) -> dict[str, Attack]:
    """The attacks of a dissection by name, made from one ``attack`` on the whole model (its threat, steps, step size,
    restarts and seed), for a model with that ``trace``. "residue" only where each router chooses one expert an image;
    "router" is exact about the routes where these can be counted, else a gradient attack (see `Misrouting`).
    """
    loss: Loss = attack.objective.loss if isinstance(attack.objective, Joint) else "ce"
    common = climb_of(attack)
    attacks: dict[str, Attack] = {
        "prediction": attack,
        "experts": replace(attack, objective=experts_only(loss)),
        "router": Misroute(**common) if countable(trace) else replace(attack, objective=Misrouting(loss)),
        "steering": ExpertTransition(**common),
        "margin": replace(attack, objective=Rerouting()),
        "flip": RouteFlip(**common),
    }
    if all(tuple(routing.index.shape[1:]) == (1, 1) for routing in trace.values()):
        attacks["residue"] = replace(attack, objective=Residue())
    experts = min(routing.num_experts for routing in trace.values())
    return attacks | {f"expert {k}": replace(attack, objective=OneExpert(k, loss)) for k in range(experts)}


# ------------------------------------------------------------------------------------------------ the public functions


@takes(DissectOptions, limit=None)
def dissect(
    model: Callable[[Tensor], Tensor],
    x: Images,
    y: Labels = None,
    *,
    options: DissectOptions,
    num_classes: int | None = None,
) -> Dissection:
    """Takes a routed model apart: how well its router keeps the route, and its experts the label, each attacked alone.

    ``x``, ``y``: images (n, ch, h, w) in [0, 1] with labels (n), or a data set of the project (its test split).
    The attack, from which the others are made (`parts_of`), is by default PGD-20 at linf 8/255. The model is judged by
    itself, in its own precision; a frozen copy is climbed. It keeps its modes and device. Raises UserError for a model
    without a router, and where `evaluate` does.
    """
    base = _base(options, linf(8 / 255))
    with in_hand(model, x, y, options, num_classes) as session:
        return _dissected(session, base)


@takes(DissectOptions)
def dissect_run(run: str | Path, *, options: DissectOptions) -> Dissection:
    """Takes the model of a run folder apart on its first test images; writes ``RUN/dissection.json`` after each attack,
    and a rerun goes on with the attacks that are missing.

    The attack is by default PGD-20 at the threat the run was trained for. Raises UserError where `dissect` does.
    """
    base = _base(options, threat_of(read_config(named(run))))
    with on_run(run, options) as session:
        return _dissected(session, base)


def _base(options: DissectOptions, threat: Threat) -> PGD:
    return seeded(pgd_on_the_whole(options.attack, PGD(threat, steps=STEPS), "a dissection"), options.seed)


# ------------------------------------------------------------------------------------------------ the work


def _dissected(session: Session, base: PGD) -> Dissection:
    """Asks all questions; those that are answered in the folder's file are not asked again."""
    output = session.output
    if not output.trace:
        raise UserError("the model has no router, so there is nothing to take apart; robustmoe evaluate attacks it")
    header = session.attack_header(base)
    attacks = parts_of(base, output.trace)
    record = session.resume(Dissection, header, lambda old: len(old.under)) or session.keep(
        measure_clean(session, header, base.threat)
    )
    todo = {name: attack for name, attack in attacks.items() if name not in record.under}
    if not todo:
        return record
    meter = Meter()
    tell_of_gradient(session.model, session.probe.x)
    climbed = session.surrogate(meter)
    costs = {name: attack.queries(output) * len(session.images) for name, attack in todo.items()}
    with progress(sum(costs.values()), "dissect", unit="passes") as bar:
        meter.bar = bar
        for name, attack in todo.items():
            bar.say(name)
            costs.pop(name)
            answers = run_attack(session, climbed, attack, name)
            bar.expect(meter.queries + sum(costs.values()))
            under = {**record.under, name: answers}
            under = {name: under[name] for name in (CLEAN, *attacks) if name in under}
            record = session.keep(replace(record, under=under, done=len(under) == len(attacks) + 1))
    return record


@torch.no_grad()
def measure_clean(session: Session, header: Header, threat: Threat) -> Dissection:
    """What is asked of the clean images."""
    model = session.model
    experts = min(info.experts for info in header.routers.values())
    parts: list[Answers] = []
    forced: list[list[int]] = [[] for _ in range(experts)]
    narrow: dict[str, list[float]] = {}
    wide: dict[str, list[float]] = {}
    entropy: dict[str, list[float]] = {}
    for batch in session.batches():
        done = clean_forward(model, batch)
        parts.append(_answers(model, done, done.clean.trace, threat))
        for k, column in enumerate(forced):
            column += predictions(model.run(batch.x, forced=to_expert(done.clean.trace, k)))
        for name, routing in done.clean.trace.items():
            log_gate = torch.log_softmax(routing.logits, -1)
            entropy.setdefault(name, []).extend((-(log_gate.exp() * log_gate).sum(-1)).mean(-1).tolist())
            if routing.k < routing.num_experts:
                gap = lead(routing.logits, routing.index)
                narrow.setdefault(name, []).extend(gap.amin(-1).tolist())
                wide.setdefault(name, []).extend(gap.amax(-1).tolist())
    under = {CLEAN: _joined(parts)}
    index, labels = session.images.index.tolist(), session.images.labels.tolist()
    return Dissection(header, index, labels, forced, narrow, wide, entropy, under, 0.0)


def run_attack(session: Session, climbed: Surrogate, attack: Attack, name: str) -> Answers:
    """The answers under one attack on all images. UserError where it stops, or leaves the ball or the box."""
    parts = []
    for batch in session.batches():
        noise = Noise.of(batch.index, attack.seed)
        done = attack_batch(session.model, attack, batch, noise, climbed)
        k = attack.objective.k if isinstance(attack, PGD) and isinstance(attack.objective, OneExpert) else None
        fixed = done.clean.trace if k is None else to_expert(done.clean.trace, k)
        answers = _answers(session.model, done, fixed, attack.threat)
        check_inside(attack.threat, done.batch.x, done.x_adv, name)
        if isinstance(attack, RouteFlip):
            answers = replace(answers, moved=_flipped(attack, climbed, batch, noise, done.clean, answers.moved))
        parts.append(answers)
    return _joined(parts)


def _flipped(
    attack: RouteFlip, climbed: Surrogate, batch: Batch, noise: Noise, clean: Output, moved: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Returns ``moved``, with 1 where that router can be moved by an attack on it alone. The model's own class stands
    for the label, so that images which it gets wrong are attacked too.
    """
    flips = attack.flips(climbed, batch.x, clean.logits.argmax(1), noise)
    alone = {name: flip.flipped.tolist() for name, flip in flips.items()}
    return {
        name: [max(share, float(hit)) for share, hit in zip(shares, alone[name])] if name in alone else shares
        for name, shares in moved.items()
    }


@torch.no_grad()
def _answers(model: RoutedModel, done: Attacked, fixed: Trace, threat: Threat) -> Answers:
    """Asks the exact model, in two passes more. ``fixed``: the routing that ``routing_fixed`` is asked on."""
    x, x_adv = done.batch.x.float(), done.x_adv.float()
    return Answers(
        predicted=list(predictions(done.attacked)),
        routing_fixed=list(predictions(model.run(done.x_adv, forced=fixed))),
        routing_transplanted=list(predictions(model.run(done.batch.x, forced=done.attacked.trace))),
        size=threat.size(x_adv - x).tolist(),
        routes=routes(done.attacked.trace),
        moved={name: shares.tolist() for name, shares in rerouted(done.clean.trace, done.attacked.trace).items()},
    )


def _joined(parts: Sequence[Answers]) -> Answers:
    """Returns the batches' answers, one after the other."""

    def column(field: str) -> list[Any]:
        return [value for part in parts for value in getattr(part, field)]

    def named(field: str) -> dict[str, list[Any]]:
        return {name: [v for part in parts for v in getattr(part, field)[name]] for name in getattr(parts[0], field)}

    plain = {field: column(field) for field in ("predicted", "routing_fixed", "routing_transplanted", "size")}
    return Answers(**plain, routes=named("routes"), moved=named("moved"))
