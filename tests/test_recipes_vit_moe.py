"""The recipes of sparse vision transformers: what they say, what they build, and two steps of each.

The default suite takes the two steps at width 16; `make recipes` takes them at true size too, with two images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustmoe import spec
from robustmoe.data import DATASETS
from robustmoe.models import Normalise, ViT, ViTMoE, build_model, vit_small
from robustmoe.recipe import Recipe, load_recipe
from robustmoe.training import build_method
from robustmoe.training.auxiliary import BALANCE_LOSSES
from robustmoe.training.phases import MiniBatch, train_step
from test_recipes_advmoe import batch, has_base, model_spec

FOLDER = Path(__file__).parents[1] / "recipes" / "vit_moe"
CIFAR, TINY = "cifar10_small", "tiny_imagenet_small"
MOE = ViTMoE("small", patch=4, experts=8, k=2)
EVERY2, TINY_MOE = (dataclasses.replace(MOE, placement="every_2", patch=patch) for patch in (4, 8))
WIDE = ViT(patch=4, mlp_ratio=8.0)
VMOE: dict[str, Any] = {"experts": 8, "k": 2, "eval_capacity": 4.0, "group": 8, "multiple": 4, "gelu": "tanh"}
MODELS = {
    f"{CIFAR}_dense": vit_small(patch=4),
    f"{CIFAR}_dense_wide": WIDE,
    f"{CIFAR}_last2": MOE,
    f"{CIFAR}_every2": EVERY2,
    f"{CIFAR}_every2_e2": dataclasses.replace(EVERY2, experts=2),
    f"{CIFAR}_soft": dataclasses.replace(
        MOE, experts=16, choice="slots", slots=4, placement=(6, 7, 8, 9, 10, 11), classifier="gap", qk_norm=True
    ),
    f"{CIFAR}_upcycled": dataclasses.replace(MOE, gating="renormalised"),
    f"{CIFAR}_dense_at": vit_small(patch=4),
    f"{CIFAR}_dense_wide_at": WIDE,
    f"{CIFAR}_last2_at": MOE,
    f"{CIFAR}_every2_at": EVERY2,
    f"{CIFAR}_every2_at_consistent": EVERY2,
    f"{TINY}_every2": TINY_MOE,
    f"{TINY}_every2_at": TINY_MOE,
    "imagenet_s32_last2": ViTMoE(
        "vmoe_small",
        patch=32,
        equal_experts=True,
        capacity=1.05,
        expert_dropout=0.2,
        pre_logits=512,
        head_start="vmoe",
        **VMOE,
    ),
    "imagenet_b16_every2_finetuned": ViTMoE(
        "base", patch=16, placement="every_2", gating="renormalised", capacity=1.5, **VMOE
    ),
}


def data_of(name: str) -> tuple[str, tuple[int, int, int], int]:
    """The data set of a recipe, the shape of its images, its classes."""
    if name.startswith("imagenet"):
        size = 384 if "finetuned" in name else 224
        return "imagenet", (3, size, size), 1000
    return ("cifar10", (3, 32, 32), 10) if name.startswith(CIFAR) else ("tiny_imagenet", (3, 64, 64), 200)


def passes(name: str) -> int:
    """How often a step takes an image through the network: the attack's 10 steps, its result, and the two passes of a
    consistency.
    """
    return 1 + 10 * ("_at" in name) + 2 * ("consistent" in name)


def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.toml")


def text_of(name: str) -> str:
    """The comment at the top, in one line."""
    head = (FOLDER / f"{name}.toml").read_text().split("\nmodel = ")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    return " ".join(head.replace("\n#", "").split())


def test_the_folder_is_complete() -> None:
    assert {file.stem for file in FOLDER.iterdir() if not has_base(file)} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_says_what_it_is(name: str) -> None:
    """Its own name in the command, where the numbers are from, and that nobody ran it (its cost: test_pages.py)."""
    data, shape, _ = data_of(name)
    text = text_of(name)
    size = ", size=384" if shape[1] == 384 else ""
    assert f'robustmoe train {name} --data "{data}(root=' in text
    assert f'{size})" Numbers: [' in text
    for words in ("[CODE]", "Chosen by us:", "Not timed."):
        assert words in text, words
    assert text.endswith("Result: not run at this size.")
    times = "once" if passes(name) == 1 else f"{passes(name)} times"
    assert f"every image {times} through the network" in text


@pytest.mark.parametrize("name", MODELS)
def test_everything_a_recipe_names_is_built(name: str) -> None:
    """Balanced as V-MoE's code does: importance and load, gshard for 2 experts or fewer, nothing for slots."""
    written = recipe_of(name)
    own = model_spec(written)
    assert own == MODELS[name]
    with torch.device("meta"):
        _, shape, classes = data_of(name)
        built = own.build(classes, shape, Normalise((0.5,) * 3, (0.5,) * 3))
    method = build_method(written.method)
    (phase,) = method.phases
    assert set(phase.parameters(built)) == {key for key, _ in built.named_parameters()}
    for text in ("optimizer", "schedule", "augment"):
        spec.build(getattr(written, text), text)
    attacks = [spec.build(text, "attack") for text in (*written.attacks, *filter(None, [written.val_attack]))]
    threats = {each.threat for each in [*attacks, *filter(None, [method.attack])]}
    eps = "1/255" if "_at" not in name else "8/255" if name.startswith(CIFAR) else "2/255"
    assert threats == {spec.build(f"linf({eps})", "threat")}
    assert ("_at" in name) == (method.attack is not None) == (written.val_attack is not None)

    assert written.inputs == ("centred" if name.startswith("imagenet") else "data")

    balance = None
    if isinstance(own, ViTMoE) and own.choice == "token":
        balance = "gshard" if own.experts <= 2 else "vmoe"
    assert ("balance" in written.method) == (balance is not None)
    assert balance is None or f"balance=0.01, balance_loss={balance}" in written.method
    assert balance is None or balance in BALANCE_LOSSES

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: function.__name__)

    assert spec.build(written.data, {key: seen(function) for key, function in DATASETS.items()}) == data_of(name)[0]


