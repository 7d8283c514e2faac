"""Lipschitz constants over balls, and the certificates made of them: Theorem 5.4 with constants of margins, and
CERT-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from closed_forms import margin_slopes
from robustmoe import UserError
from robustmoe.attacks.threat import Norm, Threat
from robustmoe.certification import Ball, Bounded, Bounds, Certificate, build_certifier
from robustmoe.certification.graph import record
from robustmoe.certification.slopes import lipschitz, pair_slopes, steepness
from robustmoe.certification.theorem import Local, SoftLipschitz, Theorem54, softmax
from robustmoe.models import RoutedModel
from robustmoe.models.parts import Fork, Leaf, Mixed, Part
from robustmoe.noise import Noise
from robustmoe.routing import Tape

NORMS: tuple[Norm, ...] = ("linf", "l2")
DUAL = {"linf": 1, "l2": 2}


def net(seed: int, pixels: int = 4, classes: int = 3, hidden: int = 6, size: float = 0.7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes)).double()
    for weight in made.parameters():
        weight.data = size * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return made


class Of(RoutedModel):
    """A model from its parts: soft mixtures of logits or probabilities, and duals of these."""

    def __init__(self, part: Part, *modules: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.held = nn.ModuleList(modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Of:
        return self  # the networks are in float64 already

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return answer(self.part, x.double())

    def parts(self) -> Part:
        return self.part


def answer(part: Part, x: Tensor) -> Tensor:
    """What the parts mean, written down a second time, for soft routers."""
    if isinstance(part, Leaf):
        return part.network(x)
    if isinstance(part, Mixed):
        standard, robust = (torch.softmax(answer(half, x), 1) for half in (part.standard, part.robust))
        return ((1 - part.alpha[0]) * standard + part.alpha[0] * robust).log()
    outputs = torch.stack([answer(branch, x) for branch in part.branches], 1)
    weight = torch.softmax(part.router(x), 1)[:, :, None]
    if part.mix == "logits":
        return (weight * outputs).sum(1)
    return (weight * torch.softmax(outputs, 2)).sum(1).log()


def soft_moe(seed: int, mix: str, experts: int = 3) -> Of:
    made = [net(10 * seed + i) for i in range(experts)]
    router = net(10 * seed + 9, classes=experts, size=0.3)
    fork = Fork("router", router, tuple(Leaf(one) for one in made), experts, "softmax", cast(Any, mix))
    return Of(fork, *made, router)


def draws(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def around(x: Tensor, norm: Norm, eps: Tensor, points: int) -> Tensor:
    """(points, n, ...) images of the ball inside the box, its rim among them."""
    generator = torch.Generator().manual_seed(5)
    step = torch.randn(points, *x.shape, dtype=x.dtype, generator=generator)
    if norm == "linf":
        step = torch.where(torch.rand(points, 1, 1, 1, 1, generator=generator) < 0.5, step.sign(), step.clamp(-1, 1))
    else:
        step = step / step.flatten(2).norm(dim=2)[..., None, None, None]
    return (x + eps.view(-1, 1, 1, 1) * step).clamp(0, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_constants_of_an_affine_network_are_its_dual_norms(norm: Norm) -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 2.0], [0.0, 0.0]], dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).double()
    network[1].weight.data = weight
    ball = Ball(draws(2, 1, 1, 2), norm, torch.full((2,), 0.1, dtype=torch.float64))
    rows = weight[0] - weight  # 0; (0.5, -4); (1, -2)
    expected = {"linf": [0.0, 4.5, 3.0], "l2": [0.0, 16.25**0.5, 5.0**0.5]}[norm]
    found = margin_slopes(network, ball, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(found, torch.tensor([expected] * 2, dtype=torch.float64))
    torch.testing.assert_close(found[0], rows.norm(p=DUAL[norm], dim=1))
    pairs = pair_slopes(Bounded(record(network, ball.x), ball))
    torch.testing.assert_close(pairs, torch.cdist(weight, weight, p=DUAL[norm]).expand(2, 3, 3))
    torch.testing.assert_close(steepness(network, ball), pairs.amax(2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 3)
    ),
    "smooth": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "tanh gelu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.GELU("tanh"), nn.Linear(6, 3), nn.Sigmoid()),
    "norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((0.5 - torch.relu(self.inner(x)) + torch.cat([x[:, 1:], -x[:, :1]], 1)).flatten(1))


NETWORKS["residual"] = Residual


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_and_no_secant_in_the_ball_is_above_the_constant(name: str, norm: Norm) -> None:
    network = NETWORKS[name]().double().eval()
    x = draws(3, 2, 4, 4)
    eps = torch.tensor([0.02, 0.1, 0.4], dtype=torch.float64)
    rows = torch.tensor([[1.0, -1.0, 0.0], [0.3, 0.5, 1.0]], dtype=torch.float64)[:, None].expand(-1, 3, -1)
    found = lipschitz(Bounded(record(network, x), Ball(x, norm, eps)), rows).detach()
    points = around(x, norm, eps, 200).requires_grad_()
    values = torch.einsum("pnc,snc->spn", network(points.flatten(0, 1)).unflatten(0, (200, 3)), rows)
    for row, value in enumerate(values):
        (slope,) = torch.autograd.grad(value.sum(), points, retain_graph=True)
        largest = slope.flatten(2).norm(p=DUAL[norm], dim=2).amax(0)
        assert (largest <= found[row] * (1 + 1e-9)).all()
        assert (found[row, 0] <= 8 * largest[0]).all()  # a bound, not just any large number
        at, size = points.detach().flatten(2), {"linf": torch.inf, "l2": 2}[norm]
        apart = (at[1:] - at[:-1]).norm(p=size, dim=2)
        assert ((value[1:] - value[:-1]).abs() <= found[row] * apart * (1 + 1e-9)).all()


def test_constants_grow_with_the_ball_and_do_not_look_at_the_batch() -> None:
    network, x = net(1), draws(4, 1, 2, 2)
    y = torch.tensor([0, 1, 2, 0])
    small, large = (
        margin_slopes(network, Ball(x, "linf", torch.full((4,), eps, dtype=x.dtype)), y, "ibp") for eps in (0.01, 0.5)
    )
    assert (small <= large + 1e-12).all()
    assert (small < large - 1e-3).any()
    alone = margin_slopes(network, Ball(x[2:3], "linf", torch.full((1,), 0.5, dtype=x.dtype)), y[2:3], "ibp")
    torch.testing.assert_close(alone[0], large[2])


def test_softmax_halves_the_largest_change_of_a_difference_of_logits() -> None:
    """Against finite changes in every direction: p_a - p_b never moves by more, and one case moves by all of it."""
    generator = torch.Generator().manual_seed(0)
    before = 2 * torch.randn(3000, 4, dtype=torch.float64, generator=generator)
    step = torch.randn(3000, 4, dtype=torch.float64, generator=generator)
    change = (step[:, :, None] - step[:, None, :]).abs()
    bound = softmax(Local(before, change), 1.5)
    after = torch.softmax(1.5 * (before + step), 1)
    torch.testing.assert_close(bound.value, torch.softmax(1.5 * before, 1))
    moved = after - bound.value
    assert ((moved[:, :, None] - moved[:, None, :]).abs() <= bound.slope + 1e-12).all()
    two = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64)  # p_0 - p_1 = tanh(z_0), of slope 1 at 0
    slope = softmax(Local(0 * two, (two[:, :, None] - two[:, None, :]).abs())).slope
    torch.testing.assert_close(slope[0, 0, 1], torch.tanh(two[0, 0]))


def certify(spec: str | Bounds | Theorem54 | SoftLipschitz, model: RoutedModel, x: Tensor) -> list[Certificate]:
    return build_certifier(spec)(model, x.float(), Noise.of(torch.arange(len(x))))


def test_the_toy_whose_constants_of_classes_claim_twice_the_true_radius() -> None:
    """z = (x, -x) at x = 0.1 (pixel 0.6, less 0.5): the margin of probabilities is tanh 0.1, and vanishes at distance
    0.1. Of one class p_y = (1 + tanh x) / 2 the constant is 1/2: 2 tanh 0.1 = 0.199 would be claimed.
    """
    layer = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double()
    layer[1].weight.data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    layer[1].bias.data = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    fork = Fork("router", lambda x: 0 * x.flatten(1), (Leaf(layer),), 1, "softmax", "probabilities")
    x = torch.full((1, 1, 1, 1), 0.6)
    for norm in ("linf", "l2"):
        (found,) = certify(f"theorem_5_4({norm}(0.2), search=12)", Of(fork, layer), x)
        assert found.radius == pytest.approx(float(torch.tanh(torch.tensor(0.1))), rel=1e-4)
        assert found.radius <= 0.1
        assert found.rule == "Theorem 5.4"
        assert "0.0997" in found.reason
    logits = Fork("router", fork.router, fork.branches, 1, "softmax", "logits")
    (found,) = certify("theorem_5_4(linf(0.2), search=12)", Of(logits, layer), x)
    assert found.radius == pytest.approx(0.1, rel=1e-4)  # margin 2x over its constant 2


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_sampled_image_within_the_radius_changes_the_prediction(mix: str, norm: Norm) -> None:
    claimed, x = 0, draws(8, 1, 2, 2)
    for seed in range(3):
        model = soft_moe(seed, mix)
        for kind in (Theorem54, SoftLipschitz):
            found = certify(kind(Threat(norm, 0.3), search=4), model, x)
            radius = torch.tensor([one.radius for one in found], dtype=x.dtype)
            points = around(x.float().double(), norm, radius, 400)
            labels = model(points.flatten(0, 1)).argmax(1).view(400, 8)
            assert (labels == torch.tensor([one.prediction for one in found])).all()
            claimed += int((radius > 0.01).sum())
    assert claimed >= 10


@pytest.mark.parametrize("kind", [Theorem54, SoftLipschitz])
def test_duals_by_the_robust_half_alone(kind: type[Theorem54]) -> None:
    """Theorem 5.5's form: whatever the standard half is, here one that is as wrong as it can be."""
    robust = soft_moe(2, "logits")
    x = draws(30, 1, 2, 2)
    wrong = nn.Module()
    wrong.forward = lambda at: -50 * answer(robust.part, at)  # type: ignore[method-assign]
    model = Of(Mixed(Leaf(wrong), robust.part, (0.9, 0.9), "probabilities"), robust)
    found = certify(kind(Threat("linf", 0.1), search=3), model, x)
    radius = torch.tensor([one.radius for one in found], dtype=x.dtype)
    assert (radius > 0).any()
    points = around(x.float().double(), "linf", radius, 300)
    labels = model(points.flatten(0, 1)).argmax(1).view(300, -1)
    assert (labels == torch.tensor([one.prediction for one in found])).all()
    names = {one.rule for one in found if one.radius > 0}
    assert names == ({"Theorem 5.5"} if kind is Theorem54 else {"soft Lipschitz, robust half alone"})
    half = Of(Mixed(Leaf(wrong), robust.part, (0.5, 0.5), "probabilities"), robust)
    assert all(one.radius == 0 for one in certify(kind(Threat("linf", 0.1), search=0), half, x))  # threshold 1


