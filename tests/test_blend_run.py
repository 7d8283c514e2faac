"""A blend of run folders: what it writes, how it goes on, and the verb."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustmoe as rm
from robustmoe import records
from robustmoe import spec as specs
from robustmoe.cli import main
from robustmoe.data import Data
from robustmoe.evaluation import blend_run
from robustmoe.models import build_model
from robustmoe.records import Blend
from robustmoe.training.checkpoint import save_weights

blending = importlib.import_module("robustmoe.evaluation.blending")

MOE = "ensemble(linear, experts=2, router=linear)"
QUICK = "pgd(linf(0.1), steps=2)"


@pytest.fixture(scope="module")
def digits() -> Data:
    data: Data = specs.build("digits", "data")
    return data


def make_run(folder: Path, source: Data, model: str = "linear", sharpness: float = 1.0, **changes: Any) -> Path:
    """A run folder whose classifiers choose the nearest class mean (of the images' pixels), with a ``sharpness``; the
    k-th leaves out the pixels of row k.
    """
    config = {
        "model": model, "data": "digits", "method": "at(pgd(linf(0.05), steps=1))", "threat": "linf(0.05)",
        "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.0], "std": [1.0], "attacks": ["fgsm(linf(0.05))"],
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    built = build_model(model, 10, (1, 8, 8), (0.0,), (1.0,))
    batch = source.train.batch(list(range(400)))
    means = torch.stack([batch.x[batch.y == c].flatten(1).mean(0) for c in range(10)])
    heads = [m for m in built.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    with torch.no_grad():
        for k, head in enumerate(heads):
            kept = means.clone()
            kept[:, 8 * k : 8 * k + 8] = 0
            head.weight.copy_(2 * sharpness * kept)
            head.bias.copy_(-sharpness * kept.square().sum(1))
    save_weights(folder / "model.safetensors", built.state_dict(), model)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: Data) -> Path:
    """A folder with the runs "one", sharp and dense, "two", softer and routed, and some that do not fit them."""
    place = tmp_path_factory.mktemp("blend")
    make_run(place / "one", digits, sharpness=4.0)
    make_run(place / "two", digits, MOE)
    make_run(place / "other", digits, data="digits(val=0.2)")
    make_run(place / "fewer", digits, num_classes=3)
    (place / "empty").mkdir()
    return place


@pytest.fixture
def runs(place: Path) -> tuple[Path, Path]:
    return place / "one", place / "two"


SETTINGS: dict[str, Any] = {"alphas": [0.0, 0.6, 0.9, 1.0], "attack": QUICK, "limit": 20, "seed": 5}


def test_the_blend_is_a_run_folder(runs: tuple[Path, Path], tmp_path: Path, digits: Data) -> None:
    """Its model is the blend at the chosen alpha; at 0.7 where none is."""
    out, settings = tmp_path / "blended", {**SETTINGS, "mix": "logits"}
    x = digits.test.batch(list(range(20))).x
    standard, robust = (rm.load_model(run) for run in runs)
    for clean, chosen in ((0.5, 1.0), (None, None)):
        found = blend_run(*runs, **settings, clean=clean, out=out)
        assert records.Blend.read(out) == found
        assert found.chosen == chosen
        alpha = 0.7 if chosen is None else chosen
        assert torch.allclose(rm.load_model(out)(x), (1 - alpha) * standard(x) + alpha * robust(x), atol=1e-5)
    assert (found.standard, found.robust, found.mix) == (str(runs[0]), str(runs[1]), "logits")
    assert (found.header.run, found.header.attack) == (str(out), "pgd(linf(0.1), steps=2, seed=5)")
    assert [found.predicted[0], found.predicted[3]] == [half(x).argmax(1).tolist() for half in (standard, robust)]
    val = digits.val.batch(list(range(len(digits.val))))
    assert found.validation[3] == pytest.approx((robust(val.x).argmax(1) == val.y).float().mean().item())


def test_a_stopped_blend_goes_on(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = blend_run(*runs, **SETTINGS, out=tmp_path / "whole")
    assert {attack for row in whole.broken for attack in row} >= {-1, 0}
    out, real, write, calls = tmp_path / "out", blending.attack_alpha, Blend.write, []

    def stopped(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    def killed(found: Blend, folder: Path) -> Path:
        if found.attacked == 3:
            raise KeyboardInterrupt
        return write(found, folder)

    monkeypatch.setattr(blending, "attack_alpha", stopped)
    with pytest.raises(KeyboardInterrupt):
        blend_run(*runs, **SETTINGS, out=out)
    left = records.Blend.read(out)
    assert left is not None
    assert (left.attacked, [row.count(-1) for row in left.broken][2:]) == (
        2,
        [row.count(-1) for row in whole.broken][2:],
    )
    assert [file.name for file in out.glob("blend-start*")] == ["blend-start-2.safetensors"]
    monkeypatch.setattr(Blend, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        blend_run(*runs, **SETTINGS, out=out)
    monkeypatch.setattr(Blend, "write", write)
    found = blend_run(*runs, **SETTINGS, out=out)
    assert (found.broken, found.predicted, found.validation) == (whole.broken, whole.predicted, whole.validation)
    assert not list(out.glob("blend-start*"))
    calls.clear()
    done = blend_run(*runs, **SETTINGS, clean=0.1, batch_size=3, out=out)
    assert calls == [], "nothing is attacked again, whatever alpha is wanted"
    assert (done.broken, done.chosen, done.seconds) == (found.broken, 1.0, found.seconds)
    assert capsys.readouterr().err == ""
    calls[:] = [1] * 3
    other = blend_run(*runs, **{**SETTINGS, "alphas": [0.5, 1.0]}, out=out)
    assert other.attacked == 2
    blend_run(*runs, **{**SETTINGS, "alphas": [0.5, 1.0], "limit": 4}, mix="logits", out=out)
    assert re.sub(r"\S+/", "", capsys.readouterr().err) == (
        "blend.json is of another list of alphas; it is kept as blend.json.old1 and made anew\n"
        "blend.json is of another model; it is kept as blend.json.old2 and made anew\n"
    )


def test_warm_starts_that_are_gone(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {**SETTINGS, "alphas": [0.5, 1.0], "limit": 6, "out": tmp_path / "out"}
    found = blend_run(*runs, **settings)
    replace(found, attacked=1).write(tmp_path / "out")
    again = blend_run(*runs, **settings)
    assert (
        "is of another pass, whose warm starts are gone; it is kept as blend.json.old1 and made anew"
        in capsys.readouterr().err
    )
    assert again.broken == found.broken


def test_one_run_of_a_dual_model(tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"dual(linear, {MOE}, alpha=0.6, sharpen=scaled(scale=3))"
    run = make_run(tmp_path / "dual", digits, spec, method="jtdmoe(pgd(linf(0.05), steps=1))")
    monkeypatch.chdir(tmp_path)
    found = blend_run(run, alphas=[0.6, 1.0], limit=10)
    assert (found.header.run, found.header.attack) == ("runs/blend-dual", "pgd(linf(0.05), steps=20)"), "of the run"
    assert (found.mix, found.sharpen) == ("probabilities", "scaled(scale=3)")
    assert (found.standard, found.robust) == (f"{run}, standard", f"{run}, robust")
    assert list(found.header.routers) == ["robust.router"]
    x = digits.test.batch(list(range(10))).x
    assert torch.equal(rm.load_model("runs/blend-dual")(x), rm.load_model(run)(x)), "at its own alpha"
    assert found.predicted[0] == rm.load_model(run)(x).argmax(1).tolist()
    config = json.loads(Path("runs/blend-dual/config.json").read_text())
    assert config["method"] == "jtdmoe(pgd(linf(0.05), steps=1))"


# ------------------------------------------------------------------------------------------------ the verb


def test_the_verb_from_end_to_end(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    words = ["--alphas", "0,0.8,1", "--attack", QUICK, "--limit", "12", "--clean", "0.3", "--sharpen", "scaled(2)"]
    assert main(["blend", *map(str, runs), *words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith(f"run folder: {out}\nnext: robustmoe evaluate {out}; report shows the curve")
    assert "0.8" in text
    assert json.loads((out / "config.json").read_text())["attacks"] == ["fgsm(linf(0.05))"], "of the robust run"
    assert main(["evaluate", str(out), "--limit", "12", "--curve", "none"]) == 0
    assert main(["dissect", str(out), "--limit", "2", "--attack", "pgd(linf(0.1), steps=1)"]) == 0
    assert main(["check", str(out), "--limit", "4", "--only", "H6,R13"]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    numbers = json.loads((tmp_path / "page.json").read_text())["runs"][0]
    assert numbers["blend"] is not None
    found = records.Blend.read(out)
    assert found is not None
    assert numbers["headline"]["clean"]["count"] == 12 - found.broken[2].count(-2)


@pytest.mark.parametrize(
    "words, message",
    [
        ("one two --alphas 0,2", "2 is no alpha; expected shares of the robust half, from 0"),
        ("one two --alphas some", "'some' is not a list of numbers"),
        ("one two --alphas []", "there is no alpha; expected at least one"),
        ("one other", "one and other are of different data, digits and digits(val=0.2); expected two runs of the same"),
        ("one fewer", "one and fewer are of different classes, 10 and 3; expected"),
        ("one", "one is of one model, linear, expected a dual model; or name two runs"),
        ("one gone", "there is no run folder 'gone'"),
        ("one empty", "empty: not a run folder"),
        ("one two one", "blend takes two runs or models, or one run of a dual model; got 3"),
        ("one two --attack apgd(linf(0.1))", "a blend makes its attacks from one pgd on the whole model"),
        ("one two --attack pgd(", "cannot read 'pgd('"),
        ("one two --mix both", "--mix must be one of 'probabilities', 'logits'"),
        ("one two --sharpen nutz", "unknown sharpening 'nutz'; did you mean 'nuts'"),
        ("one two --sharpen scaled(0)", "scale must be above 0; got 0"),
        ("one two --clean 95", "the clean accuracy wanted is 95, expected a share from 0 to 1"),
        ("one two --limit 0", "the limit on images is 0"),
        ("one two --batch-size 0", "the batch size is 0"),
        ("one two --out two", "'two' is not empty, and no blend's; choose another --out"),
        ("one two --out one/config.json", "'one/config.json' is a file, not a run folder"),
        ("one two --device cuda:99", "device 'cuda:99' cannot be used here"),
        ("", "blend takes two runs or models, or one run of a dual model; got 0"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: str,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(["blend", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(place.rglob("*")) == before
