"""Operations of networks with gates and attention inside: softmax, the choice of the best, and products of two values
of the image.

The mixture of numbers by a softmax's row is bounded over all scores in a box exactly (Davoodi and Rezazadeh 2026, arXiv
2605.10974, for attention): its weights sum to 1, which an interval of each does not know (`Interval.joint`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustmoe.certification.operations import Interval, Jointly, Operation, Pulled, Slopes, by_image, times
from robustmoe.certification.windows import dot
from robustmoe.errors import UserError
from robustmoe.routing import Gating, chosen_weights


@dataclass(frozen=True)
class SoftmaxBox(Jointly):
    """Softmax weights of all scores between ``lower`` and ``upper``, row by row.

    The sum of T_i e_i / sum of e_i, with every e_i between exp(lower_i) and exp(upper_i), is least at a corner: the
    numbers T below the minimum have the largest e_i, those above it the smallest. In order of T that is one of e - 1
    corners, and all are tried.
    """

    lower: Float[Tensor, "n *rows e"]
    upper: Float[Tensor, "n *rows e"]

    shares = True

    def lowest(self, above: Float[Tensor, "s n *rows e"]) -> Float[Tensor, "s n *rows"]:
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

    def line(self, above: Float[Tensor, "s n *rows e"]) -> tuple[Float[Tensor, "s n *rows e"], Tensor]:
        """Slopes and offsets (s, n, *rows) of planes below the mixture everywhere in the box: the tangent in its
        middle, less a bound of how far the mixture bends.

        Along a step v from the middle the mixture T has the second derivative E[(T - ET)(v - Ev)^2] under the weights
        there: at least -(max ET - min T) times the largest E[v^2].
        """
        middle, reach = 0.5 * (self.lower + self.upper), 0.5 * (self.upper - self.lower)
        weights = torch.softmax(middle, -1)
        mean = (weights * above).sum(-1)
        bend = (-self.lowest(-above) - above.amin(-1)) * -self.lowest(-reach.square()[None])
        slope = weights * (above - mean[..., None])
        return slope, mean - 0.5 * bend - (slope * middle).sum(-1)

    def pull(self, above: Float[Tensor, "s n *rows e"]) -> Pulled:
        """Of each row the plane, or the exact minimum, whichever is higher in the middle of the box."""
        slope, offset = self.line(above)
        least = self.lowest(above)
        straight = (slope * (0.5 * (self.lower + self.upper))).sum(-1) + offset >= least
        return Pulled((torch.where(straight[..., None], slope, 0.0),), by_image(torch.where(straight, offset, least)))


@dataclass(frozen=True, eq=False)
class Softmax(Operation):
    """Of each row of numbers, along the last dimension: an image's scores of experts, or a token's of tokens."""

    affine = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.softmax(inputs[0], -1)

    def interval(self, *inputs: Interval) -> Interval:
        lower, upper = inputs[0].lower, inputs[0].upper
        return Interval(_least_weight(lower, upper), _least_weight(upper, lower), None, SoftmaxBox(lower, upper))

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        return SoftmaxBox(inputs[0].lower, inputs[0].upper).pull(above)

    def open(self, x: Interval) -> Tensor:
        return x.upper > x.lower

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        """d/dg_i of sum_j A_j w_j is w_i (A_i - sum_j A_j w_j)."""
        own = self.interval(*inputs)
        assert own.joint is not None
        least, most = own.joint.lowest(above.lower)[..., None], -own.joint.lowest(-above.upper)[..., None]
        return (times(Slopes(above.lower - most, above.upper - least), own.lower, own.upper),)


def _least_weight(own: Float[Tensor, "*n e"], others: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """Each weight with its own score from the one row, all others' from the other: the smallest and the largest."""
    e = own.shape[-1]
    alone = torch.eye(e, dtype=torch.bool, device=own.device)
    spread = others.unsqueeze(-2).expand(*others.shape[:-1], e, e)
    rest = torch.logsumexp(spread.masked_fill(alone, -torch.inf), -1)
    return torch.sigmoid(own - rest)


@dataclass(frozen=True)
class AnyChosen(Jointly):
    """1/k for each of some k of the ``reachable`` experts, the ``sure`` ones among them."""

    reachable: Bool[Tensor, "n *rows e"]
    k: int
    sure: Bool[Tensor, "n *rows e"] | None = None

    shares = True

    def lowest(self, above: Float[Tensor, "s n *rows e"]) -> Float[Tensor, "s n *rows"]:
        first = above.masked_fill(~self.reachable, torch.inf)
        first = first if self.sure is None else first.masked_fill(self.sure, -torch.inf)
        return above.gather(-1, first.argsort(-1)[..., : self.k]).mean(-1)


@dataclass(frozen=True)
class AnyWeighted(Jointly):
    """The softmax weights of some k of the ``reachable`` experts, the ``sure`` ones among them, of all ``scores`` in a
    box: over the chosen ("renormalised"), or those of the softmax over all ("vmoe"). Every choice is tried.
    """

    scores: SoftmaxBox
    reachable: Bool[Tensor, "n *rows e"]
    sure: Bool[Tensor, "n *rows e"]
    k: int
    gating: Gating

    shares = True

    def choices(self) -> Iterator[tuple[list[int], Tensor]]:
        """Sets of k experts, and in which rows (n, *rows) they can be chosen."""
        for chosen in itertools.combinations(range(self.reachable.shape[-1]), self.k):
            picked = list(chosen)
            others = self.sure.index_fill(-1, torch.tensor(picked, device=self.sure.device), False)
            possible = self.reachable[..., picked].all(-1) & ~others.any(-1)
            if bool(possible.any()):
                yield picked, possible

    def lowest(self, above: Float[Tensor, "s n *rows e"]) -> Float[Tensor, "s n *rows"]:
        least = torch.full_like(above[..., 0], torch.inf)
        for picked, possible in self.choices():
            if self.gating == "renormalised":
                box = SoftmaxBox(self.scores.lower[..., picked], self.scores.upper[..., picked])
                lowest = box.lowest(above[..., picked])
            else:
                lowest = self.scores.lowest(above * self.held(picked, above))
            least = torch.where(possible, torch.minimum(least, lowest), least)
        return least

    def held(self, picked: list[int], like: Tensor) -> Float[Tensor, " e"]:
        """1 for those experts, 0 for others."""
        zeros = torch.zeros(self.reachable.shape[-1], dtype=like.dtype, device=like.device)
        return zeros.index_fill(0, torch.tensor(picked, device=like.device), 1.0)


