"""Several climbs of each image in one batch, such as one towards each class, that give what they give in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Climb = TypeVar("Climb")

SMALL, MORE = 128, 3
"""So many times as many images as were said have room where they are of at most so many numbers: small passes cost what
they cost for their many operations, and hold little."""

_ROOM: ContextVar[int] = ContextVar("room", default=0)


@contextlib.contextmanager
def room_for(images: int) -> Iterator[None]:
    """Inside, attacks may ask about so many images at a time, however few they are given."""
    token = _ROOM.set(images)
    try:
        yield
    finally:
        _ROOM.reset(token)


def room() -> int:
    """How many images an attack may ask about at a time; 0 where nobody said."""
    return _ROOM.get()


def next_climbs(
    waiting: Sequence[Climb], images: int, numbers: int = SMALL + 1
) -> tuple[Sequence[Climb], Sequence[Climb]]:
    """The climbs that have room in one batch of so many images of so many ``numbers``, at least one, and those that are
    still to come.
    """
    count = max(1, room() * (MORE if numbers <= SMALL else 1) // images)
    return waiting[:count], waiting[count:]


@dataclass
class Together:
    """The rows of one batch: climb by climb, and in each the same images. Of an image only the first climb that breaks
    it counts, so that later ones need not go on. ``first`` (images,): the row of that climb so far.
    """

    images: int
    first: Int[Tensor, " m"]

    @classmethod
    def of(cls, images: int, climbs: int, device: torch.device) -> Together:
        return cls(images, torch.full((images,), images * climbs, device=device))

    def broke(self, rows: Int[Tensor, " n"], these: Bool[Tensor, " n"] | None = None) -> None:
        """These rows have broken their images, or ``these`` of them."""
        told = rows if these is None else torch.where(these, rows, torch.iinfo(rows.dtype).max)
        self.first.scatter_reduce_(0, rows % self.images, told, "amin")

    def wanted(self, rows: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of the rows no earlier climb has made needless."""
        return rows <= self.first[rows % self.images]
