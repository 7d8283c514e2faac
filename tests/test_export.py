"""A run's model for other code: the way back of every layout, and a folder to share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from golden_weights import FOLDER, read_case
from robustmoe import cli
from robustmoe.errors import UserError
from robustmoe.training import load_model
from robustmoe.weights import export_run, import_run
from robustmoe.weights.reading import read_groups

CASE = next(path for path in sorted(FOLDER.glob("vmoe*.json")) if read_case(path).weights)
SPEC = "vit_moe(size=tiny, width=8, depth=2, heads=2, patch=4, experts=2, k=1, placement=(1,))"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of weights in V-MoE's layout."""
    case = read_case(CASE)
    weights = {name: torch.from_numpy(value) for name, value in case.tensors().items()}
    torch.save(weights, tmp_path / "theirs.pt")
    shape = tuple(map(float, case.image_shape))
    options = {"classes": case.num_classes, "image_shape": shape}
    return import_run(tmp_path / "theirs.pt", case.model, out=tmp_path / "run", **options).folder


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".npz"])
def test_imported_and_exported_again_is_equal(run: Path, tmp_path: Path, ending: str) -> None:
    said = export_run(run, tmp_path / f"back{ending}")
    assert "in the layout 'vmoe'" in said
    assert "note: not in it: the model takes (pixels - [0.5, 0.5, 0.5]) / [0.5, 0.5, 0.5]" in said
    before = read_groups(tmp_path / "theirs.pt")[""]
    after = read_groups(tmp_path / f"back{ending}")[""]
    assert {name.replace(".", "/") for name in before} == {name.replace(".", "/") for name in after}
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    with pytest.raises(UserError, match="is there already"):
        export_run(run, tmp_path / f"back{ending}")


def test_what_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    for out, layout, said in (
        ("a.bin", None, r"ends in one of \.safetensors, \.pt, \.pth, \.npz, \.onnx"),
        ("a.pt", "optml", "the code of the layout 'optml' has no such model"),
        ("a.pt", "vmo", "there is no layout 'vmo'; did you mean 'vmoe'"),
        ("a.onnx", "vmoe", "in no layout; leave --layout out"),
    ):
        with pytest.raises(UserError, match=said):
            export_run(run, tmp_path / out, layout)
        assert not (tmp_path / out).exists()


def test_a_folder_to_share_is_a_run_with_a_model_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "zoo:digits_pathway", "--attack", "fgsm(linf(0.1))", "--limit", "4"]) == 0
    assert cli.main(["export", "zoo:digits_pathway", "--out", "shared"]) == 0
    card = Path("shared/README.md").read_text()
    assert card.startswith("---\nlibrary_name: robustmoe\n")
    assert "fgsm(linf(0.1))" in card
    assert "keeps" in card
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model("shared")(x), load_model("runs/zoo-digits_pathway")(x))
    assert not {path.name for path in Path("shared").iterdir()} - {"README.md", "config.json", "model.safetensors"}
    capsys.readouterr()
    for wrong, said in (
        (["--out", "shared"], "is there already, and holds something"),
        ([], "expected --out"),
        (["--out", "folder", "--layout", "optml"], "leave --layout out"),
    ):
        assert cli.main(["export", "zoo:digits_pathway", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_was_never_measured_has_no_card_to_share(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    (tmp_path / "run").mkdir()
    config = {"model": "linear", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "shared")]) == 2
    assert not (tmp_path / "shared").exists()


def test_a_run_whose_origin_is_spoilt_is_one_line_or_is_exported(run: Path, tmp_path: Path) -> None:
    file = run / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "imported": {"layout": "vmo"}}))
    with pytest.raises(UserError, match=r"there is no layout 'vmo'; did you mean 'vmoe'"):
        export_run(run, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    assert "in the layout 'vmoe'" in export_run(run, tmp_path / "a.pt", "vmoe")
