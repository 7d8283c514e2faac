"""The Lipschitz laboratory in numbers: each quantity over the images, loads, and the boundary mass against eps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import router_names
from robustmoe.analysis.rates import Rate, mean, rate
from robustmoe.records import Lipschitz
from robustmoe.records.lipschitz import MULTIPLES

RIGHT = ("clean", "attacked", "routing fixed", "routing transplanted")
"""Passes of which it is known whether the model is right: the clean image; the attacked one; that on the clean image's
routes; the clean image on the attacked one's routes."""


@dataclass(frozen=True)
class Middle:
    """A quantity over ``n`` images: its median, between which values eight tenths of them are, and its mean (infinite
    where one is)."""

    median: float
    low: float
    high: float
    mean: float
    n: int


@dataclass(frozen=True)
class LayerPart:
    """One router: ``short``, its name in tables; ``numbers`` by quantity; ``load``, the share of the items that each
    expert got, and ``dead``, those that got none of these images' items; ``boundary``: (radius in pixels, mean share of
    the items that have a routing boundary within it to first order), rising; ``bounds``: an upper bound on each
    expert's slope; ``absent``: what was not measured, and why; ``note``: how the rest was."""

    name: str
    short: str
    numbers: dict[str, Middle]
    load: tuple[float, ...]
    dead: tuple[int, ...]
    boundary: tuple[tuple[float, float], ...]
    bounds: tuple[float, ...]
    absent: dict[str, str]
    note: str

    @property
    def mass(self) -> float | None:
        """Returns the boundary mass at the attack's own eps; None where routes cannot change."""
        return self.boundary[MULTIPLES.index(1.0)][1] if self.boundary else None


@dataclass(frozen=True)
class LipschitzSummary:
    """What was measured on ``n`` images. ``kinds``: quantity -> "lower bound", "upper bound", "first order" or
    "estimate"; any other is exact. ``right``: accuracy in each of `RIGHT`. ``fall``: (of the margin, by the experts, by
    the routes), means over the images in logits; the last two add up to the first, and are (it, 0) for a dense
    model."""

    n: int
    model: dict[str, Middle]
    layers: tuple[LayerPart, ...]
    kinds: dict[str, str]
    right: dict[str, Rate]
    fall: tuple[float, float, float]

    def kind(self, quantity: str) -> str:
        """Returns how exact that quantity is."""
        return self.kinds.get(quantity, "exact")


def lipschitz_summary(record: Lipschitz) -> LipschitzSummary:
    """Returns the numbers of the images that are done."""
    right = {name: rate([value > 0.5 for value in record.model[f"right, {name}"]]) for name in RIGHT}
    return LipschitzSummary(
        n=len(record.index),
        model={name: middle(values) for name, values in record.model.items() if not name.startswith("right, ")},
        layers=tuple(_layer(record, name) for name in record.header.routers),
        kinds=record.kinds,
        right=right,
        fall=(
            mean(record.model["fall"]),
            mean(record.model["fall by experts"]),
            mean(record.model["fall by routes"]),
        ),
    )


def _layer(record: Lipschitz, name: str) -> LayerPart:
    counts = [sum(column) for column in zip(*record.load[name], strict=True)]
    shares = [mean(column) for column in zip(*record.boundary.get(name, []), strict=True)]
    radii = [multiple * record.header.eps for multiple in MULTIPLES]
    return LayerPart(
        name=name,
        short=router_names(list(record.header.routers))[name],
        numbers={quantity: middle(values) for quantity, values in record.layers[name].items()},
        load=tuple(count / max(sum(counts), 1) for count in counts),
        dead=tuple(expert for expert, count in enumerate(counts) if count == 0),
        boundary=tuple(zip(radii, shares, strict=True)) if shares else (),
        bounds=tuple(record.bounds.get(name, ())),
        absent=record.absent[name],
        note=record.notes[name],
    )


def middle(values: Sequence[float]) -> Middle:
    """Returns the middle of at least one value; infinite ones count, nan gives nan."""
    if any(math.isnan(value) for value in values):
        return Middle(math.nan, math.nan, math.nan, math.nan, len(values))
    ordered = sorted(values)
    return Middle(_at(ordered, 0.5), _at(ordered, 0.1), _at(ordered, 0.9), mean(ordered), len(ordered))


def _at(ordered: Sequence[float], share: float) -> float:
    """Returns the quantile by the straight line between the two values around it."""
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below if below == above else below + (place - math.floor(place)) * (above - below)
