"""Models: the identities of forced runs, parameter and operation counts by formula, and the contract of every table
entry.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustmoe import spec as specs
from robustmoe.models import (
    MODELS,
    LayerExperts,
    Output,
    Pathway,
    ResNet,
    RoutedModel,
    as_routed,
    build_model,
    resnet18,
    resnet20,
)
from robustmoe.models.convolution import Layers, RoutedConv, Segments, routed_layers
from robustmoe.models.resnet import BLOCKS
from robustmoe.routing import Tape, soft, to_expert, to_rank, top_k
from tiny_models import in_turn

# ------------------------------------------------------------------------------------------------ forced runs


@torch.no_grad()
def test_forcing_a_models_own_trace_changes_nothing(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    x = images(16)
    free = model.run(x)
    forced = model.run(x, forced=free.trace)
    assert torch.equal(forced.logits, free.logits)
    assert torch.equal(model(x), free.logits)
    assert forced.trace.keys() == free.trace.keys()
    for name, routing in free.trace.items():
        for field in ("logits", "index", "weight"):
            assert torch.equal(getattr(forced.trace[name], field), getattr(routing, field))


@torch.no_grad()
def test_forcing_expert_i_of_an_ensemble_is_expert_i_alone(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    x = images(10)
    for name in ("ensemble_hard", "ensemble_soft", "ensemble_k2", "ensemble_straight"):
        model = tiny(name)
        for i, expert in enumerate(model.experts):
            alone = model.run(x, forced=to_expert(model.run(x).trace, i)).logits
            torch.testing.assert_close(alone, expert(model.normalise(x)), rtol=0, atol=1e-6)


def randomise_statistics(model: nn.Module) -> None:
    """Running statistics and scales that are not 0 and 1, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize(
    "spec", ["resnet8(width=8)", "resnet(depth=50, width=4)", "resnet(depth=14, width=4, shortcut=pad)"]
)
@torch.no_grad()
def test_forcing_expert_i_of_a_pathway_is_a_slim_dense_network(spec: str, images: Callable[..., Tensor]) -> None:
    """Its filters are expert i's bank, its BatchNorms, stem, shortcuts and head the shared ones: a transplant."""
    x = images(6)
    model = build_model(f"pathway({spec}, experts=3, ratio=0.5, router=small_cnn(width=4))", 4, (3, 8, 8))
    randomise_statistics(model)
    backbone = specs.build(spec, "model")
    answers = []
    for i in range(3):
        slim = backbone.make(4, (3, 8, 8), Layers(routed=True), 0.5).eval()
        bank = {
            name.replace(f".experts.{i}.", "."): value
            for name, value in model.network.state_dict().items()
            if ".experts." not in name or f".experts.{i}." in name
        }
        slim.load_state_dict(bank)
        forced = model.run(x, forced=to_expert(model.run(x).trace, i)).logits
        torch.testing.assert_close(forced, slim(model.normalise(x)), rtol=1e-5, atol=1e-5)
        answers.append(forced)
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


