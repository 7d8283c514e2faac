"""A thing is written as a call, everywhere the same text: ``pgd(linf(8/255), steps=50)``.

`build` makes the object a text names, `text` writes an object back, `canonical` gives a text its one normal form,
`describe` lists what can be written. A text is parsed with `ast` and nothing of it is evaluated but calls of known
names, numbers with ``+ - * / **``, strings, booleans, ``None``, lists and tuples. A bare name is a call without
arguments, except where the argument it is given for is a string or a literal: ``pgd(linf(8/255), keep=last)``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from robustmoe.spec.bind import CallReader, Table, mapping
from robustmoe.spec.hints import conform, hint_text
from robustmoe.spec.listing import entries
from robustmoe.spec.parse import canonical, numbers, tree_of
from robustmoe.spec.write import CallWriter

__all__ = [
    "TABLES",
    "Table",
    "build",
    "canonical",
    "conform",
    "describe",
    "hint_text",
    "numbers",
    "text",
]


def _table(module: str, name: str) -> Callable[[], Table]:
    def load() -> Table:
        table: Table = getattr(import_module(module), name)
        return table

    return load


TABLES: dict[str, Callable[[], Table]] = {
    "model": _table("robustmoe.models", "MODELS"),
    "sharpening": _table("robustmoe.models", "SHARPENINGS"),
    "data": _table("robustmoe.data", "DATASETS"),
    "attack": _table("robustmoe.attacks", "ATTACKS"),
    "threat": _table("robustmoe.attacks", "THREATS"),
    "objective": _table("robustmoe.attacks", "OBJECTIVES"),
    "view": _table("robustmoe.attacks", "VIEWS"),
    "codec": _table("robustmoe.wrapping", "CODECS"),
    "certifier": _table("robustmoe.certification", "CERTIFIERS"),
    "method": _table("robustmoe.training", "METHODS"),
    "optimizer": _table("robustmoe.training", "OPTIMIZERS"),
    "schedule": _table("robustmoe.training", "SCHEDULES"),
    "augment": _table("robustmoe.data", "AUGMENTS"),
}
"""The kinds of things, and where their names are: imported when first asked for."""


def build(text: str, kind: str | Table, *more: str | Table) -> Any:
    """Returns the object that ``text`` names.

    ``kind`` is a key of `TABLES`, or a table (name -> callable). The outermost name must be of that kind; names
    inside it may be of any kind, or from the tables in ``more``. A mistake is a one-line `UserError`.
    """
    return CallReader(kind, more, TABLES).outermost(tree_of(text))


def text(obj: Any, *tables: str | Table) -> str:
    """``obj`` written as a call: an instance of a frozen dataclass that, or whose factory, is in a table.

    The inverse of `build`. Only what differs from its default is written. The tables are those of all kinds, or the
    ones given. Where several names make an equal object, the one that needs the fewest arguments wins, and a factory
    (``resnet18``) before its class.
    """
    return CallWriter(mapping(table, TABLES) for table in tables or TABLES).call(obj)


def describe(kind: str) -> list[tuple[str, str, str]]:
    """Returns for each name of a kind (name, signature, first line of its docstring)."""
    return entries(mapping(kind, TABLES), CallWriter(load() for load in TABLES.values()))
