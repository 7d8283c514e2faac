"""X1 to X3: what an MoE gains while its routes are given and no attack can move them (LIP-0 to LIP-2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from robustmoe.lipschitz import block_coherence
from robustmoe.records.theory import Chart, ChartLine, Comparison, Experiment
from robustmoe.theory.draws import normal, signs, unit


def minimum_norm(x: Tensor, y: Tensor) -> Tensor:
    """The shortest w with x w = y: x (..., n, d) of full row rank, y (..., n) or (..., n, o); w (..., d) or
    (..., d, o).
    """
    target = y if y.ndim == x.ndim else y[..., None]
    solution = x.mT @ torch.linalg.solve(x @ x.mT, target)
    return solution if y.ndim == x.ndim else solution[..., 0]


def mirrored(x: Tensor, seed: int) -> Tensor:
    """The same points after a random reflection: clusters that no longer lie along the axes, every product kept."""
    axis = unit(normal(seed, "mirror", 1, x.shape[-1]))[0]
    return x - 2 * (x @ axis)[..., None] * axis


def _clusters(seed: int, experts: int, points: int, width: int) -> Tensor:
    """(e, n, d): each cluster normal, variance 1/width, in coordinates of its own; then all mirrored."""
    own = normal(seed, "blocks", experts, points, width) / math.sqrt(width)
    placed = torch.zeros(experts, points, experts, width, dtype=own.dtype)
    placed[torch.arange(experts), :, torch.arange(experts)] = own
    return mirrored(placed.flatten(2), seed)


def _ratio(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Dense constant over the largest expert's (x (e, n, d), y (e, n)), and the worst error of an interpolant."""
    each = minimum_norm(x, y)
    together = minimum_norm(x.flatten(0, 1), y.flatten())
    wrong = torch.maximum((x @ together - y).abs().max(), ((x * each[:, None]).sum(-1) - y).abs().max())
    return float(together.norm() / each.norm(dim=1).max()), float(wrong)


def _squared_norms(x: Tensor, y: Tensor) -> Tensor:
    """q_i = y_i^T K_ii^-1 y_i of each cluster, by Cholesky: the closed form of |w_i|^2."""
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(x @ x.mT), y[..., None], upper=False)
    return half.square().sum((1, 2))


