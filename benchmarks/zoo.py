"""Makes the zoo: trains each model into a run folder, attacks it, and writes it and its card into the package.

python benchmarks/zoo.py --out DIR --cifar10 DIR [--only NAME ...] [--train]
python benchmarks/zoo.py --table                       # what the cards say: docs/results/zoo.json

Some two hours on one CPU thread; a model that is trained or attacked is not done again. ``--train`` stops before the
attacks. The attacks are the package's defaults, on the first 1,000 test images (of transformers 200); certificates of
the nets trained for them, on the first 200. CIFAR-10's folder is not written down: the shipped configuration says
cifar10.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from results import RESULTS, described, write
from robustmoe import demo, zoo
from robustmoe.analysis import groups, worst_case
from robustmoe.evaluation import certify_run, evaluate_run
from robustmoe.recipe import Recipe
from robustmoe.records import read_config
from robustmoe.training import train

LIMITS, CERTIFIED = {"vit_moe": 200}, 200
"""Test images that are attacked, 1,000 of the other kinds: route_beam takes 2,000 passes an image."""
SIZES = {"digits": "linf(0.1)", "fashion_mnist": "linf(0.1)", "cifar10": "linf(8/255)"}
"""Data set: the radius of its nets."""
STEPS = {"linf(0.1)": "0.125", "linf(8/255)": "10/255"}
"""The step of one-step adversarial training: 1.25 times the radius."""

NETS = {
    "dense": "patch_resnet(width=16)",
    "pathway": "pathway(patch_resnet(width=16), experts=2, ratio=0.75, router=small_cnn(width=8), standardise=True)",
    "upcycled": "ensemble(patch_resnet(width=16), experts=4, router=downsampled(linear, size=4), standardise=True)",
    "affine": "affine(patch_resnet(width=16), experts=64, routers=norm)",
    "certified": (
        "ensemble(conv_small(width=8, hidden=64), experts=2, router=conv_small(width=4, hidden=16), standardise=True)"
    ),
    "vit_moe": "vit_moe(tiny, patch=4, width=48, depth=4, heads=4, experts=4, k=1, placement=every_2)",
}
ABOUT = {
    "dense": "a small dense net, adversarially trained",
    "pathway": "a MoE-CNN of two pathways, adversarially trained (AdvMoE's kind)",
    "upcycled": "an ensemble of copies of the dense net, fine-tuned for a stable route",
    "affine": "the dense net with 64 affine experts a norm, mixed softly",
    "certified": "a hard-routed MoE of two networks, trained for certificates",
    "vit_moe": "a small vision transformer, two blocks of four token-routed experts",
}


def entries(cifar10: str) -> dict[str, Recipe]:
    """Returns the recipe of every model, those first that others start from."""
    recipes = {}
    for data, size in SIZES.items():
        place = f"cifar10(root={cifar10!r})" if data == "cifar10" else data
        for kind in NETS:
            if (data, kind) == ("digits", "affine"):  # its net takes images of whole patches of 4 of larger sides
                continue
            recipes[f"{data}_{kind}"] = _digits(kind) if data == "digits" else _larger(kind, place, size)
    return recipes


def _digits(kind: str) -> Recipe:
    """The demo's three models, and two more of their size."""
    size = SIZES["digits"]
    attack = f"pgd({size}, steps=3, keep=last)"
    common: dict[str, Any] = {"data": "digits", "batch_size": 64, "seed": 1, "threads": 1}
    if kind == "upcycled":
        return Recipe(
            model="ensemble(resnet8(width=16), experts=2, router=downsampled(linear, size=4), standardise=True)",
            method=_stable(attack),
            optimizer="sgd(lr=0.02, momentum=0.9, weight_decay=5e-4)",
            schedule="one_cycle",
            epochs=4,
            init="digits_dense",
            val_attack=f"pgd({size}, steps=10)",
            **common,
        )
    if kind == "vit_moe":
        return _transformer(NETS[kind].replace("patch=4", "patch=2"), attack, size, 30, common)
    return demo.recipes()[kind]


def _larger(kind: str, data: str, size: str) -> Recipe:
    """Fashion-MNIST and CIFAR-10: one-step adversarial training with a random start (Wong et al. 2020)."""
    attack = f"pgd({size}, steps=1, step_size={STEPS[size]}, keep=last)"
    common: dict[str, Any] = {"data": data, "batch_size": 128, "seed": 0, "threads": 1, "val_limit": 1000}
    if kind == "vit_moe":
        return _transformer(NETS[kind], attack, size, 6, common)
    if kind == "certified":
        radius = "linf(2/255)" if data != "fashion_mnist" else size
        return Recipe(
            model=NETS[kind],
            method=f"certified({radius}, stability=0.3, balance=0.1)",
            optimizer="adamw(lr=2e-3, weight_decay=0)",
            schedule="one_cycle(rise=0.3)",
            epochs=8,
            clip=8.0,
            val_certifier=f"bounds({radius}, how=ibp, search=0, dtype=float32)",
            **common,
        )
    held = attack.replace("keep", "objective=experts_only, keep")
    methods = {
        "dense": f"at({attack})",
        "affine": f"at({attack})",
        "pathway": f"at({held}, balance=0.1)",
        "upcycled": _stable(attack),
    }
    free = r", undecayed='affine\\.'" if kind == "affine" else ""
    rate, epochs = (0.04, 2) if kind == "upcycled" else (0.2, 10)
    return Recipe(
        model=NETS[kind],
        method=methods[kind],
        optimizer=f"sgd(lr={rate}, momentum=0.9, weight_decay=5e-4, nesterov=True{free})",
        schedule="one_cycle(rise=0.4)",
        epochs=epochs,
        precision="bf16",
        init=f"{data.partition('(')[0]}_dense" if kind == "upcycled" else None,
        val_attack=f"pgd({size}, steps=10)",
        **common,
    )


