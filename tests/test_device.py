"""What a GPU has to give as the CPU does: `make test-device` runs it on every GPU there is; `make test` on a device
that is not there (see `pretended`), so that this file is run too.

Tolerances are those of float32 sums in another order. An attack climbs by signs, so that pixels may end elsewhere: what
it breaks is compared, not its pixels. Apple's GPUs (MPS) are refused: they have no float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from pretended import DEVICE, Pretending
from robustmoe import asking, generators
from robustmoe.analysis.rates import robust
from robustmoe.attacks import build_attack, linf
from robustmoe.attacks.base import looked_at
from robustmoe.certification import Bounds, Smoothing
from robustmoe.evaluation.precision import whole_float32
from robustmoe.models import RoutedModel
from robustmoe.models.tokens import TokenExperts
from robustmoe.noise import Noise
from robustmoe.training import MiniBatch, build_method, train_step
from tiny_models import in_turn

N = 8
HARD = "ensemble(linear, experts=2, gate=hard, router=linear)"
WITHOUT = pytest.param(
    "",
    marks=[pytest.mark.device, pytest.mark.skip(reason="torch sees no CUDA device here; MPS is refused (no float64)")],
)
GPUS = [f"cuda:{place}" for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
DEVICES = [*(pytest.param(name, marks=pytest.mark.device) for name in GPUS), *([] if GPUS else [WITHOUT]), str(DEVICE)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def both(
    device: torch.device, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> Callable[[str], list[tuple[RoutedModel, Tensor, Tensor]]]:
    """both(name): the tiny model, images and its own labels for them, on the CPU and on the device."""

    def make(name: str) -> list[tuple[RoutedModel, Tensor, Tensor]]:
        host, x = tiny(name), images(N)
        with torch.no_grad():
            y = host(x).argmax(1)
        return [(host, x, y), (tiny(name).to(device), x.to(device), y.to(device))]

    return make


@pytest.fixture(autouse=True)
def pretending(device: torch.device) -> object:
    with Pretending() if device == DEVICE else contextlib.nullcontext(), whole_float32():
        yield


Both = Callable[[str], list[tuple[RoutedModel, Tensor, Tensor]]]


def close(there: Tensor, here: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance``, relative and absolute."""
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=tolerance, atol=tolerance, check_dtype=True)


@pytest.mark.parametrize("name", ["dense", "pathway", "ensemble_k2", "vit_moe"])
def test_logits_routes_and_gradients(name: str, both: Both) -> None:
    outputs, slopes = [], []
    for model, x, y in both(name):
        at = x.clone().requires_grad_(True)
        outputs.append(model.run(at))
        slopes.append(torch.autograd.grad(nn.functional.cross_entropy(outputs[-1].logits, y), at)[0])
    here, there = outputs
    close(there.logits, here.logits, 1e-4)
    close(slopes[1], slopes[0], 1e-4)
    for router, routing in here.trace.items():
        assert torch.equal(there.trace[router].index.cpu(), routing.index)


def test_draws_are_the_same_bits(device: torch.device) -> None:
    here = Noise.of(torch.arange(5), 3, 1)
    there = Noise(here.state.to(device)).fold(2)
    assert torch.equal(there.uniform(7).cpu(), here.fold(2).uniform(7))
    close(there.normal(7), here.fold(2).normal(7), 1e-5)


ATTACKS = [
    "pgd(linf(0.05), steps=4)", "pgd(l2(0.5), steps=4, keep=first)", "apgd(linf(0.05), steps=6)",
    "apgd(l1(4), steps=6)", "fab(linf(0.05), steps=3, targets=2)", "square(linf(0.1), steps=15)",
    "expert_transition(linf(0.05), steps=2)", "route_flip(linf(0.05), steps=2)",
]  # fmt: skip


