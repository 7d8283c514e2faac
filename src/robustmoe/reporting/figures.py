"""Plots as inline SVG, drawn by hand: colours come from the page's CSS variables, so that one drawing serves light,
dark and print. Every figure carries its numbers as alternative text, as tooltips, and as attributes from which the
page's script shows the values at the pointer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

Size = tuple[int, int]
NORMAL, SMALL, LARGE = (420, 236), (320, 216), (540, 290)  # drawing units; text is 12 of them
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) with x rising, an optional band (x, low, high), a colour number, dashed or not, with or
    without ``dots`` (a mark and a tooltip at each point); without ``joined`` its dots alone. ``run``: the place of the
    run that it is of, where a reader can choose among several."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    band: tuple[tuple[float, float, float], ...] = ()
    dashed: bool = False
    dots: bool = True
    joined: bool = True
    run: int | None = None


class Key(NamedTuple):
    """An entry of a legend; ``run``: see `Series`."""

    name: str
    colour: int
    dashed: bool = False
    run: int | None = None


def of_run(run: int | None) -> str:
    """Returns the class of what goes when a reader leaves a run out, after a space; "" for what stays."""
    return "" if run is None else f" run-{run}"


@dataclass(frozen=True)
class Axes:
    """The axes of a line chart. y goes from 0 (or its least value) to a little above its greatest, unless ``y_range``
    says otherwise. ``whole_x``: ticks at whole numbers alone. ``log_x``, ``log_y``: logarithmic, without what is not
    above 0. ``mark``: an upright line at this x."""

    x_label: str
    unit: str = ""
    y_range: tuple[float, float] | None = None
    whole_x: bool = False
    log_x: bool = False
    log_y: bool = False
    mark: float | None = None


def colour(position: int) -> int:
    """Returns the number of a colour class, 1 to 8, in turn."""
    return position % COLOURS + 1


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Returns round values that cover [low, high], about as many as wanted."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns at most nine round values in [low, high], both above 0, by powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(values) <= 9:
            break
    return values


def _text(value: float) -> str:
    if value != 0 and (abs(value) < 0.01 or abs(value) >= 100_000):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _scale(low: float, high: float, start: float, end: float) -> tuple[float, float]:
    """Returns slope and offset of the straight line that takes [low, high] to [start, end]."""
    slope = (end - start) / (high - low) if high > low else 0.0
    return slope, (start - slope * low) if high > low else (start + end) / 2


class _Frame:
    """Axes: data to drawing coordinates, and the grid as SVG."""

    def __init__(
        self, xs: tuple[float, float], ys: tuple[float, float], size: Size, log_x: bool = False, log_y: bool = False
    ) -> None:
        self.width, self.height = size
        self._along_x, self._along_y = math.log if log_x else float, math.log if log_y else float
        left, right = map(self._along_x, xs)
        low, high = map(self._along_y, ys)
        self._x = _scale(left, right, float(LEFT), float(self.width - RIGHT))
        self._y = _scale(low, high, float(self.height - BOTTOM), float(TOP))

    def x(self, value: float) -> float:
        return round(self._x[0] * self._along_x(value) + self._x[1], 1)

    def y(self, value: float) -> float:
        return round(self._y[0] * self._along_y(value) + self._y[1], 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)

    def data(self, x_label: str, unit: str) -> str:
        """Returns attributes by which the script finds a point: slope, offset and kind of each axis."""
        x, y = (
            f"{slope:.6g} {offset:.6g}{' log' if along is math.log else ''}"
            for (slope, offset), along in ((self._x, self._along_x), (self._y, self._along_y))
        )
        return f' data-x="{x}" data-y="{y}" data-label="{escape(x_label)}" data-unit="{escape(unit)}"'

    def grid(self, x_label: str, unit: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = [
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(y)}" y2="{self.y(y)}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{self.y(y) + 4}" text-anchor="end">{_text(y)}{unit}</text>'
            for y in y_ticks
        ]
        parts += [
            f'<text class="tick" x="{self.x(x)}" y="{bottom + 17}" text-anchor="middle">{_text(x)}</text>'
            for x in x_ticks
        ]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{self.height - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return "".join(parts)


def svg(body: str, alt: str, size: Size, data: str = "") -> str:
    """Returns a drawing with its alternative text; ``data``: further attributes, each after a space."""
    width, height = size
    kind = "large" if size == LARGE else "plot"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}"{data}>{body}</svg>'
    )


def legend(entries: Sequence[Key]) -> str:
    """Returns names with their colours."""
    items = "".join(
        f'<li class="entry{of_run(run)}"><i class="key b{number}{" dashed" if dashed else ""}"></i>{escape(name)}</li>'
        for name, number, dashed, run in entries
    )
    return f'<ul class="legend">{items}</ul>'


def figure(title: str, drawing: str, entries: Sequence[Key] = (), note: str = "") -> str:
    """Returns a titled figure with its legend above and a note below."""
    keys = legend(entries) if entries else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{keys}{drawing}{below}</figure>"


def lines(title: str, series: Sequence[Series], axes: Axes, *, note: str = "", size: Size = NORMAL) -> str:
    """Returns a line chart; see `Axes`. What cannot be drawn, not finite or not above 0 on a logarithmic axis, is left
    out."""
    series = [line for line in (_drawable(line, axes) for line in series) if line.points]
    unit = axes.unit
    xs = [x for line in series for x, _ in line.points]
    y_all = [y for line in series for _, y in line.points]
    low, high = axes.y_range or (min(y_all) if axes.log_y else min(0.0, *y_all), max(y_all) * 1.06 or 1.0)
    left, right = min([*xs, *_mark(axes)]), max([*xs, *_mark(axes)])
    frame = _Frame((left, right), (low, high), size, axes.log_x, axes.log_y)
    x_ticks = log_ticks(left, right) if axes.log_x else ticks(left, right, 6)
    if axes.whole_x:
        x_ticks = [value for value in x_ticks if value == int(value)] or [xs[0]]
    body = frame.grid(axes.x_label, unit, x_ticks, log_ticks(low, high) if axes.log_y else ticks(low, high))
    if axes.mark is not None:
        body += f'<path class="mark" d="{frame.path([(axes.mark, low), (axes.mark, high)])}"/>'
    for line in series:
        body += _line(frame, line, unit)
    alt = f"{title}. " + "; ".join(
        f"{line.name}: {_text(round(line.points[0][1], 3))}{unit} at {_text(line.points[0][0])}"
        + (
            f", {_text(round(line.points[-1][1], 3))}{unit} at {_text(line.points[-1][0])}"
            if len(line.points) > 1
            else ""
        )
        for line in series
    )
    entries = [Key(line.name, line.colour, line.dashed, line.run) for line in series]
    return figure(title, svg(body, alt, size, frame.data(axes.x_label, unit)), entries, note)


def _mark(axes: Axes) -> list[float]:
    return [] if axes.mark is None or (axes.log_x and axes.mark <= 0) else [axes.mark]


def _drawable(line: Series, axes: Axes) -> Series:
    """Returns the line without the points that the axes have no place for."""
    points = tuple(
        (x, y)
        for x, y in line.points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)
    )
    return replace(line, points=points)


def _line(frame: _Frame, line: Series, unit: str) -> str:
    parts = []
    if line.band:
        edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        parts.append(f'<path class="band f{line.colour}" d="{frame.path(edge)}Z"/>')
    dashed = " dashed" if line.dashed else ""
    if len(line.points) > 1 and line.joined:
        parts.append(f'<path class="line s{line.colour}{dashed}" d="{frame.path(line.points)}"/>')
    radius = 3.2 if len(line.points) <= 24 else 1.6
    parts += [
        f'<circle class="dot f{line.colour}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="{radius}">'
        f"<title>{escape(line.name)}: {y:.4g}{unit} at {x:.6g}</title></circle>"
        for x, y in line.points
        if not line.dashed and (not line.joined or (line.dots and len(line.points) <= 120))
    ]
    between = {x: f",{low:.4g},{high:.4g}" for x, low, high in line.band}
    values = [(x, f"{y:.4g}{between.get(x, '')}") for x, y in line.points]
    return _values(line.name, line.colour, values, "".join(parts), line.run)


def _values(name: str, number: int, values: Sequence[tuple[float, str]], drawn: str, run: int | None = None) -> str:
    """Returns what is drawn of a line with its values, as "x,y" or "x,y,low,high"."""
    data = " ".join(f"{x:.6g},{text}" for x, text in values)
    return (
        f'<g class="values{of_run(run)}" data-name="{escape(name)}" data-colour="{number}" data-xy="{data}">{drawn}</g>'
    )


def shares(title: str, epochs: Sequence[float], loads: Sequence[Sequence[float]], note: str = "") -> str:
    """Draws who gets the items, over the epochs: one layer an expert, stacked to 100 %."""
    experts = max(len(load) for load in loads)
    if len(epochs) == 1:  # one epoch still fills the frame
        epochs, loads = [epochs[0], epochs[0] + 1], [loads[0], loads[0]]
    frame = _Frame((epochs[0], epochs[-1]), (0.0, 100.0), NORMAL)
    base = [0.0] * len(epochs)
    body = ""
    for expert in range(experts):
        top = [b + 100 * (load[expert] if expert < len(load) else 0.0) for b, load in zip(base, loads, strict=True)]
        edge = list(zip(epochs, top, strict=True)) + list(zip(epochs, base, strict=True))[::-1]
        name = f"expert {expert}: {top[-1] - base[-1]:.1f}% in the last epoch"
        drawn = f'<path class="layer f{colour(expert)}" d="{frame.path(edge)}Z"><title>{name}</title></path>'
        values = [(epoch, f"{high - low:.1f}") for epoch, high, low in zip(epochs, top, base, strict=True)]
        body += _values(f"expert {expert}", colour(expert), values, drawn)
        base = top
    whole = [value for value in ticks(epochs[0], epochs[-1], 6) if value == int(value)]
    body += frame.grid("epoch", "%", whole or [epochs[0]], [0.0, 25.0, 50.0, 75.0, 100.0])
    last = ", ".join(f"expert {at} {100 * share:.1f}%" for at, share in enumerate(loads[-1]))
    entries = [Key(f"expert {at}", colour(at)) for at in range(min(experts, COLOURS))]
    data = frame.data("epoch", "%").replace(" data-y=", " data-stack=")  # a share stands on those below it
    return figure(title, svg(body, f"{title}. In the last epoch: {last}", NORMAL, data), entries, note)


Bar = tuple[float, float, float]  # a value and its interval, in per cent


@dataclass(frozen=True)
class Cross:
    """A point with its intervals along both axes, in per cent. ``name``: written beside it. ``ring``: to be seen
    first."""

    name: str
    x: Bar
    y: Bar
    ring: bool = False


def crosses(
    title: str,
    curves: Sequence[tuple[str, int, Sequence[Cross]]],
    floors: Sequence[tuple[str, int, Sequence[tuple[float, float]]]],
    labels: tuple[str, str],
    note: str = "",
    size: Size = NORMAL,
    runs: Mapping[str, int] | None = None,
) -> str:
    """Draws per cents against per cents: each curve (name, colour, points) a line with a cross a point, each floor a
    dashed line. ``labels``: of x and of y. y starts at 0, x a little below its least. ``runs``: by the name of a curve
    or a floor, see `Series`."""
    runs = runs or {}
    every = [point for _, _, points in curves for point in points]
    xs = [x for point in every for x in point.x] + [x for _, _, points in floors for x, _ in points]
    ys = [y for point in every for y in point.y] + [y for _, _, points in floors for _, y in points]
    low, high = 5.0 * math.floor(min(xs) / 5), 5.0 * math.ceil(max(xs) / 5)
    top = min(100.0, max(ys) * 1.06) or 1.0
    frame = _Frame((low, high), (0.0, top), size)
    body = frame.grid(labels[0], "%", ticks(low, high, 6), ticks(0.0, top))
    taken: list[tuple[float, float]] = []
    for name, number, floor in floors:
        body += _line(frame, Series(name, tuple(floor), number, dashed=True, run=runs.get(name)), "%")
    for name, number, points in curves:
        drawn = f'<path class="line s{number}" d="{frame.path([(cross.x[0], cross.y[0]) for cross in points])}"/>'
        drawn += "".join(_cross(frame, name, number, labels, cross) for cross in points)
        drawn += "".join(
            _cross_name(frame, number, cross, taken) for cross in sorted(points, key=lambda cross: not cross.ring)
        )
        body += f'<g class="curve{of_run(runs.get(name))}">{drawn}</g>'
    alt = f"{title}. " + "; ".join(
        f"{name}: "
        + ", ".join(f"{cross.name}: {cross.x[0]:.1f}% {labels[0]}, {cross.y[0]:.1f}% {labels[1]}" for cross in points)
        for name, _, points in curves
    )
    entries = [Key(name, number, False, runs.get(name)) for name, number, _ in curves]
    entries += [Key(name, number, True, runs.get(name)) for name, number, _ in floors]
    return figure(title, svg(body, alt, size), entries, note)


def _cross(frame: _Frame, name: str, number: int, labels: tuple[str, str], cross: Cross) -> str:
    x, y = frame.x(cross.x[0]), frame.y(cross.y[0])
    words = "; ".join(
        f"{label} {value:.1f}% ({low:.1f}–{high:.1f})"
        for label, (value, low, high) in zip(labels, (cross.x, cross.y), strict=True)
    )
    ring = f'<circle class="ring" cx="{x}" cy="{y}" r="7.5"/>' if cross.ring else ""
    return (
        f'<path class="thin s{number}" d="{frame.path([(cross.x[1], cross.y[0]), (cross.x[2], cross.y[0])])}'
        f'{frame.path([(cross.x[0], cross.y[1]), (cross.x[0], cross.y[2])])}"/>{ring}'
        f'<circle class="dot f{number}" cx="{x}" cy="{y}" r="4"><title>{escape(name)}, {escape(cross.name)}: '
        f"{escape(words)}</title></circle>"
    )


def _cross_name(frame: _Frame, number: int, cross: Cross, taken: list[tuple[float, float]]) -> str:
    """Returns the point's name beside it, unless another stands there."""
    x, y = frame.x(cross.x[0]) + 9, frame.y(cross.y[0]) - 7
    if any(abs(x - other) < 8 * len(cross.name) and abs(y - height) < 13 for other, height in taken):
        return ""
    taken.append((x, y))
    return f'<text class="tick f{number}" x="{x:.1f}" y="{y:.1f}">{escape(cross.name)}</text>'


def bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, int, Sequence[Bar]]],
    x_label: str,
    note: str = "",
) -> str:
    """Draws per cents side by side, with whiskers: one group a name, one bar a series (name, colour, its bars). The
    values of more than 16 bars are tooltips alone."""
    frame = _Frame((0.0, float(len(groups))), (0.0, 100.0), NORMAL)
    body = frame.grid(x_label, "%", [], [0.0, 25.0, 50.0, 75.0, 100.0])
    width = min(0.8 / len(series), 0.3)
    for at, group in enumerate(groups):
        body += (
            f'<text class="tick" x="{frame.x(at + 0.5)}" y="{NORMAL[1] - BOTTOM + 17}" text-anchor="middle">'
            f"{escape(group)}</text>"
        )
        for place, (name, number, values) in enumerate(series):
            start = at + 0.5 + (place - len(series) / 2) * width
            body += _one_bar(frame, start, width, number, f"{name}, {x_label} {group}", values[at])
            if len(groups) * len(series) <= 16:
                middle, above = frame.x(start + width / 2), frame.y(values[at][2]) - 4
                body += (
                    f'<text class="tick" x="{middle}" y="{above:.1f}" text-anchor="middle">{values[at][0]:.0f}</text>'
                )
    alt = f"{title}. " + "; ".join(
        f"{name}: " + ", ".join(f"{x_label} {group} {bar[0]:.1f}%" for group, bar in zip(groups, values, strict=True))
        for name, _, values in series
    )
    return figure(title, svg(body, alt, NORMAL), [Key(name, number) for name, number, _ in series], note)


