"""The checks: each passes on what is sound and fails on what it is there for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import analysis
from robustmoe.attacks import PGD, experts_only, l2, linf, router_only
from robustmoe.data import Batch
from robustmoe.evaluation import checks
from robustmoe.models import RoutedModel, as_routed
from robustmoe.records import Check, Row
from robustmoe.routing import Tape, soft, straight_through, top_k

JOINT = PGD(linf(8 / 255))
GATES = {
    "straight": straight_through,
    "hard": lambda logits: top_k(logits, 1, "hard"),
    "renormalised": top_k,
    "vmoe": lambda logits: top_k(logits, 1, "vmoe"),
    "soft": soft,
}


class Pair(RoutedModel):
    """x is two pixels, p and q. The router says ``slope`` * (1/2 - p) of expert 0, the opposite of expert 1; expert 0
    says 1/2 - q of class 0 and the opposite of class 1; expert 1 the other way round.
    """

    def __init__(self, gate: str, slope: float = 1.0) -> None:
        super().__init__()
        self.gate, self.slope = gate, slope

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        p, q = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        logits = self.slope * torch.stack([0.5 - p, p - 0.5], 1)
        routing = tape("router", GATES[self.gate](logits[:, None]))
        experts = torch.stack([0.5 - q, q - 0.5, q - 0.5, 0.5 - q], 1).view(-1, 2, 2)
        chosen = experts.gather(1, routing.index[:, 0, :, None].expand(-1, -1, 2))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


def batch(x: Tensor, y: Tensor | None = None) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y, torch.arange(len(x)))


def seen(function: Callable[..., Check], *args: Any) -> Check:
    with torch.no_grad():
        return function(*args)


RANDOM = batch(torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(2)))


# ------------------------------------------------------------------------------------------------ H1


def test_input_range() -> None:
    assert checks.input_range(RANDOM).status == "pass"
    normalised = checks.input_range(batch((RANDOM.x - 0.5) / 0.25))
    assert normalised.status == "fail"
    assert normalised.sentence.endswith("; expected float32 in [0, 1]")
    for odd in (RANDOM.x + 0.5, RANDOM.x * torch.nan, RANDOM.x * 255):
        assert checks.input_range(batch(odd)).status == "fail"


# ------------------------------------------------------------------------------------------------ H2


def row(size: float, box: float = 0.0) -> Row:
    return Row(0, 0, 0, 0, {"linf": size, "box": box}, {}, None, None, {}, {})


EPS = 8 / 255


@pytest.mark.parametrize(
    "size, box, status",
    [
        (EPS, 0.0, "pass"),
        (EPS * (1 + 1e-6), 0.0, "pass"),
        (EPS * (1 + 1e-4), 0.0, "fail"),
        (math.nan, 0.0, "fail"),
        (0.0, 1e-7, "fail"),
        (0.0, math.nan, "fail"),
        (math.inf, 0.0, "fail"),
    ],
)
def test_ball_and_box_in_any_order(size: float, box: float, status: str) -> None:
    """Python's max loses a nan that does not come first."""
    for rows in itertools.permutations([row(0.0), row(size, box), row(EPS / 2)]):
        assert checks.ball_and_box(rows, "linf", EPS).status == status
    assert analysis.inside(size, EPS) is (status == "pass" or size == 0.0)


@pytest.mark.parametrize("eps", [0.1 / 255, 0.5 / 255, 2 / 255, 0.5])
def test_rounding_is_inside_the_ball(eps: float) -> None:
    """x + eps is rounded to float32 beside x: at small radii by more than 1e-5 of eps. Both judges call it inside."""
    x = torch.linspace(0.0, 1.0, 4001)
    moved = ((x + eps).clamp(0, 1) - x).abs().amax().item()
    assert checks.ball_and_box([row(moved)], "linf", eps).status == "pass"
    assert analysis.inside(moved, eps)
    assert not analysis.inside(eps * 1.001 + 1e-6, eps)


# ------------------------------------------------------------------------------------------------ H3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1)


def change_weight(net: Net) -> None:
    net.norm.weight.data += 1e-6


def change_statistics(net: Net) -> None:
    net.train()(torch.rand(4, 1, 1, 2))
    net.eval()


def change_mode(net: Net) -> None:
    net.norm.train()


def change_hidden(net: Net) -> None:
    net.hidden[1] = 1


def change_gradient(net: Net) -> None:
    net(torch.rand(1, 1, 1, 2)).sum().backward()


