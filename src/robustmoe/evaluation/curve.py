"""What an attack at one radius already tells of another, so that a curve asks no image again whose answer is known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from robustmoe.analysis import robust
from robustmoe.records import Evaluation, Row
from robustmoe.records.types import LARGER, SMALLER


def broken_below(eps: float, done: Iterable[Evaluation], wanted: Collection[int]) -> list[Row]:
    """The rows at radius ``eps`` of those images ``wanted`` that are broken at a smaller radius already: what breaks
    them there lies in this ball too. None of attacks whose answer depends on the batch.
    """
    rows: dict[int, Row] = {}
    for result in sorted(done, key=lambda result: result.header.eps):
        if result.header.eps < eps and not result.header.bound_to_batches:
            lost = (row for row in result.rows if row.index in wanted and not robust(row))
            rows |= {row.index: replace(row, part=SMALLER) for row in lost if row.index not in rows}
    return list(rows.values())


def nearest_within(eps: float, norm: str, rows: Sequence[Row]) -> list[Row]:
    """The rows at radius ``eps`` of an attack that looks for the nearest broken image (``finds_nearest``), from its
    ``rows`` at a larger one: an image whose nearest is farther comes back clean.
    """
    near = [row if row.size[norm] <= eps else _unattacked(row) for row in rows]
    return [replace(row, part=LARGER) for row in near]


def _unattacked(row: Row) -> Row:
    exposed = None if row.router_exposed is None else row.clean
    return replace(
        row,
        adversarial=row.clean,
        size=dict.fromkeys(row.size, 0.0),
        rerouted=dict.fromkeys(row.rerouted, 0.0),
        router_exposed=exposed,
        experts_exposed=exposed,
        route_adversarial=row.route_clean,
    )
