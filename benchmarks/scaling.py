"""How the cost grows with the work: images, experts, tokens, radii, certificates, processes.

python benchmarks/scaling.py [--rounds 3] [--only images experts] [--processes] [--write]     # --only alone: no job

CPU time on one thread (of `processes`: wall time of two CPUs, so run it on a quiet machine), the median over rounds in
which all sizes take turns. The networks have fresh weights, and attacks keep the last iterate, so that each pass of
each image is made. The slope is that of the straight line through log time over log size, by least squares: 1 is
linear, less is better. --write: docs/results/scaling.json and docs/scaling.svg; what is not run stays there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from results import RESULTS, described, write
from robustmoe.attacks import linf
from robustmoe.attacks.pgd import PGD
from robustmoe.evaluation import certify, evaluate
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.reporting.figures import Axes, Series, colour, lines
from robustmoe.reporting.page import document
from robustmoe.reporting.standalone import drawings
from robustmoe.spec import build
from robustmoe.training.optimisation import AdamW
from robustmoe.training.phases import MiniBatch, train_step

Work = Callable[[int], Callable[[], Any]]
CHANNELS, CLASSES = 3, 10
ENSEMBLE = "ensemble(conv_small(width=8, hidden=64), experts={}, router=downsampled(linear, size=4), standardise=True)"
TOKENS = "vit_moe(tiny, patch=2, width=48, depth=4, heads=4, experts={}, k=1, placement=every_2)"


def images(n: int, side: int) -> Tensor:
    return torch.rand(n, CHANNELS, side, side, generator=torch.Generator().manual_seed(0))


def model_of(spec: str, side: int) -> RoutedModel:
    torch.manual_seed(0)
    return build_model(spec, CLASSES, (CHANNELS, side, side)).eval()


def labels(model: RoutedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.run(part).logits.argmax(1) for part in x.split(128)])


def attack(model: RoutedModel, x: Tensor, steps: int = 5) -> Callable[[], Any]:
    """PGD that makes each of its passes, on what the model says itself."""
    y, pgd = labels(model, x), PGD(linf(0.01), steps=steps, keep="last")
    return lambda: pgd.perturb(model, x, y, Noise.of(torch.arange(len(x))))


def of_images(n: int) -> Callable[[], Any]:
    """A whole evaluation: checks, rows, no curve."""
    model, x = model_of("resnet8(width=8)", 16), images(n, 16)
    y = labels(model, x)
    pgd = PGD(linf(0.01), steps=10, keep="last")
    return lambda: evaluate(model, x, y, attacks=(pgd,), curve=(), batch_size=100)


def of_radii(n: int) -> Callable[[], Any]:
    """An evaluation with a curve of n radii below the attack's, at which nothing is known beforehand."""
    model, x = model_of("resnet8(width=8)", 16), images(100, 16)
    y = labels(model, x)
    radii = tuple(0.01 * at / (n + 1) for at in range(1, n + 1))
    pgd = PGD(linf(0.01), steps=10, keep="last")
    return lambda: evaluate(model, x, y, attacks=(pgd,), curve=radii, batch_size=100)


def of_experts(n: int) -> Callable[[], Any]:
    """An attack on a hard ensemble of n networks."""
    return attack(model_of(ENSEMBLE.format(n), 16), images(128, 16))


def of_token_experts(n: int) -> Callable[[], Any]:
    """An attack on a transformer with n experts in every second block, one a token."""
    return attack(model_of(TOKENS.format(n), 16), images(16, 16))


def of_trained_experts(n: int) -> Callable[[], Any]:
    """A step of its adversarial training, AdamW."""
    model, x = model_of(TOKENS.format(n), 16), images(16, 16)
    y = labels(model, x)
    method: Any = build("at(pgd(linf(0.01), steps=2, keep=last))", "method")
    optimisers = [AdamW().over(phase.parameters(model)) for phase in method.phases]
    batch = MiniBatch(x, y, Noise.of(torch.arange(len(x))))
    return lambda: train_step(model, method.at(0.0), optimisers, batch)


def of_tokens(n: int) -> Callable[[], Any]:
    """An attack on a transformer of n tokens, whose attention is quadratic in them."""
    side = 2 * math.isqrt(n)
    return attack(model_of(TOKENS.format(8), side), images(16, side))


