"""The public names: one line each, in the imports that type checkers read."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import robustmoe


def test_every_public_name_is_what_its_module_has() -> None:
    assert {"Recipe", "RoutedModel", "UserError", "evaluate", "train"} <= set(robustmoe.__all__)
    assert dir(robustmoe) == robustmoe.__all__ == sorted(set(robustmoe.__all__))
    for name, home in robustmoe._HOMES.items():
        assert getattr(robustmoe, name) is getattr(import_module(home), name)


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"^module 'robustmoe' has no attribute 'trian'$"):
        robustmoe.trian  # noqa: B018


def test_the_import_alone_loads_no_torch() -> None:
    code = 'import sys, robustmoe; sys.exit("torch" in sys.modules or robustmoe.UserError.__name__ != "UserError")'
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_has_every_public_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: robustmoe\.(\w+)$", page, re.MULTILINE)) == robustmoe.__all__
