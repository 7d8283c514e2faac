"""Experts of tokens: four ways to run them against a plain loop over tokens, gradients of every order, and who finds
room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from robustmoe.models.tokens import (
    Dispatch,
    TokenExperts,
    capacity,
    experts_choose,
    groupable,
    within_capacity,
)

WAYS: tuple[Dispatch, ...] = get_args(Dispatch)
ALIGNED, UNALIGNED = (8, 16), (6, 10)
"""(d, h): rows of a multiple of 16 bytes in float32 and bfloat16, which the grouped product needs, and others."""


def by_hand(experts: TokenExperts, x: Tensor, index: Tensor, weight: Tensor, kept: Tensor | None = None) -> Tensor:
    """Token by token, the definition; GELU written out."""
    rows = []
    for m in range(len(x)):
        total = torch.zeros_like(x[m])
        for j in range(index.shape[1]):
            if kept is None or bool(kept[m, j]):
                i = int(index[m, j])
                hidden = x[m] @ experts.w1[i] + experts.b1[i]
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                total = total + weight[m, j] * (hidden @ experts.w2[i] + experts.b2[i])
        rows.append(total)
    return torch.stack(rows) if rows else x


def filled(num: int, width: int, hidden: int) -> TokenExperts:
    """Experts none of whose numbers is 0."""
    experts = TokenExperts(num, width, hidden)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def chosen(items: int, num: int, k: int) -> tuple[Tensor, Tensor]:
    """k different experts an item, and weights."""
    return torch.rand(items, num).argsort(1)[:, :k], torch.rand(items, k)


def some(items: int, num: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and which pairs are kept: two thirds."""
    return *chosen(items, num, k), torch.rand(items, k) < 2 / 3


def only_even(items: int, num: int, k: int) -> tuple[Tensor, Tensor]:
    """Every odd expert stays empty."""
    index, weight = chosen(items, num, k)
    return index // 2 * 2, weight


CASES: dict[str, tuple[int, int, Callable[[], tuple[Tensor, ...]]]] = {
    "two of four": (13, 4, lambda: chosen(13, 4, 2)),
    "one of five": (9, 5, lambda: chosen(9, 5, 1)),
    "all of three": (7, 3, lambda: chosen(7, 3, 3)),
    "empty experts": (11, 6, lambda: only_even(11, 6, 1)),
    "one item": (1, 4, lambda: chosen(1, 4, 2)),
    "one expert": (6, 1, lambda: chosen(6, 1, 1)),
    "no item": (0, 4, lambda: chosen(0, 4, 2)),
    "some dropped": (12, 4, lambda: some(12, 4, 2)),
    "all dropped": (5, 4, lambda: (*chosen(5, 4, 2), torch.zeros(5, 2, dtype=torch.bool))),
}


def with_gradients(
    function: Callable[..., Tensor], experts: TokenExperts, x: Tensor, index: Tensor, weight: Tensor, *kept: Tensor
) -> list[Tensor]:
    """The output, and the gradients of x, the weights and every parameter, of one uneven sum."""
    x, weight = x.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    out = function(x, index, weight, *kept)
    slope = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x, weight, *experts.parameters()]
    if not out.requires_grad:  # nothing ran
        return [out, *map(torch.zeros_like, wanted)]
    found = torch.autograd.grad((out * slope).sum(), wanted, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [ALIGNED, UNALIGNED])
def test_claim_5_every_way_is_the_loop_over_tokens(way: Dispatch, case: str, sizes: tuple[int, int]) -> None:
    items, num, make = CASES[case]
    experts, x, (index, weight, *kept) = filled(num, *sizes), torch.randn(items, sizes[0]), make()
    assert groupable(x, experts.w1, experts.w2) == (sizes == ALIGNED and items > 0)
    expected = with_gradients(lambda *given: by_hand(experts, *given), experts, x, index, weight, *kept)
    found = with_gradients(lambda x, i, w, k=None: experts(x, i, w, k, dispatch=way), experts, x, index, weight, *kept)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_expert_has_gradient_zero(way: Dispatch) -> None:
    experts, (index, weight) = filled(4, *ALIGNED), only_even(9, 4, 1)
    experts(torch.randn(9, 8), index, weight, dispatch=way).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[1::2].any()
        assert parameter.grad[0].any()


