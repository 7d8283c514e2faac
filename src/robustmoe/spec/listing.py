"""What can be written: the names of a table, with their signatures."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

from robustmoe.errors import UserError
from robustmoe.spec.bind import Table
from robustmoe.spec.hints import ANYTHING, Factory, signature_of
from robustmoe.spec.meanings import first_sentence
from robustmoe.spec.own import OwnPart
from robustmoe.spec.write import CallWriter


def entries(table: Table, writer: CallWriter) -> list[tuple[str, str, str]]:
    """Returns for each name of a table (name, signature, first sentence of its docstring)."""
    rows = []
    for name, function in sorted(table.items()):
        function = function.thing if isinstance(function, OwnPart) else function
        parameters = ", ".join(_parameter(p, writer) for p in signature_of(function).parameters.values())
        line = first_sentence(inspect.getdoc(function) or "").replace("``", "")
        rows.append((name, f"{name}({parameters})" if parameters else name, line))
    return rows


def _parameter(parameter: inspect.Parameter, writer: CallWriter) -> str:
    star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
    star = "**" if parameter.kind is parameter.VAR_KEYWORD else star
    if parameter.default is parameter.empty:
        hint = "" if parameter.annotation is ANYTHING else f": {hint_source(parameter.annotation)}"
        return f"{star}{parameter.name}{hint}"
    default = parameter.default
    if isinstance(default, Factory):
        return f"{parameter.name}=…"
    try:
        return f"{parameter.name}={writer.value(default, parameter.annotation)}"
    except UserError:
        return f"{parameter.name}={getattr(default, '__name__', default)}"


def hint_source(hint: Any) -> str:
    """Returns an annotation as one writes it, without module names."""
    if isinstance(hint, str):
        return hint
    return getattr(hint, "__name__", "") if typing.get_origin(hint) is None else re.sub(r"\b\w+\.", "", str(hint))
