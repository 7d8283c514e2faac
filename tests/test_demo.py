"""The demo, with two steps of training instead of its epochs: `make demo` runs the whole."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from robustmoe import demo
from robustmoe.errors import UserError
from robustmoe.records import Certificates, read
from robustmoe.training.checkpoint import read_config

measuring = importlib.import_module("robustmoe.evaluation.measuring")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUTED", "DENSE", "PROVABLE"):
        recipe = getattr(demo, name)
        quick = tuple(attack.replace("steps=20", "steps=1, keep=first") for attack in recipe.attacks[:3])
        quick += tuple(attack.replace("steps=20", "steps=1") for attack in recipe.attacks[3:])
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
def test_demo_makes_three_runs_and_one_report_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = demo.demo(tmp_path / "demo")
    assert page == tmp_path / "demo" / "report.html"
    assert "pathway" in page.read_text()
    rows = {run: list((tmp_path / "demo" / run / "rows").glob("*.jsonl")) for run in demo.RUNS}
    main = {
        run: [f for f in files if not f.name.endswith(("curve.jsonl", "examples.jsonl"))] for run, files in rows.items()
    }
    assert {run: len(files) for run, files in main.items()} == {"pathway": 4, "dense": 1, "certified": 4}
    assert len(read(main["dense"][0]).rows) == 359
    proofs = {run: Certificates.read_all(tmp_path / "demo" / run) for run in demo.RUNS}
    assert all(len(one.rows) == 2 and one.done for found in proofs.values() for one in found)
    assert {run: [(one.certifier, one.subject) for one in found] for run, found in proofs.items()} == {
        "pathway": [("bounds(linf(0.1), search=0)", "model"), ("smoothing(n=500)", "smoothed model")],
        "dense": [("bounds(linf(0.1), search=0)", "model")],
        "certified": [("bounds(linf(0.1), search=3)", "model")],
    }
    assert "The certifiers side by side" in page.read_text()
    (tmp_path / "demo" / "dense" / "state.pt").unlink()
    for name in ("ROUTED", "DENSE", "PROVABLE"):  # one attack and one certifier a run: what is repeated is the rest
        recipe = getattr(demo, name)
        monkeypatch.setattr(demo, name, dataclasses.replace(recipe, attacks=recipe.attacks[:1]))
    monkeypatch.setattr(demo, "RUNS", dict.fromkeys(demo.RUNS, (demo.BOUNDS,)))
    assert demo.demo(tmp_path / "demo", seed=3) == page
    assert (tmp_path / "demo" / "dense" / "state.pt").exists(), "made anew"
    assert {read_config(tmp_path / "demo" / run)["seed"] for run in demo.RUNS} == {3}


def test_demo_deletes_nothing_of_a_users(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "pathway").mkdir()
    with pytest.raises(UserError, match=r"holds other things than a demo \(thesis.tex\); choose another --out"):
        demo.demo(tmp_path)
    assert (tmp_path / "pathway").is_dir()
    with pytest.raises(UserError, match="is a file; expected a folder for the demo"):
        demo.demo(tmp_path / "thesis.tex")
