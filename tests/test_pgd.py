"""PGD and FGSM: closed forms on linear models, the contract over attacks and models, and what a hard gate hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import (
    ATTACKS,
    FGSM,
    PGD,
    Attack,
    ExpertsOnly,
    Held,
    Joint,
    NotFiniteError,
    RouterOnly,
    build_attack,
    kl,
    l1,
    l2,
    linf,
)
from robustmoe.attacks.objectives import Objective
from robustmoe.models import RoutedModel
from robustmoe.models.ensemble import EnsembleModel
from robustmoe.models.norm import Normalise
from robustmoe.noise import Noise
from robustmoe.routing import detach, to_rank
from tiny_models import TINY, in_turn

SHAPE, SIZE = (3, 4, 4), 48
ROUTED = sorted(set(TINY) - {"dense", "dual"})


class LinearModel(nn.Module):
    """Logits (0, <w, x>): the margin of label 0 is <w, x>, so the gradient of any loss of it is a multiple of w."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        value = (x * self.w).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(value), value], 1)


def rise(model: LinearModel, x: Tensor, x_adv: Tensor) -> list[float]:
    with torch.no_grad():
        return (model(x_adv)[:, 1] - model(x)[:, 1]).tolist()


@pytest.fixture
def linear() -> tuple[LinearModel, Tensor, Tensor]:
    """A linear model, and mid-grey images that no perturbation used here brings to the box."""
    return LinearModel(torch.randn(SHAPE) * 0.3), torch.full((5, *SHAPE), 0.5), torch.zeros(5, dtype=torch.long)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("attack", [FGSM(linf(0.1)), PGD(linf(0.1)), PGD(linf(0.1), steps=20, keep="last")])
def test_linf_gains_eps_times_the_l1_norm(linear: tuple[LinearModel, Tensor, Tensor], attack: Attack) -> None:
    model, x, y = linear
    x_adv = attack(model, x, y)
    torch.testing.assert_close(x_adv, (x + 0.1 * model.w.sign()).detach(), rtol=0, atol=1e-6)
    assert rise(model, x, x_adv) == pytest.approx([0.1 * float(model.w.detach().abs().sum())] * 5, rel=1e-5)


@pytest.mark.parametrize("attack", [FGSM(l2(0.5)), PGD(l2(0.5), steps=60)])
def test_l2_gains_eps_times_the_l2_norm(linear: tuple[LinearModel, Tensor, Tensor], attack: Attack) -> None:
    model, x, y = linear
    assert rise(model, x, attack(model, x, y)) == pytest.approx([0.5 * float(model.w.detach().norm())] * 5, rel=1e-4)


def test_l1_gains_eps_times_the_largest_weight(linear: tuple[LinearModel, Tensor, Tensor]) -> None:
    """Of 48 coordinates a step moves 5 %, rounded down: the two steepest; FGSM's mean over them is the closed form."""
    model, x, y = linear
    top = model.w.detach().abs().flatten().topk(2).values
    assert rise(model, x, FGSM(l1(0.4))(model, x, y)) == pytest.approx([0.4 * float(top.mean())] * 5, rel=1e-5)
    climbed = rise(model, x, PGD(l1(0.4), steps=300, step_size=0.05)(model, x, y))
    best = 0.4 * float(top[0])
    assert all(0.9 * best < value <= best * (1 + 1e-5) for value in climbed)


def test_where_the_box_binds_the_attack_stops_at_it() -> None:
    model, x = LinearModel(torch.ones(SHAPE)), torch.full((1, *SHAPE), 0.95)
    assert torch.equal(PGD(linf(0.1))(model, x, torch.tensor([0])), torch.ones(1, *SHAPE))


