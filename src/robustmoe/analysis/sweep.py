"""A sweep in numbers: what each attack leaves at every eps, how far the routes move, how redundant the experts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.rates import Rate, mean, rate
from robustmoe.records import Override, Sweep, SweepAnswers


@dataclass(frozen=True)
class SweepPoint:
    """One attack at one eps. ``right``: images right under it, whatever the clean answer was (the paper's accuracy).
    ``robust``: right on the clean image and under this attack at this and every smaller eps of the sweep, which can
    only fall. ``loss``: mean cross-entropy, nats. ``changed``: images whose class changed, right or wrong (the paper's
    prediction changes). ``routing_fixed``: attacked images right on the clean image's route; ``routing_transplanted``:
    clean images right on the attacked one's; None for a dense model. By router: ``moved``, the mean of 1 - IoU of the
    chosen experts, and ``moved_paper``, where an item that goes to no expert both times counts as changed; ``idle``:
    the mean share of such items."""

    eps: float
    right: Rate
    robust: Rate
    loss: float
    changed: Rate
    routing_fixed: Rate | None
    routing_transplanted: Rate | None
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
        """Returns the mean accuracy."""
        return math.fsum(share.value for share in self.rates.values()) / len(self.rates)

    @property
    def lowest(self) -> tuple[int, Rate]:
        """Returns the lowest accuracy, and of which draw, expert or k."""
        return min(self.rates.items(), key=lambda pair: pair[1].value)

    @property
    def highest(self) -> tuple[int, Rate]:
        """Returns the highest accuracy."""
        return max(self.rates.items(), key=lambda pair: pair[1].value)


@dataclass(frozen=True)
class SweepSummary:
    """A model swept on ``n`` images. ``clean``, ``loss``: on untouched images. ``curves``: an attack each. ``worst``:
    eps -> images right on the clean image and under every attack at this and every smaller eps. ``spare``: see `Spare`;
    () where it was not asked for, or there is no router."""

    n: int
    clean: Rate
    loss: float
    curves: tuple[SweepCurve, ...]
    worst: dict[float, Rate]
    spare: tuple[Spare, ...]

    @property
    def strongest(self) -> SweepCurve | None:
        """Returns the attack that leaves the fewest images at its largest eps, of those that go furthest."""
        return min(self.curves, key=lambda curve: (-curve.points[-1].eps, curve.points[-1].robust.value), default=None)


def sweep_summary(record: Sweep) -> SweepSummary:
    """Returns the numbers of a sweep; also of one that was stopped, as far as it went."""
    attacks = list(dict.fromkeys(point.attack for point in record.points))
    return SweepSummary(
        n=record.header.n,
        clean=rate(_right(record.predicted, record.labels)),
        loss=mean(record.loss),
        curves=tuple(_curve(record, attack) for attack in attacks),
        worst={eps: rate(_survivors(record, record.points, eps)) for eps in sorted({p.eps for p in record.points})},
        spare=_spare(record),
    )


def _right(predicted: Sequence[int], labels: Sequence[int]) -> list[bool]:
    return [a == b for a, b in zip(predicted, labels, strict=True)]


def _survivors(record: Sweep, points: Sequence[SweepAnswers], eps: float) -> list[bool]:
    """Returns which images are right untouched and at all points up to ``eps``."""
    left = _right(record.predicted, record.labels)
    for point in points:
        if point.eps <= eps:
            left = [a and b for a, b in zip(left, _right(point.predicted, record.labels), strict=True)]
    return left


def _curve(record: Sweep, attack: str) -> SweepCurve:
    own = sorted((point for point in record.points if point.attack == attack), key=lambda point: point.eps)
    return SweepCurve(attack, tuple(_point(record, own, point) for point in own))


def _point(record: Sweep, own: Sequence[SweepAnswers], point: SweepAnswers) -> SweepPoint:
    routed, labels = bool(record.header.routers), record.labels
    return SweepPoint(
        eps=point.eps,
        right=rate(_right(point.predicted, labels)),
        robust=rate(_survivors(record, own, point.eps)),
        loss=mean(point.loss),
        changed=rate([a != b for a, b in zip(record.predicted, point.predicted, strict=True)]),
        routing_fixed=rate(_right(point.routing_fixed, labels)) if routed else None,
        routing_transplanted=rate(_right(point.routing_transplanted, labels)) if routed else None,
        moved={name: mean(shares) for name, shares in point.moved.items()},
        moved_paper={name: mean(shares) for name, shares in point.moved_paper.items()},
        idle={name: mean(shares) for name, shares in point.idle.items()},
    )


def _spare(record: Sweep) -> tuple[Spare, ...]:
    groups: dict[tuple[str, str], list[Override]] = {}
    for override in record.overrides:
        groups.setdefault((override.rule, override.router), []).append(override)
    return tuple(
        Spare(
            rule,
            router,
            {override.number: rate(_right(override.predicted, record.labels)) for override in group},
            {override.number: rate(_right(override.predicted, record.predicted)) for override in group},
        )
        for (rule, router), group in groups.items()
    )
