"""Choices balanced by transport: projections against a search over all supports, plans against scipy's optimiser and
the equations that they solve, and the layers that use them. (Against the paper's code: tests/test_fidelity.py.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from robustmoe.costs import costs
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model, transport
from robustmoe.models.transport import nearest, sinkhorn, sparse
from robustmoe.noise import Noise

By = Literal["tokens", "experts"]


def on_simplex(x: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex: max(x - shift, 0), the shift by bisection."""
    low, high = x.min() - 1, x.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(x - low, 0)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_the_nearest_sparse_point(k: int) -> None:
    """Of all points with k entries at most: each support is tried."""
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    points = nearest(x, k)
    for group, column in itertools.product(range(2), range(4)):
        given, best = x[group, :, column].numpy(), None
        for support in map(list, itertools.combinations(range(5), min(k, 5))):
            point = np.zeros(5)
            point[support] = on_simplex(given[support])
            if best is None or ((point - given) ** 2).sum() < ((best - given) ** 2).sum():
                best = point
        torch.testing.assert_close(points[group, :, column], torch.from_numpy(best), rtol=1e-9, atol=1e-9)


def test_sinkhorns_plan() -> None:
    """It sums to 1 for each token and to s / e for each expert, and is exp(logits) times a factor a token and a factor
    an expert: the one plan of that kind, and the nearest in KL divergence (Cuturi 2013, lemma 2).
    """
    logits = torch.randn(3, 12, 4, dtype=torch.float64)
    plan = sinkhorn(logits)
    torch.testing.assert_close(plan.sum(2), torch.ones(3, 12).double())
    torch.testing.assert_close(plan.sum(1), torch.full((3, 4), 3.0).double(), rtol=1e-4, atol=1e-4)
    factor = plan.log() - logits
    crossed = factor[:, :1, :1] + factor - factor[:, :1] - factor[:, :, :1]
    torch.testing.assert_close(crossed, torch.zeros_like(crossed), rtol=0, atol=1e-9)


def best_plan(p: np.ndarray) -> np.ndarray:
    """argmax of <P, p> - |P|^2 / 2 over plans, by scipy's SLSQP."""
    s, e = p.shape
    limits = [
        {"type": "eq", "fun": lambda flat: flat.reshape(s, e).sum(1) - 1},
        {"type": "eq", "fun": lambda flat: (flat.reshape(s, e).sum(0) - s / e)[1:]},
    ]
    start = np.full(s * e, 1 / e)
    solved = scipy.optimize.minimize(
        lambda flat: 0.5 * (flat**2).sum() - flat @ p.ravel(), start, constraints=limits, bounds=[(0, None)] * (s * e)
    )
    return np.asarray(solved.x.reshape(s, e))