CHOICES = 500
"""Sets of experts that are tried at most."""


@dataclass(frozen=True, eq=False)
class BestChosen(Operation):
    """The weights of each row's k largest numbers, 0 for the others: 1/k each ("hard"), or as `top_k` says."""

    k: int
    gating: Gating = "hard"

    affine = False
    chooses = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        return chosen_weights(inputs[0], self.k, self.gating)

    def interval(self, *inputs: Interval) -> Interval:
        """Ties count as either order."""
        reachable, sure = self._reach(inputs[0])
        joint = self._joint(inputs[0], reachable, sure)
        if isinstance(joint, AnyChosen):
            share = torch.ones_like(inputs[0].lower) / self.k
            return Interval(share * sure, share * reachable, None, joint)
        e = reachable.shape[-1]
        unit = torch.eye(e, dtype=inputs[0].lower.dtype, device=reachable.device)
        unit = unit.view(e, *[1] * (reachable.ndim - 1), e).expand(-1, *reachable.shape)
        return Interval(joint.lowest(unit).movedim(0, -1), -joint.lowest(-unit).movedim(0, -1), None, joint)

    def _reach(self, x: Interval) -> tuple[Tensor, Tensor]:
        """Which can be chosen, and which surely are."""
        ahead = (x.lower.unsqueeze(-2) > x.upper.unsqueeze(-1)).sum(-1)
        rivals = (x.upper.unsqueeze(-2) >= x.lower.unsqueeze(-1)).sum(-1) - 1  # without itself
        return ahead < self.k, rivals < self.k

    @property
    def _equal(self) -> bool:
        """Whether each of the chosen has 1/k."""
        return self.gating == "hard" or (self.gating == "renormalised" and self.k == 1)

    def _joint(self, x: Interval, reachable: Tensor, sure: Tensor) -> AnyChosen | AnyWeighted:
        if self._equal:
            return AnyChosen(reachable, self.k, sure)
        return AnyWeighted(SoftmaxBox(x.lower, x.upper), reachable, sure, self.k, self.gating)

    def pull(self, above: Tensor, inputs: Sequence[Interval]) -> Pulled:
        """A constant where the choice can change."""
        (x,) = inputs
        reachable, sure = self._reach(x)
        joint = self._joint(x, reachable, sure)
        least = joint.lowest(above)
        if isinstance(joint, AnyChosen):
            return Pulled((torch.zeros_like(above),), by_image(least))
        kept = above * sure
        lower, upper = x.lower, x.upper
        if self.gating == "renormalised":  # the weights of others underflow
            away = lower.amin(-1, keepdim=True) + 2 * math.log(torch.finfo(above.dtype).tiny)
            lower, upper = torch.where(sure, lower, away), torch.where(sure, upper, away)
        slope, offset = SoftmaxBox(lower, upper).line(kept)
        middle = (slope * (0.5 * (lower + upper))).sum(-1) + offset
        straight = (reachable == sure).all(-1) & (middle >= least)
        return Pulled((torch.where(straight[..., None], slope, 0.0),), by_image(torch.where(straight, offset, least)))

    def open(self, x: Interval) -> Tensor:
        reachable, sure = self._reach(x)
        return reachable & ~sure

    def slopes(self, above: Slopes, inputs: Sequence[Interval]) -> tuple[Slopes, ...]:
        if bool(self.open(inputs[0]).any()):
            raise UserError("a hard gate whose choice can change in the ball has no Lipschitz constant there")
        if not self._equal:
            raise UserError(f"no Lipschitz constants are known through {self.gating} gates; expected hard or soft ones")
        return (Slopes(torch.zeros_like(above.lower), torch.zeros_like(above.upper)),)


@dataclass(frozen=True, eq=False)
class Product(Operation):
    """The product of two values of the image, or a third plus it (shift, x, scale); they broadcast to (n, *shape).

    Between two planes: x y >= y_m x + x_m y - (x_l y_l + x_u y_u) / 2 and <= the same with (x_l y_u + x_u y_l) / 2, m
    the middles: the mean of both of McCormick's (1976) on each side.
    """

    shape: tuple[int, ...]

    affine = False
    mains = (-2,)

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
        parts = [above, times(above, y.lower, y.upper), times(above, x.lower, x.upper)][-len(inputs) :]
        return tuple(Slopes(*(_summed(side, each.lower) for side in part)) for part, each in zip(parts, inputs))


def _summed(values: Float[Tensor, "s n ..."], like: Float[Tensor, "n ..."]) -> Tensor:
    """Coefficients (s, n, ...) of what was broadcast from the shape of ``like``."""
    dims = [1 + d for d in range(1, like.ndim) if like.shape[d] == 1 and values.shape[1 + d] != 1]
    return values.sum(dims, keepdim=True) if dims else values
