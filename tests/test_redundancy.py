"""Other routes than the routers' own: against models built without the expert or with another k, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustmoe.attacks.views import RuleTape
from robustmoe.evaluation.redundancy import (
    gate_of,
    left_out,
    overridden,
    random_experts,
    redundancy,
    settings,
    with_k,
    without,
)
from robustmoe.evaluation.session import in_hand
from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.options import SweepOptions
from robustmoe.routing import Routing, soft, top_k

SHAPE = "tiny, patch=4, width=12, depth=2, heads=2, mlp_ratio=2, placement=every_2"
ROUTER = "network.blocks.1.mlp.router"


def vit(options: str, experts: int, seed: int = 0) -> RoutedModel:
    """A ViT-MoE for images (1, 8, 8) whose parameters are all drawn anew, large enough that the experts matter."""
    model = build_model(f"vit_moe({SHAPE}, experts={experts}, {options})", 4, (1, 8, 8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def image_moe(gate: str, k: int, experts: int) -> RoutedModel:
    return build_model(
        f"ensemble(linear, experts={experts}, k={k}, gate={gate}, router=linear)", 4, (1, 8, 8), seed=1
    ).eval()


def fewer(large: RoutedModel, small: RoutedModel, gone: int, experts: int) -> RoutedModel:
    """``small`` with the weights of ``large``, but for expert ``gone`` of ``experts``: its tensors, and its row of the
    router (Soft MoE: the columns of its slots).
    """
    kept = [expert for expert in range(experts) if expert != gone]
    given, state = large.state_dict(), {}
    for name, like in small.state_dict().items():
        parts = name.split(".")
        if parts[0] == "experts":  # whole networks, by number
            state[name] = given[".".join(["experts", str(kept[int(parts[1])]), *parts[2:]])]
        elif given[name].shape == like.shape:
            state[name] = given[name]
        elif parts[-1] == "mu":
            state[name] = given[name].unflatten(1, (experts, -1))[:, kept].flatten(1)
        else:
            state[name] = given[name][kept]
    small.load_state_dict(state)
    return small


@pytest.fixture
def x(images: Callable[..., Tensor]) -> Tensor:
    return images(24, 1, 8, 8)


def gates(model: RoutedModel, x: Tensor) -> dict[str, str]:
    with torch.no_grad():
        return {name: gate_of(routing) for name, routing in model.run(x).trace.items()}


# ------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize(
    "options, gate",
    [
        ("k=2, gating=vmoe", "vmoe"),
        ("k=1, gating=vmoe", "vmoe"),
        ("k=2, gating=renormalised", "renormalised"),
        ("k=1, gating=renormalised", "hard"),
        ("k=2, gating=hard", "hard"),
        ("k=2, gating=straight_through", "hard"),
        ("gating=soft", "soft"),
        ("k=2, gating=vmoe, capacity=0.6", "vmoe"),
        ("k=2, gating=renormalised, capacity=0.6", "renormalised"),
        ("k=2, gating=hard, capacity=0.6", "hard"),
        ("choice=expert", "expert choice"),
        ("choice=slots, slots=2", "slots"),
    ],
)
def test_the_gate_is_known_from_the_decisions(options: str, gate: str, x: Tensor) -> None:
    model = vit(options, 4)
    assert gates(model, x) == {ROUTER: gate}
    if "capacity" in options:
        assert bool((model.run(x).trace[ROUTER].weight == 0).any()), "some choices found no room"


def test_a_gate_of_its_own_is_unknown() -> None:
    free = top_k(torch.randn(3, 2, 4), 2)
    assert gate_of(Routing(free.logits, free.index, torch.sigmoid(free.weight))) == "unknown"
    assert gate_of(Routing(free.logits, free.index, torch.zeros_like(free.weight))) == "unknown", "no item has room"


# ------------------------------------------------------------------------------------------------ one expert removed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        "k=2, gating=vmoe",
        "k=1, gating=vmoe",
        "k=2, gating=renormalised",
        "k=2, gating=hard",
        "gating=soft",
        "choice=slots, slots=2",
    ],
)
def test_without_an_expert_is_the_layer_built_without_it(options: str, rank: int, x: Tensor) -> None:
    """Of the two experts that most items go to, either."""
    whole = vit(options, 4)
    with torch.no_grad():
        gone = int(whole.run(x).trace[ROUTER].chosen().sum((0, 1)).argsort(descending=True, stable=True)[rank])
    twin = fewer(whole, vit(options, 3, seed=9), gone, 4)
    with torch.no_grad():
        found = overridden(whole, x, without(gates(whole, x), gone)).logits
        assert torch.allclose(found, twin(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, whole(x), rtol=1e-2, atol=1e-2), "the expert was used"


@pytest.mark.parametrize("gate, k", [("straight_through", 1), ("renormalised", 2), ("vmoe", 2), ("soft", 3)])
def test_of_image_routers_too(gate: str, k: int, x: Tensor) -> None:
    whole = image_moe(gate, k, 3)
    with torch.no_grad():
        for gone in range(3):
            twin = fewer(whole, image_moe(gate, min(k, 2), 2), gone, 3)
            found = overridden(whole, x, without(gates(whole, x), gone)).logits
            assert torch.allclose(found, twin(x), rtol=1e-4, atol=1e-5)


def test_where_experts_choose_the_others_stay(x: Tensor) -> None:
    model = vit("choice=expert", 4)
    with torch.no_grad():
        before = model.run(x).trace[ROUTER]
        after = overridden(model, x, without(gates(model, x), 1)).trace[ROUTER]
    assert not bool(after.chosen()[..., 1].any())
    assert bool(before.chosen()[..., 1].any())
    others = before.index != 1
    assert torch.equal(after.weight[others], before.weight[others])


def test_a_saturated_soft_gate_still_has_a_rest() -> None:
    """softmax of (100, 0, 1) is (1, 0, 0) in float32; without the first it is that of (0, 1)."""
    fresh = soft(torch.tensor([[[100.0, 0.0, 1.0]]]))
    found = without({"router": "soft"}, 0)("router", fresh)
    weights = dict(zip(found.index[0, 0].tolist(), found.weight[0, 0].tolist()))
    assert weights == pytest.approx({0: 0, 1: 1 / (1 + math.e), 2: math.e / (1 + math.e)})


def test_an_expert_that_does_not_exist(x: Tensor) -> None:
    model = vit("k=2", 4)
    with pytest.raises(ValueError, match=r"expert 4 does not exist at 'network\.blocks\.1\.mlp\.router'"):
        overridden(model, x, without(gates(model, x), 4))


# ------------------------------------------------------------------------------------------------ another k


@pytest.mark.parametrize("gating", ["vmoe", "renormalised", "hard"])
def test_another_k_is_the_layer_built_with_it(gating: str, x: Tensor) -> None:
    model = vit(f"k=2, gating={gating}", 4)
    for k in (1, 2, 3, 4):
        twin = vit(f"k={k}, gating={gating}", 4)
        with torch.no_grad():
            found = overridden(model, x, with_k(gates(model, x), k)).logits
            assert torch.allclose(found, twin(x), rtol=1e-4, atol=1e-4)


def test_a_room_is_not_asked_for(x: Tensor) -> None:
    """With its own k, a layer with room for few gives what the layer with room for all gives."""
    small, large = vit("k=2, capacity=0.6", 4), vit("k=2", 4)
    with torch.no_grad():
        assert torch.allclose(overridden(small, x, with_k(gates(small, x), 2)).logits, large(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(small(x), large(x), rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------ random experts


def test_random_experts_are_uniform_and_differ_from_each_other() -> None:
    """9000 items choose 2 of 6: each expert is chosen 3000 times, deviation sqrt(9000 * 1/3 * 2/3) = 45; each of the 15
    pairs 600 times, deviation sqrt(9000 * 1/15 * 14/15) = 24.
    """
    fresh = top_k(torch.zeros(300, 30, 6), 2, "vmoe")
    found = random_experts({"router": "vmoe"}, Noise.of(torch.arange(300), 5))("router", fresh)
    assert bool((found.index[..., 0] != found.index[..., 1]).all())
    counts = found.index.flatten().bincount(minlength=6)
    assert int((counts - 3000).abs().max()) < 5 * 45
    low, high = found.index.min(-1).values, found.index.max(-1).values
    pairs = (6 * low + high).flatten().bincount(minlength=36)
    assert int((pairs > 0).sum()) == 15
    assert int((pairs[pairs > 0] - 600).abs().max()) < 5 * 24


@pytest.mark.parametrize("gating", ["vmoe", "renormalised", "hard"])
def test_they_are_weighted_by_the_rule_or_as_the_route_was(gating: str) -> None:
    logits = torch.randn(4, 3, 5)
    fresh, noise = top_k(logits, 2, gating), Noise.of(torch.arange(4))
    own = random_experts({"router": gating}, noise)("router", fresh)
    kept = random_experts({"router": gating}, noise, "kept")("router", fresh)
    assert torch.equal(own.index, kept.index)
    assert torch.equal(kept.weight, fresh.weight)
    for i in range(4):
        for t in range(3):
            a, b = own.index[i, t].tolist()
            p = [math.exp(v) for v in logits[i, t].tolist()]
            among = {"vmoe": sum(p), "renormalised": p[a] + p[b]}.get(gating)
            wanted = [0.5, 0.5] if among is None else [p[a] / among, p[b] / among]
            assert own.weight[i, t].tolist() == pytest.approx(wanted, rel=1e-5)


def test_an_image_s_draw_is_its_own(x: Tensor) -> None:
    """Alone, or in another batch, it goes the same way; each router and each draw has draws of its own."""
    model = vit("k=2", 4)
    known, noise = gates(model, x), Noise.of(torch.arange(24), 3)
    with torch.no_grad():
        whole = overridden(model, x, random_experts(known, noise)).logits
        rows = torch.tensor([20, 3])
        part = overridden(model, x[rows], random_experts(known, noise[rows])).logits
    assert torch.allclose(whole[rows], part, rtol=1e-5, atol=1e-5)
    fresh = top_k(torch.zeros(24, 4, 6), 2)
    rule = random_experts({"a": "hard", "b": "hard"}, noise)
    other = random_experts({"a": "hard"}, noise.fold(1))
    assert not torch.equal(rule("a", fresh).index, rule("b", fresh).index)
    assert not torch.equal(rule("a", fresh).index, other("a", fresh).index)


def test_equal_experts_make_the_choice_matter_nothing(x: Tensor) -> None:
    model = vit("k=2, gating=renormalised", 4)
    experts = model.get_submodule(ROUTER.replace("router", "experts"))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        clean, noise = model(x), Noise.of(torch.arange(24))
        for rule in (random_experts(gates(model, x), noise), without(gates(model, x), 1), with_k(gates(model, x), 3)):
            assert torch.allclose(overridden(model, x, rule).logits, clean, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what is asked


def test_every_setting_of_two_routers(x: Tensor) -> None:
    model = build_model(f"vit_moe({SHAPE.replace('every_2', '(0, 1)')}, experts=3, k=2)", 4, (1, 8, 8)).eval()
    asked = settings(model.run(x).trace, 2)
    first, second = "network.blocks.0.mlp.router", ROUTER
    places = ["", first, second]
    wanted = [("random", place, draw) for place in places for draw in (0, 1)]
    wanted += [("random, weights kept", "", draw) for draw in (0, 1)]
    wanted += [("without", place, expert) for place in places for expert in range(3)]
    assert [tuple(one) for one in asked] == [*wanted, ("k", "", 1), ("k", "", 2), ("k", "", 3)]
    known = gates(model, x)
    tape = RuleTape(next(s for s in asked if s[:2] == ("without", second)).made(known, Noise.of(torch.arange(24))))
    with torch.no_grad():
        model.body(x, tape)
    assert torch.equal(tape.trace[first].index, tape.fresh[first].index), "the rule holds for one router alone"
    assert not bool(tape.trace[second].chosen()[..., 0].any())


@pytest.mark.parametrize(
    "options, rules, said",
    [
        ("gating=soft", {"without"}, "every expert is used already"),
        ("choice=slots", {"without"}, "every slot is used"),
        ("choice=expert", {"without"}, "the experts choose their items"),
        ("k=2, gating=hard", {"random", "without", "k"}, ""),
        ("k=2", {"random", "random, weights kept", "without", "k"}, ""),
    ],
)
def test_what_makes_no_sense_is_said(options: str, rules: set[str], said: str, x: Tensor) -> None:
    trace = vit(options, 4).run(x).trace
    assert {setting.rule for setting in settings(trace, 1)} == rules
    sentences = left_out(trace)
    assert len(sentences) == bool(said)
    assert all(one.startswith(f"{ROUTER}: {said}") for one in sentences)


def test_a_model_that_takes_no_other_k_says_so(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    from robustmoe.data import from_arrays

    data = from_arrays(images(12), torch.arange(12) % 4)
    options = SweepOptions(draws=2, batch_size=5, device="cpu")
    with in_hand(tiny("pathway"), data, None, options) as session:
        found, said = redundancy(session)
    assert [one.number for one in found if one.rule == "k"] == [1]
    assert said == ["k is not changed: a pathway model takes one expert an image."]
    assert [one.rule for one in found] == ["random"] * 2 + ["without"] * 3 + ["k"]
    assert all(len(one.predicted) == 12 for one in found)


def test_a_dual_model_s_halves_are_asked_apart(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """The standard half is soft: nothing is drawn there; an expert is removed from each half."""
    trace = tiny("dual").eval().run(images(4)).trace
    asked = settings(trace, 1)
    assert {one.router for one in asked if one.rule == "without"} == {"", "standard.router", "robust.router"}
    assert {one.router for one in asked if one.rule == "random"} == {""}
    assert left_out(trace) == [
        "standard.router: every expert is used already: no other is drawn, and k is not changed."
    ]


def test_a_dense_model_has_nothing_to_ask(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    trace = tiny("dense").run(images(2)).trace
    assert settings(trace, 3) == left_out(trace) == []
