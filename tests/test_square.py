"""The Square Attack: closed forms, a second implementation, and the contract (ball, box, judge, batch, model)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import Attack, NotFiniteError, Surrogate, Threat, l1, l2, linf
from robustmoe.attacks import square as square_module
from robustmoe.attacks.square import Square
from robustmoe.models import RoutedModel
from robustmoe.models.base import Output
from robustmoe.models.plain import Plain
from robustmoe.noise import Noise
from tiny_models import TINY, in_turn

NORMS = [linf, l2, l1]
SIZES = {"linf": 0.05, "l2": 0.5, "l1": 4.0}
SHAPE = (2, 9, 9)


class Curved(nn.Module):
    """Two logits in float64, bent so that greedy search matters: no two proposals are as good as each other."""

    def __init__(self, shape: tuple[int, int, int], margin: float) -> None:
        super().__init__()
        self.w, self.v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        away = x.double() - 0.5
        value = (away * self.w).flatten(1).sum(1) + torch.sin((away * self.v).flatten(1).sum(1)) - self.margin
        return torch.stack([torch.zeros_like(value), value], 1)


class Recorder(nn.Module):
    """Passes on, and keeps every batch it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return self.model(x)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def grey(n: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return 0.2 + 0.6 * torch.rand(n, *shape)


def wrong(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


@pytest.fixture(params=NORMS)
def threat(request: pytest.FixtureRequest) -> Threat:
    return request.param(SIZES[request.param.__name__])


# ------------------------------------------------------------------------------------------------ closed forms


def test_on_a_linear_model_linf_reaches_the_closed_form_distance() -> None:
    """From iteration 201 on the windows of a 4 x 4 image are one pixel, so the search ends at eps * sign(w): fooled
    exactly where eps is above margin / ||w||_1.
    """
    w, x = torch.randn(1, 4, 4), torch.full((3, 1, 4, 4), 0.5)
    distance = 0.1
    margin = distance * float(w.abs().sum())

    def model(x: Tensor) -> Tensor:
        value = ((x - 0.5) * w).flatten(1).sum(1) - margin
        return torch.stack([torch.zeros_like(value), value], 1)

    x_adv = Square(linf(1.01 * distance), steps=800)(model, x, zeros(3))
    torch.testing.assert_close(x_adv, (x + 1.01 * distance * w.sign()), rtol=0, atol=1e-6)
    assert torch.equal(Square(linf(0.99 * distance), steps=800)(model, x, zeros(3)), x)


def test_the_windows_shrink_on_the_papers_schedule() -> None:
    """Sides are round(sqrt(p * 32 * 32)), p = 0.8 halved after 10, 50, 200, 500, 1000, 2000 and 4000 iterations."""
    sides = {first: side for first, _, side, _ in Square(linf(0.1)).stretches(32, 32)}
    expected = {0: 29, 11: 20, 51: 14, 201: 10, 501: 7, 1001: 5, 2001: 4, 4001: 3}
    assert {first: sides[first] for first in expected} == expected
    shrunk = {first: side for first, _, side, _ in Square(linf(0.1), steps=1000, rescale=True).stretches(32, 32)}
    assert shrunk[2] == 20  # 2 of 1,000 is 20 of 10,000
    assert shrunk[801] == 1  # after 8,000: p = 0.8 / 512, side round(1.26)
    odd = {first: Square(l2(0.1)).side_at(first, 32, 32) for first in expected}
    assert odd == {**expected, 11: 21, 51: 15, 201: 11, 2001: 5}
    lengths = [length for _, length, _, _ in Square(l1(0.1), steps=777).stretches(32, 32)]
    assert sum(lengths) == 777


def test_the_pattern_is_the_papers_pyramid() -> None:
    """Side 3: the upper bump is 1 x 3, the lower 2 x 3 around its (1, 1): the middle has 1 + 1/4, the rest 1/4, each
    bump of unit norm before the whole is.
    """
    upper = torch.tensor([[0.25, 1.25, 0.25]])
    lower = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]])
    whole = torch.cat([upper / upper.norm(), -lower / lower.norm()]) / math.sqrt(2)
    torch.testing.assert_close(square_module.pattern("l2", 3), torch.stack([whole, whole.T]), rtol=0, atol=1e-6)
    assert square_module.pattern("l1", 7).abs().sum((1, 2)).tolist() == pytest.approx([1.0, 1.0])


