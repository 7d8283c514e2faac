"""The report: run folders in, one self-contained HTML page out, with the same numbers as Markdown and JSON beside it.

Pure readers of files: nothing here runs a model or imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from robustmoe.errors import UserError, printable
from robustmoe.options import several
from robustmoe.records import Audit, assert_ours, write_own
from robustmoe.reporting.collect import collect
from robustmoe.reporting.figure_files import figure_writer
from robustmoe.reporting.kinds import KINDS, story, text
from robustmoe.reporting.markdown import markdown
from robustmoe.reporting.numbers import numbers
from robustmoe.reporting.page import MARK, page
from robustmoe.reporting.terminal import summary_table

__all__ = ["report", "story", "summary_table", "text"]


MARKS = {"": MARK, ".md": "<!-- robustmoe report -->", ".json": '{"kind":"robustmoe report"'}
"""By its ending ("": the page), what shows that a file is an earlier report's, which a new one may overwrite."""


NOT_PAGES = (".md", ".json", ".csv", ".tex", ".txt", ".pdf", ".png", ".svg", ".xlsx", ".docx")
"""Endings of files that a report is not written as."""


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    figures: str | os.PathLike[str] | None = None,
    format: str = "svg",
) -> Path:
    """Write ``out`` (``.html`` is added if it is missing; a folder gets ``report.html``) and beside it the same name
    with ``.md`` and ``.json``; return the page's path. One run may be given alone, several are set
    side by side. ``figures``: a folder that gets every figure as a file, svg, or png or pdf (extra ``figures``).

    UserError if a folder is not a run, nothing was measured in it, or the files cannot be written. Nothing but an
    earlier report is overwritten."""
    files = report_files(out)
    draw = None if figures is None else figure_writer(figures, format)
    views = collect(several(runs))
    if draw is not None:
        draw(views)
    texts = (
        printable(page(views)),
        printable(f"{MARKS['.md']}\n{markdown(views)}"),
        json.dumps(numbers(views), indent=1, allow_nan=False) + "\n",
    )
    for (path, mark), content in zip(files.items(), texts):
        write_own(path, content, mark)
    return next(iter(files))


def report_files(out: str | os.PathLike[str]) -> dict[Path, str]:
    """Returns the files of a report at ``out``, the page first, and the mark of each. UserError where one of them is
    there and no report's, or would stand in a run folder under the name of a result."""
    path = Path(out)
    if path.suffix.lower() in NOT_PAGES:
        raise UserError(
            f"{path}: a report is one HTML page, with the same numbers as .md and .json beside it; expected an --out "
            "that ends in .html (--figures FOLDER writes its figures, robustmoe compare tables as .csv and .tex)"
        )
    if path.is_dir():
        path = path / "report.html"
    elif path.suffix.lower() not in (".html", ".htm"):
        path = path.with_name(path.name + ".html")
    files = {path if ending == "" else path.with_suffix(ending): mark for ending, mark in MARKS.items()}
    names = ("config.json", Audit.file, *(str(kind.record.file) for kind in KINDS))
    in_run = any((f / part).exists() for f in (path.parent, path.parent.parent) for part in ("config.json", "rows"))
    for file, mark in files.items():
        if in_run and any(file.match(name) for name in names):
            raise UserError(f"{path}: {file.name} beside it is the name of a result of a run; choose another --out")
        assert_ours(file, mark)
    return files
