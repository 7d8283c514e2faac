"""Accuracy against eps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import attack_name
from robustmoe.analysis.rates import Rate, right, robust
from robustmoe.records import Header, Row

MONOTONE_TOLERANCE = 0.005  # accuracy may rise by half a point between neighbouring eps before we say so


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps on the same ``n`` images, eps rising from 0 (clean)."""

    name: str
    norm: str
    n: int
    points: tuple[tuple[float, Rate], ...]
    warnings: tuple[str, ...]


def family(header: Header) -> str:
    """Returns the attack's spec with its eps replaced and its step size (which goes with eps) left out, so that the
    files of one curve have one name."""
    name = re.sub(r"\b(linf|l2|l1)\([^()]*\)", r"\1(eps)", attack_name(header))
    return re.sub(r", step_size=[^,()]*", "", name)


def eps_curve(files: Sequence[tuple[Header, Sequence[Row]]]) -> list[Curve]:
    """Returns accuracy against eps, one curve an attack family; files of one eps only give none.

    All points are taken on the images that every finished file of the family has (an unfinished one joins if it has
    them too), and eps = 0 is the clean accuracy on them. Two files of one eps count with the worse outcome for each
    image. Files join by data set and split, not by the hash of their images: a curve is measured on the first of
    them."""
    families: dict[tuple[object, ...], list[tuple[Header, Sequence[Row]]]] = {}
    for header, rows in files:
        if header.attack is not None and rows:
            key = (family(header), header.norm, header.model_hash, header.data, header.split)
            families.setdefault(key, []).append((header, rows))
    curves = [_curve(str(key[0]), members) for key, members in families.items()]
    return [curve for curve in curves if curve is not None]


def _curve(name: str, members: list[tuple[Header, Sequence[Row]]]) -> Curve | None:
    if len({header.eps for header, _ in members}) < 2:
        return None
    whole = [(header, rows) for header, rows in members if len(rows) >= header.n]
    if len({header.eps for header, _ in whole}) < 2:
        whole = members
    images = set.intersection(*({row.index for row in rows} for _, rows in whole))
    members = [(header, rows) for header, rows in members if images <= {row.index for row in rows}]
    if not images:
        return None
    clean = {row.index for row in members[0][1] if row.index in images and right(row)}
    survivors: dict[float, set[int]] = {0.0: clean}
    for header, rows in members:
        kept = {row.index for row in rows if row.index in images and robust(row)}
        survivors[header.eps] = survivors.get(header.eps, kept) & kept
    points = tuple((eps, Rate(len(survivors[eps]), len(images))) for eps in sorted(survivors))
    warnings = tuple(
        f"accuracy rises from {100 * low.value:.1f}% at eps {a:.4g} to {100 * high.value:.1f}% at eps {b:.4g}: "
        "the attack is too weak at the larger eps"
        for (a, low), (b, high) in itertools.pairwise(points)
        if high.value > low.value + MONOTONE_TOLERANCE
    )
    return Curve(name, members[0][0].norm, len(images), points, warnings)
