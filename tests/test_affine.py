"""Affine experts: the definition in closed form, identities of the tape, upcycling, what moves in training, costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.attacks import PGD, AutoAttackRouting, linf
from robustmoe.costs import costs
from robustmoe.errors import UserError
from robustmoe.models import AffineModel, AffineNorm, LayerExperts, RoutedModel, affine, build_model
from robustmoe.models.affine import LowRankExperts, MergedConv, Numbers
from robustmoe.noise import Noise
from robustmoe.recipe import load_recipe
from robustmoe.routing import Routing, Trace, soft, to_expert
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.checkpoint import save_weights
from robustmoe.training.optimisation import SGD
from robustmoe.training.starting import start_from

SHAPE, CLASSES = (3, 8, 8), 4
BACKBONE = "resnet(depth=14, width=4)"  # three stages of two blocks
SPECS = {
    "soft, a router a block": f"affine({BACKBONE}, experts=5)",
    "soft, a router a norm": f"affine({BACKBONE}, experts=5, routers=norm, pool=1, temperature=0.5)",
    "top-1, straight through": f"affine({BACKBONE}, experts=5, gate=straight_through)",
    "top-2, one router": f"affine({BACKBONE}, experts=5, gate=renormalised, k=2, routers=image)",
    "pre-activation, last stage": "affine(wide_resnet(10, 1), experts=3, stages=(3,))",
    "patches": "affine(patch_resnet(width=6, patch=2), experts=3, gate=vmoe)",
    "kernels alone": f"affine({BACKBONE}, experts=0, kernels=3, routers=norm)",
    "kernels of rank 2 besides": f"affine({BACKBONE}, experts=5, kernels=5, rank=2)",
}
ROUTERS = [6, 12, 6, 1, 1, 2, 12, 12]
BY_REGION = {
    "soft": "affine(patch_resnet(width=6, patch=2), experts=5, grid=2)",
    "top-1": f"affine({BACKBONE}, experts=5, gate=straight_through, grid=2, routers=norm)",
}


def trained(text: str, x: Tensor, seed: int = 0) -> AffineModel:
    """In float64, with experts, statistics and scales as after training."""
    model = build_model(text, CLASSES, SHAPE, seed=seed).double()
    assert isinstance(model, AffineModel)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayerExperts):
                module.experts.normal_(0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        for _ in range(8):
            model.train().run(x)
    return model.eval()


@pytest.fixture
def x(images: Callable[..., Tensor]) -> Tensor:
    return images(12, *SHAPE).double()


@pytest.fixture(params=SPECS)
def model(request: pytest.FixtureRequest, x: Tensor) -> AffineModel:
    return trained(SPECS[request.param], x)


# ------------------------------------------------------------------------------------------------ the definition


@pytest.fixture(params=[0, affine.FEW], ids=["as large maps", "as small maps"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of a test are small: without this they would never go the way of large ones in eval mode."""
    monkeypatch.setattr(affine, "FEW", request.param)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_norm_is_batch_norm_with_scale_and_shift_of_each_image(x: Tensor, training: bool, fused: bool) -> None:
    x = x.contiguous(memory_format=torch.channels_last)
    norm = AffineNorm(3, place=7).double().train(training)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        assert tensor is not None
        tensor.uniform_(0.5, 1.5)
    added = torch.randn(len(x), 2, 3, dtype=x.dtype)
    mean, var = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (norm.running_mean, norm.running_var)
    )
    assert mean is not None
    assert var is not None
    expected = torch.empty_like(x)
    for n, d in itertools.product(range(len(x)), range(3)):
        unit = (x[n, d] - mean[d]) / torch.sqrt(var[d] + norm.eps)
        expected[n, d] = (norm.weight[d] + added[n, 0, d]) * unit + norm.bias[d] + added[n, 1, d]
    torch.testing.assert_close(norm(x, Numbers({7: added.flatten(1)}, fused)), expected)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("side", [6, 5])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_norm_by_region_has_the_numbers_of_the_region_of_each_pixel(side: int, training: bool, fused: bool) -> None:
    """Five rows do not fall into two alike: the first region has three."""
    norm = AffineNorm(3, place=0).double().train(training)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        assert tensor is not None
        tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    added = torch.randn(2, 2, 2, 2, 3, dtype=x.dtype)  # image, row, column, scale or shift, channel
    unit = norm.unit(x)
    expected = torch.empty_like(x)
    for n, i, j in itertools.product(range(2), range(side), range(side)):
        scale, shift = added[n, i * 2 // side, j * 2 // side]
        expected[n, :, i, j] = (norm.weight + scale) * unit[n, :, i, j] + norm.bias + shift
    torch.testing.assert_close(norm(x, Numbers({0: added.view(8, 6)}, fused)), expected)


@pytest.mark.parametrize("name", BY_REGION)
@torch.no_grad()
def test_regions_that_decide_alike_are_the_model_without_regions(name: str, x: Tensor) -> None:
    """One expert everywhere, and mixtures that are the same in all regions of an image."""
    model, whole = (trained(text, x) for text in (BY_REGION[name], BY_REGION[name].replace(", grid=2", "")))
    state = model.state_dict()
    whole.load_state_dict({key: state[key] for key in whole.state_dict()})
    free = model.run(x)
    assert all(routing.index.shape[:2] == (len(x), 4) for routing in free.trace.values())
    assert torch.equal(model.run(x, forced=free.trace).logits, free.logits)
    assert torch.equal(model(x), free.logits)
    for expert in (0, 4):
        alone = [each.run(x, forced=to_expert(each.run(x).trace, expert)).logits for each in (model, whole)]
        torch.testing.assert_close(*alone)
    mixtures = {key: soft(r.logits[:, :1]) for key, r in free.trace.items()}
    four = {
        key: Routing(*(each.expand(-1, 4, -1) for each in (r.logits, r.index, r.weight))) for key, r in mixtures.items()
    }
    torch.testing.assert_close(model.run(x, forced=four).logits, whole.run(x, forced=mixtures).logits)
    assert not torch.allclose(model.run(x, forced=four).logits, free.logits, atol=1e-4)


@torch.no_grad()
def test_a_region_sees_the_image_and_itself(x: Tensor) -> None:
    model = trained("affine(patch_resnet(width=6, patch=2, blocks=1), experts=3, pool=1, grid=2)", x)
    (routing,) = model.run(x).trace.values()
    entering = model.network.entry(model.normalise(x))
    router = model.get_submodule("affine.0.router")

    def unit(features: Tensor, name: str) -> Tensor:
        norm = router.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        return norm(features[:, :, None, None])[:, :, 0, 0]

    whole = router.get_submodule("head")(unit(entering.mean((2, 3)), "norm"))
    for region, (i, j) in enumerate(itertools.product((0, 2), (0, 2))):
        own = unit(entering[:, :, i : i + 2, j : j + 2].mean((2, 3)), "region_norm")
        torch.testing.assert_close(routing.logits[:, region], whole + router.get_submodule("region_head")(own))


@torch.no_grad()
def test_a_region_is_answered_alike_in_any_batch_and_upcycles(x: Tensor) -> None:
    model = trained(BY_REGION["soft"], x)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), model(x))
    assert model(x[:0]).shape == (0, CLASSES)
    fresh = build_model(BY_REGION["soft"], CLASSES, SHAPE, seed=1).double().eval()
    dense = build_model(specs.build(BY_REGION["soft"], "model").backbone, CLASSES, SHAPE, seed=2).double().eval()
    fresh.load_state_dict(dense.state_dict(), strict=False)
    torch.testing.assert_close(fresh(x), dense(x))


