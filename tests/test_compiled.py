"""The switch ``compile``: steps run compiled, nothing else does, and what comes out is what the code says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import robustmoe as rm
import sync_counts
from robustmoe.attacks.base import looked_at
from robustmoe.errors import UserError
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.training import MiniBatch, build_method, compiled, loop, train, train_step

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""Torch's compiler looks at every attribute of what it is given, and hides what it hears."""

SHORT = Recipe(
    model="ensemble(small_cnn(width=4), experts=2, router=small_cnn(width=4))",
    data="digits",
    method="at(pgd(linf(0.1), steps=2, keep=last))",
    optimizer="sgd(lr=0.1)",
    epochs=1,
    max_steps=3,
    batch_size=16,
    val_limit=16,
    val_attack="fgsm(linf(0.1))",
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When something ran compiled, by a compiler that changes nothing: in a "step", or "elsewhere", as the trial does
    which asks whether torch can compile.
    """
    ran: list[str] = []
    now = ["elsewhere"]

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        def compiled_graph(*args: Any) -> Any:
            ran.append(now[0])
            return graph.forward(*args)

        return compiled_graph

    def step(*args: Any, **kwargs: Any) -> Any:
        now[0] = "step"
        try:
            return train_step(*args, **kwargs)
        finally:
            now[0] = "elsewhere"

    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(loop, "train_step", step)
    return ran


def test_steps_run_compiled_and_what_judges_does_not(tmp_path: Path, ran: list[str]) -> None:
    train(SHORT, tmp_path / "plain")
    assert ran == []
    train(dataclasses.replace(SHORT, compile=True), tmp_path / "compiled")
    assert ran.pop(0) == "elsewhere"
    assert set(ran) == {"step"}
    assert len(ran) >= 3 * (3 + 2), "in a step two climbs and the training pass, router and experts"
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, msg=name)
    assert json.loads((tmp_path / "compiled" / "config.json").read_text())["compile"] is True
    again = rm.load_model(tmp_path / "compiled")
    ran.clear()
    again(torch.rand(2, 1, 8, 8))
    assert ran == []


def test_a_forecast_times_compiled_steps(ran: list[str]) -> None:
    rm.forecast(dataclasses.replace(SHORT, compile=True), seconds=0.1)
    assert ran.pop(0) == "elsewhere"
    assert set(ran) == {"step"}


def test_a_compiler_that_is_missing_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        raise RuntimeError("No working C++ compiler\nand more")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    with pytest.raises(UserError, match=r"^compile: torch cannot compile for cpu here: .+$"):
        train(dataclasses.replace(SHORT, compile=True), tmp_path / "run")


def test_where_it_does_not_go() -> None:
    asked = dataclasses.replace(SHORT, compile=True)
    with pytest.raises(UserError, match="several processes"):
        compiled.check(dataclasses.replace(asked, sharding="full"), False)
    with pytest.raises(UserError, match="this one is yours"):
        compiled.check(asked, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler uses what torch has given up
@pytest.mark.parametrize("name", ["dense", "pathway"])
def test_compiled_gradients_are_those_of_the_code(name: str) -> None:
    """By torch's own compiler, over two steps of training (a pathway's experts have other sizes in each)."""
    moved: list[dict[str, Tensor]] = []
    for asked in (False, True):
        model, x, y = sync_counts.net(name)
        method = build_method("at(pgd(linf(0.03), steps=1, keep=last))")
        optimisers = [torch.optim.SGD(phase.parameters(model).values(), lr=0.1) for phase in method.phases]
        with compiled.held(asked), looked_at():
            if asked:
                compiled.prepare(model, torch.device("cpu"))
            for step in range(2):
                noise = Noise.of(torch.arange(len(x)), step)
                with compiled.at_work(asked):
                    train_step(model, method, optimisers, MiniBatch(x, y, noise))
        moved.append({name: p.detach().clone() for name, p in model.named_parameters()})
        torch.default_generator.manual_seed(0)
    for name, weight in moved[0].items():
        torch.testing.assert_close(moved[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
