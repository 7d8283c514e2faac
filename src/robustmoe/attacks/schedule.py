"""How far an attack is in its schedule, for a forecast that stops it before its end.

`Attack.queries` tells the passes of an image whose every step is a pass. An attack that leaves steps out, because they
cannot help, says here how many it has likely made, and of how many (`followed`); one of several climbs, how far it is
in each (`part`, `at`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

Step = TypeVar("Step")

Hear = Callable[[float, float, bool], None]

_HEARD: ContextVar[Hear | None] = ContextVar("heard", default=None)


@contextlib.contextmanager
def heard_by(hear: Hear) -> Iterator[None]:
    """Inside, ``hear(done, of, some)`` is called by attacks that leave steps out: passes that an image which never
    breaks has likely made so far, and in all. Only their ratio, and how it grows, means something. ``some``: not all
    images that are left are in each pass.
    """
    token = _HEARD.set(hear)
    try:
        yield
    finally:
        _HEARD.reset(token)


_WITHIN: ContextVar[tuple[float, float]] = ContextVar("within", default=(0.0, 1.0))
"""What is climbed of the attack: from one share of it to another."""


@contextlib.contextmanager
def part(begin: float, end: float, of: float) -> Iterator[None]:
    """Inside, an attack is in that part of the part that it was in: from ``begin`` to ``end``, of ``of`` in all."""
    first, last = _WITHIN.get()
    token = _WITHIN.set((first + (last - first) * begin / of, first + (last - first) * end / of))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def at(step: int, steps: int) -> None:
    """So many of its steps an attack has made in the part that it is in."""
    hear = _HEARD.get()
    if hear is not None:
        first, last = _WITHIN.get()
        hear(first + (last - first) * step / steps, 1.0, True)


class Random(NamedTuple):
    """Steps that each draw one of ``different`` proposals, of a ``kind`` that begins anew where another follows, and
    leave out what was drawn before. None: nothing is left out.
    """

    kind: int
    length: int
    different: int | None


def likely(steps: Iterable[Random]) -> list[float]:
    """Returns the passes of each: d (1 - (1 - 1/d)^n) different ones are expected in n draws of d."""
    passes, kind, drawn = [], None, 0
    for step in steps:
        drawn = drawn if step.kind == kind else 0
        passes.append(_seen(drawn + step.length, step.different) - _seen(drawn, step.different))
        kind, drawn = step.kind, drawn + step.length
    return passes


def _seen(draws: int, different: int | None) -> float:
    return float(draws) if different is None else different * (1 - (1 - 1 / different) ** draws)


def followed(steps: Iterable[Step], passes: Sequence[float], restart: int, restarts: int) -> Iterator[Step]:
    """The steps of one restart in turn, each told of before it is made. A restart has a pass at its start, and the
    attack one before all.
    """
    whole = 1 + sum(passes)
    done = 2 + restart * whole
    for step, each in zip(steps, passes, strict=True):
        hear = _HEARD.get()
        if hear is not None:
            hear(done, 1 + restarts * whole, False)
        yield step
        done += each
