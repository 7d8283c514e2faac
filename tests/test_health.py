"""Validation counted by hand, and what is said of a router that is dead, fixed or does not learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import FGSM, PGD, linf
from robustmoe.data import from_arrays
from robustmoe.models import RoutedModel
from robustmoe.recipe import Recipe
from robustmoe.records import read_jsonl
from robustmoe.routing import Tape, top_k
from robustmoe.training import train
from robustmoe.training.health import Validation, complaints, router_health, trainable_routers, validate

CPU = torch.device("cpu")


class Threshold(RoutedModel):
    """Class 1 where the pixel is above 0.5; expert 0 of 3 below 0.25, else expert 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixel = x[:, 0, 0, 0] * self.scale
        never = torch.full_like(pixel, -9.0)
        tape("router", top_k(torch.stack([0.25 - pixel, pixel - 0.25, never], 1)[:, None]))
        return torch.stack([0.5 - pixel, pixel - 0.5], 1)


PIXELS = [0.1, 0.45, 0.9, 0.7, 0.3]
LABELS = [0, 0, 1, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_validation_by_hand(batch_size: int) -> None:
    """Right: all but 0.7. An attack of 0.1 carries 0.45 (and nothing else) over 0.5: 3 of 5 hold.

    Expert 0 gets 0.1 alone.
    """
    images = from_arrays(torch.tensor(PIXELS).view(5, 1, 1, 1), LABELS)
    result = validate(Threshold(), images, FGSM(linf(0.1)), batch_size, CPU, seed=0)
    assert (result.clean, result.robust, result.n) == (0.8, 0.6, 5)
    assert result.load == {"router": [0.2, 0.8, 0.0]}
    # The two best logits are 0.25 - pixel and pixel - 0.25; the attack takes pixel 0.3 to 0.4, and none over 0.25
    gaps = [2 * abs(pixel - 0.25) for pixel in PIXELS]
    assert result.gap == {"router": pytest.approx(sum(gaps) / 5, rel=1e-6)}
    assert result.consistency == {"router": 1.0}
    still = validate(Threshold(), images, None, batch_size, CPU, seed=0)
    assert (still.robust, still.consistency) == (None, {})


def test_an_image_is_robust_only_where_it_is_right_before_and_after() -> None:
    """0.51 of label 0 is wrong; an attack that is allowed to help would leave it right, and it must not count."""
    images = from_arrays(torch.full((1, 1, 1, 1), 0.51), [0])

    class Helps(FGSM):
        def perturb(self, model: Any, x: Tensor, y: Tensor, noise: Any) -> Tensor:
            return x - 0.1

    result = validate(Threshold(), images, Helps(linf(0.1)), 1, CPU, seed=0)
    assert (result.clean, result.robust) == (0.0, 0.0)


def test_logits_that_are_not_finite_are_wrong() -> None:
    model = Threshold()
    with torch.no_grad():
        model.scale.fill_(torch.inf)
    images = from_arrays(torch.tensor(PIXELS).view(5, 1, 1, 1), LABELS)
    assert validate(model, images, None, 2, CPU, seed=0).clean == 0.0


def test_validation_does_not_depend_on_the_batch_size(
    routed: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Each image's random start belongs to the image."""
    held = from_arrays(images(11), labels(11))
    attack = PGD(linf(0.1), steps=1)
    results = [validate(routed, held, attack, size, CPU, seed=3) for size in (11, 4)]
    assert results[0].gap == pytest.approx(results[1].gap, rel=1e-5)
    assert results[0] == results[1]._replace(gap=results[0].gap)


def test_decisions_that_an_attack_changes_are_counted() -> None:
    """Steps of 0.1 upwards carry 0.2 and 0.16 over the routing boundary at 0.25, 0.1 not: a third stays."""
    images = from_arrays(torch.tensor([0.2, 0.16, 0.1]).view(3, 1, 1, 1), [0, 0, 0])
    assert validate(Threshold(), images, FGSM(linf(0.1)), 2, CPU, seed=0).consistency == {"router": 1 / 3}


def test_router_health_by_hand() -> None:
    """Load (3/4, 1/4, 0): entropy 3/4 log(4/3) + 1/4 log 4, expert 2 dead."""
    seen = Validation(0.9, 0.5, 8, {"r": [0.75, 0.25, 0.0]}, {"r": 1.5}, {"r": 0.625})
    found = router_health(seen, {"r": 2.0}, {"r": True}, {"r": True})["r"]
    assert found.pop("entropy") == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert found == {
        "load": [0.75, 0.25, 0.0],
        "dead": [2],
        "gap": 1.5,
        "consistency": 0.625,
        "grad_norm": 2.0,
        "moved": True,
        "declared_fixed": False,
    }
    assert complaints({"r": found}) == ["warning: router 'r' sends no validation image to expert(s) [2]"]


@pytest.mark.parametrize(
    "grad, moved, trainable, learns, said",
    [
        (1.0, True, True, True, False),
        (0.0, True, True, False, True),  # weight decay alone moved it
        (1.0, False, True, False, True),
        (0.0, False, False, False, False),  # a hard gate says so itself: nothing to complain of
    ],
)
def test_who_learns_and_who_is_complained_of(
    grad: float, moved: bool, trainable: bool, learns: bool, said: bool
) -> None:
    seen = Validation(0.9, None, 8, {"r": [0.5, 0.5]}, {"r": 1.5}, {})
    found = router_health(seen, {"r": grad}, {"r": moved}, {"r": trainable})
    assert (found["r"]["moved"], found["r"]["declared_fixed"]) == (learns, not trainable)
    assert bool(complaints(found)) == said


def test_which_gates_declare_a_gradient(model: RoutedModel, images: Callable[..., Tensor], request: Any) -> None:
    name = request.node.callspec.params["model"]
    others = {"dense": [], "dual": ["standard.router", "robust.router"], "vit_moe": ["network.blocks.1.mlp.router"]}
    expected = dict.fromkeys(others.get(name, ["router"]), name != "ensemble_hard")
    assert trainable_routers(model, images(1)) == expected


@pytest.mark.parametrize(
    "gate, method, moved, fixed",
    [
        ("hard", "standard", False, True),
        ("renormalised", "standard", False, False),
        ("renormalised", "standard(balance=0.1)", True, False),
        ("vmoe", "standard", True, False),
        ("straight_through", "standard", True, False),
        ("straight_through", "standard(moves=experts)", False, True),  # left alone on purpose
    ],
)
def test_a_run_tells_whether_its_router_learns(
    gate: str, method: str, moved: bool, fixed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At k = 1 the renormalised gate is the constant 1: no gradient from the output, whatever weight decay does."""
    recipe = Recipe(
        model=f"ensemble(small_cnn(width=2), experts=3, gate={gate}, router=small_cnn(width=2))",
        data="digits",
        method=method,
        epochs=1,
        max_steps=3,
        val_limit=20,
        threads=1,
    )
    (line,) = read_jsonl(train(recipe, tmp_path / "run") / "metrics.jsonl")
    router = line["routers"]["router"]
    assert (router["moved"], router["declared_fixed"]) == (moved, fixed)
    assert (router["grad_norm"] > 0) == moved
    error = capsys.readouterr().err
    assert ("warning: router 'router' got no gradient in this epoch" in error) == (not moved and not fixed)
    # A fresh router sends every image to one expert: the two others are dead, and are named
    assert router["dead"] == [expert for expert in range(3) if router["load"][expert] == 0]
    assert f"sends no validation image to expert(s) {router['dead']}" in error
