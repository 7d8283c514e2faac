"""Objectives: losses by hand, gradients by finite differences, and what is held while the attacked image moves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from objective_infos import EXPERTS_ONLY, JOINT, ROUTER_ONLY, ROUTING
from robustmoe.attacks import (
    OBJECTIVES,
    ExpertsOnly,
    Joint,
    Objective,
    RouterOnly,
    RoutingLoss,
    Score,
    kl,
    losses,
    router_hinge,
)
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.losses import loss_of
from robustmoe.attacks.objectives import Inner, _departure
from robustmoe.attacks.pgd import ascend
from robustmoe.models import EnsembleModel, PathwayModel, RoutedModel
from robustmoe.records import ObjectiveInfo
from robustmoe.routing import Routing

EVERY = [
    Joint("ce"),
    Joint("margin"),
    Joint("kl"),
    ExpertsOnly("ce"),
    ExpertsOnly("margin"),
    ExpertsOnly("kl"),
    RouterOnly(),
]


def test_losses_by_hand() -> None:
    logits, y = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]]).log(), torch.tensor([1, 2])
    assert loss_of("ce", logits, y).tolist() == pytest.approx([-math.log(0.6), -math.log(0.25)])
    assert loss_of("margin", logits, y).tolist() == pytest.approx([math.log(0.3 / 0.6), math.log(0.5 / 0.25)])
    clean = torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.5, 0.25]]).log()
    by_hand = 0.25 * math.log(0.5) + 0.5 * math.log(2.0)
    assert loss_of("kl", logits, y, clean).tolist() == pytest.approx([0.0, by_hand], abs=1e-6)
    with pytest.raises(ValueError, match="the kl loss needs the clean logits"):
        loss_of("kl", logits, y)


def test_kl_is_finite_for_extreme_logits() -> None:
    """p = (1, 0), q = (e^-200, 1): KL is 200, where a product of probabilities and logarithms gives NaN or infinity."""
    value = kl(torch.tensor([[100.0, -100.0]]), torch.tensor([[-100.0, 100.0]]))
    assert value.tolist() == pytest.approx([200.0])
    assert kl(torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4]])).tolist() == [0.0]


def test_the_table_makes_every_objective_by_its_name() -> None:
    aims = dict.fromkeys(("joint", "targeted", "joint_normalised", "diluted"), JOINT)
    aims |= {"experts_only": EXPERTS_ONLY, "router_only": ROUTER_ONLY, "router_hinge": ROUTER_ONLY}
    assert {name: ObjectiveInfo.of(make()) for name, make in OBJECTIVES.items()} == aims
    assert ObjectiveInfo.of(RoutingLoss()) == ROUTING


def test_an_objective_must_declare_what_it_aims_at() -> None:
    with pytest.raises(TypeError, match="objective Nameless must declare name and aims_at_router"):

        class Nameless(Objective):
            def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
                raise NotImplementedError


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_gradients_by_finite_differences(
    objective: Objective, routed: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """In float64, along random directions, away from the clean image. A straight-through gradient is biased, as
    declared.
    """
    model, x, y = routed.double(), images(6).double(), labels(6)
    inner = objective(model, x, y)
    x_adv = (x + 0.02 * torch.randn_like(x)).clamp(0, 1)
    score, gradient = ascend(inner, x_adv)
    direction = torch.randn_like(x)
    with torch.no_grad():
        up, down = inner(x_adv + 1e-6 * direction).loss, inner(x_adv - 1e-6 * direction).loss
    slope = (gradient * direction).flatten(1).sum(1)
    exact = torch.allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-6)
    gate = model.rule.keywords["gate"] if isinstance(model, EnsembleModel) else None
    straight = isinstance(model, PathwayModel) or gate == "straight_through"
    assert exact is not (straight and isinstance(objective, Joint))
    assert score.loss.shape == score.fooled.shape == (6,)
    assert score.fooled.dtype == torch.bool


@torch.no_grad()
def test_joint_and_fooled_are_of_the_live_model(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    x, x_adv = images(8), 1 - images(8)
    y = model(x).argmax(1)
    score = Joint()(model, x, y)(x_adv)
    expected = torch.nn.functional.cross_entropy(model(x_adv), y, reduction="none")
    torch.testing.assert_close(score.loss, expected)
    assert torch.equal(score.fooled, model(x_adv).argmax(1) != y)
    assert not Joint()(model, x, y)(x).fooled.any()


@torch.no_grad()
def test_experts_only_holds_the_clean_route(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    x, x_adv = images(8), images(8).flip(0)
    y = routed(x).argmax(1)
    held = routed.run(x_adv, forced=routed.run(x).trace).logits
    score = ExpertsOnly()(routed, x, y)(x_adv)
    torch.testing.assert_close(score.loss, torch.nn.functional.cross_entropy(held, y, reduction="none"))
    assert torch.equal(score.fooled, held.argmax(1) != y)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_the_route_alone_is_that_of_a_whole_pass(
    routed: RoutedModel, half: bool, images: Callable[..., Tensor]
) -> None:
    """To the bit: what holds the clean route need not run an expert for it."""
    model, x = LowPrecision(routed) if half else routed, images(9)
    alone, whole = model.route(x), model.run(x).trace
    assert alone.keys() == whole.keys()
    for name, routing in alone.items():
        for ours, theirs in zip(
            (routing.logits, routing.index, routing.weight),
            (whole[name].logits, whole[name].index, whole[name].weight),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["ensemble_hard", "pathway"])
def test_only_a_loss_that_compares_with_the_clean_logits_asks_for_them(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = tiny(name), images(4), torch.zeros(4, dtype=torch.long)

    def body(*args: object) -> Tensor:
        raise AssertionError("the experts ran")

    monkeypatch.setattr(type(model), "body", body)
    for objective in (ExpertsOnly(), ExpertsOnly("margin"), RouterOnly(), router_hinge()):
        objective(model, x, y)
    with pytest.raises(AssertionError, match="the experts ran"):
        ExpertsOnly("kl")(model, x, y)


def test_experts_only_sends_nothing_through_the_router(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    x, y = images(6), torch.zeros(6, dtype=torch.long)
    for loss in ("ce", "margin", "kl"):
        routed.zero_grad()
        ExpertsOnly(loss)(routed, x, y)(images(6).flip(0)).loss.sum().backward()
        (router,) = (routed.get_submodule(name) for name in routed.route(x))
        assert all(p.grad is None or not p.grad.any() for p in router.parameters())


@torch.no_grad()
def test_on_a_dense_model_experts_only_is_joint(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x, y = tiny("dense"), images(4), torch.zeros(4, dtype=torch.long)
    one, other = Joint()(model, x, y)(1 - x), ExpertsOnly()(model, x, y)(1 - x)
    assert torch.equal(one.loss, other.loss)


@torch.no_grad()
def test_router_only_is_above_zero_exactly_where_an_image_is_rerouted(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    for name in ("ensemble_hard", "ensemble_k2", "pathway"):
        model, x, x_adv = tiny(name), images(24), images(24).flip(0)
        score: Score = RouterOnly()(model, x, torch.zeros(24, dtype=torch.long))(x_adv)
        before, after = (model.run(at).trace["router"].chosen() for at in (x, x_adv))
        moved = (before != after).any(-1)[:, 0]
        assert 0 < moved.sum() < 24
        assert torch.equal(score.loss > 0, moved)


def test_an_item_none_of_whose_choices_found_room_departs_from_nothing() -> None:
    logits = torch.tensor([[[2.0, 0.5, 1.0], [3.0, 0.0, 1.0]]], requires_grad=True)
    clean = Routing(logits.detach(), torch.tensor([[[0], [0]]]), torch.tensor([[[1.0], [0.0]]]))
    loss = _departure(clean, logits).loss
    assert loss.tolist() == [pytest.approx((1.0 - 2.0) / 2)]
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]]


def test_router_only_needs_a_router(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="router_only needs a model with a router; this model is dense"):
        RouterOnly()(tiny("dense"), images(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("kind", ["ce", "margin", "dlr", "towards dlr", "towards margin"])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("spoilt", ["none", "flat", "certain", "huge", "never", "nan"])
def test_ordinary_logits_give_what_all_logits_give(
    kind: str, classes: int, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way, which is taken where no image's logits are out of the ordinary, to the bit, and its gradients."""
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(classes))
    y = torch.arange(6) % classes
    if spoilt != "none":
        logits[2] = {"flat": 1e-6, "certain": 1.0, "huge": 2.0**60, "never": 1.0, "nan": torch.nan}[spoilt] * logits[2]
    if spoilt == "certain":
        logits[2, y[2]] = 300.0
    if spoilt == "never":
        logits[2, (y[2] + 1) % classes] = -torch.inf
    assert losses.ordinary(logits) is (spoilt in ("none", "certain"))

    def parts() -> list[Tensor]:
        at = logits.clone().requires_grad_(True)
        if kind.startswith("towards"):
            ascent = losses.targeted_climb(kind.split()[1], at, y, (y + 1) % classes)  # type: ignore[arg-type]
        else:
            ascent = losses.climb(kind, at, y)  # type: ignore[arg-type]
        [slope] = torch.autograd.grad(ascent.climbed.sum(), at)
        return [ascent.loss.detach(), ascent.climbed.detach(), slope, losses.scale_of(logits)]

    short = parts()
    monkeypatch.setattr(losses, "ordinary", lambda logits: False)
    for mine, long in zip(short, parts(), strict=True):
        assert torch.equal(mine.nan_to_num(7.0), long.nan_to_num(7.0))
