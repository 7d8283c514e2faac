"""A run as points for an experiment tracker, read from its files: an epoch's numbers, then what was measured.

Training knows no tracker: whoever may read the run folder can follow it, at any time, also on another machine."""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.progress import note
from robustmoe.records import at_work, file_stem, read_metrics, read_some_config, rows_files
from robustmoe.reporting.collect import collect
from robustmoe.reporting.trackers import TRACKERS, Points, Tracked

ACCURACIES = {
    "train_accuracy": "train",
    "val_clean": "val_clean",
    "val_robust": "val_robust",
    "val_certified": "val_certified",
}
PAUSE = 2.0
"""Seconds between two looks at a run that is followed."""

_SELDOM = 5
"""What was measured is read at every so many looks: it is much more to read than the epochs."""


@dataclass
class _Following:
    """A run on its way into a tracker: what was ``sent``, and how many points of it were new to the tracker."""

    folder: Path
    name: str
    tracked: Tracked
    sent: Points
    words: dict[str, str]
    new: int = 0
    done: bool = False

    def send(self, points: Points, words: Mapping[str, str]) -> None:
        """Gives the tracker what it has not yet."""
        if points or words:
            self.tracked.send(points, words)
        self.sent.update(points)
        self.words.update(words)
        self.new += len(points)


def track(runs: Sequence[Path], to: str, out: str | None, follow: bool) -> str:
    """Send these runs to the tracker ``to``, and with ``follow`` go on until nobody writes in their folders any more.

    What the tracker has already is not sent again. UserError where a folder is no run, the tracker is not installed or
    does not answer, or it has other numbers under the run's name."""
    runs = list({folder.resolve(): folder for folder in runs}.values())  # each once
    _wait_for([folder for folder in runs if follow and not (folder / "config.json").is_file()])
    configs = [_config(folder) for folder in runs]
    plain = [folder.resolve().name for folder in runs]
    names = [str(folder) if plain.count(name) > 1 else name for folder, name in zip(runs, plain)]
    tracker = TRACKERS[to](out)
    following: list[_Following] = []
    try:
        for folder, name, config in zip(runs, names, configs):
            tracked = tracker.begin(name, config)
            following.append(_Following(folder, name, tracked, dict(tracked.there), dict(tracked.words)))
        _send(following, follow)
    finally:
        for each in following:
            each.tracked.close(each.done)
    return "\n".join([*map(_said, following), *tracker.said()])


def _send(following: Sequence[_Following], follow: bool) -> None:
    looks = 0
    while True:
        busy = [follow and at_work(each.folder) for each in following]  # asked before the files are read
        for each, more in zip(following, busy):
            _send_epochs(each)
            if not more or looks % _SELDOM == 0:
                _send_measured(each)
            each.done = not more
        if not any(busy):
            return
        looks += 1
        time.sleep(PAUSE)


def _send_epochs(each: _Following) -> None:
    """Sends what is new. UserError where the tracker has another value for a point of the run."""
    points = points_of(each.folder)
    for (tag, step), value in points.items():
        there = each.sent.get((tag, step), value)
        if not _same(there, value):
            raise UserError(
                f"{each.folder} says {value:.6g} for {tag} of epoch {step}, and what was tracked as {each.name!r} is "
                f"{there:.6g}: that was another training; choose another --out"
            )
    new = {key: value for key, value in points.items() if key not in each.sent}
    each.send(new, {})
    if new:
        note(f"{each.folder}: sent as far as epoch {max(step for _, step in new)}")


def _send_measured(each: _Following) -> None:
    """Sends what was measured: a number that has changed since, by more images or attacks, is a further step."""
    numbers, words = measured(each.folder)
    new = {}
    for tag, value in numbers.items():
        last = max((step for other, step in each.sent if other == tag), default=-1)
        if last < 0 or not _same(each.sent[tag, last], value):
            new[tag, last + 1] = value
    each.send(new, {name: text for name, text in words.items() if each.words.get(name) != text})


def _same(a: float, b: float) -> bool:
    """Whether two numbers are equal as 32-bit floats, which is what TensorBoard keeps."""
    x, y = ctypes.c_float(a).value, ctypes.c_float(b).value
    return x == y or (math.isnan(x) and math.isnan(y))


def _said(each: _Following) -> str:
    epochs = [step for tag, step in each.sent if tag.startswith("loss/")]
    done = f", {max(epochs)} epochs" if epochs else ""
    return f"{each.folder}: {each.new} new points, {len(each.sent)} in all{done}"


def _wait_for(runs: Sequence[Path]) -> None:
    for folder in runs:
        note(f"waiting for {folder} to begin (it has no config.json yet)")
    while not all((folder / "config.json").is_file() for folder in runs):
        time.sleep(PAUSE)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json; robustmoe train makes a run")
    return {name: value for name, value in read_some_config(folder / "config.json").items() if name != "resumed"}


def points_of(folder: str | os.PathLike[str]) -> Points:
    """Returns (tag, step) -> value of a run: the numbers of each epoch, at step = epoch."""
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return {(tag, line["epoch"]): value for line in lines for tag, value in _of_epoch(line)}


def _of_epoch(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for field in ("loss", "lr", "grad_norm"):
        for phase, value in (line.get(field) or {}).items():
            yield f"{field}/{_plain(phase)}", float(value)
    for field, tag in ACCURACIES.items():
        if line.get(field) is not None:
            yield f"accuracy/{tag}", float(line[field])
    for field in ("step", "seconds"):
        if line.get(field) is not None:
            yield f"time/{field}", float(line[field])
    for name, router in (line.get("routers") or {}).items():
        start = f"router/{_plain(name) or 'router'}"
        for expert, share in enumerate(router.get("load") or []):
            yield f"{start}/load/{expert}", float(share)
        for field in ("entropy", "gap", "consistency", "grad_norm"):
            if router.get(field) is not None:
                yield f"{start}/{field}", float(router[field])
        yield f"{start}/dead_experts", float(len(router.get("dead") or []))


def measured(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Returns what complete evaluations of a run measured, and by threat in words whether it can be quoted."""
    numbers, words = {}, {}
    for group in _groups(folder) if rows_files(folder) else []:
        ball = file_stem(f"{group.worst.norm} {group.worst.eps:g}")
        for name, summary in zip(group.names, group.summaries, strict=True):
            if summary.complete and summary.robust is not None:
                numbers[f"evaluation/robust/{file_stem(name)}"] = summary.robust.value
        reasons = "; ".join([*group.verdict.failed, *group.verdict.incomplete])
        if all(summary.complete for summary in group.summaries) and not group.worst.partial:
            numbers[f"evaluation/{ball}/clean"] = group.worst.clean.value
            numbers[f"evaluation/{ball}/worst"] = group.worst.robust.value
            said = f"worst of {', '.join(group.names)}: {group.verdict.said}"
            words[f"verdict/{ball}"] = f"{said} ({reasons})" if reasons else said
    return numbers, words


def _groups(folder: Path) -> list[Any]:
    try:
        return collect([folder])[0].groups
    except UserError as error:
        if "has no rows yet" in str(error):
            return []
        raise


def _plain(name: str) -> str:
    """A name with what every tracker takes in one: letters, digits, "_", "-" and "."."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
