"""APGD: closed forms on linear models, the l1 projection against a slow one, what leaves and what stays, whose word
counts. That it is AutoAttack's to the bit is shown in test_crosscheck_apgd.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import (
    ExpertsOnly,
    Joint,
    NotFiniteError,
    RouterOnly,
    Surrogate,
    Targeted,
    Threat,
    l1,
    l2,
    linf,
    together,
)
from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.l1 import l1_excess
from robustmoe.attacks.objectives import Inner, Objective, Score
from robustmoe.models import RoutedModel
from robustmoe.models.base import Output
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise

SHAPE, SIZE = (3, 4, 4), 48
EPS = {"linf": 0.04, "l2": 0.35, "l1": 2.0}
"""Radii at which some images of the tiny models break, and some do not."""


class LinearModel(nn.Module):
    """Logits (9, <w, x>) of a label 0 that holds: the margin is <w, x> - 9, its gradient w."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        value = (x * self.w).flatten(1).sum(1)
        return torch.stack([torch.full_like(value, 9.0), value], 1)


@pytest.fixture
def w() -> Tensor:
    return torch.randn(SHAPE) * 0.3


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def missed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def gain(w: Tensor, x: Tensor, x_adv: Tensor) -> Tensor:
    return ((x_adv - x) * w).flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("keep", ["first", "best"])
@pytest.mark.parametrize("rng", ["image", "autoattack"])
def test_linf_goes_to_the_corner_of_ball_and_box(w: Tensor, keep: str, rng: str, images: Callable[..., Tensor]) -> None:
    x = images(5, *SHAPE)
    x_adv = APGD(linf(0.1), steps=5, objective=Joint("margin"), keep=keep, rng=rng)(LinearModel(w), x, zeros(5))
    torch.testing.assert_close(x_adv, (x + 0.1 * w.sign()).clamp(0, 1), rtol=0, atol=1e-6)


def test_l2_gains_eps_times_the_l2_norm(w: Tensor) -> None:
    x = torch.full((5, *SHAPE), 0.5)
    x_adv = APGD(l2(0.4), steps=30, objective=Joint("margin"))(LinearModel(w), x, zeros(5))
    assert gain(w, x, x_adv).tolist() == pytest.approx([0.4 * float(w.norm())] * 5, rel=1e-4)


@pytest.mark.parametrize("largereps", [None, False])
def test_l1_fills_the_largest_weights_up_to_the_box(w: Tensor, largereps: bool | None) -> None:
    """From mid-grey each pixel can move by 0.5: a budget of 1.2 is best spent on the largest two, and 0.2 on the next.

    The climb may end early, in the original too: where all pixels of a small support move alike, the projection takes
    back what the step gave.
    """
    x = torch.full((5, *SHAPE), 0.5)
    x_adv = APGD(l1(1.2), steps=100, objective=Joint("margin"), largereps=largereps)(LinearModel(w), x, zeros(5))
    top = w.abs().flatten().topk(3).values
    best = 0.5 * float(top[0] + top[1]) + 0.2 * float(top[2])
    reached = gain(w, x, x_adv) / best
    assert float(reached.max()) == pytest.approx(1.0, abs=1e-5)
    assert float(reached.min()) > 0.75


class Hump(nn.Module):
    """One pixel decides: the margin is highest at 0.55 and falls on both sides, so a fixed step overshoots."""

    def forward(self, x: Tensor) -> Tensor:
        value = -(x.flatten(1)[:, 0] - 0.55).abs() - 1
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.parametrize("threat", [linf(0.3), l2(0.3), l1(0.3)])
def test_shrinking_steps_find_the_peak_between_two_overshoots(threat: Threat) -> None:
    """linf, l2: steps of 0.6 halve at about eight checkpoints of a hundred steps; l1: they stop at eps / 10 = 0.03."""
    x_adv = APGD(threat, objective=Joint("margin"))(Hump(), torch.full((3, 1, 1, 1), 0.5), zeros(3))
    reach = 0.03 if threat.norm == "l1" else 0.6 / 2**6
    torch.testing.assert_close(x_adv, torch.full((3, 1, 1, 1), 0.55), rtol=0, atol=reach)


@dataclass(frozen=True)
class Faint(Objective):
    """<w, x>, never fooled."""

    name = "faint"
    aims_at_router = True
    w: Tensor

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            loss = (x_adv * self.w).flatten(1).sum(1)
            return Score(loss, torch.zeros_like(loss, dtype=torch.bool))

        return inner