@pytest.mark.parametrize("steps, step_size, expected", [(1, None, 0.2), (2, None, 0.1), (3, 0.03, 0.09), (3, 1.0, 0.2)])
def test_step_sizes(steps: int, step_size: float | None, expected: float) -> None:
    """eps / 4 by default and eps for a single step, from the clean image: steps * step_size, at most eps."""
    model, x = LinearModel(torch.ones(SHAPE)), torch.full((1, *SHAPE), 0.5)
    attack = PGD(linf(0.2), steps=steps, step_size=step_size, start="clean")
    torch.testing.assert_close(attack(model, x, torch.tensor([0])), x + expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [linf, l2, l1])
def test_eps_zero_changes_nothing(norm: Callable[[float], object], images: Callable[..., Tensor]) -> None:
    x = images(3, *SHAPE)
    model = LinearModel(torch.randn(SHAPE))
    for attack in (PGD(norm(0.0), steps=3), FGSM(norm(0.0))):
        torch.testing.assert_close(attack(model, x, torch.zeros(3, dtype=torch.long)), x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-12, 1e-18, 1e-30])
def test_a_vanishing_gradient_still_points_somewhere(scale: float) -> None:
    """Confident models have gradients of any smallness; an l2 step must not shrink with them."""
    model, x = LinearModel(torch.randn(SHAPE) * scale), torch.full((2, *SHAPE), 0.5)
    x_adv = FGSM(l2(0.5), Joint("margin"))(model, x, torch.zeros(2, dtype=torch.long))
    assert (x_adv - x).flatten(1).norm(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps and restarts must be at least 1; got 0 and 1"),
        ({"restarts": 0}, "steps and restarts must be at least 1; got 10 and 0"),
        ({"step_size": 0.0}, "step_size must be above 0"),
        ({"step_size": float("nan")}, "step_size must be above 0"),
    ],
)
def test_settings_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(linf(0.1), **arguments)


# ------------------------------------------------------------------------------------------------ what is kept


class Hump(nn.Module):
    """One pixel decides: its margin is highest at 0.55 and falls on both sides, so steps of 0.1 overshoot."""

    def forward(self, x: Tensor) -> Tensor:
        value = -(x.flatten(1)[:, 0] - 0.55).abs() + 0.1
        return torch.stack([torch.zeros_like(value), value], 1)


def test_the_best_iterate_is_kept_not_the_last() -> None:
    """From 0.5 the pixel goes 0.6, 0.5, 0.6...; with step 0.07: 0.57, 0.50, 0.57, 0.50: after four steps the last is
    0.50.
    """
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    attack = PGD(linf(0.3), steps=4, step_size=0.07, start="clean")
    assert float(attack(Hump(), x, y)) == pytest.approx(0.57, abs=1e-6)
    assert float(replace(attack, keep="last")(Hump(), x, y)) == pytest.approx(0.50, abs=1e-6)


def test_fooled_comes_before_a_higher_loss() -> None:
    """Three classes; the first step fools with a small loss, the next raises the loss through a window that does not
    fool.
    """

    @dataclass(frozen=True)
    class Scripted(Objective):
        name = "scripted"
        aims_at_router = True

        def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Callable[[Tensor], object]:
            from robustmoe.attacks import Score

            def inner(x_adv: Tensor) -> Score:
                value = x_adv.flatten(1)[:, 0]
                return Score(value, (value > 0.55) & (value < 0.65))

            return inner

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    attack = PGD(linf(0.4), steps=4, step_size=0.1, start="clean", objective=Scripted())
    assert float(attack(lambda x: x.flatten(1), x, y)) == pytest.approx(0.6, abs=1e-6)


class Counting(nn.Module):
    """A model with known answers that notes the images it is asked about."""

    def __init__(self, broken: Tensor) -> None:
        super().__init__()
        self.broken, self.asked = broken, []

    def forward(self, x: Tensor) -> Tensor:
        """Pixel 0 names the image (it has no gradient); those of ``broken`` are fooled wherever they are."""
        name = (x.detach().flatten(1)[:, 0] * 100).round().long()
        self.asked.append(name.tolist())
        value = torch.where(self.broken[name], 1.0, -1.0) + 0.01 * x.flatten(1)[:, 1]
        return torch.stack([torch.zeros_like(value), value], 1)


