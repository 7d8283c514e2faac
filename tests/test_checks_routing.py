"""Checks of routing and routers, and all checks together on planted models and on a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faulty_models import ATTACK, EPS, GATES, Capacity, Constant, Dead, Distant, Large, Mix, Pair, Stale, case, on
from robustmoe import recipe, training
from robustmoe.attacks import PGD, Attack, Joint, Objective, Score, experts_only, l1, l2, linf, router_only
from robustmoe.attacks.objectives import Inner
from robustmoe.attacks.routes import RouteFlip
from robustmoe.attacks.views import Soft, Viewed
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.evaluation import checks
from robustmoe.evaluation.checks import routers, routing
from robustmoe.evaluation.checks.planted import PlantedRoute
from robustmoe.models import RoutedModel, as_routed
from robustmoe.records import Check
from robustmoe.reporting.card import card
from robustmoe.routing import Tape

JOINT = PGD(linf(8 / 255))
DENSE = as_routed(lambda x: x.flatten(1)[:, :4])


def batch(x: Tensor, y: Tensor | None = None) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y, torch.arange(len(x)))


def in_sight(model: RoutedModel, attack: Attack, images: Batch) -> Check:
    """Check R1 of one attack."""
    with torch.no_grad():
        return routing.router_in_sight(on(model, images, attack))


RANDOM = batch(torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(2)))


# ------------------------------------------------------------------------------------------------ R1


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_router_share_by_hand(slope: float) -> None:
    """One image (p, q) = (0.2, 0.2), label 0: expert 0, logits e = (0.3, -0.3); g = (-a, a) is the gradient of the loss
    with respect to them. Straight-through: the weight of expert 0 moves as its router logit, slope * (1/2 - p).
    d/dq = g . (-1, 1) = 2a; d/dp = -slope * g . e = slope * 0.6 a; so the share is 0.3 slope / sqrt(1 + (0.3 slope)^2).
    """
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    found = in_sight(Pair("straight", slope), JOINT, one)
    assert found.status == "pass"
    assert found.value == pytest.approx(0.3 * slope / math.sqrt(1 + (0.3 * slope) ** 2), rel=1e-5)


def test_soft_router_share_by_hand() -> None:
    """The same image; soft weights (s, 1 - s) with s = sigmoid(2 * 0.3). The output is (2s - 1) * 0.3 for class 0, the
    opposite for class 1: d/dq is 2a (2s - 1), d/dp is 2a * 0.3 * 2 * s (1 - s) * 2.
    """
    s = 1 / (1 + math.exp(-0.6))
    dq, dp = 2 * s - 1, 0.3 * 2 * s * (1 - s) * 2
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    found = in_sight(Pair("soft"), JOINT, one)
    assert found.value == pytest.approx(dp / math.hypot(dp, dq), rel=1e-5)


@pytest.mark.parametrize("gate, status", [("hard", "fail"), ("renormalised", "fail"), ("vmoe", "pass")])
def test_gates_without_a_gradient(gate: str, status: str) -> None:
    found = in_sight(Pair(gate), JOINT, RANDOM)
    assert found.status == status
    assert (found.value == 0) is (status == "fail")
    assert status == "pass" or found.sentence.startswith("routing unattacked: no gradient reaches the image through")


def test_a_saturated_gate_hardly_sees_the_router() -> None:
    """softmax over (9, -9) and beyond: its gradient is there and next to nothing."""
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    shares = [in_sight(Pair("vmoe", slope), JOINT, one) for slope in (1.0, 20.0, 100.0)]
    assert [found.status for found in shares] == ["pass", "warn", "fail"]


def test_what_is_not_run() -> None:
    held = PGD(linf(8 / 255), objective=experts_only())
    assert in_sight(Pair("straight"), held, RANDOM).status == "not run"
    dense = as_routed(lambda x: x.flatten(1))
    assert in_sight(dense, JOINT, RANDOM).status == "not run"


@pytest.mark.parametrize("gate", sorted(GATES))
def test_router_only_is_measured_on_its_own_loss(gate: str) -> None:
    attack = PGD(l2(0.1), objective=router_only())
    sees = in_sight(Pair(gate), attack, RANDOM)
    assert (sees.status, sees.value) == ("pass", 1.0)
    blind = in_sight(Pair(gate, 0.0), attack, RANDOM)
    assert (blind.status, blind.value) == ("fail", 0.0)


def test_constant_experts_and_no_path_at_all() -> None:
    """Experts that do not look at the image: all there is of a gradient goes through the router, or there is none."""

    class Constant(RoutedModel):
        def __init__(self, gate: str) -> None:
            super().__init__()
            self.gate, self.experts = gate, nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            routing = tape("router", GATES[self.gate](torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1]], 1)[:, None]))
            return (routing.weight[:, 0, :, None] * self.experts[routing.index[:, 0]]).sum(1)

    assert in_sight(Constant("straight"), JOINT, RANDOM).value == pytest.approx(1.0)
    assert in_sight(Constant("hard"), JOINT, RANDOM).status == "fail"


def test_the_router_seen_through_a_view() -> None:
    """A hard gate has no gradient; through the soft view the attack has one, and an attack on the route aims at it."""
    hard = Pair("hard")
    assert in_sight(hard, JOINT, RANDOM).status == "fail"
    assert in_sight(hard, Viewed(Soft(1.0), JOINT), RANDOM).status == "pass"
    assert in_sight(hard, RouteFlip(linf(EPS)), RANDOM).status == "pass"
    assert in_sight(Pair("hard", 0.0), RouteFlip(linf(EPS)), RANDOM).status == "fail"


# ------------------------------------------------------------------------------------------------ R2, R3, R15


def behind(n: int = 8) -> Batch:
    """Images of `PlantedRoute`: right, and an adversarial of each lies behind the boundary between the experts."""
    return batch(PlantedRoute(linf(EPS), (1, 4, 4)).images(n, (1, 4, 4)))


@pytest.mark.parametrize("check", [routing.route_flip, routing.enumerated], ids=["R2", "R3"])
def test_adversarials_behind_a_change_of_route(check: Callable[..., Check]) -> None:
    """PGD on the hard gate finds none of 8; an evaluation that has router_only misses none."""
    fork = PlantedRoute(linf(EPS), (1, 4, 4))
    blind = check(case(fork, ATTACK, batch=behind()))
    assert blind.status == "fail"
    aims = check(case(fork, ATTACK, PGD(linf(EPS), steps=20, objective=router_only()), batch=behind()))
    assert aims.status == "pass"
    assert check(case(Mix("soft"))).status == "not run"
    assert check(case(DENSE)).status == "not run"


def test_the_rates_of_a_route_flip() -> None:
    """Every route of the fork can be flipped, and every flip breaks."""
    found = routing.route_flip(case(PlantedRoute(linf(EPS), (1, 4, 4)), ATTACK, batch=behind()))
    assert found.value == {"routers": {"router": [1.0, 1.0]}, "missed": 8}


@pytest.mark.parametrize("threat", [linf(EPS), l2(0.5), l1(1.0), linf(0.5)], ids=["linf", "l2", "l1", "linf 0.5"])
def test_the_fork_by_hand(threat: Any) -> None:
    """The score is -eps / 2; a move of eps along the dual direction brings it to +eps / 2, and no smaller one than
    eps / 2 moves the route."""
    shape = (1, 4, 4)
    fork = PlantedRoute(threat, shape)
    x = fork.images(4, shape)
    assert bool(((x > 0) & (x < 1)).all())
    score = (x.flatten(1) - 0.5) @ fork.towards
    torch.testing.assert_close(score, torch.full((4,), -fork.eps / 2), atol=1e-6, rtol=0)
    dual = {"linf": fork.towards.abs().sum(), "l2": fork.towards.norm(), "l1": fork.towards.abs().max()}[threat.norm]
    assert float(dual) == pytest.approx(1.0)
    assert fork(x).argmax(1).tolist() == [0] * 4
    moved = threat.project(x + 0.9 * fork.eps * threat.direction(fork.towards.expand(4, -1).view_as(x), x), x)
    if threat.norm != "l1":  # an l1 step moves 5 % of the coordinates, which is none of 16 too many: the first
        assert fork(moved).argmax(1).tolist() == [1] * 4


@pytest.mark.parametrize("threat", [linf(EPS), l2(0.5), l1(1.0)], ids=["linf", "l2", "l1"])
def test_the_suite_must_find_what_lies_behind_a_route(threat: Any) -> None:
    """Our own attacks against the planted change of route: the plain one finds nothing, those that know routers all."""
    plain = routing.planted_route(case(Mix(), PGD(threat)))
    assert (plain.status, plain.value) == ("fail", 0.0)
    assert plain.sentence.endswith("add router_only or route_flip")
    for attack in (PGD(threat, steps=20, objective=router_only()), RouteFlip(threat)):
        found = routing.planted_route(case(Mix(), PGD(threat), attack))
        assert (found.status, found.value) == ("pass", 1.0)
    assert routing.planted_route(case(DENSE)).status == "not run"


# ------------------------------------------------------------------------------------------------ R4, R5


STRONG = dataclasses.replace(ATTACK, steps=40, objective=Joint("margin"))


def test_a_saturated_gate() -> None:
    assert routing.saturation(case(Mix(), STRONG)).status == "pass"
    found = routing.saturation(case(Mix("vmoe", sharp=1e3)))
    assert found.status in ("warn", "fail")
    assert found.value["saturated"] > 0.9
    assert routing.saturation(case(DENSE)).status == "not run"


def test_softened_gates_break_what_the_evaluation_missed() -> None:
    """The fork again: at temperature 16 the two experts are mixed, and the gate's gradient is there."""
    found = routing.saturation(case(PlantedRoute(linf(EPS), (1, 4, 4)), ATTACK, batch=behind()))
    assert (found.status, found.value["missed"]) == ("fail", 8)


