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
    Blend,
    Certificates,
    Check,
    Dissection,
    Evaluation,
    Example,
    Header,
    Lipschitz,
    Sweep,
    examples_path,
    read,
    read_examples,
    read_jsonl,
    rows_files,
)


@dataclass(frozen=True)
class Group:
    """Attacks of one threat on the same images, their worst case and whether it can be quoted."""

    results: list[Evaluation]
    names: list[str]
    summaries: list[analysis.EvaluationSummary]
    worst: analysis.WorstCase
    verdict: analysis.Verdict


class Dissected(NamedTuple):
    """A run's dissection, and its numbers."""

    record: Dissection
    parts: analysis.DissectionSummary


class Blended(NamedTuple):
    """A run's curve over alpha, its numbers, and the place of the alpha to look at first."""

    record: Blend
    points: tuple[analysis.AlphaPoint, ...]
    shown: int

    @property
    def attacked(self) -> tuple[analysis.AlphaPoint, ...]:
        """The alphas whose robust accuracy is known."""
        return tuple(point for point in self.points if point.robust is not None)


class Measured(NamedTuple):
    """What the Lipschitz laboratory measured of a run, and its numbers."""

    record: Lipschitz
    numbers: analysis.LipschitzSummary


class Swept(NamedTuple):
    """A run's sweep over eps, and its numbers."""

    record: Sweep
    numbers: analysis.SweepSummary


class Certified(NamedTuple):
    """What one certifier proves of a run, and its numbers."""

    record: Certificates
    numbers: analysis.CertificatesSummary


@dataclass(frozen=True)
class View:
    """One run, read. ``groups[0]``, if there is an attack, is the headline. ``clean_only``: files without an attack.
    ``checks``: (attack, check) pairs, worst first. ``dissected``, ``blended``, ``swept``, ``measured``: None without a
    dissection, a curve over alpha, a sweep over eps or a Lipschitz file of this model; ``certified``: by each
    certifier; a run without ``results`` has one of them. ``notes``: what does not fit together or is missing."""

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[Evaluation]
    groups: list[Group]
    clean_only: list[analysis.EvaluationSummary]
    curves: list[analysis.Curve]
    loads: list[analysis.Load]
    examples: list[Example]
    checks: list[tuple[str, Check]]
    dissected: Dissected | None
    blended: Blended | None
    swept: Swept | None
    measured: Measured | None
    certified: tuple[Certified, ...]
    notes: list[str]

    @property
    def header(self) -> Header:
        """The header that speaks for the run: the headline's, else that of what there is."""
        return self.groups[0].results[0].header if self.groups else self.headers[0]

    @property
    def headers(self) -> list[Header]:
        """Every header: the rows', the dissection's, the curve's, the sweep's, the laboratory's, the certifiers'."""
        made = (self.dissected, self.blended, self.swept, self.measured, *self.certified)
        others = [one.record.header for one in made if one is not None]
        return [*(result.header for result in self.results), *others]

    @property
    def routed(self) -> bool:
        """The model has at least one router."""
        return bool(self.header.routers)

    @property
    def clean(self) -> analysis.Rate:
        """Clean accuracy on the headline's images, of a run that has rows."""
        if self.groups:
            return self.groups[0].worst.clean
        return self.clean_only[0].clean if self.clean_only else analysis.evaluation_summary(*self.results[0]).clean

    @property
    def seconds(self) -> float | None:
        """Wall time of the finished evaluations, in seconds; None if none is finished."""
        times = [result.checks.seconds for result in self.results if result.checks is not None]
        return sum(times) if times else None


def collect(runs: Sequence[str | os.PathLike[str]]) -> list[View]:
    """Read every run; UserError if there is none, or one is not a run folder or nothing was measured in it."""
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
    everything = [(path, read(path)) for path in rows_files(folder)]
    kept = [(path, result) for path, result in everything if result.rows]
    results = [result for _, result in kept]
    audit = Audit.read(folder)
    groups = [_group(members, audit) for members in analysis.groups(results)]
    head = groups[0].results[0] if groups else next(iter(results), None)
    notes = [f"{path.name} has no rows yet and is left out" for path, result in everything if not result.rows]
    dissected = _dissected(folder, None if head is None else head.header, notes)
    first = head or (None if dissected is None else dissected.record)
    blended = _blended(folder, None if first is None else first.header, notes)
    second = first or (None if blended is None else blended.record)
    swept = _swept(folder, None if second is None else second.header, notes)
    third = second or (None if swept is None else swept.record)
    measured = _measured(folder, None if third is None else third.header, notes)
    fourth = third or (None if measured is None else measured.record)
    certified = _certified(folder, None if fourth is None else fourth.header, results, notes)
    if fourth is None and not certified:
        raise UserError(f"{folder} has no rows yet; `robustmoe evaluate {folder}` makes them")
    return View(
        name=name,
        folder=folder,
        config=_config(config_path),
        metrics=read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else [],
        results=results,
        groups=groups,
        clean_only=[analysis.evaluation_summary(*result) for result in results if result.header.attack is None],
        curves=analysis.eps_curve([(result.header, result.rows) for result in results]),
        loads=_loads(groups[0] if groups else None, head),
        examples=_examples(kept, groups),
        checks=_checks(results, audit),
        dissected=dissected,
        blended=blended,
        swept=swept,
        measured=measured,
        certified=certified,
        notes=notes + analysis.warnings(results),
    )


