"""The regions into which routers divide the images: which region an image is in, and how to climb a loss inside it.

A `Target` names experts for some items; `Steering` ascends the loss of the model forced there while it moves the image
to where the routers decide so themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks import schedule
from robustmoe.attacks.finite import require_finite
from robustmoe.attacks.late import Fallen, Pending
from robustmoe.attacks.losses import climb, scale_of
from robustmoe.attacks.surrogate import Surrogate, missed, unconfirmed
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.views import RuleTape
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing, Trace

RouteLoss = Literal["ce", "margin"]
GRID = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
SLACK = 0.1
"""How far inside a region, in deviations of an item's logits, an item need not be pushed further (while others are not
there yet)."""


class _Decided(Exception):
    """The routers asked for have all decided; the rest of the pass is not needed."""


def decisions(model: RoutedModel, x: Float[Tensor, "n ch h w"], names: Collection[str] | None = None) -> Trace:
    """What the routers decide on their own; the pass ends once those ``names`` have (None: a whole pass).

    A router at the entrance costs itself alone; behind a `Surrogate`, a pass that ends at the only router asked for is
    not counted.
    """
    while isinstance(model, Surrogate) and names is not None and len(names) == 1:
        model = model.climbed
    tape: RuleTape

    def stop(name: str, fresh: Routing) -> Routing:
        if names is not None and set(names) <= set(tape.fresh):
            raise _Decided
        return fresh

    tape = RuleTape(stop)
    try:
        model.ask(x, tape)
    except _Decided:
        return tape.fresh
    if names is not None and not set(names) <= set(tape.fresh):
        raise UserError(f"there is no router {sorted(set(names) - set(tape.fresh))}, only {sorted(tape.fresh)}")
    return tape.fresh


def router_logits(
    model: RoutedModel, x: Float[Tensor, "n ch h w"], names: Collection[str] | None = None
) -> dict[str, Float[Tensor, "n t e"]]:
    """The logits of the routers, as `run` would record them: see `decisions`."""
    return {name: routing.logits for name, routing in decisions(model, x, names).items()}


@dataclass(frozen=True)
class Goal:
    """Where the items of one router shall go: those ``forced`` (n, t) to the experts ``index`` (n, t, k).

    ``scaled`` (n, t): the model's own weights there are softmax over all experts (V-MoE); ``renormalised``: over the
    chosen. A forced expert is weighted by the same rule, live; by the constant fresh weight where neither holds (hard
    and straight-through gates). ``whole``: all items are known to be forced, so that in every pass the same decision
    is.
    """

    index: Int[Tensor, "n t k"]
    forced: Bool[Tensor, "n t"]
    scaled: Bool[Tensor, "n t"]
    renormalised: Bool[Tensor, "n t"]
    whole: bool = False
    known: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, before: Routing, index: Int[Tensor, "n t k"], forced: Bool[Tensor, "n t"] | None = None) -> Goal:
        """``before``: a decision of the model's own for these images, from which its weights are known. ``forced``: by
        default all items.
        """
        full, among, constant = weighted_as(before)
        scaled = full & ~constant
        every = torch.ones_like(index[..., 0], dtype=torch.bool) if forced is None else forced
        return cls(index, every, scaled, among & ~constant & ~scaled, forced is None)

    def __getitem__(self, rows: Tensor) -> Goal:
        return Goal(self.index[rows], self.forced[rows], self.scaled[rows], self.renormalised[rows], self.whole)

    def force(self, fresh: Routing) -> Routing:
        """The decision with the forced items sent to the goal."""
        constant = torch.where(self.renormalised[..., None], _among(fresh.logits, self.index), fresh.weight.detach())
        weight = torch.where(self.scaled[..., None], _full(fresh.logits, self.index), constant)
        if self.whole:
            return Routing(fresh.logits, self.index, weight).knowing(self.known)
        forced = self.forced[..., None]
        return Routing(
            fresh.logits, torch.where(forced, self.index, fresh.index), torch.where(forced, weight, fresh.weight)
        )

    def reached(self, fresh: Routing) -> Bool[Tensor, " n"]:
        """Which images' forced items are all there."""
        return (alike(self.index, fresh.index) | ~self.forced).all(1)


Target = Mapping[str, Goal]
"""Goals by router; {} is no goal at all: the free route."""


