"""Everything on a device that is not there (see `pretended`): no operation mixes places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from pretended import DEVICE, MixedDevicesError, Pretending, place
from robustmoe.attacks import ATTACKS, FMN, Attack, build_attack
from robustmoe.data import Batch
from robustmoe.evaluation import checks
from robustmoe.evaluation.checks import strength
from robustmoe.models import DualModel, RoutedModel, ViTMoEModel, build_model
from robustmoe.models.plain import as_routed
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, build_method, train_step
from test_direct_calls import CALLS
from test_phases import METHODS_HERE, optimisers
from tiny_models import TINY, in_turn

MODELS = {
    **TINY,
    "stages": "pathway(resnet8(width=4), experts=2, ratio=0.5, router=small_cnn(width=4), routers=stage)",
    "affine": "affine(patch_resnet(width=4, patch=2), experts=3)",
    "affine, top-1": "affine(patch_resnet(width=4, patch=2), experts=3, gate=straight_through)",
    "expert choice": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, placement=(1,), choice=expert)",
    "rooms": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, k=1, capacity=0.5, placement=(1,))",
    "slots": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, placement=(1,), choice=slots)",
    "planned": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, placement=(1,), plan=sinkhorn)",
    "blocks": "block_moe(resnet8(width=4), experts=2, stages=(2,))",
}
QUICK = {
    "fgsm": ["fgsm(linf(0.1))"],
    "pgd": [
        "pgd(linf(0.1), steps=2, restarts=2)", "pgd(l2(0.5), steps=2, keep=last)", "pgd(l1(3), steps=2, keep=first)",
        *(f"pgd(linf(0.1), steps=2, objective={objective})" for objective in (
            "experts_only", "router_only", "targeted(3)", "joint(kl)", "router_hinge", "joint_normalised", "diluted",
        )),
    ],
    "vmoe_pgd": ["vmoe_pgd(linf(0.1))"],
    "apgd": ["apgd(linf(0.1), steps=3)", "apgd(l2(0.5), steps=3, rng=autoattack)", "apgd(l1(3), steps=3)"],
    "apgd_t": ["apgd_t(linf(0.1), steps=3, targets=2)"],
    "fab": ["fab(linf(0.1), steps=2, targets=2)", "fab(l2(0.5), steps=2)", "fab(l1(3), steps=2, restarts=2)"],
    "square": ["square(linf(0.1), steps=4)", "square(l2(0.5), steps=4)", "square(l1(3), steps=4)"],
    "fmn": ["fmn(linf(0.1), steps=3)", "fmn(l2(0.5), steps=3)"],
    "route_flip": ["route_flip(linf(0.1), steps=2)"],
    "expert_transition": ["expert_transition(linf(0.1), steps=2)"],
    "route_beam": ["route_beam(linf(0.1), steps=1, beam=2, candidates=4)"],
    "other_routes": ["other_routes(linf(0.1), steps=2)"],
    "through": ["through(soft(1.0), pgd(linf(0.1), steps=2))", "through(straight_through, pgd(linf(0.1), steps=2))"],
    "bf16": ["bf16(pgd(linf(0.1), steps=2))"],
    "folded": ["folded(pgd(linf(0.1), steps=2))"],
    "undivided": ["undivided(pgd(linf(0.1), steps=2))"],
    "noisy": ["noisy(pgd(linf(0.1), steps=2))"],
}  # fmt: skip
LINEAR = "ensemble(linear, experts=3, router=linear, gate=straight_through)"
PARTS = ("autoattack", "autoattack_routing", "quick_verdict")
"""Suites of the others."""


@pytest.fixture
def there(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> Callable[..., tuple[RoutedModel, ...]]:
    """there(name): the tiny model, and six images with labels, on the device."""

    def make(name: str) -> tuple[RoutedModel, Tensor, Tensor]:
        model = tiny(MODELS.get(name, name)).to(DEVICE)
        x = images(6).to(DEVICE)
        return model, x, (torch.arange(6) % 4).to(DEVICE)

    return make  # type: ignore[return-value]


MISTAKES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "host constants": lambda x, host: x + host,
    "a mask of the host": lambda x, host: torch.where(host > 0, x, x),
    "places of the host": lambda x, host: torch.gather(x, 1, torch.zeros(3, 1, dtype=torch.int64)),
    "weights of the host": lambda x, host: nn.Linear(4, 2)(x),
    "numpy": lambda x, host: x.numpy(),
    "a generator of the host": lambda x, host: torch.rand(3, generator=torch.Generator(), device=DEVICE),
    "in place": lambda x, host: host.add_(x[0]),
    "a buffer left behind": lambda x, host: torch.cat([x, host[None]]),
    "draws of the host": lambda x, host: x + Noise.of(torch.arange(3), 0).uniform(4),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    with Pretending(), pytest.raises(MixedDevicesError):
        MISTAKES[mistake](torch.rand(3, 4, device=DEVICE), torch.ones(4))


def test_what_cuda_takes_is_taken_and_everything_says_where_it_lies() -> None:
    with Pretending() as mode:
        x, host = torch.rand(3, 4, device=DEVICE), torch.ones(4)
        assert {each.device for each in (x, x * 2, x.double(), x.new_zeros(2), torch.zeros_like(x), x[0], x.T)} == {
            DEVICE
        }
        assert {each.device for each in (host, x.cpu(), x.to("cpu"), torch.zeros(2))} == {torch.device("cpu")}
        there = x * torch.tensor(2.0), x[torch.tensor([0, 1])], host.to(x) + x, torch.where(x > 0, x, 0.0)
        assert {place(each) for each in there} == {"there"}
        assert place(x.cpu() + host) == "here"
        mode.syncs.clear()
        assert len(x[x > 2]) == 0
        assert float(x.sum()) > 0
        assert mode.syncs == {"boolean index": 1, "_local_scalar_dense": 1}


def test_what_judges_takes_no_tf32_and_puts_it_back(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, seen = tiny("dense"), set()

    def told(x: Tensor) -> Tensor:
        seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return model(x)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rm.evaluate(told, images(2), torch.tensor([0, 1]), attacks="fgsm(linf(0.1))")
        batch = Batch(images(2), torch.tensor([0, 1]), torch.arange(2))
        checks.deep(as_routed(told), batch, [build_attack("fgsm(linf(0.1))")], only=("H2",))
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == {(False, False)}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, there: Callable[..., tuple[RoutedModel, Tensor, Tensor]]) -> None:
    with Pretending():
        model, x, y = there(name)
        output = model.run(x)
        assert place(output.logits) == "there"
        model.run(x, forced=output.trace)
        assert place(build_attack("pgd(linf(0.1), steps=2)")(model, x, y)) == "there"
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
        assert {place(p.grad) for p in model.parameters() if p.grad is not None} == {"there"}


def test_every_attack_is_here() -> None:
    assert {*QUICK, *PARTS} == set(ATTACKS)


@pytest.mark.parametrize(
    "spec, name",
    in_turn([each for some in QUICK.values() for each in some], ["pathway", "vit_moe", "ensemble_straight"], 3),
)
def test_attacks(
    spec: str,
    name: str,
    there: Callable[..., tuple[RoutedModel, Tensor, Tensor]],
    tiny: Callable[..., RoutedModel],
    images: Callable[..., Tensor],
) -> None:
    attack: Attack = build_attack(spec)
    noise = Noise.of(torch.arange(6), 0)
    with Pretending():
        model, x, y = there(name)
        x_adv = attack(model, x, y, Noise(noise.state.to(DEVICE)))
        assert place(x_adv) == "there"
    torch.default_generator.manual_seed(0)
    assert torch.equal(x_adv, attack(tiny(MODELS.get(name, name)), images(6), torch.arange(6) % 4, noise)), (
        "the host asks otherwise, and is answered the same"
    )


@pytest.mark.parametrize("method, name", in_turn(list(METHODS_HERE), sorted(TINY), 4))
def test_methods(method: str, name: str, there: Callable[..., tuple[RoutedModel, Tensor, Tensor]]) -> None:
    with Pretending():
        model, x, y = there(name)
        refused = (method == "jtdmoe" and not isinstance(model, DualModel)) or (
            method == "certified" and isinstance(model, ViTMoEModel)
        )
        if not refused:
            built = build_method(METHODS_HERE[method])
            state = Noise(Noise.of(torch.arange(6), 1).state.to(DEVICE))
            train_step(
                model, built, optimisers(built, model, 0.1), MiniBatch(x, y, state), second=MiniBatch(x, y, state)
            )


@pytest.mark.parametrize("name", CALLS)
def test_certifiers_and_what_else_is_called_directly(name: str) -> None:
    call = CALLS[name]
    with Pretending():
        model = build_model(call.model, 3, (1, 4, 4)).to(DEVICE)
        x, y = torch.rand(4, 1, 4, 4, device=DEVICE), (torch.arange(4) % 3).to(DEVICE)
        call.call(model, x, y, Noise(Noise.of(torch.arange(4), 7).state.to(DEVICE)))


@pytest.mark.parametrize("name", ["ensemble_straight", "vit_moe", "dense"])
def test_a_whole_evaluation(name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x, y = tiny(name), images(8), torch.arange(8) % 4
    with Pretending():
        [result] = rm.evaluate(model, x, y, attacks="pgd(linf(0.05), steps=2)", device=str(DEVICE))
    assert len(result.rows) == 8


def test_every_check(there: Callable[..., tuple[RoutedModel, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for the nearest, a hundred steps in an evaluation, makes five."""
    monkeypatch.setattr(strength, "FMN", lambda threat, steps, seed: FMN(threat, steps=5, seed=seed))
    with Pretending():
        model, x, y = there(LINEAR)
        answers = checks.deep(
            model, Batch(x[:4], y[:4], torch.arange(4)).to(DEVICE), [build_attack("pgd(linf(0.05), steps=1)")]
        )
    assert [answer.id for answer in answers] == checks.ids()


@pytest.mark.parametrize("name", [LINEAR, "dual"])
def test_the_laboratory(name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x, y = tiny(name), images(8), torch.arange(8) % 4
    with Pretending():
        rm.sweep(model, x, y, attacks="pgd(linf(0.05), steps=1)", eps=(0.01, 0.02), device=str(DEVICE))
        if name == "dual":
            rm.blend(
                model.standard, model.robust, x, y, attack="pgd(linf(0.05), steps=1)", alphas=(0.5,), device=str(DEVICE)
            )
        else:
            rm.dissect(model, x, y, attack="pgd(linf(0.05), steps=1)", device=str(DEVICE))
            rm.measure_lipschitz(model, x, y, device=str(DEVICE))