def dense_with(model: AffineModel, text: str, rows: dict[int, Tensor]) -> RoutedModel:
    """The backbone whose norms hold, beside their own, the numbers ``rows`` by router."""
    dense = build_model(specs.build(text, "model").backbone, CLASSES, SHAPE).double()
    names = {name for name, _ in dense.named_parameters()} | {name for name, _ in dense.named_buffers()}
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    layers = {each.place: name for name, each in model.named_modules() if isinstance(each, AffineNorm | MergedConv)}
    for number, row in rows.items():
        experts = model.affine[number]
        assert isinstance(experts, LayerExperts)
        for place, part in zip(experts.places, row.split(list(experts.places.values())), strict=True):
            layer = dense.get_submodule(layers[place])
            if isinstance(layer, nn.Conv2d):
                layer.weight.data += part.view(layer.weight.shape)
            else:
                assert isinstance(layer, nn.BatchNorm2d)
                layer.weight.data += part[: len(layer.weight)]
                layer.bias.data += part[len(layer.weight) :]
    return dense.eval()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_an_image_is_answered_by_the_dense_network_of_its_own_mixture(name: str, x: Tensor) -> None:
    """Another way to the same logits: for each image a dense network is built."""
    model = trained(SPECS[name], x)
    free = model.run(x[:3])
    assert len(free.trace) == dict(zip(SPECS, ROUTERS))[name]
    for image in range(3):
        rows = {}
        for name_of, routing in free.trace.items():  # affine.NUMBER.router
            number = int(name_of.split(".")[1])
            experts = model.affine[number]
            assert isinstance(experts, LayerExperts)
            chosen = zip(routing.index[image, 0], routing.weight[image, 0])
            rows[number] = experts.gain * sum(weight * experts.rows()[index] for index, weight in chosen)
        dense = dense_with(model, SPECS[name], rows)
        torch.testing.assert_close(free.logits[image], dense(x[image : image + 1])[0])


