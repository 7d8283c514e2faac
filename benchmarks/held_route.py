"""What an adversarial training that holds the route changes: joint against experts_only training attacks, several
seeds, on digits.

python benchmarks/held_route.py [--seeds N]

One row a training objective: mean and spread over seeds of the clean accuracy and of what each attack leaves, in per
cent of the test images. The model, schedule and attacks are those of `robustmoe demo`; only the training attack's
objective differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from robustmoe import analysis, demo
from robustmoe.evaluation import evaluate_run
from robustmoe.training import train

COLUMNS = ("clean", "joint", "experts_only", "router_only", "worst case")


def one(objective: str, seed: int, folder: Path) -> dict[str, float]:
    """Train and attack one model; per cent of the test images by column."""
    from robustmoe.attacks import build_attack

    method = f"at(pgd({demo.EPS}, steps=3, objective={objective}, keep=last), balance=0.1)"
    train(dataclasses.replace(demo.ROUTED, method=method, seed=seed), folder)
    attacks = [build_attack(text) for text in demo.ROUTED.attacks]
    results = evaluate_run(folder, curve=(), device="cpu")
    worst = analysis.worst_case([(r.header, r.rows) for r in results])
    found = {"clean": worst.clean.value, "worst case": worst.robust.value}
    for attack, result in zip(attacks, results):
        found[attack.objective.name] = analysis.evaluation_summary(*result).robust.value
    return {name: 100 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    print("| training attack | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for objective in ("joint", "experts_only"):
        with tempfile.TemporaryDirectory() as scratch:
            runs = [one(objective, seed, Path(scratch) / str(seed)) for seed in range(seeds)]
        cells = [[run[column] for run in runs] for column in COLUMNS]
        spread = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c) if len(c) > 1 else 0:.1f}" for c in cells]
        print(f"| {objective} | " + " | ".join(spread) + " |", flush=True)


if __name__ == "__main__":
    main()
