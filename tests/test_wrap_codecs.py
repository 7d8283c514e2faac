"""Every codec on a small model that keeps its contract: recorded, replayed, forced, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from foreign_models import CASES, EXPERTS, BlockLayer, Case, Classifier, Experts, TripleGate, TripleLayer
from robustmoe.routing import Routing, detach, to_expert
from robustmoe.wrapping import WrappedModel


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def wrapped(case: Case) -> tuple[nn.Module, WrappedModel]:
    model = case.make().eval()
    routed = rm.wrap(model, {case.path: case.codec})
    assert isinstance(routed, WrappedModel)
    return model, routed


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[int, int]]:
    """Which experts run meanwhile, and on how many rows."""
    rows: dict[int, int] = {}
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    hooks = [
        expert.register_forward_hook(
            lambda module, args, output, i=i: rows.__setitem__(i, rows.get(i, 0) + len(args[0].flatten(0, -2)))
        )
        for i, expert in enumerate(experts)
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def test_recorded_replayed_and_left_as_it_was(case: Case, images: Callable[..., Tensor]) -> None:
    model, routed = wrapped(case)
    x = images(5, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    free = routed.run(x)
    size = float(free.logits.detach().abs().max())
    assert torch.equal(free.logits, model(x)), "watched, the model answers the same to the bit"
    for routing in free.trace.values():
        assert routing.logits.shape == (5, case.items, EXPERTS)
        assert routing.index.shape == routing.weight.shape == (5, case.items, case.k)
        assert torch.equal(routing.weight, routing.weight.sort(-1, descending=True).values), "best first"
    again = routed.run(x, forced=detach(free.trace))
    torch.testing.assert_close(again.logits, free.logits, rtol=0, atol=1e-6 * size)
    for name, routing in free.trace.items():
        assert torch.equal(again.trace[name].index, routing.index)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_logits_are_those_that_the_router_chooses_by(case: Case, images: Callable[..., Tensor]) -> None:
    _, routed = wrapped(case)
    for routing in routed.run(images(5, 3, 8, 8)).trace.values():
        best = routing.logits.topk(case.k).indices.sort(-1).values
        assert torch.equal(best, routing.index.sort(-1).values)


def test_a_forced_expert_alone_runs_and_each_image_is_its_own(case: Case, images: Callable[..., Tensor]) -> None:
    model, routed = wrapped(case)
    x = images(5, 3, 8, 8)
    with torch.no_grad():
        trace = routed.run(x).trace
        answers = [routed.run(x, forced=to_expert(trace, e)).logits for e in range(EXPERTS)]
        apart = torch.stack(answers)
        assert float((apart[0] - apart[1]).abs().min(0).values.max()) > 1e-4, "another expert, another answer"
        alone = routed.run(x[3:4], forced=to_expert({name: r[3:4] for name, r in trace.items()}, 2)).logits
        torch.testing.assert_close(alone, answers[2][3:4], rtol=1e-5, atol=1e-6)
        if not case.soft and case.codec != "dispatch" and not case.codec.startswith("logits"):
            with counted(model) as rows:
                routed.run(x, forced=to_expert(trace, 2))
            assert set(rows) == {2}


def test_a_mixture_is_the_sum_of_its_parts(images: Callable[..., Tensor]) -> None:
    """By hand, for a layer that can be: the answer of the model is linear in the layer's."""
    model, routed = wrapped(CASES["triple"])
    x = images(5, 3, 8, 8)
    trace = routed.run(x).trace
    name, own = next(iter(trace.items()))
    weight = torch.tensor([0.25, 0.75]).expand_as(own.weight)
    given = Routing(own.logits, own.index, weight)
    h = model.patches(x).flatten(2).transpose(1, 2)
    answers = torch.stack([expert(h) for expert in model.moe.experts], 2)
    picked = answers.gather(2, own.index[..., None].expand(-1, -1, -1, 8))
    expected = model.head((h + (picked * weight[..., None]).sum(2)).mean(1))
    torch.testing.assert_close(routed.run(x, forced={name: given}).logits, expected)


