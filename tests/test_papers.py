"""docs/papers.md and the claims in recipes: every recipe has one, and the page has all of them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import pages
from papers import PAGE, RECIPES, REST, ROOT, braced, names, rendered, rows
from robustmoe.errors import UserError
from robustmoe.listing import list_names
from robustmoe.recipe import Claim, claims, load_recipe

TEXT = PAGE.read_text(encoding="utf-8")
BASE = 'model = "resnet18"\ndata = "digits"\nmethod = "standard"\nepochs = 3\n'
SAYS = '\n[[claimed]]\npaper = "P"\nplace = "Table 2"\nrow = "r"\n'


def test_every_recipe_says_what_is_claimed_of_it() -> None:
    for file in RECIPES:
        said = claims(file)
        assert said, file
        assert len({(claim.paper, claim.place, claim.row) for claim in said}) == len(said), file
        head = file.read_text(encoding="utf-8").split('\nmodel = "')[0]
        assert "Expected:" not in head, f"{file}: a claim stands in [[claimed]] alone"
        assert "Claimed" not in head, file


def test_the_page_is_what_the_recipes_say() -> None:
    assert rendered(TEXT) == TEXT, "python -m tests.papers writes it anew"
    cells = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    assert {name for row in cells for name in names(row[1])} == {file.stem for file in RECIPES}
    assert all(len(row) == 5 and row[4].strip(" |") for row in cells)


def test_a_number_is_a_papers_on_this_page_alone() -> None:
    assert [page for page in pages() if "<!-- claimed -->" in page.read_text(encoding="utf-8").replace("``", "")] == [
        PAGE
    ]


@pytest.mark.parametrize(
    ("old", "new"), [("SA 77.81", "SA 79.81"), ("| not known |", "| SA 90 |"), ("experts2`", "experts3`")]
)
def test_a_lie_on_the_page_is_written_over(old: str, new: str) -> None:
    assert old in TEXT
    assert rendered(TEXT.replace(old, new)) == TEXT


def test_what_was_written_by_hand_is_kept() -> None:
    """Of the rows that there are; a new one begins as not run."""
    row = next(line for line in TEXT.splitlines() if line.startswith("| AutoAttack table: RT-ER |"))
    assert rendered(TEXT.replace(row + "\n", "")) != TEXT
    assert "11.8" in row
    assert "| not run at this size |" in rendered(TEXT.replace(row + "\n", ""))


def test_a_paper_without_a_table_goes_to_the_last() -> None:
    assert set(rows([])) == {REST}
    with pytest.raises(ValueError, match="no table under"):
        rendered("# A page\n")


@pytest.mark.parametrize("given", [["a_b"], ["a_b", "a_c"], ["a_b_x", "a_c_x", "a_c_d_x"], ["a", "b_a", "c"]])
def test_names_in_braces(given: list[str]) -> None:
    assert names(braced(given)) == given


def test_a_claim_is_read_typed_and_told(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(BASE + SAYS + 'values = {SA = 77.81, RA = "below 4"}\nsource = "hearsay"\n' + SAYS)
    known, unknown = claims(file)
    assert known == Claim(paper="P", place="Table 2", row="r", values={"SA": 77.81, "RA": "below 4"}, source="hearsay")
    assert (known.said, unknown.said) == ("SA 77.81, RA below 4", "not known")
    assert load_recipe(file).epochs == 3
    said = " ".join(list_names("cifar10_resnet18_rt_er").split())
    assert "Tables 2 and 9, RT-ER, top-1, beta 6: SA 77.81, PGD-50 69.09, RA-E 75.71, RA-R 72.28 (from" in said
    assert "a dense net of equal inference cost: nothing." in " ".join(list_names("cifar10_resnet18_at_dense").split())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("claimed = 3\n" + BASE, "claimed is 3, expected entries that begin with"),
        (BASE + '[[claimed]]\npaper = "P"\nplace = "T"\n', "'row' is too much or missing"),
        (BASE + SAYS + "year = 1\n", "'year' is too much or missing"),
        (BASE + SAYS + "source = 1\n", "expected texts"),
        (BASE + SAYS + "values = {SA = [1]}\n", "expected texts, and numbers"),
    ],
)
def test_a_claim_that_cannot_be_read(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=told):
        claims(tmp_path / "r.toml")


def test_a_base_gives_what_a_recipe_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "low.toml").write_text(BASE + "seed = 4\n" + SAYS)
    (tmp_path / "mid.toml").write_text('base = "low"\nepochs = 5\n')
    (tmp_path / "top.toml").write_text('base = "mid"\nseed = 6\n')
    top, low = load_recipe(tmp_path / "top.toml"), load_recipe(tmp_path / "low.toml")
    assert (top.model, top.epochs, top.seed, low.epochs, low.seed) == ("resnet18", 5, 6, 3, 4)
    assert claims(tmp_path / "top.toml") == (), "claims are of one recipe"
    away = tmp_path / "away.toml"
    away.write_text('base = "cifar10_resnet18_rt_er"\nepochs = 1\n')
    assert load_recipe(away).batch_size == 512


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base = 3\n", "base is 3, expected the name of a recipe"),
        ('base = "none_such_at_all"\n', "there is no recipe"),
        ('base = "r"\n', "leads back to this recipe"),
        ('base = "other"\n', "leads back to this recipe"),
    ],
)
def test_a_base_that_is_none(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    (tmp_path / "other.toml").write_text('base = "r"\n')
    with pytest.raises(UserError, match=told):
        load_recipe(tmp_path / "r.toml")


def test_the_page_stands_in_docs() -> None:
    assert PAGE == ROOT / "docs" / "papers.md"
