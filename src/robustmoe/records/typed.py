"""JSON to dataclasses and back, by the type hints of the fields; errors name the field.

A dataclass may have a method ``problems()``, which yields in words what does not fit together in it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from robustmoe.errors import UserError

T = TypeVar("T")
Reader = Callable[[Any], Any]
_PLAIN: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
}


class _Misfit(TypeError):
    """A value that is not of its type: what it must be, what it is, and its place in the field, such as "[3]"."""

    def __init__(self, wanted: str, value: Any) -> None:
        super().__init__(wanted)
        self.wanted, self.value, self.place = wanted, value, ""


def build(cls: type[T], data: Any) -> T:
    """Returns an instance of a dataclass from a JSON object: every field there (those with a default may be missing),
    of its type, no other, and without problems. A key "kind" is left out. UserError says what is wrong."""
    name = str(getattr(cls, "kind", cls.__name__.lower()))
    if not isinstance(data, dict):
        raise UserError(f"{name}: expected an object, got {data!r:.80}")
    data = {key: value for key, value in data.items() if key != "kind"}
    values = {}
    for field, (read, optional) in _fields(cls).items():  # type: ignore[arg-type]
        if field not in data:
            if optional:
                continue
            raise UserError(f"{name}: field {field!r} is missing")
        try:
            values[field] = read(data.pop(field))
        except _Misfit as misfit:
            place = f"{field}{misfit.place}"
            raise UserError(f"{name}: field {place!r} must be {misfit.wanted}, got {misfit.value!r:.80}") from None
    if data:
        raise UserError(f"{name}: unknown field {next(iter(data))!r}")
    made = cls(**values)
    for problem in made.problems() if hasattr(made, "problems") else ():
        raise UserError(f"{name}: {problem}")
    return made


def encode(value: Any) -> Any:
    """Returns the JSON value that :func:`build` reads: a dataclass becomes an object (its own ``to_dict``, if it has
    one)."""
    if is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None)
        return own() if own else {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> Iterator[str]:
    """Returns the problem that a field has a value that is not allowed, if it has."""
    if value not in allowed:
        yield f"field {name!r} must be one of {', '.join(allowed)}, got {value!r}"


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Reader, bool]]:
    """Returns field -> how it is read, and whether it may be missing."""
    hints = get_type_hints(cls)
    return {
        field.name: (
            _reader(hints[field.name]),
            field.default is not MISSING or field.default_factory is not MISSING,
        )
        for field in fields(cls)
    }


def _reader(hint: Any) -> Reader:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if hint in _PLAIN:
        return _plain(hint)
    if origin in (Union, types.UnionType):
        (kept,) = (each for each in inner if each is not types.NoneType)
        read = _reader(kept)
        return lambda value: None if value is None else read(value)
    if origin is list:
        return _each(list, "a list", _reader(inner[0]))
    if origin is dict and inner[0] is str:
        return _each(dict, "an object", _reader(inner[1]))
    if isinstance(hint, type) and is_dataclass(hint):
        return _object(getattr(hint, "from_dict", None) or functools.partial(build, hint))
    raise TypeError(f"no way is known to read {hint} from JSON")


def _plain(kind: type) -> Reader:
    allowed, words = _PLAIN[kind]

    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise _Misfit(words, value)
        return kind(value)

    return read


def _object(make: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Misfit("an object", value)
        return make(value)

    return read


def _each(kind: type, words: str, read: Reader) -> Reader:
    """Returns a list or an object, item by item."""

    def whole(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _Misfit(words, value)
        items: Any = value
        key: Any = None
        made = {}
        try:
            for key, item in value.items() if isinstance(value, dict) else enumerate(items):
                made[key] = read(item)
        except _Misfit as misfit:
            misfit.place = f"[{key}]{misfit.place}"
            raise
        return made if kind is dict else list(made.values())

    return whole
