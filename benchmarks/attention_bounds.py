"""Certificates of vision transformers of one block on digits: docs/results/attention_bounds.json.

python benchmarks/attention_bounds.py [--seeds 0 1 2] [--images 30]     # half an hour on one thread

Each net is trained by adversarial training and by `certified(linf(0.01))`, for every seed; of the first test images the
share that is right, that stands under PGD-20, and that each kind of bounds certifies, at linf 0.01 and 0.02. Nets that
stand in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from results import RESULTS, described, spread_of, write
from robustmoe.attacks import build_attack
from robustmoe.data import digits
from robustmoe.evaluation import certify
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.training import load_model, train

SIZES = "patch=4, width=16, depth=1, heads=2"
NETS = {
    "dense": f"vit({SIZES})",
    "top_1": f"vit_moe(tiny, {SIZES}, experts=3, k=1, placement=(0,))",
    "slots": f"vit_moe(tiny, {SIZES}, experts=3, choice=slots, slots=2, placement=(0,))",
}
METHODS = {"at": "at(pgd(linf(0.03), steps=5, keep=last))", "certified": "certified(linf(0.01))"}
EPOCHS = {"at": 40, "certified": 60}
RADII = (0.01, 0.02)
HOW = ("ibp", "crown_ibp", "crown")


def trained(net: str, method: str, seed: int, folder: Path) -> Any:
    recipe = Recipe(
        model=NETS[net],
        data="digits",
        method=METHODS[method],
        optimizer="adamw(lr=0.003)",
        schedule="one_cycle",
        epochs=EPOCHS[method],
        batch_size=64,
        seed=seed,
        threads=1,
        device="cpu",
    )
    return load_model(train(recipe, folder)).eval()


def measured(model: Any, images: int) -> dict[str, float]:
    """In per cent of the images; and seconds of the CPU an image."""
    batch = digits().test.batch(torch.arange(images))
    with torch.no_grad():
        right = model(batch.x).argmax(1) == batch.y
    told = {"clean": 100 * float(right.float().mean())}
    for eps in RADII:
        name = f"at_{eps}".replace(".", "_")
        attack = build_attack(f"pgd(linf({eps}), steps=20)")
        attacked = attack(model, batch.x, batch.y, Noise.of(batch.index, 0))
        with torch.no_grad():
            stands = right & (model(attacked).argmax(1) == batch.y)
        told[f"pgd_{name}"] = 100 * float(stands.float().mean())
        for how in HOW:
            begun = time.process_time()
            (record,) = certify(model, batch.x, batch.y, certifiers=(f"bounds(linf({eps}), how={how})",))
            told[f"seconds_{how}_{name}"] = (time.process_time() - begun) / images
            proven = sum(row.prediction == row.label and row.radius >= eps for row in record.rows)
            told[f"{how}_{name}"] = 100 * proven / images
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = described("python benchmarks/attention_bounds.py", seeds=args.seeds, images=args.images, nets=NETS)
    file = RESULTS / "attention_bounds.json"
    numbers = json.loads(file.read_text(encoding="utf-8"))["numbers"] if file.is_file() else {}
    for method, net in product(METHODS, NETS):
        name = f"{net}_{method}"
        if name not in numbers:
            runs = []
            for seed in args.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(measured(trained(net, method, seed, Path(folder) / "run"), args.images))
            numbers[name] = {key: spread_of([run[key] for run in runs]) for key in runs[0]}
            write(file, about, numbers)
            print(name, {key: round(each["mean"], 2) for key, each in numbers[name].items()}, flush=True)


if __name__ == "__main__":
    main()
