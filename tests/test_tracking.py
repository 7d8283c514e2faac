"""A run sent to trackers: what is sent, once each, also while the run goes on; read back by their own readers."""

from __future__ import annotations

import ctypes
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from objective_infos import JOINT
from robustmoe import analysis, cli
from robustmoe.errors import UserError
from robustmoe.records import at_work, read, rows_files, writing
from robustmoe.reporting import tracking
from robustmoe.reporting.trackers import MEASURED, TRACKERS, Points
from robustmoe.reporting.tracking import measured, points_of, track
from test_report import make_run

Reader = Callable[[Path, str], Points]


class Kept:
    """A tracker in memory."""

    def __init__(self) -> None:
        self.runs: dict[str, Points] = {}
        self.words: dict[str, dict[str, str]] = {}
        self.sent: list[Points] = []
        self.closed: list[bool] = []

    def begin(self, name: str, config: Mapping[str, Any]) -> KeptRun:
        return KeptRun(self, name)

    def said(self) -> list[str]:
        return ["next: look"]


class KeptRun:
    def __init__(self, tracker: Kept, name: str) -> None:
        self.tracker, self.name = tracker, name
        self.there = dict(tracker.runs.setdefault(name, {}))
        self.words = dict(tracker.words.setdefault(name, {}))

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        assert not set(points) & set(self.tracker.runs[self.name]), "a point is sent twice"
        self.tracker.sent.append(dict(points))
        self.tracker.runs[self.name].update(points)
        self.tracker.words[self.name].update(words)

    def close(self, done: bool) -> None:
        self.tracker.closed.append(done)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    tracker = Kept()
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda out: tracker)
    monkeypatch.setattr(tracking, "PAUSE", 0.0)
    return tracker


def cut(run: Path, epochs: int) -> list[str]:
    """The run as it was after so many epochs; returns the lines that are left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:epochs]))
    return lines[epochs:]


def test_every_number_of_an_epoch_is_a_point(tmp_path: Path) -> None:
    run = make_run(tmp_path, attacks=(), curve=False)
    points = points_of(run)
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line["epoch"]
        assert points["loss/experts", step] == line["loss"]["experts"]
        assert points["lr/router", step] == line["lr"]["router"]
        assert points["accuracy/val_clean", step] == line["val_clean"]
        assert (("accuracy/val_robust", step) in points) == (line["val_robust"] is not None)
        load = line["routers"]["router"]["load"]
        assert [points[f"router/router/load/{expert}", step] for expert in range(4)] == load
        assert points["router/router/dead_experts", step] == 0.0
    assert {step for _, step in points} == set(range(1, 7))
    assert measured(run) == ({}, {})


def test_what_was_measured_is_the_report_s_and_says_whether_it_can_be_quoted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    numbers, words = measured(run)
    results = [read(path) for path in rows_files(run)]
    worst = analysis.worst_case([(r.header, r.rows) for r in analysis.groups(results)[0]])
    assert numbers["evaluation/linf-0.0313725/worst"] == worst.robust.value
    assert numbers["evaluation/linf-0.0313725/clean"] == worst.clean.value
    assert len([tag for tag in numbers if tag.startswith("evaluation/robust/")]) == 4
    assert "no check speaks against this number" in words["verdict/linf-0.0313725"]
    unfinished = make_run(tmp_path, name="part", stop_after=5)
    assert not any(tag.endswith("worst") for tag in measured(unfinished)[0])


def test_nothing_is_sent_twice_and_other_numbers_are_refused(tmp_path: Path, kept: Kept) -> None:
    run = make_run(tmp_path)
    left = cut(run, 2)
    track([run], "tensorboard", None, follow=False)
    assert {step for tag, step in kept.runs["pathway"] if tag.startswith("loss/")} == {1, 2}
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(left)
    said = track([run, run / ".." / run.name], "tensorboard", None, follow=False)  # named twice
    assert said.count("new points") == 1
    assert {key: value for key, value in kept.runs["pathway"].items() if not key[0].startswith(MEASURED)} == points_of(
        run
    )
    assert "6 epochs" in said
    assert "0 new points" in track([run], "tensorboard", None, follow=False)
    line = json.loads(left[0])
    (run / "metrics.jsonl").write_text(json.dumps({**line, "val_clean": 0.123}) + "\n")
    with pytest.raises(UserError, match=r"0\.123 for accuracy/val_clean of epoch 3.*another training; choose another"):
        track([run], "tensorboard", None, follow=False)


def test_a_number_that_more_images_change_is_a_further_step(tmp_path: Path, kept: Kept) -> None:
    run = make_run(tmp_path, curve=False, attacks=())
    track([run], "tensorboard", None, follow=False)
    for strength in (0.2, 0.6):
        make_run(tmp_path, curve=False, training=False, attacks=(("fgsm(linf(8/255))", JOINT, strength),))
        track([run], "tensorboard", None, follow=False)
        (run / "rows" / "attack0.jsonl").unlink()
    worst = [value for (tag, _), value in sorted(kept.runs["pathway"].items()) if tag.endswith("/worst")]
    assert len(worst) == 2
    assert worst[0] > worst[1]


def test_losses_that_are_no_numbers_are_sent_once_too(tmp_path: Path, kept: Kept) -> None:
    run = make_run(tmp_path, attacks=(), curve=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, loss in zip(lines, (math.nan, math.inf, -math.inf, 1e39, -1e300, 1e-300)):
        line["loss"]["experts"] = loss
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    track([run], "tensorboard", None, follow=False)
    as_kept = {key: ctypes.c_float(value).value for key, value in kept.runs["pathway"].items()}
    kept.runs["pathway"] = as_kept  # as TensorBoard gives them back
    assert "0 new points" in track([run], "tensorboard", None, follow=False)


def test_a_run_is_followed_until_its_writer_is_gone(
    tmp_path: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, attacks=(), curve=False)
    left = cut(run, 1)
    config = (run / "config.json").read_text()
    (run / "config.json").unlink()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from robustmoe.records import writing\n"
         f"with writing({str(run)!r}): print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert at_work(run)
    looks = 0

    def look(_: float) -> None:  # what happens between two looks at the run
        nonlocal looks
        looks += 1
        if looks == 1:
            (run / "config.json").write_text(config)
        elif left:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(left.pop(0))
        else:
            holder.communicate()

    monkeypatch.setattr(tracking.time, "sleep", look)
    said = track([run], "tensorboard", None, follow=True)
    assert not at_work(run)
    assert [max(step for _, step in points) for points in kept.sent] == [1, 2, 3, 4, 5, 6]
    assert kept.closed == [True]
    assert "6 epochs" in said
    assert "waiting for" in capsys.readouterr().err


def test_a_writer_s_dead_lock_is_nobody_at_work(tmp_path: Path) -> None:
    (tmp_path / ".robustmoe-0123.lock").write_text("{}")
    assert not at_work(tmp_path)
    with writing(tmp_path):
        assert at_work(tmp_path)
    assert not at_work(tmp_path)


@pytest.mark.parametrize("to", sorted(TRACKERS))
def test_what_is_wrong_is_one_line(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for run, said in (
        (tmp_path, "no config.json"),
        (tmp_path / "x", "there is no run folder"),
        (tmp_path / "file", "is a file"),
    ):
        assert cli.main(["track", str(run), "--to", to, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("to", sorted(TRACKERS))
def test_a_missing_extra_is_named(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, attacks=(), curve=False)
    for name in ("tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.summary.writer.event_file_writer", None)
    with pytest.raises(UserError, match=rf"needs the package {to} .*pip install 'robustmoe\[{to}\]'"):
        track([run], to, str(tmp_path / "out"), follow=False)


# ------------------------------------------------------------------------ the trackers themselves (make outgoing)


def of_tensorboard(out: Path, name: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / name), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all(len({e.step for e in each}) == len(each) for each in scalars.values()), "a point stands twice"
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    if any(tag.startswith(MEASURED) for tag in scalars):
        said = events.Tensors("robustmoe/verdict/linf-0.0313725")[-1].tensor_proto.string_val[0].decode()
        assert "no check speaks against" in said
    return {(tag, e.step): e.value for tag, each in scalars.items() for e in each}


def of_mlflow(out: Path, name: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("robustmoe")
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "advmoe(pgd(linf(8/255), steps=10))"
    points: Points = {}
    for tag in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, tag)
        assert len({each.step for each in history}) == len(history), "a point stands twice"
        points |= {(tag, each.step): each.value for each in history}
    return points


def of_wandb(out: Path, name: str) -> Points:
    from wandb.proto import wandb_internal_pb2

    points: Points = {}
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run") and record.run.display_name:
                assert record.run.display_name == name
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            for tag, value in items.items():
                if not tag.startswith("_") and tag != "epoch":
                    assert (tag, items["epoch"]) not in points, "a point stands twice"
                    points[tag, items["epoch"]] = value
            for update in record.summary.update:
                tag = update.key or "/".join(update.nested_key)
                if tag.startswith(MEASURED):
                    points[tag, 0] = json.loads(update.value_json)
    return points


def log_records(data: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format, as W&B writes it: blocks of 32 KiB, pieces with their length and
    kind (1 whole, 2 first, 3 middle, 4 last)."""
    records, at, whole = [], 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(whole)
    return records


