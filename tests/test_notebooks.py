"""The notebooks of examples/ run, and show what they are committed with, but for the numbers."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from blocks import check_python
from notebooks import NOTEBOOKS, ROOT, executed

COUNT, LARGEST = 3, 40_000  # notebooks, and bytes of one
ALIKE = 0.8  # of a cell's words: another CPU may say "unclear" where this one says "experts"


def said(cell: dict[str, Any]) -> list[str]:
    """The words that a cell prints, numbers apart, and the kinds of what else it shows."""
    text = "".join("".join(output.get("text", "")) for output in cell.get("outputs", ()))
    kinds = [kind for output in cell.get("outputs", ()) for kind in output.get("data", {})]
    return re.sub(r"[\d.–!#%]+|-{5,}|\s+", " ", text).split() + kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_says_nothing_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"/(home|root|tmp|Users|work)/|execution\"|stderr", text)
    notebook = json.loads(text)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    told = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert all(words in told for words in ("**The question.**", "**What you will see.**", "## What it means", "differ"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "python -m tests.notebooks"
    for cell in code:
        check_python("".join(cell["source"]))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == COUNT
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.\w+)\)", page)) == {path.name for path in (ROOT / "examples").glob("*.[ip]*")}


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_a_notebook_runs_and_shows_what_it_is_committed_with(path: Path, tmp_path: Path) -> None:
    there, made = json.loads(path.read_text(encoding="utf-8")), executed(path, tmp_path)
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in there["cells"]]
    for old, new in zip(there["cells"], made["cells"], strict=True):
        if old["cell_type"] == "code":
            alike = difflib.SequenceMatcher(None, said(old), said(new)).ratio()
            assert alike >= ALIKE, f"{alike:.2f} of what this cell shows is as committed:\n{''.join(old['source'])}"