@pytest.mark.parametrize("by", ["tokens", "experts"])
def test_without_a_limit_it_is_the_quadratic_plan(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for every entry, and steps to the end, both sides solve one problem."""
    monkeypatch.setattr(transport, "STEPS", 2000)
    monkeypatch.setattr(transport, "SMALL", 1e-6)
    p = torch.softmax(2 * torch.randn(1, 6, 3, dtype=torch.float64), 2)
    plan = sparse(p, 6, by)[0]
    torch.testing.assert_close(plan, torch.from_numpy(best_plan(p[0].numpy())), rtol=0, atol=2e-3)


@pytest.mark.parametrize("by, k, side", [("tokens", 2, 2), ("experts", 4, 1)])
def test_a_sparse_plan(by: By, k: int, side: int) -> None:
    """At most k entries a token (an expert), which sum to what it has to give; the other side is nearer to its share
    than by the choice of the best alone; groups do not see each other.
    """
    p = torch.softmax(torch.randn(3, 12, 4, dtype=torch.float64) + torch.tensor([1.0, 0, 0, 0]), 2)
    plan = sparse(p, k, by)
    assert int((plan > 0).sum(side).max()) <= k
    amount = {"tokens": 1.0, "experts": 3.0}[by]
    torch.testing.assert_close(plan.sum(side), torch.full_like(plan.sum(side), amount))
    torch.testing.assert_close(sparse(p[1:2], k, by)[0], plan[1])
    start = amount * (nearest(p.transpose(1, 2), k).transpose(1, 2) if by == "tokens" else nearest(p / amount, k))
    share = 12 / 4 if by == "tokens" else 1.0
    off = [(each.sum(3 - side) - share).norm() for each in (start, plan)]
    assert off[1] < off[0]


# ------------------------------------------------------------------------------------------------ in a model

SIZE = "tiny, patch=4, width=16, depth=4, heads=2, mlp_ratio=2, experts=4, placement=every_2"
KINDS = ["plan=sinkhorn, k=2", "plan=sparse, k=2", "plan=sinkhorn, choice=expert", "plan=sparse, choice=expert"]


def made(options: str) -> RoutedModel:
    """With routers that send most tokens to one expert."""
    model = build_model(f"vit_moe({SIZE}, {options})", 4, (3, 8, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers().values():
            for parameter in layer.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("group", [1, 4])
def test_a_layer_goes_by_the_plan(options: str, group: int, images: Callable[..., Tensor]) -> None:
    """The chosen are the plan's best, group by group (6 images: the last group has two); the weights are the
    softmax's. A model's own trace changes nothing.
    """
    model, x = made(f"{options}, group={group}"), images(6)
    output = model.run(x)
    assert model(x[:0]).shape == (0, 4)
    torch.testing.assert_close(model.run(x, forced=output.trace).logits, output.logits)
    for routing in output.trace.values():
        p = torch.softmax(routing.logits, 2)
        torch.testing.assert_close(routing.weight, p.gather(2, routing.index) * (routing.weight != 0))
        for rows in torch.arange(6).split(group):
            logits, chosen = routing.logits[rows].flatten(0, 1)[None], routing.chosen()[rows].flatten(0, 1)
            some, room = p[rows].flatten(0, 1)[None], -(-len(rows) * 5 // 4)
            if "expert" in options:
                plan = sinkhorn(logits)[0] if "sinkhorn" in options else sparse(some, room, "experts")[0]
                assert chosen.sum(0).tolist() == [room] * 4
                for expert in range(4):
                    least = plan[chosen[:, expert], expert].min()
                    assert least >= plan[~chosen[:, expert], expert].max()
            else:
                plan = sinkhorn(logits)[0] if "sinkhorn" in options else sparse(some, 2, "tokens")[0]
                best = torch.argsort(plan, dim=1, descending=True, stable=True)[:, :2]
                assert torch.equal(best, routing.index[rows].flatten(0, 1))


@torch.no_grad()
def test_a_plan_balances(images: Callable[..., Tensor]) -> None:
    """The fullest expert of 32 images as one group: by the plans it has less than by the best logits."""
    x, fullest = images(32), []
    for plan in ("none", "sinkhorn", "sparse"):
        trace = made(f"plan={plan}, k=1, group=32").run(x).trace
        fullest.append(int(trace["network.blocks.1.mlp.router"].chosen().sum((0, 1)).max()))
    assert fullest[1] < 0.8 * fullest[0]
    assert fullest[2] < fullest[0]


@torch.no_grad()
@pytest.mark.parametrize("plan, noisy", [("sinkhorn", True), ("sparse", False)])
def test_training_noise(plan: str, noisy: bool, images: Callable[..., Tensor]) -> None:
    """An image's own, as without a plan; the weights are those of the logits without it."""
    model, x = made(f"plan={plan}, k=1").train(), images(6)
    noise, order = Noise.of(torch.arange(6), 1), torch.tensor([4, 1])
    whole = model.run(x, noise=noise)
    some = model.run(x[order], noise=noise[order]).logits
    torch.testing.assert_close(some, whole.logits[order], rtol=1e-4, atol=1e-5)
    for routing in whole.trace.values():
        assert (routing.noisy is not None) == noisy
        p = torch.softmax(routing.logits, 2)
        torch.testing.assert_close(routing.weight, p.gather(2, routing.index))


def test_gradients_room_and_costs(images: Callable[..., Tensor]) -> None:
    """The router learns by the weights alone; room, renormalised gates and members go with a plan; it costs no
    multiply-adds of products.
    """
    model, x = made("plan=sparse, k=2, capacity=0.7, gating=renormalised, members=2"), images(5)
    model.run(x).logits.logsumexp(1).sum().backward()
    routers = [value.grad for name, value in model.named_parameters() if name.endswith("router.weight")]
    assert len(routers) == 4
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in routers)
    assert any((routing.weight == 0).any() for routing in model.run(x).trace.values())
    counts = [costs(f"vit_moe({SIZE}, k=2, plan={plan})", 4, (3, 8, 8)).macs for plan in ("none", "sparse", "sinkhorn")]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    "options, message",
    [
        ("plan=sparse, gating=hard", "plan=sparse takes gating=vmoe or gating=renormalised; got 'hard'"),
        ("plan=sparse, choice=slots", "plan=sparse takes choice=token or choice=expert, and order=vanilla"),
        ("plan=sinkhorn, order=priority", "plan=sinkhorn takes choice=token or choice=expert, and order=vanilla"),
    ],
)
def test_what_goes_with_no_plan(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(f"vit_moe({SIZE}, {options})", 4, (3, 8, 8))
