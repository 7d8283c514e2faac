"""What an experiment of `robustmoe theory` found: numbers expected beside measured, and the data of its figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["equal", "at most", "at least", "between", "measured only"]


@dataclass(frozen=True)
class Comparison:
    """One number measured, and what was expected of it before it was measured.

    ``kind``: how they are compared. "equal": to ``tolerance`` (absolute); "at most", "at least": on one side of
    ``expected``, with ``tolerance`` for rounding; "between": ``expected`` and ``upper``; "measured only": nothing was
    expected, and it cannot fail (but by being nan). ``published``: what the notes that the table comes from measured;
    ``near``: how far from it the measured number may be, by the precision stated there and by what other draws of the
    same distribution change; None: the notes do not say what data theirs was measured on.
    """

    setting: str
    kind: Kind
    measured: float
    expected: float = math.nan
    upper: float = math.nan
    tolerance: float = 0.0
    published: float | None = None
    near: float | None = 0.0

    @property
    def holds(self) -> bool:
        """Says whether the measured number is as expected; a nan never is."""
        if self.kind == "measured only":
            return not math.isnan(self.measured)
        low = -math.inf if self.kind == "at most" else self.expected - self.tolerance
        top = {"at least": math.inf, "between": self.upper}.get(self.kind, self.expected) + self.tolerance
        return low <= self.measured <= top

    @property
    def reproduced(self) -> bool | None:
        """Says whether the published number came out again; None where there is none, or on unknown data."""
        if self.published is None or self.near is None:
            return None
        return abs(self.measured - self.published) <= self.near


@dataclass(frozen=True)
class ChartLine:
    """Points (x, y) of one line of a chart; ``style``: a measured line with dots, an expected dashed one, or dots."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: Literal["line", "dashed", "dots"] = "line"


@dataclass(frozen=True)
class Chart:
    """The data of one figure. ``mark``: an upright line at this x, and what it stands for."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[ChartLine, ...]
    log_x: bool = False
    log_y: bool = False
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Experiment:
    """One experiment, done. ``says``: what its numbers mean, in a sentence. ``charts``: side by side in its figure;
    none: it has no figure. ``seconds``: wall time.
    """

    id: str
    title: str
    rows: tuple[Comparison, ...]
    says: str
    seed: int
    seconds: float = 0.0
    charts: tuple[Chart, ...] = ()

    @property
    def holds(self) -> bool:
        """Says whether every row does."""
        return all(row.holds for row in self.rows)
