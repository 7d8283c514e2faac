"""Attacks through the noise of training: what is climbed is the noisy model, drawn anew in each pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import PGD, Joint, Noisy, build_attack, changed, linf
from robustmoe.attacks.noisy import PASSES, TrainingNoise
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, build_method, train_step

Images, Labels, Tiny = Callable[..., Tensor], Callable[[int], Tensor], Callable[..., RoutedModel]

VIT = "vit_moe(tiny, patch=4, width=16, depth=2, heads=2, mlp_ratio=2, experts=4, k=1, placement=every_2, dropout=0.1)"
STEPS = PGD(linf(0.1), steps=3, step_size=0.05, keep="last")


def vit() -> RoutedModel:
    return build_model(VIT, 10, (3, 8, 8), seed=2)


def test_it_is_pgd_on_the_noisy_model_written_out(images: Images, labels: Labels) -> None:
    """The start of PGD, then three signs of a gradient, each of a pass with other noise; not the attack without."""
    model, x, y, noise = vit().eval(), images(8), labels(8), Noise.of(torch.arange(8), 3)
    found = Noisy(STEPS)(model, x, y, noise)
    x_adv = start(model, x, y, noise)
    for step in range(3):
        at = x_adv.clone().requires_grad_()
        logits = model.run(at, noise=noise.fold(PASSES, step)).logits
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), at)
        x_adv = (x_adv + 0.05 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert float(((found - x_adv).abs() > 1e-6).float().mean()) < 1e-3, "rounding"
    plain = STEPS(model, x, y, noise)
    assert float((found != plain).float().mean()) > 0.05
    assert float((found - x).abs().max()) <= 0.1 + 1e-6


def start(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Where PGD begins: what its first pass is asked about."""
    seen: list[Tensor] = []

    class Spy(RoutedModel):
        def body(self, images: Tensor, tape: object) -> Tensor:
            seen.append(images.detach().clone())
            return model.ask(images, tape)  # type: ignore[arg-type]

    changed(STEPS, steps=1)(Spy(), x, y, noise)
    return seen[0]


def test_every_pass_has_noise_of_its_own_and_the_images_are_their_own(images: Images, labels: Labels) -> None:
    model, x = vit().eval(), images(6)
    noise = Noise.of(torch.arange(6), 1)
    noisy = TrainingNoise(model, noise)
    first, second = noisy.run(x), noisy.run(x)
    assert not torch.equal(first.logits, second.logits)
    assert set(first.trace) == set(model.run(x).trace)
    some = torch.tensor([4, 1])
    again = TrainingNoise(model, noise[some])
    torch.testing.assert_close(again.run(x[some]).logits, first.logits[some])
    route = TrainingNoise(model, noise).route(x)
    assert all(torch.equal(route[name].index, first.trace[name].index) for name in route)
    held = noisy.run(x, forced=first.trace)
    assert all(torch.equal(held.trace[name].index, first.trace[name].index) for name in route)


def test_a_model_without_noise_is_attacked_as_it_is(images: Images, labels: Labels, tiny: Tiny) -> None:
    model, x, y = tiny("pathway"), images(6), labels(6)
    assert torch.equal(Noisy(STEPS)(model, x, y), STEPS(model, x, y))
    noisy = vit().eval()
    assert torch.equal(Noisy(STEPS)(Surrogate(noisy, noisy), x, y), STEPS(noisy, x, y)), "nor in evaluation"


def test_it_trains_and_leaves_no_mark(images: Images, labels: Labels) -> None:
    method = build_method("at(noisy(pgd(linf(0.1), steps=2, keep=last)), balance=0.01, balance_loss=vmoe)")
    model = vit()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = MiniBatch(images(6), labels(6), Noise.of(torch.arange(6), 3))
    result = train_step(model, method, [optimiser], batch)
    assert torch.isfinite(result.loss["all"])
    assert all(module.training for module in model.modules())
    attack = build_attack("noisy(pgd(linf(0.1)))")
    assert (attack.threat, attack.objective, attack.seed) == (linf(0.1), Joint(), 0)


def test_an_attack_that_leaves_images_out_is_told(images: Images, labels: Labels) -> None:
    model, x = vit().eval(), images(6)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    attack = Noisy(PGD(linf(0.1), steps=3, keep="first"))
    with pytest.raises(UserError, match=r"noisy\(...\) got a pass of \d of 6 images"):
        attack(model, x, y)
