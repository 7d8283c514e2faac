"""Schedules at points worked by hand, optimisers against torch's, the moving average by its recursion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustmoe import spec
from robustmoe.errors import UserError
from robustmoe.training import SGD, AdamW
from robustmoe.training.optimisation import Average, OptimizerSpec, constant, cosine, cyclic, one_cycle, poly, step
from robustmoe.training.phases import _move

POINTS = [
    (constant(), {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    # (1 + cos(pi p)) / 2: cos(pi/3) = 1/2, cos(2 pi/3) = -1/2
    (cosine(), {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0}),
    # up to 1 at 0.2; then half a cosine over the remaining 0.8: its middle is 0.6
    (cosine(warmup=0.2), {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.6: 0.5, 1.0: 0.0}),
    # up to 1 at 0.4, down to 0 over 0.6: at 0.7 it is (1 - 0.7) / 0.6
    (one_cycle(), {0.0: 0.0, 0.2: 0.5, 0.4: 1.0, 0.7: 0.5, 1.0: 0.0}),
    # two triangles from 0.5 to 1: tops at 1/4 and 3/4, half-way up (0.75) at 1/8
    (cyclic(cycles=2.0), {0.0: 0.5, 1 / 8: 0.75, 1 / 4: 1.0, 3 / 8: 0.75, 1 / 2: 0.5, 3 / 4: 1.0, 1.0: 0.5}),
    # one and a half: the run ends at a top; at 1/2 three quarters of the first are over, half-way down to 0.2
    (cyclic(cycles=1.5, low=0.2), {0.0: 0.2, 1 / 3: 1.0, 1 / 2: 0.6, 2 / 3: 0.2, 1.0: 1.0}),
    (one_cycle(rise=0.0), {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
    (poly(2.0), {0.0: 1.0, 0.5: 0.25, 0.9: 0.01, 1.0: 0.0}),
    (step(), {0.0: 1.0, 0.49: 1.0, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1.0: 0.01}),
    (step((0.9, 0.3), factor=0.5), {0.29: 1.0, 0.3: 0.5, 0.9: 0.25}),
]


@pytest.mark.parametrize("schedule, points", POINTS)
def test_schedules_at_points_worked_by_hand(schedule: object, points: dict[float, float]) -> None:
    assert callable(schedule)
    assert {p: schedule(p) for p in points} == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize(
    "text", ["cosine(warmup=1.0)", "one_cycle(rise=-0.1)", "step(milestones=(0.5, 1.5))", "cyclic(low=1.0)"]
)
def test_a_share_outside_0_to_1_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"must be in \[0, 1\), a share of the run"):
        spec.build(text, "schedule")


@pytest.mark.parametrize("cycles", [0.0, -1.0])
def test_no_cycle_at_all_is_refused(cycles: float) -> None:
    with pytest.raises(UserError, match=f"cycles must be above 0; got {cycles}"):
        spec.build(f"cyclic(cycles={cycles})", "schedule")
    with pytest.raises(UserError, match="power must be above 0"):
        spec.build(f"poly(power={cycles})", "schedule")


def test_cyclic_is_the_schedule_of_rt_ers_released_code() -> None:
    """Of RT-ER's code: torch's triangular CyclicLR from 5e-5 to 1e-4, 500 iterations up, over 3000 iterations."""
    layer = nn.Linear(1, 1)
    theirs = torch.optim.lr_scheduler.CyclicLR(
        optimiser := torch.optim.Adam(layer.parameters()), 5e-5, 1e-4, step_size_up=500, cycle_momentum=False
    )
    ours, seen = cyclic(cycles=3.0, low=0.5), []
    for _ in range(3000):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    assert [1e-4 * ours(place / 3000) for place in range(3000)] == pytest.approx(seen, rel=1e-9)


@pytest.mark.parametrize(
    "text", ["sgd(lr=0.0)", "adamw(lr=-1.0)", "sgd(weight_decay=-0.1)", "adamw(weight_decay=-1.0)"]
)
def test_a_learning_rate_or_decay_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="lr must be above 0, weight_decay 0 or more"):
        spec.build(text, "optimizer")


def test_specs_make_torchs_optimisers() -> None:
    layer = nn.Linear(2, 2)
    sgd = SGD(0.3, 0.8, 1e-3, nesterov=True).make(layer.parameters())
    assert type(sgd) is torch.optim.SGD
    assert {key: sgd.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov", "dampening")} == {
        "lr": 0.3,
        "momentum": 0.8,
        "weight_decay": 1e-3,
        "nesterov": True,
        "dampening": 0,
    }
    adamw = AdamW(2e-3, 0.1, 0.8, 0.99).make(layer.parameters())
    assert type(adamw) is torch.optim.AdamW
    assert {key: adamw.defaults[key] for key in ("lr", "weight_decay", "betas")} == {
        "lr": 2e-3,
        "weight_decay": 0.1,
        "betas": (0.8, 0.99),
    }


def test_sgd_with_momentum_and_decay_by_hand() -> None:
    """w = 2, gradient 1 twice. g = 1 + 0.5 * 2 = 2, v = 2, w = 2 - 0.1 * 2 = 1.8; g = 1 + 0.9 = 1.9, v = 0.5 * 2 + 1.9
    = 2.9, w = 1.8 - 0.29 = 1.51.
    """
    weight = nn.Parameter(torch.tensor([2.0]))
    optimiser = SGD(0.1, momentum=0.5, weight_decay=0.5).make([weight])
    seen = []
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimiser.step()
        seen.append(weight.item())
    assert seen == pytest.approx([1.8, 1.51])


def test_parameters_named_undecayed_have_no_weight_decay() -> None:
    """w = 2, gradient 1, lr 0.1: 2 - 0.1 * (1 + 0.5 * 2) = 1.8 with a decay of 0.5, and 1.9 without."""
    named = {"affine.0.experts": nn.Parameter(torch.tensor([2.0])), "affineless": nn.Parameter(torch.tensor([2.0]))}
    named["network.affine."] = nn.Parameter(torch.tensor([2.0]))
    optimiser = SGD(0.1, 0.0, 0.5, undecayed=r"affine\.").over(named)
    for weight in named.values():
        weight.grad = torch.ones(1)
    optimiser.step()
    assert [weight.item() for weight in named.values()] == pytest.approx([1.9, 1.8, 1.8])
    with pytest.raises(UserError, match=r"undecayed='router' names no parameter; expected names such as 'affine.0"):
        SGD(undecayed="router").over(named)
    with pytest.raises(ValueError, match=r"undecayed must be a regular expression; got '\('"):
        SGD(undecayed="(")


def test_adamw_first_step_by_hand() -> None:
    """After one step m / sqrt(v) = sign(g): w = 2 - 0.1 * 0.5 * 2 - 0.1 * 1 = 1.8, whatever the gradient's size."""
    weight = nn.Parameter(torch.tensor([2.0]))
    optimiser = AdamW(0.1, weight_decay=0.5).make([weight])
    weight.grad = torch.tensor([123.0])
    optimiser.step()
    assert weight.item() == pytest.approx(1.8)


