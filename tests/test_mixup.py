"""mixup and cutout: closed forms, whose draws they are, and what an attack in between is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import data, spec
from robustmoe.attacks import PGD, Attack, Joint, linf
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, at, build_method, standard, train_step
from robustmoe.training.mixup import Labelled, beta, mixed
from robustmoe.training.optimisation import SGD

NOISE = Noise.of(torch.arange(4), 7)


def some(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(n)


# ------------------------------------------------------------------------------------------------ mixup


def test_each_image_meets_the_next_one() -> None:
    """share * x + (1 - share) * next, image by image; of one image alone nothing changes."""
    x, y = some()
    found = mixed(x, y, NOISE, 0.4)
    assert found.share is not None
    assert found.other is not None
    assert found.other.tolist() == [1, 2, 3, 0]
    for i, share in enumerate(found.share.tolist()):
        torch.testing.assert_close(found.x[i], share * x[i] + (1 - share) * x[(i + 1) % 4])
        assert found.label[i] == (i if share >= 0.5 else (i + 1) % 4)
    torch.testing.assert_close(mixed(x[:1], y[:1], NOISE[:1], 0.4).x, x[:1])


def test_the_loss_is_that_of_mixed_labels() -> None:
    """Cross-entropy is linear in the target: the paper's CE(mixed one-hot labels), also with smoothed ones."""
    logits = torch.randn(4, 5)
    _, y = some()
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    given = Labelled(torch.zeros(4, 1, 1, 1), y, y.roll(-1), share)
    target = share[:, None] * F.one_hot(y, 5) + (1 - share)[:, None] * F.one_hot(y.roll(-1), 5)
    torch.testing.assert_close(given.cross_entropy(logits), F.cross_entropy(logits, target))
    smooth = F.cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(given.cross_entropy(logits, 0.2), smooth)
    assert given.label.tolist() == [1, 2, 2, 3]  # two equal shares: the image's own


def test_shares_are_beta_distributed() -> None:
    """Beta(1, 1) is uniform: the draw itself. Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); Beta(1/2, 1/2) is
    the arcsine law, whose quantile is sin^2(pi u / 2). 20,000 draws: five standard errors.
    """
    noise = Noise.of(torch.arange(20_000), 3)
    u = noise.uniform()
    torch.testing.assert_close(beta(noise, 1.0), u, rtol=0, atol=1e-6)
    torch.testing.assert_close(beta(noise, 0.5), torch.sin(torch.pi * u / 2) ** 2, rtol=0, atol=1e-5)
    for alpha in (0.2, 2.0):
        variance = 1 / (4 * (2 * alpha + 1))
        share = beta(noise, alpha).double()
        assert abs(share.mean() - 0.5) < 5 * (variance / 20_000) ** 0.5
        assert share.var() == pytest.approx(variance, rel=0.05)
        assert ((share >= 0) & (share <= 1)).all()


def test_a_share_belongs_to_its_image() -> None:
    x, y = some()
    order = torch.tensor([2, 0, 3, 1])
    whole, turned = mixed(x, y, NOISE, 0.4), mixed(x[order], y[order], NOISE[order], 0.4)
    assert whole.share is not None
    assert turned.share is not None
    assert torch.equal(turned.share, whole.share[order])
    assert not torch.equal(turned.x, whole.x[order])  # whom it meets is a matter of the batch


@dataclass(frozen=True)
class Recorder(Attack):
    """Returns the image darkened, and remembers what it was given."""

    seen: list[tuple[Tensor, Tensor]]
    threat = linf(0.1)
    objective = Joint()
    seed = 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        self.seen.append((x, y))
        return x * 0.9


