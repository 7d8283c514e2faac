"""Randomised smoothing against closed forms: linear models, whose smoothed boundary is their own; counts by a plain
loop; duals whose halves are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, binomtest, norm
from torch import Tensor

from robustmoe import spec as specs
from robustmoe.certification import ABSTAIN, Smoothing, build_certifier, predict
from robustmoe.certification.smoothing import COUNT, SELECT, lower_bound, radius
from robustmoe.errors import UserError
from robustmoe.models import DualModel, RoutedModel
from robustmoe.models.dual import Scaled
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise
from robustmoe.routing import Tape, top_k
from robustmoe.training import build_method
from robustmoe.training.methods import GAUSSIAN

SIGMA = 0.25


def streams(n: int, seed: int = 0) -> Noise:
    return Noise.of(torch.arange(n), seed)


def linear(weight: Tensor, bias: Tensor, scale: float = 1.0) -> RoutedModel:
    """logits = scale * (weight (c, d) x + bias (c,))."""
    return Plain(lambda x: scale * (x.flatten(1) @ weight.T + bias))


def threshold(scale: float = 1.0) -> RoutedModel:
    """Class 1 where the first pixel is above 1/2; it is as far from the boundary as that pixel from 1/2."""
    return linear(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, -1.0]), scale)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


def constant(*probabilities: float) -> RoutedModel:
    logits = torch.tensor(probabilities).log()
    return Plain(lambda x: logits.expand(len(x), -1))


# ------------------------------------------------------------------------------------------------ the two formulas


@pytest.mark.parametrize("k, n, alpha", [(99, 100, 0.001), (750, 1000, 0.05), (1, 10, 0.01), (9999, 10_000, 0.001)])
def test_the_lower_bound_is_that_of_clopper_and_pearson(k: int, n: int, alpha: float) -> None:
    """One-sided at alpha is the lower end of the two-sided interval at 2 alpha."""
    interval = binomtest(k, n).proportion_ci(confidence_level=1 - 2 * alpha, method="exact")
    assert lower_bound(k, n, alpha) == pytest.approx(interval.low, rel=1e-9)


def test_the_lower_bound_by_hand() -> None:
    """All of n: p^n = alpha. One of n: 1 - (1 - p)^n = alpha. None: 0."""
    assert lower_bound(10_000, 10_000, 0.001) == pytest.approx(0.001 ** (1 / 10_000), rel=1e-12)
    assert lower_bound(1, 5, 0.05) == pytest.approx(1 - 0.95 ** (1 / 5), rel=1e-12)
    assert lower_bound(0, 5, 0.05) == 0.0


def test_the_radius_by_hand() -> None:
    """Phi(1) = 0.8413447: one sigma. With a least share Phi(0.5) = 0.6914625, half a sigma less; none at or below."""
    assert radius(0.8413447460685429, 0.25) == pytest.approx(0.25)
    assert radius(0.8413447460685429, 0.25, 0.6914624612740131) == pytest.approx(0.125)
    assert radius(0.5, 0.25) == radius(0.6, 0.25, 0.6) == radius(0.6, 0.25, 0.7) == 0.0


@pytest.mark.parametrize("a", [0.55, 0.7, 0.9, 0.99])
def test_the_duals_radius_is_never_below_p10s(a: float) -> None:
    """CERT-10 with h_j <= 1 - h_y: sigma / 2 (Phi^-1(a h) - Phi^-1(a (1 - h) + 1 - a)). Both are 0 at h = 1 / (2 a);
    near h = 1 CERT-10 ends at sigma Phi^-1(a), ours does not; at a = 1 they are Cohen's.
    """
    for h in torch.linspace(1 / (2 * a), 1 - 1e-6, 50, dtype=torch.float64).tolist():
        p10 = 0.5 * SIGMA * (norm.ppf(a * h) - norm.ppf(a * (1 - h) + 1 - a))
        assert radius(h, SIGMA, 1 / (2 * a)) >= p10 - 1e-12
    assert radius(0.999, SIGMA, 1 / (2 * a)) > SIGMA * norm.ppf(a)
    assert radius(h, SIGMA, 1 / 2) == pytest.approx(0.5 * SIGMA * (norm.ppf(h) - norm.ppf(1 - h)), rel=1e-6)


# ------------------------------------------------------------------------------------------------ linear models


def test_the_radius_of_a_linear_classifier_approaches_its_distance_from_below() -> None:
    """The smoothed boundary of two half-spaces is their own. With n copies the bound lies about 3.1 deviations of the
    share below it (alpha = 0.001): at distance 0.2, 0.25 * 3.1 sqrt(p (1 - p) / n) / phi(0.8) = 0.0035 for n = 100,000.
    """
    x = pixels(0.3, 0.45, 0.6, 0.7)
    distance = (x[:, 0, 0, 0] - 0.5).abs()
    gap = {}
    for n in (100, 1000, 100_000):
        found = Smoothing(SIGMA, n=n, batch=20_000)(threshold(), x, streams(4))
        assert [one.prediction for one in found] == [0, 0 if n > 100 else ABSTAIN, 1 if n > 100 else ABSTAIN, 1]
        gap[n] = distance - torch.tensor([one.radius for one in found])
        assert (gap[n] > 0).all()
    assert gap[100][0] > gap[1000][0] > gap[100_000][0]
    assert gap[100_000].max() < 2 * 0.0035


def test_no_radius_of_linear_classifiers_of_many_classes_exceeds_their_distance() -> None:
    """A class of a linear one lies in a half-space for each rival: its share is at most Phi(distance / sigma)."""
    draw = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(5, 12, generator=draw), 0.1 * torch.randn(5, generator=draw)
    x = torch.rand(48, 3, 2, 2, generator=draw)
    model = linear(weight, bias)
    logits = model(x)
    y = logits.argmax(1)
    margin = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight[None]).norm(dim=2)
    distance = margin.scatter(1, y[:, None], torch.inf).amin(1)
    found = Smoothing(SIGMA, n=2000)(model, x, streams(48))
    certain = torch.tensor([one.prediction for one in found]) == y
    assert certain.sum() > 20
    assert (torch.tensor([one.radius for one in found]) <= distance)[certain].all()


def test_a_certificate_is_wrong_as_often_as_alpha_says() -> None:
    """For 2000 streams of noise at one image: as often as the bound of a binomial count exceeds the true share, which
    is what alpha limits. Phi(0.2 / 0.25) = 0.788.
    """
    alpha, n, p = 0.2, 60, norm.cdf(0.8)
    expected = sum(binom.pmf(k, n, p) for k in range(n + 1) if lower_bound(k, n, alpha) > p)
    assert 0.1 < expected <= alpha
    found = Smoothing(SIGMA, n0=20, n=n, alpha=alpha)(threshold(), pixels(0.7).expand(2000, 1, 1, 1), streams(2000))
    wrong = sum(one.radius > 0.2 for one in found) / 2000
    assert wrong == pytest.approx(expected, abs=4 * math.sqrt(expected / 2000))


def test_noise_is_not_clipped() -> None:
    """The boundary lies at 1.2, outside the pixel range, 0.3 from the pixel: clipped copies would never cross it. The
    bound is below by about 0.25 * 3.1 sqrt(p (1 - p) / n) / phi(1.2) = 0.009.
    """
    model = linear(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, -2.4]))
    (found,) = Smoothing(SIGMA, n=10_000)(model, pixels(0.9), streams(1))
    assert found.prediction == 0
    assert 0.3 - 2 * 0.009 < found.radius <= 0.3


def test_selection_and_count_have_noise_of_their_own() -> None:
    """The certificate by hand: 0.55 + 0.25 z > 0.5, z the streams of the n copies, apart from the first n0."""
    noise = Noise.of(torch.arange(1), 5)
    drawn = {tag: torch.stack([noise.fold(tag, k).normal() for k in range(200)]) for tag in (SELECT, COUNT)}
    above = {tag: int((0.55 + SIGMA * z > 0.5).sum()) for tag, z in drawn.items()}
    assert above[SELECT] != above[COUNT]
    (found,) = Smoothing(SIGMA, n0=200, n=200, alpha=0.3)(threshold(), pixels(0.55), noise)
    assert found.prediction == 1
    assert found.radius == pytest.approx(SIGMA * norm.ppf(lower_bound(above[COUNT], 200, 0.3)))


def test_it_abstains_at_a_boundary_and_says_why() -> None:
    x = pixels(0.5, 0.9)
    middle, inside = Smoothing(SIGMA, n=1000, eps=0.1)(threshold(), x, streams(2))
    assert (middle.prediction, middle.radius, middle.rule) == (ABSTAIN, 0.0, "")
    assert re.fullmatch(
        r"class [01] has at least 0\.4\d+ of the answers under noise; more than 0\.5000 is needed", middle.reason
    )
    assert (inside.prediction, inside.rule, inside.reason) == (1, "Cohen", "")
    assert inside.radius > 0.1
    (far,) = Smoothing(SIGMA, n=1000, eps=0.5)(threshold(), x[1:], streams(1))
    assert re.fullmatch(r"class 1 has at least 0\.\d+ of the answers under noise, enough for radius 0\.\d+", far.reason)


def test_an_answer_that_is_no_number_is_no_vote() -> None:
    """Of a model that says NaN wherever the pixel is above 1/2, and class 1 elsewhere, half the answers are left."""

    def broken(x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0] > 0.5, torch.nan, torch.tensor([0.0, 1.0]))

    (found,) = Smoothing(SIGMA, n=1000)(Plain(broken), pixels(0.5), streams(1))
    assert found.prediction == ABSTAIN
    assert "class 1 has at least 0.4" in found.reason
    assert predict(Plain(lambda x: x.new_full((len(x), 2), torch.nan)), pixels(0.5), streams(1), Smoothing()) == ABSTAIN


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("n, expected", [(10, ABSTAIN), (11, 1)])
def test_a_prediction_needs_eleven_equal_answers(n: int, expected: int) -> None:
    """n of n has the two-sided p-value 2^(1 - n): 2^-9 is above 0.001, 2^-10 is not."""
    assert predict(constant(0.1, 0.9), pixels(0.5), streams(1), Smoothing(n=n)).tolist() == [expected]


def test_predictions_of_a_linear_classifier() -> None:
    said = predict(threshold(), pixels(0.3, 0.5, 0.7), streams(3), Smoothing(SIGMA, n=1000))
    assert said.tolist() == [0, ABSTAIN, 1]


@pytest.mark.parametrize("name", ["ensemble_hard", "pathway", "vit_moe"])
def test_a_hard_routed_model_keeps_its_smoothed_prediction_within_the_radius(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """CERT-10: routes may change under noise and inside the radius, and the certificate holds all the same."""
    model, x = tiny(name), images(6)
    found = Smoothing(SIGMA, n=1000)(model, x, streams(6))
    held = [i for i, one in enumerate(found) if one.radius > 0.05]
    assert len(held) >= 2
    if name != "vit_moe":
        assert any(one.stable is not None and one.stable < 1 for one in found)
    held = held[:4]
    said = torch.tensor([found[i].prediction for i in held])
    size = torch.tensor([found[i].radius for i in held])
    assert_smoothed(model, x[held], said, size)


def assert_smoothed(model: RoutedModel, x: Tensor, said: Tensor, size: Tensor) -> None:
    """The most frequent answer within the radius ``size`` is ``said``: in random directions, and in the one in which
    the mean margin under noise falls fastest.
    """
    z = SIGMA * streams(64, 9).normal(*x.shape[1:])
    toward = []
    for i in range(len(x)):
        shift = torch.zeros_like(x[:1]).requires_grad_()
        logits = model(x[i : i + 1] + shift + z)
        rival = logits.mean(0).scatter(0, said[i], -torch.inf).argmax()
        (gradient,) = torch.autograd.grad((logits[:, rival] - logits[:, said[i]]).mean(), shift)
        toward.append(gradient)
    for direction in [torch.cat(toward), *(streams(len(x), 20 + s).normal(*x.shape[1:]) for s in range(3))]:
        unit = F.normalize(direction.flatten(1)).view_as(x)
        moved = (x + 0.95 * size[:, None, None, None] * unit).clamp(0.0, 1.0)
        assert predict(model, moved, streams(len(x), 5), Smoothing(SIGMA, n=500, alpha=0.5)).tolist() == said.tolist()


# ------------------------------------------------------------------------------------------------ any model


def counted(model: RoutedModel, x: Tensor, noise: Noise, copies: int) -> tuple[Tensor, int]:
    """The answers to noisy copies of one image, one pass each: votes, and how many had the routes of the image."""
    clean = model.run(x).trace
    same, votes = 0, []
    for copy in range(copies):
        output = model.run(x + SIGMA * noise.fold(copy).normal(*x.shape[1:]))
        votes.append(int(output.logits.argmax()))
        chosen = [(r.chosen() == clean[name].chosen()).all().item() for name, r in output.trace.items()]
        same += all(chosen)
    return torch.bincount(torch.tensor(votes), minlength=4), same


def test_certificates_of_every_model_equal_a_plain_loop(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    x, noise, alpha = images(2), streams(2), 0.1
    found = Smoothing(SIGMA, n0=4, n=12, alpha=alpha, batch=7)(model, x, noise)
    for i, one in enumerate(found):
        y = int(counted(model, x[i : i + 1], noise[i : i + 1].fold(SELECT), 4)[0].argmax())
        votes, same = counted(model, x[i : i + 1], noise[i : i + 1].fold(COUNT), 12)
        share = lower_bound(int(votes[y]), 12, alpha)
        assert one.prediction == (y if share > 0.5 else ABSTAIN)
        assert one.radius == pytest.approx(max(0.0, SIGMA * norm.ppf(share)) if share else 0.0)
        assert one.stable == same / 12
        assert one.reachable is None


@pytest.mark.parametrize("of", ["model", "robust"])
def test_a_certificate_depends_on_its_image_alone(
    of: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Not on the batch size, the other images, or the order."""
    model, x, noise = DualModel(tiny("dense"), tiny("ensemble_hard"), 0.8, sharpen=Scaled(40.0)), images(5), streams(5)
    spec = f"smoothing(n0=4, n=15, alpha=0.1, of={of}, batch={{}})"
    whole = build_certifier(spec.format(1000))(model, x, noise)
    assert len(set(whole)) > 2
    for batch in (7, 64):
        assert build_certifier(spec.format(batch))(model, x, noise) == whole
    order = torch.tensor([4, 2])
    assert build_certifier(spec.format(1))(model, x[order], noise[order]) == [whole[4], whole[2]]
    assert build_certifier(spec.format(1000))(model, x, streams(5, 1)) != whole


