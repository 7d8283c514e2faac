"""Several climbs of an image in one batch give what they give one after the other, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustmoe.attacks import FAB, Attack, AutoAttack, Surrogate, TargetedAPGD, Threat, linf, missed
from robustmoe.attacks.together import Together, next_climbs, room, room_for
from robustmoe.evaluation import evaluate
from robustmoe.models import RoutedModel

EPS = {"linf": 0.03, "l2": 0.25, "l1": 2.0}


class Alone(RoutedModel):
    """Two layers, asked about one image at a time, so that their roundings are those of no batch; notes each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.GELU(), nn.Linear(24, 4))
        self.passes: list[int] = []

    def body(self, x: Tensor, tape: Any) -> Tensor:
        self.passes.append(len(x))
        return torch.cat([self.inner(each) for each in x.split(1)]) if len(x) else self.inner(x)


@pytest.fixture
def asked(images: Callable[..., Tensor]) -> tuple[Alone, Tensor, Tensor]:
    model, x = Alone(), images(8)
    return model, x, model(x).argmax(1)


def attacks() -> list[Attack]:
    climbs: list[Attack] = []
    for norm, eps in EPS.items():
        threat = Threat(norm, eps)  # type: ignore[arg-type]
        climbs.append(TargetedAPGD(threat, steps=6, loss="margin"))
        climbs.append(FAB(threat, steps=4, targets=9, restarts=2))
    threat = linf(EPS["linf"])
    return [
        *climbs,
        TargetedAPGD(threat, steps=5, restarts=2, keep="best"),
        TargetedAPGD(Threat("l1", 2.0), steps=6, largereps=False, eot=2),
        FAB(threat, steps=3, targets=2, keep="best"),
        FAB(threat, steps=3, restarts=3),
    ]


@pytest.mark.parametrize("attack", attacks(), ids=lambda attack: f"{type(attack).__name__}-{attack.threat.norm}")
def test_at_once_is_as_in_turn(attack: Attack, asked: tuple[Alone, Tensor, Tensor]) -> None:
    """To the bit, whatever there is room for; and never more images at a time than that."""
    model, x, y = asked
    climbed = Surrogate(model, model, close=True)
    given, passes = [], []
    for size in (1, 18, 150):
        model.passes.clear()
        with room_for(size):
            given.append(attack(climbed, x, y))
        passes.append(len(model.passes))
        assert max(model.passes) <= max(size, len(x))
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    assert passes[2] <= passes[1] < passes[0]
    broken = missed(model, given[0], model(given[0]), y)
    assert bool(broken.any())
    assert not bool(broken.all())


def test_later_climbs_of_a_broken_image_stop(asked: tuple[Alone, Tensor, Tensor]) -> None:
    """Where the first target breaks all at once, the others' climbs end with it."""
    model, x, y = asked
    attack = TargetedAPGD(linf(1.0), steps=30, loss="margin")
    with room_for(200):
        attack(model, x, y)
    assert len(model.passes) < 20


def test_the_original_stays_as_it_is(asked: tuple[Alone, Tensor, Tensor]) -> None:
    model, x, y = asked
    for attack in (
        TargetedAPGD(linf(0.02), steps=4, rng="autoattack"),
        FAB(linf(0.02), 3, targets=3, rng="autoattack"),
    ):
        model.passes.clear()
        with room_for(200):
            attack(model, x, y)
        assert max(model.passes) <= len(x)


def test_an_evaluation_gives_room_for_its_batch_size(asked: tuple[Alone, Tensor, Tensor]) -> None:
    model, x, y = asked
    verdicts = []
    for size in (8, 32):
        model.passes.clear()
        [result] = evaluate(model, x, y, attacks=TargetedAPGD(linf(0.03), steps=4), precision="fp32", batch_size=size)
        verdicts.append([replace(row, part="") for row in result.rows])
        asked_at_once = max(model.passes[-30:])
        assert size / 2 < asked_at_once <= size
    assert verdicts[0] == verdicts[1]


def test_room() -> None:
    assert room() == 0
    with room_for(10):
        assert next_climbs([1, 2, 3], 4) == ([1, 2], [3])
        assert next_climbs([1, 2, 3], 11) == ([1], [2, 3])
        assert next_climbs([1, 2, 3], 11, numbers=64) == ([1, 2], [3])
        with room_for(40):
            assert next_climbs([1, 2, 3], 4) == ([1, 2, 3], [])
        assert room() == 10
    together = Together.of(2, 3, torch.device("cpu"))  # rows 0 2 4 of the first image, 1 3 5 of the second
    together.broke(torch.tensor([4, 3]))
    together.broke(torch.tensor([2]))
    together.broke(torch.tensor([5]))
    assert together.wanted(torch.arange(6)).tolist() == [True, True, True, True, False, False]


def test_a_suite_called_directly_has_room_for_what_it_was_given(asked: tuple[Alone, Tensor, Tensor]) -> None:
    """Eight images were given: the parts may ask about eight, however few are left to them."""
    model, x, y = asked
    suite = AutoAttack(linf(0.005))
    parts = dict(suite.parts(model.run(x)))
    left = x[:4], y[:4]
    model.passes.clear()
    with room_for(len(x)):
        replace(parts["apgd-t"], steps=5)(model, *left)
    assert max(model.passes) == 8


@pytest.mark.parametrize("keep", ["first", "best"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_fuller_passes_of_a_step_give_what_three_give(
    norm: str, keep: str, asked: tuple[Alone, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAB's images to the bit, where runs that were broken before are asked apart from the others."""
    model, x, y = asked
    threat = Threat(norm, EPS[norm])  # type: ignore[arg-type]
    attack = FAB(threat, steps=12, targets=3, eta=1.0, keep=keep)  # type: ignore[arg-type]
    given, passes = [], []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(FAB, "_in_two_passes", FAB._part_by_part)
        model.passes.clear()
        given.append(attack(Surrogate(model, model, close=True), x, y))
        passes.append(len(model.passes))
    assert torch.equal(*given)
    assert passes[0] < passes[1]
    assert bool((given[0] != x).any())
