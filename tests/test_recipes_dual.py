"""The recipes after the dual-model paper: what they say, what they build, and two steps of each.

The default suite takes the two steps with tiny networks in the place of the recipe's; `make recipes` takes them at true
size too (two images instead of 512, which no CPU passes through four ViT-small in minutes).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from robustmoe import spec
from robustmoe.attacks import linf
from robustmoe.data import DATASETS
from robustmoe.models import Dual, Ensemble, EnsembleModel, Normalise, build_model, vit_small
from robustmoe.recipe import Recipe, load_recipe
from robustmoe.training import build_method
from robustmoe.training.phases import MiniBatch, StepResult, train_step
from robustmoe.training.starting import start_from
from test_recipes_advmoe import batch, has_base, model_spec

FOLDER = Path(__file__).parents[1] / "recipes" / "dual"
CIFAR, TINY = "cifar10_resnet18", "tiny_imagenet_vit_small"
DATA = {CIFAR: ("cifar10", (3, 32, 32), 10), TINY: ("tiny_imagenet", (3, 64, 64), 200)}
NETWORK = {CIFAR: "resnet18", TINY: "resized(vit_small, size=224)"}
EPS = {CIFAR: "8/255", TINY: "2/255"}

PASSES = {
    "standard_moe": 1,
    "at_moe": 10 + 1,
    "rt_er": (10 + 1) + (10 + 2),
    "rt_er_released": (10 + 1) + (10 + 2),
    "rt_er_labelled": (10 + 1) + (10 + 1),
    "rt_er_all": (10 + 1) + 4 * (10 + 2),
    "rt_er_beta1": 23,
    "rt_er_beta3": 23,
    "rt_er_beta9": 23,
    "rt_er_experts2": 23,
    "rt_er_experts6": 23,
    "rt_er_experts8": 23,
    "jtdmoe": 23 + 2,
    "jtdmoe_released": 59 + 2,
    "at_dense": 10 + 1,
}
"""How often a training step takes an image through a network: an attack of ten steps is ten, its result one more, a KL
another for the clean image; JTDMoE's standard phase asks both halves for the clean image."""
ALL = [f"{CIFAR}_{kind}" for kind in PASSES] + [
    f"{TINY}_{kind}" for kind in ("standard_moe", "at_moe", "rt_er", "jtdmoe")
]


def parts(name: str) -> tuple[str, str]:
    """ "cifar10_resnet18_rt_er" -> the cell and the kind."""
    cell = CIFAR if name.startswith(CIFAR) else TINY
    return cell, name.removeprefix(f"{cell}_")


def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.toml")


def text_of(name: str) -> str:
    """The comment at the top, in one line."""
    head = (FOLDER / f"{name}.toml").read_text().split("\nmodel = ")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    return " ".join(head.replace("\n#", "").split())


def test_the_folder_is_complete() -> None:
    assert {file.stem for file in FOLDER.iterdir() if not has_base(file)} == set(ALL)


@pytest.mark.parametrize("cell", DATA)
def test_what_all_recipes_of_a_cell_share(cell: str) -> None:
    """The settings of the released code and the paper (section 2 of our page on it)."""
    shared = []
    for name in (name for name in ALL if name.startswith(cell)):
        fields = dataclasses.asdict(recipe_of(name))
        shared.append({key: fields[key] for key in fields if key not in ("model", "method", "attacks", "init")})
    assert all(fields == shared[0] for fields in shared)
    settings = {
        "optimizer": "adamw(lr=1e-4, weight_decay=0)",
        "epochs": 130 if cell == CIFAR else 10,
        "batch_size": 512,
        "augment": "crop_flip(padding=2, cutout=8)",
        "val_attack": f"pgd(linf({EPS[cell]}), steps=10, step_size=2/255)",
    }
    assert {key: shared[0][key] for key in settings} == settings


