"""Attacks on the route: planted models that only they break, identities of their parts, and the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, Attack, ExpertsOnly, NotFiniteError, RouterOnly, Surrogate, l1, l2, linf
from robustmoe.attacks.routes import (
    ExpertTransition,
    Flip,
    Goal,
    JointNormalised,
    RouteBeam,
    RouteFlip,
    RouterHinge,
    RoutingLoss,
    Steering,
    decisions,
    router_hinge,
    router_logits,
)
from robustmoe.attacks.routes.flip import rivals, swapped
from robustmoe.attacks.routes.regions import alike, forced_pass, lead, margin, reached, unit
from robustmoe.attacks.routes.transition import by_sum
from robustmoe.attacks.views import ExpertView, Soft, Viewed
from robustmoe.models import RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise
from robustmoe.routing import Gating, Routing, Tape, top_k
from tiny_models import in_turn

SHAPE, SIZE = (3, 4, 4), 48
BALL = linf(0.1)
STEPS = 6
ROUTING = [ExpertTransition(BALL, STEPS), RouteFlip(BALL, STEPS), RouteBeam(BALL, STEPS)]


def names(attack: Attack) -> str:
    return type(attack).__name__


class Planted(RoutedModel):
    """One top-1 router with the logits ``scores(mean of the pixels but the first)``; expert k says class ``says[k]``
    with a margin of 6 that the first pixel moves a little, so that no gradient is 0.
    """

    def __init__(self, scores: Callable[[Tensor], list[Tensor]], says: list[int], gating: Gating = "hard") -> None:
        super().__init__()
        self.scores, self.gating = scores, gating
        self.says = F.one_hot(torch.tensor(says), 2) * 6.0
        self.bodies = 0

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = torch.stack(self.scores(x.flatten(1)[:, 1:].mean(1)), 1)
        routing = tape("router", top_k(logits[:, None], 1, self.gating))
        self.bodies += 1
        pixel = x[:, 0, 0, 0]
        said = self.says[routing.index[:, 0, 0]].to(x.dtype) + torch.stack([pixel, -pixel], 1)
        return said * routing.weight[:, 0]


def grey(n: int = 6) -> tuple[Tensor, Tensor]:
    """Mid-grey images of class 0. The mean of 47 uniform draws on [-0.1, 0.1] deviates by 0.008: no random start
    crosses a boundary at 0.53.
    """
    return torch.full((n, *SHAPE), 0.5), torch.zeros(n, dtype=torch.long)


def robust(model: RoutedModel, attack: Attack, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(attack(model, x, y)).argmax(1) == y).float().mean())


# ------------------------------------------------------------------------------------------------ planted models


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_behind_a_boundary_that_no_gradient_shows(attack: Attack) -> None:
    """Expert 1, which is wrong, decides where the mean is above 0.58."""
    model = Planted(lambda m: [0 * m, 50 * (m - 0.58)], [0, 1])
    x, y = grey()
    assert robust(model, PGD(BALL, steps=20, restarts=2), x, y) == 1.0
    assert robust(model, attack, x, y) == 0.0


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_behind_a_saturated_gate(attack: Attack) -> None:
    """A gate-scaled expert, whose softmax is 1 to the last bit: no gradient either."""
    model = Planted(lambda m: [0 * m, 5000 * (m - 0.58)], [0, 1], "vmoe")
    x, y = grey()
    assert robust(model, PGD(BALL, steps=20), x, y) == 1.0
    assert robust(model, attack, x, y) == 0.0


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_behind_a_gate_in_sight(attack: Attack) -> None:
    model = Planted(lambda m: [0 * m, 50 * (m - 0.58)], [0, 1], "vmoe")
    assert robust(model, attack, *grey()) == 0.0


class Corner(RoutedModel):
    """Expert 1 decides where the mean of the pixels but the first is above 0.58, and is wrong where the first pixel is
    above 0.55; expert 0 is right, and the more so the higher that pixel.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        mean, pixel = x.flatten(1)[:, 1:].mean(1), x[:, 0, 0, 0]
        routing = tape("router", top_k(torch.stack([0 * mean, 50 * (mean - 0.58)], 1)[:, None], 1, "hard"))
        first, second = torch.stack([6 + pixel, -pixel], 1), torch.stack([0 * pixel, 40 * (pixel - 0.55)], 1)
        return torch.where(routing.index[:, :, 0] == 0, first, second)


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_a_boundary_and_then_an_expert(attack: Attack) -> None:
    """Neither the experts' nor the router's gradient alone leads there."""
    x, y = grey()
    for objective in (RouterOnly(), ExpertsOnly(), RouterHinge()):
        assert robust(Corner(), PGD(BALL, steps=20, objective=objective, start="clean"), x, y) == 1.0
    assert robust(Corner(), PGD(BALL, steps=20, start="clean"), x, y) == 1.0
    assert robust(Corner(), attack, x, y) == 0.0


