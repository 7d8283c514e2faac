"""The one error type a user's own mistake raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad input. Its message is one line: what was wrong, what was expected, what to do. The command line prints it
    and ends with exit code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known names nearest to ``name``: "did you mean 'pgd'? known: fgsm, pgd"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}known: {', '.join(known)}"
