"""Run folders to views: everything the page, the Markdown and the JSON say is worked out here once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from robustmoe import analysis
from robustmoe.errors import UserError
from robustmoe.records import (
    Audit,
    Check,
    Dissection,
    Example,
    Header,
    Result,
    examples_path,
    read,
    read_audit,
    read_dissection,
    read_examples,
    read_jsonl,
)


@dataclass(frozen=True)
class Group:
    """Attacks of one threat on the same images, their worst case and whether it can be quoted."""

    results: list[Result]
    names: list[str]
    summaries: list[analysis.Summary]
    worst: analysis.WorstCase
    verdict: analysis.Verdict


class Dissected(NamedTuple):
    """A run's dissection, and its numbers."""

    record: Dissection
    parts: analysis.Anatomy


@dataclass(frozen=True)
class View:
    """One run, read. ``groups[0]``, if there is an attack, is the headline. ``clean_only``: files without an attack.
    ``checks``: (attack, check) pairs, worst first. ``dissected``: None without a dissection of this model.
    ``notes``: what does not fit together or is missing."""

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[Result]
    groups: list[Group]
    clean_only: list[analysis.Summary]
    curves: list[analysis.Curve]
    loads: list[analysis.Load]
    examples: list[Example]
    checks: list[tuple[str, Check]]
    dissected: Dissected | None
    notes: list[str]

    @property
    def header(self) -> Header:
        """The header that speaks for the run: the headline's."""
        return self.groups[0].results[0].header if self.groups else self.results[0].header

    @property
    def routed(self) -> bool:
        """The model has at least one router."""
        return bool(self.header.routers)

    @property
    def clean(self) -> analysis.Rate:
        """Clean accuracy on the headline's images."""
        if self.groups:
            return self.groups[0].worst.clean
        return self.clean_only[0].clean if self.clean_only else analysis.summary(*self.results[0]).clean

    @property
    def seconds(self) -> float | None:
        """Wall time of the finished evaluations, in seconds; None if none is finished."""
        times = [result.checks.seconds for result in self.results if result.checks is not None]
        return sum(times) if times else None


def collect(runs: Sequence[str | os.PathLike[str]]) -> list[View]:
    """Read every run; UserError if there is none, or one is not a run folder or has no rows."""
    if not runs:
        raise UserError("nothing to report: name at least one run folder")
    folders = [Path(run) for run in runs]
    plain = [folder.resolve().name for folder in folders]
    labels = [str(folder) if plain.count(name) > 1 else name for folder, name in zip(folders, plain, strict=True)]
    return [_view(folder, name) for folder, name in zip(folders, labels, strict=True)]


def _view(folder: Path, name: str) -> View:
    config_path, rows_path = folder / "config.json", folder / "rows"
    if not config_path.is_file() and not rows_path.is_dir():
        raise UserError(
            f"{folder} is not a run folder: expected config.json and rows/ in it; "
            "`robustmoe train` makes a run, `robustmoe evaluate RUN` its rows"
        )
    files = sorted(path for path in rows_path.glob("*.jsonl") if not path.name.endswith(".examples.jsonl"))
    everything = [(path, read(path)) for path in files if path.stat().st_size > 0]
    kept = [(path, result) for path, result in everything if result.rows]
    if not kept:
        raise UserError(f"{folder} has no rows yet; `robustmoe evaluate {folder}` makes them")
    results = [result for _, result in kept]
    audit = read_audit(folder)
    groups = [_group(members, audit) for members in analysis.groups(results)]
    head = groups[0].results[0] if groups else results[0]
    notes = [f"{path.name} has no rows yet and is left out" for path, result in everything if not result.rows]
    dissected = _dissected(folder, head.header, notes)
    return View(
        name=name,
        folder=folder,
        config=_config(config_path),
        metrics=read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else [],
        results=results,
        groups=groups,
        clean_only=[analysis.summary(*result) for result in results if result.header.attack is None],
        curves=analysis.eps_curve([(result.header, result.rows) for result in results]),
        loads=_loads(groups[0] if groups else None, head),
        examples=_examples(kept, groups),
        checks=_checks(results, audit),
        dissected=dissected,
        notes=notes + analysis.warnings(results),
    )


def _dissected(folder: Path, header: Header, notes: list[str]) -> Dissected | None:
    """The folder's dissection, if it is done and of the model of that header; else ``notes`` says why not."""
    found = read_dissection(folder)
    if found is None:
        return None
    if not found.done or found.header.model_hash != header.model_hash:
        why = "of other weights than the evaluation" if found.done else "not finished"
        notes.append(f"dissection.json is {why} and is left out; `robustmoe dissect {folder}` makes it")
        return None
    return Dissected(found, analysis.anatomy(found))


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; restore it from the run that made it")
    return value


def _group(results: list[Result], audit: Audit | None) -> Group:
    return Group(
        results=results,
        names=analysis.names([result.header for result in results]),
        summaries=[analysis.summary(*result) for result in results],
        worst=analysis.worst_case([(result.header, result.rows) for result in results]),
        verdict=analysis.judge(results, audit),
    )


def strongest(group: Group) -> int:
    """The position of the attack that leaves the lowest robust accuracy."""
    values = [summary.robust.value if summary.robust is not None else math.inf for summary in group.summaries]
    return values.index(min(values))


def _loads(group: Group | None, head: Result) -> list[analysis.Load]:
    """The load under the headline's strongest attack."""
    result = group.results[strongest(group)] if group is not None else head
    return [analysis.load_by_class(result.header, result.rows, name) for name in result.header.routers]


def _examples(kept: list[tuple[Path, Result]], groups: list[Group]) -> list[Example]:
    """The examples of the headline's strongest attack that has some, else of any file."""
    ranked = [path for path, _ in kept]
    if groups:
        group = groups[0]
        order = sorted(
            range(len(group.results)), key=lambda at: (group.summaries[at].robust or group.worst.clean).value
        )
        first = [path for at in order for path, result in kept if result is group.results[at]]
        ranked = first + [path for path in ranked if path not in first]
    for path in ranked:
        found = read_examples(examples_path(path)) if examples_path(path).is_file() else []
        if found:
            return found
    return []


def _checks(results: list[Result], audit: Audit | None) -> list[tuple[str, Check]]:
    order = ("fail", "warn", "not run", "pass")
    labels = analysis.names([result.header for result in results])
    pairs = [
        (label, check)
        for label, result in zip(labels, results, strict=True)
        for check in (result.checks.checks if result.checks is not None else [])
    ]
    if audit is not None and any(result.header.model_hash == audit.model_hash for result in results):
        pairs += [(f"robustmoe check, {audit.n} images", check) for check in audit.checks]
    return sorted(pairs, key=lambda pair: order.index(pair[1].status))


def comparable(views: Sequence[View]) -> list[str]:
    """Why the runs cannot be compared number by number, in sentences; empty if they can."""
    reasons = []
    for field, words in (
        ("data_hash", "data sets"),
        ("index_hash", "images"),
        ("norm", "norms"),
        ("eps", "eps"),
    ):
        if len({getattr(view.header, field) for view in views}) > 1:
            reasons.append(f"these runs were evaluated on different {words}")
    sets = {tuple(sorted(view.groups[0].names)) for view in views if view.groups and not view.routed}
    routed = {tuple(sorted(view.groups[0].names)) for view in views if view.groups and view.routed}
    if len(sets) > 1 or len(routed) > 1:
        reasons.append("they were not attacked by the same attacks")
    return reasons
