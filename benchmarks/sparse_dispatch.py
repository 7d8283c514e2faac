"""Sparse dispatch against the reference mix: the same outputs, timed in turn in one process on one thread.

`mix_reference` runs all E experts on every image, `mix_sparse` only the chosen one: the ideal ratio is E at k = 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustmoe.models import SmallCNN, mix_reference, mix_sparse


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fastest(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """The least time of each, measured in turn so that a busy machine slows all alike; one round warms up."""
    times = [[seconds(function) for function in functions] for _ in range(rounds + 1)]
    return [min(column) for column in zip(*times[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8], help="numbers of experts")
    parser.add_argument("--batch", type=int, default=256, help="images a batch, 3x32x32")
    parser.add_argument("--width", type=int, default=32, help="width of an expert, a small CNN")
    parser.add_argument("--rounds", type=int, default=11, help="the fastest of this many is taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, weight = torch.rand(args.batch, 3, 32, 32, requires_grad=True), torch.ones(args.batch, 1)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out.sum(), x)

    print("experts  pass              reference ms  sparse ms  ratio")
    for count in args.experts:
        experts = [SmallCNN(args.width).network(10, (3, 32, 32)) for _ in range(count)]
        index = torch.randint(count, (args.batch, 1))
        mixes = [partial(mix, experts, x, index, weight) for mix in (mix_reference, mix_sparse)]
        both = [lambda mix=mix: backward(mix()) for mix in mixes]
        for name, functions in (("forward", mixes), ("forward+backward", both)):
            reference, sparse = fastest(functions, args.rounds)
            print(f"{count:7}  {name:16}  {reference * 1e3:12.1f}  {sparse * 1e3:9.1f}  {reference / sparse:5.2f}")


if __name__ == "__main__":
    main()
