"""Recipes that take another one's fields (``base``): ablations and series. What they say, what they change, and that
what they name is built, on the meta device; two steps of one of each kind, small by default, at true size in `make
recipes`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path

import pytest
import torch

from robustmoe import spec
from robustmoe.models import Normalise, build_model
from robustmoe.recipe import Recipe, claims, load_recipe
from robustmoe.training import build_method
from robustmoe.training.phases import MiniBatch, train_step
from test_recipes_advmoe import DATA, batch, has_base, model_spec

FOLDER = Path(__file__).parents[1] / "recipes"
SERIES = {file.stem: file for file in sorted(FOLDER.rglob("*.toml")) if has_base(file)}
CHANGES = {name: {"model", "method"} for name in ("advmoe", "dual", "vit_moe", "robust_experts")}
"""What a series of a folder may change."""

SMALL = {
    "resnet18_cifar10_advmoe_experts4": ("resnet18", "resnet8(width=4)"),
    "resnet18_cifar10_advmoe_bilevel": ("resnet18", "resnet8(width=4)"),
    "cifar10_resnet18_rt_er_top2": ("resnet18", "small_cnn(width=4)"),
    "cifar10_small_every2_e4": ("small,", "small, width=16, heads=2,"),
    "cifar10_small_every2_at_noisy": ("small,", "small, width=16, heads=2,"),
    "cifar10_small_every2_at_e2": ("small,", "small, width=16, heads=2,"),
    "cifar100_resnet18_block_conv5_first_switch_conv": ("resnet18", "resnet18(width=4)"),
    "cifar100_resnet18_conv_entropy_gap": ("resnet18", "resnet18(width=4)"),
    "imagenet_b32_every2_e2": ("base,", "base, width=16, heads=2, depth=2,"),
    "imagenet_b_plus32_dense": ("width=832, depth=15, heads=13", "width=16, depth=2, heads=2"),
}
"""Of each kind one, and its net in small."""

TRUE = [
    "resnet18_cifar10_advmoe_experts4",
    "cifar10_resnet18_rt_er_top2",
    "cifar10_small_every2_e4",
    "cifar100_resnet18_block_switch_conv",
    "cifar100_resnet50_conv_entropy_gap",
]


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(SERIES[name])


def own_fields(name: str) -> dict[str, object]:
    fields = tomllib.loads(SERIES[name].read_text(encoding="utf-8"))
    return {key: value for key, value in fields.items() if key not in ("base", "claimed")}


def base_of(name: str) -> str:
    return str(tomllib.loads(SERIES[name].read_text(encoding="utf-8"))["base"])


def data_of(name: str) -> tuple[str, tuple[int, int, int], int]:
    data = recipe_of(name).data.partition("(")[0]
    return (data, *DATA[data])


def test_what_the_papers_vary_has_its_series() -> None:
    """The number of experts at 2, 4, 8, 16, 32; the dense family from S to L; three patches; N, ratio and router."""
    every = {file.stem for file in FOLDER.rglob("*.toml")}
    small = {f"cifar10_small_every2{at}{e}" for at in ("", "_at") for e in ("", "_e2", "_e4", "_e16", "_e32")}
    large = {f"imagenet_b32_every2_e{e}" for e in (2, 4, 8, 16, 32)}
    dense = {f"imagenet_{size}32_dense" for size in ("s", "b", "b_plus", "b_plus2", "b_plus3", "l")}
    patch = {f"cifar10_small_{kind}_patch{side}" for kind in ("dense", "every2") for side in (2, 8)}
    ablations = {"experts4", "experts8", "ratio02", "ratio08", "router_small_cnn", "router_resnet8", "bilevel"}
    advmoe = {f"resnet18_cifar10_advmoe_{kind}" for kind in ablations}
    assert small | large | dense | patch | advmoe | {"cifar10_resnet18_rt_er_top2"} <= every


def test_robust_experts_table_is_complete() -> None:
    """Seven places in ResNet-18 and two in ResNet-50, two losses, two routers; three baselines; all are claimed."""
    places = [f"block_conv{stage}_{which}" for stage in (4, 5) for which in ("first", "last")] + ["block", "conv"]
    nets = {"resnet18": [*places, "conv_last"], "resnet50": ["block", "conv"]}
    table = {
        f"cifar100_{net}_{place}_{loss}_{router}"
        for net, rows in nets.items()
        for place in rows
        for loss in ("entropy", "switch")
        for router in ("conv", "gap")
    }
    dense = {"cifar100_resnet18_at_dense", "cifar100_resnet18_dense", "cifar100_resnet50_at_dense"}
    files = {file.stem: file for file in (FOLDER / "robust_experts").iterdir()}
    assert set(files) == table | dense
    seen = [tuple(claims(file)[0].values.values()) for file in files.values()]
    assert {len(values) for values in seen} == {3}
    assert (54.91, 19.96, 20.76) in seen
    for name in table:
        written = load_recipe(files[name])
        assert ("noise=0.1" in written.model) == ("switch" in name) == ("balance_loss=switch_best" in written.method)
        assert f"router={'conv3_gap' if name.endswith('conv') else 'gap_fc'}" in written.model
    base = load_recipe(files["cifar100_resnet18_at_dense"])
    assert (base.batch_size, base.epochs, base.schedule) == (640, 200, "poly(power=0.9)")


@pytest.mark.parametrize("name", SERIES)
def test_a_series_says_what_it_is_and_changes_that_alone(name: str) -> None:
    head = SERIES[name].read_text(encoding="utf-8").split("\nbase = ")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    text, data = " ".join(head.replace("\n#", "").split()), data_of(name)[0]
    assert f'robustmoe train {name} --data "{data}(root=' in text
    for words in ("[CODE]", "Chosen by us:", "Not timed.", f"All else as in {base_of(name)}"):
        assert words in text, words
    assert re.search(r"Result: not run (here|at this size)\.$", text)
    own, base = own_fields(name), load_recipe(SERIES[name].parent / f"{base_of(name)}.toml")
    assert set(own) <= CHANGES[SERIES[name].parent.name]
    assert all(value != getattr(base, key) for key, value in own.items())


@pytest.mark.parametrize("name", SERIES)
def test_everything_a_series_names_is_built(name: str) -> None:
    """The balance loss is gshard for two experts or fewer, as in V-MoE's code."""
    written = recipe_of(name)
    _, shape, classes = data_of(name)
    described = model_spec(written)
    with torch.device("meta"):
        model = described.build(classes, shape, Normalise((0.5,) * 3, (0.5,) * 3))
    phases = build_method(written.method).phases
    assert set().union(*(phase.parameters(model) for phase in phases)) == {key for key, _ in model.named_parameters()}
    for kind in ("optimizer", "schedule", "augment"):
        spec.build(getattr(written, kind), kind)
    attacks = [spec.build(text, "attack") for text in (*written.attacks, *filter(None, [written.val_attack]))]
    assert len({attack.threat for attack in attacks}) == 1
    if written.model.startswith("vit_moe"):
        assert ("gshard" in written.method) == ("experts=2," in written.model)
    assert any(p.shape[0] == classes for p in model.parameters() if p.ndim == 2)


