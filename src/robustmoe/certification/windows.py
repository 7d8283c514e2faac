"""Coefficients of numbers that see a small field of a feature map each, held as that field alone: a window a row.

A neuron of a convolution depends on a few pixels, so the coefficients of one row are 0 but for a window, of the same
size for all rows, elsewhere for each. Xu et al. 2020 (auto_LiRPA) hold them so; here the windows of any rows go
together, and what depends on no image is held once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


class Sliding(NamedTuple):
    """How a convolution's kernel goes over a map; all in (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def field(self, window: Pair) -> Pair:
        """The field of what enters that a window of what leaves depends on."""
        height, width = (
            (length - 1) * a + (k - 1) * d + 1
            for length, a, k, d in zip(window, self.stride, self.kernel, self.dilation, strict=True)
        )
        return height, width


@dataclass(frozen=True)
class Windows:
    """Coefficients (s, n, c, h, w) of n ``images`` that are 0 but for a window of p x q fields a row.

    ``values`` (n, s, p, q, c), or (1, s, p, q, c) where they are those of every image; the window of a row begins at
    its ``place`` (s, 2) times ``stride`` plus ``shift``, which may be outside of the map of ``size`` (h, w): there the
    values are 0.
    """

    images: int
    values: Tensor
    place: Tensor
    size: Pair
    stride: Pair = (1, 1)
    shift: Pair = (0, 0)

    @classmethod
    def units(cls, numbers: Tensor, like: Tensor) -> Windows:
        """1 at each of ``numbers`` (s,), counted through ``like`` (n, c, h, w)."""
        _, channels, height, width = like.shape
        field = numbers % (height * width)
        values = F.one_hot(numbers // (height * width), channels).to(like)
        place = torch.stack((field // width, field % width), 1)
        return cls(len(like), values[None, :, None, None], place, (height, width))

    @property
    def window(self) -> Pair:
        return self.values.shape[2], self.values.shape[3]

    def of(self, values: Tensor) -> Windows:
        """Coefficients of the same places, with other values."""
        return replace(self, values=values)

    def __neg__(self) -> Windows:
        return self.of(-self.values)

    def __add__(self, other: Windows) -> Windows:
        """The sum, in the smallest window that holds both. The rows must be the same, with strides alike."""
        if self.stride != other.stride or self.size != other.size:
            raise ValueError(f"windows that move by {self.stride} and {other.stride} fields have no common one")
        start = tuple(min(a, b) for a, b in zip(self.shift, other.shift, strict=True))
        end = tuple(
            max(a + p, b + q) for a, p, b, q in zip(self.shift, self.window, other.shift, other.window, strict=True)
        )
        both = [
            F.pad(
                each.values,
                [
                    *(0, 0, each.shift[1] - start[1], end[1] - each.shift[1] - each.window[1]),
                    *(each.shift[0] - start[0], end[0] - each.shift[0] - each.window[0]),
                ],
            )
            for each in (self, other)
        ]
        return replace(self, values=both[0] + both[1], shift=(start[0], start[1]))

    @cached_property
    def _fields(self) -> tuple[Tensor, Tensor]:
        """(s, p), (s, q): the lines and the columns of the map under each window."""
        lines, columns = (
            self.place[:, [axis]] * self.stride[axis]
            + self.shift[axis]
            + torch.arange(self.window[axis], device=self.place.device)
            for axis in (0, 1)
        )
        return lines, columns

    @cached_property
    def _index(self) -> Tensor:
        """(s, p, q) the fields of the map under each window, counted through (h, w); some field where there is none."""
        lines, columns = (each.clamp(0, end - 1) for each, end in zip(self._fields, self.size, strict=True))
        return lines[:, :, None] * self.size[1] + columns[:, None]

    def inside(self) -> Windows:
        """The same with 0 where a window lies outside of the map."""
        lines, columns = ((each >= 0) & (each < end) for each, end in zip(self._fields, self.size, strict=True))
        return self.of(self.values * (lines[:, :, None] & columns[:, None])[..., None].to(self.values))

    def pick(self, value: Tensor) -> Tensor:
        """A value (n, c, h, w), or what broadcasts to it, at the windows: broadcasts to (n, s, p, q, c)."""
        value = value.to(self.values.dtype)  # a constant of no dimension is of float64, in any network
        value = value.view(*[1] * (4 - value.ndim), *value.shape).permute(0, 2, 3, 1)
        if value.shape[1:3] == (1, 1):
            return value[:, None]
        value = value.expand(-1, *self.size, -1).flatten(1, 2)
        return value.index_select(1, self._index.flatten()).unflatten(1, self._index.shape)

    def dot(self, value: Tensor) -> Tensor:
        """(s, n) the sums of the products with a value (n, c, h, w), or with what broadcasts to it."""
        return total(self.values * self.pick(value))

    def dense(self) -> Tensor:
        """(s, n, c, h, w)."""
        n, s, _, _, channels = self.values.shape
        whole = self.values.new_zeros(n, s, self.size[0] * self.size[1], channels)
        index = self._index.flatten(1)[None, :, :, None].expand(n, -1, -1, channels)
        whole = whole.scatter_add(2, index, self.values.flatten(2, 3)).unflatten(2, self.size)
        return whole.permute(1, 0, 4, 2, 3).expand(-1, self.images, -1, -1, -1)

    def before(self, convolution: Sliding, weight: Tensor, size: Pair) -> Windows:
        """Coefficients of what enters a convolution, of maps of ``size``, for these of what leaves it."""
        n, s, p, q, _ = self.values.shape
        (a, b), (c, d) = convolution.stride, convolution.dilation
        parts = weight.unflatten(0, (convolution.groups, -1)).permute(0, 1, 3, 4, 2)  # (g, out, kernel, in)
        values = self.values.unflatten(4, (convolution.groups, -1))
        columns = torch.einsum("nspqgo,goyxi->nspqyxgi", values, parts).flatten(6)
        window = convolution.field(self.window)
        if (p, q, c, d) == (1, 1, 1, 1):
            below = columns[:, :, 0, 0]
        else:
            below = columns.new_zeros(n, s, *window, columns.shape[-1])
            for y, x in itertools.product(*map(range, convolution.kernel)):
                lines = slice(y * c, y * c + (p - 1) * a + 1, a)
                rows = slice(x * d, x * d + (q - 1) * b + 1, b)
                below[:, :, lines, rows] += columns[:, :, :, :, y, x]
        top, left = convolution.padding
        stride = (self.stride[0] * a, self.stride[1] * b)
        shift = (self.shift[0] * a - top, self.shift[1] * b - left)
        windows = Windows(self.images, below, self.place, size, stride, shift)
        return windows.inside() if top or left else windows


def total(values: Tensor) -> Tensor:
    """(s, n): the sums over the windows of values (n, s, p, q, c)."""
    return values.flatten(2).sum(2).T


Coefficients = Tensor | Windows
"""(s, n, ...): s rows for each of n images."""


def dot(above: Coefficients, value: Tensor) -> Tensor:
    """(s, n) the sums of the products of ``above`` and what broadcasts to (n, ...)."""
    if isinstance(above, Windows):
        return above.dot(value)
    if value.shape == above.shape[1:]:  # one pass over the coefficients
        return torch.bmm(above.flatten(2).transpose(0, 1), value.flatten(1)[:, :, None])[:, :, 0].T
    return (above * value).flatten(2).sum(2)


def sizes(above: Coefficients) -> Coefficients:
    """The absolute coefficients."""
    return above.of(above.values.abs()) if isinstance(above, Windows) else above.abs()


def plus(a: Coefficients, b: Coefficients) -> Coefficients:
    """The sum of two coefficients of the same rows."""
    if isinstance(a, Windows) and isinstance(b, Windows) and a.stride == b.stride:
        return a + b
    return dense(a) + dense(b)


def dense(above: Coefficients) -> Tensor:
    return above.dense() if isinstance(above, Windows) else above


def count(above: Coefficients) -> int:
    """How many rows there are."""
    return len(above.place) if isinstance(above, Windows) else len(above)


def flat(above: Coefficients) -> Tensor:
    """(s, n, numbers): the coefficients in a row, without most of those that are 0."""
    return above.values.flatten(2).transpose(0, 1) if isinstance(above, Windows) else above.flatten(2)


def along(above: Coefficients, value: Tensor) -> Tensor:
    """A value (n, ...) in the order of `flat`: (n, numbers), or (s, n, numbers)."""
    return above.pick(value).flatten(2).transpose(0, 1) if isinstance(above, Windows) else value.flatten(1)
