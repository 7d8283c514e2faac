"""Questions to the device: their answers are those of the CPU, and a step asks no more than it has to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import sync_counts
from pretended import DEVICE, Pretending, place
from robustmoe import asking, distributed
from robustmoe.attacks import PGD, Attack, Joint, NotFiniteError, Threat, boundary, build_attack
from robustmoe.attacks.finite import in_the_end, require_finite
from robustmoe.attacks.objectives import Inner, Objective, Score
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.models.base import RoutedModel
from robustmoe.models.norm import BatchNorm2d
from robustmoe.models.plain import as_routed
from robustmoe.noise import Noise
from robustmoe.routing import straight_through, top_k

MASKS = [[True, False, True, True, False], [False] * 5, [True] * 5, [False, True, False, False, False]]


def test_places_and_pairs_and_tallies_are_torchs_and_cost_a_question() -> None:
    host = [torch.tensor(mask) for mask in MASKS]
    index = torch.tensor([2, 0, 2, 2, 4])
    with Pretending() as mode:
        there = [mask.to(DEVICE) for mask in host]
        mode.syncs.clear()
        answers = asking.places(*there)
        assert mode.syncs == {"tolist": 1}
        sizes = asking.counts(*there)
        mode.syncs.clear()
        rows, columns = asking.pairs(torch.stack(there), sum(sizes))
        tally = asking.tally(index.to(DEVICE), 6)
        none = asking.places(asking.nowhere(there[0]))
        assert mode.syncs == {}
        assert {place(each) for each in (*answers, rows, columns, tally, *none)} == {"there"}
    for mask, answer, on_host in zip(host, answers, asking.places(*host), strict=True):
        assert torch.equal(answer, mask.nonzero()[:, 0])
        assert torch.equal(on_host, mask.nonzero()[:, 0])
    assert sizes == [int(mask.sum()) for mask in host] == asking.counts(*host)
    assert torch.equal(torch.stack([rows, columns], 1), torch.stack(host).nonzero())
    assert torch.equal(tally, torch.bincount(index, minlength=6))
    assert len(none[0]) == 0


def attack_on(*numbers: Tensor, fails: bool = False) -> None:
    """An attack that meets these numbers, one after the other."""
    with in_the_end():
        for each in numbers:
            require_finite(each)
        if fails:
            raise IndexError("what broken numbers lead to, or another mistake")


def test_what_is_not_finite_is_told_in_the_end_of_an_attack_and_instead_of_what_it_leads_to() -> None:
    broken = torch.tensor([1.0, torch.nan])
    with Pretending() as mode:
        there = broken.to(DEVICE)
        mode.syncs.clear()
        with pytest.raises(NotFiniteError):
            attack_on(there[:1], there, there[:1])
        assert mode.syncs == {"_local_scalar_dense": 1}
        with pytest.raises(NotFiniteError):
            attack_on(there, fails=True)
        with pytest.raises(IndexError):
            attack_on(there[:1], fails=True)
        attack_on(there[:1])
        with pytest.raises(NotFiniteError):
            require_finite(there)
    with pytest.raises(NotFiniteError):
        require_finite(broken[:1], broken)
    most = torch.finfo(torch.float32).max
    require_finite(torch.tensor([most, most]))  # their sum is not
    with pytest.raises(NotFiniteError):
        require_finite(torch.tensor([torch.inf, -torch.inf]))


@pytest.mark.parametrize("keep", ["last", "first", "best"])
def test_an_attack_on_broken_logits_stops_on_a_device_too(keep: str) -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        logits = x.flatten(1)[:, :3]
        return logits * torch.nan if len(calls) > 2 else logits

    attack = build_attack(f"pgd(linf(0.001), steps=5, keep={keep}, start=clean)")
    with Pretending():
        x = torch.rand(3, 1, 4, 4).to(DEVICE)
        y = x.flatten(1)[:, :3].argmax(1)
        with pytest.raises(NotFiniteError):
            attack(as_routed(model), x, y)


def test_a_replayed_decision_is_asked_once_and_another_one_anew() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0]], [[3.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]])
    with Pretending() as mode:
        there = logits.to(DEVICE)
        routing = top_k(there, 2)
        mode.syncs.clear()
        assert routing.sizes() == [1, 3, 2]
        assert routing.replayed(straight_through(there, 2)).sizes() == [1, 3, 2]
        assert routing.detach().sizes() == [1, 3, 2]
        assert mode.syncs == {"tolist": 1}
        assert routing[:2].sizes() == [1, 2, 1]
        assert top_k(there.flip(-1), 2).sizes() == [2, 3, 1]


def test_what_nearly_always_holds_is_asked_in_the_end_and_what_did_not_hold_is_made_again() -> None:
    for answers, asked in ((3 * [True], 1), ([True, False, True], 4)):
        calls: list[list[bool]] = []

        def make(answers: list[bool] = answers, calls: list[list[bool]] = calls) -> Tensor:
            calls.append([asking.surely(torch.tensor(each).to(DEVICE)) for each in answers])
            return torch.tensor(calls[-1])

        with Pretending() as mode:
            made = asking.hoped(make)
        assert made.tolist() == answers
        assert calls == ([answers] if all(answers) else [3 * [True], answers])
        assert mode.syncs["_local_scalar_dense"] == asked
    assert not asking.surely(torch.tensor(False))


def test_newtons_method_that_takes_longer_than_was_thought_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 0, :2].mean((1, 2)) - 0.1], 1) * 8

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    fab = build_attack("fab(linf(0.4), steps=3)")
    y = model(x).argmax(1)
    expected = fab(as_routed(model), x, y)
    assert not torch.equal(expected, x)
    passes = []
    for rounds in (boundary.UNASKED, 0):
        monkeypatch.setattr(boundary, "UNASKED", rounds)
        calls.clear()
        with Pretending():
            assert torch.equal(fab(as_routed(model), x.to(DEVICE), y.to(DEVICE)).cpu(), expected)
        passes.append(len(calls))
    assert passes[1] > passes[0]


def claiming(net: str) -> tuple[Surrogate, list[tuple[int, bool]], Tensor, Tensor]:
    """A net climbed on a copy that is somewhat wrong, so that the exact one refutes some of what it claims; its passes,
    how many images and with or without a gradient; images and labels.
    """
    exact, x, y = sync_counts.net(net)
    climbed, passes = copy.deepcopy(exact), list[tuple[int, bool]]()
    with torch.no_grad():
        for weight in climbed.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape))
    return Surrogate(climbed, exact, close=True, on_pass=lambda *each: passes.append(each)), passes, x, y


@dataclass(frozen=True)
class OfSome(Objective):
    """An objective of one's own that does not give what `missed` says as it is: the last images never fall."""

    name: ClassVar[str] = "of_some"
    aims_at_router: ClassVar[bool] = True

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        inner = Joint()(model, x, y)

        def some(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            score = inner(x_adv, rows)
            places = torch.arange(len(x), device=x.device) if rows is None else rows
            return score._replace(fooled=score.fooled & (places < 12))

        return some


FALLING: list[Attack] = [
    build_attack("pgd(linf(0.05), steps=8, restarts=2, keep=first)"),
    build_attack("pgd(linf(0.05), steps=8, keep=first, objective=experts_only)"),
    PGD(Threat("linf", 0.05), steps=8, keep="first", objective=OfSome()),
    build_attack("square(linf(0.05), steps=40)"),
    build_attack("square(l2(3), steps=20)"),
    build_attack("fab(linf(0.05), steps=6, targets=2)"),
    build_attack("expert_transition(linf(0.05), steps=6)"),
    build_attack("route_flip(linf(0.05), steps=6, rivals=1)"),
]


def alike_on_a_device(surrogate: Surrogate, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """Which images fall (n,); the device's images are the CPU's, bit for bit."""
    noise = Noise.of(torch.arange(len(x)))
    expected = attack(surrogate, x, y, noise)
    with Pretending():
        there = Surrogate(surrogate.climbed.to(DEVICE), surrogate.exact.to(DEVICE), True)
        made = attack(there, x.to(DEVICE), y.to(DEVICE), Noise(noise.state.to(DEVICE)))
    assert torch.equal(made.cpu(), expected)
    return surrogate.exact(expected).argmax(1) != y


@pytest.mark.parametrize("net", ["pathway", "hard ensemble"])
@pytest.mark.parametrize("attack", FALLING, ids=lambda attack: type(attack).__name__)
def test_images_that_fall_on_a_device_fall_where_they_do_on_the_cpu(net: str, attack: Attack) -> None:
    surrogate, passes, x, y = claiming(net)
    fell = int(alike_on_a_device(surrogate, attack, x, y).sum())
    judged = sum(n for n, gradient in passes if not gradient and n < len(x))
    assert 0 < fell < len(x)
    assert judged > fell, "some claims are refuted"


def test_images_that_fall_on_the_way_over_the_boundaries_of_tokens_fall_there() -> None:
    surrogate, _, x, y = claiming("ViT-MoE")
    with torch.no_grad():  # so that answers differ, and images can fall
        for model in (surrogate.exact, surrogate.climbed):
            [*_, head] = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
            head.bias.sub_(model(x).mean(0))
    y = surrogate.exact(x).argmax(1)
    fell = int(alike_on_a_device(surrogate, build_attack("route_flip(linf(0.02), steps=6, rivals=1)"), x, y).sum())
    assert 0 < fell < len(x)


@pytest.mark.parametrize("kind", ["pgd", "expert_transition", "route_flip"])
def test_so_do_those_that_all_fall(kind: str) -> None:
    surrogate, _, x, y = claiming("pathway")
    few = 3
    attack = build_attack(f"{kind}(linf(0.5), steps=6, step_size=0.02{', keep=first' if kind == 'pgd' else ''})")
    assert bool(alike_on_a_device(surrogate, attack, x[:few], y[:few]).all())


def test_a_question_that_can_wait_is_asked_with_the_next() -> None:
    mask, other = torch.tensor(MASKS[0]), torch.tensor(MASKS[2])
    with Pretending() as mode, asking.together() as asked:
        first, second = asked.later(mask.to(DEVICE)), asked.later(other.to(DEVICE))
        mode.syncs.clear()
        assert asking.told(torch.tensor([4, 1]).to(DEVICE)) == [4, 1]
        assert (first.count(), second.count(), asked.questions, mode.syncs) == (3, 5, 1, {"tolist": 1})
        third = asked.later(mask.to(DEVICE))
        mode.syncs.clear()
        assert (third.count(), third.count(), mode.syncs) == (3, 3, {"tolist": 1})
    with asking.together() as asked:
        here = asked.later(mask)
        assert asking.told(torch.tensor([4, 1])) == [4, 1]
        assert (here.count(), asked.questions) == (3, 0)


def test_a_batchnorm_over_processes_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back, also of a process without images. (A process that is all there are, and does not know it.)"""
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: value)
    with Pretending() as mode:
        norm = BatchNorm2d(3).train().to(DEVICE)
        expected, images = copy.deepcopy(norm), torch.rand(4, 3, 2, 2)
        x = images.to(DEVICE)
        mode.syncs.clear()
        norm(x.requires_grad_(True)).square().sum().backward()
        norm(x[:0])
        assert mode.syncs == {}
    reference = torch.nn.BatchNorm2d(3).train()
    reference(images)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, msg=key)
    assert not torch.equal(expected.running_mean, norm.running_mean)


BUDGETS = {
    ("dense", "PGD, keep=last"): 0,
    ("dense", "PGD, keep=first"): 1,
    ("dense", "APGD"): 1,
    ("dense", "FAB-T"): 1,
    ("dense", "Square"): 1,
    ("pathway", "PGD, keep=first"): 1,
    ("pathway", "APGD"): 2,
    ("pathway", "FAB-T"): 1,
    ("pathway", "Square"): 2,
    ("pathway", "expert_transition"): 2.2,
    ("hard ensemble", "expert_transition"): 2.2,
    ("pathway", "route_flip"): 4.6,
    ("hard ensemble", "PGD, keep=first"): 1,
    ("hard ensemble", "FAB-T"): 1,
    ("hard ensemble", "Square"): 2,
    ("ViT-MoE", "PGD, keep=first"): 1,
    ("ViT-MoE", "expert_transition"): 4,
}
"""At most so many questions a step. A pathway asks in each free pass how many images each expert has. Rounding decides
how many passes a step of FAB makes, two or three, and in how many steps the exact model gives its word: its budget is
beside the passes of a routed net, and one more question is counted anew behind such a word.
"""


@pytest.mark.parametrize("net, name", BUDGETS)
def test_a_step_of_an_attack_asks_no_more_than(net: str, name: str) -> None:
    counted = sync_counts.attack(net, sync_counts.ATTACKS[name])
    free = 0.0
    if name == "FAB-T":
        assert counted.passes <= 3 + counted.verdicts
        free = counted.verdicts + (0.0 if net == "dense" else counted.passes)
    assert counted.syncs - free <= BUDGETS[net, name] + 1e-9, counted
    assert counted.copies == 0
    assert counted.stood > 0


TRAINING_BUDGETS = {
    ("dense", "AT"): 2,
    ("pathway", "AT, route held"): 4,
    ("pathway", "AT, undivided"): 4,
    ("hard ensemble", "AT, undivided"): 4,
}
"""Of a whole step with ten of the attack."""


@pytest.mark.parametrize("net, name", TRAINING_BUDGETS)
def test_a_step_of_training_asks_no_more_than(net: str, name: str) -> None:
    counted = sync_counts.training(net, sync_counts.TRAININGS[name])
    assert counted.syncs <= TRAINING_BUDGETS[net, name], counted


@pytest.mark.parametrize("net", ["pathway", "hard ensemble", "ViT-MoE, sorted"])
def test_an_undivided_attack_is_the_attack(net: str) -> None:
    """In float64, and nobody asks for the sizes; outside of it experts have their own images again."""
    model, x, y = sync_counts.net(net)
    model, x, noise = model.double(), x.double(), Noise.of(torch.arange(len(x)))
    spec = "pgd(linf(0.03), steps=4, keep=last)"
    with mock.patch.object(asking, "tally", side_effect=asking.tally) as tally:
        plain = build_attack(spec)(model, x, y, noise)
        divided = tally.call_count
        undivided = build_attack(f"undivided({spec})")(model, x, y, noise)
        assert tally.call_count == divided > 0
        model(x)
        assert tally.call_count > divided
    torch.testing.assert_close(undivided, plain)
    assert not torch.equal(plain, x)
