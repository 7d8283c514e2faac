"""Checks of the harness: each passes on what is sound and fails on what it is there for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faulty_models import ATTACK, Capacity, Dynamic, Mix, Noisy, Pair, case, on
from robustmoe import analysis, compat
from robustmoe.attacks import Attack, Objective, Threat, linf
from robustmoe.attacks.objectives import Joint
from robustmoe.data import Batch, from_arrays
from robustmoe.evaluation import checks
from robustmoe.evaluation.checks import Finished, Subject, harness, routers
from robustmoe.models import RoutedModel, as_routed
from robustmoe.noise import Noise
from robustmoe.records import Check, Row
from robustmoe.routing import Tape, top_k


def batch(x: Tensor, y: Tensor | None = None) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y, torch.arange(len(x)))


def seen(function: Callable[[Subject], Check], model: RoutedModel, images: Batch) -> Check:
    with torch.no_grad():
        return function(on(model, images))


RANDOM = batch(torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(2)))


# ------------------------------------------------------------------------------------------------ H1


def test_input_range() -> None:
    two = as_routed(lambda x: x.flatten(1)[:, :2])
    assert seen(harness.input_range, two, RANDOM).status == "pass"
    normalised = seen(harness.input_range, two, batch((RANDOM.x - 0.5) / 0.25))
    assert normalised.status == "fail"
    assert normalised.sentence.endswith("; expected float32 in [0, 1]")
    for labels, status in (([0, 1], "pass"), ([0, 2], "fail"), ([-1, 0], "fail")):
        assert seen(harness.input_range, two, batch(RANDOM.x[:2], torch.tensor(labels))).status == status
    for odd in (RANDOM.x + 0.5, RANDOM.x * torch.nan, RANDOM.x * 255):
        assert seen(harness.input_range, two, batch(odd)).status == "fail"


# ------------------------------------------------------------------------------------------------ H2


def row(size: float, box: float = 0.0) -> Row:
    return Row(0, 0, 0, 0, {"linf": size, "box": box}, {}, None, None, {}, {})


EPS = 8 / 255


@pytest.mark.parametrize(
    "size, box, status",
    [
        (EPS, 0.0, "pass"),
        (EPS * (1 + 1e-6), 0.0, "pass"),
        (EPS * (1 + 1e-4), 0.0, "fail"),
        (math.nan, 0.0, "fail"),
        (0.0, 1e-7, "fail"),
        (0.0, math.nan, "fail"),
        (math.inf, 0.0, "fail"),
    ],
)
def test_ball_and_box_in_any_order(size: float, box: float, status: str) -> None:
    """Python's max loses a nan that does not come first."""
    for rows in itertools.permutations([row(0.0), row(size, box), row(EPS / 2)]):
        assert harness.ball_and_box(Finished(rows, "linf", EPS, ("", ""))).status == status
    assert analysis.inside(size, EPS) is (status == "pass" or size == 0.0)


@pytest.mark.parametrize("eps", [0.1 / 255, 0.5 / 255, 2 / 255, 0.5])
def test_rounding_is_inside_the_ball(eps: float) -> None:
    """x + eps is rounded to float32 beside x: at small radii by more than 1e-5 of eps. Both judges call it inside."""
    x = torch.linspace(0.0, 1.0, 4001)
    moved = ((x + eps).clamp(0, 1) - x).abs().amax().item()
    assert harness.ball_and_box(Finished([row(moved)], "linf", eps, ("", ""))).status == "pass"
    assert analysis.inside(moved, eps)
    assert not analysis.inside(eps * 1.001 + 1e-6, eps)


# ------------------------------------------------------------------------------------------------ H3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1)


def change_weight(net: Net) -> None:
    net.norm.weight.data += 1e-6


def change_statistics(net: Net) -> None:
    net.train()(torch.rand(4, 1, 1, 2))
    net.eval()


def change_mode(net: Net) -> None:
    net.norm.train()


def change_hidden(net: Net) -> None:
    net.hidden[1] = 1


def change_gradient(net: Net) -> None:
    net(torch.rand(1, 1, 1, 2)).sum().backward()


def change_frozen(net: Net) -> None:
    net.norm.bias.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [change_weight, change_statistics, change_mode, change_hidden, change_gradient, change_frozen]
)
def test_any_change_of_the_model_is_seen(change: Callable[[Net], None]) -> None:
    net = Net().eval()
    before = checks.fingerprint(net)
    assert harness.unchanged(Finished([], "linf", EPS, (before, checks.fingerprint(net)))).status == "pass"
    change(net)
    assert harness.unchanged(Finished([], "linf", EPS, (before, checks.fingerprint(net)))).status == "fail"


