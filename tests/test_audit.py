"""`robustmoe audit`: from a foreign model in a file to a report, and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import robustmoe as rm
from robustmoe import records, spec
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation import auditing
from robustmoe.evaluation.auditing import audit
from robustmoe.wrapping import WrappedModel, WrappedSpec

MINE = """
import torch
from torch import nn
import robustmoe as rm

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Linear(64, 10) for _ in range(3))

    def forward(self, x):
        scores = self.gate(x)
        weight, index = scores.topk(2)
        weight = weight.softmax(-1)
        y = 0
        for i, expert in enumerate(self.experts):
            share = (weight * (index == i)).sum(-1, keepdim=True)
            y = y + share * expert(x)
        return y

def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), Layer())

class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, x):
        return {"logits": self.net(x.sub_(0.5)).squeeze()}

def told():
    return Told()

def tidy():
    net = make_model()
    class Tidy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x):
            return self.net(x - 0.5)
    return Tidy()

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def function():
    return lambda x: x.flatten(1)[:, :10]

def routed():
    return rm.wrap(make_model(), {"1": "call(topk, softmax)"}, example=torch.rand(4, 1, 8, 8))
"""
FEW = ["--data", "digits", "--threat", "linf(0.1)", "--limit", "2", "--attack", "fgsm(linf(0.1))", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checks, which take seconds, one."""
    real = auditing.check_run
    monkeypatch.setattr(auditing, "check_run", lambda run, **given: real(run, only="H4", **given))


def test_a_mixture_that_writes_squeezes_and_gives_a_dict_is_wrapped_as_one_that_does_not() -> None:
    """Equal logits and routes, on a batch and on one image, which stay as they are."""
    data = spec.build("digits", "data")
    made = [spec.build(f"mine.py:{name}", "model").made(10, (1, 8, 8)) for name in ("told", "tidy")]
    assert not any(auditing._tells(model, data) for model in made), "and neither is asked before it is wrapped"
    x = data.test.batch(list(range(4))).x
    told, tidy = (rm.wrap(model, example=x) for model in made)
    for images in (x, x[:1]):
        kept = images.clone()
        a, b = told.run(images), tidy.run(images)
        assert torch.equal(images, kept)
        assert torch.equal(a.logits, b.logits)
        assert [routing.index.tolist() for routing in a.trace.values()] == [
            routing.index.tolist() for routing in b.trace.values()
        ]
        assert len(a.trace) == 1


def test_from_a_file_to_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "mine.py:make_model", *FEW]) == 0
    out, err = capsys.readouterr()
    assert "runs/mine-make-model" in err
    assert "rm.gate.call(" in err, "the routers that were found are told"
    assert out.endswith("report: runs/mine-make-model/report.html\n")
    assert "verdict:" in out
    run = Path("runs/mine-make-model")
    config = json.loads((run / "config.json").read_text())
    assert config["threat"] == "linf(0.1)", "what later measurements take"
    described = spec.build(config["model"], "model")
    assert isinstance(described, WrappedSpec)
    assert spec.text(described) == config["model"], "the guess is pinned"
    model = rm.load_model(run)
    assert isinstance(model, WrappedModel)
    assert list(model.run(torch.rand(2, 1, 8, 8)).trace) == ["1"]
    assert records.read(records.rows_files(run)[0]).header.routers["1"].experts == 3
    audited = records.Audit.read(run)
    assert audited is not None
    assert (audited.n, audited.attacks) == (2, ["fgsm(linf(0.1))"])
    assert records.Dissection.read(run) is not None
    assert "mine.py:make_model" in (run / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json*") if path.parent.name == "rows"}
    before[run / "checks.json"] = (run / "checks.json").stat().st_mtime_ns
    assert main(["audit", "mine.py:make_model", *FEW]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what is done is not done again"


@pytest.mark.parametrize(
    "name, told, routers",
    [
        ("dense", "no router found", []),
        ("function", "is no nn.Module, so no router can be looked for", []),
        ("routed", "attacks", ["1"]),
    ],
)
def test_what_is_not_wrapped(name: str, told: str, routers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = audit(f"mine.py:{name}", "digits", threat="linf(0.1)", limit=3, attacks="fgsm(linf(0.1))", out="run")
    assert told in capsys.readouterr().err
    assert list(done.results[0].header.routers) == routers
    assert done.results[0].header.model == f"mine.py:{name}"
    assert done.unwrapped == ""


def test_what_cannot_be_wrapped_is_measured_as_a_callable_and_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*given: object, **more: object) -> None:
        raise UserError("router '1' cannot be replayed")

    monkeypatch.setattr(auditing, "wrap", refuses)
    assert main(["audit", "mine.py:make_model", *FEW, "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert "not wrapped: router '1' cannot be replayed; measured as a plain callable" in err
    assert "routing was seen, but not wrapped: router '1' cannot be replayed" in out
    assert "verdict: do NOT quote this number" in out
    assert "so this is the model as a callable: router" in Path("run/report.html").read_text()


@pytest.mark.parametrize("gives", ["None", "3", "list"])
def test_what_is_no_model_is_one_line(gives: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is said of routers or folders, and no folder is made."""
    Path("none.py").write_text(f"def make_model():\n    return {gives}\n")
    assert main(["audit", "none.py:make_model", *FEW, "--out", "empty"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("robustmoe: none.py:make_model gives ")
    assert "expected a model: an nn.Module, or another callable" in err
    assert not Path("empty").exists()


def test_images_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "mine.py:dense"]) == 2
    assert "mine.py:dense needs images to be attacked on; expected --data" in capsys.readouterr().err
