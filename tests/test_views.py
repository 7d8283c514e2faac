"""Views of a routed model: identities of each, forced routes win, and who judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, ExpertsOnly, Joint, Surrogate, exact_of, linf
from robustmoe.attacks.base import evaluating
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.views import (
    VIEWS,
    Exact,
    ExpertView,
    HalfView,
    RuleTape,
    Soft,
    StraightThrough,
    View,
    Viewed,
    attack_view,
    changed,
    each_expert,
    halves,
    image_routers,
    sole_router,
)
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.routing import Routing, Tape, soft, to_expert, top_k
from tiny_models import in_turn

EVERY = [Exact(), StraightThrough(), StraightThrough("identity"), Soft(), Soft(0.3), ExpertView(1)]


class Layers(RoutedModel):
    """Two routers of four items each (an image's quarters), top ``k`` of three linear experts, residual."""

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.routers = nn.ModuleList(nn.Linear(48, 3) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(48, 48) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(48, 4)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        items = x.reshape(len(x), 4, 48)
        for layer, (router, experts) in enumerate(zip(self.routers, self.experts)):
            routing = tape.under(f"layer{layer}")("router", top_k(router(items), self.k, "vmoe"))
            every = torch.stack([torch.tanh(expert(items)) for expert in experts], 2)
            place = routing.index[..., None].expand(-1, -1, -1, 48)
            items = items + (every.gather(2, place) * routing.weight[..., None]).sum(2)
        return self.head(items.mean(1))


@pytest.fixture
def layers() -> Layers:
    return Layers().eval()


def gradient(model: RoutedModel, x: Tensor, y: Tensor) -> Tensor:
    at = x.clone().requires_grad_(True)
    found = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)[0]
    return found.detach()


# ------------------------------------------------------------------------------------------------ identities


def test_the_table_makes_every_view() -> None:
    assert [type(VIEWS[name]()) for name in ("exact", "straight_through", "soft", "expert", "half")] == [
        Exact,
        StraightThrough,
        Soft,
        ExpertView,
        HalfView,
    ]
    with pytest.raises(ValueError, match="temperature must be above 0, a number from 1e-09; got 0"):
        Soft(0.0)


@pytest.mark.parametrize("view", [Exact(), StraightThrough(), StraightThrough("identity")])
def test_these_views_have_the_exact_values(view: View, model: RoutedModel, images: Callable[..., Tensor]) -> None:
    x = images(6)
    with torch.no_grad():
        assert torch.equal(attack_view(model, view)(x), model(x))
    assert torch.equal(attack_view(model, view)(x.clone().requires_grad_(True)), model(x))


def test_the_exact_view_has_the_exact_gradient(
    model: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(6), labels(6)
    assert torch.equal(gradient(attack_view(model, Exact()), x, y), gradient(model, x, y))


@pytest.mark.parametrize("view", EVERY)
def test_a_dense_model_looks_the_same_in_every_view(
    view: View, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny("dense"), images(4)
    with torch.no_grad():
        assert torch.equal(attack_view(model, view)(x), model(x))


def test_the_straight_through_view_of_a_hard_gate_has_the_declared_gradient(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """By hand: sum over the chosen k of d loss / d weight_k times the gradient of softmax(g)_k (or g_k), added."""
    model, x, y = tiny("ensemble_hard"), images(5), labels(5)
    for surrogate in ("softmax", "identity"):
        at = x.clone().requires_grad_(True)
        routing = model.run(at).trace["router"]
        weight = routing.weight.detach().clone().requires_grad_(True)
        held = {"router": Routing(routing.logits, routing.index, weight)}
        loss = F.cross_entropy(model.run(at, forced=held).logits, y, reduction="sum")
        slope, experts = torch.autograd.grad(loss, [weight, at])
        score = routing.logits.softmax(-1) if surrogate == "softmax" else routing.logits
        moved = (score.gather(-1, routing.index) * slope).sum()
        expected = experts + torch.autograd.grad(moved, at)[0]
        torch.testing.assert_close(gradient(attack_view(model, StraightThrough(surrogate)), x, y), expected)


@pytest.mark.parametrize("name", ["ensemble_hard", "ensemble_straight", "pathway"])
def test_soft_is_the_log_of_the_mixed_probabilities(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny(name), images(6)
    with torch.no_grad():
        trace = model.run(x).trace
        gate = (trace["router"].logits[:, 0] / 0.7).softmax(-1)
        experts = torch.stack([model.run(x, forced=to_expert(trace, k)).logits.softmax(-1) for k in range(3)], 1)
        expected = (gate[:, :, None] * experts).sum(1).log()
        output = attack_view(model, Soft(0.7)).run(x)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.trace["router"].weight.sum(-1), torch.ones(6, 1))
    assert torch.equal(output.trace["router"].logits, trace["router"].logits)


@pytest.mark.parametrize("name", ["ensemble_hard", "ensemble_straight", "pathway"])
def test_soft_tends_to_the_exact_prediction(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny(name), images(32)
    with torch.no_grad():
        cold = attack_view(model, Soft(1e-4))(x)
        torch.testing.assert_close(cold, model(x).log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_soft_inside_the_layer_mixes_all_experts(layers: Layers, images: Callable[..., Tensor]) -> None:
    """The same pass as with the soft decisions replayed layer by layer; a soft model at T = 1 is itself."""
    x = images(5)

    class SoftLayers(Tape):
        def __call__(self, name: str, fresh: Routing) -> Routing:
            return soft(fresh.logits, 0.5)

        def under(self, prefix: str) -> Tape:
            return self

    with torch.no_grad():
        output = attack_view(layers, Soft(0.5)).run(x)
        torch.testing.assert_close(output.logits, layers.body(x, SoftLayers()))
    assert sorted(output.trace) == ["layer0.router", "layer1.router"]
    assert all(routing.k == 3 for routing in output.trace.values())


def test_a_soft_gate_is_its_own_soft_view(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("ensemble_soft"), images(5)
    with torch.no_grad():
        assert torch.equal(attack_view(model, Soft())(x), model(x))


def test_soft_shows_the_router_of_a_hard_gate(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The gradient moves with the router's weights' scale; the hard gate's does not."""
    model, x, y = tiny("ensemble_hard"), images(5), labels(5)
    blind, seeing = gradient(model, x, y), gradient(attack_view(model, Soft()), x, y)
    with torch.no_grad():
        model.router.head.weight.mul_(1.5)
        model.router.head.bias.mul_(1.5)
    assert torch.equal(gradient(model, x, y), blind)
    assert not torch.allclose(gradient(attack_view(model, Soft()), x, y), seeing, rtol=1e-2)


@pytest.mark.parametrize("k", [0, 2])
def test_the_expert_view_is_the_forced_run(
    k: int, routed: RoutedModel, layers: Layers, images: Callable[..., Tensor]
) -> None:
    x = images(6)
    for model in (routed, layers):
        with torch.no_grad():
            expected = model.run(x, forced=to_expert(model.run(x).trace, k)).logits
            torch.testing.assert_close(attack_view(model, ExpertView(k))(x), expected, rtol=1e-6, atol=1e-6)


def test_an_expert_that_does_not_exist_is_refused(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    (name,) = routed.route(images(2))
    with pytest.raises(ValueError, match=f"expert 3 does not exist at '{name}': it has experts 0 to 2"):
        attack_view(routed, ExpertView(3))(images(2))


# ------------------------------------------------------------------------------------------------ dual models

DUAL = (
    "dual(ensemble(linear, experts=2, gate=hard, router=linear), "
    "ensemble(linear, experts=3, gate=straight_through, router=linear), alpha=0.6, mix={}, sharpen={})"
)
BLENDS = [("probabilities", "None"), ("probabilities", "nuts"), ("logits", "scaled(3)")]


def dual(tiny: Callable[..., RoutedModel], mix: str = "probabilities", sharpen: str = "nuts") -> DualModel:
    """Two routers of two and three experts; alpha 0.6."""
    model = tiny(DUAL.format(mix, sharpen))
    assert isinstance(model, DualModel)
    return model


@pytest.mark.parametrize("mix, sharpen", BLENDS)
def test_soft_softens_each_half_and_blends_the_results(
    mix: str, sharpen: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """By hand: log of the mixed probabilities of each half's experts, sharpened and blended as the model does."""
    model, x = dual(tiny, mix, sharpen), images(6)
    with torch.no_grad():
        soft_halves = []
        for half, experts in ((model.standard, 2), (model.robust, 3)):
            trace = half.run(x).trace
            gate = (trace["router"].logits[:, 0] / 0.7).softmax(-1)
            each = [half.run(x, forced=to_expert(trace, k)).logits.softmax(-1) for k in range(experts)]
            soft_halves.append((gate[:, :, None] * torch.stack(each, 1)).sum(1).log())
        expected = model.blended(x, *soft_halves)
        output = attack_view(model, Soft(0.7)).run(x)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        assert {name: routing.k for name, routing in output.trace.items()} == {"standard.router": 2, "robust.router": 3}
        cold = attack_view(model, Soft(1e-4))(x).log_softmax(-1)  # no blend sees a shift of a half's logits
        torch.testing.assert_close(cold, model(x).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["standard", "robust"])
def test_soft_shows_the_routers_of_both_halves(
    half: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The gradient moves with the scale of either router."""
    model, x, y = dual(tiny), images(5), labels(5)
    before = gradient(attack_view(model, Soft()), x, y)
    with torch.no_grad():
        for parameter in model.get_submodule(f"{half}.router").parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(gradient(attack_view(model, Soft()), x, y), before, rtol=1e-2)


@pytest.mark.parametrize("half", ["standard", "robust"])
def test_a_half_is_seen_alone_before_any_sharpening(
    half: Literal["standard", "robust"], tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = dual(tiny), images(5)
    alone = model.get_submodule(half)
    assert isinstance(alone, RoutedModel)
    with torch.no_grad():
        output, trace = attack_view(model, HalfView(half)).run(x), model.run(x).trace
        assert torch.equal(output.logits, alone(x))
        assert sorted(output.trace) == ["robust.router", "standard.router"]
        forced = to_expert(trace, 1)
        held = attack_view(model, f"half({half})").run(x, forced=forced).logits
        assert torch.equal(held, alone.run(x, forced={"router": forced[f"{half}.router"]}).logits)
        softened = attack_view(alone, Soft(0.5))(x)
        for first, second in ((HalfView(half), Soft(0.5)), (Soft(0.5), HalfView(half))):
            both = attack_view(attack_view(model, first), second)
            assert exact_of(both) is model
            torch.testing.assert_close(both(x), softened)
    at = x.clone().requires_grad_(True)
    logits = attack_view(model, HalfView(half))(at)
    other = model.get_submodule("robust" if half == "standard" else "standard")
    found = torch.autograd.grad(logits.sum(), list(other.parameters()), allow_unused=True)
    assert all(each is None for each in found), "nothing of the other half is in the gradient"


def test_a_half_in_bf16_stays_in_bf16(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """A fast copy's climbed part is a `LowPrecision`: the views look through it, and its numbers stay those of bf16."""
    model, x = dual(tiny), images(5)
    with torch.no_grad():
        seen = attack_view(Surrogate(LowPrecision(model), model, close=True), HalfView("robust"))
        assert torch.equal(seen(x), LowPrecision(model.robust)(x))
        assert not torch.equal(seen(x), model.robust(x))
        soft_seen = attack_view(Surrogate(LowPrecision(model), model, close=True), Soft(0.5))
        torch.testing.assert_close(soft_seen(x), attack_view(model, Soft(0.5))(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["dense", "ensemble_hard"])
def test_only_dual_models_have_halves(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    attack = Viewed(HalfView("robust"), PGD(linf(0.03), steps=1))
    with pytest.raises(UserError, match=r"half\(robust\) is one half of a dual model, .* this model is a \w+"):
        attack(tiny(name), images(2), labels(2))
    with pytest.raises(UserError, match="left"):
        attack_view(tiny("dual(linear, linear)"), "half(left)")


def test_halves_are_known_by_their_routers_names(
    layers: Layers, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x = images(2)
    two, mixed = dual(tiny).run(x).trace, tiny("dual(linear, ensemble(linear, router=linear))").run(x).trace
    assert {half: sorted(trace) for half, trace in halves(two).items()} == {
        "standard": ["router"],
        "robust": ["router"],
    }
    assert {half: sorted(trace) for half, trace in halves(mixed).items()} == {"standard": [], "robust": ["router"]}
    for other in (layers, tiny("ensemble_hard"), tiny("dense"), tiny("dual(linear, linear)")):
        assert halves(other.run(x).trace) == {}
    assert sorted(image_routers(two)) == ["robust.router", "standard.router"]
    assert sole_router(two) is None
    assert sole_router(mixed) == "robust.router"
    assert image_routers(layers.run(x).trace) == image_routers(tiny("ensemble_soft").run(x).trace) == {}


def test_the_passes_of_a_softened_dual_model(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """One pass of the whole, one more of the standard half, two more of the robust half: 4, as counted."""
    model, x, seen = dual(tiny), images(4), []
    counted = Surrogate(model, model, close=True, on_pass=lambda n, gradient: seen.append((n, gradient)))
    attack_view(counted, Soft())(x.clone().requires_grad_(True))
    assert seen == [(4, True)] * 4
    assert Soft().passes(model.run(x)) == 4
    assert HalfView().passes(model.run(x)) == 1


# ------------------------------------------------------------------------------------------------ forced routes win


@pytest.mark.parametrize("view", EVERY)
def test_a_forced_route_wins_over_the_view(
    view: View, routed: RoutedModel, layers: Layers, images: Callable[..., Tensor]
) -> None:
    """Every router forced: whatever the view, the pass is the exact model's on that route."""
    x = images(6)
    for model in (routed, layers):
        with torch.no_grad():
            forced = to_expert(model.run(x).trace, 2)
            output = attack_view(model, view).run(x, forced=forced)
            torch.testing.assert_close(output.logits, model.run(x, forced=forced).logits, rtol=1e-6, atol=1e-6)
        assert all(bool((routing.index == 2).all()) for routing in output.trace.values())


def test_a_router_that_is_not_forced_follows_the_view(layers: Layers, images: Callable[..., Tensor]) -> None:
    x = images(4)
    with torch.no_grad():
        forced = {"layer0.router": to_expert(layers.run(x).trace, 2)["layer0.router"]}
        trace = attack_view(layers, ExpertView(1)).run(x, forced=forced).trace
    assert bool((trace["layer0.router"].index == 2).all())
    assert bool((trace["layer1.router"].index == 1).all())


@pytest.mark.parametrize("view", EVERY)
def test_experts_only_through_a_view_is_experts_only(
    view: View, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y = tiny("ensemble_hard"), images(6), labels(6)
    attack = PGD(linf(0.03), steps=3, objective=ExpertsOnly())
    torch.testing.assert_close(Viewed(view, attack)(model, x, y), attack(model, x, y), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ who judges


class Says(RoutedModel):
    """Class 1 everywhere on route 1, class 0 on route 0; the router always picks 0."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        flat = x.flatten(1).sum(1, keepdim=True)
        logits = torch.cat([torch.ones_like(flat), 0 * flat], 1)[:, None]
        routing = tape("router", top_k(logits))
        return F.one_hot(routing.index[:, 0, 0], 2).to(x.dtype) + 0 * flat


def test_the_exact_model_judges_a_view(images: Callable[..., Tensor]) -> None:
    """The view is wrong at every image, the model at none: nothing is fooled."""
    x, y = images(5), torch.zeros(5, dtype=torch.long)
    view = attack_view(Says(), ExpertView(1))
    assert bool((view(x).argmax(1) == 1).all())
    assert not bool(Joint()(view, x, y)(x).fooled.any())
    assert bool(Joint()(Says(), x, torch.ones_like(y))(x).fooled.all())


def test_a_view_of_a_surrogate_climbs_its_copy_and_keeps_its_judge_and_counts(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    exact, copy, seen = tiny("ensemble_hard"), tiny("ensemble_hard", 1), []
    model = Surrogate(copy, exact, close=True, on_pass=lambda n, gradient: seen.append((n, gradient)))
    x = images(4)
    with torch.no_grad():
        for view in EVERY:
            found = attack_view(model, view)
            assert exact_of(found) is exact
            torch.testing.assert_close(found(x), attack_view(copy, view)(x))
    assert attack_view(model, Exact()) is model
    assert [attack_view(model, view).close for view in EVERY] == [True, True, True, False, False, False]
    seen.clear()
    attack_view(model, Soft())(x.clone().requires_grad_(True))
    assert seen == [(4, True)] * 3  # one pass an expert
    seen.clear()
    labels = torch.zeros(4, dtype=torch.long)
    Viewed(ExpertView(0), PGD(linf(0.01), steps=2, keep="last"))(model, x, labels)
    assert seen == [(4, True)] * 2  # nobody reads which are broken
    seen.clear()
    Viewed(ExpertView(0), PGD(linf(0.01), steps=2, keep="best"))(model, x, labels)
    assert seen[:4] == [(4, True), (4, False)] * 2  # a gradient, and the judge


@pytest.mark.parametrize("view, name", in_turn(EVERY, ["ensemble_hard", "ensemble_k2", "pathway", "dual"], every=2))
def test_an_attack_through_a_view_keeps_the_contract(
    view: View,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    attack, x, y = Viewed(view, PGD(linf(0.03), steps=2, restarts=2, keep="first", seed=4)), images(6), labels(6)
    routed = tiny(name)
    assert (attack.threat, attack.objective, attack.seed) == (linf(0.03), Joint(), 4)
    for i, module in enumerate(routed.modules()):
        module.training = i % 3 == 0
    modes = [module.training for module in routed.modules()]
    x_adv = attack(routed, x, y)
    assert [module.training for module in routed.modules()] == modes
    assert float((x_adv - x).abs().max()) <= 0.03 * (1 + 1e-5)
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    assert torch.equal(attack(routed, x, y), x_adv)
    with evaluating(routed):
        if isinstance(view, Exact):
            assert torch.equal(x_adv, attack.attack(routed, x, y))


def test_an_image_is_attacked_alike_in_any_batch_through_soft(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    from robustmoe.noise import Noise

    model, x, y, index = tiny("ensemble_hard").double(), images(6).double(), labels(6), torch.arange(6)
    attack = Viewed(Soft(), PGD(linf(0.03), steps=3))
    whole = attack(model, x, y, Noise.of(index))
    alone = [attack(model, x[i : i + 1], y[i : i + 1], Noise.of(index[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), whole)


def test_each_expert_and_changed(
    layers: Layers, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    attack, x = PGD(linf(0.03), steps=2), images(2)
    named = each_expert(attack, layers.run(x))
    assert named == [(f"expert {k}", Viewed(ExpertView(k), attack)) for k in range(3)]
    assert each_expert(attack, tiny("dense").run(x)) == []
    assert changed(named[1][1], seed=3, threat=linf(0.01)) == Viewed(ExpertView(1), PGD(linf(0.01), steps=2, seed=3))
    output = tiny("ensemble_hard").run(x)
    assert attack.queries(output) == 7
    assert Viewed(StraightThrough(), attack).queries(output) == 7
    assert Viewed(Soft(), attack).queries(output) == 3 * 7 + 3
    assert Viewed(Soft(), attack).parts(output) == [("", Viewed(Soft(), attack))]


def test_a_rule_tape_keeps_the_fresh_decisions_and_the_forced_ones(images: Callable[..., Tensor]) -> None:
    layers, x = Layers().eval(), images(3)
    with torch.no_grad():
        free = layers.run(x).trace
        tape = RuleTape(ExpertView(1).rule, Tape(to_expert(free, 2)))
        layers.body(x, tape)
    assert torch.equal(tape.fresh["layer0.router"].index, free["layer0.router"].index)
    assert sorted(tape.fresh) == sorted(tape.trace) == ["layer0.router", "layer1.router"]
    assert all(bool((routing.index == 2).all()) for routing in tape.trace.values())


def test_a_view_can_be_written(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("ensemble_hard"), images(4)
    for text, view in (("soft(0.3)", Soft(0.3)), ("expert(1)", ExpertView(1)), ("straight_through", StraightThrough())):
        assert torch.equal(attack_view(model, text)(x), attack_view(model, view)(x))
    with pytest.raises(UserError, match="did you mean 'soft'"):
        attack_view(model, "sofd(1)")
