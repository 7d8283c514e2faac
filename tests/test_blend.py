"""Blending: the curve over alpha against closed forms, against attacks made by hand, and what is certified."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks import PGD, ExpertTransition, RouteBeam, joint, linf, part_noise
from robustmoe.data import Data, from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import blend
from robustmoe.evaluation.alphas import attacks_at, threshold
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import DualModel, RoutedModel, Scaled, build_model
from robustmoe.models.dual import Mix
from robustmoe.models.parts import Leaf, Part
from robustmoe.noise import Noise
from robustmoe.options import BlendOptions, read
from robustmoe.records import Blend
from robustmoe.routing import Tape, top_k

alphas_module = importlib.import_module("robustmoe.evaluation.alphas")

EPS = 0.1
CORNER = "pgd(linf(0.1), steps=3, step_size=0.1)"
"""Two steps of 0.1 reach the corner of the ball from any start, where the gradient's signs are everywhere the same."""

ALPHAS = BlendOptions().alphas


def fell(found: Blend, k: int) -> set[int]:
    """The images that an attack broke at the alpha of place k."""
    return {i for i, attack in enumerate(found.broken[k]) if attack >= 0}


# ------------------------------------------------------------------------------------------------ closed forms


class Two(RoutedModel):
    """Logits (0, w x + b). ``masked``: without a gradient to the image."""

    def __init__(self, w: Tensor, b: float = 0.0, masked: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.b = b
        self.masked = masked

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w + self.b

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        score = self.score(x.detach() if self.masked else x)
        return torch.stack([torch.zeros_like(score), score], 1)

    def parts(self) -> Part:
        """The same as one linear layer, for certificates."""
        weight, bias = torch.stack([torch.zeros_like(self.w), self.w]), self.w.new_tensor([0.0, self.b])
        return Leaf(lambda x: F.linear(x.flatten(1), weight, bias))


def linear_case() -> tuple[Two, Two, Tensor, Tensor]:
    """Two halves whose weights have the same sign in every pixel, so that one corner of the ball is the worst image for
    both, and so for every blend; each is blind to one pixel. The labels are noisy.
    """
    generator = torch.Generator().manual_seed(3)
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1])
    size = torch.rand(2, 6, generator=generator) + 0.2
    size[0, 0] = size[1, 3] = 0
    w = sign * size * torch.tensor([[9.0], [4.0]])
    x = 0.15 + 0.7 * torch.rand(80, 1, 2, 3, generator=generator)
    standard, robust = Two(w[0], -0.5 * float(w[0].sum())), Two(w[1], -0.5 * float(w[1].sum()))
    noise = torch.randn(80, generator=generator)
    y = (robust.score(x) + standard.score(x) + noise > 0).long()
    return standard.eval(), robust.eval(), x, y


def worst(half: Two, x: Tensor, y: Tensor) -> Tensor:
    """The score at the corner that is the worst for label y, in float64."""
    shift = (1 - 2 * y.double())[:, None] * half.w.detach().sign().double() * EPS
    return (x.flatten(1).double() + shift) @ half.w.detach().double() + half.b


def class_of(alpha: float, standard: Tensor, robust: Tensor, mix: str, scale: float) -> Tensor:
    """The blend's class, from the scores of the halves: log-odds above 0."""
    if 0 < alpha < 1:
        robust = scale * robust
    if mix == "logits":
        return ((1 - alpha) * standard + alpha * robust > 0).long()
    return ((1 - alpha) * torch.sigmoid(standard) + alpha * torch.sigmoid(robust) > 0.5).long()


@pytest.mark.parametrize("mix, scale", [("probabilities", 1.0), ("probabilities", 3.0), ("logits", 1.0)])
def test_the_whole_curve_of_two_linear_halves(mix: Any, scale: float) -> None:
    standard, robust, x, y = linear_case()
    sharpen = None if scale == 1 else Scaled(scale)
    found = blend(standard, robust, x, y, attack=CORNER, mix=mix, sharpen=sharpen, num_classes=2)
    assert (found.alphas, found.attacked) == (list(ALPHAS), len(ALPHAS))
    standing = []
    with torch.no_grad():
        clean = standard.score(x).double(), robust.score(x).double()
    at_worst = worst(standard, x, y), worst(robust, x, y)
    for k, alpha in enumerate(ALPHAS):
        before = class_of(alpha, *clean, mix, scale)
        after = class_of(alpha, *at_worst, mix, scale)
        assert found.predicted[k] == before.tolist()
        expected = torch.where(before != y, -2, torch.where(after != y, 0, -1))
        assert [min(attack, 0) for attack in found.broken[k]] == expected.tolist()
        standing.append(int((expected == -1).sum()))
    assert len(set(standing)) > 3, "the curve is no flat line"
    assert all(0 < count < 80 for count in standing)