@pytest.mark.outgoing
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("to, reader", [("tensorboard", of_tensorboard), ("mlflow", of_mlflow), ("wandb", of_wandb)])
def test_the_tracker_has_every_point_once(
    to: str, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    run, out = make_run(tmp_path, attacks=(), curve=False), tmp_path / "out"
    left = cut(run, 2)
    assert cli.main(["track", str(run), "--to", to, "--out", str(out)]) == 0
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(left)
    for _ in range(2):
        assert cli.main(["track", str(run), "--to", to, "--out", str(out)]) == 0
    make_run(tmp_path, training=False)
    for _ in range(2):
        assert cli.main(["track", str(run), "--to", to, "--out", str(out)]) == 0
    assert "0 new points" in capsys.readouterr().out
    there = reader(out, "pathway")
    wanted = {**points_of(run), **{(tag, 0): value for tag, value in measured(run)[0].items()}}
    assert set(there) == set(wanted)
    assert all(math.isclose(there[key], value, rel_tol=1e-6) for key, value in wanted.items())
    line = json.loads(left[-1])
    (run / "metrics.jsonl").write_text(json.dumps({**line, "val_clean": 0.123}) + "\n")
    assert cli.main(["track", str(run), "--to", to, "--out", str(out)]) == 2
    assert "that was another training" in capsys.readouterr().err
    assert set(reader(out, "pathway")) == set(wanted)


@pytest.mark.outgoing
def test_tensorboard_goes_on_after_a_kill(tmp_path: Path) -> None:
    """The last record of a killed writer's file is half there; what it lost is sent again."""
    run, out = make_run(tmp_path, attacks=(), curve=False), tmp_path / "out"
    assert cli.main(["track", str(run), "--out", str(out)]) == 0
    (file,) = (out / "pathway").glob("events*")
    file.write_bytes(file.read_bytes()[:-20])
    assert cli.main(["track", str(run), "--out", str(out)]) == 0
    assert set(of_tensorboard(out, "pathway")) == set(points_of(run))
