"""The table of checks: what a declaration puts there, and that docs/checks.md has a row for each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustmoe.evaluation.checks import CHECKS, Answer, Subject, check, ids, not_run
from robustmoe.records import Check

PAGE = Path(__file__).parents[1] / "docs" / "checks.md"


def test_every_check_has_one_row_in_the_docs_and_no_row_is_left_over() -> None:
    rows = re.findall(r"^\| ([HGR]\d+) \|", PAGE.read_text(), flags=re.M)
    assert rows == ids()


def test_the_docs_name_the_cheap_checks() -> None:
    page = " ".join(PAGE.read_text().split())
    told = re.search(r"and do not run the attack: (.*?); and, from what the attack left, (.*?)\.", page)
    assert told is not None
    assert re.findall(r"[HGR]\d+", told.group(1)) == ids("cheap")
    assert re.findall(r"[HGR]\d+", told.group(2)) == ids("after")


def test_every_check_is_asked_by_the_deep_ones() -> None:
    assert ids("model", "attack") == ids()


def test_a_declaration_is_all_that_a_check_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustmoe.evaluation.checks.registry.CHECKS", before := dict(CHECKS))

    @check("R99", "toy", "model", "cheap")
    def toy(case: Subject) -> Answer:
        """A check for this test."""
        return not_run("it is a toy")

    assert ids() == [*ids()[:-1], "R99"]
    assert "R99" in ids("cheap")
    assert "R99" not in ids("attack")
    assert toy(None) == Check("R99", "toy", "not run", None, "it is a toy")  # type: ignore[arg-type]
    assert before["R99"].asked.keys() == {"model", "cheap"}
    with pytest.raises(ValueError, match="check R99 has a function for 'model' already"):
        check("R99", "toy", "model")
    with pytest.raises(ValueError, match="check R99 is 'toy' already; got 'another'"):
        check("R99", "another", "after")
