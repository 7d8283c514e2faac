"""Attacks do not depend on the scale of the logits: neither where a softmax says nothing, nor where float32 ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks.losses import Loss, climb, loss_of, targeted_climb
from robustmoe.attacks.objectives import Diluted, RouterOnly
from robustmoe.attacks.pgd import ascend
from robustmoe.attacks.routes import JointNormalised
from robustmoe.data import DATASETS, Batch
from robustmoe.evaluation.checks import deep
from robustmoe.models import RoutedModel, as_routed
from robustmoe.routing import Tape

SCALES = (1e-40, 1e-6, 30.0, 1e3, 1e6, 1e30)
ATTACKS = (
    "fgsm(linf(0.1))",
    "pgd(linf(0.1), steps=10)",
    "pgd(linf(0.1), steps=10, objective=joint(loss=dlr))",
    "pgd(l2(0.5), steps=10, objective=joint(loss=margin))",
    "apgd(linf(0.1), steps=20)",
    "apgd_t(linf(0.1), steps=10, targets=2)",
    "fmn(linf(0.1), steps=20)",
    "fmn(l2(0.5), steps=20)",
    "fab(linf(0.1), steps=5, targets=2)",
    "square(linf(0.1), steps=20)",
)


class Times(RoutedModel):
    """The logits of ``model`` times ``scale``."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits: Tensor = self.model.body(x, tape) if isinstance(self.model, RoutedModel) else self.model(x)
        return logits * self.scale


def conv() -> nn.Module:
    layers = (nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))


def pathway() -> nn.Module:
    spec = "pathway(resnet8(width=4), experts=2, ratio=0.5, router=small_cnn, standardise=True)"
    return rm.build_model(spec, 10, (1, 8, 8), seed=0)


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    data = DATASETS["digits"]()
    train, test = data.train.batch(list(range(1000))), data.test.batch(list(range(40)))
    nets = {}
    for make in (conv, mlp, pathway):
        torch.manual_seed(0)
        net = make()
        optimiser = torch.optim.Adam(net.parameters(), 4e-3)
        for _ in range(6):
            for rows in torch.randperm(len(train.y)).split(50):
                optimiser.zero_grad()
                F.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
                optimiser.step()
        nets[make.__name__] = (net.eval(), test.x, test.y)
    return nets


@pytest.mark.parametrize("name", ["conv", "mlp", "pathway"])
def test_the_robust_accuracy_does_not_depend_on_the_scale(
    name: str, trained: dict[str, tuple[nn.Module, Tensor, Tensor]]
) -> None:
    """Of `conv` by every attack and scale but 1e6, which is as full a softmax as 1e3; of the others by three, at both
    ends and where a softmax is full.
    """
    net, x, y = trained[name]
    few = ATTACKS if name == "conv" else ATTACKS[1:2] + ATTACKS[4:5] + ATTACKS[6:7]
    scales = (1e-40, 1e-6, 30.0, 1e3, 1e30) if name == "conv" else (1e-40, 1e3, 1e30)
    for text in few:
        stand = []
        for scale in (1.0, *scales):
            model = Times(net, scale)
            with torch.no_grad():
                stand.append(int((model(rm.build_attack(text)(model, x, y)).argmax(1) == y).sum()))
        assert max(abs(count - stand[0]) for count in stand) <= 1, (text, stand)
        assert stand[0] < 39, text  # there is something to lose


LOGITS = torch.tensor([[2.0, 1.0, -1.0, 0.5, 0.0], [-1.0, 3.0, 2.5, 0.0, 1.0], [0.3, 0.1, 0.2, 4.0, -6.0]])
LABELS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize("kind", ["ce", "margin", "dlr", "kl"])
def test_an_ordinary_loss_is_what_is_climbed_to_the_bit(kind: Loss) -> None:
    at = LOGITS.clone().requires_grad_()
    clean = LOGITS.flip(1)
    loss = loss_of(kind, at, LABELS, clean)
    (wanted,) = torch.autograd.grad(loss.sum(), at)
    ascent = climb(kind, at, LABELS, clean)
    (told,) = torch.autograd.grad(ascent.climbed.sum(), at)
    assert torch.equal(ascent.loss, loss)
    assert torch.equal(ascent.climbed, loss)
    assert torch.equal(told, wanted)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["ce", "margin", "dlr"])
