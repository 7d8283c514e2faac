"""Does AdvMoE help? Dense, S-Dense, adversarially trained MoE, AdvMoE's variants and controls on Fashion-MNIST.

python benchmarks/advmoe_study.py train --out DIR [--seeds 3]      # hours on one core; go on with the same command
python benchmarks/advmoe_study.py evaluate --out DIR [--limit 1000]
python benchmarks/advmoe_study.py table --out DIR
python benchmarks/advmoe_study.py collapse                         # fresh routers

Every arm has the same data, epochs, batches, optimiser, training threat (linf 0.1, 2 steps) and loss (TRADES, beta 6);
all pathways have the same architecture. One row an arm: mean ± standard deviation over the seeds, in per cent of the
test images. "worst case" is per image over the attacks of `ATTACKS` that the model can meet.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats

from robustmoe import analysis, records
from robustmoe import spec as specs
from robustmoe.attacks import build_attack
from robustmoe.data import fashion_mnist
from robustmoe.evaluation import evaluate_run
from robustmoe.models import build_model
from robustmoe.recipe import Recipe
from robustmoe.records import Result
from robustmoe.training import train

BACKBONE = "resnet(depth=8, width=32, stem=imagenet)"
PATHWAY = f"pathway({BACKBONE}, experts=2, ratio=0.5, router=small_cnn(width=16), standardise=True)"
ATTACK = "pgd(linf(0.1), steps=2, step_size=0.0625, start=near, keep=last)"
HELD = ATTACK.replace("start", "objective=experts_only(kl), start")
RELEASED = f"advmoe({ATTACK}, variant=released, shared_attack=True"

ARMS = {
    "dense": (BACKBONE, f"trades({ATTACK}, beta=6)"),
    "sdense": (f"slim({BACKBONE})", f"trades({ATTACK}, beta=6)"),
    "at_moe": (PATHWAY, f"trades({ATTACK}, beta=6, balance=0.1)"),
    "held": (PATHWAY, f"trades({HELD}, beta=6, balance=0.1)"),
    "bilevel": (PATHWAY, f"advmoe({ATTACK}, variant=bilevel, balance=0.1)"),
    "released": (PATHWAY, f"{RELEASED})"),
    "random": (PATHWAY, f"{RELEASED}, target=random)"),
    "no_target": (PATHWAY, f"{RELEASED}, target=none)"),
}

PLAIN = {
    "PGD-50": "pgd(linf(0.1), steps=50)",
    "PGD-50 margin": "pgd(linf(0.1), steps=50, objective=joint(margin))",
}
ROUTED = {
    "frozen route": "pgd(linf(0.1), steps=50, objective=experts_only)",
    "steering": "expert_transition(linf(0.1), steps=50)",
    "router only": "pgd(linf(0.1), steps=20, objective=router_only)",
}
BESIDE = {"released attack": "pgd(linf(0.1), steps=10, objective=diluted)", "PGD-10": "pgd(linf(0.1), steps=10)"}
"""Claim C14: what the released evaluation says beside the plain attack of as many steps. Not in the worst case."""


def recipe(arm: str, seed: int) -> Recipe:
    model, method = ARMS[arm]
    return Recipe(
        model=model,
        data="fashion_mnist",
        method=method,
        optimizer="sgd(lr=0.1, momentum=0.9, weight_decay=5e-4)",
        schedule="one_cycle(rise=0.3)",
        epochs=2,
        batch_size=128,
        precision="bf16",
        seed=seed,
        val_attack="pgd(linf(0.1), steps=10)",
        val_limit=512,
        threads=1,
    )


def attacks_of(arm: str) -> dict[str, str]:
    return PLAIN if arm in ("dense", "sdense") else {**PLAIN, **ROUTED, **BESIDE}


def each(out: Path, arms: list[str], seeds: int, work: Callable[[str, int, Path], object]) -> None:
    """Seed by seed, so that what there is after half the time can be compared."""
    for seed in range(seeds):
        for arm in arms:
            work(arm, seed, out / f"{arm}-{seed}")


def train_one(arm: str, seed: int, folder: Path) -> None:
    train(recipe(arm, seed), folder, resume=(folder / "config.json").exists())


def finished(folder: Path) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and len(records.read_jsonl(file)) == 2


def evaluate_one(arm: str, folder: Path, limit: int) -> None:
    if finished(folder):
        attacks = tuple(attacks_of(arm).values())
        evaluate_run(folder, attacks=attacks, limit=limit, precision="fast", curve=())


def files_of(arm: str, folder: Path) -> dict[str, Result]:
    """The rows by the attack's name in `attacks_of`."""
    names = {specs.text(build_attack(text)): name for name, text in attacks_of(arm).items()}
    files = [records.read(path) for path in sorted((folder / "rows").glob("*.jsonl")) if "examples" not in path.name]
    return {names[file.header.attack]: file for file in files if file.header.attack in names}


