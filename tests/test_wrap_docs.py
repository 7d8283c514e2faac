"""docs/wrap.md: its table of codecs is that of the code, and its printed table. (Its example: test_blocks.)"""

from __future__ import annotations

import re
from pathlib import Path

import torch

import robustmoe as rm
from foreign_models import CapacityGate, CapacityLayer, Classifier
from robustmoe.wrapping import CODECS

PAGE = (Path(__file__).parents[1] / "docs" / "wrap.md").read_text()


def test_the_example_is_less_than_twenty_lines() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    assert len(code.splitlines()) < 20


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
