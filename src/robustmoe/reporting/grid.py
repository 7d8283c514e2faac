"""A table, once: as HTML, as Markdown and as lines of text for the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from robustmoe.analysis import Rate
from robustmoe.errors import printable
from robustmoe.reporting.figures import colour, of_run
from robustmoe.reporting.words import interval, percent

WIDTH = 80
"""Columns of the terminal."""

WIDE = 5  # columns of the page: beyond them, small print stands below its value
NAME, LONGEST = 24, 30  # characters of a row's name in the terminal, where the table is too wide: least, most

Entry = tuple[str, str]  # a value and its small print


@dataclass(frozen=True)
class Grid:
    """A table: the first entry of each row is its name; an entry is a value and its small print. ``strong``: the name
    of the row to be read first."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    strong: str = ""

    def texts(self) -> list[list[str]]:
        """Returns the rows with small print in brackets."""
        return [[f"{value} ({small})" if small else value for value, small in row] for row in self.rows]


def rated(rate: Rate | None) -> Entry:
    """Returns a rate and its interval."""
    return percent(rate), interval(rate)


# HTML ------------------------------------------------------------------------------------------------------------


def cell(label: str, value: str, note: str = "", kind: str = "", run: int | None = None) -> str:
    """Returns a table cell with small print; narrow screens show ``label`` beside it. ``run``: see `figures.Series`."""
    small = f"<small>{escape(note)}</small>" if note else ""
    kind = f"{kind}{of_run(run)}".strip()
    cls = f' class="{kind}"' if kind else ""
    return f'<td{cls} data-label="{escape(label)}"><span>{escape(value)}{small}</span></td>'


