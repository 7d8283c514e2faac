"""Slopes, radii and stretches of whole models: closed forms of linear ones, second implementations for the others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import Threat, l2, linf
from robustmoe.attacks.routes.reach import route_radius
from robustmoe.lipschitz import norms
from robustmoe.lipschitz.norms import (
    ALL,
    empirical_lipschitz,
    exact_pass,
    local_norm,
    margin_radius,
    pixel_radius,
    routing_split,
)
from robustmoe.models import RoutedModel, build_model
from robustmoe.routing import Tape, detach, to_expert, top_k

VIT = "vit_moe(tiny, patch=2, width=16, depth=2, heads=2, experts=4, k=2, placement=(0, 1), gating={})"
SHAPE = (1, 4, 4)


def vit(gating: str = "vmoe", **more: str) -> RoutedModel:
    """A ViT-MoE of two routed blocks, in float64, its experts and routers large enough to matter."""
    spec = (
        VIT.format(gating)
        if not more
        else VIT.format(gating)[:-1] + "".join(f", {k}={v}" for k, v in more.items()) + ")"
    )
    model = build_model(spec, 4, SHAPE, seed=3).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts.w" in name or ".fc" in name or "proj.weight" in name or "head.weight" in name:
                p.mul_(12.0)
    return model


class Linear(RoutedModel):
    """logits = x W^T + b, of 2 x 2 grey images."""

    def __init__(self, weight: list[list[float]], bias: list[float]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


W = [[2.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]]
LINEAR = Linear(W, [0.1, -1.5, -0.5])
X = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.6, 0.2, 0.4, 0.9]]).view(2, 1, 2, 2)
"""The logits: (1.1, 0, -0.25) and (1.3, -0.9, -0.05)."""


# ------------------------------------------------------------------------------------------------ closed forms


def test_slopes_of_a_linear_model() -> None:
    """The rows of W are orthogonal, of lengths 2, 3 and 1/2, so ||W|| = 3. The margin is row 0 minus row 1 for the
    first image, whose best rival is class 1, and row 0 minus row 2 for the second.
    """
    assert local_norm(LINEAR, X).tolist() == pytest.approx([3.0, 3.0])
    assert local_norm(LINEAR, X, steps=50).tolist() == pytest.approx([3.0, 3.0], rel=1e-5)
    slopes = [math.sqrt(4 + 9), math.sqrt(4 + 0.25)]
    assert local_norm(LINEAR, X, torch.tensor([0, 0]), of="margin").tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("norm, dual", [("l2", (13**0.5, 4.25**0.5)), ("linf", (5.0, 2.5)), ("l1", (3.0, 2.0))])
def test_the_margin_radius_of_a_linear_model(norm: str, dual: tuple[float, float]) -> None:
    """min over rivals of gap / dual norm. The first image is 1.1 above class 1 and 1.35 above class 2; for the second
    the rival with the higher logit, class 2, is 1.35 away and the other 2.2: nearest is the one of least ratio.
    """
    expected = [min(1.1 / dual[0], 1.35 / dual[1]), min(2.2 / dual[0], 1.35 / dual[1])]
    assert margin_radius(LINEAR, X, torch.tensor([0, 0]), norm).tolist() == pytest.approx(expected)
    assert margin_radius(LINEAR, X, torch.tensor([1, 2]), norm).tolist() == [0.0, 0.0], "wrong images have no radius"


def test_the_nearest_rival_is_not_always_the_second_best() -> None:
    """Class 1 is 1 below, with a slope of 1 against class 0; class 2 is 2 below, with a slope of 10."""
    steep = Linear([[0.0] * 4, [1.0, 0, 0, 0], [0, 10.0, 0, 0]], [2.0, 1.0, 0.0])
    x = torch.zeros(1, 1, 2, 2)
    assert margin_radius(steep, x, torch.tensor([0]), "l2").tolist() == pytest.approx([min(1 / 1, 2 / 10)])


def test_no_class_is_near_where_nothing_moves() -> None:
    flat = Linear([[0.0] * 4, [0.0] * 4], [1.0, 0.0])
    assert margin_radius(flat, X, torch.tensor([0, 0]), "l2").tolist() == [math.inf, math.inf]
    assert local_norm(flat, X).tolist() == [0.0, 0.0]
    assert empirical_lipschitz(flat, X, l2(0.1)).tolist() == [0.0, 0.0]


def test_the_stretch_of_a_linear_model() -> None:
    """Inside the box: ||W|| in l2; with one row w, ||w||_1 = 3.75 in linf. Never above, and near it."""
    found = empirical_lipschitz(LINEAR, X, l2(0.05), steps=60)
    assert found.tolist() == pytest.approx([3.0, 3.0], rel=0.01)
    assert float(found.max()) <= 3.0 * (1 + 1e-4)
    one = Linear([[1.0, -2.0, 0.5, 0.25], [0.0] * 4], [0.0, 0.0])
    corner = empirical_lipschitz(one, X, linf(0.05), steps=40)
    assert float(corner.max()) <= 3.75 * (1 + 1e-4)
    assert float(corner.min()) >= 0.95 * 3.75


def test_more_steps_find_no_less() -> None:
    """The climbs are the same, step by step, and the best is kept."""
    model, x = vit().float(), torch.rand(3, *SHAPE)
    found = [empirical_lipschitz(model, x, l2(0.3), steps) for steps in (1, 4, 12)]
    assert bool((found[0] <= found[1]).all())
    assert bool((found[1] <= found[2]).all())
    assert bool((found[0] < found[2]).any())


# ------------------------------------------------------------------------------------------------ claim 19


def full(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Each image's Jacobian (n, c, d), by torch's own function, image by image."""
    rows = [torch.autograd.functional.jacobian(lambda one: function(one[None])[0], image).flatten(1) for image in x]
    return torch.stack(rows)


