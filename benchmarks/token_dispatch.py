"""The ways to send tokens through experts, and one training step of a sparse transformer beside another library's.

python benchmarks/token_dispatch.py [--sizes 2080,192,768 ...] [--experts 8 16 32 64] [--k 1 2] [--repeats 5]

First table: `TokenExperts` on N random tokens of width d, hidden width h, each sent to k of E experts (dropless, loads
nearly equal), forward and backward to the tokens, weights and parameters. "dense" runs every expert on every token; it
is timed up to 8 experts, beyond it only grows. "auto / best" is what ``dispatch="auto"`` takes over the fastest of that
row. Second table: the time at 16, 32 and 64 experts over that at 8, in the same round, with ``auto``: what should be 1
at constant k; "attack" is forward and the gradient of the tokens alone.

The step (``--step-experts``): cross-entropy, backward, AdamW on a ViT of which every second MLP is routed, k = 2, gates
renormalised. `st-moe-pytorch` stands in the same network with the same experts, its second expert always taken (its
threshold is 0), its auxiliary losses computed (as it does) and left out of the loss; without it, ours alone is timed.
"same room" gives each expert room for 2 tokens / E of an image's (its capacity factor 2, our capacity 1); "no
drop" gives it room for all of an image's tokens. Before timing, the logits of the two without drops are compared.

Everything of a table is timed in turn in one process, in another order every round; medians, medians of the ratios
within a round, and half the distance between the quartiles. ``--clock cpu`` (the default) counts the process's CPU
seconds, for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathway_inference import CLOCKS, Jobs, Times, cpu_name, measure, ratio, spread, table
from robustmoe.models import RoutedModel, TokenExperts, TokenMoE, ViTMoEModel, build_model
from robustmoe.models.tokens import Dispatch
from robustmoe.models.vit import MLP
from robustmoe.routing import Routing, Tape

SHAPE, CLASSES = (3, 32, 32), 10
WAYS: tuple[Dispatch, ...] = ("loop", "sorted", "grouped", "dense")
DENSE_UP_TO = 8

# ------------------------------------------------------------------------------------------------ dispatch


class Layer:
    """Experts, and tokens routed to them at random."""

    def __init__(self, tokens: int, width: int, hidden: int, experts: int, k: int) -> None:
        self.experts = TokenExperts(experts, width, hidden)
        self.x = torch.randn(tokens, width, requires_grad=True)
        weight, self.index = torch.softmax(torch.randn(tokens, experts), -1).topk(k)
        self.weight = weight.requires_grad_(True)

    def training(self, way: Dispatch) -> Tensor:
        """Forward, and every gradient; returns the output."""
        out = self.experts(self.x, self.index, self.weight, dispatch=way)
        torch.autograd.grad(out.square().sum(), [self.x, self.weight, *self.experts.parameters()])
        return out.detach()

    def attack(self, way: Dispatch) -> None:
        """Forward, and the gradient of the tokens, parameters without one."""
        self.experts.requires_grad_(False)
        out = self.experts(self.x, self.index, self.weight.detach(), dispatch=way)
        torch.autograd.grad(out.square().sum(), self.x)
        self.experts.requires_grad_(True)

    def auto(self) -> Dispatch:
        return self.experts._fastest(self.x, self.index, None)


def dispatching(args: argparse.Namespace) -> None:
    rows = [["N, d, h", "k", "E", *(f"{way}, ms" for way in WAYS), "spread", "auto", "auto / best"]]
    flat = [["N, d, h", "k", "pass", *(f"E = {experts}" for experts in args.experts), "spread"]]
    for size in args.sizes:
        for k in args.k:
            times = one_size(args, size, k)
            rows += [_row(args, times, size, k, experts) for experts in args.experts]
            flat += [_flat(args, times, size, k, kind) for kind in ("auto", "attack")]
    print("\nforward and all gradients\n")
    table(rows)
    print(f"\ntime over that at E = {args.experts[0]}, `auto`; N k / E tokens an expert\n")
    table(flat)


def one_size(args: argparse.Namespace, size: tuple[int, int, int], k: int) -> Times:
    """Every way and number of experts in turn, in one process."""
    jobs: Jobs = {}
    for experts in args.experts:
        layer = Layer(*size, experts, k)
        ways = [way for way in WAYS if way != "dense" or experts <= DENSE_UP_TO]
        outputs = [layer.training(way) for way in ways]
        off = max((other - outputs[0]).abs().max().item() for other in outputs)
        assert off < 1e-4, f"the ways differ by {off}"
        for way in (*ways, "auto"):
            jobs[f"{way} {experts}"] = lambda layer=layer, way=way: layer.training(way)  # type: ignore[misc]
        jobs[f"attack {experts}"] = lambda layer=layer: layer.attack("auto")  # type: ignore[misc]
    return measure(jobs, args.repeats, CLOCKS[args.clock])


def _row(args: argparse.Namespace, times: Times, size: tuple[int, int, int], k: int, experts: int) -> list[str]:
    found = {way: times[f"{way} {experts}"] for way in WAYS if f"{way} {experts}" in times}
    cells = [f"{1e3 * statistics.median(found[way]):.1f}" if way in found else "" for way in WAYS]
    best = min(found, key=lambda way: statistics.median(found[way]))
    picked = Layer(size[0], size[1], size[2], experts, k).auto()
    most = max(spread(values) / statistics.median(values) for values in found.values())
    over = ratio(times, f"auto {experts}", f"{best} {experts}")
    return [
        ", ".join(map(str, size)),
        str(k),
        str(experts),
        *cells,
        f"{100 * most:.0f} %",
        picked,
        f"{over:.2f} ({best})",
    ]


def _flat(args: argparse.Namespace, times: Times, size: tuple[int, int, int], k: int, kind: str) -> list[str]:
    first = f"{kind} {args.experts[0]}"
    ratios = [f"{ratio(times, f'{kind} {experts}', first):.2f}" for experts in args.experts]
    name = {"auto": "training", "attack": "attack"}[kind]
    return [", ".join(map(str, size)), str(k), name, *ratios, f"{100 * spread(times[first]) / min(times[first]):.0f} %"]


# ------------------------------------------------------------------------------------------------ one training step


class Theirs(nn.Module):
    """st-moe-pytorch's layer in the place of a `TokenMoE`, with copies of its router and experts."""

    def __init__(self, own: TokenMoE, room: float) -> None:
        super().__init__()
        from st_moe_pytorch import MoE  # type: ignore[import-not-found]

        experts = []
        for i in range(own.experts.num):
            width, hidden = own.experts.w1.shape[1:]
            mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            tensors = (own.experts.w1[i].T, own.experts.b1[i], own.experts.w2[i].T, own.experts.b2[i])
            mlp.load_state_dict(dict(zip(mlp.state_dict(), tensors, strict=True)))
            experts.append(mlp)
        self.moe = MoE(
            own.experts.w1.shape[1],
            own.experts.num,
            experts=nn.ModuleList(experts),
            threshold_train=0.0,
            capacity_factor_train=room,
        )
        self.moe.gate.to_gates.load_state_dict(own.router.state_dict())

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return self.moe(x).outputs


