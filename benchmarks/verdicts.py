"""Verdicts of this checkout beside those of an older one, image by image, on every net of the zoo that both know.

python benchmarks/verdicts.py --before CHECKOUT [--cifar10 FOLDER] [--images 20] [--nets digits_dense ...]

Each checkout is a process of its own, on the first test images that the net gets right, through `evaluate` as users
call it: PGD-50 at a quarter, a half, three quarters and all of the net's eps, and autoattack_routing. Says how many
stand under each in both, and how many images have another verdict. Writes docs/results/verdicts.json net by net; a net
that is there is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suites import SOURCES, ZOO, zoo_net

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")


def attacks(size: str) -> dict[str, str]:
    """By name: those of the curve, and the suite."""
    eps = size.removeprefix("linf(").removesuffix(")")
    curve = {f"PGD-50 at {k}/4": f"pgd(linf({k / 4} * {eps}), steps=50)" for k in (1, 2, 3)}
    return {**curve, "PGD-50": f"pgd({size}, steps=50)", "suite": f"autoattack_routing({size})"}


def serve(name: str, count: int, cifar10: str) -> None:
    """Prints, by attack, whether each image stands, which part broke it, and the CPU seconds, as a line of JSON."""
    import torch

    from robustmoe import data
    from robustmoe.evaluation import evaluate

    torch.set_num_threads(1)
    answer, sys.stdout = sys.stdout, sys.stderr
    model = zoo_net(name)
    config = json.loads((ZOO / name / "config.json").read_text(encoding="utf-8"))
    sets = {"digits": data.digits, "fashion_mnist": data.fashion_mnist, "cifar10": lambda: data.cifar10(cifar10)}
    test = sets[config["data"].split("(")[0]]().test
    batch = test.batch(list(range(min(len(test), 8 * count))))
    with torch.no_grad():
        right = torch.nonzero(model(batch.x).argmax(1) == batch.y)[:count, 0]
    told: dict[str, Any] = {}
    for what, attack in attacks(config["threat"]).items():
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            evaluate(model, batch.x[right], batch.y[right], attacks=(attack.replace(" ", ""),), out=folder)
            lines = [json.loads(line) for file in Path(folder).rglob("*.jsonl") for line in file.open(encoding="utf-8")]
        rows = sorted((line for line in lines if line.get("kind") == "row"), key=lambda row: int(row["index"]))
        told[what] = {
            "stands": [row["adversarial"] == row["label"] for row in rows],
            "parts": [row["part"] for row in rows],
            "seconds": time.process_time() - begun,
        }
    print(json.dumps(told), file=answer, flush=True)


def asked(name: str, sources: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--serve", name, "--images", str(args.images), "--cifar10", args.cifar10]
    env = {**os.environ, "PYTHONPATH": str(sources)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def compared(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """By attack: how many stand in both checkouts, and whose verdict is another. "autoattack" is the suite's first four
    parts.
    """
    out: dict[str, Any] = {"n": len(new["suite"]["stands"])}
    for each in (new, old):
        suite = each["suite"]
        each["autoattack"] = {**suite, "stands": [part not in AUTOATTACK for part in suite["parts"]]}
    for what in new:
        ours, theirs = new[what]["stands"], old[what]["stands"]
        out[what.replace("-", "_").replace(" ", "_").replace("/", "_")] = {
            "stand": sum(ours),
            "before": sum(theirs),
            "only_now": sum(a and not b for a, b in zip(ours, theirs, strict=True)),
            "only_before": sum(b and not a for a, b in zip(ours, theirs, strict=True)),
            "seconds": new[what]["seconds"],
            "seconds_before": old[what]["seconds"],
        }
    return out


def known(sources: Path) -> list[str]:
    """The nets of the zoo whose models a checkout can build and load."""
    names = sorted(path.parent.name for path in ZOO.glob("*/config.json"))
    env = {**os.environ, "PYTHONPATH": str(sources)}
    command = [sys.executable, __file__, "--known", *names]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an older commit")
    parser.add_argument("--cifar10", default="", help="a folder of CIFAR-10; without it its nets are left out")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--nets", nargs="+", help="nets of the zoo; all that both know, where it is not given")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--known", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.images, args.cifar10)
        return
    for name in args.known or ():
        with contextlib.suppress(Exception):  # an older checkout refuses what it does not know in its own words
            zoo_net(name)
            print(name)
    if args.known:
        return
    if args.before is None:
        parser.error("give --before, a checkout of an older commit")
    from results import RESULTS, described, write

    file = RESULTS / "verdicts.json"
    about = described("python benchmarks/verdicts.py --before CHECKOUT --cifar10 FOLDER", seeds=[0])
    git = ["git", "rev-parse", "HEAD"]
    about["before"] = subprocess.run(git, cwd=args.before, capture_output=True, text=True, check=True).stdout.strip()
    numbers = json.loads(file.read_text(encoding="utf-8"))["numbers"] if file.is_file() else {}
    for name in args.nets or known(args.before.resolve() / "src"):
        if name in numbers or (name.startswith("cifar10") and not args.cifar10):
            continue
        numbers[name] = compared(asked(name, SOURCES, args), asked(name, args.before.resolve() / "src", args))
        print(name, json.dumps(numbers[name]), flush=True)
        write(file, about, numbers)


if __name__ == "__main__":
    main()
