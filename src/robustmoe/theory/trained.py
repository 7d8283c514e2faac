"""X9: a soft MoE that is trained on the data of LIP-1 does not find the gain of LIP-1: its router takes it back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustmoe.lipschitz import gates, popoviciu_bound, router_terms
from robustmoe.records.theory import Chart, ChartLine, Comparison, Experiment
from robustmoe.theory.draws import normal, unit


def _data(seed: int, experts: int, points: int, width: int, centre: float) -> tuple[Tensor, Tensor]:
    """x (e n, e width + e), y (e n): cluster i is normal in coordinates of its own, with the label of a teacher of norm
    1, and stands at ``centre`` on a further axis of its own.
    """
    at = torch.arange(experts)
    own = normal(seed, "x9 x", experts, points, width)
    y = torch.einsum("end,ed->en", own, unit(normal(seed, "x9 teachers", experts, width)))
    blocks = torch.zeros(experts, points, experts, width, dtype=own.dtype)
    blocks[at, :, at] = own
    place = centre * torch.eye(experts, dtype=own.dtype)[:, None].expand(-1, points, -1)
    return torch.cat([blocks.flatten(2), place], -1).flatten(0, 1), y.flatten()


def train(x: Tensor, y: Tensor, experts: int, decay: Tensor, steps: int, lr: float, seed: int) -> tuple[Tensor, Tensor]:
    """Adam on the mean squared error of s soft MoEs at once, x (s, n, d), y (s, n): the experts' and the router's
    rows (s, e, d). ``decay`` (s): the weight decay of each one's experts; the router has none.
    """
    start = 0.1 * normal(seed, "x9 start", 1, 2, experts, x.shape[2])
    weights, slopes = (part.repeat(len(x), 1, 1).requires_grad_(True) for part in start.unbind(1))
    optimizer = torch.optim.Adam([weights, slopes], lr=lr)
    for _ in range(steps):
        p = torch.softmax(torch.bmm(x, slopes.mT), -1)
        error = (p * torch.bmm(x, weights.mT)).sum(-1) - y
        # Adam treats every number apart, so the sum trains each model as if it were alone.
        loss = error.square().mean(1).sum() + 0.5 * (decay * weights.square().sum((1, 2))).sum()
        weights.grad, slopes.grad = torch.autograd.grad(loss, [weights, slopes])
        optimizer.step()
    return weights.detach(), slopes.detach()


class Parts:
    """The norms (n) of LIP-3's parts at every input of one trained MoE, with their bound, and the mean squared
    error."""

    def __init__(self, x: Tensor, y: Tensor, weights: Tensor, slopes: Tensor) -> None:
        logits, outputs = x @ slopes.T, (x @ weights.T)[..., None]
        p = gates(logits, "soft")
        rows = slopes.expand(len(x), -1, -1)
        expert, router = p @ weights, router_terms(logits, outputs, rows, "soft")[0][:, 0]
        self.expert, self.router, self.total = expert.norm(dim=1), router.norm(dim=1), (expert + router).norm(dim=1)
        self.bound = p @ weights.norm(dim=1) + popoviciu_bound(p, outputs, rows).diameters
        self.sharp = float(p.amax(1).mean())
        self.error = float(((p * outputs[..., 0]).sum(1) - y).square().mean())


X9_PUBLISHED = {"expert": (1.04, 2.58), "total": (5.15, 3.33), "sharp": (0.60, None)}
"""With decay and without, of one seed."""


def x9(
    seed: int = 0, experts: int = 16, seeds: int = 3, steps: int = 1000, points: int = 8, width: int = 4
) -> Experiment:
    """The clusters of LIP-1 with centres to route by, and a soft MoE trained on them with Adam."""
    root = math.sqrt(experts)
    made = [_data(seed * 100 + number, experts, points, width, centre=2.0) for number in range(seeds)]
    x, y = (torch.stack(parts * 2) for parts in zip(*made))
    decay = torch.tensor([1e-3] * seeds + [0.0] * seeds, dtype=x.dtype)
    weights, slopes = train(x, y, experts, decay, steps, lr=0.02, seed=seed)
    trained = [Parts(*seed_parts) for seed_parts in zip(x, y, weights, slopes)]
    dense = max(float(minimum_norm_of_all(*data).norm()) for data in made)
    rows = [Comparison("dense, shortest interpolant", "equal", dense, root, tolerance=1e-6, published=4.00, near=0.005)]
    for name, parts, at in (("decay", trained[:seeds], 0), ("no decay", trained[seeds:], 1)):
        rows += _rows(name, parts, at, root)
    charts = tuple(
        _chart(f"{name}, first seed", trained[at * seeds], root) for at, name in enumerate(("decay 1e-3", "no decay"))
    )
    worst = [_mean([float(p.total.max()) for p in trained[at : at + seeds]]) for at in (0, seeds)]
    says = (
        f"Weight decay makes the experts specialists, and the router takes the gain back: the worst input's slope is "
        f"{worst[0]:.2f} (decay) and {worst[1]:.2f} (none), where the dense model has {root:.2f} and given routes 1. "
        "The sqrt(E) gain is a property of routing and data, not of training an MoE."
    )
    return Experiment("X9", f"a trained soft MoE (E={experts}, {seeds} seeds)", tuple(rows), says, seed, charts=charts)


def minimum_norm_of_all(x: Tensor, y: Tensor) -> Tensor:
    """The shortest w with x w = y where x has more rows than rank: the pseudo-inverse's."""
    solution: Tensor = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    return solution


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rows(name: str, trained: list[Parts], at: int, root: float) -> list[Comparison]:
    """What is expected of the models with decay (at 0) or without (1)."""
    expert, total = (_mean([float(getattr(p, part).max()) for p in trained]) for part in ("expert", "total"))
    lead = min(float(p.router[p.total.argmax()] / p.expert[p.total.argmax()]) for p in trained)
    published = {key: values[at] for key, values in X9_PUBLISHED.items()}
    rows = [
        Comparison(f"{name}: mean squared error, worst seed", "at most", max(p.error for p in trained), 1e-3),
        Comparison(f"{name}: slope / bound of LIP-3, any input", "at most",
                   max(float((p.total / p.bound).max()) for p in trained), 1.0, tolerance=1e-9),
        Comparison(f"{name}: expert term, worst input, mean of seeds", "at most", expert, root,
                   published=published["expert"], near=None),
        Comparison(f"{name}: total, worst input, above given routes, mean of seeds", "at least", total, 1.0,
                   published=published["total"], near=None),
        Comparison(f"{name}: mean largest weight", "measured only", _mean([p.sharp for p in trained]),
                   published=published["sharp"], near=None),
        Comparison(f"{name}: total, mean over inputs", "measured only",
                   _mean([float(p.total.mean()) for p in trained])),
    ]  # fmt: skip
    if at == 0:
        rows += [
            Comparison("decay: total, worst input, against the dense model's, mean of seeds", "at least", total, root),
            Comparison("decay: router / expert term at the worst input, least of seeds", "at least", lead, 1.0),
        ]
    return rows


def _chart(title: str, parts: Parts, root: float) -> Chart:
    order = parts.total.argsort()
    share = torch.linspace(0, 1, len(order)).tolist()
    router, expert, total = (
        tuple(zip(share, value[order].tolist())) for value in (parts.router, parts.expert, parts.total)
    )
    curves = (
        ChartLine("router term", router, "dots"),
        ChartLine("expert term", expert, "dots"),
        ChartLine("whole slope", total),
        ChartLine("dense, sqrt(E)", ((0.0, root), (1.0, root)), "dashed"),
        ChartLine("given routes, 1", ((0.0, 1.0), (1.0, 1.0)), "dashed"),
    )
    return Chart(title, "inputs, in the order of their slope", "norm", curves)
