"""Every training method on sparse vision transformers, and whose the routers' training noise is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustmoe.models import RoutedModel, build_model
from robustmoe.noise import Noise
from robustmoe.routing import Tape, Trace
from robustmoe.training import METHODS, Method, build_method, standard, train_step
from robustmoe.training.optimisation import SGD
from robustmoe.training.phases import MiniBatch
from test_phases import METHODS_HERE
from tiny_models import in_turn

SIZE = "patch=4, width=16, depth=2, heads=2, experts=3, placement=every_2"
MODELS = {
    "vmoe": f"vit_moe(tiny, {SIZE}, k=2)",
    "renormalised": f"vit_moe(tiny, {SIZE}, k=2, gating=renormalised, capacity=1.0)",
    "expert_choice": f"vit_moe(tiny, {SIZE}, k=1, choice=expert)",
    "soft_moe": f"vit_moe(tiny, {SIZE}, k=1, choice=slots)",
}
UNBOUNDED = {"certified"}
"""Methods that do not take a transformer: no bounds are known through attention (tests/test_phases.py)."""
METHOD_TEXTS = {
    **{name: text for name, text in METHODS_HERE.items() if name not in UNBOUNDED},
    "advmoe_released": "advmoe(pgd(linf(0.1), steps=1, keep=last), released)",
    "advmoe_shared": "advmoe(pgd(linf(0.1), steps=1, keep=last), released, shared_attack=True)",
    "rt_er_random": "rt_er(pgd(linf(0.1), steps=1, keep=last), protect=random)",
    "mixup": "at(pgd(linf(0.1), steps=1, keep=last), balance=0.01, balance_loss=gshard, mixup=0.2)",
    "prc": "consistent(trades(pgd(linf(0.1), steps=1, keep=last)), prc)",
}


def noise_of(index: Tensor) -> Noise:
    return Noise.of(index, 5)


def made(name: str, method: str) -> RoutedModel:
    text = MODELS[name]
    return build_model(f"dual({text}, {text})" if method == "jtdmoe" else text, 4, (3, 8, 8), seed=0)


def stepped(
    model: RoutedModel, method: Method, x: Tensor, index: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The losses of one step."""
    optimisers = [SGD(0.1, 0.0, 0.0).make(phase.parameters(model).values()) for phase in method.phases]
    second = MiniBatch(x.flip(0), index.flip(0) % 4, noise_of(index).fold(9))
    return train_step(
        model, method, optimisers, MiniBatch(x, index % 4, noise_of(index)), second=second, autocast=autocast
    ).loss


def test_every_method_is_tested_here() -> None:
    assert set(METHODS) - UNBOUNDED <= set(METHOD_TEXTS)


@pytest.mark.parametrize("text, name", in_turn([*METHOD_TEXTS], [*MODELS], every=2))
def test_every_method_moves_its_phases_parameters_alone(text: str, name: str, images: Callable[..., Tensor]) -> None:
    """Phase by phase: what it names moves (every router that it names too), and nothing else."""
    method = build_method(METHOD_TEXTS[text])
    for phase in method.phases:
        model = made(name, text)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        losses = stepped(model, Method((phase,), method.attack), images(6), torch.arange(6))
        assert torch.isfinite(losses[phase.name])
        assert losses[phase.name].dtype == torch.float32
        moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        own = set(phase.parameters(model))
        assert moved <= own
        routers = {key for key in own if ".router." in key}
        assert routers <= moved, (phase.name, routers - moved)
        assert any(".experts." in key for key in moved) or phase.name == "router"


@pytest.mark.parametrize("text", ["standard(balance=0.01, balance_loss=vmoe)", METHOD_TEXTS["consistent"]])
def test_under_bf16_decisions_and_losses_stay_float32(text: str, images: Callable[..., Tensor]) -> None:
    """And the loss is that of float32 within what 8 bits allow."""
    found = [
        stepped(made("vmoe", text), build_method(text), images(6), torch.arange(6), autocast)["all"]
        for autocast in (None, torch.bfloat16)
    ]
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------ training noise


