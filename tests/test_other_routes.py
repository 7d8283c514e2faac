"""Attacks on other routes, and transfer from another run: planted models that only they break, and their contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustmoe import UserError
from robustmoe.attacks import PGD, OtherRoutes, build_attack, linf
from robustmoe.attacks.routes.elsewhere import OnRoute
from robustmoe.evaluation.transferring import FromRun
from robustmoe.models import LayerExperts, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.routing import Tape, detach, top_k
from robustmoe.training import train
from robustmoe.training.checkpoint import load_model

BALL = linf(0.1)


class Sleeping(RoutedModel):
    """Expert 0 says class 0 whatever it sees; expert 1, which takes images of a mean above 0.53, says class 1 where the
    first pixel is above 0.55. No gradient of the model leads from a grey image to expert 1.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        score = x.flatten(1)[:, 1:].mean(1) - 0.53
        routing = tape("router", top_k(torch.stack([-score, score], 1)[:, None], 1, "hard"))
        pixel = x[:, 0, 0, 0] - 0.55
        zero = torch.zeros_like(pixel)
        says = torch.stack([torch.stack([zero + 1, zero], 1), torch.stack([-pixel, pixel], 1)], 1)
        return says[torch.arange(len(x)), routing.index[:, 0, 0]] * routing.weight[:, 0]


def grey() -> tuple[Tensor, Tensor]:
    return torch.full((5, 3, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)


def test_an_expert_out_of_the_gradients_sight_is_attacked_where_the_routers_can_be_pushed_to() -> None:
    (x, y), model = grey(), Sleeping()
    blind = PGD(BALL, steps=20)(model, x, y)
    assert (model(blind).argmax(1) == y).all()
    broken = OtherRoutes(BALL, steps=10)(model, x, y)
    assert (model(broken).argmax(1) == 1).all()
    assert (broken - x).abs().max() <= 0.1 + 1e-6
    for source in ("clean", "mirrored", "negative"):  # the routes of these are the image's own here
        kept = OtherRoutes(BALL, steps=10, routes=(source,))(model, x, y)
        assert (model(kept).argmax(1) == y).all()


@pytest.fixture
def affine() -> RoutedModel:
    model = build_model("affine(patch_resnet(width=4, patch=2), experts=3)", 4, (3, 8, 8)).double()
    for module in model.modules():
        if isinstance(module, LayerExperts):
            nn.init.normal_(module.experts, std=0.5)
    return model


def test_the_route_of_another_image_is_held_and_the_free_route_judges(
    affine: RoutedModel, images: Callable[..., Tensor]
) -> None:
    x = images(6, 3, 8, 8).double()
    y = affine(x).argmax(1)
    route = detach(affine.run(x.flip(-1)).trace)
    at = (x + 0.01).requires_grad_(True)
    score = OnRoute(route, "margin")(affine, x, y)(at)
    held, free = affine.run(at, forced=route).logits, affine(at)
    mask = nn.functional.one_hot(y, 4).bool()
    margin = held.masked_fill(mask, -torch.inf).amax(1) - held.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(score.loss, margin)
    assert torch.equal(score.fooled, free.argmax(1) != y)
    attack = OtherRoutes(linf(0.4), steps=20, routes=("mirrored",))
    x_adv = attack(affine, x, y)
    wrong = affine(x_adv).argmax(1) != y
    assert wrong.any()
    assert (x_adv - x).abs().max() <= 0.4 + 1e-9


def test_an_image_is_attacked_alike_in_any_batch(affine: RoutedModel, images: Callable[..., Tensor]) -> None:
    x, noise = images(6, 3, 8, 8).double(), Noise.of(torch.arange(6))
    y = affine(x).argmax(1)
    attack = OtherRoutes(linf(0.02), steps=4)
    whole = attack(affine, x, y, noise)
    alone = torch.cat([attack(affine, x[i : i + 1], y[i : i + 1], noise[torch.tensor([i])]) for i in range(6)])
    torch.testing.assert_close(whole, alone)


def test_what_it_cannot_take_is_one_line(images: Callable[..., Tensor]) -> None:
    dense, x = build_model("linear", 4, (3, 8, 8)), images(2, 3, 8, 8)
    with pytest.raises(UserError, match="other_routes needs a model with a router; this model is dense"):
        OtherRoutes(BALL)(dense, x, dense(x).argmax(1))
    for text, message in (
        ("other_routes(linf(0.1), routes=())", "routes must be some of clean, pushed, mirrored, negative"),
        ("other_routes(linf(0.1), steps=0)", "steps must be at least 1; got 0"),
        ("other_routes(linf(0.1), step_size=-1.0)", "step_size must be above 0"),
        ("from_run('runs/x', pgd(linf(0.1), objective=experts_only))", "from_run takes attacks of the whole model"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build_attack(text)
        assert "\n" not in str(error.value)


def test_an_attack_from_another_run_climbs_that_run_and_is_judged_by_the_model(
    tmp_path: Path, images: Callable[..., Tensor]
) -> None:
    recipe = Recipe(model="linear", data="digits", method="standard", epochs=1, max_steps=3, device="cpu")
    run = train(recipe, tmp_path / "dense")
    source, x = load_model(run), images(6, 1, 8, 8)
    y = source(x).argmax(1)
    other = build_model("ensemble(linear, experts=2, router=linear)", 10, (1, 8, 8), seed=5)
    step = PGD(linf(0.1), steps=1, start="clean", keep="last")
    transferred = FromRun(str(run), step)(other, x, y)
    torch.testing.assert_close(transferred, step(source, x, y))
    label = other(x).argmax(1)
    many = FromRun(str(run), PGD(linf(0.3), steps=10, keep="first"))(other, x, label)
    fooled = other(many).argmax(1) != label
    own = PGD(linf(0.3), steps=10, keep="first")(source, x, label)
    assert not torch.equal(many, own)  # the source says of most images at once that they are broken; the model does not
    assert fooled.any()
    with pytest.raises(UserError, match="has 10 classes, the model 4"):
        FromRun(str(run), step)(build_model("linear", 4, (1, 8, 8)), x, y.clamp(max=3))
    with pytest.raises(UserError, match="does not take images"):
        FromRun(str(run), step)(build_model("linear", 10, (3, 8, 8)), images(2, 3, 8, 8), y[:2])
