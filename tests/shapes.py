"""What jaxtyping's import hook puts on every function of `robustmoe` under pytest: beartype, for first calls only.

With every call checked the hook is nearly half of the suite's time, and most of that goes to the same few functions of
an attack's or a training's loop, thousands of times in one test. So each function is checked in its first ``CALLS``
calls of each phase of a test (its fixtures, then itself). Every function that a test calls is checked there;
`make test-typed` checks every call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
import jaxtyping._decorator

CALLS = 2
EVERY_CALL = sys.maxsize
decorate = jaxtyping.jaxtyped


class Budget:
    """The checks that each function has had in this phase of a test."""

    def __init__(self) -> None:
        self.calls = CALLS
        self.spent: Counter[int] = Counter()

    def start(self) -> None:
        """Begins a phase of a test: every function has all its checks."""
        self.spent.clear()


budget = Budget()


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Returns ``function`` (or class) as jaxtyping's decorator does, but its later calls in a phase go unchecked.

    A function inside a function is made anew in every call of the outer: all of them share one count, by their code.
    """
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not inspect.isfunction(function):  # a class, a property: its functions come back here
        return decorate(function, typechecker=typechecker)
    code, spent, checked = id(function.__code__), budget.spent, None

    @functools.wraps(function)
    def sparing(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if spent[code] >= budget.calls:
            return function(*args, **kwargs)
        spent[code] += 1
        if checked is None:
            checked = decorate(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return sparing


def install() -> None:
    """Puts the sparing decorator in jaxtyping's place; to be called before `robustmoe` is imported."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = jaxtyped


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` checked by beartype; jaxtyping names the checker by a text, `shapes.typechecked`."""
    return beartype.beartype(function)
