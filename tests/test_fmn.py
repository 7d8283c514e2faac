"""FMN: closed forms on linear models, the distances and their curve, and the contract of an attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import Joint, NotFiniteError, RouterOnly, Surrogate, Threat, experts_only, missed, size
from robustmoe.attacks.boundary import dual_size, into_ball
from robustmoe.attacks.fmn import FMN, accuracy_curve
from robustmoe.models import RoutedModel
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise
from tiny_models import TINY, in_turn

NORMS = ("linf", "l2", "l1")
SHAPE = (3, 4, 4)
EPS = {"linf": 0.08, "l2": 0.6, "l1": 6.0}


class Linear(nn.Module):
    """Logits (0, <w, x - 0.5> - offset): label 0 is right where the second logit is below 0."""

    def __init__(self, w: Tensor, offset: float) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        value = ((x - 0.5) * self.w).flatten(1).sum(1) - self.offset
        return torch.stack([torch.zeros_like(value), value], 1)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
def test_the_distance_to_a_linear_boundary_is_the_margin_over_the_dual_norm(norm: str) -> None:
    """Away from the box. The radius swings about the boundary by gamma, at the end 0.1 %: from above, within 0.3 %."""
    model, y = Linear(torch.randn(SHAPE), 0.3), torch.zeros(4, dtype=torch.long)
    x = 0.48 + 0.04 * torch.rand(4, *SHAPE)
    with torch.no_grad():
        margin = -model(x)[:, 1]
    assert (margin > 0).any()
    true = margin.clamp(min=0) / dual_size(norm, model.w.detach()[None])
    found = FMN(Threat(norm, 0.1), steps=200, step_size=0.1).distances(model, x, y)
    assert (found >= true * (1 - 1e-5)).all()
    torch.testing.assert_close(found, true, rtol=3e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_in_the_way_does_not_stall_it(norm: str) -> None:
    """Half the pixels are 0 and would have to fall further; the distance is that of the other half alone."""
    w = -torch.ones(SHAPE)
    w[:, 2:] *= 0.5
    x = torch.full((2, *SHAPE), 0.5)
    x[:, :, :2] = 0.0
    model, y = Linear(w, 0.0), torch.zeros(2, dtype=torch.long)
    model.offset = float(((x[0] - 0.5) * w).sum()) + 1.0  # the margin is 1
    free = w[:, 2:][None]
    expected = 1.0 / float(dual_size(norm, free))
    found = FMN(Threat(norm, 0.1), steps=200, step_size=0.1).distances(model, x, y)
    assert found.tolist() == pytest.approx([expected] * 2, rel=5e-3)


def test_distances_are_zero_for_mistakes_and_infinite_where_nothing_breaks() -> None:
    x, noise = torch.full((3, *SHAPE), 0.5), None
    blind = Plain(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2) + 0 * x.flatten(1)[:, :2])
    found = FMN(Threat("l2", 0.5), steps=3).distances(blind, x, torch.tensor([0, 1, 0]), noise)
    assert found.tolist() == [math.inf, 0.0, math.inf]
    assert FMN(Threat("l2", 0.5)).distances(blind, x[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="there are 3 images and 1 streams of noise"):
        FMN(Threat("l2", 0.5)).distances(blind, x, torch.tensor([0, 1, 0]), Noise.of(torch.arange(1)))


def test_the_curve_by_hand() -> None:
    """Four images: one wrong, one broken at exactly 0.1, one at 0.3, one never."""
    distances = torch.tensor([0.0, 0.1, 0.3, math.inf])
    assert accuracy_curve(distances, [0.0, 0.05, 0.1, 0.2, 0.3, 9.0]) == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert accuracy_curve([0.0, 1.0], [0.5]) == [0.5]
    with pytest.raises(ValueError, match="there are no distances"):
        accuracy_curve([], [0.1])
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="distances must be 0 or more"):
            accuracy_curve([bad], [0.1])


@pytest.mark.parametrize(
    "norm, start, name", in_turn([("linf", "clean"), ("l2", "random"), ("l1", "clean")], sorted(TINY))
)
def test_the_contract(
    norm: str, start: str, name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """In the ball and the box, broken or clean, as far away as the distances say, and the model as found."""
    model, x = tiny(name), images(6)
    y = answers(model, x)
    y[0] = (y[0] + 1) % 4  # one is wrong from the start
    model.train()
    model.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack = FMN(Threat(norm, EPS[norm]), steps=12, start=start)
    x_adv, distances = attack(model, x, y), attack.distances(model, x, y)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    within = distances <= EPS[norm]
    torch.testing.assert_close(size(norm, x_adv - x), distances.where(within, torch.zeros(())), rtol=0, atol=0)
    assert torch.equal(x_adv[~within], x[~within])
    assert torch.equal(answers(model, x_adv) != y, within)
    assert distances[0] == 0


def test_some_images_are_broken_and_some_are_not(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """The contract's test would pass an attack that does nothing: this one does."""
    x = images(12)
    for name in ("dense", "ensemble_soft"):
        model = tiny(name)
        found = FMN(Threat("l2", 0.5), steps=40).distances(model, x, answers(model, x))
        assert torch.isfinite(found).sum() >= 8


