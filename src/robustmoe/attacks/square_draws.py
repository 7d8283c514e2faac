"""The random numbers of the Square Attack: an image's own, or those of the released code's stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustmoe.attacks.threat import Norm
from robustmoe.noise import Noise


class Stretch(NamedTuple):
    """The iterations first..first + length - 1, of the ``among`` ones that all have windows of ``side`` pixels."""

    first: int
    length: int
    side: int
    among: int


class Draws(NamedTuple):
    """The random numbers of b iterations, for n images: ``place`` (n, b, 4), top and left of one window and of a second
    (which linf does not use); ``sign`` (n, b, c), -1 or 1 a channel; ``turned`` (n, b), whether the pattern is
    transposed (l2 and l1).
    """

    place: Tensor
    sign: Tensor
    turned: Tensor


class Tiles(NamedTuple):
    """The start's tiles for n images: ``sign`` (n, c, down, across); ``turned`` (n, down, across); rows and columns of
    pixels left free before the first.
    """

    sign: Tensor
    turned: Tensor
    top: int
    left: int


@dataclass(frozen=True)
class ByImage:
    """Random numbers for the images ``rows`` of the batch, of ``shape`` (c, h, w): every image its own windows and
    signs, from its own stream; all h - side + 1 positions are equally likely.
    """

    noise: Noise

    def stripes(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """-1 or 1 for each channel and column (n, c, 1, w)."""
        return _signs(self.noise[rows].fold(0).uniform(shape[0], 1, shape[2]))

    def tiles(self, rows: Tensor, shape: torch.Size, side: int) -> Tiles:
        """What fills an image with tiles of ``side`` pixels."""
        c, h, w = shape
        u = self.noise[rows].fold(0).uniform(c + 1, h // side, w // side)
        return Tiles(_signs(u[:, 1:]), u[:, 0] < 0.5, h % side // 2, w % side // 2)

    def draws(self, rows: Tensor, shape: torch.Size, stretch: Stretch) -> Draws:
        """The numbers of these iterations."""
        c, h, w = shape
        u = self.noise[rows].fold(1 + stretch.first).uniform(stretch.length, 5 + c)
        places = torch.tensor([h, w, h, w], device=u.device) - stretch.side + 1
        return Draws((u[..., :4] * places).long(), _signs(u[..., 5:]), u[..., 4] < 0.5)


@dataclass(frozen=True)
class ByBatch:
    """The same from the released code's stream: a batch shares its windows, and none reaches the last row or column."""

    generator: torch.Generator
    norm: Norm

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def stripes(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return _signs(self._rand(len(rows), shape[0], 1, shape[2])).to(rows.device)

    def tiles(self, rows: Tensor, shape: torch.Size, side: int) -> Tiles:
        (c, h, w), n = shape, len(rows)
        sign, turned = torch.empty(n, c, h // side, w // side), torch.empty(n, h // side, w // side, dtype=torch.bool)
        for i in range(h // side):
            for j in range(w // side):
                turned[:, i, j] = self._rand(1) > 0.5
                sign[:, :, i, j] = _signs(self._rand(n, c))
        offset = (h - side * 5) // 2
        top, left = (offset, offset) if side == h // 5 else (h % side // 2, w % side // 2)
        return Tiles(sign.to(rows.device), turned.to(rows.device), top, left)

    def draws(self, rows: Tensor, shape: torch.Size, stretch: Stretch) -> Draws:
        (c, h, w), n, side = shape, len(rows), stretch.side
        places = torch.tensor([h, w]) - side
        if self.norm == "linf":
            u = self._rand(stretch.length, 2 + c)
            place, sign = (places * u[:, :2]).long().repeat(1, 2), _signs(u[:, 2:]).expand(n, -1, -1)
            turned = torch.zeros(stretch.length, dtype=torch.bool)
        else:  # a draw's size depends on the images left: one iteration at a time
            place = (places.repeat(2) * self._rand(1, 4)).long()
            turned = self._rand(1) > 0.5
            sign = _signs(self._rand(n, c))[:, None]
        return Draws(
            place.expand(n, -1, -1).to(rows.device), sign.to(rows.device), turned.expand(n, -1).to(rows.device)
        )


def _signs(u: Tensor) -> Tensor:
    """-1 where u < 0.5, else 1."""
    return 1.0 - 2.0 * (u < 0.5).float()
