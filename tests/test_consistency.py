"""Router consistency: terms by hand and against their definitions, and as an option of every method."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import PGD, RouterOnly, build_attack, evaluating, linf
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.training import Loss, Method, MiniBatch, Pair, at, build_method, consistent, standard, trades, train_step
from robustmoe.training.consistency import (
    CONSISTENCY,
    LOSSES,
    Consistent,
    check_consistency,
    divergence,
    jensen_shannon,
    lipschitz,
    prc,
)
from robustmoe.training.optimisation import SGD

PAIR = Pair(torch.zeros(2, 1, 1, 2), torch.tensor([[0.1, 0.1], [0.0, 0.2]]).view(2, 1, 1, 2))


def logits(*p: list[float]) -> Tensor:
    """(n, 1, e), whose softmax is as given."""
    return torch.tensor(p, dtype=torch.float64).log()[:, None]


P, Q = logits([0.9, 0.1], [0.3, 0.7]), logits([0.5, 0.5], [0.3, 0.7])


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_kl_by_hand() -> None:
    """Of two images, the second of which did not change; the direction is KL(clean || attacked)."""
    assert divergence(P, Q, PAIR).item() == pytest.approx(kl_by_hand([0.9, 0.1], [0.5, 0.5]) / 2)
    assert divergence(Q, P, PAIR).item() == pytest.approx(kl_by_hand([0.5, 0.5], [0.9, 0.1]) / 2)


def test_jensen_shannon_by_hand() -> None:
    """The middle of (0.9, 0.1) and (0.5, 0.5) is (0.7, 0.3). Between two sure and different decisions it is log 2."""
    middle = [0.7, 0.3]
    expected = (kl_by_hand([0.9, 0.1], middle) + kl_by_hand([0.5, 0.5], middle)) / 2
    assert jensen_shannon(P, Q, PAIR).item() == pytest.approx(expected / 2)
    assert jensen_shannon(Q, P, PAIR).item() == pytest.approx(expected / 2)
    sure = 1e4 * torch.eye(2)[:, None]
    assert jensen_shannon(sure, sure.flip(0), PAIR).item() == pytest.approx(math.log(2))
    assert jensen_shannon(sure, sure, PAIR).item() == 0


def test_prc_by_hand() -> None:
    """M = 2 / 2 * ((0.9, 0.1)^T (0.5, 0.5) + (0.3, 0.7)^T (0.3, 0.7))
    = ((0.45 + 0.09, 0.45 + 0.21), (0.05 + 0.21, 0.05 + 0.49)) = ((0.54, 0.66), (0.26, 0.54)).
    """
    expected = 0.005 * 0.46**2 + 0.05 * (0.66**2 + 0.26**2) / 2
    assert prc(P, Q, PAIR).item() == pytest.approx(expected)


def test_prc_wants_sure_equal_and_spread_decisions() -> None:
    """Sure, equal and even: M is the identity. All collapsed on one of 4: M_00 = 4, the rest 0. Even p: all M are 1/4
    times 4 / 4... that is, 4 * 1/16 = 1/4. Every decision changed: the diagonal is 0, and 4 entries of 12 are 1.
    """
    even = 1e3 * torch.eye(4).repeat(2, 1)[:, None]
    assert prc(even, even, PAIR).item() == pytest.approx(0, abs=1e-9)
    one = torch.zeros(8, 1, 4)
    one[..., 0] = 1e3
    assert prc(one, one, PAIR).item() == pytest.approx(0.005 * (9 + 3) / 4)
    flat = torch.zeros(8, 1, 4)
    assert prc(flat, flat, PAIR).item() == pytest.approx(0.005 * 0.75**2 + 0.05 / 16)
    assert prc(even, even.roll(1, -1), PAIR).item() == pytest.approx(0.005 + 0.05 * 4 / 12)
    assert prc(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), PAIR).item() == 0  # one expert has nobody to be apart from


def test_lipschitz_by_hand() -> None:
    """Pixels moved by (0.1, 0.1) and (0, 0.2): MSE 0.01 and 0.02. Logits by (1, 0) and (2, 2): MSE 0.5 and 4. The mean
    of 50 and 200. An image that stayed has ratio 0, and rounding there (1e-7) is not blown up.
    """
    clean = torch.zeros(2, 1, 2)
    attacked = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]]])
    assert lipschitz(clean, attacked, PAIR).item() == pytest.approx(125.0, rel=1e-5)
    still = Pair(PAIR.x, PAIR.x)
    assert lipschitz(clean, clean, still).item() == 0
    assert lipschitz(clean, clean + 1e-7, still).item() < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences_and_of_both_sides(name: str) -> None:
    clean, attacked = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    values = (clean.requires_grad_(), attacked.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: LOSSES[name](a, b, PAIR), values)  # type: ignore[index]
    loss = LOSSES[name](*values, PAIR)  # type: ignore[index]
    assert all(float(each.abs().max()) > 0 for each in torch.autograd.grad(loss, values))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [1e4, 1e12])
def test_huge_logits_are_finite(name: str, gap: float) -> None:
    clean = (gap * torch.eye(4)[:2, None]).requires_grad_()
    value = LOSSES[name](clean, clean.detach().roll(1, -1), PAIR)  # type: ignore[index]
    (gradient,) = torch.autograd.grad(value, clean)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------ in a method

ATTACK = PGD(linf(0.1), steps=2, keep="last")
VIT = "vit_moe(tiny, patch=4, width=16, depth=4, heads=2, experts=4, k=2, placement=every_2)"


def streams(n: int) -> Noise:
    return Noise.of(torch.arange(n), 5)


def taken(method: Method, model: RoutedModel, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of one step, phase by phase summed, by parameter."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimisers = [SGD(1.0, 0.0, 0.0).make(phase.parameters(model).values()) for phase in method.phases]
    train_step(model, method, optimisers, MiniBatch(x, y, streams(len(x))))
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("of", "name"), [(of, name) for of in ("router", "model") for name in LOSSES if (of, name) != ("model", "prc")]
)
def test_a_method_adds_the_term_of_its_own_attacked_images(
    name: str, of: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Against its few lines: the attack's images, taken from its own call; the mean over two routers, or the logits."""
    x, y = images(6), torch.arange(6) % 4
    model, twin, plain = tiny(VIT), tiny(VIT), tiny(VIT)
    found = taken(build_method(f"consistent(at(pgd(linf(0.1), steps=2, keep=last)), {name}, 3.0, {of})"), model, x, y)
    own = taken(at(ATTACK), plain, x, y)
    pair = Pair(x, ATTACK(twin.train(), x, y, streams(6).fold(0)))
    assert twin.training
    clean, attacked = twin.eval().run(x), twin.run(pair.x_adv)
    if of == "model":
        term = LOSSES[name](clean.logits[:, None], attacked.logits[:, None], pair)  # type: ignore[index]
    else:
        first, second = clean.trace
        term = (
            sum(
                LOSSES[name](clean.trace[router].logits, attacked.trace[router].logits, pair)  # type: ignore[index]
                for router in (first, second)
            )
            / 2
        )  # type: ignore[assignment]
    parameters = dict(twin.named_parameters())
    more = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
    moved = 0.0
    for key, gradient in zip(parameters, more):
        expected = own[key] if gradient is None else own[key] + 3 * gradient
        torch.testing.assert_close(found[key], expected, rtol=2e-3, atol=2e-6)
        moved = max(moved, 0.0 if gradient is None else float(gradient.abs().max()))
    assert moved > 1e-5


