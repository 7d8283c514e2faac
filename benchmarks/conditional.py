"""Affine experts beside dense nets of the same cost, on CIFAR-10 at linf 8/255 and Fashion-MNIST at linf 0.1.

python benchmarks/conditional.py run --cifar10 DIR --out DIR [--arms dense16 affine64 ...] [--seeds 0 1 2] [--epochs 10]
python benchmarks/conditional.py run --fashion --out DIR ...
python benchmarks/conditional.py table [--write]                 # --write: docs/results/studies/conditional.json
python benchmarks/conditional.py keep --out DIR --arms affine64 --epochs 30 --seeds 2   # into the zoo

One-step adversarial training (random start, step 1.25 eps; --steps 2: two of half that), SGD 0.2, one cycle, Nesterov,
batches of 128, weight decay 5e-4 (none on gates and experts), no augmentation; 1,000 of the training images are held
out, and the weights are kept that are best on them under PGD-10. The judge: the first 4,000 test images, the worst of
`attacks` an image, which a net with gates meets besides with its gates held at the clean image's, attacked alone, and
(hard ones) seen as soft.

A run's folder is OUT/ARM-EPOCHS-PRECISION-SEED, "fashion_" before it for that data set, "_two" behind the precision for
two steps; it is taken up where it was left. What is judged is written to a file of that name in
docs/results/studies/conditional, and not done again.
The ResNets meet the attacks as a suite, each on what those before it left. Differences are to the dense net (dense16,
resnet8) of the same data, seed, epochs, precision and steps, paired image by image. bf16 is the faster one only where
the processor has it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from results import RESULTS, described, spread_of, write
from robustmoe import records
from robustmoe.analysis import robust
from robustmoe.attacks import Attack, Threat
from robustmoe.attacks.base import Suite
from robustmoe.attacks.objectives import Joint, Objective
from robustmoe.costs import costs
from robustmoe.evaluation import evaluate_run
from robustmoe.models import Output
from robustmoe.recipe import Recipe
from robustmoe.spec import build
from robustmoe.training import train
from zoo import ship

PATHWAY = "pathway(patch_resnet(width=20), experts=2, ratio=0.8, router=downsampled(linear, size=4), standardise=True)"
ENSEMBLE = "ensemble(patch_resnet(width=16), experts=4, router=downsampled(linear, size=4), standardise=True)"
ARMS = {
    "dense16": "patch_resnet(width=16)",
    "dense24": "patch_resnet(width=24)",
    "dense32": "patch_resnet(width=32)",
    "affine64": "affine(patch_resnet(width=16), experts=64, routers=norm)",
    "affine64_block": "affine(patch_resnet(width=16), experts=64, routers=block)",
    "affine64_mean": "affine(patch_resnet(width=16), experts=64, routers=norm, pool=1)",
    "affine24_grid2": "affine(patch_resnet(width=16), experts=24, routers=norm, grid=2)",
    "affine64_grid2": "affine(patch_resnet(width=16), experts=64, routers=norm, grid=2)",
    "affine64_kernels4": "affine(patch_resnet(width=16), experts=64, routers=norm, kernels=4)",
    "kernels4": "affine(patch_resnet(width=16), experts=0, routers=norm, kernels=4)",
    "affine1": "affine(patch_resnet(width=16), experts=1, routers=norm)",
    "affine8": "affine(patch_resnet(width=16), experts=8, routers=norm)",
    "fixed8": "affine(patch_resnet(width=16), experts=8, routers=norm, gate=hard)",
    "sparse8": "affine(patch_resnet(width=16), experts=64, k=8, gate=renormalised, routers=norm)",
    "hard8": "affine(patch_resnet(width=16), experts=8, routers=norm, gate=straight_through)",
    "affine64_w32": "affine(patch_resnet(width=32), experts=64, routers=norm)",
    "pathway": PATHWAY,
    "advmoe": PATHWAY,
    "rt_er": ENSEMBLE,
    "squeeze16": "benchmarks/squeeze.py:patch_resnet",
    "resnet8": "resnet8(width=16)",
    "resnet8_w28": "resnet8(width=28)",
    "resnet8_squeeze": "benchmarks/squeeze.py:resnet8_16",
    "resnet8_affine64": "affine(resnet8(width=16), experts=64, routers=norm)",
    "resnet8_affine64_grid2": "affine(resnet8(width=16), experts=64, routers=norm, grid=2)",
    "resnet8_sparse8": "affine(resnet8(width=16), experts=64, k=8, gate=renormalised, routers=norm)",
    "resnet8_hard8": "affine(resnet8(width=16), experts=8, routers=norm, gate=straight_through)",
}
METHODS = {
    "pathway": "at({held}, balance=0.1)",
    "advmoe": "advmoe({attack}, variant=bilevel)",
    "rt_er": "rt_er({attack}, beta=6)",
}
"""Arms of the papers' models that cost what dense16 does, trained by AdvMoE's and RT-ER's methods, and a pathway
trained with its route held in the attack, this project's way.
"""
TWINS = {"patch": "dense16", "resnet8": "resnet8"}
"""The dense net that an arm is set beside, by the net in its model."""
STUDY = RESULTS / "studies" / "conditional"
SIZES = {"cifar10": "linf(8/255)", "fashion_mnist": "linf(0.1)"}
STEPS = {"cifar10": ("10/255", "5/255"), "fashion_mnist": ("0.125", "0.0625")}
"""The step's size of training with one step, and with two."""


