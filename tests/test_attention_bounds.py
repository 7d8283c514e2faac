"""Bounds through transformers: closed forms, every corner of small boxes, sampled and attacked images of whole nets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe import UserError
from robustmoe.certification import Ball, Bounded, Bounding, attention, build_certifier, worst_margins
from robustmoe.certification.attention import Centring, FromLeft, MeanSquare, PairProduct, Unit
from robustmoe.certification.gates import BestChosen, Softmax, SoftmaxBox
from robustmoe.certification.graph import check, record
from robustmoe.certification.operations import Interval
from robustmoe.certification.slopes import lipschitz
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.parts import Leaf
from robustmoe.noise import Noise
from robustmoe.routing import Gating, chosen_weights
from robustmoe.training import MiniBatch, build_method, train_step
from robustmoe.training.optimisation import SGD

HOWS: tuple[Bounding, ...] = ("ibp", "crown_ibp", "crown")


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def box_of(*shape: int, widths: tuple[float, ...] = (0.0, 0.1, 1.0, 4.0), seed: int = 3) -> Interval:
    """Rows of each width in turn, the images' dimension first."""
    lower = normal(*shape, seed=seed)
    width = normal(*shape, seed=seed + 1).abs() * torch.tensor(widths)[torch.arange(shape[0]) % len(widths)].view(
        -1, *[1] * (len(shape) - 1)
    )
    return Interval(lower, lower + width)


def corners(box: Interval) -> Tensor:
    """(2^e, n, ..., e): both ends of each number of a row, all rows alike."""
    picks = torch.tensor(list(itertools.product([False, True], repeat=box.lower.shape[-1])))
    picks = picks.view(len(picks), *[1] * (box.lower.ndim - 1), -1)
    return torch.where(picks, box.upper, box.lower)


