"""The dual model: exact endpoints, the two mixes against naive float64, what each mix does with the standard half's
scale (CERT-7, CERT-9), sharpening and the mixer by their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.errors import UserError
from robustmoe.models import (
    SHARPENINGS,
    Dual,
    DualModel,
    Linear,
    Nuts,
    Plain,
    RoutedModel,
    Scaled,
    blend_logits,
    build_model,
)
from robustmoe.models.dual import Mix
from robustmoe.routing import to_expert

HALF = "ensemble(small_cnn(width=4), experts=3, gate=hard, router=linear)"
OPTIONS = ["", "sharpen=nuts", "sharpen=scaled(scale=4)", "mixer=linear", "sharpen=nuts, mixer=small_cnn(width=4)"]
MIXES: list[Mix] = ["probabilities", "logits"]


def make(
    tiny: Callable[..., RoutedModel], options: str = "", mix: Mix = "probabilities", alpha: float = 0.7
) -> DualModel:
    extra = f", {options}" if options else ""
    model = tiny(f"dual({HALF}, {HALF}, alpha={alpha}, mix={mix}{extra})")
    assert isinstance(model, DualModel)
    return model


def of_logits(standard: Tensor, robust: Tensor, alpha: float = 0.7, mix: Mix = "probabilities") -> DualModel:
    """Two halves that say these logits whatever they see."""
    return DualModel(Plain(lambda x: standard), Plain(lambda x: robust), alpha, mix)


def naive(standard: Tensor, robust: Tensor, alpha: Tensor | float) -> Tensor:
    """log of the mixed softmaxes, in float64 and by their definition."""
    p, q = (z.double().exp() / z.double().exp().sum(1, keepdim=True) for z in (standard, robust))
    share = torch.as_tensor(alpha).double().expand(len(p))[:, None]
    return ((1 - share) * p + share * q).log()


# ------------------------------------------------------------------------------------------------ alpha


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_the_endpoints_are_the_halves_bit_for_bit(
    mix: Mix, options: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Both as built and as set later, and nothing between them is."""
    x, model = images(12), make(tiny, options, mix)
    for alpha, half in ((0.0, model.standard), (1.0, model.robust)):
        assert torch.equal(model.at(alpha)(x), half(x))
        assert torch.equal(make(tiny, options, mix, alpha)(x), half(x))
        model.alpha = alpha
        assert torch.equal(model(x), half(x))
        model.alpha = 0.5
        assert not torch.equal(model(x), half(x))


@torch.no_grad()
def test_alpha_is_settable_and_at_shares_the_halves(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x, model = images(6), make(tiny)
    other = model.at(0.2)
    assert (model.alpha, other.alpha) == (0.7, 0.2)
    assert (other.standard, other.robust) == (model.standard, model.robust)
    model.alpha = 0.2
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), make(tiny, alpha=0.2)(x))
    model.standard.train()
    again = model.at(0.3)
    assert (again.training, again.standard.training, again.robust.training) == (False, True, False)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_0_to_1_is_refused(alpha: float, tiny: Callable[..., RoutedModel]) -> None:
    said = r"alpha is the robust half's share, a number from 0 \(standard\) to 1 \(robust\); got "
    model = make(tiny)
    for act in (
        lambda: setattr(model, "alpha", alpha),
        lambda: model.at(alpha),
        lambda: DualModel(model.standard, model.robust, alpha),
        lambda: Dual(Linear(), Linear(), alpha),
    ):
        with pytest.raises(ValueError, match=said):
            act()
    assert model.alpha == 0.7
    with pytest.raises(UserError, match=said):
        build_model("dual(linear, linear, alpha=1.5)", 4, (3, 8, 8))


# ------------------------------------------------------------------------------------------------ routes


