"""CERT-2c: bounds of an expert on its own region, against linear programmes, samples, and the bound on the whole
ball."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from robustmoe.certification import Ball, worst_margins
from robustmoe.certification.regions import region_margins
from robustmoe.models import RoutedModel

EPS = 0.02


def ball_of(x: Tensor, norm: str = "linf", eps: float = EPS) -> Ball:
    return Ball(x, norm, torch.full((len(x),), eps, dtype=x.dtype))


def exact(model: RoutedModel, x: Tensor, y: int, expert: int) -> list[float]:
    """Of one image and a model of linear parts: for each class the least margin of the expert on its region, by a
    linear programme over the images of the ball and the box; inf where the region is empty.
    """
    std, mean = model.normalise.std.flatten()[0].item(), model.normalise.mean.flatten()[0].item()

    def affine(network: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
        weight = network.head.weight.detach().double().numpy() / std
        return weight, network.head.bias.detach().double().numpy() - weight.sum(1) * mean

    (answer, bias), (gate, gate_bias) = affine(model.experts[expert]), affine(model.router)
    flat = x.flatten().numpy()
    box = list(zip((flat - EPS).clip(0), (flat + EPS).clip(max=1)))
    found = []
    for j in range(4):
        programme = linprog(
            answer[y] - answer[j], A_ub=gate - gate[expert], b_ub=gate_bias[expert] - gate_bias, bounds=box
        )
        found.append(programme.fun + bias[y] - bias[j] if programme.success else np.inf)
    return found


def test_of_linear_parts_it_is_the_linear_programme(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Never above it; with enough steps equal, by strong duality; an empty region is proven to hold nothing wrong."""
    model = tiny("ensemble(linear, experts=3, gate=hard, router=linear)").double()
    x = images(12).double()
    y = model(x).argmax(1)
    near = empty = 0
    for expert in range(3):
        network = model.experts[expert]
        found = region_margins(
            lambda z, network=network: network(model.normalise(z)),
            lambda z: model.router(model.normalise(z)),
            expert,
            ball_of(x),
            y,
            steps=300,
        )
        for n in range(len(x)):
            for j, bound in enumerate(exact(model, x[n], int(y[n]), expert)):
                value = found[n, j].item()
                if np.isinf(bound):
                    empty += value > 0
                elif j != y[n]:
                    assert value <= bound + 1e-9
                    near += value > bound - 0.01
    assert near > 40
    assert empty > 10


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.15)])
def test_it_is_below_the_samples_of_the_cell_and_above_the_bound_of_the_ball(
    norm: str, eps: float, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model = tiny("ensemble_hard").double()
    x = images(6).double()
    y = model(x).argmax(1)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, *x.shape, generator=generator, dtype=x.dtype)
    noise = noise.sign() if norm == "linf" else noise / noise.flatten(2).norm(dim=2)[..., None, None, None]
    points = (x + eps * noise).clamp(0, 1)
    routes = model.run(points.flatten(0, 1)).trace["router"].index.view(400, 6)
    inside = 0
    for expert in range(3):
        parts = model.parts()
        network = parts.branches[expert].network
        ball = ball_of(x, norm, eps)
        with torch.no_grad():
            found = region_margins(network, parts.router, expert, ball, y)
            at_no_price = region_margins(network, parts.router, expert, ball, y, steps=0)
            logits = network(points.flatten(0, 1)).view(400, 6, 4)
        assert (found >= at_no_price).all()
        margins = logits.gather(2, y.expand(400, 6)[..., None]) - logits
        margins = margins.masked_fill((routes != expert)[..., None], torch.inf)
        assert (found <= margins.amin(0) + 1e-9).all()
        inside += int((routes == expert).sum())
    assert inside == 2400
    assert len({tuple(row) for row in routes.T.unique(dim=1).tolist()}) > 1


def test_the_certificate_says_that_it_needed_the_cells(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Two experts, constant but for a slope: each is right where it is used, and wrong at the other end of the ball."""
    model = tiny("ensemble(linear, experts=2, gate=hard, router=linear)").double()
    with torch.no_grad():
        for part in (model.router, *model.experts):
            part.head.weight.zero_()
            part.head.bias.zero_()
        model.router.head.weight[0, 0], model.router.head.weight[1, 0] = 1.0, -1.0
        for expert, sign in zip(model.experts, (1.0, -1.0)):  # the margin of class 0 is 0.1 + 2 sign z
            expert.head.weight[0, 0], expert.head.bias[0] = 2 * sign, 0.1
    x = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)  # z = 0: on the boundary
    y = torch.zeros(1, dtype=torch.long)
    whole, regions = (worst_margins(model.parts(), ball_of(x, eps=0.2), y, region_steps=steps) for steps in (0, 200))
    assert not whole.proven(y)
    assert regions.proven(y)
    assert regions.rule == ["each expert on its region"]
    assert regions.reached.all()
    assert 0.09 < regions.lower[0, 1] <= 0.1
