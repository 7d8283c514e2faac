"""Accuracy, loss and routes over eps: the evaluation of Puigcerver et al. (NeurIPS 2022, arXiv 2210.10253), as their
released code has it, with a strong attack beside theirs.

Their attack (`vmoe_pgd`) is weak; it is here to compare with the paper. What each attack gives is put to the exact
model again, and so are its images on the clean route and the clean images on its route.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import PGD, Attack, Surrogate, at_radius, build_attack, linf, vmoe_pgd
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import Attacked, attack_batch, check_inside, clean_forward, predictions
from robustmoe.evaluation.choosing import seeded, spec_or_repr
from robustmoe.evaluation.meters import Meter
from robustmoe.evaluation.redundancy import redundancy
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
from robustmoe.options import PAPER_EPS, SweepOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Header, Sweep, SweepAnswers
from robustmoe.routing import Trace, rerouted

ATTACKS: tuple[Attack, ...] = (vmoe_pgd(linf(8 / 255)), PGD(linf(8 / 255), steps=50, restarts=2))
"""The paper's and a strong one, unless told."""


# ------------------------------------------------------------------------------------------------ public functions


@takes(SweepOptions, limit=None)
def sweep(
    model: Callable[[Tensor], Tensor],
    x: Images,
    y: Labels = None,
    *,
    options: SweepOptions,
    num_classes: int | None = None,
) -> Sweep:
    """Attacks ``model`` at every eps, and says what is left and how far its routes move.

    ``x``, ``y``: images (n, ch, h, w) in [0, 1] with labels (n), or a data set of the project (its test split). The
    attacks are of one norm, each made again at every radius; by default `vmoe_pgd` and PGD-50 with 2 restarts. A dense
    model has no routes, and the rest of the numbers. ``seed``: of the draws, and of the attacks whose spec gives none.
    The model keeps its modes and device. Raises UserError where `evaluate` does.
    """
    grid = grid_of(options)
    with in_hand(model, x, y, options, num_classes) as session:
        return _swept(session, grid)


@takes(SweepOptions)
def sweep_run(run: str | Path, *, options: SweepOptions) -> Sweep:
    """Sweeps the model of a run folder on its first test images; writes ``RUN/sweep.json`` after each attack and eps. A
    rerun goes on with what is missing, and other attacks or radii are added to what is there.

    The rest: see `sweep`.
    """
    grid = grid_of(options)
    with on_run(run, options) as session:
        return _swept(session, grid)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class EpsGrid:
    """What a sweep asks: ``attacks`` by their specs, at the radii that they were given with, each at every ``eps``."""

    attacks: dict[str, Attack]
    eps: tuple[float, ...]

    @property
    def first(self) -> Attack:
        return next(iter(self.attacks.values()))

    def left(self, record: Sweep) -> list[tuple[str, float]]:
        """The attacks and radii that are not there yet, attack by attack."""
        there = {(point.attack, point.eps) for point in record.points}
        return [(name, eps) for name in self.attacks for eps in self.eps if (name, eps) not in there]


def grid_of(options: SweepOptions) -> EpsGrid:
    """What the options ask. UserError for what cannot be asked."""
    chosen = [seeded(build_attack(attack), options.seed) for attack in options.attacks or ATTACKS]
    norms = {attack.threat.norm for attack in chosen}
    if len(norms) > 1:
        raise UserError(f"the attacks are of {' and '.join(sorted(norms))}; expected one norm, sweep one at a time")
    if not all(attack.threat.eps > 0 for attack in chosen):
        raise UserError("an attack of eps 0 cannot be made again at another; expected one such as pgd(linf(8/255))")
    return EpsGrid({spec_or_repr(attack): attack for attack in chosen}, _radii(options.eps, norms.pop()))


def _radii(given: Sequence[float], norm: str) -> tuple[float, ...]:
    """Each once, in rising order. UserError for what is no radius."""
    if norm != "linf" and given in (PAPER_EPS, SweepOptions().eps):
        raise UserError(f"these radii are of linf, the attacks of {norm}; expected --eps such as 0.25,0.5,1")
    top = 1.0 if norm == "linf" else math.inf
    for radius in given:
        if not 0 < radius <= top or radius == math.inf:
            limits = "above 0 and at most 1" if norm == "linf" else "above 0"
            raise UserError(
                f"{radius:g} is no eps of a sweep of {norm}; expected numbers {limits}, in pixels of [0, 1] (8/255)"
            )
    if not given:
        raise UserError("a sweep needs at least one eps, such as 8/255")
    return tuple(sorted({float(radius) for radius in given}))


