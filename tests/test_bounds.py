"""Bounds of networks over balls: every operation, every architecture, closed forms, and second implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from closed_forms import margin_slopes
from robustmoe import UserError
from robustmoe.attacks.threat import Norm
from robustmoe.certification import Ball, Bounded, Bounding, worst_margins
from robustmoe.certification import bounds as bounds_module
from robustmoe.certification.certify import leaves
from robustmoe.certification.graph import check, record
from robustmoe.certification.nonlinear import Elementwise, Relu, Smooth, gelu, sigmoid, silu, tanh
from robustmoe.certification.operations import Interval
from robustmoe.models import build_model
from robustmoe.models.norm import unit_length
from robustmoe.models.parts import Leaf
from robustmoe.routing import chosen_shares

HOWS: tuple[Bounding, ...] = ("ibp", "crown_ibp", "crown")
NORMS: tuple[Norm, ...] = ("linf", "l2")


def draws(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ball_of(x: Tensor, norm: Norm, eps: float | list[float]) -> Ball:
    sizes = [eps] * len(x) if isinstance(eps, float) else eps
    return Ball(x, norm, torch.tensor(sizes, dtype=x.dtype))


def inside(ball: Ball, points: int) -> Tensor:
    """(points, n, ...) images of the ball inside the box, most of them on its rim."""
    step = normal(points, *ball.x.shape, seed=5)
    step = step.sign() if ball.norm == "linf" else step / step.flatten(2).norm(dim=2)[..., None, None, None]
    step[: points // 4] *= draws(points // 4, 1, 1, 1, 1)
    return (ball.x + ball.eps.view(-1, 1, 1, 1) * step).clamp(0, 1)


def every_output(network: Callable[[Tensor], Tensor], ball: Ball) -> Tensor:
    """Rows that ask for each output and its negative: (2 c, n, c)."""
    with torch.no_grad():
        c = network(ball.x).shape[1]
    unit = torch.eye(c, dtype=ball.x.dtype)
    return torch.cat([unit, -unit])[:, None].expand(-1, len(ball.x), -1)


def least_seen(network: Callable[[Tensor], Tensor], ball: Ball, rows: Tensor, points: int = 100) -> Tensor:
    """(s, n) the least value of each row on sampled images."""
    at = inside(ball, points)
    with torch.no_grad():
        values = torch.stack([network(each) for each in at])
    return torch.einsum("pnc,snc->psn", values, rows).amin(0)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("how", HOWS)
def test_a_linear_network_over_linf_is_its_closed_form(how: Bounding) -> None:
    """min of w . x' + b = w . x + b - eps |w|_1 without the box; with it each pixel goes to its own end."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    weight, bias = network[1].weight, network[1].bias
    for x in (0.4 + 0.2 * draws(3, 3, 2, 2), draws(3, 3, 2, 2)):
        ball = ball_of(x, "linf", [0.1, 0.2, 0.3])
        low, high = (x - ball.eps.view(-1, 1, 1, 1)).clamp(min=0), (x + ball.eps.view(-1, 1, 1, 1)).clamp(max=1)
        ends = torch.where(weight[:, None] > 0, low.flatten(1), high.flatten(1))
        found = Bounded(record(network, x), ball, how).lower(every_output(network, ball))[:4]
        torch.testing.assert_close(found, (weight[:, None] * ends).sum(2) + bias[:, None])
        if x.min() >= 0.3 and x.max() <= 0.7:
            plain = (x.flatten(1) @ weight.T + bias - ball.eps[:, None] * weight.abs().sum(1)).T
            torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("how", HOWS)
