"""The statements of docs/theory.md on synthetic data: each experiment measures a number and sets it beside what a
closed form or a bound says, worked out without it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from robustmoe.errors import UserError, nearest
from robustmoe.options import several
from robustmoe.progress import progress
from robustmoe.records.theory import Experiment
from robustmoe.theory.fixed import x1, x1b, x1c, x2, x3
from robustmoe.theory.radius import x7, x8
from robustmoe.theory.slots import x11
from robustmoe.theory.split import x4, x5, x6, x10
from robustmoe.theory.trained import x9

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "X1": x1,
    "X1b": x1b,
    "X1c": x1c,
    "X2": x2,
    "X3": x3,
    "X4": x4,
    "X5": x5,
    "X6": x6,
    "X7": x7,
    "X8": x8,
    "X9": x9,
    "X10": x10,
    "X11": x11,
}
"""Each takes a seed, and sizes that tests make smaller."""

__all__ = ["EXPERIMENTS", "run"]


def run(names: str | Sequence[str] = (), seed: int = 0) -> list[Experiment]:
    """The named experiments (default: all), in the order of `EXPERIMENTS`. Names may be in either case.

    Raises UserError for a name that is none.
    """
    known, names = {name.lower(): name for name in EXPERIMENTS}, several(names)
    for name in names:
        if name.lower() not in known:
            raise UserError(f"unknown experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    wanted = {known[name.lower()] for name in names} or set(EXPERIMENTS)
    done = []
    for name in progress([name for name in EXPERIMENTS if name in wanted], "theory", unit="experiments"):
        start = time.perf_counter()
        experiment = EXPERIMENTS[name](seed=seed)
        done.append(dataclasses.replace(experiment, seconds=time.perf_counter() - start))
    return done
