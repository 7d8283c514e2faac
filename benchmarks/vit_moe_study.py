"""Does the number of experts buy robustness at equal compute? Dense ViTs and ViT-MoEs of E = 2, 4, 8, 16, natural and
adversarial training, under the paper's weak attack, PGD-50 with restarts, AutoAttack and the routing attacks.

python benchmarks/vit_moe_study.py train --out DIR [--seeds 3]        # half a minute to two a run, of one core
python benchmarks/vit_moe_study.py sweep --out DIR [--limit 200]      # weak and strong attack, routes, redundancy
python benchmarks/vit_moe_study.py lipschitz --out DIR --limit 32     # slopes, the router's share of the damage
python benchmarks/vit_moe_study.py evaluate --out DIR --limit 60      # AutoAttack and routing attacks of some arms
python benchmarks/vit_moe_study.py table --out DIR

Every verb goes on where it was. ViT of 4 blocks, width 48, 16 patches and the class token; in the MoEs blocks 1 and 3
have experts. At k = 1 a pass costs what the dense net's does; at k = 2 no more than "dense wide" (its MLPs are twice as
wide in all four blocks, not in two). One row an arm: mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from robustmoe import analysis, records
from robustmoe.evaluation import lipschitz_run, sweep_run
from robustmoe.recipe import Recipe
from robustmoe.records import Sweep
from study import Study, table

SHAPE = "patch={patch}, width=48, depth=4, heads=4"
BALANCED = "balance=0.01, balance_loss={loss}"
EXPERTS = (2, 4, 8, 16)
NETS = {
    "dense": "vit({shape})",
    "dense wide": "vit({shape}, mlp_ratio=8)",
    **{f"E{e} k1": f"vit_moe(tiny, {{shape}}, experts={e}, k=1, placement=every_2)" for e in EXPERTS},
    "E16 k2": "vit_moe(tiny, {shape}, experts=16, k=2, placement=every_2)",
}
PATCH = {"digits": 2, "fashion_mnist": 7}
EPOCHS = {"digits": 20, "fashion_mnist": 3}
TRAINING = ("natural", "at")
EPS = 0.05
"""The linf radius of every attack, in training too."""

ARMS = [f"{training} {net}" for training in TRAINING for net in NETS]
PAIRS = [
    (f"{training} {left}", f"{training} {right}")
    for training in TRAINING
    for left, right in [*((f"E{e} k1", "dense") for e in EXPERTS), ("E16 k1", "E2 k1"), ("E16 k2", "dense wide")]
]


def parts(arm: str) -> tuple[str, str]:
    training, _, net = arm.partition(" ")
    return training, net


THREAT = f"linf({EPS})"


SUITED = ("dense", "E16 k1")
"""The nets that meet AutoAttack too (the MoEs then the routing attacks): minutes each."""
WEAK, STRONG = f"vmoe_pgd({THREAT})", f"pgd({THREAT}, steps=50, restarts=2)"


def attacks(arm: str) -> dict[str, str]:
    """The suite of a dense net has no routing attack. The weak and the strong attack are in the sweep."""
    net = parts(arm)[1]
    suite = f"autoattack_routing({THREAT})" if net.startswith("E") else f"autoattack({THREAT})"
    return {"suite": suite} if net in SUITED else {}


def recipe(arm: str, seed: int, data: str) -> Recipe:
    training, net = parts(arm)
    method = "standard"
    given = []
    if training == "at":
        method = "at"
        given.append(f"pgd({THREAT}, steps=2, keep=last)")
    if net.startswith("E") and "soft" not in net:
        given.append(BALANCED.format(loss="gshard" if net.startswith("E2") else "vmoe"))
    return Recipe(
        model=NETS[net].format(shape=SHAPE.format(patch=PATCH[data])),
        data=data,
        method=f"{method}({', '.join(given)})" if given else method,
        optimizer="adamw(lr=4e-3, weight_decay=0.05)",
        schedule="one_cycle",
        epochs=EPOCHS[data],
        batch_size=64 if data == "digits" else 128,
        val_attack=f"pgd({THREAT}, steps=5)" if training == "at" else None,
        val_limit=512,
        seed=seed,
        threads=1,
    )


def study(out: Path, data: str) -> Study:
    return Study(out, lambda arm, seed: recipe(arm, seed, data), attacks)


class Swept(Study):
    """The same runs, judged by what one attack of the sweep leaves."""

    place = 0

    def swept(self, arm: str, seed: int) -> Sweep | None:
        found = records.Sweep.read(self.folder(arm, seed))
        return found if found is not None and found.done else None

    def inside(self, arm: str, seed: int) -> dict[str, Any]:
        return {"sweep": found} if (found := self.swept(arm, seed)) else {}

    def survivors(self, arm: str, seed: int) -> dict[int, bool]:
        found = self.inside(arm, seed)["sweep"]
        attacked = found.points[self.place].predicted
        rows = zip(found.index, found.labels, found.predicted, attacked, strict=True)
        return {index: y == clean == after for index, y, clean, after in rows}


class Strong(Swept):
    place = 1


def numbers(given: Study, arm: str, seed: int) -> dict[str, float]:
    """Per cent of the test images, of the attacks that are done."""
    found = {}
    swept = records.Sweep.read(given.folder(arm, seed))
    if swept is not None and swept.done:
        curves = analysis.sweep_summary(swept)
        found["clean"] = curves.clean.value
        for name, curve in zip(("weak (paper's)", "PGD-50 x 2"), curves.curves, strict=True):
            found[name] = curve.points[-1].robust.value
    suited = given.files(arm, seed).get("suite")
    if suited is not None and len(suited.rows) == suited.header.n:
        suite = analysis.routing_gap(suited)
        last = analysis.by_part(suited)[-1].left
        found |= {"AutoAttack": (suite[0] if suite else last).value, "AutoAttack + routing": last.value}
    return {name: 100 * value for name, value in found.items()}


def routes(given: Study, arm: str, seed: int) -> dict[str, float]:
    """Of the sweep at `EPS`: routes under the weak and the strong attack, redundancy; of the laboratory: the router's
    share of the change.
    """
    swept, measured = (read(given.folder(arm, seed)) for read in (records.Sweep.read, records.Lipschitz.read))
    found: dict[str, float] = {}
    if swept is not None and swept.done and swept.header.routers:
        curves = analysis.sweep_summary(swept)
        for name, curve in zip(("weak", "PGD-50"), curves.curves):
            point = curve.points[-1]
            found[f"rerouted, {name}"] = statistics.mean(point.moved.values())
            if point.routing_fixed is not None:
                found[f"right on the clean route, {name}"] = point.routing_fixed.value
                found[f"right, {name}"] = point.right.value
            if point.routing_transplanted is not None and name == "PGD-50":
                found["clean images, attacked route"] = point.routing_transplanted.value
        for spare in curves.spare:
            if spare.rule == "random" and spare.router == "":
                found["random experts"] = spare.mean
            if spare.rule == "without" and spare.router == "":
                found["worst expert out"] = spare.lowest[1].value
    if measured is not None and measured.done:
        parts_of = analysis.lipschitz_summary(measured)
        fall = parts_of.fall
        found["margin's fall by the routes"] = fall[2] / fall[0] if fall[0] else 0.0
        shares = [layer.numbers["attack router share"].mean for layer in parts_of.layers]
        if shares:
            found["router's share in the layers (LIP-8)"] = statistics.mean(shares)
    found = {name: 100 * value for name, value in found.items()}
    if measured is not None and measured.done:
        found["margin gradient"] = analysis.lipschitz_summary(measured).model["margin slope"].mean
    return found


def tables(out: Path, data: str, seeds: int) -> str:
    given = study(out, data)
    lines = []
    for columns_of in (numbers, routes):
        found = {arm: [each for seed in range(seeds) if (each := columns_of(given, arm, seed))] for arm in ARMS}
        columns = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run))
        lines += [*table(columns, found), ""]
    kinds = {"weak": Swept, "PGD-50 x 2": Strong, "AutoAttack, the MoEs' with the routing attacks": Study}
    for name, kind in kinds.items():
        lines += [f"{name}:", "", *kind(given.out, given.recipe, given.attacks).differences(PAIRS, seeds), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "evaluate", "sweep", "lipschitz", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/vit_moe_study"))
    parser.add_argument("--data", choices=list(PATCH), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    given = parser.parse_args()
    work = study(given.out, given.data)
    if given.verb == "train":
        work.train(given.arms, given.seeds)
    elif given.verb == "evaluate":
        work.evaluate(given.arms, given.seeds, given.limit)
    elif given.verb == "table":
        print(tables(given.out, given.data, given.seeds))
    else:
        for seed in range(given.seeds):
            for arm in given.arms:
                if given.verb == "sweep":
                    sweep_run(work.folder(arm, seed), attacks=(WEAK, STRONG), eps=EPS, limit=given.limit)
                else:
                    lipschitz_run(work.folder(arm, seed), attack=STRONG, limit=given.limit)


if __name__ == "__main__":
    main()
