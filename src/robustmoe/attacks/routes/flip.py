"""The route-flip attack: cross a boundary of one router, then be wrong behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks import schedule
from robustmoe.attacks.base import entered
from robustmoe.attacks.late import Fallen, Pending
from robustmoe.attacks.routes.base import RouteAttack
from robustmoe.attacks.routes.regions import (
    GRID,
    Goal,
    RouteLoss,
    Survivors,
    alike,
    asked,
    broken,
    climbable,
    decisions,
    free_trace,
    gradients_of,
    margin,
    narrowed,
)
from robustmoe.attacks.surrogate import unconfirmed
from robustmoe.attacks.threat import Threat
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Trace

FLIPPED, BEHIND, FREE = 1.0, 7.0, 11.0
"""How far the attack is with a rival, for a forecast: where its route is flipped, where the climb behind the boundary
is over, and in the end. A step of each costs about so many forward passes more, where a single router decides.
"""


class Flip(NamedTuple):
    """Of one router, per image (n,) bool: ``flipped``, some item's chosen set was moved; ``broken``, and then, by that
    alone or by the ascent behind the boundary, the image. Both are False for an image that is wrong from the start.
    """

    flipped: Tensor
    broken: Tensor


@dataclass(frozen=True)
class RouteFlip(RouteAttack):
    """For each router, and each of its ``rivals`` best experts that are not chosen: raise the rival over the weakest
    chosen expert until the route flips; ascend the loss behind the boundary (see `Steering`); then ascend it freely.

    Each of the three takes at most ``steps`` steps of ``step_size`` (eps / 4 by default). A router of many items is
    pushed on all of them at once, and what has flipped by the end is forced. An image that does not flip goes straight
    to the free ascent. A broken image leaves at once; one that is never broken comes back as the end of its last climb.
    Restart 0 starts at the clean image, later ones at random. Where all gates always use all experts, the loss is
    ascended freely. `flips` says, for each router apart, how often the route moved and how often that broke the image.
    """

    threat: Threat
    steps: int = 20
    rivals: int = 2
    step_size: float | None = None
    restarts: int = 1
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check()
        if self.rivals < 1:
            raise ValueError(f"rivals must be at least 1; got {self.rivals}")

    def _pairs(self, trace: Trace) -> Iterator[tuple[str, int]]:
        """Every router that chooses, with each rank of rival it has."""
        for name, routing in narrowed(trace).items():
            for rank in range(min(self.rivals, routing.num_experts - routing.k)):
                yield name, rank

    def queries(self, output: Output) -> int:
        """A step of the flip: a gradient (not counted for a single router) and the judge; behind the boundary 6, and
        the deciding passes where routers are not single.
        """
        single = len(output.trace) == 1
        inside = 6 if single else 6 + len(self.grid) - 1
        pair = (1 if single else 4) * (self.steps + 1) + (inside + 4) * self.steps + 2
        return 2 + self.restarts * max(1, len(list(self._pairs(output.trace)))) * pair if output.trace else 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        model = climbable(model)
        trace = free_trace(model, x, "route_flip")
        survivors, steer = Survivors(model, x, y), self._steering()
        pairs = list(self._pairs(trace))
        for restart in range(self.restarts):
            for number, (name, rank) in enumerate(pairs or [("", 0)]):
                rows = survivors.rows
                if len(rows) == 0:
                    return survivors.x_adv
                now = x[rows] if restart == 0 else self.threat.start(x[rows], noise[rows].fold(restart, number))
                done, of = float(restart * max(1, len(pairs)) + number), float(self.restarts * max(1, len(pairs)))
                if pairs:
                    with schedule.part(done, done + BEHIND / FREE, of):
                        now, fooled, _ = self._behind(model, x[rows], y[rows], now, name, trace[name][rows], rank)
                    survivors.record(rows, now, fooled)
                    [left] = asking.places(~fooled)
                    rows, now = rows[left], now[left]
                if len(rows):
                    with schedule.part(done + (BEHIND / FREE if pairs else 0.0), done + 1.0, of):
                        survivors.record(rows, *steer(model, x[rows], y[rows], now, {}))
        return survivors.x_adv

    def flips(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray | list[int],
        noise: Noise | None = None,
    ) -> dict[str, Flip]:
        """Each router attacked on its own, from the clean image (restart 0, without the free ascent). ``model``, ``x``
        and ``y`` as for the attack; ``noise`` is not drawn from.
        """
        out: dict[str, Flip] = {}
        with entered(model, x, y, noise, self.seed, climbs=True) as (given, x, y, _):
            routed = climbable(given)
            trace = free_trace(routed, x, "route_flip")
            right = torch.nonzero(~broken(routed, x, y))[:, 0]
            for name in narrowed(trace):
                left, out[name] = right, Flip(*torch.zeros(2, len(x), dtype=torch.bool, device=x.device))
                for rank in [rank for router, rank in self._pairs(trace) if router == name]:
                    if len(left) == 0:
                        break
                    clean = trace[name][left]
                    _, fooled, moved = self._behind(routed, x[left], y[left], x[left], name, clean, rank)
                    out[name].flipped[left] |= moved
                    out[name].broken[left] |= moved & fooled
                    left = left[~(moved & fooled)]
        return out

    def _behind(
        self, model: RoutedModel, x: Tensor, y: Tensor, start: Tensor, name: str, clean: Routing, rank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flip, then ascend in the region behind. Last iterates, which are broken, which flipped."""
        with schedule.part(0.0, FLIPPED, BEHIND):
            now, index, fooled = self._flip(model, x, y, start, name, clean, rank)
        forced = ~alike(index, clean.index)
        flipped = forced.any(1)
        [rows] = asking.places(flipped & ~fooled)
        if len(rows):
            some = None if forced.shape[1] == 1 else forced[rows]  # None: all, which is so of an only item
            goal = Goal.of(clean[rows], index[rows], some)
            with schedule.part(FLIPPED, BEHIND, BEHIND):
                now[rows], fooled[rows] = self._steering()(model, x[rows], y[rows], now[rows], {name: goal})
        return now, fooled, flipped

    def _flip(
        self, model: RoutedModel, x: Tensor, y: Tensor, start: Tensor, name: str, clean: Routing, rank: int
    ) -> tuple[Tensor, Int[Tensor, "n t k"], Bool[Tensor, " n"]]:
        """Raise the rival of that rank at every item until all are flipped, or the steps are over: the iterates, what
        the router chooses there, and which are broken. An image whose route has moved is judged at every step.
        """
        goal = Goal.of(clean, swapped(clean, rivals(clean, self.rivals)[..., rank]))
        end, index, fooled = start.clone(), clean.index.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows, now = torch.arange(len(x), device=x.device), start
        late: Fallen | None = None
        with asking.together() as questions:
            for step in range(self.steps + 1):
                schedule.at(step, self.steps + 1)
                last = step == self.steps
                batch = _looked(model, now, rows, name, goal, clean.index)
                ask, stay = asking.places(batch.moved | last, batch.stays)
                if late is not None and (left := late.settled(fooled)) is not None:
                    batch = _Batch(*(each[left] for each in batch))
                    ask, stay = asking.places(batch.moved | last, batch.stays)
                rows, now = batch.rows, batch.now
                end[rows], index[rows] = now, batch.chosen
                with unconfirmed() as claims:
                    here, late = Pending(asked(model, now, y[rows], ask), claims, ask), None
                if last or asking.free(now):
                    fooled[rows] = hit = here.settled()
                    if not asking.is_nowhere(hit):
                        [stay] = asking.places(batch.stays & ~hit)
                else:
                    late = Fallen(rows, stay, here, questions.later(here.fooled))
                if last or len(stay) == 0:
                    break
                rows, now = rows[stay], now[stay]
                move = self._steering().step_size * self.threat.direction(batch.gradient[stay], now)
                now = self.threat.project(now + move, x[rows])
            if late is not None:
                late.settled(fooled)
        return end, index, fooled


