"""Attacks made in bf16: the attack on the network in half precision, with nothing else changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustmoe import compat
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Bf16, Joint, Viewed, at_radius, changed, linf
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.attacks.views import StraightThrough
from robustmoe.models import RoutedModel
from robustmoe.training.methods import climbing

INNER = PGD(linf(8 / 255), steps=2, keep="last")


def test_it_is_the_attack_on_the_half_network(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Not on the exact one: of 6 * 192 signs of a gradient some differ after a rounding to 8 bits."""
    model, x, y = tiny("pathway"), images(6), labels(6)
    found = Bf16(INNER)(model, x, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, INNER(LowPrecision(model), x, y))
    differing = float((found != INNER(model, x, y)).float().mean())
    assert 0 < differing < 0.2


def test_half_is_nearly_the_model_and_sees_its_weights_move(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    """bf16 keeps 8 bits; the second pass has to see what an optimiser did in place after the first."""
    x, half = images(6), LowPrecision(model)
    for _ in range(2):
        expected = model.run(x)
        found = half.run(x, forced=expected.trace)
        assert found.logits.dtype == torch.float32
        assert not torch.equal(found.logits, expected.logits)
        off = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
        assert float(off.detach()) < 0.05
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)


def test_what_evaluation_attacks_is_attacked_as_it_is(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y = tiny("dense"), images(6), labels(6)
    seen = Surrogate(model, model)
    assert torch.equal(Bf16(INNER)(seen, x, y), INNER(model, x, y))


def test_a_device_without_products_of_bf16_attacks_in_float32(
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = tiny("pathway"), images(6), labels(6)
    monkeypatch.setattr(compat, "multiplies", lambda device, dtype: dtype != torch.bfloat16)
    assert torch.equal(Bf16(INNER)(model, x, y), INNER(model, x, y))


def test_what_is_inside_can_be_changed() -> None:
    attack = Bf16(INNER)
    assert (attack.threat, attack.objective, attack.seed) == (INNER.threat, Joint(), 0)
    assert changed(attack, seed=3) == Bf16(changed(INNER, seed=3))
    assert changed(Viewed(StraightThrough(), attack), seed=3).seed == 3
    assert at_radius(Bf16(changed(INNER, step_size=1 / 255)), 4 / 255).attack.step_size == 0.5 / 255
    assert climbing(attack, Joint("kl")) == Bf16(changed(INNER, objective=Joint("kl")))
    named = Bf16(changed(INNER, objective=Joint("margin")))
    assert climbing(named, Joint("kl")) == named
    assert specs.build("bf16(pgd(linf(8/255), steps=2, keep=last))", "attack") == attack
