"""Auxiliary losses of routers: closed forms, directions, huge logits, several routers, and two processes as one.

This file is also the program of the two processes (`worker`).
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import PGD, linf
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import Routing, top_k
from robustmoe.training import at, build_method, standard, trades, train_step
from robustmoe.training.auxiliary import (
    BALANCE_LOSSES,
    auxiliary,
    check_balance_loss,
    column_entropy,
    entropy,
    importance,
    load_balance,
)
from robustmoe.training.optimisation import SGD

LOG4 = math.log(4)


def h(*p: float) -> float:
    """Entropy in nats."""
    return -sum(each * math.log(each) for each in p)


def routing(*probabilities: list[float]) -> Routing:
    """Top-1 decisions of images whose softmax is as given; a probability of 0 is a logit 1e4 below."""
    p = torch.tensor(probabilities)
    return top_k(torch.where(p > 0, p.clamp(min=1e-30).log(), -1e4)[:, None].requires_grad_())


UNIFORM = routing(*[[0.25] * 4] * 8)
COLLAPSED = routing(*[[0.0, 1.0, 0.0, 0.0]] * 8)
SURE_AND_EVEN = routing(*torch.eye(4).tolist() * 2)
TWO = routing([0.9, 0.1], [0.3, 0.7])  # P = (0.6, 0.4), one image each


@pytest.mark.parametrize(
    "loss, given, expected",
    [
        # Switch: e * sum f P - 1. A tie of logits goes to expert 0, f = (1, 0, 0, 0): 4 * 1/4 - 1
        (load_balance, UNIFORM, 0.0),
        (load_balance, COLLAPSED, 3.0),
        (load_balance, SURE_AND_EVEN, 0.0),
        (load_balance, TWO, 0.0),  # f = (1/2, 1/2)
        # Mean of H(p) - H(P)
        (entropy, UNIFORM, 0.0),
        (entropy, COLLAPSED, 0.0),
        (entropy, SURE_AND_EVEN, -LOG4),
        (entropy, TWO, (h(0.9, 0.1) + h(0.3, 0.7)) / 2 - h(0.6, 0.4)),
        # -H(P)
        (column_entropy, UNIFORM, -LOG4),
        (column_entropy, COLLAPSED, 0.0),
        (column_entropy, SURE_AND_EVEN, -LOG4),
        (column_entropy, TWO, -h(0.6, 0.4)),
        # variance over squared mean of the sums of p: COLLAPSED (8, 0, 0, 0): mean 2, variance (36 + 3 * 4) / 4 = 12
        (importance, UNIFORM, 0.0),
        (importance, COLLAPSED, 3.0),
        (importance, SURE_AND_EVEN, 0.0),
        (importance, TWO, 0.01 / 0.25),  # sums (1.2, 0.8): mean 1, variance 0.04
    ],
)
def test_closed_forms(loss: Callable[[Routing], Tensor], given: Routing, expected: float) -> None:
    assert loss(given).item() == pytest.approx(expected, abs=2e-6)


def test_importance_is_the_squared_coefficient_of_variation() -> None:
    """Shazeer et al. 2017, from its definition: sums of p over all items, population variance."""
    logits = 3 * torch.randn(6, 5, 7, dtype=torch.float64)
    sums = logits.softmax(-1).sum((0, 1))
    expected = sums.var(correction=0) / sums.mean() ** 2
    torch.testing.assert_close(importance(top_k(logits)), expected)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_an_item_counts_like_an_image(name: str) -> None:
    """(n, t, e) says what (n t, 1, e) says; the order does not matter."""
    logits = torch.randn(4, 3, 5, dtype=torch.float64)
    flat = logits.reshape(12, 1, 5)[torch.randperm(12)]
    torch.testing.assert_close(BALANCE_LOSSES[name](top_k(logits, 2)), BALANCE_LOSSES[name](top_k(flat, 2)))


@pytest.mark.parametrize("name", ["entropy", "importance", "column_entropy"])
def test_gradients_by_finite_differences(name: str) -> None:
    """(Switch holds its shares; its gradient is worked by hand in test_methods.py.)"""
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: BALANCE_LOSSES[name](top_k(value)), logits)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_descent_spreads_the_load(name: str) -> None:
    """From 0.7 of the probability on expert 0: the largest mean probability and the loss fall, and the load evens.

    The entropy loss makes each image sure of its expert besides, and a sure router has no gradient left: here the load
    stays where it was then, at a half.
    """
    logits = 0.5 * torch.randn(64, 1, 4, dtype=torch.float64)
    logits[..., 0] += 2.0
    p = logits.softmax(-1)
    sure, uneven, first = p.amax(-1).mean(), p.mean((0, 1)).amax(), BALANCE_LOSSES[name](top_k(logits))
    assert uneven > 0.6
    for _ in range(400):
        logits.requires_grad_(True)
        (gradient,) = torch.autograd.grad(BALANCE_LOSSES[name](top_k(logits)), logits)
        logits = (logits - 5.0 * gradient).detach()
    p = logits.softmax(-1)
    assert BALANCE_LOSSES[name](top_k(logits)) < first - 0.05
    assert p.mean((0, 1)).amax() < (0.55 if name == "entropy" else 0.35)
    if name == "entropy":
        assert p.amax(-1).mean() > 0.9 > sure


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("gap", [104.0, 1e4, 1e30])
def test_huge_logits_have_finite_losses_and_gradients(name: str, gap: float) -> None:
    """exp underflows in float32 from a gap of 104 on. Values as in the closed forms: collapsed, and sure and even."""
    for chosen, expected in (
        (torch.zeros(8, dtype=torch.long), {"switch": 3.0, "entropy": 0.0, "importance": 3.0, "column_entropy": 0.0}),
        (torch.arange(8) % 4, {"switch": 0.0, "entropy": -LOG4, "importance": 0.0, "column_entropy": -LOG4}),
    ):
        logits = (gap * F.one_hot(chosen, 4).float()).requires_grad_()
        value = BALANCE_LOSSES[name](top_k(logits[:, None]))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(expected[name], abs=2e-6)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_a_broken_router_stays_visible(name: str) -> None:
    logits = torch.zeros(4, 1, 3)
    logits[1, 0, 2] = float("nan")
    assert BALANCE_LOSSES[name](top_k(logits)).isnan()


# ------------------------------------------------------------------------------------------------ in the methods


def test_the_sum_is_over_the_routers() -> None:
    trace = {"a": TWO.detach(), "b": COLLAPSED.detach()}
    assert float(auxiliary(trace, 0.5, "importance")) == pytest.approx(0.5 * (0.04 + 3.0))
    assert float(auxiliary(trace, 0.5)) == pytest.approx(0.5 * (0.0 + 3.0))
    assert auxiliary(trace, 0.0, "importance") == 0
    assert auxiliary({}, 0.5, "importance") == 0


def step(model: RoutedModel, method: object, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What one step of plain SGD with rate 1 subtracts: the gradient."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = SGD(1.0, 0.0, 0.0).make(model.parameters())
    train_step(model, method, [optimiser], x, y, Noise.of(torch.arange(len(x)), 5))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


ATTACK = PGD(linf(0.0), steps=1, start="clean")


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("kind", ["standard", "at", "trades"])
def test_a_method_adds_the_loss_it_was_told(
    kind: str,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """Against its few lines. The attack's radius is 0: AT is then standard training, and the KL of TRADES is 0."""
    x, y = images(16), labels(16)
    model, twin = tiny("ensemble_k2"), tiny("ensemble_k2")
    make = {
        "standard": lambda: standard(balance=0.3, balance_loss=name),
        "at": lambda: at(ATTACK, balance=0.3, balance_loss=name),
        "trades": lambda: trades(ATTACK, balance=0.3, balance_loss=name),
    }
    found = step(model, make[kind](), x, y)
    output = twin.train().run(x)
    value = F.cross_entropy(output.logits, y) + 0.3 * BALANCE_LOSSES[name](output.trace["router"])
    parameters = dict(twin.named_parameters())
    for (key, _), gradient in zip(parameters.items(), torch.autograd.grad(value, list(parameters.values()))):
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-6)
    plain = step(tiny("ensemble_k2"), standard(), x, y)
    assert not torch.allclose(plain["router.head.weight"], found["router.head.weight"], atol=1e-4)