@pytest.mark.parametrize("scale", [1e-12, 1e-30])
def test_an_l2_step_keeps_its_length_for_a_vanishing_gradient(w: Tensor, scale: float) -> None:
    x = torch.full((2, *SHAPE), 0.5)
    attack = APGD(l2(0.4), steps=20, objective=Faint(w * scale))
    best = 0.4 * float(w.norm())
    assert gain(w, x, attack(LinearModel(w), x, zeros(2))).tolist() == pytest.approx([best] * 2, rel=1e-3)


def test_the_original_stays_where_the_gradient_vanishes(w: Tensor) -> None:
    """It divides by the norm (whose squares underflow) plus 1e-12. (Seed 0 would draw w itself for a start.)"""
    x = torch.full((2, *SHAPE), 0.5)
    attack = APGD(l2(0.4), steps=20, objective=Faint(w * 1e-30), rng="autoattack", seed=1)
    assert (gain(w, x, attack(LinearModel(w), x, zeros(2))) < 0.2 * float(w.norm())).all()


# ------------------------------------------------------------------------------------------------ the l1 projection


def slow_projection(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """One image in float64: the level by bisection. The nearest point z has z - x = sign * min(soft(|delta|), room)."""
    room = torch.where(delta > 0, 1 - x, x)

    def at(level: float) -> Tensor:
        return delta.sign() * (delta.abs() - level).clamp(min=0).minimum(room)

    if at(0.0).abs().sum() <= eps:
        return at(0.0)
    low, high = 0.0, float(delta.abs().max())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).abs().sum() > eps else (low, middle)
    return at(high)


