"""The Lipschitz laboratory as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from robustmoe.analysis import LayerPart, LipschitzSummary, Middle, lipschitz_summary
from robustmoe.records import Lipschitz
from robustmoe.reporting.figures import Axes, Series, bars, colour, heat, lines
from robustmoe.reporting.grid import Entry, Grid, rated
from robustmoe.reporting.panel import Kind, Panel, Shown
from robustmoe.reporting.words import NORM_NAMES, eps_axis, eps_text, percent, plural, threat

Measured = Shown[Lipschitz, LipschitzSummary]
ROUTERS_SHOWN = 8
MOST_EXPERTS = 16  # columns of the tables of experts; beyond them, the greatest is told

WHOLE = {
    "jacobian": "slope of the logits, ‖J‖",
    "experts' part": "of it with the routing weights fixed",
    "router's part": "of it through the routing weights",
    "router's share": "router’s part / (router’s + experts’)",
    "margin slope": "slope of the margin",
    "margin radius": "distance to another class",
    "stretch": "greatest ‖f(x+δ)−f(x)‖/‖δ‖ found in the ball",
}
"""Quantities of the whole model, in the order of its table."""

SHARES = {"router's share", "router share", "attack router share"}

TABLES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "The layer’s Jacobian at its input, in parts",
        {
            "layer jacobian": "‖A + R‖, the layer without its residual",
            "layer jacobian max": "… the image’s worst token",
            "expert term": "‖A‖, expert term",
            "expert term max": "… the image’s worst token",
            "router term": "‖R‖, router term",
            "router term max": "… the image’s worst token",
            "mixing term": "of R: how the chosen are mixed",
            "mass term": "of R: how much weight they have",
            "router share": "‖R‖ / (‖A‖ + ‖R‖)",
            "model's experts' part": "model’s ‖J‖, this layer’s weights fixed",
            "model's router's part": "model’s ‖J‖ through this layer’s weights",
        },
    ),
    (
        "Experts: slopes and disagreement",
        {
            "expert slope": "‖J‖ of the steepest chosen expert",
            "expert slope max": "… the image’s worst token",
            "disagreement": "‖f_i − f_j‖, chosen and next",
            "relative disagreement": "… over their lengths (1: orthogonal)",
            "weighted disagreement": "Σ p_i p_j ‖f_i − f_j‖",
            "jump": "jump at the next boundary",
            "jump max": "… the image’s worst token",
        },
    ),
    (
        "Routes: how near a change is",
        {
            "margin": "k-th minus next logit",
            "margin min": "… the image’s nearest token",
            "radius l2": "L2 radius at the layer’s input",
            "radius l2 min": "… the image’s nearest token",
            "radius linf": "L∞ radius at the layer’s input",
            "radius linf min": "… the image’s nearest token",
            "pixel radius": "radius in pixels",
            "pixel radius min": "… the image’s nearest item",
            "routing slope": "slope of p at the layer’s input",
            "routing slope max": "… the image’s worst token",
            "pixel routing slope": "‖∂s/∂x‖/2, logits of all items by pixels (bounds p’s slope)",
        },
    ),
    (
        "Under the attack: the layer’s change in parts",
        {
            "attack change": "‖change of the layer’s output‖",
            "attack experts": "‖experts’ part‖",
            "attack router": "‖router’s part‖",
            "attack router share": "router’s / (router’s + experts’)",
        },
    ),
)
"""Quantities of the layers, in the order of their tables."""

TERMS = (
    (
        "A and R",
        "a layer mixes experts, Σ w_i f_i. Its Jacobian is A = Σ w_i J_i, the experts moving at fixed weights, plus R, "
        "the weights moving at fixed experts. Norms are spectral; the parts’ sum is never below the whole.",
    ),
    (
        "at the layer’s input",
        "in units of the tokens that enter the layer (after LayerNorm); not comparable with pixels.",
    ),
    (
        "how exact",
        "exact: computed outright. First order: a linear estimate at the clean image, no certificate. Lower bound: "
        "found by a search or an iteration, so the truth is at least that. Estimate: the jump of the boundary ahead, "
        "at today’s weights and answers; a share of lower bounds.",
    ),
    ("boundary mass", "the share of items (tokens) whose routing boundary is within eps, to first order."),
    (
        "by the experts, by the routes",
        "the attacked image against the clean one, each on the routes of either: what the change of input costs at "
        "mean over both routes, and what the change of routes costs at mean over both inputs. They add up to the fall.",
    ),
)


# Words -----------------------------------------------------------------------------------------------------------


def story(shown: Measured) -> str:
    """Returns what the numbers say, as plain text."""
    summary, header = shown.summary, shown.record.header
    whole = summary.model
    radius = whole["margin radius"].median / header.eps
    said = (
        f"At the median image the logits change by up to {_number(whole['jacobian'].median)} per unit of pixels (L2), "
        f"and another class is {_number(radius)} eps away to first order; right on {percent(summary.right['clean'])} "
        f"of the images clean, on {percent(summary.right['attacked'])} attacked."
    )
    if not summary.layers:
        return f"{said} The model has no router."
    share = percent(whole["router's share"].median, 0)
    said += f" Of the Jacobian, {share} goes through the routing weights (router’s share of the parts’ norms, median)."
    fall, experts, routes = summary.fall
    said += (
        f" The attack lowers the margin by {_number(fall)} on average: {_number(experts)} by the experts and "
        f"{_number(routes)} by the routes; with the routing fixed {percent(summary.right['routing fixed'])} of the "
        f"attacked images are right."
    )
    masses = [layer.mass for layer in summary.layers if layer.mass is not None]
    if masses:
        low, high = min(masses), max(masses)
        between = percent(low, 0) if low == high else f"{percent(low, 0)} to {percent(high, 0)}"
        said += f" A routing boundary is within eps for {between} of the items, to first order."
    dead = [f"{layer.short}: {', '.join(map(str, layer.dead))}" for layer in summary.layers if layer.dead]
    return f"{said} Experts without an item: {'; '.join(dead)}." if dead else said


def setting(record: Lipschitz) -> str:
    """Returns on what, and against what."""
    header = record.header
    where = f"{plural(len(record.index), 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    return f"{where}; changes are those that {header.attack} makes. Computed in float32 without autocast."


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


# Tables ----------------------------------------------------------------------------------------------------------


def grids(shown: Measured) -> list[Grid]:
    """Returns everything measured, as tables: the whole model, the layers side by side, experts, what is missing."""
    summary = shown.summary
    tables = [_model(shown)]
    for title, rows in TABLES:
        grid = _layers(summary, title, rows)
        tables += [grid] if grid is not None else []
    return [
        *tables,
        *([_boundaries(shown)] if any(layer.boundary for layer in summary.layers) else []),
        *_experts(summary),
    ]


def _entry(value: Middle | None, name: str) -> Entry:
    if value is None:
        return "–", ""
    if name in SHARES:
        return percent(value.median), f"{percent(value.low)} to {percent(value.high)}"
    return _number(value.median), f"{_number(value.low)} to {_number(value.high)}"


def _model(shown: Measured) -> Grid:
    summary, header = shown.summary, shown.record.header
    norm, eps = NORM_NAMES[header.norm], eps_text(header.norm, header.eps)
    units = {"margin radius": f"{norm}, pixels", "stretch": f"logits L2 / pixels {norm}, {norm} ≤ {eps}"}
    rows: list[tuple[Entry, ...]] = [
        ((words, units.get(name, "")), _entry(summary.model[name], name), (summary.kind(name), ""))
        for name, words in WHOLE.items()
        if name in summary.model
    ]
    words = {"clean": "right, clean", "attacked": "right, attacked"}
    if summary.layers:
        words |= {
            "routing fixed": "right, attacked, routing fixed",
            "routing transplanted": "right, clean, routing transplanted",
        }
    rows += [((label, ""), rated(summary.right[name]), ("exact", "")) for name, label in words.items()]
    fall, experts, routes = summary.fall
    parts = f"{_number(experts)} by experts + {_number(routes)} by routes" if summary.layers else ""
    rows.append((("fall of the margin under the attack", "mean"), (_number(fall), parts), ("exact", "")))
    note = "Slopes are by pixels in L2. Medians over the images; small print: what eight tenths of them are within."
    return Grid("The whole model", ("Quantity", "Median", "How exact"), tuple(rows), note)


def _layers(summary: LipschitzSummary, title: str, words: Mapping[str, str]) -> Grid | None:
    """Returns the layers side by side; None where no layer has any of these quantities."""
    shown = summary.layers[:ROUTERS_SHOWN]
    rows = tuple(
        ((label, ""), *(_entry(layer.numbers.get(name), name) for layer in shown), (summary.kind(name), ""))
        for name, label in words.items()
        if any(name in layer.numbers for layer in shown)
    )
    if not rows:
        return None
    what = "Means over an image’s tokens unless said otherwise, then medians over the images."
    notes = "" if title != TABLES[0][0] else " ".join([what, *_notes(summary)])
    return Grid(title, ("Quantity", *(layer.short for layer in shown), "How exact"), rows, notes)


def _notes(summary: LipschitzSummary) -> list[str]:
    """Returns how the layers were computed and what they have not, each sentence once."""
    told: dict[str, list[str]] = {}
    for layer in summary.layers:
        for sentence in (layer.note, *(f"no {what}, as {why}" for what, why in layer.absent.items())):
            if sentence:
                told.setdefault(sentence, []).append(layer.short)
    some = [f"{', '.join(names)}: {sentence}." for sentence, names in told.items()]
    more = len(summary.layers) - ROUTERS_SHOWN
    return some + ([f"{plural(more, 'more router')} in the JSON of the report."] if more > 0 else [])


def _boundaries(shown: Measured) -> Grid:
    """Returns the boundary mass against eps."""
    header = shown.record.header
    there = [layer for layer in shown.summary.layers if layer.boundary][:ROUTERS_SHOWN]
    rows = tuple(
        ((eps_text(header.norm, radius), "the attack’s eps" if radius == header.eps else ""),
         *((percent(layer.boundary[at][1]), "") for layer in there))
        for at, (radius, _) in enumerate(there[0].boundary)
    )  # fmt: skip
    head = (f"Within ({NORM_NAMES[header.norm]}, pixels)", *(layer.short for layer in there))
    note = "First order. Where not all items were asked, those that were not count as farther away."
    return Grid("Boundary mass: items with a routing boundary that near", head, rows, note)


def _experts(summary: LipschitzSummary) -> list[Grid]:
    """Returns load and bound of each expert."""
    out = []
    for layer in summary.layers[:ROUTERS_SHOWN]:
        numbers = range(min(len(layer.load), MOST_EXPERTS))
        rows: list[tuple[Entry, ...]] = [
            (
                ("share of the items", ""),
                *((percent(layer.load[k]), "none" if k in layer.dead else "") for k in numbers),
            )
        ]
        if layer.bounds:
            bound = (
                ("slope at most", "‖W2‖ 1.129 ‖W1‖, upper bound"),
                *((_number(layer.bounds[k]), "") for k in numbers),
            )
            rows.append(bound)
        note = f"Dead on these images: {', '.join(map(str, layer.dead))}." if layer.dead else ""
        if len(layer.load) > MOST_EXPERTS:
            note = f"{note} {len(layer.load)} experts; all in the JSON of the report.".strip()
        head = (f"Experts, {layer.short}", *(str(k) for k in numbers))
        out.append(Grid(f"Load and slopes of the experts of {layer.short}", head, tuple(rows), note))
    return out


# The page --------------------------------------------------------------------------------------------------------


def panel(shown: Measured) -> Panel:
    """Returns everything that is said of a Lipschitz record."""
    return Panel(story(shown), setting(shown.record), grids(shown), TERMS, open=1, figures=lambda: _figures(shown))


def _figures(shown: Measured) -> str:
    """Draws the router's shares, boundary mass and loads, layer by layer."""
    layers = shown.summary.layers[:ROUTERS_SHOWN]
    body = _share_figure(layers) + _boundary_figure(shown, layers)
    loads = ""
    if layers:
        widest = max(len(layer.load) for layer in layers)
        table = [[*layer.load, *([math.nan] * (widest - len(layer.load)))] for layer in layers]
        drawn = heat("% of the items to each expert, clean", [layer.short for layer in layers], table)
        loads = f'<div class="heats" style="margin-top:20px"><div class="heatbox" tabindex="0">{drawn}</div></div>'
    return f'<div class="plots wide" style="margin-top:20px">{body}</div>{loads}' if body else ""


