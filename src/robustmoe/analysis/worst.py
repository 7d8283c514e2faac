"""Several attacks of one model, one set of images and one threat: an image survives only if it survives them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import names
from robustmoe.analysis.rates import Rate, right, robust
from robustmoe.errors import UserError
from robustmoe.records import Evaluation, Header, Row

SAME_IMAGES = ("model_hash", "data_hash", "split", "index_hash")
SAME_THREAT = (*SAME_IMAGES, "norm", "eps")


@dataclass(frozen=True)
class Adds:
    """What one attack gives to the worst case: the right images it breaks, and those that it alone breaks."""

    name: str
    broken: int
    alone: int


@dataclass(frozen=True)
class WorstCase:
    """The per-image worst over several attacks of one model, one set of images and one threat."""

    norm: str
    eps: float
    clean: Rate
    robust: Rate
    adds: tuple[Adds, ...]
    partial: tuple[str, ...]  # attacks that have not seen all of these images: the number can still fall


def groups(results: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Returns the attacked main files that may be put together (same model, images and threat), the largest group
    first: most images, then most attacks, then smallest eps."""
    members: dict[tuple[object, ...], list[Evaluation]] = {}
    for result in results:
        if result.header.attack is not None and result.header.role == "main" and result.rows:
            members.setdefault(tuple(getattr(result.header, name) for name in SAME_THREAT), []).append(result)
    size = {key: max(len(result.rows) for result in group) for key, group in members.items()}
    return [
        members[key]
        for key in sorted(members, key=lambda key: (-size[key], -len(members[key]), members[key][0].header.eps))
    ]


def worst_case(files: Sequence[tuple[Header, Sequence[Row]]]) -> WorstCase:
    """Returns the per-image worst over several attacks.

    Taken over the images that every finished file has (if none is finished, that every file has). An unfinished attack
    counts with the images that it has broken already. UserError if the files differ in model, images or threat."""
    if not files:
        raise UserError("worst case of no attack: give at least one rows file")
    first = files[0][0]
    for header, _ in files:
        for name in SAME_THREAT:
            if getattr(header, name) != getattr(first, name):
                raise UserError(
                    f"attacks cannot be put together: {name} is {getattr(first, name)!r} in one and "
                    f"{getattr(header, name)!r} in another"
                )
    tables = [{row.index: row for row in rows} for _, rows in files]
    whole = [table for (header, _), table in zip(files, tables, strict=True) if len(table) >= header.n]
    images = set.intersection(*(set(table) for table in whole or tables))
    clean = {i for i in images if all(right(table[i]) for table in tables if i in table)}
    broken = [{i for i in clean & set(table) if not robust(table[i])} for table in tables]
    every = set().union(*broken)
    adds = []
    labels = names([header for header, _ in files])
    for position, name in enumerate(labels):
        others = set().union(*(part for at, part in enumerate(broken) if at != position))
        adds.append(Adds(name, len(broken[position]), len(broken[position] - others)))
    return WorstCase(
        norm=first.norm,
        eps=first.eps,
        clean=Rate(len(clean), len(images)),
        robust=Rate(len(clean - every), len(images)),
        adds=tuple(adds),
        partial=tuple(name for name, table in zip(labels, tables, strict=True) if not images <= set(table)),
    )