def test_the_model_is_left_as_found(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    Smoothing(n=10)(model, images(2), streams(2))
    predict(model, images(2), streams(2), Smoothing(n=10))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.is_grad_enabled()


class Crossing(RoutedModel):
    """One of two equal experts, by whether the pixel is above 1/2."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixel = x[:, 0, 0, :1]
        tape("router", top_k(torch.stack([1 - pixel, pixel], 2)))
        return torch.cat([torch.zeros_like(pixel), torch.ones_like(pixel)], 1)


def test_stable_is_the_share_of_the_noise_that_keeps_the_route() -> None:
    """Phi(0.2 / 0.25) = 0.788, with a deviation of 0.0065 at n = 4000. A dense model has no route to change."""
    (found,) = Smoothing(SIGMA, n=4000)(Crossing(), pixels(0.7), streams(1))
    assert found.stable == pytest.approx(norm.cdf(0.8), abs=4 * 0.0065)
    (dense,) = Smoothing(SIGMA, n=10)(threshold(), pixels(0.7), streams(1))
    assert dense.stable == 1.0


# ------------------------------------------------------------------------------------------------ duals (CERT-10)


@pytest.mark.parametrize("a", [0.6, 0.8, 1.0])
def test_the_radius_of_a_dual_of_a_half_space_is_exact_for_the_worst_standard_half(a: float) -> None:
    """R is sure of a half-space at distance d: h = Phi(d / sigma) falls to 1 / (2 a) at d - sigma Phi^-1(1 / (2 a)).
    Just before, the smoothed dual with a standard half that always says the rival keeps its class; just after, not.
    """
    d = 0.45
    dual = DualModel(constant(1.0, 0.0), threshold(1e6), a)
    true = d - SIGMA * norm.ppf(1 / (2 * a))
    (found,) = Smoothing(SIGMA, n=100_000, of="robust", batch=20_000)(dual, pixels(0.5 + d), streams(1))
    assert (found.prediction, found.rule) == (1, "smoothed robust half")
    assert true - 0.03 < found.radius <= true
    look = Smoothing(SIGMA, n=20_000, of="robust", batch=20_000)
    near, far = pixels(0.5 + d - true + 0.04, 0.5 + d - true - 0.04).split(1)
    assert predict(dual, torch.cat([near, far]), streams(2), look).tolist() == [1, 0]


def test_a_dual_of_constant_halves_is_certified_by_the_robust_share_alone() -> None:
    """Every copy draws class 0 with probability 0.8; the count is binomial, and no standard half changes anything."""
    n, a = 4000, 0.7
    found = []
    for standard in (constant(0.1, 0.8, 0.1), threshold_of_three()):
        dual = DualModel(standard, constant(0.8, 0.15, 0.05), a)
        found.append(Smoothing(SIGMA, n=n, of="robust")(dual, pixels(0.3, 0.7), streams(2)))
    assert found[0] == found[1]
    for one in found[0]:
        share = norm.cdf(one.radius / SIGMA + norm.ppf(1 / (2 * a)))  # the bound that the radius was made of
        deviation = math.sqrt(0.8 * 0.2 / n)
        assert one.prediction == 0
        assert 0.8 - 8 * deviation < share < 0.8
    low = DualModel(constant(0.1, 0.9), constant(0.7, 0.3), a)  # 0.7 < 1 / 1.4
    (none,) = Smoothing(SIGMA, n=n, of="robust")(low, pixels(0.3), streams(1))
    assert none.prediction == ABSTAIN
    assert "more than 0.7143 is needed" in none.reason


def threshold_of_three() -> RoutedModel:
    return linear(torch.tensor([[0.0], [20.0], [-20.0]]), torch.tensor([0.0, -10.0, 9.0]))


def test_no_standard_half_moves_a_dual_within_its_radius(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Brute force: the mean probabilities h of R at moved images, over 1000 copies, blended with every one-hot S, which
    are the extreme ones (a mean of any S is a mixture of them). R is sharpened, and the certificate knows.
    """
    a, x = 0.8, images(6)
    robust = tiny("ensemble_hard")
    dual = DualModel(tiny("dense"), robust, a, sharpen=Scaled(40.0))
    found = Smoothing(SIGMA, n=1000, of="robust")(dual, x, streams(6))
    held = [i for i, one in enumerate(found) if one.radius > 0.02]
    assert len(held) >= 2
    tried = 0
    for i in held:
        noise = SIGMA * streams(1000, 7).normal(*x.shape[1:])
        for s in range(4):
            unit = F.normalize(streams(1, 30 + s).normal(*x.shape[1:]).flatten(1)).view_as(x[:1])
            with torch.no_grad():
                h = torch.softmax(40 * robust(x[i] + 0.95 * found[i].radius * unit + noise), 1).mean(0)
            blends = a * h + (1 - a) * torch.eye(4)
            assert blends.argmax(1).tolist() == [found[i].prediction] * 4
            tried += 4
    assert tried >= 32


def test_at_alpha_1_the_robust_half_is_not_sharpened(tiny: Callable[..., RoutedModel]) -> None:
    """As the dual itself does. Constant (0.8, 0.2) sharpened by 10 would be all but sure."""
    dual = DualModel(constant(0.5, 0.5), constant(0.8, 0.2), 1.0, sharpen=Scaled(10.0))
    (found,) = Smoothing(SIGMA, n=2000, of="robust")(dual, pixels(0.5), streams(1))
    assert found.radius < SIGMA * norm.ppf(0.8)
    dual.alpha = 0.99
    (found,) = Smoothing(SIGMA, n=2000, of="robust")(dual, pixels(0.5), streams(1))
    assert found.radius > SIGMA * norm.ppf(0.99)


@pytest.mark.parametrize(
    "model, said",
    [
        ("dense", "is for dual models; got Dense: leave of= out"),
        ("dual(resnet8(width=4), resnet8(width=4), mix=logits)", "needs a dual that mixes probabilities"),
        ("dual(resnet8(width=4), resnet8(width=4), mixer=small_cnn(width=4))", "needs a constant alpha"),
        ("dual(resnet8(width=4), resnet8(width=4), alpha=0.5)", "alpha above 1/2, .*; got 0.5"),
    ],
)
def test_duals_without_a_radius_are_refused(
    model: str, said: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    smoothing = Smoothing(n=10, of="robust")
    with pytest.raises(UserError, match=said):
        smoothing(tiny(model), images(1), streams(1))
    with pytest.raises(UserError, match=said):
        predict(tiny(model), images(1), streams(1), smoothing)


# ------------------------------------------------------------------------------------------------ specs, training


@pytest.mark.parametrize(
    "text", ["smoothing", "smoothing(0.5, n0=50, n=1000, alpha=0.01, eps=0.5, of=robust, batch=100)"]
)
def test_the_spec_comes_back(text: str) -> None:
    made = build_certifier(text)
    assert isinstance(made, Smoothing)
    assert (made.norm, build_certifier(specs.text(made, "certifier"))) == ("l2", made)
    assert specs.text(Smoothing(sigma=0.5), "certifier") == "smoothing(sigma=0.5)"


@pytest.mark.parametrize(
    "text, said",
    [
        ("smoothing(sigma=0)", "sigma must be above 0, in pixels"),
        ("smoothing(eps=-1)", "eps must be above 0"),
        ("smoothing(n0=0)", "n0 must be at least 1; got 0"),
        ("smoothing(batch=0)", "batch must be at least 1; got 0"),
        ("smoothing(alpha=1)", "alpha is the probability of a wrong certificate, between 0 and 1; got 1"),
        ("smoothing(n=9)", "n=9 copies certify nothing at alpha=0.001; expected 10 or more"),
        ("smoothing(of=standard)", "of"),
    ],
)
def test_bad_arguments_are_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_certifier(text)
    assert "\n" not in str(caught.value)


def test_gaussian_training_is_cross_entropy_on_noisy_images(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Every image with noise of its own, which is not clipped; nothing is attacked."""
    model, x, y, noise = tiny("dense"), images(8), labels(8), streams(8)
    method = build_method("gaussian(sigma=0.5)")
    found = method.phases[0].loss(model, x, y, noise)
    noisy = x + 0.5 * noise.fold(GAUSSIAN).normal(3, 8, 8)
    assert noisy.min() < 0 < 1 < noisy.max()
    torch.testing.assert_close(found.value, F.cross_entropy(model(noisy), y))
    assert found.correct == (model(noisy).argmax(1) == y).sum()
    assert (found.pair, method.attack) == (None, None)
    with pytest.raises(UserError, match="sigma must be above 0, in pixels"):
        build_method("gaussian(sigma=0)")
