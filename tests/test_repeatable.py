"""The switch for the same bits on a GPU: what it sets, and that it goes back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import robustmoe as rm
from robustmoe import repeatable
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel
from robustmoe.recipe import Recipe
from robustmoe.training import train

Flags = tuple[bool, bool, bool, bool, str | None]


def flags() -> Flags:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(repeatable.WORKSPACE),
    )


SET: Flags = (True, True, False, False, ":4096:8")


def test_what_is_set_goes_back_and_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(repeatable.WORKSPACE, raising=False)
    before = flags()
    with repeatable.deterministic(False):
        assert flags() == before
    with repeatable.deterministic(True):
        assert flags() == SET
    assert flags() == before
    monkeypatch.setenv(repeatable.WORKSPACE, ":16:8")
    with pytest.raises(KeyError), repeatable.deterministic(True):
        raise KeyError(flags()[-1])
    assert flags() == (*before[:-1], ":16:8")


def test_an_operation_without_such_an_algorithm_is_a_line() -> None:
    said = "cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_..."
    line = r"deterministic: cumsum_cuda_kernel does not have .*, or no --deterministic"
    with pytest.raises(UserError, match=line), repeatable.deterministic(True):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="out of memory"), repeatable.deterministic(True):
        raise RuntimeError("out of memory")


def test_trainings_and_evaluations_work_inside_it(
    tmp_path: Path, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    model, seen = tiny("dense"), []

    def told(x: Tensor) -> Tensor:
        seen.append(flags()[:4])
        return model(x)

    rm.evaluate(told, images(2), torch.tensor([0, 1]), attacks="fgsm(linf(0.1))", deterministic=True)
    assert set(seen) == {SET[:4]}
    seen.clear()
    rm.evaluate(told, images(2), torch.tensor([0, 1]), attacks="fgsm(linf(0.1))")
    assert set(seen) == {flags()[:4]}
    recipe = Recipe(
        model="small_cnn(width=4)", data="digits", method="standard", epochs=1, max_steps=2, threads=1, device="cpu"
    )
    weights = []
    for number, asked in enumerate((False, True)):
        run = train(dataclasses.replace(recipe, deterministic=asked), tmp_path / str(number))
        weights.append(rm.load_model(run).state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items()), "on a CPU nothing changes"
