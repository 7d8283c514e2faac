"""PGD-50 at 8/255 on one net: ours on a strict and a fast copy, beside torchattacks and foolbox, in one process.

python benchmarks/pgd.py --net RUN_FOLDER [--data SPEC] --limit 200 --batch 100

Every tool attacks the same images chunk by chunk, in turn, each chunk in another order, so that a busy machine slows
all alike. All take steps of 2/255 from a random start; the exact model judges the images that each gives back, against
the label. Ours lets an image go once it is broken (``keep="first"``); the peers climb on with every image. Making the
copies is part of our time. ``--net digits`` (the default) trains a small CNN on digits first, in seconds: too easy a
net to compare accuracies on, as are untrained ones, which break at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from robustmoe.attacks import PGD, linf
from robustmoe.data import Data, batches, digits
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import Precision, frozen_copy
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.spec import build
from robustmoe.training import load_model, train

EPS, STEP = 8 / 255, 2 / 255

Tool = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, y, index) -> x_adv."""


def ours(model: RoutedModel, precision: Precision, steps: int) -> Tool:
    """PGD on a copy, which is made in the first chunk's time."""
    copies = []

    def attack(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if not copies:
            copies.append(frozen_copy(model, x, precision))
        return PGD(linf(EPS), steps=steps, step_size=STEP, keep="first")(copies[0], x, y, Noise.of(index))

    return attack


def by_torchattacks(model: RoutedModel, steps: int) -> Tool:
    attack = importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=STEP, steps=steps)
    return lambda x, y, index: attack(x, y)


def by_foolbox(model: RoutedModel, steps: int) -> Tool:
    foolbox = importlib.import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return lambda x, y, index: attack(wrapped, x, y, epsilons=EPS)[1]


def digits_net(eps: float) -> RoutedModel:
    """A small network trained on digits against PGD-3 in linf ``eps``."""
    recipe = Recipe(
        model="resnet8(width=16)",
        data="digits",
        method=f"at(pgd(linf({eps}), steps=3, keep=last))",
        schedule="one_cycle",
        epochs=3,
        batch_size=64,
        threads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, folder)
        return load_model(folder)


@torch.no_grad()
def right(model: RoutedModel, x: Tensor, y: Tensor) -> int:
    return int((model(x).argmax(1) == y).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="digits", help="a run folder, or digits")
    parser.add_argument("--data", default="cifar10", help="what the run is tested on, such as cifar10(root='PATH')")
    parser.add_argument("--limit", type=int, default=200, help="images")
    parser.add_argument("--batch", type=int, default=100, help="images a chunk")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # the peers draw from the global generator
    model = digits_net(EPS) if args.net == "digits" else load_model(Path(args.net))
    data: Data = digits() if args.net == "digits" else build(args.data, "data")
    tools = {
        "ours, strict": ours(model, "strict", args.steps),
        "ours, fast": ours(model, "fast", args.steps),
        "torchattacks": by_torchattacks(model, args.steps),
        "foolbox": by_foolbox(model, args.steps),
    }
    seconds, held, clean, done = dict.fromkeys(tools, 0.0), dict.fromkeys(tools, 0), 0, 0
    for turn, batch in enumerate(batches(data.test.head(args.limit), args.batch)):
        x, y, first = batch.x, batch.y, turn % len(tools)
        names = [*tools][first:] + [*tools][:first]
        clean, done = clean + right(model, x, y), done + len(x)
        for name in names:
            start = time.perf_counter()
            x_adv = tools[name](x, y, batch.index)
            seconds[name] += time.perf_counter() - start
            if float((x_adv - x).abs().max()) > EPS * (1 + 1e-5):
                raise AssertionError(f"{name} left the ball")
            held[name] += right(model, x_adv, y)
    print(f"PGD-{args.steps}, linf 8/255, {args.net}, {done} images, batch {args.batch}, threads {args.threads}")
    print(f"clean accuracy {100 * clean / done:.1f} %\n")
    print("| tool | seconds | robust accuracy | torchattacks takes | foolbox takes |\n|---|---|---|---|---|")
    for name, taken in seconds.items():
        ratios = " | ".join(f"{seconds[peer] / taken:.2f} times" for peer in ("torchattacks", "foolbox"))
        print(f"| {name} | {taken:.2f} | {100 * held[name] / done:.1f} % | {ratios} |")


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; this benchmark needs torchattacks and foolbox: run `make crosscheck`")
    except UserError as error:
        sys.exit(str(error))
