"""The Lipschitz laboratory as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from robustmoe.analysis import LayerPart, LipschitzSummary, Middle
from robustmoe.records import Lipschitz
from robustmoe.reporting.collect import Measured, View
from robustmoe.reporting.figures import Series, bars, colour, heat, lines
from robustmoe.reporting.tables import Entry, Grid, grid_html, rated
from robustmoe.reporting.words import NORM_NAMES, eps_text, percent, plural, threat

ROUTERS_SHOWN = 8
MOST_EXPERTS = 16  # columns of the tables of experts; beyond them, the greatest is told

WHOLE = {
    "jacobian": "slope of the logits, ‖J‖",
    "experts' part": "of it with the routing weights held",
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
            "model's experts' part": "model’s ‖J‖, this layer’s weights held",
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
        "a layer mixes experts, Σ w_i f_i. Its Jacobian is A = Σ w_i J_i, the experts moving at held weights, plus R, "
        "the weights moving at held experts. Norms are spectral; the parts’ sum is never below the whole.",
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


def story(one: Measured) -> str:
    """What the numbers say, as plain text."""
    found, header = one.numbers, one.record.header
    whole = found.model
    radius = whole["margin radius"].median / header.eps
    said = (
        f"At the median image the logits change by up to {_number(whole['jacobian'].median)} per unit of pixels (L2), "
        f"and another class is {_number(radius)} eps away to first order; right on {percent(found.right['clean'])} of "
        f"the images clean, on {percent(found.right['attacked'])} attacked."
    )
    if not found.layers:
        return f"{said} The model has no router."
    share = percent(whole["router's share"].median, 0)
    said += f" Of the Jacobian, {share} goes through the routing weights (router’s share of the parts’ norms, median)."
    fall, experts, routes = found.fall
    said += (
        f" The attack lowers the margin by {_number(fall)} on average: {_number(experts)} by the experts and "
        f"{_number(routes)} by the routes; on the clean routes {percent(found.right['frozen'])} of the attacked images "
        f"are right."
    )
    masses = [layer.mass for layer in found.layers if layer.mass is not None]
    if masses:
        low, high = min(masses), max(masses)
        between = percent(low, 0) if low == high else f"{percent(low, 0)} to {percent(high, 0)}"
        said += f" A routing boundary is within eps for {between} of the items, to first order."
    dead = [f"{short(layer.name)}: {', '.join(map(str, layer.dead))}" for layer in found.layers if layer.dead]
    return f"{said} Experts without an item: {'; '.join(dead)}." if dead else said


def setting(found: Lipschitz) -> str:
    """On what, and against what."""
    header = found.header
    where = f"{plural(len(found.index), 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    return f"{where}; changes are those that {header.attack} makes. Computed in float32 without autocast."


def short(router: str) -> str:
    """ "block 3" of "network.blocks.3.mlp.router"; any other name as it is."""
    found = re.fullmatch(r"network\.blocks\.(\d+)\.mlp\.router", router)
    return f"block {found[1]}" if found else router


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Measured) -> list[Grid]:
    """Everything measured, as tables: the whole model, the layers side by side, experts, what is missing."""
    found = one.numbers
    tables = [_model(one)]
    for title, rows in TABLES:
        grid = _layers(found, title, rows)
        tables += [grid] if grid is not None else []
    return [*tables, *([_boundaries(one)] if any(layer.boundary for layer in found.layers) else []), *_experts(found)]


def _entry(value: Middle | None, name: str) -> Entry:
    if value is None:
        return "–", ""
    if name in SHARES:
        return percent(value.median), f"{percent(value.low)} to {percent(value.high)}"
    return _number(value.median), f"{_number(value.low)} to {_number(value.high)}"


def _model(one: Measured) -> Grid:
    found, header = one.numbers, one.record.header
    norm, eps = NORM_NAMES[header.norm], eps_text(header.norm, header.eps)
    units = {"margin radius": f"{norm}, pixels", "stretch": f"logits L2 / pixels {norm}, {norm} ≤ {eps}"}
    rows: list[tuple[Entry, ...]] = [
        ((words, units.get(name, "")), _entry(found.model[name], name), (found.kind(name), ""))
        for name, words in WHOLE.items()
        if name in found.model
    ]
    words = {"clean": "right, clean", "attacked": "right, attacked"}
    if found.layers:
        words |= {"frozen": "right, attacked on the clean routes", "swapped": "right, clean on the attacked routes"}
    rows += [((label, ""), rated(found.right[name]), ("exact", "")) for name, label in words.items()]
    fall, experts, routes = found.fall
    parts = f"{_number(experts)} by experts + {_number(routes)} by routes" if found.layers else ""
    rows.append((("fall of the margin under the attack", "mean"), (_number(fall), parts), ("exact", "")))
    note = "Slopes are by pixels in L2. Medians over the images; small print: what eight tenths of them are within."
    return Grid("The whole model", ("Quantity", "Median", "How exact"), tuple(rows), note)


def _layers(found: LipschitzSummary, title: str, words: Mapping[str, str]) -> Grid | None:
    """The layers side by side; None where no layer has any of these quantities."""
    shown = found.layers[:ROUTERS_SHOWN]
    rows = tuple(
        ((label, ""), *(_entry(layer.numbers.get(name), name) for layer in shown), (found.kind(name), ""))
        for name, label in words.items()
        if any(name in layer.numbers for layer in shown)
    )
    if not rows:
        return None
    what = "Means over an image’s tokens unless said otherwise, then medians over the images."
    notes = "" if title != TABLES[0][0] else " ".join([what, *_notes(found)])
    return Grid(title, ("Quantity", *(short(layer.name) for layer in shown), "How exact"), rows, notes)


def _notes(found: LipschitzSummary) -> list[str]:
    """How the layers were computed and what they have not, each sentence once."""
    told: dict[str, list[str]] = {}
    for layer in found.layers:
        for sentence in (layer.note, *(f"no {what}, as {why}" for what, why in layer.absent.items())):
            if sentence:
                told.setdefault(sentence, []).append(short(layer.name))
    some = [f"{', '.join(names)}: {sentence}." for sentence, names in told.items()]
    more = len(found.layers) - ROUTERS_SHOWN
    return some + ([f"{plural(more, 'more router')} in the JSON of the report."] if more > 0 else [])


def _boundaries(one: Measured) -> Grid:
    """The boundary mass against eps."""
    header = one.record.header
    there = [layer for layer in one.numbers.layers if layer.boundary][:ROUTERS_SHOWN]
    rows = tuple(
        ((eps_text(header.norm, radius), "the attack’s eps" if radius == header.eps else ""),
         *((percent(layer.boundary[at][1]), "") for layer in there))
        for at, (radius, _) in enumerate(there[0].boundary)
    )  # fmt: skip
    head = (f"Within ({NORM_NAMES[header.norm]}, pixels)", *(short(layer.name) for layer in there))
    note = "First order. Where not all items were asked, those that were not count as farther away."
    return Grid("Boundary mass: items with a routing boundary that near", head, rows, note)


def _experts(found: LipschitzSummary) -> list[Grid]:
    """Load and bound of each expert."""
    out = []
    for layer in found.layers[:ROUTERS_SHOWN]:
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
        head = (f"Experts, {short(layer.name)}", *(str(k) for k in numbers))
        out.append(Grid(f"Load and slopes of the experts of {short(layer.name)}", head, tuple(rows), note))
    return out


# The page --------------------------------------------------------------------------------------------------------


def section(views: Sequence[View]) -> str:
    """The measured runs: a story, figures and tables each; "" without any."""
    there = [(at, view, view.measured) for at, view in enumerate(views) if view.measured is not None]
    if not there:
        return ""
    parts = [
        '<h2>Lipschitz laboratory</h2><p class="lead">How far the model can move for a small change of the image, and '
        "whether through its experts or its router.</p>"
    ]
    for at, view, one in there:
        name = (
            f'<h2><i class="dotkey b{colour(at)}"></i><span>{escape(view.name)}</span></h2>' if len(views) > 1 else ""
        )
        parts.append(f'<div class="cards"><article class="card">{name}{_card(one)}</article></div>{_figures(one)}')
        first, *rest = grids(one)
        tables = "".join(grid_html(grid) for grid in rest)
        parts.append(grid_html(first))
        if rest:
            parts.append(
                f"<details{'' if len(there) > 1 else ' open'}><summary>Layer by layer</summary>{tables}</details>"
            )
    terms = "".join(f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in TERMS)
    return f'{"".join(parts)}<dl class="terms">{terms}</dl>'


def _card(one: Measured) -> str:
    return f'<p class="story">{escape(story(one))}</p><p class="note">{escape(setting(one.record))}</p>'


def _figures(one: Measured) -> str:
    """Router's shares, boundary mass and loads, layer by layer."""
    layers = one.numbers.layers[:ROUTERS_SHOWN]
    body = _share_figure(layers) + _boundary_figure(one, layers)
    loads = ""
    if layers:
        widest = max(len(layer.load) for layer in layers)
        table = [[*layer.load, *([math.nan] * (widest - len(layer.load)))] for layer in layers]
        drawn = heat("% of the items to each expert, clean", [short(layer.name) for layer in layers], table)
        loads = f'<div class="heats" style="margin-top:20px"><div class="heatbox" tabindex="0">{drawn}</div></div>'
    return f'<div class="plots wide" style="margin-top:20px">{body}</div>{loads}' if body else ""


def _share_figure(layers: Sequence[LayerPart]) -> str:
    """What the router has of each layer's Jacobian, and of its change under the attack."""
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
    return bars("The router’s share of each layer", [short(layer.name) for layer in some], series, "layer", note)


def _boundary_figure(one: Measured, layers: Sequence[LayerPart]) -> str:
    """The share of items within a radius of a routing boundary."""
    some = [layer for layer in layers if layer.boundary]
    if not some:
        return ""
    header = one.record.header
    scale, unit = (255, " of 1/255") if header.norm == "linf" else (1, "")
    series = [
        Series(
            short(layer.name),
            ((0.0, 0.0), *((scale * radius, 100 * share) for radius, share in layer.boundary)),
            colour(at),
        )
        for at, layer in enumerate(some)
    ]
    label = f"{NORM_NAMES[header.norm]} radius in pixels{unit}"
    note = "Share of the items with a routing boundary that near, to first order; the upright line is the attack’s eps."
    return lines("Boundary mass", series, label, unit="%", y_range=(0.0, 100.0), note=note, mark=scale * header.eps)
