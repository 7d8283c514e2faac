"""A thing is written as a call, everywhere the same text: ``pgd(linf(8/255), steps=50)``.

`build` makes the object a text names, `text` writes an object back, `canonical` gives a text its one normal form,
`describe` lists what can be written. A text is parsed with `ast` and nothing of it is evaluated but calls of known
names, numbers with ``+ - * / **``, strings, booleans, ``None``, lists and tuples. A bare name is a call without
arguments, except where the argument it is given for is a string or a literal: ``pgd(linf(8/255), keep=last)``.

``my_file.py:name`` stands wherever a name does, and runs that file (`robustmoe.spec.own`); installed packages may offer
names too (`robustmoe.spec.offered`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from robustmoe.spec.bind import CallReader, Table, mapping
from robustmoe.spec.familiar import unknown
from robustmoe.spec.hints import conform, hint_text
from robustmoe.spec.listing import entries
from robustmoe.spec.offered import packages as offering
from robustmoe.spec.offered import parts_offered
from robustmoe.spec.own import OwnPart, Written, blamed, called, said, sha256_of
from robustmoe.spec.pages import page
from robustmoe.spec.parse import canonical, numbers, own_names, tree_of
from robustmoe.spec.write import CallWriter

__all__ = [
    "TABLES",
    "OwnPart",
    "Table",
    "Written",
    "blamed",
    "build",
    "called",
    "canonical",
    "conform",
    "describe",
    "explain",
    "files",
    "hint_text",
    "numbers",
    "own_names",
    "packages",
    "said",
    "text",
    "unknown",
]

PLACES = {
    "model": ("robustmoe.models", "MODELS", "ModelSpec"),
    "sharpening": ("robustmoe.models", "SHARPENINGS", "Sharpening"),
    "data": ("robustmoe.data", "DATASETS", "Data"),
    "attack": ("robustmoe.attacks", "ATTACKS", "Attack"),
    "threat": ("robustmoe.attacks", "THREATS", "Threat"),
    "objective": ("robustmoe.attacks", "OBJECTIVES", "Objective"),
    "view": ("robustmoe.attacks", "VIEWS", "View"),
    "codec": ("robustmoe.wrapping", "CODECS", "Codec"),
    "certifier": ("robustmoe.certification", "CERTIFIERS", "Certifier"),
    "method": ("robustmoe.training", "METHODS", "Method"),
    "optimizer": ("robustmoe.training", "OPTIMIZERS", "OptimizerSpec"),
    "schedule": ("robustmoe.training", "SCHEDULES", None),
    "augment": ("robustmoe.data", "AUGMENTS", None),
}
"""Kind -> the module, the table of its names in it, and the class of its things; None where they are functions."""


MORE = {
    "model": ("robustmoe.wrapping.described", "MODELS"),
    "attack": ("robustmoe.evaluation.transferring", "ATTACKS"),
}
"""Kind -> a second table, of what stands above the first."""


def _table(kind: str) -> Callable[[], Table]:
    def load() -> Table:
        module, name, _ = PLACES[kind]
        table: Table = getattr(import_module(module), name)
        if kind in MORE:
            above, name = MORE[kind]
            table = {**table, **getattr(import_module(above), name)}
        return {**more, **table} if (more := parts_offered(kind)) else table

    return load


def _wanted(kind: str) -> type | None:
    module, _, name = PLACES[kind]
    return None if name is None else getattr(import_module(module), name)


def _late() -> type:
    """The class that holds a call of a model of a user's own until the model is built."""
    late: type = import_module("robustmoe.models").OwnModel
    return late


TABLES: dict[str, Callable[[], Table]] = {kind: _table(kind) for kind in PLACES}
"""The kinds of things, and where their names are: imported when first asked for."""


def build(text: str, kind: str | Table, *more: str | Table) -> Any:
    """Returns the object that ``text`` names.

    ``kind`` is a key of `TABLES`, or a table (name -> callable). The outermost name must be of that kind; names
    inside it may be of any kind, or from the tables in ``more``. A mistake is a one-line `UserError`.
    """
    return CallReader(kind, more, TABLES, _wanted, _late).outermost(tree_of(text))


def text(obj: Any, *tables: str | Table) -> str:
    """``obj`` written as a call: an instance of a frozen dataclass that, or whose factory, is in a table.

    The inverse of `build`. Only what differs from its default is written. The tables are those of all kinds, or the
    ones given. Where several names make an equal object, the one that needs the fewest arguments wins, and a factory
    (``resnet18``) before its class.
    """
    return CallWriter(mapping(table, TABLES) for table in tables or TABLES).call(obj)


def files(*texts: str | None) -> dict[str, str]:
    """Returns the SHA-256 of each file that stands in the texts as ``my_file.py:name``, by the path that is written.
    UserError where a file is not there.
    """
    paths = [name.rpartition(":")[0] for text in texts if text is not None for name in own_names(text)]
    return {path: sha256_of(path) for path in dict.fromkeys(paths)}


def packages() -> dict[str, str]:
    """Returns the installed packages that offer parts, and their versions."""
    return offering(PLACES)


def describe(kind: str) -> list[tuple[str, str, str]]:
    """Returns for each name of a kind (name, signature, first sentence of its docstring)."""
    return entries(mapping(kind, TABLES), CallWriter(load() for load in TABLES.values()))


def explain(kind: str, name: str) -> str:
    """Returns all that is known of a name of a kind: each argument with its meaning, an example, the papers."""
    return page(kind, name, mapping(kind, TABLES)[name], CallWriter(load() for load in TABLES.values()))
