"""Training in fp16: beside torch's own GradScaler, with overflows, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustmoe as rm
from robustmoe.attacks.objectives import Score
from robustmoe.attacks.pgd import ascend
from robustmoe.errors import UserError
from robustmoe.models import build_model
from robustmoe.noise import Noise
from robustmoe.recipe import Recipe
from robustmoe.training import MiniBatch, build_method, scaling, train_step
from robustmoe.training.checkpoint import read_state
from robustmoe.training.scaling import LossScale
from tiny_models import CLASSES, IMAGE_SHAPE, TINY

IMAGES = 8


def batch(step: int = 0) -> MiniBatch:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(IMAGES, *IMAGE_SHAPE, generator=generator)
    return MiniBatch(x, torch.arange(IMAGES) % CLASSES, Noise.of(torch.arange(IMAGES), step))


@pytest.mark.parametrize("bad", [(), (0,), (3, 4), (2, 7)])
def test_the_scale_moves_as_torchs_own(bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "EVERY", 3)
    weight = torch.nn.Parameter(torch.ones(1))
    ours, theirs = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
    torchs, scale = torch.amp.GradScaler("cpu", init_scale=scaling.START, growth_interval=3), LossScale(ours)
    for step in range(10):
        torchs.scale(torch.ones(()))
        weight.grad = torch.full((1,), torch.inf if step in bad else 1.0)
        torchs.step(theirs)
        torchs.update()
        if step in bad:
            assert scale.overflowed(torch.zeros(4))
        else:
            scale.stepped()
        assert scale.value == torchs.get_scale()
    assert scale.left_out == len(bad) == scaling.left_out([ours])
    assert scaling.left_out([theirs]) == 0


@pytest.mark.parametrize("name", ["dense", "pathway"])
def test_steps_in_fp16_are_those_of_torchs_scaler(name: str) -> None:
    model, twin = (build_model(TINY[name], CLASSES, IMAGE_SHAPE) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    method = build_method("standard")
    optimiser, other = (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, twin))
    torchs = torch.amp.GradScaler("cpu", init_scale=scaling.START)
    twin.train()
    for step in range(3):
        given = batch(step)
        result = train_step(model, method, [optimiser], given, autocast=torch.float16)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = twin(given.x)
        loss = F.cross_entropy(logits.float(), given.y)
        torchs.scale(loss).backward()
        torchs.step(other)
        torchs.update()
        other.zero_grad()
        assert float(result.loss[method.phases[0].name]) == pytest.approx(loss.item(), rel=1e-6)
    for (key, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7), key


def test_a_step_that_overflows_is_left_out_until_the_scale_fits() -> None:
    model, method = build_model(TINY["dense"], CLASSES, IMAGE_SHAPE), build_method("standard")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    LossScale(optimiser).group["loss_scale"] = 2.0**30
    before = [p.clone() for p in model.parameters()]
    result = train_step(model, method, [optimiser], batch(), autocast=torch.float16)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    assert (LossScale(optimiser).value, LossScale(optimiser).left_out) == (2.0**29, 1)
    assert (float(result.grad_norm[method.phases[0].name]), result.seen) == (0.0, IMAGES)
    while LossScale(optimiser).left_out < 30 and all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
        train_step(model, method, [optimiser], batch(), autocast=torch.float16)
    assert LossScale(optimiser).left_out < 30
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    LossScale(optimiser).group["loss_scale"] = scaling.LEAST
    with pytest.raises(UserError, match="is not finite"):
        train_step(model, method, [optimiser], batch(), autocast=torch.float16)


def test_gradients_at_the_images_that_fp16_would_round_to_zero_are_kept() -> None:
    def inner(x: Tensor, rows: Tensor | None = None) -> Score:
        loss = (x.half() * 1e-4).sum((1, 2, 3)).float() * 1e-4
        return Score(loss, torch.zeros(len(x), dtype=torch.bool))

    x = batch().x
    assert float(ascend(inner, x)[1].abs().max()) == 0.0, "1e-8 is less than fp16 has"
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.allclose(ascend(inner, x)[1], torch.full_like(x, 1e-8), rtol=0.05)


RUN: dict[str, Any] = {
    "model": TINY["dense"],
    "data": "digits",
    "method": "at(pgd(linf(0.1), steps=1, keep=last))",
    "epochs": 2,
    "batch_size": 256,
    "precision": "fp16",
    "device": "cpu",
    "val_limit": 20,
}


def test_a_run_in_fp16_is_resumed_to_the_bit_with_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first scale is too large, so that steps are left out, and the scale has to be kept."""
    monkeypatch.setattr(scaling, "START", 2.0**20)
    rm.train(Recipe(**RUN), tmp_path / "whole")
    said = capsys.readouterr().err
    assert "steps of epoch 1 had gradients that overflowed, and were left out" in said
    assert "of epoch 2 had" not in said
    rm.train(Recipe(**{**RUN, "max_steps": 4}), tmp_path / "cut")
    config = (tmp_path / "cut" / "config.json").read_text().replace('"max_steps": 4', '"max_steps": null')
    (tmp_path / "cut" / "config.json").write_text(config)
    rm.train(Recipe(**RUN), tmp_path / "cut", resume=True)
    ends = [read_state(tmp_path / name / "state.pt") for name in ("whole", "cut")]
    groups = [end["optimisers"][0]["param_groups"][0] for end in ends]
    assert groups[0]["left_out"] == groups[1]["left_out"] > 0
    assert groups[0]["loss_scale"] == groups[1]["loss_scale"] < 2.0**20
    assert all(torch.equal(a, b) for a, b in zip(ends[0]["model"].values(), ends[1]["model"].values()))


def test_fp16_is_for_whole_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16's loss scale is for whole models; expected precision=bf16"):
        rm.train(Recipe(**RUN, sharding="full"), tmp_path / "run")