@pytest.mark.parametrize("eps", [0.0, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("spread", [0.02, 0.5, 4.0])
def test_the_l1_projection_is_the_slow_one(eps: float, spread: float, images: Callable[..., Tensor]) -> None:
    x = images(12, *SHAPE)
    x[:2] = x[:2].round()  # corners of the box
    delta = spread * torch.randn(12, *SHAPE)
    delta[4:] *= torch.rand(8, *SHAPE) < 0.3
    delta[8:] = (delta[8:] * 4).round() / 4  # ties
    delta[11] = 0
    expected = torch.stack([slow_projection(a, b, eps) for a, b in zip(x.double(), delta.double())])
    found = delta.double() - l1_excess(x.double(), delta.double(), eps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    single = delta - l1_excess(x, delta, eps)
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=2e-6)
    assert (single.abs().flatten(1).sum(1) <= eps + 1e-5).all()


def test_the_l1_projection_where_every_coordinate_leaves_the_box() -> None:
    """One pixel at 0.5, moved by 0.8, in a ball of 0.4, ends at 0.9 (AutoAttack's code leaves it at 1). With another
    at 0.9, moved by 0.3, in a ball of 0.55: the level 0.25 leaves min(0.55, room 0.5) and min(0.05, room 0.1).
    """
    one = l1_excess(torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.8), 0.4)
    assert float(one) == pytest.approx(0.4)
    x, delta = torch.tensor([0.5, 0.9]).view(1, 1, 1, 2), torch.tensor([0.8, 0.3]).view(1, 1, 1, 2)
    assert (delta - l1_excess(x, delta, 0.55)).flatten().tolist() == pytest.approx([0.5, 0.05])


def test_the_projection_of_no_images_is_none() -> None:
    empty = torch.zeros(0, *SHAPE)
    assert l1_excess(empty, empty, 1.0).shape == empty.shape


# ------------------------------------------------------------------------------------------------ the contract

SETTINGS = {"steps": 5, "restarts": 2}


def attacks(norm: str) -> list[APGD | TargetedAPGD]:
    threat = Threat(norm, EPS[norm])
    return [
        APGD(threat, **SETTINGS),
        APGD(threat, **SETTINGS, keep="best", objective=Joint("dlr")),
        APGD(threat, **SETTINGS, rng="autoattack"),
        TargetedAPGD(threat, targets=2, steps=5),
        TargetedAPGD(threat, targets=2, steps=5, keep="best", rng="autoattack", loss="margin"),
    ]


@pytest.mark.parametrize("norm", EPS)
def test_ball_box_and_generator(norm: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Images that touch the box; nothing but the result changes, and the same call gives it again."""
    model, x = tiny("ensemble_soft"), images(8)
    x[:4] = (x[:4] * 3 - 1).clamp(0, 1)
    y = model(x).argmax(1)
    given, generator = x.clone(), torch.get_rng_state()
    for attack in attacks(norm):
        x_adv = attack(model, x, y)
        assert x_adv.shape == x.shape
        assert x_adv.dtype == torch.float32
        assert (attack.threat.size(x_adv - x) <= attack.threat.eps * (1 + 3e-6)).all()
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1
        assert torch.equal(x, given)
        assert torch.equal(torch.get_rng_state(), generator)
        assert torch.equal(attack(model, x, y), x_adv)
        assert missed(model, x_adv, y).any()


@pytest.mark.parametrize("norm", EPS)
def test_eps_zero_changes_nothing(norm: str, w: Tensor, images: Callable[..., Tensor]) -> None:
    x = images(3, *SHAPE)
    x_adv = APGD(Threat(norm, 0.0), steps=6)(LinearModel(w), x, zeros(3))
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("keep", ["first", "best"])
def test_an_image_is_attacked_alike_in_any_batch(
    norm: str, keep: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """In float64, where a rounding cannot tip a sign: alone, or in another order; some break early, some late."""
    model, x, index = tiny("ensemble_soft").double(), images(8).double(), torch.arange(8) + 40
    y = model(x).argmax(1)
    y[3] = (y[3] + 1) % 4  # gone before the first step
    attack = APGD(Threat(norm, EPS[norm]), **SETTINGS, keep=keep)
    whole = attack(model, x, y, Noise.of(index))
    assert 1 < int(missed(model, whole, y).sum()) < 8
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    torch.testing.assert_close(attack(model, x[order], y[order], Noise.of(index[order])), whole[order])
    parts = [attack(model, x[i : i + 1], y[i : i + 1], Noise.of(index[i : i + 1])) for i in (0, 2, 3, 6)]
    torch.testing.assert_close(torch.cat(parts), whole[[0, 2, 3, 6]])


def test_the_start_of_an_image_is_its_own_to_the_bit(images: Callable[..., Tensor]) -> None:
    """What the model is asked first, restart by restart: for five images at once, and for the fourth alone."""
    x, index, seen = images(5, *SHAPE), torch.arange(5), []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return torch.stack([9 + 0 * x.flatten(1)[:, 0], x.flatten(1)[:, 0]], 1)

    attack = APGD(linf(0.1), steps=1, restarts=2)
    attack(model, x, zeros(5), Noise.of(index))
    attack(model, x[3:4], zeros(1), Noise.of(index[3:4]))
    together, alone = seen[:4:2], seen[4::2]
    assert all(torch.equal(many[3:4], one) for many, one in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[1])
    surface = (together[0] - x).abs().flatten(1).amax(1)
    assert (surface <= 0.1 + 1e-6).all()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("rng", ["image", "autoattack"])
def test_leaving_at_once_breaks_the_same_images(
    norm: str, rng: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny("pathway").double(), images(10).double()
    y, total = model(x).argmax(1), 0
    for attack in attacks(norm)[::3]:
        first, best = (missed(model, replace(attack, keep=keep, rng=rng)(model, x, y), y) for keep in ("first", "best"))
        assert torch.equal(first, best)
        total += int(first.sum())
    assert 0 < total < 20


@pytest.mark.parametrize("objective", [Joint("margin"), Joint("kl"), ExpertsOnly(), RouterOnly(), Targeted(3)])
@pytest.mark.parametrize("norm", EPS)
def test_every_objective_rises(
    objective: Joint, norm: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """An image that is not fooled returns its highest loss, which is above the clean one's."""
    model, x = tiny("ensemble_straight"), images(8)
    y = model(x).argmax(1)
    x_adv = APGD(Threat(norm, EPS[norm]), 10, objective=objective)(model, x, y)
    inner = objective(model, x, y)
    with torch.no_grad():
        before, after = inner(x), inner(x_adv)
    held = ~after.fooled
    assert held.any()
    assert (after.loss > before.loss)[held].all()


# ------------------------------------------------------------------------------------------------ passes


class Counting(nn.Module):
    """A model with known answers that notes the images it is asked about: pixel 0 names the image (it has no
    gradient); those of ``broken`` are fooled wherever they are.
    """

    def __init__(self, broken: list[bool]) -> None:
        super().__init__()
        self.broken, self.asked = torch.tensor(broken), []

    def forward(self, x: Tensor) -> Tensor:
        name = (x.detach().flatten(1)[:, 0] * 100).round().long()
        self.asked.append(name.tolist())
        value = torch.where(self.broken[name], 1.0, -1.0) + 0.01 * x.flatten(1)[:, 1]
        return torch.stack([torch.zeros_like(value), value], 1)


def named(n: int) -> Tensor:
    x = torch.full((n, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] = torch.arange(n) / 100
    return x


def test_steps_and_one_passes_a_restart_and_the_broken_leave_at_once() -> None:
    model = Counting([True, False, True, False])
    APGD(linf(0.001), steps=3, restarts=2)(model, named(4), zeros(4))
    assert model.asked == [[0, 1, 2, 3]] + [[1, 3]] * 3 + [[1, 3]] * 4


def test_keeping_the_best_runs_all_to_the_end_but_restarts_only_the_unbroken() -> None:
    model = Counting([True, False, True, False])
    APGD(linf(0.001), steps=3, restarts=2, keep="best")(model, named(4), zeros(4))
    assert model.asked == [[0, 1, 2, 3]] * 4 + [[1, 3]] * 4


def test_nothing_is_asked_once_all_are_broken() -> None:
    model = Counting([True, True])
    APGD(linf(0.001), steps=9, restarts=9)(model, named(2), zeros(2))
    assert model.asked == [[0, 1]]


def test_the_original_leaves_an_image_missed_when_clean() -> None:
    model, x = Counting([True, False]), named(2)
    x_adv = APGD(linf(0.001), steps=2, rng="autoattack", keep="best")(model, x, zeros(2))
    assert model.asked == [[0, 1]] + [[1]] * 3
    assert torch.equal(x_adv[0], x[0])


def test_in_a_larger_ball_nobody_leaves() -> None:
    """largereps: a break outside the ball is none. 3 + 3 + 4 steps, and one pass more a climb."""
    model = Counting([True, False])
    APGD(l1(0.001), steps=10)(model, named(2), zeros(2))
    assert model.asked == [[0, 1]] * (4 + 4) + [[0, 1]] + [[1]] * 4


@pytest.mark.parametrize("steps, expected", [(3, [1, 1, 1]), (7, [3, 3, 1]), (10, [3, 3, 4]), (100, [30, 30, 40])])
def test_the_schedule_of_largereps(steps: int, expected: list[int]) -> None:
    """Shares .3, .3 and the rest, the first two rounded up."""
    stages = APGD(l1(2.0), steps=steps).stages()
    assert stages == list(zip([6.0, 4.0, 2.0], expected, strict=True))
    assert sum(expected) == steps
    assert APGD(l1(2.0), steps=steps, largereps=False).stages() == [(2.0, steps)]


@pytest.mark.parametrize(
    "attack",
    [
        APGD(linf(0.01), 5),
        APGD(l2(0.01), 5, restarts=3, eot=2),
        APGD(l1(0.01), 5, rng="autoattack"),
        TargetedAPGD(linf(0.01), 2, 5, loss="margin"),
        TargetedAPGD(l1(0.01), 9, 5, restarts=2, loss="margin", rng="autoattack"),
    ],
)
def test_queries_are_what_an_unbroken_image_costs(attack: APGD | TargetedAPGD, w: Tensor) -> None:
    """Counted by a `Surrogate`: a gradient is 3 passes. (A surrogate that is close asks nothing of the exact model.)"""
    counts = []
    linear = Plain(LinearModel(w))
    model = Surrogate(linear, linear, close=True, on_pass=lambda n, gradient: counts.append(n * (3 if gradient else 1)))
    x = torch.full((1, *SHAPE), 0.5)
    attack(model, x, zeros(1))
    assert sum(counts) == attack.queries(Output(linear(x), {}))


def test_eot_averages_the_gradient() -> None:
    """Two linear models in turn: their mean pushes pixel 0 up and pixel 1 down, either alone the two alike. A step of
    twice eps from the ball's surface ends in that corner.
    """
    weights, asked = (torch.tensor([3.0, 1.0]), torch.tensor([-1.0, -3.0])), []

    def model(x: Tensor) -> Tensor:
        asked.append(x.detach().flatten(1))
        value = asked[-1] @ weights[0] + (x.flatten(1) - asked[-1]) @ weights[len(asked) % 2]
        return torch.stack([torch.full_like(value, 9.0), value], 1)

    x = torch.full((2, 1, 1, 2), 0.5)
    APGD(linf(0.1), steps=1, eot=2, objective=Joint("margin"))(model, x, zeros(2))
    assert len(asked) == 2 * 2
    assert torch.equal(asked[2], asked[3])
    torch.testing.assert_close(asked[2], torch.tensor([[0.6, 0.4]] * 2))


# ------------------------------------------------------------------------------------------------ whose word counts


def always(label: int, noted: list[int] | None = None) -> Plain:
    """Says ``label``, with a gradient."""

    def says(x: Tensor) -> Tensor:
        if noted is not None:
            noted.append(len(x))
        value = 0.1 * x.flatten(1).mean(1)
        return torch.stack([value - 5 * label, -value + 5 * (label - 1)], 1)

    return Plain(says)


@pytest.mark.parametrize("keep", ["first", "best"])
def test_a_surrogate_that_boasts_is_not_believed(keep: str) -> None:
    """It misses every image, the exact model none: nobody leaves, and the result is the highest loss, not a "break"."""
    asked: list[int] = []
    model = Surrogate(always(1, asked), always(0))
    x = torch.full((3, *SHAPE), 0.5)
    x_adv = APGD(linf(0.1), steps=4, restarts=2, keep=keep, objective=Joint("margin"))(model, x, zeros(3))
    assert asked == [3] * 10
    torch.testing.assert_close(x_adv, x - 0.1, rtol=0, atol=1e-6)  # the margin falls with the mean


def test_a_break_that_the_surrogate_misses_counts() -> None:
    asked: list[int] = []
    APGD(linf(0.1), steps=4)(Surrogate(always(0, asked), always(1)), torch.full((3, *SHAPE), 0.5), zeros(3))
    assert asked == [3]


def test_a_broken_model_stops_the_attack() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1).sum(1), x.flatten(1).sum(1) / 0], 1)

    with pytest.raises(NotFiniteError, match="not finite"):
        APGD(linf(0.1), steps=2)(model, torch.full((2, *SHAPE), 0.5), zeros(2))