# ------------------------------------------------------------------------------------------------ the work


def _swept(session: Session, grid: EpsGrid) -> Sweep:
    """Asks all questions; those that are answered in the folder's file are not asked again."""
    options: SweepOptions = session.options
    header = session.attack_header(grid.first)  # the attacks and radii are with the answers
    header = replace(header, attack=None, objective=None, eps=0.0, parts=[], seed=options.seed)

    def keep(record: Sweep) -> Sweep:
        return session.keep(replace(record, done=not grid.left(record)))

    record = session.resume(Sweep, header, lambda old: len(old.points)) or keep(measure_clean(session, header))
    if options.draws not in (0, record.draws):
        overrides, sentences = redundancy(session)
        record = keep(replace(record, draws=options.draws, overrides=overrides, left_out=sentences))
    todo = grid.left(record)
    if not todo:
        return record if record.done else keep(record)
    meter = Meter()
    tell_of_gradient(session.model, session.probe.x)
    climbed = session.surrogate(meter)
    costs = [grid.attacks[name].queries(session.output) * len(session.images) for name, _ in todo]
    with progress(sum(costs), "sweep", unit="passes") as bar:
        meter.bar = bar
        for at, (name, eps) in enumerate(todo):
            bar.say(f"{name} at {eps:.4g}, {at + 1} of {len(todo)}")
            point = run_attack(session, climbed, grid.attacks[name], name, eps)
            record = keep(replace(record, points=_in_order([*record.points, point])))
            bar.expect(meter.queries + sum(costs[at + 1 :]))
    return record


def _in_order(points: list[SweepAnswers]) -> list[SweepAnswers]:
    """The attacks as they came, each by rising eps."""
    attacks = list(dict.fromkeys(point.attack for point in points))
    return sorted(points, key=lambda point: (attacks.index(point.attack), point.eps))


@torch.no_grad()
def measure_clean(session: Session, header: Header) -> Sweep:
    """What is asked of the clean images."""
    predicted: list[int] = []
    losses: list[float] = []
    for batch in session.batches():
        done = clean_forward(session.model, batch)
        predicted += predictions(done.clean)
        losses += _losses(done.clean, batch.y)
    index, labels = session.images.index.tolist(), session.images.labels.tolist()
    return Sweep(header, index, labels, predicted, losses, 0, [], [], [], 0.0)


def run_attack(session: Session, climbed: Surrogate, base: Attack, name: str, eps: float) -> SweepAnswers:
    """The answers under one attack at one eps. UserError where it stops, or leaves the ball or the box."""
    attack = at_radius(base, eps)
    answers = SweepAnswers(name, eps, [], [], [], [], [], {}, {}, {})
    for batch in session.batches():
        done = attack_batch(session.model, attack, batch, Noise.of(batch.index, attack.seed), climbed)
        check_inside(attack.threat, batch.x, done.x_adv, name)
        append_batch(answers, session.model, done, attack)
    return answers


@torch.no_grad()
def append_batch(answers: SweepAnswers, model: RoutedModel, done: Attacked, attack: Attack) -> None:
    """Puts what was answered to one batch more at the end of the lists of ``answers``."""
    batch, clean, attacked = done.batch, done.clean, done.attacked
    answers.predicted.extend(predictions(attacked))
    answers.loss.extend(_losses(attacked, batch.y))
    answers.size.extend(attack.threat.size(done.x_adv.float() - batch.x.float()).tolist())
    if not clean.trace:
        return
    answers.routing_fixed.extend(predictions(model.run(done.x_adv, forced=clean.trace)))
    answers.routing_transplanted.extend(predictions(model.run(batch.x, forced=attacked.trace)))
    for columns, shares in (
        (answers.moved, rerouted(clean.trace, attacked.trace)),
        (answers.moved_paper, rerouted(clean.trace, attacked.trace, empty="changed")),
        (answers.idle, _idle(clean.trace, attacked.trace)),
    ):
        for name, share in shares.items():
            columns.setdefault(name, []).extend(share.tolist())


def _idle(before: Trace, after: Trace) -> dict[str, Tensor]:
    """Returns, for each router, per image (n,), the share of items that go to no expert, before and after."""
    return {
        name: (~(routing.chosen() | after[name].chosen()).any(-1)).float().mean(-1) for name, routing in before.items()
    }


def _losses(output: Output, y: Tensor) -> list[float]:
    """Each image's cross-entropy, in nats."""
    losses: list[float] = F.cross_entropy(output.logits, y, reduction="none").tolist()
    return losses