class Peer(RoutedModel):
    """A copy of our model with `Theirs`; it says no routes."""

    def __init__(self, model: ViTMoEModel, room: float) -> None:
        super().__init__()
        made = copy.deepcopy(model)
        self.normalise, self.network = made.normalise, made.network
        for block in self.network.blocks:
            if isinstance(block.mlp, TokenMoE):
                block.mlp = Theirs(block.mlp, room)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return self.network(self.normalise(x))


def ours(args: argparse.Namespace, experts: int, **given: object) -> ViTMoEModel:
    fields = {"patch": 4, "width": args.step_width, "depth": args.step_depth, "heads": 3, "experts": experts, "k": 2}
    fields |= {"placement": "every_2", "gating": "renormalised", **given}
    model = build_model(f"vit_moe({', '.join(f'{name}={value}' for name, value in fields.items())})", CLASSES, SHAPE)
    assert isinstance(model, ViTMoEModel)
    return model


def step(model: RoutedModel, x: Tensor, y: Tensor) -> Callable[[], object]:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5)

    def run() -> None:
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


@torch.no_grad()
def compare(model: ViTMoEModel, x: Tensor) -> float:
    """How far the two libraries' logits are apart where no token is dropped."""
    peer = Peer(model, room=float(model.layers().popitem()[1].experts.num)).train()
    off = float((peer(x) - model(x)).abs().max() / model(x).abs().max())
    assert off < 1e-4, f"the two differ by {off}"
    return off


