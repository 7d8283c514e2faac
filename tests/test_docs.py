"""What the pages promise: links lead somewhere, recipes build and train. (Their code: test_blocks.)"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from robustmoe import recipe, spec
from robustmoe.data import Data, from_arrays
from robustmoe.training import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_attack_is_in_the_table_of_attacks() -> None:
    """Those that stand in another's table are named below it."""
    text = (ROOT / "docs" / "attacks.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| .*`\w+\(", line)]
    rows = [re.split(r" \| ", line.replace("`", "").strip("| ")) for line in lines]
    written = [row[3] for row in rows]
    for attack in written:
        spec.build(attack, "attack")
    there = {
        name for attack in (*written, *re.findall(r"`([^`\n]*)`", text)) for name in re.findall(r"\w+(?=\()", attack)
    }
    table = spec.TABLES["attack"]
    assert set(table() if callable(table) else table) <= there
    for name, _, aims, attack in rows:
        router = getattr(getattr(spec.build(attack, "attack"), "objective", None), "aims_at_router", None)
        assert router is not False or "experts alone" in aims, name


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_builds_and_takes_two_steps(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random images of the data set's shape: the recipe's own data are not needed."""
    written = recipe.load_recipe(file)
    for attack in written.attacks:
        spec.build(attack, "attack")
    images = from_arrays(torch.rand(8, 3, 32, 32), torch.arange(8))
    data = Data("random", images, images, images, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
    real = spec.build
    monkeypatch.setattr(spec, "build", lambda text, kind: data if kind == "data" else real(text, kind))
    small = dataclasses.replace(written, batch_size=4, epochs=1, val_limit=2, threads=1, device="cpu")
    run = train(small, tmp_path / "run")
    assert (run / "model.safetensors").exists()