def _stable(attack: str) -> str:
    """Training that protects an expert drawn at random and keeps the route (docs/dual.md, arm "upcycled")."""
    held = attack.replace("keep", "objective=experts_only, keep")
    return f"rt_er({held}, protect=random, loss=ce, beta=1, balance=0.1, stability=1)"


def _transformer(model: str, attack: str, size: str, epochs: int, common: dict[str, Any]) -> Recipe:
    return Recipe(
        model=model,
        method=f"at({attack}, balance=0.01, balance_loss=vmoe)",
        optimizer="adamw(lr=4e-3, weight_decay=0.05)",
        schedule="one_cycle(rise=0.2)",
        epochs=epochs,
        clip=1.0,
        val_attack=f"pgd({size}, steps=10)",
        **common,
    )


def card(name: str, folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Attacks (and certifies) a trained run, and returns what its card says."""
    data = next(each for each in SIZES if name.startswith(each))
    kind = name.removeprefix(f"{data}_")
    config = read_config(folder)
    results = evaluate_run(folder, attacks=(), limit=LIMITS.get(kind, 1000), curve=())
    worst = worst_case([(result.header, result.rows) for result in groups(results)[0]])
    proven = {}
    if kind == "certified":
        (record,) = certify_run(folder, certifiers=(f"bounds({config['threat']}, search=3)",), limit=CERTIFIED)
        proven = {"certified": record.summary().certified.count, "certified_n": record.summary().certified.n}
    return {
        "name": name,
        "about": ABOUT[kind],
        **{field: config[field] for field in ("model", "method", "threat")},
        "data": data,
        "n": worst.robust.n,
        "clean": worst.clean.count,
        "worst": worst.robust.count,
        **proven,
        "attacks": [adds.name for adds in worst.adds],
        **{field: source[field] for field in ("command", "commit", "hardware")},
    }


def ship(name: str, folder: Path, told: dict[str, Any]) -> None:
    """Writes a model's files and card into the package."""
    place = zoo.FOLDER / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "model.safetensors", place / "model.safetensors")
    config = {**read_config(folder), **{field: told[field] for field in ("data", "command")}}  # no folder of here
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (place / zoo.CARD).write_text(json.dumps(told, indent=1) + "\n")


def table() -> None:
    """Writes docs/results/zoo.json: what the cards say, in per cent."""
    cards = zoo.cards()
    numbers = {
        card.name: {
            "clean": 100 * card.clean / card.n,
            "worst": 100 * card.worst / card.n,
            "certified": 100 * card.certified / card.certified_n if card.certified_n else None,
            "n": card.n,
            "kilobytes": (zoo.FOLDER / card.name / "model.safetensors").stat().st_size / 1e3,
        }
        for card in cards
    }
    made = [{"name": card.name, "commit": card.commit, "hardware": card.hardware} for card in cards]
    seeds = sorted({read_config(zoo.FOLDER / card.name)["seed"] for card in cards})
    write(RESULTS / "zoo.json", described("python benchmarks/zoo.py --table", seeds=seeds), numbers, models=made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--cifar10", default="cifar10", help="the folder of CIFAR-10")
    parser.add_argument("--only", nargs="*", help="these models alone")
    parser.add_argument("--train", action="store_true", help="stop before the attacks")
    parser.add_argument("--table", action="store_true", help="write docs/results/zoo.json of the cards, and stop")
    args = parser.parse_args()
    if args.table:
        table()
        return
    torch.set_num_threads(1)
    source = described("python benchmarks/zoo.py")
    recipes = {name: each for name, each in entries(args.cifar10).items() if not args.only or name in args.only}
    for name, recipe in recipes.items():
        folder = args.out / name
        if recipe.init:
            recipe = dataclasses.replace(recipe, init=str(args.out / recipe.init))
        train(recipe, folder, resume=(folder / "config.json").exists())
    told = {} if args.train else {name: card(name, args.out / name, source) for name in recipes}
    for name, each in told.items():  # the sources stay as they were committed until everything is measured
        ship(name, args.out / name, each)


if __name__ == "__main__":
    main()
