"""FAB: the projection against a slow second implementation, closed forms on linear models, the contract, the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from robustmoe.attacks import NotFiniteError, Surrogate, Threat, size, together
from robustmoe.attacks.boundary import dual_size, projection
from robustmoe.attacks.fab import FAB
from robustmoe.models import RoutedModel
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise
from tiny_models import TINY, in_turn

NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.08, "l2": 0.6, "l1": 6.0}


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


# ------------------------------------------------------------------------------------------------ the projection


def slow(norm: str, t: Tensor, w: Tensor, b: float) -> Tensor:
    """One point's move, from the KKT conditions: a root of the one multiplier (linf, l2), a loop over coordinates (l1).

    linf: every coordinate goes down <w, .> by the level, or as far as the box lets it; l2: by the level times its
    weight; l1: the fractional knapsack.
    """
    if float(w @ t) < b:
        w, b = -w, -b
    gap = float(w @ t) - b
    weight, room = w.abs(), torch.where(w > 0, t, 1 - t) * (w != 0)
    if gap >= float(weight @ room):
        return -w.sign() * room
    if norm == "l1":
        move = torch.zeros_like(t)
        for i in weight.argsort(descending=True).tolist():
            move[i] = min(gap / float(weight[i]) if weight[i] > 0 else 0.0, float(room[i]))
            gap -= float(weight[i] * move[i])
        return -w.sign() * move
    unit = torch.ones_like(w) if norm == "linf" else weight
    level = brentq(lambda z: float(weight @ torch.minimum(z * unit, room)) - gap, 0.0, 1e6, xtol=1e-15, rtol=1e-14)
    return -w.sign() * torch.minimum(level * unit, room)


def problems(d: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """40 points, normals and offsets in float64. "corner": most pixels at the box; "sparse": most weights 0; "far":
    planes that mostly miss the box.
    """
    t, w = torch.rand(40, d, dtype=torch.float64), torch.randn(40, d, dtype=torch.float64)
    if kind == "corner":
        t = (3 * t - 1).clamp(0, 1)
    if kind == "sparse":
        w = w * (torch.rand(40, d) < 0.3)
        w[:, 0] = 1.0
    spread = (3.0 if kind == "far" else 0.3) * d**0.5
    return t, w, (w * t).sum(1) + spread * torch.randn(40, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["inside", "corner", "sparse", "far"])
@pytest.mark.parametrize("d", [1, 2, 3, 16, 47])
def test_the_projection_is_the_slow_one(norm: str, kind: str, d: int) -> None:
    t, w, b = problems(d, kind)
    expected = torch.stack([slow(norm, t[i], w[i], float(b[i])) for i in range(len(t))])
    torch.testing.assert_close(projection(norm, t, w, b), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["inside", "corner", "sparse", "far"])
def test_newtons_level_is_the_sorted_one(kind: str) -> None:
    t, w, b = problems(47, kind)
    w[0], w[1, 1:] = 0.0, 0.0  # no direction at all, and a single one
    sorted_, newton = projection("linf", t, w, b), projection("linf", t, w, b, by_sort=False)
    torch.testing.assert_close(newton, sorted_, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_feasible_move_is_smaller(norm: str) -> None:
    """Against 200 random points of the plane inside the box, made by projecting random points of the box in l2."""
    t, w, b = problems(6, "inside")
    move = projection(norm, t, w, b)
    met = ((w * (t + move)).sum(1) - b).abs() < 1e-9
    assert met.sum() > 20
    for _ in range(200):
        other = torch.rand_like(t)
        other = other + projection("l2", other, w, b) - t
        shorter = size(norm, other[:, None, None]) < size(norm, move[:, None, None]) - 1e-9
        assert not (shorter & met).any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_without_direction_moves_nothing(norm: str) -> None:
    assert projection(norm, torch.rand(3, 5), torch.zeros(3, 5), torch.tensor([0.0, 1.0, -1.0])).abs().max() == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-100, -30, 60])
def test_the_scale_of_a_plane_does_not_matter(norm: str, power: int) -> None:
    """(w, b) times a power of two is the same plane, to the bit: gradients may be of any smallness."""
    t, w, b = (value.float() for value in problems(16, "corner"))
    assert torch.equal(projection(norm, t, w * 2.0**power, b * 2.0**power), projection(norm, t, w, b))


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 2])
def test_a_linear_boundary_is_met_at_the_closed_form_distance(norm: str, targets: int) -> None:
    """Three classes, images far from the box: margin over dual norm, times the overshoot of 1 %; not within less."""
    w, y = torch.randn(3, 1, 4, 4), torch.zeros(6, dtype=torch.long)
    x = 0.48 + 0.04 * torch.rand(6, 1, 4, 4)
    bias = torch.tensor([0.5, 0.0, 0.0]) - 0.5 * w.sum((1, 2, 3))

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ w.flatten(1).T + bias

    logits = model(x)
    assert torch.equal(logits.argmax(1), y)
    rivals = [(logits[:, 0] - logits[:, c]) / dual_size(norm, (w[c] - w[0])[None]) for c in (1, 2)]
    true = torch.stack(rivals).amin(0)
    attack = FAB(Threat(norm, 0.9), steps=10, targets=targets, eta=1.01, alpha_max=1.0)
    for factor, broken in ((1.02, True), (0.999, False)):
        for i in range(len(x)):
            one = replace(attack, threat=Threat(norm, factor * float(true[i])))
            found = one(model, x[i : i + 1], y[i : i + 1])
            assert bool(model(found).argmax(1) != 0) is broken
            assert broken or torch.equal(found, x[i : i + 1])


# ------------------------------------------------------------------------------------------------ the contract


OPTIONS = [
    ("linf", {"targets": 9}),
    ("l1", {"targets": 2, "restarts": 2, "rng": "autoattack"}),
    ("l2", {"keep": "best", "restarts": 2}),
]


@pytest.mark.parametrize("norm, options, name", in_turn(OPTIONS, sorted(TINY)))
def test_the_contract(
    norm: str,
    options: dict[str, object],
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
) -> None:
    """In the ball and the box, broken or clean, and the model and the global generator as found."""
    model, x = tiny(name), images(6)
    y = answers(model, x)
    y[0] = (y[0] + 1) % 4  # one is wrong from the start
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    attack = FAB(Threat(norm, EPS[norm]), steps=5, **options)
    x_adv = attack(model, x, y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (size(norm, x_adv.double() - x.double()) <= EPS[norm] * (1 + 1e-6)).all()
    fooled = answers(model, x_adv) != y
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert torch.equal(x_adv[0], x[0])
    assert fooled[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 3])
def test_first_and_best_break_the_same_images_and_best_is_nearer(
    norm: str, targets: int, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """In float64, where a pass does not depend on its batch beyond 1e-15."""
    model, x = tiny("ensemble_soft").double(), images(10).double()
    y = answers(model, x)
    attack = FAB(Threat(norm, EPS[norm]), steps=12, restarts=2, targets=targets)
    first, best = attack(model, x, y), replace(attack, keep="best")(model, x, y)
    assert torch.equal(answers(model, first) != y, answers(model, best) != y)
    assert bool((answers(model, first) != y).any())
    assert (size(norm, best - x) <= size(norm, first - x) + 1e-9).all()


@pytest.mark.parametrize("name", ["dense", "ensemble_soft"])
def test_an_image_is_attacked_alike_in_any_batch(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny(name).double(), images(8).double()
    y, noise = answers(model, x), Noise.of(torch.arange(8), 3)
    attack = FAB(Threat("l2", 0.4), steps=8, restarts=2, targets=2)
    whole = attack(model, x, y, noise)
    for rows in (torch.tensor([4, 1]), torch.tensor([5])):
        torch.testing.assert_close(attack(model, x[rows], y[rows], noise[rows]), whole[rows], rtol=0, atol=1e-9)


def test_the_exact_model_judges(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """The surrogate has slightly other weights: what moved broke the exact model, and some does."""
    climbed, exact, x = tiny("ensemble_soft"), tiny("ensemble_soft"), images(8)
    with torch.no_grad():
        for parameter in climbed.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    y = answers(exact, x)
    for close in (False, True):
        for targets in (0, 3):
            attack = FAB(Threat("l2", 9.0), steps=15, targets=targets)
            x_adv = attack(Surrogate(climbed, exact, close), x, y)
            moved = (x_adv != x).flatten(1).any(1)
            assert torch.equal(answers(exact, x_adv) != y, moved)
            assert moved.any()


def test_restarts_are_random_by_the_seed(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """A start lies at eps / 2 (less where the box clips it); another seed is another start, and "image" another."""
    x = 0.3 + 0.4 * images(3)
    for norm in NORMS:
        one = FAB(Threat(norm, 0.1))
        starts = []
        for attack in (
            one,
            replace(one, seed=1),
            replace(one, rng="autoattack"),
            replace(one, rng="autoattack", seed=1),
        ):
            noise = Noise.of(torch.arange(3), attack.seed)
            starts.append(attack._start(x, noise, torch.Generator().manual_seed(attack.seed)))
            torch.testing.assert_close(size(norm, starts[-1] - x), torch.full((3,), 0.05), rtol=1e-4, atol=1e-6)
        assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


# ------------------------------------------------------------------------------------------------ the passes


class Counted(nn.Module):
    """Logits of a linear model whose margin scales with ``gain``; it counts the images of its passes and gradients."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.plain, self.graph, self.back = 0, 0, 0
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self.graph += len(x)
            x.register_hook(self._count)
        else:
            self.plain += len(x)
        mean = x.flatten(1).mean(1)
        return torch.stack([self.reach - mean, mean - self.reach, mean - self.reach - 1], 1)

    def _count(self, gradient: Tensor) -> None:
        self.back += len(gradient)