def test_power_iteration_is_within_a_hundredth_and_never_above(images: Callable[..., Tensor]) -> None:
    """Claim 19. The SVD of torch's full Jacobian is the second implementation."""
    model, x = vit(), images(6, *SHAPE).double()
    exact = torch.linalg.svdvals(full(model, x))[:, 0]
    assert torch.allclose(local_norm(model, x), exact, rtol=1e-10)
    found = local_norm(model, x, steps=40)
    assert bool((found <= exact * (1 + 1e-12)).all())
    assert bool((found >= 0.99 * exact).all())
    assert bool((local_norm(model, x, steps=2) < found).any()), "two steps are not enough: the test can fail"


def test_never_above_the_product_of_the_layers() -> None:
    """Claim 19: of two layers, ||W2|| 1.129 ||W1||."""

    class MLP(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 30), nn.Linear(30, 4)

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return self.two(nn.functional.gelu(self.one(x.flatten(1))))

    model, x = MLP().double(), 4 * torch.randn(50, 3, 2, 2, dtype=torch.float64)
    bound = 1.12891 * torch.linalg.svdvals(model.one.weight)[0] * torch.linalg.svdvals(model.two.weight)[0]
    for found in (
        local_norm(model, x),
        local_norm(model, x, steps=30),
        empirical_lipschitz(model, x.clamp(0, 1), l2(1.0)),
    ):
        assert bool((found <= bound).all())
        assert float(found.max()) > 0.2 * bound, "the bound is not far off, so it means something"


def test_an_image_is_measured_alone(images: Callable[..., Tensor]) -> None:
    model, x = vit(), images(3, *SHAPE).double()
    one = slice(1, 2)
    assert torch.allclose(local_norm(model, x)[one], local_norm(model, x[one]))
    assert torch.allclose(routing_split(model, x)[ALL].router[one], routing_split(model, x[one])[ALL].router)
    assert torch.allclose(pixel_radius(model, x, "l2")[NAMES[0]][one], pixel_radius(model, x[one], "l2")[NAMES[0]])


# ------------------------------------------------------------------------------------------------ routing


