"""AdvMoE's pathway model in real time: beside the dense net, S-Dense, and the same model computed as the released code
does it (all experts, then a mask); inference, and one training step.

python benchmarks/pathway_inference.py [--threads 1] [--repeats 20] [--batch 128 1] [--experts 2 4 8] [--width 64]

All are ResNet-18 (``--width 64``) at ratio 0.5 with the paper's ResNet-20 router, random weights, the router's head set
so that every expert gets about the same share of the images. Everything is timed in turn in one process, in another
order every round, so that a busy machine slows all alike; medians, and half the distance between the quartiles as the
spread. ``--clock cpu`` counts the process's own CPU seconds instead of the wall's (for one thread on a busy machine).

"all experts" is written here: the routed convolutions with all filters of all experts on every image, times the mask,
then the chosen channels; the same weights, the same logits (checked). Its training step makes the passes of the
released code (10 of the model, 16 of the router, as `released_step` lists them), with the KL in log space.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, Bf16, kl, linf
from robustmoe.attacks.base import evaluating
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import PathwayModel, RoutedModel, build_model
from robustmoe.models.convolution import RoutedConv, Segments
from robustmoe.models.pathway import decide
from robustmoe.noise import Noise
from robustmoe.routing import Tape
from robustmoe.training import advmoe, train_step
from robustmoe.training.phases import Method, MiniBatch

SHAPE, CLASSES = (3, 32, 32), 10
EPS, STEP, ALPHA, BETA = 8 / 255, 5 / 255, 6.0, 6.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# ------------------------------------------------------------------------------------------------ all experts


class Mask(Segments):
    """(n, e) in the place of a weight an image: what `AllExperts` reads."""


class AllExperts(nn.Module):
    """A `RoutedConv` as the released code computes it: all filters on every image, masked, then compacted."""

    def __init__(self, conv: RoutedConv) -> None:
        super().__init__()
        one = conv.experts[0]
        assert isinstance(one, nn.Conv2d)
        self.stride, self.padding, self.experts = one.stride, one.padding, len(conv.experts)
        filters = torch.cat([p.detach() for p in conv.experts.parameters()])  # no biases
        self.weight = nn.Parameter(filters.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        mask = segments.weight
        out = F.conv2d(x, self.weight, None, self.stride, self.padding).unflatten(1, (self.experts, -1))
        out = out * mask[:, :, None, None, None]
        return out[mask.detach() > 0.5].contiguous(memory_format=torch.channels_last)


class ComputeAll(RoutedModel):
    """A copy of a pathway model whose routed convolutions are `AllExperts`."""

    def __init__(self, model: PathwayModel) -> None:
        super().__init__()
        made = copy.deepcopy(model)
        self.normalise, self.router, self.network = made.normalise, made.router, made.network
        for parent in list(self.network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RoutedConv):
                    setattr(parent, name, AllExperts(child))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = self.normalise(x).contiguous(memory_format=torch.channels_last)
        routing = tape("router", decide(self.router, x))
        mask = torch.zeros_like(routing.logits[:, 0]).scatter(1, routing.index[:, 0], routing.weight[:, 0])
        return self.network(x, Mask([], mask))

    def scores(self, x: Tensor) -> Tensor:
        """The router alone."""
        return self.router(self.normalise(x).contiguous(memory_format=torch.channels_last))


def released_step(
    model: ComputeAll, optimisers: list[torch.optim.Optimizer], x: Tensor, y: Tensor, experts: int
) -> None:
    """One mini-batch of ``train_moe.py``, pass by pass (those without a use too)."""
    model.train()
    scores = model.scores(x)
    model(x)  # for the training accuracy it prints
    x_adv = _released_attack(model, x, scores)
    clean, attacked = model(x), model(x_adv)
    loss = F.cross_entropy(clean, y) + BETA * kl(clean, attacked).mean()
    optimisers[0].zero_grad()
    loss.backward()
    optimisers[0].step()
    x_adv = _released_attack(model, x, scores)
    model(x)
    loss = ALPHA * F.cross_entropy(scores, y % experts) + BETA * kl(scores, model.scores(x_adv)).mean()
    optimisers[1].zero_grad()
    loss.backward()
    optimisers[1].step()


def _released_attack(model: ComputeAll, x: Tensor, scores: Tensor) -> Tensor:
    """Three passes of the model and two more of the router: clean logits, and two steps."""
    with evaluating(model):
        with torch.no_grad():
            clean = model(x)
        x_adv = x + 1e-3 * torch.randn_like(x)
        for _ in range(2):
            x_adv = x_adv.detach().requires_grad_(True)
            loss = kl(clean, model(x_adv)).sum() + kl(scores.detach(), model.scores(x_adv)).sum()
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = (x_adv.detach() + STEP * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return x_adv.detach()


# ------------------------------------------------------------------------------------------------ models and images


def images(n: int) -> Tensor:
    """Noise of differing brightness and contrast, so that a router has something to tell apart."""
    level, contrast = torch.rand(2, n, 3, 1, 1)
    return (level + contrast * (torch.rand(n, *SHAPE) - 0.5)).clamp(0, 1)


def pathway(width: int, experts: int, x: Tensor) -> PathwayModel:
    """In eval mode, BatchNorms used to ``x``, the router's head set so that the experts' loads are nearly equal."""
    model = build_model(f"pathway(resnet18(width={width}), experts={experts})", CLASSES, SHAPE)
    assert isinstance(model, PathwayModel)
    with torch.no_grad():
        model.router.train()
        for _ in range(10):
            model.route(x)
        model.router.eval()
        logits, head = model.route(x)["router"].logits[:, 0], model.router.get_submodule("head")
        assert isinstance(head, nn.Linear)
        mean, scale, bias = logits.mean(0), 1 / logits.std(0), torch.zeros(experts)
        for _ in range(500):
            shares = torch.bincount(((logits - mean) * scale + bias).argmax(1), minlength=experts) / len(x)
            bias -= 0.02 * (experts * shares - 1)
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - mean) * scale + bias)
    return model


@torch.no_grad()
def load(model: PathwayModel, x: Tensor) -> Tensor:
    """Images an expert."""
    return torch.bincount(model.route(x)["router"].index.flatten(), minlength=model.num_experts)


# ------------------------------------------------------------------------------------------------ timing

Jobs = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def measure(jobs: Jobs, repeats: int, clock: Callable[[], float]) -> Times:
    """Seconds of each, in turn, every round in another order; one round before warms up and is dropped."""
    names = list(jobs)
    times: Times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            jobs[name]()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: Times, name: str, *references: str) -> float:
    """The median over the rounds of the time over the references' sum in the same round."""
    return statistics.median(a / sum(b) for a, *b in zip(times[name], *(times[other] for other in references)))


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
    return (high - low) / 2


