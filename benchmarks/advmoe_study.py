"""Does AdvMoE help? Dense, S-Dense, adversarially trained MoE, AdvMoE's variants and controls on Fashion-MNIST.

python benchmarks/advmoe_study.py train --out DIR [--seeds 3]      # hours on one core; go on with the same command
python benchmarks/advmoe_study.py evaluate --out DIR [--limit 1000]
python benchmarks/advmoe_study.py table --out DIR

Every arm has the same data, epochs, batches, optimiser, training threat (linf 0.1, 2 steps) and loss (TRADES, beta 6);
all pathways have the same architecture. One row an arm: mean ± standard deviation over the seeds, in per cent of the
test images. "worst case" is per image over the attacks of `ATTACKS` that the model can meet.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from robustmoe import analysis, records
from robustmoe import spec as specs
from robustmoe.attacks import build_attack
from robustmoe.evaluation import evaluate_run
from robustmoe.recipe import Recipe
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


def numbers(arm: str, folder: Path) -> dict[str, float] | None:
    """Per cent of the test images by column; None for a run that is not evaluated."""
    names = {specs.text(build_attack(text)): name for name, text in attacks_of(arm).items()}
    files = [records.read(path) for path in sorted((folder / "rows").glob("*.jsonl")) if "examples" not in path.name]
    by_attack = {names[file.header.attack]: file for file in files if file.header.attack in names}
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
    lines += ["", "Differences in the worst case, seed by seed (points; mean, and each seed's):", ""]
    for left, right in (
        ("at_moe", "dense"), ("bilevel", "dense"), ("released", "dense"), ("held", "dense"),
        ("at_moe", "sdense"), ("bilevel", "at_moe"), ("released", "at_moe"), ("random", "released"), ("held", "at_moe"),
    ):  # fmt: skip
        pairs = [a["worst case"] - b["worst case"] for a, b in zip(found.get(left, []), found.get(right, []))]
        if pairs:
            lines.append(f"- {left} - {right}: {statistics.mean(pairs):+.1f} ({', '.join(f'{p:+.1f}' for p in pairs)})")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "evaluate", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    if given.verb == "train":
        each(given.out, given.arms, given.seeds, train_one)
    elif given.verb == "evaluate":
        each(given.out, given.arms, given.seeds, lambda arm, _, folder: evaluate_one(arm, folder, given.limit))
    else:
        print(table(given.out, given.arms, given.seeds))


if __name__ == "__main__":
    main()