# ------------------------------------------------------------------------------------------------ every proposal


def test_linf_proposals_are_corners_and_differ_in_one_window_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, one proposal a pass: replay the search from what the model was asked."""
    monkeypatch.setattr(square_module, "FEW", 1)
    monkeypatch.setattr(square_module, "WIDE", 1)
    x, model = grey(1).clamp(0.0, 0.75), Recorder(Curved(SHAPE, 1e3))
    Square(linf(0.3), steps=300)(model, x, zeros(1))
    corners = torch.stack([(x - 0.3).clamp(0, 1), (x + 0.3).clamp(0, 1)])
    clean, best, *rest = model.asked
    assert torch.equal(clean, x)
    assert len(rest) <= 300
    rises = [float(model.model(best)[0, 1])]
    for proposal in rest:
        assert (proposal == corners).any(0).all()
        changed = torch.nonzero((proposal != best)[0].any(0))
        assert len(changed), "a proposal that changes nothing was asked"
        extent = changed.amax(0) - changed.amin(0) + 1
        assert extent.max() <= 8  # the first windows' side, round(sqrt(0.8 * 81))
        if float(model.model(proposal)[0, 1]) > rises[-1]:
            best, rises = proposal, [*rises, float(model.model(proposal)[0, 1])]
    assert len(rises) > 10


def test_all_proposals_lie_in_ball_and_box(threat: Threat, images: Callable[..., Tensor]) -> None:
    x, model = images(4, *SHAPE), Recorder(Curved(SHAPE, 1e3))
    noise = Noise.of(torch.arange(4), 0)
    for i in range(4):  # alone, so that each pass is of one image
        Square(threat, steps=80)(model, x[i : i + 1], zeros(1), noise[i : i + 1])
        asked = torch.cat(model.asked)
        assert threat.size(asked - x[i]).max() <= threat.eps * (1 + 1e-5)
        assert asked.min() >= 0
        assert asked.max() <= 1
        assert not torch.isnan(asked).any()
        model.asked.clear()


# ------------------------------------------------------------------------------------------------ the same search


def by_hand(attack: Square, model: nn.Module, x: Tensor, noise: Noise) -> Tensor:
    """linf, image by image, proposal by proposal, label 0; nothing skipped, nothing asked ahead."""
    eps, (c, h, w) = attack.threat.eps, x.shape[1:]
    out = x.clone()
    for i in range(len(x)):
        one, stream = x[i], noise[i : i + 1].fold(0)
        lowest, highest = (one - eps).clamp(0, 1), (one + eps).clamp(0, 1)
        best = torch.where(stream.fold(0).uniform(c, 1, w)[0] < 0.5, lowest, highest)
        loss = float(model(best[None])[0, 1])
        for first, length, side, _ in attack.stretches(h, w):
            draws = stream.fold(1 + first).uniform(length, 5 + c)[0]
            for u in draws:
                if loss > 0:
                    break
                top, left = int(u[0] * (h - side + 1)), int(u[1] * (w - side + 1))
                proposal = best.clone()
                for channel in range(c):
                    place = (channel, slice(top, top + side), slice(left, left + side))
                    proposal[place] = (lowest if u[5 + channel] < 0.5 else highest)[place]
                value = float(model(proposal[None])[0, 1])
                if value > loss:
                    best, loss = proposal, value
        if loss > 0:
            out[i] = best
    return out


def test_linf_search_is_the_one_written_by_hand() -> None:
    x, model, noise = grey(8), Curved(SHAPE, 4.5), Noise.of(torch.arange(8), 3)
    attack = Square(linf(0.05), steps=250)
    expected = by_hand(attack, model, x, noise)
    found = wrong(model, expected, zeros(8))
    assert 0 < int(found.sum()) < 8
    torch.testing.assert_close(attack(model, x, zeros(8), noise), expected, rtol=0, atol=1e-7)


def margins(threat: Threat) -> Curved:
    """A model that some of the images withstand, and some do not."""
    model = Curved(SHAPE, 0.0)
    model.margin = {"linf": 3.0, "l2": 2.0, "l1": 3.6}[threat.norm]
    return model


def test_asking_ahead_changes_nothing(threat: Threat, monkeypatch: pytest.MonkeyPatch) -> None:
    x = grey(12)
    model = margins(threat)
    attack = Square(threat, steps=60, restarts=2)
    ahead = attack(model, x, zeros(12))
    assert 0 < int(wrong(model, ahead, zeros(12)).sum()) < 12
    for few, wide in ((1, 1), (64, 10_000)):
        monkeypatch.setattr(square_module, "FEW", few)
        monkeypatch.setattr(square_module, "WIDE", wide)
        torch.testing.assert_close(attack(model, x, zeros(12)), ahead, rtol=0, atol=1e-6)


def test_remembering_refusals_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = grey(12), zeros(12)
    model = Recorder(Curved(SHAPE, 4.5))
    attack = Square(linf(0.05), steps=400)
    monkeypatch.setattr(square_module, "TABLE", float("inf"))
    remembered, asked = attack(model, x, y), sum(map(len, model.asked))
    model.asked.clear()
    monkeypatch.setattr(square_module, "TABLE", 0.0)
    torch.testing.assert_close(attack(model, x, y), remembered, rtol=0, atol=1e-7)
    assert asked < sum(map(len, model.asked))


def test_an_image_does_not_see_its_batch(threat: Threat) -> None:
    x = grey(8)
    model, noise, attack = margins(threat), Noise.of(torch.arange(8) + 40, 1), Square(threat, steps=100)
    together, order = attack(model, x, zeros(8), noise), torch.randperm(8)
    assert torch.equal(attack(model, x[order], zeros(8), noise[order]), together[order])
    for i in range(0, 8, 3):
        one = slice(i, i + 1)
        torch.testing.assert_close(attack(model, x[one], zeros(1), noise[one]), together[one], rtol=0, atol=1e-6)


def test_more_steps_and_restarts_only_add() -> None:
    """The numbers of an iteration do not depend on how many follow."""
    x, y, model = grey(12), zeros(12), Curved(SHAPE, 4.5)
    short, long = (Square(linf(0.05), steps=steps)(model, x, y) for steps in (100, 400))
    found = wrong(model, short, y)
    assert 0 < int(found.sum()) < int(wrong(model, long, y).sum())
    assert torch.equal(long[found], short[found])
    again = Square(linf(0.05), steps=100, restarts=3)(model, x, y)
    assert torch.equal(again[found], short[found])


# ------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("norm, name", in_turn(NORMS, sorted(TINY)))
def test_attacks_every_kind_of_model(
    norm: Callable[[float], Threat], name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """A broken image is in ball and box, every other comes back clean, and the model is as it was. The two random
    streams, each with its loss, take turns over models and norms.
    """
    threat, turn = norm(SIZES[norm.__name__]), sorted(TINY).index(name) // 3
    rng, loss = [("image", "margin"), ("autoattack", "ce")][turn % 2]
    model, x = tiny(name), images(6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4  # missed from the start
    model.train()
    model.run(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x_adv = Square(threat, steps=25, rng=rng, loss=loss, seed=5)(model, x, y)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    broken = wrong(model.eval(), x_adv, y)
    assert torch.equal(x_adv[~broken], x[~broken])
    assert torch.equal(x_adv[0], x[0])
    assert threat.size(x_adv - x).max() <= threat.eps * (1 + 1e-5)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_the_exact_model_says_what_is_broken(threat: Threat) -> None:
    """The surrogate gives in at once, the exact model later, or (its margin out of reach) never."""
    x, y = grey(8), zeros(8)
    exact = margins(threat)
    easy = Curved(SHAPE, exact.margin - 1.0)
    easy.w, easy.v = exact.w, exact.v
    for close in (True, False):
        model = Surrogate(Plain(easy), Plain(exact), close=close)
        x_adv = Square(threat, steps=100)(model, x, y)
        broken = wrong(exact, x_adv, y)
        assert 0 < int(broken.sum()) < 8
        assert torch.equal(x_adv[~broken], x[~broken])
        never = Surrogate(Plain(easy), Plain(Curved(SHAPE, 1e3)), close=close)
        assert torch.equal(Square(threat, steps=50)(never, x, y), x)


def test_queries_are_the_images_a_never_broken_one_costs() -> None:
    attack, model = Square(l2(0.1), steps=50, restarts=2), Recorder(Curved(SHAPE, 1e3))
    attack(model, grey(1), zeros(1))
    queries = attack.queries(Output(torch.zeros(1, 2), {}))
    assert queries == 1 + 2 * (1 + 50)
    kept_ahead = sum(map(len, model.asked))  # proposals asked ahead and discarded come on top
    assert kept_ahead >= queries


def test_only_forward_passes() -> None:
    class Watching(Curved):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(x)

    Square(linf(0.1), steps=20)(Watching(SHAPE, 2.0), grey(2), zeros(2))


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 8, 12), (5, 12, 7), (1, 64, 2), (2, 28, 4), (1, 4, 60), (1, 9, 1)])
def test_images_of_any_shape(threat: Threat, shape: tuple[int, int, int]) -> None:
    x = grey(3, shape)
    for rng in ("image", "autoattack"):
        x_adv = Square(threat, steps=30, rng=rng)(Curved(shape, 0.5), x, zeros(3))
        assert x_adv.shape == x.shape
        assert threat.size(x_adv - x).max() <= threat.eps * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(1, 64, 2), (1, 28, 4)])
def test_the_start_of_a_tall_image_fills_its_ball(threat: Threat, shape: tuple[int, int, int]) -> None:
    """With one query the start is all there is: where it fools, it lies on the sphere, not at the clean image."""
    x = grey(1, shape)
    for rng in ("image", "autoattack"):
        x_adv = Square(threat, steps=1, rng=rng)(
            lambda at: torch.stack([-(at - x[:1]).abs().sum((1, 2, 3)), torch.full((len(at),), -1e-3)], 1), x, zeros(1)
        )
        torch.testing.assert_close(threat.size(x_adv - x), torch.full((1,), threat.eps), rtol=1e-3, atol=0)


def test_eps_zero_changes_nothing() -> None:
    x = grey(3)
    for norm in NORMS:
        torch.testing.assert_close(Square(norm(0.0), steps=20)(Curved(SHAPE, 1e3), x, zeros(3)), x, rtol=0, atol=0)


def test_the_global_generator_is_not_touched(threat: Threat) -> None:
    x, model = grey(3), Curved(SHAPE, 1e3)
    before = torch.get_rng_state()
    for rng in ("image", "autoattack"):
        Square(threat, steps=5, rng=rng)(model, x, zeros(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_the_attack() -> None:
    def model(x: Tensor) -> Tensor:
        value = x.flatten(1).sum(1)
        return torch.stack([value, torch.full_like(value, torch.nan)], 1)

    with pytest.raises(NotFiniteError, match="loss or gradient is not finite"):
        Square(linf(0.1), steps=5)(model, grey(2), torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps and restarts must be at least 1; got 0 and 1"),
        ({"restarts": 0}, "steps and restarts must be at least 1; got 5000 and 0"),
        ({"p_init": 0.0}, "p_init, a share of the image, must be above 0 and at most 1; got 0.0"),
        ({"p_init": 8.0}, "p_init, a share of the image, must be above 0 and at most 1; got 8.0"),
    ],
)
def test_settings_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Square(linf(0.1), **arguments)


def test_it_is_an_attack() -> None:
    attack: Attack = Square(linf(0.1), loss="ce")
    assert attack.objective.name == "joint"
    assert attack.parts(Output(torch.zeros(1, 2), {})) == [("", attack)]
