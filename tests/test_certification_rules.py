"""The propositions as functions of tensors: each against brute force, a linear programme, a closed form, or samples."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from closed_forms import soft_margin, soft_radius
from robustmoe.certification import Ball, rules, worst_margins
from robustmoe.models import blend_logits
from robustmoe.models.parts import Fork, Leaf

DUAL = {"linf": 1, "l2": 2}  # order of the dual norm


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def away(values: Tensor, y: Tensor) -> Tensor:
    """The entries of the other classes: (n, c) -> (n, c - 1)."""
    others = torch.ones_like(values, dtype=torch.bool).scatter_(1, y[:, None], False)
    return values[others].view(len(values), -1)


# ------------------------------------------------------------------------------------------------ CERT-0


def corner_minimum(lower: Tensor, upper: Tensor, y: int) -> Tensor:
    """min over the corners of the box of logit margins of each p_y - p_j: the difference is monotone in every margin
    for any fixed values of the others, so its minimum over the box is at a corner.
    """
    c = len(lower)
    ways = [(0.0,) if k == y else (float(lower[k]), float(upper[k])) for k in range(c)]
    corners = torch.tensor(list(product(*ways)), dtype=torch.float64)  # z_y - z_k
    p = torch.softmax(-corners, 1)
    return (p[:, y, None] - p).amin(0)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_probability_margins_are_the_minimum_over_the_box_of_logit_margins(scale: float) -> None:
    y = torch.arange(60) % 4
    lower = scale * draw(1, 60, 4)
    upper = lower + scale * draw(2, 60, 4).abs()
    lower, upper = (each.scatter(1, y[:, None], 0.0) for each in (lower, upper))
    assert 40 < int((away(lower, y) < 0).sum()) < 140  # both cases of CERT-0
    found = rules.probability_margins(lower, upper, y)
    expected = torch.stack([corner_minimum(lower[n], upper[n], int(y[n])) for n in range(60)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probability_margins_of_huge_logits_are_numbers(dtype: torch.dtype) -> None:
    lower = torch.tensor([[0.0, 1e30, 1e30], [0.0, -1e30, 1e30], [0.0, -1e30, -2e30], [0.0, -5.0, 3.0]], dtype=dtype)
    found = rules.probability_margins(lower, torch.full_like(lower, torch.inf), torch.zeros(4, dtype=torch.long))
    # p = (1, 0, 0); then class 1 has it all; then 2 may, and 1 may too (2's margin is unbounded above: it may be gone)
    expected = torch.tensor([[0.0, 1.0, 1.0], [0.0, -1.0, 0.0], [0.0, -1.0, -1.0]], dtype=dtype)
    torch.testing.assert_close(found[:3], expected)
    last = 1 / (1 + math.exp(5.0)), math.exp(5.0) / (1 + math.exp(5.0))  # of y and of class 1, where 2 is gone
    assert math.isclose(float(found[3, 1]), last[0] - last[1], rel_tol=1e-5)


def test_a_margin_of_zero_is_no_certificate() -> None:
    zero, y = torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    assert rules.probability_margins(zero, zero, y)[0].tolist() == [0.0, 0.0, 0.0]  # and nothing is above 0


# ------------------------------------------------------------------------------------------------ CERT-2, CERT-3


def box_of_differences(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """least and most of g_i - g_k for logits anywhere between low and high (n, e)."""
    off = 1 - torch.eye(low.shape[1], dtype=low.dtype)
    return (low[:, :, None] - high[:, None]) * off, (high[:, :, None] - low[:, None]) * off


def logits_box(seed: int, n: int = 40, e: int = 4) -> tuple[Tensor, Tensor]:
    low = draw(seed, n, e)
    return low, low + draw(seed + 1, n, e).abs()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_choice_of_sampled_logits_is_reachable_and_the_extreme_ones_show_that_no_more_is(k: int) -> None:
    low, high = logits_box(5)
    _, most = box_of_differences(low, high)
    found = rules.reachable(most, k)
    share = torch.rand(500, *low.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = (low + share * (high - low)).topk(k).indices
    chosen = torch.zeros(500, *low.shape, dtype=torch.bool).scatter_(-1, best, 1)
    assert not (chosen & ~found).any()
    alone = torch.stack([torch.where(torch.eye(4)[i] > 0, high, low) for i in range(4)], 1)  # expert i at its best
    rank = (alone > alone.diagonal(dim1=1, dim2=2)[:, :, None]).sum(2)
    assert torch.equal(found, rank < k)  # for a box of logits, that is when an expert is chosen somewhere
    assert k == 4 or (~found).any()


def test_a_tie_is_reachable() -> None:
    most = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert rules.reachable(most).tolist() == [[True, True]]
    assert rules.reachable(torch.tensor([[[0.0, 2.0], [-1e-9, 0.0]]])).tolist() == [[True, False]]


# ------------------------------------------------------------------------------------------------ CERT-4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_weights_hold_every_true_weight_and_are_attained(temperature: float) -> None:
    low, high = logits_box(7)
    small, large = rules.soft_weights(*box_of_differences(low, high), temperature)
    share = torch.rand(500, *low.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.softmax((low + share * (high - low)) / temperature, -1)
    assert (weights >= small - 1e-12).all()
    assert (weights <= large + 1e-12).all()
    for i in range(4):
        mine = torch.eye(4)[i] > 0
        top, bottom = (torch.softmax(torch.where(mine, *pair) / temperature, 1) for pair in ((high, low), (low, high)))
        torch.testing.assert_close(large[:, i], top[:, i])
        torch.testing.assert_close(small[:, i], bottom[:, i])


def programme(lower: Tensor, small: Tensor, large: Tensor) -> float:
    """min sum_i a_i lower_i over a in the simplex between small and large."""
    sides = list(zip(small.tolist(), large.tolist(), strict=True))
    found = linprog(lower.numpy(), A_eq=[[1.0] * len(lower)], b_eq=[1.0], bounds=sides, method="highs")
    assert found.status == 0, found.message
    return float(found.fun)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_greedy_mixture_is_the_linear_programme(spread: float) -> None:
    """Spread 0.01: the weights are nearly known; 8: the small ones sum to nearly 0."""
    low = draw(9, 30, 5)
    small, large = rules.soft_weights(*box_of_differences(low, low + spread * draw(10, 30, 5).abs()))
    lower = draw(11, 30, 5, 3)
    found = rules.weighed(lower, small, large)
    expected = [[programme(lower[n, :, j], small[n], large[n]) for j in range(3)] for n in range(30)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)  # HiGHS: 1e-7


def test_a_cold_soft_router_is_a_hard_one() -> None:
    """CERT-4 at temperature 1e-4 is CERT-2: the worst of the reachable experts."""
    low, high = logits_box(13)
    least, most = box_of_differences(low, high)
    lower = draw(15, 40, 4, 3)
    found = rules.weighed(lower, *rules.soft_weights(least, most, 1e-4))
    hard = lower.masked_fill(~rules.reachable(most)[:, :, None], torch.inf).amin(1)
    assert most[most != 0].abs().min() > 1e-3
    assert least[least != 0].abs().min() > 1e-3
    torch.testing.assert_close(found, hard, rtol=0, atol=1e-3)


def test_one_expert_and_equal_experts_leave_nothing_to_the_router() -> None:
    one = torch.zeros(3, 1, 1, dtype=torch.float64)
    lower = draw(17, 3, 1, 4)
    assert torch.equal(rules.weighed(lower, *rules.soft_weights(one, one)), lower[:, 0])
    assert rules.reachable(one).all()
    small, large = rules.soft_weights(*box_of_differences(*logits_box(19, 3)))
    torch.testing.assert_close(rules.weighed(lower.expand(3, 4, 4), small, large), lower[:, 0])


# ------------------------------------------------------------------------------------------------ CERT-5


def test_total_variation_of_two_softmaxes_is_at_most_tanh_of_a_quarter_of_the_range() -> None:
    g, step = draw(21, 5000, 4), 2 * draw(22, 5000, 4)
    variation = 0.5 * (torch.softmax(g + step, 1) - torch.softmax(g, 1)).abs().sum(1)
    width = step.amax(1) - step.amin(1)
    assert (variation <= torch.tanh(width / 4) + 1e-12).all()
    w = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    two = torch.stack([w / 4, -w / 4], 1)  # from (-w/4, w/4): the difference moves by w, about 0
    variation = 0.5 * (torch.softmax(two, 1) - torch.softmax(-two, 1)).abs().sum(1)
    torch.testing.assert_close(variation, torch.tanh(w / 4))


class Soft:
    """A soft mixture of linear experts f_i(x) = W_i x + b_i, router g(x) = V x + v, in d dimensions; class y = 0."""

    def __init__(self, seed: int, e: int = 3, c: int = 3, d: int = 5) -> None:
        self.w, self.b = draw(seed, e, c, d), draw(seed + 1, e, c)
        self.v, self.shift = draw(seed + 2, e, d), draw(seed + 3, e)

    def margins(self, x: Tensor) -> Tensor:
        """(n, e, c) of every expert."""
        z = torch.einsum("ecd,nd->nec", self.w, x) + self.b
        return z[:, :, :1] - z

    def mixed(self, x: Tensor, temperature: float) -> Tensor:
        weight = torch.softmax((x @ self.v.T + self.shift) / temperature, 1)
        return (weight[:, :, None] * self.margins(x)).sum(1)

    def constants(self, norm: str) -> tuple[Tensor, float]:
        """Exact: slope (1, c), and steepness."""
        order = DUAL[norm]
        slope = torch.linalg.vector_norm(self.w[:, :1] - self.w, order, dim=2).amax(0)
        steepness = torch.linalg.vector_norm(self.v[:, None] - self.v[None], order, dim=2).max()
        return slope[None], float(steepness)


def in_ball(seed: int, n: int, d: int, eps: float, norm: str) -> Tensor:
    """Steps on the sphere, half of them at corners (linf) or of random length (l2)."""
    step = draw(seed, n, d)
    if norm == "linf":
        return eps * torch.where(torch.arange(n)[:, None] % 2 == 0, step.sign(), step.tanh())
    return eps * step / torch.linalg.vector_norm(step, dim=1, keepdim=True)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_soft_margin_is_below_every_sampled_one(norm: str, temperature: float) -> None:
    useful = 0
    for seed in range(100, 140, 4):
        model, x = Soft(seed), draw(seed + 50, 1, 5)
        margin, each = model.mixed(x, temperature), model.margins(x)
        spread = each.amax(1) - each.amin(1)
        slope, steepness = model.constants(norm)
        for eps in (0.01, 0.1, 1.0):
            found = soft_margin(margin, spread, slope, steepness, eps, temperature)
            sampled = model.mixed(x + in_ball(seed, 1000, 5, eps, norm), temperature)
            assert (sampled >= found - 1e-12).all()
            useful += int((found < sampled.amin(0) - 1e-9).sum())
        radius = float(soft_radius(margin, spread, slope, steepness, temperature))
        positive = bool((margin[:, 1:] > 0).all())
        assert (radius > 0) == positive
        if positive:  # tanh t <= t: within the radius the margin that is claimed is above 0
            found = soft_margin(margin, spread, slope, steepness, 0.999 * radius, temperature)
            assert (found[:, 1:] > 0).all()
            assert (model.mixed(x + in_ball(seed, 1000, 5, 0.999 * radius, norm), temperature)[:, 1:] > 0).all()
    assert useful


def test_without_spread_the_soft_radius_is_margin_over_slope_whatever_the_router_does() -> None:
    margin, slope = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[0.0, 2.0, 4.0]])
    zero = torch.zeros_like(margin)
    for steepness in (0.0, 1.0, 1e6):  # identical experts: the router is free
        assert soft_radius(margin, zero, slope, steepness).tolist() == [0.25]  # min(3 / 2, 1 / 4)
    assert soft_radius(margin, zero, zero, 1.0).tolist() == [math.inf]  # constant
    # a router that swings fast: by 1.6 of margin 3 in a spread of 1.6, and no more however cold it is
    turned = soft_margin(torch.tensor([[3.0]]), torch.tensor([[1.6]]), torch.zeros(1, 1), 1e9, 1.0)
    assert turned.item() == pytest.approx(3.0 - 1.6)


# ------------------------------------------------------------------------------------------------ CERT-7 to CERT-9


@pytest.mark.parametrize("alpha, expected", [(0.6, 2 / 3), (0.7, 3 / 7), (0.8, 0.25), (0.9, 1 / 9), (0.95, 1 / 19)])
def test_the_threshold_of_a_dual_is_attained_by_a_one_hot_standard_half(alpha: float, expected: float) -> None:
    threshold = rules.threshold(alpha)
    assert threshold == pytest.approx(expected)
    standard = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # one-hot, wrong: margin -1
    for step, right in ((1e-6, True), (-1e-6, False)):
        margin = threshold + step
        robust = torch.tensor([[(1 + margin) / 2, (1 - margin) / 2]], dtype=torch.float64)
        blend = blend_logits(standard.log().clamp(min=-1e3), robust.log(), alpha, "probabilities")
        assert (int(blend.argmax()) == 0) is right
        bound = rules.dual_margins(torch.tensor([[-5.0]]), torch.tensor([[margin]], dtype=torch.float64), alpha)
        assert (float(bound) > 0) is right  # a standard margin cannot be below -1


def test_no_margin_passes_at_alpha_a_half_or_less() -> None:
    assert rules.threshold(0.5) == 1.0  # and a probability margin is below 1
    assert rules.threshold(0.4) > 1.0
    assert rules.threshold(0.0) == math.inf
    best = torch.tensor([[1.0]])
    assert not (rules.dual_margins(-best, best, 0.5) > 0).any()


def test_knowing_the_standard_half_never_certifies_less() -> None:
    """CERT-8 contains CERT-7: dual_margins grows with the standard half's bound, whose least is -1."""
    standard, robust = draw(31, 500, 3).tanh(), draw(32, 500, 3).tanh()
    for alpha in (0.55, 0.7, 0.9):
        known = rules.dual_margins(standard, robust, alpha)
        blind = rules.dual_margins(-torch.ones_like(robust), robust, alpha)
        assert (known >= blind).all()
        assert torch.equal(blind > 0, robust > rules.threshold(alpha))
        assert int((known > 0).sum()) > int((blind > 0).sum()) > 0


