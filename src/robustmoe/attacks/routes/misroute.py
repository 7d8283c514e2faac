"""Attacks on the routers alone, the experts' answers taken at the clean image: RA-R of Zhang et al. (ICML 2025).

What is attacked is not the model but G(x') = the model's answer to the clean image on the route that it takes at x'
(sum_i a_i(x') f_i(x)). How far the paper's own attack went is not known; its released code has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe.attacks.losses import Loss, climb, loss_of
from robustmoe.attacks.objectives import Inner, Objective, Score, scored, some, some_routes
from robustmoe.attacks.routes.base import RouteAttack
from robustmoe.attacks.routes.objectives import departure
from robustmoe.attacks.routes.regions import (
    GRID,
    Goal,
    RouteLoss,
    Target,
    decisions,
    gradients_of,
    margin,
    reached,
    spread,
)
from robustmoe.attacks.surrogate import exact_of
from robustmoe.attacks.threat import Threat
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Trace, soft

ROUTES = 64
"""So many routes of a model are tried one by one."""


def countable(trace: Trace) -> bool:
    """Whether every router sends the whole image to one expert, and there are at most `ROUTES` routes in all."""
    single = all(tuple(routing.index.shape[1:]) == (1, 1) for routing in trace.values())
    return single and math.prod(routing.num_experts for routing in trace.values()) <= ROUTES


@torch.no_grad()
def misrouted(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], x_adv: Float[Tensor, "n ch h w"], y: Int[Tensor, " n"]
) -> Score:
    """G(x_adv), of the exact model: its margin loss (best wrong logit minus the label's), and whether it is wrong."""
    exact = exact_of(model)
    logits = exact.run(x, forced=exact.run(x_adv).trace).logits
    return Score(loss_of("margin", logits, y), logits.argmax(1) != y)


@dataclass(frozen=True)
class Misrouting(Objective):
    """A loss of G; ``fooled``: the exact model's G is wrong. Gates that use all experts are climbed as they are. For
    any other, softmax(logits / their deviation) over all experts stands in: a hard decision has no gradient, and
    another one does not see the experts that are not chosen. A model that takes no such mixture (a wrapped one whose
    code counts on k experts) is climbed by the departure from its clean decisions, as `RouterHinge` does without a cap.
    """

    name: ClassVar[str] = "router_only"
    aims_at_router: ClassVar[bool] = True
    aims_at_experts: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            clean = exact_of(model).run(x)
        names = list(clean.trace)
        mixes = _mixes(exact_of(model), x[:1], {name: routing[:1] for name, routing in clean.trace.items()})

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            image, label = some(x, rows), some(y, rows)
            trace = decisions(model, x_adv, names)
            if mixes:
                logits = model.run(image, forced={name: _smooth(routing) for name, routing in trace.items()}).logits
                aimed = climb(self.loss, logits, label, some(clean.logits, rows))
            else:
                aimed = departure(some_routes(clean.trace, rows), trace, math.inf)
            return scored(aimed, misrouted(model, image, x_adv.detach(), label).fooled)

        return inner


def _mixes(model: RoutedModel, x: Tensor, trace: Trace) -> bool:
    """Whether the model takes a mixture of all experts."""
    try:
        with torch.no_grad():
            model.run(x, forced={name: _smooth(routing) for name, routing in trace.items()})
    except UserError:  # a wrapped model says so, router by router
        return False
    return True


def _smooth(routing: Routing) -> Routing:
    if routing.k == routing.num_experts:
        return routing
    return soft(routing.logits / spread(routing.logits)[..., None])


@dataclass(frozen=True)
class Misroute(RouteAttack):
    """For routers that send the whole image to one expert each (see `countable`): the routes on which the clean image
    loses most are sought one after the other, in falling order of that loss; the first in reach is the worst in reach.

    What a route does to the clean image is known beforehand: where no route is wrong the image cannot be broken, and
    where none is worse than its own it comes back as it was. (With gates that scale what they choose, by how much is an
    estimate: as on the clean image.) Within a region nothing is gained: the climb ends at its boundary.
    Steps are of ``step_size`` (eps / 4 by default) for the first half, or as long as a way of eps takes, and then ever
    shorter, as the ascent of the lowest of several leads needs. Restart 0 starts at the clean image, later ones at
    random. ``loss``, ``grid``: not used.
    """

    threat: Threat
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "margin"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check()

    def queries(self, output: Output) -> int:
        """A pass for each route, and the climbs; those of a single router are not counted."""
        routes = math.prod(routing.num_experts for routing in output.trace.values())
        return routes + (0 if len(output.trace) == 1 else self.restarts * (routes - 1) * 3 * (self.steps + 1))

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            trace = exact_of(model).run(x).trace
        if not countable(trace):
            raise UserError(f"misroute needs routers of whole images, one expert each, and at most {ROUTES} routes")
        promised, routes = _promises(model, x, y, trace)
        x_adv, best = x.clone(), misrouted(model, x, x, y)
        loss, fooled = best.loss, best.fooled
        for restart in range(self.restarts):
            for rank in range(promised.shape[1]):
                rows = torch.nonzero(~fooled & (promised[:, rank] > loss))[:, 0]
                if len(rows) == 0:
                    continue
                start = x[rows] if restart == 0 else self.threat.start(x[rows], noise[rows].fold(restart, rank))
                end = self._climb(model, x[rows], start, _target(trace, routes[rows, rank]))
                score = misrouted(model, x[rows], end, y[rows])
                better = score.fooled | (score.loss > loss[rows])
                kept = rows[better]
                x_adv[kept], loss[kept], fooled[kept] = end[better], score.loss[better], score.fooled[better]
        return x_adv

    def _climb(self, model: RoutedModel, x: Tensor, start: Tensor, target: Target) -> Tensor:
        """The first iterate that the exact routers send to the target, else the last."""
        end, now, rows = start.clone(), start, torch.arange(len(x), device=x.device)
        step_size, names = self._steering().step_size, list(target)
        far = max(self.steps / 2, self.threat.eps / step_size) if step_size else self.steps
        for step in range(self.steps + 1):
            goal = {name: aim[rows] for name, aim in target.items()}
            at = now.detach().requires_grad_(True)
            fresh = decisions(model, at, names)
            there = reached(goal, fresh, now)
            if bool(there.any()):
                with torch.no_grad():
                    there &= reached(goal, decisions(exact_of(model), now, names), now)
            end[rows] = now
            stay = torch.nonzero(~there)[:, 0]
            if step == self.steps or len(stay) == 0:
                break
            gradient = gradients_of([margin(goal, fresh)], at)[0][stay]
            rows, now = rows[stay], now[stay]
            length = step_size if step < far else step_size * (self.steps - step) / (self.steps - far)
            now = self.threat.project(now + length * self.threat.direction(gradient, now), x[rows])
        return end


@torch.no_grad()
def _promises(
    model: RoutedModel, x: Tensor, y: Tensor, trace: Trace
) -> tuple[Float[Tensor, "n r"], Int[Tensor, "n r routers"]]:
    """The margin loss of the clean images on each route, the largest first, and which expert each router chooses
    there.
    """
    ranges = [torch.arange(routing.num_experts, device=x.device) for routing in trace.values()]
    every = torch.cartesian_prod(*ranges).view(-1, len(ranges))
    losses = []
    for route in every:
        forced = {name: goal.force(trace[name]) for name, goal in _target(trace, route.expand(len(x), -1)).items()}
        losses.append(loss_of("margin", exact_of(model).run(x, forced=forced).logits, y))
    promised, order = torch.stack(losses, 1).sort(dim=1, descending=True, stable=True)
    return promised, every[order]


def _target(trace: Trace, experts: Int[Tensor, "n routers"]) -> Target:
    """The route on which each router, in turn, chooses these experts."""
    no: Bool[Tensor, "n 1"] = torch.zeros_like(experts[:, :1], dtype=torch.bool)
    return {name: Goal(experts[:, place, None, None], ~no, no, no) for place, name in enumerate(trace)}