def _share_figure(layers: Sequence[LayerPart]) -> str:
    """Returns what the router has of each layer's Jacobian, and of its change under the attack."""
    some = [layer for layer in layers if "router share" in layer.numbers]
    if not some:
        return ""

    def bar(value: Middle) -> tuple[float, float, float]:
        return 100 * value.median, 100 * value.low, 100 * value.high

    series = [
        (words, number, [bar(layer.numbers[name]) for layer in some])
        for number, (name, words) in enumerate(
            {"router share": "of the Jacobian", "attack router share": "of the change under attack"}.items(), 1
        )
        if all(name in layer.numbers for layer in some)
    ]
    note = "‖R‖ / (‖A‖ + ‖R‖), median over images; whiskers: eight tenths of them. 50: experts and router alike."
    return bars("The router’s share of each layer", [layer.short for layer in some], series, "layer", note)


def _boundary_figure(shown: Measured, layers: Sequence[LayerPart]) -> str:
    """Returns the share of items within a radius of a routing boundary."""
    some = [layer for layer in layers if layer.boundary]
    if not some:
        return ""
    header = shown.record.header
    scale = eps_axis(header.norm, [header.eps])[0]
    unit = "" if scale == 1 else " of 1/255"
    series = [
        Series(
            layer.short,
            ((0.0, 0.0), *((scale * radius, 100 * share) for radius, share in layer.boundary)),
            colour(at),
        )
        for at, layer in enumerate(some)
    ]
    label = f"{NORM_NAMES[header.norm]} radius in pixels{unit}"
    note = "Share of the items with a routing boundary that near, to first order; the upright line is the attack’s eps."
    axes = Axes(label, unit="%", y_range=(0.0, 100.0), mark=scale * header.eps)
    return lines("Boundary mass", series, axes, note=note)


KIND = Kind(
    Lipschitz,
    "Lipschitz laboratory",
    "How far the model can move for a small change of the image, and whether through its experts or its router.",
    lambda record, evaluations: lipschitz_summary(record),
    panel,
    unfit=lambda record: "" if record.index else "without an image yet",
    link="Lipschitz",
)
