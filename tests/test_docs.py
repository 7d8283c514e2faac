"""What the pages promise: README's code runs, links lead somewhere, recipes build and train."""

from __future__ import annotations

import dataclasses
import json
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


def code_of(page: str) -> str:
    """The one Python block of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return str(code)


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_the_readmes_python_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line for line, but for the numbers: those are of the CPU that docs/results/front_door.json names."""

    def words(text: str) -> list[str]:
        return re.sub(r"[\d.–!]+|-{5,}| {2,}", " ", text).split()

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code_of("README.md"), {"__name__": "readme"})
    said = json.loads((ROOT / "docs" / "results" / "front_door.json").read_text())["output"]
    assert words(capsys.readouterr().out) == words("\n".join(said))


def test_the_ten_lines_of_the_start_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "router": Linear().network(3, (1, 8, 8)),
        "experts": [SmallCNN(4).network(5, (1, 8, 8)) for _ in range(3)],
        "x": torch.rand(6, 1, 8, 8),
        "y": torch.arange(6) % 5,
    }
    exec(code_of("docs/start.md"), names)
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
