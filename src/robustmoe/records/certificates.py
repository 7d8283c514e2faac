"""The files of `robustmoe certify` in a run folder: what a certifier proves, one row an image.

JSON lines in ``RUN/certificates``, one file a certifier: a first line of what was certified, then a line an image. The
whole file is written anew after each batch, at once or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.files import dump_line, parse_line, whole_lines, write_atomic
from robustmoe.records.types import Header, build

VERSION = 1
SUBJECTS = ("model", "smoothed model")


@dataclass(frozen=True)
class Proof:
    """One image: its index in the data set, its label, and what is proven of it. No image within ``radius`` of it (in
    the header's norm, pixels of [0, 1]) has another prediction than ``prediction`` (-1: the certifier abstains).

    ``rule``: what proves it, "" at radius 0; ``reachable``: experts that can be used somewhere within the header's eps,
    ``held``: those of them that are proven on their own; ``stable``: whether the route is the same everywhere there (1
    or 0; under noise the share of copies on the clean route); None where the certifier does not know. ``reason``: why
    eps is not certified. ``seconds``: its share of its batch's wall time."""

    index: int
    label: int
    prediction: int
    radius: float
    rule: str
    reachable: int | None
    held: int | None
    stable: float | None
    reason: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the certified prediction is the label."""
        return self.prediction == self.label

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of one line."""
        return {"kind": "certificate", **vars(self)}


@dataclass(frozen=True)
class Certificates:
    """What one certifier proves of one model. ``header``: the model, the images, the certifier's norm, eps and seed
    (its attack is None). ``certifier``: its spec. ``subject``: what the certificates are of, one of `SUBJECTS`.
    ``rows``: of the images done so far."""

    header: Header
    certifier: str
    subject: str
    rows: list[Proof]

    @property
    def done(self) -> bool:
        """Whether all images are."""
        return len(self.rows) == self.header.n

    @property
    def seconds(self) -> float:
        """Wall time of the images that are done."""
        return math.fsum(row.seconds for row in self.rows)

    def radii(self) -> dict[int, float]:
        """Index -> radius of the images whose certified prediction is the label, for ``evaluate(certified=...)``.
        UserError where the certificates are not of the model that is attacked there."""
        if self.subject != "model":
            raise UserError(
                f"the certificates of {self.certifier} are of the {self.subject}: an attack on the model itself may "
                "leave none of its images out"
            )
        return {row.index: row.radius for row in self.rows if row.right}

    def to_lines(self) -> bytes:
        """The whole file."""
        first = {"kind": "certificates", "version": VERSION, "certifier": self.certifier, "subject": self.subject}
        lines = [first | {"header": self.header.to_dict()}, *(row.to_dict() for row in self.rows)]
        return b"".join(map(dump_line, lines))


def certificates_path(run: str | os.PathLike[str], name: str) -> Path:
    """``RUN/certificates/<name>.jsonl``."""
    return Path(run) / "certificates" / f"{name}.jsonl"


def write_certificates(path: str | os.PathLike[str], found: Certificates) -> None:
    """Write a file, atomically."""
    write_atomic(path, found.to_lines())


def read_certificates(path: str | os.PathLike[str]) -> Certificates | None:
    """What a file holds, without a half-written last line; None without one. UserError if it is not such a file."""
    path = Path(path)
    if not path.exists():
        return None
    lines = whole_lines(path)
    remedy = "delete it, and `robustmoe certify RUN` makes it anew"
    if not lines:
        raise UserError(f"{path} is empty; {remedy}")
    found: Certificates | None = None
    for number, line in enumerate(lines, 1):
        data = parse_line(line, path, number)
        try:
            if found is None:
                found = _first(data)
            else:
                found.rows.append(_row(data))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; {remedy}") from None
    assert found is not None
    for problem in _misfits(found):
        raise UserError(f"{path}: {problem}; {remedy}")
    return found


def read_all_certificates(run: str | os.PathLike[str]) -> list[Certificates]:
    """Every certifier's file of a run folder, by name."""
    found = (read_certificates(path) for path in sorted((Path(run) / "certificates").glob("*.jsonl")))
    return [one for one in found if one is not None]


def _first(data: dict[str, Any]) -> Certificates:
    if data.get("kind") != "certificates":
        raise UserError('not a file of certificates: its first line must be {"kind":"certificates",...}')
    if data.get("version") != VERSION:
        raise UserError(f"certificates of version {data.get('version')!r}, this robustmoe reads version {VERSION}")
    about = {name: value for name, value in data.items() if name != "version"}
    found = build(Certificates, about | {"rows": []}, rows=lambda rows: rows)
    if found.subject not in SUBJECTS:
        raise UserError(f"field 'subject' must be one of {', '.join(SUBJECTS)}, got {found.subject!r}")
    return found


def _row(data: dict[str, Any]) -> Proof:
    if data.get("kind") != "certificate":
        raise UserError(f"unknown kind {data.get('kind')!r}; expected certificate")
    row = build(Proof, data)
    if not row.radius >= 0:
        raise UserError(f"field 'radius' must be 0 or more, got {row.radius}")
    return row


def _misfits(found: Certificates) -> Iterator[str]:
    """What does not fit together, in words."""
    n, indices = len(found.rows), {row.index for row in found.rows}
    if n > found.header.n:
        yield f"it has {n} images, more than the {found.header.n} it is about"
    if len(indices) < n:
        yield "an image has two rows"