def change_frozen(net: Net) -> None:
    net.norm.bias.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [change_weight, change_statistics, change_mode, change_hidden, change_gradient, change_frozen]
)
def test_any_change_of_the_model_is_seen(change: Callable[[Net], None]) -> None:
    net = Net().eval()
    before = checks.fingerprint(net)
    assert checks.unchanged(before, checks.fingerprint(net)).status == "pass"
    change(net)
    assert checks.unchanged(before, checks.fingerprint(net)).status == "fail"


def test_weights_hash_is_of_every_parameter_and_buffer_and_nothing_else() -> None:
    assert checks.weights_hash(Net()) == checks.weights_hash(Net().train())
    for change in (change_weight, change_statistics, change_hidden):
        net = Net()
        change(net)
        assert checks.weights_hash(net) != checks.weights_hash(Net())
    for dtype in (torch.bfloat16, torch.bool, torch.int64):
        net = Net()
        net.register_buffer("more", torch.ones((), dtype=dtype))
        assert len(checks.weights_hash(net)) == 64


# ------------------------------------------------------------------------------------------------ H4


class Capacity(RoutedModel):
    """Expert 0 takes the first four images of a batch, whatever they are; the others go to expert 1."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        first = torch.arange(len(x)) < 4
        logits = torch.stack([first.float(), 1 - first.float()], 1)
        routing = tape("router", top_k(logits[:, None], 1, "hard"))
        return torch.stack([x.flatten(1).sum(1), routing.index[:, 0, 0] * 9.0], 1)


def test_an_answer_that_depends_on_the_neighbours() -> None:
    found = seen(checks.alone, Capacity().eval(), RANDOM)
    assert (found.status, found.value) == ("fail", 4)
    assert found.sentence.startswith("4 of 8 predictions change when an image stands alone")
    assert seen(checks.alone, Pair("soft"), RANDOM).status == "pass"


def test_train_mode_batch_norm() -> None:
    def normed(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True).flatten(1)

    wide = batch(torch.rand(8, 2, 3, 3, generator=torch.Generator().manual_seed(1)))
    assert seen(checks.alone, as_routed(normed), wide).status == "fail"
    raises = seen(checks.alone, as_routed(lambda x: normed(x[:, :, :1, :1])), wide)
    assert (raises.status, raises.sentence) == ("fail", "the model fails on an image alone (ValueError)")
    assert seen(checks.alone, as_routed(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()).eval()), wide).status == "pass"


def test_nan_is_not_the_same_alone() -> None:
    nan = as_routed(lambda x: x.flatten(1) * torch.nan)
    assert seen(checks.alone, nan, RANDOM).status == "fail"
    assert seen(checks.determinism, nan, RANDOM).status == "fail"


# ------------------------------------------------------------------------------------------------ H6


class Says(RoutedModel):
    def __init__(self, logits: Callable[[Tensor], Tensor], router: float = 0.0) -> None:
        super().__init__()
        self.logits, self.router = logits, router

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        tape("gate", top_k(torch.full((len(x), 1, 2), self.router)))
        return self.logits(x)


@pytest.mark.parametrize(
    "model, status, words",
    [
        (Says(lambda x: x.flatten(1)), "pass", "finite"),
        (Says(lambda x: x.flatten(1).softmax(1)), "warn", "look like probabilities"),
        (Says(lambda x: x.flatten(1).log_softmax(1)), "pass", "finite"),
        (Says(lambda x: x.flatten(1) / 0), "fail", "the logits are not finite"),
        (Says(lambda x: x.flatten(1), math.nan), "fail", "the logits of router 'gate' are not finite"),
        (Says(lambda x: x.flatten(1), math.inf), "fail", "the logits of router 'gate' are not finite"),
        (Says(lambda x: x[0, 0]), "fail", "a tensor of shape (1, 2), expected (n, c)"),
        (Says(lambda x: x), "fail", "a tensor of shape (8, 1, 1, 2), expected (n, c)"),
    ],
)
def test_outputs(model: RoutedModel, status: str, words: str) -> None:
    found = seen(checks.outputs, model, RANDOM)
    assert found.status == status
    assert words in found.sentence


# ------------------------------------------------------------------------------------------------ H7


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dropout_left_on(scale: float) -> None:
    """Whatever the scale of the logits: an attacker's model may hide its randomness in small ones."""
    random = as_routed(lambda x: scale * F.dropout(x.flatten(1), 0.5, training=True))
    found = seen(checks.determinism, random, RANDOM)
    assert found.status == "fail"
    assert "a random model needs attacks over its randomness" in found.sentence
    assert seen(checks.determinism, as_routed(lambda x: scale * x.flatten(1)), RANDOM).status == "pass"
    rounding = as_routed(lambda x: scale * x.flatten(1) * (1 + 1e-6 * torch.rand(())))
    assert seen(checks.determinism, rounding, RANDOM).status == "pass"


