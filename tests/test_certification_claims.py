"""Certificates are sound: no sampled or attacked point of a certified ball has another prediction, for models of every
kind; and naive rules, held against the same points, are caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from closed_forms import soft_radius
from robustmoe.attacks import PGD, Threat, linf
from robustmoe.certification import Ball, Bounding, Bounds, Worst, rules, worst_margins
from robustmoe.certification.margins import others
from robustmoe.certification.routes import exact_margin
from robustmoe.models import EnsembleModel, Normalise, RoutedModel, build_model
from robustmoe.models.parts import Fork, Mixed, Part
from robustmoe.models.small import LinearNetwork
from robustmoe.noise import Noise
from tiny_models import in_turn

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
    "soft_linear": f"ensemble({LINEAR}, gate=soft)",
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
POINTS = 96
DEAR = ("pathway", "stages", "own_norms")
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
        if name == "dual_logits":
            louder(model.standard, 12.0)
    return model.eval()


def louder(half: EnsembleModel, scale: float) -> None:
    """The same predictions, from logits times ``scale``."""
    for expert in half.experts:
        expert.head.weight *= scale
        expert.head.bias *= scale


def level(model: EnsembleModel, x: Tensor) -> None:
    """Mean 0 and deviation 1 of each expert's logits; where several are mixed by rank, they differ by half of what they
    would (of experts that agree on nothing no mixture of any two can be certified). A soft router is 5 times as steep.
    """
    if model.gate == "soft":
        model.router.norm.running_var /= 25
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


def first(case: Case, n: int) -> Case:
    return Case(case.model, case.ball[:n], case.y[:n], case.points[:, :n])


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
    elif isinstance(part, Mixed):
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


def images_of(name: str) -> int:
    return 12 if name in DEAR else 64


def make_case(name: str, norm: str, seed: int = 0) -> Case:
    """POINTS points an image: random ones and corners, steepest steps towards classes and experts, the same with noise,
    and PGD.
    """
    n, p = images_of(name), POINTS
    model, x = lively(name, seed), random_images(n, 7 + seed)
    y = model(x).argmax(1)
    sizes = torch.tensor([0.001, 0.005, 0.02, 0.1], dtype=torch.float64) * (1.0 if norm == "linf" else 3.0)
    eps = sizes[torch.arange(n) % 4]
    attacked = attack_at(model, x, y, norm, eps)[None]
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


def attack_at(model: RoutedModel, x: Tensor, y: Tensor, norm: str, eps: Tensor) -> Tensor:
    """PGD, size by size."""
    out = x.clone()
    for size in eps.unique().tolist():
        here = eps == size
        out[here] = PGD(Threat(norm, size), steps=5)(model, x[here], y[here])
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


def worst_of(case: Case, how: Bounding, space: str = "sign", region_steps: int = 0) -> Worst:
    with torch.no_grad():
        return worst_margins(case.model.parts(), case.ball, case.y, how, space=space, region_steps=region_steps)


MEETINGS = [*in_turn(sorted(MODELS), NORMS), ("hard", "l2"), ("soft", "l2"), ("pathway", "linf"), ("dual", "l2")]
"""Every model in one norm, in turn, and one of each kind in both: a norm is known to a bound's first step alone."""


def test_the_points_below_are_more_than_100_000() -> None:
    assert len(set(MEETINGS)) == len(MODELS) + 4
    assert POINTS * sum(images_of(name) for name, _ in MEETINGS) >= 100_000


@pytest.mark.parametrize("name, norm", MEETINGS)
def test_no_point_of_a_certified_ball_has_another_prediction(name: str, norm: str) -> None:
    case = make_case(name, norm)
    assert case.points.shape[:2] == (POINTS, images_of(name))
    assert ((case.points == 0) | (case.points == 1)).any()  # the box is in the way of some
    z = answers(case)
    shares = {}
    for how in HOWS:
        proven = worst_of(case, how, region_steps=10 if how == "crown_ibp" and name not in DEAR else 0).proven(case.y)
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


