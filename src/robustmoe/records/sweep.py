"""The file of a sweep in a run folder: what `robustmoe sweep` asked of a model at every eps, answer by answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from robustmoe.records.record import Column, Record, by_router, other_routers
from robustmoe.records.typed import Answer, Count, Length, Radius, Share, Whole, one_of
from robustmoe.records.types import Header

RANDOM, KEPT, WITHOUT, OTHER_K = "random", "random, weights kept", "without", "k"
OVERRIDES = (RANDOM, KEPT, WITHOUT, OTHER_K)
"""What was done to the routes of clean images: experts drawn at random, weighted by the layer's own rule or by the
route's own weights; one expert taken out; another number of experts an item."""


@dataclass(frozen=True)
class SweepAnswers:
    """What the exact model says of the images as one attack left them at one eps, an entry an image.

    ``attack``: its spec, at the radius that it was given with. ``eps``: in the header's norm, in pixels of [0, 1].
    ``predicted``: the class; -1 where a logit was not finite. ``loss``: cross-entropy, in nats. ``routing_fixed``: the
    class on the clean image's route; ``routing_transplanted``: of the clean image on the attacked image's route; both
    [] for a dense model. ``size``: of the perturbation. ``moved``: router -> mean over items of 1 - IoU of the experts
    chosen before and after, without the items that go to no expert both times; ``moved_paper``: these counted as
    changed, as V-MoE's code does; ``idle``: their share."""

    attack: str
    eps: Radius
    predicted: list[Answer]
    loss: list[float]
    routing_fixed: list[Answer]
    routing_transplanted: list[Answer]
    size: list[Length]
    moved: dict[str, list[Share]]
    moved_paper: dict[str, list[Share]]
    idle: dict[str, list[Share]]


@dataclass(frozen=True)
class Override:
    """The classes of the clean images with one rule in the place of the routers' own decisions: ``rule`` one of
    :data:`OVERRIDES`, ``router`` the only router it holds for ("": all), ``number`` the draw, the expert or the k."""

    rule: Annotated[str, one_of(OVERRIDES)]
    router: str
    number: Whole
    predicted: list[Answer]


@dataclass(frozen=True)
class Sweep(Record, kind="sweep", file="sweep.json", version=2, verb="sweep"):
    """The questions asked of one model. ``header``: the model and the images; it names no attack.

    ``index``, ``labels``, ``predicted``, ``loss``: of each clean image. ``points``: by attack, then by eps; more may
    come, of other attacks and other radii. ``draws``: of random experts; 0: ``overrides`` were not asked for.
    ``left_out``: what of these makes no sense for this model, in sentences. ``seconds``: wall time. ``done``: all that
    the last command asked for is there."""

    header: Header
    index: list[Count]
    labels: list[Count]
    predicted: list[Answer]
    loss: list[float]
    draws: Count
    overrides: list[Override]
    left_out: list[str]
    points: list[SweepAnswers]
    seconds: Length
    done: bool = False

    def columns(self) -> Iterator[Column]:
        n = self.header.n
        for name in ("index", "labels", "predicted", "loss"):
            yield name, getattr(self, name), n
        for at, point in enumerate(self.points):
            for name in ("predicted", "loss", "size"):
                yield f"points[{at}].{name}", getattr(point, name), n
            for name in ("routing_fixed", "routing_transplanted"):
                yield f"points[{at}].{name}", getattr(point, name), n if self.header.routers else 0
            for name in ("moved", "moved_paper", "idle"):
                yield from by_router(f"points[{at}].{name}", getattr(point, name), n)
        for at, override in enumerate(self.overrides):
            yield f"overrides[{at}].predicted", override.predicted, n

    def answers(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "field 'predicted'", self.predicted
        for at, point in enumerate(self.points):
            for name in ("predicted", "routing_fixed", "routing_transplanted"):
                yield f"points[{at}].{name}", getattr(point, name)
        for at, override in enumerate(self.overrides):
            yield f"overrides[{at}].predicted", override.predicted

    def problems(self) -> Iterator[str]:
        routers = self.header.routers
        for at, point in enumerate(self.points):
            for name in ("moved", "moved_paper", "idle"):
                yield from other_routers(f"points[{at}].{name}", getattr(point, name), self.header)
        for at, override in enumerate(self.overrides):
            if override.router not in ("", *routers):
                yield f"overrides[{at}].router must be '' or one of {sorted(routers)}, got {override.router!r}"
        yield from super().problems()
        if len({(point.attack, point.eps) for point in self.points}) < len(self.points):
            yield "two points are of the same attack and eps"
