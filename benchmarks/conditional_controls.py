"""What the gates of affine experts do once they are trained: a net's gates are changed, and it is attacked anew.

    python benchmarks/conditional_controls.py --cifar10 DIR [--runs RUN ...] [--limit 1000] [--write]

RUN: folders that `benchmarks/conditional.py run` left (arm affine64), or those of it in the zoo, of 30 epochs. Each of
these nets is the trained one but for its gates: "uniform", every expert alike (the router's last layer is 0); "random",
a router with weights drawn anew, at the size of the trained ones; "uniform N", only router N is uniform. Attacks see
the net as it then is. "clean of another image": no attack, each image with the gates of the next one; "moved": half of
the sum of absolute changes of the gates under PGD-10, from 0 to 1. --write:
docs/results/studies/conditional_controls.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional import SIZES, attacks
from results import RESULTS, described, spread_of, write
from robustmoe import zoo
from robustmoe.analysis import robust
from robustmoe.attacks import Attack
from robustmoe.data import Batch, Data
from robustmoe.evaluation import evaluate
from robustmoe.models import RoutedModel
from robustmoe.models.affine import AffineModel, LayerExperts
from robustmoe.noise import Noise
from robustmoe.routing import Trace
from robustmoe.spec import build
from robustmoe.training import load_model

MET = attacks(SIZES["cifar10"])
JUDGE = ("PGD-10", "margin", "rival 1")


def routers(model: RoutedModel) -> list[LayerExperts]:
    assert isinstance(model, AffineModel)
    return [each for each in model.affine if isinstance(each, LayerExperts)]


@torch.no_grad()
def with_gates(model: RoutedModel, kind: str) -> RoutedModel:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for number, each in enumerate(routers(changed)):
        head = each.router.head
        if kind in ("uniform", f"uniform {number}"):
            head.weight.zero_()
            head.bias.zero_()
        elif kind == "random":
            for weight in (head.weight, head.bias):
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn * weight.std() + weight.mean())
    return changed


def survivors(model: RoutedModel, batch: Batch) -> tuple[float, list[bool]]:
    """Clean accuracy, and for each image whether it stands in the worst of `JUDGE`."""
    judges = tuple(build(MET[name], "attack") for name in JUDGE)
    results = evaluate(model, batch.x, batch.y, attacks=judges, curve=())
    stands = [all(robust(row) for row in rows) for rows in zip(*(each.rows for each in results), strict=True)]
    return results[0].summary().clean.value, stands


def gates(trace: Trace) -> dict[str, Tensor]:
    """(n, e) the weight of every expert, router by router."""
    return {
        name: torch.zeros_like(routing.logits[:, 0]).scatter_(1, routing.index[:, 0], routing.weight[:, 0])
        for name, routing in trace.items()
    }


@torch.no_grad()
def of_another_image(model: RoutedModel, batch: Batch) -> float:
    """Clean accuracy with the gates of the next image."""
    trace = {name: routing[torch.arange(len(batch.x)).roll(-1)] for name, routing in model.run(batch.x).trace.items()}
    return float((model.run(batch.x, forced=trace).logits.argmax(1) == batch.y).double().mean())


def moved(model: RoutedModel, batch: Batch) -> list[float]:
    attack: Attack = build(MET["PGD-10"].replace("keep=first", "keep=last"), "attack")
    adversarial = attack.perturb(model, batch.x, batch.y, Noise.of(torch.arange(len(batch.x)), 0))
    with torch.no_grad():
        clean, attacked = gates(model.run(batch.x).trace), gates(model.run(adversarial).trace)
    return [float(0.5 * (clean[name] - attacked[name]).abs().sum(1).mean()) for name in clean]


def controls(run: Path, batch: Batch) -> dict[str, Any]:
    model = load_model(run)
    base, stands = survivors(model, batch)
    out: dict[str, Any] = {
        "seed": json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"],
        "trained": {"clean": base, "worst": statistics.mean(stands)},
        "clean_of_another_image": of_another_image(model, batch),
        "moved": moved(model, batch),
    }
    for kind in ("uniform", "random", *(f"uniform {number}" for number in range(len(routers(model))))):
        clean, others = survivors(with_gates(model, kind), batch)
        out[kind] = {"clean": clean, "worst": statistics.mean(others)}
        print(f"{run.name}, {kind}: clean {100 * clean:.1f}, worst {100 * out[kind]['worst']:.1f}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="a folder that the data set cifar10 reads")
    parser.add_argument("--runs", type=Path, nargs="+", default=sorted(zoo.FOLDER.glob("cifar10_affine64_x30_*")))
    parser.add_argument("--limit", type=int, default=1000, help="test images")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data: Data = build(f"cifar10(root={str(args.cifar10)!r}, val=0.02)", "data")
    batch = data.test.batch(list(range(args.limit)))
    each = [controls(run, batch) for run in args.runs]
    kinds = [name for name, value in each[0].items() if isinstance(value, dict)]
    numbers = {
        kind.replace(" ", "_"): {
            "clean": spread_of([100 * run[kind]["clean"] for run in each]),
            "worst": spread_of([100 * run[kind]["worst"] for run in each]),
        }
        for kind in kinds
    } | {"clean_of_another_image": spread_of([100 * run["clean_of_another_image"] for run in each])}
    numbers |= {f"moved_{n}": spread_of([run["moved"][n] for run in each]) for n in range(len(each[0]["moved"]))}
    print(numbers)
    if args.write:
        command = f"python benchmarks/conditional_controls.py --limit {args.limit} --write"
        about = described(command, seeds=[run["seed"] for run in each], images=args.limit)
        write(RESULTS / "studies" / "conditional_controls.json", about, numbers)


if __name__ == "__main__":
    main()