def test_methods_say_what_they_attacked(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    """The pair of each phase: its clean images, and those its own attack makes of them; none where nothing attacks."""
    x, y = images(6), labels(6)
    attack = "pgd(linf(0.1), steps=2, keep=last)"
    for text, kind, pairs in (
        ("standard", "ensemble_k2", [False]),
        (f"at({attack})", "ensemble_k2", [True]),
        (f"trades({attack})", "ensemble_k2", [True]),
        (f"rt_er({attack})", "ensemble_k2", [True]),
        (f"advmoe({attack})", "pathway", [True, True]),
        (f"advmoe({attack}, released)", "pathway", [True, True]),
        (f"advmoe({attack}, released, shared_attack=True)", "pathway", [True]),
        (f"jtdmoe({attack})", "dual", [True, False]),
        (f"jtdmoe({attack}, gamma=1)", "dual", [True, True]),
        (f"consistent(at({attack}))", "ensemble_k2", [True]),
    ):
        model = tiny(kind).train()
        for phase, attacked in zip(build_method(text).phases, pairs, strict=True):
            loss = phase.loss(model, x, y, streams(6))
            assert (loss.pair is not None) == attacked, (text, phase.name)
            if loss.pair is not None:
                assert torch.equal(loss.pair.x, x)
                assert 0.05 < float((loss.pair.x_adv - x).abs().max()) <= 0.1 + 1e-6
                assert not loss.pair.x_adv.requires_grad
    mixed = build_method(f"at({attack}, mixup=1)").phases[0].loss(tiny("dense"), x, y, streams(6))
    assert mixed.pair is not None
    assert not torch.equal(mixed.pair.x, x)  # what was attacked is the mixed image
    assert 0.05 < float((mixed.pair.x_adv - mixed.pair.x).abs().max()) <= 0.1 + 1e-6


class Counting:
    """A phase's loss that says which images it attacked, or none."""

    def __init__(self, pair: Pair | None) -> None:
        self.pair = pair

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        return Loss(next(model.parameters()).sum() * 0, None, self.pair)


def test_whose_attack_it_is(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """The phase's own images; else those of the attack given for the term, or of the method's; never two attacks."""
    model, x, y = tiny("ensemble_k2"), images(6), torch.arange(6) % 4
    given = build_attack("pgd(linf(0.2), steps=2, objective=router_only)")
    own = Pair(x, (x + 0.05).clamp(max=1.0))

    def value(pair: Pair | None, anew: bool) -> float:
        loss = Consistent(Counting(pair), "kl", 1.0, "router", given, anew)
        return loss(model, x, y, streams(6)).value.item()

    def expected(x_adv: Tensor) -> float:
        with evaluating(model), torch.no_grad():
            a, b = (model.run(images_).trace["router"].logits for images_ in (x, x_adv))
        return float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True) / 6)

    fresh = given(model, x, y, streams(6).fold(CONSISTENCY))
    assert value(own, False) == pytest.approx(expected(own.x_adv), rel=1e-4)
    assert value(own, True) == pytest.approx(expected(fresh), rel=1e-4)
    assert value(None, False) == pytest.approx(expected(fresh), rel=1e-4)
    assert expected(fresh) > 2 * expected(own.x_adv)