class Watched(RoutedModel):
    """A model, and what each pass over it was: in train mode, with noise, with given routes; and its trace."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model
        self.passes: list[tuple[bool, bool, bool, Trace]] = []

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = self.model.body(x, tape)
        self.passes.append((self.model.training, tape.noise is not None, bool(tape.forced), tape.trace))
        return logits


ROUTER = "network.blocks.1.mlp.router"


@pytest.mark.parametrize("text", [*sorted(set(METHOD_TEXTS) - {"jtdmoe", "advmoe_released"})])
def test_passes_in_train_mode_are_noisy_and_no_others(text: str, images: Callable[..., Tensor]) -> None:
    """Those on given routes apart, where no router decides. Attacks and the terms of `consistent` run in eval mode."""
    model = Watched(made("vmoe", text))
    method = build_method(METHOD_TEXTS[text])
    stepped(model, method, images(6), torch.arange(6))
    for training, noisy, forced, trace in model.passes:
        assert noisy == (training and not forced)
        assert (trace[ROUTER].noisy is not None) == noisy
    kinds = [(training, forced) for training, _, forced, _ in model.passes]
    assert (True, False) in kinds
    assert (method.attack is not None) == ((False, False) in kinds)


def test_both_halves_of_a_dual_model_train_with_noise(images: Callable[..., Tensor]) -> None:
    """Each in its own phase: the robust half first, then the standard one, which the robust one joins in eval mode."""
    model = made("vmoe", "jtdmoe")
    watched = {}
    for half in ("standard", "robust"):
        watched[half] = Watched(getattr(model, half))
        setattr(model, half, watched[half])
    stepped(model, build_method(METHOD_TEXTS["jtdmoe"]), images(6), torch.arange(6))
    for half in watched.values():
        trained = [noisy for training, noisy, forced, _ in half.passes if training and not forced]
        assert trained
        assert all(trained)
        assert not any(noisy for training, noisy, _, _ in half.passes if not training)


def test_the_noise_is_the_images_own_and_changes_who_is_chosen(images: Callable[..., Tensor]) -> None:
    """Experts chosen in a train step: others than in eval mode, the same in another batch, others in another step, and
    the noise is normal of deviation 1 / e. (The router's weights are small here, so that the noise decides often.)
    """
    x, index = images(40), torch.arange(40)

    def chosen(rows: Tensor, key: int = 0) -> Trace:
        model = Watched(build_model(MODELS["vmoe"], 4, (3, 8, 8), seed=0))
        optimiser = SGD(0.1).make(model.parameters())
        train_step(model, standard(), [optimiser], MiniBatch(x[rows], rows % 4, noise_of(rows).fold(key)))
        ((_, _, _, trace),) = model.passes
        return trace

    whole, rows = chosen(index)[ROUTER], torch.tensor([7, 31, 2])
    quiet = build_model(MODELS["vmoe"], 4, (3, 8, 8), seed=0).run(x).trace[ROUTER]
    assert 0.05 < float((whole.index[..., 0] != quiet.index[..., 0]).float().mean()) < 0.9
    torch.testing.assert_close(whole.logits, quiet.logits)
    part = chosen(rows)[ROUTER]
    assert torch.equal(part.index, whole.index[rows])
    assert whole.noisy is not None
    assert part.noisy is not None
    torch.testing.assert_close(part.noisy, whole.noisy[rows], rtol=0, atol=1e-5)
    assert not torch.equal(chosen(index, 1)[ROUTER].index, whole.index)
    drawn = (whole.noisy - whole.logits).detach()  # 40 * 5 * 3 = 600 draws
    assert float(drawn.std()) == pytest.approx(1 / 3, rel=5 / (2 * 600) ** 0.5)