def test_at_attacks_the_mixed_image_against_its_larger_label(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """One step against its few lines."""
    x, y, noise = images(6), labels(6), Noise.of(torch.arange(6), 5)
    recorder = Recorder([])
    model, twin = tiny("ensemble_k2"), tiny("ensemble_k2")
    method = at(recorder, mixup=0.8)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    result = train_step(model, method, [SGD(1.0, 0.0, 0.0).make(model.parameters())], MiniBatch(x, y, noise))
    given = mixed(x, y, noise.fold(0), 0.8)
    ((attacked, against),) = recorder.seen
    assert torch.equal(attacked, given.x)
    assert torch.equal(against, given.label)
    assert not torch.equal(against, y)
    logits = twin.train()(given.x * 0.9)
    value = given.cross_entropy(logits)
    torch.testing.assert_close(result.loss["all"], value.detach())
    assert int(result.correct) == int((logits.argmax(1) == given.label).sum())
    gradients = torch.autograd.grad(value, list(twin.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        torch.testing.assert_close(before[name] - parameter.detach(), gradient, rtol=1e-3, atol=2e-6)


def test_mixup_of_0_is_none(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    losses = []
    for method in (standard(), standard(mixup=0.0), standard(mixup=1.0)):
        model = tiny("dense")
        optimiser = SGD(1.0).make(model.parameters())
        result = train_step(model, method, [optimiser], MiniBatch(images(6), labels(6), Noise.of(torch.arange(6), 5)))
        losses.append(float(result.loss["all"]))
    assert losses[0] == losses[1] != losses[2]
    assert build_method("at(pgd(linf(0.1), steps=1), mixup=0.2)").attack == PGD(linf(0.1), steps=1)
    for text in ("standard(mixup=-0.1)", "at(pgd(linf(0.1)), mixup=-1)"):
        with pytest.raises(UserError, match="mixup must be 0 or more; got -"):
            build_method(text)


# ------------------------------------------------------------------------------------------------ cutout


@pytest.mark.parametrize("side", [1, 2, 3, 20])
def test_cutout_equals_the_slow_definition(side: int) -> None:
    """A pixel at a time: 0 where it is within the square about the uniform centre; a square of 20 leaves nothing or
    sticks out.
    """
    x = 0.1 + torch.rand(30, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    noise = Noise.of(torch.arange(30), 3)
    expected = x.clone()
    for i, (u, v) in enumerate(noise.fold(3).uniform(2).tolist()):
        top, left = int(u * 5) - side // 2, int(v * 7) - side // 2
        for r in range(5):
            for c in range(7):
                if top <= r < top + side and left <= c < left + side:
                    expected[i, :, r, c] = 0
    found = data.augment(x, noise, 0, False, side)
    assert torch.equal(found, expected)
    holes = (found == 0).all(1).flatten(1).sum(1)
    assert int(holes.max()) == min(side, 5) * min(side, 7)
    if side == 3:
        assert int(holes.min()) < 9  # some stick out


def test_cutout_comes_after_crop_and_flip() -> None:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = Noise.of(torch.arange(20), 5)
    whole = spec.build("crop_flip(padding=2, cutout=4)", "augment")(x, noise)
    moved = spec.build("crop_flip(padding=2)", "augment")(x, noise)
    assert torch.equal(whole, data.augment(moved, noise, 0, False, 4))
    picked = torch.tensor([11, 3])
    assert torch.equal(data.augment(x[picked], noise[picked], 2, True, 4), whole[picked])
    with pytest.raises(UserError, match="cutout must be 0 or more pixels; got -1"):
        spec.build("crop_flip(cutout=-1)", "augment")
    with pytest.raises(UserError, match="the cutout is -1, expected 0 or more"):
        data.augment(x, noise, 0, False, -1)


def test_the_sigmoid_cross_entropy_by_hand() -> None:
    """A sum over classes of two logarithms each, the mean over images; its gradient is sigmoid - target."""
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    _, y = some()
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    given = Labelled(torch.zeros(4, 1, 1, 1), y, y.roll(-1), share)
    target = share[:, None] * F.one_hot(y, 5) + (1 - share)[:, None] * F.one_hot(y.roll(-1), 5)
    smooth = 0.8 * target + 0.2 / 5
    p = torch.sigmoid(logits)
    by_hand = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).sum(1).mean()
    value = given.cross_entropy(logits, 0.2, "sigmoid")
    torch.testing.assert_close(value, by_hand)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, (p - smooth) / 4)
    plain = Labelled(torch.zeros(4, 1, 1, 1), y).cross_entropy(logits, of="sigmoid")
    torch.testing.assert_close(plain, F.binary_cross_entropy(p, F.one_hot(y, 5).double()) * 5)


def test_a_method_takes_the_sigmoid() -> None:
    x, y = some()
    model = build_model("small_cnn(width=2)", 4, (2, 3, 3))
    for text in ("standard({})", "at(pgd(linf(0.1), steps=1), {})", "gaussian(0.1, {})"):
        values = [
            float(build_method(text.format(f"loss={loss}")).phases[0].loss(model, x, y, NOISE).value.detach())
            for loss in ("softmax", "sigmoid")
        ]
        assert values[1] > values[0] > 0, "a term for every class"
    with pytest.raises(UserError, match="loss"):
        build_method("standard(loss=hinge)")
