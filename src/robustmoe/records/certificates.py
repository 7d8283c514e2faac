"""The files of `robustmoe certify` in a run folder, one a certifier: what it proves, one row an image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from robustmoe.errors import UserError
from robustmoe.records.record import Record
from robustmoe.records.typed import Answer, Count, Length, Share, one_of
from robustmoe.records.types import Header

SUBJECTS = ("model", "smoothed model")


@dataclass(frozen=True)
class Proof:
    """One image: its index in the data set, its label, and what is proven of it. No image within ``radius`` of it (in
    the header's norm, pixels of [0, 1]) has another prediction than ``prediction`` (-1: the certifier abstains).

    ``rule``: what proves it, "" at radius 0; ``reachable``: experts that can be used somewhere within the header's eps,
    ``proven``: those of them that are proven on their own; ``stable``: whether the route is the same everywhere there
    (1 or 0; under noise the share of copies on the clean route); None where the certifier does not know. ``reason``:
    why eps is not certified. ``seconds``: its share of its batch's wall time."""

    index: Count
    label: Count
    prediction: Answer
    radius: Annotated[float, Meta(ge=0)]
    rule: str
    reachable: Count | None
    proven: Count | None
    stable: Share | None
    reason: str
    seconds: Length

    @property
    def right(self) -> bool:
        """Says whether the certified prediction is the label."""
        return self.prediction == self.label


@dataclass(frozen=True)
class Certificates(Record, kind="certificates", file="certificates/*.json", version=3, verb="certify"):
    """What one certifier proves of one model. ``header``: the model, the images, the certifier's norm, eps and seed
    (its attack is None). ``certifier``: its spec. ``subject``: what the certificates are of, one of `SUBJECTS`.
    ``rows``: of the images done so far."""

    header: Header
    certifier: str
    subject: Annotated[str, one_of(SUBJECTS)]
    rows: list[Proof]

    @property
    def which(self) -> str:
        """Returns the certifier's spec."""
        return self.certifier

    @property
    def done(self) -> bool:
        """Says whether all images are."""
        return len(self.rows) == self.header.n

    @property
    def seconds(self) -> float:
        """Returns the wall time of the images that are done."""
        return math.fsum(row.seconds for row in self.rows)

    def radii(self) -> dict[int, float]:
        """Returns index -> radius of the images whose certified prediction is the label, for
        ``evaluate(certified=...)``. UserError where the certificates are not of the model that is attacked there."""
        if self.subject != "model":
            raise UserError(
                f"the certificates of {self.certifier} are of the {self.subject}: an attack on the model itself may "
                "leave none of its images out"
            )
        return {row.index: row.radius for row in self.rows if row.right}

    def images(self) -> list[tuple[int, int]]:
        return [(row.index, row.label) for row in self.rows]

    def answers(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield "the predictions of the rows", [row.prediction for row in self.rows]

    def problems(self) -> Iterator[str]:
        n = len(self.rows)
        yield from super().problems()
        if self.rows and max(row.label for row in self.rows) >= len(self.header.classes):
            yield f"the labels of the rows must be from 0 to {len(self.header.classes) - 1}"
        if n > self.header.n:
            yield f"it has {n} images, more than the {self.header.n} it is about"
        if len({row.index for row in self.rows}) < n:
            yield "an image has two rows"