def test_the_views() -> None:
    assert routing.views(case(Mix(), STRONG)).status == "pass"
    found = routing.views(case(PlantedRoute(linf(EPS), (1, 4, 4)), ATTACK, batch=behind()))
    assert found.status == "fail"
    assert (found.value["exact"], found.value["soft"]) == (8, 0)
    assert routing.views(case(DENSE)).status == "not run"


# ------------------------------------------------------------------------------------------------ R6, R7, R13


def test_neighbours() -> None:
    assert routers.neighbours(case(Mix("hard"))).status == "pass"
    found = routers.neighbours(case(Capacity()))
    assert found.status == "fail"
    assert "3 routes change" in found.sentence


@pytest.mark.parametrize("answers, status", [("old", "fail"), ("fresh", "warn")])
def test_a_stale_route(answers: str, status: str) -> None:
    """A kept decision warns; one that is given for another image's fails."""
    found = routers.stale(case(Stale(answers)))
    assert found.status == status
    assert "last" in found.sentence
    assert routers.stale(case(Mix("hard"))).status == "pass"


def test_a_model_that_holds_a_graph_cannot_be_copied() -> None:
    class Holds(Mix):
        def score(self, x: Tensor) -> Tensor:
            self.kept = super().score(x)
            return self.kept

    subject = case(Holds())
    with torch.enable_grad():
        subject.model(subject.whole.x)
    found = routers.stale(subject)
    assert found.status == "fail"
    assert "cannot be copied" in found.sentence


