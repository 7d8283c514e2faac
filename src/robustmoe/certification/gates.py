"""Operations of networks with gates inside: softmax, the choice of the best, and products of two values of the image.

The mixture of numbers by a gate is bounded over all scores in a box exactly: the weights of a softmax sum to 1, which
an interval of each does not know (`Interval.joint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustmoe.certification.operations import Interval, Jointly, Operation, Pulled, Slopes
from robustmoe.certification.windows import dot
from robustmoe.errors import UserError
from robustmoe.routing import chosen_shares


@dataclass(frozen=True)
class SoftmaxBox(Jointly):
    """Softmax weights of all scores between ``lower`` and ``upper``.

    The sum of T_i e_i / sum of e_i, with every e_i between exp(lower_i) and exp(upper_i), is least at a corner: the
    numbers T below the minimum have the largest e_i, those above it the smallest. In order of T that is one of e - 1
    corners, and all are tried.
    """

    lower: Float[Tensor, "n e"]
    upper: Float[Tensor, "n e"]

    def lowest(self, above: Float[Tensor, "s n e"]) -> Float[Tensor, "s n"]:
        ordered, place = above.sort(-1)
        e = above.shape[-1]
        if e == 1:
            return ordered[..., 0]
        top = self.upper.amax(-1, keepdim=True)
        small, large = (torch.exp(each - top).expand_as(above).gather(-1, place) for each in (self.lower, self.upper))
        sums = []
        for factor in (ordered, torch.ones_like(ordered)):
            low, high = (small * factor).flip(-1).cumsum(-1).flip(-1), (large * factor).cumsum(-1)
            sums.append(high[..., :-1] + low[..., 1:])
        whole = sums[1]
        room = torch.finfo(whole.dtype).tiny ** 0.5  # where all of it underflows, the least number is a bound
        means = sums[0] / whole.clamp(min=room)
        return torch.where(whole > room, means, ordered[..., :1]).amin(-1)


@dataclass(frozen=True, eq=False)
class Softmax(Operation):
    """Of each image's row of numbers."""

    affine = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.softmax(inputs[0], -1)

    def interval(self, *inputs: Interval) -> Interval:
        lower, upper = inputs[0].lower, inputs[0].upper
        return Interval(_least_weight(lower, upper), _least_weight(upper, lower), None, SoftmaxBox(lower, upper))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        """A constant: the exact minimum over the box of scores."""
        return Pulled((torch.zeros_like(above),), SoftmaxBox(inputs[0].lower, inputs[0].upper).lowest(above))

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        """d/dg_i of sum_j A_j w_j is w_i (A_i - sum_j A_j w_j)."""
        own = self.interval(*inputs)
        assert own.joint is not None
        least, most = own.joint.lowest(above.lower)[..., None], -own.joint.lowest(-above.upper)[..., None]
        return (_times(Slopes(above.lower - most, above.upper - least), own.lower, own.upper),)


def _least_weight(own: Float[Tensor, "n e"], others: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    """Each weight with its own score from the one row, all others' from the other: the smallest and the largest."""
    e = own.shape[-1]
    alone = torch.eye(e, dtype=torch.bool, device=own.device)
    rest = torch.logsumexp(others[:, None].expand(-1, e, -1).masked_fill(alone, -torch.inf), -1)
    return torch.sigmoid(own - rest)


@dataclass(frozen=True)
class AnyChosen(Jointly):
    """1/k for each of some k of the ``reachable`` experts."""

    reachable: Bool[Tensor, "n e"]
    k: int

    def lowest(self, above: Float[Tensor, "s n e"]) -> Float[Tensor, "s n"]:
        return above.masked_fill(~self.reachable, torch.inf).sort(-1).values[..., : self.k].mean(-1)


@dataclass(frozen=True, eq=False)
class BestChosen(Operation):
    """1/k for each image's k largest numbers, 0 for the others."""

    k: int

    affine = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return chosen_shares(inputs[0], self.k)

    def interval(self, *inputs: Interval) -> Interval:
        """Ties count as either order."""
        reachable, sure = self._reach(inputs[0])
        share = torch.ones_like(inputs[0].lower) / self.k
        return Interval(share * sure, share * reachable, None, AnyChosen(reachable, self.k))

    def _reach(self, x: Interval) -> tuple[Tensor, Tensor]:
        """Which can be chosen, and which surely are."""
        ahead = (x.lower[:, None] > x.upper[:, :, None]).sum(-1)
        rivals = (x.upper[:, None] >= x.lower[:, :, None]).sum(-1) - 1  # without itself
        return ahead < self.k, rivals < self.k

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        joint = self.interval(*inputs).joint
        assert joint is not None
        return Pulled((torch.zeros_like(above),), joint.lowest(above))

    def open(self, x: Interval) -> Tensor:
        reachable, sure = self._reach(x)
        return reachable & ~sure

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        if bool(self.open(inputs[0]).any()):
            raise UserError("a hard gate whose choice can change in the ball has no Lipschitz constant there")
        return (Slopes(torch.zeros_like(above.lower), torch.zeros_like(above.upper)),)


@dataclass(frozen=True, eq=False)
class Product(Operation):
    """The product of two values of the image, or a third plus it (shift, x, scale); they broadcast to (n, *shape).

    Between two planes: x y >= y_m x + x_m y - (x_l y_l + x_u y_u) / 2 and <= the same with (x_l y_u + x_u y_l) / 2, m
    the middles: the mean of both of McCormick's (1976) on each side.
    """

    shape: tuple[int, ...]

    affine = False
    main = -2

    def __call__(self, *inputs: Tensor) -> Tensor:
        product = inputs[-2] * inputs[-1]
        return product if len(inputs) == 2 else inputs[0] + product

    def interval(self, *inputs: Interval) -> Interval:
        x, y = inputs[-2:]
        corners = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
        lower, upper = corners.amin(0), corners.amax(0)
        return (
            Interval(lower, upper) if len(inputs) == 2 else Interval(inputs[0].lower + lower, inputs[0].upper + upper)
        )

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        x, y = inputs[-2:]
        equal = 0.5 * (x.lower * y.lower + x.upper * y.upper)
        crossed = 0.5 * (x.lower * y.upper + x.upper * y.lower)
        bias = -dot(above.clamp(min=0), equal) - dot(above.clamp(max=0), crossed)
        by_x, by_y = above * (0.5 * (y.lower + y.upper)), above * (0.5 * (x.lower + x.upper))
        parts = [above, by_x, by_y][-len(inputs) :]
        return Pulled(tuple(_summed(part, each.lower) for part, each in zip(parts, inputs)), bias)

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        x, y = inputs[-2:]
        parts = [above, _times(above, y.lower, y.upper), _times(above, x.lower, x.upper)][-len(inputs) :]
        return tuple(Slopes(*(_summed(side, each.lower) for side in part)) for part, each in zip(parts, inputs))


def _times(slopes: Slopes, lower: Tensor, upper: Tensor) -> Slopes:
    """Bounds of the products of what lies within either pair."""
    corners = torch.stack([side * factor for side in slopes for factor in (lower, upper)])
    return Slopes(corners.amin(0), corners.amax(0))


def _summed(values: Float[Tensor, "s n ..."], like: Float[Tensor, "n ..."]) -> Tensor:
    """Coefficients (s, n, ...) of what was broadcast from the shape of ``like``."""
    dims = [1 + d for d in range(1, like.ndim) if like.shape[d] == 1 and values.shape[1 + d] != 1]
    return values.sum(dims, keepdim=True) if dims else values
