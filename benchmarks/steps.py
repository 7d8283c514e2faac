"""Training steps beside the same steps done another way: time and memory, each in a process of its own.

python benchmarks/steps.py [--rounds 5] [--only affine at_dense] [--file steps_avx2]

The processes take their steps in turn, in another order each round, on one thread; a ratio is the median over rounds
of the other way's CPU time over ours, with the smallest and the largest. Memory: the peak of the process, in MB, of
which torch and python take some 280. Random images and weights. Writes docs/results/steps.json (or the name given by
--file) when all rows are run.

- at_dense, at_pathway: adversarial training, PGD-10, float32. "live": the attack on the network itself, freed memory
  handed back to the system, as it was at first. Ours: the attack folded(...), memory kept, as `robustmoe train` does;
  "in_bf16" is live over folded(bf16(...)).
- affine: one-step adversarial training in bf16 of 64 affine experts. "by_torch": its norms and pooling by torch's own
  operations. "dense": our time over that of the backbone alone, the other way round.
- advmoe_N: AdvMoE's step (bilevel, its two attack steps) of N experts. "all_experts": every expert on every image, the
  others' results thrown away. "in_bf16": the same over ours with the attacks folded(bf16(...)).
- rt_er: four narrow ResNet-18. "loop": each image handed to its expert alone, as the released code does
  (ensemble_step.py); "in_bf16": the loop over ours with the attacks folded(bf16(...)).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from robustmoe import heap
from robustmoe.models import affine, build_model, by_image, pathway
from robustmoe.models.convolution import Segments
from robustmoe.noise import Noise
from robustmoe.routing import Routing
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.optimisation import SGD

if __package__:
    from benchmarks.results import RESULTS, described, write
else:
    from results import RESULTS, described, write


@dataclass(frozen=True)
class Job:
    """One way of a step. ``how``: "", "by_torch", "all_experts" or "loop"; ``keeps``: whether freed memory is kept."""

    model: str
    method: str
    batch: int
    pixels: int = 32
    bf16: bool = False
    how: str = ""
    keeps: bool = True


Row = dict[str, Job]
"""The ways by name; "ours" is what the others are beside."""


def at_row(model: str) -> Row:
    pgd = "pgd(linf(8/255), steps=10, keep=last)"
    ours = Job(model, f"at(folded({pgd}))", 64)
    return {
        "ours": ours,
        "live": replace(ours, method=f"at({pgd})", keeps=False),
        "in_bf16": replace(ours, method=f"at(folded(bf16({pgd})))"),
    }


def affine_row() -> Row:
    method = "at(pgd(linf(8/255), steps=1, step_size=10/255, keep=last))"
    ours = Job("affine(resnet8(width=16), experts=64)", method, 128, bf16=True)
    return {"ours": ours, "by_torch": replace(ours, how="by_torch"), "dense": replace(ours, model="resnet8(width=16)")}


def advmoe_row(experts: int) -> Row:
    pgd = "pgd(linf(8/255), steps=2, step_size=5/255, keep=last, start=near)"
    model = f"pathway(resnet18(width=32), experts={experts}, router=small_cnn, standardise=True)"
    ours = Job(model, f"advmoe(folded({pgd}))", 128, 16)
    return {
        "ours": ours,
        "all_experts": replace(ours, method=f"advmoe({pgd})", how="all_experts"),
        "in_bf16": replace(ours, method=f"advmoe(folded(bf16({pgd})))"),
    }


def rt_er_row() -> Row:
    pgd = "pgd(linf(8/255), steps=10, step_size=2/255, keep=last)"
    ours = Job("ensemble(resnet18(width=16), experts=4, router=linear, gate=hard)", f"rt_er({pgd})", 32)
    return {
        "ours": replace(ours, method=f"rt_er(folded({pgd}))"),
        "loop": replace(ours, how="loop"),
        "in_bf16": replace(ours, method=f"rt_er(folded(bf16({pgd})))"),
    }


ROWS = {
    "affine": affine_row(),
    "at_dense": at_row("resnet8(width=16)"),
    "at_pathway": at_row("pathway(resnet8(width=32), experts=2, router=small_cnn)"),
    **{f"advmoe_{n}": advmoe_row(n) for n in (2, 4, 8)},
    "rt_er": rt_er_row(),
}

# ------------------------------------------------------------------------------------------------ other ways


@dataclass(frozen=True)
class EveryExpert(Segments):
    """A batch in its own order, all of which goes through every expert: ``expert`` (n,) is the one that counts."""

    expert: Tensor

    def through(self, modules: nn.ModuleList, x: Tensor, every: bool = False) -> Tensor:
        out: Tensor = sum(  # type: ignore[assignment]
            module(x) * (self.expert == k)[:, None, None, None].to(x.dtype) for k, module in enumerate(modules)
        )
        return out


def on_all(function: Callable[..., Tensor], x: Tensor, routing: Routing, weight: Tensor, apart: bool) -> Tensor:
    """In the place of `dispatch`."""
    return function(x, EveryExpert([], weight, routing.index[:, 0, 0]))


def context_of(how: str) -> AbstractContextManager[object]:
    if how == "all_experts":
        return mock.patch.object(pathway, "dispatch", on_all)
    if how == "by_torch":
        stack = ExitStack()
        for module in (affine, by_image):
            stack.enter_context(mock.patch.object(module, "quick", return_value=False))
        return stack
    return nullcontext()


def looped(job: Job, x: Tensor, y: Tensor) -> Callable[[], object]:
    from ensemble_step import loop

    given = argparse.Namespace(width=16, experts=4, steps=10)
    return loop(given, x, y, throughout=False)


def stepping(job: Job) -> Callable[[], object]:
    """Returns one step of the job, on random images."""
    torch.manual_seed(0)
    shape = (3, job.pixels, job.pixels)
    x, y = torch.rand(job.batch, *shape), torch.randint(10, (job.batch,))
    if job.how == "loop":
        return looped(job, x, y)
    model, method = build_model(job.model, 10, shape, seed=0), build_method(job.method)
    optimisers = [SGD(1e-3).over(phase.parameters(model)) for phase in method.phases]
    first, second = (
        MiniBatch(images, labels, Noise.of(torch.arange(job.batch), key))
        for key, images, labels in ((0, x, y), (1, x.flip(0), y.flip(0)))
    )
    autocast = torch.bfloat16 if job.bf16 else None
    return lambda: train_step(model, method, optimisers, first, second=second, autocast=autocast)


# ------------------------------------------------------------------------------------------------ processes


def serve(job: Job) -> None:
    """Takes a step for each line that comes in, and says its CPU seconds; in the end the peak in MB."""
    torch.set_num_threads(1)
    if job.keeps:
        heap.keep_freed()
    with context_of(job.how):
        step = stepping(job)
        for _ in sys.stdin:
            start = time.process_time()
            step()
            print(time.process_time() - start, flush=True)
    print(int(next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s).split()[1]) / 1e3)


class Worker:
    """A process that takes the steps of a job when it is told to."""

    def __init__(self, job: Job) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._told()

    def peak(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._told()
        self.process.wait()
        return peak

    def _told(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process of the benchmark died; its error is above")
        return float(line)


def compared(row: Row, rounds: int) -> dict[str, Any]:
    """The ratios of a row; one round warms up."""
    workers, seconds = {name: Worker(job) for name, job in row.items()}, {name: list[float]() for name in row}
    for turn in range(rounds + 1):
        names = [*row]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(workers[name].step())
    peaks = {name: worker.peak() for name, worker in workers.items()}
    numbers: dict[str, Any] = {"seconds": statistics.median(seconds["ours"][1:]), "peak": peaks["ours"]}
    slower = next(name for name in row if name not in ("ours", "in_bf16"))
    for name in row:
        if name != "ours":
            above, below = {"in_bf16": (slower, name), "dense": ("ours", name)}.get(name, (name, "ours"))
            ratios = [a / b for a, b in zip(seconds[above][1:], seconds[below][1:], strict=True)]
            numbers[name] = {"value": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            numbers[f"{name}_seconds"], numbers[f"{name}_peak"] = statistics.median(seconds[name][1:]), peaks[name]
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[], help="some rows; nothing is written")
    parser.add_argument("--file", default="steps", help="the name of the results file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        serve(Job(**json.loads(args.job)))
        return
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    about: dict[str, Any] = {}
    if not args.only:
        about = described("python benchmarks/steps.py", seeds=[0], instructions=capability, rounds=args.rounds)
    numbers: dict[str, Any] = {}
    for name in args.only or ROWS:
        numbers[name] = compared(ROWS[name], args.rounds)
        print(name, json.dumps(numbers[name]), flush=True)
    if not args.only:
        write(RESULTS / f"{args.file}.json", about, numbers)


if __name__ == "__main__":
    main()