@pytest.mark.parametrize("start", ["clean", "random"])
def test_an_image_is_attacked_alike_in_any_batch(
    start: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny("ensemble_soft").double(), images(6).double()
    y, noise = answers(model, x), Noise.of(torch.arange(6), 3)
    attack = FMN(Threat("l2", 5.0), steps=8, start=start)
    whole = attack(model, x, y, noise)
    for rows in (torch.tensor([4, 1]), torch.tensor([5])):
        torch.testing.assert_close(attack(model, x[rows], y[rows], noise[rows]), whole[rows], rtol=0, atol=1e-9)


def test_the_exact_model_judges(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """A surrogate of slightly other weights is broken elsewhere: what is returned as broken breaks the exact model."""
    climbed, exact, x = tiny("ensemble_soft"), tiny("ensemble_soft"), images(8)
    with torch.no_grad():
        for parameter in climbed.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    y = answers(exact, x)
    for close in (False, True):
        distances = FMN(Threat("l2", 9.0), steps=15).distances(Surrogate(climbed, exact, close), x, y)
        x_adv = FMN(Threat("l2", 9.0), steps=15)(Surrogate(climbed, exact, close), x, y)
        assert torch.equal(answers(exact, x_adv) != y, torch.isfinite(distances))
    assert bool(torch.isfinite(distances).any())


def test_other_margins(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    """Experts alone: held routes. Every distance is that of a pass that was broken."""
    x = images(4)
    y = answers(routed, x)
    attack = FMN(Threat("linf", 0.5), steps=15, objective=experts_only("margin"))
    x_adv, distances = attack(routed, x, y), attack.distances(routed, x, y)
    with torch.no_grad():
        held = routed.run(x).trace
        logits = routed.run(x_adv, forced=held).logits
        assert torch.equal(missed(routed, x_adv, logits, y), distances <= 0.5)
    FMN(Threat("linf", 0.5), steps=2, objective=RouterOnly())(routed, x, y)


def test_passes_are_counted(images: Callable[..., Tensor]) -> None:
    """A first look, one pass a step with a gradient, and a last look."""
    passes: list[bool] = []
    attack = FMN(Threat("l2", 0.5), steps=7)

    def model(x: Tensor) -> Tensor:
        passes.append(x.requires_grad)
        return x.flatten(1)[:, :4]

    x = images(2)
    y = answers(model, x)
    passes.clear()
    attack(model, x, y)
    assert passes == [False] + [True] * 7 + [False]
    output = Plain(model).run(x)
    assert attack.queries(output) == 3 * 7 + 2


@pytest.mark.parametrize("norm", NORMS)
def test_into_ball(norm: str) -> None:
    """An inside point stays, an outside one lands on the sphere, no nearer than any other point of the ball."""
    delta = torch.randn(5, *SHAPE, dtype=torch.float64)
    full = size(norm, delta)
    assert torch.equal(into_ball(norm, delta, full * 1.01), delta)
    assert torch.equal(into_ball(norm, delta, torch.full((5,), math.inf, dtype=torch.float64)), delta)
    shrunk = into_ball(norm, delta, 0.3 * full)
    torch.testing.assert_close(size(norm, shrunk), 0.3 * full)
    for _ in range(20):
        other = torch.randn_like(delta)
        other = other * (0.3 * full / size(norm, other))[:, None, None, None]
        assert ((delta - shrunk).flatten(1).norm(dim=1) <= (delta - other).flatten(1).norm(dim=1)).all()
    assert into_ball(norm, delta, torch.zeros(5, dtype=torch.float64)).abs().max() == 0


def test_a_broken_model_stops_the_attack(images: Callable[..., Tensor]) -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        FMN(Threat("linf", 0.1))(
            lambda x: (x - x.detach()).flatten(1)[:, :4].sqrt(), images(3), torch.zeros(3, dtype=torch.long)
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"step_size": 0.0}, "step_size must be above 0"),
        ({"final_step_size": 2.0}, "final_step_size must be above 0 and at most step_size; got 2.0"),
        ({"gamma": 1.0}, "0 < final_gamma <= gamma < 1; got 0.001 and 1.0"),
        ({"final_gamma": 0.1}, "0 < final_gamma <= gamma < 1; got 0.1 and 0.05"),
        ({"objective": Joint("ce")}, "fmn needs a loss that is 0 at the boundary, loss=margin; got 'ce'"),
    ],
)
def test_settings_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FMN(Threat("linf", 0.1)), **arguments)
