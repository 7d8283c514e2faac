"""What the blends of a standard and a robust model answer, alpha by alpha: ``blend.json`` in a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from robustmoe.records.record import Column, Record
from robustmoe.records.typed import Answer, Count, Length, Share
from robustmoe.records.types import Header


@dataclass(frozen=True)
class Blend(Record, kind="blend", file="blend.json", version=2, verb="blend"):
    """One curve over alpha. ``header``: the model, the images and the base attack. ``standard``, ``robust``: where the
    halves came from (run folders, or class names). ``mix``, ``sharpen``: as in `models.dual` (specs; "" for none).

    ``alphas``: rising, from 0 (standard) to 1 (robust). ``index``, ``labels``: of each image. ``predicted``: alpha ->
    the class of each clean image; -1 where a logit was not finite. ``broken``: alpha -> for each image, the attack that
    broke it first, by its place in ``attacks``; -1 where none did; an image that is wrong when clean is no attack's:
    it stands as -2. ``attacks``: names of what was tried, in order. ``certified``: alpha -> whether the image is
    proven right in the whole ball; [] where no certificate was given. ``validation``: alpha -> clean accuracy on the
    validation images, by which alpha is chosen; [] without. ``wanted``: the clean accuracy asked for; ``chosen``: the
    alpha picked, the largest that has it. ``attacked``: how many alphas are attacked, from the last (1) to the first.
    ``seconds``: wall time.
    """

    header: Header
    standard: str
    robust: str
    mix: str
    sharpen: str
    alphas: list[Share]
    index: list[Count]
    labels: list[Count]
    predicted: list[list[Answer]]
    attacks: list[str]
    broken: list[list[Annotated[int, Meta(ge=-2)]]]
    certified: list[list[bool]]
    validation: list[Share]
    wanted: Share | None
    chosen: Share | None
    attacked: Count
    seconds: Length

    @property
    def done(self) -> bool:
        """Says whether all alphas are attacked."""
        return self.attacked == len(self.alphas)

    def columns(self) -> Iterator[Column]:
        n, count = len(self.index), len(self.alphas)
        yield "labels", self.labels, n
        for name in ("predicted", "broken", "certified"):
            table = getattr(self, name)
            if table or name != "certified":
                yield name, table, count
            for at, row in enumerate(table):
                yield f"{name}[{at}]", row, n
        if self.validation:
            yield "validation", self.validation, count

    def answers(self) -> Iterator[tuple[str, Sequence[int]]]:
        for at, column in enumerate(self.predicted):
            yield f"predicted[{at}]", column

    def problems(self) -> Iterator[str]:
        count = len(self.alphas)
        if not self.alphas:
            yield "there is no alpha"
        if sorted(set(self.alphas)) != self.alphas:
            yield "alphas must rise, from 0 to 1"
        yield from super().problems()
        if self.attacked > count:
            yield f"attacked is {self.attacked}, of {count} alphas"
        if any(attack >= len(self.attacks) for row in self.broken for attack in row):
            yield "broken names attacks that are not in the list"