def grid_html(grid: Grid, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> str:
    """Returns the table with its title above and its note below. ``rows``, ``columns``: the run of each row, or of each
    column but the first, where a reader can choose among several."""
    of_rows: Sequence[int | None] = rows or [None] * len(grid.rows)
    of_columns: Sequence[int | None] = columns or [None] * (len(grid.head) - 1)
    head = f'<th scope="col">{escape(grid.head[0])}</th>'
    head += "".join(_head_html(name, run) for name, run in zip(grid.head[1:], of_columns, strict=True))
    body = "".join(_row_html(grid, row, run, of_columns) for row, run in zip(grid.rows, of_rows, strict=True))
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    kind = "data stack" if len(grid.head) > WIDE else "data stack tight"
    return (
        f"<h3>{escape(grid.title)}</h3>"
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _head_html(name: str, run: int | None) -> str:
    if run is None:
        return f'<th scope="col">{escape(name)}</th>'
    return f'<th scope="col" class="column{of_run(run)}">{run_key(run)}{escape(name)}</th>'


def _row_html(grid: Grid, row: tuple[Entry, ...], run: int | None, columns: Sequence[int | None]) -> str:
    (name, small), *entries = row
    cells = "".join(
        cell(column, *entry, kind="" if entry[0] else "none", run=of)
        for column, entry, of in zip(grid.head[1:], entries, columns, strict=True)
    )
    kind = "worst" if name == grid.strong else "plain"
    key = "" if run is None else run_key(run)
    return (
        f'<tr class="{kind}{of_run(run)}"><th scope="row">{key}{escape(name)}<small>{escape(small)}</small></th>'
        f"{cells}</tr>"
    )


def run_key(run: int) -> str:
    """Returns the dot in the colour of a run, with the space after it."""
    return f'<i class="dotkey b{colour(run)}"></i> '


# Markdown --------------------------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Returns text that Markdown shows as it is: no markup, no table cell breaks, one line."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def table_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of plain texts."""
    text = ["| " + " | ".join(safe(text) for text in row) + " |" for row in (head, *rows)]
    return "\n".join([text[0], "| " + " | ".join(["---"] * len(head)) + " |", *text[1:]])


def grid_markdown(grid: Grid) -> list[str]:
    """Returns the paragraphs of a table: title, rows, note."""
    note = [safe(grid.note)] if grid.note else []
    return [f"#### {safe(grid.title)}", table_markdown(grid.head, grid.texts()), *note]


# The terminal ----------------------------------------------------------------------------------------------------


def wrapped(text: str, start: str = "") -> list[str]:
    """Returns a sentence as lines of at most 80 columns; ``start`` stands before it and is its indent."""
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def grid_lines(grid: Grid) -> list[str]:
    """Returns a table as lines of text, after an empty line."""
    return ["", *wrapped(grid.title), *aligned([list(grid.head), *grid.texts()], last=False), *wrapped(grid.note)]


def aligned(table: list[list[str]], last: bool = True) -> list[str]:
    """Returns columns of equal width, at most 80 in all, with a rule below the head and, with ``last``, above the last
    row. Where they do not fit, the names of the rows are broken; where that is not enough, a name stands on its own
    line above its values; where the values alone do not fit, there are several tables, one below the other."""
    table = [[printable(text.replace("\n", " ")) for text in row] for row in table]  # names may come from a file
    widths = [max(len(text) for text in column) for column in zip(*table, strict=True)]
    if _total(widths) <= WIDTH:
        return _ruled([_line(row, widths) for row in table], _total(widths), last)
    values = widths[1:]
    left = WIDTH - 2 - _total(values)
    if left >= NAME:
        return _split(table, last, left)
    return _stacked(table, values, last) if left >= 0 else _split(table, last, LONGEST)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    texts = [text.ljust(width) if at == 0 else text.rjust(width) for at, (text, width) in enumerate(zip(row, widths))]
    return "  ".join(texts).rstrip()


def _ruled(lines: list[str], width: int, last: bool) -> list[str]:
    rule = "-" * width
    return [lines[0], rule, *lines[1:-1], *([rule] if last else []), lines[-1]]


def _stacked(table: list[list[str]], widths: list[int], last: bool) -> list[str]:
    blocks = []
    for name, *values in table:
        line = "  " + "  ".join(text.rjust(width) for text, width in zip(values, widths, strict=True)).rstrip()
        blocks.append("\n".join([*wrapped(name), *([line] if line.strip() else [])]))
    return "\n".join(_ruled(blocks, 2 + _total(widths), last)).split("\n")


def _split(table: list[list[str]], last: bool, longest: int) -> list[str]:
    """Returns tables of as many columns as fit, each with the names of the rows; names and heads that are long are
    broken."""
    columns = [list(column[1:]) for column in zip(*table, strict=True)][1:]
    head = [
        _broken(text, _longest([*column, *text.split()])) for text, column in zip(table[0][1:], columns, strict=True)
    ]
    widths = [_longest([*top, *column]) for top, column in zip(head, columns, strict=True)]
    names = [_broken(row[0], longest) for row in table]
    first = max(len(line) for name in names for line in name)
    lines: list[str] = []
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and _total([first, *widths[start : stop + 1]]) <= WIDTH:
            stop += 1
        chosen = [first, *widths[start:stop]]
        tops = _block([names[0], *head[start:stop]], chosen, bottom=True)
        body = [
            _block([name, *([text] for text in row[1:][start:stop])], chosen) for name, row in zip(names[1:], table[1:])
        ]
        lines += [] if start == 0 else [""]
        lines += "\n".join(_ruled(["\n".join(tops), *map("\n".join, body)], _total(chosen), last)).split("\n")
        start = stop
    return lines


def _longest(texts: Sequence[str]) -> int:
    return max((len(text) for text in texts), default=0)


def _broken(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1)) or [""]


def _block(texts: list[list[str]], widths: Sequence[int], bottom: bool = False) -> list[str]:
    """Returns one row of texts of several lines each."""
    height = max(map(len, texts))
    filled = [[""] * (height - len(text)) + text if bottom else text + [""] * (height - len(text)) for text in texts]
    return [_line([text[at] for text in filled], widths) for at in range(height)]
