"""Selection rules by hand, their gradients by formula, and the tape: what is recorded, replayed and refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustmoe.routing import (
    Routing,
    Tape,
    detach,
    noisy_top_k,
    rerouted,
    soft,
    straight_through,
    to_expert,
    to_rank,
    top_k,
)

QUARTERS = [0.25, 0.5, 0.25]
"""Softmax of log(1, 2, 1)."""


def of(*rows: list[float]) -> Tensor:
    """Router logits (n, 1, e), one row an image."""
    return torch.tensor(rows)[:, None]


def probabilities(*rows: list[float]) -> Tensor:
    return of(*rows).log()


def gradient(logits: Tensor, rule: Callable[..., Routing], place: int = 0) -> list[float]:
    """d weight[0, 0, place] / d logits[0, 0]."""
    logits = logits.clone().requires_grad_(True)
    routing = rule(logits)
    (found,) = torch.autograd.grad(routing.weight[0, 0, place], logits)
    return found[0, 0].tolist()


# ------------------------------------------------------------------------------------------------ which experts


@pytest.mark.parametrize(
    "logits, k, chosen",
    [
        ([0.0, 3.0, 1.0], 1, [1]),
        ([0.0, 3.0, 1.0], 2, [1, 2]),
        ([0.0, 3.0, 1.0], 3, [1, 2, 0]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),  # ties: the lower index first
        ([0.0, 2.0, 2.0], 1, [1]),
        ([-1.0, -5.0, -1.0], 2, [0, 2]),
    ],
)
def test_best_first_and_ties_to_the_lower_index(logits: list[float], k: int, chosen: list[int]) -> None:
    for routing in (
        top_k(of(logits), k),
        top_k(of(logits), k, "vmoe"),
        top_k(of(logits), k, "hard"),
        straight_through(of(logits), k),
    ):
        assert routing.index.tolist() == [[chosen]]
        assert (routing.k, routing.num_experts) == (k, 3)
    assert soft(of(logits)).index[..., :k].tolist() == [[chosen]]


@pytest.mark.parametrize("rule", [top_k, straight_through])
@pytest.mark.parametrize("k", [0, 4])
def test_k_is_checked(rule: Callable[..., Routing], k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of experts, 3; got {k}"):
        rule(of([0.0, 0.0, 0.0]), k)


def test_temperature_is_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        soft(of([0.0, 0.0]), 0.0)


# ------------------------------------------------------------------------------------------------ their weights


def test_weights_by_hand() -> None:
    logits = probabilities([0.1, 0.6, 0.3])
    close = {"atol": 1e-6, "rtol": 0}
    # softmax over the chosen two: 0.6 / 0.9 and 0.3 / 0.9
    torch.testing.assert_close(top_k(logits, 2).weight, of([2 / 3, 1 / 3]), **close)
    torch.testing.assert_close(top_k(logits, 2, "vmoe").weight, of([0.6, 0.3]), **close)
    assert top_k(logits, 2, "hard").weight.tolist() == [[[0.5, 0.5]]]
    assert straight_through(logits, 2).weight.tolist() == [[[0.5, 0.5]]]
    assert top_k(logits).weight.tolist() == straight_through(logits).weight.tolist() == [[[1.0]]]
    torch.testing.assert_close(soft(logits).weight, of([0.6, 0.3, 0.1]), **close)
    # at temperature 1/2 probabilities are squared: 0.36, 0.09, 0.01 of 0.46
    torch.testing.assert_close(soft(logits, 0.5).weight, of([36 / 46, 9 / 46, 1 / 46]), **close)


def test_straight_through_is_exactly_one_for_any_finite_logits() -> None:
    """A pathway's forced weights must be exactly 1; huge scores must not round that away."""
    logits = torch.randn(100, 1, 4) * torch.logspace(-6, 30, 100)[:, None, None]
    for surrogate in ("identity", "softmax"):
        assert (straight_through(logits, 1, surrogate).weight == 1).all()


def test_noisy_top_k_decides_on_the_noisy_and_records_the_clean() -> None:
    logits, noise = probabilities([0.6, 0.3, 0.1]), of([0.0, 0.0, 10.0])
    routing = noisy_top_k(logits, noise, 1, "vmoe")
    assert routing.index.tolist() == [[[2]]]
    assert torch.equal(routing.logits, logits)
    torch.testing.assert_close(routing.weight[0, 0, 0], torch.softmax(logits + noise, -1)[0, 0, 2])


