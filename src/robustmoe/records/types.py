"""What a rows file holds: header, row, checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.typed import build, choice, encode

VERSION = 3
"""Of a rows file."""

PRECISIONS = ("strict", "fast", "fp32")
NORMS = ("linf", "l2", "l1")
ROLES = ("main", "curve")
STATUSES = ("pass", "not run", "warn", "fail")  # best first


@dataclass(frozen=True)
class RouterInfo:
    """One router: ``experts`` to choose from, ``k`` chosen an item, ``items`` an image (1, or tokens)."""

    experts: int
    k: int
    items: int


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
class Header:
    """What was evaluated, against what, where and how. ``eps`` is in pixels of [0, 1]; ``n`` is the number of images
    planned; ``started`` is ISO 8601; ``attack`` is None for a clean evaluation, ``routers`` is {} for a dense model.

    ``precision`` is what the attack climbed: a frozen copy in float32 ("strict") or in half precision ("fast"), or the
    model itself ("fp32"). ``parts`` are the names of a suite's attacks, in order; [] for a simple attack.
    ``certified_hash`` is of the images that were not attacked because a certificate covers them; "" without any.
    ``files``: the SHA-256 of each file of a user's own that a part comes from, by its path as it is written."""

    run: str
    model: str
    data: str
    split: str
    attack: str | None
    objective: ObjectiveInfo | None
    norm: str
    eps: float
    role: str
    method: str | None
    n: int
    seed: int
    data_hash: str
    index_hash: str
    model_hash: str
    versions: dict[str, str]
    commit: str | None
    device: str
    threads: int
    precision: str
    command: str
    classes: list[str]
    routers: dict[str, RouterInfo]
    parameters: int
    started: str
    batch_size: int = 0
    parts: list[str] = field(default_factory=list)
    certified_hash: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @property
    def bound_to_batches(self) -> bool:
        """Says whether the rows depend on which images stand in one batch: a suite (each part cuts the survivors anew),
        and an attack that draws its random numbers by the batch."""
        return bool(self.parts) or re.search(r"rng=['\"]?autoattack", self.attack or "") is not None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the file's first line."""
        return {"kind": "header", "version": VERSION, **{name: encode(value) for name, value in vars(self).items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Header:
        """Returns the inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        if data.get("kind") != "header":
            raise UserError('not a rows file: its first line must be {"kind":"header",...}')
        if data.get("version") != VERSION:
            raise UserError(
                f"rows file of version {data.get('version')!r}, this robustmoe reads version {VERSION}: install the "
                "robustmoe that wrote it, or evaluate again"
            )
        return build(Header, {name: value for name, value in data.items() if name != "version"})

    def problems(self) -> Iterator[str]:
        """Yields words that are not known, and an attack without an objective."""
        yield from choice("norm", self.norm, NORMS)
        yield from choice("role", self.role, ROLES)
        yield from choice("precision", self.precision, PRECISIONS)
        if self.attack is not None and self.objective is None:
            yield "an attack has an objective, field 'objective' must be an object, got None"


@dataclass(frozen=True)
class Row:
    """One image: its index in the data set, its label, the exact model's predictions on the clean and the attacked
    image, the perturbation's size in each norm (pixels of [0, 1]), the share of its items that changed expert, and how
    many items each expert got. ``router_exposed``: the attacked route on the clean image; ``experts_exposed``: the
    clean route on the attacked image; both None for a dense model.

    ``part``: which part of a suite broke the image; "clean": wrong without an attack, so a suite did not attack it;
    "certified": covered by a certificate, so not attacked; "": a simple attack, or an image that no part broke (then
    the attacked image is the clean one)."""

    index: int
    label: int
    clean: int
    adversarial: int
    size: dict[str, float]
    rerouted: dict[str, float]
    router_exposed: int | None
    experts_exposed: int | None
    route_clean: dict[str, list[int]]
    route_adversarial: dict[str, list[int]]
    part: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of one line."""
        return {"kind": "row", **vars(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        """Returns the inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return build(Row, data)


@dataclass(frozen=True)
class Check:
    """One answer to "can this number be believed?": ``status`` is pass, warn, fail or not run."""

    id: str
    name: str
    status: str
    value: Any
    sentence: str

    def problems(self) -> Iterator[str]:
        """Yields the problem of a status that is not known."""
        yield from choice("status", self.status, STATUSES)


@dataclass(frozen=True)
class Checks:
    """The last line of a finished file: the checks, the wall time of the evaluation in seconds, and the forward passes
    that the attack asked for, summed over images (``queries``; a gradient counts as 3, 0: not counted)."""

    checks: list[Check]
    seconds: float
    queries: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the file's last line."""
        return {"kind": "checks", **{name: encode(value) for name, value in vars(self).items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Checks:
        """Returns the inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return build(Checks, data)


@dataclass(frozen=True)
class Time:
    """The line that ends a batch: the seconds and the queries it took (their sums survive a kill). A batch without it
    is not whole, and is done again."""

    seconds: float
    queries: int = 0


@dataclass(frozen=True)
class Passed:
    """An image that a part of a suite, not the last, did not break: it is still to be attacked."""

    index: int
    part: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of one line."""
        return {"kind": "part", **vars(self)}
