"""AutoAttack and AutoAttack + routing: the definition, any number of classes, survivors, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import (
    APGD,
    FAB,
    PGD,
    Attack,
    AutoAttack,
    AutoAttackRouting,
    Joint,
    Objective,
    Square,
    Suite,
    Surrogate,
    TargetedAPGD,
    Threat,
    build_attack,
    l1,
    linf,
    part_noise,
)
from robustmoe.attacks.losses import Loss, loss_of
from robustmoe.attacks.views import HalfView, Viewed
from robustmoe.evaluation.checks import label
from robustmoe.models import Output, Plain, RoutedModel
from robustmoe.models.dual import DualModel, Mix
from robustmoe.noise import Noise
from robustmoe.routing import Tape, top_k

EPS = 8 / 255


def output(classes: int) -> Output:
    return Output(torch.zeros(1, classes), {})


def names(parts: list[tuple[str, Attack]]) -> list[str]:
    return [name for name, _ in parts]


def test_standard_is_the_released_definition() -> None:
    """fra31/auto-attack, `_set_version("standard")`, linf: 100 steps, 1 restart, 9 targets, 5,000 queries."""
    threat = linf(EPS)
    assert AutoAttack(threat, seed=3).parts(output(10)) == [
        ("apgd-ce", APGD(threat, steps=100, restarts=1, objective=Joint("ce"), rho=0.75, largereps=False, seed=3)),
        ("apgd-t", TargetedAPGD(threat, targets=9, steps=100, restarts=1, loss="dlr", largereps=False, seed=3)),
        ("fab-t", FAB(threat, steps=100, restarts=1, targets=9, alpha_max=0.1, eta=1.05, beta=0.9, seed=3)),
        ("square", Square(threat, steps=5000, restarts=1, p_init=0.8, rescale=False, loss="margin", seed=3)),
    ]


def test_standard_in_l1_has_the_larger_radii_and_five_restarts_and_targets() -> None:
    parts = dict(AutoAttack(l1(12.0)).parts(output(10)))
    ce, towards, fab = parts["apgd-ce"], parts["apgd-t"], parts["fab-t"]
    assert isinstance(ce, APGD)
    assert isinstance(towards, TargetedAPGD)
    assert isinstance(fab, FAB)
    assert (ce.restarts, ce.largereps, towards.targets, towards.largereps, fab.targets) == (5, True, 5, True, 9)


def test_plus_and_rand() -> None:
    plus = AutoAttack(linf(EPS), "plus").parts(output(10))
    assert names(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [getattr(part, "restarts", None) for _, part in plus] == [5, 5, 5, 1, 1, 1]
    assert dict(plus)["fab"] == FAB(linf(EPS), restarts=5, targets=0)
    rand = AutoAttack(linf(EPS), "rand").parts(output(10))
    assert rand == [
        ("apgd-ce", APGD(linf(EPS), eot=20, largereps=False)),
        ("apgd-dlr", APGD(linf(EPS), eot=20, objective=Joint("dlr"), largereps=False)),
    ]


@pytest.mark.parametrize(
    ("classes", "targets", "loss"), [(2, 1, "margin"), (3, 2, "margin"), (4, 3, "dlr"), (10, 9, "dlr"), (200, 9, "dlr")]
)
def test_any_number_of_classes(classes: int, targets: int, loss: str) -> None:
    """DLR needs the third logit, its targeted form the fourth; the margin stands in, and the name is withheld."""
    attack = AutoAttack(linf(EPS))
    parts = dict(attack.parts(output(classes)))
    towards, fab = parts["apgd-t"], parts["fab-t"]
    assert isinstance(towards, TargetedAPGD)
    assert isinstance(fab, FAB)
    assert (towards.targets, towards.loss, fab.targets) == (targets, loss, targets)
    assert label(attack, output(classes)) == ("AutoAttack standard" if classes >= 4 else None)
    dlr = dict(AutoAttack(linf(EPS), "plus").parts(output(classes)))["apgd-dlr"]
    assert isinstance(dlr, APGD)
    assert dlr.objective == Joint("dlr" if classes >= 3 else "margin")


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_it_runs_with_few_classes(classes: int, images: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    model = Plain(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes)))
    x = images(6)
    y = model(x).argmax(1)
    for version in ("standard", "rand"):
        attack = build_attack(f"autoattack(linf(64/255), version={version})")
        x_adv = attack(model, x, y)
        assert (model(x_adv).argmax(1) != y).all(), "a linear model falls to its own gradient"
        assert (x_adv - x).abs().max() <= 64 / 255 + 1e-6


def test_in_the_originals_stream_every_image_runs_to_the_end() -> None:
    parts = AutoAttack(linf(EPS), rng="autoattack").parts(output(10))
    assert {getattr(part, "keep", "best") for _, part in parts} == {"best"}
    assert {part.rng for _, part in parts} == {"autoattack"}  # type: ignore[attr-defined]


def test_a_model_that_is_broken_nowhere_comes_back_as_it_was(images: Callable[..., Tensor]) -> None:
    """Logits that do not depend on the image: 0 of 4 broken, every part asked, the images untouched to the bit."""
    model = Plain(lambda x: torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum((1, 2, 3))[:, None])
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    attack = AutoAttack(linf(EPS))
    small = [(name, replace(part, steps=3)) for name, part in attack.parts(output(4))]  # type: ignore[type-var]
    for _, part in small:
        assert torch.equal(model(part(model, x, y)).argmax(1), y)
    assert torch.equal(Listed(tuple(small))(model, x, y), x)


# ------------------------------------------------------------------------------------------------ suites


@dataclass(frozen=True)
class Paints(Attack):
    """Whitens the images whose label is in ``which``; a model that reads the corner pixel then errs."""

    which: tuple[int, ...]
    threat: Threat = linf(1.0)  # noqa: RUF009 (a frozen value)
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    def queries(self, output: Output) -> int:
        return 7

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        assert not (model(x).argmax(1) != y).any(), "no part sees an image that is broken already"
        hit = torch.isin(y, torch.tensor(self.which))
        return torch.where(hit[:, None, None, None], torch.ones_like(x), x)


@dataclass(frozen=True)
class Listed(Suite):
    members: tuple[tuple[str, Attack], ...]
    threat: Threat = linf(1.0)  # noqa: RUF009 (a frozen value)
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return list(self.members)


def reads_its_label(x: Tensor) -> Tensor:
    """The class is written in the corner pixel, as a tenth: white (1.0) is class 5, which no image has."""
    return -(10 * x[:, 0, 0, 0][:, None] - torch.arange(6.0)).abs().clamp(max=5)


def test_each_part_sees_what_those_before_it_left() -> None:
    x = torch.full((5, 1, 2, 2), 0.05)
    y = torch.tensor([0, 1, 2, 3, 4])
    x[:, 0, 0, 0] = y / 10
    suite = Listed((("a", Paints((1, 3))), ("b", Paints((1, 4))), ("c", Paints(()))))
    x_adv = suite(Plain(reads_its_label), x, y)
    broken = reads_its_label(x_adv).argmax(1) != y
    assert broken.tolist() == [False, True, False, True, True]
    assert torch.equal(x_adv[~broken], x[~broken])
    assert suite.queries(output(6)) == 3 * 7


def test_parts_draw_apart_and_a_simple_attack_as_ever() -> None:
    noise = Noise.of(torch.arange(3), 1)
    assert torch.equal(part_noise(noise, "").state, noise.state)
    assert not torch.equal(part_noise(noise, "a").state, part_noise(noise, "b").state)


# ------------------------------------------------------------------------------------------------ routing


class ArgmaxOnly(RoutedModel):
    """A hard route that no gradient reaches. Expert 0 says class 0 whatever it sees, expert 1 class 1;
    the router sends an image to expert 1 once its mean exceeds 1/2. Images of mean 0.49 are class 0, and one step
    of any size above 0.01 on the router's score makes them class 1.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        bright = x.mean((1, 2, 3))
        routing = tape("router", top_k(torch.stack([0.5 - bright, bright - 0.5], 1)[:, None], gating="hard"))
        says = torch.tensor([[3.0, 0.0, -1.0, -1.0], [0.0, 3.0, -1.0, -1.0]]).to(x)
        texture = (x * torch.linspace(-1, 1, x[0].numel()).view_as(x[0])).mean((1, 2, 3))  # a gradient, of no use
        return says[routing.index[:, 0, 0]] + 0.1 * texture[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.0])