def test_experts_that_agree_make_the_router_free_for_p5_alone() -> None:
    one, router = net(0), net(9, classes=2)
    fork = Fork("router", router, (Leaf(one), Leaf(one)), 2, "softmax", "logits")
    x, threat = draws(6, 1, 2, 2), Threat("linf", 0.5)
    alone, agreed, paper = (
        [found.radius for found in certify(kind(threat, search=5), model, x)]
        for kind, model in (
            (SoftLipschitz, Of(Leaf(one), one)),
            (SoftLipschitz, Of(fork, one, router)),
            (Theorem54, Of(fork, one, router)),
        )
    )
    assert agreed == pytest.approx(alone)
    assert all(p < a for p, a in zip(paper, alone))


def test_bounds_certify_more_than_constants_on_average() -> None:
    counts: dict[str, int] = {}
    x = draws(20, 1, 2, 2)
    for seed in range(6):
        model = soft_moe(seed, "logits")
        for spec in ("bounds", "soft_lipschitz", "theorem_5_4"):
            found = certify(f"{spec}(linf(0.05), search=0)", model, x)
            counts[spec] = counts.get(spec, 0) + sum(one.radius >= 0.05 for one in found)
    assert counts["bounds"] >= max(counts["soft_lipschitz"], counts["theorem_5_4"])
    assert min(counts.values()) > 0


