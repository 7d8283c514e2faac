"""Run folders to views: everything the page, the Markdown and the JSON say is worked out here once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustmoe import analysis
from robustmoe.errors import UserError
from robustmoe.records import (
    Audit,
    Check,
    Evaluation,
    Header,
    read,
    read_metrics,
    read_some_config,
    rows_files,
)
from robustmoe.reporting.kept import Kept, kept
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import Shown
from robustmoe.runs import named


@dataclass(frozen=True)
class Group:
    """Attacks of one threat on the same images, their worst case and whether it can be quoted."""

    results: list[Evaluation]
    names: list[str]
    summaries: list[analysis.EvaluationSummary]
    worst: analysis.WorstCase
    verdict: analysis.Verdict


@dataclass(frozen=True)
class RunView:
    """One run, read. ``groups[0]``, if there is an attack, is the headline. ``clean_only``: files without an attack.
    ``checks``: (attack, check) pairs, worst first. ``shown``: kind -> its records of this model; a run without
    ``results`` has at least one. ``notes``: what does not fit together or is missing."""

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[Evaluation]
    groups: list[Group]
    clean_only: list[analysis.EvaluationSummary]
    curves: list[analysis.Curve]
    loads: list[analysis.Load]
    kept: Kept | None
    checks: list[tuple[str, Check]]
    shown: dict[str, tuple[Shown[Any, Any], ...]]
    notes: list[str]

    @property
    def header(self) -> Header:
        """Returns the header that speaks for the run: the headline's, else that of what there is."""
        return self.groups[0].results[0].header if self.groups else self.headers[0]

    @property
    def headers(self) -> list[Header]:
        """Returns every header: the rows' and the records'."""
        records = [shown.record for every in self.shown.values() for shown in every]
        return [*(result.header for result in self.results), *(record.header for record in records)]

    @property
    def routed(self) -> bool:
        """Returns the model has at least one router."""
        return bool(self.header.routers)

    @property
    def clean(self) -> analysis.Rate:
        """Returns clean accuracy on the headline's images, of a run that has rows."""
        if self.groups:
            return self.groups[0].worst.clean
        return self.clean_only[0].clean if self.clean_only else analysis.evaluation_summary(*self.results[0]).clean

    @property
    def seconds(self) -> float | None:
        """Returns the wall time of the finished evaluations, in seconds; None if none is finished."""
        times = [result.checks.seconds for result in self.results if result.checks is not None]
        return sum(times) if times else None


def collect(runs: Sequence[str | os.PathLike[str]]) -> list[RunView]:
    """Read every run; UserError if there is none, or one is not a run folder or nothing was measured in it."""
    if not runs:
        raise UserError("nothing to report: name at least one run folder")
    folders = [named(run) for run in runs]
    plain = [folder.resolve().name for folder in folders]
    labels = [str(folder) if plain.count(name) > 1 else name for folder, name in zip(folders, plain, strict=True)]
    return [
        _view(folder, name, at, len(folders)) for at, (folder, name) in enumerate(zip(folders, labels, strict=True))
    ]


def _view(folder: Path, name: str, at: int, runs: int) -> RunView:
    config_path, rows_path = folder / "config.json", folder / "rows"
    if not config_path.is_file() and not rows_path.is_dir():
        raise UserError(
            f"{folder} is not a run folder: expected config.json and rows/ in it; "
            "`robustmoe train` makes a run, `robustmoe evaluate RUN` its rows"
        )
    everything = [(path, read(path)) for path in rows_files(folder)]
    files = [(path, result) for path, result in everything if result.rows]
    results = [result for _, result in files]
    audit = Audit.read(folder)
    groups = [_group(members, audit) for members in analysis.groups(results)]
    head = groups[0].results[0] if groups else next(iter(results), None)
    notes = [f"{path.name} has no rows yet and is left out" for path, result in everything if not result.rows]
    config = read_some_config(config_path) if os.path.lexists(config_path) else {}
    if config.get("unwrapped"):
        notes.append(
            f"routing was seen, but could not be wrapped, so this is the model as a callable: {config['unwrapped']}"
        )
    shown = _shown(folder, None if head is None else head.header, results, notes)
    records = [each.record for every in shown.values() for each in every]
    if head is None and not records:
        raise UserError(f"{folder} has no rows yet; `robustmoe evaluate {folder}` makes them")
    return RunView(
        name=name,
        folder=folder,
        config=config,
        metrics=read_metrics(folder / "metrics.jsonl"),
        results=results,
        groups=groups,
        clean_only=[analysis.evaluation_summary(*result) for result in results if result.header.attack is None],
        curves=analysis.eps_curve([(result.header, result.rows) for result in results]),
        loads=_loads(groups[0] if groups else None, head),
        kept=kept(files, _by_strength(groups)),
        checks=_checks(results, audit),
        shown={
            kind: tuple(replace(each, run=name, at=at, runs=runs) for each in every) for kind, every in shown.items()
        },
        notes=[*notes, *analysis.warnings(results), *analysis.other_labels([*results, *records])],
    )


