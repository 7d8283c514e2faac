"""Bounds of a whole model's margins over a ball: its networks by `bounds`, put together by `rules` along its
`parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe.certification import rules
from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.graph import record
from robustmoe.certification.regions import region_margins
from robustmoe.errors import UserError
from robustmoe.models.parts import Fork, Function, Leaf, Mixed, Part

Space = Literal["sign", "logits", "probabilities"]
"""What margins are of: logits; probabilities (their upper bounds are then the trivial 1); or whichever of the two has
the same sign and is at hand.
"""


@dataclass(frozen=True)
class Worst:
    """``lower`` and ``upper``: bounds over the ball of the margins of class y against each class (its own entry: 0).

    ``experts``: names of the m networks that answer ("" of a dense model's). Of each image, ``reached``: those that can
    be used somewhere in the ball; ``held``: those of them that are proven to say y in the whole ball on their own.
    ``stable``: every router that decides has one decision for the whole ball. ``rule``: the proposition that is used
    (docs/certification.md). ``route``: least lead over the ball of the router's choice over its best other expert
    (inf without such a router; of the outermost one).
    """

    lower: Float[Tensor, "n c"]
    upper: Float[Tensor, "n c"]
    experts: tuple[str, ...]
    reached: Bool[Tensor, "n m"]
    held: Bool[Tensor, "n m"]
    stable: Bool[Tensor, " n"]
    rule: list[str]
    route: Float[Tensor, " n"]

    def proven(self, y: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Whether every margin is above 0 in the whole ball."""
        return others(self.lower, y).amin(1) > 0


def others(margins: Float[Tensor, "... c"], y: Int[Tensor, ...]) -> Float[Tensor, "... c"]:
    """The margins, with inf in the place of the class itself."""
    return margins.scatter(-1, y[..., None], torch.inf)


def worst_margins(
    part: Part,
    ball: Ball,
    y: Int[Tensor, " n"],
    how: Bounding = "crown_ibp",
    slack: float = 0.0,
    space: Space = "sign",
    region_steps: int = 0,
) -> Worst:
    """Bounds over ``ball`` of the margins of the classes ``y``; in the ``space`` "sign", of what has the signs of the
    model's own margins.

    ``region_steps``: steps of a search for prices by which an expert of a top-1 router is bounded on its own region
    alone, where the whole ball does not prove it (CERT-2c; not with "ibp"). ``slack``: every bound of a network, by l
    or u, is moved outwards by slack (1 + |l|), for rounding. Differentiable in the weights. Raises UserError for what
    has no bounds.
    """
    return _Walk(how, slack, 0 if how == "ibp" else region_steps).part(part, ball, y, space)


def router_bounds(
    router: Function, ball: Ball, how: Bounding = "crown_ibp", slack: float = 0.0
) -> tuple[Float[Tensor, "n e e"], Float[Tensor, "n e e"]]:
    """``least`` and ``most`` of g_i - g_k over the ball, [n, i, k], g the router's logits."""
    bounded = Bounded(record(router, ball.x), ball, how)
    e = bounded.graph.output.shape[1]
    unit = torch.eye(e, dtype=ball.x.dtype, device=ball.x.device)
    rows = (unit[:, None] - unit[None]).flatten(0, 1)[:, None].expand(-1, len(ball.x), -1)
    least = bounded.lower(rows).T.unflatten(1, (e, e))
    least = (least - slack * (1 + least.abs())) * (1 - unit)
    return least, -least.transpose(1, 2)


@dataclass(frozen=True)
class _Walk:
    """Down the parts of a model."""

    how: Bounding
    slack: float
    region_steps: int

    def part(self, part: Part, ball: Ball, y: Tensor, space: Space) -> Worst:
        if isinstance(part, Leaf):
            return self._leaf(part, ball, y, space)
        if isinstance(part, Fork):
            return self._fork(part, ball, y, space)
        return self._blended(part, ball, y, space)

    def _leaf(self, part: Leaf, ball: Ball, y: Tensor, space: Space) -> Worst:
        bounded = Bounded(record(part.network, ball.x), ball, self.how)
        c = bounded.graph.output.shape[1]
        unit = torch.eye(c, dtype=ball.x.dtype, device=ball.x.device)
        rows = unit[y][None] - unit[:, None]
        lower = self._outward(bounded.lower(rows).T, y)
        upper = torch.full_like(lower, torch.inf) if space == "sign" else -self._outward(bounded.lower(-rows).T, y)
        if space == "probabilities":
            lower, upper = rules.probability_margins(lower, upper, y), torch.ones_like(lower)
        held = others(lower, y).amin(1, keepdim=True) > 0
        every = torch.ones_like(held)
        route = torch.full_like(lower[:, 0], torch.inf)
        return Worst(lower, upper, ("",), every, held, bounded.settled(), ["bounds"] * len(y), route)

    def _outward(self, lower: Tensor, y: Tensor) -> Tensor:
        return (lower - self.slack * (1 + lower.abs())).scatter(1, y[:, None], 0.0)

    def _fork(self, part: Fork, ball: Ball, y: Tensor, space: Space) -> Worst:
        single, inner = not part.soft and part.k == 1, _inner_space(part, space)
        least, most = router_bounds(part.router, ball, self.how, self.slack)
        reached = torch.ones_like(most[:, 0], dtype=torch.bool) if part.soft else rules.reachable(most, part.k)
        branches = [self._branch(each, ball, y, inner, reached[:, i]) for i, each in enumerate(part.branches)]
        lower, upper = (
            torch.stack([each.lower for each in branches], 1),
            torch.stack([each.upper for each in branches], 1),
        )
        held = torch.cat([each.held for each in branches], 1)
        on_regions = torch.zeros_like(reached)
        if self.region_steps and single and inner != "probabilities":
            lower, on_regions = self._on_regions(part, ball, y, lower, reached)
        weights = rules.soft_weights(least, most) if part.soft else None
        lower, upper = _mixed(part, lower, upper, weights, inner)
        if space == "probabilities" and inner == "logits":
            lower, upper = rules.probability_margins(lower, upper, y), torch.ones_like(lower)
        names = tuple(f"{i}{'.' if name else ''}{name}" for i, each in enumerate(branches) for name in each.experts)
        inside = torch.cat([each.reached for each in branches], 1)
        stable = torch.stack([each.stable | ~reached[:, i] for i, each in enumerate(branches)], 1).all(1)
        if not part.soft:
            stable = stable & (reached.sum(1) == part.k)
        rule = _rules(part, (inside & held).all(1), on_regions.any(1))
        return Worst(lower, upper, names, inside, held, stable, rule, _lead(least, part))

    def _on_regions(self, part: Fork, ball: Ball, y: Tensor, lower: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
        """``lower`` (n, e, c), raised where an expert is one of several in reach and not proven; and for which (n,
        e).
        """
        weak = others(lower, y[:, None].expand(-1, lower.shape[1])).amin(2) <= 0
        asked = reached & weak & (reached.sum(1, keepdim=True) > 1)
        raised = torch.zeros_like(reached)
        for i, branch in enumerate(part.branches):
            rows = asked[:, i].nonzero()[:, 0]
            if not isinstance(branch, Leaf) or not len(rows):
                continue
            raised_margins = region_margins(
                branch.network, part.router, i, ball[rows], y[rows], self.how, self.region_steps
            )
            raised_margins = torch.maximum(self._outward(raised_margins, y[rows]), lower[rows, i])
            raised[rows, i] = others(raised_margins, y[rows]).amin(1) > 0
            lower = lower.index_put((rows, torch.full_like(rows, i)), raised_margins)
        return lower, raised

    def _branch(self, part: Part, ball: Ball, y: Tensor, space: Space, reached: Tensor) -> Worst:
        """Bounds for the images that reach it; for the others those that no mixture looks at."""
        places = reached.nonzero()[:, 0]
        if len(places) == len(y):
            return self.part(part, ball, y, space)
        inner = self.part(part, ball[places] if len(places) else ball[:1], y[places] if len(places) else y[:1], space)
        every = torch.where(reached, reached.cumsum(0) - 1, 0)  # a place in inner, for each image

        def spread(values: Tensor, missing: float | bool) -> Tensor:
            return torch.where(reached.view(-1, *[1] * (values.ndim - 1)), values[every], missing)

        return Worst(
            spread(inner.lower, torch.inf),
            spread(inner.upper, -torch.inf),
            inner.experts,
            spread(inner.reached, False),
            spread(inner.held, False),
            spread(inner.stable, True),
            [inner.rule[place] for place in every.tolist()],
            spread(inner.route, torch.inf),
        )

    def _blended(self, part: Mixed, ball: Ball, y: Tensor, space: Space) -> Worst:
        if part.mix == "probabilities" and space == "logits":
            raise UserError("no bounds are known of the logits of a blend of probabilities; expected mix=logits")
        inner: Space = "probabilities" if part.mix == "probabilities" else "logits"
        standard = self.part(part.standard, ball, y, inner)
        robust = self.part(part.robust, ball, y, inner if part.scale == 1 else "logits")
        low, high = robust.lower, robust.upper
        if part.scale != 1:
            low, high = part.scale * low, part.scale * high
            if inner == "probabilities":
                low, high = rules.probability_margins(low, high, y), torch.ones_like(high)
        if inner == "probabilities":
            lower = torch.minimum(*(rules.dual_margins(standard.lower, low, alpha) for alpha in part.alpha))
            upper = torch.ones_like(lower)
            alone = torch.minimum(*(rules.dual_margins(-torch.ones_like(low), low, alpha) for alpha in part.alpha))
            rule = ["robust half alone" if each else "both halves" for each in (others(alone, y).amin(1) > 0).tolist()]
        else:
            lower = torch.minimum(*((1 - alpha) * standard.lower + alpha * low for alpha in part.alpha))
            upper = torch.maximum(*((1 - alpha) * standard.upper + alpha * high for alpha in part.alpha))
            rule = ["mixed logits"] * len(y)
            if space == "probabilities":
                lower, upper = rules.probability_margins(lower, upper, y), torch.ones_like(upper)
        names = tuple(
            f"{half}{'.' if name else ''}{name}"
            for half, worst in (("standard", standard), ("robust", robust))
            for name in worst.experts
        )
        return Worst(
            lower,
            upper,
            names,
            torch.cat([standard.reached, robust.reached], 1),
            torch.cat([standard.held, robust.held], 1),
            standard.stable & robust.stable,
            rule,
            torch.minimum(standard.route, robust.route),
        )


def _inner_space(part: Fork, space: Space) -> Space:
    """Returns what the margins of the branches have to be of, for the fork's to be of ``space``. UserError where no
    bounds are known.
    """
    single = not part.soft and part.k == 1
    if part.mix == "probabilities" and not single:
        if space == "logits":
            raise UserError("no bounds are known of the logits of a mixture of probabilities; expected mix=logits")
        return "probabilities"
    return space if single and (part.total or part.mix == "probabilities" or space == "sign") else "logits"


def _mixed(
    part: Fork, lower: Tensor, upper: Tensor, weights: tuple[Tensor, Tensor] | None, inner: Space
) -> tuple[Tensor, Tensor]:
    """Returns the mixture's bounds (n, c) of its branches' (n, e, c); ``weights``: bounds of a soft router's."""
    if weights is None:
        used = part.k if part.weighting == "equal" else 1
        lower, upper = rules.averaged(lower, used), -rules.averaged(-upper, used)
    else:
        low, high = weights
        lower, upper = rules.weighed(lower, low, high), -rules.weighed(-upper, low, high)
    if not part.total and inner == "logits":  # the k largest of e weights of sum 1 have k/e of it at least
        share = part.k / len(part.branches)
        lower, upper = torch.where(lower > 0, share * lower, lower), torch.where(upper > 0, upper, share * upper)
    return lower, upper


def _rules(part: Fork, alone: Bool[Tensor, " n"], on_regions: Bool[Tensor, " n"]) -> list[str]:
    """Returns each image's rule, by its name in output (docs/certification.md)."""
    usual = "soft mixture" if part.soft else "all reachable experts" if part.k == 1 else "top-k mixture"
    return [
        "each expert on its region" if region else "each reachable expert alone" if every else usual
        for every, region in zip(alone.tolist(), on_regions.tolist())
    ]


def _lead(least: Float[Tensor, "n e e"], part: Fork) -> Float[Tensor, " n"]:
    """The largest over the experts of its least lead over the others: above 0 where a top-1 router keeps it
    everywhere.
    """
    e = least.shape[1]
    if part.soft or part.k != 1 or e == 1:
        return torch.full_like(least[:, 0, 0], torch.inf)
    alone = torch.eye(e, dtype=torch.bool, device=least.device)
    return least.masked_fill(alone, torch.inf).amin(2).amax(1)