def test_weights_hash_is_of_every_parameter_and_buffer_and_nothing_else() -> None:
    assert checks.weights_hash(Net()) == checks.weights_hash(Net().train())
    for change in (change_weight, change_statistics, change_hidden):
        net = Net()
        change(net)
        assert checks.weights_hash(net) != checks.weights_hash(Net())
    for dtype in (torch.bfloat16, torch.bool, torch.int64):
        net = Net()
        net.register_buffer("more", torch.ones((), dtype=dtype))
        assert len(checks.weights_hash(net)) == 64


# ------------------------------------------------------------------------------------------------ H4


class FirstFour(RoutedModel):
    """Expert 0 takes the first four images of a batch, whatever they are; the others go to expert 1."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        first = torch.arange(len(x)) < 4
        logits = torch.stack([first.float(), 1 - first.float()], 1)
        routing = tape("router", top_k(logits[:, None], 1, "hard"))
        return torch.stack([x.flatten(1).sum(1), routing.index[:, 0, 0] * 9.0], 1)


def test_an_answer_that_depends_on_the_neighbours() -> None:
    found = seen(harness.alone, FirstFour().eval(), RANDOM)
    assert found.status == "fail"
    assert found.sentence.startswith("4 of 8 predictions change when an image stands alone")
    assert found.value >= 4  # the other arrangements move other images behind the first four
    assert seen(harness.alone, Pair("soft"), RANDOM).status == "pass"


def test_train_mode_batch_norm() -> None:
    def normed(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True).flatten(1)

    wide = batch(torch.rand(8, 2, 3, 3, generator=torch.Generator().manual_seed(1)))
    assert seen(harness.alone, as_routed(normed), wide).status == "fail"
    raises = seen(harness.alone, as_routed(lambda x: normed(x[:, :, :1, :1])), wide)
    assert (raises.status, raises.sentence) == ("fail", "the model fails on an image alone (ValueError)")
    assert seen(harness.alone, as_routed(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()).eval()), wide).status == "pass"


def test_nan_is_not_the_same_alone() -> None:
    nan = as_routed(lambda x: x.flatten(1) * torch.nan)
    assert seen(harness.alone, nan, RANDOM).status == "fail"
    assert seen(harness.determinism, nan, RANDOM).status == "fail"


# ------------------------------------------------------------------------------------------------ H6


class Says(RoutedModel):
    def __init__(self, logits: Callable[[Tensor], Tensor], router: float = 0.0) -> None:
        super().__init__()
        self.logits, self.router = logits, router

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        tape("gate", top_k(torch.full((len(x), 1, 2), self.router)))
        return self.logits(x)


@pytest.mark.parametrize(
    "model, status, words",
    [
        (Says(lambda x: x.flatten(1)), "pass", "finite"),
        (Says(lambda x: x.flatten(1).softmax(1)), "warn", "look like probabilities"),
        (Says(lambda x: x.flatten(1).log_softmax(1)), "pass", "finite"),
        (Says(lambda x: x.flatten(1) / 0), "fail", "the logits are not finite"),
        (Says(lambda x: x.flatten(1), math.nan), "fail", "the logits of router 'gate' are not finite"),
        (Says(lambda x: x.flatten(1), math.inf), "fail", "the logits of router 'gate' are not finite"),
    ],
)
def test_outputs(model: RoutedModel, status: str, words: str) -> None:
    found = seen(harness.outputs, model, RANDOM)
    assert found.status == status
    assert words in found.sentence


# ------------------------------------------------------------------------------------------------ H7


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dropout_left_on(scale: float) -> None:
    """Whatever the scale of the logits: an attacker's model may hide its randomness in small ones."""
    random = as_routed(lambda x: scale * F.dropout(x.flatten(1), 0.5, training=True))
    found = seen(harness.determinism, random, RANDOM)
    assert found.status == "fail"
    assert "a random model needs attacks over its randomness" in found.sentence
    assert seen(harness.determinism, as_routed(lambda x: scale * x.flatten(1)), RANDOM).status == "pass"
    rounding = as_routed(lambda x: scale * x.flatten(1) * (1 + 1e-6 * torch.rand(())))
    assert seen(harness.determinism, rounding, RANDOM).status == "pass"


# ------------------------------------------------------------------------------------------------ H4, planted


def test_capacity_is_seen_among_the_neighbours() -> None:
    model = Capacity().eval()
    assert seen(harness.alone, model, case(Mix()).whole).status == "fail"
    assert seen(harness.alone, Mix("hard"), case(Mix()).whole).status == "pass"


# ------------------------------------------------------------------------------------------------ H5


