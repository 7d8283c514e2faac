"""`robustmoe.forecast` beside the work itself, on a clock that only the model's passes move; what it leaves alone."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe.attacks import schedule
from robustmoe.certification import Certificate, Certifier
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation.certifying import Certifying
from robustmoe.evaluation.session import in_hand
from robustmoe.forecasting import timing
from robustmoe.forecasting.certifying import timed
from robustmoe.forecasting.probing import PassCost, Trace
from robustmoe.forecasting.timing import Seconds
from robustmoe.options import CertifyOptions
from robustmoe.recipe import Recipe
from robustmoe.records import at_work

NOW = [0.0]
"""Seconds on the clock of these tests."""

CALL, IMAGE = 0.01, 0.001
"""What a pass of `Ticking` takes, and each of its images."""


class Ticking(nn.Module):
    """A linear net whose passes take time. ``scale`` of its logits: 0 is never broken."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        NOW[0] += CALL + IMAGE * len(x)
        logits: Tensor = self.linear(x.flatten(1))
        return self.scale * logits + (1 - self.scale) * torch.tensor([1.0, 0.0, 0.0, 0.0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that only passes of `Ticking` take; nine seconds of the CPU are ten on the wall."""
    NOW[0] = 0.0
    fake = types.SimpleNamespace(process_time=lambda: 0.9 * NOW[0], monotonic=lambda: NOW[0])
    monkeypatch.setattr(timing, "time", fake)
    return NOW


def pictures(n: int) -> tuple[Tensor, Tensor]:
    """n random images, and the side that each is brighter on as one of four labels."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    halves = torch.stack([x[..., :4, :4], x[..., :4, 4:], x[..., 4:, :4], x[..., 4:, 4:]]).flatten(2).mean(2)
    return x, halves.argmax(0)


def fit(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Teach the net its images, so that attacks break some of them."""
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


# ------------------------------------------------------------------------------------------------ beside the truth


@pytest.mark.parametrize("method", ["standard", "at(pgd(linf(0.1), steps=2, keep=last))"])
def test_a_training_takes_what_was_forecast(method: str, clock: list[float], tmp_path: Path) -> None:
    x, y = pictures(300)
    net = Ticking()
    before = [p.clone() for p in net.parameters()]
    fields: dict[str, Any] = {"method": method, "epochs": 4, "batch_size": 16, "val_attack": "pgd(linf(0.1), steps=3)"}
    told = rm.forecast(net, x, y, seconds=1.0, device="cpu", **fields)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters())), "its steps are made on a copy"
    begun = clock[0]
    rm.train(net, x, y, out=tmp_path / "run", device="cpu", **fields)
    truth = clock[0] - begun
    numbers = told.summary()
    assert numbers["wall_seconds"] == pytest.approx(truth, rel=0.03)
    assert numbers["cpu_seconds"] == pytest.approx(0.9 * truth, rel=0.03)
    assert numbers["measured_cpu_seconds"] < 0.5 * numbers["cpu_seconds"]
    counts = {part["name"]: part["count"] for part in numbers["parts"]}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (counts["training steps"], counts["validations"]) == (lines[-1]["step"], len(lines))
    written = sum((tmp_path / "run" / name).stat().st_size for name in ("state.pt", "model.safetensors"))
    assert numbers["files_bytes"] == pytest.approx(written, rel=0.1)


def test_max_steps_and_seeds_of_a_method_that_changes(clock: list[float]) -> None:
    x, y = pictures(100)
    told = rm.forecast(Ticking(), x, y, method="standard", epochs=9, batch_size=10, max_steps=12, seconds=0.1)
    counts = {part.name: part.count for part in told.parts}
    assert (counts["training steps"], counts["validations"]) == (12, 2)


@pytest.mark.parametrize("attack", ["pgd(linf(0.03), steps=20, keep=first)", "pgd(linf(0.03), steps=20, keep=best)"])
def test_an_evaluation_takes_what_was_forecast(attack: str, clock: list[float]) -> None:
    x, y = pictures(90)
    net = Ticking()
    fit(net, x, y)
    asked: dict[str, Any] = {"attacks": attack, "curve": "auto", "batch_size": 32, "device": "cpu"}
    told = rm.forecast(net, x, y, seconds=20.0, **asked)
    begun = clock[0]
    (whole, *_) = rm.evaluate(net, x, y, **asked)
    truth = clock[0] - begun
    assert 0.2 < whole.summary().robust.value < 0.9, "some of the images break, not all"
    assert told.wall == pytest.approx(truth, rel=0.2)
    part = next(part for part in told.parts if part.passes is not None)
    assert part.low <= part.cpu <= part.high <= part.most
    assert part.most_passes is not None
    assert part.passes is not None
    assert (part.passes < part.most_passes) == ("first" in attack)


def test_where_nothing_breaks_a_short_probe_tells_it_all(clock: list[float]) -> None:
    """The probe is stopped long before its end, and what is left is what `Attack.queries` says."""
    x, y = pictures(64)
    net, y = Ticking(scale=0.0), torch.zeros_like(y)
    asked: dict[str, Any] = {"attacks": "pgd(linf(0.1), steps=200, keep=first)", "batch_size": 32, "device": "cpu"}
    told = rm.forecast(net, x, y, seconds=2.0, **asked)
    begun = clock[0]
    rm.evaluate(net, x, y, **asked)
    assert told.wall == pytest.approx(clock[0] - begun, rel=0.05)
    assert told.measured < 0.3 * told.cpu
    attack = next(part for part in told.parts if part.passes is not None)
    assert attack.passes == pytest.approx(attack.most_passes, rel=0.01)


@pytest.mark.parametrize(("steps", "restarts"), [(5000, 1), (1500, 3)])
def test_a_stopped_probe_knows_that_square_leaves_proposals_out(steps: int, restarts: int, clock: list[float]) -> None:
    """Nothing helps on this net: each window of a side is asked once, most of the 4,500 and more never."""
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    net = Ticking(scale=0.0)
    net.linear = nn.Linear(64, 4)
    attack = f"square(linf(0.1), steps={steps}, restarts={restarts})"
    asked: dict[str, Any] = {"attacks": attack, "curve": "none", "batch_size": 16, "device": "cpu"}
    told = rm.forecast(net, x, torch.zeros(16, dtype=torch.long), seconds=3.0, **asked)
    begun = clock[0]
    rm.evaluate(net, x, torch.zeros(16, dtype=torch.long), **asked)
    truth = clock[0] - begun
    assert told.measured < 0.6 * told.cpu, "the probe was stopped"
    assert told.wall == pytest.approx(truth, rel=0.25)
    part = next(part for part in told.parts if part.passes is not None)
    assert part.most_passes == 1 + restarts * (1 + steps)
    assert part.passes is not None
    assert part.passes < 0.3 * part.most_passes


def test_likely_passes_are_the_different_proposals_of_random_draws() -> None:
    """By hand: of two, three draws see 2 (1 - 1/8) different ones; another kind begins anew; without a table, all."""
    steps = [schedule.Random(*step) for step in ((5, 1, 2), (5, 2, 2), (3, 1, 2), (1, 7, None))]
    assert schedule.likely(steps) == pytest.approx([1.0, 0.75, 1.0, 7.0])
    heard: list[tuple[float, float]] = []
    with schedule.heard_by(lambda done, of, _: heard.append((done, of))):
        for restart in range(2):
            list(schedule.followed("abc", [4.0, 2.0, 1.0], restart, 2))
    assert heard == [(2, 17), (6, 17), (8, 17), (10, 17), (14, 17), (16, 17)]


def test_a_suite_is_forecast_part_by_part(clock: list[float]) -> None:
    x, y = pictures(40)
    net = Ticking()
    fit(net, x, y)
    told = rm.forecast(net, x, y, attacks="autoattack(linf(0.02))", seconds=5.0, batch_size=16, device="cpu")
    names = [part.name.rpartition(": ")[2] for part in told.parts if part.passes is not None]
    assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]
    left = [part.left for part in told.parts if part.left is not None]
    assert left == sorted(left, reverse=True)
    entering = [part.count for part in told.parts if part.passes is not None]
    assert entering == sorted(entering, reverse=True)


class Pairs(Ticking):
    """A net that takes no image alone."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("two images at least")
        return super().forward(x)


def test_a_model_that_cannot_be_counted_is_forecast_and_says_so(clock: list[float]) -> None:
    x, y = pictures(20)
    told = rm.forecast(Pairs(), x, y, attacks="fgsm(linf(0.02))", seconds=1.0, batch_size=10, device="cpu")
    assert told.macs is None
    assert any(
        note.startswith("Multiply-adds were not counted") and "two images at least" in note for note in told.notes
    )
    counted = rm.forecast(Ticking(), x, y, attacks="fgsm(linf(0.02))", seconds=1.0, batch_size=10, device="cpu")
    assert counted.macs == 192 * 4
    assert not any("counted" in note for note in counted.notes)


# ------------------------------------------------------------------------------------------------ the model of the cost


def counted(trace: Trace, sizes: Sequence[int], gradient: bool = True, seconds: float = 1.0) -> Trace:
    """Passes on so many images, each of which takes so long."""
    for n in sizes:
        trace.count(n, gradient, trace.took)
        trace.took += Seconds(seconds, seconds / 2)
    return trace


def test_a_trace_scales_by_hand() -> None:
    """Ten calls with a gradient on 8 images, of which 4 are left from the fifth on: 12 + 0.5 x 60 seconds there."""
    costs = {True: PassCost(1.2, 0.5), False: PassCost(1.0, 1.0)}
    trace = counted(Trace(8, cost=30), [8] * 5 + [4] * 5, seconds=8.4)
    assert trace.passes == pytest.approx(3 * 60 / 8)
    whole = trace.scaled(costs, trace.pace(costs), images=20, batch_size=8)  # three batches: 30 calls, 150 images
    assert whole.cpu == pytest.approx(84 * (30 * 1.2 + 150 * 0.5) / (10 * 1.2 + 60 * 0.5))
    assert whole.wall == pytest.approx(whole.cpu / 2)
    unbroken = trace.scaled(costs, trace.pace(costs), images=8, batch_size=8, unbroken=True)
    assert unbroken.cpu == pytest.approx(84 * (10 * 1.2 + 80 * 0.5) / (10 * 1.2 + 60 * 0.5))


def test_a_trace_that_did_not_end_goes_on_with_the_images_that_were_left() -> None:
    costs = {True: PassCost(0.0, 1.0), False: PassCost(0.0, 1.0)}
    trace = counted(Trace(8, cost=60, whole=False), [8] * 5, seconds=8.0)
    trace = counted(trace, [4] * 5, seconds=4.0)
    assert trace.passes == pytest.approx(3 * (60 + 10 * 4) / 8)  # as many calls again, on four images
    assert trace.scaled(costs, trace.pace(costs), images=8, batch_size=8).cpu == pytest.approx(100.0)
    assert trace.scaled(costs, trace.pace(costs), images=8, batch_size=8, unbroken=True).cpu == pytest.approx(160.0)


def test_several_targets_at_once_go_on_at_once() -> None:
    """Of each of eight images four targets in a pass: ten passes of 32 rows, and as many to come."""
    trace = counted(Trace(8, cost=240, whole=False), [32] * 10)
    assert trace.passes == pytest.approx(3 * 20 * 32 / 8)
    assert trace.pace({kind: PassCost(0.0, 1.0) for kind in (True, False)}).cpu == pytest.approx(20 / 640)


def test_a_trace_that_heard_how_far_it_is_goes_on_at_that_pace() -> None:
    """Heard after ten passes: four of ten. So 25 are likely, and two more were made since."""
    trace = counted(Trace(8, cost=500, whole=False), [8] * 10, gradient=False)
    trace.hear(4.0, 10.0, trace.took)
    counted(trace, [8] * 2, gradient=False)
    assert trace.passes == pytest.approx(25.0)
    trace.hear(1.0, 1000.0, trace.took)
    assert trace.likely == 500, "never more than what the attack costs at most"


def test_a_climb_of_another_kind_goes_on_as_it_went_last() -> None:
    """Four tenths of an attack: two steps of one second without a pass, then two with two passes in three seconds. So
    the six that are left take 18 seconds and twelve passes.
    """
    trace = Trace(8, cost=500, whole=False)
    for step in range(5):
        hear = schedule.heard_by(lambda done, of, some: trace.hear(done, of, trace.took, some))
        with hear, schedule.part(0.0, 1.0, 2.0):
            schedule.at(step, 5)
        if step < 2:
            trace.took += Seconds(1.0, 1.0)
        else:
            counted(trace, [4, 4], gradient=False, seconds=1.5)
    assert trace.some
    alone = {True: PassCost(0.0, 0.0), False: PassCost(1.0, 0.0)}
    assert trace.passes == pytest.approx((4 + 12) * 4 / 8)
    assert trace.scaled(alone, trace.pace(alone), images=8, batch_size=8).cpu == pytest.approx(8 + 18)


def test_what_is_made_once_is_not_counted_again_and_again() -> None:
    """Six calls of ten seconds each, then six of one: the 288 that are left take a second each."""
    costs = {True: PassCost(1.0, 0.0), False: PassCost(1.0, 0.0)}
    trace = counted(Trace(8, cost=300, whole=False), [8] * 6, gradient=False, seconds=10.0)
    trace = counted(trace, [8] * 6, gradient=False)
    assert trace.scaled(costs, trace.pace(costs), images=8, batch_size=8).cpu == pytest.approx(354.0)
    trace.whole = True
    assert trace.scaled(costs, trace.pace(costs), images=8, batch_size=8).cpu == pytest.approx(66.0)


# ------------------------------------------------------------------------------------------------ the command line


def test_a_dry_run_prints_a_table_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustmoe.forecasting.BUDGET", 0.2)
    Path("small.toml").write_text(
        'model = "small_cnn(width=4)"\ndata = "digits"\nmethod = "at(pgd(linf(0.1), steps=2))"\nepochs = 30\n'
    )
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef make_model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    there = sorted(tmp_path.iterdir())
    draws = torch.get_rng_state()
    assert main(["train", "small.toml", "--dry_run", "--seeds", "0..2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "training steps    300 " in out
    assert "for each of 3 seeds" in out
    model = ["--model", "own.py:make_model", "--data", "digits"]
    attack = ["--attack", "pgd(linf(0.1), steps=5)", "--limit", "40", "--device", "cpu"]
    assert main(["evaluate", *model, *attack, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "pgd(linf(0.1), steps=5" in text
    assert "passes an image (a gradient counts as 3)" in text
    assert "curve at 0.15" in text
    assert max(map(len, (out + text).splitlines())) <= 80
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == there
    assert torch.equal(draws, torch.get_rng_state())


def test_what_cannot_be_forecast_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pictures(8)
    for seconds, said in {0.0: "0.0", float("nan"): "nan", float("inf"): "inf", "5": "'5'", True: "True"}.items():
        with pytest.raises(UserError, match=f"seconds is {said}; expected a number above 0"):
            rm.forecast(Ticking(), x, y, seconds=seconds)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a forecast is of all images; leave shard out"):
        rm.forecast(Ticking(), x, y, shard="1/3")
    with pytest.raises(UserError, match="there is no recipe 'nothing'"):
        rm.forecast("nothing")
    with pytest.raises(UserError, match="cannot forecast a int; expected a recipe, its name or file, a run folder, or"):
        rm.forecast(3)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a forecast is made by one process"):
        rm.forecast(Recipe(model="small_cnn", data="digits", method="standard", epochs=1))


def test_processes_of_torchrun_tell_once_that_a_forecast_is_made_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("robustmoe.cli.GRACE", 0.0)
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["evaluate", "zoo:digits_dense", "--dry-run"]) == 2
        told.append(capsys.readouterr().err)
    assert told[0].startswith("robustmoe: a forecast is made by one process")
    assert told[1] == ""


def test_a_dry_run_is_refused_where_the_run_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text('model = "small_cnn"\ndata = "digits"\nmethod = "standard"\nepochs = 1\n')
    assert main(["train", "small.toml", "--dry-run", "--resume", "--out", "new"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    assert main(["train", "small.toml", "--dry-run", "--out", "old"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_certification_is_forecast_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustmoe.forecasting.BUDGET", 0.2)
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef make_model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    there = sorted(tmp_path.iterdir())
    model = ["--model", "own.py:make_model", "--data", "digits", "--limit", "100", "--device", "cpu"]
    certifiers = ["--certifier", "bounds(linf(0.01), how=ibp, search=0)", "--certifier", "smoothing(0.25, n=200)"]
    assert main(["certify", *model, *certifiers, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("forecast of the certification of ")
    assert "bounds(linf(0.01), how=ibp, search=0)" in text.replace("\n", " ")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == there
    assert max(map(len, text.splitlines())) <= 80


def test_a_certification_is_forecast_as_it_is_made_beside_another_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same switches, and without the folder's lock: a job may be at work there."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef make_model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    assert main(["certify", "--model", "own.py:make_model", "--data", "digits", "--limit", "2", "--out", "run"]) == 0
    proofs, seen = Certifying.proofs, []

    def noted(self: Certifying, batch: Any) -> Any:
        seen.append((torch.are_deterministic_algorithms_enabled(), at_work("run")))
        return proofs(self, batch)

    monkeypatch.setattr(Certifying, "proofs", noted)
    rm.forecast("run", certifiers="bounds(linf(0.01), how=ibp)", limit=2, deterministic=True, seconds=0.1)
    assert set(seen) == {(True, False)}


def test_a_certification_takes_what_was_forecast(clock: list[float]) -> None:
    """Each image takes a tenth of a second, each call half a second, and the first call five."""
    calls = []

    class Slow(Certifier):
        norm, eps = "linf", 0.1

        def certify(self, model: Any, x: Tensor, noise: Any) -> list[Certificate]:
            clock[0] += 0.5 + 0.1 * len(x) + (5 if not calls else 0)
            calls.append(len(x))
            return [Certificate(0, 0.0, "", None, None, "") for _ in x]

    x, y = pictures(96)
    options = CertifyOptions(batch_size=16, device="cpu", limit=None)
    with in_hand(Ticking(), x, y, options) as session:
        each, images = timed(Certifying(session, Slow()), 16.0)
    assert (calls, images) == ([1, 4, 16, 16, 16], 48)
    assert each.wall == pytest.approx((0.5 + 1.6) / 16)
    calls.clear()
    with in_hand(Ticking(), x, y, options) as session:
        each, images = timed(Certifying(session, Slow()), 4.0)
    assert (calls, images, each.wall) == ([1], 1, pytest.approx(5.6)), "one image took all the time there was"


# ------------------------------------------------------------------------------------------------ while it works


def test_a_log_file_is_told_once_how_fast_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 20 steps of a training (here of 2 x 13: the second epoch's seventh), and two batches of an attack."""
    monkeypatch.setenv("ROBUSTMOE_PROGRESS", "1000")
    x, y = pictures(150)
    net = Ticking()
    rm.train(net, x, y, method="standard", epochs=2, batch_size=10, out=tmp_path / "run", device="cpu")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "images/s" in line]
    assert re.fullmatch(
        r"epoch 2/2: 7/13 steps, 0:00 left, loss all [\d.]+, [\d.e+]+ images/s, 0:00 left of all training, "
        r"memory peak [\d.]+ [MG]B",
        line,
    )
    rm.evaluate(net, x, y, attacks="pgd(linf(0.1), steps=2, keep=best)", batch_size=50, device="cpu")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "images/s" in line]
    assert re.match(r"pgd\(.*: \d+/\d+ passes, 0:00 left, robust [\d.]+ %, [\d.e+]+ images/s, memory peak", line)
