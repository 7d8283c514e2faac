"""The laboratory: the parts of routed layers against torch's full Jacobians, its file, its page, its verb."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robustmoe as rm
from robustmoe import analysis, records
from robustmoe.analysis import lipschitz_summary
from robustmoe.analysis.lipschitz import RIGHT, middle
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation import lipschitz_run
from robustmoe.evaluation.lipschitz import Bench
from robustmoe.lipschitz import attribution, expert_jacobian_norm, layers, spread
from robustmoe.lipschitz.inputs import layer_inputs
from robustmoe.lipschitz.layers import (
    as_answer,
    crossed,
    decide,
    disagreement,
    layer_terms,
    network_terms,
    route_terms,
    slope_bound,
    whole_experts,
    whole_terms,
)
from robustmoe.lipschitz.quantities import of_layer, of_tokens
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.token_layers import Rule, SlotMoE, TokenLayer, TokenMoE, TokenRouter
from robustmoe.models.tokens import TokenExperts
from robustmoe.models.vit_moe import ViTMoEModel
from robustmoe.records import Lipschitz, RouterInfo
from robustmoe.records.lipschitz import MULTIPLES
from robustmoe.routing import Routing, Tape, detach, soft
from test_dissection import make_trained
from test_report import made, make_header, make_run

SHAPE = (1, 4, 4)
VIT = "vit_moe(tiny, patch=2, width=12, depth=2, heads=2, experts=4, placement=(1,), mlp_ratio=2, {})"
GATES = {
    "vmoe": "k=2", "renormalised": "k=2, gating=renormalised", "soft": "gating=soft", "hard": "k=2, gating=hard",
    "straight_through": "k=2, gating=straight_through", "one": "k=1",
    "room": "k=2, capacity=0.8", "room renormalised": "k=2, gating=renormalised, capacity=0.8",
    "expert choice": "choice=expert, capacity=2", "expert choice renormalised":
    "choice=expert, capacity=2, gating=renormalised",
}  # fmt: skip
NAME = "network.blocks.1.mlp.router"


def vit(arguments: str, seed: int = 1) -> ViTMoEModel:
    """In float64, with experts that say something."""
    model = build_model(VIT.format(arguments), 4, SHAPE, seed=seed).double().eval()
    assert isinstance(model, ViTMoEModel)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts.w" in name:
                p.mul_(15.0)
            if "experts.b" in name:
                p.normal_()
    return model


def layer_of(model: ViTMoEModel, x: Tensor) -> tuple[TokenMoE, Tensor]:
    """The routed layer and its input at these images."""
    layer = model.layers()[NAME]
    assert isinstance(layer, TokenMoE)
    return layer, layer_inputs(model, model.layers(), x)[NAME]


def token_jacobians(layer: TokenMoE, h: Tensor, forced: dict[str, Routing] | None = None) -> Tensor:
    """(n * t, d, d): torch's Jacobian of the whole layer, of each token's output by its own input."""
    found = []
    for image in range(len(h)):
        held = None if forced is None else {"router": forced["router"][image : image + 1]}

        def answer(one: Tensor, held: dict[str, Routing] | None = held) -> Tensor:
            return layer(one[None], Tape(held))[0]

        whole = torch.autograd.functional.jacobian(answer, h[image])
        found += [whole[token, :, token] for token in range(h.shape[1])]
    return torch.stack(found)


def spectral(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices)[..., 0]


# ------------------------------------------------------------------------------------------------ LIP-3


@pytest.mark.parametrize("gate", sorted(GATES))
def test_the_parts_against_the_full_jacobian(gate: str, images: Callable[..., Tensor]) -> None:
    """The layer's own autograd, free and with its routing held, is the second implementation; it is the function's, but
    for "straight_through", whose declared gradient is not: there the held one is.
    """
    layer, h = layer_of(vit(GATES[gate]), images(2, *SHAPE).double())
    trace = {"router": decide(layer, h).detach()}
    held = token_jacobians(layer, h, trace)
    whole = held if gate == "straight_through" else token_jacobians(layer, h)
    found = layer_terms(layer, h)
    for name, value, expected in (
        ("total", found.total, whole), ("expert", found.expert, held), ("router", found.router, whole - held),
    ):  # fmt: skip
        assert torch.allclose(value, spectral(expected), rtol=1e-10, atol=1e-10), name
    assert bool((found.total <= found.expert + found.router + 1e-12).all())
    moves = gate not in ("hard", "straight_through")
    assert bool((found.router > 0).any()) == moves
    weighed = gate in ("vmoe", "one", "room", "room renormalised", "expert choice")
    assert bool((found.mass > 1e-6).any()) == weighed, "the chosen have a constant weight in all, or it moves"
    assert bool((found.mixing > 1e-6).any()) == (moves and gate != "one")
    if "room" in gate:
        assert bool((trace["router"].weight == 0).any()), "some token found no room"


def test_identical_experts_leave_the_gate_mass_alone(images: Callable[..., Tensor]) -> None:
    """Claim 11: the router's term is then f grad G^T, and nothing without a mass. Forgetting it would be seen."""
    for gate, some in (("vmoe", True), ("renormalised", False)):
        layer, h = layer_of(vit(GATES[gate] + ", equal_experts=True"), images(2, *SHAPE).double())
        with torch.no_grad():
            layer.experts.b1.zero_()
            layer.experts.b2.zero_()
        found = layer_terms(layer, h)
        assert float(found.mixing.max()) < 1e-12
        assert torch.allclose(found.router, found.mass, atol=1e-12)
        assert bool((found.router > 1e-3).all()) == some
        logits = h.flatten(0, 1) @ layer.router.weight.T
        p = logits.softmax(1).detach()
        chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
        mass = (p * chosen).sum(1, keepdim=True)
        mean_in = (p * chosen / mass) @ layer.router.weight
        mean_out = (p * (1 - chosen) / (1 - mass)) @ layer.router.weight
        slope = mass * (1 - mass) * (mean_in - mean_out)
        said = layer.experts.single(0, h.flatten(0, 1))
        if some:
            assert torch.allclose(found.mass, said.norm(dim=1) * slope.norm(dim=1), rtol=1e-9)