def test_the_routers_gradient_reaches_the_image(case: Case, images: Callable[..., Tensor]) -> None:
    _, routed = wrapped(case)
    x = images(3, 3, 8, 8).requires_grad_(True)
    trace = routed.run(x).trace
    slope = torch.autograd.grad(sum(r.logits.square().sum() for r in trace.values()), x)[0]
    assert float(slope.abs().max()) > 0


def test_own_gates_recompute_the_weights_of_a_forced_index(images: Callable[..., Tensor]) -> None:
    for name in ("triple", "biased", "pair", "topk", "topk renormalised", "topk softmax", "dispatch"):
        _, routed = wrapped(CASES[name])
        x, other = images(4, 3, 8, 8), images(8, 3, 8, 8)[4:]
        router, theirs = next(iter(detach(routed.run(other).trace).items()))
        at = x.clone().requires_grad_(True)
        output = routed.run(at, forced={router: theirs}, gates="own")
        routing = output.trace[router]
        assert torch.equal(routing.index, theirs.index), name
        assert not torch.equal(routing.weight, theirs.weight), name
        own = {name: routed.run(x).trace[router]}
        again = routed.run(x, forced={router: own[name]}, gates="own").trace[router]
        torch.testing.assert_close(again.weight, own[name].weight, msg=name)
        assert float(torch.autograd.grad(routing.weight[..., 0].sum(), at)[0].abs().max()) > 0, name
        held = routed.run(x, forced={router: Routing(routing.logits, routing.index, routing.weight.detach())})
        torch.testing.assert_close(held.logits, output.logits, msg=name)


def test_biased_routers_record_the_scores_that_they_choose_by(images: Callable[..., Tensor]) -> None:
    model, routed = wrapped(CASES["biased"])
    x = images(5, 3, 8, 8)
    gate, h = model.moe.gate, model.patches(x).flatten(2).transpose(1, 2)
    routing = routed.run(x).trace["moe.gate"]
    torch.testing.assert_close(routing.logits, gate.proj(h).sigmoid() + gate.bias)
    assert not torch.equal(gate.proj(h).topk(2).indices.sort(-1).values, routing.index.sort(-1).values)


def test_several_calls_of_a_router_have_numbers(images: Callable[..., Tensor]) -> None:
    _, routed = wrapped(CASES["twice"])
    x = images(3, 3, 8, 8)
    trace = routed.run(x).trace
    assert list(trace) == ["moe.gate", "moe.gate#2"]
    second = to_expert({"moe.gate#2": trace["moe.gate#2"]}, 1)
    half = routed.run(x, forced=second)
    assert torch.equal(half.trace["moe.gate"].index, trace["moe.gate"].index)
    assert bool((half.trace["moe.gate#2"].index == 1).all())


def test_capacity_is_lifted_on_a_forced_route(images: Callable[..., Tensor]) -> None:
    _, routed = wrapped(CASES["dispatch"])
    x = images(5, 3, 8, 8)
    free = routed.run(x).trace["moe.gate"]
    assert bool((free.weight == 0).any()), "free, some item finds no room"
    forced = routed.run(x, forced=to_expert({"moe.gate": free}, 0))
    h = routed.model.patches(x).flatten(2).transpose(1, 2)
    expected = routed.model.head((h + routed.model.moe.experts[0](h)).mean(1))
    torch.testing.assert_close(forced.logits, expected)


