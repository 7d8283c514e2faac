"""A sweep in numbers: what each attack leaves at every eps, how far the routes move, how redundant the experts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.rates import Rate, rate
from robustmoe.records import Override, Sweep, SweepAnswers


@dataclass(frozen=True)
class SweepPoint:
    """One attack at one eps. ``right``: images right under it, whatever the clean answer was (the paper's accuracy).
    ``robust``: right on the clean image and under this attack at this and every smaller eps of the sweep, which can
    only fall. ``loss``: mean cross-entropy, nats. ``changed``: images whose class changed, right or wrong (the paper's
    prediction changes). ``held``: attacked images right on the clean image's route; ``swapped``: clean images right on
    the attacked one's; None for a dense model. By router: ``moved``, the mean of 1 - IoU of the chosen experts, and
    ``moved_paper``, where an item that goes to no expert both times counts as changed; ``idle``: the mean share of such
    items."""

    eps: float
    right: Rate
    robust: Rate
    loss: float
    changed: Rate
    held: Rate | None
    swapped: Rate | None
    moved: dict[str, float]
    moved_paper: dict[str, float]
    idle: dict[str, float]


@dataclass(frozen=True)
class SweepCurve:
    """One attack, by rising eps."""

    attack: str
    points: tuple[SweepPoint, ...]


@dataclass(frozen=True)
class Spare:
    """Clean accuracy with some rule in the place of the routers' decisions: ``rule`` and ``router`` as in `Override`;
    ``rates``: by draw, expert or k; ``agree``: the share of images with the class of the model as it is."""

    rule: str
    router: str
    rates: dict[int, Rate]
    agree: dict[int, Rate]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return math.fsum(found.value for found in self.rates.values()) / len(self.rates)

    @property
    def lowest(self) -> tuple[int, Rate]:
        """The lowest accuracy, and of which draw, expert or k."""
        return min(self.rates.items(), key=lambda pair: pair[1].value)

    @property
    def highest(self) -> tuple[int, Rate]:
        """The highest accuracy."""
        return max(self.rates.items(), key=lambda pair: pair[1].value)


@dataclass(frozen=True)
class SweepSummary:
    """A model swept. ``clean``, ``loss``: on untouched images. ``curves``: an attack each. ``worst``: eps -> images
    right on the clean image and under every attack at this and every smaller eps. ``spare``: see `Spare`; () where it
    was not asked for, or there is no router."""

    clean: Rate
    loss: float
    curves: tuple[SweepCurve, ...]
    worst: dict[float, Rate]
    spare: tuple[Spare, ...]

    @property
    def strongest(self) -> SweepCurve | None:
        """The attack that leaves the fewest images at its largest eps, of those that go furthest."""
        return min(self.curves, key=lambda curve: (-curve.points[-1].eps, curve.points[-1].robust.value), default=None)


def sweep_summary(found: Sweep) -> SweepSummary:
    """The numbers of a sweep; also of one that was stopped, as far as it went."""
    attacks = list(dict.fromkeys(point.attack for point in found.points))
    return SweepSummary(
        clean=rate(_right(found.predicted, found.labels)),
        loss=_mean(found.loss),
        curves=tuple(_curve(found, attack) for attack in attacks),
        worst={eps: rate(_standing(found, found.points, eps)) for eps in sorted({p.eps for p in found.points})},
        spare=_spare(found),
    )


def _right(predicted: Sequence[int], labels: Sequence[int]) -> list[bool]:
    return [a == b for a, b in zip(predicted, labels, strict=True)]


def _standing(found: Sweep, points: Sequence[SweepAnswers], eps: float) -> list[bool]:
    """Which images are right untouched and at all points up to ``eps``."""
    left = _right(found.predicted, found.labels)
    for point in points:
        if point.eps <= eps:
            left = [a and b for a, b in zip(left, _right(point.predicted, found.labels), strict=True)]
    return left


def _curve(found: Sweep, attack: str) -> SweepCurve:
    own = sorted((point for point in found.points if point.attack == attack), key=lambda point: point.eps)
    return SweepCurve(attack, tuple(_point(found, own, point) for point in own))


def _point(found: Sweep, own: Sequence[SweepAnswers], point: SweepAnswers) -> SweepPoint:
    routed, labels = bool(found.header.routers), found.labels
    return SweepPoint(
        eps=point.eps,
        right=rate(_right(point.predicted, labels)),
        robust=rate(_standing(found, own, point.eps)),
        loss=_mean(point.loss),
        changed=rate([a != b for a, b in zip(found.predicted, point.predicted, strict=True)]),
        held=rate(_right(point.held, labels)) if routed else None,
        swapped=rate(_right(point.swapped, labels)) if routed else None,
        moved={name: _mean(shares) for name, shares in point.moved.items()},
        moved_paper={name: _mean(shares) for name, shares in point.moved_paper.items()},
        idle={name: _mean(shares) for name, shares in point.idle.items()},
    )


def _spare(found: Sweep) -> tuple[Spare, ...]:
    groups: dict[tuple[str, str], list[Override]] = {}
    for one in found.overrides:
        groups.setdefault((one.rule, one.router), []).append(one)
    return tuple(
        Spare(
            rule,
            router,
            {one.number: rate(_right(one.predicted, found.labels)) for one in group},
            {one.number: rate(_right(one.predicted, found.predicted)) for one in group},
        )
        for (rule, router), group in groups.items()
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