def two_boundaries() -> Planted:
    """Expert 0 up to a mean of 0.53, expert 1 up to 0.58, expert 2 beyond: the upper envelope of three lines."""
    return Planted(lambda m: [0 * m, 50 * (m - 0.53), 100 * (m - 0.555)], [0, 0, 1])


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_a_region_behind_two_boundaries(attack: Attack) -> None:
    x, y = grey()
    assert robust(two_boundaries(), PGD(BALL, steps=20, restarts=2), x, y) == 1.0
    assert robust(two_boundaries(), attack, x, y) == 0.0


@pytest.mark.parametrize(
    "attack", [RouteFlip(BALL, STEPS, rivals=1), ExpertTransition(BALL, STEPS, experts=2), RouteBeam(BALL, rivals=1)]
)
def test_with_one_rival_only_the_next_cell_is_searched(attack: Attack) -> None:
    """The first rival of expert 0 at 0.5 is expert 1: -1.5 against -5.5."""
    assert robust(two_boundaries(), attack, *grey()) == 1.0


class Tokens(RoutedModel):
    """Two layers that route four items, an image's quarters, by the quarter's mean m: expert 1 above ``at[layer]``.
    ``wrong(c)`` says from the experts c (n, 2, 4) which images get the wrong class.
    """

    def __init__(self, at: tuple[float, float], wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at, self.wrong = at, wrong

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        means = x.reshape(len(x), 4, 12).mean(-1)
        chosen = []
        for layer, at in enumerate(self.at):
            logits = torch.stack([0 * means, 50 * (means - at)], -1)
            chosen.append(tape.under(f"layer{layer}")("router", top_k(logits, 1, "hard")).index[..., 0])
        said = F.one_hot(self.wrong(torch.stack(chosen, 1)).long(), 2) * 6.0
        pixel = x[:, 0, 0, 0]
        return said.to(x.dtype) + torch.stack([pixel, -pixel], 1)


def only_item_two(chosen: Tensor) -> Tensor:
    """Item 2 of layer 1 has flipped, and nothing else."""
    return (chosen[:, 1, 2] == 1) & (chosen.sum((1, 2)) == 1)


def test_one_item_of_eight() -> None:
    """All other flips are harmless, and hide this one."""
    x, y = grey(2)
    model = Tokens((0.59, 0.56), only_item_two)
    for attack in (PGD(BALL, steps=20, restarts=2), PGD(BALL, steps=20, objective=RouterOnly())):
        assert robust(model, attack, x, y) == 1.0
    assert robust(model, RouteBeam(BALL, STEPS), x, y) == 0.0
    assert robust(model, RouteBeam(BALL, STEPS, beam=1), x, y) == 0.0  # the forced losses say which it is
    assert robust(model, RouteBeam(BALL, STEPS, candidates=2, depth=1), x, y) == 1.0  # items 0 and 1 of layer 1


def test_two_items_at_once() -> None:
    x, y = grey(2)
    model = Tokens((0.59, 0.56), lambda c: (c[:, 1, 1] == 1) & (c[:, 1, 3] == 1) & (c.sum((1, 2)) == 2))
    assert robust(model, PGD(BALL, steps=20), x, y) == 1.0
    assert robust(model, RouteBeam(BALL, 4, depth=1), x, y) == 1.0
    assert robust(model, RouteBeam(BALL, 4, depth=2), x, y) == 0.0


def test_an_earlier_layer_that_a_later_one_looks_at() -> None:
    """All of layer 0 flips together: what the flip attack holds is every item at once."""
    model = Tokens((0.56, 9.0), lambda c: c[:, 0].sum(1) == 4)
    x, y = grey()
    assert robust(model, PGD(BALL, steps=20), x, y) == 1.0
    assert robust(model, RouteFlip(BALL, STEPS), x, y) == 0.0
    assert robust(model, ExpertTransition(BALL, STEPS), x, y) == 0.0  # routers of items: the same attack


class Side(RoutedModel):
    """Half of a dual model. It reads one side of the image, two of its four columns: expert 1 decides where their mean
    is above ``at``. Expert k says class 0 with the margin ``margins[k]``; a column moves that a little.
    """

    def __init__(self, columns: slice, at: float, margins: tuple[float, float]) -> None:
        super().__init__()
        self.columns, self.at, self.margins = columns, at, torch.tensor(margins)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        mean = x[..., self.columns].flatten(1).mean(1)
        routing = tape("router", top_k(torch.stack([0 * mean, 50 * (mean - self.at)], 1)[:, None], 1, "hard"))
        margin = self.margins.to(x)[routing.index[:, 0, 0]] + 0.1 * (x[:, 0, 0, self.columns].sum(1) - 1)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def sides(standard: tuple[float, float], robust: tuple[float, float]) -> DualModel:
    """The blend's margin is the mean of the halves'; a side's mean moves by 0.1, its boundary is 0.08 away."""
    left, right = Side(slice(0, 2), 0.58, standard), Side(slice(2, 4), 0.58, robust)
    return DualModel(left, right, alpha=0.5, mix="logits")


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_a_dual_model_that_only_the_second_routers_flip_breaks(attack: Attack) -> None:
    """Margins by region: (0, 0) 4, (1, 0) 11, (1, 1) 4, and (0, 1) -3: the standard half's flip rescues it."""
    x, y = grey()
    assert robust(sides((2, 9), (2, -5)), PGD(BALL, steps=20, objective=ExpertsOnly()), x, y) == 1.0
    assert robust(sides((2, 9), (2, -5)), PGD(BALL, steps=20, restarts=2), x, y) == 1.0
    assert robust(sides((2, 9), (2, -5)), attack, x, y) == 0.0


def test_a_dual_model_that_only_both_flips_together_break() -> None:
    """Margins by region: (0, 0) 8, (0, 1) 3, (1, 0) 3, (1, 1) -2. The flip attack moves one router at a time."""
    model, (x, y) = sides((4, -1), (4, -1)), grey()
    assert robust(model, PGD(BALL, steps=20), x, y) == 1.0
    assert robust(model, RouteFlip(BALL, STEPS), x, y) == 1.0
    assert robust(model, ExpertTransition(BALL, STEPS), x, y) == 0.0
    assert robust(model, ExpertTransition(BALL, STEPS, regions=3), x, y) == 1.0  # the fourth region is the one
    assert robust(model, ExpertTransition(BALL, STEPS, regions=4), x, y) == 0.0
    assert robust(model, ExpertTransition(BALL, STEPS, experts=1), x, y) == 1.0


@pytest.mark.parametrize("sizes", [[3], [4, 4], [2, 3, 2], [1, 3]])
def test_cells_come_by_the_sum_of_ranks(sizes: list[int]) -> None:
    every = sorted(product(*map(range, sizes)), key=lambda ranks: (sum(ranks), ranks))
    assert list(by_sum(sizes)) == every


def test_the_number_of_cells_that_are_tried(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Seen in the queries of one step, of which each region has 7 with one router and 6 more with several."""
    attack, many = ExpertTransition(BALL, 1, regions=5), "ensemble(linear, experts=20, router=linear, gate=hard)"
    two = f"dual({many}, ensemble(linear, experts=3, router=linear, gate=hard))"
    x = images(2)
    for spec, other, regions, each in (
        (many, attack, 20, 7),  # one router: all of its experts
        (two, attack, 5, 13),
        (two, ExpertTransition(BALL, 1), 16, 13),
        (two, ExpertTransition(BALL, 1, experts=2), 4, 13),
        ("dual", attack, 3, 7),  # the standard half's gate is soft: one router that chooses
    ):
        assert other.queries(tiny(spec).run(x)) == 2 + regions * each, spec


def test_a_router_that_uses_all_experts_stays_free(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """With the soft standard half held constant by alpha = 1 the attack is the one on the robust half alone."""
    model, x = tiny("dual"), images(6)
    assert isinstance(model, DualModel)
    with torch.no_grad():
        y = model.robust(x).argmax(1)
    attack = ExpertTransition(linf(0.03), 3)
    assert torch.equal(attack(model.at(1.0), x, y), attack(model.robust, x, y))


def test_flip_rate_and_break_rate_apart() -> None:
    """Layer 0 cannot be flipped (on the way there layer 1 breaks the image: not its doing); layer 1 can, which breaks
    the image in the first model and does not in the second. Image 5 is wrong from the start.
    """
    x, _ = grey()
    model = Tokens((0.7, 0.56), lambda c: c[:, 1].sum(1) == 4)
    y = torch.tensor([0, 0, 0, 0, 0, 1])
    found = RouteFlip(BALL, STEPS).flips(model, x, y)
    assert sorted(found) == ["layer0.router", "layer1.router"]
    assert isinstance(found["layer1.router"], Flip)
    assert found["layer0.router"].flipped.tolist() == [False] * 6
    assert found["layer0.router"].broken.tolist() == [False] * 6
    assert found["layer1.router"].flipped.tolist() == [True] * 5 + [False]
    assert found["layer1.router"].broken.tolist() == [True] * 5 + [False]
    harmless = RouteFlip(BALL, STEPS).flips(Tokens((0.7, 0.56), lambda c: c[:, 1, 0] > 1), x, y)
    assert harmless["layer1.router"].flipped.tolist() == [True] * 5 + [False]
    assert harmless["layer1.router"].broken.tolist() == [False] * 6


@pytest.mark.parametrize("threat", [l2(0.1 * 47**0.5), l1(0.1 * 47)])
@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_other_norms(attack: Attack, threat: object) -> None:
    """The boundary of the mean at 0.58 is 0.08 sqrt(47) away in l2, and 0.08 * 47 in l1."""
    model = Planted(lambda m: [0 * m, 50 * (m - 0.58)], [0, 1])
    assert robust(model, replace(attack, threat=threat, steps=15), *grey(2)) == 0.0


# ------------------------------------------------------------------------------------------------ identities


def test_router_logits_are_those_of_the_run(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    x = images(5)
    with torch.no_grad():
        ((name, routing),) = routed.run(x).trace.items()
        for asked in (None, [name]):
            assert torch.equal(router_logits(routed, x, asked)[name], routing.logits)
            assert torch.equal(decisions(routed, x, asked)[name].index, routing.index)
    with pytest.raises(ValueError, match=rf"there is no router \['gate'\], only \['{name}'\]"):
        router_logits(routed, x, ["gate"])


def test_a_pass_for_the_router_ends_at_the_router() -> None:
    model, (x, _) = Planted(lambda m: [m, -m], [0, 1]), grey()
    assert sorted(router_logits(model, x, ["router"])) == ["router"]
    assert model.bodies == 0
    router_logits(model, x)
    assert model.bodies == 1
    tokens = decisions(Tokens((0.5, 0.5), only_item_two), x, ["layer0.router"])
    assert sorted(tokens) == ["layer0.router"]


def test_forcing_a_models_own_decision_changes_nothing(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    """The weights too, live: values and image gradients are those of the free pass (but a straight-through gate's)."""
    x = images(6).requires_grad_(True)
    output = routed.run(x)
    ((name, clean),) = output.trace.items()
    goal = Goal.of(clean, clean.index, torch.ones(clean.index.shape[:2], dtype=torch.bool))
    logits, fresh = forced_pass(routed, x, {name: goal})
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-6)
    assert bool(reached({name: goal}, fresh, x).all())
    if clean.weight.requires_grad and not bool((clean.weight == 1).all()):
        a, b = (torch.autograd.grad(v.square().sum(), x, retain_graph=True)[0] for v in (logits, output.logits))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gating, weights", [("vmoe", "softmax"), ("hard", "one"), ("renormalised", "one")])
def test_a_forced_expert_is_weighted_as_the_router_would(gating: Gating, weights: str) -> None:
    logits = torch.randn(5, 3, 4)
    fresh = top_k(logits, 1, gating)
    forced = Goal.of(fresh, torch.full((5, 3, 1), 2), torch.tensor([[True, False, True]] * 5)).force(fresh)
    expected = logits.softmax(-1)[..., 2:3] if weights == "softmax" else torch.ones(5, 3, 1)
    torch.testing.assert_close(forced.weight[:, [0, 2]], expected[:, [0, 2]])
    torch.testing.assert_close(forced.weight[:, 1], fresh.weight[:, 1])
    assert bool((forced.index[:, [0, 2]] == 2).all())
    assert torch.equal(forced.index[:, 1], fresh.index[:, 1])


def test_rivals_and_what_a_flip_exchanges() -> None:
    """By hand: of logits (3, 1, 4, 2) the best two are 2 and 0; the rivals 3, 1; rival 3 takes the place of 0."""
    routing = top_k(torch.tensor([[[3.0, 1.0, 4.0, 2.0]]]), 2)
    assert rivals(routing, 5).tolist() == [[[3, 1]]]
    index = swapped(routing, torch.tensor([[3]]))
    assert index.tolist() == [[[2, 3]]]
    assert lead(routing.logits, index).tolist() == [[-1.0]]  # 2 against 3
    assert alike(index, torch.tensor([[[3, 2]]])).tolist() == [[True]]


def test_an_item_that_is_there_leaves_the_gradient_to_the_others() -> None:
    """Deviation of (a, -a) is a, so leads are 2 in deviations whatever their scale; here item 0 is far inside, item 1
    is outside, item 2 is not held.
    """
    logits = torch.tensor([[[5.0, -5.0], [-1.0, 1.0], [-2.0, 2.0]]], requires_grad=True)
    routing = Routing(logits, torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(1, 3, 1))
    goal = Goal.of(routing, routing.index, torch.tensor([[True, True, False]]))
    value = margin({"r": goal}, {"r": routing})
    assert value.tolist() == pytest.approx([(0.1 - 2.0) / 2])
    slope = torch.autograd.grad(value.sum(), logits)[0]
    torch.testing.assert_close(slope, torch.tensor([[[0.0, 0.0], [0.5, -0.5], [0.0, 0.0]]]))


def test_the_step_takes_the_smallest_lambda_that_lands(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Against trying all of them one by one."""
    model, x, y = tiny("ensemble_hard"), images(24), labels(24)
    steer = Steering(linf(0.08), 1, 0.03)
    with torch.no_grad():
        clean = model.run(x).trace["router"]
    goal = Goal.of(clean, swapped(clean, rivals(clean, 1)[..., 0]), torch.ones(24, 1, dtype=torch.bool))
    target = {"router": goal}
    gradients, _ = steer.gradients_at(model, x, y, target)
    new = steer.step(model, x, x, gradients, target)
    used = []
    for i in range(24):
        one = x[i : i + 1]
        for weight in steer.grid:
            step = unit(gradients[0])[i : i + 1] + weight * unit(gradients[1])[i : i + 1]
            there = steer.threat.project(one + 0.03 * step.sign(), one)
            if int(model.run(there).trace["router"].index) == int(goal.index[i]):
                break
        used.append(weight)
        torch.testing.assert_close(new[i : i + 1], there)
    assert len(set(used)) >= 3, used  # the grid is used


# ------------------------------------------------------------------------------------------------ objectives


def test_router_hinge_by_hand() -> None:
    """Two routers of different scale, one item off by then: -2 and +2 in deviations, the latter counted 0.1."""

    class Two(RoutedModel):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            a, b = x[:, 0, 0, 0] - 0.5, 100 * (x[:, 0, 0, 1] - 0.5)
            for name, value in (("a", a), ("b", b)):
                tape(name, top_k(torch.stack([value, -value], 1)[:, None], 1, "hard"))
            return x.flatten(1)[:, :2]

    x, y = torch.full((2, *SHAPE), 0.6), torch.zeros(2, dtype=torch.long)
    inner = router_hinge()(Two(), x, y)
    assert inner(x).loss.tolist() == pytest.approx([-2.0, -2.0])
    moved = x.clone()
    moved[:, 0, 0, 1] = 0.4
    moved.requires_grad_(True)
    score = inner(moved)
    assert score.loss.tolist() == pytest.approx([(-2.0 + 0.1) / 2] * 2, rel=1e-5)
    slope = torch.autograd.grad(score.loss.sum(), moved)[0]
    assert float(slope[:, 0, 0, 1].abs().max()) == 0.0  # router b has left; router a has the whole gradient
    assert float(slope[:, 0, 0, 0].abs().min()) > 1.0
    assert inner(x[:1], torch.tensor([1])).loss.tolist() == pytest.approx([-2.0])


def test_router_hinge_of_soft_gates_and_dense_models(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(4), labels(4)
    moved = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        soft = tiny("ensemble_soft")
        torch.testing.assert_close(RouterHinge()(soft, x, y)(moved).loss, RouterOnly()(soft, x, y)(moved).loss)
    with pytest.raises(ValueError, match="router_hinge needs a model with a router; this model is dense"):
        RouterHinge()(tiny("dense"), x, y)


@pytest.mark.parametrize("name", ["ensemble_hard", "ensemble_k2", "pathway"])
def test_joint_normalised_has_gradients_of_equal_length(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y = tiny(name), images(5), labels(5)
    at = (x + 0.01).clamp(0, 1).requires_grad_(True)
    output = model.run(at)
    loss = F.cross_entropy(output.logits, y, reduction="none")
    away = RouterHinge(cap=1e9)(model, x, y)(at).loss
    a, b = (torch.autograd.grad(v.sum(), at, retain_graph=True)[0] for v in (loss, away))
    length = lambda g: g.flatten(1).norm(dim=1)[:, None, None, None]  # noqa: E731
    score = JointNormalised(0.5)(model, x, y)(at)
    found = torch.autograd.grad(score.climbed.sum(), at)[0]
    torch.testing.assert_close(found, a + 0.5 * length(a) / length(b) * b, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(score.loss, loss)
    with torch.no_grad():
        torch.testing.assert_close(JointNormalised()(model, x, y)(at).loss, loss)


def test_joint_normalised_breaks_what_joint_does_not() -> None:
    model = Planted(lambda m: [0 * m, 50 * (m - 0.58)], [0, 1])
    x, y = grey()
    assert robust(model, PGD(BALL, steps=20, objective=JointNormalised()), x, y) == 0.0


def test_joint_normalised_of_a_dense_model_is_joint(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y, attack = tiny("dense"), images(4), labels(4), PGD(linf(0.03), steps=3)
    assert torch.equal(replace(attack, objective=JointNormalised())(model, x, y), attack(model, x, y))


# ------------------------------------------------------------------------------------------------ the contract

CONTRACT = [
    ExpertTransition(linf(0.03), 2, restarts=2),
    RouteFlip(l2(0.3), 2, loss="margin"),
    RouteBeam(linf(0.03), 1, beam=2, candidates=4, restarts=2),
]


class Layers(RoutedModel):
    """Two routers of four items each (an image's quarters), top two of three linear experts, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(48, 3) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(48, 48) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(48, 4)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        items = x.reshape(len(x), 4, 48)
        for layer, (router, experts) in enumerate(zip(self.routers, self.experts)):
            routing = tape.under(f"layer{layer}")("router", top_k(3 * router(items), 2, "renormalised"))
            every = torch.stack([torch.tanh(expert(items)) for expert in experts], 2)
            place = routing.index[..., None].expand(-1, -1, -1, 48)
            items = items + (every.gather(2, place) * routing.weight[..., None]).sum(2)
        return 4 * self.head(items.mean(1))


DUAL = (
    "dual(ensemble(linear, experts=2, gate=hard, router=linear), "
    "ensemble(linear, experts=2, gate=straight_through, router=linear))"
)
"""Two routers that choose."""


@pytest.mark.parametrize(
    "attack, name",
    in_turn(CONTRACT, ["ensemble_hard", "ensemble_soft", "ensemble_k2", "pathway"])
    + [(attack, name) for attack in CONTRACT for name in ("layers", DUAL)],
)
def test_the_contract(
    attack: Attack, name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """In the ball and the box; modes, weights and generators untouched; deterministic; never worse than nothing."""
    model, x = Layers().eval() if name == "layers" else tiny(name), images(4)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4  # wrong from the start: comes back as it is
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given, generator = x.clone(), torch.get_rng_state()

    x_adv = attack(model, x, y)

    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert bool((attack.threat.size(x_adv - x) <= attack.threat.eps * (1 + 1e-5)).all())
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    assert torch.equal(x, given)
    assert torch.equal(x_adv[0], x[0])
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(attack(model, x, y), x_adv)
    assert attack.objective == RoutingLoss(attack.loss)
    assert attack.objective.name == "routing"
    assert attack.parts(model.eval().run(x)) == [("", attack)]


@pytest.mark.parametrize("name", ["ensemble_hard", "layers"])
@pytest.mark.parametrize("attack", [replace(attack, steps=1) for attack in CONTRACT], ids=names)
def test_an_image_is_attacked_alike_in_any_batch(
    attack: Attack, name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model = (Layers().eval() if name == "layers" else tiny(name)).double()
    x, index = images(4).double(), torch.arange(4) + 40
    with torch.no_grad():
        y = model(x).argmax(1)
    whole = attack(model, x, y, Noise.of(index))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attack(model, x[order], y[order], Noise.of(index[order])), whole[order])
    alone = [attack(model, x[i : i + 1], y[i : i + 1], Noise.of(index[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), whole[:2])


@pytest.mark.parametrize("close", [True, False])
def test_only_the_exact_models_own_route_breaks_an_image(
    close: bool, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """A surrogate of other weights, forced to a route: what counts as fooled is what the exact model misses."""
    copy, exact, x, y = tiny("ensemble_hard", 1), tiny("ensemble_hard"), images(24), labels(24)
    model = Surrogate(copy, exact, close=close)
    with torch.no_grad():
        clean = copy.run(x).trace["router"]
    goal = Goal.of(clean, swapped(clean, rivals(clean, 1)[..., 0]), torch.ones(24, 1, dtype=torch.bool))
    end, fooled = Steering(linf(0.05), 4, 0.02)(model, x, y, x, {"router": goal})
    with torch.no_grad():
        wrong = exact(end).argmax(1) != y
        assert not bool((fooled & ~wrong).any())
        assert bool(fooled.any())
        assert not bool(fooled.all())
        if not close:  # asked about all of them
            assert torch.equal(fooled, wrong)


@pytest.mark.parametrize("view, attack", in_turn([Soft(), ExpertView(1)], CONTRACT))
def test_through_a_view_they_ask_the_exact_model(
    attack: Attack, view: object, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny("ensemble_hard"), images(5)
    with torch.no_grad():
        y = model(x).argmax(1)
    assert torch.equal(Viewed(view, attack)(model, x, y), attack(model, x, y))


@pytest.mark.parametrize(
    "attack, name",
    in_turn([*CONTRACT, PGD(linf(0.03), steps=3, keep="first")], ["ensemble_hard", "layers", "dual", DUAL], every=2),
)
def test_queries_bound_what_a_model_is_asked(
    attack: Attack, name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Counted passes an image, a gradient as 3, are at most what `queries` says (less one clean pass)."""
    asked = [0]

    def count(n: int, gradient: bool) -> None:
        asked[0] += n * (3 if gradient else 1)

    exact, x = Layers().eval() if name == "layers" else tiny(name), images(6)
    model = Surrogate(exact, exact, close=True, on_pass=count)
    with torch.no_grad():
        output = exact.run(x)
    attack(model, x, output.logits.argmax(1))
    assert 0 < asked[0] / 6 <= attack.queries(output) + 1


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_models_without_a_route(
    attack: Attack, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(3), labels(3)
    with pytest.raises(
        ValueError, match=r"route_\w+|expert_transition needs a model with a router; this model is dense"
    ):
        attack(tiny("dense"), x, y)
    with torch.no_grad():
        y = tiny("ensemble_soft")(x).argmax(1)
    plain = PGD(BALL, steps=STEPS, keep="first", start="clean")
    assert torch.equal(attack(tiny("ensemble_soft"), x, y), plain(tiny("ensemble_soft"), x, y))


@pytest.mark.parametrize("attack", ROUTING, ids=names)
def test_a_broken_model_stops_the_attack(attack: Attack) -> None:
    """Right when judged, NaN where a gradient is taken."""

    class Half(Planted):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return super().body(x, tape) * (torch.nan if x.requires_grad else 1.0)

    x, y = grey(2)
    with pytest.raises(NotFiniteError, match="not finite"):
        attack(Half(lambda m: [0 * m, 50 * (m - 0.58)], [0, 0]), x, y)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ExpertTransition(BALL, steps=0), "steps and restarts must be at least 1; got 0 and 1"),
        (lambda: RouteFlip(BALL, step_size=0.0), "step_size must be above 0"),
        (lambda: RouteBeam(BALL, grid=(1.0, 0.0)), "grid must be numbers from 0 up, in rising order"),
        (lambda: ExpertTransition(BALL, experts=0), "experts must be at least 1; got 0"),
        (lambda: ExpertTransition(BALL, regions=0), "regions must be at least 1; got 0"),
        (lambda: RouteFlip(BALL, rivals=0), "rivals must be at least 1; got 0"),
        (lambda: RouteBeam(BALL, depth=0), "depth must be at least 1; got 0"),
        (lambda: JointNormalised(-1.0), "weight must be 0 or more"),
    ],
)
def test_numbers_that_no_attack_can_have(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_hard_gate_loses_more_than_pgd_shows(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Measured on this model: what plain PGD breaks is a part of what each attack on the route breaks."""
    model, x = tiny("ensemble_hard"), images(24)
    with torch.no_grad():
        y = model(x).argmax(1)
    plain = robust(model, PGD(linf(4 / 255), steps=10, keep="first"), x, y)
    for attack in ROUTING:
        assert robust(model, replace(attack, threat=linf(4 / 255), steps=5), x, y) < plain - 0.1