def weighted_as(
    decision: Routing,
) -> tuple[Bool[Tensor, "n t"], Bool[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """How the chosen experts of each item are weighted, known from a router's own decision: by softmax over all experts
    (V-MoE), by softmax over the chosen, and by the constant 1. Several may hold at once. Experts without room (weight
    0) say nothing; of an item without any other, none holds.
    """
    logits, own = decision.logits.detach(), decision.weight.detach()
    silent = own == 0

    def like(weight: Tensor) -> Tensor:
        return (torch.isclose(own, weight, rtol=1e-4, atol=1e-6) | silent).all(-1) & ~silent.all(-1)

    constant = ((own == 1.0) | silent).all(-1) & ~silent.all(-1)
    return like(_full(logits, decision.index)), like(_among(logits, decision.index)), constant


def _full(logits: Tensor, index: Tensor) -> Tensor:
    return torch.softmax(logits, -1).gather(-1, index)


def _among(logits: Tensor, index: Tensor) -> Tensor:
    return torch.softmax(logits.gather(-1, index), -1)


def alike(a: Int[Tensor, "n t k"], b: Int[Tensor, "n t k"]) -> Bool[Tensor, "n t"]:
    """Which items' chosen sets are equal."""
    return (a.sort(-1).values == b.sort(-1).values).all(-1)


def lead(logits: Float[Tensor, "n t e"], index: Int[Tensor, "n t k"]) -> Float[Tensor, "n t"]:
    """The lowest logit of the experts ``index`` minus the highest other one: above 0, the router chooses them."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
    highest = logits.masked_fill(chosen, -torch.inf).amax(-1)
    return logits.masked_fill(~chosen, torch.inf).amin(-1) - highest


def spread(logits: Float[Tensor, "n t e"]) -> Float[Tensor, "n t"]:
    """The deviation of an item's logits over the experts, a constant: the yardstick of its margins."""
    logits = logits.detach()
    factor = scale_of(logits)[:, None]  # its squares cannot overflow
    deviation = (logits * factor[..., None]).std(-1, unbiased=False) / factor
    return deviation.clamp(min=torch.finfo(logits.dtype).tiny ** 0.5)


def margin(target: Target, fresh: Trace) -> Float[Tensor, " n"]:
    """How far inside the target an image is: the mean `lead` of its forced items, in deviations, each at most `SLACK`
    or the least of them, so that an item that is there leaves the gradient to those that are not.
    """
    parts = [lead(fresh[name].logits, goal.index) / spread(fresh[name].logits) for name, goal in target.items()]
    forced = torch.cat([goal.forced for goal in target.values()], 1)
    leads = torch.cat(parts, 1)
    least = leads.detach().masked_fill(~forced, torch.inf).amin(1, keepdim=True)
    cap = least.clamp(min=SLACK).expand_as(leads)
    leads = torch.where(leads <= cap, leads, cap)
    return torch.where(forced, leads, torch.zeros_like(leads)).sum(1) / forced.sum(1).clamp(min=1)


def reached(target: Target, fresh: Trace, like: Tensor) -> Bool[Tensor, " n"]:
    """Which images (of the batch ``like``) are in the target region."""
    inside = torch.ones(len(like), dtype=torch.bool, device=like.device)
    for name, goal in target.items():
        inside = inside & goal.reached(fresh[name])
    return inside


def forced_pass(model: RoutedModel, x: Float[Tensor, "n ch h w"], target: Target) -> tuple[Float[Tensor, "n c"], Trace]:
    """The logits with the forced items sent to the target, all else free, and what each router itself said there."""
    tape = RuleTape(lambda name, fresh: target[name].force(fresh) if name in target else fresh)
    logits = model.ask(x, tape)
    return logits, tape.fresh


def gradients_of(values: list[Tensor], at: Tensor) -> list[Tensor]:
    """The gradient of each of ``values`` (n,) at the images, 0 where no path leads there. Raises `NotFiniteError`."""
    gradients = []
    for place, value in enumerate(values):
        keep = place + 1 < len(values)
        gradient = (
            torch.autograd.grad(value.sum(), at, allow_unused=True, retain_graph=keep)[0]
            if value.requires_grad
            else None
        )
        gradients.append(torch.zeros_like(at) if gradient is None else gradient)
    require_finite(*values, *gradients)
    return gradients


def unit(gradient: Tensor) -> Tensor:
    """Of Euclidean norm 1, image by image; zero stays zero."""
    return Threat("l2", 1.0).direction(gradient, gradient)


def climbable(model: RoutedModel) -> RoutedModel:
    """The model itself; for a `Surrogate` of other values (a view) the exact one, counted alike: an attack on the route
    needs the exact decisions.
    """
    if isinstance(model, Surrogate) and not model.close:
        return Surrogate(model.exact, model.exact, close=True, on_pass=model.on_pass)
    return model


def asked(model: RoutedModel, x_adv: Tensor, y: Tensor, rows: Int[Tensor, " m"]) -> Bool[Tensor, " n"]:
    """Which images are `broken`; only ``rows`` of them are asked about."""
    if len(rows) == 0:
        return asking.nowhere(y)
    hit = broken(model, x_adv[rows], y[rows])
    if asking.is_nowhere(hit):
        return asking.nowhere(y)
    everywhere = torch.zeros_like(y, dtype=torch.bool)
    everywhere[rows] = hit
    return everywhere


@torch.no_grad()
def broken(model: RoutedModel, x_adv: Tensor, y: Tensor) -> Bool[Tensor, " n"]:
    """Which images the exact model misses on its free route."""
    return missed(model, x_adv, model.run(x_adv).logits, y)


@dataclass(frozen=True)
class Steering:
    """Ascent of a loss inside a region: the step is along loss gradient + lambda * margin gradient, both of norm 1.

    Lambda is, image by image and step by step, the smallest of ``grid`` whose step, after projection, lands in the
    target region; the largest where none does. (The rule is that of this project's own study of expert transitions,
    where a fixed lambda was weaker than plain PGD; there the gradients were not normalised.)
    """

    threat: Threat
    steps: int
    step_size: float
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "ce"

    def __call__(
        self, model: RoutedModel, x: Tensor, y: Tensor, start: Tensor, target: Target
    ) -> tuple[Tensor, Bool[Tensor, " n"]]:
        """The last iterate of each image, or the first that the exact model misses on its own route, and which those
        are.
        """
        if target and not asking.free(start):
            return self._asking_late(model, x, y, start, target)
        end, fooled = start.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows, now, goal = torch.arange(len(x), device=x.device), start, dict(target)
        for step in range(self.steps):
            schedule.at(step, self.steps + 1)
            gradients, doubt = self.gradients_at(model, now, y[rows], goal)
            [ask] = asking.places(doubt)
            hit = asked(model, now, y[rows], ask)
            end[rows], fooled[rows] = now, hit
            if not asking.is_nowhere(hit):
                [stay] = asking.places(~hit)
                if len(stay) == 0:
                    return end, fooled
                rows, now, goal = rows[stay], now[stay], {name: aim[stay] for name, aim in goal.items()}
                gradients = [gradient[stay] for gradient in gradients]
            now = self.step(model, now, x[rows], gradients, goal)
        schedule.at(self.steps, self.steps + 1)
        end[rows], fooled[rows] = now, broken(model, now, y[rows])
        return end, fooled

    def _asking_late(
        self, model: RoutedModel, x: Tensor, y: Tensor, start: Tensor, target: Target
    ) -> tuple[Tensor, Bool[Tensor, " n"]]:
        """The same where asking waits for the device: which images to judge, and who fell in the step before, is asked
        with where the step leads. Who fell goes on in vain for a step, and is then left where he fell.
        """
        end, fooled = start.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows, now, goal = torch.arange(len(x), device=x.device), start, dict(target)
        late: Fallen | None = None
        with asking.together() as questions:
            for step in range(self.steps):
                schedule.at(step, self.steps + 1)
                gradients, doubt = self.gradients_at(model, now, y[rows], goal)
                question = questions.later(doubt)
                moved = self.step(model, now, x[rows], gradients, goal)
                ask = asking.taken(doubt, question.count())
                if late is not None and (left := late.settled(fooled)) is not None:
                    if len(left) == 0:
                        return end, fooled
                    rows, now, moved = rows[left], now[left], moved[left]
                    goal = {name: aim[left] for name, aim in goal.items()}
                    [ask] = asking.places(doubt[left])
                end[rows] = now
                with unconfirmed() as claims:
                    here = Pending(asked(model, now, y[rows], ask), claims, ask)
                late = Fallen(rows, None, here, questions.later(here.fooled))
                now = moved
            if late is not None and (left := late.settled(fooled)) is not None:
                rows, now = rows[left], now[left]
        if len(rows) > 0:
            schedule.at(self.steps, self.steps + 1)
            end[rows], fooled[rows] = now, broken(model, now, y[rows])
        return end, fooled

    def gradients_at(
        self, model: RoutedModel, now: Tensor, y: Tensor, target: Target
    ) -> tuple[list[Tensor], Bool[Tensor, " n"]]:
        """The two gradients of the forced pass, and which images are to be judged.

        Where every forced item goes to its goal by itself, the forced pass is the free one, and only images that it
        misses are to be; the others all are.
        """
        at = now.detach().requires_grad_(True)
        logits, fresh = forced_pass(model, at, target)
        values = [climb(self.loss, logits, y).climbed]
        if target:
            values.append(margin(target, fresh))
        gradients = gradients_of(values, at)
        return gradients, ~reached(target, fresh, now) | (logits.detach().argmax(1) != y)

    @torch.no_grad()
    def step(self, model: RoutedModel, now: Tensor, x: Tensor, gradients: list[Tensor], target: Target) -> Tensor:
        loss = unit(gradients[0])
        if not target:
            return self._moved(now, x, loss)
        inward, new = unit(gradients[1]), now.clone()
        left = torch.arange(len(now), device=now.device)
        rounds = self._rounds(now, target)
        for turn, weights in enumerate(rounds, 1):
            goal = {name: aim[left] for name, aim in target.items()}
            there, out = now[left], torch.ones_like(left, dtype=torch.bool)
            for place, weight in enumerate(weights, 1):
                moved = self._moved(now[left], x[left], loss[left] + weight * inward[left])
                there = moved if place == 1 else torch.where(out[:, None, None, None], moved, there)
                if turn == len(rounds) and place == len(weights):  # the largest, wherever it leads
                    break
                out = out & ~reached(goal, decisions(model, moved, goal), left)
            new[left] = there
            if turn == len(rounds):
                break
            [some] = asking.places(out)
            left = left[some]
            if len(left) == 0:
                break
        return new

    def _rounds(self, now: Tensor, target: Target) -> list[tuple[float, ...]]:
        """The grid, cut after each lambda behind which the host asks which images are left to try the next. Where that
        waits for the device, it asks less often, and images that have landed are moved on in vain with the others:
        after the first lambda alone where a single router decides for an image, which costs itself alone; else also in
        the middle of the others.
        """
        if asking.free(now):
            return [(weight,) for weight in self.grid]
        first, rest = self.grid[:1], self.grid[1:]
        half = len(rest) if _single(target) else len(rest) // 3
        return [weights for weights in (first, rest[:half], rest[half:]) if weights]

    def _moved(self, now: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        return self.threat.project(now + self.step_size * self.threat.direction(gradient, now), x)


def _single(target: Target) -> bool:
    """Whether a single router decides for an image, once."""
    return len(target) == 1 and all(goal.forced.shape[1] == 1 for goal in target.values())


class Survivors:
    """The images of a batch that are not broken yet, and the attacked images so far."""

    def __init__(self, model: RoutedModel, x: Tensor, y: Tensor) -> None:
        self.x_adv = x.clone()
        self.unbroken = ~broken(model, x, y)

    @property
    def rows(self) -> Int[Tensor, " m"]:
        return asking.places(self.unbroken)[0]

    def record(self, rows: Tensor, x_adv: Tensor, fooled: Tensor) -> None:
        """What a climb of the images ``rows`` gave."""
        self.x_adv[rows] = x_adv
        self.unbroken[rows] &= ~fooled


def free_trace(model: RoutedModel, x: Tensor, attack: str) -> Trace:
    """The exact decisions on x. ValueError for a dense model."""
    with torch.no_grad():
        trace = decisions(model, x)
    if not trace:
        raise UserError(f"{attack} needs a model with a router; this model is dense")
    return trace


def narrowed(trace: Trace) -> Trace:
    """The routers that choose: fewer experts than there are."""
    return {name: routing for name, routing in trace.items() if routing.k < routing.num_experts}
