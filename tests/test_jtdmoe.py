"""JTDMoE: who moves in which phase (C16, J4, J5), and the two losses against a few independent lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import PGD, Held, changed, linf
from robustmoe.errors import UserError
from robustmoe.models import DualModel, RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.routing import to_expert, to_rank
from robustmoe.training import Method, MiniBatch, build_method, jtdmoe, train, train_step
from robustmoe.training.optimisation import AdamW
from robustmoe.training.rt_er import RTER

ATTACK = PGD(linf(0.1), steps=2, keep="last")
HALF = "ensemble(resnet8(width=4), experts=2, gate=straight_through, router=linear)"
N = 12


def make(seed: int = 0, mix: str = "probabilities", mixer: str = "") -> DualModel:
    extra = f", mixer={mixer}" if mixer else ""
    model = build_model(f"dual({HALF}, {HALF}, alpha=0.7, mix={mix}{extra})", 4, (3, 8, 8), seed=seed)
    assert isinstance(model, DualModel)
    return model


def adam(method: Method, model: RoutedModel) -> list[torch.optim.Optimizer]:
    """The released code's kind of optimiser: one stale gradient is a whole step of it."""
    return [AdamW(1e-2, 0.0).make(phase.parameters(model).values()) for phase in method.phases]


def state(model: RoutedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: RoutedModel) -> set[str]:
    """Parameters and buffers that are no longer bit for bit what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


@pytest.fixture
def batch(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> tuple[Tensor, Tensor, Noise]:
    return images(N), labels(N), Noise.of(torch.arange(N), 5)


# ------------------------------------------------------------------------------------------------ C16


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("mixer", ["", "linear"])
def test_c16_each_phase_leaves_the_other_half_bit_for_bit(
    mixer: str, gamma: float, batch: tuple[Tensor, Tensor, Noise]
) -> None:
    """Weights and buffers, in two batches in a row with one optimiser state: where a gradient of the phase before were
    left (J4), Adam would move the other half in the second.
    """
    model = make(mixer=mixer)
    whole = jtdmoe(ATTACK, gamma=gamma)
    optimisers = adam(whole, model)
    others = {"robust": ("standard.", "mixer."), "standard": ("robust.",)}
    for number in range(2):
        for phase, optimiser in zip(whole.phases, optimisers):
            before, (x, y, noise) = state(model), batch
            train_step(model, Method((phase,), whole.attack), [optimiser], MiniBatch(x, y, noise.fold(number)))
            changes = moved(before, model)
            assert not {name for name in changes if name.startswith(others[phase.name])}
            own = others["standard" if phase.name == "robust" else "robust"][0]
            assert f"{own}router.head.weight" in changes
            assert any(name.startswith(f"{own}experts.") for name in changes)
            assert ("mixer.network.head.weight" in changes) == (phase.name == "standard" and bool(mixer))
            assert all(parameter.grad is None for parameter in model.parameters())


def test_c16_both_phases_at_once_are_one_after_the_other(batch: tuple[Tensor, Tensor, Noise]) -> None:
    """One `train_step` of the method = its two phases alone: nothing goes between them but the robust half's weights.
    (Each phase alone is the first, so the streams of the second are folded by hand.)
    """
    x, y, noise = batch
    method = jtdmoe(ATTACK)
    model, twin = make(), make()
    for _ in range(2):
        train_step(model, method, adam(method, model), MiniBatch(x, y, noise))
        for phase, optimiser in zip(method.phases, adam(method, twin)):
            train_step(twin, Method((phase,), ATTACK), [optimiser], MiniBatch(x, y, noise))
    assert moved(state(twin), model) == set()  # without gamma the standard phase draws nothing


def test_j5_batch_norm_counts_real_batches_in_its_own_phase_alone(batch: tuple[Tensor, Tensor, Noise]) -> None:
    """Variant "released": the attacked whole, then all clean and all attacked images through each expert. So a robust
    expert has seen 3 batches, or 2 where the attacked whole sent it nothing; a standard one the clean pass alone. The
    attacks, in eval mode, count for nothing.
    """
    model, (x, y, noise) = make(), batch
    used = set(model.standard.run(x).trace["router"].index.flatten().tolist())
    method = jtdmoe(ATTACK)
    train_step(model, method, adam(method, model), MiniBatch(x, y, noise))
    counts = {name: int(v) for name, v in model.state_dict().items() if name.endswith("num_batches_tracked")}
    robust = {v for name, v in counts.items() if name.startswith("robust.")}
    assert robust <= {2, 3}
    assert 3 in robust
    for expert in range(2):
        own = {v for name, v in counts.items() if name.startswith(f"standard.experts.{expert}.")}
        assert own == {1 if expert in used else 0}


def test_modes_are_restored_and_each_half_trains_in_its_own_phase_alone(batch: tuple[Tensor, Tensor, Noise]) -> None:
    """Seen by hooks: the standard half's only pass with a gradient is in train mode, and meanwhile the robust one runs
    in eval mode; in the robust phase the standard half does not run at all.
    """
    model, (x, y, noise) = make(), batch
    seen: dict[str, list[bool]] = {"standard": [], "robust": []}
    for half, modes in seen.items():
        expert = getattr(model, half).router
        expert.register_forward_hook(lambda module, given, out, modes=modes: modes.append(module.training))
    robust, standard = jtdmoe(ATTACK).phases
    model.train()
    robust.loss(model, x, y, noise)
    assert seen["standard"] == []
    assert {True, False} == set(seen["robust"])  # its attacks in eval mode
    seen["robust"].clear()
    standard.loss(model, x, y, noise)
    assert seen == {"standard": [True], "robust": [False]}
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("variant, experts", [("released", [0, 1]), ("paper", [None])])
def test_the_robust_phase_by_hand(variant: str, experts: list[int | None], batch: tuple[Tensor, Tensor, Noise]) -> None:
    """CE(R(x_R), y) + beta / n sum_i KL(f_i(x) || f_i(x_i)): over all experts and images ("released"), or over the
    second-ranked expert of each image ("paper"). In eval mode, where a pass has no effect on the next.
    """
    model, (x, y, noise) = make(), batch
    method = build_method(f"jtdmoe(pgd(linf(0.1), steps=2, keep=last), beta=3.0, variant={variant})")
    found = method.phases[0].loss(model, x, y, noise).value
    half = model.robust
    value = F.cross_entropy(half(ATTACK(half, x, y, noise)), y)
    trace = half.run(x).trace
    for number, expert in enumerate(experts):
        forced = to_rank(trace, 1) if expert is None else to_expert(trace, expert)
        x_adv = changed(ATTACK, objective=Held(forced))(half, x, y, noise.fold(1, number))
        clean, attacked = half.run(x, forced=forced).logits, half.run(x_adv, forced=forced).logits
        value = value + 3 * F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="sum") / N
    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in model.named_parameters() if name.startswith("robust.")]
    parameters = [dict(model.named_parameters())[name] for name in names]
    ours, theirs = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (found, value))
    for mine, other in zip(ours, theirs):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_the_variants_are_the_names_they_say() -> None:
    losses = [build_method(f"jtdmoe(pgd(linf(0.1)), variant={v})").phases[0].loss for v in ("released", "paper")]
    assert [each.loss.protect for each in losses] == ["all", "second"]  # type: ignore[attr-defined]
    assert all(isinstance(each.loss, RTER) and each.loss.beta == 6.0 for each in losses)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_standard_phase_by_hand(gamma: float, mix: str, batch: tuple[Tensor, Tensor, Noise]) -> None:
    """CE of the clean blend + gamma * CE of the attacked one; the standard half in train mode (its BatchNorm by the
    batch), the robust one in eval mode and a constant.
    """
    model, (x, y, noise) = make(mix=mix), batch
    twin = copy.deepcopy(model)
    model.train()
    found = jtdmoe(ATTACK, gamma=gamma).phases[1].loss(model, x, y, noise)
    twin.standard.train()

    def blended(at: Tensor) -> Tensor:
        standard, robust = twin.standard(at), twin.robust(at).detach()
        if mix == "logits":
            return 0.3 * standard + 0.7 * robust
        return (0.3 * standard.softmax(1) + 0.7 * robust.softmax(1)).log()

    clean = blended(x)
    x_adv = ATTACK(twin, x, y, noise)  # of the model in eval mode, with the statistics that the clean pass has moved
    value = F.cross_entropy(clean, y) + (gamma * F.cross_entropy(blended(x_adv), y) if gamma else 0)
    torch.testing.assert_close(found.value, value, rtol=1e-5, atol=1e-6)
    assert found.correct is not None
    assert int(found.correct) == int((clean.argmax(1) == y).sum())
    ours = torch.autograd.grad(found.value, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(value, list(twin.parameters()), allow_unused=True)
    for (name, _), mine, other in zip(model.named_parameters(), ours, theirs):
        assert (mine is None) == (other is None), name
        assert mine is None or not name.startswith("robust.")
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    "text, said",
    [
        ("jtdmoe(pgd(linf(0.1)), beta=-1.0)", r"beta must be 0 or more; got -1\.0"),
        ("jtdmoe(pgd(linf(0.1)), gamma=-0.5)", r"gamma must be 0 or more; got -0\.5"),
        ("jtdmoe(pgd(linf(0.1)), variant=mine)", "released"),
        ("jtdmoe(route_flip(linf(0.1)))", "jtdmoe turns its attack on single experts; .* got a RouteFlip"),
    ],
)
def test_bad_specs_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_method(text)


def test_a_model_that_is_not_dual_is_one_clear_line(
    tmp_path: Path, tiny: Callable[..., RoutedModel], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    method = jtdmoe(ATTACK)
    for phase in method.phases:
        with pytest.raises(
            UserError, match=r"^jtdmoe trains a dual model, such as dual\(resnet8, resnet8\); got a Dense$"
        ):
            phase.loss(tiny("dense"), *batch)
    recipe = Recipe(
        model="resnet8(width=4)", data="digits", method="jtdmoe(pgd(linf(0.1)))", epochs=1, max_steps=1, threads=1
    )
    with pytest.raises(UserError) as told:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("this model has none; expected a dual model, such as dual(resnet8, resnet8)")
