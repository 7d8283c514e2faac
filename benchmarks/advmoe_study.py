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
from pathlib import Path

import torch

from robustmoe import analysis
from robustmoe.data import fashion_mnist
from robustmoe.models import build_model
from robustmoe.recipe import Recipe
from study import Study, table

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


def numbers(study: Study, arm: str, seed: int) -> dict[str, float] | None:
    """Per cent of the test images by column; None for a run that is not evaluated."""
    inside = study.inside(arm, seed)
    if not inside:
        return None
    worst = analysis.worst_case([(file.header, file.rows) for file in inside.values()])
    found = {"clean": worst.clean.value, "worst case": worst.robust.value}
    for name, file in study.files(arm, seed).items():
        found[name] = analysis.evaluation_summary(*file).robust.value
        moved = [value for row in file.rows for value in row.rerouted.values()]
        if moved and name in ("PGD-50", "router only"):
            found[f"rerouted, {name}"] = statistics.mean(moved)
    return {name: 100 * value for name, value in found.items()}


def tables(study: Study, arms: list[str], seeds: int) -> str:
    found = {arm: [n for seed in range(seeds) if (n := numbers(study, arm, seed))] for arm in arms}
    columns = ["clean", *PLAIN, "frozen route", "steering", "router only", "worst case"]
    columns += [*BESIDE, "rerouted, PGD-50", "rerouted, router only"]
    pairs = [("at_moe", "dense"), ("released", "dense"), ("released", "at_moe"), ("bilevel", "at_moe")]
    pairs += [("released", "bilevel"), ("random", "released"), ("held", "at_moe"), ("held", "released")]
    pairs += [("held", "sdense")]
    return "\n".join([*table(columns, found), "", *study.differences(pairs, seeds)])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("train", "evaluate", "table", "collapse"))
    parser.add_argument("--out", type=Path, default=Path("runs/advmoe_study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    given = parser.parse_args()
    study = Study(given.out, recipe, attacks_of, frozenset(BESIDE))
    if given.verb == "train":
        study.train(given.arms, given.seeds)
    elif given.verb == "evaluate":
        study.evaluate(given.arms, given.seeds, given.limit)
    elif given.verb == "collapse":
        for router in ("resnet20", "small_cnn(width=16)"):
            for standardise, training in ((False, False), (False, True), (True, False), (True, True)):
                print(f"{router}, {standardise=}, {training=}: {collapse(router, standardise, training)} of 20")
    else:
        print(tables(study, given.arms, given.seeds))


if __name__ == "__main__":
    main()
