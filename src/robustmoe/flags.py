"""The flags of a verb, read off its signature: names, types, help, defaults; every field of a recipe is a flag too."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from robustmoe import recipe as recipes
from robustmoe import spec
from robustmoe.errors import UserError, nearest

Verb = Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Flag:
    """One argument of a verb: its name, annotation, help text, whether it stands without a flag, and its default."""

    name: str
    hint: Any
    help: str
    positional: bool = False
    required: bool = False
    default: Any = argparse.SUPPRESS

    @property
    def repeated(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    @property
    def may_be_none(self) -> bool:
        return types.NoneType in typing.get_args(self.hint)


def _flags(verb: Verb) -> list[Flag]:
    """The flags of a verb: its parameters, and the fields of the recipe where it takes any."""
    hints = typing.get_type_hints(verb, include_extras=True)
    flags = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            flags += _recipe_flags()
            continue
        hint, words = typing.get_args(hints[name])
        required = parameter.default is parameter.empty
        positional = required or name in ("kind", "run", "experiments")
        flags.append(Flag(name, hint, words, positional, required, parameter.default))
    return flags


def _recipe_flags() -> list[Flag]:
    flags = []
    for field, annotated in zip(dataclasses.fields(recipes.Recipe), recipes.field_types().values(), strict=True):
        hint, words = typing.get_args(annotated)
        default = "set by the recipe" if field.default is dataclasses.MISSING else f"recipe default: {field.default}"
        flags.append(Flag(field.name, hint, f"{words} ({default})"))
    return flags


def _parser(name: str, verb: Verb, flags: Sequence[Flag]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"robustmoe {name}", description=summary(verb), exit_on_error=False)
    for flag in flags:
        options: dict[str, Any] = {"help": flag.help}
        if flag.positional:
            options |= {"metavar": _metavar(flag.name), "type": str if flag.repeated else flag.hint}
            if flag.repeated:
                options |= {"nargs": "+"} if flag.required else {"nargs": "*", "default": []}
            elif not flag.required:
                options |= {"nargs": "?", "default": None}
            parser.add_argument(flag.name, **options)
        elif flag.hint is bool:
            parser.add_argument(f"--{flag.name}", action="store_true", **options)
        elif flag.repeated:
            parser.add_argument(f"--{flag.name}", type=str, action="append", default=argparse.SUPPRESS, **options)
        else:
            parser.add_argument(f"--{flag.name}", type=flag.hint, default=flag.default, **options)
    return parser


def _metavar(name: str) -> str:
    return name.upper().removesuffix("S")


def summary(verb: Verb) -> str:
    return (inspect.getdoc(verb) or "").partition("\n")[0]


def _normal(argv: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """``argv`` with ``--batch-size`` as ``--batch_size``, "none" as jsonargparse's null; refuses unknown flags."""
    known = {flag.name: flag for flag in flags}
    out: list[str] = []
    waiting: Flag | None = None  # the flag whose value comes next
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in known and key != "help":
                names = [f"--{f.name}" for f in flags if not f.positional]
                raise UserError(f"unknown option '--{key}'; {nearest(f'--{key}', names)}")
            waiting = known.get(key) if not equals else None
            out.append(f"--{key}{equals}{_null(value, known.get(key))}")
        else:
            out.append(_null(word, waiting))
            waiting = None
    return out


def _null(value: str, flag: Flag | None) -> str:
    return "null" if flag is not None and flag.may_be_none and value.lower() == "none" else value


def parse(name: str, verb: Verb, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments that ``argv`` gives to the verb called ``name``. Raises UserError for what it does not take."""
    flags = _flags(verb)
    known = {flag.name: flag for flag in flags}
    try:
        found = _parser(name, verb, flags).parse_args(_normal(argv, flags))
    except argparse.ArgumentError as e:
        raise UserError(_one_line(str(e), name, known)) from None
    return {key: tuple(value) if known[key].repeated else value for key, value in vars(found).items()}


def _one_line(message: str, name: str, known: dict[str, Flag]) -> str:
    """What jsonargparse says, in our words."""
    wrong = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)\Z', message, re.DOTALL)
    if wrong and wrong[1] in known:
        flag = known[wrong[1]]
        hint = spec.hint_text(flag.hint)
        return f"{'' if flag.positional else '--'}{flag.name} must be {hint}; got {wrong[2]!r}"
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing:
        return f"{name} needs {_metavar(missing[1])}; see robustmoe {name} --help"
    return f"{message[:1].lower()}{message[1:]}; see robustmoe {name} --help"