# ------------------------------------------------------------------------------------------------ their gradients


def test_renormalised_top_1_gives_the_router_no_gradient_at_all() -> None:
    """The softmax over one entry is the constant 1."""
    assert gradient(of([0.3, -2.0, 7.0]), top_k) == [0.0, 0.0, 0.0]


def test_renormalised_top_2_gradient_is_the_sigmoid_derivative() -> None:
    # w = sigmoid(z1 - z0), p = (1/3, 2/3): dw/dz1 = 1/3 * 2/3 = -dw/dz0, nothing to the unchosen
    found = gradient(probabilities([1.0, 2.0, 0.1]), lambda z: top_k(z, 2))
    assert found == pytest.approx([-2 / 9, 2 / 9, 0.0], abs=1e-6)


def test_vmoe_gradient_is_a_row_of_the_softmax_jacobian() -> None:
    # p_i (delta_ij - p_j) for i = 1 and p = (1/4, 1/2, 1/4)
    for k in (1, 2):
        found = gradient(probabilities(QUARTERS), lambda z, k=k: top_k(z, k, "vmoe"))
        assert found == pytest.approx([-0.125, 0.25, -0.125], abs=1e-6)


def test_straight_through_gradients() -> None:
    assert gradient(of([1.0, 5.0, 2.0]), straight_through) == [0.0, 1.0, 0.0]
    assert gradient(of([1.0, 5.0, 2.0]), lambda z: straight_through(z, 2), place=1) == [0.0, 0.0, 1.0]
    found = gradient(probabilities(QUARTERS), lambda z: straight_through(z, 1, "softmax"))
    assert found == pytest.approx([-0.125, 0.25, -0.125], abs=1e-6)


def test_straight_through_gradient_has_one_non_zero_an_image() -> None:
    logits = torch.randn(50, 1, 5, requires_grad=True)
    (found,) = torch.autograd.grad(straight_through(logits).weight.sum(), logits)
    assert torch.equal(found, torch.nn.functional.one_hot(logits.argmax(-1), 5).float())


def test_soft_gradient_is_the_jacobian_over_the_temperature() -> None:
    found = gradient(probabilities(QUARTERS) * 2.0, lambda z: soft(z, 2.0))
    assert found == pytest.approx([-0.125 / 2, 0.25 / 2, -0.125 / 2], abs=1e-6)


def test_hard_gives_no_gradient() -> None:
    assert not top_k(torch.randn(3, 1, 4, requires_grad=True), 2, "hard").weight.requires_grad


def test_detach_cuts_logits_and_weights() -> None:
    trace = {"router": soft(torch.randn(2, 1, 3, requires_grad=True))}
    cut = detach(trace)["router"]
    assert not cut.logits.requires_grad
    assert not cut.weight.requires_grad
    assert torch.equal(cut.index, trace["router"].index)


# ------------------------------------------------------------------------------------------------ the tape


def test_a_tape_records_what_is_decided() -> None:
    tape, routing = Tape(), top_k(of([0.0, 1.0]))
    assert tape("router", routing) is routing
    assert tape.trace == {"router": routing}


def test_a_tape_replays_the_decision_and_records_the_fresh_logits() -> None:
    forced, fresh = top_k(of([9.0, 1.0, 0.0]), 2), top_k(of([0.0, 1.0, 4.0]))
    tape = Tape({"router": forced})
    used = tape("router", fresh)
    assert used.index is forced.index  # two experts, though the model's own rule takes one
    assert used.weight is forced.weight
    assert used.logits is fresh.logits
    assert tape.trace["router"] is used


def test_routers_that_are_not_forced_decide_freely() -> None:
    fresh = top_k(of([0.0, 1.0]))
    assert Tape({"other": top_k(of([1.0, 0.0]))})("router", fresh) is fresh