# ------------------------------------------------------------------------------------------------ rules that are wrong


def chosen_only(case: Case) -> Tensor:
    """The naive certificate of a hard router: of the expert that the image goes to."""
    fork = case.model.parts()
    assert isinstance(fork, Fork)
    choice = fork.router(case.ball.x).argmax(1)
    each = [worst_margins(leaf, case.ball, case.y, "crown").proven(case.y) for leaf in fork.branches]
    return torch.stack(each, 1)[torch.arange(len(choice)), choice]


def frozen_weights(case: Case) -> Tensor:
    """The naive certificate of a soft router: the experts' bounds, weighed as at the image."""
    fork = case.model.parts()
    assert isinstance(fork, Fork)
    weight = torch.softmax(fork.router(case.ball.x), 1)
    each = [worst_margins(leaf, case.ball, case.y, "crown", space="logits").lower for leaf in fork.branches]
    mixed = (weight[:, :, None] * torch.stack(each, 1)).sum(1)
    return others(mixed, case.y).amin(1) > 0


def blind_threshold(case: Case) -> Tensor:
    """CERT-7's threshold for a blend of logits, which has none: as if the standard half's margin were at most 1."""
    part = case.model.parts()
    assert isinstance(part, Mixed)
    robust = worst_margins(part.robust, case.ball, case.y, "crown", space="logits").lower
    return others(robust, case.y).amin(1) > rules.threshold(part.alpha[0])


@pytest.mark.parametrize(
    "name, rule, seed",
    [
        ("hard", chosen_only, 0),
        ("linear", chosen_only, 0),
        ("soft_linear", frozen_weights, 0),
        ("dual_logits", blind_threshold, 1),
    ],
)
def test_naive_rules_are_caught_by_the_same_points(name: str, rule: Callable[[Case], Tensor], seed: int) -> None:
    case = make_case(name, "linf", seed=seed)
    z = answers(case)
    with torch.no_grad():
        assert violated(rule(case), case, z).any()
    assert not violated(worst_of(case, "crown").proven(case.y), case, z).any()


# ------------------------------------------------------------------------------------------------ closed forms


def hand_made(router: Tensor, experts: list[tuple[Tensor, Tensor]], gate: str = "hard") -> EnsembleModel:
    """Linear experts (weight, bias) and a router on one-channel pixels, which are normalised to (x - 0.5) / 1."""

    def linear(weight: Tensor, bias: Tensor) -> LinearNetwork:
        made = LinearNetwork(weight.shape[1], len(weight))
        with torch.no_grad():
            made.head.weight.copy_(weight)
            made.head.bias.copy_(bias)
        return made

    networks: list[nn.Module] = [linear(*each) for each in experts]
    normalise = Normalise((0.5,), (1.0,))
    model = EnsembleModel(linear(router, torch.zeros(len(router))), networks, gate, 1, "logits", normalise)
    return model.eval()


def certified(model: RoutedModel, x: Tensor, certifier: Bounds) -> list:
    return certifier(model, x, Noise.of(torch.arange(len(x))))


@pytest.mark.parametrize("norm", NORMS)
def test_two_constant_experts_get_no_radius_above_the_way_to_the_boundary(norm: str) -> None:
    """CERT-6: the experts say (1, 0) and (0, 1) whatever they see; the router (x, -x). Every slope is 0, the radius
    |x|."""
    flat = torch.zeros(2, 1)
    model = hand_made(
        torch.tensor([[1.0], [-1.0]]), [(flat, torch.tensor([1.0, 0.0])), (flat, torch.tensor([0.0, 1.0]))]
    )
    x = torch.linspace(0.005, 0.995, 24).view(-1, 1, 1, 1)
    way = (x.flatten() - 0.5).abs().tolist()
    for how, eps in (("ibp", 0.02), ("crown", 0.3)):
        found = certified(model, x, Bounds(Threat(norm, eps), how, search=8))
        assert all(one.radius <= far for one, far in zip(found, way))
        # all of it up to twice eps, but for the search's last step and the slack of 1e-6
        assert all(one.radius >= min(far, 2 * eps) - 2 * eps * 2**-7 - 1e-5 for one, far in zip(found, way))
        assert [one.prediction for one in found] == [0 if pixel > 0.5 else 1 for pixel in x.flatten().tolist()]


