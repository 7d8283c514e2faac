"""AutoAttack (standard, linf) on one net: ours beside pyautoattack, in one process.

python benchmarks/autoattack.py --net digits|fashion|RUN_FOLDER [--data SPEC] --limit 200 --batch 100 [--own]

The net is given to both as a plain torch module in torch's own memory layout, as a user's model is; with ``--own`` as
this project builds it (channels last inside, which the peer then has for nothing).

Modes: "peer" is pyautoattack, unchanged; "autoattack" is ours on the model itself with the original's random stream,
whose robust images should be the peer's; "strict" and "fast" are ours with a stream an image, on a frozen copy in the
model's own precision and in bf16. Every mode attacks the same images chunk by chunk, in turn, each chunk in another
order, so that a busy machine slows all alike; a chunk is one batch of the peer. Making the copies is part of our time,
the peer's checks of the model part of its. The exact model judges what each gives back, against the label. Then the
seconds part by part, so that a ratio can be explained. ``--out`` gets one row a mode, chunk and part.

digits and fashion are trained here first, against PGD (fashion: minutes).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmoe.attacks import linf
from robustmoe.attacks.autoattack import AutoAttack
from robustmoe.attacks.base import part_noise
from robustmoe.data import Batch, Data, batches, digits, fashion_mnist
from robustmoe.errors import UserError
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import Dense, RoutedModel, as_routed
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.spec import build
from robustmoe.training import load_model, train

MODES = ("peer", "strict", "fast", "autoattack")
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
NETS = {
    "digits": (digits, 0.1, {"model": "resnet8(width=8)", "epochs": 6, "batch_size": 64}),
    "fashion": (fashion_mnist, 0.1, {"model": "resnet8(width=8)", "epochs": 1, "max_steps": 300, "val_limit": 500}),
}
"""Data, eps and recipe of the nets that are trained here, so that robust accuracy is between 30 and 70 %."""


@dataclass
class Found:
    """What a mode did with the images of one chunk: ``robust`` (n,), seconds in all, and seconds and robust images left
    after each part.
    """

    robust: Tensor
    seconds: float = 0.0
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)


class Clock(logging.Handler):
    """Reads the peer's log: when a part starts and ends, and how many per cent are robust after it."""

    def __init__(self, n: int) -> None:
        super().__init__(logging.DEBUG)
        self.n, self.start, self.parts = n, 0.0, dict[str, tuple[float, int]]()

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split()
        if words[:1] == ["running"]:
            self.start = time.perf_counter()
        elif words[:3] == ["robust", "accuracy", "after"]:
            left = round(float(words[4].rstrip("%")) / 100 * self.n)
            self.parts[words[3].rstrip(":").lower()] = (time.perf_counter() - self.start, left)


def by_peer(model: RoutedModel, eps: float, batch: Batch, seed: int, parts: list[str]) -> Found:
    """pyautoattack's standard version, or the first ``parts`` of it, all images in one batch."""
    import pyautoattack

    clock, logger = Clock(len(batch)), logging.getLogger("auto-attack")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(clock)
    start = time.perf_counter()
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=seed)
    attack.attacks_to_run = parts
    x_adv = attack.run_standard_evaluation(batch.x, batch.y, batch_size=len(batch))[0]
    seconds = time.perf_counter() - start
    logger.removeHandler(clock)
    check_ball(batch.x, x_adv, eps)
    return Found(right(model, x_adv, batch.y) & right(model, batch.x, batch.y), seconds, clock.parts)


class Ours:
    """AutoAttack of this project, part by part; the copy is made once, in the first chunk's time."""

    def __init__(self, model: RoutedModel, eps: float, mode: str, seed: int, parts: list[str]) -> None:
        self.model, self.eps, self.mode = model, eps, mode
        self.climbed: RoutedModel | None = model if mode == "autoattack" else None
        self.attack = AutoAttack(linf(eps), rng="autoattack" if mode == "autoattack" else "image", seed=seed)
        self.parts = parts

    def __call__(self, batch: Batch) -> Found:
        begin = time.perf_counter()
        if self.climbed is None:
            self.climbed = frozen_copy(self.model, batch.x, "fast" if self.mode == "fast" else "strict")
        with torch.no_grad():
            output = self.model.run(batch.x)
        found = Found(output.logits.argmax(1) == batch.y)
        noise = Noise.of(batch.index, self.attack.seed)
        for name, part in ((name, part) for name, part in self.attack.parts(output) if name in self.parts):
            start, left = time.perf_counter(), torch.nonzero(found.robust)[:, 0]
            if len(left):
                x, y = batch.x[left], batch.y[left]
                x_adv = part(self.climbed, x, y, part_noise(noise[left], name))
                check_ball(x, x_adv, self.eps)
                found.robust[left] = right(self.model, x_adv, y)
            found.parts[name] = (time.perf_counter() - start, int(found.robust.sum()))
        found.seconds = time.perf_counter() - begin
        return found


def check_ball(x: Tensor, x_adv: Tensor, eps: float) -> None:
    if float((x_adv - x).abs().max()) > eps * (1 + 1e-5) + 1e-7 or float((x_adv - 0.5).abs().max()) > 0.5:
        raise AssertionError("an attack left the ball or the box")