def test_a_linear_network_over_l2_is_its_closed_form(how: Bounding) -> None:
    """w . x + b - eps |w|_2 where no pixel comes near the box."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    x = 0.4 + 0.2 * draws(3, 3, 2, 2)
    ball = ball_of(x, "l2", [0.1, 0.2, 0.3])
    found = Bounded(record(network, x), ball, how).lower(every_output(network, ball))
    expected = (network(x) - ball.eps[:, None] * network[1].weight.norm(dim=1)).T
    torch.testing.assert_close(found[:4], expected, rtol=1e-7, atol=1e-9)


def test_the_least_of_a_slope_over_an_l2_ball_in_the_box_is_that_of_a_solver() -> None:
    x = torch.tensor([[0.05, 0.9, 0.5, 0.0]], dtype=torch.float64).view(1, 1, 2, 2).expand(4, -1, -1, -1).contiguous()
    ball = ball_of(x, "l2", [0.05, 0.3, 0.8, 3.0])
    slope = normal(3, 4, 1, 2, 2)
    found = ball.lowest(slope)
    for row in range(3):
        for i, eps in enumerate(ball.eps.tolist()):
            w, at = slope[row, i].flatten().numpy(), x[i].flatten().numpy()
            room: Any = {"type": "ineq", "fun": lambda z, at=at, eps=eps: eps**2 - np.sum((z - at) ** 2)}
            start = np.clip(at - 0.5 * eps * w / np.linalg.norm(w), 0.0, 1.0)
            best = minimize(lambda z, w=w: w @ z, start, method="SLSQP", bounds=[(0, 1)] * 4, constraints=[room])
            assert float(found[row, i]) == pytest.approx(best.fun, abs=2e-6)
            step = best.x - at  # the solver may end a little outside of the ball
            allowed = at + step * min(1.0, eps / np.linalg.norm(step))
            assert float(found[row, i]) <= w @ allowed + 1e-9


# ------------------------------------------------------------------------------------------------ operations

ACTIVATIONS: dict[str, Elementwise] = {
    "relu": Relu(),
    "leaky": Relu(0.3),
    "gelu": gelu("none"),
    "gelu tanh": gelu("tanh"),
    "silu": silu(),
    "sigmoid": sigmoid(),
    "tanh": tanh(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_lies_between_its_bounds_and_its_lines_on_every_interval(name: str) -> None:
    operation = ACTIVATIONS[name]
    ends = torch.cat([torch.linspace(-7, 7, 57, dtype=torch.float64), torch.tensor([-1.4142, -0.7518, 1e-9, 1.4143])])
    lower, upper = (each.flatten() for each in torch.meshgrid(ends, ends, indexing="ij"))
    lower, upper = lower[lower <= upper], upper[lower <= upper]
    at = lower + (upper - lower) * torch.linspace(0, 1, 301, dtype=torch.float64)[:, None]
    values = operation(at)
    bounds = operation.interval(Interval(lower, upper))
    assert (values >= bounds.lower - 1e-12).all()
    assert (values <= bounds.upper + 1e-12).all()
    assert ((values.amin(0) - bounds.lower) <= 1.1e-3 + 0.1 * (upper - lower)).all()  # near, on short intervals
    low, offset, high, high_offset = operation.lines(lower, upper)
    low_offset = 0.0 if offset is None else offset
    assert (values >= low * at + low_offset - 1e-12).all()
    assert (values <= high * at + high_offset + 1e-12).all()
    gap = (high - low) * 0.5 * (lower + upper) + high_offset - low_offset
    assert (gap <= 1.1e-3 + 0.5 * (upper - lower)).all()
    at.requires_grad_()
    (slope,) = torch.autograd.grad(operation(at).sum(), at)
    least, most = operation.derivative(lower, upper)
    counted = at.detach().abs() > 1e-8  # at a corner autograd takes one side
    assert (slope >= least - 1e-12)[counted].all()
    assert (slope <= most + 1e-12)[counted].all()


def test_the_tanh_form_of_gelu_is_within_the_allowance_of_the_exact_one() -> None:
    """On a grid of steps 1e-5; beyond 8 both forms are 0 or x to 1e-13."""
    x = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64).requires_grad_()
    difference = F.gelu(x) - F.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(difference.sum(), x)
    operation = gelu("tanh")
    assert slope.abs().max() < 0.01  # so between two grid points, 1e-5 apart, the difference moves by 1e-7
    assert difference.abs().max() + 1e-7 < operation.error
    assert slope.diff().abs().max() < 1e-6  # and so does its slope, by less than 1e-6
    assert slope.abs().max() + 1e-6 < operation.slope_error
    far = torch.tensor([-8.0, 8.0], dtype=torch.float64)
    for form in ("none", "tanh"):
        assert (F.gelu(far, approximate=form) - F.relu(far)).abs().max() < 1e-13


def _bell(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / (2 * torch.pi) ** 0.5 * (2 - x.square())


def _logistic(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x) * (2 - x * torch.tanh(x / 2))


@pytest.mark.parametrize("operation, second", [(gelu("none"), _bell), (silu(), _logistic)], ids=["gelu", "silu"])
def test_the_shape_that_a_rule_is_built_on(operation: Smooth, second: Callable[[Tensor], Tensor]) -> None:
    """The second derivative, phi(x) (2 - x^2) or s(x) s(-x) (2 - x tanh(x/2)), by finite differences of the slope; the
    slope by autograd; where it bends, and the only minimum.
    """
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    differences = (operation.slope(x + 1e-5) - operation.slope(x - 1e-5)) / 2e-5
    torch.testing.assert_close(differences, second(x), rtol=1e-6, atol=1e-8)
    x.requires_grad_()
    torch.testing.assert_close(operation.slope(x), torch.autograd.grad(operation.near(x).sum(), x)[0])
    bends = torch.tensor(operation.bends, dtype=torch.float64)
    assert (second(bends - 1e-6) * second(bends + 1e-6) < 0).all()
    assert int((second(x.detach()).sign().diff() != 0).sum()) == len(bends)
    assert operation.least is not None
    before, after, value = operation.least
    assert operation.slope(torch.tensor(before, dtype=torch.float64)) < 0
    assert operation.slope(torch.tensor(after, dtype=torch.float64)) > 0
    assert 0 < operation.near(torch.linspace(before, after, 20001, dtype=torch.float64)).min() - value < 1e-7


class Layers(nn.Module):
    """An operation between two affine layers that make positive and negative numbers of the pixels."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(2 * self.conv(x) - 0.1).flatten(1)


