"""The trackers that a run can be sent to: TensorBoard, MLflow, Weights & Biases. Each is a package of its own, imported
when it is asked for.

A tracker begins one `Tracked` a run, which knows what is ``there`` already from an earlier time, so that nothing is
sent twice."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from robustmoe.errors import UserError, printable
from robustmoe.records import write_atomic
from robustmoe.records.files import explained

Points = dict[tuple[str, int], float]
"""(tag, step) -> value. What was measured of a trained model has tags that begin with `MEASURED`."""

MEASURED = "evaluation/"
_WORDS = "robustmoe/"


@runtime_checkable
class Tracked(Protocol):
    """A run in a tracker."""

    there: Points
    words: dict[str, str]

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        """Adds points and texts, which can be seen when this returns."""
        ...

    def close(self, done: bool) -> None:
        """Ends it; ``done``: all that the run will ever say was sent."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """A place for runs."""

    def begin(self, name: str, config: Mapping[str, Any]) -> Tracked:
        """Opens the run of that name, new or as it was left."""
        ...

    def said(self) -> list[str]:
        """Returns what a reader does next, in lines."""
        ...


def _needed(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--to {extra} needs the package {extra} ({error}); pip install 'robustmoe[{extra}]'") from None


@contextlib.contextmanager
def _answering(tracker: str, place: str) -> Iterator[None]:
    """Whatever the tracker's own library raises as one line: it may be the network, the disk, its server."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{tracker} does not take the run at {place} ({type(error).__name__}: {error}); what it has stays, and "
            "the same command goes on"
        ) from error


def _identity(name: str, config: Mapping[str, Any]) -> str:
    """Returns a short name of the training itself: another one in a folder of the same name has another."""
    return hashlib.sha256(json.dumps([name, config], sort_keys=True).encode()).hexdigest()[:12]


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that say how the run was made, as plain values."""
    kept = {name: value for name, value in config.items() if isinstance(value, str | int | float) and value != ""}
    return {name: printable(value) if isinstance(value, str) else value for name, value in kept.items()}


# ------------------------------------------------------------------------------------------------------ TensorBoard


class TensorBoard:
    """Event files, in a folder a run."""

    def __init__(self, out: str | None) -> None:
        self.folder = Path(out or "runs/tensorboard")
        _needed("tensorboard.summary.writer.event_file_writer", "tensorboard")

    def begin(self, name: str, config: Mapping[str, Any]) -> Tracked:
        """Reads the run's event files, and begins one more."""
        with _answering("tensorboard", str(self.folder)):
            return _Events(self.folder / name, config)

    def said(self) -> list[str]:
        """Returns how it is looked at."""
        return [f"next: tensorboard --logdir {self.folder}"]


class _Events:
    """The event files of a run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.there, self.words = _events(folder)
        self._protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        with explained("write", folder):
            self.writer = writer.EventFileWriter(str(folder))
        if not self.there:
            hparams = importlib.import_module("tensorboard.plugins.hparams.summary_v2")
            self._add(hparams.hparams_pb(_scalars(config)), 0)

    def _add(self, summary: Any, step: int) -> None:
        self.writer.add_event(self._protos.Event(wall_time=time.time(), step=step, summary=summary))

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        """Adds an event a step, with the values of all its tags."""
        text = importlib.import_module("tensorboard.plugins.text.summary_v2")
        kind = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        with _answering("tensorboard", str(self.folder)):
            for step in sorted({step for _, step in points}):
                values = [kind.Value(tag=tag, simple_value=value) for (tag, at), value in points.items() if at == step]
                self._add(kind(value=values), step)
            for name, said in words.items():
                self._add(text.text_pb(_WORDS + name, said), 0)
            self.writer.flush()

    def close(self, done: bool) -> None:
        """Closes the file."""
        self.writer.close()


def _events(folder: Path) -> tuple[Points, dict[str, str]]:
    """Returns the points and the last texts of a folder's event files, those of a killed writer included."""
    loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader").LegacyEventFileLoader
    points: Points = {}
    words: dict[str, str] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in loader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points[value.tag, event.step] = value.simple_value
                elif value.tag.startswith(_WORDS):
                    words[value.tag.removeprefix(_WORDS)] = value.tensor.string_val[0].decode()
    return points, words


# ----------------------------------------------------------------------------------------------------------- MLflow


class MLflow:
    """A folder with a database, or a tracking server."""

    def __init__(self, out: str | None) -> None:
        mlflow = _needed("mlflow", "mlflow")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven take minutes to say no
        self.uri = out or os.environ.get("MLFLOW_TRACKING_URI") or "runs/mlflow"
        artifacts = None
        if "://" not in self.uri and self.uri != "databricks":
            folder = Path(self.uri)
            with explained("write", folder):
                folder.mkdir(parents=True, exist_ok=True)
            self.uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").resolve().as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "robustmoe")
        with _answering("mlflow", self.uri), _quiet():
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            there = self.client.get_experiment_by_name(name)
            self.experiment = there.experiment_id if there else self.client.create_experiment(name, artifacts)

    def begin(self, name: str, config: Mapping[str, Any]) -> Tracked:
        """Takes up the MLflow run that has this training's mark, or makes it."""
        with _answering("mlflow", self.uri):
            return _Logged(self.client, self.experiment, name, config, self.uri)

    def said(self) -> list[str]:
        """Returns how it is looked at."""
        return [f"next: mlflow ui --backend-store-uri {self.uri}"]


