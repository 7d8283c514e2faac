"""One attack on a model, image by image: what a rows file holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robustmoe.records.record import Told
from robustmoe.records.types import Checks, Header, Row


@dataclass(frozen=True)
class Evaluation(Told):
    """A whole rows file: unpacks as ``header, rows, checks``. ``checks`` is None while the evaluation is unfinished."""

    kind = "evaluation"

    header: Header
    rows: list[Row]
    checks: Checks | None

    @property
    def which(self) -> str:
        """Returns the attack's spec."""
        return self.header.attack or "no attack"

    def images(self) -> list[tuple[int, int]]:
        """Returns (index in the data set, label) of each image that is done."""
        return [(row.index, row.label) for row in self.rows]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.header, self.rows, self.checks))