def _shown(
    folder: Path, header: Header | None, results: list[Evaluation], notes: list[str]
) -> dict[str, tuple[Shown[Any, Any], ...]]:
    """Returns kind -> the folder's records of the model of that header (None: of the first record's); ``notes`` says
    what is left out, and why."""
    shown: dict[str, tuple[Shown[Any, Any], ...]] = {}
    for kind in KINDS:
        fit = []
        every: list[Any] = kind.record.read_all(folder)
        for record in every:
            where = record.path("", record.which)
            unfit = kind.unfit(record)
            if not unfit and header is not None and record.header.model_hash != header.model_hash:
                unfit = "of other weights than the evaluation"
            if unfit:
                notes.append(f"{where} is {unfit} and is left out; `robustmoe {record.verb}` makes it")
                continue
            header = header or record.header
            if not record.done:
                notes.append(f"{where} is not complete; the same `robustmoe {record.verb}` goes on with it")
            fit.append(Shown(record, kind.summarise(record, results)))
            if kind.doubts(fit[-1]):
                notes.append(f"the numbers of {where} cannot be quoted; see {kind.title}")
        shown[kind.name] = tuple(fit)
    return shown


def _group(results: list[Evaluation], audit: Audit | None) -> Group:
    return Group(
        results=results,
        names=analysis.names([result.header for result in results]),
        summaries=[analysis.evaluation_summary(*result) for result in results],
        worst=analysis.worst_case([(result.header, result.rows) for result in results]),
        verdict=analysis.judge(results, audit),
    )


def strongest(group: Group) -> int:
    """Returns the position of the attack that leaves the lowest robust accuracy."""
    values = [summary.robust.value if summary.robust is not None else math.inf for summary in group.summaries]
    return values.index(min(values))


def _loads(group: Group | None, head: Evaluation | None) -> list[analysis.Load]:
    """Returns the load under the headline's strongest attack."""
    result = group.results[strongest(group)] if group is not None else head
    if result is None:
        return []
    return [analysis.load_by_class(result.header, result.rows, name) for name in result.header.routers]


def _by_strength(groups: list[Group]) -> list[Evaluation]:
    """Returns the headline's attacks, the strongest first."""
    if not groups:
        return []
    pairs = zip(groups[0].summaries, groups[0].results, strict=True)
    left = [((summary.robust or groups[0].worst.clean).value, result) for summary, result in pairs]
    return [result for _, result in sorted(left, key=lambda pair: pair[0])]


def _checks(results: list[Evaluation], audit: Audit | None) -> list[tuple[str, Check]]:
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


def comparable(views: Sequence[RunView]) -> list[str]:
    """Returns why the evaluations cannot be compared number by number, in sentences; empty if they can."""
    views = [view for view in views if view.results]
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


def numbered(views: Sequence[RunView]) -> list[tuple[int | None, RunView]]:
    """Returns the runs with their places, by which a reader chooses among them; None for the only one."""
    return [(at if len(views) > 1 else None, view) for at, view in enumerate(views)]


def of_kind(views: Sequence[RunView], kind: str) -> list[Shown[Any, Any]]:
    """Returns the records of one kind of all runs, in their order."""
    return [shown for view in views for shown in view.shown[kind]]


def heading(views: Sequence[RunView]) -> str:
    """Returns what is compared: "pathway on digits", "4 runs on digits"."""
    names = [view.name for view in views]
    said = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if len(names) < 4 else f"{len(names)} runs"
    data = list(dict.fromkeys(_short(view.header.data) for view in views))
    return f"{said} on {data[0]}" if len(data) == 1 else f"{said} on {len(data)} data sets"


def _short(data: str) -> str:
    """Returns the name of a data set's spec, without its arguments and folders."""
    return re.split(r"[/\\]", data.partition("(")[0])[-1] or data
