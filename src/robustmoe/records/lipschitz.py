"""The file of the Lipschitz laboratory in a run folder: what `robustmoe lipschitz` measured, image by image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.files import read_json, write_atomic
from robustmoe.records.types import Header, build

VERSION = 1

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""The radii, in eps, within which boundaries are counted."""

KINDS = ("exact", "lower bound", "upper bound", "first order", "estimate")


@dataclass(frozen=True)
class Lipschitz:
    """What was measured of one model. ``header``: the model, the images, and the attack under which changes are split;
    its norm and eps are those of every radius.

    An entry an image, for the images done so far: ``index``, ``labels``; ``model``: quantity -> its value; ``layers``:
    router -> quantity -> its value (of tokens: "max" and "min" are in the quantity's name, the others are means);
    ``load``: router -> items that each expert got; ``boundary``: router -> share of the items whose pixel radius is at
    most each of `MULTIPLES` times eps.

    ``bounds``: router -> an upper bound on each expert's slope at the layer's input. ``kinds``: quantity -> one of
    `KINDS`. ``absent``: router -> what of it was not measured, and why; ``notes``: router -> how the rest was.
    ``seconds``: wall time."""

    header: Header
    index: list[int]
    labels: list[int]
    model: dict[str, list[float]]
    layers: dict[str, dict[str, list[float]]]
    load: dict[str, list[list[int]]]
    boundary: dict[str, list[list[float]]]
    bounds: dict[str, list[float]]
    kinds: dict[str, str]
    absent: dict[str, dict[str, str]]
    notes: dict[str, str]
    seconds: float

    @property
    def done(self) -> bool:
        """Whether all images are."""
        return len(self.index) == self.header.n

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        return {"kind": "lipschitz", "version": VERSION, **vars(self), "header": self.header.to_dict()}

    @staticmethod
    def from_dict(data: Any) -> Lipschitz:
        """The inverse of :meth:`to_dict`; UserError says what is wrong."""
        if not isinstance(data, dict) or data.get("kind") != "lipschitz":
            raise UserError('not a file of the Lipschitz laboratory: expected {"kind": "lipschitz", ...}')
        version = data.get("version")
        if version != VERSION:
            raise UserError(f"a Lipschitz file of version {version!r}, this robustmoe reads version {VERSION}")
        data = {name: value for name, value in data.items() if name != "version"}
        found = build(Lipschitz, data)
        for problem in _misfits(found):
            raise UserError(f"lipschitz: {problem}")
        return found


def lipschitz_path(run: str | os.PathLike[str]) -> Path:
    """``RUN/lipschitz.json``."""
    return Path(run) / "lipschitz.json"


def write_lipschitz(run: str | os.PathLike[str], found: Lipschitz) -> None:
    """Write the run's file, atomically."""
    write_atomic(lipschitz_path(run), json.dumps(found.to_dict(), separators=(",", ":")) + "\n")


def read_lipschitz(run: str | os.PathLike[str]) -> Lipschitz | None:
    """What the run's file holds; None without one. UserError if it is not such a file."""
    return read_json(
        lipschitz_path(run), Lipschitz.from_dict, f"delete it, and `robustmoe lipschitz {run}` makes it anew"
    )


def _misfits(found: Lipschitz) -> Iterator[str]:
    """What does not fit together, in words."""
    n, routers = len(found.index), found.header.routers
    if n > found.header.n:
        yield f"it has {n} images, more than the {found.header.n} it is about"
    for field in ("layers", "load"):
        named = getattr(found, field)
        if set(named) != set(routers):
            yield f"field {field!r} is of the routers {sorted(named)}, expected {sorted(routers)}"
    for name, kind in found.kinds.items():
        if kind not in KINDS:
            yield f"kinds[{name!r}] must be one of {', '.join(KINDS)}, got {kind!r}"
    columns: dict[str, list[Any]] = {"labels": found.labels}
    columns |= {f"model[{key!r}]": column for key, column in found.model.items()}
    columns |= {f"layers[{r!r}][{k!r}]": column for r, layer in found.layers.items() for k, column in layer.items()}
    for field in ("load", "boundary"):
        columns |= {f"{field}[{name!r}]": column for name, column in getattr(found, field).items()}
    for name, column in columns.items():
        if len(column) != n:
            yield f"{name} has {len(column)} entries, expected {n}, one an image"
    for name, rows in found.load.items():
        if name in routers and any(len(row) != routers[name].experts for row in rows):
            yield f"load[{name!r}] must have {routers[name].experts} numbers an image"
    if any(len(row) != len(MULTIPLES) for rows in found.boundary.values() for row in rows):
        yield f"field 'boundary' must have {len(MULTIPLES)} numbers an image"
