"""Annotations: what a parameter takes, whether a value conforms, and how to say so."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
SCALARS = (bool, int, float, str, types.NoneType)
ANYTHING = inspect.Parameter.empty
MOST = 2**63


@dataclass(frozen=True)
class Factory:
    """The default of an argument whose value is made anew by ``make`` for each object."""

    make: Callable[[], Any]


@functools.lru_cache(maxsize=4096)
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature, with annotations evaluated where all of them can be. A dataclass's field that has a
    ``default_factory`` has a `Factory` for its default.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        signature = inspect.signature(function)
    if not (isinstance(function, type) and dataclasses.is_dataclass(function)):
        return signature
    made = {
        field.name: Factory(field.default_factory)
        for field in dataclasses.fields(function)
        if field.init and field.default_factory is not dataclasses.MISSING
    }
    parameters = signature.parameters.values()
    return signature.replace(parameters=[p.replace(default=made.get(p.name, p.default)) for p in parameters])


def arms_of(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, flat; one arm for anything else."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return arms_of(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(arm for member in typing.get_args(hint) for arm in arms_of(member))
    return (hint,)


def conform(value: Any, hint: Any) -> Any:
    """``value`` as the annotation ``hint`` wants it (an int becomes a float, a list a tuple); else a `TypeError`.

    int excludes bool. Annotations other than scalars, None, Union, Literal, sequences and classes are not checked. No
    argument takes a whole number of more than 64 bits (generators and tensors do not), nor a text with a zero byte, or
    with bytes that are not UTF-8 (nothing could load weights from there).
    """
    if isinstance(value, int) and not -MOST <= value < MOST:
        raise TypeError("expected a number below 2**63")
    if isinstance(value, str) and "\0" in value:
        raise TypeError("expected a text without a zero byte")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise TypeError("expected a text in UTF-8 (rename the file or folder)")
    arms = arms_of(hint)
    if len(arms) == 1:
        return _conform_one(value, arms[0])
    accepted = []
    for arm in arms:
        try:
            accepted.append(_conform_one(value, arm))
        except TypeError:
            continue
    if not accepted:
        raise TypeError(f"expected {hint_text(hint)}")
    return next((result for result in accepted if type(result) is type(value)), accepted[0])


def _conform_one(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is ANYTHING:
        good = True
    elif hint is None or hint is types.NoneType:
        good = value is None
    elif origin is Literal:
        good = any(value == a and type(value) is type(a) for a in typing.get_args(hint))
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value
    elif hint in SEQUENCES or origin in SEQUENCES:
        return _conform_sequence(value, hint)
    elif isinstance(hint, type) and origin is None:
        try:
            good = isinstance(value, hint)
        except TypeError:  # a Protocol that cannot be checked
            good = True
    else:
        good = True
    if not good:
        raise TypeError(f"expected {hint_text(hint)}")
    return value


def _conform_sequence(value: Any, hint: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected {hint_text(hint)}")
    container = list if (typing.get_origin(hint) or hint) is list else tuple
    args = typing.get_args(hint)
    if container is tuple and typing.get_origin(hint) is tuple and args[-1:] != (Ellipsis,) and len(args) != len(value):
        raise TypeError(f"expected {len(args)} values")
    return container(conform(item, item_hint(hint, i)) for i, item in enumerate(value))


def item_hint(hint: Any, place: int) -> Any:
    """Returns the annotation of the item at ``place`` of a sequence annotated ``hint``."""
    for arm in arms_of(hint):
        args = typing.get_args(arm)
        if typing.get_origin(arm) in SEQUENCES and args:
            fixed = typing.get_origin(arm) is tuple and args[-1] is not Ellipsis
            return (args[place] if place < len(args) else ANYTHING) if fixed else args[0]
    return ANYTHING


def takes_bare(name: str, hint: Any) -> bool:
    """Returns whether a bare name given for an argument annotated ``hint`` is that string, and not a call."""
    arms = arms_of(hint)
    if any(name in typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal):
        return True
    origins = (Literal, *SEQUENCES)  # neither is ever written as a call
    return str in arms and all(arm is None or arm in SCALARS or typing.get_origin(arm) in origins for arm in arms)


def hint_text(hint: Any) -> str:
    """Returns an annotation in words: "float or None", "one of 'fp32', 'bf16'", "list of int"."""
    words = []
    for arm in arms_of(hint):
        origin, args = typing.get_origin(arm), [a for a in typing.get_args(arm) if a is not Ellipsis]
        if arm is types.NoneType or arm is None:
            words.append("None")
        elif origin is Literal:
            words.append(repr(args[0]) if len(args) == 1 else "one of " + ", ".join(map(repr, args)))
        elif origin in SEQUENCES:
            words.append("list of " + " and ".join(hint_text(a) for a in args))
        else:
            words.append(getattr(arm, "__name__", str(arm)))
    return " or ".join(words)
