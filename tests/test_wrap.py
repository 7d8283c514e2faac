"""`find_routers` and `wrap` with nothing else given, and the self-tests: what is refused, what is noted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import robustmoe as rm
from foreign_models import (
    CASES,
    EXPERTS,
    WIDTH,
    BlockLayer,
    CapacityGate,
    CapacityLayer,
    Classifier,
    DividingLayer,
    Layer,
    PairGate,
    SlotLayer,
    TripleGate,
    TripleLayer,
)
from robustmoe.attacks import PGD, linf
from robustmoe.attacks.routes import Misrouting
from robustmoe.attacks.routes.objectives import RouterHinge
from robustmoe.errors import UserError
from robustmoe.routing import Routing, detach, to_expert
from robustmoe.wrapping import Said, WrappedModel
from robustmoe.wrapping.codecs import text_of
from robustmoe.wrapping.said import fitted

GUESSED = {
    "logits": ("moe", "call(weights=renormalised)"),
    "argmax": ("moe.gate", "index"),
    "softmax": ("moe.gate", "dense"),
}
"""Where another codec than the case's own says the same, and is guessed."""


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_router_is_found_and_the_model_wrapped_with_nothing_else_given(
    name: str, images: Callable[..., Tensor]
) -> None:
    case, x = CASES[name], images(6, 3, 8, 8)
    model = case.make().eval()
    routed = rm.wrap(model, example=x)
    assert isinstance(routed, WrappedModel)
    path, text = GUESSED.get(name, (case.path, case.codec.replace("call(topk)", "call").replace("(topk, ", "(")))
    assert [(site.path, text_of(site.codec)) for site in routed.sites] == [(path, text)]
    output = routed.run(x)
    assert torch.equal(output.logits, model(x))
    again = routed.run(x, forced=detach(output.trace)).logits
    torch.testing.assert_close(again, output.logits, rtol=0, atol=1e-6 * float(output.logits.detach().abs().max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_findings_are_a_table_that_fits_a_terminal(images: Callable[..., Tensor]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_module_with_a_rather_long_name = Classifier(DividingLayer(PairGate()))

        def forward(self, x: Tensor) -> Tensor:
            return self.a_module_with_a_rather_long_name(x)

    findings = rm.find_routers(Outer(), images(4, 3, 8, 8))
    lines = str(findings).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["module", "path", "class", "call", "shape", "grad"]
    assert lines[2] == "a_module_with_a_rather_long_name.moe.gate"
    assert lines[3].split() == ["PairGate", "topk", "(16,", "4)", "on"]
    assert lines[4] == "    -> rm.gate.pair()"
    assert lines[5:] == ["no gradient: a_module_with_a_rather_long_name.moe (no_grad)"]
    assert list(findings.routers) == ["a_module_with_a_rather_long_name.moe.gate"]


class Attention(nn.Module):
    """What a dense net has that looks like a gate: attention, squeeze and excite, a gated MLP, a token count of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x)[0]
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        x = x * self.gate(x.mean(1, keepdim=True)).sigmoid()
        for block in self.blocks:
            x = x + F.silu(self.gate(x)) * block(x)
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: Classifier(Attention()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Softmax(-1)),
        lambda: rm.build_model("resnet8", 10, (3, 8, 8)),
        lambda: rm.build_model("vit(patch=4, width=8, depth=2, heads=2)", 10, (3, 8, 8)),
    ],
)
def test_a_dense_net_has_no_router(make: Callable[[], nn.Module], images: Callable[..., Tensor]) -> None:
    model, x = make(), images(4, 3, 8, 8)
    findings = rm.find_routers(model, x)
    assert not findings
    assert str(findings) == "no router found: no choice among experts was seen in a pass"
    if not isinstance(model, rm.RoutedModel):
        with pytest.raises(rm.UserError, match=r"no router was found in this model; name them"):
            rm.wrap(model, example=x)


class ChoosingLayer(Layer):
    """Each expert chooses two of the image's four items; ``dim``: how the scores lie."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(WIDTH, EXPERTS))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        index = p.topk(2, dim=1).indices if self.dim == 1 else p.transpose(1, 2).topk(2, dim=-1).indices.transpose(1, 2)
        weight = torch.zeros_like(p).scatter(1, index, p.gather(1, index))
        return self.experts.all(x.flatten(0, 1), weight.flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("dim", [1, 2])
def test_experts_that_choose_their_items_are_told(dim: int) -> None:
    x = torch.rand(3, 3, 16, 16)
    findings = rm.find_routers(Classifier(ChoosingLayer(dim)), x)
    assert not findings
    assert "the experts of moe (ChoosingLayer) choose their items" in str(findings).replace("\n", " ")
    with pytest.raises(rm.UserError, match=r"the experts of moe .* choose their items: no codec reads that"):
        rm.wrap(Classifier(ChoosingLayer(dim)), example=x)
    both = nn.Sequential(nn.Conv2d(3, 3, 1), Classifier(nn.Sequential(ChoosingLayer(dim), TripleLayer(TripleGate()))))
    routed = rm.wrap(both.eval(), example=x)
    assert isinstance(routed, WrappedModel)
    assert [site.path for site in routed.sites] == ["1.moe.1.gate"]
    assert routed.notes[0].startswith("the experts of 1.moe.0 (ChoosingLayer) choose their items")


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "make, routers, message",
    [
        (
            lambda: Classifier(BlockLayer("renormalised")),
            {"moe.gate": "logits(k=1)"},
            "router 'moe.gate': its own decision, replayed, changes the answer by .*so logits does not say all",
        ),
        (
            lambda: Classifier(TripleLayer(TripleGate())),
            {"moe.gate": "triple", "head": "logits"},
            "router 'head'",
        ),
        (
            lambda: Classifier(TripleLayer(TripleGate())),
            {"moe": "call(topk)"},
            "router 'moe' took no decision in a pass on the example: .*expected a call of topk in the forward of 'moe'",
        ),
        (
            lambda: Classifier(TripleLayer(TripleGate())),
            {"moe.experts": "dense"},
            "router 'moe.experts' took no decision .*expected the module at 'moe.experts' to run",
        ),
    ],
)
def test_what_would_make_numbers_wrong_is_refused(
    make: Callable[[], nn.Module], routers: dict[str, str], message: str, images: Callable[..., Tensor]
) -> None:
    with pytest.raises(rm.UserError, match=message):
        rm.wrap(make().eval(), routers, example=images(4, 3, 8, 8))


def test_a_route_that_other_experts_have_a_say_in_is_refused(images: Callable[..., Tensor]) -> None:
    class Leaky(Layer):
        def flat(self, x: Tensor) -> Tensor:
            _, weight, index = self.gate(x)
            return self.experts.mix(x, index, weight) + 0.1 * self.experts[0](x)

    with pytest.raises(rm.UserError, match=r"router 'moe.gate': forced to expert 3 alone, other experts still contrib"):
        rm.wrap(Classifier(Leaky(TripleGate())).eval(), example=images(4, 3, 8, 8))


def test_a_norm_behind_the_experts_hides_nothing_from_the_test_of_a_forced_route(
    images: Callable[..., Tensor],
) -> None:
    """A norm takes out what is added to every feature alike, and each expert would seem to have no say."""

    class Normed(Layer):
        def flat(self, x: Tensor) -> Tensor:
            _, weight, index = self.gate(x)
            mixed = self.experts.mix(x, index, weight)
            return F.layer_norm(mixed, mixed.shape[-1:])

    routed = rm.wrap(Classifier(Normed(TripleGate())).eval(), example=images(4, 3, 8, 8))
    assert list(routed.run(images(4, 3, 8, 8)).trace) == ["moe.gate"]


def test_a_model_that_notices_that_it_is_watched_is_refused(images: Callable[..., Tensor]) -> None:
    class Shy(TripleGate):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weight, index = super().forward(x)
            return logits, weight * (2.0 if self._forward_hooks else 1.0), index

    with pytest.raises(rm.UserError, match=r"the model answers otherwise when router 'moe.gate' is watched"):
        rm.wrap(Classifier(TripleLayer(Shy())).eval(), {"moe.gate": "triple"}, example=images(4, 3, 8, 8))


def test_what_cannot_be_wrapped_is_said() -> None:
    with pytest.raises(rm.UserError, match="no module has a router's class that is known by name; give an example"):
        rm.wrap(Classifier(TripleLayer(TripleGate())))
    model = rm.build_model("resnet8", 10, (3, 8, 8))
    assert rm.wrap(model) is model
    assert rm.wrap(nn.DataParallel(model)) is model


def test_what_was_made_parallel_or_compiled_is_wrapped_as_it_was(images: Callable[..., Tensor]) -> None:
    model, x = Classifier(TripleLayer(TripleGate())).eval(), images(4, 3, 8, 8)
    for made in (nn.DataParallel(model), torch.compile(model, backend="eager"), nn.Sequential(model)):
        routed = rm.wrap(made, example=x)
        assert isinstance(routed, WrappedModel)
        assert routed.model is model


def test_an_example_that_the_model_does_not_take_is_refused(images: Callable[..., Tensor]) -> None:
    model = Classifier(TripleLayer(TripleGate()))
    for ask in (rm.find_routers, lambda model, x: rm.wrap(model, {"moe.gate": "triple"}, example=x)):
        with pytest.raises(rm.UserError, match=r"the model fails on the example, \(2, 1, 8, 8\): RuntimeError: Given"):
            ask(model, images(2, 1, 8, 8))
        with pytest.raises(rm.UserError, match=r"a few images .*; got torch.float32 of shape \(0, 3"):
            ask(model, images(2, 3, 8, 8)[:0])


def test_a_class_is_known_by_its_name(images: Callable[..., Tensor]) -> None:
    class WhateverTopKRouter(TripleGate):
        pass

    class SoftMoE(SlotLayer):
        pass

    for layer, path, codec in ((TripleLayer(WhateverTopKRouter()), "moe.gate", "triple"), (SoftMoE(), "moe", "slots")):
        routed = rm.wrap(Classifier(layer).eval())
        assert isinstance(routed, WrappedModel)
        assert [(site.path, text_of(site.codec)) for site in routed.sites] == [(path, codec)]
        assert routed.notes == ("not tested: no example was given",)
        assert list(routed.run(images(2, 3, 8, 8)).trace) == [path]


# ------------------------------------------------------------------------------------------------ noted


class NoisyGate(TripleGate):
    """Drops the second expert at random, in eval mode too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weight, index = super().forward(x)
        kept = torch.zeros_like(weight).uniform_() < 2 * weight
        return logits, weight * kept, index


def test_random_numbers_are_named_held_and_averaged(images: Callable[..., Tensor]) -> None:
    x = images(6, 3, 8, 8)
    model = Classifier(TripleLayer(NoisyGate())).eval()
    free = rm.wrap(model, example=x)
    assert isinstance(free, WrappedModel)
    assert free.notes[0].startswith("module 'moe.gate' (NoisyGate) draws random numbers in eval mode (uniform_)")
    assert "note: module 'moe.gate'" in repr(free)
    assert not torch.equal(free(x), free(x))
    held = rm.wrap(model, example=x, noise="replay")
    assert isinstance(held, WrappedModel)
    assert held.notes == ()
    state = torch.get_rng_state()
    assert torch.equal(held(x), held(x))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is not moved"
    torch.testing.assert_close(held(x[[4, 1]]), held(x)[[4, 1]])
    trace = detach(held.run(x).trace)
    again = held.run(x, forced=trace, gates="own")
    assert torch.equal(again.trace["moe.gate"].weight, trace["moe.gate"].weight), "its own weights, by the same draws"
    mean = rm.wrap(model, example=x, noise="average")
    with torch.no_grad():
        output = mean.run(x)
        assert list(output.trace) == [f"draw{i}.moe.gate" for i in range(8)]
        torch.testing.assert_close(mean.run(x, forced=output.trace).logits, output.logits)
        many = torch.stack([free(x) for _ in range(120)]).mean(0)
        one_pass = (held(x) - many).abs().mean()
        assert float((output.logits - many).abs().mean()) < float(one_pass)


def test_an_answer_that_depends_on_the_batch_is_noted(images: Callable[..., Tensor]) -> None:
    class Crowded(CapacityLayer):
        """All images of the batch queue for the same places."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)[None]).view_as(x)

    routed = rm.wrap(Classifier(Crowded(CapacityGate())).eval(), {"moe.gate": "dispatch"}, example=images(6, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert any("router 'moe.gate' sends an image elsewhere when it is alone" in note for note in routed.notes)


def test_images_that_are_mixed_behind_the_router_are_noted(images: Callable[..., Tensor]) -> None:
    class Centred(TripleLayer):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out - out.mean(0)

    routed = rm.wrap(Classifier(Centred(TripleGate())).eval(), example=images(4, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert "the model mixes the images of a batch" in routed.notes[0]


class GroupedGate(TripleGate):
    """The better two experts, both of one half; scores of the other half are shut out by ``shut``."""

    def __init__(self, shut: float) -> None:
        super().__init__()
        self.shut = shut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.proj(x)
        halves = logits.unflatten(-1, (2, 2))
        best = halves.sum(-1).topk(1, dim=-1).indices
        open_ = torch.zeros_like(halves[..., 0]).scatter(-1, best, 1).bool()
        index = logits.masked_fill(~open_.repeat_interleave(2, -1), self.shut).topk(2, dim=-1).indices
        return logits, logits.sigmoid().gather(-1, index), index


def test_the_scores_that_a_limit_by_groups_leaves_are_recorded(images: Callable[..., Tensor]) -> None:
    x = images(6, 3, 8, 8)
    for shut in (-torch.inf, -100.0):
        routed = rm.wrap(Classifier(TripleLayer(GroupedGate(shut))).eval(), example=x)
        assert isinstance(routed, WrappedModel)
        assert routed.notes == ()
        routing = routed.run(x).trace["moe.gate"]
        assert torch.isfinite(routing.logits).all()
        assert torch.equal(routing.logits.topk(2).indices.sort(-1).values, routing.index.sort(-1).values)


def test_a_router_whose_rule_is_not_seen_is_noted(images: Callable[..., Tensor]) -> None:
    class Odd(TripleGate):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weight, index = super().forward(x)
            return -logits, weight, index

    routed = rm.wrap(Classifier(TripleLayer(Odd())).eval(), {"moe.gate": "triple"}, example=images(4, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert not any("does not choose the highest" in note for note in routed.notes), "what its top-k was given is heard"
    silent = rm.wrap(
        Classifier(TripleLayer(Odd())).eval(),
        {"moe.gate": (_read, _write)},
        example=images(4, 3, 8, 8),
    )
    assert isinstance(silent, WrappedModel)
    assert "router 'moe.gate' does not choose the highest of the scores" in silent.notes[0]


class LeavingOut(Layer):
    """A soft gate of which only what is above a quarter counts."""

    def flat(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        return self.experts.all(x, p * (p > 0.25))


def test_a_gate_whose_code_leaves_experts_out_is_noted(images: Callable[..., Tensor]) -> None:
    routed = rm.wrap(Classifier(LeavingOut(nn.Linear(WIDTH, EXPERTS))).eval(), example=images(4, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert "router 'moe' is recorded as one that uses all experts, but the code after it leaves out" in routed.notes[0]
    soft = rm.wrap(CASES["softmax"].make().eval(), example=images(4, 3, 8, 8))
    assert isinstance(soft, WrappedModel)
    assert soft.notes == ()


def test_a_gumbel_gate_is_found_and_held(images: Callable[..., Tensor]) -> None:
    class Gumbel(Layer):
        def flat(self, x: Tensor) -> Tensor:
            return self.experts.all(x, F.gumbel_softmax(self.gate(x), hard=True))

    x = images(4, 3, 8, 8)
    routed = rm.wrap(Classifier(Gumbel(nn.Linear(WIDTH, EXPERTS))).eval(), example=x, noise="replay")
    assert isinstance(routed, WrappedModel)
    assert [text_of(site.codec) for site in routed.sites] == ["call(name=gumbel_softmax)"]
    routing = routed.run(x).trace["moe"]
    assert torch.equal(routing.weight.detach().round(), torch.eye(EXPERTS)[0].expand_as(routing.weight))
    assert torch.equal(routed(x), routed(x))


def test_checkpointed_parts_are_refused(images: Callable[..., Tensor]) -> None:
    class Checkpointed(TripleLayer):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    with pytest.raises(rm.UserError, match=r"no gradient can be taken when router 'moe.gate' is watched"):
        rm.wrap(Classifier(Checkpointed(TripleGate())).eval(), example=images(4, 3, 8, 8))


def _read(said: Said) -> Routing:
    logits, weight, index = (said.items(said.entry(i)) for i in range(3))
    return Routing(logits, index, weight)


def _write(said: Said, routing: Routing) -> object:
    routing = fitted(routing, 2, said)
    return said.entry(0), said.back(routing.weight, said.entry(1)), said.back(routing.index, said.entry(2))


def test_the_sequence_may_come_first(images: Callable[..., Tensor]) -> None:
    class SequenceFirst(TripleLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(1)
    layer = TripleLayer(TripleGate())
    other = SequenceFirst(TripleGate())
    other.load_state_dict(layer.state_dict())
    plain, x = Classifier(layer).eval(), images(5, 3, 8, 8)
    swapped = Classifier(other).eval()
    swapped.load_state_dict(plain.state_dict())
    wanted, routed = rm.wrap(plain, example=x), rm.wrap(swapped, example=x)
    assert isinstance(routed, WrappedModel)
    assert routed.sites[0].swapped
    expected, trace = wanted.run(x).trace["moe.gate"], routed.run(x).trace["moe.gate"]
    torch.testing.assert_close(trace.logits, expected.logits)
    assert torch.equal(trace.index, expected.index)
    forced = to_expert({"moe.gate": expected}, 1)
    forced["moe.gate"].index[2] = 3
    torch.testing.assert_close(routed.run(x, forced=forced).logits, wanted.run(x, forced=forced).logits)


def test_equal_experts_have_no_say(images: Callable[..., Tensor]) -> None:
    model = Classifier(TripleLayer(TripleGate())).eval()
    for expert in model.moe.experts:
        expert.load_state_dict(model.moe.experts[0].state_dict())
    routed = rm.wrap(model, example=images(4, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert "router 'moe.gate' has no say: all to expert 0 and all to expert 3" in routed.notes[0]


def test_code_that_counts_on_k_experts_gets_k(images: Callable[..., Tensor]) -> None:
    """`DividingLayer` divides by k to find an item: fewer experts are padded, more refused."""
    model, x = Classifier(DividingLayer(PairGate())).eval(), images(4, 3, 8, 8)
    routed = rm.wrap(model, example=x)
    assert isinstance(routed, WrappedModel)
    assert not routed.sites[0].wide
    trace = routed.run(x).trace
    h = model.patches(x).flatten(2).transpose(1, 2)
    expected = model.head((h + model.moe.experts[2](h)).mean(1))
    torch.testing.assert_close(routed.run(x, forced=to_expert(trace, 2)).logits, expected)
    with pytest.raises(rm.UserError, match=r"router 'moe.gate' cannot be forced so: the code .* takes 2 experts"):
        routed.run(x, forced={"moe.gate": rm.routing.soft(trace["moe.gate"].logits)})


# ------------------------------------------------------------------------------------------------ gradient off


class Scattering(DividingLayer):
    """DeepSeek's way: what the experts say is summed in place."""

    @torch.no_grad()
    def eval_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, ranks = torch.where(index == number)
            if len(rows):
                said = expert(x[rows]).mul_(weight[rows, ranks, None])
                out.scatter_reduce_(0, rows[:, None].expand_as(said), said, reduce="sum")
        return out


class Inferring(DividingLayer):
    @torch.inference_mode()
    def eval_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.train_way(x, index, weight)


class Overwriting(DividingLayer):
    """At inference it overwrites what a gradient would need, so that opening it is no way."""

    @torch.no_grad()
    def eval_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return super().eval_way(x, index, weight).exp().log_()


@pytest.mark.parametrize(
    "kind, climbs", [(DividingLayer, "opened"), (Scattering, "opened"), (Inferring, "opened"), (Overwriting, ("moe",))]
)
def test_a_differentiable_way_is_climbed_and_the_exact_values_kept(
    kind: type[DividingLayer], climbs: object, images: Callable[..., Tensor]
) -> None:
    model = Classifier(kind(PairGate())).eval().double()
    x = images(4, 3, 8, 8).double()
    routed = rm.wrap(model, example=x)
    assert isinstance(routed, WrappedModel)
    assert routed.climbs == climbs
    assert "module 'moe' runs without gradient in eval mode (" in routed.notes[0]
    at = x.clone().requires_grad_(True)
    logits = routed(at)
    assert torch.equal(logits, model(x))
    assert not any(module.training for module in model.modules())
    slope = torch.autograd.grad(logits.square().sum(), at)[0]
    blind = torch.autograd.grad(model(at).square().sum(), at)[0]
    way = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    with torch.no_grad():
        measured = (model(x + 1e-6 * way).square().sum() - model(x - 1e-6 * way).square().sum()) / 2e-6
    torch.testing.assert_close((slope * way).sum(), measured, rtol=1e-4, atol=1e-6)
    assert abs(float((blind * way).sum() - measured)) > 0.01 * abs(float(measured)), "without the view it is wrong"


def test_a_way_that_moves_a_buffer_is_none(images: Callable[..., Tensor]) -> None:
    class Counting(Overwriting):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__(gate)
            self.register_buffer("calls", torch.zeros(()))

        def train_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            self.calls += 1
            return super().train_way(x, index, weight)

    model = Classifier(Counting(PairGate())).eval()
    routed = rm.wrap(model, example=images(4, 3, 8, 8))
    assert isinstance(routed, WrappedModel)
    assert routed.climbs is None
    assert float(model.moe.calls) == 0, "the model is as it was"
    assert routed.notes[0].startswith("module 'moe' passes no gradient (no_grad), though the answer depends on it")


def test_a_way_that_takes_float32_alone_is_measured_in_float32(images: Callable[..., Tensor]) -> None:
    """As DiT-MoE's block, whose answer in training is cast to float32: its float64 copy has no gradient to give."""

    class Casting(Overwriting):
        def train_way(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[index[:, 0] >= 0] = super().train_way(x, index, weight).float()
            return out

    x = images(4, 3, 8, 8)
    routed = rm.wrap(Classifier(Casting(PairGate())).eval(), example=x)
    (record,) = rm.evaluate(routed, x, [0, 1, 2, 3], attacks="fgsm(linf(0.05))")
    (said,) = (check for check in record.checks.checks if check.id == "G2")
    assert said.status in ("pass", "warn")
    assert "float32" in said.sentence


# ---------------------------------------------------------------------------------------------- the rest of the project


def test_evaluation_attacks_and_copies_work_on_a_wrapped_model(images: Callable[..., Tensor]) -> None:
    model, x = Classifier(DividingLayer(PairGate())).eval(), images(4, 3, 8, 8)
    routed = rm.wrap(model, example=x)
    twin = copy.deepcopy(routed)
    assert torch.equal(twin(x), routed(x))
    y = model(x).argmax(1)
    records = rm.evaluate(routed, x, y, attacks="pgd(linf(8/255), steps=1)")
    assert all(summary.failed == () for summary in records.summary()), "no check sees a hidden router, or no gradient"
    assert records[0].header.routers["moe.gate"].experts == EXPERTS
    for objective in (Misrouting(), RouterHinge()):
        attack = PGD(linf(8 / 255), steps=1, objective=objective)
        assert float((attack(routed, x, y) - x).abs().max()) > 0, "also where the model takes no mixture"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [list, np.asarray, lambda x: np.asarray(x, dtype=np.float64)])
def test_an_example_may_be_any_array_of_images(kind: Callable[[Any], Any], images: Callable[..., Tensor]) -> None:
    """As everywhere else: `rm.evaluate` takes the same images."""
    model, x = CASES["argmax"].make().eval(), images(4, 3, 8, 8)
    assert rm.find_routers(model, kind(x.tolist())).routers == rm.find_routers(model, x).routers
    assert torch.equal(rm.wrap(model, example=kind(x.tolist()))(x), model(x))


@pytest.mark.parametrize("example", [[], torch.zeros(0, 3, 8, 8), 3.0, "images", torch.ones(2, 3, 8, 8) > 0])
def test_an_example_that_is_none_is_one_line(example: Any) -> None:
    with pytest.raises(UserError, match="the example"):
        rm.wrap(CASES["argmax"].make().eval(), example=example)
