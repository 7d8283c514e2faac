"""X7 and X8: how far a route holds (LIP-6), and what the gain of fixed routes is worth once routes are attacked
(LIP-7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robustmoe.lipschitz import gates, routing_radius
from robustmoe.records.theory import Chart, ChartLine, Comparison, Experiment
from robustmoe.routing import top_k
from robustmoe.theory.draws import normal, unit

# ------------------------------------------------------------------------------------------------ X7


def _chosen(logits: Tensor, k: int) -> Tensor:
    return top_k(logits[:, None], k).chosen()[:, 0]


def _towards(rows: Tensor, norm: Literal["l2", "linf"]) -> Tensor:
    """(m, e, e, d): the unit step that gains most for expert j on expert i."""
    gap = rows[:, None] - rows[:, :, None]
    return gap.sign() if norm == "linf" else gap / gap.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def flips(rows: Tensor, bias: Tensor, x: Tensor, steps: Tensor, k: int) -> Tensor:
    """(m, a): which of a steps (m, a, d) change the set that router ``rows`` (m, e, d) chooses at x (m, d)."""
    before = _chosen(torch.einsum("med,md->me", rows, x) + bias, k)
    after = torch.einsum("med,mad->mae", rows, x[:, None] + steps) + bias[:, None]
    there = _chosen(after.flatten(0, 1), k).unflatten(0, after.shape[:2])
    return (there != before[:, None]).any(-1)


def x7(seed: int = 0, routers: int = 500, experts: int = 6, width: int = 10, tries: int = 64) -> Experiment:
    """LIP-6: random routers with a bias, k = 1 to 3, at 0.999 and 1.001 of the radius, along every pair and at
    random."""
    rows = []
    radii: dict[str, Tensor] = {}
    for norm in ("l2", "linf"):
        inside = outside = 0
        radii_here = []
        for k in (1, 2, 3):
            m = routers // 3 + (k <= routers % 3)
            key = f"x7 {norm} {k}"
            slopes, bias = normal(seed, f"{key} rows", m, experts, width), normal(seed, f"{key} bias", m, experts)
            x = normal(seed, f"{key} x", m, width)
            logits = torch.einsum("med,md->me", slopes, x) + bias
            index = top_k(logits[:, None], k).index[:, 0]
            radius = routing_radius(logits, slopes, index, norm)
            pairs = _towards(slopes, norm).flatten(1, 2)
            free = normal(seed, f"{key} tries", m, tries, width)
            free = free.sign() if norm == "linf" else unit(free)
            reach = radius[:, None, None]
            near = torch.cat([0.999 * reach * pairs, 0.999 * reach * free], 1)
            inside += int(flips(slopes, bias, x, near, k).any(1).sum())
            outside += int((~flips(slopes, bias, x, 1.001 * reach * pairs, k).any(1)).sum())
            radii_here.append(radius)
        radii[norm] = torch.cat(radii_here)
        rows += [
            Comparison(f"{norm}: routes moved at 0.999 r, of {routers}", "equal", float(inside), 0.0, published=0.0),
            Comparison(
                f"{norm}: routes not moved at 1.001 r, of {routers}", "equal", float(outside), 0.0, published=0.0
            ),
        ]
    rows += _kmeans(seed, experts, width)
    ordered = {norm: values.sort().values.tolist() for norm, values in radii.items()}
    curves = tuple(
        ChartLine(norm, tuple((r, (at + 1) / len(values)) for at, r in enumerate(values)), "line")
        for norm, values in ordered.items()
    )
    chart = Chart("Random linear routers, d=10", "routing radius", "share of inputs within", curves, log_x=True)
    says = "The radius of a linear router is exact: nothing moves the chosen set below it, and something does above."
    return Experiment("X7", "the routing radius", tuple(rows), says, seed, charts=(chart,))


def _kmeans(seed: int, experts: int, width: int, points: int = 50) -> list[Comparison]:
    """Nearest-centre routing as a linear router with bias -|c|^2 / 2."""
    centres = 4 * normal(seed, "x7 centres", experts, width)
    spread = 0.5
    step = normal(seed, "x7 points", experts, points, width)
    x = centres[:, None] + spread * unit(step)
    x = x.flatten(0, 1)
    own = torch.arange(experts).repeat_interleave(points)
    logits = x @ centres.T - 0.5 * centres.square().sum(1)
    radius = routing_radius(logits, centres, own[:, None], "l2")
    square = torch.cdist(x, centres).square()
    gap = square - square.gather(1, own[:, None])
    apart = torch.cdist(centres, centres)
    form = (gap / (2 * apart[own])).masked_fill(torch.eye(experts, dtype=torch.bool)[own], math.inf).amin(1)
    low = float((apart + torch.eye(experts) * 1e9).min()) / 2 - spread
    return [
        Comparison("k-means: worst difference of r to the distances' form", "equal",
                   float((radius - form).abs().max()), 0.0, tolerance=1e-10),
        Comparison("k-means: least r, against separation / 2 - cluster radius", "at least", float(radius.min()), low),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ X8


@dataclass(frozen=True)
class Clusters:
    """The construction of LIP-7: E clusters, each with d coordinates of its own and a centre among the E of the router,
    at distance ``apart`` from every other. Cluster i's label is the sign of its teacher w_i (norm 1) on its own
    coordinates. ``x`` (n, E d + E), ``y`` (n) of +-1, ``own`` (n), ``teachers`` (E, E d + E), ``centres`` likewise.
    """

    x: Tensor
    y: Tensor
    own: Tensor
    teachers: Tensor
    centres: Tensor
    apart: float

    def outputs(self, x: Tensor) -> Tensor:
        """All experts: (m, e)."""
        return x @ self.teachers.T

    def logits(self, x: Tensor) -> Tensor:
        """The router: nearest centre, as a linear router."""
        return x @ self.centres.T - 0.5 * self.centres.square().sum(1)

    def moe(self, x: Tensor) -> Tensor:
        """The top-1 MoE."""
        return (gates(self.logits(x), "hard", 1) * self.outputs(x)).sum(1)

    def dense(self, x: Tensor) -> Tensor:
        """The dense model: the sum of all teachers."""
        return x @ self.teachers.sum(0)


def clusters(seed: int, apart: float, n: int, experts: int = 16, width: int = 8) -> Clusters:
    """n points, cluster by cluster in turn; own coordinates standard normal."""
    own = torch.arange(n) % experts
    teachers = torch.zeros(experts, experts, width, dtype=torch.float64)
    teachers[torch.arange(experts), torch.arange(experts)] = unit(normal(seed, "x8 teachers", experts, width))
    blocks = torch.zeros(n, experts, width, dtype=torch.float64)
    blocks[torch.arange(n), own] = normal(seed, "x8 x", n, width)
    none = torch.zeros(experts, experts, dtype=torch.float64)
    places = torch.eye(experts, dtype=torch.float64) * apart / math.sqrt(2)
    x = torch.cat([blocks.flatten(1), places[own]], 1)
    given = torch.cat([teachers.flatten(1), none], 1)
    centres = torch.cat([torch.zeros_like(teachers).flatten(1), places], 1)
    y = torch.where((x @ given.T).gather(1, own[:, None])[:, 0] < 0, -1.0, 1.0).double()
    return Clusters(x, y, own, given, centres, apart)


def nearest_wrong(made: Clusters, slack: float = 1e-9, sweeps: int = 60) -> Tensor:
    """(n, d): for each point the nearest one at which the top-1 MoE is wrong, by search: for every expert j the nearest
    point of "the router prefers j to all, and j is wrong" (a quadratic program, solved by Hildreth's dual ascent), and
    the nearest of all that is truly wrong. Knows nothing of LIP-7: any linear router and experts would do.
    """
    best, size = made.x.clone(), torch.full((len(made.x),), math.inf, dtype=made.x.dtype)
    for j in range(len(made.teachers)):
        others = torch.arange(len(made.teachers)) != j
        routes = made.centres[others] - made.centres[j]
        limits = 0.5 * (made.centres[others].square().sum(1) - made.centres[j].square().sum()) - slack
        for label in (-1.0, 1.0):
            mine = made.y == label
            if not mine.any():
                continue
            walls = torch.cat([routes, label * made.teachers[j : j + 1]])
            candidate = _project(made.x[mine], walls, torch.cat([limits, limits.new_tensor([-slack])]), sweeps)
            wrong = made.moe(candidate) * label < 0
            length = torch.where(wrong, (candidate - made.x[mine]).norm(dim=1), math.inf)
            better = length < size[mine]
            best[mine] = torch.where(better[:, None], candidate, best[mine])
            size[mine] = torch.minimum(size[mine], length)
    return best


def _project(x: Tensor, walls: Tensor, limits: Tensor, sweeps: int) -> Tensor:
    """The nearest point to each x with walls z <= limits."""
    gram = walls @ walls.T
    excess = x @ walls.T - limits
    force = torch.zeros_like(excess)
    for _ in range(sweeps):
        before = force.clone()
        for c in range(len(walls)):
            force[:, c] = (force[:, c] + (excess[:, c] - force @ gram[c]) / gram[c, c]).clamp(min=0.0)
        if float((before - force).abs().max()) < 1e-13:
            break
    return x - force @ walls


def breaks_within(made: Clusters, seed: int, radius: Tensor, points: int, tries: int = 20) -> int:
    """How many of the first ``points`` the MoE gets wrong somewhere strictly within their ``radius`` (n): at 0.999 of
    it, at random and between the way to each other centre and the way downhill, of the own expert and of that one.
    """
    made = replace(made, x=made.x[:points], y=made.y[:points], own=made.own[:points])
    radius = radius[:points]
    n, d = made.x.shape
    broken = torch.zeros(n, dtype=torch.bool)
    downhill = -made.y[:, None] * made.teachers[made.own]
    for j in range(len(made.centres)):
        across = unit(made.centres[j] - made.centres[made.own] + 1e-300)
        flip = -made.y[:, None] * made.teachers[j]
        for angle in torch.linspace(0, math.pi / 2, 5).tolist():
            for way in (downhill, flip):
                step = unit(math.cos(angle) * across + math.sin(angle) * way)
                broken |= made.moe(made.x + 0.999 * radius[:, None] * step) * made.y < 0
    for attempt in range(tries):
        step = unit(normal(seed, f"x8 try {attempt}", n, d))
        broken |= made.moe(made.x + 0.999 * radius[:, None] * step) * made.y < 0
    return int(broken.sum())


X8_PUBLISHED = {
    (1.0, 0.05): (0.839, 0.960),
    (1.0, 0.1): (0.692, 0.921),
    (1.0, 0.2): (0.424, 0.839),
    (1.0, 0.4): (0.101, 0.692),
    (1.0, 0.6): (0.016, 0.000),
    (0.25, 0.2): (0.424, 0.000),
}
"""(separation, eps) -> robust accuracy of the dense model and of the MoE."""


def x8(seed: int = 0, separations: Sequence[float] = (0.25, 1.0, 4.0), n: int = 2000, experts: int = 16) -> Experiment:
    """LIP-7: attacks on the dense model and on the MoE, router included, against the closed forms."""
    rows, charts = [], []
    root = math.sqrt(experts)
    for apart in separations:
        made = clusters(seed, apart, n, experts)
        adversarial = nearest_wrong(made)
        size = (adversarial - made.x).norm(dim=1)
        margin = (made.y * made.outputs(made.x).gather(1, made.own[:, None])[:, 0]).clamp(max=apart / 2)
        rows += [
            Comparison(f"D={apart:g}: search against min(a, D/2), worst of {n}", "equal",
                       float((size - margin).abs().max()), 0.0, tolerance=1e-6),
            Comparison(f"D={apart:g}: broken below that radius, of {min(n, 400)}", "equal",
                       float(breaks_within(made, seed, margin, 400)), 0.0, published=0.0),
        ]  # fmt: skip
        for eps in [eps for at, eps in X8_PUBLISHED if at == apart] or [apart / 4, apart / 2 + 0.01]:
            rows += _accuracies(made, size, eps)
        grid = torch.linspace(0, 0.6 * apart, 61, dtype=torch.float64).tolist()
        curve = [(eps, _dense_accuracy(made, eps), float((size > eps).double().mean())) for eps in grid]
        if 2 * (1 - _cdf(root * apart / 2)) > 0.01:  # the dense model has something left there
            last = max(eps for eps, dense, moe in curve if moe >= dense)
            step = grid[1] - grid[0]
            rows.append(
                Comparison(f"D={apart:g}: largest eps at which the MoE leads", "equal", last, apart / 2, tolerance=step)
            )
        charts.append(_chart(apart, root, curve))
    says = (
        "Up to half the distance D of the routing centres the MoE keeps its factor sqrt(E); beyond it an attacker "
        "changes the route and nothing is left, while the dense model still stands on some inputs."
    )
    return Experiment("X8", f"attacked routes: the crossover (E={experts})", tuple(rows), says, seed,
                      charts=tuple(charts))  # fmt: skip


def _cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _dense_accuracy(made: Clusters, eps: float) -> float:
    """Of the dense model under its best attack, straight along its one weight vector."""
    step = eps * unit(made.teachers.sum(0))
    return float((made.dense(made.x - made.y[:, None] * step) * made.y > 0).double().mean())


def _accuracies(made: Clusters, size: Tensor, eps: float) -> list[Comparison]:
    """Robust accuracy as attacked, against P(|N(0, 1)| > ...), within 4 standard errors (and 2 inputs)."""
    root, n = math.sqrt(len(made.teachers)), len(made.x)
    forms = (2 * (1 - _cdf(root * eps)), 2 * (1 - _cdf(eps)) if eps < made.apart / 2 else 0.0)
    measured = (_dense_accuracy(made, eps), float((size > eps).double().mean()))
    rows = []
    for at, name in enumerate(("dense", "MoE")):
        error = math.sqrt(forms[at] * (1 - forms[at]) / n)
        allowed = 4 * error + 2 / n if forms[at] > 0 else 0.0
        published = X8_PUBLISHED.get((made.apart, eps))
        rows.append(
            Comparison(f"D={made.apart:g}, eps={eps:g}: {name} robust accuracy", "equal", measured[at], forms[at],
                       tolerance=allowed, published=None if published is None else published[at],
                       near=0.0005 + math.sqrt(2) * allowed)
        )  # fmt: skip
    return rows


def _chart(apart: float, root: float, curve: list[tuple[float, float, float]]) -> Chart:
    return Chart(
        f"centres {apart:g} apart",
        "eps (l2)",
        "robust accuracy",
        (
            ChartLine("dense", tuple((eps, dense) for eps, dense, _ in curve)),
            ChartLine("MoE, routes attacked", tuple((eps, moe) for eps, _, moe in curve)),
            ChartLine("P(a > eps sqrt E)", tuple((eps, 2 * (1 - _cdf(root * eps))) for eps, *_ in curve), "dashed"),
            ChartLine("P(min(a, D/2) > eps)",
                  tuple((eps, 2 * (1 - _cdf(eps)) if eps <= apart / 2 else 0.0) for eps, *_ in curve), "dashed"),
        ),
        mark=(apart / 2, "D/2"),
    )  # fmt: skip
