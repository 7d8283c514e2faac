"""Auxiliary losses of routers: closed forms, directions, huge logits, several routers, and two processes as one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forks import fork_pair
from robustmoe.attacks import PGD, linf
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import Routing, noisy_top_k, top_k
from robustmoe.training import Method, MiniBatch, at, build_method, standard, trades, train_step
from robustmoe.training.auxiliary import (
    BALANCE_LOSSES,
    auxiliary,
    check_balance_loss,
    column_entropy,
    entropy,
    gshard,
    importance,
    load,
    load_balance,
    switch_best,
    variance,
    vmoe,
    z_loss,
)
from robustmoe.training.consistency import prc
from robustmoe.training.optimisation import SGD
from robustmoe.training.phases import Pair, router_noise

LOG4 = math.log(4)
NOISY = {"load", "vmoe"}
"""Losses of routers that decide with noise."""


def decided(logits: Tensor, k: int = 1, noise: Tensor | None = None) -> Routing:
    """The decision of a router with training noise of deviation 1/e; the same ``noise`` (n, t, e) each time."""
    if noise is None:
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    return noisy_top_k(logits, noise / logits.shape[-1], k)


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
        # The same of the largest logits; 1 more, minus the mean deviation of p: of SURE_AND_EVEN 2 of 8 are 1, so the
        # unbiased variance is 8 / 7 * 3 / 16; of TWO both are 0.6 / sqrt 2
        (switch_best, UNIFORM, 0.0),
        (switch_best, COLLAPSED, 3.0),
        (switch_best, TWO, 0.0),
        (switch_best, top_k(TWO.logits, 2), 0.0),
        (switch_best, Routing(TWO.logits, 1 - TWO.index, TWO.weight), 0.0),
        (switch_best, Routing(COLLAPSED.logits, SURE_AND_EVEN.index, COLLAPSED.weight), 3.0),  # shared out otherwise
        (variance, UNIFORM, 1.0),
        (variance, COLLAPSED, 4.0),
        (variance, SURE_AND_EVEN, 1 - (3 / 14) ** 0.5),
        (variance, TWO, 1 - 0.6 / 2**0.5),
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
        # e * sum of (share of first choices) * P; of UNIFORM's ties expert 0 has all: 4 * 1/4
        (gshard, UNIFORM, 1.0),
        (gshard, COLLAPSED, 4.0),
        (gshard, SURE_AND_EVEN, 1.0),
        (gshard, TWO, 1.0),  # 2 * (0.5 * 0.6 + 0.5 * 0.4)
        # logits that are logarithms of probabilities have the logsumexp 0; four zeros log 4
        (z_loss, TWO, 0.0),
        (z_loss, top_k(torch.zeros(3, 2, 4)), LOG4**2),
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


GATES = torch.tensor(
    [[0.70, 0.20, 0.10], [0.25, 0.60, 0.15], [0.55, 0.30, 0.15], [0.10, 0.25, 0.65], [0.40, 0.35, 0.25]],
    dtype=torch.float64,
)


def test_claim_1_importance_and_gshard_of_five_tokens() -> None:
    """The gates' sums are (2, 1.7, 1.3): mean 5/3, population variance 0.74 / 9, over the squared mean 0.0296 (with the
    unbiased variance it would be 0.0444). First choices (3, 1, 1) / 5: 9 * (0.4 * 0.6 + 0.34 * 0.2 + 0.26 * 0.2) / 3
    = 1.08. Even gates whose first choices are even: 0 and 1.
    """
    given = top_k(GATES.log()[:, None])
    assert importance(given).item() == pytest.approx(0.0296, abs=1e-12)
    assert gshard(given).item() == pytest.approx(1.08, abs=1e-12)
    even = Routing(torch.zeros(3, 1, 3), torch.arange(3)[:, None, None], torch.ones(3, 1, 1))
    assert (importance(even).item(), gshard(even).item()) == pytest.approx((0.0, 1.0), abs=1e-6)


LOGITS = torch.tensor([[1.2, 0.3, -0.5], [0.1, 0.9, 0.2], [0.6, 0.5, -0.1], [-0.4, 0.0, 0.8]], dtype=torch.float64)
DRAWN = torch.tensor(
    [[0.05, -0.1, 0.2], [-0.15, 0.1, 0.0], [0.02, 0.12, -0.05], [0.1, -0.05, 0.05]], dtype=torch.float64
)


@pytest.mark.parametrize("k, expected", [(1, 0.0699984), (2, 0.0402777)])
def test_claim_2_load_of_four_tokens(k: int, expected: float) -> None:
    """The page's numbers, and V-MoE's definition item by item: 1 - Phi((k-th largest noisy logit - logit) * e)."""
    given = noisy_top_k(LOGITS[:, None], DRAWN[:, None], k)
    assert load(given).item() == pytest.approx(expected, abs=5e-8)
    chances = []
    for logits, noise in zip(LOGITS.tolist(), DRAWN.tolist()):
        threshold = sorted(a + b for a, b in zip(logits, noise))[-k]
        chances.append([1 - (1 + math.erf((threshold - each) * 3 / math.sqrt(2))) / 2 for each in logits])
    means = [sum(column) / 4 for column in zip(*chances)]
    middle = sum(means) / 3
    by_hand = sum((mean - middle) ** 2 for mean in means) / 3 / middle**2
    assert load(given).item() == pytest.approx(by_hand, rel=1e-10)
    assert vmoe(given).item() == pytest.approx((by_hand + importance(given).item()) / 2, rel=1e-10)


@pytest.mark.parametrize("name", sorted(NOISY | {"importance", "gshard"}))
@pytest.mark.parametrize("k", [1, 2])
def test_two_experts_and_no_variance(name: str, k: int) -> None:
    """Equal logits, and noise that is turned round in half of the items: the experts' means are equal to the last bit.
    A deviation sqrt(0) would have the gradient NaN here.
    """
    logits = torch.zeros(4, 1, 2, requires_grad=True)
    noise = torch.tensor([[0.5, -0.25], [-0.25, 0.5]] * 2)[:, None]
    value = BALANCE_LOSSES[name](decided(logits, k, noise))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(0.0 if name != "gshard" else 1.0, abs=1e-6)
    assert torch.isfinite(gradient).all()


def test_gshard_counts_first_choices_with_noise() -> None:
    """Logits (0.1, 0) and noise (0, 0.3): expert 1 comes first, p = softmax(0.1, 0.3): 2 * p_1."""
    given = noisy_top_k(torch.tensor([[[0.1, 0.0]]]), torch.tensor([[[0.0, 0.3]]]), 2)
    assert gshard(given).item() == pytest.approx(2 / (1 + math.exp(-0.2)))


def test_load_needs_a_router_with_noise(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    words = r"balance_loss 'load' .*needs the training noise of the router.*noise=True.*balance_loss=importance"
    with pytest.raises(UserError, match=words):
        load(TWO)
    with pytest.raises(UserError, match=words):
        step(tiny("ensemble_k2"), standard(balance=0.1, balance_loss="vmoe"), images(4), torch.arange(4))


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_an_item_counts_like_an_image(name: str) -> None:
    """(n, t, e) says what (n t, 1, e) says; the order does not matter."""
    logits, noise = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    order = torch.randperm(12)
    flat, flat_noise = (each.reshape(12, 1, 5)[order] for each in (logits, noise))
    whole, mixed = decided(logits, 2, noise), decided(flat, 2, flat_noise)
    torch.testing.assert_close(BALANCE_LOSSES[name](whole), BALANCE_LOSSES[name](mixed))


@pytest.mark.parametrize("name", sorted(set(BALANCE_LOSSES) - {"switch"}))
def test_gradients_by_finite_differences(name: str) -> None:
    """(Switch holds its shares; its gradient is worked by hand in test_methods.py.)"""
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: BALANCE_LOSSES[name](decided(value, 2)), logits)


def test_descent_of_z_shrinks_the_logsumexp() -> None:
    logits = 3 * torch.randn(8, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(z_loss(top_k(logits)), logits)
    assert z_loss(top_k(logits - 2 * gradient)) < 0.7 * z_loss(top_k(logits))


@pytest.mark.parametrize("gap, most", [(1.0, (0.0, 0.35)), (2.0, (0.85, 1.0))])
def test_load_spreads_what_is_within_reach_of_the_noise(gap: float, most: tuple[float, float]) -> None:
    """Noise of deviation 1/4, drawn anew each step. Expert 0 ahead by 4 deviations: descent evens the choices. By 8:
    the chance of another is flat there, and the load stays collapsed (importance, beside it in "vmoe", is what helps).
    """
    generator = torch.Generator().manual_seed(3)

    def fresh(logits: Tensor) -> Routing:
        return decided(logits, 1, torch.randn(logits.shape, generator=generator, dtype=logits.dtype))

    logits = 0.2 * torch.randn(64, 1, 4, dtype=torch.float64)
    logits[..., 0] += gap
    for _ in range(400):
        logits.requires_grad_(True)
        (gradient,) = torch.autograd.grad(load(fresh(logits)), logits)
        logits = (logits - 5.0 * gradient).detach()
    largest = float(fresh(logits).chosen().double().mean((0, 1)).amax())
    assert most[0] < largest < most[1]


@pytest.mark.parametrize("name", sorted(set(BALANCE_LOSSES) - {"z", "load"}))
def test_descent_spreads_the_load(name: str) -> None:
    """From 0.7 of the probability on expert 0: the largest mean probability and the loss fall, and the load evens.

    The entropy loss makes each image sure of its expert besides, and a sure router has no gradient left: here the load
    stays where it was then, at a half.
    """
    logits = 0.5 * torch.randn(64, 1, 4, dtype=torch.float64)
    logits[..., 0] += 2.0
    p = logits.softmax(-1)
    sure, uneven, first = p.amax(-1).mean(), p.mean((0, 1)).amax(), BALANCE_LOSSES[name](decided(logits))
    assert uneven > 0.6
    for _ in range(400):
        logits.requires_grad_(True)
        (gradient,) = torch.autograd.grad(BALANCE_LOSSES[name](decided(logits)), logits)
        logits = (logits - 5.0 * gradient).detach()
    p = logits.softmax(-1)
    assert BALANCE_LOSSES[name](decided(logits)) < first - 0.05
    assert p.mean((0, 1)).amax() < (0.55 if name == "entropy" else 0.35)
    if name == "entropy":
        assert p.amax(-1).mean() > 0.9 > sure


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("gap", [104.0, 1e4, 1e15])
def test_huge_logits_have_finite_losses_and_gradients(name: str, gap: float) -> None:
    """exp underflows in float32 from a gap of 104 on. Values as in the closed forms: collapsed, and sure and even. (The
    noise is 0 here: the chosen expert is at the threshold, with probability 1/2; what the mean is does not matter.)
    """
    one = {"importance": 3.0, "load": 3.0, "vmoe": 3.0, "gshard": 4.0, "switch_best": 3.0, "variance": 4.0}
    both, other = {"z": gap**2}, {"switch_best": 0.0, "variance": 1 - (3 / 14) ** 0.5}
    even = {"switch": 0.0, "entropy": -LOG4, "importance": 0.0, "load": 0.0, "vmoe": 0.0, "gshard": 1.0, **other}
    for chosen, expected in (
        (torch.zeros(8, dtype=torch.long), {"switch": 3.0, "entropy": 0.0, "column_entropy": 0.0, **one, **both}),
        (torch.arange(8) % 4, {"column_entropy": -LOG4, **even, **both}),
    ):
        logits = (gap * F.one_hot(chosen, 4).float()).requires_grad_()
        value = BALANCE_LOSSES[name](decided(logits[:, None], 1, torch.zeros(8, 1, 4)))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=2e-6)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_a_broken_router_stays_visible(name: str) -> None:
    logits = torch.zeros(4, 1, 3)
    logits[1, 0, 2] = float("nan")
    assert BALANCE_LOSSES[name](decided(logits)).isnan()


# ------------------------------------------------------------------------------------------------ in the methods


def test_the_sum_is_over_the_routers() -> None:
    trace = {"a": TWO.detach(), "b": COLLAPSED.detach()}
    assert float(auxiliary(trace, 0.5, "importance")) == pytest.approx(0.5 * (0.04 + 3.0))
    assert float(auxiliary(trace, 0.5)) == pytest.approx(0.5 * (0.0 + 3.0))
    assert auxiliary(trace, 0.0, "importance") == 0
    assert auxiliary({}, 0.5, "importance") == 0


def streams(index: Tensor) -> Noise:
    return Noise.of(index, 5)


def step(model: RoutedModel, method: Method, x: Tensor, y: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
    """What one step of plain SGD with rate 1 subtracts: the gradient."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = SGD(1.0, 0.0, 0.0).make(model.parameters())
    train_step(model, method, [optimiser], MiniBatch(x, y, streams(torch.arange(len(x)) if index is None else index)))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