@torch.no_grad()
def right(model: RoutedModel, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


def net(name: str, data_spec: str | None, eps: float | None) -> tuple[RoutedModel, Data, float]:
    """The net, its data and the radius."""
    if name not in NETS:
        data: Data = build(data_spec or "cifar10", "data")
        return load_model(Path(name)), data, 8 / 255 if eps is None else eps
    make, radius, settings = NETS[name]
    method = f"at(pgd(linf({radius}), steps=3, keep=last))"
    recipe = Recipe(
        data=make.__name__, method=method, schedule="one_cycle", threads=torch.get_num_threads(), **settings
    )  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, folder)
        return load_model(folder), make(), radius if eps is None else eps


def plain(model: RoutedModel) -> RoutedModel:
    """A dense model's normalisation and network alone, in torch's own memory layout."""
    if not isinstance(model, Dense):
        raise UserError("the net has a router; it can only be taken as it is: add --own")
    bare = torch.nn.Sequential(model.normalise, model.network).to(memory_format=torch.contiguous_format)
    return as_routed(bare.eval())


def radius(text: str) -> float:
    """8/255 or 0.1."""
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def table(rows: list[list[str]]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")


def show(found: dict[str, list[Found]], n: int, clean: int, names: list[str]) -> None:
    """Two tables: time, ratio, robust accuracy after each part and agreement; then the seconds part by part."""
    reference = "peer" if "peer" in found else next(iter(found))
    masks = {mode: torch.cat([one.robust for one in chunks]) for mode, chunks in found.items()}
    seconds = {mode: sum(one.seconds for one in chunks) for mode, chunks in found.items()}
    spent = {m: {p: sum(one.parts.get(p, (0.0, 0))[0] for one in c) for p in names} for m, c in found.items()}
    rows = [["mode", "seconds", f"{reference} takes", *(f"robust after {p}" for p in names), "other verdicts"]]
    for mode, chunks in found.items():
        left = []
        for place, part in enumerate(names):  # the peer stops, and logs no more parts, where nothing is left
            counts = [one.parts[part][1] if part in one.parts else 0 for one in chunks]
            left.append(f"{100 * sum(counts) / n:.1f} %")
            assert place < len(names) - 1 or sum(counts) == int(masks[mode].sum()), f"{mode}: counts do not add up"
        weaker = int((masks[mode] & ~masks[reference]).sum())
        stronger = int((~masks[mode] & masks[reference]).sum())
        ratio = f"{seconds[reference] / seconds[mode]:.2f} times"
        rows.append([mode, f"{seconds[mode]:.1f}", ratio, *left, f"+{weaker} robust, -{stronger}"])
    print(f"clean accuracy {100 * clean / n:.1f} % of {n} images\n")
    table(rows)
    print(f"\nSeconds part by part (and how many times as long the {reference} takes):\n")
    rows = [["mode", *names, "the rest (copies, checks)"]]
    for mode in found:
        cells = [f"{spent[mode][p]:.1f} ({spent[reference][p] / max(spent[mode][p], 1e-9):.2f})" for p in names]
        rows.append([mode, *cells, f"{seconds[mode] - sum(spent[mode].values()):.1f}"])
    table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="digits", help="digits, fashion or a run folder")
    parser.add_argument("--data", help="what a run is tested on, such as digits (default: cifar10)")
    parser.add_argument("--limit", type=int, default=200, help="images")
    parser.add_argument("--batch", type=int, default=100, help="images a chunk")
    parser.add_argument("--eps", type=radius, help="8/255 for a run folder, 0.1 for digits and fashion")
    parser.add_argument("--modes", default=",".join(MODES), help="which, and in which order")
    parser.add_argument("--own", action="store_true", help="the model as this project builds it")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw, the peer's too")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="the first parts of AutoAttack alone, such as apgd-ce,apgd-t"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="rows are added to this .jsonl file")
    args = parser.parse_args()
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
    parts = args.parts.split(",")
    if parts != list(PARTS[: len(parts)]):
        raise UserError(f"--parts must be the first of {', '.join(PARTS)}; got {args.parts!r}")
    if "peer" in modes:
        import pyautoattack  # noqa: F401 (missing: better now than after the training)
    torch.set_num_threads(args.threads)
    model, data, eps = net(args.net, args.data, args.eps)
    model = model if args.own else plain(model)
    tools: dict[str, Any] = {m: Ours(model, eps, m, args.seed, parts) for m in modes if m != "peer"}
    found: dict[str, list[Found]] = {mode: [] for mode in modes}
    clean, n = 0, 0
    for turn, batch in enumerate(batches(data.test.head(args.limit), args.batch)):
        clean, n, first = clean + int(right(model, batch.x, batch.y).sum()), n + len(batch), turn % len(modes)
        for mode in modes[first:] + modes[:first]:
            one = tools[mode](batch) if mode in tools else by_peer(model, eps, batch, args.seed, parts)
            found[mode].append(one)
            print(f"chunk {turn}, {mode}: {one.seconds:.1f} s, {int(one.robust.sum())} robust", file=sys.stderr)
            if args.out is not None:
                with args.out.open("a") as file:
                    for part, (seconds, left) in one.parts.items():
                        row = {
                            "net": args.net,
                            "eps": eps,
                            "seed": args.seed,
                            "threads": args.threads,
                            "mode": mode,
                            "chunk": turn,
                        }
                        row |= {"n": len(batch), "part": part, "seconds": round(seconds, 3), "robust": left}
                        file.write(json.dumps(row) + "\n")
    kind = "as this project builds it" if args.own else "a plain module"
    print(f"AutoAttack standard, linf {eps:.4g}, {args.net} ({kind}), batch {args.batch}, threads {args.threads}")
    show(found, n, clean, parts)


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; this benchmark needs pyautoattack: run `make crosscheck`")
    except UserError as error:
        sys.exit(str(error))