def inside(box: Interval, points: int) -> Tensor:
    """(points, ...), half of them at ends."""
    share = torch.rand(points, *box.lower.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share[::2] = share[::2].round()
    return box.lower + share * (box.upper - box.lower)


# ------------------------------------------------------------------------------------------------ operations


def test_rows_of_a_softmax_are_least_at_a_corner_of_their_scores() -> None:
    """(n, heads, t, t), as in attention: weights and mixtures, by every corner of each row."""
    box, above = box_of(4, 2, 3, 5), normal(6, 4, 2, 3, 5)
    weights = torch.softmax(corners(box), -1)
    torch.testing.assert_close(
        SoftmaxBox(box.lower, box.upper).lowest(above),
        torch.stack([(each * above).sum(-1) for each in weights]).amin(0),
    )
    bounds = Softmax().interval(box)
    torch.testing.assert_close(bounds.lower, weights.amin(0))
    torch.testing.assert_close(bounds.upper, weights.amax(0))


def test_attention_is_bounded_exactly_over_all_scores_and_values() -> None:
    """Each number of softmax(s) v, by every corner of a row of scores with every corner of a column of values."""
    scores, values = box_of(4, 2, 3, 4), box_of(4, 2, 4, 2, seed=8)
    bounds = PairProduct().interval(Softmax().interval(scores), values)
    columns = Interval(values.lower.transpose(-2, -1), values.upper.transpose(-2, -1))
    mixed = torch.einsum("anhij,bnhrj->abnhir", torch.softmax(corners(scores), -1), corners(columns))
    torch.testing.assert_close(bounds.lower, mixed.amin((0, 1)))
    torch.testing.assert_close(bounds.upper, mixed.amax((0, 1)))
    apart = PairProduct().interval(Interval(*_ends(Softmax().interval(scores))), values)
    assert (apart.lower <= bounds.lower + 1e-12).all()
    assert (bounds.lower - apart.lower).amax() > 0.5, "weights that sum to 1 say more than an interval of each"


def _ends(x: Interval) -> tuple[Tensor, Tensor]:
    return x.lower, x.upper


@pytest.mark.parametrize("weights", [True, False])
def test_little_memory_gives_the_same_products(weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = box_of(4, 2, 3, 4), box_of(4, 2, 4, 5, seed=8)
    x = Softmax().interval(x) if weights else x
    whole = PairProduct().interval(x, y)
    monkeypatch.setattr(attention, "HELD", 200)
    parts = PairProduct().interval(x, y)
    torch.testing.assert_close(_ends(parts), _ends(whole), rtol=0, atol=1e-12)


def test_products_of_two_values_are_bounded_by_their_corners_and_planes() -> None:
    """One product each is exact; planes are below every sampled product, and the product where one side is known."""
    x, y = box_of(4, 3, 1), box_of(4, 1, 2, seed=9)
    bounds = PairProduct().interval(x, y)
    ends = torch.stack([a @ b for a in _ends(x) for b in _ends(y)])
    torch.testing.assert_close(bounds.lower, ends.amin(0))
    torch.testing.assert_close(bounds.upper, ends.amax(0))
    x, y = box_of(4, 2, 3, 4), box_of(4, 2, 4, 2, seed=9)
    above = normal(5, 4, 2, 3, 2)
    pulled, left = PairProduct().pull(above, (x, y)), FromLeft(x.lower).pull(above, (y,))
    assert pulled.bias is not None
    for a, b in zip(inside(x, 60), inside(y, 60), strict=True):
        by_x, by_y = ((each * at).flatten(2).sum(2) for each, at in zip(pulled.coefficients, (a, b), strict=True))
        assert (by_x + by_y + pulled.bias <= (above * (a @ b)).flatten(2).sum(2) + 1e-9).all()
        alone = (left.coefficients[0] * b).flatten(2).sum(2)
        torch.testing.assert_close(alone, (above * (x.lower @ b)).flatten(2).sum(2))
    known = Interval(y.lower, y.lower)
    pulled = PairProduct().pull(above, (x, known))
    assert pulled.bias is not None
    line = (pulled.coefficients[0] * x.upper).flatten(2).sum(2) + (pulled.coefficients[1] * y.lower).flatten(2).sum(2)
    torch.testing.assert_close(line + pulled.bias, (above * (x.upper @ y.lower)).flatten(2).sum(2))


def test_planes_of_a_softmax_are_below_it_and_touch_it_in_a_small_box() -> None:
    """Second order: a box a tenth as wide has a gap a hundredth as large."""
    above, gaps = normal(6, 4, 3, 5), []
    for width in (1.0, 0.1, 0.01):
        box = box_of(4, 3, 5, widths=(width,))
        slope, offset = SoftmaxBox(box.lower, box.upper).line(above)
        for at in inside(box, 60):
            assert (slope * at).sum(-1).add(offset).le((torch.softmax(at, -1) * above).sum(-1) + 1e-12).all()
        middle = 0.5 * (box.lower + box.upper)
        gaps.append(((torch.softmax(middle, -1) * above).sum(-1) - (slope * middle).sum(-1) - offset).amax())
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]


@pytest.mark.parametrize("gating", ["vmoe", "renormalised"])
@pytest.mark.parametrize("k", [1, 2])
def test_gates_that_weight_the_chosen_by_softmax(gating: Gating, k: int) -> None:
    """By every set of k and every corner, where the set can be the best somewhere; and drawn scores."""
    box, above = box_of(6, 2, 4, widths=(0.0, 0.1, 0.5, 1.0, 3.0, 10.0)), normal(5, 6, 2, 4)
    gate, every = BestChosen(k, gating), torch.full((5, 6, 2), math.inf, dtype=torch.float64)
    for chosen in itertools.combinations(range(4), k):
        held = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(chosen), 1.0)
        others = [i for i in range(4) if i not in chosen]
        possible = torch.stack([(box.lower[..., others] > box.upper[..., [i]]).sum(-1) == 0 for i in chosen]).all(0)
        for at in corners(box):
            weights = torch.softmax(at, -1) * held
            weights = weights / weights.sum(-1, keepdim=True) if gating == "renormalised" else weights
            every = torch.where(possible, torch.minimum(every, (weights * above).sum(-1)), every)
    bounds = gate.interval(box)
    assert bounds.joint is not None
    lowest, pulled = bounds.joint.lowest(above), gate.pull(above, (box,))
    torch.testing.assert_close(lowest, every)
    assert pulled.bias is not None
    for at in inside(box, 200):
        weights = chosen_weights(at, k, gating)
        assert (weights >= bounds.lower - 1e-12).all()
        assert (weights <= bounds.upper + 1e-12).all()
        value = (weights * above).sum(-1)
        assert (lowest <= value + 1e-12).all()
        line = (pulled.coefficients[0] * at).flatten(2).sum(2) + pulled.bias
        assert (line <= value.flatten(2).sum(2) + 1e-9).all()


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(UserError, match="weights 8 of 16 experts by softmax, too many choices"):
        record(lambda x: chosen_weights(x.flatten(1), 8, "vmoe"), torch.rand(2, 1, 4, 4))


