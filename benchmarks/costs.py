"""Parameters and multiply-adds: of the models whose costs README and docs tell, docs/results/costs.json, and of every
recipe that tells its own, docs/results/recipe_costs.json.

python benchmarks/costs.py     # half a minute

A test counts them again (tests/test_pages.py).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from results import RESULTS, described, write
from robustmoe import recipe
from robustmoe.costs import costs

SMALL = "resnet(depth=8, width=32, stem=imagenet)"
TINY = "patch=2, width=48, depth=4, heads=4"
NET = "resnet(depth=8, width=16, stem=imagenet)"
MODELS = {
    "cifar10_dense": ("resnet8(width=32)", 10, (3, 32, 32)),
    "cifar10_pathway": (
        "pathway(resnet8(width=32), experts=2, ratio=0.75, router=small_cnn, standardise=True)",
        10,
        (3, 32, 32),
    ),
    "advmoe_dense": (SMALL, 10, (1, 28, 28)),
    "advmoe_slim": (f"slim({SMALL}, ratio=0.5)", 10, (1, 28, 28)),
    "advmoe_pathway": (
        f"pathway({SMALL}, experts=2, ratio=0.5, router=small_cnn(width=16), standardise=True)",
        10,
        (1, 28, 28),
    ),
    "vit_dense": (f"vit({TINY})", 10, (1, 8, 8)),
    "vit_wide": (f"vit({TINY}, mlp_ratio=8)", 10, (1, 8, 8)),
    "vit_e16_k1": (f"vit_moe(tiny, {TINY}, experts=16, k=1, placement=every_2)", 10, (1, 8, 8)),
    "vit_e16_k2": (f"vit_moe(tiny, {TINY}, experts=16, k=2, placement=every_2)", 10, (1, 8, 8)),
    "dual_dense": (NET, 10, (3, 32, 32)),
    "dual_moe": (f"ensemble({NET}, gate=hard, router=linear)", 10, (3, 32, 32)),
    "resnet18_imagenet": ("resnet18(stem=imagenet)", 1000, (3, 224, 224)),
    "router_imagenet": ("resnet20", 2, (3, 224, 224)),
}
"""Model, classes, image shape."""


SHAPES = {
    "digits": (10, (1, 8, 8)),
    "fashion_mnist": (10, (1, 28, 28)),
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "tiny_imagenet": (200, (3, 64, 64)),
    "imagenet": (1000, (3, 224, 224)),
}
"""Classes and image shape of a data set, but for one that says size=."""


def recipes() -> dict[str, tuple[str, int, tuple[int, int, int]]]:
    """Model, classes and image shape of every recipe that tells its cost, by its path in recipes."""
    found, folder = {}, Path(__file__).parents[1] / "recipes"
    for file in sorted(folder.rglob("*.toml")):
        if "GMAC" in file.read_text(encoding="utf-8"):
            written = recipe.load_recipe(file)
            classes, (channels, *_) = SHAPES[written.data.partition("(")[0]]
            size = re.search(r"size=(\d+)", written.data)
            side = int(size[1]) if size else SHAPES[written.data.partition("(")[0]][1][1]
            found[str(file.relative_to(folder).with_suffix(""))] = (written.model, classes, (channels, side, side))
    return found


def main() -> None:
    counted = functools.cache(costs)
    for file, models in {"costs": MODELS, "recipe_costs": recipes()}.items():
        specs = {name: {"spec": spec, "classes": n, "image_shape": shape} for name, (spec, n, shape) in models.items()}
        numbers = {name: dataclasses.asdict(counted(*model)) for name, model in models.items()}
        write(RESULTS / f"{file}.json", described("python benchmarks/costs.py"), numbers, specs=specs)


if __name__ == "__main__":
    main()