def attacks(size: str) -> dict[str, str]:
    """The attacks that every net meets; their union is the worst case."""
    rivals = {f"rival {k - 1}": f"objective=targeted({k}, margin)" for k in (2, 3, 4, 5)}
    named = {"margin": "objective=joint(margin)", **rivals}
    longer = {name: f"pgd({size}, steps=30, {objective}, keep=first)" for name, objective in named.items()}
    return {"PGD-10": f"pgd({size}, steps=10, keep=first)", **longer}


def gate_attacks(size: str, soft: bool) -> dict[str, str]:
    """The attacks that nets with a router meet besides; ``soft``: their gates are so already."""
    pushed = {"gates held": "experts_only(margin)", "gates alone": "router_only"}
    named = {name: f"pgd({size}, steps=30, objective={each}, keep=first)" for name, each in pushed.items()}
    return named if soft else {**named, "gates softened": f"through(soft(1.0), {attacks(size)['margin']})"}


def recipe(arm: str, seed: int, args: argparse.Namespace) -> Recipe:
    model, data = ARMS[arm], data_of(args)
    size, climb = SIZES[data], f"steps={args.steps}, step_size={STEPS[data][args.steps - 1]}"
    free = r", undecayed='affine\\.'" if "affine" in model else ""
    return Recipe(
        model=model,
        data="fashion_mnist(val=0.02)" if args.fashion else f"cifar10(root={str(args.cifar10)!r}, val=0.02)",
        method=METHODS.get(arm, "at({attack})").format(
            attack=f"pgd({size}, {climb}, keep=last)",
            held=f"pgd({size}, {climb}, objective=experts_only, keep=last)",
        ),
        optimizer=f"sgd(lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True{free})",
        schedule="one_cycle(rise=0.4)",
        epochs=args.epochs,
        batch_size=128,
        precision=args.precision,
        seed=seed,
        val_attack=f"pgd({size}, steps=10)",
        threads=1,
        device="cpu",
    )


def name_of(arm: str, seed: int, args: argparse.Namespace) -> str:
    """The name of a run's folder, and of its results file."""
    prefix, ending = "fashion_" if args.fashion else "", "_two" if args.steps == 2 else ""
    return f"{prefix}{arm}-{args.epochs}-{args.precision}{ending}-{seed}"


def data_of(args: argparse.Namespace) -> str:
    return "fashion_mnist" if args.fashion else "cifar10"


def twin_of(arm: str) -> str:
    return next(twin for net, twin in TWINS.items() if net in ARMS[arm])


def attacks_of(arm: str, size: str) -> dict[str, str]:
    if not ARMS[arm].startswith(("affine", "pathway", "ensemble")):
        return attacks(size)
    soft = "affine" in ARMS[arm] and "gate=" not in ARMS[arm]
    return {**attacks(size), **gate_attacks(size, soft)}


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    """Trains and judges one net; whatever is finished is not done again."""
    folder = args.out / name_of(arm, seed, args)
    file = STUDY / f"{folder.name}.json"
    if file.exists():
        return
    resumed = (folder / "config.json").exists()
    start = time.process_time()
    train(recipe(arm, seed, args), folder, resume=resumed)
    seconds = None if resumed else time.process_time() - start
    clean, left = judged(folder, attacks_of(arm, SIZES[data_of(args)]), arm.startswith("resnet8"), args.limit)
    cost = costs(ARMS[arm], image_shape=(1, 28, 28) if args.fashion else (3, 32, 32))
    numbers = {
        "arm": arm,
        "data": data_of(args),
        "seed": seed,
        "epochs": args.epochs,
        "precision": args.precision,
        "steps": args.steps,
        "model": ARMS[arm],
        "macs": cost.macs,
        "parameters": cost.parameters,
        "training_cpu_seconds": seconds,
        "clean": clean,
        "attacks": {name: len(indices) / args.limit for name, indices in left.items()},
        "worst": len(set.intersection(*left.values())) / args.limit,
        "plain": len(set.intersection(*(left[name] for name in attacks("")))) / args.limit,
        "survivors": sorted(set.intersection(*left.values())),
        "images": args.limit,
        "last_epoch": records.read_jsonl(folder / "metrics.jsonl")[-1],
    }
    write(
        file,
        described(
            f"python benchmarks/conditional.py run {'--fashion ' if args.fashion else ''}--arms {arm} "
            f"--epochs {args.epochs} --precision {args.precision} --steps {args.steps}",
            seeds=[seed],
        ),
        numbers,
    )
    print(f"{file.name}: clean {100 * numbers['clean']:.1f}, worst case {100 * numbers['worst']:.1f}", flush=True)