def survivors(arm: str, folder: Path) -> dict[int, bool]:
    """Image -> right under every attack of the worst case."""
    files = [file for name, file in files_of(arm, folder).items() if name not in BESIDE]
    tables = [{row.index: analysis.robust(row) for row in file.rows} for file in files]
    return {index: all(table[index] for table in tables) for index in tables[0]}


def numbers(arm: str, folder: Path) -> dict[str, float] | None:
    """Per cent of the test images by column; None for a run that is not evaluated."""
    by_attack = files_of(arm, folder)
    if set(by_attack) != set(attacks_of(arm)):
        return None
    inside = [(file.header, file.rows) for name, file in by_attack.items() if name not in BESIDE]
    worst = analysis.worst_case(inside)
    found = {"clean": worst.clean.value, "worst case": worst.robust.value}
    for name, file in by_attack.items():
        found[name] = analysis.summary(*file).robust.value
        moved = [value for row in file.rows for value in row.rerouted.values()]
        if moved and name in ("PGD-50", "router only"):
            found[f"rerouted, {name}"] = statistics.mean(moved)
    return {name: 100 * value for name, value in found.items()}


def table(out: Path, arms: list[str], seeds: int) -> str:
    found = {arm: [n for seed in range(seeds) if (n := numbers(arm, out / f"{arm}-{seed}"))] for arm in arms}
    columns = ["clean", *PLAIN, "frozen route", "steering", "router only", "worst case"]
    columns += [*BESIDE, "rerouted, PGD-50", "rerouted, router only"]
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for arm, runs in found.items():
        if runs:
            cells = [spread([run[column] for run in runs if column in run]) for column in columns]
            lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    lines += ["", "| worst case | by seed | mean | ± over seeds | ± over images |", "|---|---|---|---|---|"]
    pairs = [("at_moe", "dense"), ("released", "dense"), ("released", "at_moe"), ("bilevel", "at_moe")]
    pairs += [
        ("released", "bilevel"),
        ("random", "released"),
        ("held", "at_moe"),
        ("held", "released"),
        ("held", "sdense"),
    ]
    lines += [difference(out, *pair, seeds) for pair in pairs if all(len(found.get(arm, [])) == seeds for arm in pair)]
    return "\n".join(lines)


def difference(out: Path, left: str, right: str, seeds: int) -> str:
    """Paired, in points: each seed's, the mean, and half of its 95 % interval, by t over the seeds and by the normal
    law over all pairs of images, taken as independent.
    """
    by_seed = []
    for seed in range(seeds):
        one, other = (survivors(arm, out / f"{arm}-{seed}") for arm in (left, right))
        by_seed.append([100.0 * (one[index] - other[index]) for index in one])
    means = [statistics.mean(each) for each in by_seed]
    every = [value for each in by_seed for value in each]
    over_images = 1.96 * statistics.stdev(every) / len(every) ** 0.5
    over_seeds = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(means) / seeds**0.5 if seeds > 1 else float("nan")
    each = ", ".join(f"{mean:+.1f}" for mean in means)
    return f"| {left} - {right} | {each} | {statistics.mean(means):+.1f} | {over_seeds:.1f} | {over_images:.1f} |"


def collapse(router: str, standardise: bool, training: bool) -> int:
    """Claim C12: of 20 fresh routers, how many send more than 90 % of 1,000 test images to one expert; ``training``:
    BatchNorms by the statistics of each batch of 128.
    """
    data, found = fashion_mnist(), 0
    x = data.test.batch(list(range(1000))).x
    text = f"pathway(resnet(depth=8, width=4, stem=imagenet), router={router}, standardise={standardise})"
    for seed in range(20):
        model = build_model(text, 10, (1, 28, 28), data.mean, data.std, seed).train(training)
        with torch.no_grad():
            expert = torch.cat([model.route(part)["router"].index.flatten() for part in x.split(128)])
        found += int(torch.bincount(expert).max()) > 900
    return found


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "evaluate", "table", "collapse"))
    parser.add_argument("--out", type=Path, default=Path("runs/advmoe_study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    if given.verb == "train":
        each(given.out, given.arms, given.seeds, train_one)
    elif given.verb == "evaluate":
        each(given.out, given.arms, given.seeds, lambda arm, _, folder: evaluate_one(arm, folder, given.limit))
    elif given.verb == "collapse":
        for router in ("resnet20", "small_cnn(width=16)"):
            for standardise, training in ((False, False), (False, True), (True, False), (True, True)):
                print(f"{router}, {standardise=}, {training=}: {collapse(router, standardise, training)} of 20")
    else:
        print(table(given.out, given.arms, given.seeds))


if __name__ == "__main__":
    main()