NAMES = ("network.blocks.0.mlp.router", "network.blocks.1.mlp.router")


def held_difference(model: RoutedModel, x: Tensor, names: tuple[str, ...], step: float = 1e-6) -> Tensor:
    """The Jacobian with those routers' decisions held, by central differences."""
    trace = detach(model.run(x).trace)
    fixed = {name: trace[name] for name in names}
    columns = []
    for place in range(x[0].numel()):
        e = torch.zeros_like(x[0]).flatten()
        e[place] = step
        ahead, behind = (model.run(x + sign * e.view_as(x[0]), fixed).logits for sign in (1, -1))
        columns.append((ahead - behind) / (2 * step))
    return torch.stack(columns, 2)


def test_the_routing_split_is_the_difference_of_two_jacobians(images: Callable[..., Tensor]) -> None:
    """By central differences of the forced and of the free model: no autograd, so nothing hides in a detach."""
    model, x = vit(), images(2, *SHAPE).double()
    found = routing_split(model, x)
    assert list(found) == [*NAMES, ALL]
    free = held_difference(model, x, ())
    assert torch.allclose(found[ALL].total, torch.linalg.svdvals(free)[:, 0], rtol=1e-5)
    for name, names in ((NAMES[0], NAMES[:1]), (NAMES[1], NAMES[1:]), (ALL, NAMES)):
        held = held_difference(model, x, names)
        assert torch.allclose(found[name].experts, torch.linalg.svdvals(held)[:, 0], rtol=1e-5)
        assert torch.allclose(found[name].router, torch.linalg.svdvals(free - held)[:, 0], rtol=1e-4)
        total, experts, router = found[name]
        assert bool((total <= experts + router).all())
        assert bool((experts <= total + router).all())
        assert bool((router > 0.01 * experts).all()), "there is something to split"
    assert not torch.allclose(found[NAMES[0]].router, found[NAMES[1]].router, rtol=0.1), "each router its own"


def test_the_split_by_power_iteration(images: Callable[..., Tensor]) -> None:
    model, x = vit(), images(1, *SHAPE).double()
    exact, found = routing_split(model, x), routing_split(model, x, steps=25)
    for name, part in found.items():
        for one, whole in zip(part, exact[name], strict=True):
            assert bool((one <= whole * (1 + 1e-9)).all())
            assert torch.allclose(one, whole, rtol=0.01)


@pytest.mark.parametrize("gating", ["hard", "straight_through"])
def test_a_decision_without_a_slope_has_no_router_part(gating: str, images: Callable[..., Tensor]) -> None:
    """The function is that of held weights. Of "straight_through", autograd says otherwise: that gradient is left out,
    and one that was kept would be seen here.
    """
    model, x = vit(gating), images(2, *SHAPE).double()
    found = routing_split(model, x)
    assert torch.allclose(found[ALL].total, torch.linalg.svdvals(held_difference(model, x, ()))[:, 0], rtol=1e-5)
    assert all(float(part.router.max()) == 0 for part in found.values())
    naive = torch.linalg.svdvals(full(model, x))[:, 0]
    assert torch.allclose(naive, local_norm(model, x)) == (gating == "hard")


def test_one_renormalised_expert_has_no_router_part(images: Callable[..., Tensor]) -> None:
    """Its weight is the constant 1."""
    found = routing_split(vit("renormalised"), images(2, *SHAPE).double())
    alone = routing_split(build_model(VIT.format("renormalised").replace("k=2", "k=1"), 4, SHAPE), images(2, *SHAPE))
    assert float(alone[ALL].router.max()) == 0
    assert float(found[ALL].router.min()) > 0


def test_a_dense_model_has_no_split(images: Callable[..., Tensor], tiny: Callable[..., RoutedModel]) -> None:
    assert routing_split(tiny("dense"), images(2)) == {}
    assert pixel_radius(tiny("dense"), images(2), "linf") == {}


