"""The file of the Lipschitz laboratory in a run folder: what `robustmoe lipschitz` measured, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from robustmoe.records.record import Column, Record, by_router, other_routers, per_expert, strange_routers
from robustmoe.records.typed import Count, Length, Share, one_of
from robustmoe.records.types import Header

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""The radii, in eps, within which boundaries are counted."""

NEEDED = (
    "margin radius", "jacobian", "fall", "fall by experts", "fall by routes", "right, clean", "right, attacked",
    "right, routing fixed", "right, routing transplanted",
)  # fmt: skip
"""What is measured of every model."""

KINDS = ("exact", "lower bound", "upper bound", "first order", "estimate")


@dataclass(frozen=True)
class Lipschitz(Record, kind="lipschitz", file="lipschitz.json", version=2, verb="lipschitz"):
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
    index: list[Count]
    labels: list[Count]
    model: dict[str, list[float]]
    layers: dict[str, dict[str, list[float]]]
    load: dict[str, list[list[Count]]]
    boundary: dict[str, list[list[Share]]]
    bounds: dict[str, list[float]]
    kinds: dict[str, Annotated[str, one_of(KINDS)]]
    absent: dict[str, dict[str, str]]
    notes: dict[str, str]
    seconds: Length

    @property
    def done(self) -> bool:
        """Says whether all images are."""
        return len(self.index) == self.header.n

    def columns(self) -> Iterator[Column]:
        n = len(self.index)
        yield "labels", self.labels, n
        for quantity, column in self.model.items():
            yield f"model[{quantity!r}]", column, n
        for router, layer in self.layers.items():
            yield from by_router(f"layers[{router!r}]", layer, n)
        for name in ("load", "boundary"):
            yield from by_router(name, getattr(self, name), n)

    def problems(self) -> Iterator[str]:
        n = len(self.index)
        if n > self.header.n:
            yield f"it has {n} images, more than the {self.header.n} it is about"
        for name in ("layers", "load"):
            yield from other_routers(f"field {name!r}", getattr(self, name), self.header)
        for name in ("absent", "notes") if n else ():
            yield from other_routers(f"field {name!r}", getattr(self, name), self.header)
        for name in ("boundary", "bounds"):
            yield from strange_routers(f"field {name!r}", getattr(self, name), self.header)
        for quantity in NEEDED if n else ():
            if quantity not in self.model:
                yield f"field 'model' has no {quantity!r}"
        yield from super().problems()
        yield from per_expert("load", self.load, self.header)
        if any(len(row) != len(MULTIPLES) for rows in self.boundary.values() for row in rows):
            yield f"field 'boundary' must have {len(MULTIPLES)} numbers an image"