@torch.no_grad()
def test_the_trace_is_that_of_both_halves(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    x, model = images(12), make(tiny)
    output = model.run(x)
    assert set(output.trace) == {"standard.router", "robust.router"}
    for half in ("standard", "robust"):
        own = getattr(model, half).run(x).trace["router"]
        for trace in (output.trace, model.route(x)):
            assert torch.equal(trace[f"{half}.router"].logits, own.logits)
            assert torch.equal(trace[f"{half}.router"].index, own.index)
    for forced in ({name: routing for name, routing in output.trace.items() if name == kept} for kept in output.trace):
        assert torch.equal(model.run(x, forced=forced).logits, output.logits)
    assert model.at(0.0).run(x).trace.keys() == output.trace.keys()  # at the endpoints too


@torch.no_grad()
def test_forcing_one_half_forces_that_half_alone(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x, model = images(12), make(tiny)
    forced = to_expert({"robust.router": model.run(x).trace["robust.router"]}, 1)
    robust = model.robust.run(x, forced={"router": forced["robust.router"]}).logits
    expected = blend_logits(model.standard(x), robust, 0.7, "probabilities")
    assert torch.equal(model.run(x, forced=forced).logits, expected)
    with pytest.raises(ValueError, match=r"forced routing for .*, but this model's routers are"):
        model.run(x, forced={"router": forced["robust.router"]})


# ------------------------------------------------------------------------------------------------ the mixes


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7, 0.99875])
def test_the_mixes_against_their_definitions(alpha: float) -> None:
    standard, robust = 4 * torch.randn(2, 50, 7)
    found = blend_logits(standard, robust, alpha, "probabilities")
    share = torch.tensor(alpha)  # as float32 has it: of 1 - 0.99875 a rounding of alpha is 5e-5
    torch.testing.assert_close(found.double(), naive(standard, robust, share), rtol=0, atol=5e-6)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(50))  # log probabilities already
    found = blend_logits(standard, robust, alpha, "logits")
    expected = (1 - alpha) * standard.double() + alpha * robust.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


def test_one_alpha_an_image() -> None:
    standard, robust = 4 * torch.randn(2, 50, 7)
    alpha = torch.linspace(0.01, 0.99, 50)
    found = blend_logits(standard, robust, alpha, "probabilities")
    torch.testing.assert_close(found.double(), naive(standard, robust, alpha.double()), rtol=0, atol=5e-6)
    found = blend_logits(standard, robust, alpha, "logits")
    for row in (0, 20, 49):
        alone = blend_logits(standard[row : row + 1], robust[row : row + 1], float(alpha[row]), "logits")
        assert torch.equal(found[row : row + 1], alone)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("alpha", [1e-12, 0.5, 1 - 1e-9])
