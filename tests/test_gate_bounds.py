"""Bounds through gates: closed forms, every corner of small boxes, sampled images of whole models, certificates."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustmoe import UserError
from robustmoe.certification import Ball, Bounded, Bounding, build_certifier
from robustmoe.certification.gates import AnyChosen, BestChosen, Product, Softmax, SoftmaxBox
from robustmoe.certification.graph import check, record
from robustmoe.certification.margins import worst_margins
from robustmoe.certification.operations import Interval
from robustmoe.certification.slopes import lipschitz
from robustmoe.models import LayerExperts, RoutedModel, build_model
from robustmoe.routing import chosen_shares

HOWS: tuple[Bounding, ...] = ("ibp", "crown_ibp", "crown")


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def box() -> Interval:
    """Of six images' five scores, some of one value, some far apart."""
    lower, width = normal(6, 5), normal(6, 5, seed=4).abs() * torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 40.0])[:, None]
    return Interval(lower, lower + width)


def corners(box: Interval) -> Tensor:
    """(32, n, e): a function that is monotone along every score is least at one of them."""
    picks = torch.tensor(list(itertools.product([False, True], repeat=box.lower.shape[1])))
    return torch.where(picks[:, None], box.upper, box.lower)


# ------------------------------------------------------------------------------------------------ closed forms


def test_a_softmax_mixture_is_least_at_a_corner_of_the_scores_and_that_is_what_is_given(box: Interval) -> None:
    above = normal(7, 6, 5)
    every = (torch.softmax(corners(box), -1)[:, None] * above).sum(-1)  # (32, 7, 6)
    torch.testing.assert_close(SoftmaxBox(box.lower, box.upper).lowest(above), every.amin(0))
    bounds = Softmax().interval(box)
    weights = torch.softmax(corners(box), -1)
    torch.testing.assert_close(bounds.lower, weights.amin(0))
    torch.testing.assert_close(bounds.upper, weights.amax(0))


@pytest.mark.parametrize("width", [50.0, 1e3, 1e6])
def test_scores_that_are_far_apart_are_bounded_in_float32(width: float) -> None:
    """Where exp underflows the bound is still one, and finite."""
    lower = torch.tensor([[-width, -2 * width, 0.0, -width]])
    box = Interval(lower, lower + torch.tensor([[width, 2.5 * width, 0.0, 1.0]]))
    above = torch.tensor([[[3.0, -2.0, 1.0, 0.5]], [[-1.0, 2.0, 0.0, 5.0]]])
    lowest = SoftmaxBox(box.lower, box.upper).lowest(above)
    wide = Interval(box.lower.double(), box.upper.double())
    exact = (torch.softmax(corners(wide), -1)[:, None] * above.double()).sum(-1).amin(0)
    assert torch.isfinite(lowest).all()
    assert (lowest.double() <= exact + 1e-5).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hard_gates_can_choose_what_some_scores_of_the_box_choose(box: Interval, k: int) -> None:
    """Every corner, and draws between; what is never chosen there has weight 0, what always is has 1/k."""
    share = torch.rand(4000, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = torch.cat([corners(box), box.lower + share * (box.upper - box.lower)])
    shares = torch.stack([chosen_shares(each, k) for each in seen])
    bounds = BestChosen(k).interval(box)
    torch.testing.assert_close(bounds.lower, shares.amin(0))
    torch.testing.assert_close(bounds.upper, shares.amax(0))
    above = normal(7, 6, 5)
    assert bounds.joint is not None
    lowest = bounds.joint.lowest(above)
    assert (lowest <= (shares[:, None] * above).sum(-1).amin(0) + 1e-12).all()
    if k == 1:
        torch.testing.assert_close(lowest, (shares[:, None] * above).sum(-1).amin(0))
    everyone = AnyChosen(torch.ones(6, 5, dtype=torch.bool), k).lowest(above)
    torch.testing.assert_close(everyone, above.sort(-1).values[..., :k].mean(-1))


def test_chosen_shares_are_those_of_a_hard_gate() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    assert chosen_shares(logits, 1).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert chosen_shares(logits, 2).tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]


