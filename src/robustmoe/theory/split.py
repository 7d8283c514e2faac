"""X4, X5, X6 and X10: the Jacobian's two parts, their bound, and the jump at a routing boundary (LIP-3 to LIP-5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustmoe.lipschitz import (
    Gating,
    gates,
    jacobian_split,
    jump,
    paths,
    popoviciu_bound,
    router_terms,
    vjp,
)
from robustmoe.records.theory import Chart, ChartLine, Comparison, Experiment
from robustmoe.theory.draws import Mlps, normal, unit

SMOOTH: tuple[tuple[Gating, int], ...] = (("soft", 1), ("renormalised", 2), ("vmoe", 2))


def layer(
    experts: Callable[[Tensor], Tensor], router: Callable[[Tensor], Tensor], gating: Gating, k: int, temperature: float
) -> Callable[[Tensor], Tensor]:
    """The MoE itself, x (m, d) -> (m, o): what autograd is asked about."""

    def run(x: Tensor) -> Tensor:
        return torch.einsum("me,meo->mo", gates(router(x), gating, k, temperature), experts(x))

    return run


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(m, o, d) by autograd, of a function that treats items apart."""
    blocks = torch.autograd.functional.jacobian(lambda at: function(at).sum(0), x, vectorize=True)
    return blocks.transpose(0, 1)


def _surrogate(experts: Mlps, router: Callable[[Tensor], Tensor], x: Tensor, gating: Gating, k: int) -> list[Tensor]:
    """The Jacobians (m, o, d) of the three paths, row by row."""
    at = x.clone().requires_grad_(True)
    outputs = experts(at)
    three = paths(gates(router(at), gating, k), outputs)
    rows = torch.eye(outputs.shape[2], dtype=x.dtype)
    return [torch.stack([vjp(path, at, row.expand(len(x), -1)) for row in rows], 1) for path in three]


def x4(seed: int = 0, items: int = 16, experts: int = 5, width: int = 7, out: int = 4) -> Experiment:
    """LIP-3 against autograd: MLP experts and an MLP router, so that slopes depend on x."""
    mlps = Mlps(seed, "x4", experts, width, 12, out)
    scores = Mlps(seed, "x4 router", 1, width, 12, experts)
    x = normal(seed, "x4 x", items, width)

    def router(at: Tensor) -> Tensor:
        return 2 * scores(at)[:, 0]

    rows, shares = [], []
    for gating, k in SMOOTH:
        split = jacobian_split(mlps, router, x, gating, k)
        wrong = float((split.total - _jacobian(layer(mlps, router, gating, k, 1.0), x)).abs().max())
        rows.append(
            Comparison(f"{gating}: A + R against autograd, worst", "equal", wrong, 0.0, tolerance=1e-12,
                       published=0.0, near=7e-15)
        )  # fmt: skip
        pairs = zip(_surrogate(mlps, router, x, gating, k), split)
        wrong = max(float((measured - form).abs().max()) for measured, form in pairs)
        rows.append(Comparison(f"{gating}: each part by its path, worst", "equal", wrong, 0.0, tolerance=1e-12))
        norms = [float(torch.linalg.matrix_norm(part, ord=2).mean()) for part in (*split, split.total)]
        shares.append((gating, norms))
    same = Mlps(seed, "x4", experts, width, 12, out).alike()
    for gating, k in SMOOTH:
        split = jacobian_split(same, router, x, gating, k)
        size = float(torch.linalg.matrix_norm(split.router, ord=2).max())
        if gating != "vmoe":
            rows.append(Comparison(f"{gating}, equal experts: router term", "equal", size, 0.0, tolerance=1e-12))
            continue
        form = _mass_norm(same, router, x, k)
        rows += [
            Comparison("vmoe, equal experts: router term, |f| |grad G|", "equal", size, form, tolerance=1e-12),
            Comparison("vmoe, equal experts: router term", "at least", size, 1e-3),
        ]
    bars = tuple(
        ChartLine(name, tuple((float(at), norms[part]) for at, (_, norms) in enumerate(shares)), "dots")
        for part, name in enumerate(("experts, A", "mixing", "gate mass", "whole layer"))
    )
    chart = Chart("Parts of the Jacobian", "0 soft, 1 renormalised, 2 vmoe", "mean spectral norm", bars)
    says = (
        "The split is exact under every gating; with equal experts the router adds nothing, unless the weights are "
        "softmax values that do not add up to 1 (V-MoE)."
    )
    return Experiment("X4", "the Jacobian's split into experts and router", tuple(rows), says, seed, charts=(chart,))