def of_certificates(n: int) -> Callable[[], Any]:
    """Certificates by bounds of n images."""
    model, x = model_of("conv_small(width=4, hidden=32)", 12), images(n, 12)
    y = labels(model, x)
    certifier: Any = build("bounds(linf(0.001), search=0)", "certifier")
    return lambda: certify(model, x, y, certifiers=(certifier,), batch_size=20)


JOBS: dict[str, tuple[Work, tuple[int, ...]]] = {
    "images": (of_images, (100, 200, 400, 800, 1600)),
    "radii": (of_radii, (1, 2, 4, 8, 16)),
    "experts": (of_experts, (2, 4, 8, 16, 32, 64)),
    "token_experts": (of_token_experts, (2, 4, 8, 16, 32, 64)),
    "trained_token_experts": (of_trained_experts, (2, 4, 8, 16, 32, 64)),
    "tokens": (of_tokens, (16, 36, 64, 144, 256)),
    "certificates": (of_certificates, (20, 40, 80, 160)),
}
NAMES = {
    "images": "evaluate, images",
    "radii": "evaluate, radii of its curve",
    "experts": "PGD on a hard ensemble, experts",
    "token_experts": "PGD on a ViT-MoE, experts",
    "trained_token_experts": "training step of a ViT-MoE, experts",
    "tokens": "PGD on a ViT-MoE, tokens",
    "certificates": "CROWN, images",
}


def measured(job: str, rounds: int) -> dict[int, float]:
    """Median seconds by size; a first round warms up."""
    work, sizes = JOBS[job]
    ready = {size: work(size) for size in sizes}
    took: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
            start = time.process_time()
            ready[size]()
            took[size].append(time.process_time() - start)
    return {size: statistics.median(times[1:]) for size, times in took.items()}


def slope(times: Mapping[int, float]) -> float:
    """Of the line through log seconds over log size, by least squares."""
    return statistics.linear_regression([math.log(n) for n in times], [math.log(t) for t in times.values()]).slope


def of_processes(rounds: int) -> dict[int, float]:
    """Wall seconds of an evaluation of 6,000 images by one and two processes, their start included."""
    took: dict[int, list[float]] = {1: [], 2: []}
    command = [
        "evaluate",
        "zoo:fashion_mnist_dense",
        "--attack",
        "pgd(linf(0.1), steps=100, keep=last)",
        "--curve",
        "none",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for number in took:
                launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
                launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "robustmoe", *command]
                start = time.monotonic()
                out = ["--limit", "6000", "--out", f"{folder}/{turn}-{number}"]
                subprocess.run([*launch, *out], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
                took[number].append(time.monotonic() - start)
    return {number: statistics.median(times) for number, times in took.items()}


def drawn(times: Mapping[str, Mapping[int, float]]) -> str:
    """Every job as a line of its time over that of its smallest size, both axes logarithmic."""
    series = [
        Series(NAMES[job], tuple((n / min(of), t / of[min(of)]) for n, t in of.items()), colour(at))
        for at, (job, of) in enumerate(times.items())
    ]
    linear = Series("linear", ((1.0, 1.0), (32.0, 32.0)), colour(len(series)), dashed=True, dots=False)
    axes = Axes("size, times the smallest", log_x=True, log_y=True)
    note = "Upwards: CPU time, times that of the smallest size."
    figure = lines("How the cost grows", [*series, linear], axes, note=note, size=(640, 360))
    page = document("Scaling", "Scaling", "", f"<section id='scaling'>{figure}</section>", "")
    return drawings(page, [""])[0].svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--processes", action="store_true", help="one and two processes too, by the wall clock")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "scaling.json"
    numbers = json.loads(file.read_text(encoding="utf-8"))["numbers"] if file.is_file() else {}
    for job in args.only:
        times = measured(job, args.rounds)
        numbers[job] = {"slope": slope(times), "seconds": {str(n): t for n, t in times.items()}}
        print(job, numbers[job], flush=True)
    if args.processes:
        both = of_processes(args.rounds)
        numbers["processes"] = {"speedup": both[1] / both[2], "seconds": {str(n): t for n, t in both.items()}}
        print("processes", numbers["processes"])
    if args.write:
        about = described("python benchmarks/scaling.py --processes --write", seeds=[0], spread="medians over rounds")
        write(file, about, numbers)
        times_of = {job: {int(n): t for n, t in numbers[job]["seconds"].items()} for job in JOBS if job in numbers}
        (RESULTS.parent / "scaling.svg").write_text(drawn(times_of), encoding="utf-8")


if __name__ == "__main__":
    main()