@pytest.mark.parametrize(("cell", "images"), [(CIFAR, 45_000), (TINY, 90_000)])
def test_the_schedule_is_the_released_triangle(cell: str, images: int) -> None:
    """5e-5 to 1e-4 in 500 steps and back in 500, with 10 % of the images held out and the last short batch left out."""
    written = recipe_of(f"{cell}_rt_er")
    schedule, lr = spec.build(written.schedule, "schedule"), spec.build(written.optimizer, "optimizer").lr
    steps = images // written.batch_size * written.epochs
    for step, expected in ((0, 5e-5), (250, 7.5e-5), (500, 1e-4), (1000, 5e-5), (1500, 1e-4)):
        assert lr * schedule(step / steps) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_says_what_it_is(name: str) -> None:
    """Its own name in the command, where the numbers are from, and that nobody ran it (its cost: test_pages.py)."""
    cell, kind = parts(name)
    data, *_ = DATA[cell]
    text = text_of(name)
    assert f'robustmoe train {name} --data "{data}(root=' in text
    for words in (
        "[CODE]",
        "[PAPER]",
        "Different from the released code:",
        "cutout",
        "Not timed.",
    ):
        assert words in text
    assert text.endswith("Result: not run here.")
    assert f"every image {PASSES[kind]} time" in text


@pytest.mark.parametrize("name", ALL)
def test_everything_a_recipe_names_is_built(name: str) -> None:
    """Four networks behind a linear router, or two such; a route is trained but where it says released."""
    cell, kind = parts(name)
    written = recipe_of(name)
    own = model_spec(written)
    network = spec.build(NETWORK[cell], "model")
    gate = "hard" if kind.endswith("released") else "straight_through"
    experts = int(kind.removeprefix("rt_er_experts")) if "experts" in kind else 4
    moe = Ensemble(network, experts, gate=gate, router=spec.build("linear", "model"))
    if kind.startswith("jtdmoe"):
        assert own == Dual(moe, moe, 0.7, "logits" if kind == "jtdmoe_released" else "probabilities")
    else:
        assert own == (network if kind == "at_dense" else moe)

    with torch.device("meta"):
        _, shape, classes = DATA[cell]
        built = own.build(classes, shape, Normalise((0.5,) * 3, (0.5,) * 3))
    assert any(p.shape[0] == classes for p in built.parameters() if p.ndim == 2)
    method = build_method(written.method)
    attack = method.attack
    moved = set().union(*(phase.parameters(built) for phase in method.phases))
    assert moved == {key for key, _ in built.named_parameters()}
    for text in ("optimizer", "schedule", "augment"):
        spec.build(getattr(written, text), text)
    attacks = [spec.build(text, "attack") for text in (*written.attacks, str(written.val_attack))]
    threat = linf(8 / 255 if cell == CIFAR else 2 / 255)
    assert {each.threat for each in [*attacks, *filter(None, [attack])]} == {threat}
    assert "autoattack" in written.attacks[1]

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: function.__name__)

    assert spec.build(written.data, {key: seen(function) for key, function in DATASETS.items()}) == DATA[cell][0]


@pytest.mark.parametrize(
    ("kind", "field", "ours", "other"),
    [
        ("rt_er_beta1", "method", "beta=6", "beta=1"),
        ("rt_er_beta3", "method", "beta=6", "beta=3"),
        ("rt_er_beta9", "method", "beta=6", "beta=9"),
        ("rt_er_experts2", "model", "experts=4", "experts=2"),
        ("rt_er_experts6", "model", "experts=4", "experts=6"),
        ("rt_er_experts8", "model", "experts=4", "experts=8"),
        ("rt_er_released", "model", "gate=straight_through", "gate=hard"),
        ("rt_er_labelled", "method", "beta=6", "beta=1, loss=ce"),
        ("rt_er_all", "method", "beta=6", "beta=6, protect=all"),
    ],
)
def test_a_variant_differs_from_rt_er_in_one_place(kind: str, field: str, ours: str, other: str) -> None:
    plain, variant = (dataclasses.asdict(recipe_of(f"{CIFAR}_{each}")) for each in ("rt_er", kind))
    assert plain[field].count(ours) == 1
    assert variant == plain | {field: plain[field].replace(ours, other)}


@pytest.mark.parametrize("cell", DATA)
def test_the_dual_model_starts_from_the_runs_of_its_halves(cell: str) -> None:
    written = recipe_of(f"{cell}_jtdmoe")
    own = model_spec(written)
    assert isinstance(own, Dual)
    sources = dict(part.split("=runs/") for part in str(written.init).split(", "))
    assert {part: model_spec(recipe_of(name)) for part, name in sources.items()} == {
        "standard": own.standard,
        "robust": own.robust,
    }
    others = {recipe_of(name).init for name in ALL if name.startswith(cell) and "jtdmoe" not in name}
    assert others == ({None} if cell == CIFAR else {"vit_small.safetensors"})