@pytest.fixture
def dim(images: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Images of mean 0.49."""
    x = images(6)
    x = 0.49 + 0.3 * (x - x.mean((1, 2, 3), keepdim=True))
    return x, torch.zeros(6, dtype=torch.long)


def test_knowing_the_router_breaks_what_autoattack_calls_robust(dim: tuple[Tensor, Tensor]) -> None:
    x, y = dim
    model, threat = ArgmaxOnly(), linf(0.02)
    found = model.run(x)
    blind = AutoAttack(threat).parts(found)
    for name, part in blind:
        if name != "square":  # random search may stumble over a mean; it does not on real routers
            assert (model(replace(part, steps=10)(model, x, y)).argmax(1) == 0).all(), name  # type: ignore[type-var]
    suite = AutoAttackRouting(threat, steps=5)
    assert suite.parts(found)[: len(blind)] == blind
    knowing = Listed(tuple(suite.routing_parts(found)), threat)
    x_adv = knowing(model, x, y)
    assert (model(x_adv).argmax(1) == 1).all()
    assert (x_adv - x).abs().max() <= 0.02 + 1e-6


def test_its_parts_fit_the_model(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """One image router: every expert's cell. Several experts an image: a beam. A dense model: AutoAttack alone."""
    suite = AutoAttackRouting(linf(EPS), temperatures=(0.5, 2.0))
    routing = ["experts held", "routers", "joint normalised", "straight-through", "soft 0.5", "soft 2"]
    routing += ["expert 0", "expert 1", "expert 2", "flip"]
    x = images(2)
    assert names(suite.routing_parts(tiny("ensemble_hard").run(x))) == [*routing, "transition"]
    assert names(suite.routing_parts(tiny("ensemble_k2").run(x))) == [*routing, "beam"]
    layered = tiny("block_moe(resnet8(width=4), stages=(2, 3), experts=3)").run(x)
    assert names(suite.routing_parts(layered)) == [*routing, "beam", "transition"]
    assert suite.parts(tiny("dense").run(x)) == suite.autoattack.parts(tiny("dense").run(x))
    assert suite.queries(tiny("dense").run(x)) == suite.autoattack.queries(tiny("dense").run(x))


@pytest.mark.parametrize("standard", ["linear", "ensemble(linear, experts=3, router=linear)"])
def test_its_parts_for_a_dual_model(
    standard: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Also the halves alone, which every one of its parts can be run with. Of two dense networks there is no trace, so
    the suite is AutoAttack, and the halves are attacked by name.
    """
    x, y = images(4), labels(4)
    model = tiny(f"dual({standard}, ensemble(linear, experts=3, router=linear))")
    found = AutoAttackRouting(linf(EPS), steps=2, temperatures=(1.0,)).routing_parts(model.run(x))
    assert names(found)[3:7] == ["straight-through", "soft 1", "half standard", "half robust"]
    assert names(found)[-2:] == (["flip", "transition"] if standard == "linear" else ["beam", "transition"])
    for name, part in found:
        assert float((part(model, x, y) - x).abs().max()) <= EPS * (1 + 1e-5), name
    dense = tiny("dual(linear, linear)")
    assert AutoAttackRouting(linf(EPS)).routing_parts(dense.run(x)) == []
    through = build_attack("through(half(robust), pgd(linf(8/255), steps=2))")
    assert torch.equal(through(dense, x, y), Viewed(HalfView("robust"), PGD(linf(EPS), steps=2))(dense, x, y))


def dual_of_lines(margin: float, mix: Mix) -> DualModel:
    """Two linear networks that both say class 0 with about this margin."""
    halves = []
    for _ in range(2):
        layer = nn.Linear(192, 10).double()
        with torch.no_grad():
            layer.bias.zero_()[0] = margin
        halves.append(Plain(nn.Sequential(nn.Flatten(), layer)))
    return DualModel(halves[0], halves[1], 0.7, mix)


@pytest.mark.parametrize(
    "margin, mix, losses",
    [
        (10.0, "probabilities", ["ce", "dlr", "margin"]),
        (80.0, "probabilities", ["ce", "dlr", "margin"]),
        (100.0, "probabilities", ["dlr", "margin"]),
        (10.0, "logits", ["ce", "dlr", "margin"]),
        (30.0, "logits", ["dlr", "margin"]),
        (100.0, "logits", ["dlr", "margin"]),
    ],
)
def test_a_confident_blend_has_a_gradient_in_float32(
    margin: float, mix: Mix, losses: list[Loss], images: Callable[..., Tensor]
) -> None:
    """The signs of the gradient in float32 are those of CE's closed form in float64, sum over wrong classes j of
    softmax_j (z_j - z_0)', of DLR's and of the margin's, for at least 99 % of the pixels.

    A mix of probabilities keeps CE usable until e^-margin is no normal float32 number (margins above 87). In a mix of
    logits, as in any single network, CE loses the label's part from a margin of 17, where softmax rounds to 1: half of
    the signs are wrong; AutoAttack's DLR stands in.
    """
    model, x, y = dual_of_lines(margin, mix), images(6), torch.zeros(6, dtype=torch.long)
    at = x.double().requires_grad_(True)
    z = model(at)
    share = (z.detach() - z.detach()[:, 1:].logsumexp(1, keepdim=True)).exp()[:, 1:]  # of the wrong classes
    closed = {"ce": (share * (z[:, 1:] - z[:, :1])).sum(1), "dlr": loss_of("dlr", z, y), "margin": z[:, 1:].amax(1)}
    closed["margin"] = closed["margin"] - z[:, 0]
    narrow, agree = model.float(), {}
    for kind, value in closed.items():
        expected = torch.autograd.grad(value.sum(), at, retain_graph=True)[0]
        near = x.clone().requires_grad_(True)
        found = torch.autograd.grad(loss_of(cast(Loss, kind), narrow(near), y).sum(), near)[0]
        agree[kind] = float((found.sign() == expected.sign()).float().mean())
    assert {kind for kind, same in agree.items() if same > 0.99} == set(losses), agree


def test_the_exact_model_judges_a_suite(images: Callable[..., Tensor]) -> None:
    """Through a surrogate that calls everything broken, nothing is."""
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    never = Plain(lambda x: torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum((1, 2, 3))[:, None])
    always = Plain(lambda x: torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum((1, 2, 3))[:, None])
    suite = Listed((("pgd", PGD(linf(EPS), steps=2)), ("square", Square(linf(EPS), steps=3))), linf(EPS))
    assert torch.equal(suite(Surrogate(always, never, close=True), x, y), x)