@pytest.mark.parametrize("kind", ["", "_at"])
def test_twins_differ_only_in_model_and_method(kind: str) -> None:
    """All but the upcycled one, which has a start and a learning rate of its own."""
    names = [name for name in MODELS if name.startswith(CIFAR) and ("_at" in name) == (kind == "_at")]
    shared = []
    for name in names:
        fields = dataclasses.asdict(recipe_of(name))
        apart = {"model", "method"} | ({"init", "optimizer"} if name.endswith("upcycled") else set())
        shared.append({key: value for key, value in fields.items() if key not in apart})
    assert len(shared) >= 5
    for fields in shared:
        assert fields.items() <= shared[0].items()
    assert recipe_of(f"{CIFAR}_upcycled").init == f"runs/{CIFAR}_dense"


def test_the_schedules_of_imagenet_are_v_moes_and_the_papers() -> None:
    """By section 3.4 of our page 10,000 steps of warm-up of Adam's 3e-3, then linear; by section 2.1 500 of 10,000
    steps of SGD's 0.03, then half a cosine. 1,153,050 images are left to train on.
    """
    for name, warm, total, rate in (
        ("imagenet_s32_last2", 10_000, 42_000, 3e-3),
        ("imagenet_b16_every2_finetuned", 500, 10_000, 0.03),
    ):
        written = recipe_of(name)
        steps = 1_153_050 // written.batch_size * written.epochs
        assert steps == pytest.approx(total, rel=0.02)
        schedule, lr = spec.build(written.schedule, "schedule"), spec.build(written.optimizer, "optimizer").lr
        assert lr == rate
        assert schedule(warm / steps) == pytest.approx(1.0, abs=0.01)
        assert schedule(0.5 * warm / steps) == pytest.approx(0.5, abs=0.01)
        assert schedule(1.0) == pytest.approx(0.0, abs=1e-9)


# ------------------------------------------------------------------------------------------------ two steps


def two_steps(name: str, model_spec: ViT | ViTMoE, precision: str, side: int = 384) -> None:
    """On two images, of at most ``side`` pixels a side, with an attack of two steps (ten are five times the same):
    losses and gradients finite, and every router has a gradient.
    """
    _, (channels, *sides), classes = data_of(name)
    shape = (channels, min(sides[0], side), min(sides[1], side))
    written = recipe_of(name)
    model = build_model(spec.text(model_spec), classes, shape, seed=written.seed)
    method = build_method(written.method.replace("steps=10", "steps=2"))
    optimizer = spec.build(written.optimizer, "optimizer")
    optimisers = [optimizer.make(phase.parameters(model).values()) for phase in method.phases]
    routers = [key for key, _ in model.named_modules() if key.endswith(".router")]
    assert len(routers) == (len(model_spec.places()) if isinstance(model_spec, ViTMoE) else 0)
    autocast = torch.bfloat16 if precision == "bf16" else None
    for step in range(2):
        x, y, noise = batch(shape, classes, step)
        result = train_step(
            model, method, optimisers, MiniBatch(x, y, noise), autocast=autocast, clip=written.clip, routers=routers
        )
        assert torch.isfinite(result.loss["all"])
        assert 0 < float(result.grad_norm["all"]) < float("inf")
        assert all(float(result.router_grad[router]) > 0 for router in routers)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_with_width_16(name: str) -> None:
    two_steps(name, dataclasses.replace(MODELS[name], width=16, heads=2), recipe_of(name).precision, side=128)


@pytest.mark.recipes
@pytest.mark.parametrize("name", [*reversed(MODELS)])  # the largest first
def test_two_steps_at_true_size(name: str) -> None:
    """In float32: half precision takes minutes where the CPU has no instruction for it."""
    two_steps(name, MODELS[name], "fp32")
