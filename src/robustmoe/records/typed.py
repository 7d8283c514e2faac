"""JSON to dataclasses and back: msgspec reads them by the types of their fields, which hold the ranges; errors name the
field.

A dataclass may have a method ``problems()``, which yields in words what does not fit together in it.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from robustmoe.errors import UserError

T = TypeVar("T")

MOST = 2**63 - 1
Whole = Annotated[int, Meta(ge=-MOST - 1, le=MOST)]
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Answer = Annotated[int, Meta(ge=-1, le=MOST)]
"""A predicted class; -1 where a logit was not finite."""
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Length = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
"""A finite number, 0 or more: a radius, seconds."""
Radius = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Share = Annotated[float, Meta(ge=0, le=1)]
Experts = Annotated[int, Meta(ge=1, le=65536)]
"""How many experts a router has; tables of that size are made for each class."""


def one_of(words: Sequence[str]) -> Meta:
    """Returns the mark of a text that is one of some words."""
    return Meta(pattern=rf"\A(?:{'|'.join(words)})\Z")


Plain = None | bool | int | float | str
_Flat = Plain | list[Plain] | dict[str, Plain]
_Deep = Plain | list[_Flat] | dict[str, _Flat]
Value = Plain | list[_Deep] | dict[str, _Deep]
"""What a check may answer: a plain value, or lists and objects of them, three deep at most."""


_HALVES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""What half a surrogate pair may look like in JSON, and a whole one too."""


def parse(text: bytes | str) -> Any:
    """Returns the value that JSON stands for (NaN and Infinity are numbers). UserError where it is no JSON, nested too
    deeply, or has text that no file can hold."""
    try:
        value = json.loads(text)
        if _HALVES.search(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise UserError(f"it has half of a character (\\u{ord(error.object[error.start]):04x}) in a text") from None
    except RecursionError:
        raise UserError("it is nested too deeply to be one of our files") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise UserError(f"it is no JSON: {error}") from None


def build(cls: type[T], data: Any) -> T:
    """Returns an instance of a dataclass from a JSON object: every field there (those with a default may be missing),
    of its type and in its range, no other, and without problems. UserError says what is wrong."""
    name = str(getattr(cls, "kind", cls.__name__.lower()))
    try:
        made = msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {_said(cls, data, str(error))}") from None
    for problem in _problems(made, data, ""):
        raise UserError(f"{name}: {problem}")
    return made


def encode(value: Any) -> Any:
    """Returns the JSON value that :func:`build` reads: a dataclass becomes an object, which begins with its kind and
    version, where it has them."""
    if is_dataclass(value) and not isinstance(value, type):
        names = sorted((field.name for field in fields(value)), key=lambda name: name not in ("kind", "version"))
        return {name: encode(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def check_version(name: str, data: Mapping[str, Any], version: int, remedy: str) -> None:
    """UserError where a file is of another version: it names the robustmoe that wrote it, where the file does."""
    then = data.get("version")
    if then == version and type(then) is int:
        return
    header = data if isinstance(data.get("versions"), dict) else data.get("header")
    versions = header.get("versions") if isinstance(header, dict) else None
    writer = versions.get("robustmoe") if isinstance(versions, dict) else None
    which = f"robustmoe {writer:.20}" if isinstance(writer, str) else "the robustmoe that wrote it"
    raise UserError(
        f"{name} of version {_short.repr(then)}, this robustmoe reads version {version}: install {which}, or {remedy}"
    )


def _problems(made: Any, data: Any, place: str) -> Iterator[str]:
    """Yields what msgspec does not look at, in every dataclass inside: fields that are not known, and problems."""
    if is_dataclass(made):
        known = {field.name for field in fields(made)}
        for name in data:
            if name not in known:
                yield f"unknown field {_short.repr(f'{place}{name}')}"
            else:
                yield from _problems(getattr(made, name), data[name], f"{place}{name}.")
        problems = getattr(made, "problems", None)
        for problem in problems() if problems else ():
            yield f"{place.removesuffix('.')}: {problem}" if place else problem
    elif isinstance(made, dict):
        for name in made:
            yield from _problems(made[name], data[name], f"{place.removesuffix('.')}[{name}].")
    elif isinstance(made, list) and made and isinstance(data[0], dict):
        for at, item in enumerate(made):
            yield from _problems(item, data[at], f"{place.removesuffix('.')}[{at}].")


# ------------------------------------------------------------------------------------------------ words

_WORDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list",
    "object": "an object", "null": "null", ">=": "of at least", "<=": "of at most", ">": "above",
}  # fmt: skip
_short = reprlib.Repr()
_short.maxstring = _short.maxlong = 60


def _said(hint: Any, data: Any, message: str, place: str = "") -> str:
    """Returns msgspec's message about ``data``, which stands at ``place``, in our words."""
    what, _, path = message.partition(" - at `")
    for name, at, _any in re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", path):
        hint = _inner(hint, name)
        if _any:  # an entry of an object, whose key msgspec does not tell
            return next(_said(hint, item, error, f"{place}[{key:.60}]") for key, item, error in _misfits(data, hint))
        place += f".{name}" if name else f"[{at}]"
        data = data[name or int(at)]
    if missing := re.search(r"required field `(\w+)`", what):
        return f"field {f'{place}.{missing[1]}'.removeprefix('.')!r} is missing"
    where = f"field {place.removeprefix('.')!r} must be" if place else "expected"
    return f"{where} {_wanted(hint, what)}, got {_short.repr(data)}"


def _misfits(data: Mapping[str, Any], hint: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields the entries of an object that are not of the type, and what msgspec says of each."""
    for key, item in data.items():
        try:
            msgspec.convert(item, hint)
        except msgspec.ValidationError as error:
            yield key, item, str(error)


def _inner(hint: Any, name: str) -> Any:
    """Returns the type of a field, or of the items of a list or an object."""
    if name:
        return get_type_hints(next(filter(is_dataclass, _arms(hint))), include_extras=True)[name]
    return next(get_args(arm)[-1] for arm in _arms(hint) if get_origin(arm) in (list, dict))


def _arms(hint: Any) -> Iterator[Any]:
    """Yields the members of a union, without the marks of ranges."""
    if get_origin(hint) in (Annotated, Union, UnionType):
        for arm in get_args(hint):
            yield from _arms(arm)
    else:
        yield hint


def _wanted(hint: Any, what: str) -> str:
    """Returns what msgspec expected, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if words := re.search(r"matching regex '\\\\A\(\?:(.*)\)", what):
        return f"one of {words[1].replace('|', ', ')}"
    if what.endswith(str(sys.float_info.max)) or "out of range" in what:
        return "a finite number"
    expected = re.sub(r"`([^`]+)`", lambda kinds: " or ".join(map(_WORDS.__getitem__, kinds[1].split(" | "))), what)
    expected = re.sub(r"of length ([<>]=) (\d+)", r"\1 \2 entries", expected)
    expected = re.sub(r"[<>]=|>", lambda sign: _WORDS[sign[0]], expected)
    return expected.removeprefix("Expected ").partition(", got ")[0]