@dataclass(frozen=True, repr=False)
class Judge(Suite):
    """Attacks by name, each on what those before it left."""

    threat: Threat
    attacks: tuple[tuple[str, Attack], ...]
    seed: int = 0

    def __repr__(self) -> str:
        return f"the judge's {len(self.attacks)} attacks"

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return Joint()

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return list(self.attacks)


def judged(folder: Path, named: dict[str, str], suite: bool, limit: int) -> tuple[float, dict[str, set[int]]]:
    """Clean accuracy, and the images that stand under each attack: alone, or (``suite``, which is cheaper) under it and
    all before it.
    """
    if not suite:
        alone = {
            name: evaluate_run(folder, attacks=(attack,), limit=limit, precision="fast", curve=())[0]
            for name, attack in named.items()
        }
        stands = {name: {row.index for row in each.rows if robust(row)} for name, each in alone.items()}
        return alone["PGD-10"].summary().clean.value, stands
    parts: list[tuple[str, Attack]] = [(name, build(attack, "attack")) for name, attack in named.items()]
    result = evaluate_run(
        folder, attacks=(Judge(parts[0][1].threat, tuple(parts)),), limit=limit, precision="fast", curve=()
    )[0]
    by_part = {row.index: row.part for row in result.rows if row.clean == row.label}
    names = list(named)
    return result.summary().clean.value, {
        name: {i for i, part in by_part.items() if part not in names[: at + 1]} for at, name in enumerate(names)
    }


def keep(arm: str, seed: int, args: argparse.Namespace) -> None:
    """Ships a net that is judged with the package, as zoo:DATA_ARM_xEPOCHS_SEED; its card has the judge's numbers."""
    run = name_of(arm, seed, args)
    file = json.loads((STUDY / f"{run}.json").read_text(encoding="utf-8"))
    numbers, about, config = file["numbers"], file["about"], records.read_config(args.out / run)
    told = {
        "name": f"{data_of(args)}_{arm}_x{args.epochs}{'_two' if args.steps == 2 else ''}_{seed}",
        "about": f"study of affine experts: {arm}, {args.epochs} epochs, seed {seed}",
        **{field: config[field] for field in ("model", "method", "threat")},
        "data": data_of(args),
        "n": numbers["images"],
        **{name: round(numbers[name] * numbers["images"]) for name in ("clean", "worst")},
        "attacks": list(attacks_of(arm, config["threat"]).values()),
        "command": about["command"],
        "commit": about["commit"],
        "hardware": about["hardware"],
    }
    ship(told["name"], args.out / run, told)


# ------------------------------------------------------------------------------------------------ the table


def read() -> list[dict[str, Any]]:
    files = sorted(STUDY.glob("*-*-*-*.json"))
    runs = [{"data": "cifar10", **json.loads(file.read_text(encoding="utf-8"))["numbers"]} for file in files]
    order = list(ARMS)
    return sorted(runs, key=lambda each: (each["data"], each["epochs"], order.index(each["arm"]), each["seed"]))