@torch.no_grad()
def test_a_pathways_batch_comes_back_in_its_order(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Each image answered by its own expert: the rows of the free run are rows of the three forced ones."""
    model, x = tiny("pathway"), images(16)
    free = model.run(x)
    chosen = free.trace["router"].index[:, 0, 0]
    assert chosen.unique().tolist() == [0, 1, 2]
    every = torch.stack([model.run(x, forced=to_expert(free.trace, i)).logits for i in range(3)], 1)
    torch.testing.assert_close(free.logits, every[torch.arange(16), chosen], rtol=0, atol=1e-5)


def test_a_pathway_refuses_what_it_cannot_do(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("pathway"), images(4)
    trace = model.run(x).trace
    with pytest.raises(ValueError, match="takes one expert an image; the routing has k = 2"):
        model.run(x, forced={"router": top_k(trace["router"].logits, 2)})
    with pytest.raises(ValueError, match="a pathway model's forced weights must be 1"):
        model.run(x, forced={"router": top_k(trace["router"].logits, 1, "vmoe")})
    with pytest.raises(ValueError, match="a routed convolution needs the batch's segments"):
        RoutedConv(2, 3, 4, 3, 1)(x)


@torch.no_grad()
def test_a_soft_ensemble_is_the_weighted_sum(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    x = images(8)
    for spec in (
        "ensemble_soft",
        "ensemble(small_cnn(width=4), experts=3, gate=soft, router=small_cnn, mix=probabilities)",
    ):
        model = tiny(spec)
        gate = torch.softmax(model.router(model.normalise(x)), -1)
        outputs = torch.stack([expert(model.normalise(x)) for expert in model.experts], 1)
        if model.mix == "probabilities":
            expected = (gate[..., None] * torch.softmax(outputs, -1)).sum(1).log()
            torch.testing.assert_close(model(x).exp().sum(1), torch.ones(8))
        else:
            expected = (gate[..., None] * outputs).sum(1)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_a_dense_model_has_no_trace(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    assert tiny("dense").run(images(3)).trace == {}


@pytest.mark.parametrize(
    "name, routers", [("dense", r"\[\]"), ("pathway", r"\['router'\]"), ("ensemble_hard", r"\['router'\]")]
)
def test_forcing_a_router_that_does_not_exist_is_refused(
    name: str, routers: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    forced = {"rooter": top_k(torch.zeros(3, 1, 2))}
    with pytest.raises(ValueError, match=rf"forced routing for \['rooter'\], but this model's routers are {routers}"):
        tiny(name).run(images(3), forced=forced)


def test_the_gradient_of_the_image_is_contiguous(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    """As the image is: attacks of other libraries call ``gradient.view(n, -1)``."""
    x = images(5).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert gradient.is_contiguous()
    assert (gradient != 0).any()


def test_forcing_a_routing_of_another_batch_is_refused(routed: RoutedModel, images: Callable[..., Tensor]) -> None:
    trace = routed.run(images(4)).trace
    items = next(iter(trace.values())).logits.shape[1]
    message = rf"is for \(images, items\) = \(4, {items}\), this batch has \(3, {items}\)"
    with pytest.raises(ValueError, match=message):
        routed.run(images(3), forced=trace)


# ------------------------------------------------------------------------------------------------ a user's own model


class Mine(RoutedModel):
    """What a user writes: ten lines."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(192, 2)
        self.experts = nn.ModuleList(nn.Linear(192, 4) for _ in range(2))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = x.flatten(1)
        routing = tape("router", top_k(self.router(x)[:, None], k=1, gating="vmoe"))
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outputs[torch.arange(len(x))[:, None], routing.index[:, 0]]
        return (picked * routing.weight[:, 0, :, None]).sum(1)


class Two(RoutedModel):
    """Two routed parts after one another: a user's model inside a user's model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mine(), Mine()

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return self.first.body(x, tape.under("first")) - self.second.body(x, tape.under("second"))


@torch.no_grad()
def test_a_users_model_is_a_model_like_ours(images: Callable[..., Tensor]) -> None:
    model, x = Mine(), images(6)
    logits, trace = model.run(x)
    assert logits.shape == (6, 4)
    assert torch.equal(model.run(x, forced=trace).logits, logits)
    for i in range(2):
        torch.testing.assert_close(
            model.run(x, forced=to_expert(trace, i)).logits, model.experts[i](x.flatten(1)), rtol=0, atol=1e-6
        )


@torch.no_grad()
def test_two_routers_are_forced_apart(images: Callable[..., Tensor]) -> None:
    model, x = Two(), images(6)
    trace = model.run(x).trace
    assert list(trace) == ["first.router", "second.router"]
    one = {"second.router": to_expert(trace, 1)["second.router"]}
    out = model.run(x, forced=one)
    expected = model.first(x) - model.second.experts[1](x.flatten(1))
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(out.trace["first.router"].index, trace["first.router"].index)
    assert torch.equal(out.trace["second.router"].logits, trace["second.router"].logits)
    last = model.run(x, forced=to_rank(trace, 1)).trace  # of two experts, the second is the other one
    assert all(torch.equal(last[name].index, 1 - trace[name].index) for name in trace)


def test_a_users_model_without_prefixes_is_told_so(images: Callable[..., Tensor]) -> None:
    class Clash(Two):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            return self.first.body(x, tape) - self.second.body(x, tape)

    with pytest.raises(ValueError, match="two routers are named 'router' in one pass"):
        Clash()(images(2))


def test_token_routers_may_have_several_items(images: Callable[..., Tensor]) -> None:
    """A router of four patches: (n, t, e) with t = 4; forcing and ranks work a patch at a time."""

    class Patches(RoutedModel):
        def body(self, x: Tensor, tape: Tape) -> Tensor:
            patches = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)  # (n, 4)
            routing = tape("router", soft(torch.stack([patches, 1 - patches, patches * 0], -1)))
            return torch.zeros(len(x), 4, 3).scatter(-1, routing.index, routing.weight).sum(1)

    x, model = images(5), Patches()
    logits, trace = model.run(x)
    assert trace["router"].logits.shape == (5, 4, 3)
    assert torch.equal(model.run(x, forced=trace).logits, logits)
    assert model.run(x, forced=to_expert(trace, 2)).logits.tolist() == [[0.0, 0.0, 4.0]] * 5


def test_any_callable_is_routed_with_an_empty_trace(images: Callable[..., Tensor]) -> None:
    x, network = images(3), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model = as_routed(network)
    assert isinstance(model.run(x), Output)
    assert model.run(x).trace == {}
    assert torch.equal(model(x), network(x))
    assert as_routed(model) is model


# ------------------------------------------------------------------------------------------------ counts


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def formula(depth: int, width: int, classes: int, experts: int = 1, ratio: float = 1.0) -> int:
    """Parameters of a CIFAR ResNet with projections: k * k * in * out a convolution, 2 a BatchNorm channel, the head.

    Main-branch convolutions count ``experts`` times at ``ratio`` of the width.
    """
    total, inputs = 3 * width * 9 + 2 * width, width
    for stage, blocks in enumerate(BLOCKS[depth]):
        w = int(ratio * width * 2**stage)
        out = 4 * w if depth == 50 else w
        for block in range(blocks):
            if depth == 50:
                total += experts * (inputs * w + 9 * w * w + w * out) + 2 * (2 * w + out)
            else:
                total += experts * (9 * inputs * w + 9 * w * w) + 4 * w
            if inputs != out or (stage > 0 and block == 0):
                total += inputs * out + 2 * out
            inputs = out
    return total + inputs * classes + classes


PUBLISHED = [
    # depth, dense, MoE of two half-width pathways; GMAC dense and of one pathway (research/advmoe.md, section 4.2)
    (18, 11_173_962, 5_565_450, 0.5554, 0.1517),
    (34, 21_282_122, 10.620e6, 1.1594, 0.3027),
    (50, 23_520_842, 11.075e6, 1.2978, 0.3310),
]


def macs(network: nn.Module, segments: Segments | None) -> int:
    """Multiply-adds of one 32-pixel image, counted by torch on tensors without values."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32, device="meta"), segments)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("depth, dense, moe, dense_gmac, pathway_gmac", PUBLISHED)
def test_counts_are_those_of_the_paper(
    depth: int, dense: int, moe: float, dense_gmac: float, pathway_gmac: float
) -> None:
    spec = ResNet(depth, 64)
    with torch.device("meta"):
        network = spec.network(10, (3, 32, 32)).eval()
        routed = spec.make(10, (3, 32, 32), routed_layers(2), 0.5).eval()
    assert parameters(network) == dense == formula(depth, 64, 10)
    assert parameters(routed) == formula(depth, 64, 10, experts=2, ratio=0.5)
    assert parameters(routed) == pytest.approx(moe, rel=1e-4)
    assert macs(network, None) / 1e9 == pytest.approx(dense_gmac, rel=1e-3)
    one = torch.ones(1, device="meta")
    for sizes in ([1, 0], [0, 1]):
        assert macs(routed, Segments(sizes, one)) / 1e9 == pytest.approx(pathway_gmac, rel=1e-3)


def test_the_papers_router_and_its_whole_model() -> None:
    """ResNet-20 with padded shortcuts: 269,202 parameters with two outputs, 0.0406 GMAC; with ResNet-18 5,834,652."""
    with torch.device("meta"):
        router = resnet20().network(2, (3, 32, 32)).eval()
    # three stages of six convolutions, 16, 32, 64 channels: no shortcut has parameters
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    assert parameters(router) == 269_202 == convolutions + 2 * (16 + 6 * (16 + 32 + 64)) + 64 * 2 + 2
    assert macs(router, None) / 1e9 == pytest.approx(0.0406, rel=2e-3)
    assert Pathway(resnet18()).router == resnet20()
    assert 5_565_450 + 269_202 == 5_834_652
    model = build_model("pathway(resnet18)", 10, (3, 32, 32))
    assert (parameters(model.network), parameters(model.router), parameters(model)) == (5_565_450, 269_202, 5_834_652)


@pytest.mark.parametrize("depth", sorted(set(BLOCKS) - {18, 34, 50}))
@pytest.mark.parametrize("width, ratio, experts", [(4, 1.0, 1), (8, 0.5, 3), (5, 0.7, 2)])
def test_every_depth_has_the_formulas_parameters(depth: int, width: int, ratio: float, experts: int) -> None:
    with torch.device("meta"):
        network = ResNet(depth, width).make(7, (3, 8, 8), routed_layers(experts), ratio)
    assert parameters(network) == formula(depth, width, 7, experts, ratio)


def test_padded_shortcuts_by_hand() -> None:
    """Subsampled, and the two new channels are zeros, one on either side."""
    block = ResNet(20, 2, "pad").make(3, (1, 4, 4)).stages[1][0].shortcut
    x = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    out = block(x)[0]
    assert out[[0, 3]].abs().max() == 0
    assert out[1].tolist() == [[0, 2], [8, 10]]
    assert out[2].tolist() == [[16, 18], [24, 26]]


# ------------------------------------------------------------------------------------------------ the table

CASES = {
    "resnet": ["resnet(depth=14, width=4, shortcut=pad)"],
    "resnet8": ["resnet8(width=4)"],
    "resnet10": ["resnet10(width=4)"],
    "resnet18": ["resnet18(width=2)"],
    "resnet20": ["resnet20(width=4)"],
    "resnet34": ["resnet34(width=2)"],
    "resnet50": ["resnet50(width=2)", "resnet50(width=2, inner=2)"],
    "preact_resnet": ["preact_resnet(depth=10, width=2, shortcut=conv3, activation=silu, padding=same)"],
    "preact_resnet18": ["preact_resnet18(width=2)"],
    "preact_resnet34": ["preact_resnet34(width=2, last_norm=False)"],
    "preact_resnet50": ["preact_resnet50(width=2)"],
    "wide_resnet": ["wide_resnet(depth=10, width=2)"],
    "wrn_28_10": [],  # 36 million parameters: counted in test_backbones.py; wide_resnet is the same network, smaller
    "vgg16": ["vgg16(width=4)"],
    "densenet": ["densenet(depth=10, growth=4)"],
    "densenet40": ["densenet40(growth=2)"],
    "densenet121": [],  # 430 layers: built in test_backbones.py
    "vit": ["vit(patch=4, width=8, depth=2, heads=2)"],
    "vit_tiny": [],  # vit of another size: counted in test_vit.py
    "vit_small": [],
    "vit_base": [],
    "vit_moe": ["vit_moe(tiny, patch=4, width=8, depth=2, heads=2, experts=3, placement=(1,), choice=slots)"],
    "linear": ["linear"],
    "small_cnn": ["small_cnn"],
    "conv_small": ["conv_small(width=4, hidden=8)"],
    "downsampled": ["downsampled(resnet8(width=4), size=6)"],
    "resized": ["resized(vit(patch=6, width=8, depth=1, heads=2), size=12)", "resized(resnet8(width=4), size=6)"],
    "ensemble": [
        "ensemble(resnet8(width=4), experts=2, standardise=True)",
        "ensemble(small_cnn, experts=3, k=2, gate=hard, router=linear)",
        "ensemble(small_cnn, experts=2, gate=renormalised)",
        "ensemble(small_cnn, experts=3, k=2, gate=renormalised)",
        "ensemble(small_cnn, experts=2, gate=vmoe, standardise=True, mix=probabilities)",
        "ensemble(linear, experts=2, gate=soft)",
        "ensemble(vit(patch=4, width=8, depth=1, heads=2), experts=2, router=linear)",
    ],
    "slim": ["slim(resnet8(width=4), ratio=0.5)"],
    "pruned": ["pruned(resnet8(width=4), ratio=0.5)"],
    "block_moe": [
        "block_moe(resnet10(width=4), experts=2)",
        "block_moe(resnet8(width=4), stages=(2, 3), experts=3, k=2, router=gap_fc, blocks=last)",
        "block_moe(wide_resnet(depth=10, width=1), stages=(3,), experts=2, router=gap_fc, gate=vmoe, standardise=True)",
        "block_moe(resnet8(width=4), stages=(2,), experts=3, router=conv3_gap, noise=0.1, capacity=1.5)",
        "block_moe(resnet8(width=4), stages=(3,), experts=3, router=double_conv)",
    ],
    "conv_moe": [
        "conv_moe(resnet10(width=4), experts=2, router=gap_fc)",
        "conv_moe(resnet8(width=4), stages=(3,), experts=3, k=3, shortcuts=True)",
        "conv_moe(resnet8(width=4), stages=(2, 3), experts=2, convs=last, standardise=True)",
    ],
    "pathway": [
        "pathway(resnet8(width=4), experts=2, standardise=True)",
        "pathway(resnet50(width=4), experts=3, ratio=0.6, router=linear, standardise=True)",
        "pathway(resnet8(width=4), experts=2, router=small_cnn, norm=own)",
        "pathway(resnet8(width=4), experts=2, router=small_cnn, routers=stage)",
        "pathway(resnet8(width=4), experts=2, router=small_cnn, routers=stage, norm=own)",
        "pathway(resnet10(width=4, stem=imagenet), experts=2, router=linear)",
        "pathway(wide_resnet(depth=10, width=1), experts=2, router=linear, norm=own)",
        "pathway(wide_resnet(depth=10, width=1, released=True, padding=same), experts=2, router=linear)",
        "pathway(preact_resnet(depth=10, width=2), experts=2, router=linear)",
        "pathway(vgg16(width=4), experts=2, router=downsampled(linear, size=4))",
        "pathway(densenet(depth=10, growth=4), experts=2, router=linear, routers=stage)",
    ],
    "dual": [
        "dual(small_cnn(width=4), ensemble(resnet8(width=4), experts=2, router=linear), alpha=0.9, sharpen=nuts)",
        "dual(small_cnn(width=4), small_cnn(width=4), mix=logits, mixer=small_cnn(width=4))",
    ],
    "patch_resnet": ["patch_resnet(width=4)"],
    "affine": [
        "affine(resnet8(width=4), experts=4)",
        "affine(patch_resnet(width=4, patch=2), experts=3, gate=straight_through, routers=image)",
        "affine(wide_resnet(depth=10, width=1), experts=3, gate=vmoe, k=2, routers=norm, stages=(2,))",
        "affine(vgg16(width=4), experts=2, pool=1)",
        "affine(densenet(depth=10, growth=4), experts=2, gate=hard)",
    ],
}
SPECS = [spec for cases in CASES.values() for spec in cases]


def still(spec: str) -> bool:
    """The router's weight is a constant: no gradient can reach it from the output."""
    return "gate=hard" in spec or ("gate=renormalised" in spec and "k=2" not in spec)


def test_every_model_of_the_table_stands_under_the_contract() -> None:
    assert set(CASES) == set(MODELS)


@pytest.mark.parametrize("shape, spec", in_turn([((3, 8, 8),), ((1, 12, 8),)], SPECS))
@torch.no_grad()
def test_built_models_answer_and_are_made_by_their_seed_alone(
    spec: str, shape: tuple[int, int, int], images: Callable[..., Tensor]
) -> None:
    before = torch.get_rng_state()
    model = build_model(spec, 5, shape, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    twin, other = build_model(spec, 5, shape, seed=3), build_model(spec, 5, shape, seed=4)
    assert not any(module.training for module in model.modules())
    x = images(6, *shape)
    logits = model(x)
    assert logits.shape == (6, 5)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert torch.equal(twin(x), logits)
    assert not torch.equal(other(x), logits)
    assert model.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_float64_and_bfloat16(spec: str, images: Callable[..., Tensor]) -> None:
    """In float64 everything is float64; under bf16 autocast logits and router logits are float32, and near the exact
    ones.
    """
    x = images(6)
    model = build_model(spec, 4, (3, 8, 8))
    exact = model.run(x)
    wide = build_model(spec, 4, (3, 8, 8)).double()
    for training in (True, False):
        out = wide.train(training).run(x.double())
        assert out.logits.dtype == torch.float64
        assert all(r.logits.dtype == r.weight.dtype == torch.float64 for r in out.trace.values())
        with torch.autocast("cpu", torch.bfloat16):
            half = model.train(training).run(x)
        assert half.logits.dtype == torch.float32
        assert all(r.logits.dtype == r.weight.dtype == torch.float32 for r in half.trace.values())
    with torch.autocast("cpu", torch.bfloat16):
        half = build_model(spec, 4, (3, 8, 8)).run(x, forced=exact.trace)
    torch.testing.assert_close(half.logits, exact.logits, rtol=0.05, atol=0.05 * float(exact.logits.abs().max()))
    torch.testing.assert_close(
        build_model(spec, 4, (3, 8, 8)).double()(x.double()).float(), exact.logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("spec", SPECS)
def test_in_training_every_parameter_gets_a_gradient_where_declared(
    spec: str, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """With every expert used (forced in turn where a fresh router would send all to one); the router of a constant
    gate not.
    """
    x, y = images(12), labels(12)
    model = build_model(spec, 4, (3, 8, 8)).train()
    for module in model.modules():
        if isinstance(module, LayerExperts):  # a fresh one is 0, and its router without effect
            nn.init.normal_(module.experts)
    fresh = model.run(x)
    loss = nn.functional.cross_entropy(fresh.logits, y)
    for name, routing in fresh.trace.items():
        for i in range(routing.num_experts):
            loss = loss + nn.functional.cross_entropy(model.run(x, forced=to_expert({name: routing}, i)).logits, y)
    loss.backward()
    for name, parameter in model.named_parameters():
        if "standardise" in spec and name.endswith("router.network.head.bias"):
            continue  # a BatchNorm follows: its gradient is 0 but for rounding
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved != (still(spec) and "router." in name), name


def test_the_routers_gradient_of_a_pathway_is_the_straight_through_sum() -> None:
    """d loss / d logit of the chosen expert = sum over routed layers of <dL/dh, h>, by finite differences."""
    model = build_model("pathway(resnet8(width=4), experts=2, router=linear)", 4, (3, 8, 8)).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    routing = model.run(x).trace["router"]
    (found,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), torch.tensor([1])), model.router.head.bias)

    def loss(scale: float) -> float:
        convolutions = [module for module in model.network.modules() if isinstance(module, RoutedConv)]
        assert len(convolutions) == 6
        hooks = [module.register_forward_hook(lambda module, args, out: scale * out) for module in convolutions]
        logits = model(x)
        for hook in hooks:
            hook.remove()
        return float(nn.functional.cross_entropy(logits, torch.tensor([1])).detach())

    slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    expected = torch.zeros(2, dtype=torch.float64)
    expected[int(routing.index)] = slope
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("resnet(depth=9)", "depth must be one of"),
        ("resnet8(width=0)", "width must be at least 1; got 0"),
        ("small_cnn(width=0)", "width must be at least 1; got 0"),
        ("conv_small(width=4, hidden=0)", "width and hidden must be at least 1; got 4 and 0"),
        ("ensemble(small_cnn, experts=2, k=3)", "k must be between 1 and the number of experts, 2; got 3"),
        ("pathway(resnet8, experts=0)", "experts must be at least 1; got 0"),
        ("pathway(resnet8, ratio=1.5)", r"ratio must be in \(0, 1\]; got 1.5"),
        ("pathway(resnet8(width=4), ratio=0.1)", "ratio 0.1 of width 4 leaves no channel"),
    ],
)
def test_bad_settings_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(spec, 4, (3, 8, 8))


def test_normalisation_is_inside_the_model(images: Callable[..., Tensor]) -> None:
    """A model of mean m and std s answers x as one of mean 0 and std 1 answers (x - m) / s."""
    x = images(4)
    model = build_model("resnet8(width=4)", 4, (3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5))
    plain = build_model("resnet8(width=4)", 4, (3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(model(x), plain((x - mean) / std))