def table(rows: list[list[str]]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |", flush=True)


# ------------------------------------------------------------------------------------------------ inference


def inference(args: argparse.Namespace, batch: int) -> None:
    """Two tables: plain eval-mode models, and their frozen copies (BatchNorm folded)."""
    x = images(max(batch, 128))
    models: dict[str, RoutedModel] = {
        "dense": build_model(f"resnet18(width={args.width})", CLASSES, SHAPE),
        "S-Dense": build_model(f"slim(resnet18(width={args.width}), ratio=0.5)", CLASSES, SHAPE),
        "router": build_model("resnet20", max(args.experts), SHAPE),
    }
    for experts in args.experts:
        model = pathway(args.width, experts, x)
        models[f"ours, N = {experts}"], models[f"all experts, N = {experts}"] = model, ComputeAll(model).eval()
        off = (models[f"all experts, N = {experts}"](x[:16]) - model(x[:16])).abs().max().item()
        assert off < 1e-4, f"the two ways differ by {off}"
        print(f"N = {experts}: images an expert {load(model, x[:batch]).tolist()}")
    x = x[:batch]
    _inference(models, x, f"plain models in eval mode, batch {batch}", args)
    folded = {name: frozen_copy(model, x[:8]).climbed for name, model in models.items() if "all" not in name}
    _inference(folded, x, f"frozen copies (BatchNorm folded), batch {batch}", args)


def _inference(models: dict[str, RoutedModel], x: Tensor, title: str, args: argparse.Namespace) -> None:
    jobs: Jobs = {name: lambda model=model: model(x) for name, model in models.items()}  # type: ignore[misc]
    with torch.inference_mode():
        times = measure(jobs, args.repeats, CLOCKS[args.clock])
    rows = [["model", "ms an image", "spread", "of dense", "of S-Dense + router"]]
    for name, found in times.items():
        per_image = [1e3 * seconds / len(x) for seconds in found]
        cells = [f"{statistics.median(per_image):.3f}", f"{spread(per_image):.3f}"]
        rows.append(
            [name, *cells, f"{ratio(times, name, 'dense'):.2f}", f"{ratio(times, name, 'S-Dense', 'router'):.2f}"]
        )
    print(f"\n{title}\n")
    table(rows)
    ours = [name for name in times if name.startswith("ours")]
    flat = [ratio(times, name, ours[0]) for name in ours]
    print(
        f"\nours over N, in the same round: the slowest takes {max(flat) / min(flat):.2f} times as long as the fastest"
    )


# ------------------------------------------------------------------------------------------------ one training step


def optimisers(parameters: list[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """The released code's, at a learning rate that leaves the loads alone."""
    return [torch.optim.SGD(moved, 1e-5, momentum=0.9, weight_decay=5e-4) for moved in parameters]


def ours(model: PathwayModel, method: Method, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(model)
    moved = optimisers([list(phase.parameters(model).values()) for phase in method.phases])
    noise = Noise.of(torch.arange(len(x)))
    second = MiniBatch(x, y, noise.fold(1))
    return lambda: train_step(model, method, moved, MiniBatch(x, y, noise), second=second)


def released(model: PathwayModel, x: Tensor, y: Tensor) -> Callable[[], object]:
    made = ComputeAll(model)
    router = list(made.router.parameters())
    moved = optimisers([list(made.network.parameters()), router])
    return lambda: released_step(made, moved, x, y, model.num_experts)


def training(args: argparse.Namespace, experts: int) -> None:
    x, y = images(args.train_batch), torch.randint(CLASSES, (args.train_batch,))
    model = pathway(args.width, experts, x)
    attack = PGD(linf(EPS), steps=2, step_size=STEP, keep="last", start="near")
    jobs = {
        "all experts, released passes": released(model, x, y),
        "ours": ours(model, advmoe(attack, "released"), x, y),
        "ours, attacks in bf16": ours(model, advmoe(Bf16(attack), "released"), x, y),
        "ours, one attack for both": ours(model, advmoe(attack, "released", shared_attack=True), x, y),
        "ours, bilevel (two mini-batches)": ours(model, advmoe(attack, "bilevel"), x, y),
    }
    times = measure(jobs, args.steps, CLOCKS[args.clock])
    print(f"\none training step, N = {experts}, batch {len(x)}, images an expert {load(model, x).tolist()}\n")
    rows = [["step", "seconds", "spread", "times faster"]]
    for name, found in times.items():
        faster = 1 / ratio(times, name, "all experts, released passes")
        rows.append([name, f"{statistics.median(found):.2f}", f"{spread(found):.2f}", f"{faster:.2f}"])
    table(rows)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of inference")
    parser.add_argument("--steps", type=int, default=5, help="rounds of training steps; 0: none")
    parser.add_argument(
        "--batch", type=int, nargs="*", default=[128, 1], help="images, for inference; none: no inference"
    )
    parser.add_argument("--train-batch", type=int, default=128, help="images, for a training step")
    parser.add_argument("--width", type=int, default=64, help="of the dense ResNet-18's first stage")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {cpu_name()}, {args.clock} time, width {args.width}")
    for batch in args.batch:
        inference(args, batch)
    if args.steps:
        for experts in args.experts:
            training(args, experts)


if __name__ == "__main__":
    main()
