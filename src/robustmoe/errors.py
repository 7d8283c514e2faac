"""The one error type a user's own mistake raises, and text that a terminal shows and does not obey."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 2000
"""Characters of a message that are shown."""


class UserError(ValueError):
    """A bad input. Its message is one line: what was wrong, what was expected, what to do. The command line prints it
    and ends with exit code 2, without a traceback. Of a very long one, as of a text that was read, the middle is left
    out.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        left = len(line) - LONGEST
        super().__init__(line if left <= 0 else f"{line[: LONGEST - 300]}... ({left} characters) ...{line[-300:]}")


class EverywhereError(UserError):
    """One that every process of torchrun meets, before they know of each other: the first process tells it."""


_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and new line, marks that turn the direction of writing, and halves of characters."""


def printable(text: str) -> str:
    """Returns the text with what a terminal would obey, and not show, written as an escape, such as ``\\x1b``."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return " ".join(str(error).partition("\n")[0].split()) or type(error).__name__


def out_of_memory(error: BaseException) -> str | None:
    """What to do, in one line, where an error says that there was not enough memory (torch says it in a RuntimeError);
    None for any other.
    """
    first = first_line(error)
    words = ("can't allocate memory", "out of memory", "could not allocate")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in first for word in words)):
        return f"out of memory ({first:.200}); expected something smaller: the model, the images or --batch-size"
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known names nearest to ``name``: "did you mean 'pgd'? known: fgsm, pgd"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}known: {', '.join(known)}"
