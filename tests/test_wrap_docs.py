"""docs/wrap.md: its example runs as printed, its table of codecs is that of the code."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import robustmoe as rm
from foreign_models import CapacityGate, CapacityLayer, Classifier, TripleGate, TripleLayer
from robustmoe.wrapping import CODECS

PAGE = (Path(__file__).parents[1] / "docs" / "wrap.md").read_text()


def test_the_example_runs_in_under_twenty_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) < 20
    model = Classifier(TripleLayer(TripleGate())).eval()
    theirs = types.ModuleType("their_code")
    images = torch.rand(8, 3, 8, 8)
    vars(theirs).update(make_model=lambda: model, images=images, labels=model(images).argmax(1))
    monkeypatch.setitem(sys.modules, "their_code", theirs)
    names: dict[str, object] = {}
    exec(code.replace("steps=20", "steps=1"), names)
    printed = capsys.readouterr().out
    assert "    -> rm.gate.triple()" in printed.splitlines()
    assert "worst of 2" in printed
    assert torch.equal(names["held"].trace["moe.gate"].index, names["free"].trace["moe.gate"].index)  # type: ignore[attr-defined]


def test_every_codec_is_in_the_table() -> None:
    table = re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE)
    assert set(table) == set(CODECS)


def test_the_printed_table_is_of_the_form_that_is_shown() -> None:
    class TopNGating(CapacityGate):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            torch.zeros(len(x)).uniform_()
            return super().forward(x)

    shown = re.findall(r"```\n(module path.*?)```", PAGE, re.DOTALL)[0].splitlines()
    printed = str(rm.find_routers(Classifier(CapacityLayer(TopNGating())), torch.rand(6, 3, 8, 8))).splitlines()
    assert printed == shown
