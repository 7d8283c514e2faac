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


@dataclass(frozen=True)
class ImagesLeft:
    """What several attacks left of the ``seen`` images: those that are right when ``clean``, and for each attack the
    ``broken`` ones among them.
    """

    seen: set[int]
    clean: set[int]
    broken: tuple[set[int], ...]

    @property
    def kept(self) -> set[int]:
        """Returns the images that are right under every attack."""
        return self.clean - set().union(*self.broken)


def worst_images(files: Sequence[tuple[Header, Sequence[Row]]]) -> ImagesLeft:
    """Returns which images several attacks left.

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
    seen = set.intersection(*(set(table) for table in whole or tables))
    clean = {i for i in seen if all(right(table[i]) for table in tables if i in table)}
    return ImagesLeft(seen, clean, tuple({i for i in clean & set(table) if not robust(table[i])} for table in tables))


def worst_case(files: Sequence[tuple[Header, Sequence[Row]]]) -> WorstCase:
    """Returns the per-image worst over several attacks, on the images of :func:`worst_images`."""
    images = worst_images(files)
    adds = []
    labels = names([header for header, _ in files])
    for position, name in enumerate(labels):
        others = set().union(*(part for at, part in enumerate(images.broken) if at != position))
        adds.append(Adds(name, len(images.broken[position]), len(images.broken[position] - others)))
    header = files[0][0]
    return WorstCase(
        norm=header.norm,
        eps=header.eps,
        clean=Rate(len(images.clean), len(images.seen)),
        robust=Rate(len(images.kept), len(images.seen)),
        adds=tuple(adds),
        partial=tuple(
            name for name, (_, rows) in zip(labels, files, strict=True) if not images.seen <= {r.index for r in rows}
        ),
    )