@pytest.mark.parametrize("spec, plain", [(SGD(0.1), torch.optim.SGD), (AdamW(0.1), torch.optim.AdamW)])
def test_a_step_is_torchs_plain_one_whatever_the_order_of_memory(
    spec: OptimizerSpec, plain: type[torch.optim.Optimizer]
) -> None:
    """A fused optimiser of torch 2.13 walks through a gradient's memory, which may be in another order than the
    weight's: a convolution's gradient on channels-last images is.
    """
    weights = [torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(5)]
    made, expected = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    ours = spec.over({str(at): weight for at, weight in enumerate(made)})
    assert ours.defaults["fused"]
    settings = {key: value for key, value in ours.defaults.items() if key not in ("fused", "decoupled_weight_decay")}
    theirs = plain(expected, **settings, fused=False)
    for _ in range(3):
        gradients = [torch.randn(4, 3, 2, 2) for _ in range(2)] + [torch.randn(5)]
        gradients[0] = gradients[0].to(memory_format=torch.channels_last)
        _move(ours, dict(zip("012", made)), dict(zip("012", gradients)), torch.zeros(()), 0.0, None)
        for weight, gradient in zip(expected, gradients):
            weight.grad = gradient
        theirs.step()
    for weight, plainly in zip(made, expected):
        torch.testing.assert_close(weight, plainly, rtol=1e-5, atol=1e-6)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0]))
        self.register_buffer("running", torch.tensor([0.0]))
        self.register_buffer("count", torch.tensor(0))


def test_the_average_by_its_recursion() -> None:
    """decay at update t is min(0.3, (1 + t) / (10 + t)): 2/11, 3/12, then 0.3 (4/13 is above it). Values 1, 2, 3:
    a1 = 9/11, a2 = 0.25 a1 + 0.75 * 2, a3 = 0.3 a2 + 0.7 * 3.
    """
    model = Counter()
    average = Average(model, 0.3)
    expected = 0.0
    for t, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        with torch.no_grad():
            model.weight.fill_(float(t))
            model.get_buffer("running").fill_(10.0 * t)
            model.get_buffer("count").fill_(t)
        average.update(model)
        expected = decay * expected + (1 - decay) * t
        assert average.state["weight"].item() == pytest.approx(expected)
        assert average.state["running"].item() == pytest.approx(10 * expected)  # BatchNorm's statistics too
        assert average.state["count"].item() == t  # integers are copied
    assert model.weight.item() == 3.0
    assert not average.state["weight"].requires_grad


def test_the_average_starts_at_the_model_and_survives_a_round_trip() -> None:
    model = Counter()
    average = Average(model, 0.99)
    average.update(model)
    assert average.state["weight"].item() == 0.0
    again = Average(model, 0.99)
    again.load_state_dict(average.state_dict())
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.update(model)
    again.update(model)
    assert again.state["weight"].item() == average.state["weight"].item() == pytest.approx(1 - 3 / 12)
    assert again.steps == 2


def test_the_warm_up_never_passes_the_decay() -> None:
    """(1 + t) / (10 + t) reaches 0.5 at t = 8."""
    model = Counter()
    average = Average(model, 0.5)
    average.steps = 7
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.update(model)
    assert average.state["weight"].item() == pytest.approx(0.5)
    average.steps = 10**6
    average.update(model)
    assert average.state["weight"].item() == pytest.approx(0.75)
    assert math.isclose(average.decay, 0.5)