def test_planes_of_a_product_are_mccormicks_and_exact_where_one_factor_is_known() -> None:
    x, y = Interval(normal(3, 4), normal(3, 4) + 2), Interval(normal(3, 4, seed=8), normal(3, 4, seed=8) + 1)
    above = normal(5, 3, 4, seed=9)
    pulled = Product(torch.Size([4])).pull(above, (x, y))
    assert pulled.bias is not None
    for a, b in itertools.product(torch.linspace(0, 1, 7, dtype=torch.float64), repeat=2):
        at, by = x.lower + a * (x.upper - x.lower), y.lower + b * (y.upper - y.lower)
        line = (pulled.coefficients[0] * at + pulled.coefficients[1] * by).sum(-1) + pulled.bias
        assert (line <= (above * at * by).sum(-1) + 1e-12).all()
    known = Interval(y.lower, y.lower)
    fixed = Product(torch.Size([4])).pull(above, (x, known))
    assert fixed.bias is not None
    line = (fixed.coefficients[0] * x.upper + fixed.coefficients[1] * known.lower).sum(-1) + fixed.bias
    torch.testing.assert_close(line, (above * x.upper * known.lower).sum(-1))


class OnePixel(nn.Module):
    """t_0 s(2 g x) + t_1 s(-2 g x), s the logistic function: two experts of one number each, scores g x and -g x."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.table = torch.tensor([[1.5], [-1.5]]).double(), torch.tensor([[2.0, -1.0]]).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.softmax(nn.functional.linear(x.flatten(1), self.scores), -1), self.table)


@pytest.mark.parametrize("how", HOWS)
def test_a_mixture_of_one_pixel_is_its_closed_form(how: Bounding) -> None:
    """The mixture rises with the pixel, and the two scores are at their ends together: the bounds are exact."""
    x = torch.tensor([0.3, 0.9], dtype=torch.float64).view(2, 1, 1, 1)
    ball = Ball(x, "linf", torch.tensor([0.1, 0.2], dtype=torch.float64))
    unit = torch.ones(1, 2, 1, dtype=torch.float64)
    bounded = Bounded(record(OnePixel(), x), ball, how)

    def closed(pixel: Tensor) -> Tensor:
        return 2 * torch.sigmoid(3 * pixel) - torch.sigmoid(-3 * pixel)

    ends = torch.tensor([[0.2, 0.7], [0.4, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(bounded.lower(unit)[0], closed(ends[0]))
    torch.testing.assert_close(-bounded.lower(-unit)[0], closed(ends[1]))


# ------------------------------------------------------------------------------------------------ whole models

MODELS = {
    "soft": "affine(patch_resnet(width=4, patch=2, blocks=1), experts=4)",
    "soft, a router a norm": "affine(resnet8(width=2), experts=3, routers=norm, temperature=2.0, pool=1)",
    "hard, several routers": "affine(patch_resnet(width=4, patch=2), experts=3, gate=straight_through)",
    "top-2": "affine(patch_resnet(width=4, patch=2, blocks=1), experts=4, gate=hard, k=2)",
    "by region": "affine(patch_resnet(width=4, patch=2, blocks=1), experts=3, grid=2, temperature=2.0)",
    "hard, by region": "affine(patch_resnet(width=3, patch=2, blocks=1), experts=3, gate=hard, grid=2, routers=image)",
    "kernels": "affine(patch_resnet(width=3, patch=2, blocks=1), experts=0, kernels=2)",
    "kernels of a rank besides": "affine(patch_resnet(width=3, patch=2, blocks=1), experts=2, kernels=2, rank=1)",
    "hard kernels, several routers": "affine(patch_resnet(width=3, patch=2), experts=0, kernels=2, gate=hard)",
    "pre-activation": "affine(wide_resnet(10, 1), experts=3, stages=(3,))",
}


def randomised(spec: str, side: int = 8) -> RoutedModel:
    model = build_model(spec, 4, (3, side, side)).double()
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, LayerExperts):
            module.experts.data.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def inside(ball: Ball, points: int) -> Tensor:
    step = normal(points, *ball.x.shape, seed=5).sign()
    return (ball.x + ball.eps.view(-1, 1, 1, 1) * step).clamp(0, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_image_of_the_ball_leaves_the_bounds(name: str, images: Callable[..., Tensor]) -> None:
    side = 4 if name == "pre-activation" else 8  # CROWN's work grows with the square of the pixels
    model, x = randomised(MODELS[name], side), images(3, 3, side, side).double()
    (leaf,) = [model.parts()]
    graph = record(leaf.network, x)  # type: ignore[union-attr]
    torch.testing.assert_close(graph(x), model(x))
    check(graph, leaf.network, x.flip(0))  # type: ignore[union-attr]
    unit = torch.eye(4, dtype=torch.float64)
    rows = torch.cat([unit, -unit])[:, None].expand(-1, 3, -1)
    for norm, eps in (("linf", [1e-4, 0.003, 0.03]), ("l2", [1e-3, 0.03, 0.2])):
        ball = Ball(x, norm, torch.tensor(eps, dtype=x.dtype))  # type: ignore[arg-type]
        at = inside(Ball(x, "linf", ball.eps if norm == "linf" else ball.eps / x[0].numel() ** 0.5), 40)
        seen = torch.stack([torch.einsum("snc,nc->sn", rows, model(each)) for each in at]).amin(0)
        found = [Bounded(graph, ball, how).lower(rows) for how in HOWS[: 3 if norm == "linf" else 2]]
        for lower in found:
            assert (lower <= seen + 1e-9).all()
        assert (found[1] >= found[0] - 1e-9).all()
    hard = "hard" in name or "top" in name
    if not hard:  # in the smallest ball the bounds are close
        near = Bounded(graph, Ball(x, "linf", torch.full((3,), 1e-9, dtype=x.dtype)), "crown_ibp").lower(rows)
        torch.testing.assert_close(near, torch.einsum("snc,nc->sn", rows, model(x)), rtol=0.01, atol=0.01)


@torch.no_grad()
def test_lipschitz_constants_through_a_soft_gate_are_not_exceeded(images: Callable[..., Tensor]) -> None:
    model, x = randomised(MODELS["soft"]), images(3, 3, 8, 8).double()
    ball = Ball(x, "linf", torch.full((3,), 0.01, dtype=x.dtype))
    rows = torch.eye(4, dtype=torch.float64)[:, None].expand(-1, 3, -1)
    constants = lipschitz(Bounded(record(model.parts().network, x), ball, "crown_ibp"), rows)  # type: ignore[union-attr]
    clean = torch.einsum("snc,nc->sn", rows, model(x))
    for each in inside(ball, 40):
        moved = torch.einsum("snc,nc->sn", rows, model(each)) - clean
        assert (moved.abs() <= constants * (each - x).flatten(1).abs().amax(1) + 1e-9).all()
    with torch.enable_grad():
        at = x.clone().requires_grad_(True)
        slopes = torch.stack(
            [torch.autograd.grad(model(at)[:, c].sum(), at)[0].flatten(1).abs().sum(1) for c in range(4)]
        )
    assert (constants >= slopes - 1e-9).all()


@pytest.mark.parametrize("experts", ["experts=3", "experts=0, kernels=3"])
@torch.no_grad()
def test_one_hard_router_is_a_fork_whose_branches_are_the_experts(experts: str, images: Callable[..., Tensor]) -> None:
    model = randomised(f"affine(patch_resnet(width=4, patch=2), {experts}, gate=straight_through, routers=image)")
    x = images(4, 3, 8, 8).double()
    y = model(x).argmax(1)
    fork = model.parts()
    scores = fork.router(x)  # type: ignore[union-attr]
    torch.testing.assert_close(scores, model.run(x).trace["affine.0.router"].logits[:, 0])
    answers = torch.stack([branch.network(x) for branch in fork.branches], 1)  # type: ignore[union-attr]
    torch.testing.assert_close(answers[torch.arange(4), scores.argmax(1)], model(x))
    worst = worst_margins(fork, Ball(x, "linf", torch.full((4,), 0.002, dtype=x.dtype)), y)
    for each in inside(Ball(x, "linf", torch.full((4,), 0.002, dtype=x.dtype)), 40):
        logits = model(each)
        margins = logits.gather(1, y[:, None]) - logits
        assert (worst.lower <= margins + 1e-9).all()
    assert worst.experts == ("0", "1", "2")


@pytest.mark.parametrize("options", ["", ", gate=straight_through, routers=image", ", grid=2, kernels=2, rank=1"])
def test_gradients_of_the_bounds_reach_routers_and_experts(options: str, images: Callable[..., Tensor]) -> None:
    """Certified training moves them; which experts are in reach of a hard gate has no gradient."""
    model = randomised(f"affine(patch_resnet(width=4, patch=2, blocks=1), experts=4{options})").float()
    x = images(3, 3, 8, 8)
    worst = worst_margins(model.parts(), Ball(x, "linf", torch.full((3,), 0.01)), torch.tensor([0, 1, 2]), "ibp")
    others = worst.lower[worst.lower.isfinite()]
    others.sum().backward()
    for name, parameter in model.named_parameters():
        if "straight" in options and ".router." in name:
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_a_certificate_is_given_and_what_has_none_is_one_line(images: Callable[..., Tensor]) -> None:
    certifier = build_certifier("bounds(linf(1/2550))")
    x = images(4, 3, 8, 8)
    model = randomised(MODELS["soft"]).float()
    assert any(each.radius > 0 for each in certifier(model, x))
    odd = build_model("affine(patch_resnet(width=4, patch=2), experts=3, gate=vmoe)", 4, (3, 8, 8))
    with pytest.raises(UserError, match="no certificate knows affine experts with gate=vmoe and k=1") as error:
        odd.parts()
    assert "\n" not in str(error.value)
