"""What the pages promise: README's code runs, links lead somewhere, recipes build and train."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from robustmoe import recipe, spec
from robustmoe.data import Data, from_arrays
from robustmoe.models import Linear, SmallCNN
from robustmoe.training import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_the_ten_lines_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {
        "router": Linear().network(3, (1, 8, 8)),
        "experts": [SmallCNN(4).network(5, (1, 8, 8)) for _ in range(3)],
        "x": torch.rand(6, 1, 8, 8),
        "y": torch.arange(6) % 5,
    }
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    attacks = [line for line in printed if line.startswith(("pgd(", "route_beam("))]
    assert len(attacks) == 4, "one line an attack"
    assert "objective=router_only" in attacks[2]
    assert attacks[3].startswith("route_beam")
    assert any(line.strip().startswith("worst of 4") for line in printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


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
