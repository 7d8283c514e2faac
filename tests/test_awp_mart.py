"""Adversarial weight perturbation and MART, each against its formula written a second time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import spec
from robustmoe.attacks import PGD, Attack, Joint, linf
from robustmoe.attacks.base import remembering
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, at, awp, build_method, mart, standard, trades, train_step
from robustmoe.training.methods import mart_loss
from robustmoe.training.uphill import moved, statistics_kept, steps_uphill
from test_methods import Stored, gradient_of

Images, Labels, Tiny = Callable[..., Tensor], Callable[[int], Tensor], Callable[..., RoutedModel]


@dataclass(frozen=True)
class Counted(Attack):
    """Moves every pixel up, and remembers the weights it was asked at."""

    asked: list[float] = field(default_factory=list)
    objective: Joint = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    @property
    def threat(self):  # type: ignore[override, no-untyped-def]
        return linf(0.1)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        self.asked.append(float(next(model.parameters()).detach().abs().sum()))
        return (x + 0.1).clamp(max=1)


# ------------------------------------------------------------------------------------------------ AWP


@pytest.mark.parametrize("kind", ["dense", "pathway"])
def test_the_gradient_is_that_at_the_moved_weights(kind: str, images: Images, labels: Labels, tiny: Tiny) -> None:
    """By the authors' way: a copy goes uphill, its difference is scaled layer by layer to gamma of the norm."""
    x, y, gamma = images(12), labels(12), 0.05
    x_adv = (x + 0.1).clamp(max=1)
    model, twin = tiny(kind), tiny(kind)
    found = gradient_of(awp(at(Counted()), gamma), model, x, y)

    twin.train()
    proxy = copy.deepcopy(twin)
    F.cross_entropy(proxy(x_adv), y).backward()
    rate = 0.01
    for name, weight in proxy.named_parameters():
        if weight.ndim > 1 and weight.grad is not None:
            old = twin.get_parameter(name).detach()
            difference = (old + rate * weight.grad) - old
            with torch.no_grad():
                twin.get_parameter(name).add_(gamma * old.norm() / (difference.norm() + 1e-20) * difference)
    F.cross_entropy(twin(x_adv), y).backward()
    for name, parameter in twin.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], wanted, rtol=2e-2, atol=2e-5)
    plain = gradient_of(at(Counted()), tiny(kind), x, y)
    assert any(not torch.allclose(plain[name], found[name], rtol=2e-2, atol=2e-5) for name in plain)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), msg="statistics of the second pass alone")


def test_one_attack_a_step_and_at_the_weights_themselves(images: Images, labels: Labels, tiny: Tiny) -> None:
    x, y, attack, model = images(6), labels(6), Counted(), tiny("dense")
    before = float(next(model.parameters()).detach().abs().sum())
    gradient_of(awp(at(attack), 0.1), model, x, y)
    assert attack.asked == [before]


