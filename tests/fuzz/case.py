"""What a section makes: words of a command, or something that is done in Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """``change``: what is odd about it, in words; ``work``: the words of a command, or a function that may raise
    `UserError`; ``valid``: nothing is odd, so that it must be taken.
    """

    change: str
    work: list[str] | Callable[[], object]
    valid: bool = False


class Evil:
    """A pickle that runs a command."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)