def test_nested_and_concurrent_passes_do_not_mix(images: Callable[..., Tensor]) -> None:
    model, routed = wrapped(CASES["triple"])
    x = images(6, 3, 8, 8)
    trace = routed.run(x).trace
    alone = [routed.run(x, forced=to_expert(trace, e)).logits for e in range(EXPERTS)]
    asked, inner = [False], []

    def ask(module: nn.Module, args: object) -> None:
        if not asked[0]:
            asked[0] = True
            inner.append(routed.run(x[:2], forced=to_expert({"moe.gate": trace["moe.gate"][:2]}, 3)).logits)

    hook = model.moe.register_forward_pre_hook(ask)
    outer = routed.run(x, forced=to_expert(trace, 1)).logits
    hook.remove()
    assert torch.equal(outer, alone[1])
    torch.testing.assert_close(inner[0], alone[3][:2])
    told: dict[int, list[Tensor]] = {e: [] for e in range(EXPERTS)}

    def work(expert: int) -> None:
        for _ in range(20):
            told[expert].append(routed.run(x, forced=to_expert(trace, expert)).logits)

    threads = [threading.Thread(target=work, args=(e,)) for e in range(EXPERTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(told[e]) == 20 and all(torch.equal(t, alone[e]) for t in told[e]) for e in told)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_after_an_error_nothing_is_left(images: Callable[..., Tensor]) -> None:
    for name in ("triple", "topk"):
        model, routed = wrapped(CASES[name])
        x = images(2, 3, 8, 8)
        good = model(x)

        def fail(*args: object) -> None:
            raise RuntimeError("an expert fails")

        hooks = [expert.register_forward_pre_hook(fail) for expert in model.moe.experts]
        with pytest.raises(rm.UserError, match=r"the model fails on images .*RuntimeError: an expert fails"):
            routed.run(x)
        for hook in hooks:
            hook.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(model(x), good)
        assert torch.rand(3).topk(1).values.ndim == 1, "no mode is left on the stack"


def test_two_functions_are_a_codec(images: Callable[..., Tensor]) -> None:
    def read(said: rm.wrapping.Said) -> Routing:
        logits, weight, index = (said.items(said.entry(i)) for i in range(3))
        return Routing(logits, index, weight)

    def write(said: rm.wrapping.Said, routing: Routing) -> object:
        logits, weight, index = (said.entry(i) for i in range(3))
        return logits, said.back(routing.weight, weight), said.back(routing.index, index)

    model = Classifier(TripleLayer(TripleGate())).eval()
    x = images(3, 3, 8, 8)
    mine, known = rm.wrap(model, {"moe.gate": (read, write)}), rm.wrap(model, {"moe.gate": rm.gate.triple()})
    assert "functions(" in repr(mine)
    forced = known.run(images(6, 3, 8, 8)[3:]).trace
    assert torch.equal(mine.run(x, forced=forced).logits, known.run(x, forced=forced).logits)


@pytest.mark.parametrize(
    "routers, message",
    [
        ({"moe.gat": "triple"}, r"no module 'moe.gat'; did you mean 'moe.gate'"),
        ({"moe.gate": "tripel"}, "unknown codec 'tripel'; did you mean 'triple'"),
        ({"moe.gate": "index(logits='moe.proj')"}, "logits='moe.proj' of router 'moe.gate' is no module"),
    ],
)
def test_a_wrong_router_is_refused(routers: dict[str, object], message: str) -> None:
    with pytest.raises(rm.UserError, match=message):
        rm.wrap(Classifier(TripleLayer(TripleGate())), routers)


def test_what_a_router_cannot_say_is_refused_by_name(images: Callable[..., Tensor]) -> None:
    model = Classifier(BlockLayer("values")).eval()
    x = images(3, 3, 8, 8)
    with pytest.raises(rm.UserError, match=r"router 'moe.gate' cannot be read by triple: entry 2 .* \(12, 4\)"):
        rm.wrap(model, {"moe.gate": "triple"}).run(x)
    routed = rm.wrap(model, {"moe": "call(topk)"})
    trace = routed.run(x).trace
    three = Routing(trace["moe"].logits, trace["moe"].index[..., [0, 1, 1]], torch.full((3, 4, 3), 1 / 3))
    with pytest.raises(rm.UserError, match=r"router 'moe' cannot be forced so: the code .* takes 2 experts"):
        routed.run(x, forced={"moe": three})
    with pytest.raises(rm.UserError, match="expected logits"):
        rm.wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), {}).run(x)


@pytest.mark.parametrize("output", ["logits", 1, lambda result: result["logits"], None])
def test_the_logits_are_picked(output: object, images: Callable[..., Tensor]) -> None:
    class Named(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"hidden": x, "logits": super().forward(x)}

    class Several(Classifier):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x, super().forward(x)

    kind = Several if output == 1 else Named
    model = kind(TripleLayer(TripleGate())).eval()
    routed = rm.wrap(model, {"moe.gate": "triple"}, output=output)  # type: ignore[arg-type]
    assert routed(images(2, 3, 8, 8)).shape == (2, 10)