@pytest.mark.parametrize("rng", ["image", "autoattack"])
def test_an_image_that_nothing_breaks_costs_one_pass_and_gradient_a_step(rng: str) -> None:
    """Reach 2 lies outside the box: no point is broken. A clean pass and the first look and the last are plain, the
    first look's image is then passed again; the other steps need one pass with its gradient each.
    """
    model, steps = Counted(2.0), 9
    FAB(Threat("linf", 0.1), steps=steps, targets=1, rng=rng)(
        model, torch.full((4, 1, 2, 2), 0.5), torch.zeros(4).long()
    )
    assert (model.plain, model.graph, model.back) == (4 * 3, 4 * steps, 4 * steps)


@pytest.mark.parametrize("rng", ["image", "autoattack"])
def test_a_broken_image_costs_another_pass_a_step(rng: str) -> None:
    """Reach 0.7 is met in one step, outside eps; every later point overshoots too: a look and a gradient a step."""
    model, steps = Counted(0.7), 9
    attack = FAB(Threat("linf", 0.1), steps=steps, targets=1, rng=rng)
    attack(model, torch.full((4, 1, 2, 2), 0.5), torch.zeros(4).long())
    assert (model.plain, model.graph, model.back) == (4 * (1 + steps), 4 * steps, 4 * steps)
    output = Plain(model).run(torch.zeros(1, 1, 2, 2))
    assert attack.queries(output) == 1 + 4 * steps
    assert replace(attack, targets=0).queries(output) == 1 + (2 + 2 * 3) * steps
    assert replace(attack, targets=9, restarts=3).queries(output) == 1 + 2 * 3 * 4 * steps


