"""What a rows file holds: header, row, checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from robustmoe.errors import UserError
from robustmoe.records.typed import (
    Answer,
    Count,
    Experts,
    Length,
    Share,
    Value,
    Whole,
    build,
    check_version,
    encode,
    one_of,
)

VERSION: Final = 3
"""Of a rows file."""

PRECISIONS = ("strict", "fast", "fp32")
NORMS = ("linf", "l2", "l1")
ROLES = ("main", "curve")
STATUSES = ("pass", "not run", "warn", "fail")  # best first
CLEAN, CERTIFIED = "clean", "certified"
"""Parts of a row that are no attack: wrong from the start; covered by a certificate."""
SMALLER, LARGER = "smaller eps", "larger eps"
"""Parts of a row of a curve that comes from the attack at another radius."""
SIZES = (*NORMS, "box")
"""What is measured of a perturbation: in each norm, and how far the attacked image leaves [0, 1]."""


@dataclass(frozen=True)
class RouterInfo:
    """One router: ``experts`` to choose from, ``k`` chosen an item, ``items`` an image (1, or tokens)."""

    experts: Experts
    k: Count
    items: Count


@dataclass(frozen=True)
class ObjectiveInfo:
    """What an attack maximises: the ``name`` of its kind, whether moving the routing or the experts' outputs can raise
    it, and whether it is only for models with a router. Each objective declares this about itself."""

    name: str
    aims_at_router: bool
    aims_at_experts: bool
    needs_router: bool

    @staticmethod
    def of(objective: Any) -> ObjectiveInfo:
        """Returns what an objective (`robustmoe.attacks.Objective`) declares about itself."""
        return ObjectiveInfo(**{fact.name: getattr(objective, fact.name) for fact in fields(ObjectiveInfo)})

    @property
    def aims_at_all(self) -> bool:
        """Says whether router and experts are attacked together, so that the attack's name says enough."""
        return self.aims_at_router and self.aims_at_experts


@dataclass(frozen=True)
class Resumed:
    """Other versions, or another commit, that took work up at a time (``started``, ISO 8601), when ``done`` of its
    images, points, attacks or steps were done."""

    versions: dict[str, str]
    commit: str | None
    started: str
    done: Count