def _dissected(folder: Path, header: Header | None, notes: list[str]) -> Dissected | None:
    """The folder's dissection, if it is done."""
    found = Dissection.read(folder)
    if found is None or not _shown(found, header, notes, "" if found.done else "not finished", "dissect", folder):
        return None
    return Dissected(found, analysis.dissection_summary(found))


def _blended(folder: Path, header: Header | None, notes: list[str]) -> Blended | None:
    """The folder's curve over alpha, if there is a point on it."""
    found = Blend.read(folder)
    if found is None:
        return None
    empty = "" if found.alphas and found.index else "empty"
    if not _shown(found, header, notes, empty, "blend", None):
        return None
    return Blended(found, analysis.alpha_curve(found), analysis.alpha_shown(found))


def _swept(folder: Path, header: Header | None, notes: list[str]) -> Swept | None:
    """The folder's sweep, if something was attacked in it."""
    found = Sweep.read(folder)
    if found is None or not _shown(
        found, header, notes, "" if found.points else "without an attack yet", "sweep", folder
    ):
        return None
    if not found.done:
        notes.append(f"the sweep was stopped; `robustmoe sweep {folder}` goes on with it")
    return Swept(found, analysis.sweep_summary(found))


def _measured(folder: Path, header: Header | None, notes: list[str]) -> Measured | None:
    """The folder's Lipschitz file, if there is an image in it."""
    found = Lipschitz.read(folder)
    if found is None or not _shown(
        found, header, notes, "" if found.index else "without an image yet", "lipschitz", folder
    ):
        return None
    if not found.done:
        notes.append(f"the Lipschitz laboratory was stopped; `robustmoe lipschitz {folder}` goes on with it")
    return Measured(found, analysis.lipschitz_summary(found))


def _certified(
    folder: Path, header: Header | None, results: list[Evaluation], notes: list[str]
) -> tuple[Certified, ...]:
    """What each certifier proves of the model of that header (None: of the first one's), where there is an image."""
    shown = []
    for found in Certificates.read_all(folder):
        name = f"certificates of {found.certifier}"
        header = header or found.header
        if not found.rows or found.header.model_hash != header.model_hash:
            why = "are of other weights than the evaluation" if found.rows else "have no image yet"
            notes.append(f"the {name} {why} and are left out; `robustmoe certify {folder}` makes them")
            continue
        if not found.done:
            notes.append(f"the {name} are not complete; the same `robustmoe certify` goes on with them")
        one = Certified(found, analysis.certificates_summary(found, results))
        if one.numbers.refuted:
            notes.append(f"an attack disproves the {name}; see Certificates")
        shown.append(one)
    return tuple(shown)


def _shown(
    found: Dissection | Blend | Sweep | Lipschitz,
    header: Header | None,
    notes: list[str],
    unfit: str,
    verb: str,
    folder: Path | None,
) -> bool:
    """Whether the record is of the model of that header (None: of any) and not ``unfit``; else ``notes`` says why not,
    and what makes it anew.
    """
    if header is not None and found.header.model_hash != header.model_hash and not unfit:
        unfit = "of other weights than the evaluation"
    if unfit:
        file = "dissection" if verb == "dissect" else verb
        again = f"robustmoe {verb}" if folder is None else f"`robustmoe {verb} {folder}`"
        notes.append(f"{file}.json is {unfit} and is left out; {again} makes it")
    return not unfit


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


def _group(results: list[Evaluation], audit: Audit | None) -> Group:
    return Group(
        results=results,
        names=analysis.names([result.header for result in results]),
        summaries=[analysis.evaluation_summary(*result) for result in results],
        worst=analysis.worst_case([(result.header, result.rows) for result in results]),
        verdict=analysis.judge(results, audit),
    )


def strongest(group: Group) -> int:
    """The position of the attack that leaves the lowest robust accuracy."""
    values = [summary.robust.value if summary.robust is not None else math.inf for summary in group.summaries]
    return values.index(min(values))


def _loads(group: Group | None, head: Evaluation | None) -> list[analysis.Load]:
    """The load under the headline's strongest attack."""
    result = group.results[strongest(group)] if group is not None else head
    if result is None:
        return []
    return [analysis.load_by_class(result.header, result.rows, name) for name in result.header.routers]


def _examples(kept: list[tuple[Path, Evaluation]], groups: list[Group]) -> list[Example]:
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


def comparable(views: Sequence[View]) -> list[str]:
    """Why the evaluations cannot be compared number by number, in sentences; empty if they can."""
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