def test_restarts_attack_only_the_unbroken() -> None:
    model = Counting(torch.tensor([True, False, True, False, False]))
    x = torch.full((5, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] = torch.arange(5) / 100
    PGD(linf(0.001), steps=2, restarts=3)(model, x, torch.zeros(5, dtype=torch.long))
    assert (
        model.asked == [[0, 1, 2, 3, 4]] * 3 + [[1, 3, 4]] * 6
    )  # per restart: two steps, and the last iterate's score


def test_every_restart_starts_elsewhere() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return torch.stack([5 + 0 * x.flatten(1)[:, 0], x.flatten(1)[:, 0]], 1)

    PGD(linf(0.1), steps=1, restarts=3)(model, torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.long))
    starts = seen[::2]  # each restart asks twice: at its start, and after the step
    assert len(starts) == 3
    assert all(not torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("keep", ["best", "first", "last"])
def test_restarts_know_which_images_they_go_on_with(
    keep: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """Each image's own route is held in every restart, though later ones see some of the images: as one by one."""
    model, x, y, noise = tiny("ensemble_hard").double(), images(8).double(), labels(8), Noise.of(torch.arange(8))
    forced = to_rank(model.run(x).trace, torch.arange(8) % 3)
    attack = PGD(linf(0.1), steps=2, restarts=3, keep=keep, objective=Held(detach(forced)))
    broken = model.run(attack(model, x, y, noise), forced=forced).logits.argmax(1) != y
    assert 0 < int(broken.sum()) < 8  # so the restarts go on with some
    one_by_one = []
    for row in torch.arange(8).split(1):
        own = {name: routing[row].detach() for name, routing in forced.items()}
        one_by_one.append(replace(attack, objective=Held(own))(model, x[row], y[row], noise[row]))
    torch.testing.assert_close(attack(model, x, y, noise), torch.cat(one_by_one))


def test_restarts_stop_when_all_are_broken() -> None:
    model = Counting(torch.tensor([True, True]))
    x = torch.full((2, 1, 1, 2), 0.5)
    x[:, 0, 0, 0] = torch.arange(2) / 100
    PGD(linf(0.001), steps=1, restarts=9)(model, x, torch.zeros(2, dtype=torch.long))
    assert len(model.asked) == 2


@pytest.mark.parametrize("keep, name", in_turn(["best", "last"], ROUTED))
def test_more_restarts_never_do_worse(
    keep: str,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    routed, x, y = tiny(name), images(12), labels(12)
    fooled, loss = None, None
    for restarts in (2, 3, 5):
        x_adv = PGD(linf(0.03), steps=2, restarts=restarts, keep=keep)(routed, x, y)
        with torch.no_grad():
            logits = routed(x_adv)
        now, ce = logits.argmax(1) != y, F.cross_entropy(logits, y, reduction="none")
        if fooled is not None:
            assert (now >= fooled).all()
            assert (ce >= loss - 1e-5)[now == fooled].all()
        fooled, loss = now, ce


def test_the_best_of_more_steps_is_never_worse(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    """At a fixed step size the iterates of fewer steps are among those of more."""
    x = images(12)
    with torch.no_grad():
        y = model(x).argmax(1)
    previous = torch.full((12,), -torch.inf)
    for steps in (1, 3, 6):
        x_adv = PGD(linf(0.02), steps=steps, step_size=0.01)(model, x, y)
        with torch.no_grad():
            margin = torch.where(model(x_adv).argmax(1) != y, 1e3, F.cross_entropy(model(x_adv), y, reduction="none"))
        assert (margin >= previous - 1e-5).all()
        previous = margin


# ------------------------------------------------------------------------------------------------ the contract

ATTACK_SPECS = {
    "fgsm": ["fgsm(linf(8/255))", "fgsm(l2(0.5))"],
    "pgd": [
        "pgd(linf(8/255), steps=3)",
        "pgd(linf(8/255), steps=2, keep=last)",
        "pgd(l2(0.5), steps=3, restarts=2)",
        "pgd(l1(4), steps=3, start=clean)",
        "pgd(linf(8/255), steps=2, objective=experts_only)",
        "pgd(linf(8/255), steps=2, objective=joint(kl))",
        "pgd(l2(0.5), steps=2, objective=joint(margin))",
        "pgd(linf(8/255), steps=2, keep=first)",
        "pgd(linf(8/255), steps=2, objective=router_only)",  # the ninth: meets the dense model, which it refuses
    ],
    "vmoe_pgd": ["vmoe_pgd(linf(8/255), steps=2)"],
    "apgd": ["apgd(linf(8/255), steps=4)", "apgd(l1(4), steps=4)"],
    "apgd_t": ["apgd_t(l2(0.5), steps=3, targets=2)"],
    "fab": ["fab(linf(8/255), steps=3, targets=2)"],
    "fmn": ["fmn(l2(0.5), steps=4)"],
    "square": ["square(linf(8/255), steps=8)"],
    "route_flip": ["route_flip(linf(8/255), steps=2)"],
    "other_routes": ["other_routes(linf(8/255), steps=2)"],
    "undivided": ["undivided(pgd(linf(8/255), steps=2))", "undivided(pgd(l2(0.5), steps=2, keep=last))"],
    "folded": ["folded(pgd(linf(8/255), steps=2))", "folded(pgd(l2(0.5), steps=2, keep=last))"],
    "expert_transition": ["expert_transition(l2(0.5), steps=2)"],
    "route_beam": ["route_beam(linf(8/255), steps=2, beam=2, candidates=4)"],
    "through": ["through(soft(0.5), pgd(linf(8/255), steps=2))", "through(straight_through, apgd(l2(0.5), steps=2))"],
    "noisy": ["noisy(pgd(linf(8/255), steps=2, keep=last))"],
    "bf16": ["bf16(pgd(linf(8/255), steps=2, keep=last))", "bf16(pgd(l2(0.5), steps=2))"],
}
SUITES = {"autoattack", "autoattack_routing", "quick_verdict"}
"""Of parts that stand above; see test_autoattack.py, test_quick_verdict.py."""


def test_every_attack_of_the_table_stands_under_the_contract() -> None:
    assert set(ATTACK_SPECS) | SUITES == set(ATTACKS)


def meetings() -> list[tuple[str, str]]:
    """Returns the pairs of an attack and a tiny model under the contract: every attack of the table meets every model.
    Where it has several specs each meets every second model, in turn.
    """
    return [
        (spec, model)
        for specs in ATTACK_SPECS.values()
        for turn, spec in enumerate(specs)
        for place, model in enumerate(sorted(TINY))
        if len(specs) == 1 or (turn + place) % 2 == 0
    ]


def test_every_attack_meets_every_model() -> None:
    met = set(meetings())
    for name, specs in ATTACK_SPECS.items():
        assert {model for spec, model in met if spec in specs} == set(TINY), name
        assert all(sum(other == spec for other, _ in met) >= 4 for spec in specs), name
    assert ("pgd(linf(8/255), steps=2, objective=router_only)", "dense") in met


@pytest.mark.parametrize("spec, name", meetings())
def test_the_contract(
    spec: str,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """In the ball and the box; modes, buffers, weights, gradients and generators untouched; deterministic."""
    attack, model, x, y = build_attack(spec), tiny(name), images(6), labels(6)
    if attack.needs_router and attack.objective.aims_at_router and not model.run(x).trace:
        with pytest.raises(ValueError, match="needs a model with a router; this model is dense"):
            attack(model, x, y)
        return
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0  # modes that no call of train() or eval() would leave
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 4 != 1)
        parameter.grad = torch.full_like(parameter, 7.0) if i % 2 == 0 else None
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given, generator = x.clone(), torch.get_rng_state()

    x_adv = attack(model, x, y)

    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert (attack.threat.size(x_adv - x) <= attack.threat.eps * (1 + 1e-5)).all()
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 4 != 1)
        assert (parameter.grad == 7.0).all() if i % 2 == 0 else parameter.grad is None
    assert torch.equal(attack(model, x, y), x_adv)


@pytest.mark.parametrize(
    "spec, name",
    in_turn(["pgd(linf(8/255), steps=3, restarts=2)", "pgd(l2(0.5), steps=3)", "pgd(l1(4), steps=3)"], ROUTED),
)
def test_an_image_is_attacked_alike_in_any_batch(
    spec: str,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    """In float64, where a rounding cannot tip a sign: alone, or in another order, with the image's own noise."""
    attack, model = build_attack(spec), tiny(name).double()
    x, y, index = images(8).double(), labels(8), torch.arange(8) + 40
    whole = attack(model, x, y, Noise.of(index))
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    torch.testing.assert_close(attack(model, x[order], y[order], Noise.of(index[order])), whole[order])
    parts = [attack(model, x[i : i + 1], y[i : i + 1], Noise.of(index[i : i + 1])) for i in range(8)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_seed_and_the_noise_choose_the_start(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    model, x, y, attack = tiny("dense"), images(4), labels(4), PGD(linf(0.03), steps=1, keep="best")
    assert not torch.equal(attack(model, x, y), replace(attack, seed=1)(model, x, y))
    by_position = Noise.of(torch.arange(4), 1)
    assert torch.equal(attack(model, x, y, by_position), replace(attack, seed=1)(model, x, y))


def test_noise_of_another_batch_is_refused(images: Callable[..., Tensor]) -> None:
    """One stream would broadcast: the same start for every image, silently."""
    with pytest.raises(ValueError, match="there are 3 images and 1 streams of noise"):
        PGD(linf(0.1))(lambda x: x.flatten(1), images(3), torch.zeros(3, dtype=torch.long), Noise.of(torch.arange(1)))


def test_an_empty_batch_is_returned(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    assert PGD(linf(0.03))(model, images(0), torch.zeros(0, dtype=torch.long)).shape == (0, 3, 8, 8)


def test_any_callable_can_be_attacked(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    w = torch.randn(192, 4)
    x, y = images(5), labels(5)
    x_adv = PGD(linf(0.05))(lambda x: x.flatten(1) @ w, x, y)
    before, after = (F.cross_entropy(at.flatten(1) @ w, y, reduction="none") for at in (x, x_adv))
    assert (after > before).all()


@pytest.mark.parametrize(
    "spec, name", in_turn(["pgd(linf(8/255), steps=3)", "pgd(l2(0.5), steps=2)", "pgd(l1(4), steps=2)"], ROUTED)
)
def test_under_bf16_autocast_the_perturbation_stays_float32(
    spec: str,
    name: str,
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
    labels: Callable[[int], Tensor],
) -> None:
    attack, x, y = build_attack(spec), images(6), labels(6)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = attack(tiny(name), x, y)
    assert x_adv.dtype == torch.float32
    # half an ulp below 1 is 3e-8 a pixel, by which x + delta may round outwards
    slack = 6e-8 * {"linf": 1, "l2": 192**0.5, "l1": 192}[attack.threat.norm]
    assert (attack.threat.size(x_adv.double() - x.double()) <= attack.threat.eps * (1 + 1e-6) + slack).all()


@pytest.mark.parametrize("attack", [FGSM(linf(0.03)), PGD(linf(0.03)), PGD(l2(0.5), objective=ExpertsOnly())])
def test_a_broken_model_stops_the_attack(attack: Attack, images: Callable[..., Tensor]) -> None:
    """sign(NaN) is 0 in torch: an attack that goes on returns its start, and reads as robustness."""
    with pytest.raises(NotFiniteError, match="loss or gradient is not finite"):
        attack(lambda x: x.flatten(1)[:, :4] * float("nan"), images(3), torch.zeros(3, dtype=torch.long))


def test_an_infinite_gradient_stops_the_attack(images: Callable[..., Tensor]) -> None:
    with pytest.raises(NotFiniteError, match="loss or gradient is not finite"):
        PGD(linf(0.03), start="clean")(
            lambda x: (x - x.detach()).flatten(1)[:, :4].sqrt(), images(3), torch.zeros(3, dtype=torch.long)
        )


@pytest.mark.parametrize("start", ["random", "clean"])
def test_on_a_model_without_gradient_the_attack_stays_at_its_start(start: str, images: Callable[..., Tensor]) -> None:
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    noise = Noise.of(torch.arange(3))
    attack = PGD(linf(0.03), start=start, keep="last")
    found = attack(lambda x: x.detach().flatten(1)[:, :4], x, y, noise)
    assert torch.equal(found, x if start == "clean" else attack.threat.start(x, noise.fold(0)))


# ------------------------------------------------------------------------------------------------ routers under attack


class OnRoute(nn.Module):
    """``model`` with the routes of the images ``x``: what an attack on the experts alone is an attack on."""

    def __init__(self, model: RoutedModel, x: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.trace = model.run(x).trace

    def forward(self, x: Tensor) -> Tensor:
        return self.model.run(x, forced=self.trace).logits


def test_experts_only_attacks_the_model_with_its_route_held(
    routed: RoutedModel, images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    x, y = images(8), labels(8)
    attack = PGD(linf(0.05), steps=4)
    held = attack(OnRoute(routed, x), x, y)
    torch.testing.assert_close(replace(attack, objective=ExpertsOnly())(routed, x, y), held, rtol=0, atol=1e-6)


def linear_router(weight: Tensor, bias: Tensor, experts: list[nn.Module], gate: str) -> EnsembleModel:
    """An ensemble on unnormalised images whose router is linear in the pixels."""
    router = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(experts)))
    with torch.no_grad():
        router[1].weight.copy_(weight)
        router[1].bias.copy_(bias)
    return EnsembleModel(router, experts, gate, 1, "logits", Normalise((0.0,) * 3, (1.0,) * 3)).eval()


@pytest.mark.parametrize("gate", ["hard", "straight_through"])
@pytest.mark.parametrize("norm, dual", [(linf, 1), (l2, 2)])
def test_one_step_reroutes_a_linear_router_at_the_closed_form_distance(
    gate: str, norm: Callable[[float], object], dual: int
) -> None:
    """The decision is sign(<d, x> + c), d = w1 - w0: its distance is |<d, x> + c| / ||d||_dual."""
    weight, x = torch.randn(2, SIZE), 0.4 + 0.2 * torch.rand(6, *SHAPE)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 3)) for _ in range(2)]
    model = linear_router(weight, torch.zeros(2), experts, gate)
    gap = x.flatten(1) @ (weight[1] - weight[0])
    distance = gap.abs() / torch.linalg.vector_norm(weight[1] - weight[0], dual)
    before = model.run(x).trace["router"].index
    for i in range(6):
        for factor, moved in ((1.02, True), (0.98, False)):
            one = slice(i, i + 1)
            attack = FGSM(norm(factor * float(distance[i])), RouterOnly())
            after = model.run(attack(model, x[one], torch.tensor([0]))).trace["router"].index
            assert bool((after != before[one]).item()) is moved


def test_router_only_objective_by_hand(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """At the clean image: the runner-up's logit minus the winner's for top-1; third minus second for k = 2; 0 for
    soft.
    """
    x, y = images(5), torch.zeros(5, dtype=torch.long)
    for name, places in (("ensemble_hard", (1, 0)), ("ensemble_k2", (2, 1)), ("ensemble_soft", None)):
        model = tiny(name)
        with torch.no_grad():
            score = RouterOnly()(model, x, y)(x)
            ordered = model.run(x).trace["router"].logits[:, 0].sort(descending=True).values
        expected = ordered[:, places[0]] - ordered[:, places[1]] if places else torch.zeros(5)
        torch.testing.assert_close(score.loss, expected, rtol=0, atol=1e-6)


def test_router_only_of_a_soft_gate_is_the_kl_of_the_gate(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, x = tiny("ensemble_soft"), images(4)
    inner = RouterOnly()(model, x, torch.zeros(4, dtype=torch.long))
    moved = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        p, q = (torch.softmax(model.run(at).trace["router"].logits[:, 0], -1) for at in (x, moved))
        torch.testing.assert_close(inner(moved).loss, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
        assert kl(q.log(), q.log()).tolist() == [0.0] * 4


class Nearly(nn.Module):
    """Says class ``says``, with a margin of 6 that one pixel of its own moves a little."""

    def __init__(self, says: int) -> None:
        super().__init__()
        self.says = says

    def forward(self, x: Tensor) -> Tensor:
        moving = torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)
        return moving + F.one_hot(torch.tensor(self.says), 2) * 6.0


def hidden_route(gate: str, winner: float = 0.5) -> tuple[EnsembleModel, Tensor, Tensor]:
    """Expert 0 is right and hardly moves, expert 1 is wrong; the router looks at pixels that no expert looks at.

    It decides by the mean m of 47 pixels, 0.5 in x: expert 1 where m > 0.58. With eps = 0.1 a random start almost never
    gets there, as the mean of 47 uniform draws on [-eps, eps] deviates by eps / sqrt(3 * 47) = 0.008. The winner's
    logit falls by ``winner`` times m, the rival's rises by the rest.
    """
    weight = torch.zeros(2, SIZE)
    weight[0, 1:], weight[1, 1:] = -winner / (SIZE - 1), (1 - winner) / (SIZE - 1)
    model = linear_router(weight, torch.tensor([0.58, 0.0]), [Nearly(0), Nearly(1)], gate)
    return model, torch.full((8, *SHAPE), 0.5), torch.zeros(8, dtype=torch.long)


def robust(model: RoutedModel, attack: Attack, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(attack(model, x, y)).argmax(1) == y).float().mean())


@pytest.mark.parametrize("restarts", [1, 5])
def test_a_hard_gate_hides_its_router_from_plain_pgd(restarts: int) -> None:
    """The demonstration: 100 % "robust" under joint PGD, 0 % under an attack on the router of the very same model."""
    model, x, y = hidden_route("hard")
    attack = PGD(linf(0.1), steps=20, restarts=restarts)
    assert robust(model, attack, x, y) == 1.0
    assert robust(model, replace(attack, objective=ExpertsOnly()), x, y) == 1.0
    assert robust(model, replace(attack, objective=RouterOnly()), x, y) == 0.0


def test_a_straight_through_gate_shows_its_router_to_plain_pgd() -> None:
    model, x, y = hidden_route("straight_through")
    assert robust(model, PGD(linf(0.1), steps=20), x, y) == 0.0
    assert robust(model, PGD(linf(0.1), steps=20, objective=ExpertsOnly()), x, y) == 1.0


def test_a_straight_through_gradient_moves_the_chosen_logit_alone() -> None:
    """Where only the rival's logit depends on the image, it is as blind as the hard gate, and router_only is not."""
    model, x, y = hidden_route("straight_through", winner=0.0)
    assert robust(model, PGD(linf(0.1), steps=20), x, y) == 1.0
    assert robust(model, PGD(linf(0.1), steps=20, objective=RouterOnly()), x, y) == 0.0