def test_under_prefixes_names_for_recording_and_replaying() -> None:
    forced = top_k(of([1.0, 0.0]))
    tape = Tape({"a.b.router": forced})
    used = tape.under("a").under("b")("router", top_k(of([0.0, 1.0])))
    tape.under("c")("router", top_k(of([0.0, 1.0])))
    tape("router", top_k(of([0.0, 1.0])))
    assert used.index is forced.index
    assert list(tape.trace) == ["a.b.router", "c.router", "router"]


def test_two_routers_of_one_name_are_refused() -> None:
    tape = Tape()
    tape.under("a")("router", top_k(of([0.0, 1.0])))
    tape("router", top_k(of([0.0, 1.0])))
    with pytest.raises(ValueError, match=r"two routers are named 'a.router' in one pass.*tape.under"):
        tape.under("a")("router", top_k(of([0.0, 1.0])))


def test_a_forced_routing_of_another_batch_is_refused() -> None:
    tape = Tape({"router": top_k(torch.zeros(3, 1, 2))})
    with pytest.raises(ValueError, match=r"forced routing of 'router' is for .* = \(3, 1\), this batch has \(2, 1\)"):
        tape("router", top_k(torch.zeros(2, 1, 2)))


def test_a_forced_routing_with_other_experts_is_refused() -> None:
    tape = Tape({"router": top_k(torch.zeros(3, 1, 2))})
    with pytest.raises(ValueError, match="forced routing of 'router' has 2 experts, the model 4"):
        tape("router", top_k(torch.zeros(3, 1, 4)))


# ------------------------------------------------------------------------------------------------ traces


def test_to_rank_by_hand() -> None:
    trace = {"router": soft(of([0.0, 3.0, 1.0], [2.0, 2.0, 5.0]))}
    for rank, expected in enumerate([[1, 2], [2, 0], [0, 1]]):  # second image: a tie, lower index first
        routing = to_rank(trace, rank)["router"]
        assert routing.index.flatten().tolist() == expected
        assert routing.weight.flatten().tolist() == [1.0, 1.0]
    assert to_rank(trace, torch.tensor([2, 0]))["router"].index.flatten().tolist() == [0, 2]
    for wrong in (3, torch.tensor([0, 3])):
        with pytest.raises(ValueError, match="rank 3 does not exist at 'router': it has 3 experts"):
            to_rank(trace, wrong)


def test_to_expert_by_hand() -> None:
    trace = {"a": soft(torch.zeros(2, 3, 4)), "b": soft(torch.zeros(2, 1, 2))}
    forced = to_expert(trace, 1)
    for name, shape in (("a", (2, 3, 1)), ("b", (2, 1, 1))):
        assert forced[name].index.shape == shape
        assert (forced[name].index == 1).all()
        assert (forced[name].weight == 1).all()
    with pytest.raises(ValueError, match="expert 2 does not exist at 'b': it has experts 0 to 1"):
        to_expert(trace, 2)
    with pytest.raises(ValueError, match="expert -1 does not exist"):
        to_expert(trace, -1)


def with_index(index: list[list[list[int]]], experts: int) -> Routing:
    chosen = torch.tensor(index)
    return Routing(torch.zeros(*chosen.shape[:2], experts), chosen, torch.ones(chosen.shape))


def test_chosen_marks_the_experts_of_each_item() -> None:
    routing = with_index([[[2, 0]], [[1, 2]]], 3)
    assert routing.chosen().tolist() == [[[True, False, True]], [[False, True, True]]]
    assert routing[torch.tensor([1])].chosen().tolist() == [[[False, True, True]]]
    assert routing[:1].index.tolist() == [[[2, 0]]]


def test_rerouted_is_one_minus_iou_of_the_chosen_sets() -> None:
    before = with_index([[[0, 1]], [[0, 1]], [[0, 1]]], 4)
    after = with_index([[[1, 0]], [[1, 2]], [[2, 3]]], 4)
    # the same set in another order: 0; one of three in common: 2/3; none: 1
    assert rerouted({"r": before}, {"r": after})["r"].tolist() == pytest.approx([0.0, 2 / 3, 1.0])


def test_rerouted_of_top_1_is_the_share_of_items_sent_elsewhere() -> None:
    before = with_index([[[0], [1], [2], [3]]], 4)
    after = with_index([[[0], [1], [2], [0]]], 4)
    assert rerouted({"r": before}, {"r": after})["r"].tolist() == [0.25]
    assert rerouted({}, {}) == {}
