"""How far a route is: closed forms of a linear router, an exact linear program, brute force, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from robustmoe.attacks import PGD, Threat, l1, l2, linf, router_only
from robustmoe.attacks.routes import router_logits
from robustmoe.attacks.routes.reach import reachable, route_radius
from robustmoe.attacks.threat import Norm
from robustmoe.data.sets import digits
from robustmoe.models import RoutedModel, build_model
from robustmoe.routing import Tape, top_k
from robustmoe.training.auxiliary import auxiliary
from robustmoe.training.rt_er import unstable

SHAPE = (3, 4, 4)
MEAN, STD = (0.5, 0.25, 0.375), (0.25, 0.5, 0.125)  # exact in float32, in which a model keeps them
ORDER: dict[Norm, float] = {"linf": 1.0, "l2": 2.0, "l1": np.inf}
"""The dual norm's order: how a linear function grows in the ball."""


def linear_router(seed: int, experts: int = 4, k: int = 1, router: str = "linear") -> RoutedModel:
    spec = f"ensemble(linear, experts={experts}, k={k}, gate=hard, router={router})"
    return build_model(spec, 3, SHAPE, MEAN, STD, seed=seed).double()


def rows_of(model: RoutedModel) -> tuple[np.ndarray, np.ndarray]:
    """The router as W x + b on pixels, the normalisation folded in: W (e, d), b (e,)."""
    weight, bias = (p.detach().numpy() for p in (model.router.head.weight, model.router.head.bias))
    std, mean = (np.repeat(values, SHAPE[1] * SHAPE[2]) for values in (STD, MEAN))
    return weight / std, bias - (weight * (mean / std)).sum(1)


