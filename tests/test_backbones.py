"""The architectures of AdvMoE: what is routed, second implementations of their networks, slim twins, odd image sizes,
folding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.costs import costs
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.models import Backbone, BatchNorm2d, RoutedModel, build_model
from robustmoe.models.convolution import Conv, Layers, RoutedConv, routed_layers
from robustmoe.models.densenet import Transition
from robustmoe.models.small import Downsampled, Linear
from robustmoe.routing import to_expert

TINY = {
    "resnet10": "resnet10(width=4, stem=imagenet)",
    "wide": "wide_resnet(depth=16, width=1)",
    "wide_imagenet": "wide_resnet(depth=10, width=2, stem=imagenet)",
    "wide_released": "wide_resnet(depth=16, width=1, released=True)",
    "preact": "preact_resnet(depth=10, width=4, shortcut=conv3, activation=silu, padding=same)",
    "vgg16": "vgg16(width=4)",
    "dense": "densenet(depth=16, growth=4)",
}


@pytest.fixture(params=TINY)
def backbone(request: pytest.FixtureRequest) -> str:
    """Each architecture, tiny."""
    return TINY[request.param]


def built(text: str) -> Backbone:
    made = specs.build(text, "model")
    assert isinstance(made, Backbone)
    return made


def randomise(model: nn.Module) -> None:
    """BatchNorm statistics and scales that are not 0 and 1, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)


# ------------------------------------------------------------------------------------------------ what is routed


@pytest.mark.parametrize(
    "text, routed, shared",
    [
        # research/advmoe.md, 4.1; shared convolutions: the stem, and in ResNet's CIFAR form the projections (with
        # ratio below 1 one for every stage)
        ("resnet18", 16, 1 + 4),
        ("resnet34", 32, 1 + 4),
        ("resnet50", 48, 1 + 4),
        ("resnet18(stem=imagenet)", 19, 1),
        ("resnet50(stem=imagenet)", 52, 1),
        ("wrn_28_10", 27, 1),
        ("wrn_28_10(stem=imagenet)", 27, 1),
        ("wrn_28_10(released=True)", 27, 1),
        ("preact_resnet18", 19, 1),
        ("preact_resnet50", 52, 1),
        ("vgg16", 12, 1),
        ("densenet40", 2 * 18 + 2, 1),  # ours: two convolutions a layer, and the two transitions
        ("densenet121", 2 * 58 + 3, 1),
    ],
)
def test_how_many_convolutions_are_routed(text: str, routed: int, shared: int) -> None:
    with torch.device("meta"):
        network = built(text).make(10, (3, 32, 32), routed_layers(2), 0.5)
    banks = [module for module in network.modules() if isinstance(module, RoutedConv)]
    assert len(banks) == routed
    assert all(len(module.experts) == 2 for module in banks)
    assert sum(isinstance(module, Conv) for module in network.modules()) - 2 * routed == shared


def test_wide_resnet50_2_has_the_published_size() -> None:
    """torchvision's documentation: 68,883,240 parameters at 1000 classes, and 11.40 GFLOPS at 224 pixels."""
    counted = costs("resnet50(stem=imagenet, inner=2)", 1000, (3, 224, 224))
    assert counted.parameters == 68_883_240
    assert counted.macs / 1e9 == pytest.approx(11.40, abs=0.01)


@pytest.mark.parametrize("ratio, widths", [(0.5, [32, 64, 128, 256]), (0.8, [51, 102, 204, 409])])
def test_the_widths_of_resnet18(ratio: float, widths: list[int]) -> None:
    """Four routed convolutions each (C2); widths are rounded down."""
    with torch.device("meta"):
        network = built("resnet18").make(10, (3, 32, 32), routed_layers(2), ratio)
    banks = [module.experts[0].out_channels for module in network.modules() if isinstance(module, RoutedConv)]
    assert banks == [width for width in widths for _ in range(4)]
    assert network.stem.out_channels == 64