@pytest.mark.parametrize("way", WAYS)
def test_double_precision_and_its_second_derivatives(way: Dispatch) -> None:
    """Float64, which the grouped product does not take: to 12 digits, and gradients of gradients against numerical
    ones.
    """
    experts, x = filled(3, 4, 4).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    index, weight, kept = some(5, 3, 2)
    weight = weight.double().requires_grad_(True)
    assert not groupable(x, experts.w1, experts.w2)
    out = experts(x, index, weight, kept, dispatch=way)
    torch.testing.assert_close(out, by_hand(experts, x, index, weight, kept), rtol=1e-12, atol=1e-12)
    parameters = tuple(experts.parameters())
    assert torch.autograd.gradgradcheck(
        lambda *_: experts(x, index, weight, kept, dispatch=way), (x, weight, *parameters), fast_mode=True
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drop", [False, True])
def test_second_derivatives_in_single_precision(way: Dispatch, drop: bool) -> None:
    """The gradient of the input gradient's square, as a Jacobian penalty takes it; also through the grouped product."""
    experts, x, (index, weight, kept) = filled(4, *ALIGNED), torch.randn(7, 8), some(7, 4, 2)
    found = []
    for function in (
        lambda x: by_hand(experts, x, index, weight, kept if drop else None),
        lambda x: experts(x, index, weight, kept if drop else None, dispatch=way),
    ):
        at = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(at).square().sum(), at, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [at, experts.w1, experts.b1, experts.w2]))
    for own, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-3 * float(reference.abs().max()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode(way: Dispatch) -> None:
    """Forward mode, by `torch.func.jvp` and by dual numbers (the grouped product has none), against the definition's
    double-backward one.
    """
    experts, x, v, (index, weight) = filled(4, *ALIGNED), torch.randn(7, 8), torch.randn(7, 8), chosen(7, 4, 2)
    _, expected = torch.autograd.functional.jvp(lambda x: by_hand(experts, x, index, weight), x, v)
    out, found = torch.func.jvp(lambda x: experts(x, index, weight, dispatch=way), (x,), (v,))
    torch.testing.assert_close(out, by_hand(experts, x, index, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = experts(torch.autograd.forward_ad.make_dual(x, v), index, weight, dispatch=way)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-4)


def test_dense_is_the_one_for_vmap() -> None:
    """Over batches of tokens, each with its routes (the others count tokens, which vmap does not allow)."""
    experts, x = filled(4, *ALIGNED), torch.randn(3, 7, 8)
    index, weight = (torch.stack(each) for each in zip(*(chosen(7, 4, 2) for _ in range(3)), strict=True))
    found = torch.vmap(lambda *given: experts(*given, dispatch="dense"))(x, index, weight)
    for own, *given in zip(found, x, index, weight, strict=True):
        torch.testing.assert_close(own, by_hand(experts, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [ALIGNED, UNALIGNED])
def test_under_autocast(way: Dispatch, sizes: tuple[int, int]) -> None:
    """Bfloat16 keeps 8 bits: outputs and gradients within 2 % of float32's, in norm. Tokens and parameters are float32
    and so are their gradients; the output is in half precision, as a dense MLP's.
    """
    experts, x, (index, weight, kept) = filled(4, *sizes), torch.randn(40, sizes[0]), some(40, 4, 2)
    expected = with_gradients(lambda *given: experts(*given, dispatch="loop"), experts, x, index, weight, kept)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda *given: experts(*given, dispatch=way), experts, x, index, weight, kept)
    assert found[0].dtype == torch.bfloat16
    for own, reference in zip(found, expected, strict=True):
        assert own.dtype == torch.float32 or own is found[0]
        assert float((own.float() - reference).norm() / reference.norm()) < 0.02


@torch.no_grad()
def test_what_auto_takes() -> None:
    """The grouped product where it can and what it holds is small, else sorted pairs; dense where every expert is
    chosen and none dropped. Here 16 hidden units of 4 bytes a pair: 32 MB are 524288 pairs.
    """
    experts, x = filled(4, *ALIGNED), torch.randn(5, 8)
    two, all_four = chosen(5, 4, 2)[0], chosen(5, 4, 4)[0]
    assert experts._fastest(x, two, None) == "grouped"
    assert experts._fastest(x, all_four, None) == "dense"
    assert experts._fastest(x, all_four, torch.ones(5, 4, dtype=torch.bool)) == "grouped"
    assert experts._fastest(x, two[:1].expand(2**18, 2), None) == "grouped"
    assert experts._fastest(x, two[:1].expand(2**18 + 1, 2), None) == "sorted"
    assert experts.double()._fastest(x.double(), two, None) == "sorted"


@torch.no_grad()
def test_each_expert_is_drawn_or_all_are_equal() -> None:
    """0.02 as in a `ViT` (4096 numbers: 1.1 % is one standard error); biases 0."""
    drawn, equal = TokenExperts(3, 64, 64), TokenExperts(3, 64, 64, equal=True)
    for weight in (drawn.w1, drawn.w2):
        assert not torch.equal(weight[0], weight[1])
        assert all(float(expert.std()) == pytest.approx(0.02, rel=0.1) for expert in weight)
    for weight in (equal.w1, equal.w2):
        assert torch.equal(weight, weight[:1].expand_as(weight))
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not any(bias.any() for experts in (drawn, equal) for bias in (experts.b1, experts.b2))
    with torch.device("meta"):
        assert TokenExperts(3, 4, 8, equal=True).w1.is_meta


# ------------------------------------------------------------------------------------------------ room


@pytest.mark.parametrize(
    "items, experts, k, factor, room, by_four",
    [
        (2308, 8, 2, 1.5, 866, 868),  # V-MoE: 4 images of 577 tokens
        (400, 8, 2, 1.05, 105, 108),
        (136, 16, 1, 1.05, 9, 12),
        (100, 10, 1, 1.1, 11, 12),  # 100 * 1.1 is above 110 in floating point
        (1, 8, 1, 0.1, 1, 4),
        (64, 4, 1, 4.0, 64, 64),
    ],
)
def test_claim_4_capacity(items: int, experts: int, k: int, factor: float, room: int, by_four: int) -> None:
    assert capacity(items, experts, k, factor) == room
    assert capacity(items, experts, k, factor, multiple=4) == by_four


GATES = torch.tensor(
    [[0.70, 0.20, 0.10], [0.25, 0.60, 0.15], [0.55, 0.30, 0.15], [0.10, 0.25, 0.65], [0.40, 0.35, 0.25]]
)
OTHER = torch.tensor(
    [[0.40, 0.35, 0.25], [0.55, 0.30, 0.15], [0.70, 0.20, 0.10], [0.10, 0.25, 0.65], [0.25, 0.60, 0.15]]
)


def pairs(index: Tensor, kept: Tensor) -> set[tuple[int, int]]:
    """(item, expert) of what is kept."""
    return {(int(i), int(index[i, j])) for i, j in kept.nonzero()}


@pytest.mark.parametrize(
    "k, room, vanilla, priority",
    [
        (1, 1, {(0, 0), (3, 2), (4, 1)}, {(2, 0), (3, 2), (4, 1)}),
        (2, 2, {(0, 0), (0, 1), (1, 0), (3, 2), (4, 1)}, {(1, 0), (2, 0), (2, 1), (3, 2), (4, 1)}),
    ],
)
def test_claim_3_who_comes_first_by_hand(
    k: int, room: int, vanilla: set[tuple[int, int]], priority: set[tuple[int, int]]
) -> None:
    """k = 2, room 2, in order: expert 0 gets 0 and 1; item 2's first choice is full and counts; of second choices,
    expert 1 has one place left (item 4 came first), which item 0 takes; 3's is full.
    """
    index = OTHER.argsort(1, descending=True)[:, :k]
    assert pairs(index, within_capacity(index, None, 3, room)) == vanilla
    assert pairs(index, within_capacity(index, OTHER.amax(1), 3, room)) == priority


@pytest.mark.parametrize("ordered", [False, True])
def test_room_is_the_queue_written_out(ordered: bool) -> None:
    """All first choices, then all second ones; whoever is refused still counts."""
    for _ in range(20):
        index, _ = chosen(17, 4, 3)
        priority = torch.rand(17)
        kept = within_capacity(index, priority if ordered else None, 4, 5)
        counts, expected = [0] * 4, torch.zeros_like(kept)
        for j in range(3):
            for i in priority.argsort(descending=True).tolist() if ordered else range(17):
                expert = int(index[i, j])
                expected[i, j] = counts[expert] < 5
                counts[expert] += 1
        assert torch.equal(kept, expected)
        assert 0 < int(kept.sum()) < kept.numel()


def test_claim_5_enough_room_is_no_limit() -> None:
    index, weight = chosen(9, 3, 2)
    kept = within_capacity(index, None, 3, 9)
    assert kept.all()
    experts, x = filled(3, *ALIGNED), torch.randn(9, 8)
    for way in WAYS:
        torch.testing.assert_close(experts(x, index, weight, kept, way), experts(x, index, weight, None, way))


def test_claim_3_experts_choose_by_hand() -> None:
    expected = {(0, 0), (2, 0), (1, 1), (4, 1), (3, 2), (4, 2)}
    assert {(int(i), int(e)) for i, e in experts_choose(GATES, 2).nonzero()} == expected
    assert experts_choose(GATES, 9).all()
    tied = experts_choose(torch.full((5, 2), 0.5), 2)
    assert torch.equal(tied, torch.tensor([[True, True], [True, True], *[[False, False]] * 3]))
