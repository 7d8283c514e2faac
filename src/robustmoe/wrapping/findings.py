"""What `find_routers` found, and how it is printed."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from robustmoe.wrapping.codecs import text_of
from robustmoe.wrapping.said import Codec
from robustmoe.wrapping.watching import Cut, Decision, Draw

WIDTH = 80


@dataclass(frozen=True)
class Finding:
    """A decision: the ``path`` of the module that takes it and its class, the ``call`` ("returns" where it was seen
    only in what the module gave back), the ``shape`` of the scores, whether it ran with gradients on, and the codec
    that reads it.
    """

    path: str
    module: str
    call: str
    shape: tuple[int, ...]
    gradient: bool
    codec: Codec


@dataclass(frozen=True)
class RouterFindings:
    """The decisions of a model, in the order of a pass, and where it passes no gradient (``cuts``) or draws random
    numbers (``draws``). ``inverted``: where experts choose their items, which no codec reads. Prints as a table.
    """

    rows: tuple[Finding, ...]
    cuts: tuple[Cut, ...] = ()
    draws: tuple[Draw, ...] = ()
    inverted: tuple[Decision, ...] = ()

    @property
    def routers(self) -> dict[str, Codec]:
        """The best guess, as `rm.wrap` takes it."""
        return {row.path: row.codec for row in self.rows}

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            table = ["no router found: no choice among experts was seen in a pass"]
        else:
            table = [_line("module path", "class", "call", "shape", "grad"), "-" * WIDTH]
            for row in self.rows:
                table += _lines(row)
        return "\n".join([*table, *self._doubts()])

    __repr__ = __str__

    @property
    def unread(self) -> list[str]:
        """What no codec reads, one sentence each."""
        names = [f"{call.path or 'the model'} ({call.module})" for call in self.inverted]
        return [f"the experts of {name} choose their items: no codec reads that, no attack moves it" for name in names]

    def _doubts(self) -> list[str]:
        lines = [line for sentence in self.unread for line in _wrapped(sentence)]
        for path, how in outermost(self.cuts):
            lines += _wrapped(f"no gradient: {path or 'the model'} ({how})")
        for draw in self.draws:
            lines += _wrapped(f"random: {draw.path or 'the model'} ({draw.module}) calls {draw.call}")
        return lines


def outermost(cuts: tuple[Cut, ...]) -> list[tuple[str, str]]:
    """The path and kind of each cut that lies in no other module with such a cut."""
    places = list(dict.fromkeys((cut.path, cut.how) for cut in cuts))

    def inside(path: str, other: str) -> bool:
        return path != other and (other == "" or path.startswith(f"{other}."))

    return [(path, how) for path, how in places if not any(inside(path, other) for other, _ in places)]


def _lines(row: Finding) -> list[str]:
    cells = (row.module, row.call, str(row.shape), "on" if row.gradient else "off")
    path = row.path or "(the model)"
    first = [_line(path, *cells)] if len(path) <= 26 else [path, _line("", *cells)]
    text = text_of(row.codec)
    return [*first, *_wrapped(f"    -> rm.gate.{text if text.endswith(')') else text + '()'}")]


def _line(path: str, module: str, call: str, shape: str, grad: str) -> str:
    return f"{path:26.26} {module:20.20} {call:8} {shape:17.17} {grad:>4}".rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="       ", replace_whitespace=False)