def test_alpha_1_is_the_robust_half_and_alpha_0_the_standard_one() -> None:
    standard, robust = draw(33, 20, 3).tanh(), draw(34, 20, 3).tanh()
    assert torch.equal(rules.dual_margins(standard, robust, 1.0), robust)
    assert torch.equal(rules.dual_margins(standard, robust, 0.0), standard)


def test_a_dual_and_its_robust_half_differ_only_where_the_robust_margin_is_small() -> None:
    """CERT-7b, pointwise: for any standard half."""
    standard, robust = 4 * draw(35, 20_000, 3), 2 * draw(36, 20_000, 3)
    top = torch.softmax(robust, 1).topk(2).values
    margin = top[:, 0] - top[:, 1]
    for alpha in (0.55, 0.7, 0.9):
        blend = blend_logits(standard, robust, alpha, "probabilities")
        differs = blend.argmax(1) != robust.argmax(1)
        assert differs.any()
        assert (margin[differs] <= rules.threshold(alpha)).all()
        assert int(differs.sum()) <= int((margin <= rules.threshold(alpha)).sum()) < len(margin)


def test_the_scale_of_the_standard_half_decides_a_blend_of_logits_and_nothing_of_the_certificate() -> None:
    """CERT-9, with the numbers of its proof: 0.3 (0, 4c) + 0.7 (3, 0) = (2.1, 1.2 c)."""
    robust = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.long)
    margin = torch.cat([torch.zeros(1, 1), robust[:, :1] - robust[:, 1:]], 1).double()
    certified = rules.probability_margins(margin, margin, y)[:, 1]
    classes = {"logits": [], "probabilities": []}
    for c in (1.0, 3.0, 10.0):
        standard = torch.tensor([[0.0, 4.0 * c]], dtype=torch.float64)
        for mix, found in classes.items():
            found.append(int(blend_logits(standard, robust, 0.7, mix).argmax()))
    assert classes["logits"] == [0, 1, 1]
    assert float(certified) == pytest.approx(math.tanh(1.5))  # 0.905, above 3 / 7 whatever c is
    assert float(certified) > rules.threshold(0.7)
    assert classes["probabilities"] == [0, 0, 0]


