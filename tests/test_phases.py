"""One training step by hand on models of one weight: only a phase's parameters move, and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustmoe.errors import UserError
from robustmoe.models import DualModel, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Tape
from robustmoe.training import METHODS, Loss, Method, MiniBatch, Phase, TrainingStopped, build_method, train_step
from robustmoe.training.methods import EXPERTS, ROUTERS
from robustmoe.training.optimisation import SGD
from tiny_models import TINY

NO_NOISE = Noise.of(torch.arange(2))


class Weights(RoutedModel):
    """logits = (a * x, b * x) of one-pixel images; `c` is there and unused."""

    def __init__(self, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))
        self.b = nn.Parameter(torch.tensor([b]))
        self.c = nn.Parameter(torch.tensor([5.0]))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixel = x[:, 0, 0, :1]
        return torch.cat([self.a * pixel, self.b * pixel], 1)


def linear(weight: str) -> Callable[..., Loss]:
    """loss = 3 * parameter * mean(x): the gradient is 3 mean(x)."""

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        return Loss((3.0 * getattr(model, weight)).sum() * x.mean(), torch.tensor(1))

    return loss


def optimisers(method: Method, model: nn.Module, lr: float = 0.5) -> list[torch.optim.Optimizer]:
    return [SGD(lr, momentum=0.0, weight_decay=0.0).make(phase.parameters(model).values()) for phase in method.phases]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, 0.5]).view(2, 1, 1, 1), torch.tensor([0, 1])


def test_two_phases_move_their_own_parameters_one_after_the_other(batch: tuple[Tensor, Tensor]) -> None:
    """First "a" on 3 a mean(x) (gradient 2.25), then "b" on a * b, which sees the moved a: 1 - 0.5 * 2.25 = -0.125."""

    def product(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        assert isinstance(model, Weights)
        return Loss((model.a * model.b).sum(), torch.tensor(2))

    model = Weights()
    method = Method((Phase("first", "a", linear("a")), Phase("second", "b$", product)))
    result = train_step(model, method, optimisers(method, model), MiniBatch(*batch, NO_NOISE))
    assert model.a.item() == 1 - 0.5 * 2.25
    assert model.b.item() == 0 - 0.5 * -0.125
    assert model.c.item() == 5.0
    assert [p.grad for p in model.parameters()] == [None, None, None]
    assert {name: value.item() for name, value in result.loss.items()} == {"first": 2.25, "second": 0.0}
    assert {name: value.item() for name, value in result.grad_norm.items()} == {"first": 2.25, "second": 0.125}
    assert (result.correct.item(), result.seen) == (2, 2)  # those of the last phase


def test_each_phase_has_its_own_random_numbers(batch: tuple[Tensor, Tensor]) -> None:
    seen = []

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        seen.append(noise.state.tolist())
        return linear("a")(model, x, y, noise)

    model = Weights()
    method = Method((Phase("first", "a", loss), Phase("second", "a", loss)))
    train_step(model, method, optimisers(method, model), MiniBatch(*batch, NO_NOISE))
    assert seen == [NO_NOISE.fold(0).state.tolist(), NO_NOISE.fold(1).state.tolist()]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("clip, moved", [(0.0, (3.0, 4.0)), (10.0, (3.0, 4.0)), (1.0, (0.6, 0.8)), (2.5, (1.5, 2.0))])
def test_clipping_scales_a_gradient_of_norm_5(
    clip: float, moved: tuple[float, float], batch: tuple[Tensor, Tensor]
) -> None:
    """The gradient is (3, 4); above the largest norm it is scaled down to it."""

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        assert isinstance(model, Weights)
        return Loss(3 * model.a.sum() + 4 * model.b.sum(), torch.tensor(0))

    model = Weights(0.0, 0.0)
    method = Method((Phase("both", "a|b", loss),))
    result = train_step(model, method, optimisers(method, model, lr=1.0), MiniBatch(*batch, NO_NOISE), clip=clip)
    assert (-model.a.item(), -model.b.item()) == pytest.approx(moved, rel=1e-6)
    assert result.grad_norm["both"].item() == pytest.approx(5.0)  # before clipping


def test_clipping_where_autograd_gives_two_parameters_one_tensor(batch: tuple[Tensor, Tensor]) -> None:
    """The loss 3 * sum(a + b): both gradients are the same expanded tensor, of joint norm 3 sqrt(2)."""

    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        assert isinstance(model, Weights)
        return Loss((3 * (model.a + model.b)).sum(), torch.tensor(0))

    model = Weights(0.0, 0.0)
    method = Method((Phase("both", "a|b", loss),))
    train_step(model, method, optimisers(method, model, lr=1.0), MiniBatch(*batch, NO_NOISE), clip=1.0)
    assert [model.a.item(), model.b.item()] == pytest.approx([-(0.5**0.5)] * 2)


def test_a_parameter_without_gradient_has_gradient_zero(batch: tuple[Tensor, Tensor]) -> None:
    """Weight decay alone moves it: 5 - 0.5 * 0.1 * 5 = 4.75."""
    model = Weights()
    method = Method((Phase("all", "", linear("a")),))
    optimiser = SGD(0.5, momentum=0.0, weight_decay=0.1).make(method.phases[0].parameters(model).values())
    train_step(model, method, [optimiser], MiniBatch(*batch, NO_NOISE))
    assert model.c.item() == pytest.approx(4.75)


def test_a_phase_that_moves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="phase 'x' moves the parameters that match 'router'; this model has none"):
        Phase("x", "router", linear("a")).parameters(Weights())
    model = Weights()
    model.a.requires_grad_(False)
    assert set(Phase("x", "", linear("a")).parameters(model)) == {"b", "c"}
    with pytest.raises(UserError, match="this model has none"):
        Phase("x", "a", linear("a")).parameters(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(bad: float, batch: tuple[Tensor, Tensor]) -> None:
    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        assert isinstance(model, Weights)
        return Loss(model.a.sum() + bad * model.b.sum(), torch.tensor(0))

    model = Weights(1.0, 1.0)
    method = Method((Phase("broken", "", loss),))
    said = r"in phase 'broken' the gradient of 'b' \(1 of 3 parameters\) is not finite"
    with pytest.raises(TrainingStopped, match=said):
        train_step(model, method, optimisers(method, model), MiniBatch(*batch, NO_NOISE), clip=1.0)
    assert [p.item() for p in model.parameters()] == [1.0, 1.0, 5.0]
    assert [p.grad for p in model.parameters()] == [None, None, None]


def test_a_loss_that_is_not_finite_stops(batch: tuple[Tensor, Tensor]) -> None:
    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        return Loss(linear("a")(model, x, y, noise).value + torch.tensor(torch.nan), torch.tensor(0))

    method = Method((Phase("broken", "a", loss),))
    with pytest.raises(TrainingStopped, match=r"in phase 'broken' the loss is not finite \(loss nan\)"):
        train_step(model := Weights(), method, optimisers(method, model), MiniBatch(*batch, NO_NOISE))


def test_finite_gradients_whose_norm_overflows_are_called_so(batch: tuple[Tensor, Tensor]) -> None:
    def loss(model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        assert isinstance(model, Weights)
        return Loss((1e30 * (model.a + model.b)).sum() * 0 + 3e38 * (model.a - model.b).sum(), torch.tensor(0))

    method = Method((Phase("broken", "", loss),))
    with pytest.raises(TrainingStopped, match="the norm of the gradient is not finite"):
        train_step(model := Weights(0.0, 0.0), method, optimisers(method, model), MiniBatch(*batch, NO_NOISE))


METHODS_HERE = {
    "standard": "standard(balance=0.1)",
    "gaussian": "gaussian(sigma=0.25, balance=0.1)",
    "at": "at(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
    "trades": "trades(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
    "mart": "mart(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
    "awp": "awp(at(pgd(linf(0.1), steps=2, keep=last), balance=0.1))",
    "advmoe": "advmoe(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
    "rt_er": "rt_er(pgd(linf(0.1), steps=2, keep=last), balance=0.1)",
    "jtdmoe": "jtdmoe(pgd(linf(0.1), steps=2, keep=last))",
    "certified": "certified(linf(0.01), stability=0.1, balance=0.1)",
    "consistent": "consistent(at(pgd(linf(0.1), steps=2, keep=last), balance=0.1), of=model)",
}


def test_every_method_is_tested_here() -> None:
    assert set(METHODS_HERE) == set(METHODS)


def meetings() -> list[tuple[str, str, torch.dtype | None]]:
    """Returns every method with every tiny model: each with every second in float32, in turn, and under bf16 with the
    others.
    """
    return [
        (name, model, torch.bfloat16 if (turn + place) % 2 else None)
        for turn, name in enumerate(METHODS_HERE)
        for place, model in enumerate(sorted(TINY))
    ]


@pytest.mark.parametrize("name, kind, autocast", meetings())
def test_every_method_moves_its_phases_parameters_alone(
    name: str,
    kind: str,
    autocast: torch.dtype | None,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """The routers frozen, then the routers alone: the others are bit for bit as they were, and no gradient is left."""
    whole, model = build_method(METHODS_HERE[name]), tiny(kind)
    names = [key for key, _ in model.named_parameters()]
    if name == "jtdmoe" and not isinstance(model, DualModel):
        with pytest.raises(UserError, match="expected a dual model"):
            whole.phases[0].parameters(model)
        return
    for params in (EXPERTS, ROUTERS if any(re.match(ROUTERS, key) for key in names) else "network.stages"):
        half = "(?={})" if name == "jtdmoe" else ""  # its phases keep to their halves
        phases = [replace(each, params=half.format(each.params) + params, own_batch=False) for each in whole.phases]
        method = Method(tuple(phases), whole.attack)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        noise = Noise.of(torch.arange(24), 1)
        train_step(
            model, method, optimisers(method, model, 0.1), MiniBatch(images(24), labels(24), noise), autocast=autocast
        )
        assert model.training
        assert all(value.grad is None for value in model.parameters())
        own = {key for phase in method.phases for key in phase.parameters(model)}
        still = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
        assert set(names) - own <= still
        # Under bf16 too every weight of the network has a gradient (autocast keeps casts made without one for reuse).
        assert not {key for key in own & still if ".experts." not in f".{key}"}
        assert all(value.dtype == torch.float32 for value in model.parameters())
