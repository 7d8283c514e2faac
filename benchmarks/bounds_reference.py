"""Our bounds of margins against auto_LiRPA's (Xu et al. 2020) on small ReLU networks: IBP, CROWN-IBP and CROWN.

    python benchmarks/bounds_reference.py

Needs auto_LiRPA, which this library does not (https://github.com/Verified-Intelligence/auto_LiRPA). Images are in
[0.3, 0.7], so that the box [0, 1], which ours keep to and theirs do not, plays no part.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe.certification import Ball, Bounded, Bounding
from robustmoe.certification.graph import record

METHODS: dict[Bounding, str] = {"ibp": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN"}


def networks() -> dict[str, nn.Module]:
    """Untrained, weights times 1.5, in float64."""
    conv = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    found: dict[str, nn.Module] = {
        "3 x 32 units": nn.Sequential(
            nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        ),
        "conv_small": nn.Sequential(*conv, nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)),
        "BatchNorm and pooling": nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
        ),
    }  # fmt: skip
    with torch.no_grad():
        for network in found.values():
            network.double().eval()
            for weight in network.parameters():
                weight *= 1.5
    return found


def theirs(lirpa: Any, network: nn.Module, ball: Ball, rows: Tensor, method: str) -> Tensor:
    """(n, s) lower bounds by auto_LiRPA."""
    norm = float("inf") if ball.norm == "linf" else 2.0
    bounded = lirpa.BoundedModule(network, torch.empty_like(ball.x), verbose=False)
    image = lirpa.BoundedTensor(ball.x, lirpa.PerturbationLpNorm(norm=norm, eps=float(ball.eps[0])))
    lower, _ = bounded.compute_bounds(x=(image,), C=rows.transpose(0, 1).contiguous(), method=method)
    return torch.as_tensor(lower).detach()


@torch.no_grad()
def ours(network: nn.Module, ball: Ball, rows: Tensor, how: Bounding) -> tuple[Tensor, Tensor]:
    """(n, s) what the last linear bounds say alone (with "ibp": the intervals), and what is used."""
    bounded = Bounded(record(network, ball.x), ball, how)
    used = bounded.lower(rows)
    if how == "ibp":
        return used.T, used.T
    slope, offset = bounded.linear(rows)
    return (ball.lowest(slope) + offset).T, used.T


def main() -> int:
    if importlib.util.find_spec("auto_LiRPA") is None:
        print("auto_LiRPA is not installed; see https://github.com/Verified-Intelligence/auto_LiRPA", file=sys.stderr)
        return 1
    import auto_LiRPA as lirpa

    torch.manual_seed(0)
    print("network, norm, eps, method: least and largest of (ours - theirs), mean of theirs, seconds ours / theirs")
    for name, network in networks().items():
        x = 0.3 + 0.4 * torch.rand(8, 3, 8, 8, dtype=torch.float64)
        y = network(x).argmax(1)
        unit = torch.eye(10, dtype=torch.float64)
        rows = unit[y][None] - unit[:, None]
        for norm, sizes in (("linf", (0.004, 0.02, 0.1)), ("l2", (0.1, 0.25))):
            for eps in sizes:
                ball = Ball(x, norm, torch.full((8,), eps, dtype=x.dtype))  # type: ignore[arg-type]
                for how, method in METHODS.items():
                    start = time.perf_counter()
                    alone, used = ours(network, ball, rows, how)
                    middle = time.perf_counter()
                    reference = theirs(lirpa, network, ball, rows, method)
                    end = time.perf_counter()
                    gap, more = alone - reference, used - reference
                    print(
                        f"{name}, {norm}, {eps}, {method}: linear alone {gap.min():.1e} to {gap.max():.1e}, as used "
                        f"{more.min():.1e} to {more.max():.1e}, mean {reference.mean():.3f}, "
                        f"{middle - start:.2f} / {end - middle:.2f} s"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
