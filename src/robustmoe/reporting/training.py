"""Curves: accuracy against eps, training, and the routers' health over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from robustmoe.analysis import Curve, router_names
from robustmoe.reporting.boxes import run_part
from robustmoe.reporting.collect import RunView, numbered
from robustmoe.reporting.figures import LARGE, NORMAL, SMALL, Axes, Series, Size, colour, lines, of_run, shares
from robustmoe.reporting.words import NORM_NAMES, eps_axis, eps_text, interval, number, percent, plural

ROUTERS_SHOWN = 12


def eps_section(views: Sequence[RunView]) -> str:
    """Returns accuracy against eps, one chart a norm, with its table beside it; "" without a curve."""
    curves = [(view, curve) for view in views for curve in view.curves]
    if not curves:
        return ""
    parts = [
        "<h2>Accuracy against eps</h2>",
        '<p class="lead">A larger eps lets the attack change the image more, so an honest curve only falls, and it '
        "reaches zero in the end. At eps 0 nothing is changed. Bands are 95 % intervals.</p>",
    ]
    for norm in dict.fromkeys(curve.norm for _, curve in curves):
        chosen = [(view, curve) for view, curve in curves if curve.norm == norm]
        labels = [f"{view.name}: {curve.name}" if len(views) > 1 else curve.name for view, curve in chosen]
        runs = [views.index(view) if len(views) > 1 else None for view, _ in chosen]
        parts.append(_eps_pair(norm, labels, [curve for _, curve in chosen], runs))
    return "".join(parts)


def _eps_pair(norm: str, labels: list[str], curves: list[Curve], runs: list[int | None]) -> str:
    unit, label = eps_axis(norm, (eps for curve in curves for eps, _ in curve.points))
    colours = [at if run is None or runs.count(run) > 1 else run for at, run in enumerate(runs)]
    series = [
        Series(
            name=name,
            points=tuple((unit * eps, 100 * rate.value) for eps, rate in curve.points),
            colour=colour(number),
            band=tuple((unit * eps, 100 * rate.interval[0], 100 * rate.interval[1]) for eps, rate in curve.points),
            run=run,
        )
        for number, name, curve, run in zip(colours, labels, curves, runs, strict=True)
    ]
    sizes = sorted({curve.n for curve in curves})
    chart = lines(
        f"Accuracy against eps, {NORM_NAMES.get(norm, norm)}",
        series,
        Axes(label, unit="%", y_range=(0.0, 100.0)),
        size=LARGE,
        note=f"Measured on {' / '.join(plural(size, 'image') for size in sizes)}.",
    )
    return f'<div class="plots pair">{chart}{_eps_table(norm, curves, series)}</div>'


def _eps_table(norm: str, curves: list[Curve], series: list[Series]) -> str:
    every = sorted({eps for curve in curves for eps, _ in curve.points})
    head = "".join(
        f'<th scope="col" class="column{of_run(line.run)}"><i class="dotkey b{line.colour}"></i>'
        f'<span class="unseen">{escape(line.name)}</span></th>'
        for line in series
    )
    if len(curves) == 1:
        head = '<th scope="col">accuracy</th>'
    body = ""
    for eps in every:
        cells = ""
        for curve, line in zip(curves, series, strict=True):
            rate = dict(curve.points).get(eps)
            cells += f'<td class="rate{of_run(line.run)}">{percent(rate)}<small>{interval(rate)}</small></td>'
        body += f'<tr><th scope="row">{escape(eps_text(norm, eps))}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="data{" tight" if len(curves) == 1 else ""}"><thead>'
        f'<tr><th scope="col">eps</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# Training --------------------------------------------------------------------------------------------------------


def _over_epochs(metrics: list[dict[str, Any]], *keys: str, scale: float = 1.0) -> tuple[tuple[float, float], ...]:
    """Returns (epoch, value) of the epochs that have a finite number at that place."""
    points: dict[float, float] = {}
    for line in metrics:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        epoch, value_there = number(line.get("epoch")), number(value)
        if epoch is not None and value_there is not None:
            points[epoch] = scale * value_there
    return tuple(sorted(points.items()))


def _inner(metrics: list[dict[str, Any]], key: str) -> list[str]:
    """Returns the names under a key, in order of appearance: phases or routers."""
    values = (line.get(key) for line in metrics)
    return list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))


def _drawn(title: str, series: list[Series], note: str = "", size: Size = NORMAL, **axes: Any) -> str:
    kept = [line for line in series if line.points]
    return lines(title, kept, Axes("epoch", whole_x=True, **axes), note=note, size=size) if kept else ""


def section(views: Sequence[RunView]) -> str:
    """Shows loss, accuracy and learning rate over the epochs, one row of charts a run; "" without metrics."""
    body = ""
    for run, view in numbered(views):
        charts = _charts(view.metrics)
        if charts:
            title = f"<h3>{escape(view.name)}</h3>" if run is not None else ""
            body += run_part(run, f'{title}<div class="plots">{charts}</div>')
    if not body:
        return ""
    lead = "Validation images are not the test images; robust validation uses the (weaker) attack named in the recipe."
    return f'<h2>Training</h2><p class="lead">{lead}</p>{body}'


def _charts(metrics: list[dict[str, Any]]) -> str:
    accuracy = [
        Series("training", _over_epochs(metrics, "train_accuracy", scale=100.0), 3),
        Series("validation, clean", _over_epochs(metrics, "val_clean", scale=100.0), 1),
        Series("validation, robust", _over_epochs(metrics, "val_robust", scale=100.0), 2),
    ]
    best = [line["epoch"] for line in metrics if line.get("best") is True and number(line.get("epoch")) is not None]
    note = f"Kept: epoch {best[-1]:g}." if best else ""
    loss = [
        Series(name, _over_epochs(metrics, "loss", name), colour(at)) for at, name in enumerate(_inner(metrics, "loss"))
    ]
    rate = [
        Series(name, _over_epochs(metrics, "lr", name), colour(at)) for at, name in enumerate(_inner(metrics, "lr"))
    ]
    return (
        _drawn("Accuracy", accuracy, unit="%", y_range=(0.0, 100.0), note=note, size=SMALL)
        + _drawn("Loss by phase", loss, size=SMALL)
        + _drawn("Learning rate by phase", rate, size=SMALL)
    )


# Routers ---------------------------------------------------------------------------------------------------------


def health_section(views: Sequence[RunView]) -> str:
    """Returns load and entropy of each router over the epochs; "" without a router in the metrics."""
    body = "".join(run_part(run, _health(view, run is not None)) for run, view in numbered(views))
    if not body:
        return ""
    return (
        "<h2>Router health</h2>"
        '<p class="lead">Who gets the validation images. An expert left out shows as a vanishing layer. Entropy '
        "is that of the load, in nats: at the dotted line all experts get the same share, at zero one gets all.</p>"
        + body
    )


def _health(view: RunView, several: bool) -> str:
    routers = _inner(view.metrics, "routers")
    if not routers:
        return ""
    title = f"<h3>{escape(view.name)}</h3>" if several else ""
    short = router_names(routers)
    charts = "".join(_router(view.metrics, name, short[name]) for name in routers[:ROUTERS_SHOWN])
    more = len(routers) - ROUTERS_SHOWN
    rest = f'<p class="note">{plural(more, "more router")} in the JSON beside this page.</p>' if more > 0 else ""
    return f'{title}<div class="plots wide">{charts}</div>{rest}'


def _router(metrics: list[dict[str, Any]], name: str, short: str) -> str:
    seen = [
        (number(line.get("epoch")), line["routers"][name])
        for line in metrics
        if isinstance(line.get("routers"), dict) and isinstance(line["routers"].get(name), dict)
    ]
    loads = [(epoch, [number(share) or 0.0 for share in state["load"]]) for epoch, state in seen
             if epoch is not None and state.get("load")]  # fmt: skip
    note = _state(seen[-1][1]) if seen else ""
    area = shares(f"{short}: load", [epoch for epoch, _ in loads], [load for _, load in loads], note) if loads else ""
    entropy = _over_epochs(metrics, "routers", name, "entropy")
    if not entropy:
        return area
    series = [Series("entropy", entropy, 4)]
    top = max(value for _, value in entropy)
    if loads:
        even = math.log(len(loads[-1][1]))
        series.append(Series("even", ((entropy[0][0], even), (entropy[-1][0], even)), 5, dashed=True))
        top = max(top, even)
    return area + _drawn(f"{short}: entropy (nats)", series, y_range=(0.0, 1.08 * top or 1.0))


def _state(state: dict[str, Any]) -> str:
    """Returns what the last epoch says of a router, in words."""
    words = []
    if state.get("dead"):
        words.append("dead experts: " + ", ".join(str(expert) for expert in state["dead"]))
    if state.get("declared_fixed") is True:
        words.append("fixed by declaration")
    elif state.get("moved") is False:
        words.append("did not move: it is not being trained")
    return "; ".join(words).capitalize() + ("." if words else "")
