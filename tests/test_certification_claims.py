"""Certificates are sound: no sampled or attacked point of a certified ball has another prediction, for models of every
kind; and naive rules, held against the same points, are caught.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import PGD, Attack, ExpertTransition, Threat, l2, linf
from robustmoe.certification import Ball, Bounding, Bounds, Worst, rules, worst_margins
from robustmoe.certification.margins import others, router_bounds
from robustmoe.certification.routes import exact_margin
from robustmoe.errors import UserError
from robustmoe.models import EnsembleModel, Normalise, RoutedModel, build_model
from robustmoe.models.parts import Blended, Fork, Part
from robustmoe.models.small import LinearNetwork
from robustmoe.noise import Noise

CLASSES = 3
SHAPE = (1, 4, 4)
CNN = "small_cnn(width=2), experts=3, router=small_cnn(width=2), standardise=True"
LINEAR = "linear, experts=3, router=linear, standardise=True"
SOFT = f"ensemble({CNN}, gate=soft)"
HARD = f"ensemble({CNN}, gate=hard)"
MIXED = f"ensemble({CNN}, gate=soft, mix=probabilities)"
PATH = "pathway(resnet8(width=4), experts=2, router=small_cnn(width=2), standardise=True, {})"

MODELS = {
    "linear": f"ensemble({LINEAR}, gate=hard)",
    "hard": HARD,
    "soft": SOFT,
    "soft_probabilities": MIXED,
    "top_2": f"ensemble({CNN}, gate=renormalised, k=2)",
    "top_2_probabilities": f"ensemble({CNN}, gate=renormalised, k=2, mix=probabilities)",
    "vmoe": f"ensemble({CNN}, gate=vmoe, k=2)",
    "vmoe_1": f"ensemble({CNN}, gate=vmoe)",
    "vmoe_probabilities": f"ensemble({CNN}, gate=vmoe, k=2, mix=probabilities)",
    "straight_through_2": f"ensemble({CNN}, gate=straight_through, k=2)",
    "dual": f"dual({SOFT}, {HARD}, alpha=0.8)",
    "dual_logits": f"dual({HARD}, ensemble({LINEAR}, gate=hard), mix=logits)",
    "dual_mixer": f"dual({HARD}, {MIXED}, alpha=0.8, mixer=small_cnn(width=2))",
    "dual_scaled": f"dual({SOFT}, {HARD}, sharpen=scaled(scale=3))",
    "pathway": PATH.format("ratio=1"),
    "stages": PATH.format("routers=stage"),
    "own_norms": PATH.format("norm=own"),
}
NORMS = ("linf", "l2")
IMAGES, POINTS = 64, 64
HOWS: tuple[Bounding, ...] = ("ibp", "crown_ibp", "crown")


def random_images(n: int, seed: int = 0) -> Tensor:
    """Noise of differing level and contrast; some pixels at the walls of the box."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, *SHAPE, generator=generator)
    level, contrast = torch.rand(2, n, 1, 1, 1, generator=generator)
    return (level + 1.5 * contrast * (noise - 0.5)).clamp(0.0, 1.0).double()


def lively(name: str, seed: int = 0) -> RoutedModel:
    """A random model in float64 that uses every expert and says every class: the running statistics of every BatchNorm,
    the standardised routers' too, are those of random images, and each expert's mean logits are 0.
    """
    model = build_model(MODELS.get(name, name), CLASSES, SHAPE, seed=seed).to(torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the batches
    model.train()
    x = random_images(256, seed=99)
    with torch.no_grad():
        for batch in x.split(64):
            model(batch)
        for part in [model, *model.children()]:
            if isinstance(part, EnsembleModel):
                level(part, x)
    return model.eval()


def level(model: EnsembleModel, x: Tensor) -> None:
    """Mean 0 and deviation 1 of each expert's logits; where several are mixed by rank, they differ by half of what they
    would (of experts that agree on nothing no mixture of any two can be certified).
    """
    for expert in model.experts:
        if model.k > 1:
            for own, first in zip(expert.parameters(), model.experts[0].parameters()):
                own.copy_(0.5 * (own + first))
        logits = expert(model.normalise(x))
        expert.head.weight /= logits.std()
        expert.head.bias.copy_((expert.head.bias - logits.mean(0)) / logits.std())


# ------------------------------------------------------------------------------------------------ points


class Case(NamedTuple):
    """A model, images with a radius each, the class that is certified, and points (p, n, ch, h, w) of their balls."""

    model: RoutedModel
    ball: Ball
    y: Tensor
    points: Tensor


def clipped(x: Tensor, step: Tensor, norm: str, eps: Tensor) -> Tensor:
    """x plus the step of full size in the ball, in the box; steps (..., n, ch, h, w)."""
    if norm == "linf":
        step = step.clamp(-1, 1)
    else:
        step = step / torch.linalg.vector_norm(step.flatten(-3), dim=-1).clamp(min=1e-12)[..., None, None, None]
    return (x + eps[:, None, None, None] * step).clamp(0.0, 1.0)


def margins_of(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None]) - z


