"""The report: run folders in, one self-contained HTML page out, with the same numbers as Markdown and JSON beside it.

Pure readers of files: nothing here runs a model or imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from robustmoe.options import several
from robustmoe.records import write_atomic
from robustmoe.reporting.collect import collect
from robustmoe.reporting.kinds import story, text
from robustmoe.reporting.markdown import markdown
from robustmoe.reporting.numbers import numbers
from robustmoe.reporting.page import page
from robustmoe.reporting.terminal import summary_table

__all__ = ["report", "story", "summary_table", "text"]


def report(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write ``out`` (``.html`` is added if it is missing; a folder gets ``report.html``) and beside it the same name
    with ``.md`` and ``.json``; return the page's path. One run may be given alone, several are set
    side by side.

    UserError if a folder is not a run, nothing was measured in it, or the files cannot be written."""
    path = Path(out)
    if path.is_dir():
        path = path / "report.html"
    elif path.suffix.lower() not in (".html", ".htm"):
        path = path.with_name(path.name + ".html")
    views = collect(several(runs))
    write_atomic(path, page(views))
    write_atomic(path.with_suffix(".md"), markdown(views))
    write_atomic(path.with_suffix(".json"), json.dumps(numbers(views), indent=1, allow_nan=False) + "\n")
    return path
