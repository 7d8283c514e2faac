"""The dual model on CIFAR-10: which part is weak, what RT-ER adds, what JTDMoE adds to separate halves, and an ensemble
holds.

python benchmarks/dual_study.py train --out DIR --data "cifar10(root='...')" [--seeds 3]   # hours on one core
python benchmarks/dual_study.py evaluate --out DIR [--limit 150]                           # PGD-50, AutoAttack, routing
python benchmarks/dual_study.py dissect --out DIR [--limit 150]                            # RA-E, RA-R
python benchmarks/dual_study.py blend --out DIR [--limit 150]                              # the curves over alpha
python benchmarks/dual_study.py table --out DIR

Every verb goes on where it was. All arms have the same data, epochs (the fine-tuned ones besides), batches, optimiser
and training threat (linf 8/255, 2 steps of 5/255). One row an arm: mean ± standard deviation over the seeds, in per
cent of the test images. "union" is per image over all attacks that the arm met.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from robustmoe import analysis, records
from robustmoe.evaluation import blend_run, dissect_run
from robustmoe.recipe import Recipe
from robustmoe.records import Blend
from study import Study, spread, table

NET = "resnet(depth=8, width=16, stem=imagenet)"
MOE = f"ensemble({NET}, gate=hard, router=linear)"
EVEN = f"ensemble({NET}, router=downsampled(linear, size=4), standardise=True)"
ATTACK = "pgd(linf(8/255), steps=2, step_size=5/255, keep=last)"
HELD = ATTACK.replace("keep", "objective=experts_only, keep")
PROTECTED = f"rt_er({HELD}, protect=random, loss=ce, beta=1, balance=0.1, stability=1)"

ARMS = {
    "dense_at": (NET, f"at({ATTACK})"),
    "dense_standard": (NET, "standard"),
    "standard": (MOE, "standard"),
    "at": (MOE, f"at({ATTACK})"),
    "rt_er": (MOE, f"rt_er({ATTACK}, beta=6)"),
    "labelled": (MOE, f"rt_er({ATTACK}, loss=ce, beta=1)"),
    "all": (MOE, f"rt_er({ATTACK}, protect=all, loss=ce, beta=1)"),
    "even": (EVEN, PROTECTED),
    "jtdmoe": (f"dual({MOE}, {MOE}, alpha=0.7)", f"jtdmoe({ATTACK}, variant=paper)"),
    "upcycled": (EVEN, PROTECTED),
    "dense_again": (NET, f"at({ATTACK})"),
}
MEAN = f"ensemble({NET}, k=4, gate=hard, router=linear)"
"""The mean of all experts, four times the cost: the arm "mean" is the weights of "labelled" in it, not trained."""

FINE = {
    "jtdmoe": "standard={out}/standard-{seed}, robust={out}/rt_er-{seed}",
    "upcycled": "{out}/dense_at-{seed}",
    "dense_again": "{out}/dense_at-{seed}",
}
"""Arms that start from trained ones: fine-tuned for an epoch more, at a fifth of the learning rate."""

TRAINED, EVERY = list(ARMS), [*ARMS, "mean"]
DENSE = ("dense_at", "dense_standard", "dense_again")
THREAT = "linf(8/255)"
PGD_50 = "pgd(linf(8/255), steps=50, step_size=2/255)"
AUTOATTACK = f"autoattack({THREAT})"
STEERED = "expert_transition(linf(8/255), steps=50)"
DISSECTED = ("standard", "at", "rt_er", "labelled", "even", "upcycled")
PAIRS = [
    ("at", "dense_at"),
    ("rt_er", "at"),
    ("labelled", "at"),
    ("all", "at"),
    ("all", "dense_at"),
    ("mean", "labelled"),
    ("mean", "dense_at"),
    ("even", "dense_at"),
    ("upcycled", "dense_at"),
    ("upcycled", "dense_again"),
]

BLENDS: dict[str, dict[str, str]] = {
    "separate": {"standard": "standard", "robust": "rt_er"},
    "separate, logits": {"standard": "standard", "robust": "rt_er", "mix": "logits"},
    "jtdmoe": {"standard": "jtdmoe"},
    "dense": {"standard": "dense_standard", "robust": "dense_at"},
    "dense, sharpened": {"standard": "dense_standard", "robust": "dense_at", "sharpen": "scaled(4)"},
    "upcycled": {"standard": "dense_standard", "robust": "upcycled", "sharpen": "scaled(4)"},
}


def attacks_of(arm: str) -> dict[str, str]:
    """A dense net and the mean of all experts have no route to be attacked."""
    if arm in DENSE or arm == "mean":
        return {"PGD-50": PGD_50, "suite": AUTOATTACK}
    return {"PGD-50": PGD_50, "suite": f"autoattack_routing({THREAT})", "steered": STEERED}


def study(out: Path, data: str) -> Study:
    def recipe(arm: str, seed: int) -> Recipe:
        model, method = (MEAN, ARMS["labelled"][1]) if arm == "mean" else ARMS[arm]
        fine = arm in FINE
        return Recipe(
            model=model,
            data=data,
            method=method,
            optimizer=f"sgd(lr={0.02 if fine else 0.1}, momentum=0.9, weight_decay=5e-4)",
            schedule="one_cycle(rise=0.3)",
            epochs=1 if fine else 2,
            batch_size=128,
            augment="crop_flip(padding=2)",
            precision="bf16",
            seed=seed,
            init=FINE[arm].format(out=out, seed=seed) if fine else None,
            val_attack="pgd(linf(8/255), steps=10)",
            val_limit=512,
            threads=1,
        )

    return Study(out, recipe, attacks_of)


def numbers(given: Study, arm: str, seed: int) -> dict[str, float] | None:
    """Per cent of the test images by column; None for a run that is not evaluated."""
    files = given.inside(arm, seed)
    if not files:
        return None
    union = analysis.worst_case([(file.header, file.rows) for file in files.values()])
    suite = analysis.routing_gap(files["suite"])
    last = analysis.by_part(files["suite"])[-1].left
    found = {
        "clean": union.clean.value,
        "PGD-50": analysis.evaluation_summary(*files["PGD-50"]).robust.value,
        "AutoAttack": (suite[0] if suite else last).value,
        "AutoAttack + routing": last.value,
        "union": union.robust.value,
    }
    if "steered" in files:
        found["transition alone"] = analysis.evaluation_summary(*files["steered"]).robust.value
    return {name: 100 * value for name, value in found.items()}


def blend_folder(out: Path, name: str, seed: int) -> Path:
    return out / f"blend-{name.replace(', ', '-')}-{seed}"


def average(given: Study, seed: int) -> None:
    """The folder of the arm "mean"."""
    source, folder = given.folder("labelled", seed), given.folder("mean", seed)
    if given.trained("labelled", seed) and not folder.exists():
        folder.mkdir()
        config = json.loads((source / "config.json").read_text()) | {"model": MEAN}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name in ("model.safetensors", "metrics.jsonl"):
            shutil.copy(source / name, folder / name)


def make_blends(given: Study, names: list[str], seeds: int, limit: int) -> None:
    for seed in range(seeds):
        for name in names:
            options = dict(BLENDS[name])
            halves = [given.folder(options.pop(half), seed) for half in ("standard", "robust") if half in options]
            blend_run(*halves, **options, limit=limit, out=blend_folder(given.out, name, seed))


def blends(given: Study, names: list[str], seeds: int) -> Iterator[tuple[str, list[Blend]]]:
    for name in names:
        found = [records.Blend.read(blend_folder(given.out, name, seed)) for seed in range(seeds)]
        yield name, [blend for blend in found if blend is not None and blend.done]


def curve(found: list[Blend]) -> list[tuple[str, str]]:
    """Clean and robust accuracy at each alpha, over the seeds."""
    columns = []
    for place in range(len(found[0].alphas)):
        clean = [100 * share(b.predicted[place], b.labels) for b in found]
        robust = [100 * statistics.mean(broken == -1 for broken in b.broken[place]) for b in found]
        columns.append((spread(clean), spread(robust)))
    return columns


def share(predicted: list[int], labels: list[int]) -> float:
    return statistics.mean(float(p == y) for p, y in zip(predicted, labels))


def tables(given: Study, arms: list[str], names: list[str], seeds: int) -> str:
    rows = {arm: [n for seed in range(seeds) if (n := numbers(given, arm, seed))] for arm in arms}
    columns = ["clean", "PGD-50", "AutoAttack", "AutoAttack + routing", "transition alone", "union"]
    lines = [*table(columns, rows), "", *given.differences(PAIRS, seeds), ""]
    parts = {arm: [each for seed in range(seeds) if (each := anatomy_of(given, arm, seed))] for arm in DISSECTED}
    if any(parts.values()):
        first = next(runs[0] for runs in parts.values() if runs)
        lines += [*table(list(first), parts), ""]
    for name, found in blends(given, names, seeds):
        if found:
            lines += [f"| {name}, {len(found)} seeds: alpha | " + " | ".join(f"{a:g}" for a in found[0].alphas) + " |"]
            lines += ["|" + "---|" * (len(found[0].alphas) + 1)]
            for title, cells in zip(("clean", "robust"), zip(*curve(found)), strict=True):
                lines.append(f"| {title} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def anatomy_of(given: Study, arm: str, seed: int) -> dict[str, float] | None:
    """SA, RA, RA-E and RA-R, in per cent, of a run that is taken apart."""
    found = records.Dissection.read(given.folder(arm, seed))
    if found is None or not found.done:
        return None
    parts = analysis.dissection_summary(found)
    rates = {
        "SA": parts.clean,
        "RA (PGD-20)": parts.robust["prediction"],
        "RA-E frozen": parts.routing_fixed,
        "RA-E live": parts.robust["experts"],
        "RA-R frozen": parts.routing_transplanted,
        "RA-R live": parts.robust["router"],
        "RA, union": parts.worst,
    }
    return {name: 100 * rate.value for name, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "evaluate", "dissect", "blend", "table"))
    parser.add_argument("--out", type=Path, default=Path("runs/dual_study"))
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--arms", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument("--blends", nargs="+", choices=list(BLENDS), default=list(BLENDS))
    given = parser.parse_args()
    work = study(given.out, given.data)
    if given.verb == "train":
        work.train([arm for arm in given.arms if arm in TRAINED], given.seeds)
    elif given.verb == "evaluate":
        for seed in range(given.seeds):
            average(work, seed)
        work.evaluate(given.arms, given.seeds, given.limit)
    elif given.verb == "dissect":
        for seed in range(given.seeds):
            for arm in [arm for arm in given.arms if arm in DISSECTED]:
                dissect_run(work.folder(arm, seed), limit=given.limit)
    elif given.verb == "blend":
        make_blends(work, given.blends, given.seeds, given.limit)
    else:
        print(tables(work, given.arms, given.blends, given.seeds))


if __name__ == "__main__":
    main()
