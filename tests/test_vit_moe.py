"""Sparse vision transformers: layers against the papers' equations written token by token, identities of routing, room
and groups, training noise, sizes and costs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faulty_models import on
from robustmoe import spec as specs
from robustmoe.costs import costs
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.evaluation.checks import harness
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import RoutedModel, SlotMoE, TokenExperts, TokenMoE, ViT, ViTMoE, ViTMoEModel, build_model
from robustmoe.models.token_layers import Rule, SlotRouter, TokenRouter
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Tape, rerouted, soft, to_expert

SMALL = "patch=4, width=16, depth=4, heads=2, mlp_ratio=2, experts=3, placement=every_2"
KINDS = {
    "vmoe": f"vit_moe({SMALL}, k=2)",
    "renormalised": f"vit_moe({SMALL}, k=2, gating=renormalised)",
    "soft": f"vit_moe({SMALL}, gating=soft)",
    "hard": f"vit_moe({SMALL}, k=1, gating=hard)",
    "straight_through": f"vit_moe({SMALL}, k=1, gating=straight_through)",
    "room": f"vit_moe({SMALL}, k=2, capacity=0.7)",
    "first come by priority": f"vit_moe({SMALL}, k=2, capacity=0.7, order=priority)",
    "expert": f"vit_moe({SMALL}, choice=expert)",
    "expert renormalised": f"vit_moe({SMALL}, choice=expert, gating=renormalised, capacity=2)",
    "slots": f"vit_moe({SMALL}, choice=slots, slots=2)",
}
ROUTERS = ["network.blocks.1.mlp.router", "network.blocks.3.mlp.router"]


def made(text: str, image: int = 8, seed: int = 0) -> ViTMoEModel:
    """With experts and routers that differ clearly: a fresh one's are nearly equal."""
    model = build_model(text, 4, (3, image, image), seed=seed)
    assert isinstance(model, ViTMoEModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.layers().values():
            for parameter in layer.experts.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if isinstance(layer.router, SlotRouter):
                layer.router.scale.fill_(3.0)
    return model


def layer_of(width: int, experts: int, **given: object) -> TokenMoE:
    """A layer alone, in float64."""
    fields = {"k": 1, "gating": "vmoe", "noise": True, "choice": "token", "room": None, "order": "vanilla"}
    fields |= {"group": 1, "multiple": 1, **given}
    own = TokenExperts(experts, width, 2 * width)
    torch.nn.init.normal_(own.w1)
    torch.nn.init.normal_(own.w2)
    torch.nn.init.normal_(own.b1)
    torch.nn.init.normal_(own.b2)
    return TokenMoE(TokenRouter(width, experts), own, Rule(**fields), "auto").double()


def mlp(experts: TokenExperts, i: int, token: Tensor) -> Tensor:
    return F.gelu(token @ experts.w1[i] + experts.b1[i]) @ experts.w2[i] + experts.b2[i]


# ------------------------------------------------------------------------------------------------ the equations


@torch.no_grad()
@pytest.mark.parametrize("gating", ["vmoe", "renormalised", "hard", "soft", "straight_through"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_token_choice_is_the_papers_sum(gating: str, k: int) -> None:
    """V-MoE, eq. 1 and 2: p = softmax(W x), the k largest of it; sum of p_i MLP_i(x), token by token."""
    layer, x = layer_of(4, 5, k=k, gating=gating), torch.randn(3, 6, 4, dtype=torch.float64)
    tape = Tape()
    found = layer(x, tape)
    for n in range(3):
        for t in range(6):
            p = torch.softmax(layer.router.weight @ x[n, t], 0)
            best = p.argsort(descending=True)[: 5 if gating == "soft" else k].tolist()
            total = sum(float(p[i]) for i in best)
            share = {"renormalised": 1 / total, "vmoe": 1.0, "soft": 1.0}
            weights = {i: float(p[i]) * share[gating] if gating in share else 1 / k for i in best}
            expected = sum(w * mlp(layer.experts, i, x[n, t]) for i, w in weights.items())
            torch.testing.assert_close(found[n, t], expected, rtol=1e-10, atol=1e-12)
            assert tape.trace["router"].index[n, t].tolist() == best


@torch.no_grad()
@pytest.mark.parametrize("gating", ["vmoe", "renormalised"])
@pytest.mark.parametrize("factor, room", [(None, 4), (1.0, 4), (0.4, 2), (9.0, 11)])
def test_expert_choice_is_the_papers(gating: str, factor: float | None, room: int) -> None:
    """Zhou et al. 2022: each of 3 experts takes the ceil(11 c / 3) tokens of the image with its largest p."""
    layer = layer_of(4, 3, choice="expert", gating=gating, room=factor)
    x, tape = torch.randn(2, 11, 4, dtype=torch.float64), Tape()
    found = layer(x, tape)
    chosen = tape.trace["router"].chosen()
    for n in range(2):
        p = torch.softmax(x[n] @ layer.router.weight.T, 1)
        taken = torch.stack([p[:, e] >= p[:, e].sort(descending=True).values[room - 1] for e in range(3)], 1)
        assert torch.equal(chosen[n], taken)
        assert taken.sum(0).tolist() == [room] * 3
        for t in range(11):
            own = [e for e in range(3) if taken[t, e]]
            total = sum(float(p[t, e]) for e in own) if gating == "renormalised" else 1.0
            expected = sum((float(p[t, e]) / total * mlp(layer.experts, e, x[n, t]) for e in own), torch.zeros(4))
            torch.testing.assert_close(found[n, t], expected.double(), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_is_the_papers(slots: int) -> None:
    """Puigcerver et al. 2024, section 2.1 and 2.3: logits = scale * X^ M^ (each of length 1); slots = softmax over
    tokens, answers by the slot's expert, tokens = softmax over all slots.
    """
    experts = layer_of(4, 3).experts
    layer = SlotMoE(SlotRouter(4, 3 * slots).double(), experts)
    layer.router.scale.fill_(2.5)
    x, tape = torch.randn(2, 7, 4, dtype=torch.float64), Tape()
    found = layer(x, tape)
    for n in range(2):
        unit = x[n] / (x[n].square().sum(1, keepdim=True) + 1e-6).sqrt()
        mu = layer.router.mu / (layer.router.mu.square().sum(0) + 1e-6).sqrt()
        logits = 2.5 * unit @ mu
        given = torch.softmax(logits, 0).T @ x[n]
        answers = torch.stack([mlp(experts, s // slots, given[s]) for s in range(3 * slots)])
        combine = torch.softmax(logits, 1)
        torch.testing.assert_close(found[n], combine @ answers, rtol=1e-10, atol=1e-12)
        routing = tape.trace["router"][n : n + 1]
        share = torch.zeros(7, 3).double().scatter_add(1, routing.index[0], routing.weight[0])
        torch.testing.assert_close(share, combine.view(7, 3, slots).sum(2))


@torch.no_grad()
def test_the_whole_model_is_the_dense_one_with_layers_in_place(images: Callable[..., Tensor]) -> None:
    """The blocks written out: x + attention(norm x), then x + (layer or MLP)(norm x)."""
    for text in KINDS.values():
        model, x = made(text), images(5)
        network = model.network
        tokens = network.tokens((x - 0.5) / 0.5)
        for i, block in enumerate(network.blocks):
            tokens = tokens + block.attn(block.norm1(tokens))
            given = block.norm2(tokens)
            tokens = tokens + (block.mlp(given, Tape()) if i in (1, 3) else block.mlp(given))
        torch.testing.assert_close(model(x), network.head(network.norm(tokens)[:, 0]), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ identities


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_own_trace_changes_nothing(kind: str, images: Callable[..., Tensor]) -> None:
    model, x = made(KINDS[kind]), images(6)
    free = model.run(x)
    assert list(free.trace) == list(model.layers()) == ROUTERS
    assert all(routing.logits.shape == (6, 5, 3) for routing in free.trace.values())  # 2 x 2 patches, the class token
    assert all(len(model.get_submodule(name).state_dict()) > 0 for name in ROUTERS)
    forced = model.run(x, forced=free.trace)
    assert torch.equal(forced.logits, free.logits)
    for name, routing in free.trace.items():
        for field in ("logits", "index", "weight"):
            assert torch.equal(getattr(forced.trace[name], field), getattr(routing, field))
    other = images(12)[6:]
    held = model.run(other, forced=free.trace)
    for name, routing in free.trace.items():
        assert torch.equal(held.trace[name].weight, routing.weight)
        assert not torch.equal(held.trace[name].logits, routing.logits)
    assert not torch.allclose(held.logits, model(other), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_forcing_expert_i_is_the_dense_model_of_that_expert(kind: str, images: Callable[..., Tensor]) -> None:
    """(But for slots, where the expert sees the slots' means.)"""
    model, x = made(KINDS[kind]), images(4)
    trace = model.run(x).trace
    for i in range(3):
        dense = build_model(ViT(4, 16, 4, 2, 2.0), 4, (3, 8, 8))
        state = model.state_dict()
        for b in (1, 3):
            own = model.network.blocks[b].mlp.experts
            for name, value in {"fc1.weight": own.w1[i].T, "fc1.bias": own.b1[i]}.items():
                state[f"network.blocks.{b}.mlp.{name}"] = value
            for name, value in {"fc2.weight": own.w2[i].T, "fc2.bias": own.b2[i]}.items():
                state[f"network.blocks.{b}.mlp.{name}"] = value
        dense.load_state_dict({name: state[name] for name in dense.state_dict()})
        same = torch.allclose(model.run(x, forced=to_expert(trace, i)).logits, dense(x), rtol=1e-5, atol=1e-5)
        assert same == (kind != "slots")


@torch.no_grad()
def test_claim_6_all_experts_renormalised_are_soft_and_one_is_dense() -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    full = layer_of(4, 5, k=5, gating="renormalised")
    mixed = TokenMoE(full.router, full.experts, layer_of(4, 5, k=5, gating="soft").rule, "auto")
    torch.testing.assert_close(full(x, Tape()), mixed(x, Tape()), rtol=1e-12, atol=1e-12)
    for gating in ("renormalised", "vmoe", "hard"):
        one = layer_of(4, 1, gating=gating)
        torch.testing.assert_close(one(x, Tape()), mlp(one.experts, 0, x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("given", [{"k": 2}, {"k": 2, "room": 0.6}, {"choice": "expert"}])
def test_claim_6_experts_in_another_order(given: dict[str, object]) -> None:
    """With their router rows: the same answers; the trace names them by their new places."""
    layer, order, tape, other = layer_of(4, 5, **given), torch.tensor([3, 0, 4, 1, 2]), Tape(), Tape()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    before = layer(x, tape)
    for parameter in layer.parameters():
        parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(layer(x, other), before, rtol=1e-10, atol=1e-12)
    assert torch.equal(other.trace["router"].chosen(), tape.trace["router"].chosen()[..., order])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["token", "expert", "priority", "slots"])
def test_claim_6_tokens_in_another_order(kind: str) -> None:
    """Answers move with the tokens, but where the first come are served (the last assertion)."""
    x, order = torch.randn(2, 9, 4, dtype=torch.float64), torch.randperm(9)
    layers = {
        "token": layer_of(4, 5, k=2),
        "expert": layer_of(4, 5, choice="expert"),
        "priority": layer_of(4, 5, k=2, room=0.5, order="priority"),
        "slots": SlotMoE(SlotRouter(4, 10).double(), layer_of(4, 5).experts),
    }
    torch.testing.assert_close(
        layers[kind](x[:, order], Tape()), layers[kind](x, Tape())[:, order], rtol=1e-12, atol=1e-12
    )
    queue = layer_of(4, 5, k=2, room=0.5)
    assert not torch.allclose(queue(x.flip(1), Tape()), queue(x, Tape()).flip(1), atol=1e-3)


@torch.no_grad()
def test_the_class_token_is_routed(images: Callable[..., Tensor]) -> None:
    """It is item 0: sent elsewhere in the last block it changes the logits, a patch sent elsewhere there does not."""
    model, x = made(KINDS["hard"]), images(5)
    free = model.run(x)
    for item, changes in ((0, True), (1, False)):
        routing = free.trace[ROUTERS[1]]
        index = routing.index.clone()
        index[:, item] = (index[:, item] + 1) % 3
        logits = model.run(x, forced={ROUTERS[1]: Routing(routing.logits, index, routing.weight)}).logits
        assert bool((logits != free.logits).any(1).all()) == changes


@torch.no_grad()
def test_dual_models_of_two(images: Callable[..., Tensor]) -> None:
    model, x = build_model(f"dual({KINDS['vmoe']}, {KINDS['expert']})", 4, (3, 8, 8)), images(5)
    free = model.run(x)
    assert list(free.trace) == [f"{half}.{name}" for half in ("standard", "robust") for name in ROUTERS]
    assert torch.equal(model.run(x, forced=free.trace).logits, free.logits)
    for alpha, half in ((0.0, model.standard), (1.0, model.robust)):
        assert torch.equal(model.at(alpha)(x), half(x))


# ------------------------------------------------------------------------------------------------ batch mates


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_claim_7_an_image_does_not_depend_on_its_batch(kind: str, images: Callable[..., Tensor]) -> None:
    """Alone, among others, in another order; no image gives no logits. Rounding apart, and routes exactly."""
    model, x = made(KINDS[kind]), images(8)
    whole = model.run(x)
    assert model(x[:0]).shape == (0, 4)
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    parts = [(torch.arange(8)[i : i + 1], x[i : i + 1]) for i in range(8)] + [
        (order, x[order]),
        (order[:3], x[order[:3]]),
    ]
    for rows, given in parts:
        found = model.run(given)
        torch.testing.assert_close(found.logits, whole.logits[rows], rtol=1e-4, atol=1e-5)
        for name, routing in whole.trace.items():
            assert torch.equal(found.trace[name].chosen(), routing[rows].chosen())


@pytest.mark.parametrize("given, status", [("", "pass"), (", group=4, capacity=0.7", "fail")])
def test_evaluation_sees_who_shares_room(given: str, status: str, images: Callable[..., Tensor]) -> None:
    model, x = made(f"vit_moe({SMALL}, k=1{given})"), images(8)
    assert harness.alone(on(model, Batch(x, torch.zeros(8, dtype=torch.long), torch.arange(8)))).status == status


def grouped(given: dict[str, object]) -> tuple[TokenMoE, Tensor]:
    """A layer of 8 experts with room for 5 of the 32 tokens of a group of two images, and such a group: in the second
    image, 6 tokens are for expert 0, clearly and in falling order; the first image has none for it.
    """
    layer = layer_of(8, 8, room=1.25, group=2, **given)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(8))
    tokens = 1 + torch.arange(16) % 7
    victims = tokens.clone()
    victims[4:10] = 0
    x = 3.0 * F.one_hot(torch.stack([tokens, victims]), 8).double()
    return layer, x


@torch.no_grad()
@pytest.mark.parametrize("order", ["vanilla", "priority"])
def test_claim_7_with_shared_room_one_image_empties_anothers_experts(order: str) -> None:
    """The attack across images: 16 tokens, first in the group (and sure of themselves), all on expert 0. Of its 6
    victims one was dropped before; now all are. With a group of one, nothing changes.
    """
    layer, x = grouped({"order": order})
    attacked = x.clone()
    attacked[0] = 0.0
    attacked[0, :, 0] = 5.0
    for group, lost in ((2, (1, 6)), (1, (3, 3))):  # alone: ceil(16 * 1.25 / 8) = 3 of the 6 have room
        layer.rules = layer_of(8, 8, room=1.25, group=group, order=order).rules
        answers = []
        for given, dropped in zip((x, attacked), lost, strict=True):
            tape = Tape()
            answers.append(layer(given, tape)[1])
            weight = tape.trace["router"].weight[1, 4:10]
            assert int((weight == 0).sum()) == dropped
            assert bool((answers[-1][4:10][weight[:, 0] == 0] == 0).all())  # it skips the layer
        assert torch.allclose(*answers, rtol=1e-9, atol=1e-9) == (group == 1)


@torch.no_grad()
def test_rerouted_where_tokens_are_dropped() -> None:
    """Of the second image's 16 tokens: victim 6 of 6 is dropped both times (no share, or changed), the other five only
    after: 5 of 15 changed, or 6 of 16 as the paper's code counts. The first image: all its 16 changed experts.
    """
    layer, x = grouped({})
    attacked = x.clone()
    attacked[0] = 0.0
    attacked[0, :, 0] = 5.0
    before, after = Tape(), Tape()
    layer(x, before)
    layer(attacked, after)
    for empty, expected in (("left out", [1.0, 5 / 15]), ("changed", [1.0, 6 / 16])):
        assert rerouted(before.trace, after.trace, empty)["router"].tolist() == pytest.approx(expected)


@torch.no_grad()
def test_groups_are_images_in_a_row() -> None:
    """Three groups of 2, 2 and 1 images: each as if it were alone, its room by its own tokens."""
    layer = layer_of(4, 3, k=2, room=0.7, group=2, order="priority")
    x = torch.randn(5, 9, 4, dtype=torch.float64)
    alone = torch.cat([layer(part, Tape()) for part in x.split(2)])
    torch.testing.assert_close(layer(x, Tape()), alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x[1:], Tape()), alone[1:], atol=1e-3)
    tape = Tape()
    layer(x, tape)
    load = tape.trace["router"].chosen().sum(1)
    room = [9, 9, 5]  # ceil(18 * 2 * 0.7 / 3) and ceil(9 * 2 * 0.7 / 3)
    counts = torch.stack([load[0] + load[1], load[2] + load[3], load[4]])
    assert bool((counts <= torch.tensor(room)[:, None]).all())
    assert bool((counts == torch.tensor(room)[:, None]).any(1).all())


# ------------------------------------------------------------------------------------------------ noise and gradients


@torch.no_grad()
@pytest.mark.parametrize("experts, gating", [(3, "vmoe"), (8, "renormalised"), (5, "hard")])
def test_claim_8_training_noise_has_deviation_one_over_experts(
    experts: int, gating: str, images: Callable[..., Tensor]
) -> None:
    """About 64 * 65 * e numbers: 1 % is less than two standard errors. The image's own: it does not depend on the
    batch; each router's differs.
    """
    text = f"vit_moe({SMALL.replace('experts=3', f'experts={experts}')}, k=2, gating={gating})"
    model, x = made(text, image=32), images(64, 3, 32, 32)
    noise = Noise.of(torch.arange(64), 5)
    found = model.run(x, noise=noise).trace
    drawn = {name: routing.noisy - routing.logits for name, routing in found.items()}
    for value in drawn.values():
        assert float(value.std()) == pytest.approx(1 / experts, rel=0.02)
        assert float(value.mean()) == pytest.approx(0, abs=0.02 / experts)
    assert float(torch.corrcoef(torch.stack([v.flatten() for v in drawn.values()]))[0, 1]) == pytest.approx(0, abs=0.03)
    part = model.run(x[7:9], noise=noise[7:9]).trace
    for name, routing in part.items():
        torch.testing.assert_close(routing.noisy - routing.logits, drawn[name][7:9], rtol=0, atol=1e-5)
        best = routing.noisy.argsort(dim=-1, descending=True)[..., :2]
        assert torch.equal(routing.index, best)
    free = model.run(x)
    assert all(routing.noisy is None for routing in free.trace.values())
    assert torch.equal(model(x), free.logits)
    assert not torch.equal(model.run(x, noise=noise).logits, free.logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "straight_through", "expert", "slots", "off"])
def test_the_others_have_no_noise(kind: str, images: Callable[..., Tensor]) -> None:
    model, x = made({**KINDS, "off": f"vit_moe({SMALL}, k=2, noise=False)"}[kind]), images(4)
    assert torch.equal(model.run(x, noise=Noise.of(torch.arange(4))).logits, model(x))


@pytest.mark.parametrize(
    "given, moves",
    [
        ({"k": 1, "gating": "renormalised"}, False),  # its weight is 1 whatever the logits
        ({"k": 1, "gating": "vmoe"}, True),
        ({"k": 2, "gating": "renormalised"}, True),
        ({"k": 2, "gating": "hard"}, False),
        ({"k": 1, "gating": "straight_through"}, True),
        ({"choice": "expert"}, True),
    ],
)
def test_claim_10_the_routers_gradient(given: dict[str, object], moves: bool) -> None:
    """Through the output, and through a capacity just so."""
    for room in (None, 0.8):
        layer = layer_of(4, 5, **{"room": room, **given})
        layer(torch.randn(2, 9, 4, dtype=torch.float64), Tape()).square().sum().backward()
        gradient = layer.router.weight.grad
        assert (gradient is not None and float(gradient.abs().max()) > 1e-6) == moves
        assert float(layer.experts.w1.grad.abs().max()) > 1e-6


class Blind(TokenRouter):
    """A router that hides from the attack."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize("kind", ["vmoe", "renormalised", "soft", "hard", "room", "expert", "slots", "blind"])
def test_claim_27_the_images_gradient_is_the_slope(kind: str, images: Callable[..., Tensor]) -> None:
    """By finite differences in float64: routers let the gradient through, and one that did not would be seen."""
    model, x = made(KINDS["vmoe" if kind == "blind" else kind]).double(), images(6).double()
    if kind == "blind":
        for layer in model.layers().values():
            weights = layer.router.state_dict()
            layer.router = Blind(16, 3).double()
            layer.router.load_state_dict(weights)
    direction = torch.randn_like(x)
    at = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(at)[:, 0].sum(), at)
    up, down = (model(x + step * direction)[:, 0].detach() for step in (1e-6, -1e-6))
    slope = (gradient * direction).flatten(1).sum(1)
    assert torch.allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-6) == (kind != "blind")


@pytest.mark.parametrize("gating, moves", [("renormalised", False), ("vmoe", True)])
def test_equal_experts_starve_a_renormalised_router(gating: str, moves: bool, images: Callable[..., Tensor]) -> None:
    """V-MoE's start: all experts alike, so only the mass of the gates can move the output."""
    model = build_model(f"vit_moe({SMALL}, k=2, gating={gating}, equal_experts=True)", 4, (3, 8, 8))
    F.cross_entropy(model(images(8)), torch.arange(8) % 4).backward()
    for layer in model.layers().values():
        gradient, scale = layer.router.weight.grad, layer.experts.w1.grad
        assert (float(gradient.norm()) > 1e-3 * float(scale.norm())) == moves


@torch.no_grad()
@pytest.mark.parametrize("experts, k, mass", [(8, 1, 0.1286), (8, 2, 0.2557), (32, 2, 0.0648)])
def test_claim_9_the_v_moe_gates_of_a_fresh_router_scale_a_block(experts: int, k: int, mass: float) -> None:
    """With equal experts the layer is the MLP times the sum of the chosen gates: about k / e, more exactly
    (k + s * sum of the k largest of e normals on average) / e for logits of deviation s = 0.02: 1.4236 of 8, 0.8522
    after it; 2.0697 and 1.6502 of 32. Renormalised it is the MLP.
    """
    layer = layer_of(64, experts, k=k)
    for parameter in layer.experts.parameters():
        parameter.copy_(parameter[:1].expand_as(parameter).clone())
    torch.nn.init.normal_(layer.router.weight, std=0.02 / 8)
    x, tape = torch.randn(8, 50, 64, dtype=torch.float64), Tape()
    found, dense = layer(x, tape), mlp(layer.experts, 0, x)
    gates = tape.trace["router"].weight.sum(-1, keepdim=True)
    assert float(gates.mean()) == pytest.approx(mass, rel=0.01)
    torch.testing.assert_close(found, gates * dense, rtol=1e-10, atol=1e-12)
    layer.rules = layer_of(64, experts, k=k, gating="renormalised").rules
    torch.testing.assert_close(layer(x, Tape()), dense, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ sizes and settings


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("vit_moe(vmoe_small, placement=last_2)", (5, 7)),  # V-MoE S
        ("vit_moe(vmoe_base, placement=every_2)", (1, 3, 5, 7, 9, 11)),
        ("vit_moe", (9, 11)),
        ("vit_moe(depth=5, placement=every_2)", (1, 3)),
        ("vit_moe(depth=5, placement=last_1)", (3,)),
        ("vit_moe(placement=(5, 2, 5))", (2, 5)),
    ],
)
def test_placement(text: str, blocks: tuple[int, ...]) -> None:
    described = specs.build(text, "model")
    assert isinstance(described, ViTMoE)
    assert described.places() == blocks
    with torch.device("meta"):
        small = ViTMoE(width=4, heads=2, depth=described.backbone.depth, experts=2, placement=described.placement)
        model = build_model(small, 4, (3, 16, 16))
    assert list(model.layers()) == [f"network.blocks.{i}.mlp.router" for i in blocks]
    assert specs.build(specs.text(described), "model") == described


def dense_parameters(width: int, depth: int, hidden: int, patch: int, tokens: int, classes: int) -> int:
    block = 4 * width + 4 * width * (width + 1) + hidden * (width + 1) + width * (hidden + 1)
    return depth * block + width * (1 + tokens + 3 * patch**2 + 1 + 2) + (width + 1) * classes


@pytest.mark.parametrize(
    "text, image, d, depth, h, patch, routed, e, router",
    [
        ("vit_moe(vmoe_small, patch=32, experts=32, placement=every_2)", 224, 512, 8, 2048, 32, 4, 32, 32 * 512),
        ("vit_moe(vmoe_small, patch=32, experts=8, placement=last_2)", 224, 512, 8, 2048, 32, 2, 8, 8 * 512),
        ("vit_moe(small, patch=4, k=1)", 32, 384, 12, 1536, 4, 2, 8, 8 * 384),
        ("vit_moe(tiny, patch=4, mlp_ratio=2, choice=expert)", 32, 192, 12, 384, 4, 2, 8, 8 * 192),
        ("vit_moe(tiny, patch=4, choice=slots, slots=3)", 32, 192, 12, 768, 4, 2, 8, 3 * 8 * 192 + 1),
    ],
)
def test_parameters_by_formula(
    text: str, image: int, d: int, depth: int, h: int, patch: int, routed: int, e: int, router: int
) -> None:
    tokens, one = 1 + (image // patch) ** 2, h * (d + 1) + d * (h + 1)
    expected = dense_parameters(d, depth, h, patch, tokens, 10) + routed * ((e - 1) * one + router)
    found = costs(text, 10, (3, image, image))
    assert (found.parameters, found.router_parameters) == (expected, routed * router)


def test_v_moe_s_has_as_many_parameters_more_than_vit_s_as_published() -> None:
    """Riquelme et al. 2021, table 2: 36.5 million dense, 296.9 with 32 experts in every second block."""
    shape = (3, 224, 224)
    sparse = costs("vit_moe(vmoe_small, patch=32, experts=32, placement=every_2)", 10, shape)
    dense = costs("vit(patch=32, width=512, depth=8, heads=8)", 10, shape)
    assert (sparse.parameters - dense.parameters) / 1e6 == pytest.approx(296.9 - 36.5, abs=0.1)


@pytest.mark.parametrize(
    "fields, routed, router",
    [
        ("k=1", lambda t, e, d, h: 2 * t * d * h, lambda t, e, d: t * d * e),
        ("k=2", lambda t, e, d, h: 2 * 2 * t * d * h, lambda t, e, d: t * d * e),
        ("k=2, dispatch=loop", lambda t, e, d, h: 2 * 2 * t * d * h, lambda t, e, d: t * d * e),
        ("gating=soft", lambda t, e, d, h: e * 2 * t * d * h + t * e * d, lambda t, e, d: t * d * e),
        ("choice=expert", lambda t, e, d, h: e * -(-t // e) * 2 * d * h, lambda t, e, d: t * d * e),
        (
            "choice=slots, slots=2",
            lambda t, e, d, h: 2 * e * 2 * d * h + 2 * t * 2 * e * d,
            lambda t, e, d: t * d * 2 * e,
        ),
    ],
)
@pytest.mark.parametrize("experts", [3, 6])
def test_multiply_adds_by_formula(
    fields: str, routed: Callable[..., int], router: Callable[..., int], experts: int
) -> None:
    """Width 16, 4 blocks of which 2 are routed, hidden 32, 17 tokens of 16 x 16 pixels. On a real image the same: at
    constant k they do not grow with the experts but for the router. (Expert choice: ceil(17 / e) tokens an expert. The
    mean of all experts' answers, of soft gates, and those over slots are products too.)
    """
    text = f"vit_moe(patch=4, width=16, depth=4, heads=2, mlp_ratio=2, experts={experts}, placement=every_2, {fields})"
    t, d, h = 17, 16, 32
    attention = 4 * t * d * d + 2 * t * t * d
    expected = 3 * 16 * d * (t - 1) + 4 * attention + 2 * 2 * t * d * h + 7 * d
    expected += 2 * (routed(t, experts, d, h) + router(t, experts, d))
    found = costs(text, 7, (3, 16, 16))
    assert (found.macs, found.router_macs) == (expected, 2 * router(t, experts, d))
    assert costs(build_model(text, 7, (3, 16, 16)), 7, (3, 16, 16)) == found


@torch.no_grad()
@pytest.mark.parametrize(
    "image, patch, kind",
    [
        (8, 4, "k=2"),
        (32, 4, "choice=expert"),
        (64, 8, "choice=slots"),
        (224, 16, "k=1"),
        (384, 16, "k=2, capacity=1.05"),
    ],
)
def test_images_from_8_to_384_pixels(image: int, patch: int, kind: str, images: Callable[..., Tensor]) -> None:
    model = build_model(
        f"vit_moe(patch={patch}, width=8, depth=2, heads=2, experts=4, placement=(1,), {kind})", 5, (3, image, image)
    )
    out = model.run(images(2, 3, image, image))
    assert out.logits.shape == (2, 5)
    assert out.logits.isfinite().all()
    assert out.trace[ROUTERS[0]].logits.shape == (2, 1 + (image // patch) ** 2, 4)


@pytest.mark.parametrize("kind", ["vmoe", "straight_through", "room", "expert", "slots"])
@pytest.mark.parametrize("precision, tolerance", [("strict", 1e-5), ("fast", 0.05)])
def test_copies_to_attack(kind: str, precision: str, tolerance: float, images: Callable[..., Tensor]) -> None:
    """ "fast" is bf16 under autocast; the routers, the logits and the image's gradient stay in float32."""
    model, x = made(KINDS[kind]), images(12)
    copied = frozen_copy(model, x, precision)
    assert ("bf16" in copied.note) == (precision == "fast")
    trace = {name: routing.detach() for name, routing in model.run(x).trace.items()}
    found = []
    for each in (model, copied):
        at = x.clone().requires_grad_(True)
        out = each.run(at, forced=trace)
        assert all(routing.logits.dtype == torch.float32 for routing in out.trace.values())
        found.append((out.logits.detach(), *torch.autograd.grad(out.logits[:, 0].sum(), at)))
    for own, other in zip(*found, strict=True):
        assert other.dtype == torch.float32
        assert float((other - own).norm() / own.norm()) < tolerance


@pytest.mark.parametrize(
    "given, message",
    [
        ("k=9", "k must be between 1 and the number of experts, 8; got 9"),
        ("k=0", "k must be between 1 and the number of experts, 8; got 0"),
        ("group=0", "group must be at least 1; got 0"),
        ("multiple=0", "multiple must be at least 1; got 0"),
        ("choice=slots, slots=0", "slots must be at least 1; got 0"),
        ("capacity=0", r"capacity must be above 0, or none; got 0\.0"),
        ("choice=expert, gating=hard", "choice=expert takes gating=vmoe or gating=renormalised; got 'hard'"),
        ("choice=slots, capacity=1", "choice=slots drops no token; expected no capacity"),
        ("placement=(12,)", r"placement must name blocks from 0 to 11; got \(12,\)"),
        ("placement=()", r"placement must name blocks from 0 to 11; got \(\)"),
        ("placement=last_7", r"placement must be every_2, last_N with N from 1 to 6 \(of 12 blocks\), .*got 'last_7'"),
        ("placement=odd", "placement must be every_2, .* numbers of blocks such as .*; got 'odd'"),
        ("depth=1", r"placement must be .* \(of 1 blocks\)"),
        ("width=10, heads=3", "width must be a multiple of heads, 3; got 10"),
        ("gating=none", "gating"),
        ("patch=5", "images of 32 x 32 pixels cannot be cut into patches of 5"),
    ],
)
def test_bad_settings_are_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(f"vit_moe({given})", 4, (3, 32, 32))
    assert "\n" not in str(caught.value)


def test_a_forced_routing_of_other_tokens_is_refused(images: Callable[..., Tensor]) -> None:
    model, x = made(KINDS["vmoe"]), images(3)
    wrong = {ROUTERS[0]: soft(torch.zeros(3, 4, 3))}
    with pytest.raises(ValueError, match=r"is for \(images, items\) = \(3, 4\), this batch has \(3, 5\)"):
        model.run(x, forced=wrong)


def test_a_sparse_model_is_a_routed_model() -> None:
    assert isinstance(made(KINDS["vmoe"]), RoutedModel)
