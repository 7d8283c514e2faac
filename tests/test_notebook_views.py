"""What public functions give shows itself in a notebook with all that it says as text: no doubt is left out there."""

from __future__ import annotations

import html
import re
from pathlib import Path

from robustmoe.evaluation.auditing import Audited
from robustmoe.records import Records, read, rows_files
from robustmoe.reporting.comparison import compare
from robustmoe.weights.fitting import Fit
from robustmoe.weights.loading import Loaded
from test_report import R1_FAILED, make_run


def plain(markup: str) -> str:
    """The text of some HTML, also of the frames in it."""
    inner = " ".join(html.unescape(frame) for frame in re.findall(r'srcdoc="([^"]*)"', markup))
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", f"{markup} {inner}")).replace("\xa0", " ").split())


def test_a_comparison_says_its_verdicts_and_notes(tmp_path: Path) -> None:
    some = {"curve": False, "examples": False}
    bad, good = (
        make_run(tmp_path, name="bad", r1=R1_FAILED, **some),
        make_run(tmp_path, name="good", model_hash="0ther", model="resnet18", **some),
    )
    comparison = compare([bad, good])
    shown = plain(comparison._repr_html_())
    assert any("cannot be quoted" in note for note in comparison.notes)
    for sentence in [comparison.setting, *comparison.verdicts(), *comparison.notes]:
        assert " ".join(sentence.split()) in shown


def test_an_audit_shows_its_results_and_what_was_not_wrapped(tmp_path: Path) -> None:
    run = make_run(tmp_path, r1=R1_FAILED, curve=False, training=False, examples=False)
    results = Records(read(path) for path in rows_files(run))
    done = Audited(run, results, "a <router> that no codec reads")
    assert "do NOT quote this number" in str(done)
    for text in (str(done), plain(done._repr_html_())):
        assert "not wrapped: a <router> that no codec reads" in text
        assert str(run) in text
    assert "<router>" not in done._repr_html_()


def test_loaded_weights_show_their_notes() -> None:
    fields = dict.fromkeys(Fit.__dataclass_fields__, ())
    fit = Fit(**{**fields, "layout": "ours", "given": {}, "changed": {}, "group": "", "prefix": ""})  # type: ignore[arg-type]
    loaded = Loaded(Path("a.pt"), fit, ("head.bias",), ("its means are not known",))
    assert "note: its means are not known" in repr(loaded)
    assert "head.bias" in repr(loaded)
