"""The demo, with two steps of training instead of its epochs: `make demo` runs the whole."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from robustmoe import demo
from robustmoe.errors import UserError
from robustmoe.records import Certificates, read

measuring = importlib.import_module("robustmoe.evaluation.measuring")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUTED", "DENSE", "PROVABLE"):
        recipe = getattr(demo, name)
        attacks = recipe.attacks or (f"pgd({demo.EPS}, steps=20)",)
        quick = tuple(attack.replace("steps=20", "steps=1, keep=first") for attack in attacks[:3])
        quick += tuple(attack.replace("steps=20", "steps=1") for attack in attacks[3:])
        changes = {
            "model": recipe.model.replace("width=16", "width=4"),
            "epochs": 1,
            "max_steps": 2,
            "val_limit": 8,
            "val_attack": None,
            "attacks": quick,
            "val_certifier": None,
        }
        monkeypatch.setattr(demo, name, dataclasses.replace(recipe, **changes))
    monkeypatch.setattr(demo, "CERTIFIED", 2)
    monkeypatch.setattr(measuring, "CURVE_LIMIT", 8)


@pytest.mark.usefixtures("short")
def test_demo_makes_three_runs_and_one_report_and_goes_on_where_it_was(tmp_path: Path) -> None:
    page = demo.demo(tmp_path / "demo")
    assert page == tmp_path / "demo" / "report.html"
    assert "pathway" in page.read_text()
    rows = {run: list((tmp_path / "demo" / run / "rows").glob("*.jsonl")) for run in demo.RUNS}
    main = {
        run: [f for f in files if not f.name.endswith(("curve.jsonl", "examples.jsonl"))] for run, files in rows.items()
    }
    assert {run: len(files) for run, files in main.items()} == {"pathway": 4, "dense": 1, "certified": 4}
    rows_then = read(main["dense"][0]).rows
    assert len(rows_then) == 359
    proofs = {run: Certificates.read_all(tmp_path / "demo" / run) for run in demo.RUNS}
    assert all(len(one.rows) == 2 and one.done for found in proofs.values() for one in found)
    assert {run: [(one.certifier, one.subject) for one in found] for run, found in proofs.items()} == {
        "pathway": [("bounds(linf(0.1), search=0)", "model"), ("smoothing(n=500)", "smoothed model")],
        "dense": [("bounds(linf(0.1), search=0)", "model")],
        "certified": [("bounds(linf(0.1), search=3)", "model")],
    }
    assert "The certifiers side by side" in page.read_text()
    kept = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    made = [
        path for path in kept if {"rows", "certificates"} & set(path.parts) or path.suffix in (".safetensors", ".pt")
    ]
    assert len(made) > 20
    broken = tmp_path / "demo" / "dense" / "rows" / main["dense"][0].name
    broken.write_bytes(b"".join(kept[broken].splitlines(keepends=True)[:3]))  # killed in the first attack of `dense`
    assert demo.demo(tmp_path / "demo") == page
    for path in made:
        if path == broken:
            assert read(path).rows == rows_then
        else:
            assert path.read_bytes() == kept[path], path
    with pytest.raises(UserError, match=r"pathway is another run than the demo's: its seed is 1, expected 3; choose"):
        demo.demo(tmp_path / "demo", seed=3)


def test_demo_deletes_nothing_of_a_users(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "pathway").mkdir()
    with pytest.raises(UserError, match=r"holds other things than a demo \(thesis.tex\); choose another --out"):
        demo.demo(tmp_path)
    assert (tmp_path / "pathway").is_dir()
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="dense: not a run folder"):
        demo.demo(tmp_path)
    (tmp_path / "dense" / "config.json").write_text(
        '{"model": "resnet8", "num_classes": 2, "image_shape": [1, 8, 8], "mean": [0], "std": [1]}'
    )
    with pytest.raises(UserError, match="dense is another run than the demo's: its model is 'resnet8', expected"):
        demo.demo(tmp_path)
    assert (tmp_path / "dense" / "notes.txt").read_text() == "mine"
    assert list((tmp_path / "pathway").iterdir()) == []
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a folder for the demo"):
        demo.demo(tmp_path / "thesis.tex")