class _Logged:
    """A run of MLflow."""

    def __init__(self, client: Any, experiment: str, name: str, config: Mapping[str, Any], uri: str) -> None:
        self.client, self.uri = client, uri
        self.there: Points = {}
        mark = _identity(name, config)
        runs = client.search_runs([experiment], f"tags.`robustmoe.id` = '{mark}'", max_results=1)
        run = runs[0] if runs else client.create_run(experiment, run_name=name, tags={"robustmoe.id": mark})
        self.id = run.info.run_id
        self.status = run.info.status
        self.words = {tag[len(_WORDS) :]: text for tag, text in run.data.tags.items() if tag.startswith(_WORDS)}
        for tag in run.data.metrics:
            self.there |= {(tag, each.step): each.value for each in client.get_metric_history(self.id, tag)}
        params = {key: str(value)[:6000] for key, value in _scalars(config).items() if key not in run.data.params}
        entities = importlib.import_module("mlflow.entities")
        client.log_batch(self.id, params=[entities.Param(key, value) for key, value in params.items()])

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        """Logs batches of at most a thousand metrics, which is MLflow's limit."""
        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        metrics = [entities.Metric(tag, value, now, step) for (tag, step), value in points.items()]
        tags = [entities.RunTag(_WORDS + name, said[:5000]) for name, said in words.items()]
        with _answering("mlflow", self.uri):
            if self.status != "RUNNING":
                self.client.set_terminated(self.id, "RUNNING")
                self.status = "RUNNING"
            for start in range(0, len(metrics), 1000):
                self.client.log_batch(self.id, metrics=metrics[start : start + 1000])
            if tags:
                self.client.log_batch(self.id, tags=tags)

    def close(self, done: bool) -> None:
        """Says how the run ended; one that is only left for now stays as running."""
        if done:
            with contextlib.suppress(Exception):  # a server that is gone was told of when it went
                self.client.set_terminated(self.id, "FINISHED")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells of each step by which it makes a database."""
    import logging

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------- Weights & Biases


class Wandb:
    """Offline runs in OUT/wandb, for `wandb sync`; WANDB_MODE=online sends them at once."""

    def __init__(self, out: str | None) -> None:
        self.folder = Path(out or os.environ.get("WANDB_DIR") or "runs/wandb")
        self.wandb = _needed("wandb", "wandb")
        with explained("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, config: Mapping[str, Any]) -> Tracked:
        """Begins a run of W&B, under the name that this training always has."""
        with _answering("wandb", str(self.folder)):
            return _Offline(self.wandb, self.folder, name, config)

    def said(self) -> list[str]:
        """Returns how it is looked at."""
        return [f"next: wandb sync {self.folder}/wandb/offline-run-*"] if "WANDB_MODE" not in os.environ else []


class _Offline:
    """A run of W&B, and beside it what it was given: W&B has no way to read an offline run again."""

    def __init__(self, wandb: Any, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        mark = _identity(name, config)
        self.folder, self.path = folder, folder / f"robustmoe-{mark}.json"
        self.there, self.words = _given(self.path)
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True)
        self.run = wandb.init(
            id=mark,
            name=name,
            dir=str(folder),
            project=os.environ.get("WANDB_PROJECT", "robustmoe"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow" if os.environ.get("WANDB_MODE") == "online" else None,
            reinit="create_new",
            config=_scalars(config),
            settings=settings,
        )
        self.run.define_metric("*", step_metric="epoch")

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        """Logs a line an epoch; what was measured goes into the summary."""
        epochs = {key: value for key, value in points.items() if not key[0].startswith(MEASURED)}
        with _answering("wandb", str(self.folder)):
            for step in sorted({step for _, step in epochs}):
                values = {tag: value for (tag, at), value in epochs.items() if at == step}
                self.run.log({"epoch": step, **values}, step=step)
            for (tag, _), value in sorted(points.items()):
                if tag.startswith(MEASURED):
                    self.run.summary[tag] = value
            for name, said in words.items():
                self.run.summary[_WORDS + name] = said
        self.there.update(points)
        self.words.update(words)
        lines = [[tag, step, value] for (tag, step), value in self.there.items()]
        write_atomic(self.path, json.dumps({"kind": "robustmoe track", "points": lines, "words": self.words}) + "\n")

    def close(self, done: bool) -> None:
        """Waits until W&B has written all of it."""
        with _answering("wandb", str(self.folder)):
            self.run.finish()


def _given(path: Path) -> tuple[Points, dict[str, str]]:
    """Returns what a run of W&B was given at an earlier time."""
    if not os.path.lexists(path):
        return {}, {}
    with explained("read", path):
        text = path.read_bytes()
    try:
        told = json.loads(text)
        points = {(str(tag), int(step)): float(value) for tag, step, value in told["points"]}
        return points, {str(name): str(said) for name, said in told["words"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged; delete it, and choose another --out to send the run anew") from None


TRACKERS: dict[str, Callable[[str | None], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}