@pytest.mark.parametrize("name", ["ensemble_hard", "ensemble_k2", "pathway"])
def test_hard_and_top_k_routers_are_refused_in_one_line(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    for spec in ("theorem_5_4(linf(1/255))", "soft_lipschitz(l2(0.1))"):
        with pytest.raises(UserError, match=r"its weights jump \(CERT-6\)\. Use bounds") as error:
            certify(spec, tiny(name), images(1))
        assert "\n" not in str(error.value)


def test_a_dual_of_logits_is_refused(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    soft = "ensemble(small_cnn(width=4), experts=2, gate=soft, router=small_cnn(width=4))"
    with pytest.raises(UserError, match="mixes logits"):
        certify("theorem_5_4(linf(1/255))", tiny(f"dual({soft}, {soft}, mix=logits)"), images(1))


def test_a_soft_ensemble_of_convolutions(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """The library's own model: certified radii are no larger than those that bounds verify."""
    model, x = tiny("ensemble_soft"), images(4)
    found, bounds = (
        certify(f"{spec}(linf(8/255), how=crown, up=8, search=7)", model, x) for spec in ("theorem_5_4", "bounds")
    )
    assert all(one.reachable == 3 and one.stable == 1.0 for one in found)
    assert any(one.radius > 0 for one in found)
    for one, other in zip(found, bounds, strict=True):
        assert one.prediction == other.prediction
        assert one.radius <= other.radius * (1 + 2**-3) or other.radius >= 0.99 * 8 * 8 / 255