@pytest.mark.parametrize("gate", ["vmoe", "soft", "room renormalised"])
def test_power_iteration_of_the_layer(gate: str, images: Callable[..., Tensor]) -> None:
    """Claim 19, for widths whose Jacobians are not written out."""
    layer, h = layer_of(vit(GATES[gate]), images(2, *SHAPE).double())
    exact, found = layer_terms(layer, h), layer_terms(layer, h, steps=150)
    for name in ("total", "expert", "experts"):
        one, whole = getattr(found, name), getattr(exact, name)
        assert bool((one <= whole * (1 + 1e-9)).all()), name
        assert torch.allclose(one, whole, rtol=0.01), name
    assert torch.equal(found.router, exact.router), "exact either way"
    assert bool((layer_terms(layer, h, steps=1).total < 0.99 * exact.total).any())


def test_the_experts_slopes_and_their_bound(images: Callable[..., Tensor]) -> None:
    layer, h = layer_of(vit(GATES["vmoe"]), images(3, *SHAPE).double())
    found, index = layer_terms(layer, h).experts, decide(layer, h).index.flatten(0, 1)
    bound = spectral(layer.experts.w1) * spectral(layer.experts.w2) * 1.12891
    for i in range(4):
        own = expert_jacobian_norm(layer.experts.w1[i].T, layer.experts.b1[i], layer.experts.w2[i].T, h.flatten(0, 1))
        rows, ranks = torch.nonzero(index == i, as_tuple=True)
        assert torch.allclose(found[rows, ranks], own[rows])
        assert bool((own <= bound[i]).all())


