"""All that there is to know of one name: what it is, each argument with its meaning and its default, an example that
can be typed, and the papers.
"""

from __future__ import annotations

import inspect
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from robustmoe.errors import UserError
from robustmoe.spec.hints import ANYTHING, SEQUENCES, Factory, arms_of, signature_of
from robustmoe.spec.listing import hint_source
from robustmoe.spec.meanings import cited, first_sentence, meaning
from robustmoe.spec.own import OwnPart
from robustmoe.spec.write import CallWriter

WIDTH = 80

GIVEN = {
    "Threat": "linf(8/255)",
    "Attack": "pgd(linf(8/255))",
    "View": "soft",
    "Method": "at(pgd(linf(8/255)))",
    "Data": "cifar10",
    "ModelSpec": "resnet18",
    "NetworkSpec": "resnet18",
    "Backbone": "resnet18",
    "Backbone | ViT": "resnet18",
    "OwnModel": "my_file.py:make_model",
    "float": "8/255",
    "str | Path": "'path/to/it'",
    "str": "'runs/other'",
}
"""By what an argument takes: what the example gives where there is no default."""

EXAMPLES = {
    "model": 'robustmoe train digits_hard_moe --model "{}"',
    "sharpening": 'robustmoe blend runs/standard runs/robust --sharpen "{}"',
    "data": 'robustmoe train cifar10_small_dense_at --data "{}"',
    "attack": 'robustmoe evaluate runs/digits --attack "{}"',
    "threat": 'robustmoe audit runs/digits --threat "{}"',
    "objective": 'robustmoe evaluate runs/digits --attack "pgd(linf(8/255), objective={})"',
    "view": 'robustmoe evaluate runs/digits --attack "through({}, pgd(linf(8/255)))"',
    "codec": """rm.wrap(model, {{"path.of.router": "{}"}}, example=x)""",
    "certifier": 'robustmoe certify runs/digits --certifier "{}"',
    "method": 'robustmoe train digits_hard_moe --method "{}"',
    "optimizer": 'robustmoe train digits_hard_moe --optimizer "{}"',
    "schedule": 'robustmoe train digits_hard_moe --schedule "{}"',
    "augment": 'robustmoe train digits_hard_moe --augment "{}"',
}
"""By kind: where such a name stands."""


def call_of(name: str, thing: Callable[..., Any]) -> str:
    """Returns the shortest call of a name: what has no default is given."""
    needed = [p for p in signature_of(thing).parameters.values() if p.default is p.empty and p.kind not in _STARS]
    values = [GIVEN.get(hint_source(p.annotation), "1") for p in needed]
    return f"{name}({', '.join(values)})" if values else name


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def page(kind: str, name: str, thing: Callable[..., Any] | OwnPart, writer: CallWriter) -> str:
    """Returns what is known of a name, in lines of at most 80 columns."""
    thing = thing.thing if isinstance(thing, OwnPart) else thing
    article = "an" if kind[0] in "aeiou" else "a"
    what = "a data set" if kind == "data" else f"{article} {kind}"
    lines = [f"{name}: {what}", *_filled(first_sentence(inspect.getdoc(thing) or ""), "  ")]
    parameters = list(signature_of(thing).parameters.values())
    if parameters:
        lines += ["", "arguments:"]
    for parameter in parameters:
        lines += [f"  {_head(parameter, writer)}", *_filled(meaning(kind, thing, parameter.name), " " * 6)]
    call = call_of(name, thing)
    lines += ["", "example:", *_command(EXAMPLES[kind].format(call))]
    if papers := cited(thing):
        lines += ["", *_filled(f"papers: {'; '.join(papers)}", "", "  ")]
    return "\n".join(lines)


def _head(parameter: inspect.Parameter, writer: CallWriter) -> str:
    """Returns an argument as it is written with its default, and what it takes."""
    stars = "*" * (1 + _STARS.index(parameter.kind)) if parameter.kind in _STARS else ""
    takes = takes_of(parameter.annotation)
    if parameter.default is parameter.empty:
        needed = "" if stars else "needed"
        said = ", ".join(part for part in (needed, takes) if part)
        return f"{stars}{parameter.name}" + (f" ({said})" if said else "")
    default = parameter.default
    try:
        shown = "made anew" if isinstance(default, Factory) else writer.value(default, parameter.annotation)
    except UserError:
        shown = str(getattr(default, "__name__", default))
    head = f"{parameter.name}={shown}"
    return f"{head} ({takes})" if takes and len(head) + len(takes) < WIDTH - 5 else head


def takes_of(hint: Any) -> str:
    """Returns in words what an argument takes: "whole number or None", "ce, margin or dlr"."""
    words: list[str] = []
    for arm in arms_of(hint):
        origin, args = typing.get_origin(arm), [a for a in typing.get_args(arm) if a is not Ellipsis]
        if arm is ANYTHING or arm is object:
            continue
        if origin is Literal:
            words += [str(choice) for choice in args]
        elif origin in SEQUENCES or arm in SEQUENCES:
            inner = takes_of(args[0]) if args else ""
            words.append(f"several: {inner}" if inner else "several")
        elif arm is None or arm is types.NoneType:
            words.append("None")
        else:
            words.append(_PLAIN.get(arm, getattr(arm, "__name__", "")))
    words = list(dict.fromkeys(word for word in words if word))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""


_PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _command(text: str) -> list[str]:
    """Returns a command, in two lines where it is too long for one."""
    if len(text) <= WIDTH - 2:
        return [f"  {text}"]
    start, _, rest = text.partition(" --")
    return [f"  {start} \\", *(f"    --{line}" for line in [rest])]


def _filled(text: str, indent: str, following: str | None = None) -> list[str]:
    text = text.replace("``", "").strip()
    text = text[:-1] if text.endswith((";", ",")) else text
    after = indent if following is None else following
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=after, break_on_hyphens=False, break_long_words=False
    )