def test_the_step_by_hand() -> None:
    """gamma ||W|| along the gradient, of matrices alone; back bit for bit, also where something fails."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = torch.nn.Parameter(torch.tensor([1.0]))
    gradients = {"w": torch.tensor([[0.0, -2.0]]), "b": torch.tensor([1.0])}
    ((which, step),) = steps_uphill({"w": weight, "b": bias}, gradients, 0.1)
    assert which is weight
    torch.testing.assert_close(step, torch.tensor([[0.0, -0.5]]))
    ((_, still),) = steps_uphill({"w": weight}, {"w": torch.zeros(1, 2)}, 0.1)
    assert not bool(still.any())
    with moved([(weight, step)]):
        assert weight.tolist() == [[3.0, 3.5]]
    assert weight.tolist() == [[3.0, 4.0]]
    norm = torch.nn.BatchNorm1d(2)
    with statistics_kept(norm):
        norm(torch.randn(8, 2))
        assert float(norm.running_mean.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(norm.running_mean.abs().sum()) == 0  # type: ignore[union-attr]
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_it_begins_at_its_share_of_the_training(images: Images, labels: Labels, tiny: Tiny) -> None:
    method = awp(standard(), 0.1, start=0.5)
    x, y = images(6), labels(6)
    plain, early, late = (
        gradient_of(each, tiny("dense"), x, y) for each in (standard(), method.at(0.49), method.at(0.5))
    )
    assert all(torch.equal(plain[name], early[name]) for name in plain)
    assert any(not torch.equal(plain[name], late[name]) for name in plain)


def test_every_method_takes_it(images: Images, labels: Labels, tiny: Tiny) -> None:
    """Two phases, an attack on single experts, a term on the routers: as many attacks as without."""
    x, y = images(6), labels(6)
    for text in ("advmoe({})", "rt_er({})", "consistent(at({}))", "trades({})", "mart({})"):
        method = build_method(f"awp({text.format('pgd(linf(0.1), steps=1)')}, gamma=0.01)")
        assert {phase.awp for phase in method.phases} == {0.01}
        assert method.attack is not None
        model = tiny("pathway")
        optimisers = [torch.optim.SGD([*phase.parameters(model).values()], lr=0.1) for phase in method.phases]
        batch = MiniBatch(x, y, Noise.of(torch.arange(6), 3))
        result = train_step(model, method, optimisers, batch, second=batch)
        assert all(bool(torch.isfinite(value)) for value in result.loss.values())


def test_what_is_remembered(tiny: Tiny, images: Images, labels: Labels) -> None:
    """In order, and only where the number of images is the same; what an attack calls inside is its own matter."""
    attack, model, x, y = Counted(), tiny("dense"), images(4), labels(4)
    made: list[Tensor] = []
    with remembering(made):
        first = attack(model, x, y)
        attack(model, x[:2], y[:2])
    assert [len(each) for each in made] == [4, 2]
    with remembering(made, again=True):
        assert attack(model, x * 0, y) is first
        assert len(attack(model, x[:3], y[:3])) == 3
        assert len(attack(model, x, y)) == 4
    assert len(attack.asked) == 4
    assert len(made) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("awp(standard, gamma=0)", "gamma must be above 0"),
        ("awp(standard, start=1)", "start must be in"),
        ("mart(pgd(linf(0.1)), beta=-1)", "beta must be 0 or more"),
        ("awp(linf(0.1))", "awp"),
    ],
)
def test_what_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        spec.build(text, "method")


# ------------------------------------------------------------------------------------------------ MART


def by_the_released_code(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """Image by image, as the formula is released, without its small constants."""
    total = torch.zeros((), dtype=torch.float64)
    for p_logits, q_logits, label in zip(clean.double(), attacked.double(), y.tolist()):
        p, q = torch.softmax(p_logits, 0), torch.softmax(q_logits, 0)
        top = q.argsort(descending=True)
        rival = int(top[1]) if int(top[0]) == label else int(top[0])
        boosted = -torch.log(q[label]) - torch.log(1 - q[rival])
        total = total + boosted + beta * (p * (p.log() - q.log())).sum() * (1 - p[label])
    return total / len(y)


def test_mart_is_its_formula() -> None:
    clean = (3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    attacked = (3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
    y = torch.arange(7) % 5
    value, wanted = mart_loss(clean, attacked, y, 4.0), by_the_released_code(clean, attacked, y, 4.0)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(value, (clean, attacked)), torch.autograd.grad(wanted, (clean, attacked))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_mart_stays_finite_where_its_formula_does_not() -> None:
    """A rival of probability 1 in float32: log(1 - q) would be -inf."""
    logits = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    value = mart_loss(torch.zeros(1, 3), logits, torch.tensor([0]), 1.0)
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_a_step_of_mart(balance: float, images: Images, labels: Labels, tiny: Tiny) -> None:
    x, y = images(12), labels(12)
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    found = gradient_of(mart(Stored(x_adv), 5.0, balance=balance), tiny("pathway"), x, y)
    twin = tiny("pathway").train()
    clean, attacked = twin.run(x).logits, twin.run(x_adv)
    value = by_the_released_code(clean, attacked.logits, y, 5.0)
    routing = attacked.trace["router"]
    share = F.one_hot(routing.index[:, 0, 0], 3).float().mean(0)
    (value + balance * (3 * (share * routing.logits[:, 0].softmax(1).mean(0)).sum() - 1)).backward()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-6)
    given = PGD(linf(0.1), steps=2)
    assert mart(given).attack == given, "it climbs the cross-entropy, not the KL of TRADES"
    assert trades(given).attack != given