# ------------------------------------------------------------------------------------------------ LayerNorm


def test_a_norm_of_two_numbers_is_its_closed_form() -> None:
    """(a - b)/2 over the root of its square plus eps: it rises with a and falls with b. The far end is always exact,
    the near one where a = b is in the box.
    """
    centre = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.6, 0.55], [0.9, 0.1]], dtype=torch.float64).view(4, 1, 1, 2)
    ball = Ball(centre, "linf", torch.tensor([0.0, 0.05, 0.2, 0.1], dtype=torch.float64))
    row = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 4, -1)
    low, high = ball.box.lower.flatten(1), ball.box.upper.flatten(1)

    def closed(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a - b) * torch.rsqrt((0.5 * (a - b)).square() + 0.01)

    least, most = closed(low[:, 0], high[:, 1]), closed(high[:, 0], low[:, 1])
    for how in HOWS:
        bounded = Bounded(record(lambda x: F.layer_norm(x.flatten(1), (2,), eps=0.01), centre), ball, how)
        below, above = bounded.lower(row)[0], -bounded.lower(-row)[0]
        assert (below <= least + 1e-12).all()
        assert (above >= most - 1e-12).all()
        torch.testing.assert_close(torch.where(least <= 0, below, 0.0), torch.where(least <= 0, least, 0.0))
        torch.testing.assert_close(torch.where(most >= 0, above, 0.0), torch.where(most >= 0, most, 0.0))
        torch.testing.assert_close(below[:1], least[:1])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_normalised_row_is_in_its_bounds_above_its_planes_and_never_longer_than_its_length(
    d: int, centred: bool
) -> None:
    """Also where a box holds a row of equal numbers, which alone would divide by the root of eps."""
    x, above = box_of(8, 3, d, widths=(0.0, 0.01, 0.3, 1.0)), normal(5, 8, 3, d)
    x.lower[4:], x.upper[4:] = x.lower[4:, :, :1] - 0.2, x.lower[4:, :, :1] + 0.3
    operation, eps = Unit(1e-6, centred), 1e-6
    c = Centring().interval(x) if centred else x
    v = MeanSquare(eps).interval(c)
    bounds, pulled = operation.interval(c, v), operation.pull(above, (c, v))
    squares = MeanSquare(eps).pull(pulled.coefficients[1], (c,))
    assert squares.bias is not None
    assert pulled.bias is not None
    cap = math.sqrt(max(d - centred, 0)) + 1e-9
    assert bounds.upper.amax() <= cap
    assert bounds.lower.amin() >= -cap
    for at in inside(x, 400):
        rows = at - at.mean(-1, keepdim=True) if centred else at
        value = F.layer_norm(at, (d,), eps=eps) if centred else F.rms_norm(at, (d,), eps=eps)
        assert (value >= bounds.lower - 1e-9).all()
        assert (value <= bounds.upper + 1e-9).all()
        mean = rows.square().mean(-1, keepdim=True) + eps
        assert (mean >= v.lower - 1e-12).all()
        assert (mean <= v.upper + 1e-12).all()
        line = (pulled.coefficients[0] * rows).flatten(2).sum(2) + pulled.bias
        by_mean = (pulled.coefficients[1] * mean).flatten(2).sum(2)
        slack = 1e-9 * (1 + by_mean.abs())
        assert (line + by_mean <= (above * value).flatten(2).sum(2) + slack).all()
        assert ((squares.coefficients[0] * rows).flatten(2).sum(2) + squares.bias <= by_mean + slack).all()