def test_the_gradient_at_any_scale_is_that_of_float64_at_the_usual_range(kind: Loss, scale: float) -> None:
    """Of cross-entropy: the direction of the gradient at logits of range 16, worked out in float64."""
    start = (LOGITS * 10).requires_grad_()  # right by a wide margin, so that 1e3 saturates
    (told,) = torch.autograd.grad(climb(kind, start * scale, LABELS).climbed.sum(), start)
    wide = LOGITS.double().requires_grad_()
    extent = (wide.amax(1) - wide.amin(1)).detach()[:, None]
    (wanted,) = torch.autograd.grad(loss_of(kind, wide * 16 / extent, LABELS).sum(), wide)
    direction = F.normalize(told.double(), dim=1)
    torch.testing.assert_close(direction, F.normalize(wanted, dim=1), rtol=0, atol=1e-3)


def test_a_saturated_iterate_is_below_every_other_and_the_saturated_are_in_order() -> None:
    margins = torch.tensor([5000.0, 900.0, 200.0, 20.0, 10.0, -3.0])
    logits = torch.stack([margins, torch.zeros(6), torch.full((6,), -6000.0)], 1)
    loss = climb("ce", logits, torch.zeros(6, dtype=torch.long)).loss
    assert (loss[:4] < 0).all()
    assert (loss[4:] >= 0).all()
    assert (loss[:4].diff() > 0).all()


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("margin", [18.0, 30.0, 80.0, 1e4])
def test_where_the_labels_softmax_rounds_to_one_the_label_is_pulled_at(kind: Loss, margin: float) -> None:
    """The rivals' softmaxes are still numbers (from 87 on they are 0), but the label's gradient, p - 1, is 0."""
    clean = torch.tensor([[margin + 1, 0.0, -margin]])
    at, label = torch.tensor([[margin, 0.0, -margin]], requires_grad=True), torch.tensor([0])
    assert torch.autograd.grad(F.cross_entropy(at, label), at)[0][0, 0] == 0
    (slope,) = torch.autograd.grad(climb(kind, at, label, clean).climbed.sum(), at)
    (wanted,) = torch.autograd.grad(F.cross_entropy(at.double() * 16 / (2 * margin), label), at)
    torch.testing.assert_close(F.normalize(slope), F.normalize(wanted), rtol=0, atol=1e-3)
    assert slope[0, 0] < 0 < slope[0, 1]


def test_a_kl_from_an_image_that_is_not_saturated_is_what_is_climbed_to_the_bit() -> None:
    clean = torch.tensor([[3.0, 0.0, -1.0]])
    at = torch.tensor([[30.0, 0.0, -1.0]])
    ascent = climb("kl", at, torch.tensor([0]), clean)
    assert torch.equal(ascent.loss, loss_of("kl", at, torch.tensor([0]), clean))
    assert torch.equal(ascent.climbed, ascent.loss)


QUICK = ("fgsm(linf(0.1))", "pgd(linf(0.1), steps=10)", "apgd(linf(0.1), steps=20)")


@pytest.mark.parametrize(
    "attack, scale",
    [(attack, scale) for attack in QUICK for scale in (1.0, 10.0, 30.0, 100.0, 1e3, 1e6, 1e30)]
    + [("autoattack(linf(0.1))", scale) for scale in (1.0, 30.0, 1e3, 1e30)],
)
def test_two_logits_of_which_the_other_is_constant(attack: str, scale: float) -> None:
    """[0, s f], f linear: the robust count is that of the closed form, f at the worst corner of ball and box.

    The suite, of which the other parts stand above at every scale, at both ends, where a softmax fills up, and where
    it is full.
    """
    weight = torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0)
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(4))

    def f(x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ weight

    y = (f(x) > 0).long()
    side = (1 - 2 * y)[:, None, None, None] * weight.view(1, 1, 4, 4)
    worst = f((x + 0.1 * side).clamp(0, 1)) * (2 * y - 1)
    assert worst.abs().min() > 1e-3  # no image is decided by rounding
    truth = int((worst > 0).sum())
    assert 5 < truth < 35

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), scale * f(x)], 1)

    assert int((model(rm.build_attack(attack)(model, x, y)).argmax(1) == y).sum()) == truth