def test_logits_of_ten_thousand_have_finite_gradients(mix: Mix, alpha: float) -> None:
    """And the right value: with S certain of class 0 and R of class 1 the blend is (log(1 - alpha), log alpha)."""
    standard = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    robust = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    found = of_logits(standard, robust, alpha, mix)(torch.zeros(2, 1, 1, 1))
    assert torch.isfinite(found).all()
    if mix == "probabilities" and alpha == 0.5:
        assert found.detach().tolist() == [[pytest.approx(-math.log(2))] * 2] * 2
    loss = nn.functional.cross_entropy(found, torch.tensor([0, 0]))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [standard, robust]))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("sharpen", [None, Nuts(), Scaled(2.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_halves_in_bf16_give_float32(alpha: float, sharpen: Nuts | Scaled | None, mix: Mix) -> None:
    """The blend itself is computed in float32: it is the blend of the rounded logits, not rounded again."""
    standard, robust = torch.randn(2, 5, 4).bfloat16()
    model = of_logits(standard, robust, alpha, mix)
    model.sharpen = sharpen
    wide = of_logits(standard.float(), robust.float(), alpha, mix)
    wide.sharpen = sharpen
    x = torch.zeros(5, 1, 1, 1)
    assert model(x).dtype == torch.float32
    assert torch.equal(model(x), wide(x))


def test_under_autocast_too(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    x, model = images(6), make(tiny, "sharpen=nuts, mixer=linear")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert model.alphas(x).dtype == torch.float32  # type: ignore[union-attr]
    assert logits.dtype == torch.float32
    # log probabilities that went through bf16 would sum to 1 within 2^-9 only
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(6), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the standard scale


def test_p9_scaling_the_standard_logits_moves_a_logit_mix() -> None:
    """alpha 0.7, zR = (3, 0), zS = (0, 4c): 2.1 against 1.2 c, so class 0, 1, 1 for c = 1, 3, 10 (and at c = 1.75 a
    tie). The standard half says class 1 throughout.
    """
    robust, x = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1, 1, 1)
    found = []
    for c in (1.0, 3.0, 10.0):
        logits = of_logits(torch.tensor([[0.0, 4.0 * c]]), robust, 0.7, "logits")(x)
        assert logits[0].tolist() == pytest.approx([2.1, 1.2 * c])
        found.append(int(logits.argmax()))
    assert found == [0, 1, 1]


SCALES = [10.0**power for power in range(-3, 7)]


def test_p9_the_same_example_in_probabilities_keeps_its_prediction() -> None:
    """R's margin is tanh(3 / 2) = 0.905, above 0.3 / 0.7 = 0.429: CERT-7 certifies it against every standard half, and
    it is class 0 at every scale.
    """
    robust, x = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1, 1, 1)
    assert math.tanh(1.5) > 0.3 / 0.7
    for c in SCALES:
        assert int(of_logits(torch.tensor([[0.0, 4.0 * c]]), robust)(x).argmax()) == 0


@pytest.mark.parametrize("alpha", [0.6, 0.7, 0.9, 0.99])
def test_p7_a_certified_prediction_stays_for_every_scale_of_the_standard_half(alpha: float) -> None:
    """Issue 7, line 5: where R's margin is above (1 - alpha) / alpha, for every scale from 1e-3 to 1e6. A prediction
    that is not certified may well move: of these, some do.
    """
    standard, robust = torch.randn(4000, 5), 4 * torch.randn(4000, 5)
    top = robust.double().softmax(1).topk(2, dim=1).values
    certified = top[:, 0] - top[:, 1] > (1 - alpha) / alpha
    x = torch.zeros(4000, 1, 1, 1)
    every = torch.stack([of_logits(c * standard, robust, alpha)(x).argmax(1) for c in SCALES])
    assert 400 < int(certified.sum()) < 4000
    assert torch.equal(every[:, certified], robust[certified].argmax(1).expand(len(SCALES), -1))
    assert (every[:, ~certified] != robust[~certified].argmax(1)).any()


@pytest.mark.parametrize("alpha", [0.6, 0.7, 0.9])
@pytest.mark.parametrize("off, kept", [(0.01, True), (-0.01, False)])
def test_p7_the_threshold_is_sharp(alpha: float, off: float, kept: bool) -> None:
    """Two classes, R's margin 0.01 above or below (1 - alpha) / alpha, S certain of the other: the mixed margin is
    alpha m - (1 - alpha) = alpha * 0.01 or its negative.
    """
    margin = (1 - alpha) / alpha + off
    robust = torch.tensor([[(1 + margin) / 2, (1 - margin) / 2]]).log()
    found = of_logits(torch.tensor([[0.0, 1e3]]), robust, alpha)(torch.zeros(1, 1, 1, 1)).exp()
    assert float(found[0, 0] - found[0, 1]) == pytest.approx(alpha * off, abs=1e-6)
    assert bool(found.argmax() == 0) == kept


# ------------------------------------------------------------------------------------------------ sharpening


def nuts_by_hand(row: list[float], scale: float, shift: float, power: float) -> list[float]:
    """MixedNUTS on one image in Python's floats; torch's layer norm adds 1e-5 to the variance."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + 1e-5)
    out = []
    for v in row:
        z = (v - mean) / deviation + shift
        u = z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
        out.append(scale * math.copysign(abs(u) ** power, u))
    return out


@pytest.mark.parametrize("nuts", [Nuts(), Nuts(0.612, -2.143, 3.571), Nuts(2.0, 0.3, 0.5)])
def test_nuts_against_a_naive_formula(nuts: Nuts) -> None:
    logits = 3 * torch.randn(40, 10)
    expected = [nuts_by_hand(row, nuts.scale, nuts.shift, nuts.power) for row in logits.double().tolist()]
    torch.testing.assert_close(nuts(logits), torch.tensor(expected), rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(nuts(7 * logits + 3), nuts(logits), rtol=1e-3, atol=1e-4)  # scale and level are undone


def test_nuts_keeps_the_prediction_where_the_largest_is_above_minus_shift() -> None:
    """GELU is negative below 0 and rises above, so the largest u stays the largest once it is above 0."""
    logits = torch.randn(20000, 10, dtype=torch.float64)
    largest = torch.nn.functional.layer_norm(logits, (10,)).amax(1)
    kept = Nuts()(logits).argmax(1) == logits.argmax(1)
    assert bool(kept[largest > 1.1].all())
    assert int((largest < 1.1).sum()) > 20  # seldom, and not all of these are kept
    assert not bool(kept[largest < 1.1].all())


def test_nuts_of_two_classes_turns_the_prediction_round() -> None:
    """v = (1, -1), so u = GELU(-0.1) = -0.1 Phi(-0.1) = -0.0460 and GELU(-2.1) = -2.1 Phi(-2.1) = -0.0375."""
    logits = torch.tensor([[5.0, -5.0]])
    found = (-Nuts(scale=1.0, power=1.0)(logits))[0].tolist()
    assert found == pytest.approx([0.0460, 0.0375], abs=1e-4)
    assert int(Nuts()(logits).argmax()) == 1


def test_nuts_of_equal_or_huge_logits_has_a_finite_gradient() -> None:
    """Equal logits: u = GELU(shift) for all. With shift = 0, u = 0, where |u|^0.5 has no derivative."""
    for nuts in (Nuts(), Nuts(shift=0.0, power=0.5)):
        for logits in (torch.ones(2, 5), 1e4 * torch.randn(8, 5)):
            logits.requires_grad_()
            value = nuts(logits)
            (gradient,) = torch.autograd.grad((value * torch.arange(5)).sum(), logits)
            assert torch.isfinite(value).all()
            assert torch.isfinite(gradient).all()


def test_scaled_is_a_temperature_and_keeps_predictions() -> None:
    logits = torch.randn(100, 6)
    assert torch.equal(Scaled(8.0)(logits), 8 * logits)  # a power of two: exact
    for scale in (1e-3, 0.3, 50.0):
        assert torch.equal(Scaled(scale)(logits).argmax(1), logits.argmax(1))


@torch.no_grad()
def test_a_sharpening_is_of_the_robust_half_alone(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x, model = images(8), make(tiny, "sharpen=scaled(scale=10)")
    expected = naive(model.standard(x), 10 * model.robust(x), 0.7)
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the mixer


@pytest.mark.parametrize("alpha", [0.05, 0.7, 0.99])
def test_a_mixer_moves_the_logit_of_alpha_by_two_at_most(alpha: float, images: Callable[..., Tensor]) -> None:
    """sigmoid(logit(alpha) -/+ 2) = odds e^(-/+2) / (1 + odds e^(-/+2)); both ends are reached by a mixer of +-100."""
    x, odds = images(9), alpha / (1 - alpha)
    low, high = (odds * math.exp(sign * 2) / (1 + odds * math.exp(sign * 2)) for sign in (-1, 1))
    for value, expected in ((-100.0, low), (0.0, alpha), (100.0, high)):
        constant = Plain(lambda x, value=value: x.new_full((len(x), 1), value))  # type: ignore[misc]
        model = DualModel(Plain(lambda x: x), Plain(lambda x: x), alpha, mixer=constant)
        found = model.alphas(x)
        assert isinstance(found, Tensor)
        assert found.tolist() == pytest.approx([expected] * 9, rel=1e-5)
    if alpha == 0.7:
        assert (round(low, 2), round(high, 2)) == (0.24, 0.95)  # as the docstring of SHIFT says


def test_a_mixer_gives_every_image_its_own_alpha(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x, model = images(8), make(tiny, "mixer=linear")
    alphas = model.alphas(x)
    assert isinstance(alphas, Tensor)
    assert len(set(alphas.tolist())) == 8
    expected = naive(model.standard(x), model.robust(x), alphas.detach().double())
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x[3:4]), model(x)[3:4], rtol=0, atol=1e-5)
    own = {name: p for name, p in model.named_parameters() if name.startswith("mixer.")}
    assert own
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)), own.values()
    )
    assert all(gradient.any() for gradient in gradients)
    assert model.at(0.0).alphas(x) == 0.0


# ------------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(
    "text",
    [
        "dual(resnet8, resnet8)",
        "dual(ensemble(resnet8, router=linear, gate=hard), vgg16, alpha=0.9, mix=logits)",
        "dual(linear, linear, sharpen=nuts(power=2.0), mixer=small_cnn(width=4))",
        "dual(linear, dual(linear, linear, sharpen=scaled(scale=3.0)), alpha=0.0)",
    ],
)
def test_a_spec_comes_back_as_it_was_written(text: str) -> None:
    built = specs.build(text, "model")
    written = specs.text(built)
    assert specs.build(written, "model") == built
    assert specs.text(specs.build(written, "model")) == written


def test_sharpenings_stand_in_their_table() -> None:
    assert {name: make() for name, make in SHARPENINGS.items()} == {"scaled": Scaled(1.0), "nuts": Nuts(5.0, -1.1, 4.0)}


def test_a_dual_of_duals_names_its_routers_by_their_path(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model = tiny(f"dual(dual({HALF}, linear), {HALF}, alpha=0.5)")
    assert set(model.run(images(3)).trace) == {"standard.standard.router", "robust.router"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("dual(linear)", "robust"),
        ("dual(linear, linear, mix=sums)", "probabilities"),
        ("dual(linear, linear, sharpen=gelu)", "nuts"),
        ("dual(linear, linear, sharpen=scaled(scale=0.0))", r"scale must be above 0; got 0\.0"),
        ("dual(linear, linear, sharpen=nuts(scale=-1.0))", r"scale must be above 0; got -1\.0"),
        ("dual(linear, linear, sharpen=nuts(power=0.0))", r"power must be above 0; got 0\.0"),
        ("dual(linear, linear, mixer=dual(linear, linear))", "mixer"),
    ],
)
def test_bad_specs_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(text, 4, (3, 8, 8))


def test_the_usual_alpha_is_the_same_in_the_model_and_in_the_numbers() -> None:
    """The numbers are made without torch, so they cannot read the model's."""
    from robustmoe.analysis import blend as numbers
    from robustmoe.models import dual

    assert numbers.DEFAULT_ALPHA == dual.ALPHA == Dual.alpha
