"""Does routing cost or buy certified accuracy? A dense net, hard-routed and soft MoEs and a dual of about its cost, all
trained for certificates: clean, certified and attacked accuracy, experts within reach, certificates with an open route.

python benchmarks/certification_study.py train --data digits --out DIR [--seeds 3]     # one core: see docs for the times
python benchmarks/certification_study.py judge --data digits --out DIR [--limit 300]   # certificates, then attacks
python benchmarks/certification_study.py table --data digits --out DIR

Every verb goes on where it was. The nets are conv_small (Wong and Kolter 2018): "dense" has width 16 and 100 hidden
units. A pass of a hard MoE costs one such net and the router; the soft MoEs mix E nets of a E-th of the cost; the dual
blends two halves of half the cost, one trained for accuracy and one for certificates, at alpha 0.8. One row an arm: mean
± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from robustmoe import records
from robustmoe import spec as specs
from robustmoe.certification import Certificate, build_certifier
from robustmoe.data import batches
from robustmoe.evaluation import blend_run
from robustmoe.noise import Noise
from robustmoe.progress import progress
from robustmoe.recipe import Recipe
from robustmoe.training import load_model
from study import Study, table

DATA = {
    "digits": ("digits", "0.1", 60),
    "fashion_mnist": ("fashion_mnist(val=0.5)", "0.1", 10),
    "cifar10": ("cifar10({root}val=0.6)", "2/255", 10),
}
"""The data set, the linf radius, and the epochs."""

ROUTER = "router=conv_small(width=4, hidden=16), standardise=True"
HALF, QUARTER = "conv_small(width=11, hidden=70)", "conv_small(width=8, hidden=50)"
NETS = {
    "dense": "conv_small",
    "hard E2": f"ensemble(conv_small, experts=2, {ROUTER})",
    "soft E2": f"ensemble({HALF}, experts=2, gate=soft, {ROUTER})",
    "standard half": HALF,
    "robust half": HALF,
    "hard E2, route free": f"ensemble(conv_small, experts=2, {ROUTER})",
    "hard E4": f"ensemble(conv_small, experts=4, {ROUTER})",
    "hard E4, linear router": "ensemble(conv_small, experts=4, router=linear, standardise=True)",
    "soft E4": f"ensemble({QUARTER}, experts=4, gate=soft, {ROUTER})",
    "hard E2 from dense": f"ensemble(conv_small, experts=2, {ROUTER})",
}
MAIN = ["dense", "hard E2", "soft E2", "standard half", "robust half"]
DUAL, ALPHA, SHARPEN = "dual", 0.8, "scaled(4)"


class Certified(Study):
    """Runs of one data set at one eps."""

    def judged(self, arm: str, seed: int) -> Path:
        return self.folder(arm, seed) / "study.jsonl"


def method(arm: str, eps: str) -> str:
    if arm == "standard half":
        return "standard"
    extra = ""
    if "E" in arm:
        extra = ", balance=0.1" + (", stability=0.3" if arm.startswith("hard") and "free" not in arm else "")
    return f"certified(linf({eps}){extra})"


def study(out: Path, data: str, root: str | None) -> Certified:
    text, eps, epochs = DATA[data]
    text = text.format(root="" if root is None else f"root='{root}', ")

    def recipe(arm: str, seed: int) -> Recipe:
        standard = arm == "standard half"
        return Recipe(
            model=NETS[arm],
            data=text,
            method=method(arm, eps),
            optimizer="adamw(lr=2e-3, weight_decay=0)",
            schedule="one_cycle(rise=0.3)",
            epochs=epochs,
            batch_size=64 if data == "digits" else 128,
            clip=8.0,
            init=str(out / f"dense-{seed}") if arm.endswith("from dense") else None,
            val_certifier=None if standard else f"bounds(linf({eps}), how=ibp, search=0, dtype=float32)",
            val_limit=1000,
            seed=seed,
            threads=1,
        )

    return Certified(out, recipe, lambda arm: {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "judge", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/certification_study"))
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--root", help="the folder of the data set, where it is not the default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--arms", nargs="+", choices=list(NETS), default=list(NETS))
    given = parser.parse_args()
    work = study(given.out / given.data, given.data, given.root)
    if given.verb == "train":
        work.train(given.arms, given.seeds)


if __name__ == "__main__":
    main()
