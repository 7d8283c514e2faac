"""Checks of gradients and strength: each passes on a smooth model under a sound attack, fails on what it is for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faulty_models import ATTACK, EPS, Crowded, Large, Masked, Mix, Quantised, Shattered, Single, case, on
from robustmoe.attacks import PGD, Attack, AutoAttack, Joint, Objective, Threat, experts_only, l1, l2, linf
from robustmoe.attacks.apgd import APGD
from robustmoe.attacks.base import Suite
from robustmoe.attacks.square import Square
from robustmoe.evaluation.checks import Subject, gradients, label, published, strength
from robustmoe.evaluation.checks.planted import plant
from robustmoe.evaluation.checks.subject import graded
from robustmoe.models import RoutedModel, as_routed
from robustmoe.models.base import Output
from robustmoe.noise import Noise
from robustmoe.routing import Tape

GENTLE = PGD(linf(EPS), steps=2, step_size=EPS / 50, start="clean")
"""An attack that has gone a 25th of the way when it stops."""


@pytest.mark.parametrize(
    "images, n, points, status",
    [(0, 64, 0.5, "pass"), (-3, 64, 0.5, "pass"), (1, 64, 0.5, "warn"), (2, 64, 0.5, "fail"), (4, 1000, 0.5, "pass")],
)
def test_one_image_alone_only_warns(images: int, n: int, points: float, status: str) -> None:
    """One of 64 is 1.6 points; 4 of 1000 are 0.4."""
    assert graded(images, n, points) == status


# ------------------------------------------------------------------------------------------------ G1


def test_no_gradient() -> None:
    sound, blind = case(Mix()), case(Quantised())
    assert gradients.gradients(on(sound.model, sound.batch)).status == "pass"
    found = gradients.gradients(on(blind.model, blind.batch))
    assert (found.status, found.value) == ("fail", 1.0)
    assert gradients.flat_along(sound).status == "pass"
    deep = gradients.flat_along(blind)
    assert deep.status == "fail"
    assert set(deep.value) == {f"{loss}, {place}" for loss in ("ce", "margin", "dlr") for place in ("start", "end")}
    assert deep.value["margin, start"] == 1.0


def test_a_saturated_cross_entropy_is_no_alarm_as_its_climb_goes_on() -> None:
    """Its own gradient is exactly zero at most images; what the attacks climb there is not."""
    large = case(Large())
    at = large.batch.x.clone().requires_grad_()
    (own,) = torch.autograd.grad(F.cross_entropy(large.model(at), large.batch.y), at)
    assert (own.flatten(1).abs().amax(1) == 0).float().mean() > 0.5
    assert set(gradients.flat_along(large).value.values()) == {0.0}


# ------------------------------------------------------------------------------------------------ G2


@pytest.mark.parametrize(
    "model, status",
    [
        (Mix("soft"), "pass"),
        (Mix("vmoe"), "pass"),
        (Mix("hard"), "pass"),
        (Mix("straight"), "warn"),
        (Quantised(), "pass"),
        (Quantised(through=True), "fail"),
        (Masked(), "fail"),
    ],
    ids=["soft", "vmoe", "hard", "straight", "no gradient", "straight through the levels", "masked"],
)
def test_finite_differences(model: RoutedModel, status: str) -> None:
    """No gradient where there is none to take is right (G1 finds it); a declared straight-through gate warns."""
    found = gradients.finite_differences(case(model))
    assert found.status == status
    assert ("with the route held" in found.sentence) is (status == "warn")
    assert "float64" in found.sentence


def test_finite_differences_in_float32() -> None:
    """A model that cannot be asked in float64, or copied: its linear experts are measured as well in float32."""
    found = gradients.finite_differences(case(Single()))
    assert found.status == "pass"
    assert "float32" in found.sentence


def test_the_share_of_wrong_derivatives_by_hand() -> None:
    """Logits (0, <1, x> with half of its gradient): autograd says half of the derivative, but where the 16 signs of the
    direction sum to 0, both are 0. That has probability C(16, 8) / 2^16 = 0.196; of 256 draws the deviation is 0.025.
    """

    def half(x: Tensor) -> Tensor:
        value = x.flatten(1).sum(1)
        return torch.stack([0 * value, 0.5 * value + 0.5 * value.detach()], 1)

    found = gradients.finite_differences(case(as_routed(half)))
    assert found.status == "fail"
    assert found.value == pytest.approx(1 - math.comb(16, 8) / 2**16, abs=0.06)


# ------------------------------------------------------------------------------------------------ G3


def test_an_unstable_loss() -> None:
    assert gradients.instability(case(Mix())).status == "pass"
    assert gradients.instability(case(Shattered())).status == "warn"
    flat = gradients.instability(case(as_routed(lambda x: torch.tensor([[1e3, 0.0, 0.0]]) + 0 * x.flatten(1)[:, :3])))
    assert (flat.status, flat.value) == ("warn", None)


# ------------------------------------------------------------------------------------------------ G4, G5


@dataclasses.dataclass(frozen=True)
class Forgetful(Attack):
    """PGD that returns the image it was given."""

    threat: Threat = linf(EPS)  # noqa: RUF009
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        ATTACK(model, x, y, noise)
        return x


def test_a_success_that_is_not_returned() -> None:
    sound, lossy = case(Mix()), case(Mix(), Forgetful())
    assert strength.silent_success(sound).status == "pass"
    found = strength.silent_success(lossy)
    assert (found.status, found.value) == ("fail", int(sound.broken.sum()))
    assert found.value > 0


def test_a_climb_that_has_not_ended() -> None:
    """On a smooth model, steps of eps / 4 reach a corner of the ball and stay there; GENTLE still rises."""
    assert strength.incomplete(case(Mix(), dataclasses.replace(ATTACK, steps=40))).status == "pass"
    found = strength.incomplete(case(Mix(), dataclasses.replace(GENTLE, steps=10)))
    assert (found.status, found.value) == ("warn", 1.0)
    assert strength.incomplete(case(Mix(), PGD(linf(1.0), steps=20))).status == "not run"


# ------------------------------------------------------------------------------------------------ G6


def test_claims_that_the_exact_model_does_not_confirm() -> None:
    """An attack on the held route claims what it broke there; by hand: the held answer is wrong, the free one right."""
    assert strength.transfer(case(Mix())).status == "pass"
    held = case(Mix("hard", seed=3), PGD(linf(0.2), objective=experts_only()))
    x_adv = held.outcome(held.main).x_adv
    with torch.no_grad():
        claimed = held.model.run(x_adv, forced=held.clean.trace).logits.argmax(1) != held.batch.y
        real = held.model(x_adv).argmax(1) != held.batch.y
    lost = int((claimed & ~real).sum())
    found = strength.transfer(held)
    assert lost > 1
    assert (found.status, found.value) == ("fail", lost / len(held.batch))


# ------------------------------------------------------------------------------------------------ G7


@pytest.mark.parametrize("threat", [linf(EPS), l2(0.3), l1(0.8)], ids=lambda threat: threat.norm)
def test_unbounded(threat: Threat) -> None:
    assert strength.unbounded(case(Mix(), PGD(threat))).status == "pass"
    found = strength.unbounded(case(Quantised(), PGD(threat, start="clean")))
    assert found.status == "fail"


# ------------------------------------------------------------------------------------------------ G8


class Wave(RoutedModel):
    """The margin of class 0 is cos(2 pi (mean - 1/2) / 0.1 + 0.3): it is lost half a wavelength, 0.05, away, and is
    back after a whole one.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        wave = torch.cos(20 * math.pi * (x.flatten(1).mean(1) - 0.5) + 0.3)
        return torch.stack([wave, 0 * wave, 0 * wave - 2, 0 * wave - 2], 1)


