"""Tables as files that other programs read: Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records import assert_ours, write_own
from robustmoe.reporting.grid import Grid, grid_markdown

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?")
_SPECIAL = {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
            "\\": r"\textbackslash{}", "†": r"$^\dagger$", "≤": r"$\leq$", "∞": r"$\infty$", "±": r"$\pm$"}  # fmt: skip


def grids_csv(grids: Sequence[Grid]) -> str:
    """Returns every cell as a line: table, row, column, value, small print."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("table", "row", "column", "value", "interval"))
    for grid in grids:
        for (name, _), *entries in grid.rows:
            lines.writerows((grid.title, name, column, *entry) for column, entry in zip(grid.head[1:], entries))
    return out.getvalue()


def grid_latex(grid: Grid) -> str:
    r"""Returns a ``tabular`` of the packages booktabs and siunitx (version 3). A column of numbers is aligned at its
    points; an interval stands beside its number."""
    columns = list(zip(*grid.rows, strict=True))[1:]
    kinds, head = ["l"], [_latex(grid.head[0])]
    for name, column in zip(grid.head[1:], columns, strict=True):
        numbers = all(_NUMBER.fullmatch(value) or not value for value, _ in column)
        kinds.append("S[separate-uncertainty]" if numbers else "l")
        head.append(f"{{{_latex(name)}}}")
        if any(small for _, small in column):
            kinds.append("l")
            head.append("{95 \\%}")
    lines = [f"% {grid.title}", rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\toprule", " & ".join(head) + r" \\"]
    lines.append(r"\midrule")
    for (name, _), *entries in grid.rows:
        cells = [_latex(name)]
        for (value, small), column in zip(entries, columns, strict=True):
            cells.append(
                value.replace("±", "+-") if _NUMBER.fullmatch(value) else f"{{{_latex(value)}}}" if value else ""
            )
            cells += [f"{{{_latex(small)}}}" if small else ""] if any(each for _, each in column) else []
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex(text: str) -> str:
    return "".join(_SPECIAL.get(mark, mark) for mark in text)


def _markdown(grids: Sequence[Grid], numbers: dict[str, Any]) -> str:
    return "\n\n".join(["<!-- robustmoe compare -->", *(part for grid in grids for part in grid_markdown(grid))]) + "\n"


def _tex(grids: Sequence[Grid], numbers: dict[str, Any]) -> str:
    needs = "% robustmoe compare; needs \\usepackage{booktabs,siunitx}"
    return "\n\n".join([needs, *map(grid_latex, grids)]) + "\n"


def _json(grids: Sequence[Grid], numbers: dict[str, Any]) -> str:
    return json.dumps({"kind": "robustmoe compare", **numbers}, indent=1) + "\n"


WRITERS: dict[str, tuple[str, Callable[[Sequence[Grid], dict[str, Any]], str]]] = {
    ".md": ("<!-- robustmoe compare -->", _markdown),
    ".csv": ("table,row,column,value,interval", lambda grids, numbers: grids_csv(grids)),
    ".tex": ("% robustmoe compare", _tex),
    ".json": ('{"kind": "robustmoe compare"', _json),
}
"""By the ending of a file: what shows that it is an earlier one of ours, and who writes it."""


def table_file(out: str) -> Path:
    """Returns the path of a table that can be written there. UserError for another ending, or over another's file."""
    path = Path(out)
    if path.suffix not in WRITERS:
        raise UserError(f"{out}: tables are written as {', '.join(WRITERS)}; got the ending {path.suffix!r}")
    assert_ours(path, WRITERS[path.suffix][0])
    return path


def write_table(path: Path, grids: Sequence[Grid], numbers: dict[str, Any]) -> None:
    """Write tables in the format of the path's ending, over nothing but an earlier file of ours."""
    mark, writer = WRITERS[path.suffix]
    write_own(path, writer(grids, numbers), mark)
