"""The file of a dissection in a run folder: what `robustmoe dissect` asked of a routed model, answer by answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from robustmoe.records.record import Column, Record, by_router, other_routers, per_expert, strange_routers
from robustmoe.records.typed import Answer, Count, Length, Share
from robustmoe.records.types import Header

CLEAN = "clean"
"""The name of the answers to untouched images."""

NEEDED = (CLEAN, "prediction", "experts", "router", "steering", "margin", "flip")
"""What is asked of every model, and then each "expert k" alone; "residue" only where each router chooses one expert."""


@dataclass(frozen=True)
class Answers:
    """What the exact model says of the images as one attack left them, an entry an image.

    ``predicted``: the class, on the route that the model itself takes; -1 where a logit was not finite.
    ``routing_fixed``: the class on the clean image's route; of the attack on expert k, with expert k forced at every
    router. ``routing_transplanted``: the class of the clean image on the attacked image's route. ``size``: of the
    perturbation, in the header's norm (pixels of [0, 1]). ``routes``: router -> how many items each expert got.
    ``moved``: router -> the share of items whose set of experts changed."""

    predicted: list[Answer]
    routing_fixed: list[Answer]
    routing_transplanted: list[Answer]
    size: list[Length]
    routes: dict[str, list[list[Count]]]
    moved: dict[str, list[Share]]


@dataclass(frozen=True)
class Dissection(Record, kind="dissection", file="dissection.json", version=3, verb="dissect"):
    """The questions asked of one model. ``header``: the model, the images and the attack that the others are made from.

    ``index``, ``labels``: of each image. ``forced``: expert -> the class of each clean image with that expert forced at
    every router. ``narrow``, ``wide``: router -> the smallest and the largest gap over an image's items, where a gap is
    the weakest chosen logit minus the best one that is not chosen (best minus second for top-1); a router that always
    chooses all its experts is left out. ``entropy``: router -> that of softmax(logits), mean over items, in nats.
    ``under``: attack -> its answers, "clean" first. ``seconds``: wall time. The file is whole once ``done``."""

    header: Header
    index: list[Count]
    labels: list[Count]
    forced: list[list[Answer]]
    narrow: dict[str, list[float]]
    wide: dict[str, list[float]]
    entropy: dict[str, list[float]]
    under: dict[str, Answers]
    seconds: Length
    done: bool = False

    def columns(self) -> Iterator[Column]:
        n = self.header.n
        yield "index", self.index, n
        yield "labels", self.labels, n
        for expert, column in enumerate(self.forced):
            yield f"forced[{expert}]", column, n
        for name in ("narrow", "wide", "entropy"):
            yield from by_router(name, getattr(self, name), n)
        for attack, answers in self.under.items():
            for name in ("predicted", "routing_fixed", "routing_transplanted", "size"):
                yield f"under[{attack!r}].{name}", getattr(answers, name), n
            for name in ("routes", "moved"):
                yield from by_router(f"under[{attack!r}].{name}", getattr(answers, name), n)

    def answers(self) -> Iterator[tuple[str, Sequence[int]]]:
        for expert, column in enumerate(self.forced):
            yield f"forced[{expert}]", column
        for attack, answers in self.under.items():
            for name in ("predicted", "routing_fixed", "routing_transplanted"):
                yield f"under[{attack!r}].{name}", getattr(answers, name)

    def problems(self) -> Iterator[str]:
        routers = self.header.routers
        if not routers:
            yield "the model has no router"
        if next(iter(self.under), None) != CLEAN:
            yield f"field 'under' must begin with {CLEAN!r}"
        experts = min((info.experts for info in routers.values()), default=0)
        if len(self.forced) != experts:
            yield f"field 'forced' is of {len(self.forced)} experts, expected {experts}"
        missing = [name for name in (*NEEDED, *(f"expert {k}" for k in range(experts))) if name not in self.under]
        if self.done and missing:
            yield f"it is done, but there are no answers under {missing[0]!r}"
        for attack, answers in self.under.items():
            for name in ("routes", "moved"):
                yield from other_routers(f"under[{attack!r}].{name}", getattr(answers, name), self.header)
            yield from per_expert(f"under[{attack!r}].routes", answers.routes, self.header)
        yield from other_routers("field 'entropy'", self.entropy, self.header)
        for name in ("narrow", "wide"):
            yield from strange_routers(f"field {name!r}", getattr(self, name), self.header)
        if self.narrow.keys() != self.wide.keys():
            yield "fields 'narrow' and 'wide' must be of the same routers"
        yield from super().problems()