def _mass_norm(same: Mlps, router: Callable[[Tensor], Tensor], x: Tensor, k: int) -> float:
    """max |f| |grad G| where all experts say f, G = softmax values of the chosen, by autograd of G alone."""
    at = x.clone().requires_grad_(True)
    mass = gates(router(at), "vmoe", k).sum(1)
    (slope,) = torch.autograd.grad(mass.sum(), at)
    return float((same(x)[:, 0].norm(dim=1) * slope.norm(dim=1)).max())


def _fixed_point() -> float:
    """u with u tanh u = 1, 1.19968, by bisection."""
    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(middle) < 1 else (low, middle)
    return low


def x5(seed: int = 0, points: int = 200_001) -> Experiment:
    """LIP-4: two experts on a line, logits +-beta x. Constant experts c, -c: f = c tanh(beta x). Experts a x, -a x:
    f = a x tanh(beta x), whose greatest slope is a u, u tanh u = 1, whatever beta.
    """
    rows, curves = [], []
    for name, c, a, beta in (
        ("constant experts, c=1.5, beta=3", 1.5, 0.0, 3.0),
        ("experts +-x, beta=1", 0.0, 1.0, 1.0),
        ("experts +-x, beta=10", 0.0, 1.0, 10.0),
        ("experts +-2.5x, beta=3", 0.0, 2.5, 3.0),
    ):
        x = torch.linspace(-4, 4, points, dtype=torch.float64)[:, None] / beta
        x.requires_grad_(True)
        side = torch.tensor([1.0, -1.0], dtype=x.dtype)
        outputs = (c * side + a * x * side)[..., None]
        f = torch.einsum("me,meo->mo", gates(beta * x * side, "soft"), outputs)
        (slope,) = torch.autograd.grad(f.sum(), x)
        form = c * beta if c else a * _fixed_point()
        published = 4.5 if c else 1.19968 * a
        rows.append(
            Comparison(f"{name}: greatest slope", "equal", float(slope.abs().max()), form, tolerance=1e-6 * form,
                       published=published, near=5e-6 * max(a, 1))
        )  # fmt: skip
        some = slice(None, None, points // 200)
        line = zip((beta * x[some, 0]).tolist(), (slope[some, 0] / form).tolist())
        curves.append(ChartLine(name, tuple(line), "dashed" if beta == 10 else "line"))
    chart = Chart("Slope of two-expert layers", "beta x", "slope / closed form of the greatest", tuple(curves[:3]))
    says = (
        "Experts that disagree at the boundary make the router the whole sensitivity, and a sharper router makes it "
        "worse; experts that agree there can be routed as sharply as one likes."
    )
    return Experiment("X5", "two experts in closed form", tuple(rows), says, seed, charts=(chart,))


JUMPS: tuple[tuple[Gating, int], ...] = (("hard", 1), ("vmoe", 2), ("renormalised", 2))


def x6(
    seed: int = 0, items: int = 64, experts: int = 5, width: int = 8, out: int = 4, step: float = 1e-9
) -> Experiment:
    """LIP-5: linear experts and router, from one side of a tie to the other."""
    linear = normal(seed, "x6 experts", experts, out, width)
    slopes = normal(seed, "x6 router", experts, width)
    rows = []

    def outputs(x: Tensor) -> Tensor:
        return torch.einsum("eod,md->meo", linear, x)

    for gating, k in JUMPS:
        tie, direction = _ties(normal(seed, "x6 x", items, width), slopes, k)
        f = layer(outputs, lambda x: x @ slopes.T, gating, k, 1.0)
        jumps = (f(tie + step * direction) - f(tie - step * direction)).norm(dim=1)
        form = jump(tie @ slopes.T, outputs(tie), gating, k)
        rows += [
            Comparison(f"{gating}, k={k}: jump at one tie", "equal", float(jumps[0]), float(form[0]), tolerance=1e-6),
            Comparison(f"{gating}, k={k}: worst of {len(tie)} ties", "at most", float((jumps - form).abs().max()), 0.0,
                       tolerance=1e-6, published=None if gating == "renormalised" else 0.0, near=1e-6),
        ]  # fmt: skip
    says = "At a boundary a sparse MoE jumps by the weight of the expert that changes times the experts' disagreement."
    return Experiment("X6", "the jump at a routing boundary", tuple(rows), says, seed)


def _ties(x: Tensor, slopes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Points where the k-th and (k+1)-th logit are equal (those x that get there without another expert coming
    between), and the unit direction across.
    """
    order = torch.argsort(x @ slopes.T, dim=1, descending=True)
    across = slopes[order[:, k - 1]] - slopes[order[:, k]]
    gap = (x * across).sum(1, keepdim=True)
    tie = x - gap / across.square().sum(1, keepdim=True) * across
    pair = torch.argsort(tie @ slopes.T, dim=1, descending=True)[:, k - 1 : k + 1].sort(1).values
    kept = (pair == order[:, k - 1 : k + 1].sort(1).values).all(1)
    return tie[kept], unit(across)[kept]


def x10(seed: int = 0, cases: int = 300) -> Experiment:
    """The bounds of LIP-3 on the router term of a soft MoE, random outputs, slopes, weights and temperature."""
    worst = {"pairs": 0.0, "diameters": 0.0}
    points = []
    for case in range(cases):
        key, e = seed * 10_000 + case, 2 + case % 7
        outputs, slopes = normal(key, "x10 f", 1, e, 3), normal(key, "x10 s", 1, e, 4)
        logits, temperature = 2 * normal(key, "x10 logits", 1, e), 0.5 + float(normal(key, "x10 T", 1).abs())
        term = router_terms(logits, outputs, slopes, "soft", temperature=temperature)[0]
        norm = float(torch.linalg.matrix_norm(term, ord=2))
        bound = popoviciu_bound(gates(logits, "soft", temperature=temperature), outputs, slopes, temperature)
        for name, value in zip(worst, bound):
            worst[name] = max(worst[name], norm / float(value))
        points.append((float(e), norm / float(bound.diameters)))
    two = torch.zeros(1, 2, dtype=torch.float64)
    outputs, slopes = normal(seed, "x10 f2", 1, 2, 3), normal(seed, "x10 s2", 1, 2, 4)
    half = torch.linalg.matrix_norm(router_terms(two, outputs, slopes, "soft")[0], ord=2)
    tight = float(half / popoviciu_bound(gates(two, "soft"), outputs, slopes).diameters)
    corners = torch.eye(5, dtype=torch.float64)[None]
    simplex = popoviciu_bound(torch.full((1, 5), 0.2, dtype=torch.float64), corners, corners)
    rows = (
        Comparison(f"||R|| / pair bound, worst of {cases}", "at most", worst["pairs"], 1.0, tolerance=1e-9),
        Comparison(f"||R|| / diameter bound, worst of {cases}", "at most", worst["diameters"], 1.0, tolerance=1e-9,
                   published=0.996, near=0.0041),
        Comparison("two experts at 1/2: ||R|| / diameter bound", "equal", tight, 1.0, tolerance=1e-12, published=1.0,
                   near=1e-9),
        Comparison("5 corners of a simplex: pair / diameter bound, 2(1 - 1/5)", "equal",
                   float(simplex.pairs / simplex.diameters), 1.6, tolerance=1e-12),
    )  # fmt: skip
    chart = Chart("How much of the bound is used", "experts", "||R|| / diameter bound",
                  (ChartLine("random cases", tuple(points), "dots"),))  # fmt: skip
    says = (
        "The router's part is at most (spread of outputs) x (spread of slopes) / 4T, and two even experts meet that. "
        "The sum over pairs is a bound too; from three experts on it may be the larger one."
    )
    return Experiment("X10", "the bound on the router's part", rows, says, seed, charts=(chart,))
