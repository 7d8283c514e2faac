"""The grid of the AdvMoE paper: 4 architectures, 4 data sets, 5 methods; every cell builds and takes two steps.

Every cell is built, on the meta device. `make recipes` takes the two steps of one cell of each architecture, image size
and method (60: the two CIFARs differ in the last layer alone); the default suite those of a few of the cheapest.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustmoe
from robustmoe import spec
from robustmoe.attacks import linf
from robustmoe.data import DATASETS
from robustmoe.models import MODELS, Backbone, ModelSpec, Normalise, Pathway, Pruned, RoutedModel, Slim, build_model
from robustmoe.models.small import Downsampled
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe, load_recipe, resolve
from robustmoe.training import build_method
from robustmoe.training.phases import MiniBatch, train_step

FOLDER = Path(__file__).parents[1] / "recipes" / "advmoe"
ARCHITECTURES = ["resnet18", "wrn_28_10", "vgg16", "densenet40"]
DATA = {
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny_imagenet": ((3, 64, 64), 200),
    "imagenet": ((3, 224, 224), 1000),
}
METHODS = ["at_dense", "at_slim", "at_sparse", "at_moe", "advmoe"]
CELLS = [f"{architecture}_{data}" for architecture, data in product(ARCHITECTURES, DATA)]
GRID = [f"{cell}_{method}" for cell, method in product(CELLS, METHODS)]
DISTINCT = list(
    {(a, DATA[d][0], m): f"{a}_{d}_{m}" for a, d, m in product(ARCHITECTURES, reversed(DATA), METHODS)}.values()
)
QUICK = {"resnet18_cifar10_advmoe", *(f"densenet40_cifar10_{method}" for method in METHODS)}


def parts(name: str) -> tuple[str, str, str]:
    """ "resnet18_cifar10_at_moe" -> architecture, data set, method."""
    return next((a, d, m) for a, d, m in product(ARCHITECTURES, DATA, METHODS) if name == f"{a}_{d}_{m}")


def has_base(file: Path) -> bool:
    """Whether a recipe takes its fields from another one: test_recipes_series.py has these."""
    return "base" in tomllib.loads(file.read_text(encoding="utf-8"))


def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.toml")


def model_spec(written: Recipe) -> ModelSpec:
    made: ModelSpec = spec.build(written.model, "model")
    return made


# ------------------------------------------------------------------------------------------------ the grid


def test_the_grid_is_complete() -> None:
    assert len(set(GRID)) == 80
    assert len(DISTINCT) == 60
    assert set(QUICK) <= set(DISTINCT) < set(GRID)
    assert {file.stem for file in FOLDER.iterdir() if not has_base(file)} == set(GRID)


def test_a_cell_is_found_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder: the recipes come with the package, wherever that is installed; a folder `recipes` here is asked
    first.
    """
    monkeypatch.chdir(tmp_path)
    name = "resnet18_cifar10_advmoe"
    package = Path(robustmoe.__file__).resolve().parent
    file = resolve(name)
    assert file.name == f"{name}.toml"
    assert file.resolve().parents[1] in (package / "recipes", package.parents[1] / "recipes")
    own = tmp_path / "recipes" / "mine" / f"{name}.toml"
    own.parent.mkdir(parents=True)
    own.write_text(file.read_text())
    assert resolve(name).resolve() == own.resolve()


@pytest.mark.parametrize("cell", CELLS)
def test_twins_differ_only_in_model_method_and_attacks(cell: str) -> None:
    """What they share are the released defaults, by section 2.3 of our page on the paper."""
    shared = []
    for method in METHODS:
        fields = dataclasses.asdict(recipe_of(f"{cell}_{method}"))
        shared.append({name: value for name, value in fields.items() if name not in ("model", "method", "attacks")})
    assert all(fields == shared[0] for fields in shared)
    padding = parts(f"{cell}_at_dense")[1]
    released = {
        "optimizer": "sgd(lr=0.1, momentum=0.9, weight_decay=5e-4)",
        "schedule": "cosine",
        "epochs": 100,
        "batch_size": 128,
        "augment": f"crop_flip(padding={DATA[padding][0][1] // 8})",
        "seed": 1234,
        "val_attack": "pgd(linf(8/255), steps=10, step_size=2/255)",
    }
    assert {name: shared[0][name] for name in released} == released
    methods = {method: recipe_of(f"{cell}_{method}").method for method in METHODS}
    assert len(set(methods.values())) == 2
    assert methods["at_dense"] == methods["at_slim"] == methods["at_sparse"] == methods["at_moe"]


# ------------------------------------------------------------------------------------------------ every recipe