def test_per_class_constants_claim_twice_the_true_radius_and_constants_of_the_margin_do_not() -> None:
    """z = (x, -x) at x = 0.1, one expert: the true radius is 0.1. Eq. (8) with the constant of one class's probability,
    1/2, claims tanh(0.1) / (1/2).
    """
    margin = torch.tensor([[0.0, 0.1]], dtype=torch.float64).tanh()  # p_0 - p_1 = tanh(x)
    per_class = float(margin[0, 1]) / 0.5  # |d sigmoid(2 x) / dx| <= 1/2
    slope = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # |d tanh(x) / dx| <= 1
    ours = float(soft_radius(margin, torch.zeros_like(margin), slope, 0.0))
    assert per_class == pytest.approx(0.1993, abs=1e-4)
    assert ours == pytest.approx(0.0997, abs=1e-4)
    assert ours <= 0.1 < per_class
    model = hand_made(torch.zeros(1, 1), [(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))])
    (found,) = certified(model, torch.full((1, 1, 1, 1), 0.6), Bounds(linf(0.1), search=12))
    assert 0.0999 < found.radius <= 0.1
    assert model(torch.full((1, 1, 1, 1), 0.6 - 0.15)).argmax() == 1  # inside of what Eq. (8) claims


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.2])
def test_certificate_below_exact_below_attack_on_linear_mixtures(eps: float) -> None:
    """CERT-12: the linear programme over each expert's region. Where one expert alone is reached the certificate is
    exact."""
    case = first(make_case("linear", "linf"), 24)
    x, y = case.ball.x, case.y
    ball = Ball(x, "linf", torch.full_like(case.ball.eps, eps))
    exact = exact_margin(case.model, x, y, linf(eps))
    worst = worst_margins(case.model.parts(), ball, y, "crown", space="logits")
    ours = others(worst.lower, y).amin(1).detach()
    assert (ours <= exact + 1e-7).all()
    alone = worst.reached.sum(1) == 1
    torch.testing.assert_close(ours[alone], exact[alone], rtol=0, atol=1e-7)
    steps = torch.cat([uphill(case.model, x).sign(), torch.randn(200, *x.shape, dtype=torch.float64).sign()])
    z = answers(case._replace(points=clipped(x, steps, "linf", ball.eps)))
    label = y.expand(len(z), -1)[..., None]
    attacked = (z.gather(2, label) - z).scatter(2, label, torch.inf)
    assert (exact <= attacked.amin((0, 2)) + 1e-7).all()
    assert not ((exact > 0) & (z.argmax(2) != y).any(0)).any()
    assert alone.any() or eps > 0.1
    # CERT-11: where every point is right, so is every expert in the part of the ball that is its own
    fork = case.model.parts()
    assert isinstance(fork, Fork)
    flat = clipped(x, steps, "linf", ball.eps).flatten(0, 1)
    owner = fork.router(flat).argmax(1).view(-1, len(x))
    said = torch.stack([leaf.network(flat).argmax(1).view(-1, len(x)) for leaf in fork.branches], 2)
    right = torch.stack([((said[..., i] == y) | (owner != i)).all(0) for i in range(3)], 1).all(1)
    assert (ours > 0).sum() <= (exact > 0).sum() <= right.sum()
    assert right[exact > 0].all()


# ------------------------------------------------------------------------------------------------ radii and limits


@pytest.mark.parametrize("how", ["ibp", "crown"])
def test_every_radius_that_is_claimed_verifies_on_its_own(how: Bounding) -> None:
    model, x = lively("hard"), random_images(12, 3)
    found = certified(model, x, Bounds(linf(0.02), how, search=5))
    assert len({one.radius for one in found}) > 4
    for n, one in enumerate(found):
        if one.radius > 0:
            (again,) = certified(model, x[n : n + 1], Bounds(linf(one.radius), how, search=0))
            assert again.radius == one.radius
            assert again.prediction == one.prediction
            assert not again.reason


