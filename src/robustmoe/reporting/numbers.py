"""Views to the JSON beside the page: every number that the page shows, with counts, so that nothing is read off a
plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from robustmoe import analysis
from robustmoe.reporting.collect import Group, RunView, comparable
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import Kind, Shown


def numbers(views: Sequence[RunView]) -> dict[str, Any]:
    """Returns the whole report as JSON values; numbers that are not finite become null."""
    return finite(
        {
            "kind": "robustmoe report",
            "version": 2,
            "not_comparable": comparable(views) if len(views) > 1 else [],
            "runs": [_run(view) for view in views],
        }
    )


def _run(view: RunView) -> dict[str, Any]:
    header = view.header
    return {
        "run": view.name,
        "model": header.model,
        "method": header.method,
        "data": header.data,
        "split": header.split,
        "routers": {name: dict(vars(info)) for name, info in header.routers.items()},
        "parameters": header.parameters,
        "clean": _rate(view.clean) if view.results else None,
        "headline": _headline(view),
        "threats": [_group(group) for group in view.groups],
        "curves": [
            {
                "attack": curve.name,
                "norm": curve.norm,
                "n": curve.n,
                "points": [{"eps": eps, "accuracy": _rate(rate)} for eps, rate in curve.points],
                "warnings": list(curve.warnings),
            }
            for curve in view.curves
        ],
        "load": [dict(vars(load)) for load in view.loads],
        "checks": [{"attack": name, **vars(check)} for name, check in view.checks],
        **{kind.name: _records(kind, view.shown[kind.name]) for kind in KINDS},
        "notes": view.notes,
        "training": view.metrics,
        "config": view.config,
        "header": header.to_dict(),
        "evaluation_seconds": view.seconds,
    }


def _headline(view: RunView) -> dict[str, Any] | None:
    """Returns the worst case of the first threat, and whether it can be believed; None without an attack."""
    if not view.groups:
        return None
    group = view.groups[0]
    return {
        "clean": _rate(group.worst.clean),
        "robust": _rate(group.worst.robust),
        "norm": view.header.norm,
        "eps": view.header.eps,
        "n": group.worst.robust.n,
        "attacks": group.names,
        "router_attacked": group.verdict.router_attacked,
        "trusted": group.verdict.trusted,
        "reason": group.verdict.reason,
        "failed": list(group.verdict.failed),
        "incomplete": list(group.verdict.incomplete),
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "norm": group.worst.norm,
        "eps": group.worst.eps,
        "worst_case": {"clean": _rate(group.worst.clean), "robust": _rate(group.worst.robust)},
        "attacks": [
            {
                "name": name,
                "objective": None if summary.objective is None else summary.objective.name,
                "n": summary.n,
                "planned": summary.planned,
                "complete": summary.complete,
                "clean": _rate(summary.clean),
                "robust": _rate(summary.robust),
                "router_exposed": _rate(summary.router_exposed),
                "experts_exposed": _rate(summary.experts_exposed),
                "rerouted": summary.rerouted,
                "rerouted_broken": _rate(summary.rerouted_broken),
                "max_size": summary.max_size,
                "broken": adds.broken,
                "broken_alone": adds.alone,
                "failed": list(summary.failed),
                "incomplete": list(summary.incomplete),
                "precision": result.header.precision,
                "batch_size": result.header.batch_size or None,
                "parts": [
                    {"name": part.name, "broken": part.broken, "left": _rate(part.left)}
                    for part in analysis.by_part(result)
                ],
                "routing_gap": _gap(analysis.routing_gap(result)),
            }
            for name, result, summary, adds in zip(
                group.names, group.results, group.summaries, group.worst.adds, strict=True
            )
        ],
    }


def _records(kind: Kind, every: Sequence[Shown[Any, Any]]) -> Any:
    """Returns the records of one kind: a list where a run may have several, else an object, null without one."""
    values = [_record(shown) for shown in every]
    return values if "*" in kind.record.file else next(iter(values), None)


def _record(shown: Shown[Any, Any]) -> dict[str, Any]:
    """Returns what was measured, in its plain fields, and the numbers."""
    record, header = shown.record, shown.record.header
    made = {"norm": header.norm, "eps": header.eps, "attack": header.attack, "seed": header.seed}
    fields = {name: value for name, value in vars(record).items() if isinstance(value, str | float | int | None)}
    return {**made, **fields, **_plain(shown.summary), "done": record.done, "seconds": record.seconds}


def _plain(value: Any) -> Any:
    """Returns dataclasses as objects, rates with their intervals; a pair of experts is named "0-1"."""
    if isinstance(value, analysis.Rate):
        return _rate(value)
    if isinstance(value, analysis.Paired):
        return {**vars(value), "value": value.value, "interval": list(value.interval)}
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        pairs = value.items()
        return {"-".join(map(str, key)) if isinstance(key, tuple) else key: _plain(item) for key, item in pairs}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _gap(gap: tuple[analysis.Rate, analysis.Rate] | None) -> dict[str, Any] | None:
    if gap is None:
        return None
    alone, left = gap
    return {"autoattack": _rate(alone), "all": _rate(left), "points": 100 * (alone.count - left.count) / left.n}


def _rate(rate: analysis.Rate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    low, high = rate.interval
    return {"value": rate.value, "low": low, "high": high, "count": rate.count, "n": rate.n}


def finite(value: Any) -> Any:
    """Returns the value with nan and infinities as None, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