def test_accuracy_against_the_radius() -> None:
    """On cross-entropy alone PGD misses images that FMN, on the margin, breaks within the same radius."""
    sound = strength.radii(case(Mix(), dataclasses.replace(ATTACK, steps=40, objective=Joint("margin"))))
    assert (sound.status, sound.value["fmn"]) == ("pass", 0)
    assert sound.value["radii"] == pytest.approx([EPS * i / 4 for i in range(1, 9)])
    weak = strength.radii(case(Mix(), GENTLE))
    assert weak.status == "fail"
    assert weak.value["fmn"] > 1


def test_an_attack_that_oversteps_is_seen() -> None:
    """One step of eps from the clean image: at 0.05 the wave has turned, at 0.1 it is where it was."""
    subject = case(Wave(), PGD(linf(0.05), steps=1, start="clean"))
    grey = torch.full((8, 1, 4, 4), 0.5)
    batch = dataclasses.replace(subject.whole, x=grey, y=torch.zeros(8, dtype=torch.int64), index=torch.arange(8))
    found = strength.radii(case(Wave(), PGD(linf(0.05), steps=1, start="clean", keep="first"), batch=batch))
    assert found.status == "fail"
    assert "accuracy rises by 8 of 8 images" in found.sentence


# ------------------------------------------------------------------------------------------------ G9 to G12


def test_a_weak_attack_gains_from_more() -> None:
    assert strength.converged(case(Mix())).status == "pass"
    found = strength.converged(case(Mix(), dataclasses.replace(GENTLE, steps=10)))
    assert found.status == "fail"
    assert found.value["steps"] > 1


def test_a_black_box_beats_a_blind_attack() -> None:
    assert strength.black_box(case(Mix())).status == "pass"
    found = strength.black_box(case(Quantised(), PGD(linf(0.2), start="clean")), points=50, queries=50)
    assert found.status == "fail"
    assert found.value["random"] > 1
    assert strength.black_box(case(Mix(), PGD(linf(1.0), steps=20))).status == "not run"