X1B_PUBLISHED = {2: 1.41421, 8: 2.82843, 32: 5.65685}
X1_PUBLISHED = {1: 1.000, 2: 1.306, 4: 1.702, 8: 2.234, 16: 3.012, 32: 4.049, 64: 5.435}


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def x1(seed: int = 0, experts: Sequence[int] = tuple(X1_PUBLISHED), draws: int = 20, width: int = 32) -> Experiment:
    """Orthogonal clusters, labels +-1, shortest interpolants: the ratio of dense to MoE is sqrt(sum q / max q)."""
    rows, curves, wrong = [], [], 0.0
    for e in experts:
        ratios, expected = [], []
        for draw in range(draws):
            key = seed * 1000 + draw
            x, y = _clusters(key, e, width // 2, width), signs(key, "labels", e, width // 2)
            ratio, error = _ratio(x, y)
            q = _squared_norms(x, y)
            ratios.append(ratio)
            expected.append(float((q.sum() / q.max()).sqrt()))
            wrong = max(wrong, error, abs(ratios[-1] - expected[-1]))
        (mean, deviation), form = _spread(ratios), sum(expected) / draws
        near = max(5e-4, 3 * deviation * math.sqrt(2 / draws))
        rows.append(
            Comparison(f"E={e}: ratio, mean of {draws}", "equal", mean, form, tolerance=1e-8,
                       published=X1_PUBLISHED.get(e), near=near)
        )  # fmt: skip
        curves.append((float(e), mean, form))
    rows.append(Comparison("worst difference or misfit in any draw", "at most", wrong, 0.0, tolerance=1e-8))
    top = max(ratio / math.sqrt(count) for count, ratio, _ in curves)
    rows.append(Comparison("largest mean ratio / sqrt(E)", "at most", top, 1.0, tolerance=1e-9))
    count, ratio, _ = curves[-1]
    says = (
        f"With routes that cannot be attacked and orthogonal clusters, {count:.0f} experts have a constant {ratio:.2f} "
        f"times smaller than the dense model; sqrt(E) = {math.sqrt(count):.2f} is the ceiling, for clusters of equal "
        "norm."
    )
    title = "the sqrt(E) effect: orthogonal clusters"
    return Experiment("X1", title, tuple(rows), says, seed, charts=(_x1_chart(curves),))


def _x1_chart(curves: Sequence[tuple[float, float, float]]) -> Chart:
    return Chart(
        "Orthogonal clusters, fixed routes",
        "experts E",
        "dense constant / MoE constant",
        (
            ChartLine("measured, labels +-1", tuple((e, mean) for e, mean, _ in curves)),
            ChartLine("sqrt(sum q / max q)", tuple((e, form) for e, _, form in curves), "dashed"),
            ChartLine("sqrt(E)", tuple((e, math.sqrt(e)) for e, _, _ in curves), "dashed"),
        ),
        log_x=True,
        log_y=True,
    )


def x1b(seed: int = 0, experts: Sequence[int] = (2, 8, 32), width: int = 32) -> Experiment:
    """As X1, but each cluster has a teacher of norm 1 that its points determine: exactly sqrt(E)."""
    rows = []
    for e in experts:
        x = _clusters(seed, e, width, width)
        teachers = mirrored(torch.block_diag(*unit(normal(seed, "teachers", e, 1, width))), seed)
        y = torch.einsum("end,ed->en", x, teachers)
        ratio, wrong = _ratio(x, y)
        measured = ratio if wrong < 1e-6 else math.nan
        rows.append(
            Comparison(f"E={e}: ratio", "equal", measured, math.sqrt(e), tolerance=1e-6, published=X1B_PUBLISHED.get(e),
                       near=5e-6)
        )  # fmt: skip
    says = "Where every cluster needs the same norm, the gain is sqrt(E) exactly."
    return Experiment("X1b", "exactly sqrt(E): teachers of equal norm", tuple(rows), says, seed)


def x1c(seed: int = 0, experts: int = 8, width: int = 32, out: int = 32, draws: int = 20) -> Experiment:
    """Vector outputs: sqrt(E) if all experts write along one direction, 1 if along orthogonal ones (LIP-1'')."""
    root = math.sqrt(experts)
    x = _clusters(seed, experts, width, width)
    teachers = mirrored(torch.block_diag(*unit(normal(seed, "teachers", experts, 1, width))), seed)
    scalars = torch.einsum("end,ed->en", x, teachers)
    direction = unit(normal(seed, "one", 1, out))

    def ratio(directions: Tensor) -> float:
        y = scalars[..., None] * directions[:, None]
        each, together = minimum_norm(x, y), minimum_norm(x.flatten(0, 1), y.flatten(0, 1))
        norms = [torch.linalg.matrix_norm(w, ord=2) for w in (together, each)]
        return float(norms[0] / norms[1].max())

    random = [unit(normal(seed * 1000 + draw, "directions", experts, out)) for draw in range(draws)]
    ratios = [ratio(directions) for directions in random]
    forms = [float(torch.linalg.eigvalsh(o @ o.T)[-1].sqrt()) for o in random]
    mean, deviation = _spread(ratios)
    rows = (
        Comparison("all along one direction", "equal", ratio(direction.expand(experts, -1)), root, tolerance=1e-6,
                   published=2.828, near=5e-4),
        Comparison("orthogonal directions", "equal", ratio(torch.eye(experts, out, dtype=x.dtype)), 1.0,
                   tolerance=1e-6, published=1.000, near=5e-4),
        Comparison(f"random in R^{out}, mean of {draws}: ||O||", "equal", mean, sum(forms) / draws, tolerance=1e-6,
                   published=1.420, near=3 * deviation),
        Comparison("random directions, any", "between", min(ratios), 1.0, root),
    )  # fmt: skip
    says = "The gain is of margins, which all experts write along one direction; of a full Jacobian it may be nothing."
    return Experiment("X1c", f"vector outputs, E={experts}", rows, says, seed)


X2_PUBLISHED = {64: (1.50, 2.36), 1024: (0.32, 1.91)}
"""dimension -> coherence, ratio."""


def _coherent(key: int, d: int, experts: int, points: int) -> tuple[float, float, float, float, float]:
    """One draw of X2: coherence, ratio, its lower and upper bound, worst misfit of an interpolant."""
    basis = torch.linalg.qr(normal(key, f"subspace {d}", experts, d, 8)).Q
    x = torch.einsum("epk,edk->epd", normal(key, f"points {d}", experts, points, 8), basis)
    y = signs(key, f"labels {d}", experts, points)
    ratio, wrong = _ratio(x, y)
    q = _squared_norms(x, y)
    eta = block_coherence(x.flatten(0, 1), torch.arange(experts).repeat_interleave(points))
    share = float(q.sum() / q.max())
    top = math.sqrt(share / (1 - eta)) if eta < 1 else math.inf
    return eta, ratio, math.sqrt(share / (1 + eta)), top, wrong


def x2(
    seed: int = 0, widths: Sequence[int] = (64, 128, 256, 512, 1024), draws: int = 20, experts: int = 8, points: int = 4
) -> Experiment:
    """Random subspaces of dimension 8: the bounds of LIP-1' by the block coherence, and LIP-0 (never below 1)."""
    rows, curves = [], []
    for d in widths:
        made = [_coherent(seed * 1000 + draw, d, experts, points) for draw in range(draws)]
        outside = sum(not (low - 1e-9 <= r <= top + 1e-9 and wrong < 1e-6) for _, r, low, top, wrong in made)
        rows += [
            Comparison(f"d={d}: outside the bounds, of {draws}", "equal", float(outside), 0.0, published=0.0),
            Comparison(f"d={d}: least ratio (LIP-0)", "at least", min(draw[1] for draw in made), 1.0, tolerance=1e-9),
        ]
        means = [_spread([draw[at] for draw in made]) for at in (0, 1)]
        for name, at in (("coherence eta", 0), ("ratio", 1)):
            if d in X2_PUBLISHED:
                rows.append(
                    Comparison(f"d={d}: mean {name}", "measured only", means[at][0], published=X2_PUBLISHED[d][at],
                               near=0.005 + 3 * means[at][1])
                )  # fmt: skip
        curves.append((float(d), *(sum(draw[at] for draw in made) / draws for at in (1, 2, 3))))
    says = "The bounds of LIP-1' hold at every coherence, and with fixed routes the MoE is never worse."
    title = "clusters that are not orthogonal"
    return Experiment("X2", title, tuple(rows), says, seed, charts=(_x2_chart(curves),))


def _x2_chart(curves: Sequence[tuple[float, ...]]) -> Chart:
    return Chart(
        "Clusters that are not orthogonal",
        "dimension d (8 subspaces of dimension 8)",
        "dense constant / MoE constant",
        (
            ChartLine("measured, mean", tuple((c[0], c[1]) for c in curves)),
            ChartLine("lower bound, mean", tuple((c[0], c[2]) for c in curves), "dashed"),
            ChartLine("upper bound, mean", tuple((c[0], c[3]) for c in curves if math.isfinite(c[3])), "dashed"),
        ),
        log_x=True,
    )


def steepest(x: Tensor, y: Tensor) -> Tensor:
    """McShane: the least constant of any function through the points, max |y - y'| / |x - x'|; x (..., n, d)."""
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    rise = (y[..., :, None] - y[..., None, :]).abs()
    return torch.where(far > 0, rise / far, 0.0).flatten(-2).amax(-1)


def _rods(radius: float, experts: int, points: int, half: float) -> tuple[Tensor, Tensor]:
    """Clusters along one direction v at orthogonal centres of norm ``radius``: y rises along v in every other cluster,
    and falls in the others.
    """
    along = torch.linspace(-half, half, points, dtype=torch.float64).expand(experts, -1)
    centres = radius * torch.eye(experts, dtype=torch.float64)[:, None].expand(-1, points, -1)
    sign = 1.0 - 2.0 * (torch.arange(experts, dtype=torch.float64) % 2)
    return torch.cat([centres, along[..., None]], -1), sign[:, None] * along


def _balls(seed: int, experts: int, points: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of radius 1/2 around 0 (e, n, d), their labels (teacher of norm 1 plus a level of +-3), and the
    directions of their centres (e, d).
    """
    inside = 0.5 * unit(normal(seed, "x3 inside", experts, points, width))
    teachers = unit(normal(seed, "x3 teachers", experts, width))
    y = torch.einsum("epd,ed->ep", inside, teachers) + 3 * signs(seed, "x3 levels", experts, 1)
    return inside, y, unit(normal(seed, "x3 centres", experts, width))


X3_PUBLISHED = {0.5: 11.7, 1.0: 8.1, 2.0: 4.1, 4.0: 1.9, 8.0: 1.05}


def x3(
    seed: int = 0, radii: Sequence[float] = tuple(X3_PUBLISHED), experts: int = 8, points: int = 16, width: int = 16
) -> Experiment:
    """Any interpolant at all (LIP-2): the gain is lost as clusters move apart, since what is steep is within them."""
    half = 4.0
    rods, balls, forms, bounds = [], [], [], []
    inside, levels, towards = _balls(seed, experts, points, width)
    for radius in radii:
        x, y = _rods(radius, experts, points, half)
        rods.append(float(steepest(x.flatten(0, 1), y.flatten()) / steepest(x, y).max()))
        forms.append(max(1.0, math.sqrt(2) * half / radius))
        within = float(steepest(inside, levels).max())
        x = inside + radius * towards[:, None]
        balls.append(float(steepest(x.flatten(0, 1), levels.flatten())) / within)
        between = torch.pdist(radius * towards).min() - 1.0  # two points of two balls are no nearer
        span = float(levels.max() - levels.min())
        bounds.append(max(1.0, span / float(between) / within) if between > 0 else math.inf)
    rows = [
        Comparison(f"rods, centre norm {radius:g}: ratio", "equal", ratio, form, tolerance=1e-9)
        for radius, ratio, form in zip(radii, rods, forms)
    ]
    rows += [
        Comparison(f"balls, centre norm {radius:g}: ratio", "between", ratio, 1.0, bound, 1e-9,
                   published=X3_PUBLISHED.get(radius), near=None)
        for radius, ratio, bound in zip(radii, balls, bounds)
    ]  # fmt: skip
    rise = max(after - before for before, after in pairwise(balls))
    rows.append(Comparison("balls: largest rise of the ratio from one norm to the next", "at most", rise, 0.0))
    chart = Chart(
        "Any interpolant: separation undoes the gain",
        "norm of the clusters' centres",
        "dense constant / MoE constant",
        (
            ChartLine("rods, measured", tuple(zip(radii, rods))),
            ChartLine("rods, max(1, 4 sqrt(2) / norm)", tuple(zip(radii, forms)), "dashed"),
            ChartLine("balls, measured", tuple(zip(radii, balls))),
        ),
        log_x=True,
        log_y=True,
    )
    says = (
        f"Clusters far apart leave nothing to gain: the ratio falls from {balls[0]:.1f} to {balls[-1]:.2f} (balls), "
        f"from {rods[0]:.1f} to {rods[-1]:.2f} (rods). An MoE gains where the steepest pair of points straddles two "
        "clusters, which is where the routed map jumps."
    )
    return Experiment("X3", "the gain vanishes with separation", tuple(rows), says, seed, charts=(chart,))
