"""The images that evaluations kept to look at: those of one attack, as it left them at each radius of its curve."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustmoe import analysis
from robustmoe.records import Evaluation, Example, Header, Row, examples_path, read_examples
from robustmoe.records.types import LARGER, SMALLER

Files = Sequence[tuple[Path, Evaluation]]


@dataclass(frozen=True)
class AtRadius:
    """One image as attacked, and the ``eps`` that it was attacked with."""

    example: Example
    eps: float


@dataclass(frozen=True)
class Kept:
    """Images of one attack. ``header``: of the attack at its own radius; ``examples``: as it left them there. ``at``:
    eps, rising -> index -> the image at that radius. An image that a smaller radius broke was not attacked again: it
    stands there as the smaller one left it."""

    header: Header
    examples: list[Example]
    at: dict[float, dict[int, AtRadius]]


def kept(files: Files, first: Iterable[Evaluation]) -> Kept | None:
    """Returns the images of the first of these evaluations that kept some, else of any file; None where none did."""
    ranked = [pair for result in first for pair in files if pair[1] is result]
    for path, result in [*ranked, *files]:
        if examples := _read(path, result.header):
            own = {example.index: AtRadius(example, result.header.eps) for example in examples}
            return Kept(result.header, examples, _at(files, result.header, own))
    return None


def _read(path: Path, header: Header) -> list[Example]:
    beside = examples_path(path)
    return read_examples(beside, header) if os.path.lexists(beside) else []


def _family(header: Header) -> tuple[object, ...]:
    return analysis.family(header), header.norm, header.model_hash, header.data, header.split


def _at(files: Files, header: Header, own: dict[int, AtRadius]) -> dict[float, dict[int, AtRadius]]:
    """Returns the images of the attack at each radius that it was run at."""
    curve = {
        result.header.eps: (path, result)
        for path, result in files
        if header.attack is not None and result.header.role == "curve" and _family(result.header) == _family(header)
    }
    curve.pop(header.eps, None)
    at = {header.eps: own}
    for eps, (path, result) in curve.items():
        at[eps] = {each.index: AtRadius(each, eps) for each in _read(path, result.header) if each.index in own}
    direct = {eps: dict(images) for eps, images in at.items()}
    for eps, (_, result) in curve.items():
        for row in result.rows:
            if row.index in own and row.index not in direct[eps]:
                for other in _made_at(row, eps, direct):
                    if row.index in direct[other] and direct[other][row.index].example.adversarial == row.adversarial:
                        at[eps].setdefault(row.index, direct[other][row.index])
    return {eps: at[eps] for eps in sorted(at) if at[eps]}


def _made_at(row: Row, eps: float, radii: Iterable[float]) -> list[float]:
    """Returns the other radii whose attack may have made the image that stands at this one, likeliest first: see
    `robustmoe.evaluation.curve`."""
    if row.part == SMALLER:
        return sorted(other for other in radii if other < eps)
    between = sorted((other for other in radii if other > eps), reverse=True)
    return between if row.part == LARGER and any(row.size.values()) else []
