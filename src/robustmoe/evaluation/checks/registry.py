"""The table of checks: each stands in it by its own decorator, and nowhere else by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, ParamSpec

from robustmoe.records import Check

Stage = Literal["cheap", "after", "model", "attack"]
"""When a check is asked: before every evaluation ("cheap"), at its end ("after"), or by `robustmoe check`, of the model
on all images ("model") or of the attacks on the images that the model gets right ("attack")."""

P = ParamSpec("P")


class Answer(NamedTuple):
    """What a check answers: pass, warn, fail or not run; a value that JSON can hold; and one sentence."""

    status: str
    value: Any
    sentence: str


def not_run(why: str) -> Answer:
    """The answer of a check that was not run, and why."""
    return Answer("not run", None, why)


@dataclass(frozen=True)
class Registered:
    """One check: its ``id`` (H4), its ``name``, and the function that answers at each stage."""

    id: str
    name: str
    asked: dict[Stage, Callable[..., Check]] = field(default_factory=dict)

    def says(self, answer: Answer) -> Check:
        """The line of the file or the card."""
        return Check(self.id, self.name, *answer)


CHECKS: dict[str, Registered] = {}
"""Every check by id, in the order in which they were declared; `ids` has them in the order of their numbers."""


def check(id: str, name: str, *stages: Stage) -> Callable[[Callable[P, Answer]], Callable[P, Check]]:
    """Puts the decorated function into the table as check ``id``; called, it gives the whole `Check`.

    A check of two functions (a cheap and a deep one, say) is declared twice, under one name. Raises ValueError where
    the two names differ, or a stage has its function already.
    """
    entry = CHECKS.setdefault(id, Registered(id, name))
    if entry.name != name:
        raise ValueError(f"check {id} is {entry.name!r} already; got {name!r}")
    if taken := [stage for stage in stages if stage in entry.asked]:
        raise ValueError(f"check {id} has a function for {taken[0]!r} already")

    def register(function: Callable[P, Answer]) -> Callable[P, Check]:
        @functools.wraps(function)
        def ask(*args: P.args, **kwargs: P.kwargs) -> Check:
            return entry.says(function(*args, **kwargs))

        entry.asked.update(dict.fromkeys(stages, ask))
        return ask

    return register


def ids(*stages: Stage) -> list[str]:
    """The ids of all checks, or of those asked at one of the ``stages``: H, then G, then R, each by number."""
    asked = [entry.id for entry in CHECKS.values() if not stages or any(stage in entry.asked for stage in stages)]
    return sorted(asked, key=lambda id: ("HGR".index(id[0]), int(id[1:])))
