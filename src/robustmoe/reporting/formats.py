"""Tables as files that other programs read: Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records import assert_ours, write_own
from robustmoe.reporting.grid import Entry, Grid, grid_markdown, safe

LAST_LATIN = 0x17F
"""The last letter that every LaTeX prints."""

LONGEST_HEAD, LONGEST_NAME, PAGE = 18, 30, 66
"""Characters of a column's head, of a row's name and of a whole row, above which a LaTeX table would be too wide."""

_NUMBER = re.compile(r"(?P<sign>[+-])?(?P<whole>\d+)(\.(?P<rest>\d+))?( ± \d+(\.\d+)?)?( †)?")
_EXPONENT = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
_SPECIAL = {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
            "\\": r"\textbackslash{}", "†": r"$^\dagger$", "≤": r"$\leq$", "∞": r"$_\infty$", "±": r"$\pm$",
            "‖": r"$\|$", "×": r"$\times$", "→": r"$\to$", "–": r"\textendash{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
            '"': "''"}  # fmt: skip
_GREEK = {mark: f"$\\{name}$" for mark, name in {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "λ": "lambda", "μ": "mu", "σ": "sigma",
    "τ": "tau", "Δ": "Delta"}.items()}  # fmt: skip


def grids_csv(grids: Sequence[Grid]) -> str:
    """Returns every cell as a line: table, row, column, value, small print."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("table", "row", "column", "value", "interval"))
    for grid in grids:
        for (name, _), *entries in grid.rows:
            lines.writerows((grid.title, name, column, *entry) for column, entry in zip(grid.head[1:], entries))
    return out.getvalue()


def grid_latex(grid: Grid, about: str = "", label: str = "robustmoe") -> str:
    r"""Returns a ``table`` of the packages booktabs and siunitx (version 3), with ``about`` in its caption. A column of
    numbers is aligned at its points; an interval stands beside its number. A table that is too wide for a page lies on
    its side: rows are columns. A head that is still long is a letter, which the caption explains."""
    grid = _fitting(grid)
    columns = list(zip(*grid.rows, strict=True))[1:]
    longest = max(len(row[0][0]) for row in grid.rows)
    kinds = [r">{\raggedright\arraybackslash}p{0.33\linewidth}" if longest > LONGEST_NAME else "l"]
    head = [_latex(grid.head[0])]
    letters: list[str] = []
    for name, column in zip(grid.head[1:], columns, strict=True):
        if len(name) > LONGEST_HEAD:
            letters.append(f"{chr(ord('A') + len(letters))}: {name}")
            name = letters[-1][0]
        kinds.append(_column([value for value, _ in column]))
        head.append(f"{{{_latex(name)}}}")
        if any(small for _, small in column):
            kinds.append("l")
            head.append("{95 \\%}")
    said = " ".join([f"{grid.title}.", *([about] if about else []), *([grid.note] if grid.note else [])])
    said += f" {'; '.join(letters)}." if letters else ""
    lines = [
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_latex(said)}}}",
        rf"\label{{tab:{label}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    lines += [" & ".join(_cells(row, columns)) + r" \\" for row in grid.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _fitting(grid: Grid) -> Grid:
    """Returns the table without empty columns, on its side where it would be too wide for a page. The small print of
    names is in the note."""
    columns = [column for column in zip(grid.head, *grid.rows) if any(any(entry) for entry in column[1:])]
    told = "; ".join(f"{name}: {small}" for name, small in columns[0][1:] if small)
    note = " ".join([*([grid.note] if grid.note else []), *([f"{told}."] if told else [])])
    if sum(map(_width, columns)) <= PAGE or not any(small for column in columns[1:] for _, small in column[1:]):
        head, *rows = zip(*columns, strict=True)
        return replace(grid, head=head, rows=tuple(rows), note=note)
    turned = tuple(((name, ""), *column) for name, *column in columns[1:])
    return replace(grid, head=("", *(name for name, _ in columns[0][1:])), rows=turned, note=note)


def _width(column: tuple[Any, ...]) -> int:
    name, *entries = column
    head = 1 if len(name) > LONGEST_HEAD else len(name)
    return max(head, *(len(value) for value, _ in entries)) + max(len(small) for _, small in entries)


def _cells(row: Sequence[Entry], columns: Sequence[Sequence[Entry]]) -> list[str]:
    cells = [_latex(row[0][0])]
    for (value, small), column in zip(row[1:], columns, strict=True):
        cells.append(_value(value, numbers=_all_numbers([each for each, _ in column])))
        if any(each for _, each in column):
            small = small if "-" in small else small.replace(" to ", "–")
            cells.append(f"{{{_latex(small)}}}" if small else "")
    return cells


def _all_numbers(values: Sequence[str]) -> bool:
    return any(values) and all(_NUMBER.fullmatch(value) or not value for value in values)


def _column(values: Sequence[str]) -> str:
    """Returns the kind of a column: of numbers, as wide as the widest of them, else of text."""
    if not _all_numbers(values):
        return "l"
    if any("±" in value for value in values):  # siunitx 3.2 spaces them badly where they are aligned
        return "S[table-alignment-mode=none,table-number-alignment=right,uncertainty-mode=separate," + (
            "table-text-alignment=right,retain-zero-uncertainty]"
        )
    parts = [match for value in values if (match := _NUMBER.fullmatch(value))]
    sign = "+" if any(part["sign"] for part in parts) else ""
    whole, rest = (max(len(part[name] or "") for part in parts) for name in ("whole", "rest"))
    width = f"{sign}{whole}" + (f".{rest}" if rest else "")
    return f"S[table-format={width}{',retain-explicit-plus' if sign else ''}]"


def _value(value: str, numbers: bool) -> str:
    """Returns a cell; siunitx sets its numbers."""
    if not value:
        return ""
    if numbers:
        return value.replace("±", "+-").replace(" †", r"{\rlap{$^\dagger$}}")
    return rf"\num{{{value}}}" if _EXPONENT.fullmatch(value) else f"{{{_latex(value)}}}"


def _latex(text: str) -> str:
    """Returns text that LaTeX prints as it is."""
    plain = "".join(_SPECIAL.get(mark, _GREEK.get(mark, mark)) for mark in text)
    plain = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", plain).replace("--", "-{}-")
    return f"{{}}{plain}" if plain[:1] in ("[", "*") else plain  # else an argument of the line before


def _about(numbers: dict[str, Any]) -> list[str]:
    """Returns what has to be known of the tables, as sentences."""
    return [str(numbers["setting"]), *(f"Note: {note}." for note in numbers["notes"])]


def _markdown(grids: Sequence[Grid], numbers: dict[str, Any]) -> str:
    tables = (part for grid in grids for part in grid_markdown(grid))
    return "\n\n".join(["<!-- robustmoe compare -->", *map(safe, _about(numbers)), *tables]) + "\n"


def _tex(grids: Sequence[Grid], numbers: dict[str, Any]) -> str:
    needs = (
        "% robustmoe compare; needs \\usepackage{booktabs,array,siunitx}, siunitx of version 3 (TeX Live 2021 or newer)"
    )
    about = " ".join(_about(numbers))
    tables = [grid_latex(grid, "" if at else about, f"robustmoe-{at + 1}") for at, grid in enumerate(grids)]
    text = "\n\n".join([needs, *tables]) + "\n"
    other = any(ord(mark) > LAST_LATIN for mark in text)
    return (
        text.replace("\n", "\n% a name has characters of other scripts: compile with LuaLaTeX\n", 1) if other else text
    )


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