class _Batch(NamedTuple):
    """The images ``rows`` at ``now``: the gradient towards the rival, the experts they go to, whether any item of an
    image has moved, and whether not all are at the rival yet.
    """

    rows: Tensor
    now: Tensor
    gradient: Tensor
    chosen: Tensor
    moved: Tensor
    stays: Tensor


def _looked(model: RoutedModel, now: Tensor, rows: Tensor, name: str, goal: Goal, clean: Tensor) -> _Batch:
    """What the router says of the images. ``goal`` and ``clean``, the experts of the clean image, are of all images."""
    at, goal = now.detach().requires_grad_(True), goal[rows]
    fresh = decisions(model, at, [name])[name]
    [gradient] = gradients_of([margin({name: goal}, {name: fresh})], at)
    return _Batch(rows, now, gradient, fresh.index, ~alike(fresh.index, clean[rows]).all(1), ~goal.reached(fresh))


def rivals(routing: Routing, count: int) -> Int[Tensor, "n t r"]:
    """The best experts that are not chosen, best first, at most ``count`` of them."""
    order = torch.argsort(
        routing.logits.detach().masked_fill(routing.chosen(), -torch.inf), dim=-1, descending=True, stable=True
    )
    return order[..., : min(count, routing.num_experts - routing.k)]


def swapped(routing: Routing, rival: Int[Tensor, "n t"]) -> Int[Tensor, "n t k"]:
    """The chosen experts with the weakest given up for ``rival``."""
    weakest = routing.logits.detach().gather(-1, routing.index).argmin(-1, keepdim=True)
    return routing.index.scatter(-1, weakest, rival[..., None])
