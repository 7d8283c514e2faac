"""Sizes and names of the source: what is longer than a screen, and names that say nothing."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "src" / "robustmoe"
PATHS = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
Function = ast.FunctionDef | ast.AsyncFunctionDef
NOTHING = {"found", "one"}
"""Names that say nothing of what they hold: a rate, a record, a check?"""

MANY_ARGUMENTS = {
    "interop.py:benchmark": "RobustBench's own arguments",
    "models/conversion.py:moefy": "users write them by name",
    "training/advmoe.py:advmoe": "users write them by name, in recipes",
}
LONG = {
    "models/conversion.py:moefy": "half of it is its docstring, with an example",
    "training/advmoe.py:advmoe": "half of it is its docstring",
    "interop.py:benchmark": "half of it is its docstring",
    "attacks/fab.py:_run": "its passes share what they know of each point",
    "theory/slots.py:x11": "one table of rows",
    "theory/fixed.py:x3": "one table of rows",
    "theory/split.py:x4": "one table of rows",
}
LARGE: dict[str, str] = {}


class Seen(NamedTuple):
    """What is kept of the source, without its trees (every collection of garbage in a later test would go through
    them): each function's name, number of arguments and lines; classes; names that say nothing.
    """

    functions: list[tuple[str, int, int]]
    classes: list[str]
    nothing: list[str]


@functools.cache
def seen() -> Seen:
    kept = Seen([], [], [])
    for path, file in PATHS.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Function):
                lines = (node.end_lineno or 0) - node.lineno + 1
                kept.functions.append((f"{path}:{node.name}", len(arguments(node)), lines))
            elif isinstance(node, ast.ClassDef):
                kept.classes.append(node.name)
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id
            name = stored or getattr(node, "arg" if isinstance(node, ast.arg) else "name", None)
            if name in NOTHING and isinstance(node, ast.Name | ast.arg | Function):
                kept.nothing.append(f"{path}:{node.lineno} {name}")
    return kept


def arguments(function: Function) -> list[str]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_a_function_has_at_most_eight_arguments() -> None:
    assert {name for name, arguments, _ in seen().functions if arguments > 8} == set(MANY_ARGUMENTS)


def test_a_function_has_at_most_forty_lines() -> None:
    assert {name for name, _, lines in seen().functions if lines > 40} == set(LONG)


def test_a_module_has_at_most_450_lines() -> None:
    large = {name for name, file in PATHS.items() if file.read_text().count("\n") > 450}
    assert large == set(LARGE)


def test_no_name_is_found_or_one() -> None:
    assert seen().nothing == []


def test_no_two_classes_have_one_name() -> None:
    assert [name for name, count in Counter(seen().classes).items() if count > 1] == []
