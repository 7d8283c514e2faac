"""Does routing cost or buy certified accuracy? A dense net, hard-routed and soft MoEs and a dual of about its cost, all
trained for certificates: clean, certified and attacked accuracy, experts within reach, certificates with an open route.

python benchmarks/certification_study.py train --data digits --out DIR [--seeds 3]     # one core
python benchmarks/certification_study.py judge --data digits --out DIR [--limit 300]   # certificates, then attacks
python benchmarks/certification_study.py table --data digits --out DIR

Every verb goes on where it was. The nets are conv_small (Wong and Kolter 2018): "dense" has width 16 and 100 hidden
units. A pass of a hard MoE costs one such net and the router; the soft MoEs mix E nets of a E-th of the cost; the dual
blends two halves of half the cost, one trained for accuracy and one for certificates, at alpha 0.8. One row an arm:
mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robustmoe import analysis, records
from robustmoe.analysis.certificates import covers
from robustmoe.evaluation import blend_run, certify_run, evaluate_run
from robustmoe.recipe import Recipe
from robustmoe.records import Certificates
from study import Study, table

DATA = {
    "digits": ("digits", "0.1", 60),
    "fashion_mnist": ("fashion_mnist(val=0.5)", "0.1", 10),
    "cifar10": ("cifar10({root}val=0.8)", "2/255", 10),
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
    "dense from dense": "conv_small",
    "hard E2 from dense": f"ensemble(conv_small, experts=2, {ROUTER})",
}
ARMS = [*NETS, DUAL := "dual"]
ALPHA, SHARPEN = 0.8, "scaled(4)"
PAIRS = [
    ("hard E2", "dense"),
    ("soft E2", "dense"),
    ("dual", "dense"),
    ("hard E2", "hard E2, route free"),
    ("hard E4", "hard E2"),
    ("hard E2 from dense", "dense from dense"),
    ("dense from dense", "dense"),
]


class Certified(Study):
    """The same runs, judged by what is certified at eps."""

    def certificates(self, arm: str, seed: int) -> Certificates | None:
        found = [one for one in records.Certificates.read_all(self.folder(arm, seed)) if one.done]
        return found[0] if found else None

    def inside(self, arm: str, seed: int) -> dict[str, Any]:
        found = self.certificates(arm, seed)
        return {} if found is None else {"certificates": found}

    def survivors(self, arm: str, seed: int) -> dict[int, bool]:
        found = self.inside(arm, seed)["certificates"]
        return {row.index: row.right and covers(row, found.header.eps) for row in found.rows}


def method(arm: str, eps: str) -> str:
    if arm == "standard half":
        return "standard"
    extra = ""
    if " E" in arm:
        extra = ", balance=0.1" + (", stability=0.3" if arm.startswith("hard") and "free" not in arm else "")
    return f"certified(linf({eps}){extra})"


def study(out: Path, data: str, root: str | None, kind: type[Study] = Certified) -> Any:
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

    def attacks(arm: str) -> dict[str, str]:
        routed = {"transition": f"expert_transition(linf({eps}), steps=50)"} if " E" in arm else {}
        return {"PGD-50": f"pgd(linf({eps}), steps=50)"} | routed

    return kind(out, recipe, attacks)


def judge(work: Certified, arm: str, seed: int, eps: str, limit: int) -> None:
    """Certificates of a run's first test images, then attacks on them; the dual is made of its halves first."""
    folder = work.folder(arm, seed)
    if arm == DUAL:
        halves = [work.folder(f"{half} half", seed) for half in ("standard", "robust")]
        attack = f"pgd(linf({eps}), steps=10)"
        blend_run(*halves, alphas=[ALPHA], sharpen=SHARPEN, attack=attack, limit=10, out=folder)
    certify_run(folder, certifiers=[f"bounds(linf({eps}), search=0)"], limit=limit, batch_size=25)
    evaluate_run(folder, attacks=tuple(work.attacks(arm).values()), limit=limit, curve=())


def numbers(work: Certified, arm: str, seed: int) -> dict[str, float]:
    """Per cent of the images, and experts."""
    found = work.certificates(arm, seed)
    if found is None:
        return {}
    files = list(Study.files(work, arm, seed).values())
    proven = analysis.certificates_summary(found, files)
    attacked = analysis.worst_case([(file.header, file.rows) for file in files]) if files else None
    named = {"clean": proven.right, "certified": proven.certified}
    if attacked is not None and attacked.robust is not None:
        named["attacked"] = attacked.robust
    shares = {name: 100 * rate.value for name, rate in named.items()}
    if found.header.routers and proven.reachable is not None:
        shares["experts in reach"] = proven.reachable
        shares["certified, route open"] = 100 * proven.unstable.value
    return shares


def tables(work: Certified, seeds: int) -> str:
    found = {arm: [each for seed in range(seeds) if (each := numbers(work, arm, seed))] for arm in ARMS}
    columns = ["clean", "certified", "attacked", "experts in reach", "certified, route open"]
    return "\n".join([*table(columns, found), "", *work.differences(PAIRS, seeds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "judge", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/certification_study"))
    parser.add_argument("--data", choices=list(DATA), default="digits")
    parser.add_argument("--root", help="the folder of the data set, where it is not the default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    given = parser.parse_args()
    work = study(given.out / given.data, given.data, given.root)
    if given.verb == "train":
        work.train([arm for arm in given.arms if arm != DUAL], given.seeds)
    elif given.verb == "table":
        print(tables(work, given.seeds))
    else:
        for seed in range(given.seeds):
            for arm in given.arms:
                judge(work, arm, seed, DATA[given.data][1], given.limit)


if __name__ == "__main__":
    main()