def test_a_chunk_of_tokens_is_no_matter(images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, h = layer_of(vit(GATES["vmoe"]), images(2, *SHAPE).double())
    whole, routes = layer_terms(layer, h), route_terms(layer, h)
    monkeypatch.setattr(layers, "NUMBERS", 600)
    assert all(torch.allclose(a, b) for a, b in zip(whole, layer_terms(layer, h), strict=True))
    assert torch.allclose(routes.disagreement.apart, route_terms(layer, h).disagreement.apart)


def test_what_is_not_exact_is_not_called_so(images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the width that is written out: A, the sum, the experts' slopes; a share of them can err either way."""
    layer, h = layer_of(vit(GATES["vmoe"]), images(2, *SHAPE).double())
    exact = of_tokens(layer, h, h, steps=5)
    assert set(exact.kinds) == {"jump", "jump max"}
    monkeypatch.setattr(layers, "WHOLE", 11)
    found = of_tokens(layer, h, h, steps=5)
    bounds = {name for name, kind in found.kinds.items() if kind == "lower bound"}
    assert bounds == {
        f"{name}{end}" for name in ("layer jacobian", "expert term", "expert slope") for end in ("", " max")
    }
    assert found.kinds["router share"] == "estimate"
    moved = {name for name, column in found.columns.items() if not torch.equal(column, exact.columns[name])}
    assert moved == bounds | {"router share"}


def test_soft_moe_as_one_vector(images: Callable[..., Tensor]) -> None:
    model, x = vit("choice=slots, slots=2"), images(2, *SHAPE).double()
    layer, h = model.layers()[NAME], layer_inputs(model, model.layers(), x)[NAME]
    assert isinstance(layer, SlotMoE)
    found = whole_terms(layer, h, steps=60)
    trace = detach(as_answer(layer)(h).trace)
    for image in range(2):
        held = {"router": trace["router"][image : image + 1]}
        free, fixed = (
            torch.autograd.functional.jacobian(
                lambda one, f=f: layer(one[None], Tape(f))[0].flatten(), h[image]
            ).flatten(1)
            for f in (None, held)
        )
        for value, matrix in zip(found, (free, fixed, free - fixed), strict=True):
            exact = float(spectral(matrix))
            assert 0.99 * exact <= float(value[image]) <= exact * (1 + 1e-9)
            assert exact > 1e-3


# ------------------------------------------------------------------------------------------------ LIP-5, LIP-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("gate", ["vmoe", "one", "hard"])
def test_nothing_changes_below_the_radius_and_something_above(
    gate: str, norm: str, images: Callable[..., Tensor]
) -> None:
    """Claim 14, inside a ViT-MoE, token by token: the worst step, of the pair whose boundary is nearest, at .999 and at
    1.001 of the radius; at .999 random steps too.
    """
    layer, h = layer_of(vit(GATES[gate]), images(8, *SHAPE).double())
    radius, tokens = route_terms(layer, h).radius[norm], h.flatten(0, 1)
    rows = layer.router.weight.detach()

    def sets(at: Tensor) -> Tensor:
        return decide(layer, at[None]).chosen()[0]

    clean = sets(tokens)
    steps = []
    for token in range(len(tokens)):
        logits, best = tokens[token] @ rows.T, (math.inf, torch.zeros(12))
        for i in clean[token].nonzero()[:, 0]:
            for j in (~clean[token]).nonzero()[:, 0]:
                slope = rows[j] - rows[i]
                unit = slope / slope.norm() if norm == "l2" else slope.sign()
                best = min(best, (float((logits[i] - logits[j]) / (unit @ slope)), unit), key=lambda pair: pair[0])
        assert best[0] == pytest.approx(float(radius[token]), rel=1e-9)
        steps.append(best[1])
    step = torch.stack(steps)
    assert torch.equal(sets(tokens + 0.999 * radius[:, None] * step), clean)
    assert bool((sets(tokens + 1.001 * radius[:, None] * step) != clean).any(1).all())
    for _ in range(20):
        free = torch.randn_like(tokens)
        free = free / free.norm(dim=1, keepdim=True) if norm == "l2" else free.sign()
        assert torch.equal(sets(tokens + 0.999 * radius[:, None] * free), clean)


@pytest.mark.parametrize("gate", ["vmoe", "renormalised", "hard", "one", "straight_through"])
def test_the_jump_at_a_tie_of_a_layer(gate: str, images: Callable[..., Tensor]) -> None:
    """Claim 16: tokens are moved to the tie of their k-th and next expert; the layer is asked 1e-9 before and
    behind.
    """
    layer, h = layer_of(vit(GATES[gate]), images(8, *SHAPE).double())
    rows, tokens, k = layer.router.weight.detach(), h.flatten(0, 1), layer.rule.k
    logits = tokens @ rows.T
    order = logits.argsort(1, descending=True)
    slope = rows[order[:, k - 1]] - rows[order[:, k]]
    gap = (logits.gather(1, order[:, k - 1 : k]) - logits.gather(1, order[:, k : k + 1]))[:, 0]
    tie = tokens - (gap / slope.square().sum(1))[:, None] * slope
    there = (tie @ rows.T).argsort(1, descending=True)
    same = (there[:, : k + 1].sort(1).values == order[:, : k + 1].sort(1).values).all(1)  # no other expert came between
    same &= (there[:, : max(k - 1, 1) * (k > 1)] == order[:, : max(k - 1, 1) * (k > 1)]).all(1)
    assert int(same.sum()) >= 10
    tie, unit = tie[same], slope[same] / slope[same].norm(dim=1, keepdim=True)
    before, behind = ((layer((tie + sign * 1e-9 * unit)[None], Tape())[0]).detach() for sign in (1, -1))
    found = route_terms(layer, tie[None]).jump
    assert found is not None
    assert torch.allclose((before - behind).norm(dim=1), found, atol=1e-6)
    assert float(found.min()) > 1e-3


def test_the_routing_slope(images: Callable[..., Tensor]) -> None:
    layer, h = layer_of(vit(GATES["vmoe"]), images(2, *SHAPE).double())
    found = route_terms(layer, h).slope
    for token, value in zip(h.flatten(0, 1), found, strict=True):
        own = torch.autograd.functional.jacobian(lambda one: (one @ layer.router.weight.T).softmax(-1), token)
        assert float(value) == pytest.approx(float(spectral(own)), rel=1e-9)
    assert float(found.max()) <= slope_bound(layer)


def test_disagreement_by_hand() -> None:
    """Two best and the next: (3, 0), (0, 4), (0, 0); pairs 5, 3, 4 apart, of lengths 5, 3, 4. The fourth, far away,
    does not count.
    """
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    found = disagreement(logits, torch.tensor([[[3.0, 0], [0, 4], [0, 0], [99, 99]]]), k=2)
    assert float(found.apart) == pytest.approx((5 + 3 + 4) / 3)
    assert float(found.relative) == pytest.approx(1.0)
    assert float(found.weighted) == pytest.approx(2 * (0.4 * 0.3 * 5 + 0.4 * 0.2 * 3 + 0.3 * 0.2 * 4))


# ------------------------------------------------------------------------------------------------ LIP-8


@pytest.mark.parametrize("gate", [*sorted(GATES), "slots"])
def test_the_shares_add_up(gate: str, images: Callable[..., Tensor]) -> None:
    """Claim 18, in a layer and from end to end; of token layers the closed form of LIP-8 is the second
    implementation."""
    model = vit(GATES.get(gate, "choice=slots"))
    x = images(4, *SHAPE).double()
    x_adv = (x + 0.5 * (torch.rand_like(x) - 0.5)).clamp(0, 1)
    layer = model.layers()[NAME]
    h, h_adv = (layer_inputs(model, model.layers(), each)[NAME] for each in (x, x_adv))
    for answer, a, b in ((as_answer(layer), h, h_adv), (model.run, x, x_adv)):
        found = crossed(answer, a, b)
        experts, router = found.shares()
        assert torch.allclose(experts + router, answer(b)[0] - answer(a)[0], atol=1e-10)
        assert answer == model.run or float(router.detach().abs().max()) > 1e-6, "routes or weights moved"
    if isinstance(layer, TokenMoE):
        weights = [spread(decide(layer, each)).flatten(0, 1) for each in (h, h_adv)]
        outputs = [layer.experts.every(each.flatten(0, 1)).transpose(0, 1) for each in (h, h_adv)]
        closed = attribution(weights[0], outputs[0], weights[1], outputs[1])
        own = crossed(as_answer(layer), h, h_adv).shares()
        assert torch.allclose(own.expert.flatten(0, 1), closed.expert, atol=1e-10)
        assert torch.allclose(own.router.flatten(0, 1), closed.router, atol=1e-10)


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("name", ["ensemble_soft", "ensemble_k2", "ensemble_hard", "ensemble_straight", "pathway"])
def test_experts_that_are_whole_networks(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """LIP-3 in the pixels, against torch's Jacobians of the model with its route free and held. (Of a straight-through
    gradient the held one is the function's.)
    """
    model, x = tiny(name).double(), images(3).double()
    found = network_terms(model, x)
    assert found is not None
    assert found.space == "logits"
    trace = detach(model.run(x).trace)
    for image in range(3):
        one, held = x[image : image + 1], {"router": trace["router"][image : image + 1]}
        fixed = torch.autograd.functional.jacobian(lambda z, f=held: model.run(z, f).logits[0], one).flatten(1)
        free = torch.autograd.functional.jacobian(lambda z: model.run(z).logits[0], one).flatten(1)
        free = fixed if name in ("ensemble_straight", "pathway") else free
        for value, matrix in ((found.total, free), (found.expert, fixed), (found.router, free - fixed)):
            assert float(value[image]) == pytest.approx(float(spectral(matrix)), rel=1e-8, abs=1e-10)
    assert bool((found.jump > 0).all()) == (name != "ensemble_soft"), "one that takes all experts cannot jump"
    if name == "pathway":
        outputs = whole_experts(model, x)
        assert outputs is not None
        ranked = trace["router"].logits[:, 0].argsort(1, descending=True)
        pair = [outputs.outputs[torch.arange(3), ranked[:, rank]] for rank in (0, 1)]
        assert torch.allclose(found.jump, (pair[0] - pair[1]).norm(dim=1))


def test_probabilities_are_mixed_as_such(images: Callable[..., Tensor]) -> None:
    spec = "ensemble(small_cnn(width=4), experts=3, gate=soft, mix=probabilities, router=small_cnn(width=4))"
    model, x = build_model(spec, 4, (3, 8, 8)).double().eval(), images(2).double()
    found = network_terms(model, x)
    assert found is not None
    assert found.space == "probabilities"
    one = torch.autograd.functional.jacobian(lambda z: model(z).softmax(1)[0], x[:1]).flatten(1)
    assert float(found.total[0]) == pytest.approx(float(spectral(one)), rel=1e-8)


STAGED = "pathway(resnet8(width=4), experts=2, routers=stage, router=linear)"


def test_where_the_model_is_no_sum_nothing_is_said(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Several routers, several items an image, and one router inside a network whose head stands behind the sum."""
    assert network_terms(tiny(STAGED), images(2)) is None
    assert network_terms(tiny("dual"), images(2)) is None
    assert network_terms(vit(GATES["vmoe"]), images(2, *SHAPE).double()) is None

    class Behind(RoutedModel):
        def __init__(self, inner: RoutedModel) -> None:
            super().__init__()
            self.inner = inner

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return self.inner.body(x, tape).tanh()

    assert network_terms(Behind(tiny("ensemble_soft")), images(2)) is None


# ------------------------------------------------------------------------------------------------ the run


ATTACK = "pgd(linf(0.05), steps=2)"
RUN = "vit_moe(tiny, patch=4, width=8, depth=1, heads=2, experts=3, k=2, placement=(0,), {})"


class Rows(RoutedModel):
    """Somebody's own model: the image's rows are its tokens, and its routed layers stand where they like."""

    def __init__(self, *layers: TokenLayer) -> None:
        super().__init__()
        self.deep = torch.nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)})

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        tokens = x[:, 0]
        for name, layer in self.deep.items():
            tokens = tokens + layer(tokens, tape.under(f"deep.{name}"))
        return tokens.mean(1)


class Cosine(TokenLayer):
    """Somebody's own layer, whose router is not linear in a token."""

    whole = "the router looks at directions"

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = TokenRouter(4, 3), TokenExperts(3, 4, 6)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        routing = tape("router", soft(self.router(torch.nn.functional.normalize(x, dim=-1, eps=1e-3))))
        index, weight = routing.index.flatten(0, 1), routing.weight.flatten(0, 1)
        return self.experts(x.flatten(0, 1), index, weight).view_as(x)


def test_layers_of_somebodys_own_model_are_measured_as_they_say(images: Callable[..., Tensor]) -> None:
    """The laboratory asks the model for its layers and each layer for its router, and knows no class of either."""
    rule = Rule(1, "vmoe", False, "token", None, "vanilla", 1, 1)
    model = Rows(TokenMoE(TokenRouter(4, 3), TokenExperts(3, 4, 6), rule, "loop"), Cosine()).double().eval()
    first, second = "deep.layer0.router", "deep.layer1.router"
    assert list(model.layers()) == [first, second] == list(model.run(images(2, *SHAPE).double()).trace)
    assert build_model("small_cnn", 4, SHAPE).layers() == {}
    with pytest.raises(ValueError, match=r"as a whole alone: the router looks at directions"):
        model.layers()[second].linear()
    x = images(3, *SHAPE).double()
    for name, layer in model.layers().items():
        inputs = [layer_inputs(model, model.layers(), each)[name] for each in (x, (x + 0.01).clamp(max=1))]
        kinds, absent = of_layer(layer, *inputs, steps=20)[1:3]
        assert ("layer jacobian" in kinds) is bool(layer.whole)
        assert absent.get("disagreement and the experts' slopes") == (layer.whole or None)


def test_a_stopped_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_trained(tmp_path / "run", RUN.format("gating=vmoe"))
    real, stop, asked = Bench.measure, True, []

    def counted(self: Any, found: Any, batch: Any, climbed: Any) -> Any:
        asked.append(batch.index.tolist())
        if stop and len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, found, batch, climbed)

    monkeypatch.setattr(Bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        lipschitz_run(run, attack=ATTACK, limit=5, batch_size=2)
    left = records.Lipschitz.read(run)
    assert left is not None
    assert (len(left.index), left.done) == (2, False)
    stop = False
    asked.clear()
    whole = lipschitz_run(run, attack=ATTACK, limit=5, batch_size=2)
    assert [len(some) for some in asked] == [2, 1], "the first two images stand"
    assert (whole.done, records.Lipschitz.read(run)) == (True, whole)
    asked.clear()
    assert lipschitz_run(run, attack=ATTACK, limit=5, batch_size=4) == whole, "the batch size is not part of the work"
    assert asked == []
    (run / "lipschitz.json").unlink()
    again = lipschitz_run(run, attack=ATTACK, limit=5, batch_size=5)
    assert again.index == whole.index
    for name, column in whole.model.items():
        assert again.model[name] == pytest.approx(column, rel=2e-3, abs=1e-4), name
    assert set(again.layers) == {"network.blocks.0.mlp.router"}


@pytest.mark.parametrize("kind", ["choice=slots", "choice=expert, capacity=2", "gating=soft"])
def test_other_kinds_of_layers(kind: str, tmp_path: Path) -> None:
    """What they have not is told, and nothing else is put in its place."""
    found = lipschitz_run(make_trained(tmp_path / "run", RUN.format(kind)), attack=ATTACK, limit=2)
    for name, layer in found.layers.items():
        assert "jump, margin and radius" in found.absent[name]
        assert not {"jump", "margin", "radius l2", "pixel radius"} & set(layer)
        assert {"expert term", "router term", "attack router share", "model's router's part"} <= set(layer)
        assert all(math.isfinite(value) for column in layer.values() for value in column)
    assert found.boundary == {}
    text = str(found)
    assert "Boundary mass" not in text
    assert "no jump, margin and radius" in text


def test_a_dense_model_has_its_own_numbers(tmp_path: Path) -> None:
    found = lipschitz_run(make_trained(tmp_path / "run", "linear"), attack=ATTACK, limit=3)
    assert (found.layers, found.done) == ({}, True)
    assert "router's part" not in found.model
    assert found.model["fall by experts"] == pytest.approx(found.model["fall"])
    assert "The model has no router." in " ".join(str(found).split())


def test_other_work_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run")
    assert lipschitz_run(run, limit=1).header.attack == "pgd(linf(0.05), steps=20)", "at the threat of the run"
    assert lipschitz_run(run, attack=ATTACK, limit=1, seed=3).header.seed == 3
    assert (
        "lipschitz.json is of another attack; it is kept as lipschitz.json.old1 and made anew"
        in capsys.readouterr().err
    )


def test_a_model_in_hand(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """Half-precision weights are measured in a float32 copy; the model comes back as it was."""
    model, x, y = tiny("ensemble_soft").train(), images(2), torch.tensor([0, 1])
    found = rm.measure_lipschitz(model, x, y, attack=ATTACK, num_classes=4).summary()
    half = rm.measure_lipschitz(model.to(torch.bfloat16), x, y, attack=ATTACK, num_classes=4).summary()
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert half.model["jacobian"].median == pytest.approx(found.model["jacobian"].median, rel=0.05)
    assert [layer.name for layer in found.layers] == ["router"]


def test_what_cannot_be_measured() -> None:
    x, y = torch.rand(2, 1, 2, 2), [0, 1]
    with pytest.raises(UserError, match="the batch size is 0, expected at least 1"):
        rm.measure_lipschitz(lambda x: x.flatten(1), x, y, batch_size=0)
    with pytest.raises(UserError, match="the attack has eps 0; expected a ball of a radius above 0"):
        rm.measure_lipschitz(lambda x: x.flatten(1), x, y, attack="pgd(linf(0), steps=1)")


# ------------------------------------------------------------------------------------------------ numbers and file


def record(**changes: Any) -> Lipschitz:
    """Four images, one router of two experts of which the second gets nothing; worked by hand below."""
    header = make_header(n=4, routers={"router": RouterInfo(2, 1, 1)}, attack="pgd(linf(8/255), steps=20)")
    names = ("jacobian", "experts' part", "router's part", "margin slope", "margin radius", "stretch")
    model = {name: [1.0, 2.0, 3.0, 4.0] for name in names} | {"router's share": [0.2, 0.4, 0.4, 0.6]}
    model |= {"fall": [3.0, 3.0, 3.0, 3.0], "fall by experts": [2.0] * 4, "fall by routes": [1.0] * 4}
    model |= {"right, clean": [1.0] * 4, "right, attacked": [1.0, 0.0, 0.0, 0.0]}
    model |= {"right, routing fixed": [1.0, 1.0, 0.0, 0.0], "right, routing transplanted": [1.0, 1.0, 1.0, 0.0]}
    layer = {"expert term": [1.0, 1.0, 2.0, 2.0], "router share": [0.5] * 4, "attack router share": [0.25] * 4}
    layer |= {"margin": [0.5, math.inf, 1.0, 2.0]}
    shares = [[0.0] * 3 + [1.0] * 5, [0.0] * 8, [0.0] * 8, [1.0] * 8]
    values: dict[str, Any] = {
        "header": header, "index": [0, 1, 2, 3], "labels": [0, 1, 2, 3], "model": model, "layers": {"router": layer},
        "load": {"router": [[1, 0]] * 4}, "boundary": {"router": shares}, "bounds": {"router": [3.0, 4.0]},
        "kinds": {"margin radius": "first order"}, "absent": {"router": {"jump": "there is none"}},
        "notes": {"router": "by hand"}, "seconds": 1.0,
    }  # fmt: skip
    return Lipschitz(**{**values, **changes})


def test_the_numbers_of_a_record() -> None:
    found = lipschitz_summary(record())
    jacobian = found.model["jacobian"]
    assert (jacobian.median, jacobian.mean, jacobian.n) == (2.5, 2.5, 4)
    assert (jacobian.low, jacobian.high) == pytest.approx((1.3, 3.7)), "a tenth of the way through 1, 2, 3, 4"
    assert found.fall == (3.0, 2.0, 1.0)
    assert [found.right[name].count for name in RIGHT] == [4, 1, 2, 3]
    (layer,) = found.layers
    assert (layer.load, layer.dead, layer.bounds) == ((1.0, 0.0), (1,), (3.0, 4.0))
    assert layer.mass == (1 + 0 + 0 + 1) / 4
    assert layer.boundary[0] == (MULTIPLES[0] * 8 / 255, 1 / 4)
    margin = layer.numbers["margin"]
    assert (margin.median, margin.mean) == (1.5, math.inf), "of 0.5, 1, 2, inf"
    assert (found.kind("margin radius"), found.kind("jacobian")) == ("first order", "exact")


def test_the_middle_of_odd_values() -> None:
    assert math.isnan(middle([1.0, math.nan]).median)
    assert middle([math.inf, math.inf]).median == math.inf
    assert middle([7.0]) == analysis.Middle(7.0, 7.0, 7.0, 7.0, 1)


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert records.Lipschitz.read(tmp_path) is None
    record().write(tmp_path)
    assert records.Lipschitz.read(tmp_path) == record()


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("kind",), "audit", "not of the kind lipschitz: expected"),
        (("version",), 9, "lipschitz of version 9, this robustmoe reads version 2"),
        (("model", "jacobian"), [1.0], r"model\['jacobian'\] has 1 entries, expected 4"),
        (("model", "jacobian"), "big", r"field 'model\[jacobian\]' must be a list"),
        (("layers",), {}, r"field 'layers' is of the routers \[\], expected \['router'\]"),
        (("load", "router"), [[1]] * 4, r"load\['router'\]\[0\] must have 2 numbers, got 1"),
        (("boundary", "router"), [[1.0]] * 4, "field 'boundary' must have 8 numbers an image"),
        (("kinds", "jacobian"), "sure", r"field 'kinds\[jacobian\]' must be one of exact, lower bound"),
        (("header", "n"), 2, "it has 4 images, more than the 2 it is about"),
        (("extra",), 1, "unknown field 'extra'"),
    ],
)
def test_a_damaged_file_gets_one_line(place: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(record().to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "lipschitz.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        records.Lipschitz.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("makes it anew")


# ------------------------------------------------------------------------------------------------ verb and page


def test_the_verb_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run", RUN.format("gating=vmoe"))
    assert main(["lipschitz", str(run), "--limit", "3", "--attack", ATTACK]) == 0
    out = capsys.readouterr().out
    assert "3 images of digits (test), L∞ ≤ 0.05" in out
    assert out.rstrip().endswith(f"written to {run}/lipschitz.json; report shows it")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    found = json.loads((tmp_path / "page.json").read_text())["runs"][0]["lipschitz"]
    assert (found["n"], found["done"], len(found["layers"])) == (3, True, 1)


@pytest.mark.parametrize(
    "words, message",
    [(["--attack", "pgd("], "cannot read 'pgd("), (["--limit", "0"], "the limit on images is 0"),
     (["--batch-size", "0"], "the batch size is 0")],
)  # fmt: skip
def test_the_verb_refuses_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trained(tmp_path / "run")
    assert main(["lipschitz", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_page_shows_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record().write(run)
    page, numbers, text, source = made(run, tmp_path)
    assert "lipschitz" in page.ids
    assert page.missing_alt == 0
    assert "://" not in source
    assert "| ‖A‖, expert term | 1.5 (1 to 2) | exact |" in text
    found = numbers["runs"][0]["lipschitz"]
    assert (found["layers"][0]["numbers"]["margin"]["mean"], found["right"]["routing fixed"]["count"]) == (None, 2)


@pytest.mark.parametrize(
    "change, why", [({"index": []}, "without an image yet"), ({}, "of other weights than the evaluation")]
)
def test_what_does_not_belong_is_left_out_and_said(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    run, found = make_run(tmp_path), record()
    if change:
        empty = {"labels": [], "model": {}, "layers": {"router": {}}, "load": {"router": []}, "boundary": {}}
        found = record(**change, **empty)
    else:
        found = record(header=dataclasses.replace(found.header, model_hash="another"))
    found.write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert "lipschitz" not in page.ids
    assert numbers["runs"][0]["lipschitz"] is None
    assert any(f"lipschitz.json is {why} and is left out" in note for note in numbers["runs"][0]["notes"])
