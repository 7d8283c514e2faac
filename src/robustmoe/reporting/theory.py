"""What `robustmoe theory` prints and draws."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from robustmoe.records import write_atomic
from robustmoe.records.theory import Comparison, Experiment
from robustmoe.reporting.grid import WIDTH, aligned
from robustmoe.reporting.png import png
from robustmoe.reporting.words import plural


def theory_table(found: Sequence[Experiment]) -> str:
    """Expected beside measured, a line a row; then what each experiment says, and how many rows hold."""
    table = [["", "expected", "measured", "notes", ""]]
    for one in found:
        table.append([f"{one.id}  {one.title}", "", "", "", f"{one.seconds:.1f} s"])
        table += [["  " + row.setting, *_cells(row)] for row in one.rows]
    lines = aligned(table, last=False)
    for one in found:
        start = f"{one.id}: "
        lines += ["", *textwrap.wrap(one.says, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))]
    return "\n".join([*lines, "", *_counts([row for one in found for row in one.rows])])


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


def draw(found: Sequence[Experiment], folder: str | os.PathLike[str]) -> list[Path]:
    """One PNG file for each experiment that has a figure, ``folder``/X8.png and the like; their paths. UserError if
    they cannot be written.
    """
    paths = []
    for one in found:
        if one.charts:
            paths.append(Path(folder) / f"{one.id}.png")
            write_atomic(paths[-1], png(one.charts))
    return paths
