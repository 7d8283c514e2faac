"""What a training step costs, in the heads of recipes that nobody timed: how often a batch goes through the network,
and multiply-adds, of the step and of all steps.

python -m tests.recipe_steps writes the lines anew; test_recipe_steps.py compares them.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from robustmoe.models import RoutedModel, build_model  # noqa: E402
from robustmoe.noise import Noise  # noqa: E402
from robustmoe.recipe import Recipe, load_recipe  # noqa: E402
from robustmoe.training import MiniBatch, build_method, train_step  # noqa: E402

FOLDER = ROOT / "recipes" / "advmoe"
SMALL = {
    "pathway": "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4))",
    "pruned": "pruned(resnet8(width=4))",
}
"""A small net of the kind of a recipe's; every other kind is dense."""
DENSE = "resnet8(width=4)"
SHAPE = (3, 8, 8)
TRAINED_ON = {"cifar10": 45_000, "cifar100": 45_000, "tiny_imagenet": 90_000, "imagenet": 1_153_050}
"""Images of the official training split, but for the tenth that is held out (of ImageNet to within a few)."""


class Passes(NamedTuple):
    """How many batches a step takes through a part of the network: ``forward``, of these in train mode ``in_train``;
    back ``through`` it, to images or routers before it, which costs about as much again, and back ``to_weights`` of its
    own, about twice as much.
    """

    forward: float
    in_train: float
    through: float
    to_weights: float

    def products(self, macs: int, macs_in_train: int) -> float:
        """Multiply-adds an image, where a forward pass has so many in eval mode, in which attacks climb, and so many in
        train mode.
        """
        climbing = self.forward - self.in_train + self.through
        return climbing * macs + (self.in_train + 2 * self.to_weights) * macs_in_train


@functools.cache
def passes(method: str, kind: str) -> dict[str, Passes]:
    """By part ("network", and "router" where there is one): what one step takes, counted on a small net."""
    torch.default_generator.manual_seed(0)
    model, n = build_model(SMALL.get(kind, DENSE), 4, SHAPE), 8
    parts = {name: part for name in ("network", "router") if (part := getattr(model, name, None)) is not None}
    seen: dict[str, Counter[str]] = {name: Counter() for name in parts}
    asked: list[int] = []
    gradient = torch.autograd.grad

    def asking(outputs: Any, inputs: Any, *more: Any, **others: Any) -> Any:
        asked[:] = map(id, inputs if isinstance(inputs, list | tuple) else [inputs])
        return gradient(outputs, inputs, *more, **others)

    for name, part in parts.items():
        _count(part, seen[name], asked)
    with unittest.mock.patch("torch.autograd.grad", asking):
        step(method, model, n)
    return {name: Passes(*(counted[what] / n for what in Passes._fields)) for name, counted in seen.items()}


def step(method: str, model: RoutedModel, n: int) -> None:
    """One training step on ``n`` images (for some methods on as many others besides)."""
    built, x, y = build_method(method), torch.rand(n, *SHAPE), torch.arange(n) % 4
    batches = [MiniBatch(x, y, Noise.of(torch.arange(n), number)) for number in range(2)]
    optimisers = [torch.optim.SGD(phase.parameters(model).values(), lr=0.1) for phase in built.phases]
    train_step(model, built, optimisers, batches[0], second=batches[1] if built.two_batches else None)


def _count(module: nn.Module, counted: Counter[str], asked: list[int]) -> None:
    """Counts the images that go through the module, and back: to its weights, where these are among what is ``asked``
    for.
    """
    own = {id(parameter) for parameter in module.parameters()}

    def back(gradient: Tensor) -> None:
        counted["to_weights" if own & set(asked) else "through"] += len(gradient)

    def came(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        counted["forward"] += len(out)
        counted["in_train"] += module.training * len(out)
        if out.requires_grad:
            out.register_hook(back)

    module.register_forward_hook(came)


def line(path: Path) -> str:
    """The line of a recipe."""
    recipe, name = load_recipe(path), f"advmoe/{path.stem}"
    numbers = json.loads((ROOT / "docs" / "results" / "recipe_costs.json").read_text(encoding="utf-8"))["numbers"]
    own, kind = numbers[name], recipe.model.partition("(")[0]
    trained = numbers[re.sub(r"_at_sparse$", "_at_dense", name)]  # all of a sparse net is computed in train mode
    counted = passes(recipe.method, kind)
    macs = {"network": own["macs"] - own["router_macs"], "router": own["router_macs"]}
    train = {"network": trained["macs"] - trained["router_macs"], "router": trained["router_macs"]}
    step = _batch(recipe) * sum(part.products(macs[at], train[at]) for at, part in counted.items())
    steps = recipe.epochs * (TRAINED_ON[recipe.data.partition("(")[0]] // _batch(recipe))
    forward, _, through, weights = counted["network"]
    said = f"{forward:g} batches through the network, {through:g} back through it, {weights:g} back to its weights"
    return f"# A step takes {said}: {_said(step / 1e12)} TMAC, in all {_said(step * steps / 1e15)} PMAC."


def _batch(recipe: Recipe) -> int:
    assert recipe.batch_size != "auto"
    return recipe.batch_size


def _said(value: float) -> str:
    """Two digits that count, and as many as there are before the point."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def untimed() -> list[Path]:
    """The recipes that nobody timed and whose cost has no other words on the step."""
    return [path for path in sorted(FOLDER.glob("*.toml")) if "Not timed." in path.read_text(encoding="utf-8")]


def rendered(text: str, line: str) -> str:
    """A recipe's text with the line behind the paragraph on its cost."""
    lines = [each for each in text.split("\n") if not each.startswith("# A step takes ")]
    place = next(place for place, each in enumerate(lines) if each.startswith("# Result:"))
    return "\n".join([*lines[:place], line, *lines[place:]])


if __name__ == "__main__":
    for file in untimed():
        written = file.read_text(encoding="utf-8")
        file.write_text(rendered(written, line(file)), encoding="utf-8")
