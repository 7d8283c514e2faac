"""What jaxtyping's import hook puts on every function of `robustmoe` under pytest: beartype, for first calls only.

With every call checked the hook is nearly half of the suite's time, and most of that goes to the same few functions of
an attack's or a training's loop, thousands of times in one test. So each function is checked in its first call (the
first ``CALLS``) of each phase of a test: its fixtures, then itself. Every function that a test calls is checked there;
`make test-typed` checks every call.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import beartype
import jaxtyping
import jaxtyping._decorator

CALLS = 1
EVERY_CALL = sys.maxsize
decorate = jaxtyping.jaxtyped
read_annotation = jaxtyping._decorator._destring_annotation


class Budget:
    """The checks that each function has had in this phase of a test."""

    def __init__(self) -> None:
        self.calls = CALLS
        self.spent: dict[int, int] = {}

    def start(self) -> None:
        """Begins a phase of a test: every function has all its checks."""
        self.spent.clear()


budget = Budget()


class Inner:
    """The checks of a function inside a function, which is made anew in every call of the outer one.

    To compile its checks takes milliseconds, so they are compiled once a code, around a stand-in that calls whichever
    function is to be checked now.
    """

    of: ClassVar[dict[int, Inner]] = {}

    def __init__(self, function: types.FunctionType, typechecker: Any) -> None:
        now: list[types.FunctionType] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            return now[-1](*args, **kwargs)

        names = function.__globals__  # in which the annotations are looked up
        stand_in = functools.wraps(function)(types.FunctionType(call.__code__, names, "", None, call.__closure__))
        self.now, self.checked = now, decorate(stand_in, typechecker=typechecker)
        self.code = function.__code__  # lives on, so that no other has its id
        del stand_in.__wrapped__  # the function itself, and all that it holds, may go

    def __call__(self, function: types.FunctionType, *args: Any, **kwargs: Any) -> Any:
        self.now.append(function)
        try:
            return self.checked(*args, **kwargs)
        finally:
            self.now.pop()


ALONE: Any = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))
"""Checks as beartype does, and says what is wrong by the TypeError that jaxtyping raises."""


def shaped(hint: Any) -> bool:
    """Whether an annotation holds a shape, or one that cannot be told (a text that its module does not understand)."""
    if isinstance(hint, str) or (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)):
        return True
    parts = hint if isinstance(hint, list | tuple) else typing.get_args(hint)
    return typing.get_origin(hint) is not typing.Literal and any(map(shaped, parts))


def without_shapes(function: types.FunctionType) -> types.FunctionType | None:
    """Returns ``function`` with its annotations read, where no shape stands in them.

    For a shape, jaxtyping compiles two functions around each function and binds every call's arguments once more.
    """
    names = function.__globals__
    hints = {key: read_annotation(hint, names) for key, hint in function.__annotations__.items()}
    if any(map(shaped, hints.values())):
        return None
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, hints
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    return twin


def compiled(function: types.FunctionType, typechecker: Any) -> Callable[..., Any]:
    """Returns ``function`` with its checks."""
    if "<locals>" not in function.__qualname__:
        if (plain := without_shapes(function)) is not None:
            return ALONE(plain)
        return decorate(function, typechecker=typechecker)
    if (key := id(function.__code__)) not in Inner.of:
        Inner.of[key] = Inner(function, typechecker)
    return functools.partial(Inner.of[key], function)


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
        if (calls := spent.get(code, 0)) >= budget.calls:
            return function(*args, **kwargs)
        spent[code] = calls + 1
        if checked is None:
            checked = compiled(function, typechecker)
        return checked(*args, **kwargs)

    return sparing


def install() -> None:
    """Puts the sparing decorator in jaxtyping's place; to be called before `robustmoe` is imported."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = jaxtyped


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` checked by beartype; jaxtyping names the checker by a text, `shapes.typechecked`.

    jaxtyping hands over two stand-ins of every function, one with its parameters, one that gives its result back. The
    second has the parameters too, which are checked by then, and their sizes known: only the result is checked there.
    """
    hints = function.__annotations__
    if (result := hints.get("return", Any)) is not Any:
        function.__annotations__ = {**dict.fromkeys(hints, Any), "return": result}
    return beartype.beartype(function)