# ------------------------------------------------------------------------------------------------ targets


class Ranked(nn.Module):
    """Four classes with logits 3, 2, 1, 0; each pixel of the first four raises one of them a little."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 2.0, 1.0, 0.0]) + 0.1 * x.flatten(1)[:, :4]


@pytest.mark.parametrize("targets, climbs", [(1, 1), (2, 2), (9, 3)])
def test_each_target_is_tried_up_to_the_number_of_classes(
    targets: int, climbs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last iterate of each climb has the pixel of its own target up, and the label's down."""
    monkeypatch.setattr(together, "SMALL", 0)  # a climb at a time
    seen: list[Tensor] = []

    class Noting(Ranked):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().flatten(1)[:, :4] - 0.5)
            return super().forward(x)

    attack = TargetedAPGD(linf(0.1), targets=targets, steps=3, loss="margin")
    attack(Noting(), torch.full((2, *SHAPE), 0.5), zeros(2))
    assert attack.objective.name == "joint"
    assert len(seen) == 1 + climbs * 4, "one clean pass says all targets"
    for number in range(climbs):
        end = seen[4 * (number + 1)]
        assert end[:, 0].tolist() == pytest.approx([-0.1] * 2)
        assert end[:, number + 1].tolist() == pytest.approx([0.1] * 2)


