"""One evaluation, told alone; the report tells all those of a run together (verdict, tables)."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe.analysis import EvaluationSummary, attack_name, by_part, evaluation_summary
from robustmoe.records import Evaluation
from robustmoe.reporting.grid import Grid, rated
from robustmoe.reporting.panel import Kind, Panel, Shown
from robustmoe.reporting.words import GLOSSARY, percent, plural, threat

Evaluated = Shown[Evaluation, EvaluationSummary]


def story(shown: Evaluated) -> str:
    """Returns what is right clean, and what the attack leaves."""
    header, numbers = shown.record.header, shown.summary
    said = f"{header.model} gets {percent(numbers.clean)} of {plural(numbers.n, 'image')} right"
    if numbers.robust is None:
        return f"{said}; it was not attacked."
    return f"{said}, and keeps {percent(numbers.robust)} under {attack_name(header)}."


def setting(record: Evaluation) -> str:
    """Returns on what, and against what."""
    header = record.header
    limit = f", {threat(header.norm, header.eps)}" if header.attack else ""
    return f"{plural(header.n, 'image')} of {header.data} ({header.split}){limit}."


def grids(shown: Evaluated) -> list[Grid]:
    """Returns the accuracies, and what each part of a suite broke."""
    numbers = shown.summary
    rates = {"clean accuracy": numbers.clean, "robust accuracy": numbers.robust}
    rates |= {"router’s part": numbers.router_exposed, "experts’ part": numbers.experts_exposed}
    rows = tuple(((name, ""), rated(rate)) for name, rate in rates.items() if rate is not None)
    moved = tuple(((f"rerouted, {name}", ""), (percent(share), "")) for name, share in numbers.rerouted.items())
    tables = [Grid("What the attack leaves", ("Measure", "Value"), (*rows, *moved))]
    if parts := by_part(shown.record):
        broke = tuple(((part.name, ""), (str(part.broken), ""), rated(part.left)) for part in parts)
        tables.append(Grid("Part by part", ("Part", "Broke", "Left"), broke))
    return tables


def panel(shown: Evaluated) -> Panel:
    """Returns everything that is said of one evaluation."""
    return Panel(story(shown), setting(shown.record), grids(shown), GLOSSARY, open=2)


def doubts(shown: Evaluated) -> Sequence[str]:
    """Returns why its numbers cannot be quoted."""
    return [*shown.summary.failed, *shown.summary.incomplete]


KIND = Kind(
    Evaluation,
    "Evaluation",
    "One attack on the model. Small print: 95 % Wilson intervals, in per cent.",
    lambda record, evaluations: evaluation_summary(*record),
    panel,
    unfit=lambda record: "" if record.rows else "without an image yet",
    doubts=doubts,
)
