"""Sizes and names of the source: what is longer than a screen, and names that say nothing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "robustmoe"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
Function = ast.FunctionDef | ast.AsyncFunctionDef

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


def functions() -> Iterator[tuple[str, Function]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.name}", node


def arguments(function: Function) -> list[str]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_a_function_has_at_most_eight_arguments() -> None:
    assert {name for name, function in functions() if len(arguments(function)) > 8} == set(MANY_ARGUMENTS)


def test_a_function_has_at_most_forty_lines() -> None:
    long = {name for name, function in functions() if (function.end_lineno or 0) - function.lineno >= 40}
    assert long == set(LONG)


def test_a_module_has_at_most_450_lines() -> None:
    large = {path for path in TREES if (PACKAGE / path).read_text().count("\n") > 450}
    assert large == set(LARGE)


def test_no_name_is_found_or_one() -> None:
    """They say nothing of what they hold: a rate, a record, a check?"""
    nothing = {"found", "one"}
    names = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in nothing and isinstance(node.ctx, ast.Store):
                names.append(f"{path}:{node.lineno} {node.id}")
            elif isinstance(node, ast.arg) and node.arg in nothing:
                names.append(f"{path}:{node.lineno} {node.arg}")
            elif isinstance(node, Function) and node.name in nothing:
                names.append(f"{path}:{node.lineno} {node.name}")
    assert names == []


def test_no_two_classes_have_one_name() -> None:
    classes = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