def test_an_image_broken_at_one_target_is_not_attacked_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel 0 names the image; image 0 is missed from the start, image 1 never."""
    monkeypatch.setattr(together, "SMALL", 0)  # a climb at a time
    model = Counting([True, False])
    TargetedAPGD(linf(0.001), targets=1, steps=2, restarts=2, loss="margin")(model, named(2), zeros(2))
    clean, climb, again = [[0, 1]], [[0, 1], [1], [1]], [[1]] * 3
    assert model.asked == clean + climb + again


def test_targeted_dlr_is_the_margin_with_fewer_than_four_classes() -> None:
    x = torch.full((1, 1, 1, 1), 0.5)
    dlr, margin = (TargetedAPGD(linf(0.1), steps=5, loss=loss)(Hump(), x, zeros(1)) for loss in ("dlr", "margin"))
    assert torch.equal(dlr, margin)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("attack", [APGD, TargetedAPGD])
@pytest.mark.parametrize(
    "threat, arguments, message",
    [
        (linf(0.1), {"steps": 0}, "steps, restarts and eot must be at least 1; got 0, 1 and 1"),
        (linf(0.1), {"restarts": 0}, "steps, restarts and eot must be at least 1; got 100, 0 and 1"),
        (linf(0.1), {"eot": 0}, "steps, restarts and eot must be at least 1; got 100, 1 and 0"),
        (linf(0.1), {"rho": 1.5}, "rho is a share of steps, from 0 to 1; got 1.5"),
        (linf(0.1), {"rho": float("nan")}, "rho is a share of steps, from 0 to 1; got nan"),
        (l2(0.1), {"largereps": True}, "largereps is a schedule for l1; leave it out for l2"),
        (l1(0.1), {"steps": 2}, "largereps needs 3 steps or more, got 2; write more, or largereps=False"),
    ],
)
def test_settings_are_checked(attack: type[APGD], threat: Threat, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(threat, **arguments)


def test_targets_are_checked() -> None:
    with pytest.raises(ValueError, match="targets must be at least 1; got 0"):
        TargetedAPGD(linf(0.1), targets=0)
