"""A suite of attacks in one file: what each of its parts adds, and what those that know the router add."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from robustmoe.analysis.rates import Rate, right, robust
from robustmoe.records import Evaluation

ROUTING_SUITE = "autoattack_routing"
AUTOATTACK_PARTS = frozenset({"apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"})
"""What AutoAttack's parts are called, in each of its versions; every other part of the suite knows the router."""


@dataclass(frozen=True)
class Part:
    """One part of a suite: the images it broke (those before it had not), and the accuracy ``left`` after it."""

    name: str
    broken: int
    left: Rate


def by_part(result: Evaluation) -> tuple[Part, ...]:
    """Returns the parts of a suite in the order they ran; empty for a simple attack, and while images are missing."""
    header, rows, _ = result
    if not header.parts or len(rows) < header.n:
        return ()
    left = sum(right(row) for row in rows)
    parts = []
    for name in header.parts:
        broken = sum(row.part == name and not robust(row) for row in rows)
        left -= broken
        parts.append(Part(name, broken, Rate(left, len(rows))))
    return tuple(parts)


def routing_gap(result: Evaluation) -> tuple[Rate, Rate] | None:
    """Returns what AutoAttack alone left, and what is left after the attacks that know the router, of the same images.

    None for any other suite, for a dense model (no part knows a router) and while images are missing."""
    name = (result.header.attack or "").partition("(")[0].strip()
    parts = by_part(result) if name == ROUTING_SUITE else ()
    first = list(takewhile(lambda part: part.name in AUTOATTACK_PARTS, parts))
    if not first or len(first) == len(parts):
        return None
    return first[-1].left, parts[-1].left