def test_what_breaks_one_alpha_is_put_to_all() -> None:
    """The standard half gives no gradient: attacked alone only its random starts break it; what was made for the robust
    half, whose weights have the same signs, breaks it wherever it can be broken.
    """
    standard, robust, x, y = linear_case()
    masked = Two(standard.w, standard.b, masked=True)
    alone = blend(masked, robust, x, y, attack=CORNER, alphas=[0.0], num_classes=2)
    found = blend(masked, robust, x, y, attack=CORNER, alphas=[0.0, 1.0], num_classes=2)
    with torch.no_grad():
        right = (standard.score(x) > 0).long() == y
    blind = Two(robust.w, robust.b)  # the corner that the attack reaches: the robust half is blind to one pixel
    shift = (1 - 2 * y[:, None]) * robust.w.detach().sign() * EPS
    with torch.no_grad():
        reached = ((x.flatten(1) + shift) @ standard.w + standard.b > 0).long()
        stands = (blind.score(x) > 0).long() == y
    assert fell(found, 0) >= set(torch.nonzero(right & stands & (reached != y))[:, 0].tolist())
    assert len(fell(found, 0)) > 2 * len(fell(alone, 0))


def test_a_warm_start_goes_on_where_the_alpha_above_stopped() -> None:
    """One pixel at 0.53, class 1 above 0.5, steps of 0.02 from the clean image: one attack gets to 0.51, the next one's
    warm start to 0.49, which breaks the alpha above as well.
    """
    half = Two(torch.tensor([10.0]), -5.0)
    x, y = torch.full((1, 1, 1, 1), 0.53), torch.tensor([1])
    attack = "pgd(linf(0.1), steps=1, step_size=0.02, start=clean)"
    one = blend(half, half, x, y, attack=attack, alphas=[1.0], num_classes=2)
    assert one.broken == [[-1]]
    found = blend(half, half, x, y, attack=attack, alphas=[0.5, 1.0], num_classes=2)
    assert found.attacks == ["pgd", "warm start", "margin", "standard half", "robust half"]
    assert found.broken == [[1], [1]]


def test_a_climb_begins_in_the_ball() -> None:
    """From 0.9, outside the ball of 0.1 about 0.5, one step down of 0.05: 0.6, then 0.55."""
    half = Two(torch.tensor([10.0]), -5.0)
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
    attack = PGD(linf(0.1), steps=1, step_size=0.05, keep="last")
    assert attack.climb(half, x, y, torch.full_like(x, 0.9)).item() == pytest.approx(0.55)


# ------------------------------------------------------------------------------------------------ another way


Halves = tuple[RoutedModel, RoutedModel, Tensor, Tensor]


