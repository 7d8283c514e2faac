"""`--model my_file.py:make_model` in the place of a run: every measuring verb, and the folder that it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import robustmoe as rm
from robustmoe import records, spec
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation.own_run import own_run

MINE = """
import torch, robustmoe as rm

def routed(seed=0):
    return rm.build_model("ensemble(linear, experts=2, router=linear, gate=hard)", 10, (1, 8, 8), seed=seed)

def dense():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def function():
    return lambda x: x.flatten(1)[:, :10]
"""
ROUTED = ["--model", "mine.py:routed", "--data", "digits"]
FEW = {
    "evaluate": ["--attack", "pgd(linf(0.1), steps=1)", "--curve", "none"],
    "check": ["--only", "H4"],
    "dissect": ["--attack", "pgd(linf(0.1), steps=1)"],
    "lipschitz": ["--attack", "pgd(linf(0.1), steps=1)"],
    "certify": ["--certifier", "bounds(linf(0.01), search=0)"],
    "sweep": ["--attack", "fgsm(linf(0.1))", "--eps", "0.05,0.1", "--draws", "0"],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_every_measuring_verb_takes_a_model_and_then_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, flags in FEW.items():
        assert main([verb, *ROUTED, "--limit", "2", *flags, "--device", "cpu"]) == 0
        assert "run folder: runs/mine-routed" in capsys.readouterr().err
    headers = [
        records.read(records.rows_files("runs/mine-routed")[0]).header,
        *(kind.read_all("runs/mine-routed")[0].header for kind in (records.Dissection, records.Lipschitz)),
        *(kind.read_all("runs/mine-routed")[0].header for kind in (records.Certificates, records.Sweep)),
    ]
    for header in headers:
        assert (header.run, header.model, header.data) == ("runs/mine-routed", "mine.py:routed", "digits")
        assert header.files == spec.files("mine.py:routed")
        assert list(header.routers) == ["router"], "not as a callable that hides it"
    for verb in ("evaluate", "dissect"):
        assert main([verb, "runs/mine-routed", "--limit", "2", *FEW[verb], "--device", "cpu"]) == 0
        assert "made anew" not in capsys.readouterr().err, "it goes on with what --model began"
    assert main(["report", "runs/mine-routed"]) == 0
    model = rm.load_model("runs/mine-routed")
    own = rm.build_model("ensemble(linear, experts=2, router=linear, gate=hard)", 10, (1, 8, 8))
    assert torch.equal(model(torch.ones(1, 1, 8, 8)), own(torch.ones(1, 1, 8, 8)))


def test_a_blend_of_own_models(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "digits", "--limit", "2", "--alphas", "0,0.5", "--attack", "pgd(linf(0.1), steps=1)"]
    assert main(["blend", "--model", "mine.py:dense", "--model", "mine.py:routed(seed=3)", *flags]) == 0
    folder = "runs/blend-mine-dense-mine-routed-seed-3"
    assert f"run folder: {folder}" in capsys.readouterr().out
    x = torch.ones(1, 1, 8, 8)
    dense, routed = (rm.load_model(f"runs/{name}") for name in ("mine-dense", "mine-routed-seed-3"))
    blend = rm.load_model(folder)
    alpha = json.loads((Path(folder) / "config.json").read_text())["model"]
    assert alpha == "dual(mine.py:dense, mine.py:routed(seed=3))"
    expected = 0.3 * dense(x).softmax(1) + 0.7 * routed(x).softmax(1)
    torch.testing.assert_close(blend(x).softmax(1), expected)


def test_the_folder_of_a_function(here: Path) -> None:
    folder = own_run("./mine.py:function", "digits( )", "out")
    assert folder == Path("out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model"], config["data"], config["num_classes"]) == ("mine.py:function", "digits", 10)
    assert own_run("mine.py:function", "digits", "out") == folder, "the one that is there"
    (here / "mine.py").write_text(MINE + "\n")
    own_run("mine.py:function", "digits", "out")  # nothing was measured yet
    assert (
        json.loads((folder / "config.json").read_text())["files"] == spec.files("mine.py:function") != config["files"]
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "expected one of a run folder and --model my_file.py:make_model"),
        (["run", *ROUTED], "expected one of a run folder and --model"),
        (["--model", "mine.py:routed"], "--model mine.py:routed needs images; expected --data, such as --data digits"),
        (["--model", "resnet8", "--data", "digits"], "resnet8 is a model without weights; expected one of your own"),
        (["--model", "mine.py:rooted", "--data", "digits"], "mine.py has no 'rooted'; did you mean 'routed'"),
        ([*ROUTED, "--out", "mine.py"], "'mine.py' is a file, not a run folder"),
        (["--model", "mine.py:", "--data", "digits"], "cannot read 'mine.py:'"),
        (["run", "--data", "digits"], "--data and --out go with --model; a run has its own data and folder"),
    ],
)
@pytest.mark.parametrize("verb", ["sweep", "evaluate"])
def test_mistakes_are_one_line(verb: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if argv == ["run", "--data", "digits"] and verb == "evaluate":
        message = "there is no run folder 'run'"
    assert main([verb, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_other_work_in_the_folder_is_refused(here: Path) -> None:
    folder = own_run("mine.py:routed", "digits")
    (folder / "rows").mkdir()
    with pytest.raises(UserError, match=r"is of the data digits, this command says digits\(val=0.2\); choose another"):
        own_run("mine.py:routed", "digits(val=0.2)")
    with pytest.raises(UserError, match=r"is of the model mine.py:routed, this command says mine.py:dense"):
        own_run("mine.py:dense", "digits", folder)
    then = spec.files("mine.py:routed")["mine.py"][:12]
    (here / "mine.py").write_text(MINE + "\n")
    with pytest.raises(UserError, match=rf"holds results of mine.py of SHA-256 {then}, the file is now \w{{12}};"):
        own_run("mine.py:routed", "digits")
