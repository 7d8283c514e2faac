"""What the blends of a standard and a robust model answer, alpha by alpha: ``blend.json`` in a run folder."""

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


@dataclass(frozen=True)
class Blend:
    """One curve over alpha. ``header``: the model, the images and the base attack. ``standard``, ``robust``: where the
    halves came from (run folders, or class names). ``mix``, ``sharpen``: as in `models.dual` (specs; "" for none).

    ``alphas``: rising, from 0 (standard) to 1 (robust). ``index``, ``labels``: of each image. ``predicted``: alpha ->
    the class of each clean image; -1 where a logit was not finite. ``broken``: alpha -> for each image, the attack that
    broke it first, by its place in ``attacks``; -1 where none did; an image that is wrong when clean is no attack's:
    it stands as -2. ``attacks``: names of what was tried, in order. ``certified``: alpha -> whether the image is
    proven right in the whole ball; [] where no certificate was given. ``validation``: alpha -> clean accuracy on the
    validation images, by which alpha is chosen; [] without. ``wanted``: the clean accuracy asked for; ``chosen``: the
    alpha picked, the largest that has it. ``done``: how many alphas are attacked, from the last (1) to the first.
    ``seconds``: wall time.
    """

    header: Header
    standard: str
    robust: str
    mix: str
    sharpen: str
    alphas: list[float]
    index: list[int]
    labels: list[int]
    predicted: list[list[int]]
    attacks: list[str]
    broken: list[list[int]]
    certified: list[list[bool]]
    validation: list[float]
    wanted: float | None
    chosen: float | None
    done: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        return {"kind": "blend", "version": VERSION, **vars(self), "header": self.header.to_dict()}

    @staticmethod
    def from_dict(data: Any) -> Blend:
        """The inverse of :meth:`to_dict`; UserError says what is wrong."""
        if not isinstance(data, dict) or data.get("kind") != "blend":
            raise UserError('not a blend: expected {"kind": "blend", ...}')
        if data.get("version") != VERSION:
            raise UserError(f"a blend of version {data.get('version')!r}, this robustmoe reads version {VERSION}")
        data = {name: value for name, value in data.items() if name != "version"}
        found = build(Blend, data)
        for problem in _misfits(found):
            raise UserError(f"blend: {problem}")
        return found


def blend_path(run: str | os.PathLike[str]) -> Path:
    """``RUN/blend.json``."""
    return Path(run) / "blend.json"


def write_blend(run: str | os.PathLike[str], blend: Blend) -> None:
    """Write the run's file, atomically."""
    write_atomic(blend_path(run), json.dumps(blend.to_dict(), separators=(",", ":")) + "\n")


def read_blend(run: str | os.PathLike[str]) -> Blend | None:
    """What the run's file holds; None without one. UserError if it is not such a file."""
    return read_json(blend_path(run), Blend.from_dict, "delete it, and robustmoe blend makes it anew")


def _misfits(found: Blend) -> Iterator[str]:
    """What does not fit together, in words."""
    n, count = len(found.index), len(found.alphas)
    if not found.alphas:
        yield "there is no alpha"
    if sorted(set(found.alphas)) != found.alphas or not all(0 <= alpha <= 1 for alpha in found.alphas):
        yield "alphas must rise, from 0 to 1"
    if len(found.labels) != n:
        yield f"{len(found.labels)} labels for {n} images"
    for name in ("predicted", "broken", "certified"):
        table = getattr(found, name)
        if (table or name != "certified") and [len(row) for row in table] != [n] * count:
            yield f"{name} must have {count} lists (one an alpha) of {n} (one an image)"
    if len(found.validation) not in (0, count):
        yield f"validation has {len(found.validation)} numbers for {count} alphas"
    if not 0 <= found.done <= count:
        yield f"done is {found.done}, of {count} alphas"
    if any(not -2 <= attack < len(found.attacks) for row in found.broken for attack in row):
        yield "broken names attacks that are not in the list"