@pytest.fixture
def halves(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> Halves:
    """A dense and a routed model, 12 images, and the labels that the routed one gives."""
    standard, robust, x = tiny("linear", 5), tiny("ensemble(linear, experts=2, router=linear)"), images(12)
    with torch.no_grad():
        for model, scale in ((standard, 40.0), (robust, 10.0)):
            for module in model.modules():
                head = getattr(module, "head", None)
                if isinstance(head, nn.Linear) and head.out_features == 4:
                    head.weight.mul_(scale)
                    head.bias.sub_(head.bias)
        return standard, robust, x, robust(x).argmax(1)


ATTACK = "pgd(linf(0.03), steps=2, seed=2)"


def test_at_1_it_is_the_robust_half_under_the_same_attacks(halves: Halves) -> None:
    standard, robust, x, y = halves
    found = blend(standard, robust, x, y, attack=ATTACK, alphas=[1.0], num_classes=4)
    base = PGD(linf(0.03), steps=2, seed=2)
    attacks = {
        "pgd": base,
        "margin": replace(base, objective=joint("margin")),
        "routes": ExpertTransition(linf(0.03), steps=2, seed=2),
    }
    assert found.attacks == list(attacks)
    climbed, expected = frozen_copy(robust, x), torch.full((12,), -1)
    for number, (name, attack) in enumerate(attacks.items()):
        x_adv = attack(climbed, x, y, part_noise(Noise.of(torch.arange(12), 2), f"{name} 1.0"))
        with torch.no_grad():
            expected[(robust(x_adv).argmax(1) != y) & (expected == -1)] = number
    assert found.broken == [expected.tolist()]
    assert len(set(expected.tolist())) > 2, "some stand, and two attacks are needed"
    other = blend(robust, robust, x, y, attack=ATTACK, alphas=[1.0], num_classes=4)
    assert other.broken == found.broken, "the standard half plays no part"


def test_no_alpha_is_easier_than_when_it_is_attacked_alone(halves: Halves) -> None:
    standard, robust, x, y = halves
    alphas = [0.0, 0.6, 1.0]
    found = blend(standard, robust, x, y, attack=ATTACK, alphas=alphas, num_classes=4)
    more = 0
    for k, alpha in enumerate(alphas):
        alone = blend(standard, robust, x, y, attack=ATTACK, alphas=[alpha], num_classes=4)
        assert alone.predicted == [found.predicted[k]]
        assert fell(alone, 0) <= fell(found, k)
        more += len(fell(found, k) - fell(alone, 0))
    assert more > 0


def test_the_batch_size_decides_nothing_and_the_models_come_back(halves: Halves) -> None:
    standard, robust, x, y = halves
    common: dict[str, Any] = {"attack": ATTACK, "alphas": [0.5, 0.9, 1.0], "num_classes": 4}
    standard.train()
    first = rm.blend(standard, robust, x, y, **common)
    assert standard.training
    assert not robust.training
    standard.eval()
    again = rm.blend(standard, robust, x, y, batch_size=7, **common)
    assert (again.broken, again.predicted) == (first.broken, first.predicted)


def test_the_blend_differs_from_the_robust_half_only_where_that_is_unsure(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CERT-7b: where the predictions differ, the robust half's best probability leads its second by (1 - alpha) / alpha
    at most. Of every image that any attack made.
    """
    standard, robust, x, y = halves
    real, seen = alphas_module.judged, []

    def watched(dual: DualModel, alphas: tuple[float, ...], x_adv: Tensor) -> list[Tensor]:
        seen.append((x_adv, real(dual, alphas, x_adv)))
        return seen[-1][1]

    monkeypatch.setattr(alphas_module, "judged", watched)
    alphas = (0.6, 0.8, 0.95)
    blend(standard, robust, x, y, attack=ATTACK, alphas=alphas, sharpen="scaled(2)", num_classes=4)
    differ = sure = 0
    for x_adv, logits in seen:
        with torch.no_grad():
            probabilities = torch.softmax(2 * robust(x_adv), 1)
        best = probabilities.sort(1, descending=True).values
        lead = best[:, 0] - best[:, 1]
        for alpha, each in zip(alphas, logits, strict=True):
            other = each.argmax(1) != probabilities.argmax(1)
            assert bool((lead[other] <= (1 - alpha) / alpha + 1e-5).all())
            differ += int(other.sum())
            sure += int((lead > (1 - alpha) / alpha).sum())
    assert differ > 0
    assert sure > 0


class Tokens(RoutedModel):
    """A router of two items an image."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1)[:, :4].view(-1, 2, 2)
        return tape("router", top_k(pixels, 1)).weight.sum(1) * pixels.sum(1)


def test_which_attacks_an_alpha_gets(halves: Halves, images: Callable[..., Tensor]) -> None:
    standard, robust, x, _ = halves
    base = PGD(linf(0.05), steps=7, step_size=0.02, restarts=2, seed=4)

    def of(model: RoutedModel, alpha: float) -> dict[str, Any]:
        dual = DualModel(model, model)
        trace = dual.at(alpha).run(x).trace if 0 < alpha < 1 else {}
        return attacks_at(base, alpha, trace, warm=alpha < 1)

    common: dict[str, Any] = {"steps": 7, "step_size": 0.02, "restarts": 2, "seed": 4}
    inside = of(robust, 0.5)
    assert list(inside) == ["pgd", "warm start", "margin", "routes", "standard half", "robust half"]
    assert inside["routes"] == ExpertTransition(linf(0.05), **common)
    assert inside["margin"] == replace(base, objective=joint("margin"))
    assert of(Tokens(), 0.5)["routes"] == RouteBeam(linf(0.05), **common)
    assert list(of(standard, 1.0)) == ["pgd", "margin"]
    assert list(of(standard, 0.0)) == ["pgd", "warm start", "margin"]


# ------------------------------------------------------------------------------------------------ certificates


def margins(robust: Two, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """The least of p(label) - p(other) over the ball: two classes, so 2 p - 1 at the corner."""
    score = scale * worst(robust, x, y) * (2 * y - 1)
    return 2 * torch.sigmoid(score) - 1


def test_what_the_robust_half_proves() -> None:
    standard, robust, x, y = linear_case()
    known = margins(robust, x, y)
    found = blend(standard, robust, x, y, attack=CORNER, num_classes=2, margins=known)
    for k, alpha in enumerate(ALPHAS):
        needed = math.inf if alpha == 0 else (1 - alpha) / alpha
        assert found.certified[k] == (known > needed).tolist(), "a margin above 0 is of an image that is right"
        assert not any(sure and attack != -1 for sure, attack in zip(found.certified[k], found.broken[k]))
    shares = [sum(row) for row in found.certified]
    assert shares[:3] == [0, 0, 0], "no margin is above 1"
    assert 0 < shares[3] < shares[-1] < 80
    place = found.certified[-1].index(True)
    one = {place: float(known[place]), 99: 1.0}
    partly = blend(standard, robust, x, y, attack=CORNER, alphas=[1.0], num_classes=2, margins=one)
    assert partly.certified == [[i == place for i in range(80)]]


def test_sharpened_margins_prove_nothing_at_1_where_nothing_is_sharpened() -> None:
    standard, robust, x, y = linear_case()
    known = margins(robust, x, y, scale=4.0)
    common: dict[str, Any] = {"attack": CORNER, "alphas": [0.8, 1.0], "num_classes": 2}
    found = blend(standard, robust, x, y, sharpen="scaled(4)", margins=known, **common)
    assert found.sharpen == "scaled(scale=4)"
    assert found.certified == [(known > 0.25).tolist(), [False] * 80]
    assert sum(found.certified[0]) > 0


def test_a_mixer_can_lower_alpha_so_more_is_needed() -> None:
    """sigmoid(logit(alpha) - 2) is the lowest share that it sets; 1 / share - 1 is what is needed there."""
    half = Two(torch.ones(4))
    dual = DualModel(half, half, mixer=nn.Sequential(nn.Flatten(), nn.Linear(4, 1)))
    lowest = 1 / (1 + math.exp(-(math.log(0.9 / 0.1) - 2)))
    assert threshold(dual, 0.9) == pytest.approx(1 / lowest - 1)
    assert threshold(DualModel(half, half), 0.9) == pytest.approx(1 / 9)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_a_certifier_proves_what_no_attack_breaks(mix: Mix) -> None:
    """One corner of the ball is the worst for both halves, and two classes have one margin, so that the bounds of both
    halves add up to the blend's own worst margin, and the corner is reached: proven and unbroken are the same, but for
    rounding.
    """
    standard, robust, x, y = linear_case()
    common: dict[str, Any] = {"attack": CORNER, "num_classes": 2, "mix": mix}
    found = blend(standard, robust, x, y, certifier="bounds(linf(0.1), search=0)", **common)
    held = [[attack == -1 for attack in row] for row in found.broken]
    assert found.certified == held
    shares = [sum(row) for row in held]
    assert len(set(shares)) > 3
    assert 0 < min(shares) < max(shares) < 80


@pytest.mark.parametrize("certifier", ["bounds(linf(0.05))", "bounds(l2(0.1))", "smoothing"])
def test_a_certifier_of_another_ball_is_refused(certifier: str) -> None:
    standard, robust, x, y = linear_case()
    with pytest.raises(UserError, match=r"attacked in linf with eps 0.1; expected a certifier of that ball"):
        blend(standard, robust, x, y, attack=CORNER, num_classes=2, certifier=certifier)


def test_a_certificate_that_an_attack_refutes_is_an_error() -> None:
    standard, robust, x, y = linear_case()
    lies = torch.ones(80)
    common: dict[str, Any] = {"attack": CORNER, "alphas": [1.0], "num_classes": 2}
    first = blend(standard, robust, x, y, **common).broken[0].index(0)
    with pytest.raises(
        UserError, match=rf"^image {first} is certified at alpha 1, but the attack 'pgd' breaks it there"
    ):
        blend(standard, robust, x, y, margins=lies, **common)
    with pytest.raises(UserError, match="proves nothing of a blend of logits"):
        blend(standard, robust, x, y, mix="logits", margins=lies, **common)
    with pytest.raises(UserError, match="there are 79 certified margins for 80 images"):
        blend(standard, robust, x, y, margins=lies[1:], **common)


# ------------------------------------------------------------------------------------------------ choosing alpha


def test_alpha_is_chosen_on_validation(capsys: pytest.CaptureFixture[str]) -> None:
    standard, robust, x, y = linear_case()
    val = from_arrays(x[:30], y[:30])
    alphas = [0.0, 0.3, 0.6, 0.9, 1.0]
    with torch.no_grad():
        scores = standard.score(val.batch([*range(30)]).x), robust.score(val.batch([*range(30)]).x)
    accuracy = [(class_of(a, *scores, "probabilities", 1.0) == val.labels).sum().item() / 30 for a in alphas]
    assert len(set(accuracy)) > 1
    common: dict[str, Any] = {"attack": CORNER, "alphas": alphas, "val": val, "num_classes": 2}
    wanted = sorted(set(accuracy))[1]
    found = blend(standard, robust, x[30:], y[30:], clean=wanted, **common)
    assert found.validation == accuracy
    assert (found.wanted, found.chosen) == (wanted, max(a for a, b in zip(alphas, accuracy) if b >= wanted))
    assert capsys.readouterr().err == ""
    none = blend(standard, robust, x[30:], y[30:], clean=1.0, **common)
    assert none.chosen is None
    best = f"{100 * max(accuracy):.4g}"
    assert capsys.readouterr().err == (
        f"no alpha has a clean accuracy of 100 % on the validation images (the best has {best} %); none is chosen\n"
    )
    data = Data("toy", val, val, from_arrays(x[30:], y[30:]), ("a", "b"), (0.5,), (0.5,))
    own = blend(standard, robust, data, alphas=[0.0, 1.0], attack=CORNER, clean=0.0)
    assert (own.validation, own.chosen, own.header.data) == ([accuracy[0], accuracy[-1]], 1.0, "toy")


# ------------------------------------------------------------------------------------------------ bad inputs


def test_alphas_as_they_are_written() -> None:
    assert read(BlendOptions, {"alphas": "1, 0.5, 0.5, 0"}) == read(BlendOptions, {"alphas": [0.5, 1, 0]})
    for text, message in {
        "0,1.5": "1.5 is no alpha; expected shares of the robust half, from 0",
        "-0.1": "-0.1 is no alpha",
        "a,b": "'a,b' is not a list of numbers",
        "[]": "there is no alpha; expected at least one",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            read(BlendOptions, {"alphas": text})
    with pytest.raises(UserError, match="nan is no alpha"):
        read(BlendOptions, {"alphas": [math.nan]})


def test_what_cannot_be_blended(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    x, y = images(4), labels(4)
    four, five = build_model("linear", 4, (3, 8, 8)), build_model("linear", 5, (3, 8, 8))
    with pytest.raises(UserError, match="the halves have 4 and 5 classes"):
        blend(four, five, x, y)
    with pytest.raises(UserError, match="the model fails on images"):
        blend(four, build_model("linear", 4, (1, 8, 8)), x, y)
    with pytest.raises(UserError, match="a blend makes its attacks from one pgd on the whole model; got square"):
        blend(four, four, x, y, attack="square(linf(0.1))")
    with pytest.raises(UserError, match="alpha is chosen on validation images, and there are none"):
        blend(four, four, x, y, clean=0.5)
    with pytest.raises(UserError, match="the clean accuracy wanted is 90, expected a share from 0 to 1"):
        blend(four, four, x, y, clean=90.0)
    with pytest.raises(UserError, match="the batch size is 0"):
        blend(four, four, x, y, batch_size=0)
    with torch.no_grad():
        four.network.head.weight.fill_(math.nan)  # type: ignore[union-attr]
    found = blend(four, build_model("linear", 4, (3, 8, 8)), x, y, alphas=[0.0, 1.0], attack="pgd(linf(0.01), steps=1)")
    assert found.predicted[0] == [-1] * 4
    assert found.broken[0] == [-2] * 4
