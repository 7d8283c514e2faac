"""Threats: projections against second implementations, steepest steps by duality, random starts by their law."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from robustmoe.attacks import THREATS, Threat, l1, l2, linf, size
from robustmoe.noise import Noise

BALLS = [linf(0.1), linf(8 / 255), l2(0.5), l2(3.0), l1(0.5), l1(12.0)]


def noise(n: int, seed: int = 0) -> Noise:
    return Noise.of(torch.arange(n), seed)


# ------------------------------------------------------------------------------------------------ settings, size


def test_names_make_their_norm() -> None:
    assert {name: make(0.5) for name, make in THREATS.items()} == {name: Threat(name, 0.5) for name in THREATS}


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), 1e30])
def test_eps_is_checked(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must be 0 or more, in pixels of \[0, 1\] \(write 8/255\)"):
        l2(eps)


def test_an_linf_eps_of_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="write 8/255, not 8"):
        linf(8.0)


def test_sizes_by_hand() -> None:
    delta = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    delta[1] *= 0.5
    assert size("linf", delta).tolist() == [4.0, 2.0]
    assert size("l2", delta).tolist() == [5.0, 2.5]
    assert size("l1", delta).tolist() == [7.0, 3.5]
    assert l2(1.0).size(delta).tolist() == [5.0, 2.5]


# ------------------------------------------------------------------------------------------------ projection


def l1_by_root_finding(v: np.ndarray, eps: float, room: float) -> np.ndarray:
    """min ||u - v|| on ||u||_1 <= eps and |u| <= room: soft-threshold and clip, at the level where the norm is eps."""

    def kept(level: float) -> np.ndarray:
        return np.clip(np.abs(v) - level, 0, room)

    if kept(0.0).sum() <= eps:
        return np.sign(v) * kept(0.0)
    level = optimize.brentq(lambda t: kept(t).sum() - eps, 0.0, np.abs(v).max(), xtol=1e-14)
    return np.sign(v) * kept(level)


def reference(threat: Threat, v: np.ndarray) -> np.ndarray:
    if threat.norm == "linf":
        return np.clip(v, -threat.eps, threat.eps)
    if threat.norm == "l2":
        return v * min(1.0, threat.eps / np.linalg.norm(v))
    return l1_by_root_finding(v, threat.eps, room=0.5)


@pytest.mark.parametrize("threat", BALLS, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_projection_equals_a_second_implementation(threat: Threat, spread: float) -> None:
    """Around a grey image: the exact projection onto the ball, then the clip to the box; for l1 onto both at once."""
    delta = torch.randn(6, 3, 5, 5, dtype=torch.float64) * spread
    delta[0, 0, 0, :3] = 0.3  # ties
    x = torch.full_like(delta, 0.5)
    expected = np.stack([reference(threat, d.flatten().numpy()).reshape(3, 5, 5) for d in delta])
    projected = threat.project(x + delta, x)
    torch.testing.assert_close(projected, (x + torch.from_numpy(expected)).clamp(0, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("threat", BALLS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.05, 1.0, 100.0, 1e6, 1e15])
@pytest.mark.parametrize("side", [4, 32])
def test_projected_points_are_in_the_ball_and_the_box_and_stay(threat: Threat, scale: float, side: int) -> None:
    """Any point, in float32, hostile sizes included; x touches the box too."""
    x = torch.rand(4, 3, side, side)
    x[0], x[1] = 0.0, x[1].round()
    x_adv = x + scale * torch.randn_like(x)
    projected = threat.project(x_adv, x)
    slack = 6e-8 * x[0].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[threat.norm]  # half an ulp of a pixel
    assert (threat.size(projected.double() - x.double()) <= threat.eps * (1 + 1e-6) + slack).all()
    assert projected.min() >= 0
    assert projected.max() <= 1
    torch.testing.assert_close(threat.project(projected, x), projected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", BALLS, ids=str)
def test_points_inside_are_left_where_they_are(threat: Threat) -> None:
    x = 0.3 + 0.4 * torch.rand(5, 3, 4, 4)
    delta = torch.randn_like(x)
    delta = delta * (0.9 * min(threat.eps, 0.3) / threat.size(delta))[:, None, None, None]
    torch.testing.assert_close(threat.project(x + delta, x), x + delta, rtol=0, atol=2e-7)


def test_linf_projection_is_the_nearest_point_of_ball_and_box() -> None:
    """Both sets are boxes, so their intersection is one: clip to its sides."""
    x, v = torch.rand(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    expected = torch.minimum(torch.maximum(v, (x - 0.1).clamp(min=0)), (x + 0.1).clamp(max=1))
    torch.testing.assert_close(linf(0.1).project(v, x), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ steepest direction


def test_directions_reach_the_dual_norm() -> None:
    """max <g, d> over the unit ball is ||g||_1 (linf), ||g||_2 (l2), max |g| (l1; up to 39 pixels a step moves one)."""
    gradient = torch.randn(8, 3, 3, 4, dtype=torch.float64)
    x = torch.full_like(gradient, 0.5)
    for threat, dual in ((linf(0.1), 1), (l2(1.0), 2), (l1(1.0), torch.inf)):
        direction = threat.direction(gradient, x)
        reached = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close(reached, torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
        torch.testing.assert_close(threat.size(direction), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("threat", [linf(0.1), l2(1.0), l1(1.0)], ids=str)
def test_no_gradient_no_move(threat: Threat) -> None:
    gradient = torch.randn(2, 3, 4, 4)
    gradient[0] = 0.0
    direction = threat.direction(gradient, torch.full_like(gradient, 0.5))
    assert (direction[0] == 0).all()
    assert (direction[1] != 0).any()


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("threat", [linf(0.1), l2(1.0), l1(1.0)], ids=str)
def test_directions_do_not_depend_on_the_gradients_scale(threat: Threat, scale: float) -> None:
    gradient = torch.randn(4, 3, 4, 4)
    gradient = gradient.sign() * (gradient.abs() + 0.1)  # nothing so small that it leaves float32 at the smallest scale
    x = torch.full_like(gradient, 0.5)
    torch.testing.assert_close(
        threat.direction(gradient * scale, x), threat.direction(gradient, x), rtol=1e-5, atol=1e-6
    )


def test_an_l1_step_moves_a_twentieth_of_the_pixels_evenly() -> None:
    gradient = torch.randn(3, 3, 8, 8)  # 192 pixels: 9 of them
    direction = l1(1.0).direction(gradient, torch.full_like(gradient, 0.5))
    for g, d in zip(gradient.flatten(1), direction.flatten(1)):
        moved = d.nonzero()[:, 0]
        assert set(moved.tolist()) == set(g.abs().topk(9).indices.tolist())
        torch.testing.assert_close(d[moved], g[moved].sign() / 9)


def test_an_l1_step_wastes_nothing_on_pixels_at_the_box() -> None:
    """The steepest pixel stands at 1 and would rise, the next at 0 and would fall: the third moves."""
    gradient = torch.tensor([5.0, -4.0, 3.0, 1.0]).view(1, 1, 2, 2)
    x = torch.tensor([1.0, 0.0, 0.5, 0.5]).view(1, 1, 2, 2)
    assert l1(1.0).direction(gradient, x).flatten().tolist() == [0.0, 0.0, 1.0, 0.0]
    assert l1(1.0).direction(-gradient, x).flatten().tolist() == [-1.0, 0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ random starts


@pytest.mark.parametrize("threat", BALLS, ids=str)
def test_starts_are_in_the_ball_and_the_box_and_differ(threat: Threat) -> None:
    x = torch.rand(20, 3, 6, 6)
    start = threat.start(x, noise(20))
    assert (threat.size(start.double() - x.double()) <= threat.eps * (1 + 1e-6) + 6e-8 * 108).all()
    assert start.min() >= 0
    assert start.max() <= 1
    assert torch.equal(start, threat.start(x, noise(20)))
    assert not torch.equal(start, threat.start(x, noise(20, seed=1)))
    order = torch.randperm(20)
    assert torch.equal(threat.start(x[order], noise(20)[order]), start[order])


def starts(threat: Callable[[float], Threat], eps: float, n: int, shape: tuple[int, int, int]) -> Tensor:
    """Perturbations of mid-grey images, in units of eps; the box does not bind."""
    x = torch.full((n, *shape), 0.5, dtype=torch.float64)
    return (threat(eps).start(x, noise(n)) - x).flatten(1) / eps


def test_linf_starts_are_uniform_a_pixel() -> None:
    delta = starts(linf, 0.1, 400, (1, 3, 4))
    assert stats.kstest(delta.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("norm", [l2, l1])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 4)])
def test_starts_are_uniform_in_the_ball(norm: Callable[[float], Threat], shape: tuple[int, int, int]) -> None:
    """Uniform in a ball of dimension d: (radius / eps) ** d is uniform, and every sign pattern is as likely."""
    d, n = math.prod(shape), 4000
    delta = starts(norm, 0.3, n, shape)
    radius = torch.linalg.vector_norm(delta, 2 if norm is l2 else 1, dim=1)
    assert stats.kstest((radius**d).numpy(), "uniform").pvalue > 0.01
    positive = (delta > 0).double().mean(0)
    assert (positive - 0.5).abs().max() < 4 * 0.5 / n**0.5
    # one coordinate of the uniform ball: (1 - t^2)^((d - 1) / 2) for l2, (1 - |t|)^(d - 1) for l1, up to a factor
    if norm is l2:
        law = stats.beta((d + 1) / 2, (d + 1) / 2, loc=-1, scale=2)
        assert stats.kstest(delta[:, 0].numpy(), law.cdf).pvalue > 0.01
    else:
        assert stats.kstest(delta[:, 0].abs().numpy(), stats.beta(1, d).cdf).pvalue > 0.01


@pytest.mark.parametrize("eps", [0.5, 3.0, 12.0])
def test_an_l1_projection_spends_the_whole_ball_at_the_box_too(eps: float) -> None:
    """Ball first and box second would lose what the box cuts off; the nearest point of both does not."""
    x = (torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(4))).round().double()
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    spent = l1(eps).size(l1(eps).project(x + delta, x) - x)
    torch.testing.assert_close(spent, torch.full_like(spent, eps), rtol=1e-9, atol=0)