def test_what_a_method_keeps() -> None:
    """Names, parameters, batches and learning rates of its phases, and its attack."""
    whole = build_method("advmoe(router_lr=0.5)")
    wrapped = consistent(whole)
    assert wrapped.attack == whole.attack
    for before, after in zip(whole.phases, wrapped.phases, strict=True):
        assert (before.name, before.params, before.own_batch, before.lr, before.needs) == (
            after.name, after.params, after.own_batch, after.lr, after.needs
        )  # fmt: skip
    router_only = PGD(linf(0.1), objective=RouterOnly())
    assert consistent(standard(), attack=router_only).attack == router_only
    assert consistent(trades(ATTACK), attack=router_only).attack == trades(ATTACK).attack


def test_what_is_refused(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    for text, words in (
        ("consistent(standard)", "this method has no attack; give one with attack=, such as attack=pgd"),
        ("consistent(at(fgsm(linf(0.1))), weight=-1)", "weight must be 0 or more; got -1"),
        ("consistent(at(fgsm(linf(0.1))), prc, of=model)", "classes are not to be balanced; expected of=router"),
        ("consistent(at(fgsm(linf(0.1))), loss=mse)", "'loss': unknown name 'mse'"),
        ("consistent(resnet18)", "expected"),
    ):
        with pytest.raises(UserError, match=words):
            build_method(text)
    with pytest.raises(ValueError, match="loss must be one of kl, jsd, prc, lipschitz; got 'l2'"):
        check_consistency("l2")  # what `consistent` asks in Python, where no type checker looks
    method = build_method("consistent(at(fgsm(linf(0.1))))")
    with pytest.raises(UserError, match=r"needs a model with a router; this one is dense: expected of=model"):
        taken(method, tiny("dense"), images(4), torch.arange(4))
    taken(build_method("consistent(at(fgsm(linf(0.1))), of=model)"), tiny("dense"), images(4), torch.arange(4))


def test_the_term_leaves_statistics_and_modes_alone(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model = tiny("pathway")
    taken(build_method("consistent(at(fgsm(linf(0.1))))"), model, images(6), torch.arange(6) % 4)
    assert all(module.training for module in model.modules())
    counted = {int(v) for name, v in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counted == {1}  # the method's own pass