def test_what_is_told_of_routes_and_reasons_is_of_eps_not_of_the_last_radius_of_the_search() -> None:
    model, x = lively("hard"), random_images(12, 3)
    asked, searched = (certified(model, x, Bounds(linf(0.02), "ibp", search=search)) for search in (0, 5))
    assert [one[3:] for one in searched] == [one[3:] for one in asked]
    assert {one.reachable for one in asked} == {1, 2}
    smaller = [one for one in searched if 0 < one.radius < 0.02]
    assert smaller
    assert all("not proven to say" in one.reason for one in smaller)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["hard", "soft", "dual", "top_2"])
def test_intervals_never_certify_more_in_a_larger_ball(name: str, norm: str) -> None:
    """CROWN may: its lines change with the ball. Hence the search claims only what it verified."""
    model, x = lively(name), random_images(16, 3)
    y = model(x).argmax(1)
    sizes = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    with torch.no_grad():
        lower = [
            worst_margins(model.parts(), Ball(x, norm, torch.full_like(x[:, 0, 0, 0], eps)), y, "ibp").lower
            for eps in sizes
        ]
    for small, large in pairwise(lower):
        assert (large <= small + 1e-7).all()  # the l2 ball's search for a price is not exact
    assert (lower[0] > lower[-1]).any()


def test_a_mixture_of_one_expert_is_that_expert() -> None:
    model = lively("ensemble(small_cnn(width=2), experts=1, router=linear, gate=soft, standardise=True)")
    x = random_images(8, 3)
    alone = build_model("small_cnn(width=2)", CLASSES, SHAPE).double()
    alone.network.load_state_dict(model.experts[0].state_dict())
    for certifier in (Bounds(linf(0.01), search=4), Bounds(Threat("l2", 0.05), "crown", search=4)):
        found, single = certified(model, x, certifier), certified(alone, x, certifier)
        assert [one.radius for one in found] == [one.radius for one in single]
        assert {one.reachable for one in found} == {1}
    assert any(one.radius > 0 for one in found)


def test_alpha_1_and_0_are_the_halves_and_alpha_a_half_certifies_nothing_by_the_robust_one_alone() -> None:
    """C5 and C7; and C8: however loud the standard half is, what CERT-7 certifies stays."""
    model, x = lively("dual"), random_images(32, 3)
    certifier = Bounds(linf(0.005), search=0)
    assert certified(model.at(1.0), x, certifier) == certified(model.robust, x, certifier)
    assert certified(model.at(0.0), x, certifier) == certified(model.standard, x, certifier)
    assert all(one.rule != "robust half alone" for one in certified(model.at(0.5), x, certifier))
    for expert in model.robust.experts:  # probability margins near 1
        with torch.no_grad():
            expert.head.weight *= 20
            expert.head.bias *= 20
    before = certified(model.at(0.7), x, certifier)
    with torch.no_grad():
        for expert in model.standard.experts:
            expert.head.weight *= -100
            expert.head.bias *= -100
    after = certified(model.at(0.7), x, certifier)
    by_robust = [n for n, one in enumerate(before) if one.rule == "robust half alone"]
    assert len(by_robust) >= 5
    assert [after[n][:3] for n in by_robust] == [before[n][:3] for n in by_robust]  # prediction, radius, rule


def test_a_dual_is_as_right_under_attack_as_the_share_certified_to_be() -> None:
    """C18, with labels of which some are wrong."""
    case = make_case("dual", "linf")
    labels = torch.where(torch.arange(len(case.y)) % 5 == 0, (case.y + 1) % CLASSES, case.y)
    held = (answers(case).argmax(2) == labels).all(0)
    proven = worst_of(case, "crown_ibp").proven(case.y) & (case.y == labels)
    assert 0.1 < float(proven.double().mean()) <= float(held.double().mean()) < 0.9
    assert held[proven].all()