# ------------------------------------------------------------------------------------------------ R8, R9, R10


def test_joint_vulnerability() -> None:
    found = routing.joint_vulnerability(case(Mix(), STRONG))
    assert found.status == "pass"
    assert len(found.value) == len(found.value[0]) == 3
    assert all(found.value[i][i] >= 0.2 for i in range(3))  # what an expert is attacked for breaks that expert first

    class Same(Mix):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([self.experts[0]] * 3)

    same = routing.joint_vulnerability(case(Same(), STRONG)).value
    assert all(value == same[0][0] for row in same for value in row)
    assert routing.joint_vulnerability(case(DENSE)).status == "not run"


def test_one_weak_expert_hides_in_a_sum() -> None:
    """The fork, whose second expert is wrong everywhere and whose first is right everywhere: no attack on an expert
    alone moves anything.
    """
    found = routing.joint_vulnerability(case(PlantedRoute(linf(EPS), (1, 4, 4)), ATTACK, batch=behind()))
    assert found.value == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "model, status, words",
    [
        (Mix("hard"), "pass", "the busiest expert gets"),
        (Mix("soft"), "pass", "the busiest expert gets"),
        (Dead("hard"), "warn", "1 of 3 experts of router 'router' get no item"),
        (Dead("soft"), "warn", "1 of 3 experts of router 'router' get no item"),
        (Constant("hard"), "fail", "the logits of router 'router' are the same for all 32 images"),
        (Constant("soft"), "fail", "the logits of router 'router' are the same for all 32 images"),
    ],
)
def test_expert_load(model: RoutedModel, status: str, words: str) -> None:
    subject = case(model)
    for found in (routers.load(on(model, subject.whole)), routers.load_attacked(subject)):
        assert found.status == status
        assert words in found.sentence