ATTACK = PGD(linf(0.0), steps=1, start="clean")
VIT = "vit_moe(tiny, patch=4, width=16, depth=2, heads=2, experts=4, k=2, placement=every_2)"
VIT_ROUTER = "network.blocks.1.mlp.router"


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
    kind_of_model, router = (VIT, VIT_ROUTER) if name in NOISY else ("ensemble_k2", "router")
    model, twin = tiny(kind_of_model), tiny(kind_of_model)
    make = {
        "standard": lambda: standard(balance=0.3, balance_loss=name),
        "at": lambda: at(ATTACK, balance=0.3, balance_loss=name),
        "trades": lambda: trades(ATTACK, balance=0.3, balance_loss=name),
    }
    found = step(model, make[kind](), x, y)
    output = twin.train().run(x, noise=router_noise(streams(torch.arange(16)).fold(0)))
    value = F.cross_entropy(output.logits, y) + 0.3 * BALANCE_LOSSES[name](output.trace[router])
    parameters = dict(twin.named_parameters())
    for (key, _), gradient in zip(parameters.items(), torch.autograd.grad(value, list(parameters.values()))):
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-6)
    plain = step(tiny(kind_of_model), standard(), x, y)
    weight = f"{router}.weight" if name in NOISY else "router.head.weight"
    assert not torch.allclose(plain[weight], found[weight], atol=1e-4)