# ------------------------------------------------------------------------------------------------ whole models

BLOCK = "patch=4, width=8, depth=1, heads=2, mlp_ratio=1"
SHAPE = (1, 4, 8)
MOE = f"tiny, {BLOCK}, experts=3, placement=(0,)"
MODELS = {
    "dense": f"vit({BLOCK})",
    "two blocks": f"vit({BLOCK}, classifier=gap)".replace("depth=1", "depth=2"),
    "dense, as Soft MoE's": f"vit({BLOCK}, classifier=map, qk_norm=True, positions=sincos2d, pre_logits=5)",
    "vmoe": f"vit_moe({MOE}, k=2)",
    "renormalised": f"vit_moe({MOE}, k=2, gating=renormalised)",
    "hard": f"vit_moe({MOE}, k=2, gating=straight_through, classifier=gap)",
    "soft": f"vit_moe({MOE}, gating=soft, eval_capacity=1.0)",
    "slots": f"vit_moe({MOE}, choice=slots, slots=2)",
}


def randomised(name: str) -> RoutedModel:
    """With weights and biases unlike a fresh network's."""
    model = build_model(MODELS[name], 3, SHAPE).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def attacked(model: RoutedModel, ball: Ball, rows: Tensor) -> Tensor:
    """(s, n) the least value of each row that eight steps of the gradient's sign come to inside the ball."""
    eps, seen = ball.eps.view(-1, 1, 1, 1), []
    at = ball.x.expand(len(rows), *ball.x.shape).clone()
    for _ in range(9):
        at.requires_grad_(True)
        with torch.enable_grad():
            value = (model(at.flatten(0, 1)).unflatten(0, rows.shape[:2]) * rows).sum(2)
            (slope,) = torch.autograd.grad(value.sum(), at)
        seen.append(value.detach())
        at = (at.detach() - 0.4 * eps * slope.sign()).clamp(ball.box.lower, ball.box.upper)
    return torch.stack(seen).amin(0)


@pytest.mark.parametrize("name", MODELS)
def test_no_image_of_the_ball_leaves_the_bounds(name: str, images: Callable[..., Tensor]) -> None:
    """The layer's open form is the model; sampled and attacked images; at radius 0 the bounds are the answer."""
    model, x = randomised(name), images(2, *SHAPE).double()
    part = model.parts()
    assert isinstance(part, Leaf)
    with torch.no_grad():
        graph = record(part.network, x)
        torch.testing.assert_close(graph(x.flip(0)), model(x.flip(0)))
        check(graph, part.network, x.flip(0))
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double()[:, None].expand(-1, 2, -1)
    hows: tuple[Bounding, ...] = ("ibp", "crown" if name in ("dense", "vmoe") else "crown_ibp")
    for eps in (0.0, 0.004, 0.1)[: 3 if name in ("renormalised", "hard", "slots") else 2]:
        ball = Ball(x, "linf", torch.full((2,), eps, dtype=x.dtype))
        points = (x + eps * normal(30, *x.shape).sign()).clamp(0, 1)
        with torch.no_grad():
            answers = model(points.flatten(0, 1)).unflatten(0, (30, 2))
            lowest = [Bounded(graph, ball, how).lower(rows) for how in hows[: 2 if eps else 1]]
        seen = torch.minimum(torch.einsum("snc,pnc->psn", rows, answers).amin(0), attacked(model, ball, rows))
        for lower in lowest:
            assert (lower <= seen + 1e-9).all()
            assert torch.isfinite(lower).all()
            assert (lower >= lowest[0] - 1e-9).all()
            if eps == 0:
                torch.testing.assert_close(lower, torch.einsum("snc,nc->sn", rows, answers[0]), rtol=0, atol=1e-5)


