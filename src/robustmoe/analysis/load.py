"""Which expert gets the items of which class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.errors import UserError
from robustmoe.records import Header, Row


@dataclass(frozen=True)
class Load:
    """Shares of the items of each class (by true label) that each expert of one router gets; rows are classes, in
    the header's order, and a class without images is a row of zeros. ``dead``: experts that get nothing on clean
    images; ``images``: how many images each class has."""

    router: str
    classes: tuple[str, ...]
    images: tuple[int, ...]
    clean: tuple[tuple[float, ...], ...]
    adversarial: tuple[tuple[float, ...], ...]
    total_clean: tuple[float, ...]
    total_adversarial: tuple[float, ...]
    dead: tuple[int, ...]


def load_by_class(header: Header, rows: Sequence[Row], router: str) -> Load:
    """Returns who gets the items of each class, on clean and on attacked images. UserError if there is no such
    router."""
    if router not in header.routers:
        raise UserError(
            f"no router {router!r}; known: {', '.join(sorted(header.routers)) or 'none, the model is dense'}"
        )
    experts = header.routers[router].experts
    total = max(len(header.classes), 1 + max((row.label for row in rows), default=-1))
    classes = tuple(header.classes) + tuple(str(label) for label in range(len(header.classes), total))
    clean = [[0] * experts for _ in range(total)]
    adversarial = [[0] * experts for _ in range(total)]
    images = [0] * total
    for row in rows:
        images[row.label] += 1
        for table, route in ((clean, row.route_clean), (adversarial, row.route_adversarial)):
            for expert, items in enumerate(route.get(router, [])[:experts]):
                table[row.label][expert] += items
    total_clean = _shares([sum(column) for column in zip(*clean)])
    return Load(
        router=router,
        classes=classes,
        images=tuple(images),
        clean=tuple(_shares(counts) for counts in clean),
        adversarial=tuple(_shares(counts) for counts in adversarial),
        total_clean=total_clean,
        total_adversarial=_shares([sum(column) for column in zip(*adversarial)]),
        dead=tuple(expert for expert, share in enumerate(total_clean) if share == 0),
    )


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    whole = sum(counts)
    return tuple(count / whole if whole else 0.0 for count in counts)
