"""Objectives that weigh a router's gradient: against other routers (`RouterHinge`), against the loss
(`JointNormalised`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustmoe.attacks.losses import Ascent, climb, gate_climb
from robustmoe.attacks.objectives import Inner, Joint, Objective, Score, scored, some, some_routes
from robustmoe.attacks.routes.regions import RouteLoss, lead, spread
from robustmoe.attacks.surrogate import exact_of, missed
from robustmoe.attacks.threat import size
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing, Trace, detach


@dataclass(frozen=True)
class RoutingLoss(Objective):
    """What the attacks on the route climb, named for tables; on its own, the loss of the whole model."""

    name: ClassVar[str] = "routing"
    aims_at_router: ClassVar[bool] = True
    needs_router: ClassVar[bool] = True
    loss: RouteLoss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        return Joint(self.loss)(model, x, y)


@dataclass(frozen=True)
class RouterHinge(Objective):
    """The routers alone, every item of every router pushed off its clean decision, and no further than ``cap``.

    Per router and item, in deviations of the item's clean logits: min(best unchosen minus worst chosen logit, cap),
    averaged; so neither a router with large logits nor one that has left takes the gradient from the others (compare
    `RouterOnly`, which has no cap). Where every expert is chosen: KL of the gate. ``fooled`` is of the exact model.
    """

    name: ClassVar[str] = "router_only"
    aims_at_router: ClassVar[bool] = True
    aims_at_experts: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    cap: float = 0.1

    def __post_init__(self) -> None:
        if not self.cap >= 0:
            raise UserError(f"cap must be 0 or more: below it nothing would be climbed; got {self.cap}")

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        trace = _clean(model, x)
        if not trace:
            raise UserError("router_hinge needs a model with a router; this model is dense")

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            output = model.run(x_adv)
            away = departure(some_routes(trace, rows), output.trace, self.cap)
            return scored(away, missed(model, x_adv, output.logits, some(y, rows)))

        return inner


@dataclass(frozen=True)
class JointNormalised(Objective):
    """A loss of the whole model plus ``weight`` times the departure of its routers, with gradients of equal length.

    The departure (`RouterHinge`'s, without a cap) is scaled, image by image, by the ratio of the two gradients'
    Euclidean norms at this point, a constant; where the loss has no gradient the departure is taken as it is. It moves
    the gradient alone: the value is the loss, so that iterates compare. Dense models: the loss.
    """

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True
    weight: float = 1.0
    loss: RouteLoss = "ce"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"weight must be 0 or more, and finite; got {self.weight}")

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        trace = _clean(model, x)

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            output, label = model.run(x_adv), some(y, rows)
            loss, climbed = climb(self.loss, output.logits, label)
            if trace and x_adv.requires_grad and torch.is_grad_enabled():
                away = departure(some_routes(trace, rows), output.trace, float("inf")).climbed
                ratio = self.weight * _ratio(climbed, away, x_adv)
                climbed = climbed + torch.where(ratio > 0, ratio * (away - away.detach()), torch.zeros_like(away))
            return Score(loss, missed(model, x_adv, output.logits, label), climbed)

        return inner


def _clean(model: RoutedModel, x: Tensor) -> Trace:
    with torch.no_grad():
        return detach(exact_of(model).route(x))


def departure(clean: Trace, after: Trace, cap: float) -> Ascent:
    """(n,): how far the routers have left their ``clean`` decisions, in deviations of an item's logits, each item's
    lead at most ``cap``: the mean over routers of the mean over items.
    """
    parts = [_of_items(routing, after[name].logits, cap) for name, routing in clean.items()]
    return Ascent(*(torch.stack([items.mean(-1) for items in each]).mean(0) for each in zip(*parts, strict=True)))


def _of_items(clean: Routing, logits: Tensor, cap: float) -> Ascent:
    """For comparison and for the gradient."""
    if clean.k == clean.num_experts:
        return gate_climb(clean.logits, logits)
    away = (-lead(logits, clean.index) / spread(clean.logits)).clamp(max=cap)
    return Ascent(away, away)


def _ratio(loss: Tensor, away: Tensor, x_adv: Tensor) -> Tensor:
    """Norm of the loss's image gradient over the departure's; 1 where the loss has none, 0 where the departure has."""
    norms = []
    for value in (loss, away):
        slope = None
        if value.requires_grad:
            slope = torch.autograd.grad(value.sum(), x_adv, retain_graph=True, allow_unused=True)[0]
        norms.append(torch.zeros_like(value) if slope is None else size("l2", slope))
    ratio = norms[0] / norms[1].clamp(min=torch.finfo(loss.dtype).tiny)
    ratio = torch.where(norms[0] > 0, ratio, torch.ones_like(ratio))
    return torch.where((norms[1] > 0) & torch.isfinite(ratio), ratio, torch.zeros_like(ratio)).detach()


def router_hinge(cap: float = 0.1) -> RouterHinge:
    """The departure of the routers' decisions, every item's counted up to ``cap``."""
    return RouterHinge(cap)
