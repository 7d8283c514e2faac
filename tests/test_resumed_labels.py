"""A result that goes on is of the images that it says: labels that a file was changed in are compared with the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustmoe import cli

RECIPE = """
model = "ensemble(linear, experts=2, router=linear)"
data = "digits"
method = "standard"
epochs = 1
max_steps = 1
val_limit = 4
device = "cpu"
"""
PGD = ["--attack", "pgd(linf(0.1), steps=1)"]
CERTIFY = ["certify", "run", "--limit", "4", "--certifier", "bounds(linf(0.01), search=0)"]
KINDS = {
    "rows/fgsm-linf-0.1.jsonl": ["evaluate", "run", "--limit", "4", "--curve", "none", "--attack", "fgsm(linf(0.1))"],
    "sweep.json": ["sweep", "run", "--limit", "4", "--eps", "0.1", "--draws", "1", *PGD],
    "dissection.json": ["dissect", "run", "--limit", "4", *PGD],
    "lipschitz.json": ["lipschitz", "run", "--limit", "4", *PGD],
    "certificates/bounds-linf-0.01-search-0.json": CERTIFY,
    "blend.json": ["blend", "run", "run", "--out", "run/../blend", "--limit", "4", "--alphas", "0,0.5,1", *PGD],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resumed")
    (place / "r.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["train", "r.toml", "--out", "run"]) == 0
    return place


def of_labels(text: str, change: Callable[[list[int]], list[int]]) -> str:
    """A file with its labels changed: the column of a record, or the label of each row."""
    lines = [json.loads(line) for line in text.splitlines()]
    rows: list[dict[str, Any]] = lines[0].get("rows") or [line for line in lines if line.get("kind") == "row"]
    if rows:
        for row, label in zip(rows, change([row["label"] for row in rows]), strict=True):
            row["label"] = label
    else:
        lines[0]["labels"] = change(lines[0]["labels"])
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize("file", KINDS)
def test_changed_labels_are_told(
    file: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    path = Path("blend" if file == "blend.json" else "run", file)
    assert cli.main(KINDS[file]) == 0
    whole = path.read_text()
    labels: list[int] = []
    assert of_labels(whole, lambda own: labels.extend(own) or own)
    assert labels[::-1] != labels
    at = next(at for at in range(4) if labels[at] != labels[3 - at])
    path.write_text(changed := of_labels(whole, lambda own: own[::-1]))
    capsys.readouterr()
    assert cli.main(KINDS[file]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(path) in err
    assert (
        f"entry {at} is image {at} of class {labels[3 - at]}, but in digits image {at} is of class {labels[at]}" in err
    )
    assert path.read_text() == changed, "left as it was"
    path.write_text(of_labels(whole, lambda own: own))
    assert cli.main(KINDS[file]) == 0, "the same labels go on"


def test_an_image_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(place)
    path = Path("run/certificates/bounds-linf-0.01-search-0.json")
    assert cli.main(CERTIFY) == 0
    record = json.loads(path.read_text())
    record["rows"][2]["index"] = 10**6
    path.write_text(json.dumps(record))
    assert cli.main(CERTIFY) == 2
    assert "entry 2 is image 1000000 of class" in (err := capsys.readouterr().err)
    assert "image 1000000 is not there: the file was changed; restore it, or delete it" in err
