"""What jaxtyping's import hook puts on every function of `robustmoe` under pytest: beartype, for a test's first calls.

With every call checked the hook is nearly half of the suite's time, and most of that goes to the same few functions of
an attack's or a training's loop, thousands of times in one test. So each phase of a test (its fixtures, then itself)
has its first ``budget.calls`` checks, of arguments or of results, and the hook rests until the next phase.
`make test-typed` checks every call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

CALLS = 300


class Budget:
    """The checks that are left in this phase; at 0 jaxtyping is told to rest."""

    def __init__(self) -> None:
        self.calls = self.left = CALLS

    def start(self) -> None:
        """Begins a phase of a test, with all its checks."""
        self.left = self.calls
        jaxtyping.config.update("jaxtyping_disable", False)

    def spend(self) -> None:
        """Takes one check off."""
        self.left -= 1
        if self.left <= 0:
            jaxtyping.config.update("jaxtyping_disable", True)


budget = Budget()
EVERY_CALL = sys.maxsize


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` checked by beartype, every call counted; its checks are made when it is first called."""
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        budget.spend()
        if checked is None:
            checked = beartype.beartype(function)
        return checked(*args, **kwargs)

    return counted