@pytest.mark.parametrize("name", [*list(SPECS)[:4], "kernels of rank 2 besides"])
@torch.no_grad()
def test_one_expert_alone_is_a_dense_network(name: str, x: Tensor) -> None:
    model = trained(SPECS[name], x)
    answers = []
    for expert in range(5):
        tables = {number: each for number, each in enumerate(model.affine) if isinstance(each, LayerExperts)}
        dense = dense_with(model, SPECS[name], {i: each.gain * each.rows()[expert] for i, each in tables.items()})
        answers.append(model.run(x, forced=to_expert(model.run(x).trace, expert)).logits)
        torch.testing.assert_close(answers[-1], dense(x))
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


@pytest.mark.parametrize("text, times", [(SPECS["soft, a router a norm"], 6), (BY_REGION["top-1"], 6)])
@torch.no_grad()
def test_averages_of_a_map_are_taken_once(text: str, times: int, x: Tensor) -> None:
    """Two routers a block see the same; so do regions of the size of the fields."""
    model = trained(text, x)
    with mock.patch.object(affine, "field_means", side_effect=affine.field_means) as taken:
        model(x)
    assert taken.call_count == times


@torch.no_grad()
def test_kernels_of_a_rank_are_sums_of_so_many_products() -> None:
    model = trained(SPECS["kernels of rank 2 besides"], torch.rand(4, *SHAPE, dtype=torch.float64))
    own = [each for each in model.affine if isinstance(each, LowRankExperts)]
    assert len(own) == 6
    for each in own:
        start = 0
        for filters, inputs in each.shapes.values():
            for kernel in each.rows()[:, start : start + filters * inputs].view(-1, filters, inputs):
                assert torch.linalg.matrix_rank(kernel) == 2
            start += filters * inputs
        assert start == each.rows().shape[1]
    first = own[0]
    filters, inputs = next(iter(first.shapes.values()))
    left, right = first.experts[3, : 2 * filters].view(filters, 2), first.factors[3, : 2 * inputs].view(2, inputs)
    product = sum(torch.outer(left[:, i], right[i]) for i in range(2))
    torch.testing.assert_close(first.rows()[3, : filters * inputs], product.flatten())


