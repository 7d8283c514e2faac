"""One RT-ER training step in time and memory: ours beside a loop that hands each image to its expert alone.

python benchmarks/ensemble_step.py [--threads 1] [--width 64] [--batch 64] [--steps 10] [--repeats 5] [--memory]

The step of ``rt_er(pgd(linf(8/255), steps=10, step_size=2/255, keep=last), beta=6)`` on four ResNet-18 behind a linear
router, hard top-1, 3 x 32 x 32 pixels, random weights, Adam. The loops are written here, from what the released code
does: eval mode throughout (its attack leaves it so), ordinary memory, and besides the step's own passes one clean pass
of the whole, for the accuracy that it prints.

- "loop, as released": the whole calls its experts on one image at a time, in the attack as in the loss; each second
  expert gets its images as one batch, as there.
- "loop throughout": second experts also get one image at a time.
- "ours": `robustmoe.training.train_step`, fp32; BatchNorm in train mode in the losses. "attacks in bf16" is
  `rt_er(bf16(pgd(...)))`. "all bf16" is autocast over the whole step, for both (the released code has fp16 on a GPU).

Steps are timed in turn in one process, in another order every round; medians, half the distance between the quartiles,
and medians of the ratios within a round. Before, the loop's loss is compared with ours, in eval mode and from a clean
start. ``--memory``: the peak of each in a process of its own (VmHWM after two steps, less VmRSS after construction).
``--clock cpu`` counts the process's CPU seconds (for one thread on a busy machine).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pathway_inference import CLASSES, CLOCKS, SHAPE, Jobs, cpu_name, images, measure, ratio, spread, table
from robustmoe.attacks import PGD, Attack, Bf16, Joint, kl, linf
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.pgd import ascend
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import EnsembleModel, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, train_step
from robustmoe.training.rt_er import RTER, rt_er

EPS, STEP, BETA, LR = 8 / 255, 2 / 255, 6.0, 1e-4

# ------------------------------------------------------------------------------------------------ the loop


def one_by_one(model: EnsembleModel, x: Tensor, chosen: Tensor) -> Tensor:
    """Logits of every image by the expert chosen for it, one image a call."""
    x = model.normalise(x)
    return torch.cat([model.experts[k](x[n : n + 1]) for n, k in enumerate(chosen.tolist())])


def ranked(model: EnsembleModel, x: Tensor) -> Tensor:
    """The experts of every image, best first."""
    return model.router(model.normalise(x)).argsort(dim=1, descending=True)


def climb(logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, start: Tensor, steps: int) -> Tensor:
    """Signed steps up the mean cross-entropy; the last iterate."""
    x_adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(x_adv), y), x_adv)
        x_adv = (x_adv.detach() + STEP * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return x_adv.detach()


def loop_loss(model: EnsembleModel, x: Tensor, y: Tensor, start: Tensor, steps: int, throughout: bool) -> Tensor:
    """The loss of `rt_er`, image by image; ``throughout``: on the second experts too."""

    def whole(z: Tensor) -> Tensor:
        return one_by_one(model, z, ranked(model, z)[:, 0])

    second = ranked(model, x)[:, 1]
    loss = F.cross_entropy(whole(climb(whole, x, y, start, steps)), y)
    if throughout:
        groups = [torch.arange(len(x))]
    else:
        groups = [torch.nonzero(second == k)[:, 0] for k in range(len(model.experts))]
    for rows in (rows for rows in groups if len(rows)):

        def alone(z: Tensor, rows: Tensor = rows) -> Tensor:
            own = second[rows]
            return one_by_one(model, z, own) if throughout else model.experts[int(own[0])](model.normalise(z))

        x_adv = climb(alone, x[rows], y[rows], start[rows], steps)
        loss = loss + BETA * kl(alone(x[rows]), alone(x_adv)).sum() / len(x)
    return loss


# ------------------------------------------------------------------------------------------------ the steps


def pgd(steps: int, start: str = "random") -> PGD:
    return PGD(linf(EPS), steps=steps, step_size=STEP, keep="last", start=start)  # type: ignore[arg-type]


def ensemble(args: argparse.Namespace) -> EnsembleModel:
    spec = f"ensemble(resnet18(width={args.width}), experts={args.experts}, router=linear, gate=hard)"
    model = build_model(spec, CLASSES, SHAPE)
    assert isinstance(model, EnsembleModel)
    return model


def loop(args: argparse.Namespace, x: Tensor, y: Tensor, throughout: bool, half: bool = False) -> Callable[[], object]:
    model = ensemble(args).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(model.parameters(), LR)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            clean = one_by_one(model, x, ranked(model, x)[:, 0])
            start = torch.empty_like(x).uniform_(-EPS, EPS)
            loss = loop_loss(model, x, y, start, args.steps, throughout)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        (clean.argmax(1) == y).sum().item()

    return step


def ours(
    args: argparse.Namespace, x: Tensor, y: Tensor, attack: Attack, autocast: torch.dtype | None = None
) -> Callable[[], object]:
    model, method = ensemble(args), rt_er(attack, BETA)
    optimisers = [torch.optim.Adam(phase.parameters(model).values(), LR) for phase in method.phases]
    noise = Noise.of(torch.arange(len(x)))
    return lambda: train_step(model, method, optimisers, MiniBatch(x, y, noise), autocast=autocast)


JOBS: dict[str, Callable[[argparse.Namespace, Tensor, Tensor], Callable[[], object]]] = {
    "loop, as released": lambda args, x, y: loop(args, x, y, throughout=False),
    "loop throughout": lambda args, x, y: loop(args, x, y, throughout=True),
    "ours": lambda args, x, y: ours(args, x, y, pgd(args.steps)),
    "ours, attacks in bf16": lambda args, x, y: ours(args, x, y, Bf16(pgd(args.steps))),
    "loop, as released, all bf16": lambda args, x, y: loop(args, x, y, throughout=False, half=True),
    "loop throughout, all bf16": lambda args, x, y: loop(args, x, y, throughout=True, half=True),
    "ours, all bf16": lambda args, x, y: ours(args, x, y, pgd(args.steps), torch.bfloat16),
}


def compare(args: argparse.Namespace, x: Tensor, y: Tensor) -> None:
    """The two ways compute one loss, on a few images: both in eval mode, two attack steps from the clean image."""
    model = ensemble(args)
    loads = [torch.bincount(ranked(model, x)[:, rank], minlength=args.experts).tolist() for rank in (0, 1)]
    x, y = x[:8], y[:8]
    ours = RTER(pgd(2, "clean"), BETA)(model, x, y, Noise.of(torch.arange(len(x)))).value.item()
    theirs = [loop_loss(model, x, y, torch.zeros_like(x), 2, throughout).item() for throughout in (False, True)]
    assert max(abs(other - ours) for other in theirs) < 1e-3 * ours, f"ours {ours}, the loops {theirs}"
    print(f"images an expert {loads[0]}, as second expert {loads[1]}", end="; ")
    print(f"loss on {len(x)} images: ours {ours:.5f}, the loops' {theirs[0]:.5f} and {theirs[1]:.5f}", flush=True)


# ------------------------------------------------------------------------------------------------ time and memory


def timing(args: argparse.Namespace, x: Tensor, y: Tensor) -> None:
    jobs: Jobs = {name: JOBS[name](args, x, y) for name in args.jobs}
    times = measure(jobs, args.repeats, CLOCKS[args.clock])
    references = [name for name in args.jobs if name.startswith("loop")]
    rows = [["step", "seconds", "spread", *(f"faster than {name}" for name in references)]]
    for name, found in times.items():
        faster = [f"{1 / ratio(times, name, reference):.2f}" for reference in references]
        rows.append([name, f"{statistics.median(found):.2f}", f"{spread(found):.2f}", *faster])
    table(rows)


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in MB. Linux only; ru_maxrss would be the parent's, where
    that one was larger.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def memory_of(args: argparse.Namespace, x: Tensor, y: Tensor) -> None:
    """Of one step, in this process: prints the base and the peak."""
    step = JOBS[args.memory_of](args, x, y)
    base = resident("VmRSS")
    step()
    step()
    print(base, resident("VmHWM"))


def memory(args: argparse.Namespace) -> None:
    rows = [["step", "base, MB", "peak above it, MB"]]
    for name in args.jobs:
        same = [f"--{key}={getattr(args, key)}" for key in ("threads", "width", "batch", "steps", "experts")]
        command = [sys.executable, __file__, *same, f"--memory-of={name}"]
        base, most = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        rows.append([name, f"{base:.0f}", f"{most - base:.0f}"])
    print("\npeak memory, two steps, each in a process of its own\n")
    table(rows)


def passes(args: argparse.Namespace, x: Tensor) -> None:
    """One attack pass (forward, gradient of the image) through one expert's network, by batch size and copy."""
    plain, off = (build_model(f"resnet18(width={args.width})", CLASSES, SHAPE) for _ in range(2))
    off.requires_grad_(False)
    models = {
        "fp32, as pgd makes it": plain,
        "fp32, parameters without gradient": off,
        "fp32, frozen copy (BatchNorm folded)": frozen_copy(plain, x[:4]).climbed,
        "bf16, as bf16(pgd) makes it": LowPrecision(plain),
        "bf16, parameters without gradient": LowPrecision(off),
        "bf16, frozen copy (BatchNorm folded)": frozen_copy(plain, x[:4], "fast").climbed,
    }

    def all_images(model: RoutedModel, batch: int) -> None:
        for part in x.split(batch):
            ascend(Joint()(model, part, torch.zeros(len(part), dtype=torch.long)), part)

    sizes = (1, 16, 32)
    jobs: Jobs = {
        f"{name} {batch}": lambda model=model, batch=batch: all_images(model, batch)  # type: ignore[misc]
        for name, model in models.items()
        for batch in sizes
    }
    times = measure(jobs, args.repeats, CLOCKS[args.clock])
    ms = {name: f"{1e3 * statistics.median(found) / len(x):.1f}" for name, found in times.items()}
    print(f"\none attack pass through one ResNet-18 of width {args.width}, ms an image\n")
    table([["pass", *(f"batch {b}" for b in sizes)], *([name, *(ms[f"{name} {b}"] for b in sizes)] for name in models)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; 0: no timing")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18's first stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of each attack")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="NAME", help=", ".join(JOBS))
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--memory", action="store_true", help="also the peak of each")
    parser.add_argument(
        "--passes", action="store_true", help="instead: what an attack's pass costs, and cheaper copies"
    )
    parser.add_argument("--memory-of", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x, y = images(args.batch), torch.randint(CLASSES, (args.batch,))
    if args.memory_of:
        memory_of(args, x, y)
        return
    if args.passes:
        passes(args, x[:32])
        return
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {cpu_name()}, {args.clock} time, {args.experts} x "
        f"ResNet-18 of width {args.width}, batch {args.batch}, {args.steps} attack steps, {args.repeats} rounds"
    )
    compare(args, x, y)
    if args.repeats:
        timing(args, x, y)
    if args.memory:
        memory(args)


if __name__ == "__main__":
    main()