def test_a_loss_of_another_name_is_refused() -> None:
    assert build_method("standard(balance=0.1, balance_loss=column_entropy)").attack is None
    with pytest.raises(UserError, match=r"'balance_loss': unknown name 'spread'; .*known: column_entropy, entropy"):
        build_method("standard(balance=0.1, balance_loss=spread)")
    with pytest.raises(ValueError, match=r"balance_loss must be one of switch, switch_best, .*; got 'spread'"):
        check_balance_loss("spread")  # what the methods ask in Python, where no type checker looks


# ------------------------------------------------------------------------------------------------ two processes

MODEL = "block_moe(resnet8(width=4), stages=(3,), experts=4, standardise=True)"


def model_for(name: str) -> tuple[str, str]:
    """A model that the loss is of, and the name of its router's weight."""
    if name in NOISY | {"gshard"}:
        return VIT, f"{VIT_ROUTER}.weight"
    return MODEL, "network.stages.2.0.router.network.head.weight"


def steps(x: Tensor, y: Tensor, index: Tensor) -> dict[str, dict[str, Tensor]]:
    """For each loss, the gradient of one step on this process's images."""
    return {
        name: step(build_model(model_for(name)[0], 4, (3, 8, 8)), standard(balance=0.5, balance_loss=name), x, y, index)
        for name in BALANCE_LOSSES
    }


