"""Operations of transformers: matrix products of two values of the image, and LayerNorm.

Both follow Shi et al. 2020 (ICLR, "Robustness verification for transformers"), who put planes around a product and take
LayerNorm apart; in intervals the weights of attention are bounded together with the values that they mix
(`robustmoe.certification.gates.SoftmaxBox`), and a normalised number is never above what the length of its row allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.certification.operations import (
    Affine,
    Interval,
    Jointly,
    Operation,
    Pulled,
    Slopes,
    times,
)
from robustmoe.certification.windows import dot

PIECES = 8
"""Of the range of a row's mean, in which its spread is bounded apart."""


HELD = 2**22
"""Numbers of a product's terms that are held at a time, about; those of one column at least."""


@dataclass(frozen=True, eq=False)
class PairProduct(Operation):
    """The matrix product x y of two values of the image, (n, ..., p, q) and (n, ..., q, r).

    Intervals: of every product by its corners; where x are the weights of a gate or of attention, the exact minimum of
    the mixtures of y, over all scores and all y. Linear: the means of McCormick's planes, x_m y + y_m x - x_m y_m -+
    x_r y_r, m the middles and r the reaches; for a number of which this is lower in the middle than the interval's
    constant, that constant.
    """

    affine = False
    mains = (0, 1)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.matmul(inputs[0], inputs[1])

    def interval(self, *inputs: Interval) -> Interval:
        x, y = inputs
        columns = max(1, HELD // x.lower.numel())
        ends = zip(y.lower.split(columns, -1), y.upper.split(columns, -1), strict=True)
        lower, upper = zip(*(_product_ends(x, *part) for part in ends), strict=True)
        return Interval(torch.cat(lower, -1), torch.cat(upper, -1))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        x, y = inputs
        (x_m, x_r), (y_m, y_r) = _middle(x), _middle(y)
        centre, gap, own = x_m @ y_m, x_r @ y_r, self.interval(x, y)
        low, high = centre - gap >= own.lower, centre + gap <= own.upper
        positive, negative = above.clamp(min=0), above.clamp(max=0)
        through = torch.where(low, positive, 0.0) + torch.where(high, negative, 0.0)
        bias = dot(positive, torch.where(low, -centre - gap, own.lower))
        bias = bias + dot(negative, torch.where(high, -centre + gap, own.upper))
        return Pulled((through @ y_m.transpose(-2, -1), x_m.transpose(-2, -1) @ through), bias)

    def open(self, x: Interval) -> Tensor:
        """Weights are as close as their scores."""
        return torch.zeros_like(x.lower, dtype=torch.bool) if x.joint is not None else x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        x, y = inputs
        middle, reach = 0.5 * (above.lower + above.upper), 0.5 * (above.upper - above.lower)
        (x_m, x_r), (y_m, y_r) = (tuple(each.transpose(-2, -1) for each in _middle(side)) for side in (x, y))
        by_x, by_y = middle @ y_m, x_m @ middle
        reach_x = middle.abs() @ y_r + reach @ (y_m.abs() + y_r)
        reach_y = x_r @ middle.abs() + (x_m.abs() + x_r) @ reach
        return Slopes(by_x - reach_x, by_x + reach_x), Slopes(by_y - reach_y, by_y + reach_y)


def _middle(x: Interval) -> tuple[Tensor, Tensor]:
    """The middle, and how far it is to either end."""
    return 0.5 * (x.lower + x.upper), 0.5 * (x.upper - x.lower)


def _product_ends(x: Interval, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the product of x and some columns of y."""
    if x.joint is not None and x.joint.shares:
        return _least_mixture(x.joint, x, low), -_least_mixture(x.joint, x, -high)
    corners = [a[..., None] * b.unsqueeze(-3) for a in (x.lower, x.upper) for b in (low, high)]
    least = torch.minimum(torch.minimum(*corners[:2]), torch.minimum(*corners[2:]))
    most = torch.maximum(torch.maximum(*corners[:2]), torch.maximum(*corners[2:]))
    return least.sum(-2), most.sum(-2)


def _least_mixture(joint: Jointly, weights: Interval, values: Float[Tensor, "n *b q r"]) -> Float[Tensor, "n *b p r"]:
    """The least mixture of each column of ``values`` by each row of weights."""
    rows = values.movedim(-1, 0).unsqueeze(-2)
    return joint.lowest(rows.expand(-1, *weights.lower.shape)).movedim(0, -1)


@dataclass(frozen=True, eq=False)
class FromLeft(Affine):
    """The matrix product weight x of a constant (n, ..., p, q) and a value of the image (n, ..., q, r)."""

    weight: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.weight @ inputs[0]

    def interval(self, *inputs: Interval) -> Interval:
        middle, reach = _middle(inputs[0])
        middle, reach = self.weight @ middle, self.weight.abs() @ reach
        return Interval(middle - reach, middle + reach)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((self.weight.transpose(-2, -1) @ above,), None)

    def absolute(self) -> Operation:
        return FromLeft(self.weight.abs())


@dataclass(frozen=True)
class LessMean(Jointly):
    """Rows less their own mean, of all rows in ``box``."""

    box: Interval

    def lowest(self, above: Float[Tensor, "s n *rows d"]) -> Float[Tensor, "s n *rows"]:
        apart = above - above.mean(-1, keepdim=True)
        middle, reach = _middle(self.box)
        return (apart * middle).sum(-1) - (apart.abs() * reach).sum(-1)


@dataclass(frozen=True, eq=False)
class Centring(Affine):
    """Each row (n, ..., d) less its mean."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return _less_mean(inputs[0])

    def interval(self, *inputs: Interval) -> Interval:
        middle, reach = _middle(inputs[0])
        middle, reach = _less_mean(middle), _reach_less_mean(reach)
        box = LessMean(Interval(inputs[0].lower, inputs[0].upper))
        return Interval(middle - reach, middle + reach, None, box)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return Pulled((_less_mean(above),), None)

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        middle = _less_mean(0.5 * (above.lower + above.upper))
        reach = _reach_less_mean(0.5 * (above.upper - above.lower))
        return (Slopes(middle - reach, middle + reach),)


def _less_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _reach_less_mean(reach: Tensor) -> Tensor:
    """The sizes of the weights of `_less_mean` applied: 1 - 1/d of a number itself, 1/d of each other."""
    return (1 - 2 / reach.shape[-1]) * reach + reach.mean(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class MeanSquare(Operation):
    """The mean of the squares of each row (n, ..., d), plus eps: (n, ..., 1).

    Of rows less their mean whose box before that is known, it is also bounded for each piece of the range of the mean.
    Linear: c^2 is between 2 c_m c - c_m^2 and the same plus the square of c's reach.
    """

    eps: float

    affine = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].square().mean(-1, keepdim=True) + self.eps

    def interval(self, *inputs: Interval) -> Interval:
        (c,) = inputs
        least, most = (each.mean(-1, keepdim=True) for each in _squares(c))
        if isinstance(c.joint, LessMean):
            parts = [_squares(part) for part in _less_every_mean(c.joint.box)]
            low, high = (torch.stack([each.mean(-1, keepdim=True) for each in side]) for side in zip(*parts))
            least, most = torch.maximum(least, low.amin(0)), torch.minimum(most, high.amax(0))
        return Interval(least + self.eps, most + self.eps)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        middle, reach = _middle(inputs[0])
        least = self.eps - middle.square().mean(-1, keepdim=True)
        most = least + reach.square().mean(-1, keepdim=True)
        bias = dot(above.clamp(min=0), least) + dot(above.clamp(max=0), most)
        return Pulled((above * (2 / middle.shape[-1]) * middle,), bias)

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        (c,) = inputs
        share = 2 / c.lower.shape[-1]
        return (times(above, share * c.lower, share * c.upper),)


@dataclass(frozen=True, eq=False)
class Unit(Operation):
    """c / sqrt(v) of rows c (n, ..., d) and v = mean of c^2 + eps; ``centred``: their numbers sum to 0 (LayerNorm).

    Intervals: c_i / sqrt((c_i^2 + rest) / d + eps) rises with c_i, and falls or rises with the rest, the sum of the
    others' squares, as c_i is above or below 0. So with the ends of both it is exact over a box of c; of centred rows
    the rest is at least c_i^2 / (d - 1) (Cauchy and Schwarz), which alone keeps the size at sqrt(d - 1) or below.
    Where a box of the rows before the mean was taken off is known, they are also bounded for each piece of the range
    of that mean, which is then one for all numbers of the row. Bounds of v are used too.

    Linear: c_i r >= r_m c_i + c_m r - (c_l r_l + c_u r_u) / 2, and <= with (c_l r_u + c_u r_l) / 2, r = v^(-1/2), which
    is convex: above its tangent, below its chord. For a number of which this is lower in the middle than the interval's
    constant, that constant.
    """

    eps: float
    centred: bool

    affine = False
    mains = (0, 1)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * torch.rsqrt(inputs[1])

    def interval(self, *inputs: Interval) -> Interval:
        c, v = inputs
        box = c.joint.box if isinstance(c.joint, LessMean) else None
        mirrored = None if box is None else Interval(-box.upper, -box.lower)
        highest = self._highest(Interval(c.lower, c.upper), v, box)
        return Interval(-self._highest(Interval(-c.upper, -c.lower), v, mirrored), highest)

    def _highest(self, c: Interval, v: Interval, box: Interval | None) -> Tensor:
        highest = self._ratio(c.upper, *_squares(c))
        highest = torch.minimum(highest, c.upper * torch.where(c.upper > 0, v.lower, v.upper).rsqrt())
        if box is None:
            return highest
        pieces = [self._ratio(torch.minimum(c.upper, part.upper), *_squares(part)) for part in _less_every_mean(box)]
        return torch.minimum(highest, torch.stack(pieces).amax(0))

    def _ratio(self, top: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """The largest c_i / sqrt(...), c_i at most ``top``, every square between ``least`` and ``most``."""
        d = top.shape[-1]
        small = (least.sum(-1, keepdim=True) - least).clamp(min=0.0)
        if self.centred and d > 1:
            small = torch.maximum(small, top.square() / (d - 1))
        rest = torch.where(top > 0, small, most.sum(-1, keepdim=True) - most)
        return top * torch.rsqrt((top.square() + rest) / d + self.eps)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        c, v = inputs
        own, (c_m, c_r) = self.interval(c, v), _middle(c)
        r_l, r_u = v.upper.rsqrt(), v.lower.rsqrt()
        middle, gap = 0.5 * (r_l + r_u), c_r * (0.5 * (r_u - r_l))
        at = c_m.square().mean(-1, keepdim=True) + self.eps
        wide = torch.minimum(at + c_r.square().mean(-1, keepdim=True), v.upper)
        at = torch.minimum(torch.maximum(at, v.lower), v.upper)
        tangent, chord = -0.5 * at.rsqrt() / at, -(r_l * r_u).square() / (r_l + r_u)
        below, over = 1.5 * at.rsqrt(), r_u - chord * v.lower  # their offsets
        slow, fast = c_m * (tangent * wide + below), c_m * (chord * at + over)  # in the middle of the box
        low, high = torch.minimum(slow, fast) - gap >= own.lower, torch.maximum(slow, fast) + gap <= own.upper
        positive, negative = above.clamp(min=0), above.clamp(max=0)
        bias = dot(positive, torch.where(low, -gap, own.lower)) + dot(negative, torch.where(high, gap, own.upper))
        through = torch.where(low, positive, 0.0) + torch.where(high, negative, 0.0)
        by_r = (through * c_m).sum(-1, keepdim=True)
        rising = by_r >= 0
        bias = bias + dot(through, -c_m * middle)
        bias = bias + (by_r * torch.where(rising, below, over)).flatten(2).sum(2)
        return Pulled((through * middle, by_r * torch.where(rising, tangent, chord)), bias)

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        """d/dc_i is v^(-1/2), d/dv is -u_i / (2 v)."""
        c, v = inputs
        own = self.interval(c, v)
        inner = Slopes(*(each.sum(-1, keepdim=True) for each in times(above, own.lower, own.upper)))
        return times(above, v.upper.rsqrt(), v.lower.rsqrt()), times(inner, -0.5 / v.lower, -0.5 / v.upper)


def _squares(c: Interval) -> tuple[Tensor, Tensor]:
    """The least and the largest square of each number."""
    least = torch.maximum(c.lower, -c.upper).clamp(min=0.0).square()
    return least, torch.maximum(c.lower.abs(), c.upper.abs()).square()


def _less_every_mean(box: Interval) -> list[Interval]:
    """Bounds of the rows less their mean, for each piece of the range of that mean."""
    low, high = box.lower.mean(-1, keepdim=True), box.upper.mean(-1, keepdim=True)
    ends = [low + (high - low) * (place / PIECES) for place in range(PIECES)] + [high]
    return [Interval(box.lower - end, box.upper - start) for start, end in pairwise(ends)]