def difference(run: dict[str, Any], twin: dict[str, Any]) -> tuple[float, float]:
    """In points, of the worst cases, image by image: the mean, and half of its 95 % interval over the images."""
    if run["images"] != twin["images"]:
        raise SystemExit(f"{run['arm']} and {twin['arm']} of seed {run['seed']} were judged on other images")
    one, other = set(run["survivors"]), set(twin["survivors"])
    values = [100.0 * ((i in one) - (i in other)) for i in range(run["images"])]
    return statistics.mean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By data, arm and epochs: the spread over seeds of every share in per cent, and the differences to the twin."""
    out: dict[str, Any] = {}
    kinds: dict[tuple[str, str, int, str, int], dict[int, dict[str, Any]]] = {}
    for each in runs:
        kind = (each["data"], each["arm"], each["epochs"], each["precision"], each.get("steps", 1))
        kinds.setdefault(kind, {})[each["seed"]] = each
    for (data, arm, epochs, precision, steps), own in kinds.items():
        twins = kinds.get((data, twin_of(arm), epochs, precision, steps), {})
        first = next(iter(own.values()))
        entry: dict[str, Any] = {name: first[name] for name in ("model", "macs", "parameters", "images")}
        for name in ("clean", "worst", "plain"):
            entry[name] = spread_of([100 * each[name] for each in own.values()])
        for name in first["attacks"]:  # a suite's: what is left behind it
            entry[_key(name)] = spread_of([100 * each["attacks"][name] for each in own.values()])
        seconds = [each["training_cpu_seconds"] for each in own.values() if each["training_cpu_seconds"]]
        entry["training_cpu_seconds"] = spread_of(seconds) if seconds else None
        pairs = [difference(own[seed], twins[seed]) for seed in own if seed in twins and arm != twin_of(arm)]
        if pairs:
            means = [mean for mean, _ in pairs]
            entry["by_seed"] = means
            entry["difference"] = spread_of(means)
            entry["over_images"] = statistics.mean(half for _, half in pairs) / len(pairs) ** 0.5
            n = len(means)
            entry["over_seeds"] = stats.t.ppf(0.975, n - 1) * statistics.stdev(means) / n**0.5 if n > 1 else None
        prefix = "fashion_" if data == "fashion_mnist" else ""
        ending = ("" if precision == "bf16" else f"_{precision}") + ("_two" if steps == 2 else "")
        out[f"{prefix}{arm}_x{epochs}{ending}"] = entry
    return out


def _key(name: str) -> str:
    """A name as pages can point to it."""
    return re.sub(r"\W", "_", name)


def table(found: dict[str, Any]) -> str:
    head = "| arm | seeds | MACs | parameters | clean | PGD-10 | plain attacks | worst case | to the dense net "
    lines = [f"{head}| ± over images | ± over seeds | training CPU s |", "|" + "---|" * 12]
    for name, each in found.items():
        cells = [name, str(each["worst"]["n"]), f"{each['macs'] / 1e6:.3f} M", f"{each['parameters']:,}"]
        cells += [
            f"{each[key]['mean']:.1f} ± {each[key]['sd']:.1f}" for key in ("clean", _key("PGD-10"), "plain", "worst")
        ]
        if "difference" in each:
            over_seeds = each["over_seeds"]
            by_seed = ", ".join(f"{mean:+.1f}" for mean in each["by_seed"])
            cells += [f"{each['difference']['mean']:+.2f} ({by_seed})", f"{each['over_images']:.1f}"]
            cells += ["" if over_seeds is None else f"{over_seeds:.1f}"]
        else:
            cells += ["", "", ""]
        seconds = each["training_cpu_seconds"]
        lines.append("| " + " | ".join([*cells, f"{seconds['mean']:.0f}" if seconds else ""]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table", "keep"])
    parser.add_argument("--out", type=Path, help="where run folders stand")
    parser.add_argument("--cifar10", type=Path, help="a folder that the data set cifar10 reads")
    parser.add_argument("--fashion", action="store_true", help="Fashion-MNIST instead of CIFAR-10")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the training")
    parser.add_argument("--steps", type=int, choices=[1, 2], default=1, help="of the attack in training")
    parser.add_argument("--limit", type=int, default=4000, help="test images")
    parser.add_argument("--write", action="store_true", help="the table's numbers into docs/results/studies")
    args = parser.parse_args()
    if args.verb == "run":
        if args.out is None or (args.cifar10 is None) != args.fashion:
            parser.error("run needs --out, and --cifar10 with the folder of the data set or --fashion")
        for seed in args.seeds:
            for arm in args.arms:
                run(arm, seed, args)
        return
    if args.verb == "keep":
        for seed in args.seeds:
            for arm in args.arms:
                keep(arm, seed, args)
        return
    found = summary(read())
    print(table(found))
    if args.write:
        seeds = sorted({each["seed"] for each in read()})
        about = described(
            "python benchmarks/conditional.py table --write", seeds=seeds, spread="sample deviation over seeds"
        )
        write(STUDY.with_suffix(".json"), about, found)


if __name__ == "__main__":
    main()
