"""Routes over a ball: which experts a router reaches, exactly; how far the route is certified; and the exact worst
margin of a linear mixture, against which every certificate can be held.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustmoe.attacks.base import UNASKED, entered
from robustmoe.attacks.threat import Norm, Threat
from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.certify import SLACK
from robustmoe.certification.graph import check, record
from robustmoe.certification.margins import router_bounds
from robustmoe.errors import UserError
from robustmoe.models.parts import Fork, Function, Leaf, Mixed, Part
from robustmoe.routing import top_k

TOLERANCE = 1e-9
"""How far a linear programme may miss a constraint; a lead of -TOLERANCE counts as a tie, and a tie as reached."""

ROUNDS = 64
"""Rounds of the game between leads and pixels, for all images at once, before a linear programme is asked."""


def reachable_exactly(
    model: Callable[[Tensor], Tensor], x: Tensor | np.ndarray, threat: Threat
) -> dict[str, Bool[Tensor, "n e"]]:
    """For each router, the experts that it chooses somewhere in the linf ball inside the box, by linear programmes
    (C(e - 1, k - 1) for each expert and image): whether the largest least lead of the expert over all others but k - 1
    of them is 0 or more. Most are decided for all images at once by bounds on both sides, and only the rest by a
    programme. A soft router reaches all.

    `rules.reachable` asks the same pair by pair: a superset, cheap, for any norm and router. Raises UserError for a
    router that is not affine in the pixels, ValueError for another norm than linf.
    """
    with _doubled(model, x) as (part, given, _):
        return {name: _reached(fork, given, _cubes(given, threat)) for name, fork in _forks(part)}


def route_radius(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray,
    norm: Norm,
    how: Bounding = "crown_ibp",
    halvings: int = 20,
) -> Float[Tensor, " n"]:
    """A certified radius of each image's route, in ``norm`` and pixels: in that ball, inside the box, every router that
    decides keeps its set of experts; of stages those on the image's path, of a dual both halves'.

    Every chosen expert is compared with every other, and the radius was verified itself, found by ``halvings`` of the
    largest there is (1 in linf, the root of the number of pixels in l2). Of affine routers it is the exact radius, the
    search apart; of others it is as good as the bounds (``how``). inf without a router that leaves an expert out.
    """
    with _doubled(model, x) as (part, given, _):
        most = 1.0 if norm == "linf" else float(given[0].numel()) ** 0.5
        return _radius(part, given, norm, how, torch.full_like(given[:, 0, 0, 0], most), halvings)


def exact_margin(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | list[int],
    threat: Threat,
) -> Float[Tensor, " n"]:
    """CERT-12: the smallest margin of the class y over the linf ball inside the box, exactly: for every expert i and
    other class j the linear programme min {f_i^y - f_i^j : g_i >= g_k for all k}, of linear experts behind a linear
    top-1 router (or of one linear network).

    An oracle to hold certificates against: certificate <= exact <= attack. On a boundary of regions both experts count.
    Raises UserError for a model of another kind, ValueError for another norm.
    """
    with _doubled(model, x, y) as (part, given, labels):
        cubes = _cubes(given, threat)
        experts, router = _linear_mixture(part, given)
        return given.new_tensor([_margin(experts, router, cube, label) for cube, label in zip(cubes, labels.tolist())])


def _margin(experts: list[AffineMap], router: AffineMap | None, cube: Cube, label: int) -> float:
    """The smallest margin of the class in the cube, of the experts chosen there."""
    least = torch.inf
    for i, expert in enumerate(experts):
        leads = None if router is None else router.leads(i, cube.x)
        for j in range(len(expert.offset)):
            if j != label:
                goal = AffineMap(expert.slope[label] - expert.slope[j], expert.offset[label] - expert.offset[j])
                value = _least(goal, cube, leads)
                least = least if value is None else min(least, value)
    return least


# ------------------------------------------------------------------------------------------------ parts


class AffineMap(NamedTuple):
    """slope . image + offset, of images as rows: (o, d) and (o,), or (d,) and a number."""

    slope: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        value: Tensor = self.slope @ x + self.offset
        return value

    def leads(self, i: int, x: Tensor) -> AffineMap:
        """Output i minus each other, of the step away from x: (o - 1, d), (o - 1,)."""
        lead = AffineMap(self.slope[i] - self.slope, self.offset[i] - self.offset)
        rest = torch.arange(len(self.offset), device=x.device) != i
        return AffineMap(lead.slope[rest], lead(x)[rest])


class Cube(NamedTuple):
    """One image as a row x (d,), and how far each pixel may move down and up."""

    x: Tensor
    down: Tensor
    up: Tensor


@contextlib.contextmanager
def _doubled(model: Callable[[Tensor], Tensor], x: Any, y: Any = UNASKED) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """The parts of a copy in eval mode, and the images, in float64; and the labels. Gradients are off inside."""
    with entered(model, x, y) as given, torch.no_grad():
        given.model(given.x)  # the pass that is looked at: nothing else here asks the model itself
        yield copy.deepcopy(given.model).to(torch.float64).parts(), given.x.to(torch.float64), given.y


def _forks(part: Part, prefix: str = "") -> Iterator[tuple[str, Fork]]:
    """Every router by its name in a trace; a model whose branches fork again has them behind something not affine."""
    if isinstance(part, Fork):
        yield prefix + part.name, part
        for branch in part.branches:
            yield from _forks(branch, prefix)
    elif isinstance(part, Mixed):
        yield from _forks(part.standard, f"{prefix}standard.")
        yield from _forks(part.robust, f"{prefix}robust.")


def _affine(function: Function, x: Tensor, what: str) -> AffineMap:
    """The function of the images x as a matrix and a bias."""
    graph = record(function, x[:1])
    if not all(node.operation is None or node.operation.affine for node in graph.nodes):
        raise UserError(f"{what} is not linear in the pixels, so there is no linear programme; expected router=linear")
    check(graph, function, 1 - x[:1])
    rows = torch.eye(graph.output.shape[1], dtype=x.dtype, device=x.device)[:, None]
    slope, offset = Bounded(graph, Ball(x[:1], "linf", torch.zeros_like(x[:1, 0, 0, 0])), "ibp").linear(rows)
    return AffineMap(slope[:, 0].flatten(1), offset[:, 0])


def _cubes(x: Tensor, threat: Threat) -> list[Cube]:
    if threat.norm != "linf":
        raise ValueError(f"exact routes and margins are for linf balls; got {threat.norm}")
    box = Ball(x, "linf", torch.full_like(x[:, 0, 0, 0], threat.eps)).box
    down, up = (box.lower - x).flatten(1), (box.upper - x).flatten(1)
    return [Cube(*each) for each in zip(x.flatten(1), down, up, strict=True)]


def _linear_mixture(part: Part, x: Tensor) -> tuple[list[AffineMap], AffineMap | None]:
    if isinstance(part, Leaf):
        return [_affine(part.network, x, "the network")], None
    leaves = [each for each in part.branches if isinstance(each, Leaf)] if isinstance(part, Fork) else []
    if not isinstance(part, Fork) or part.soft or part.k != 1 or not part.total or len(leaves) != len(part.branches):
        raise UserError("the exact margin is of linear experts behind a linear top-1 router, whose weight is 1")
    experts = [_affine(each.network, x, "an expert") for each in leaves]
    return experts, _affine(part.router, x, f"the router {part.name!r}")


# ------------------------------------------------------------------------------------------------ linear programmes


def _reached(fork: Fork, x: Tensor, cubes: list[Cube]) -> Bool[Tensor, "n e"]:
    """Expert by expert and way by way for all images at once; what that leaves open, by linear programmes."""
    e = len(fork.branches)
    reached = torch.full((len(x), e), fork.soft, dtype=torch.bool, device=x.device)
    if fork.soft or not len(x):
        return reached
    router = _affine(fork.router, x, f"the router {fork.name!r}")
    for i in range(e):
        each = [router.leads(i, cube.x) for cube in cubes]
        for kept in map(list, _against(e, fork.k)):
            rest = (~reached[:, i]).nonzero()[:, 0].tolist()
            if not rest:
                break
            offsets = torch.stack([each[at].offset[kept] for at in rest])
            down, up = torch.stack([cubes[at].down for at in rest]), torch.stack([cubes[at].up for at in rest])
            sure, never = _played(each[0].slope[kept], offsets, down, up)
            for at, surely, nowhere in zip(rest, sure, never, strict=True):
                reached[at, i] = surely or (not nowhere and _lead(each[at], kept, cubes[at]) >= -TOLERANCE)
    return reached


def _played(
    slope: Float[Tensor, "m d"], offset: Float[Tensor, "n m"], down: Float[Tensor, "n d"], up: Float[Tensor, "n d"]
) -> tuple[list[bool], list[bool]]:
    """Of each image, whether some step within its sides surely gives every lead 0 or more, and whether surely none
    does; where both are False, the answer is too close.

    A game of zero sum: weights of the leads against the step. To weights of sum 1 the best step is a corner, and the
    lead that they have there is above what any step gives the least lead; a step that is tried shows what can be had.
    The weights go up where a lead is small (Freund and Schapire 1999), the steps are tried, and their mean.
    """
    n, m = offset.shape
    score, mean, size = torch.zeros_like(offset), torch.zeros_like(down), torch.zeros_like(offset[:, :1])
    sure, never = (torch.zeros(n, dtype=torch.bool, device=offset.device) for _ in range(2))
    if m == 0:
        return [True] * n, [False] * n
    for turn in range(1, ROUNDS + 1):
        weights = torch.softmax(score, 1)
        pull = weights @ slope
        step = torch.where(pull > 0, up, down)
        mean += (step - mean) / turn
        leads = step @ slope.T + offset
        never |= (leads * weights).sum(1) < -2 * TOLERANCE
        for tried in (leads, mean @ slope.T + offset):
            sure |= tried.amin(1) >= 0
        if bool((sure | never).all()):
            break
        size = torch.maximum(size, leads.abs().amax(1, keepdim=True))
        score -= leads / size.clamp(min=torch.finfo(size.dtype).tiny) * (8 * math.log(max(2, m)) / turn) ** 0.5
    return sure.tolist(), (never & ~sure).tolist()


def _against(e: int, k: int) -> Iterator[tuple[int, ...]]:
    """Which of the e - 1 others a top-k choice must lead: all but k - 1, in every way."""
    return combinations(range(e - 1), e - k)


def _lead(leads: AffineMap, kept: list[int], cube: Cube) -> float:
    """The largest that the least of the leads ``kept`` gets in the cube: max t with every lead >= t."""
    if not kept:
        return torch.inf
    slope, offset = leads.slope[kept], leads.offset[kept]
    ones = torch.ones_like(offset)[:, None]
    goal = torch.cat([torch.zeros_like(cube.x), -torch.ones_like(cube.x[:1])])
    value = _programme(goal, torch.cat([slope, -ones], 1), offset, [*_sides(cube), (None, None)])
    assert value is not None  # some t is low enough
    return -value


def _least(goal: AffineMap, cube: Cube, leads: AffineMap | None) -> float | None:
    """The minimum of ``goal`` over the part of the cube where every lead is 0 or more; None where there is none."""
    slope, offset = (goal.slope[None][:0], goal.slope[:0]) if leads is None else leads
    value = _programme(goal.slope, slope, offset, _sides(cube))
    return None if value is None else value + float(goal(cube.x))


def _sides(cube: Cube) -> list[tuple[float, float]]:
    return list(zip(cube.down.tolist(), cube.up.tolist(), strict=True))


def _programme(goal: Tensor, slope: Tensor, offset: Tensor, sides: list[Any]) -> float | None:
    """min goal . d with slope d + offset >= 0 and d within its sides, by HiGHS; None where nothing is."""
    from scipy.optimize import linprog

    solution = linprog(
        goal.cpu().numpy(),
        A_ub=(-slope).cpu().numpy(),
        b_ub=offset.cpu().numpy(),
        bounds=sides,
        method="highs",
        options={"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
    )
    if solution.status not in (0, 2):  # optimal, infeasible
        raise RuntimeError(f"the linear programme was not solved: {solution.message}")
    return float(solution.fun) if solution.status == 0 else None


# ------------------------------------------------------------------------------------------------ radii


def _radius(part: Part, x: Tensor, norm: Norm, how: Bounding, most: Tensor, halvings: int) -> Float[Tensor, " n"]:
    if isinstance(part, Leaf):
        return torch.full_like(most, torch.inf)
    if isinstance(part, Mixed):
        halves = (part.standard, part.robust)
        return torch.minimum(*(_radius(half, x, norm, how, most, halvings) for half in halves))
    chosen = _chosen(part, x)
    radii = _kept(part, x, chosen, norm, how, most, halvings)
    for i, branch in enumerate(part.branches):
        here = chosen[:, i].nonzero()[:, 0]
        if len(here):
            inner = _radius(branch, x[here], norm, how, most[here], halvings)
            radii[here] = torch.minimum(radii[here], inner)
    return radii


def _chosen(fork: Fork, x: Tensor) -> Bool[Tensor, "n e"]:
    e = len(fork.branches)
    return top_k(fork.router(x)[:, None], e if fork.soft else fork.k, "hard").chosen()[:, 0]


def _kept(
    fork: Fork, x: Tensor, chosen: Tensor, norm: Norm, how: Bounding, most: Tensor, halvings: int
) -> Float[Tensor, " n"]:
    """The radius in which every chosen expert of this router leads every other."""
    if bool(chosen.all()):
        return torch.full_like(most, torch.inf)
    pairs = chosen[:, :, None] & ~chosen[:, None]

    def kept(eps: Tensor) -> Tensor:
        least, _ = router_bounds(fork.router, Ball(x, norm, eps), how, SLACK[x.dtype])
        return least.masked_fill(~pairs, torch.inf).flatten(1).amin(1) > 0

    radius, above = torch.where(kept(most), most, 0.0), most
    for _ in range(halvings):
        middle = 0.5 * (radius + above)
        good = kept(middle)
        radius, above = torch.where(good, middle, radius), torch.where(good, above, middle)
    return radius
