"""Torch's own generators are where they were, the GPUs' too: stand-ins for CUDA's functions keep what they are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robustmoe import generators
from robustmoe.errors import UserError
from robustmoe.models import build_model
from robustmoe.models.tokens import groupable
from robustmoe.provenance import pick_device
from robustmoe.recipe import Recipe
from robustmoe.training import train
from robustmoe.training.checkpoint import read_state, save_state


class GPUs:
    """Two generators, as torch.cuda's functions read and set them."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        self.seeds: list[int] = []

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)
        self.states = [torch.tensor([9], dtype=torch.uint8)] * 2

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.states = list(states)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GPUs:
    stand_in = GPUs()
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_rng_state_all": lambda: list(stand_in.states),
        "set_rng_state_all": stand_in.set_rng_state_all,
        "manual_seed_all": stand_in.manual_seed_all,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stand_in


def test_what_is_seeded_goes_back_on_every_gpu_also_after_an_error(gpus: GPUs) -> None:
    before, here = gpus.states, torch.get_rng_state()
    with generators.seeded(5):
        assert gpus.seeds == [5]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert gpus.states == before
    with pytest.raises(KeyError), generators.seeded(5):
        raise KeyError
    assert gpus.states == before
    assert torch.equal(torch.get_rng_state(), here)


def test_a_fresh_model_leaves_the_gpus_generators(gpus: GPUs) -> None:
    before = gpus.states
    build_model("linear", 3, (1, 4, 4), seed=2)
    assert gpus.seeds == [2]
    assert gpus.states == before


def test_a_gpu_that_nobody_has_asked_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("CUDA would begin here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_rng_state_all", "set_rng_state_all", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refused)
    with generators.seeded(1):
        pass


def test_a_checkpoint_keeps_the_gpus_generator_and_a_resume_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, taken = torch.tensor([4, 2], dtype=torch.uint8), []
    monkeypatch.setattr(generators, "state_on", lambda device: state)
    monkeypatch.setattr(generators, "go_on", lambda device, given: taken.append(given))
    recipe = Recipe(
        model="linear", data="digits", method="standard", epochs=1, batch_size=64, threads=1, device="cpu", max_steps=1
    )
    run = train(recipe, tmp_path / "run")
    saved = read_state(run / "state.pt")
    assert torch.equal(saved["device_rng"], state)
    train(recipe, run, resume=True)
    assert [torch.equal(given, state) for given in taken] == [True]
    save_state(run / "state.pt", {**saved, "device_rng": state[:1]})
    with pytest.raises(UserError, match="its random state of the GPU is none of torch's"):
        train(recipe, run, resume=True)
    older = {name: value for name, value in saved.items() if name != "device_rng"}
    save_state(run / "state.pt", older)
    train(recipe, run, resume=True)
    assert taken[-1] is None
    assert json.loads((run / "config.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_apples_gpus_are_refused_for_what_they_lack(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be used here \(Apple's GPUs have no float64, .*\); expected auto"):
        pick_device(name)


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.mark.parametrize("capability, takes", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_the_grouped_product_is_asked_by_compute_capability(
    capability: tuple[int, int], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x, weight = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    there, wide = x.as_subclass(OnCuda), x.float().as_subclass(OnCuda)
    assert groupable(there, weight) == takes
    assert not groupable(wide, weight.float()), "float32 has no grouped product on CUDA"
    assert groupable(x, weight)
