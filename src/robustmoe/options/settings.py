"""What every class of options shares: its fields are flags and keywords, and are checked when an instance is made."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from robustmoe import spec
from robustmoe.errors import UserError
from robustmoe.spec.hints import arms_of

Spec = Any
"""A thing written as a call, such as "pgd(linf(8/255), steps=50)", or the object itself."""

Numbers = tuple[float, ...]
"""Numbers; also taken as one text, such as "0, 2/255, 4/255"."""


class Mark(enum.Enum):
    """How an annotated argument or field differs from a plain flag."""

    POSITIONAL = "stands on the command line without a flag"
    PYTHON = "is no flag: Python alone can give it"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields that are flags. Values are checked when an instance is made; `UserError` says what is wrong. `read` makes
    one of what users write.
    """

    WORDS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By field: words that stand for a value, such as "paper" for the radii of a paper."""

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            object.__setattr__(self, name, _conform(name, getattr(self, name), hint))
        for name, least, sentence in _LEAST:
            value = getattr(self, name, None)
            if isinstance(value, int) and value < least:
                raise UserError(f"{sentence.format(value)}, expected {'at least 1' if least else '0 (none) or more'}")


_LEAST = (
    ("limit", 1, "the limit on images is {}"),
    ("batch_size", 1, "the batch size is {}"),
    ("draws", 0, "the draws of random experts are {}"),
)


def hints_of(kind: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, with its help text and marks; those of base classes come last."""
    hints = typing.get_type_hints(kind, include_extras=True)
    order = [name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})]
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: hints[name] for name in dict.fromkeys(order) if name in names}


Kind = TypeVar("Kind", bound=Settings)


def read(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    """An instance of ``kind`` of what users write: a single thing (a text, an attack) where a list is wanted is a list
    of one, numbers may be one text, and a word may stand for a value (``WORDS``).
    """
    hints = hints_of(kind)
    for name in fields:
        if name not in hints:
            raise UserError(spec.unknown("argument", name, fields[name], hints))
    return kind(**{name: _meant(kind, name, value, hints[name]) for name, value in fields.items()})


def _meant(kind: type[Settings], name: str, value: Any, annotated: Any) -> Any:
    if isinstance(value, str) and value in kind.WORDS.get(name, {}):
        return kind.WORDS[name][value]
    lists = [arm for arm in arms_of(annotated) if typing.get_origin(arm) is tuple]
    if lists and value is not None:
        numbers = isinstance(value, str) and float in typing.get_args(lists[0])
        value = spec.numbers(value) if numbers else several(value)
    return _conform(name, value, annotated)


def several(given: Any) -> tuple[Any, ...]:
    """Returns what was given where several things are wanted: a text, a path or an attack alone is a list of one."""
    return (given,) if isinstance(given, str) or not hasattr(given, "__iter__") else tuple(given)


def _conform(name: str, value: Any, annotated: Any) -> Any:
    """``value`` as the field wants it."""
    hint = typing.get_args(annotated)[0]
    try:
        value = spec.conform(value, hint)
    except TypeError as error:  # "expected int or None"
        raise UserError(f"{name} must be {str(error).removeprefix('expected ')}; got {value!r}") from None
    if name == "certified" and not isinstance(value, Mapping | None):
        got = type(value).__name__
        raise UserError(f"certified must be a mapping, index to radius, as Certificates.radii() gives; got {got}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and name in SPECS:
            spec.canonical(text)  # a mistake of writing is told before anything is loaded
    return value


SPECS = ("attack", "attacks", "certifier", "certifiers", "sharpen", "model", "models", "data", "threat")
"""The fields whose texts are written as calls."""


# ------------------------------------------------------------------------------------------------ Python's keywords

Made = TypeVar("Made")


def takes(kind: type[Kind], **defaults: Any) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """A decorator: callers give the function's ``options`` as one value of ``kind``, or its fields as keywords.

    ``defaults``: where this function has others than ``kind``. The fields stand in the function's signature and help.
    """

    def decorate(function: Callable[..., Made]) -> Callable[..., Made]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*given: Any, options: Any = None, **named: Any) -> Made:
            own = {name: value for name, value in named.items() if name in signature.parameters}
            fields = {name: value for name, value in named.items() if name not in own}
            return function(*given, options=_chosen(kind, options, fields, defaults), **own)

        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        fields = _keywords(kind, defaults)
        call.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(function)}\n\n{_described(kind)}"
        return call

    return decorate


def _chosen(kind: type[Kind], options: Any, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Kind:
    """The options with other ``fields``; without ``options``, the defaults of the class but for ``defaults``."""
    if options is not None and not isinstance(options, kind):
        raise UserError(f"options must be {kind.__name__}; got {type(options).__name__}")
    return read(kind, {**(defaults if options is None else vars(options)), **fields})


def _keywords(kind: type[Settings], defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    given = {field.name: defaults.get(field.name, field.default) for field in dataclasses.fields(kind)}
    fields = [
        inspect.Parameter(name, keyword, default=given[name], annotation=typing.get_args(hint)[0])
        for name, hint in hints_of(kind).items()
    ]
    return [*fields, inspect.Parameter("options", keyword, default=None, annotation=f"{kind.__name__} | None")]


def _described(kind: type[Settings]) -> str:
    lines = [f"    {name}: {typing.get_args(hint)[1]}" for name, hint in hints_of(kind).items()]
    return "\n".join([f"Options, as keywords or as options={kind.__name__}(...):", *lines])
