"""The file of a dissection in a run folder: what `robustmoe dissect` asked of a routed model, answer by answer."""

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

VERSION = 2
"""Version 1 had no attack "router"; such a file is read as one that is not done."""

CLEAN = "clean"
"""The name of the answers to untouched images."""

NEEDED = (CLEAN, "prediction", "frozen", "router", "steering", "margin", "flip")
"""What is asked of every model, and then each "expert k" alone; "residue" only where each router chooses one expert."""


@dataclass(frozen=True)
class Answers:
    """What the exact model says of the images as one attack left them, an entry an image.

    ``predicted``: the class, on the route that the model itself takes; -1 where a logit was not finite. ``held``: the
    class on the clean image's route; of the attack on expert k, with expert k forced at every router. ``swapped``: the
    class of the clean image on the attacked image's route. ``size``: of the perturbation, in the header's norm (pixels
    of [0, 1]). ``routes``: router -> how many items each expert got. ``moved``: router -> the share of items whose set
    of experts changed."""

    predicted: list[int]
    held: list[int]
    swapped: list[int]
    size: list[float]
    routes: dict[str, list[list[int]]]
    moved: dict[str, list[float]]


@dataclass(frozen=True)
class Dissection:
    """The questions asked of one model. ``header``: the model, the images and the attack that the others are made from.

    ``index``, ``labels``: of each image. ``forced``: expert -> the class of each clean image with that expert forced at
    every router. ``narrow``, ``wide``: router -> the smallest and the largest gap over an image's items, where a gap is
    the weakest chosen logit minus the best one that is not chosen (best minus second for top-1); a router that always
    chooses all its experts is left out. ``entropy``: router -> that of softmax(logits), mean over items, in nats.
    ``under``: attack -> its answers, "clean" first. ``seconds``: wall time. The file is whole once ``done``."""

    header: Header
    index: list[int]
    labels: list[int]
    forced: list[list[int]]
    narrow: dict[str, list[float]]
    wide: dict[str, list[float]]
    entropy: dict[str, list[float]]
    under: dict[str, Answers]
    seconds: float
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        under = {name: dict(vars(answers)) for name, answers in self.under.items()}
        return {
            "kind": "dissection", "version": VERSION, **vars(self), "header": self.header.to_dict(), "under": under,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Any) -> Dissection:
        """The inverse of :meth:`to_dict`; UserError says what is wrong."""
        if not isinstance(data, dict) or data.get("kind") != "dissection":
            raise UserError('not a dissection: expected {"kind": "dissection", ...}')
        version = data.get("version")
        if version not in (1, VERSION):
            raise UserError(f"a dissection of version {version!r}, this robustmoe reads versions 1 and {VERSION}")
        data = {name: value for name, value in data.items() if name != "version"}
        data = {**data, "done": False} if version == 1 else data
        found = build(Dissection, data, under=_under)
        for problem in _misfits(found):
            raise UserError(f"dissection: {problem}")
        return found


def dissection_path(run: str | os.PathLike[str]) -> Path:
    """``RUN/dissection.json``."""
    return Path(run) / "dissection.json"


def write_dissection(run: str | os.PathLike[str], dissection: Dissection) -> None:
    """Write the run's file, atomically."""
    write_atomic(dissection_path(run), json.dumps(dissection.to_dict(), separators=(",", ":")) + "\n")


def read_dissection(run: str | os.PathLike[str]) -> Dissection | None:
    """What the run's file holds; None without one. UserError if it is not such a file."""
    return read_json(
        dissection_path(run), Dissection.from_dict, f"delete it, and `robustmoe dissect {run}` makes it anew"
    )


def _under(value: Any) -> dict[str, Answers]:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return {name: build(Answers, answers) for name, answers in value.items()}


def _misfits(found: Dissection) -> Iterator[str]:
    """What does not fit together, in words."""
    n, routers, classes = found.header.n, found.header.routers, len(found.header.classes)
    if not routers:
        yield "the model has no router"
    if next(iter(found.under), None) != CLEAN:
        yield f"field 'under' must begin with {CLEAN!r}"
    experts = min((info.experts for info in routers.values()), default=0)
    if len(found.forced) != experts:
        yield f"field 'forced' is of {len(found.forced)} experts, expected {experts}"
    missing = [name for name in (*NEEDED, *(f"expert {k}" for k in range(experts))) if name not in found.under]
    if found.done and missing:
        yield f"it is done, but there are no answers under {missing[0]!r}"
    columns: dict[str, list[Any]] = {"index": found.index, "labels": found.labels}
    columns |= {f"forced[{expert}]": column for expert, column in enumerate(found.forced)}
    for field in ("narrow", "wide", "entropy"):
        columns |= {f"{field}[{name!r}]": column for name, column in getattr(found, field).items()}
    for attack, answers in found.under.items():
        for field in ("predicted", "held", "swapped", "size"):
            columns[f"under[{attack!r}].{field}"] = getattr(answers, field)
        for field in ("routes", "moved"):
            named = getattr(answers, field)
            if set(named) != set(routers):
                yield f"under[{attack!r}].{field} is of the routers {sorted(named)}, expected {sorted(routers)}"
            columns |= {f"under[{attack!r}].{field}[{name!r}]": column for name, column in named.items()}
        for name, rows in answers.routes.items():
            if name in routers and any(len(row) != routers[name].experts for row in rows):
                yield f"under[{attack!r}].routes[{name!r}] must have {routers[name].experts} numbers an image"
    for name, column in columns.items():
        if len(column) != n:
            yield f"{name} has {len(column)} entries, expected {n}, one an image"
    if found.labels and not 0 <= min(found.labels) <= max(found.labels) < classes:
        yield f"field 'labels' must be from 0 to {classes - 1}"