@pytest.mark.parametrize("ratio, experts", [(0.3, 2), (0.77, 8)])
def test_any_ratio_and_number_of_experts(
    backbone: str, ratio: float, experts: int, images: Callable[..., Tensor]
) -> None:
    """With a router a stage and BatchNorms of their own: every expert answers, each in its own way."""
    text = f"pathway({backbone}, experts={experts}, ratio={ratio}, router=linear, routers=stage, norm=own)"
    model, x = build_model(text, 4, (3, 8, 8)), images(2)
    randomise(model)
    trace = model.run(x).trace
    assert all(routing.num_experts == experts for routing in trace.values())
    answers = torch.stack([model.run(x, forced=to_expert(trace, k)).logits for k in range(experts)])
    assert torch.isfinite(answers).all()
    for k in range(1, experts):
        assert not torch.allclose(answers[k], answers[k - 1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("text", [*TINY.values(), "resnet50(width=4, stem=imagenet)", "densenet121(growth=4)"])
def test_a_pathway_has_the_slim_networks_shapes(text: str) -> None:
    """Exactly, where the stem is scaled (not in ResNet's CIFAR form)."""
    spec = built(text)
    with torch.device("meta"):
        pathway = spec.make(4, (3, 8, 8), Layers(routed=True), 0.6).state_dict()
        slim = spec.make(4, (3, 8, 8), ratio=0.6).state_dict()
    assert {name: value.shape for name, value in pathway.items()} == {name: value.shape for name, value in slim.items()}


@pytest.mark.parametrize("extra", ["", ", routers=stage, norm=own"])
@torch.no_grad()
def test_forcing_an_expert_is_the_slim_network_of_its_bank(
    backbone: str, extra: str, images: Callable[..., Tensor]
) -> None:
    """Expert k's filters (and BatchNorms), with the shared stem and head, transplanted into the slim dense network."""
    x = images(5)
    model = build_model(f"pathway({backbone}, experts=3, ratio=0.5, router=linear{extra})", 4, (3, 8, 8))
    randomise(model)
    trace, answers = model.run(x).trace, []
    for k in range(3):
        slim = built(backbone).make(4, (3, 8, 8), ratio=0.5).eval()
        bank = {
            name.replace(f".experts.{k}.", "."): value
            for name, value in model.network.state_dict().items()
            if ".experts." not in name or f".experts.{k}." in name
        }
        slim.load_state_dict(bank)
        forced = model.run(x, forced=to_expert(trace, k)).logits
        expected = slim(model.normalise(x))
        torch.testing.assert_close(forced, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        answers.append(forced)
    assert not torch.allclose(answers[0], answers[1], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------ written again


class Written:
    """Layers by name from a state dict, in functions: what the networks below are written with."""

    def __init__(self, network: nn.Module) -> None:
        self.state = network.state_dict()

    def conv(self, x: Tensor, name: str, stride: int = 1, same: bool = False) -> Tensor:
        weight = self.state[f"{name}.weight"]
        if same and stride == 2 and weight.shape[-1] == 3:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def active(self, x: Tensor, name: str, silu: bool = False) -> Tensor:
        x = self.unit(x, name)
        return x / (1 + torch.exp(-x)) if silu else x.clamp(min=0)

    def unit(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def start(self, x: Tensor, imagenet: bool) -> Tensor:
        """The stem of pre-activation networks; max-pooling of what is not negative may pad with zeros."""
        if not imagenet:
            return self.conv(x, "stem")
        x = F.pad(self.active(self.conv(x, "stem", 2), "norm"), (1, 1, 1, 1))
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def in_advance(net: Written, x: Tensor, reads: str = "active", silu: bool = False, same: bool = False) -> Tensor:
    """He et al. 2016b, and Zagoruyko and Komodakis 2016: both branches of a block that changes the shape start from
    ReLU(BatchNorm(x)); the others add x itself. Where ``reads`` is "raw" or "conv3" the shortcut alone starts from x,
    where it is "released" both do.
    """
    x = net.start(x, "norm.weight" in net.state)
    blocks = sorted({tuple(map(int, key.split(".")[1:3])) for key in net.state if key.startswith("stages")})
    for stage, position in blocks:
        at, stride = f"stages.{stage}.{position}", 2 if stage and not position else 1
        changes = f"{at}.shortcut.weight" in net.state
        ready = x if reads == "released" and changes else net.active(x, f"{at}.norm1", silu)
        if f"{at}.conv3.weight" in net.state:
            out = net.active(net.conv(ready, f"{at}.conv1"), f"{at}.norm2", silu)
            out = net.active(net.conv(out, f"{at}.conv2", stride, same), f"{at}.norm3", silu)
            out = net.conv(out, f"{at}.conv3")
        else:
            out = net.conv(net.active(net.conv(ready, f"{at}.conv1", stride, same), f"{at}.norm2", silu), f"{at}.conv2")
        assert changes == (stride == 2 or x.shape[1] != out.shape[1])
        x = out + (net.conv(ready if reads == "active" else x, f"{at}.shortcut", stride, same) if changes else x)
    x = net.active(x, "last", silu) if "last.weight" in net.state else x
    return net.linear(x.mean((2, 3)), "head")


def densely(net: Written, x: Tensor, layers: int, imagenet: bool) -> Tensor:
    """Huang et al. 2017, DenseNet-BC; images whose sides can be halved."""
    x = net.start(x, imagenet)
    for stage in range(3):
        for position in range(layers):
            at = f"stages.{stage}.0.{position}"
            out = net.conv(net.active(x, f"{at}.norm1"), f"{at}.conv1")
            x = torch.cat([x, net.conv(net.active(out, f"{at}.norm2"), f"{at}.conv2")], 1)
        if stage < 2:
            x = net.conv(net.active(x, f"stages.{stage}.1.norm"), f"stages.{stage}.1.conv")
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    return net.linear(net.active(x, "last").mean((2, 3)), "head")


def plainly(net: Written, x: Tensor) -> Tensor:
    """VGG-16 with BatchNorm on 16 x 16 pixels: four poolings leave 1 x 1, which stands for all of 2 x 2."""
    x = net.active(net.conv(x, "stem"), "norm")
    for stage, convolutions in enumerate((1, 2, 3, 3, 3)):
        for position in range(convolutions):
            x = net.active(net.conv(x, f"stages.{stage}.{position}.conv"), f"stages.{stage}.{position}.norm")
        if stage < 4:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    x = x.expand(-1, -1, 2, 2).flatten(1)
    for name in ("head.0", "head.2"):
        x = net.linear(x, name).clamp(min=0)
    return net.linear(x, "head.4")


@pytest.mark.parametrize(
    "text, again",
    [
        ("wide_resnet(depth=16, width=2)", in_advance),
        ("wide_resnet(depth=10, width=1)", in_advance),
        ("wide_resnet(depth=10, width=2, stem=imagenet)", in_advance),
        ("wide_resnet(depth=16, width=2, released=True)", partial(in_advance, reads="released")),
        ("wide_resnet(depth=10, width=2, stem=imagenet, released=True)", partial(in_advance, reads="released")),
        ("wide_resnet(16, 2, activation=silu, padding=same)", partial(in_advance, silu=True, same=True)),
        ("preact_resnet(depth=10, width=4)", in_advance),
        ("preact_resnet(depth=10, width=4, stem=imagenet)", in_advance),
        ("preact_resnet(depth=18, width=2, shortcut=raw, last_norm=False)", partial(in_advance, reads="raw")),
        ("preact_resnet(depth=50, width=2)", in_advance),
        ("preact_resnet(50, 2, shortcut=raw, padding=same)", partial(in_advance, reads="raw", same=True)),
        (
            "preact_resnet(depth=18, width=2, shortcut=conv3, activation=silu, padding=same)",
            partial(in_advance, reads="conv3", silu=True, same=True),
        ),
        ("densenet(depth=16, growth=4)", lambda net, x: densely(net, x, 2, False)),
        ("densenet(depth=10, growth=4, stem=imagenet)", lambda net, x: densely(net, x, 1, True)),
        ("vgg16(width=4)", plainly),
    ],
)
@torch.no_grad()
def test_networks_written_a_second_time(
    text: str, again: Callable[[Written, Tensor], Tensor], images: Callable[..., Tensor]
) -> None:
    network = built(text).network(4, (3, 16, 16)).double().eval()
    randomise(network)
    x = images(3, 3, 16, 16).double()
    torch.testing.assert_close(network(x), again(Written(network), x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_imagenet_stem_by_hand() -> None:
    """An image of 9 x 9 pixels: 5 behind the convolution, 3 behind the pooling. One bright pixel, a filter of ones: the
    convolution sees it wherever |2 i - 4| <= 3, the pooling where any of these is near.
    """
    network = built("resnet10(width=1, stem=imagenet)").network(2, (1, 9, 9)).eval()
    network.stem.weight.fill_(1.0)
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 3.0
    seen = F.relu(network.norm(network.stem(x)))[0, 0]
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 3.0  # i = 1, 2, 3
    torch.testing.assert_close(seen, expected / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(network.entry(x)[0, 0], torch.full((3, 3), 3.0 / (1 + 1e-5) ** 0.5))


@torch.no_grad()
def test_a_transition_rounds_an_odd_side_up() -> None:
    """3 x 3 pixels to 2 x 2: the last row and column are averages of what there is."""
    layer = Transition(1, 1, Layers()).eval()
    layer.conv.weight.fill_(1.0)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    expected = torch.tensor([[(0 + 1 + 3 + 4) / 4, (2 + 5) / 2], [(6 + 7) / 2, 8.0]]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(layer(x, None)[0, 0], expected)


# ------------------------------------------------------------------------------------------------ images of any size


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 13, 5), (3, 1, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_odd_images_and_a_batch_of_one(
    backbone: str, shape: tuple[int, int, int], training: bool, images: Callable[..., Tensor]
) -> None:
    """What enters a stage is what the network says (a router of that stage is built for it)."""
    network = built(backbone).make(5, shape, ratio=0.7).train(training)
    entered: list[tuple[int, ...]] = []
    for stage in network.stages:
        stage.register_forward_pre_hook(lambda module, args: entered.append(tuple(args[0].shape[1:])))
    for n in (1, 2):
        entered.clear()
        logits = network(images(n, *shape))
        assert logits.shape == (n, 5)
        assert torch.isfinite(logits).all()
        assert entered == network.inputs


@pytest.mark.parametrize("extra", ["", ", routers=stage, norm=own"])
def test_gradients_reach_every_parameter_of_the_experts_used(
    backbone: str, extra: str, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Forced to expert 1: its filters and all that is shared move, expert 0's get nothing. Freely: the router moves."""
    x = images(8)
    model = build_model(f"pathway({backbone}, experts=2, ratio=0.6, router=linear{extra})", 4, (3, 8, 8)).train()
    trace = model.run(x).trace
    F.cross_entropy(model.run(x, forced=to_expert(trace, 1)).logits, labels(8)).backward()
    for name, parameter in model.network.named_parameters():
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved == (".experts.0." not in name), name
    F.cross_entropy(model(x), labels(8)).backward()
    routers = [parameter for name, parameter in model.named_parameters() if name.startswith("router")]
    assert routers
    assert all(parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in routers)


# ------------------------------------------------------------------------------------------------ smaller images


def test_downsampling_by_hand() -> None:
    """4 x 6 pixels to 2 x 2: each of the new ones is the mean of 2 x 3 old ones. A side that is short enough stays."""
    network = Downsampled(Linear(), size=2).network(3, (1, 4, 6))
    x = torch.rand(2, 1, 4, 6)
    small = x.view(2, 1, 2, 2, 2, 3).mean((3, 5))
    torch.testing.assert_close(network(x), network.inner(small))
    network = Downsampled(Linear(), size=4).network(3, (1, 4, 6))
    assert network.size == (4, 4)
    network = Downsampled(Linear(), size=64).network(3, (1, 4, 6))
    assert torch.equal(network(x), network.inner(x))


def test_a_downsampled_router_reads_every_pixel_also_in_bfloat16(images: Callable[..., Tensor]) -> None:
    """7 pixels to 3: the parts overlap (0-2, 2-4, 4-6), none is left out; pixels are averaged in float32."""
    network = Downsampled(Linear(), size=3).network(2, (3, 7, 7))
    seen: list[torch.dtype] = []
    network.inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for autocast in (False, True):
        x = images(4, 3, 7, 7).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(x)
        (gradient,) = torch.autograd.grad(out[:, 0].float().sum(), x)
        assert (gradient != 0).all()
        inside = network.inner.head.weight[0].detach().view(3, 3, 3)
        corner = torch.full((3,), 1 / 9) * inside[:, 0, 0]  # the corner pixel is in one part of nine
        torch.testing.assert_close(gradient[0, :, 0, 0], corner, rtol=0.01 if autocast else 1e-5, atol=1e-6)
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    "text, message",
    [
        ("wide_resnet(depth=12)", r"depth must be 6n \+ 4 with n at least 1, such as 10, 16, 28; got 12"),
        ("wide_resnet(depth=4)", "depth must be 6n"),
        ("wide_resnet(width=0)", "width must be at least 1; got 0"),
        ("preact_resnet(width=0)", "width must be at least 1; got 0"),
        ("preact_resnet(depth=20)", r"depth must be one of \[10, 18, 34, 50\]; got 20"),
        ("preact_resnet(activation=gelu)", "argument 'activation': unknown name 'gelu'; did you mean 'relu' or 'silu'"),
        ("resnet18(width=0)", "width must be at least 1; got 0"),
        ("resnet(depth=18, inner=2)", "inner must be 1, or more at depth 50; got 2 at depth 18"),
        ("vgg16(width=0)", "width must be at least 1; got 0"),
        ("densenet(depth=41)", r"depth must be 6n \+ 4, such as 40 or 100, or one of \[121, 169, 201\]; got 41"),
        ("densenet(growth=0)", "growth must be at least 1; got 0"),
        ("downsampled(linear, size=0)", "size must be at least 1; got 0"),
        ("pathway(densenet(growth=3), ratio=0.2)", "ratio 0.2 of width 3 leaves no channel"),
        ("resnet18(stem=tiny)", "argument 'stem': unknown name 'tiny'; known: cifar, imagenet"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(text, 4, (3, 8, 8))


# ------------------------------------------------------------------------------------------------ folding

FOLDED = [
    # Basic blocks fold wholly. A pre-activation block folds its second BatchNorm alone (the first reads a sum, a
    # concatenation or a pooled map), and the stem's where it has one. A WRN's CIFAR stem feeds the first BatchNorm
    # directly, a DenseNet's also the concatenation, a narrow WRN's and a PreAct ResNet's the first block's sum.
    ("resnet10(width=4, stem=imagenet)", 1 + 4 * 2 + 3, 1 + 4 * 2 + 3),
    ("wide_resnet(depth=10, width=2)", 1 + 3, 3 * 2 + 1),
    ("wide_resnet(depth=16, width=2, stem=imagenet)", 1 + 6, 1 + 6 * 2 + 1),
    ("wide_resnet(depth=10, width=1)", 3, 3 * 2 + 1),
    ("wide_resnet(depth=16, width=2, released=True)", 6, 3 + 3 * 2 + 1),
    ("preact_resnet(depth=10, width=4, activation=silu, padding=same)", 4, 4 * 2 + 1),
    ("vgg16(width=4)", 13, 13),
    ("densenet(depth=16, growth=4)", 6, 6 * 2 + 2 + 1),
    ("densenet(depth=10, growth=4, stem=imagenet)", 1 + 3, 1 + 3 * 2 + 2 + 1),
]


@pytest.mark.parametrize("text, folded, norms", FOLDED)
@pytest.mark.parametrize("form", ["{}", "pathway({}, experts=3, ratio=0.5, router=small_cnn(width=4))"])
@torch.no_grad()
def test_frozen_copies_fold_what_follows_a_convolution(
    text: str, folded: int, norms: int, form: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny(form.format(text)), images(12)
    randomise(model)
    assert sum(isinstance(module, BatchNorm2d) for module in model.modules()) == norms
    copy = frozen_copy(model, x)
    assert (copy.folded, copy.note) == (folded, f"a frozen copy, {folded} of {norms} BatchNorms folded")
    exact = model.run(x)
    found = copy.climbed.run(x, forced=exact.trace).logits
    torch.testing.assert_close(found, exact.logits, rtol=1e-3, atol=1e-4 * float(exact.logits.abs().max()))