def test_linear_bounds_are_close_where_intervals_say_nothing(images: Callable[..., Tensor]) -> None:
    """A tenth of the radius: CROWN's gap to what is seen shrinks faster than the radius, so it is the function's own
    slope in the end.
    """
    model, x = randomised("dense"), images(1, *SHAPE).double()
    part = model.parts()
    assert isinstance(part, Leaf)
    rows = torch.eye(3, dtype=torch.float64)[:, None]
    gaps = []
    with torch.no_grad():
        graph, answer = record(part.network, x), torch.einsum("snc,nc->sn", rows, model(x))
    for eps in (1e-3, 1e-4):
        ball = Ball(x, "linf", torch.full((1,), eps, dtype=x.dtype))
        with torch.no_grad():
            lower = Bounded(graph, ball, "crown").lower(rows)
        seen = attacked(model, ball, rows)
        gaps.append(((seen - lower) / (answer - seen)).amax())
    assert gaps[0] < 2
    assert gaps[1] < 0.3 * gaps[0]


def test_a_route_that_can_change_is_not_called_stable(images: Callable[..., Tensor]) -> None:
    model, x = randomised("hard"), images(6, *SHAPE).double()
    y, stable = model(x).argmax(1), []
    for eps in (1e-7, 0.03):
        ball = Ball(x, "linf", torch.full((6,), eps, dtype=x.dtype))
        with torch.no_grad():
            worst = worst_margins(model.parts(), ball, y, "ibp")
        clean = model.route(x)["network.blocks.0.mlp.router"].index.sort(-1).values
        for at in (x + eps * normal(20, *x.shape).sign()).clamp(0, 1):
            moved = (model.route(at)["network.blocks.0.mlp.router"].index.sort(-1).values != clean).flatten(1).any(1)
            assert not (moved & worst.stable).any()
        stable.append(int(worst.stable.sum()))
    assert stable == [6, 0]


@torch.no_grad()
def test_lipschitz_constants_through_attention_are_not_exceeded(images: Callable[..., Tensor]) -> None:
    model, x = randomised("dense"), images(2, *SHAPE).double()
    ball = Ball(x, "linf", torch.full((2,), 1e-4, dtype=x.dtype))
    rows = torch.eye(3, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    constants = lipschitz(Bounded(record(model.parts().network, x), ball, "crown_ibp"), rows)  # type: ignore[union-attr]
    with torch.enable_grad():
        at = x.clone().requires_grad_(True)
        each = [torch.autograd.grad(model(at)[:, c].sum(), at)[0].flatten(1).abs().sum(1) for c in range(3)]
    assert (constants >= torch.stack(each) - 1e-9).all()
    assert torch.isfinite(constants).all()


# ------------------------------------------------------------------------------------------------ certificates


@pytest.mark.parametrize("name", ["dense", "vmoe", "slots"])
def test_steps_of_certified_training_move_every_weight(
    name: str, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The class token too, which a pass without gradients makes into one an image."""
    model, method = build_model(MODELS[name], 4, SHAPE), build_method("certified(linf(1e-4), warmup=0, full=0)")
    x, y = images(6, *SHAPE), labels(6)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        step = train_step(
            model, method, [SGD(lr=0.01).make(model.parameters())], MiniBatch(x, y, Noise.of(torch.arange(6)))
        )
        assert math.isfinite(step.loss["all"])
    for own, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[own]), own


def test_a_certificate_is_given_from_a_model_in_float32(images: Callable[..., Tensor]) -> None:
    certifier = build_certifier("bounds(linf(1e-4), how=crown, search=0)")
    assert any(each.radius > 0 for each in certifier(randomised("dense").float(), images(2, *SHAPE)))