@torch.no_grad()
def test_a_router_sees_what_enters_its_block(x: Tensor) -> None:
    model = trained("affine(patch_resnet(width=6, patch=2, blocks=1), experts=3, temperature=0.5)", x)
    (routing,) = model.run(x).trace.values()
    entering = model.network.entry(model.normalise(x))
    fields = torch.stack([entering[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2)
    router = model.get_submodule("affine.0.router")
    norm, head = router.get_submodule("norm"), router.get_submodule("head")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    unit = (fields.flatten(1) - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
    torch.testing.assert_close(routing.logits[:, 0], head(unit) / 0.5)


# ------------------------------------------------------------------------------------------------ the tape


@torch.no_grad()
def test_forcing_the_own_trace_changes_nothing_and_the_order_of_experts_does_not_matter(
    model: AffineModel, x: Tensor
) -> None:
    free = model.run(x)
    assert set(free.trace) == {f"affine.{i}.router" for i in range(len(model.affine))}
    assert torch.equal(model.run(x, forced=free.trace).logits, free.logits)
    assert torch.equal(model(x), free.logits)  # soft gates are not ranked there
    assert all(routing.logits.shape[:2] == (len(x), 1) for routing in free.trace.values())
    turned = {name: Routing(r.logits, r.index.flip(-1), r.weight.flip(-1)) for name, r in free.trace.items()}
    torch.testing.assert_close(model.run(x, forced=turned).logits, free.logits)


@torch.no_grad()
def test_weights_of_all_experts_may_be_forced_on_any_gate(model: AffineModel, x: Tensor) -> None:
    """All of them, the unchosen at 0: the same sum by the other way of computing it."""
    free = model.run(x)
    every: Trace = {}
    for name, routing in free.trace.items():
        e = routing.num_experts
        index = torch.arange(e).expand(len(x), 1, e)
        weight = torch.zeros_like(routing.logits).scatter(2, routing.index, routing.weight)
        every[name] = Routing(routing.logits, index, weight)
    torch.testing.assert_close(model.run(x, forced=every).logits, free.logits)
    assert not torch.allclose(
        model.run(x, forced={name: soft(-r.logits) for name, r in free.trace.items()}).logits, free.logits, atol=1e-4
    )


@torch.no_grad()
def test_an_image_is_answered_alike_in_any_batch(model: AffineModel, x: Tensor) -> None:
    whole = model(x)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), whole)
    assert model(x[:0]).shape == (0, CLASSES)


# ------------------------------------------------------------------------------------------------ upcycling


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_dense_run_upcycles_exactly(name: str, images: Callable[..., Tensor], tmp_path: Path) -> None:
    x = images(12)
    backbone = specs.build(SPECS[name], "model").backbone
    dense = build_model(backbone, CLASSES, SHAPE, seed=3)
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    for _ in range(20):
        dense.train().run(x)
    save_weights(tmp_path / "dense.safetensors", dense.eval().state_dict(), specs.text(backbone))
    model = build_model(SPECS[name], CLASSES, SHAPE)
    start_from(model, tmp_path / "dense.safetensors")
    expected = dense(x)
    off = (model(x) - expected).abs().max() / expected.abs().max()
    assert off < 1e-6
    forced = to_expert(model.run(x).trace, 1)
    assert (model.run(x, forced=forced).logits - expected).abs().max() / expected.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "gate, moves",
    [("soft", True), ("straight_through", True), ("hard", False), ("vmoe", True), ("renormalised", False)],
)
def test_what_moves_in_training(gate: str, moves: bool, x: Tensor) -> None:
    """At k = 1 the weight of "renormalised" is the constant 1, as that of "hard"."""
    model = trained(f"affine({BACKBONE}, experts=3, gate={gate})", x).float()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    method = build_method("at(pgd(linf(8/255), steps=1))")
    optimisers = [SGD(0.1, 0.0, 0.0).make(phase.parameters(model).values()) for phase in method.phases]
    batch = MiniBatch(x.float(), torch.arange(12) % CLASSES, Noise.of(torch.arange(12)))
    train_step(model.train(), method, optimisers, batch)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    experts = {name for name in before if name.endswith(".experts")}
    heads = {name for name in before if ".router.head" in name}
    assert experts <= moved
    assert heads <= moved if moves else not heads & moved