@pytest.mark.parametrize(
    "logged, status", [(1.0, "pass"), (0.9995, "pass"), (0.995, "warn"), (0.9, "fail"), (None, "not run")]
)
def test_the_training_log(logged: float | None, status: str) -> None:
    """The model is right on all 200 images by definition; 0.05, 0.5 and 10 points are another log."""
    sound = case(Mix(), n=200)
    line = None if logged is None else {"val_clean": logged, "val_n": 200}
    known = {"logged": line, "val": from_arrays(sound.whole.x, sound.whole.y)}
    assert harness.training_log(dataclasses.replace(sound, run=known)).status == status
    fewer = {"logged": {"val_clean": 1.0, "val_n": 201}, "val": known["val"]}
    assert harness.training_log(dataclasses.replace(sound, run=fewer)).status == "fail"


# ------------------------------------------------------------------------------------------------ H8


bound_early = torch.autograd.grad


def backward(value: Tensor, x: Tensor) -> tuple[Tensor]:
    value.backward()
    assert x.grad is not None
    return (x.grad,)


@pytest.mark.parametrize(
    "grad, words",
    [
        (lambda value, x: torch.autograd.grad(value, x), "torch.autograd.grad"),
        (backward, "torch.autograd.backward"),
        (bound_early, "a backward pass"),
    ],
)
def test_a_forward_pass_with_a_gradient_of_its_own(grad: Any, words: str) -> None:
    """By any name: `bound_early` was bound before the check could count it, and unpacks what the forward pass saved."""
    real = torch.autograd.grad, torch.autograd.backward
    found = harness.dynamic(on(Dynamic(grad), case(Mix()).whole))
    assert found.status == "fail"
    assert words in found.sentence
    assert (torch.autograd.grad, torch.autograd.backward) == real
    assert harness.dynamic(on(Mix(), case(Mix()).whole)).status == "pass"


# ------------------------------------------------------------------------------------------------ H9


@dataclasses.dataclass(frozen=True)
class Lottery(Attack):
    """Random noise that belongs to the place in the batch (``by="place"``), or to the image."""

    by: str
    threat: Threat = linf(0.2)  # noqa: RUF009
    objective: Objective = Joint()  # noqa: RUF009
    seed: int = 0

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        stream = noise if self.by == "image" else Noise.of(torch.arange(len(x)))
        return self.threat.project(x + 0.2 * stream.normal(*x.shape[1:]).sign(), x)


def test_noise_that_belongs_to_the_place_in_the_batch() -> None:
    assert harness.belongs(case(Mix(), Lottery("image"))).status == "pass"
    found = harness.belongs(case(Mix(), Lottery("place")))
    assert found.status == "fail"
    assert found.value > 0
    assert harness.belongs(case(Mix())).status == "pass"
    assert harness.belongs(case(Mix(), n=1)).status == "not run"


# ------------------------------------------------------------------------------------------------ H10


def test_precision() -> None:
    sound = harness.precision(case(Mix()))
    assert (sound.status, sound.value["float64"]) == ("pass", 0)

    class Rounding(Mix):
        """1e5 more on every logit: float32 keeps steps of 1/128 of the margin, float64 all of it."""

        def body(self, x: Tensor, tape: Tape) -> Tensor:
            logits = 0.01 * super().body(x, tape)
            return logits + 1e5 - (1e5 if logits.dtype == torch.float64 else 0)

    found = harness.precision(case(Rounding()))
    assert found.status == "fail"
    assert found.value["float64"] > 1


def test_precision_where_the_processor_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "multiplies", lambda device, dtype: dtype != torch.bfloat16)
    sound = harness.precision(case(Mix()))
    assert (sound.status, sound.value) == ("pass", {"float64": 0})
    assert sound.sentence.endswith("; this cpu has no products of bfloat16")


# ------------------------------------------------------------------------------------------------ all together


def test_the_cheap_checks_leave_the_model_as_it_was(model: RoutedModel, images: Callable[..., Tensor]) -> None:
    for module in itertools.islice(model.modules(), 0, None, 2):
        module.training = False
    before = checks.fingerprint(model)
    found = checks.before(model, ATTACK, batch(images(6)))
    assert checks.fingerprint(model) == before
    assert [check.id for check in found] == checks.ids("cheap")
    assert all(check.status == "pass" for check in found[:5])
    assert [check.name for check in found] == [checks.CHECKS[check.id].name for check in found]


def test_a_random_model_by_module() -> None:
    for where, words in (("module", "module 'jitter' (Jitter)"), ("body", "the model's own code")):
        noisy = Noisy(where).eval()
        assert seen(harness.determinism, noisy, case(Mix()).whole).status == "fail"
        found = routers.random_module(on(noisy, case(Mix()).whole))
        assert (found.status, found.value) == ("fail", words)
    assert routers.random_module(on(Mix(), case(Mix()).whole)).status == "pass"