# ------------------------------------------------------------------------------------------------ R1


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_router_share_by_hand(slope: float) -> None:
    """One image (p, q) = (0.2, 0.2), label 0: expert 0, logits e = (0.3, -0.3); g = (-a, a) is the gradient of the loss
    with respect to them. Straight-through: the weight of expert 0 moves as its router logit, slope * (1/2 - p).
    d/dq = g . (-1, 1) = 2a; d/dp = -slope * g . e = slope * 0.6 a; so the share is 0.3 slope / sqrt(1 + (0.3 slope)^2).
    """
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    found = seen(checks.router_in_sight, Pair("straight", slope), JOINT, one)
    assert found.status == "pass"
    assert found.value == pytest.approx(0.3 * slope / math.sqrt(1 + (0.3 * slope) ** 2), rel=1e-5)


def test_soft_router_share_by_hand() -> None:
    """The same image; soft weights (s, 1 - s) with s = sigmoid(2 * 0.3). The output is (2s - 1) * 0.3 for class 0, the
    opposite for class 1: d/dq is 2a (2s - 1), d/dp is 2a * 0.3 * 2 * s (1 - s) * 2.
    """
    s = 1 / (1 + math.exp(-0.6))
    dq, dp = 2 * s - 1, 0.3 * 2 * s * (1 - s) * 2
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    found = seen(checks.router_in_sight, Pair("soft"), JOINT, one)
    assert found.value == pytest.approx(dp / math.hypot(dp, dq), rel=1e-5)


@pytest.mark.parametrize("gate, status", [("hard", "fail"), ("renormalised", "fail"), ("vmoe", "pass")])
def test_gates_without_a_gradient(gate: str, status: str) -> None:
    found = seen(checks.router_in_sight, Pair(gate), JOINT, RANDOM)
    assert found.status == status
    assert (found.value == 0) is (status == "fail")
    assert status == "pass" or found.sentence.startswith("routing unattacked: no gradient reaches the image through")


def test_a_saturated_gate_hardly_sees_the_router() -> None:
    """softmax over (9, -9) and beyond: its gradient is there and next to nothing."""
    one = batch(torch.tensor([[[[0.2, 0.2]]]]))
    shares = [seen(checks.router_in_sight, Pair("vmoe", slope), JOINT, one) for slope in (1.0, 20.0, 100.0)]
    assert [found.status for found in shares] == ["pass", "warn", "fail"]


def test_what_is_not_run() -> None:
    held = PGD(linf(EPS), objective=experts_only())
    assert seen(checks.router_in_sight, Pair("straight"), held, RANDOM).status == "not run"
    dense = as_routed(lambda x: x.flatten(1))
    assert seen(checks.router_in_sight, dense, JOINT, RANDOM).status == "not run"


@pytest.mark.parametrize("gate", sorted(GATES))
def test_router_only_is_measured_on_its_own_loss(gate: str) -> None:
    attack = PGD(l2(0.1), objective=router_only())
    sees = seen(checks.router_in_sight, Pair(gate), attack, RANDOM)
    assert (sees.status, sees.value) == ("pass", 1.0)
    blind = seen(checks.router_in_sight, Pair(gate, 0.0), attack, RANDOM)
    assert (blind.status, blind.value) == ("fail", 0.0)


def test_constant_experts_and_no_path_at_all() -> None:
    """Experts that do not look at the image: all there is of a gradient goes through the router, or there is none."""

    class Constant(RoutedModel):
        def __init__(self, gate: str) -> None:
            super().__init__()
            self.gate, self.experts = gate, nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            routing = tape("router", GATES[self.gate](torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1]], 1)[:, None]))
            return (routing.weight[:, 0, :, None] * self.experts[routing.index[:, 0]]).sum(1)

    assert seen(checks.router_in_sight, Constant("straight"), JOINT, RANDOM).value == pytest.approx(1.0)
    assert seen(checks.router_in_sight, Constant("hard"), JOINT, RANDOM).status == "fail"


def test_the_checks_leave_the_model_as_it_was(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    for module in itertools.islice(model.modules(), 0, None, 2):
        module.training = False
    before = checks.fingerprint(model)
    found = checks.before(model, JOINT, batch(images(6)))
    assert checks.fingerprint(model) == before
    assert [check.id for check in found] == ["H1", "H6", "H7", "H4", "G1", "R1"]
    assert all(check.status == "pass" for check in found[:4])
