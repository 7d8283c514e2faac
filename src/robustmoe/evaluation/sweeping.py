"""Accuracy, loss and routes over eps: the evaluation of Puigcerver et al. (NeurIPS 2022, arXiv 2210.10253), as their
released code has it, with a strong attack beside theirs.

Their attack (`vmoe_pgd`) is weak; it is here to compare with the paper. What each attack gives is put to the exact
model again, and so are its images on the clean route and the clean images on its route.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import analysis, distributed, provenance
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Attack, Surrogate, at_radius, build_attack, linf, vmoe_pgd
from robustmoe.data import Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation import engine
from robustmoe.evaluation.attacked import Attacked, attack_batch, check_inside, look, predictions
from robustmoe.evaluation.choosing import seeded, written
from robustmoe.evaluation.folders import about_images, about_run, taken_up
from robustmoe.evaluation.measuring import PROBE, borrowed, first_look, header_of, images_of
from robustmoe.evaluation.precision import frozen
from robustmoe.evaluation.redundancy import redundancy
from robustmoe.models.base import Output, RoutedModel, as_routed
from robustmoe.noise import Noise
from robustmoe.options import PAPER_EPS, SweepOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Header, Sweep, SweepAnswers
from robustmoe.routing import Trace, rerouted
from robustmoe.training.checkpoint import load_model, read_config

ATTACKS: tuple[Attack, ...] = (vmoe_pgd(linf(8 / 255)), PGD(linf(8 / 255), steps=50, restarts=2))
"""The paper's and a strong one, unless told."""


# ------------------------------------------------------------------------------------------------ public functions


@takes(SweepOptions, limit=None)
def sweep(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    options: SweepOptions,
    num_classes: int | None = None,
) -> analysis.SweepSummary:
    """Attack ``model`` at every ``eps`` and say what is left, and how far its routes move.

    ``x``, ``y``: images (n, ch, h, w) in [0, 1] with labels (n), or a data set of the project (its test split).
    ``attacks`` are of one norm, each made again at every radius; by default `vmoe_pgd` and PGD-50 with 2 restarts. A
    dense model has no routes, and the rest of the numbers. ``seed``: of the draws, and of the attacks whose spec gives
    none. The model keeps its modes and device. Raises UserError where `evaluate` does.
    """
    work = _work_of(options)
    images = images_of(x, y, num_classes).head(options.limit)
    about = about_images(model, x)
    routed = as_routed(model)
    with borrowed(routed, work.device):
        return analysis.sweep_summary(_swept(work, routed, images, about))


@takes(SweepOptions)
def sweep_run(run: str | Path, *, options: SweepOptions) -> Sweep:
    """Sweep the model of a run folder on its first ``limit`` test images; writes ``RUN/sweep.json`` after each attack
    and eps. A rerun goes on with what is missing, and other attacks or radii are added to what is there.

    The rest: see `sweep`. `analysis.sweep_summary` makes numbers of the result.
    """
    run, work = Path(run), _work_of(options)
    config = read_config(run)
    model = load_model(run, work.device)
    data: Data = specs.build(config["data"], "data")
    about = about_run(run, config, data)
    return _swept(work, model, data.test.head(options.limit), about, run)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class _Work:
    """``attacks`` by their specs, at the radii that they were given with; see `sweep`."""

    attacks: dict[str, Attack]
    eps: tuple[float, ...]
    draws: int
    batch_size: int
    seed: int
    device: torch.device

    @property
    def first(self) -> Attack:
        return next(iter(self.attacks.values()))

    def left(self, found: Sweep) -> list[tuple[str, float]]:
        """The attacks and radii that are not there yet, attack by attack."""
        there = {(point.attack, point.eps) for point in found.points}
        return [(name, eps) for name in self.attacks for eps in self.eps if (name, eps) not in there]


def _work_of(options: SweepOptions) -> _Work:
    """UserError for what cannot be asked."""
    chosen = [seeded(build_attack(attack), options.seed) for attack in options.attacks or ATTACKS]
    norms = {attack.threat.norm for attack in chosen}
    if len(norms) > 1:
        raise UserError(f"the attacks are of {' and '.join(sorted(norms))}; expected one norm, sweep one at a time")
    if not all(attack.threat.eps > 0 for attack in chosen):
        raise UserError("an attack of eps 0 cannot be made again at another; expected one such as pgd(linf(8/255))")
    where = distributed.local_device(provenance.pick_device(options.device))
    by_spec, radii = {written(attack): attack for attack in chosen}, _radii(options.eps, norms.pop())
    return _Work(by_spec, radii, options.draws, options.batch_size, options.seed, where)


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


