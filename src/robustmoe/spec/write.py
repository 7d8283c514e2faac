"""Object to text: the shortest call that makes an equal one."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from robustmoe.errors import UserError
from robustmoe.spec.bind import Table
from robustmoe.spec.hints import Factory, arms_of, item_hint, signature_of, takes_bare
from robustmoe.spec.own import OwnPart, Written, class_name


class CallWriter:
    """Writes objects as calls of the names of some tables."""

    def __init__(self, tables: Iterable[Table]) -> None:
        self.entries = [
            (name, function.thing if isinstance(function, OwnPart) else function)
            for table in tables
            for name, function in table.items()
        ]

    def call(self, obj: Any) -> str:
        """``obj`` as a call of a name that makes an equal one: see `spec.text` for which."""
        if isinstance(obj, Written):
            return obj.text
        calls: list[tuple[int, bool, str]] = []
        reason = f"no name makes a {type(obj).__name__}"
        own = class_name(type(obj)) if dataclasses.is_dataclass(obj) else None
        for name, function in [*self.entries, *([(own, type(obj))] if own else ())]:
            signature = signature_of(function)
            is_class = function is type(obj)
            made = signature.return_annotation
            if not is_class and not (isinstance(made, type) and made is not Any and isinstance(obj, made)):
                continue
            try:
                arguments = self._arguments(obj, signature)
                if is_class or function(*arguments.args, **arguments.kwargs) == obj:
                    calls.append((len(arguments.arguments), is_class, self._write_call(name, arguments)))
            except UserError as e:
                reason = str(e)
            except (AttributeError, ValueError, TypeError):  # this factory does not make such an object; another may
                continue
        if not calls:
            raise UserError(f"a {type(obj).__name__} cannot be written as a call: {reason}")
        return min(calls)[-1]

    def _arguments(self, obj: Any, signature: inspect.Signature) -> inspect.BoundArguments:
        """Returns the attributes of ``obj`` that a signature names and that differ from its defaults."""
        arguments = inspect.BoundArguments(signature, OrderedDict())
        for name, parameter in signature.parameters.items():
            default = parameter.default
            if isinstance(default, Factory):
                default = default.make()
            needed = default is parameter.empty
            if needed or (hasattr(obj, name) and getattr(obj, name) != default):
                arguments.arguments[name] = getattr(obj, name)
        return arguments

    def _write_call(self, name: str, arguments: inspect.BoundArguments) -> str:
        """Arguments without a default by position, the others by keyword."""
        inside, positional = [], True
        for key, parameter in arguments.signature.parameters.items():
            if key not in arguments.arguments:
                continue
            value = arguments.arguments[key]
            if parameter.kind is parameter.VAR_POSITIONAL:
                inside += [self.value(item, parameter.annotation) for item in value]
                continue
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
            positional = positional and needed
            written = self.value(value, parameter.annotation)
            inside.append(written if positional else f"{key}={written}")
        return f"{name}({', '.join(inside)})" if inside else name

    def value(self, value: Any, hint: Any) -> str:
        """``value`` as it is written for an argument annotated ``hint``."""
        if value is None or isinstance(value, bool | int):
            return repr(value)
        if isinstance(value, float):
            return _float_text(value, hint)
        if isinstance(value, str):
            bare = value.isidentifier() and not keyword.iskeyword(value) and takes_bare(value, hint)
            return value if bare else repr(value)
        if isinstance(value, list | tuple):
            items = ", ".join(self.value(item, item_hint(hint, i)) for i, item in enumerate(value))
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        return self.call(value)


def _float_text(value: float, hint: Any) -> str:
    """``8/255`` where that is exact and shorter than the decimal; ``12`` for 12.0 where a float is asked for anyway."""
    if value != value:
        raise UserError("nan cannot be written in a call")
    if abs(value) == float("inf"):
        return "1e309" if value > 0 else "-1e309"
    arms = arms_of(hint)
    if value == int(value) and abs(value) < 1e6 and float in arms and int not in arms:
        return str(int(value))
    halves = round(value * 510)
    fraction = f"{halves // 2 if halves % 2 == 0 else halves / 2}/255"
    return fraction if len(fraction) < len(repr(value)) and halves / 2 / 255 == value else repr(value)