def test_the_shares_are_counted() -> None:
    subject = case(Mix("hard"))
    found = routers.load_attacked(subject)
    chosen = subject.model.run(subject.whole.x).trace["router"].index[:, 0, 0]
    assert found.value["load"]["router"] == pytest.approx([float((chosen == e).float().mean()) for e in range(3)])
    assert found.value["clean"] == 1.0
    few = routers.load(on(Dead("hard"), batch(subject.whole.x[:3])))
    assert few.status == "pass"  # 3 decisions among 3 experts prove nothing
    one = batch(subject.whole.x[:1].expand(32, -1, -1, -1))
    assert routers.load(on(Mix("soft"), one)).status == "pass"  # the images are the same, not the router's answers


@pytest.mark.parametrize(
    "moved, fixed, status",
    [
        ([True, True], False, "pass"),
        ([False, True], False, "pass"),
        ([False, False], False, "fail"),
        ([False, False], True, "warn"),
        ([], False, "not run"),
    ],
)
def test_a_router_that_was_never_trained(moved: list[bool], fixed: bool, status: str) -> None:
    """A random hyperplane is a router like any other, as far as its answers go: the log alone tells."""
    lines = [{"routers": {"router": {"moved": m, "declared_fixed": fixed}}} for m in moved]
    found = routers.trained(dataclasses.replace(case(Mix("hard")), run={"metrics": lines}))
    assert found.status == status
    assert routers.trained(case(DENSE)).status == "not run"


# ------------------------------------------------------------------------------------------------ R11, R12, the rest


@dataclasses.dataclass(frozen=True)
class Balanced(Objective):
    """Cross-entropy and a load-balance term."""

    name = "joint"
    aims_at_router = True
    loss: str = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        plain = Joint()(model, x, y)

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            score = plain(x_adv, rows)
            gate = model.run(x_adv).trace["router"].logits.softmax(-1)
            return Score(score.loss + 0.01 * (gate**2).sum((1, 2)), score.fooled)

        return inner


def test_auxiliary_terms_in_the_loss() -> None:
    held = PGD(linf(EPS), objective=experts_only("margin"))
    assert routing.auxiliary(case(Mix(), ATTACK, held)).status == "pass"
    found = routing.auxiliary(case(Mix(), PGD(linf(EPS), objective=Balanced())))
    assert found.status == "fail"
    assert routing.auxiliary(case(Mix(), PGD(linf(EPS), objective=router_only()))).status == "not run"


def test_the_scale_of_the_logits() -> None:
    assert routing.logit_scale(case(Mix(), STRONG)).status == "pass"
    found = routing.logit_scale(case(Distant()))
    assert found.status == "fail"
    assert found.value["0.1"] > found.value["1"]
    large = routing.logit_scale(case(Large()))
    assert large.value["100"] >= large.value["0.1"]  # where it is saturated, the attack climbs without its scale


def test_what_is_never_run_says_why() -> None:
    for check, words in (
        (routers.cost, "does not depend on the image"),
        (routers.certificate, "no certificate"),
        (routers.smoothing, "no randomised smoothing"),
    ):
        found = check(case(Mix()))
        assert found.status == "not run"
        assert words in found.sentence


# ------------------------------------------------------------------------------------------------ all of them


QUICK = PGD(linf(EPS), steps=5)
PLAIN, ONLY = ["pgd(linf(0.1), steps=3)"], ("H5", "G14", "R10")


