"""What wrapping costs: a pass, a forced pass and a step of PGD of a wrapped model, as ratios to the bare model's.

python benchmarks/wrap_cost.py [--width 96 --depth 4 --batch 32 --repeats 41]

The models are transformers on 64 tokens of an image, every second MLP a routed layer of four experts, written as other
people write them: a router module that gives (logits, weights, index), a top-k in the layer's own forward, Soft MoE,
and experts that run without gradient at inference. Bare and wrapped take turns within a repeat, in another order each
time; a ratio is the median over repeats, with the lower and the upper quartile. Writes docs/results/wrap_cost.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustmoe as rm
from results import RESULTS, described, write
from robustmoe.routing import detach
from robustmoe.wrapping import WrappedModel

EXPERTS = 4


class Router(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.score(x)
        weight, index = logits.softmax(-1).topk(2, dim=-1)
        return logits, weight / weight.sum(-1, keepdim=True), index


class Mixture(nn.Module):
    """The kinds are "triple": the router is a module; "topk": the layer itself chooses; "off": the experts run without
    gradient in eval mode.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(width, EXPERTS) if kind == "topk" else Router(width)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        if self.kind == "topk":
            weight, index = F.softmax(self.gate(flat), -1).topk(2)
        else:
            _, weight, index = self.gate(flat)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.training or self.kind != "off")):
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                rows, ranks = torch.where(index == number)
                if len(rows):
                    out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, ranks, None])
        return out.view_as(x)


class Slots(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(EXPERTS, 16, width) * width**-0.5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("ntd,esd->ntes", x, self.slots)
        given = torch.einsum("ntd,ntes->ensd", x, logits.softmax(1))
        answers = torch.stack([expert(part) for expert, part in zip(self.experts, given)])
        combine = logits.flatten(2).softmax(-1).unflatten(2, (EXPERTS, -1))
        return torch.einsum("ntes,ensd->ntd", combine, answers)


class Block(nn.Module):
    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attend(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Net(nn.Module):
    """Images (n, 3, 32, 32) as 64 patches."""

    def __init__(self, kind: str, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)

        def mlp(place: int) -> nn.Module:
            if place % 2 == 0:
                return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            return Slots(width) if kind == "slots" else Mixture(width, kind)

        self.blocks = nn.Sequential(*(Block(width, mlp(place)) for place in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """What PGD does in a step: a pass, the gradient of the loss, a move."""
    at = x.clone().requires_grad_(True)
    loss = F.cross_entropy(model(at), torch.zeros(len(x), dtype=torch.long), reduction="sum")
    (x + 0.01 * torch.autograd.grad(loss, at)[0].sign()).clamp(0, 1)


def measured(kind: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Ratios by what is done: median, lower and upper quartile."""
    torch.manual_seed(0)
    model = Net(kind, options.width, options.depth).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.rand(options.batch, 3, 32, 32)
    routed = rm.wrap(model, example=x)
    assert isinstance(routed, WrappedModel)
    trace = detach(routed.run(x).trace)

    def quiet(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    works: dict[str, Callable[[], object]] = {
        "bare pass": quiet(lambda: model(x)),
        "run": quiet(lambda: routed.run(x)),
        "forced": quiet(lambda: routed.run(x, forced=trace)),
        "bare step": lambda: step(model, x),
        "step": lambda: step(routed, x),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(options.repeats + 2):
        order = list(works)
        random.Random(repeat).shuffle(order)
        for name in order:
            start = time.perf_counter()
            works[name]()
            if repeat > 1:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    pairs = {"run": "bare pass", "forced": "bare pass", "step": "bare step"}
    return {name: _quartiles([a / b for a, b in zip(times[name], times[bare])]) for name, bare in pairs.items()}


def _quartiles(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"value": middle, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"width": 96, "depth": 4, "batch": 32, "repeats": 41}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = described("python benchmarks/wrap_cost.py", settings=vars(options), seeds=[0])
    table = {kind: measured(kind, options) for kind in ("triple", "topk", "slots", "off")}
    print(f"{'router':8} {'run / pass':>22} {'forced / pass':>22} {'step / step':>22}")
    for kind, ratios in table.items():
        cells = (f"{ratio['value']:.3f} ({ratio['low']:.2f}-{ratio['high']:.2f})" for ratio in ratios.values())
        print(f"{kind:8} " + " ".join(f"{cell:>22}" for cell in cells))
    write(RESULTS / "wrap_cost.json", about, table)


if __name__ == "__main__":
    main()