def _one_bar(frame: _Frame, start: float, width: float, number: int, name: str, bar: Bar) -> str:
    """Returns the bar and its whisker."""
    value, low, high = bar
    left, right, middle = frame.x(start + 0.04 * width), frame.x(start + 0.96 * width), frame.x(start + width / 2)
    top, foot = frame.y(value), frame.y(0.0)
    return (
        f'<rect class="f{number} layer" x="{left}" y="{top}" width="{right - left:.1f}" height="{foot - top:.1f}">'
        f"<title>{escape(name)}: {value:.1f}% ({low:.1f}–{high:.1f})</title></rect>"
        f'<line class="whisker" x1="{middle}" x2="{middle}" y1="{frame.y(low)}" y2="{frame.y(high)}"/>'
    )


def heat(caption: str, rows: Sequence[str], table: Sequence[Sequence[float]], marks: Sequence[int] = ()) -> str:
    """Returns a heat map as a real table of per cents: one row a class, one column an expert; ``marks``: dead experts;
    nan is shown as a dash."""
    experts = len(table[0]) if table else 0
    head = "".join(
        f'<th scope="col" class="dead" title="gets nothing">{at}†</th>' if at in marks else f'<th scope="col">{at}</th>'
        for at in range(experts)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            "<td>–</td>"
            if math.isnan(share)
            else f'<td class="{"strong" if share >= 0.55 else ""}" style="--v:{share:.3f}">{100 * share:.0f}</td>'
            for share in line
        )
        + "</tr>"
        for name, line in zip(rows, table, strict=True)
    )
    return (
        f'<table class="heat"><caption>{escape(caption)}</caption>'
        f"<thead><tr><td>expert</td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
