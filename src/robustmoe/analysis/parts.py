"""A suite of attacks in one file: what each of its parts adds, and what those that know the router add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from robustmoe.analysis.rates import Rate, right, robust
from robustmoe.records import Evaluation

ROUTING_SUITE, QUICK_SUITE = "autoattack_routing", "quick_verdict"
QUICK_NETS = 15, 15
"""On how many nets, of how many, the quick suite left as many images as the routing suite (benchmarks/quick_verdict.py;
a test compares it with that file).
"""
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


def upper_bound(group: Sequence[Evaluation]) -> str:
    """Says of the attacks of one threat that the quick suite's number is an upper bound; "" without it, or where the
    routing suite stands beside it.
    """
    suites = {_suite(result) for result in group}
    if QUICK_SUITE not in suites or ROUTING_SUITE in suites:
        return ""
    agree, measured = QUICK_NETS
    return (
        f"{QUICK_SUITE} leaves an upper bound of the robust accuracy: on {agree} of {measured} nets measured it left "
        f"as many images as {ROUTING_SUITE}, which a paper's table should use"
    )


def _suite(result: Evaluation) -> str:
    return (result.header.attack or "").partition("(")[0].strip()


def routing_gap(result: Evaluation) -> tuple[Rate, Rate] | None:
    """Returns what AutoAttack alone left, and what is left after the attacks that know the router, of the same images.

    None for any other suite, for a dense model (no part knows a router) and while images are missing."""
    parts = by_part(result) if _suite(result) == ROUTING_SUITE else ()
    first = list(takewhile(lambda part: part.name in AUTOATTACK_PARTS, parts))
    if not first or len(first) == len(parts):
        return None
    return first[-1].left, parts[-1].left