def test_first_stops_at_the_first_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within eps after one step: a clean pass, one gradient, one look."""
    monkeypatch.setattr(together, "SMALL", 0)  # a target at a time
    model = Counted(0.55)
    FAB(Threat("linf", 0.1), steps=9, targets=2)(model, torch.full((4, 1, 2, 2), 0.5), torch.zeros(4).long())
    assert (model.plain, model.graph, model.back) == (8, 4, 4)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_model_without_gradient_leaves_the_image(images: Callable[..., Tensor]) -> None:
    x = images(3)
    for targets in (0, 2):
        attack = FAB(Threat("l2", 0.5), steps=3, targets=targets)
        y = answers(lambda x: x.flatten(1)[:, :4], x)
        assert torch.equal(attack(lambda x: x.detach().flatten(1)[:, :4], x, y), x)


@pytest.mark.parametrize("targets", [0, 2])
def test_a_broken_model_stops_the_attack(targets: int, images: Callable[..., Tensor]) -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        FAB(Threat("linf", 0.1), targets=targets)(
            lambda x: (x - x.detach()).flatten(1)[:, :4].sqrt(), images(3), torch.zeros(3, dtype=torch.long)
        )


def test_one_class_is_refused(images: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 1\); expected a column for each class, two at least"):
        FAB(Threat("linf", 0.1))(lambda x: x.flatten(1)[:, :1], images(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps and restarts must be at least 1; got 0 and 1"),
        ({"restarts": 0}, "steps and restarts must be at least 1; got 100 and 0"),
        ({"targets": -1}, "targets must be 0 .untargeted. or the number of wrong classes; got -1"),
        ({"alpha_max": 1.5}, "alpha_max must be from 0 to 1; got 1.5"),
        ({"eta": 0.9}, "eta must be a number, at least 1 .no overshoot.; got 0.9"),
        ({"beta": 0.0}, "beta must be above 0 and at most 1; got 0.0"),
    ],
)
def test_settings_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FAB(Threat("linf", 0.1)), **arguments)


@pytest.mark.parametrize("keep", ["first", "best"])
def test_a_close_surrogates_judge_is_asked_inside_the_ball_alone(
    keep: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """The model as its own close surrogate: the same images as without, and the judge (which is asked without the
    surrogate's own pass) about few of the many broken points that the search walks through.
    """
    model, x = tiny("ensemble_soft").double(), images(8).double()
    y = answers(model, x)
    asked: list[int] = []

    class Counted(Surrogate):
        def verdict(self, x_adv: Tensor, y: Tensor, forced: None = None) -> Tensor:
            away = (x_adv[:, None] - x).abs().flatten(2).amax(2).amin(1)
            assert (away <= 0.02 * (1 + 1e-6)).all(), "nobody asks about a point outside the ball"
            asked.append(len(x_adv))
            return super().verdict(x_adv, y, forced)

    attack = FAB(Threat("linf", 0.02), steps=15, targets=2, keep=keep)
    alone, judged = attack(model, x, y), attack(Counted(model, model, close=True), x, y)
    assert torch.equal(answers(model, alone) != y, answers(model, judged) != y)
    fooled = int((answers(model, judged) != y).sum())
    if keep == "first":
        assert sum(asked) == fooled, "once for each image, when its point lies in the ball"