FIVE = torch.linspace(-1, 1, 5, dtype=torch.float64)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "max": lambda x: F.max_pool2d(x, 2),
    "max overlapping": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "max ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max uneven": lambda x: F.max_pool2d(x, (3, 2), stride=(1, 3), padding=(1, 0), ceil_mode=True),
    "max of relu": lambda x: F.max_pool2d(F.relu(x), 2),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "average": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "average ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
    "average adaptive": lambda x: F.adaptive_avg_pool2d(x, 3),
    "mean": lambda x: x.mean((2, 3), keepdim=True) + x.mean(-1, keepdim=True).sum(2, keepdim=True),
    "sum": lambda x: x.sum(1),
    "transpose": lambda x: F.relu(x.transpose(1, 3)),
    "permute": lambda x: F.linear(F.relu(x.permute(0, 2, 3, 1)), FIVE[:4].expand(2, -1)),
    "squeeze": lambda x: F.relu(x.unsqueeze(1)).squeeze(1),
    "view": lambda x: F.linear(x.contiguous().view(x.shape[0], 4, -1), FIVE.repeat(5).expand(3, -1)),
    "channels last": lambda x: F.relu(x.contiguous(memory_format=torch.channels_last)).reshape(x.shape[0], -1),
    "index": lambda x: (
        F.relu(x[:, [2, 0, 2]]) - x[..., 1:4, :][:, 0:1, :, None, 0].expand_as(x) if False else x[:, [2, 0]]
    ),
    "slice": lambda x: x[:, :, ::2, 1:],
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "cat": lambda x: torch.cat([x, F.relu(x), x], 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True),
    "twice": lambda x: torch.add(x, x) + (x - 0.5 * F.relu(x)),
    "pieces": lambda x: x.chunk(2, 1)[1] * x.unbind(2)[0][:, :1, :, None],
    "matrix product": lambda x: x @ x.transpose(-2, -1),
    "matrix product in batches": lambda x: torch.bmm(x[:, 0], F.relu(x[:, 1])),
    "from the left": lambda x: torch.matmul(normal(2, 4, 3, 5), F.relu(x)),
    "rows": lambda x: torch.softmax(x, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x, 2 * x + FIVE, x),
    "layer norm": lambda x: F.layer_norm(x, (5,), FIVE, -FIVE, 0.1),
    "rms norm": lambda x: F.rms_norm(F.relu(x) + 0.1, (5,), FIVE, 0.1),
    "unit length": lambda x: unit_length(x, 0.1),
    "joined": lambda x: torch.cat([torch.ones(2, 1, 5, 5, dtype=x.dtype), F.relu(x)], 1),
    "less": lambda x: 1 - F.relu(x),
    "negative": lambda x: F.relu(-x) / 3,
    "scaled": lambda x: x * FIVE - FIVE[:, None],
    "channel": lambda x: F.relu(x) * FIVE[:4, None, None],
    "dropout": lambda x: F.dropout(F.relu(x), 0.5, training=False),
    "casts": lambda x: F.relu(x.to(torch.float64)).double(),
    "batch norm": lambda x: F.batch_norm(x, FIVE[:4], FIVE[1:].abs() + 0.1, -FIVE[1:], FIVE[:4]),
    "pruned": lambda x: x.new_zeros(x.shape[0], 6, 5, 5).index_copy_(1, torch.tensor([0, 2, 3, 5]), x),
    "product": lambda x: x * F.relu(x),
    "channel gates": lambda x: torch.sigmoid(x.mean((2, 3), keepdim=True)) * x,
    "modulated": lambda x: torch.addcmul(x[:, :, :1, :1], x, x.mean((2, 3), keepdim=True)),
    "modulated alike": lambda x: torch.addcmul(FIVE, x, FIVE[:4, None, None]),
    "softmax": lambda x: torch.mm(2 * torch.softmax(x.mean((2, 3)), -1), FIVE[:4].repeat(3, 1).t() + normal(4, 3)),
    "softmax alone": lambda x: F.softmax(x.sum((2, 3)), dim=1),
    "best": lambda x: F.linear(chosen_shares(x.mean((2, 3)), 1), normal(3, 4)),
    "best two": lambda x: chosen_shares(x.mean((2, 3)), 2) @ normal(4, 3),
    "strided": lambda x: F.conv2d(x, normal(4, 2, 3, 3), stride=2, padding=(0, 1), dilation=(1, 2), groups=2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_holds_on_sampled_images(name: str) -> None:
    """Values again; bounds below what is seen, and not far; tighter with more work."""
    network = Layers(OPERATIONS[name]).double().eval()
    for norm in NORMS:
        ball = ball_of(draws(2, 2, 5, 5), norm, [0.01, 0.2])
        graph = record(network, ball.x)
        check(graph, network, draws(2, 2, 5, 5, seed=9))
        rows = every_output(network, ball)
        seen = least_seen(network, ball, rows)
        found = [Bounded(graph, ball, how).lower(rows).detach() for how in HOWS]
        for lower in found:
            assert (lower <= seen + 1e-9).all()
        assert (found[1] >= found[0] - 1e-9).all()
        assert (found[2] >= found[0] - 1e-9).all()
        allowed = 2e-3 if "tanh" in name else 0
        assert (seen - found[2])[:, 0].amax() <= 0.05 * (10 if norm == "linf" else 1) + allowed


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_linear_rule_of_every_operation_is_below_it_everywhere(name: str) -> None:
    """slope . x + offset of a random sum of outputs, on images of the ball; equal where all is affine."""
    network = Layers(OPERATIONS[name]).double().eval()
    ball = ball_of(draws(2, 2, 5, 5), "linf", [0.05, 0.3])
    graph = record(network, ball.x)
    rows = normal(3, 2, graph.output.shape[1])
    with torch.no_grad():
        slope, offset = Bounded(graph, ball, "crown_ibp").linear(rows)
        for at in inside(ball, 60):
            value = torch.einsum("nc,snc->sn", network(at), rows)
            line = (slope * at).flatten(2).sum(2) + offset
            assert (line <= value + 1e-9).all()
            if all(node.operation is None or node.operation.affine for node in graph.nodes):
                torch.testing.assert_close(line, value)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: F.relu(x, inplace=True),
    "added in place": lambda x: x.flatten(1).add_(1.0),
    "written": lambda x: x.clone() + 1,
    "into a constant": lambda x: torch.zeros(2, 2, 5, 5, dtype=x.dtype).copy_(x),
    "ones by index": lambda x: x.new_ones(2, 3, 5, 5).index_copy_(1, torch.tensor([0, 1]), x),
    "out": lambda x: torch.add(x, 1.0, out=torch.zeros(2, 2, 5, 5, dtype=x.dtype)),
    "product of other shapes": lambda x: x * x.mean(1),
    "square": lambda x: x.square(),
    "softmax over channels": lambda x: x.softmax(1),
    "matrix product of images": lambda x: x.flatten(1) @ x.flatten(1).transpose(0, 1),
    "matrix product of other shapes": lambda x: x @ x.mean(1),
    "norm over a map": lambda x: F.layer_norm(x, (5, 5)),
    "norm without an eps": lambda x: F.layer_norm(x, (5,), eps=0.0),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "unbound images": lambda x: x.unbind(0)[0],
    "softmax over images": lambda x: x.flatten(1).softmax(0),
    "addcmul of all kinds": lambda x: torch.addcmul(x, x, torch.ones(5, dtype=x.dtype)),
    "places": lambda x: x.max(1)[0],
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data + x,
    "numpy": lambda x: torch.from_numpy(x.numpy()) + x,
    "operators": lambda x: torch.ops.aten.relu(x),
    "whole numbers": lambda x: (255 * x).to(torch.uint8).to(x.dtype),
    "half": lambda x: x.half(),
    "bits": lambda x: x.view(torch.int64),
    "grows": lambda x: x.mean((1, 2, 3), keepdim=True) + torch.zeros(1, 2, 5, 5, dtype=x.dtype),
    "grows in front": lambda x: x.flatten(1) + torch.zeros(3, 1, 1, dtype=x.dtype),
    "by pixels": lambda x: F.linear(x, x[0, 0]),
    "dropout": lambda x: F.dropout(x, 0.5),
    "train": lambda x: F.batch_norm(x, torch.zeros(2).to(x), torch.ones(2).to(x), training=True),
    "cubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "cut": lambda x: F.pad(x, (-1, 0)),
    "one image": lambda x: x[0],
    "images in another order": lambda x: x[[1, 0]],
    "images mixed": lambda x: x - x.mean(0, keepdim=True),
    "images summed": lambda x: x.sum(),
    "images behind": lambda x: x.transpose(0, 1),
    "images moved": lambda x: x.permute(1, 0, 2, 3),
    "images joined": lambda x: torch.cat([x, x]),
    "images flattened": lambda x: x.flatten(),
    "images first by accident": lambda x: x[:, torch.tensor([0, 1]), :, torch.tensor([0, 1])],
    "branches": lambda x: x if x.sum() > 1 else -x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match="no bounds are known through") as error:
        record(REFUSED[name], draws(2, 2, 5, 5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "network",
    [
        lambda x: Doubling.apply(x.flatten(1)) + x.flatten(1),
        lambda x: (
            x.flatten(1) + torch.from_numpy(np.array(memoryview(x.contiguous().untyped_storage()), copy=True)).sum()
        ),
    ],
    ids=["function of its own", "storage"],
)
def test_what_the_recorder_cannot_see_is_refused_or_found(network: Callable[[Tensor], Tensor]) -> None:
    x = draws(2, 2, 5, 5)
    with pytest.raises(UserError, match=r"no bounds are known|cannot be bounded"):
        check(record(network, x), network, draws(2, 2, 5, 5, seed=9))


# ------------------------------------------------------------------------------------------------ whole networks


def randomised(spec: str, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with biases, BatchNorm weights and statistics unlike those of a fresh network."""
    model = build_model(spec, 4, (3, 8, 8), seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.ndim == 1 and value.is_floating_point():
            noise = 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.data = (value.data + noise).abs() + 0.1 if name.endswith("var") else value.data + noise
    return model


ARCHITECTURES = [
    "linear",
    "small_cnn(width=4)",
    "conv_small(width=4, hidden=16)",
    "resnet8(width=4)",
    "resnet20(width=4)",
    "resnet18(width=4, stem=imagenet)",
    "resnet50(width=2)",
    "vgg16(width=4)",
    "densenet40(growth=2)",
    "wide_resnet(depth=10, width=1)",
    "wide_resnet(depth=10, width=1, released=True)",
    "preact_resnet(depth=10, width=2, shortcut=conv3, activation=silu, padding=same)",
    "downsampled(small_cnn(width=4), size=4)",
    "resized(small_cnn(width=4), size=12)",
    "resized(small_cnn(width=4), size=5)",
    "slim(resnet8(width=8))",
    "pruned(resnet8(width=4))",
    "pathway(resnet8(width=4), experts=2, router=small_cnn(width=4))",
    "pathway(vgg16(width=4), experts=2, router=small_cnn(width=4), norm=own, standardise=True)",
    "pathway(resnet8(width=4), experts=2, routers=stage, router=small_cnn(width=4))",
    "affine(resnet8(width=4), experts=4)",
]


@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_every_architecture_is_bounded_and_bounds_hold(spec: str) -> None:
    """Its network, or its router and its last expert; linf and l2 in turn."""
    model = randomised(spec)
    functions = leaves(model.parts())
    norm, eps = (("linf", 0.004), ("l2", 0.05))[ARCHITECTURES.index(spec) % 2]
    for network in (functions[0], functions[-1])[: len(functions)]:
        ball = ball_of(draws(2, 3, 8, 8), norm, eps)  # type: ignore[arg-type]
        graph = record(network, ball.x)
        check(graph, network, draws(2, 3, 8, 8, seed=9))
        rows = every_output(network, ball)
        seen = least_seen(network, ball, rows, 10)
        with torch.no_grad():
            loose, tight = (Bounded(graph, ball, how).lower(rows) for how in HOWS[:2])
        slack = 1e-9 * (1 + loose.abs())
        assert (loose <= seen + slack).all()
        assert (tight <= seen + slack).all()
        assert (tight >= loose - slack).all()


RELU_NETWORKS = {
    "fully connected": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", RELU_NETWORKS)
@pytest.mark.parametrize("norm", NORMS)
def test_more_work_is_at_least_as_tight(name: str, norm: Norm) -> None:
    """CROWN-IBP and CROWN are never below IBP (they take the larger). CROWN is hardly ever below CROWN-IBP: closer
    bounds of a ReLU's input may choose the other line below it, which need not be the better one.
    """
    better = worse = 0
    for seed in range(5):
        torch.manual_seed(seed)
        network = RELU_NETWORKS[name]().double()
        for eps in (0.02, 0.1, 0.3):
            ball = ball_of(draws(4, 3, 2, 2, seed=seed), norm, eps)
            with torch.no_grad():
                graph, rows = record(network, ball.x), every_output(network, ball)
                ibp, mixed, crown = (Bounded(graph, ball, how).lower(rows) for how in HOWS)
            assert (mixed >= ibp - 1e-12).all()
            assert (crown >= ibp - 1e-12).all()
            assert (crown <= least_seen(network, ball, rows) + 1e-9).all()
            better += int((crown > mixed + 1e-6).sum())
            worse += int((crown < mixed - 1e-6).sum())
    assert better > 20 * worse
    assert better > 50


def textbook_ibp(layers: list[nn.Linear], low: np.ndarray, high: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every layer's result before its ReLU, by loops over its weights."""
    found = []
    for place, layer in enumerate(layers):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        if place:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        below, above = bias.copy(), bias.copy()
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                w = weight[i, j]
                below[i] += w * (low[j] if w > 0 else high[j])
                above[i] += w * (high[j] if w > 0 else low[j])
        low, high = below, above
        found.append((low, high))
    return found


def textbook_crown(layers: list[nn.Linear], low: np.ndarray, high: np.ndarray, every: bool) -> np.ndarray:
    """Lower bounds of the outputs with explicit matrices (Zhang et al. 2018, adaptive lower slope); relaxations from
    intervals, or, with ``every``, from linear bounds of every layer met with its interval.
    """
    known: list[tuple[np.ndarray, np.ndarray]] = []

    def below(row: np.ndarray, last: int) -> float:
        """A lower bound of row . (result of layer ``last``)."""
        total = 0.0
        for place in range(last, -1, -1):
            weight, bias = layers[place].weight.detach().numpy(), layers[place].bias.detach().numpy()
            total += float(row @ bias)
            row = row @ weight
            if place:
                least, most = known[place - 1]
                for j in range(len(row)):
                    lo, u = least[j], most[j]
                    if u <= 0:
                        row[j] = 0.0
                    elif lo < 0:
                        if row[j] < 0:
                            total += row[j] * (-u * lo / (u - lo))
                            row[j] *= u / (u - lo)
                        else:
                            row[j] *= 1.0 if u > -lo else 0.0
        return total + float(sum(a * (low[j] if a > 0 else high[j]) for j, a in enumerate(row)))

    intervals = textbook_ibp(layers, low, high)
    unit = [np.eye(len(layer.bias)) for layer in layers]
    for place in range(len(layers) - 1):
        least, most = intervals[place]
        if every and place:
            previous = np.maximum(known[-1][0], 0), np.maximum(known[-1][1], 0)
            least, most = (each.copy() for each in textbook_ibp([layers[place]], *previous)[0])
            for i, row in enumerate(unit[place]):
                if least[i] < 0 < most[i]:  # where the sign is known nothing depends on it
                    least[i], most[i] = max(least[i], below(row.copy(), place)), min(most[i], -below(-row, place))
        known.append((least, most))
    return np.array([below(row.copy(), len(layers) - 1) for row in unit[-1]])


@pytest.mark.parametrize("how", HOWS)
def test_bounds_of_a_small_network_are_those_of_the_textbook(how: Bounding) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        network = RELU_NETWORKS["fully connected"]().double()
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        ball = ball_of(draws(2, 3, 2, 2, seed=seed), "linf", [0.03, 0.25])
        with torch.no_grad():
            found = Bounded(record(network, ball.x), ball, how).lower(every_output(network, ball)[:3])
        for i in range(2):
            low, high = (each[i].flatten().numpy() for each in (ball.box.lower, ball.box.upper))
            plain = textbook_ibp(layers, low, high)
            if how == "ibp":
                expected = plain[-1][0]
            else:
                linear = textbook_crown(layers, low, high, every=how == "crown")
                last = plain[-1][0] if how == "crown_ibp" else np.full(3, -np.inf)
                expected = np.maximum(linear, last)
            if how == "crown":  # the intervals of the last layer, from the tightened one before, may be better
                assert (found[:, i].numpy() >= expected - 1e-9).all()
                expected = np.where(found[:, i].numpy() > expected + 1e-9, found[:, i].numpy(), expected)
            np.testing.assert_allclose(found[:, i].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_bounds_reach_every_weight(how: Bounding) -> None:
    """Against finite differences, through a convolution, BatchNorm, max-pooling, GELU, pooling and a linear layer."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.GELU(), nn.Flatten()
    )
    network = nn.Sequential(*network, nn.Linear(12, 3)).double().eval()
    network[1].bias.data += 0.2
    ball = ball_of(draws(2, 2, 6, 6), "linf", 0.05)
    y = torch.tensor([0, 2])

    def total() -> Tensor:
        worst = worst_margins(Leaf(network), ball, y, how)
        return (worst.lower * torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)).sum()

    weights = list(network.parameters())
    slopes = torch.autograd.grad(total(), weights)
    for weight, slope in zip(weights, slopes, strict=True):
        step = normal(*weight.shape, seed=7)
        with torch.no_grad():
            weight += 1e-6 * step
            above = total()
            weight -= 2e-6 * step
            below = total()
            weight += 1e-6 * step
        assert float((above - below) / 2e-6) == pytest.approx(float((slope * step).sum()), rel=1e-4, abs=1e-6)
        assert slope.abs().max() > 0


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("norm", NORMS)
def test_bounds_of_an_image_do_not_depend_on_the_batch(how: Bounding, norm: Norm) -> None:
    network = leaves(randomised("small_cnn(width=4)").parts())[0]
    ball = ball_of(draws(3, 3, 8, 8), norm, [0.002, 0.01, 0.05])
    with torch.no_grad():
        rows = every_output(network, ball)
        together = Bounded(record(network, ball.x), ball, how).lower(rows)
        for i in range(3):
            one = ball[i : i + 1]
            alone = Bounded(record(network, one.x), one, how).lower(rows[:, i : i + 1])
            torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-9, atol=1e-9)


def test_little_memory_gives_the_same_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Layers(OPERATIONS["max of relu"]).double()
    ball = ball_of(draws(2, 2, 5, 5), "linf", 0.1)
    rows = every_output(network, ball)
    graph = record(network, ball.x)
    whole = Bounded(graph, ball, "crown").lower(rows)
    monkeypatch.setattr(bounds_module, "MEMORY", 1)
    torch.testing.assert_close(Bounded(graph, ball, "crown").lower(rows), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["conv_small(width=4, hidden=16)", "resnet8(width=4)", "linear"])
def test_intervals_that_are_reached_are_not_looked_at_again(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a box the first layer's, with whatever scaling stands around it: linear bounds of it are no closer, and the
    bounds of the network are those with them.
    """
    network = leaves(randomised(spec).parts())[0] if spec != "linear" else Layers(OPERATIONS["max of relu"]).double()
    ball = ball_of(draws(2, 3, 8, 8) if spec != "linear" else draws(2, 2, 5, 5), "linf", [0.02, 0.1])
    graph, rows, looked = record(network, ball.x), every_output(network, ball), []
    tighten = Bounded._tighten
    monkeypatch.setattr(Bounded, "_tighten", lambda self, node, op: (looked.append(node), tighten(self, node, op)))
    bounded = Bounded(graph, ball, "crown")
    few, bounds = len(looked), bounded.lower(rows)
    reached = bounds_module.reached_in_a_box(graph)
    assert reached > {graph.image}
    assert not reached & set(looked)
    for node in reached:
        again = Bounded(graph, ball, "ibp")
        tighten(again, node, Relu())
        torch.testing.assert_close(again.interval[node].lower, bounded.interval[node].lower, rtol=0, atol=1e-12)
        torch.testing.assert_close(again.interval[node].upper, bounded.interval[node].upper, rtol=0, atol=1e-12)
    monkeypatch.setattr(bounds_module, "reached_in_a_box", lambda graph: set())
    torch.testing.assert_close(Bounded(graph, ball, "crown").lower(rows), bounds, rtol=0, atol=1e-12)
    assert len(looked) > 2 * few
    monkeypatch.undo()
    round_ = ball_of(ball.x, "l2", [0.02, 0.1])
    monkeypatch.setattr(Bounded, "_tighten", lambda self, node, op: looked.append(node))
    looked.clear()
    Bounded(graph, round_, "crown")
    assert reached & set(looked), "of an l2 ball they are not reached"


@pytest.mark.parametrize("how", HOWS)
def test_float32_is_within_the_outward_slack(how: Bounding) -> None:
    """slack 1e-4 (1 + |bound|)."""
    x, y = draws(3, 3, 8, 8), torch.tensor([0, 1, 2])
    for spec in ("conv_small(width=4, hidden=16)", "resnet8(width=4)")[: 2 if how == "ibp" else 1]:
        exact = leaves(randomised(spec).parts())[0]
        rounded = leaves(randomised(spec).float().parts())[0]
        for eps in (0.001, 0.01):
            with torch.no_grad():
                fine = worst_margins(Leaf(exact), ball_of(x, "linf", eps), y, how)
                coarse = worst_margins(Leaf(rounded), ball_of(x.float(), "linf", eps), y, how, slack=1e-4)
            assert coarse.lower.dtype == torch.float32
            assert (coarse.lower <= fine.lower + 1e-12).all()


@pytest.mark.parametrize("how", HOWS)
def test_autocast_does_not_touch_bounds(how: Bounding) -> None:
    """Half precision would move them by more than the slack; record, check and bounds are in the images' own dtype."""
    network = leaves(randomised("conv_small(width=4, hidden=16)").float().parts())[0]
    ball, y = ball_of(draws(2, 3, 8, 8).float(), "linf", 0.01), torch.tensor([0, 1])
    with torch.no_grad():
        plain = worst_margins(Leaf(network), ball, y, how)
        constants = margin_slopes(network, ball, y, how)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(record(network, ball.x), network, draws(2, 3, 8, 8, seed=9).float())
            cast = worst_margins(Leaf(network), ball, y, how)
            again = margin_slopes(network, ball, y, how)
    assert torch.equal(plain.lower, cast.lower)
    assert torch.equal(constants, again)