@pytest.mark.parametrize("spec, name", in_turn(ATTACKS, ["pathway", "vit_moe"]))
def test_attacks_break_what_they_break_on_the_cpu(spec: str, name: str, both: Both) -> None:
    attack, wrong = build_attack(spec), []
    for model, x, y in both(name):
        x_adv = attack(model, x, y, Noise(Noise.of(torch.arange(N)).state.to(x.device)))
        assert x_adv.device == x.device
        assert bool((attack.threat.size(x_adv - x) <= attack.threat.eps * (1 + 1e-5)).all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        with torch.no_grad():
            wrong.append(int((model(x_adv).argmax(1) != y).sum()))
    assert abs(wrong[1] - wrong[0]) <= 1, "an image at the border may fall on either side"


@pytest.mark.parametrize("method", ["standard", "at(fgsm(linf(0.03)))"])
def test_a_training_step_moves_the_weights_alike(method: str, both: Both) -> None:
    built, after, told = build_method(method), [], []
    for model, x, y in both("pathway"):
        optimisers = [torch.optim.SGD(phase.parameters(model).values(), lr=0.1) for phase in built.phases]
        noise = Noise(Noise.of(torch.arange(N)).state.to(x.device))
        with looked_at():
            result = train_step(model, built, optimisers, MiniBatch(x, y, noise), routers=["router"])
        told.append([float(each) for each in (*result.loss.values(), *result.grad_norm.values())])
        after.append({key: value.detach().cpu() for key, value in model.state_dict().items()})
    assert told[1] == pytest.approx(told[0], rel=1e-2)
    for key, value in after[0].items():
        close(after[1][key], value, 2e-3)


def test_certificates(both: Both) -> None:
    certifiers = [Bounds(linf(0.01), search=2), Smoothing(sigma=0.25, n=40, n0=10)]
    for certifier in certifiers:
        here, there = (
            certifier(model, x[:3], Noise(Noise.of(torch.arange(3)).state.to(x.device))) for model, x, _ in both(HARD)
        )
        assert [each.prediction for each in there] == [each.prediction for each in here]
        assert [each.radius for each in there] == pytest.approx([each.radius for each in here], rel=0.1, abs=1e-6)


def test_an_evaluation(device: torch.device, both: Both) -> None:
    (model, x, y), _ = both("ensemble_straight")
    counts = []
    for place in ("cpu", str(device)):
        [result] = rm.evaluate(model, x, y, attacks="pgd(linf(0.05), steps=3)", device=place)
        counts.append((sum(row.clean == row.label for row in result.rows), sum(map(robust, result.rows))))
    assert counts[1][0] == counts[0][0]
    assert abs(counts[1][1] - counts[0][1]) <= 1


def test_experts_by_every_way_of_dispatch(device: torch.device) -> None:
    experts = TokenExperts(4, 16, 32)
    x, index = torch.randn(40, 16), torch.randint(0, 4, (40, 2))
    weight = torch.rand(40, 2)
    expected = experts(x, index, weight, dispatch="loop")
    there = experts.to(device)
    for dispatch in ("loop", "sorted", "grouped", "dense"):
        given = x.to(device), index.to(device), weight.to(device)
        close(there(*given, dispatch=dispatch), expected, 1e-4)  # type: ignore[arg-type]
        half = there.to(torch.bfloat16)(given[0].bfloat16(), *given[1:], dispatch=dispatch)  # type: ignore[arg-type]
        close(half.float(), expected, 0.05)
        there = there.float()


def test_questions(device: torch.device) -> None:
    mask = torch.tensor([True, False, True, True, False])
    assert [place.tolist() for place in asking.places(mask.to(device), ~mask.to(device))] == [[0, 2, 3], [1, 4]]
    assert asking.tally(torch.tensor([2, 0, 2], device=device), 4).tolist() == [1, 0, 2, 0]


def test_draws_of_torch_come_back(device: torch.device) -> None:
    def drawn() -> list[float]:
        dropped: list[float] = nn.functional.dropout(torch.ones(64, device=device)).tolist()
        return dropped

    with generators.seeded(3):
        first = drawn()
    kept = generators.state_on(device)
    before = drawn()
    if device.type == "cuda":
        generators.go_on(device, kept)
        assert drawn() == before
    with generators.seeded(3):
        assert drawn() == first


def test_what_differs_is_seen() -> None:
    close(torch.ones(3) + 1e-6, torch.ones(3), 1e-4)
    with pytest.raises(AssertionError):
        close(torch.ones(3) + 1e-3, torch.ones(3), 1e-4)