def pixels(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------------------------ a linear router


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_radius_of_a_linear_router_in_closed_form(norm: Norm, k: int) -> None:
    """(weakest chosen - best other) / dual norm of the difference of their rows, one image at a time in numpy."""
    model, x = linear_router(3, k=k), pixels(12)
    weight, bias = rows_of(model)
    found = route_radius(model, x, norm)["router"]
    for image, radius in zip(x.flatten(1).numpy(), found.tolist()):
        scores = weight @ image + bias
        order = np.argsort(-scores)
        chosen, rival = order[k - 1], order[k]
        expected = (scores[chosen] - scores[rival]) / np.linalg.norm(weight[chosen] - weight[rival], ORDER[norm])
        assert radius == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_route_holds_to_its_radius_and_moves_beyond(norm: Norm) -> None:
    """The nearest point of the boundary to the next expert is along the dual direction. 0.999 of the way the pair is
    in its old order, at 1.001 it is not; there the route has moved.
    """
    model, x = linear_router(3), pixels(12)
    weight, _ = rows_of(model)
    radius = route_radius(model, x, norm)["router"]
    clean = router_logits(model, x)["router"][:, 0]
    best = clean.topk(2).indices
    normal = torch.from_numpy(weight)[best[:, 1]] - torch.from_numpy(weight)[best[:, 0]]
    step = normal.sign() if norm == "linf" else normal / normal.norm(dim=1, keepdim=True)
    for factor, moved in ((0.999, False), (1.001, True)):
        there = x + (factor * radius[:, None] * step).view_as(x)
        logits = router_logits(model, there)["router"][:, 0]
        gap = logits.gather(1, best[:, :1]) - logits.gather(1, best[:, 1:])
        assert bool(((gap < 0) == moved).all())
        if moved:
            assert bool((logits.argmax(1) != best[:, 0]).all())


def reaches(weight: np.ndarray, scores: np.ndarray, expert: int, threat: Threat) -> bool:
    """Whether a linear router can come to choose the expert in the ball (without the box), exactly: the largest lead t
    with (w_i - w_k) d + s_i - s_k >= t for all k, as a linear program; d of the l1 ball is split in two.
    """
    others = np.delete(np.arange(len(scores)), expert)
    slopes, gaps = weight[expert] - weight[others], scores[expert] - scores[others]
    pixels = weight.shape[1]
    if threat.norm == "linf":
        left, bounds = -slopes, [(-threat.eps, threat.eps)] * pixels
    else:
        left, bounds = np.hstack([-slopes, slopes]), [(0.0, None)] * (2 * pixels)
    left, right = np.hstack([left, np.ones((len(others), 1))]), gaps
    if threat.norm == "l1":
        left = np.vstack([left, np.append(np.ones(2 * pixels), 0.0)])
        right = np.append(right, threat.eps)
    goal = np.append(np.zeros(left.shape[1] - 1), -1.0)
    solved = linprog(goal, left, right, bounds=[*bounds, (None, None)])
    assert solved.status == 0
    return -solved.fun >= 0


@pytest.mark.parametrize("threat, share", [(linf(0.015), 0.95), (l1(0.4), 0.9)])
def test_pair_by_pair_contains_the_exact_set_and_seldom_more(threat: Threat, share: float) -> None:
    """Always a superset; in linf equal on more than 95 % of images. In l1, whose ball has fewer directions to go in at
    once, a little less often (92.5 % here).
    """
    found, exact = [], []
    for seed in range(4):
        model, x = linear_router(seed), pixels(10)
        weight, bias = rows_of(model)
        found.append(reachable(model, x, threat)["router"].numpy())
        scores = x.flatten(1).numpy() @ weight.T + bias
        best = scores.argmax(1)
        exact.append([[k == i or reaches(weight, one, k, threat) for k in range(4)] for one, i in zip(scores, best)])
    ours, true = np.concatenate(found), np.concatenate(exact)
    assert 1.2 < true.sum(1).mean() < 3, "neither the one chosen expert everywhere nor all four"
    assert not (true & ~ours).any()
    assert (true == ours).all(1).mean() > share


def test_of_the_two_best_an_expert_may_be_either() -> None:
    """Top-2: expert i is out of reach where two others are ahead of it all over the ball; by hand, pair by pair."""
    model, x = linear_router(1, k=2), pixels(20)
    weight, bias = rows_of(model)
    found = reachable(model, x, linf(0.01))["router"]
    for image, row in zip(x.flatten(1).numpy(), found.tolist()):
        scores = weight @ image + bias
        for i in range(4):
            ahead = [scores[k] - scores[i] > 0.01 * np.abs(weight[k] - weight[i]).sum() for k in range(4) if k != i]
            assert row[i] == (sum(ahead) < 2)
    assert 2 * len(x) < int(found.sum()) < 4 * len(x)


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    """200 real digits of 8 x 8, in float64, with labels."""
    batch = digits().train.batch(list(range(200)))
    return batch.x.double(), batch.y


def digits_router(seed: int = 0) -> RoutedModel:
    """A linear router standardised by hand on the digits, so that it uses all its experts."""
    return build_model("ensemble(linear, experts=4, gate=hard, router=linear)", 10, (1, 8, 8), seed=seed).double()


@pytest.mark.parametrize("threat", [linf(0.02), l2(0.15)], ids=lambda threat: threat.norm)
def test_the_share_of_routes_that_can_move_is_that_of_a_brute_force_attack(
    threat: Threat, real: tuple[Tensor, Tensor]
) -> None:
    """On real images, without the box: an attack by gradient on each rival's margin, exact for a linear router. An
    attack that has to stay in the box (`PGD`) never moves a route that is out of reach.
    """
    model, (x, y) = digits_router(), real
    clean = router_logits(model, x)["router"][:, 0].argmax(1)
    moved = torch.zeros(len(x), dtype=torch.bool)
    for rival in range(4):
        at = x.clone()
        for _ in range(3):
            at.requires_grad_(True)
            logits = router_logits(model, at)["router"][:, 0]
            margin = logits[:, rival] - logits.gather(1, clean[:, None])[:, 0]
            gradient = torch.autograd.grad(margin.sum(), at)[0]
            delta = at.detach() - x + threat.eps * threat.direction(gradient, at.detach())
            norm = threat.size(delta).clamp(min=1e-12)[:, None, None, None]  # 0 where the rival is the choice
            inside = delta.clamp(-threat.eps, threat.eps) if threat.norm == "linf" else delta * (threat.eps / norm)
            at = x + inside
        moved |= router_logits(model, at)["router"][:, 0].argmax(1) != clean
    others = reachable(model, x, threat)["router"].scatter(1, clean[:, None], False).any(1)
    assert 0.1 < float(moved.double().mean()) < 0.9
    assert torch.equal(moved, others)
    boxed = PGD(threat, steps=20, objective=router_only())(model, x, y)
    there = router_logits(model, boxed)["router"][:, 0].argmax(1)
    assert not bool(((there != clean) & ~others).any())


# ------------------------------------------------------------------------------------------------ other routers


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radius_has_the_gradient_of_finite_differences(norm: Norm) -> None:
    """In the weights of a small CNN router, in float64, central differences along a random direction of each."""
    model, x = linear_router(2, router="small_cnn(width=4)"), pixels(6)

    def mean() -> Tensor:
        return route_radius(model, x, norm)["router"].mean()

    parameters = list(model.router.parameters())
    gradients = torch.autograd.grad(mean(), parameters, allow_unused=True)
    h = 1e-6
    for parameter, gradient in zip(parameters, gradients):
        assert gradient is not None
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += h * direction
            up = mean().item()
            parameter -= 2 * h * direction
            down = mean().item()
            parameter += h * direction
        slope = float((gradient * direction).sum())
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_where_the_router_is_flat_the_radius_is_huge_and_its_gradient_finite(norm: Norm) -> None:
    model, x = linear_router(2, router="small_cnn(width=4)"), pixels(3)
    with torch.no_grad():
        model.router.conv2.bias.fill_(-100.0)  # every ReLU is off: the logits are the head's bias
    radius = route_radius(model, x, norm)["router"]
    assert bool((radius > 1e6).all())
    gradients = torch.autograd.grad(radius.mean(), list(model.router.parameters()), allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
    assert reachable(model, x, Threat(norm, 0.1))["router"].sum(1).tolist() == [1, 1, 1]


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("an expert ran")


def test_no_expert_runs_and_train_mode_mixes_no_images() -> None:
    """With a BatchNorm behind the router's logits: in train mode too, each image's radius is that of eval mode, and
    neither modes nor running statistics move.
    """
    spec = "ensemble(linear, experts=3, gate=hard, router=linear, standardise=True)"
    model, x = build_model(spec, 3, SHAPE, seed=1).double(), pixels(8)
    model.train()
    model(pixels(64))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.experts = nn.ModuleList(Raises() for _ in range(3))
    model.eval()
    expected = route_radius(model, x, "linf")["router"]
    alone = torch.cat([route_radius(model, x[i : i + 1], "linf")["router"] for i in range(8)])
    torch.testing.assert_close(alone, expected)
    model.train()
    torch.testing.assert_close(route_radius(model, x, "linf")["router"], expected)
    assert reachable(model, x, linf(0.1))["router"].shape == (8, 3)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_both_routers_of_a_dual_model() -> None:
    spec = "dual(ensemble(linear, experts=3, router=linear), ensemble(linear, experts=2, k=2, router=linear))"
    model, x = build_model(spec, 3, SHAPE, seed=1), pixels(4).float()
    within = reachable(model, x, linf(0.1))
    assert {name: tuple(mask.shape) for name, mask in within.items()} == {
        "standard.router": (4, 3),
        "robust.router": (4, 2),
    }
    assert bool(within["robust.router"].all())  # it takes both experts everywhere
    radii = route_radius(model, x, "l2")
    assert sorted(radii) == ["standard.router"]  # the other one leaves no expert out
    assert torch.equal(radii["standard.router"], route_radius(model.standard, x, "l2")["router"])


class Tokens(RoutedModel):
    def body(self, x: Tensor, tape: Tape) -> Tensor:
        means = x.reshape(len(x), 4, -1).mean(-1)
        index = tape("router", top_k(torch.stack([means, 1 - means], -1))).index
        return F.one_hot(index[..., 0], 2).to(x.dtype).sum(1)


def test_a_router_of_tokens_is_refused() -> None:
    message = "router 'router' decides 4 times an image; .* routers of whole images"
    with pytest.raises(ValueError, match=message):
        reachable(Tokens(), pixels(2), linf(0.1))
    with pytest.raises(ValueError, match=message):
        route_radius(Tokens(), pixels(2), "l2")


# ------------------------------------------------------------------------------------------------ training on it


def test_descending_on_unstable_widens_the_margins(real: tuple[Tensor, Tensor]) -> None:
    """200 steps of gradient descent on `unstable` and a balance term, for a linear router of real digits: more images
    whose route is out of every other expert's reach, and no expert left empty.
    """
    model, attack = digits_router().float(), PGD(linf(0.02), steps=1)
    x = real[0].float()

    def alone() -> float:
        return float((reachable(model, x, attack.threat)["router"].sum(1) == 1).float().mean())

    before = alone()
    descent = torch.optim.SGD(model.router.parameters(), lr=0.1)
    for _ in range(200):
        descent.zero_grad()
        loss = unstable(model, x, attack) + auxiliary(model.route(x), 1.0, "switch")
        loss.backward()
        descent.step()
    load = torch.bincount(model.route(x)["router"].index.flatten(), minlength=4) / len(x)
    assert alone() > before + 0.2, (before, alone())
    assert float(load.min()) > 0.05, load.tolist()
