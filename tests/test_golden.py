"""What the report says, word for word: one Markdown file a section, of fixed records; other tests look at numbers.

After a change of words: ``PYTHONPATH=src:tests python tests/test_golden.py`` writes the files anew; read the diff.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import test_blend_report
import test_certify_report
import test_dissection
import test_laboratory
import test_misroute
import test_report
import test_sweep
from robustmoe.records import Audit, Check, Record
from robustmoe.reporting import story, summary_table, text
from robustmoe.reporting.collect import collect, of_kind
from robustmoe.reporting.grid import safe
from robustmoe.reporting.kinds import KINDS, kind_of, summary
from robustmoe.reporting.markdown import markdown
from robustmoe.reporting.panel import Shown, as_markdown

GOLDEN = Path(__file__).parent / "golden"
blend, proof = test_blend_report.make_blend, test_certify_report.proof


def section(record: Record, *evaluations: Any) -> str:
    """The section of one record."""
    kind = kind_of(record)
    return "\n\n".join(as_markdown(kind, Shown(record, summary(record, evaluations)))) + "\n"


def stories(records: dict[str, tuple[Any, ...]]) -> str:
    """What is said of variants of a record, a paragraph each."""
    return "\n\n".join(f"{name}: {' '.join(story(*given).split())}" for name, given in records.items()) + "\n"


def blends() -> str:
    plain = test_blend_report.PLAIN
    return stories(
        {
            "nothing proven": (blend(certified=[[False] * 10] * 4),),
            "none chosen": (blend(chosen=None, wanted=0.95),),
            "not attacked": (blend(attacked=0),),
            "unfinished": (blend(**plain, attacked=2),),
            "no attack": (blend(attacks=[], broken=[[-1] * 10] * 4),),
        }
    )


def certificates() -> str:
    record, attacked = test_certify_report.record, test_certify_report.attacked
    dense = record([proof(0, reachable=1, stable=1.0)])
    dense = dataclasses.replace(dense, header=dataclasses.replace(dense.header, routers={}))
    smoothed = {"reachable": None, "proven": None}
    rows = [proof(0, 0.3, stable=0.9, **smoothed), proof(1, 0.1, stable=0.5, **smoothed),
            proof(2, prediction=-1, **smoothed)]  # fmt: skip
    header = dataclasses.replace(record(rows).header, norm="l2", eps=0.25)
    return stories(
        {
            "attacked": (record(), (attacked({3: 0.09, 4: 0.1}),)),
            "small radii": (record([proof(0, 0.02, proven=1), proof(1)]),),
            "no radius": (record([proof(0), proof(1)]),),
            "dense": (dense,),
            "all proven": (record([proof(0, 0.1, proven=2)]),),
            "by a formula": (record([proof(0, proven=None)]),),
            "smoothed": (record(rows, subject="smoothed model", header=header),),
        }
    )


def sweeps() -> str:
    record, point = test_sweep.record, test_sweep.point
    weak, strong = test_sweep.WEAK, test_sweep.STRONG
    return stories({"weak beside strong": (record(points=[point(weak, 0.1, {0}), point(strong, 0.1, {0, 1, 2})]),)})


def full(folder: Path, name: str, **changes: Any) -> Path:
    """A run with every kind of record."""
    run = test_report.make_run(folder, name=name, **changes)
    makers: list[Callable[[], Record]] = [
        test_sweep.record, test_dissection.record, test_laboratory.record, blend, test_certify_report.record,
    ]  # fmt: skip
    for make in makers:
        record: Any = make()
        dataclasses.replace(record, header=dataclasses.replace(record.header, model_hash="m0de1234")).write(run)
    return run


def evaluation(folder: Path) -> str:
    """A run with rows, a suite with its parts, an unfinished attack, a wrong answer, and deep checks."""
    run = test_report.make_run(folder)
    deep = [Check("X9", "deep", "pass", 9, "Deep sentence."), Check("X1", "warning", "warn", {"a": 1}, "Look at this.")]
    Audit("m0de1234", ["fgsm"], 64, 0, deep).write(run)
    test_report.write_rows(run, "suite", *test_report.make_suite(), [test_report.R1])
    header = test_report.make_header(attack="square(linf(8/255))")
    failed = Check("H4", "same answer alone", "fail", 8, "8 of 256 images change their answer in a batch of one.")
    test_report.write_rows(run, "square", header, test_report.make_rows(header, 0.1, seed=9), [failed])
    header = test_report.make_header(attack="fab(linf(8/255))")
    test_report.write_rows(run, "fab", header, test_report.make_rows(header, 0.1, seed=9, n=37), None)
    return markdown(collect([run]))


def runs(folder: Path) -> str:
    """What several runs are compared by, and what a run without rows says: the page's beginning."""
    bare = test_blend_report.make_folder(folder, "bare")
    views = collect([full(folder, "first"), full(folder, "second", data_hash="other"), bare])
    told = markdown(views).split("\n## ")
    return "\n## ".join(
        part.replace(safe(str(folder)), "") for part in told if not part.startswith(("first", "second"))
    )


SECTIONS: dict[str, Callable[[Path], str]] = {
    "evaluation": evaluation,
    "runs": runs,
    "sweep": lambda folder: section(test_sweep.record()) + "\n" + sweeps(),
    "dissection": lambda folder: section(test_dissection.record()) + "\n" + stories({"weak": (test_misroute.weak(),)}),
    "lipschitz": lambda folder: section(test_laboratory.record()),
    "blend": lambda folder: section(blend()) + "\n" + blends(),
    "certificates": lambda folder: section(test_certify_report.record()) + "\n" + certificates(),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_words(name: str, tmp_path: Path) -> None:
    assert SECTIONS[name](tmp_path) == (GOLDEN / f"{name}.md").read_text()


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    """Every story, number and note of every kind, also where several runs are compared."""
    runs = [full(tmp_path, "first"), full(tmp_path, "second", data_hash="other")]
    page, _, _, _ = test_report.made(runs, tmp_path)
    told: list[str] = []
    views = collect(runs)
    for kind in KINDS:
        every = of_kind(views, kind.name)
        both = kind.compare(every)
        grids = [] if both is None else [both]
        for shown in every:
            panel = kind.panel(shown)
            told += [panel.story, panel.setting, *kind.doubts(shown)]
            grids += panel.grids
        for grid in grids:
            told += [grid.title, grid.note, *grid.head, *(part for row in grid.rows for entry in row for part in entry)]
    assert len(told) > 1000
    shown_text = page.text.replace("\xa0", " ")
    assert [words for words in told if " ".join(words.split()) not in shown_text] == []


def test_no_line_of_the_terminal_is_longer_than_80_columns(tmp_path: Path) -> None:
    run = full(tmp_path, "run")
    view = collect([run])[0]
    told = [summary_table(view.results)]
    for every in view.shown.values():
        for shown in every:
            told += [str(shown.record), text(shown.record, view.results)]
    lines = "\n".join(told).splitlines()
    assert len(lines) > 200
    assert [line for line in lines if len(line) > 80] == []


def test_a_notebook_shows_the_record() -> None:
    shown = test_sweep.record()._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "Sweep over eps" in shown
    assert "<script" not in shown


if __name__ == "__main__":
    for name, make in SECTIONS.items():
        with tempfile.TemporaryDirectory() as place:
            (GOLDEN / f"{name}.md").write_text(make(Path(place)))
