"""Each method against a few independent lines, the balance loss by hand, and what the attack inside may touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import PGD, Attack, Joint, RouterOnly, linf
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, soft, top_k
from robustmoe.training import Method, MiniBatch, at, build_method, standard, trades, train_step
from robustmoe.training.auxiliary import load_balance
from robustmoe.training.optimisation import SGD


class One(RoutedModel):
    """logits = (w * x, 0) of one-pixel images: one weight."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixel = x[:, 0, 0, 0]
        return torch.stack([self.w * pixel, torch.zeros_like(pixel)], 1)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def gradient_of(method: Method, model: RoutedModel, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The step that plain SGD with lr 1 takes, with the sign turned."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimisers = [SGD(1.0, 0.0, 0.0).make(phase.parameters(model).values()) for phase in method.phases]
    train_step(model, method, optimisers, MiniBatch(x, y, Noise.of(torch.arange(len(x)), 5)))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


X = torch.tensor([0.5, 0.8]).view(2, 1, 1, 1)
Y = torch.tensor([0, 1])


def test_standard_by_hand() -> None:
    """w = 1. Image 1 (0.5, label 0): loss log(1 + e^(-w x)), gradient -x s(-w x). Image 2 (0.8, label 1): x s(w x)."""
    expected = (-0.5 * sigmoid(-0.5) + 0.8 * sigmoid(0.8)) / 2
    assert gradient_of(standard(), One(1.0), X, Y)["w"].item() == pytest.approx(expected, rel=1e-5)


def test_standard_with_label_smoothing_by_hand() -> None:
    """Targets 0.9 and 0.1 of two classes: 0.2 / 2 to each. d/dw = x (s(w x) - target of class 0)."""
    expected = (0.5 * (sigmoid(0.5) - 0.9) + 0.8 * (sigmoid(0.8) - 0.1)) / 2
    found = gradient_of(standard(label_smoothing=0.2), One(1.0), X, Y)["w"].item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_at_by_hand() -> None:
    """With w > 0 the loss of label 0 grows as x falls and that of label 1 as x rises: 0.5 -> 0.4, 0.8 -> 0.9."""
    attack = PGD(linf(0.1), steps=3, step_size=0.1, keep="last")
    expected = (-0.4 * sigmoid(-0.4) + 0.9 * sigmoid(0.9)) / 2
    assert gradient_of(at(attack), One(1.0), X, Y)["w"].item() == pytest.approx(expected, rel=1e-5)


def test_trades_by_hand() -> None:
    """w = 4. With p = s(w x), q = s(w z) the gradient is x (p - [y = 0]) + 6 (x p (1 - p) w (x - z) - z (p - q)).

    The KL grows with |z - x|, so each image ends at an edge of its ball (inside the box), by its random start.
    """
    w = 4.0

    def gradient(x: float, z: float, y: int, beta: float) -> float:
        p, q = sigmoid(w * x), sigmoid(w * z)
        return x * (p - (y == 0)) + beta * (x * p * (1 - p) * w * (x - z) - z * (p - q))

    attack = PGD(linf(0.3), steps=3, step_size=0.3)
    found = gradient_of(trades(attack, beta=6.0), One(w), X, Y)["w"].item()
    edges = [(u, v) for u in (0.2, 0.8) for v in (0.5, 1.0)]
    possible = [(gradient(0.5, u, 0, 6.0) + gradient(0.8, v, 1, 6.0)) / 2 for u, v in edges]
    assert min(abs(found - each) for each in possible) < 1e-5
    clean = (gradient(0.5, 0.5, 0, 0.0) + gradient(0.8, 0.8, 1, 0.0)) / 2
    assert min(abs(clean - each) for each in possible) > 0.005


@dataclass(frozen=True)
class Stored(Attack):
    """An attack that answers with images made before."""

    x_adv: Tensor
    objective: Joint = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    def __call__(self, model: object, x: Tensor, y: Tensor, noise: Noise | None = None) -> Tensor:
        return self.x_adv

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.x_adv


@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_trades_is_its_few_lines(
    balance: float, images: Callable[..., Tensor], labels: Callable[[int], Tensor], tiny: Callable[..., RoutedModel]
) -> None:
    """Zhang et al. 2019, with torch's own kl_div, on a routed model with BatchNorm in train mode."""
    x, y = images(16), labels(16)
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    model, twin = tiny("pathway"), tiny("pathway")
    found = gradient_of(trades(Stored(x_adv), beta=3.0, balance=balance), model, x, y)

    twin.train()
    clean = twin.run(x)
    attacked = twin(x_adv)
    value = F.cross_entropy(clean.logits, y) + 3.0 * F.kl_div(
        attacked.log_softmax(1), clean.logits.softmax(1), reduction="batchmean"
    )
    routing = clean.trace["router"]
    f = F.one_hot(routing.index[:, 0, 0], 3).float().mean(0)
    value = value + balance * (3 * (f * routing.logits[:, 0].softmax(1).mean(0)).sum() - 1)
    value.backward()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-6)