def dropped(model: RoutedModel, x: Tensor) -> float:
    """The share of pairs without room, in per cent."""
    trace: dict[str, Routing] = model.run(x).trace
    return 100 * statistics.mean(float((routing.weight == 0).float().mean()) for routing in trace.values())


def training(args: argparse.Namespace, experts: int) -> None:
    x, y = torch.rand(args.step_batch, *SHAPE), torch.randint(CLASSES, (args.step_batch,))
    dropless = ours(args, experts)
    same = ours(args, experts, capacity=1.0)
    jobs: Jobs = {"ours, no drop": step(copy.deepcopy(dropless), x, y), "ours, same room": step(same, x, y)}
    jobs["dense twin (mlp_ratio=8 in the routed blocks)"] = step(twin(dropless), x, y)
    print(f"\none training step, E = {experts}, k = 2, {args.step_batch} images of {1 + 8 * 8} tokens, ", end="")
    print(
        f"width {args.step_width}, {args.step_depth} blocks; at the same room {dropped(same, x):.0f} % dropped", end=""
    )
    if importlib.util.find_spec("st_moe_pytorch") is None:
        print("\nst-moe-pytorch is not installed: ours alone\n")
    else:
        print(f"; logits without drops differ by {compare(dropless, x[:4]):.1g} (relative)\n")
        jobs["st-moe-pytorch, same room"] = step(Peer(dropless, 2.0), x, y)
        jobs["st-moe-pytorch, no drop"] = step(Peer(dropless, float(experts)), x, y)
    times = measure(jobs, args.repeats, CLOCKS[args.clock])
    rows = [["step", "ms", "spread", "of ours, no drop", "of ours, same room"]]
    for name, found in times.items():
        ms = [1e3 * seconds for seconds in found]
        over = [f"{ratio(times, name, reference):.2f}" for reference in ("ours, no drop", "ours, same room")]
        rows.append([name, f"{statistics.median(ms):.0f}", f"{spread(ms):.0f}", *over])
    table(rows)


def twin(model: ViTMoEModel) -> RoutedModel:
    """Dense, with MLPs twice as wide where the model is routed: the multiply-adds of k = 2."""
    made = copy.deepcopy(model)
    for block in made.network.blocks:
        if isinstance(block.mlp, TokenMoE):
            width, hidden = block.mlp.experts.w1.shape[1:]
            block.mlp = MLP(width, 2 * hidden)
    return made


def size(text: str) -> tuple[int, int, int]:
    tokens, width, hidden = map(int, text.split(","))
    return tokens, width, hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [(1088, 64, 256), (2080, 192, 768), (8320, 192, 768), (4160, 384, 1536)]
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--sizes", type=size, nargs="*", default=sizes, help="N,d,h; none: no dispatch tables")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--step-experts", type=int, nargs="*", default=[8, 32], help="none: no training step")
    parser.add_argument("--step-batch", type=int, default=32)
    parser.add_argument("--step-width", type=int, default=192)
    parser.add_argument("--step-depth", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {cpu_name()}, {args.clock} time, {args.repeats} rounds"
    )
    if args.sizes:
        dispatching(args)
    for experts in args.step_experts:
        training(args, experts)


if __name__ == "__main__":
    main()