# ------------------------------------------------------------------------------------------------ two steps


DISTINCT = list(
    {(r.model, re.sub(r"beta=\d+", "", r.method)): name for name in reversed(ALL) for r in [recipe_of(name)]}.values()
)


def two_steps(name: str, model_text: str, attack_steps: int = 10) -> tuple[list[StepResult], list[int]]:
    """What two steps on two images give, and how many images each network got."""
    cell, _ = parts(name)
    _, shape, classes = DATA[cell]
    written = recipe_of(name)
    model = build_model(model_text, classes, shape, seed=written.seed)
    counts: list[int] = []
    for module in model.modules():
        found = list(module.experts) if isinstance(module, EnsembleModel) else [getattr(module, "network", None)]
        for network in filter(None, found):
            assert isinstance(network, nn.Module)
            network.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    method = build_method(written.method.replace("steps=10", f"steps={attack_steps}"))
    optimizer = spec.build(written.optimizer, "optimizer")
    optimisers = [optimizer.make(phase.parameters(model).values()) for phase in method.phases]
    routers = [key for key, module in model.named_modules() if key.endswith("router")]
    results = []
    for step in range(2):
        given = batch(shape, classes, step)
        results.append(train_step(model, method, optimisers, MiniBatch(given.x, given.y, given.noise), routers=routers))
        assert list(results[-1].loss) == [phase.name for phase in method.phases]
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    return results, counts


def check(name: str, results: list[StepResult]) -> None:
    """Losses finite, every phase moved something, and each router has a gradient where its route is trained."""
    _, kind = parts(name)
    for result in results:
        for phase in result.loss:
            assert torch.isfinite(result.loss[phase])
            assert 0 < float(result.grad_norm[phase]) < float("inf")
        routers = {"at_dense": set(), "jtdmoe": {"standard.router", "robust.router"}}
        assert set(result.router_grad) == routers.get(kind.removesuffix("_released"), {"router"})
        for norm in result.router_grad.values():
            assert (float(norm) == 0) == kind.endswith("released")


def test_beta_changes_no_count() -> None:
    """So that two steps of one of them are enough."""
    assert {PASSES[kind] for kind in PASSES if kind.startswith("rt_er_beta")} == {PASSES["rt_er"]}
    assert {parts(name)[1] for name in set(ALL) - set(DISTINCT)} == {"rt_er_beta1", "rt_er_beta3", "rt_er_beta9"}


@pytest.mark.parametrize("name", DISTINCT)
def test_two_steps_with_tiny_networks(name: str) -> None:
    """And as many images through them as the recipe says."""
    cell, kind = parts(name)
    text = recipe_of(name).model.replace(NETWORK[cell], "small_cnn(width=4)")
    assert "small_cnn" in text
    results, counts = two_steps(name, text)
    check(name, results)
    assert sum(counts) == 2 * 2 * PASSES[kind]


@pytest.mark.recipes
@pytest.mark.parametrize("name", DISTINCT)
def test_two_steps_at_true_size(name: str) -> None:
    """Of each model and method, whatever its beta; an attack of two steps, not ten, which are ten times the same."""
    check(name, two_steps(name, recipe_of(name).model, attack_steps=2)[0])


@pytest.mark.recipes
def test_published_weights_fill_every_expert(tmp_path: Path) -> None:
    """A file with timm's names and 1,000 classes: the four bodies start equal, the four heads are their own."""
    _, shape, classes = DATA[TINY]
    written = recipe_of(f"{TINY}_rt_er")
    file = tmp_path / str(written.init)
    published = vit_small().network(1000, (3, 224, 224)).state_dict()
    safetensors.torch.save_file(published, file)
    model = build_model(written.model, classes, shape, seed=1)
    start_from(model, file)
    own = model.state_dict()
    heads = []
    for k in range(4):
        for name, value in published.items():
            if not name.startswith("head."):
                assert torch.equal(own[f"experts.{k}.inner.{name}"], value)
        heads.append(own[f"experts.{k}.inner.head.weight"])
    assert not any(torch.equal(heads[0], head) for head in heads[1:])