@pytest.mark.parametrize("model", [Mix("straight"), DENSE], ids=["routed", "dense"])
def test_every_check_answers_in_order(model: RoutedModel) -> None:
    subject = case(model, n=4)
    modes = [module.training for module in model.train().modules()]
    found = checks.deep(model, subject.whole, [QUICK])
    assert [check.id for check in found] == checks.ids()
    assert [check.name for check in found] == [checks.CHECKS[id].name for id in checks.ids()]
    assert all(check.sentence and "\n" not in check.sentence for check in found)
    assert all(any(c.isdigit() for c in check.sentence) for check in found if check.status in ("warn", "fail"))
    assert [module.training for module in model.modules()] == modes
    json.dumps([check.value for check in found], allow_nan=False)
    status = {check.id: check.status for check in found}
    assert {status[key] for key in ("H1", "H2", "H3", "H4", "H6", "H7", "H8", "R7", "R13")} == {"pass"}
    assert (status["R9"] == "not run") is (model is DENSE)


def test_no_attack_on_broken_logits_and_none_on_a_model_that_is_never_right() -> None:
    class Broken(Mix):
        def score(self, x: Tensor) -> Tensor:
            return super().score(x) * torch.nan

    subject = case(Mix(), n=4)
    found = {check.id: check for check in checks.deep(Broken(), subject.whole, [QUICK])}
    assert found["H6"].status == "fail"
    assert found["G7"].status == "not run"
    assert "router 'router' are not finite" in found["G7"].sentence
    wrong = dataclasses.replace(subject.whole, y=(subject.whole.y + 1) % 4)
    found = {check.id: check for check in checks.deep(Mix(), wrong, [QUICK])}
    assert "none of 4 images right" in found["G9"].sentence
    with pytest.raises(UserError, match="no attack to check"):
        checks.deep(Mix(), subject.whole, [])


def test_a_run_folder(tmp_path: Path) -> None:
    """An untrained router of a hard gate is in the log; the clean accuracy is the logged one."""
    small = recipe.Recipe(
        model="ensemble(small_cnn(width=4), experts=2, gate=hard, router=small_cnn(width=4))",
        data="digits",
        method="standard",
        epochs=1,
        max_steps=2,
        batch_size=16,
        val_limit=50,
        threads=1,
        device="cpu",
    )
    run = training.train(small, tmp_path / "run")
    audit = checks.check_run(run, attacks=PLAIN, limit=8, device="cpu", only=ONLY)
    assert (audit.n, audit.attacks, audit.model_hash) == (8, PLAIN, checks.weights_hash(training.load_model(run)))
    found = {check.id: check for check in audit.checks}
    assert list(found) == checks.ids()
    assert (found["H5"].status, found["R10"].status) == ("pass", "warn")
    assert "by declaration" in found["R10"].sentence
    assert "pgd(linf(0.1), steps=3)" in found["G14"].sentence
    assert found["G7"].sentence == "not asked for"
    with pytest.raises(UserError, match="there is no check 'G77'; did you mean 'G7'"):
        checks.check_run(run, attacks=PLAIN, only=["G77"], device="cpu")


# ------------------------------------------------------------------------------------------------ the card


def test_the_card() -> None:
    told = [
        Check("H1", "input range", "pass", None, "fine"),
        Check("G2", "finite differences", "warn", 0.2, "some are off"),
        Check("G7", "unbounded attack", "fail", 3, "3 survive " + "and so on " * 20),
        Check("R16", "certificate", "not run", None, "no certificate in this evaluation"),
        Check("R1", "router attacked", "not run", None, "the model has no router"),
        Check("R2", "route flip", "not run", None, "the model has no router"),
    ]
    lines = card(told).splitlines()
    assert lines[0].startswith("! fail  G7  unbounded attack    3 survive and so on")
    assert lines[1].startswith(" " * 32)  # under its sentence
    assert all(len(line) <= 120 for line in lines)
    assert lines[-4:] == [
        "  warn  G2  finite differences  some are off",
        "6 checks: 1 failed, 1 warned, 1 passed, 3 not run",
        "  not run  R16: no certificate in this evaluation",
        "  not run  R1, R2: the model has no router",
    ]
    assert card([]) == "0 checks: 0 failed, 0 warned, 0 passed, 0 not run"
