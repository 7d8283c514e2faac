"""Imports point one way, read from the source: routing ← models ← attacks ← training; records ← analysis ← report."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "robustmoe"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS = [
    {"asking", "compat", "errors", "generators", "heap", "noise"},
    {"progress", "repeatable"},
    {"arrays", "distributed", "memory", "provenance", "records", "routing", "spec"},
    {"hub", "options", "zoo"},
    {"analysis", "data", "models", "recipe", "runs"},
    {"attacks", "reporting"},
    {"certification", "lipschitz", "wrapping"},
    {"training", "costs", "theory"},
    {"weights"},
    {"evaluation"},
    {"demo", "flags", "forecasting", "interop", "listing", "outgoing", "reading"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
"""From the ground up. What stands in one layer imports from layers below it, and inside its own folder."""

WITHOUT_TORCH = [
    "analysis", "cli", "errors", "flags", "heap", "hub", "listing", "options", "outgoing", "progress", "reading",
    "recipe", "records", "reporting", "runs", "spec", "verbs", "zoo", "__main__",
]  # fmt: skip


BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Where a statement holds others; no expression holds an import."""


@functools.cache
def statements(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements of a file, each with whether it stands inside a function; those for type checkers are left
    out. (The tree itself is not kept: every collection of garbage in a later test would go through it.)
    """
    kept: list[tuple[ast.Import | ast.ImportFrom, bool]] = []
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while todo:
        node, nested = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept.append((node, nested))
        nested = nested or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            for block in BLOCKS:
                todo.extend((child, nested) for child in getattr(node, block, ()))
    return kept


@functools.cache
def imported(name: str, nested: bool = True) -> set[str]:
    """The modules that ``name`` imports, by their full names; ``from robustmoe.a import b`` names b where b is a
    module.
    """
    found = set()
    for node, inside in statements(MODULES[name]):
        if inside and not nested:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{name} imports by a relative path"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            found.add(inner if inner in MODULES else str(node.module))
    return found


def part(module: str) -> str:
    """ "robustmoe.models.base" -> "models"."""
    return module.split(".")[1]


def parts(name: str, nested: bool = True) -> set[str]:
    """The other parts of the package that module ``name`` imports from."""
    inside = {module for module in imported(name, nested) if module.startswith("robustmoe.")}
    return {part(module) for module in inside} - {part(name)}


INNER = [name for name in MODULES if name != "robustmoe"]


def test_every_module_has_a_layer() -> None:
    assert {part(name) for name in INNER} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


def test_imports_point_down() -> None:
    """`spec` and `records` are the exceptions: `spec` names modules in a table, as text, and imports none of them
    before a name is asked for; a record that is printed asks for `robustmoe.reporting.kinds` by its name.
    """
    upward = []
    for name in INNER:
        place = next(i for i, layer in enumerate(LAYERS) if part(name) in layer)
        if above := parts(name) - set().union(*LAYERS[:place]):
            upward.append(f"{name} imports from {', '.join(sorted(above))}, which is not below it")
    assert not upward, "\n" + "\n".join(upward)


def of(*names: str) -> list[str]:
    return [name for name in INNER if part(name) in names]


@pytest.mark.parametrize(
    "these, never",
    [
        (of("routing", "noise"), {"models", "attacks", "training", "evaluation", "data"}),
        (of("models"), {"attacks", "training", "evaluation", "data", "records"}),
        (of("attacks"), {"training", "evaluation", "data", "records"}),
        (of("wrapping"), {"training", "evaluation", "data", "records"}),
        (of("lipschitz"), {"training", "evaluation", "data", "records"}),
        (of("certification"), {"training", "evaluation", "data", "records"}),
        (of("theory"), {"attacks", "training", "evaluation", "data", "analysis"}),
        (of("data"), {"models", "attacks", "training", "evaluation"}),
        (of("training"), {"evaluation", "analysis", "reporting"}),
        (of("records", "analysis", "reporting"), {"models", "attacks", "training", "evaluation", "data", "routing"}),
    ],
    ids=lambda value: " ".join(sorted({part(m) if "." in m else m for m in value})),
)
def test_work_and_reading_are_apart(these: list[str], never: set[str]) -> None:
    assert these
    for name in these:
        assert not parts(name) & never, name


def test_evaluation_does_not_need_the_training_loop() -> None:
    for name in of("evaluation"):
        assert not imported(name) & {"robustmoe.training", "robustmoe.training.loop", "robustmoe.training.phases"}, name


def reaches_torch(name: str) -> list[str]:
    """Returns the imports that lead from module ``name`` to torch, itself first; none where it is not reached."""
    ways = {name: [name]}
    todo = [name]
    while todo:
        module = todo.pop()
        if module.split(".")[0] == "torch":
            return ways[module]
        packages = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
        for following in [*packages, *(imported(module, nested=False) if module in MODULES else ())]:
            if following not in ways:
                ways[following] = [*ways[module], following]
                todo.append(following)
    return []


def test_torch_is_not_reached_by_importing() -> None:
    """Nor through what is imported on the way: module-level imports only, with every package's __init__."""
    names = of(*WITHOUT_TORCH)
    assert names
    ways = [" -> ".join(way) for name in names if (way := reaches_torch(name))]
    assert not ways, "\n" + "\n".join(ways)
    assert reaches_torch("robustmoe.attacks.pgd")[-1].startswith("torch"), "what does import torch is seen"
