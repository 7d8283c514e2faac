"""The flags of a verb, read off its signature by argparse: an argument is a flag, and an argument that is a dataclass
stands for its fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from robustmoe import spec
from robustmoe.errors import UserError, nearest
from robustmoe.options import SPECS, Mark, hints_of, read
from robustmoe.spec import familiar
from robustmoe.spec.hints import arms_of

Verb = Callable[..., str]

WIDTH = 80
"""Columns of a help text."""

NAMED = {*SPECS, "method"} - {"model", "data"}
OWN = "A name may be one of your own, from a file: my_file.py:name(arguments)."
"""What the help of a verb says that takes such names."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """One argument of a verb, or one field of an argument that is a dataclass (``group``: that argument's name)."""

    name: str
    hint: Any
    help: str
    marks: tuple[Mark, ...]
    default: Any
    group: str = ""

    @property
    def positional(self) -> bool:
        return Mark.POSITIONAL in self.marks

    @property
    def required(self) -> bool:
        return self.positional and self.default is inspect.Parameter.empty

    @property
    def repeated(self) -> bool:
        """Whether it is given once for each of several things. (Several numbers are one text.)"""
        return typing.get_origin(self.hint) is tuple and not self.numbers

    @property
    def numbers(self) -> bool:
        return any(typing.get_args(arm)[:1] == (float,) for arm in arms_of(self.hint))

    @property
    def option(self) -> str:
        """How it is written; the flag of a list names one thing of it."""
        name = self.name.removesuffix("s") if self.repeated else self.name
        return name.upper() if self.positional else f"--{name.rstrip('_').replace('_', '-')}"  # as_ -> --as

    @property
    def metavar(self) -> str:
        arms = arms_of(self.hint)
        literals = [arm for arm in arms if typing.get_origin(arm) is typing.Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        if choices and int not in arms:
            return f"{{{','.join(choices)}}}"
        return "N" if int in arms else "X" if float in arms else "X,..." if self.numbers else "TEXT"

    @property
    def words(self) -> str:
        """The help text, with the default where the text does not tell it."""
        words = f"{self.help}; repeat it for more" if self.repeated and not self.positional else self.help
        told = "default" in self.help or self.default in _UNSAID or isinstance(self.default, bool)
        return (words if told else f"{words} (default: {_said(self.default)})").replace("%", "%%")

    def read(self, text: str) -> Any:
        """What ``text`` stands for. UserError for what the argument cannot be."""
        arms = arms_of(self.hint)
        if self.numbers:  # its dataclass knows the words that stand for numbers
            return text
        if types.NoneType in arms and text.lower() == "none":
            return None
        if any(text in typing.get_args(arm) for arm in arms if typing.get_origin(arm) is typing.Literal):
            return text
        kind = int if int in arms else float if float in arms else str
        wanted = spec.hint_text(self.hint)
        try:
            value = kind(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise TypeError("expected a finite number")
            return spec.conform(value, typing.get_args(self.hint)[0] if self.repeated else self.hint)
        except ValueError:
            pass
        except TypeError as error:
            wanted = str(error).removeprefix("expected ")
        raise UserError(f"{self.option} must be {wanted}; got {text[:80]!r}")


_UNSAID = (None, (), inspect.Parameter.empty)
"""Defaults that mean nothing by themselves; the help text says what happens then."""


def _said(default: Any) -> str:
    if not isinstance(default, tuple):
        return str(default)
    fractions = [f"{round(255 * number)}/255" for number in default]
    exact = [len(text) < len(str(number)) for text, number in zip(fractions, default)]
    return ",".join(text if short else f"{number:g}" for text, number, short in zip(fractions, default, exact))


def flags_of(verb: Verb) -> list[Flag]:
    """The flags of a verb: its arguments, with the fields in the place of a dataclass.

    An argument ``Annotated[Mapping[str, Any], Dataclass]`` takes only those fields that were given.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    flags: list[Flag] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        hint = hints[name]
        kind = typing.get_args(hint)[1] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(kind):
            flags += _fields(name, kind, overrides=kind is not hint)
        else:
            plain, words, *marks = typing.get_args(hint)
            flags.append(Flag(name, plain, words, tuple(marks), parameter.default))
    return flags


def _fields(group: str, kind: Any, overrides: bool) -> Iterator[Flag]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, hint in hints_of(kind).items():
        plain, words, *marks = typing.get_args(hint)
        default = defaults[name]
        if overrides:
            shown = "none" if default in _UNSAID else default
            words += " (set by the recipe)" if default is dataclasses.MISSING else f" (recipe default: {shown})"
            default = None
        if Mark.PYTHON not in marks:
            yield Flag(name, plain, words, tuple(marks), default, group)


class _Parser(argparse.ArgumentParser):
    """argparse, with our error in the place of its exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser(name: str, verb: Verb, flags: Sequence[Flag]) -> _Parser:
    places = [flag for flag in flags if flag.positional]
    usage = " ".join(
        (flag.option if flag.required else f"[{flag.option}]") + (" ..." if flag.repeated else "") for flag in places
    )
    about, _, example = (inspect.getdoc(verb) or "").partition("\n\nExample: ")
    parser = _Parser(
        prog=f"robustmoe {name}",
        usage=" ".join(f"robustmoe {name} {usage} [OPTIONS]".split()),
        description=textwrap.fill(" ".join(about.split()), WIDTH),
        epilog=(f"{OWN}\n\n" if any(flag.name in NAMED for flag in flags) else "") + f"example:\n  {example}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=22, width=WIDTH),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for flag in flags:
        if flag.positional:
            many = "+" if flag.required else "*"
            count: dict[str, Any] = {"nargs": many} if flag.repeated else {} if flag.required else {"nargs": "?"}
            parser.add_argument(flag.name, metavar=flag.option, help=flag.words, **count)
        elif flag.hint is bool:
            parser.add_argument(flag.option, dest=flag.name, action="store_true", help=flag.words)
        else:
            action = "append" if flag.repeated else "store"
            parser.add_argument(flag.option, dest=flag.name, action=action, metavar=flag.metavar, help=flag.words)
    return parser


def summary(verb: Verb) -> str:
    """The first line of the verb's docstring."""
    return (inspect.getdoc(verb) or "").partition("\n")[0]


def parse(name: str, verb: Verb, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments that ``argv`` gives to the verb called ``name``. Raises UserError for what it does not take."""
    flags = flags_of(verb)
    given, rest = _parser(name, verb, flags).parse_known_args([_dashed(word) for word in argv])
    if rest:
        unknown = next((word for word in rest if re.match("--?[A-Za-z]", word)), None)
        if unknown is not None:
            raise UserError(_unknown(unknown, flags, argv))
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see robustmoe {name} --help")
    values = {flag.name: _read(flag, getattr(given, flag.name)) for flag in flags if hasattr(given, flag.name)}
    return _grouped(verb, flags, values)


def _unknown(word: str, flags: Sequence[Flag], argv: Sequence[str]) -> str:
    """Returns what to say of an option that there is not, written ``word`` and perhaps with "=" and a value."""
    option, equals, value = word.partition("=")
    following = [_dashed(word) for word in argv]
    after = following[following.index(option) + 1 :] if option in following else []
    given = value if equals else after[0] if after and not after[0].startswith("--") else None
    names = {flag.name for flag in flags if not flag.positional}
    meant = familiar.option(option, given, names, "flag")
    return f"unknown option {option!r}; {meant or nearest(option, [f.option for f in flags if not f.positional])}"


def _dashed(word: str) -> str:
    """``--batch_size=8`` as ``--batch-size=8``."""
    option, equals, value = word.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _read(flag: Flag, given: Any) -> Any:
    if isinstance(given, list):
        return tuple(flag.read(text) for text in given)
    return given if isinstance(given, bool) else flag.read(given)


def _grouped(verb: Verb, flags: Sequence[Flag], values: dict[str, Any]) -> dict[str, Any]:
    """The values by argument of the verb: those of a dataclass's fields as the dataclass, or the dict, asked for."""
    groups = {flag.name: flag.group for flag in flags}
    arguments = {name: value for name, value in values.items() if not groups[name]}
    hints = typing.get_type_hints(verb)
    for group in dict.fromkeys(group for group in groups.values() if group):
        fields = {name: value for name, value in values.items() if groups[name] == group}
        arguments[group] = read(hints[group], fields) if dataclasses.is_dataclass(hints[group]) else fields
    return arguments