def test_trades_climbs_kl_unless_it_is_told_another_objective() -> None:
    given = PGD(linf(0.1))
    method = trades(given)
    assert isinstance(method.attack, PGD)
    assert method.attack.objective == Joint("kl")
    assert given.objective == Joint()
    other = PGD(linf(0.1), objective=RouterOnly())
    assert trades(other).attack == other
    assert at(given).attack == given
    assert standard().attack is None


NAMES = ["at(pgd(linf(0.1), steps=2), balance=0.1)", "trades(pgd(linf(0.1), steps=2), balance=0.1)"]


@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_attack_inside_leaves_no_mark(
    text: str,
    autocast: torch.dtype | None,
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
    tiny: Callable[..., RoutedModel],
) -> None:
    """The step with the attack is the step with its stored images: weights and BatchNorm's buffers, bit for bit."""
    from dataclasses import replace

    x, y = images(16), labels(16)
    noise = Noise.of(torch.arange(16), 5)
    method = build_method(text)
    model, twin = tiny("pathway"), tiny("pathway")
    assert method.attack is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        x_adv = method.attack(twin, x, y, noise.fold(0))
    assert x_adv.dtype == torch.float32
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    # No pixel of the perturbation went through bf16: it would be a multiple of 2^-12 there
    assert not torch.equal(x_adv, x_adv.bfloat16().float())
    build = at if text.startswith("at") else trades
    stored = build(Stored(x_adv), balance=0.1)
    for each, with_method in ((model, method), (twin, stored)):
        each.train()
        optimiser = SGD(0.1).make(each.parameters())
        train_step(each, with_method, [optimiser], MiniBatch(x, y, noise), autocast=autocast)
        assert all(module.training for module in each.modules())
    state, other = model.state_dict(), twin.state_dict()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    counted = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counted == {1 if build is at else 2}  # TRADES passes twice in train mode, the attack never
    assert replace(method.attack, seed=0) == method.attack


def routing(shares: list[int], probability: list[float]) -> Routing:
    """Top-1 decisions, ``shares[j]`` images to expert j, every image's softmax being ``probability``."""
    index = torch.tensor([j for j, count in enumerate(shares) for _ in range(count)])[:, None, None]
    logits = torch.tensor(probability).log().expand(len(index), 1, -1).clone().requires_grad_()
    return Routing(logits, index, torch.ones(index.shape))


@pytest.mark.parametrize(
    "shares, probability, expected",
    [
        ([2, 2], [0.5, 0.5], 0.0),  # balanced: 2 (0.5 * 0.5 + 0.5 * 0.5) - 1
        ([4, 0], [0.5, 0.5], 0.0),  # the probabilities are even: the same sum
        ([4, 0], [0.9, 0.1], 0.8),  # 2 * (1 * 0.9) - 1
        ([3, 1], [0.75, 0.25], 0.25),  # 2 * (0.75 * 0.75 + 0.25 * 0.25) - 1
        ([1, 1, 2], [0.2, 0.2, 0.6], 0.2),  # 3 * (0.05 + 0.05 + 0.3) - 1
    ],
)
def test_load_balance_by_hand(shares: list[int], probability: list[float], expected: float) -> None:
    assert load_balance(routing(shares, probability)).item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_load_balance_by_hand() -> None:
    """e * sum_j f_j P_j, f fixed: d / d logit_i of one image = e / n * p_i (f_i - sum_j f_j p_j).

    Four images, f = (1, 0), p = (0.9, 0.1): 2 / 4 * 0.9 * (1 - 0.9) = 0.045, and -0.045.
    """
    given = routing([4, 0], [0.9, 0.1])
    (gradient,) = torch.autograd.grad(load_balance(given), given.logits)
    assert gradient[:, 0].flatten().tolist() == pytest.approx([0.045, -0.045] * 4, rel=1e-5)


def test_load_balance_counts_every_choice_and_every_item() -> None:
    """k = 2 of 3 experts, 2 items an image: shares add up to 1. With k = e every expert has 1/e: always balanced."""
    logits = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    p = logits[0, 0].softmax(0)
    assert load_balance(top_k(logits, 2)).item() == pytest.approx(3 * float(p[0] + p[1]) / 2 - 1)
    assert load_balance(soft(logits)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "text", ["standard(balance=-0.1)", "at(fgsm(linf(0.1)), balance=-1.0)", "trades(fgsm(linf(0.1)), beta=-1.0)"]
)
def test_a_negative_weight_is_refused(text: str) -> None:
    from robustmoe.errors import UserError

    with pytest.raises(UserError, match="must be 0 or more; got -"):
        build_method(text)
