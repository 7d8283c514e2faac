"""What `robustmoe theory` prints and draws."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from robustmoe.records import write_own
from robustmoe.records.theory import Chart, Comparison, Experiment
from robustmoe.reporting.figures import Axes, Series, colour, lines
from robustmoe.reporting.grid import WIDTH, aligned
from robustmoe.reporting.page import MARK, document
from robustmoe.reporting.words import plural


def theory_table(experiments: Sequence[Experiment]) -> str:
    """Expected beside measured, a line a row; then what each experiment says, and how many rows hold."""
    table = [["", "expected", "measured", "notes", ""]]
    for experiment in experiments:
        table.append([f"{experiment.id}  {experiment.title}", "", "", "", f"{experiment.seconds:.1f} s"])
        table += [["  " + row.setting, *_cells(row)] for row in experiment.rows]
    lines = aligned(table, last=False)
    for experiment in experiments:
        start = f"{experiment.id}: "
        lines += ["", *textwrap.wrap(experiment.says, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))]
    return "\n".join([*lines, "", *_counts([row for experiment in experiments for row in experiment.rows])])


def _cells(row: Comparison) -> list[str]:
    expected = {
        "equal": f"{row.expected:.6g}" + (f" ±{row.tolerance:.0e}" if row.tolerance else ""),
        "at most": f"≤ {row.expected + row.tolerance:.6g}",
        "at least": f"≥ {row.expected - row.tolerance:.6g}",
        "between": f"{row.expected:.6g} to {row.upper:.6g}",
        "measured only": "–",
    }[row.kind]
    published = "" if row.published is None else f"{row.published:g}"
    if row.published is not None and row.near is None:
        published = f"({published})"
    if row.reproduced is False:
        published += " !"
    held = "–" if row.kind == "measured only" and row.holds else "holds" if row.holds else "does not hold"
    return [expected, f"{row.measured:.6g}", published, held]


def _counts(rows: Sequence[Comparison]) -> list[str]:
    tested = [row for row in rows if row.kind != "measured only"]
    known = [row.reproduced for row in rows if row.reproduced is not None]
    words = [
        f"{sum(row.holds for row in tested)} of {plural(len(tested), 'row')} hold; a dash: measured, nothing expected.",
        f'"notes": what the notes this table comes from measured; {sum(known)} of {len(known)} came out again, to the '
        "precision stated there or that other draws of the same distribution allow (! = not). In brackets: of data or "
        "weights that the notes do not describe, not to be compared digit by digit.",
    ]
    return [line for sentence in words for line in textwrap.wrap(sentence, WIDTH)]


def draw(experiments: Sequence[Experiment], folder: str | os.PathLike[str]) -> Path | None:
    """Writes ``folder``/figures.html, one page with every experiment that has a figure; its path (None: there is no
    figure). Raises UserError if it cannot be written, or if another page than an earlier one of ours stands there.
    """
    drawn = [experiment for experiment in experiments if experiment.charts]
    if not drawn:
        return None
    sections = "".join(
        f"<section><h2>{escape(f'{experiment.id}  {experiment.title}')}</h2>"
        f'<p class="lead">{escape(experiment.says)}</p>'
        f'<div class="plots pair">{"".join(map(_chart, experiment.charts))}</div></section>'
        for experiment in drawn
    )
    path = Path(folder) / "figures.html"
    write_own(
        path,
        document("Theory on synthetic data", "Theory of robust mixtures", "", sections, ""),
        MARK,
    )
    return path


def _chart(chart: Chart) -> str:
    """Draws one chart; what stands upwards, and what the upright line is, are below it."""
    series = [
        Series(curve.name, curve.points, colour(at), dashed=curve.style == "dashed", joined=curve.style != "dots")
        for at, curve in enumerate(chart.curves)
    ]
    mark, words = chart.mark or (None, "")
    axes = Axes(chart.x_label, log_x=chart.log_x, log_y=chart.log_y, mark=mark)
    note = f"Upwards: {chart.y_label}." + (f" Upright line: {words}." if words else "")
    return lines(chart.title, series, axes, note=note)