def test_losses_that_disagree() -> None:
    assert strength.losses_agree(case(Mix())).status == "pass"
    found = strength.losses_agree(case(Crowded()))
    assert found.status == "warn"
    assert found.value["ce"] > found.value["margin"]
    two = strength.losses_agree(case(as_routed(lambda x: x.flatten(1)[:, :2])))
    assert set(two.value) == {"ce", "margin"}


def test_seeds() -> None:
    sound = strength.seeds(case(Mix()))
    assert sound.status == "pass"
    luck = strength.seeds(case(Quantised(), PGD(linf(0.08), steps=1)))
    assert luck.status == "warn"  # without a gradient only the random start breaks anything
    assert len(set(luck.value)) > 1


# ------------------------------------------------------------------------------------------------ G13


def test_planted_adversarials_are_in_the_ball_and_fool_the_planted_model() -> None:
    subject = case(Mix())
    threat = linf(EPS)
    sown = plant(subject.model, subject.batch.x, subject.batch.y, threat, subject.noise(0))
    assert sown is not None
    model, rows, point = sown
    x = subject.batch.x[rows]
    assert len(rows) > 24
    assert bool((threat.size(point - x) <= EPS + 1e-6).all())
    assert bool(model.missed(point).all())
    assert not bool(model.missed(x).any())
    with torch.no_grad():
        margin = model(x).gather(1, subject.batch.y[rows][:, None])[:, 0] - model(x).scatter(
            1, subject.batch.y[rows][:, None], -torch.inf
        ).amax(1)
    torch.testing.assert_close(margin, torch.full_like(margin, 2.0), atol=1e-3, rtol=0)
    order = torch.randperm(len(x))
    torch.testing.assert_close(model(x[order]), model(x)[order])  # a row finds its image anywhere in a batch


def test_the_attack_has_to_find_what_is_planted() -> None:
    sound = strength.planted(case(Mix()))
    assert (sound.status, sound.value) == ("pass", 1.0)
    assert strength.planted(case(Mix(), GENTLE)).status == "fail"
    assert strength.planted(case(Quantised(), PGD(linf(0.2), start="clean"))).status == "fail"
    deaf = strength.planted(case(as_routed(lambda x: torch.ones(len(x), 1) * torch.tensor([2.0, 1.0, 0.0]))))
    assert deaf.status == "not run"


# ------------------------------------------------------------------------------------------------ G14


@dataclasses.dataclass(frozen=True)
class Claims(Suite):
    """Parts of AutoAttack, some of them changed."""

    threat: Threat = linf(EPS)  # noqa: RUF009
    changes: tuple[tuple[str, str, object], ...] = ()
    drop: int = 0
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        parts = dict(AutoAttack(self.threat).parts(output))
        for name, field, value in self.changes:
            parts[name] = dataclasses.replace(parts[name], **{field: value})  # type: ignore[type-var]
        return list(parts.items())[self.drop :]


def answer(classes: int) -> Output:
    return Output(torch.zeros(2, classes), {})


@pytest.mark.parametrize(
    "attack, classes, said",
    [
        (AutoAttack(linf(EPS)), 10, True),
        (AutoAttack(l2(0.5)), 10, True),
        (AutoAttack(l1(12.0)), 10, True),
        (AutoAttack(linf(EPS), rng="autoattack", seed=7), 10, True),
        (AutoAttack(linf(EPS)), 4, True),
        (AutoAttack(linf(EPS)), 3, False),
        (AutoAttack(linf(EPS), version="plus"), 10, False),
        (AutoAttack(linf(EPS), version="rand"), 10, False),
        (Claims(), 10, True),
        (Claims(drop=1), 10, False),
        (Claims(changes=(("square", "steps", 1000),)), 10, False),
        (Claims(changes=(("apgd-ce", "steps", 50),)), 10, False),
        (Claims(changes=(("apgd-ce", "objective", Joint("dlr")),)), 10, False),
        (Claims(changes=(("apgd-t", "targets", 3),)), 10, False),
        (Claims(changes=(("fab-t", "targets", 0),)), 10, False),
        (Claims(changes=(("square", "threat", linf(EPS / 2)),)), 10, False),
        (APGD(linf(EPS)), 10, False),
        (Square(linf(EPS)), 10, False),
        (ATTACK, 10, False),
    ],
)
def test_the_label(attack: Attack, classes: int, said: bool) -> None:
    assert label(attack, answer(classes)) == ("AutoAttack standard" if said else None)


def of_ten(attack: Attack) -> Subject:
    """The attack on a model of ten classes."""
    return on(as_routed(lambda x: torch.zeros(len(x), 10)), case(Mix()).whole, attack)


def test_the_identity_names_and_hashes_every_part() -> None:
    one = published.attack_identity(of_ten(AutoAttack(linf(8 / 255))))
    assert one.value["label"] == "AutoAttack standard"
    assert "square: square(linf(8/255))" in one.sentence
    other = published.attack_identity(of_ten(Claims(linf(8 / 255), (("square", "steps", 4999),))))
    assert other.value["hash"] != one.value["hash"]
    assert other.sentence.endswith("no published name is claimed for it")