def test_equal_weights_are_bounded_by_the_lowest_mean_of_any_k_experts() -> None:
    """By trying every set of k of the experts in reach."""
    generator = torch.Generator().manual_seed(2)
    lower = torch.randn(30, 5, 4, generator=generator, dtype=torch.float64)
    away = torch.rand(30, 5, generator=generator) < 0.3
    away[:, :3] = False
    lower = lower.masked_fill(away[..., None], torch.inf)
    for k in (1, 2, 3):
        sets = [lower[:, list(chosen)].mean(1) for chosen in combinations(range(5), k)]
        torch.testing.assert_close(rules.averaged(lower, k), torch.stack(sets).amin(0))


def test_top_2_of_equal_weights_is_certified_where_the_mean_is_right() -> None:
    """Two constant experts with margins 3 and -1 behind a router that uses both: their mean is 1, and one is wrong."""
    router, good, bad = (nn.Linear(4, 2) for _ in range(3))
    with torch.no_grad():
        for layer, bias in ((router, (0.0, 0.0)), (good, (3.0, 0.0)), (bad, (-1.0, 0.0))):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(bias))
    fork = Fork(
        "router",
        lambda x: router(x.flatten(1)),
        (Leaf(lambda x: good(x.flatten(1))), Leaf(lambda x: bad(x.flatten(1)))),
        k=2,
        weighting="equal",
    )
    y = torch.zeros(1, dtype=torch.long)
    ball = Ball(torch.full((1, 1, 2, 2), 0.5), "linf", torch.tensor([0.5]))
    with torch.no_grad():
        equal, any_ = (worst_margins(replace(fork, weighting=each), ball, y) for each in ("equal", "chosen"))
    assert equal.lower[0, 1].item() == pytest.approx(1.0)
    assert any_.lower[0, 1].item() == pytest.approx(-1.0)
    assert equal.rule == ["top-k mixture"]