def _swept(
    work: _Work, model: RoutedModel, images: ImageSet, about: dict[str, Any], folder: Path | None = None
) -> Sweep:
    """All questions; those that stand in the folder's file are not asked again. The model is on the device."""
    output = first_look(model.eval(), images, work.device)
    header = _header(work, model, images, about, output)
    clock = time.monotonic()

    def timed(found: Sweep) -> Sweep:
        nonlocal clock
        seconds, clock = found.seconds + time.monotonic() - clock, time.monotonic()
        found = replace(found, seconds=seconds, done=not work.left(found))
        if folder is not None:
            found.write(folder)
        return found

    old = taken_up(folder, header, Sweep)
    found = old or timed(_untouched(work, model, images, header))
    if work.draws not in (0, found.draws):
        overrides, said = redundancy(model, images, work.draws, work.seed, work.device, work.batch_size)
        found = timed(replace(found, draws=work.draws, overrides=overrides, left_out=said))
    todo = work.left(found)
    if not todo:
        return found if found.done else timed(found)
    meter = engine.Meter()
    probe = images.batch(list(range(min(PROBE, len(images))))).to(work.device)
    climbed = frozen(model, probe.x, on_pass=meter.on_pass)
    costs = [work.attacks[name].queries(output) * len(images) for name, _ in todo]
    with progress(sum(costs), "sweep", unit="passes") as bar:
        meter.bar = bar
        for at, (name, eps) in enumerate(todo):
            bar.say(f"{name} at {eps:.4g}, {at + 1} of {len(todo)}")
            point = _asked(work, model, climbed, name, eps, images)
            found = timed(replace(found, points=_in_order([*found.points, point])))
            bar.expect(meter.queries + sum(costs[at + 1 :]))
    return found


def _header(work: _Work, model: RoutedModel, images: ImageSet, about: dict[str, Any], output: Output) -> Header:
    """Of the model and the images; the attacks and radii stand with the answers."""
    plan = engine.plan(work.first, output, images)
    found = header_of(model, images, work.first, plan, work.device, work.batch_size, about, "main", "strict")
    return replace(found, attack=None, objective=None, eps=0.0, parts=[], seed=work.seed)


def _in_order(points: list[SweepAnswers]) -> list[SweepAnswers]:
    """The attacks as they came, each by rising eps."""
    attacks = list(dict.fromkeys(point.attack for point in points))
    return sorted(points, key=lambda point: (attacks.index(point.attack), point.eps))


@torch.no_grad()
def _untouched(work: _Work, model: RoutedModel, images: ImageSet, header: Header) -> Sweep:
    """What is asked of the clean images."""
    predicted: list[int] = []
    losses: list[float] = []
    for batch in batches(images, work.batch_size, torch.arange(len(images)), work.device):
        done = look(model, batch)
        predicted += predictions(done.clean)
        losses += _losses(done.clean, batch.y)
    index, labels = images.index.tolist(), images.labels.tolist()
    return Sweep(header, index, labels, predicted, losses, 0, [], [], [], 0.0)


def _asked(
    work: _Work, model: RoutedModel, climbed: Surrogate, name: str, eps: float, images: ImageSet
) -> SweepAnswers:
    """The answers under one attack at one eps. UserError where it stops, or leaves the ball or the box."""
    attack = at_radius(work.attacks[name], eps)
    found = SweepAnswers(name, eps, [], [], [], [], [], {}, {}, {})
    for batch in batches(images, work.batch_size, torch.arange(len(images)), work.device):
        done = attack_batch(model, attack, batch, Noise.of(batch.index, attack.seed), climbed)
        check_inside(attack.threat, batch.x, done.x_adv, name)
        _note_down(found, model, done, attack)
    return found


@torch.no_grad()
def _note_down(found: SweepAnswers, model: RoutedModel, done: Attacked, attack: Attack) -> None:
    """The answers to one batch more, at the end of ``found``'s lists."""
    batch, clean, after = done.batch, done.clean, done.after
    found.predicted.extend(predictions(after))
    found.loss.extend(_losses(after, batch.y))
    found.size.extend(attack.threat.size(done.x_adv.float() - batch.x.float()).tolist())
    if not clean.trace:
        return
    found.routing_fixed.extend(predictions(model.run(done.x_adv, forced=clean.trace)))
    found.routing_transplanted.extend(predictions(model.run(batch.x, forced=after.trace)))
    for columns, shares in (
        (found.moved, rerouted(clean.trace, after.trace)),
        (found.moved_paper, rerouted(clean.trace, after.trace, empty="changed")),
        (found.idle, _idle(clean.trace, after.trace)),
    ):
        for name, share in shares.items():
            columns.setdefault(name, []).extend(share.tolist())


def _idle(before: Trace, after: Trace) -> dict[str, Tensor]:
    """For each router, per image (n,), the share of items that go to no expert, before and after."""
    return {
        name: (~(routing.chosen() | after[name].chosen()).any(-1)).float().mean(-1) for name, routing in before.items()
    }


def _losses(output: Output, y: Tensor) -> list[float]:
    """Each image's cross-entropy, in nats."""
    found: list[float] = F.cross_entropy(output.logits, y, reduction="none").tolist()
    return found