def test_a_loss_of_another_name_is_refused() -> None:
    assert build_method("standard(balance=0.1, balance_loss=column_entropy)").attack is None
    with pytest.raises(UserError, match=r"'balance_loss': unknown name 'variance'; .*known: column_entropy, entropy"):
        build_method("standard(balance=0.1, balance_loss=variance)")
    with pytest.raises(ValueError, match=r"balance_loss must be one of switch, entropy, .*; got 'variance'"):
        check_balance_loss("variance")  # what the methods ask in Python, where no type checker looks


# ------------------------------------------------------------------------------------------------ two processes

MODEL = "block_moe(resnet8(width=4), stages=(3,), experts=4, standardise=True)"


def steps(x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """For each loss, the gradient of one step on this process's images."""
    return {
        name: step(build_model(MODEL, 4, (3, 8, 8)), standard(balance=0.5, balance_loss=name), x, y)
        for name in BALANCE_LOSSES
    }


def some_images() -> tuple[Tensor, Tensor]:
    x = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 1.0, 10)[:, None, None, None], torch.arange(10) % 4


def worker(out: Path) -> None:
    from robustmoe import distributed

    torch.set_num_threads(1)
    with distributed.session(torch.device("cpu")):
        x, y = some_images()
        rank = distributed.rank()
        torch.save(steps(x[rank::2], y[rank::2]), out / f"{rank}.pt")


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Of every loss, through a block MoE whose experts at times get no image on one of the processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    one = steps(*some_images())
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in BALANCE_LOSSES:
        for key, gradient in one[name].items():
            torch.testing.assert_close(two[0][name][key], gradient, rtol=1e-3, atol=1e-5)
            assert torch.equal(two[0][name][key], two[1][name][key])
    routers = [one[name]["network.stages.2.0.router.network.head.weight"] for name in BALANCE_LOSSES]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(routers))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