def test_probabilities_that_are_saturated_inside_the_model_are_told_of() -> None:
    """No loss has a gradient there, so nothing can climb: check G1 fails and H6 warns, while G2 (both derivatives are
    0) passes. Of the logits behind them the same images are broken.
    """
    logits = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        logits[1].weight.copy_(1e4 * torch.randn(4, 16, generator=torch.Generator().manual_seed(6)))
    inside = nn.Sequential(logits, nn.Softmax(1))
    x = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = logits(x).argmax(1)
    attack = rm.build_attack("pgd(linf(0.1), steps=10)")
    stand = {model: int((model(attack(model, x, y)).argmax(1) == y).sum()) for model in (logits, inside)}
    assert stand[inside] > stand[logits]
    expected = {"G1": "fail", "G2": "pass", "H6": "warn"}
    checks = deep(as_routed(inside), Batch(x, y, torch.arange(24)), [attack], only=tuple(expected))
    assert {check.id: check.status for check in checks if check.id in expected} == expected


def test_classes_at_minus_infinity_are_never_chosen() -> None:
    """As the same loss of the other classes alone; and an image of which nothing can be chosen but its label, or whose
    label cannot, is finite and does not move.
    """
    keep = torch.tensor([0, 1, 2, 3])
    masked = LOGITS.clone()
    masked[:, 4] = -torch.inf
    for kind in ("ce", "margin", "dlr", "kl"):
        at, few = masked.clone().requires_grad_(), LOGITS[:, keep].clone().requires_grad_()
        ours = climb(kind, at, LABELS, masked.roll(1, 0)).climbed
        theirs = climb(kind, few, LABELS, LOGITS[:, keep].roll(1, 0)).climbed
        torch.testing.assert_close(ours, theirs)
        slope = torch.autograd.grad(ours.sum(), at)[0]
        torch.testing.assert_close(slope[:, keep], torch.autograd.grad(theirs.sum(), few)[0])
        assert (slope[:, 4] == 0).all()
    for alone in (torch.tensor([[1.0, -torch.inf, -torch.inf]]), torch.tensor([[-torch.inf, 1.0, 0.0]])):
        for kind in ("ce", "margin", "dlr"):
            at = alone.clone().requires_grad_()
            loss, climbed = climb(kind, at, torch.tensor([0]))
            (slope,) = torch.autograd.grad(climbed.sum(), at)
            assert torch.isfinite(torch.cat([loss, climbed, slope[0]])).all(), (kind, alone)
    target = torch.tensor([1, 2, 1])
    for loss in ("dlr", "margin"):
        at = masked.clone().requires_grad_()
        slope = torch.autograd.grad(targeted_climb(loss, at, LABELS, target).climbed.sum(), at)[0]
        assert torch.isfinite(slope).all()
        assert slope.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e-40, 1e4, 1e30])
def test_in_a_sum_only_the_failing_term_is_replaced(
    scale: float, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """The router's term keeps its value and its gradient; the logits' one gets a gradient."""
    model, x = tiny("pathway"), images(4)
    y = model(x).argmax(1)
    at = (x + 0.01).clamp(0, 1)
    for objective in (Diluted(), JointNormalised()):
        plain, large = (objective(m, x, y) for m in (model, Times(model, scale)))
        _, gradient = ascend(large, at)
        assert torch.isfinite(gradient).all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()
        assert not torch.equal(gradient, ascend(plain, at)[1])
    routers = [ascend(RouterOnly()(m, x, y), at) for m in (model, Times(model, scale))]
    assert torch.equal(routers[0][1], routers[1][1])