def forks(part: Part) -> Iterator[Fork]:
    """The routers that see the image first."""
    if isinstance(part, Fork):
        yield part
    elif isinstance(part, Blended):
        yield from forks(part.standard)
        yield from forks(part.robust)


def uphill(model: RoutedModel, x: Tensor) -> Tensor:
    """Gradients at x that lead somewhere: of every class, and of every router's logits, and their opposites; largest
    pixel 1.
    """
    at = x.clone().requires_grad_(True)
    values = [*model(at).unbind(1), *(each for fork in forks(model.parts()) for each in fork.router(at).unbind(1))]
    slopes = torch.stack([torch.autograd.grad(value.sum(), at, retain_graph=True)[0] for value in values])
    slopes = slopes / slopes.abs().amax((2, 3, 4), keepdim=True).clamp(min=1e-12)
    return torch.cat([slopes, -slopes])


def make_case(name: str, norm: str, n: int = IMAGES, p: int = POINTS, seed: int = 0) -> Case:
    """p points an image: random ones and corners, steepest steps towards classes and experts, the same with noise, PGD,
    and expert transitions where one router decides.
    """
    model, x = lively(name, seed), random_images(n, 7 + seed)
    y = model(x).argmax(1)
    sizes = torch.tensor([0.003, 0.01, 0.03, 0.1], dtype=torch.float64) * (1.0 if norm == "linf" else 3.0)
    eps = sizes[torch.arange(n) % 4]
    attacks: list[Callable[[Threat], Attack]] = [lambda threat: PGD(threat, steps=5)]
    if name in ("hard", "linear"):
        attacks.append(lambda threat: ExpertTransition(threat, steps=4))
    attacked = torch.stack([attack_at(model, x, y, norm, eps, each) for each in attacks])
    towards = uphill(model, x)
    generator = torch.Generator().manual_seed(seed)
    rest = p - len(attacked) - 2 * len(towards)
    normal = torch.randn(rest + len(towards), *x.shape, generator=generator, dtype=torch.float64)
    free, mixed = normal.split([rest, len(towards)])
    corners = torch.where(torch.arange(rest).view(-1, 1, 1, 1, 1) % 2 == 0, free.sign(), free)
    if norm == "linf":
        towards = towards.sign()
    steps = torch.cat([towards, towards + 0.5 * mixed, corners])
    points = torch.cat([attacked, clipped(x, steps, norm, eps)])
    assert inside(points, x, norm, eps)
    return Case(model, Ball(x, norm, eps), y, points)


def attack_at(
    model: RoutedModel, x: Tensor, y: Tensor, norm: str, eps: Tensor, attack: Callable[[Threat], Attack]
) -> Tensor:
    out = x.clone()
    for size in eps.unique().tolist():
        here = eps == size
        out[here] = attack(Threat(norm, size))(model, x[here], y[here])
    return out


def inside(points: Tensor, x: Tensor, norm: str, eps: Tensor) -> bool:
    size = torch.linalg.vector_norm((points - x).flatten(2), ord=torch.inf if norm == "linf" else 2, dim=2)
    return bool((size <= eps * (1 + 1e-6)).all() and (points >= 0).all() and (points <= 1).all())


@torch.no_grad()
def answers(case: Case) -> Tensor:
    """(p, n, c) the model's logits at every point."""
    return case.model(case.points.flatten(0, 1)).unflatten(0, case.points.shape[:2])


def violated(proven: Tensor, case: Case, z: Tensor) -> Tensor:
    """(n,) certified, and a point has another prediction."""
    return proven & (z.argmax(2) != case.y).any(0)


def worst_of(case: Case, how: Bounding, space: str = "sign") -> Worst:
    with torch.no_grad():
        return worst_margins(case.model.parts(), case.ball, case.y, how, space=space)


def test_the_points_below_are_more_than_100_000() -> None:
    assert len(MODELS) * len(NORMS) * IMAGES * POINTS >= 100_000


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_point_of_a_certified_ball_has_another_prediction(name: str, norm: str) -> None:
    case = make_case(name, norm)
    assert case.points.shape[:2] == (POINTS, IMAGES)
    assert ((case.points == 0) | (case.points == 1)).any()  # the box is in the way of some
    z = answers(case)
    shares = {}
    for how in HOWS:
        proven = worst_of(case, how).proven(case.y)
        assert not violated(proven, case, z).any()
        shares[how] = float(proven.double().mean())
    assert 0.1 < shares["crown"] < 0.9
    assert shares["ibp"] <= shares["crown_ibp"]
    for space, values in (("logits", z), ("probabilities", torch.softmax(z, 2))):
        if not (space == "logits" and has_no_logits(name)):
            margins = values.gather(2, case.y.expand(POINTS, -1)[..., None]) - values
            found = worst_of(case, "crown_ibp", space)
            assert not violated(found.proven(case.y), case, z).any()
            assert (found.lower <= margins.amin(0) + 1e-9).all(), space
            assert (found.upper >= margins.amax(0) - 1e-9).all(), space


def has_no_logits(name: str) -> bool:
    """Whether the model's logits are those of a mixture of probabilities, of which no bounds are known."""
    return "probabilities" in name or (name.startswith("dual") and name != "dual_logits")