@dataclass(frozen=True)
class Header:
    """What was evaluated, against what, where and how. ``eps`` is in pixels of [0, 1]; ``n`` is the number of images
    planned; ``started`` is ISO 8601; ``attack`` is None for a clean evaluation, ``routers`` is {} for a dense model.

    ``precision`` is what the attack climbed: a frozen copy in float32 ("strict") or in half precision ("fast"), or the
    model itself ("fp32"). ``parts`` are the names of a suite's attacks, in order; [] for a simple attack.
    ``certified_hash`` is of the images that were not attacked because a certificate covers them; "" without any.
    ``files``: the SHA-256 of each file of a user's own that a part comes from, by its path as it is written.
    ``resumed``: who went on with it later, where that was not under these ``versions`` and this ``commit``. ``shard``:
    "2/3" where only the second of three shares of the images was asked for, "3 shards" where three were merged."""

    run: str
    model: str
    data: str
    split: str
    attack: str | None
    objective: ObjectiveInfo | None
    norm: Annotated[str, one_of(NORMS)]
    eps: Annotated[float, Meta(ge=0)]
    role: Annotated[str, one_of(ROLES)]
    method: str | None
    n: Count
    seed: Whole
    data_hash: str
    index_hash: str
    model_hash: str
    versions: dict[str, str]
    commit: str | None
    device: str
    threads: Count
    precision: Annotated[str, one_of(PRECISIONS)]
    command: str
    classes: Annotated[list[str], Meta(min_length=1)]
    routers: dict[str, RouterInfo]
    parameters: Count
    started: str
    batch_size: Count = 0
    parts: list[str] = field(default_factory=list)
    certified_hash: str = ""
    files: dict[str, str] = field(default_factory=dict)
    resumed: list[Resumed] = field(default_factory=list)
    shard: Annotated[str, Meta(pattern="^([1-9][0-9]{0,5}(/[1-9][0-9]{0,5}| shards))?$")] = ""
    kind: Literal["header"] = field(default="header", kw_only=True)
    version: Literal[3] = field(default=VERSION, kw_only=True)

    @property
    def bound_to_batches(self) -> bool:
        """Says whether the rows depend on which images stand in one batch: a suite (each part cuts the survivors anew),
        and an attack that draws its random numbers by the batch."""
        return bool(self.parts) or re.search(r"rng=['\"]?autoattack", self.attack or "") is not None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the file's first line."""
        return dict(encode(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Header:
        """Returns the inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        if data.get("kind") != "header":
            raise UserError('not a rows file: its first line must be {"kind":"header",...}')
        check_version("rows file", data, VERSION, "evaluate again")
        return build(Header, data)

    def problems(self) -> Iterator[str]:
        """Yields an attack without an objective."""
        if self.attack is not None and self.objective is None:
            yield "an attack has an objective, field 'objective' must be an object, got None"


@dataclass(frozen=True)
class Row:
    """One image: its index in the data set, its label, the exact model's predictions on the clean and the attacked
    image, the perturbation's :data:`SIZES` (pixels of [0, 1]), the share of its items that changed expert, and how
    many items each expert got. ``router_exposed``: the attacked route on the clean image; ``experts_exposed``: the
    clean route on the attacked image; both None for a dense model.

    ``part``: which part of a suite broke the image; "clean": wrong without an attack, so a suite did not attack it;
    "certified": covered by a certificate, so not attacked; "smaller eps": of a curve, broken by the same attack at a
    smaller eps already; "larger eps": of a curve, cut out of the same attack's search for the nearest broken image at a
    larger one; "": a simple attack, or an image that no part broke (then the attacked image is the clean one)."""

    index: Count
    label: Count
    clean: Answer
    adversarial: Answer
    size: dict[str, float]
    rerouted: dict[str, Share]
    router_exposed: Answer | None
    experts_exposed: Answer | None
    route_clean: dict[str, list[Count]]
    route_adversarial: dict[str, list[Count]]
    part: str = ""
    kind: Literal["row"] = field(default="row", kw_only=True)

    def problems(self) -> Iterator[str]:
        """Yields a size below 0; one that is not finite is an attack's own fault, which check H2 tells."""
        if any(size < 0 for size in self.size.values()):
            yield f"field 'size' must be of numbers of at least 0, got {self.size}"


@dataclass(frozen=True)
class Check:
    """One answer to "can this number be believed?": ``status`` is pass, warn, fail or not run."""

    id: str
    name: str
    status: Annotated[str, one_of(STATUSES)]
    value: Value
    sentence: str


@dataclass(frozen=True)
class Checks:
    """The last line of a finished file: the checks, the wall time of the evaluation in seconds, and the forward passes
    that the attack asked for, summed over images (``queries``; a gradient counts as 3, 0: not counted)."""

    checks: list[Check]
    seconds: Length
    queries: Count = 0
    kind: Literal["checks"] = field(default="checks", kw_only=True)


@dataclass(frozen=True)
class Time:
    """The line that ends a batch: the seconds and the queries it took (their sums survive a kill). A batch without it
    is not whole, and is done again."""

    seconds: Length
    queries: Count = 0
    kind: Literal["time"] = field(default="time", kw_only=True)


@dataclass(frozen=True)
class Passed:
    """An image that a part of a suite, not the last, did not break: it is still to be attacked."""

    index: Count
    part: str
    kind: Literal["part"] = field(default="part", kw_only=True)


def miscounts(name: str, counts: list[int], router: RouterInfo | None) -> Iterator[str]:
    """Yields why ``counts``, of the items of one image that each expert got, cannot come from the router: an expert
    gets an item once at most, and an item goes to k experts at most (fewer where they are full)."""
    if router is None:  # that is told elsewhere
        return
    if len(counts) != router.experts:
        yield f"{name} must have {router.experts} numbers, got {len(counts)}"
    elif max(counts) > router.items:
        yield f"{name} gives one expert {max(counts)} items, an image has {router.items}"
    elif sum(counts) > router.items * router.k:
        yield f"{name} is of {sum(counts)} choices, expected at most {router.items} x {router.k} (items x k)"


def misfits(row: Any, header: Header) -> Iterator[str]:
    """Yields what of a row, or of an example to show, is not of the header's classes, parts and routers."""
    last = len(header.classes) - 1
    for name in ("label", "clean", "adversarial", "router_exposed", "experts_exposed"):
        value, least = getattr(row, name, None), 0 if name == "label" else -1
        if value is not None and not least <= value <= last:
            yield f"field {name!r} must be from {least} to {last}, got {value}"
    for name in ("rerouted", "route_clean", "route_adversarial"):
        table = getattr(row, name, header.routers)
        if table.keys() != header.routers.keys():
            yield f"field {name!r} is of the routers {sorted(table)}, expected {sorted(header.routers)}"
    for name in ("route_clean", "route_adversarial"):
        for router, counts in getattr(row, name).items():
            yield from miscounts(f"field '{name}[{router}]'", counts, header.routers.get(router))
    size = getattr(row, "size", SIZES)
    if set(size) != set(SIZES):
        yield f"field 'size' is of {sorted(size)}, expected {', '.join(SIZES)}"
    yield from unknown_part(getattr(row, "part", ""), header)


def unknown_part(part: str, header: Header) -> Iterator[str]:
    """Yields that a part is none of the header's, if it is none."""
    parts = ("", CLEAN, CERTIFIED, *header.parts, *((SMALLER, LARGER) if header.role == "curve" else ()))
    if part not in parts:
        yield f"field 'part' must be one of {parts}, got {part!r:.80}"
