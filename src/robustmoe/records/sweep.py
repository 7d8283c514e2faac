"""The file of a sweep in a run folder: what `robustmoe sweep` asked of a model at every eps, answer by answer."""

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

RANDOM, KEPT, WITHOUT, OTHER_K = "random", "random, weights kept", "without", "k"
OVERRIDES = (RANDOM, KEPT, WITHOUT, OTHER_K)
"""What was done to the routes of clean images: experts drawn at random, weighted by the layer's own rule or by the
route's own weights; one expert taken out; another number of experts an item."""


@dataclass(frozen=True)
class SweepAnswers:
    """What the exact model says of the images as one attack left them at one eps, an entry an image.

    ``attack``: its spec, at the radius that it was given with. ``eps``: in the header's norm, in pixels of [0, 1].
    ``predicted``: the class; -1 where a logit was not finite. ``loss``: cross-entropy, in nats. ``held``: the class on
    the clean image's route; ``swapped``: of the clean image on the attacked image's route; both [] for a dense model.
    ``size``: of the perturbation. ``moved``: router -> mean over items of 1 - IoU of the experts chosen before and
    after, without the items that go to no expert both times; ``moved_paper``: these counted as changed, as V-MoE's code
    does; ``idle``: their share."""

    attack: str
    eps: float
    predicted: list[int]
    loss: list[float]
    held: list[int]
    swapped: list[int]
    size: list[float]
    moved: dict[str, list[float]]
    moved_paper: dict[str, list[float]]
    idle: dict[str, list[float]]


@dataclass(frozen=True)
class Override:
    """The classes of the clean images with one rule in the place of the routers' own decisions: ``rule`` one of
    :data:`OVERRIDES`, ``router`` the only router it holds for ("": all), ``number`` the draw, the expert or the k."""

    rule: str
    router: str
    number: int
    predicted: list[int]


@dataclass(frozen=True)
class Sweep:
    """The questions asked of one model. ``header``: the model and the images; it names no attack.

    ``index``, ``labels``, ``predicted``, ``loss``: of each clean image. ``points``: by attack, then by eps; more may
    come, of other attacks and other radii. ``draws``: of random experts; 0: ``overrides`` were not asked for.
    ``left_out``: what of these makes no sense for this model, in sentences. ``seconds``: wall time. ``done``: all that
    the last command asked for is there."""

    header: Header
    index: list[int]
    labels: list[int]
    predicted: list[int]
    loss: list[float]
    draws: int
    overrides: list[Override]
    left_out: list[str]
    points: list[SweepAnswers]
    seconds: float
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        inner = {name: [dict(vars(one)) for one in getattr(self, name)] for name in ("overrides", "points")}
        return {"kind": "sweep", "version": VERSION, **vars(self), "header": self.header.to_dict(), **inner}

    @staticmethod
    def from_dict(data: Any) -> Sweep:
        """The inverse of :meth:`to_dict`; UserError says what is wrong."""
        if not isinstance(data, dict) or data.get("kind") != "sweep":
            raise UserError('not a sweep: expected {"kind": "sweep", ...}')
        if data.get("version") != VERSION:
            raise UserError(f"a sweep of version {data.get('version')!r}, this robustmoe reads version {VERSION}")
        data = {name: value for name, value in data.items() if name != "version"}
        found = build(Sweep, data, overrides=_list_of(Override), points=_list_of(SweepAnswers))
        for problem in _misfits(found):
            raise UserError(f"sweep: {problem}")
        return found


def sweep_path(run: str | os.PathLike[str]) -> Path:
    """``RUN/sweep.json``."""
    return Path(run) / "sweep.json"


def write_sweep(run: str | os.PathLike[str], sweep: Sweep) -> None:
    """Write the run's file, atomically."""
    write_atomic(sweep_path(run), json.dumps(sweep.to_dict(), separators=(",", ":")) + "\n")


def read_sweep(run: str | os.PathLike[str]) -> Sweep | None:
    """What the run's file holds; None without one. UserError if it is not such a file."""
    return read_json(sweep_path(run), Sweep.from_dict, f"delete it, and `robustmoe sweep {run}` makes it anew")


def _list_of(kind: type) -> Any:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise TypeError("a list")
        return [build(kind, one) for one in value]

    return read


def _misfits(found: Sweep) -> Iterator[str]:
    """What does not fit together, in words."""
    n, routers = found.header.n, found.header.routers
    columns: dict[str, tuple[list[Any], int]] = {
        name: (getattr(found, name), n) for name in ("index", "labels", "predicted", "loss")
    }
    for at, point in enumerate(found.points):
        if not point.eps > 0:
            yield f"points[{at}].eps must be above 0"
        columns |= {f"points[{at}].{name}": (getattr(point, name), n) for name in ("predicted", "loss", "size")}
        routed = n if routers else 0
        columns |= {f"points[{at}].{name}": (getattr(point, name), routed) for name in ("held", "swapped")}
        for field in ("moved", "moved_paper", "idle"):
            named = getattr(point, field)
            if set(named) != set(routers):
                yield f"points[{at}].{field} is of the routers {sorted(named)}, expected {sorted(routers)}"
            columns |= {f"points[{at}].{field}[{name!r}]": (column, n) for name, column in named.items()}
    for at, one in enumerate(found.overrides):
        if one.rule not in OVERRIDES:
            yield f"overrides[{at}].rule must be one of {OVERRIDES}, got {one.rule!r}"
        if one.router not in ("", *routers):
            yield f"overrides[{at}].router must be '' or one of {sorted(routers)}, got {one.router!r}"
        columns[f"overrides[{at}].predicted"] = (one.predicted, n)
    for name, (column, wanted) in columns.items():
        if len(column) != wanted:
            yield f"{name} has {len(column)} entries, expected {wanted}"
    if len({(point.attack, point.eps) for point in found.points}) < len(found.points):
        yield "two points are of the same attack and eps"
    if found.labels and not 0 <= min(found.labels) <= max(found.labels) < len(found.header.classes):
        yield f"field 'labels' must be from 0 to {len(found.header.classes) - 1}"