def two_steps(name: str, text: str, classes: int, shape: tuple[int, int, int]) -> None:
    written = recipe_of(name)
    model = build_model(text, classes, shape, seed=written.seed)
    method = build_method(re.sub(r"steps=(7|10)", "steps=2", written.method))
    optimizer = spec.build(written.optimizer, "optimizer")
    optimisers = [optimizer.make(phase.parameters(model).values()) for phase in method.phases]
    routers = [key for key, _ in model.named_modules() if key.endswith("router")]
    for step in range(2):
        given = batch(shape, classes, step)
        result = train_step(
            model,
            method,
            optimisers,
            MiniBatch(given.x, given.y, given.noise),
            second=given if method.two_batches else None,
            clip=written.clip,
            routers=routers,
        )
        assert all(bool(torch.isfinite(value)) for value in result.loss.values())
        assert set(result.router_grad) == set(routers)
        assert all(float(norm) > 0 for norm in result.router_grad.values())
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_two_steps_in_small(name: str) -> None:
    old, new = SMALL[name]
    text = recipe_of(name).model
    assert text.count(old) == 1
    _, shape, _ = data_of(name)
    two_steps(name, text.replace(old, new), 10, (3, 64, 64) if shape[1] > 64 else shape)


@pytest.mark.recipes
@pytest.mark.parametrize("name", TRUE)
def test_two_steps_at_true_size(name: str) -> None:
    _, shape, classes = data_of(name)
    two_steps(name, recipe_of(name).model, classes, shape)