@pytest.mark.parametrize("name", GRID)
def test_a_recipe_says_what_it_is(name: str) -> None:
    """Its own name in the command, where the numbers are from, the cost, and that nobody ran it."""
    head = (FOLDER / f"{name}.toml").read_text().split("\nmodel = ")[0]
    data = parts(name)[1]
    assert f'#   robustmoe train {name} --data "{data}(root=' in head
    for words in ("[CODE]", "NOT FOUND", "Chosen by us", "Not timed.", "Result: not run here."):
        assert words in " ".join(head.replace("\n#", "").split()), words
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.parametrize("name", GRID)
def test_everything_a_recipe_names_is_built(name: str) -> None:
    """The model without values, on the meta device; of the data set only its arguments."""
    architecture, data, method = parts(name)
    shape, classes = DATA[data]
    written = recipe_of(name)
    described = model_spec(written)
    backbone = MODELS[architecture](**({"stem": "imagenet"} if data == "imagenet" and architecture != "vgg16" else {}))
    assert isinstance(backbone, Backbone)
    kinds: dict[str, ModelSpec] = {"at_dense": backbone, "at_slim": Slim(backbone), "at_sparse": Pruned(backbone)}
    router = Pathway(backbone).router
    moe = Pathway(backbone, router=Downsampled(router, 64) if data == "imagenet" else router)
    assert described == kinds.get(method, moe)
    assert getattr(described, "ratio", 0.5) == 0.5
    with torch.device("meta"):
        model = described.build(classes, shape, Normalise((0.5,) * 3, (0.5,) * 3))
    assert any(p.shape[0] == classes for p in model.parameters() if p.ndim == 2)

    phases = build_method(written.method).phases
    assert [phase.name for phase in phases] == (["experts", "router"] if method == "advmoe" else ["all"])
    moved = [set(phase.parameters(model)) for phase in phases]
    assert set().union(*moved) == {key for key, _ in model.named_parameters()}
    assert sum(map(len, moved)) == len(set().union(*moved))
    for kind in ("optimizer", "schedule", "augment"):
        spec.build(getattr(written, kind), kind)
    attacks = [spec.build(text, "attack") for text in written.attacks]
    assert len(attacks) == (4 if method in ("at_moe", "advmoe") else 1)
    assert {attack.threat for attack in [*attacks, spec.build(str(written.val_attack), "attack")]} == {linf(8 / 255)}

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: function.__name__)

    assert spec.build(written.data, {key: seen(function) for key, function in DATASETS.items()}) == data


# ------------------------------------------------------------------------------------------------ two steps


def batch(shape: tuple[int, int, int], classes: int, step: int, n: int = 2) -> MiniBatch:
    """Random images of the first class and the last: two, or the last alone."""
    generator = torch.Generator().manual_seed(step)
    noise = Noise.of(torch.arange(n), 0, step)
    return MiniBatch(torch.rand(n, *shape, generator=generator), torch.tensor([0, classes - 1][-n:]), noise)


def shifts(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """BatchNorm's shifts among the parameters of these names: 0 at first, so weight decay alone leaves them there."""
    own = dict(model.named_parameters())
    return {name: own[name] for name in names if re.search(r"(norm\w*|last)\.bias$", name)}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.recipes) for name in DISTINCT]
)
def test_a_recipe_takes_two_steps(name: str) -> None:
    """On a synthetic image of the data set's shape (two where a router is trained apart, for one image may leave it
    without a gradient): losses finite, and each phase moved what is its own.
    """
    shape, classes = DATA[parts(name)[1]]
    n = 2 if name.endswith("advmoe") else 1
    written = recipe_of(name)
    model: RoutedModel = build_model(written.model, classes, shape, seed=written.seed)
    method, optimizer = build_method(written.method), spec.build(written.optimizer, "optimizer")
    own = [list(phase.parameters(model)) for phase in method.phases]
    optimisers = [optimizer.make(phase.parameters(model).values()) for phase in method.phases]
    for names in own:
        found = shifts(model, names)
        assert found
        assert not any(bool(value.any()) for value in found.values())
    for step in range(2):
        given = batch(shape, classes, step, n)
        result = train_step(model, method, optimisers, MiniBatch(given.x, given.y, given.noise))
        assert list(result.loss) == [phase.name for phase in method.phases]
        for phase in result.loss:
            assert torch.isfinite(result.loss[phase])
            assert 0 < float(result.grad_norm[phase]) < float("inf")
        assert result.seen == n
    for names in own:
        assert all(bool(value.any()) for value in shifts(model, names).values())
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