def test_the_gradient_of_the_soft_gate_is_that_of_the_definition(x: Tensor) -> None:
    """By differences, through both routers, down to the image."""
    model = trained("affine(patch_resnet(width=4, patch=2), experts=3)", x)
    at = x[:1].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(at)[0, 1], at)
    step = torch.randn(x[:1].shape, dtype=x.dtype)
    with torch.no_grad():
        difference = (model(x[:1] + 1e-6 * step)[0, 1] - model(x[:1] - 1e-6 * step)[0, 1]) / 2e-6
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=1e-8)


def test_routers_decide_in_float32_under_autocast(images: Callable[..., Tensor]) -> None:
    x = images(12)
    model = trained(SPECS["soft, a router a block"], x.double()).float()
    exact = model.run(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.run(x)
    for name, routing in half.trace.items():
        assert routing.logits.dtype == routing.weight.dtype == torch.float32
        torch.testing.assert_close(routing.weight.sum(-1), torch.ones(12, 1))
        expected = exact.trace[name].logits
        assert (routing.logits - expected).abs().mean() < 0.1 * expected.abs().mean()


# ------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize("routers, number", [("block", 2), ("norm", 4), ("image", 1)])
@pytest.mark.parametrize("gate, mixed", [("soft", 64), ("straight_through", 1)])
def test_gates_and_mixing_are_counted(routers: str, number: int, gate: str, mixed: int) -> None:
    """By hand: 3 -> 16 channels in patches of 4, on 8 x 8 four 3x3 convolutions, the head; each router 64 features to
    64 scores; each of four norms 32 numbers of every expert that is mixed.
    """
    dense = 3 * 16 * 16 * 64 + 4 * 9 * 16 * 16 * 64 + 16 * 10
    assert costs("patch_resnet").macs == dense == 639_136
    counted = costs(f"affine(patch_resnet, routers={routers}, gate={gate})")
    assert counted.router_macs == number * 64 * 64
    assert counted.macs == dense + number * 64 * 64 + 4 * 32 * mixed
    assert counted.router_parameters == number * (2 * 64 + 64 * 64 + 64)
    assert counted.parameters == costs("patch_resnet").parameters + counted.router_parameters + 4 * 32 * 64
    built = build_model(f"affine(patch_resnet, routers={routers}, gate={gate})", 10, (3, 32, 32))
    assert costs(built) == counted


def test_regions_cost_their_own_features_and_a_mixture_each() -> None:
    counted, whole = (costs(f"affine(patch_resnet{regions})") for regions in (", grid=2", ""))
    assert counted.router_macs - whole.router_macs == 2 * 4 * 16 * 64
    assert counted.macs - whole.macs == 2 * 4 * 16 * 64 + 3 * 4 * 32 * 64
    assert counted.parameters - whole.parameters == 2 * (16 * 64 + 2 * 16)


@pytest.mark.parametrize("rank", [0, 3])
def test_merging_kernels_is_counted(rank: int) -> None:
    """Four convolutions of 16 x 16 x 9, the experts' products of that rank, and a router a block on 64 features."""
    counted = costs(f"affine(patch_resnet, experts=0, kernels=4, rank={rank})")
    kernels = 4 * 16 * 16 * 9
    assert counted.macs == 639_136 + 2 * 64 * 4 + 4 * kernels * (1 + rank)
    experts = 4 * 4 * rank * (16 + 16 * 9) if rank else 4 * kernels
    assert counted.parameters == costs("patch_resnet").parameters + 2 * (2 * 64 + 64 * 4 + 4) + experts


# ------------------------------------------------------------------------------------------------ attacks, bad inputs


@pytest.mark.parametrize("text", [*list(SPECS.values())[:4:2], SPECS["top-2, one router"], *BY_REGION.values()])
def test_the_routing_attacks_take_it(text: str, x: Tensor) -> None:
    """Every part of the suite finds its model, and leaves the images in their ball."""
    model = trained(text, x).float()
    images, y = x[:4].float(), model(x[:4].float()).argmax(1)
    suite = AutoAttackRouting(linf(0.05), steps=2, temperatures=(1.0,))
    parts = [name for name, _ in suite.routing_parts(model.run(images))]
    assert {"experts held", "routers", "joint normalised", "flip", "expert 0", "expert 4"} <= set(parts)
    for _, attack in suite.routing_parts(model.run(images)):
        x_adv = attack(model, images, y, Noise.of(torch.arange(4)))
        assert (x_adv - images).abs().max() <= 0.05 + 1e-6
    wrong = model(PGD(linf(0.3), steps=10)(model, images, y, Noise.of(torch.arange(4)))).argmax(1) != y
    assert wrong.any()


@pytest.mark.parametrize(
    "text, message",
    [
        (f"affine({BACKBONE}, pool=0)", "pool must be at least 1; got 0"),
        (f"affine({BACKBONE}, grid=0)", "grid must be at least 1; got 0"),
        (f"affine({BACKBONE}, kernels=-1)", "kernels must be at least 0; got -1"),
        (f"affine({BACKBONE}, rank=2)", "rank=2 is of kernel experts; expected kernels above 0 with it"),
        (f"affine({BACKBONE}, experts=0, kernels=2, grid=2)", "grid=2 is of affine experts"),
        (f"affine({BACKBONE}, experts=0)", "there is no expert; expected experts or kernels above 0"),
        (f"affine({BACKBONE}, rank=-1)", "rank must be at least 0; got -1"),
        (f"affine({BACKBONE}, temperature=0)", "temperature must be above 0, and finite; got 0"),
        (f"affine({BACKBONE}, experts=2, k=3)", "k must be between 1 and the number of experts, 2; got 3"),
        (f"affine({BACKBONE}, stages=(4,))", "stages must be between 1 and 3 here; got 4"),
        ("affine(patch_resnet(width=0))", "width must be at least 1; got 0"),
        ("affine(patch_resnet(patch=9))", "a patch of 9 pixels does not fit in images of (8, 8)"),
    ],
)
def test_bad_arguments_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(text, CLASSES, SHAPE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipes_of_the_twins_differ_in_the_model_alone() -> None:
    """And in what has no weight decay, and the attacks that know a router."""
    mixture, dense = (load_recipe(f"cifar10_patch_{name}") for name in ("affine", "dense"))
    assert specs.build(mixture.model, "model").backbone == specs.build(dense.model, "model")
    free = replace(specs.build(mixture.optimizer, "optimizer"), undecayed="")
    assert free == specs.build(dense.optimizer, "optimizer")
    assert replace(mixture, model=dense.model, optimizer=dense.optimizer, attacks=dense.attacks) == dense


def test_the_gain_keeps_an_experts_learning_rate(x: Tensor) -> None:
    for text, gain in (("experts=9", 3.0), ("experts=9, gate=vmoe, k=4", 2.0), ("experts=9, gate=hard", 1.0)):
        model = build_model(f"affine({BACKBONE}, {text})", CLASSES, SHAPE)
        assert all(math.isclose(module.gain, gain) for module in model.modules() if isinstance(module, LayerExperts))