def test_a_straight_through_ensemble_is_its_chosen_experts(
    images: Callable[..., Tensor], tiny: Callable[..., RoutedModel]
) -> None:
    model, x = tiny("ensemble_straight").double(), images(6).double()
    trace = model.run(x).trace
    assert len(trace["router"].index.unique()) > 1
    by_expert = torch.stack([local_norm(to_only(model, i), x) for i in range(3)], 1)
    assert torch.allclose(local_norm(model, x), by_expert.gather(1, trace["router"].index[:, 0])[:, 0])


class Only(RoutedModel):
    """A model with every router forced to one expert."""

    def __init__(self, model: RoutedModel, expert: int) -> None:
        super().__init__()
        self.model, self.expert = model, expert

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return self.model.run(x, to_expert(detach(self.model.run(x).trace), self.expert)).logits


def to_only(model: RoutedModel, expert: int) -> RoutedModel:
    return Only(model, expert)


# ------------------------------------------------------------------------------------------------ radii in pixels


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["ensemble_k2", "pathway"])
def test_the_pixel_radius_of_image_routers(
    name: str, norm: str, images: Callable[..., Tensor], tiny: Callable[..., RoutedModel]
) -> None:
    """`route_radius`, written for attacks, is the second implementation."""
    model, x = tiny(name), images(5)
    (found,) = pixel_radius(model, x, norm).values()
    assert torch.allclose(found[:, 0], route_radius(model, x, norm)["router"].detach(), rtol=1e-4)


class Patches(RoutedModel):
    """Each of the four pixels is a token, routed by s = (a_t x_t, b_t): radius |a_t x_t - b_t| / |a_t|, any norm."""

    a, b = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.1, 1.3, 1.0, 3.0])

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1)
        routing = tape("router", top_k(torch.stack([self.a * pixels, self.b.expand_as(pixels)], -1), 1, "vmoe"))
        return (routing.weight[..., 0] * routing.index[..., 0]).sum(1, keepdim=True).expand(-1, 2)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_pixel_radius_of_linear_token_routers(norm: str) -> None:
    model = Patches()
    distance = (model.a * X.flatten(1) - model.b).abs() / model.a
    assert torch.allclose(pixel_radius(model, X, norm)["router"], distance)
    few = pixel_radius(model, X, norm, most=2)["router"]
    assert few.isnan().sum(1).tolist() == [2, 2]
    for own, all_of_it, margin in zip(few, distance, distance * model.a, strict=True):
        nearest = margin.argsort()[:2]
        assert torch.allclose(own[nearest], all_of_it[nearest]), "those with the smallest margins are asked"


@pytest.mark.parametrize("more", [{"choice": "expert"}, {"choice": "slots"}, {"gating": "soft"}])
def test_routes_that_do_not_hang_on_a_margin_have_no_radius(
    more: dict[str, str], images: Callable[..., Tensor]
) -> None:
    model = vit(more["gating"]) if "gating" in more else vit(**more)
    assert pixel_radius(model, images(2, *SHAPE).double(), "l2") == {}


# ------------------------------------------------------------------------------------------------ manners


def test_the_model_stays_as_it_was(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model = tiny("pathway").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images(2)
    local_norm(model, x)
    routing_split(model, x)
    margin_radius(model, x, torch.tensor([0, 1]), "l2")
    pixel_radius(model, x, "l2")
    assert all(module.training for module in model.modules())
    assert all(bool(torch.equal(value, before[name])) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_ball_without_a_radius() -> None:
    with pytest.raises(ValueError, match="the ball has to have a radius above 0; got 0"):
        empirical_lipschitz(LINEAR, X, Threat("l2", 0.0))


def test_autocast_does_not_reach_it(images: Callable[..., Tensor]) -> None:
    """bf16 keeps 8 bits: a slope computed in it would be off by far more than this."""
    model, x = vit().float(), images(2, *SHAPE)
    outside = local_norm(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(local_norm(model, x), outside, rtol=1e-5)
        with norms.differentiable(model, x):
            assert exact_pass(model, x).logits.dtype == torch.float32
