"""A suite of attacks in one file: what each of its parts adds."""

from __future__ import annotations

from dataclasses import dataclass

from robustmoe.analysis.rates import Rate, right, robust
from robustmoe.records import Result


@dataclass(frozen=True)
class Part:
    """One part of a suite: the images it broke (those before it had not), and the accuracy ``left`` after it."""

    name: str
    broken: int
    left: Rate


def by_part(result: Result) -> tuple[Part, ...]:
    """The parts of a suite in the order they ran; empty for a simple attack, and while images are missing."""
    header, rows, _ = result
    if not header.parts or len(rows) < header.n:
        return ()
    left = sum(right(row) for row in rows)
    found = []
    for name in header.parts:
        broken = sum(row.part == name and not robust(row) for row in rows)
        left -= broken
        found.append(Part(name, broken, Rate(left, len(rows))))
    return tuple(found)
