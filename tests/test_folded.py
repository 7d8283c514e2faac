"""Attacks of training on a folded copy: it follows the model in place, and the attack is the same but for rounding."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustmoe import spec as specs
from robustmoe.attacks import PGD, Bf16, ExpertsOnly, Folded, Joint, Surrogate, at_radius, changed, folding, linf
from robustmoe.attacks.half import LowPrecision
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.training import build_method
from robustmoe.training.methods import climbing

INNER = PGD(linf(8 / 255), steps=2, keep="last")


def moved(model: RoutedModel, x: Tensor) -> None:
    """One step of everything: weights, affine parts and statistics of the norms."""
    model.train()
    model.run(x).logits.square().sum().backward()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad.sign() + 0.05 * parameter
            parameter.grad = None


def near(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("name", ["dense", "pathway", "ensemble(resnet8(width=4), experts=2, gate=soft)"])
def test_the_copy_follows_the_model(name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Logits and image gradients, after each of two training steps, by one copy that is never made again."""
    model, x = tiny(name), images(12)
    twin = folding.refreshed_twin(model, x)
    assert twin is not model
    assert any(type(module).__name__ == "_Folded" for module in twin.modules()), "something was folded"
    before = model(x).detach()
    for _ in range(2):
        moved(model, images(16))
        assert folding.refreshed_twin(model, x) is twin
        at = x.clone().requires_grad_()
        expected = model.run(at)
        slope = torch.autograd.grad(expected.logits[:, 0].sum(), at, retain_graph=True)[0]
        found = twin.run(at, forced={each: routing.detach() for each, routing in expected.trace.items()})
        assert near(found.logits.detach(), expected.logits.detach())
        free = twin.run(at)
        for each, routing in expected.trace.items():
            assert near(free.trace[each].logits.detach(), routing.logits.detach())
        if not expected.trace:
            assert near(torch.autograd.grad(found.logits[:, 0].sum(), at)[0], slope)
        assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert not near(before, model(x).detach()), "the model has moved"


@pytest.mark.parametrize("objective", [Joint(), Joint("kl"), ExpertsOnly()])
def test_it_is_the_attack_on_the_model_but_for_rounding(
    objective: Joint | ExpertsOnly, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Where the sign of a gradient is not that of a rounding: nearly everywhere."""
    model, x = tiny("pathway"), images(8)
    y = model(x).argmax(1)
    attack = changed(INNER, objective=objective)
    moved(model, images(16))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    ours, theirs = Folded(attack)(model, x, y), attack(model, x, y)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert float((ours != theirs).float().mean()) < 0.05
    assert float((ours - x).abs().max()) <= 8 / 255 + 1e-6


def test_what_cannot_be_folded_is_attacked_as_it_is(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    for name in ("vit_moe", "ensemble_hard"):  # no BatchNorm behind a convolution, or none at all
        model = tiny(name)
        if folding.refreshed_twin(model, x) is model:
            assert torch.equal(Folded(INNER)(model, x, y), INNER(model, x, y))
    model = tiny("vit_moe")
    assert folding.refreshed_twin(model, x) is model
    seen = Surrogate(dense := tiny("dense"), dense)
    assert torch.equal(Folded(INNER)(seen, x, y), INNER(dense, x, y))
    other = tiny("dense", seed=1)
    monkeypatch.setattr(folding, "deviation", lambda *given: torch.tensor([0.1]))
    assert folding.refreshed_twin(other, x) is other


def test_a_copy_goes_with_its_model(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model = tiny("dense")
    folding.refreshed_twin(model, images(2))
    gc.collect()
    held = len(folding._TWINS)
    del model
    gc.collect()
    assert len(folding._TWINS) == held - 1


def test_half_precision_on_the_copy(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Whichever is written inside, bf16 runs on the folded copy; the copy itself is made in float32."""
    model, x, y = tiny("dense"), images(4), torch.zeros(4, dtype=torch.long)
    twin = folding.refreshed_twin(model, x)
    expected = INNER(LowPrecision(twin), x, y)
    assert torch.equal(Folded(Bf16(INNER))(model, x, y), expected)
    assert torch.equal(Bf16(Folded(INNER))(model, x, y), expected)
    fresh = tiny("dense", seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert folding.refreshed_twin(fresh, x) is not fresh


def test_it_is_written_and_trained_with(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    attack = Folded(INNER)
    assert specs.text(attack) == "folded(pgd(linf(8/255), steps=2, keep=last))"
    assert specs.build(specs.text(attack), "attack") == attack
    assert climbing(attack, Joint("kl")) == Folded(changed(INNER, objective=Joint("kl")))
    assert at_radius(attack, 0.1).threat.eps == 0.1
    assert Folded(PGD(linf(0.1))).for_verdict() == Folded(PGD(linf(0.1), keep="first"))
    model, x, y = tiny("dense"), images(6), torch.zeros(6, dtype=torch.long)
    noise = Noise.of(torch.arange(6), 1)
    losses = [
        build_method(f"at({text})").phases[0].loss(model.train(), x, y, noise).value.detach()
        for text in (specs.text(attack), specs.text(INNER))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-3)