def prc_and_gradient(rows: slice) -> dict[str, Tensor]:
    """Of a router-consistency term that looks at the whole batch: its value, and gradient by these images' logits."""
    clean, attacked = torch.randn(2, 6, 2, 4, generator=torch.Generator().manual_seed(0))[:, rows]
    clean = clean.clone().requires_grad_()
    value = prc(clean, attacked, Pair(torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2)))
    return {"value": value.detach(), "gradient": torch.autograd.grad(value, clean)[0]}


def some_images() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the images' numbers."""
    x = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 1.0, 10)[:, None, None, None], torch.arange(10) % 4, torch.arange(10)


def worker(out: str) -> None:
    """What each of two processes does."""
    from robustmoe import distributed

    torch.set_num_threads(1)
    with distributed.session(torch.device("cpu")):
        rank = distributed.rank()
        x, y, index = (each[rank::2] for each in some_images())
        torch.save(steps(x, y, index) | {"prc": prc_and_gradient(slice(rank, None, 2))}, Path(out) / f"{rank}.pt")


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Of every loss, through a block MoE whose experts at times get no image on one of the processes; the losses of
    noisy routers through a sparse ViT, whose training noise belongs to the image. And of the term of `consistent` that
    looks at the whole batch: of its own images each process has twice the global gradient, for their mean is taken.
    """
    children = fork_pair("test_auxiliary:worker", str(tmp_path), output=tmp_path / "said")
    assert [child.wait() for child in children] == [0, 0], [child.output.read_text() for child in children]
    one = steps(*some_images())
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in BALANCE_LOSSES:
        for key, gradient in one[name].items():
            torch.testing.assert_close(two[0][name][key], gradient, rtol=1e-3, atol=1e-5)
            assert torch.equal(two[0][name][key], two[1][name][key])
    whole = prc_and_gradient(slice(None))
    for rank in (0, 1):
        torch.testing.assert_close(two[rank]["prc"]["value"], whole["value"])
        torch.testing.assert_close(two[rank]["prc"]["gradient"], 2 * whole["gradient"][rank::2])
    alike = {"switch_best"}  # as "switch", where nothing but the logits decides
    routers = [one[name][model_for(name)[1]] for name in BALANCE_LOSSES if name not in alike]
    pairs = [pair for pair in itertools.combinations(routers, 2) if pair[0].shape == pair[1].shape]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairs)
