"""The route-beam attack: for models of many decisions, which few of them to flip, and then how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe.attacks.losses import climb
from robustmoe.attacks.routes.base import RouteAttack
from robustmoe.attacks.routes.flip import rivals, swapped
from robustmoe.attacks.routes.reach import DUAL
from robustmoe.attacks.routes.regions import (
    GRID,
    Goal,
    RouteLoss,
    Survivors,
    Target,
    climbable,
    decisions,
    forced_pass,
    free_trace,
    narrowed,
    spread,
)
from robustmoe.attacks.threat import Norm, Threat, size
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Trace, detach

REACH = 2.0
"""A flip whose linear estimate of the distance is beyond this many eps is tried only after the nearer ones."""


@dataclass(frozen=True)
class Sites:
    """Where the routers of a batch could be flipped. Items of all routers are numbered through: N of them an image.

    ``trace``: the decisions to be flipped; ``item`` and ``rival`` (n, s): each candidate's item and rank of rival,
    ``distance`` (n, s): the linear estimate of how far its boundary is, in the threat's norm; the nearest first.
    """

    trace: Trace
    item: Int[Tensor, "n s"]
    rival: Int[Tensor, "n s"]
    distance: Float[Tensor, "n s"]

    def __getitem__(self, rows: Tensor) -> Sites:
        trace = {name: routing[rows] for name, routing in self.trace.items()}
        return Sites(trace, self.item[rows], self.rival[rows], self.distance[rows])

    def target(self, choice: Int[Tensor, "n N"]) -> Target:
        """Goals from a set of flips: ``choice`` has the rank of rival an item goes to, -1 for an item left free."""
        goals, offset = {}, 0
        for name, routing in self.trace.items():
            ranks = choice[:, offset : offset + routing.index.shape[1]]
            offset += routing.index.shape[1]
            forced = ranks >= 0
            others = rivals(routing, routing.num_experts)
            index = swapped(routing, others.gather(-1, ranks.clamp(min=0)[..., None])[..., 0])
            goals[name] = Goal.of(routing, torch.where(forced[..., None], index, routing.index), forced)
        return {name: goal for name, goal in goals.items() if bool(goal.forced.any())}


def sites(model: RoutedModel, x: Tensor, names: list[str], norm: Norm, ranks: int, candidates: int) -> Sites:
    """The ``candidates`` decisions with the smallest margins (in deviations of the item's logits), by distance.

    One pass, and one gradient a candidate: margin over the dual norm of its image gradient.
    """
    at = x.detach().requires_grad_(True)
    trace = {name: routing for name, routing in decisions(model, at, names).items() if name in names}
    trace = {name: trace[name] for name in names}
    gaps, ease, length = [], [], min(ranks, max(r.num_experts - r.k for r in trace.values()))
    for routing in trace.values():
        best = rivals(routing, ranks)
        gap = routing.logits.gather(-1, routing.index).amin(-1, keepdim=True) - routing.logits.gather(-1, best)
        none = gap.new_full((*gap.shape[:2], length - gap.shape[2]), torch.inf)
        gaps.append(torch.cat([gap, none], -1))
        ease.append(torch.cat([gap.detach() / spread(routing.logits)[..., None], none], -1))
    gap, order = torch.cat(gaps, 1).flatten(1), torch.cat(ease, 1).flatten(1).argsort(dim=1, stable=True)
    order = order[:, : min(candidates, order.shape[1])]
    distance = torch.stack([_distance(gap.gather(1, candidate[:, None])[:, 0], at, norm) for candidate in order.T], 1)
    nearest = distance.argsort(dim=1, stable=True)
    order = order.gather(1, nearest)
    return Sites(
        detach(trace), torch.div(order, length, rounding_mode="floor"), order % length, distance.gather(1, nearest)
    )


def _distance(gap: Float[Tensor, " n"], at: Tensor, norm: Norm) -> Float[Tensor, " n"]:
    """Infinite where there is no such rival, or nothing moves it."""
    there = torch.isfinite(gap)
    if not (gap.requires_grad and bool(there.any())):
        return torch.full_like(gap, torch.inf)
    value = torch.where(there, gap, torch.zeros_like(gap)).sum()
    gradient = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)[0]
    slope = torch.zeros_like(gap) if gradient is None else size(DUAL[norm], gradient)
    return torch.where(there & (slope > 0), gap.detach().clamp(min=0) / slope, torch.inf)


@dataclass(frozen=True)
class RouteBeam(RouteAttack):
    """For routers of many items, or many routers: a beam search over sets of up to ``depth`` flipped decisions.

    First the loss is ascended freely (the empty set), which is all there is where every gate always uses all experts.
    Then the ``candidates`` decisions nearest to a boundary (an item and one of its ``rivals`` best unchosen experts)
    are forced one by one, all else free, and the loss of the forced pass at the start image says which are worth it;
    the best ``beam`` sets are steered into (see `Steering`), then grown by one more decision each, for the images still
    unbroken. Estimates rank the sets; only the exact model on its own route breaks an image. A broken image leaves at
    once; one that is never broken comes back as the end of its last climb. Restart 0 starts (and estimates) at the
    clean image, later ones at random. ``step_size``: eps / 4 by default.
    """

    threat: Threat
    steps: int = 20
    beam: int = 4
    depth: int = 2
    candidates: int = 16
    rivals: int = 2
    step_size: float | None = None
    restarts: int = 1
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check()
        for field in ("beam", "depth", "candidates", "rivals"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")

    def queries(self, output: Output) -> int:
        """Candidates with a gradient each, the forced passes of the search, and a climb for each set."""
        if not output.trace:
            return 0
        decided = narrowed(output.trace)
        number = sum(r.index.shape[1] * min(self.rivals, r.num_experts - r.k) for r in decided.values())
        candidates = min(self.candidates, number)
        climb = (6 if len(output.trace) == 1 else 6 + len(self.grid) - 1) * self.steps + 1
        total, width = 1 + 2 * candidates, 1
        for _ in range(min(self.depth, candidates)):
            total += width * candidates
            width = min(self.beam, width * candidates)
            total += width * climb
        return 2 + self.restarts * ((total if decided else 0) + 4 * self.steps + 1)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        model = climbable(model)
        names = list(narrowed(free_trace(model, x, "route_beam")))
        survivors, steer = Survivors(model, x, y), self._steering()
        for restart in range(self.restarts):
            rows = survivors.rows
            if len(rows) == 0:
                break
            start = x[rows] if restart == 0 else self.threat.start(x[rows], noise[rows].fold(restart))
            freely = steer(model, x[rows], y[rows], start, {})
            survivors.record(rows, *freely)
            left = ~freely[1]
            if names and bool(left.any()):
                self._search(model, x, y, rows[left], start[left], names, survivors)
        return survivors.x_adv

    def _search(
        self, model: RoutedModel, x: Tensor, y: Tensor, rows: Tensor, start: Tensor, names: list[str], field: Survivors
    ) -> None:
        """Grow, steer, grow again, from ``start`` (the images ``rows``). ``here``: places in ``rows``."""
        nearby = sites(model, start, names, self.threat.norm, self.rivals, self.candidates)
        items = sum(routing.index.shape[1] for routing in nearby.trace.values())
        sets = torch.full((len(rows), 1, items), -1, dtype=torch.long, device=x.device)
        far = start.new_zeros(len(rows), 1)
        steer, here = self._steering(), torch.arange(len(rows), device=x.device)
        for _ in range(self.depth):
            sets, far, valid = self._grow(model, start[here], y[rows[here]], nearby[here], sets, far)
            for place in range(sets.shape[1]):
                now = torch.nonzero(field.unbroken[rows[here]] & valid[:, place])[:, 0]
                if len(now) == 0:
                    continue
                which = here[now]
                target = nearby[which].target(sets[now, place])
                at = rows[which]
                field.record(at, *steer(model, x[at], y[at], start[which], target))
            left = torch.nonzero(field.unbroken[rows[here]])[:, 0]
            here, sets, far = here[left], sets[left], far[left]
            far = torch.where(valid[left], far, torch.inf)
            if len(here) == 0:
                break

    @torch.no_grad()
    def _grow(
        self,
        model: RoutedModel,
        x: Tensor,
        y: Tensor,
        nearby: Sites,
        sets: Int[Tensor, "n b N"],
        far: Float[Tensor, "n b"],
    ) -> tuple[Int[Tensor, "n b2 N"], Float[Tensor, "n b2"], Bool[Tensor, "n b2"]]:
        """Every set with one candidate more, the best ``beam`` of them: sets, distances (of their farthest flip), and
        which are real (new, of another item each, within finite distance).
        """
        grown, distance, loss, real = [], [], [], []
        for b in range(sets.shape[1]):
            for c in range(nearby.item.shape[1]):
                item, rival = nearby.item[:, c : c + 1], nearby.rival[:, c : c + 1]
                choice = sets[:, b].scatter(1, item, rival)
                apart = torch.maximum(far[:, b], nearby.distance[:, c])
                grown.append(choice)
                distance.append(apart)
                real.append((sets[:, b].gather(1, item)[:, 0] < 0) & torch.isfinite(apart))
                loss.append(_where(real[-1], partial(self._loss, model, x, y, nearby, choice), apart))
        choices, distances, losses, valid = torch.stack(grown, 1), *(torch.stack(v, 1) for v in (distance, loss, real))
        marks = Noise.of(torch.arange(choices.shape[2], device=x.device)).state
        code = ((choices + 1) * marks).sum(-1)
        again = (code[:, :, None] == code[:, None, :]) & valid[:, None, :]
        valid = valid & ~again.tril(-1).any(-1)
        near = distances <= REACH * self.threat.eps
        value = torch.where(near, losses, -distances)
        order = value.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.where(valid, near.long(), -1).gather(1, order)
        order = order.gather(1, rank.argsort(dim=1, descending=True, stable=True))[:, : self.beam]
        spread_out = order[..., None].expand(-1, -1, choices.shape[2])
        return choices.gather(1, spread_out), distances.gather(1, order), valid.gather(1, order)

    def _loss(
        self, model: RoutedModel, x: Tensor, y: Tensor, nearby: Sites, choice: Tensor, rows: Tensor
    ) -> Float[Tensor, " m"]:
        logits, _ = forced_pass(model, x[rows], nearby[rows].target(choice[rows]))
        return climb(self.loss, logits, y[rows]).loss


def _where(mask: Bool[Tensor, " n"], value: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """``value(rows)`` for the rows of the mask, 0 elsewhere."""
    out, rows = torch.zeros_like(like), torch.nonzero(mask)[:, 0]
    if len(rows):
        out[rows] = value(rows).to(out.dtype)
    return out
