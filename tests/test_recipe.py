"""`robustmoe.recipe`: files, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from robustmoe.errors import UserError
from robustmoe.options import hints_of
from robustmoe.recipe import Recipe, load_recipe, resolve

BASE = """# A recipe.
# Cost: seconds.
model = "resnet18"
data = "digits"
method = "at(pgd(linf(8/255)))"
epochs = 3
"""


def write(folder: Path, text: str = BASE, name: str = "digits.toml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_file_gives_its_fields_and_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe == Recipe(model="resnet18", data="digits", method="at(pgd(linf(8/255)))", epochs=3)
    assert (recipe.batch_size, recipe.precision, recipe.attacks, recipe.val_attack) == (128, "fp32", (), None)


def test_overrides_win_and_types_are_made_exact(tmp_path: Path) -> None:
    text = BASE + 'attacks = ["fgsm(linf(8/255))"]\nema = 0\naugment = "crop_flip"\n'
    recipe = load_recipe(write(tmp_path, text), epochs=5, augment="none", clip=1)
    assert (recipe.epochs, recipe.augment, recipe.attacks) == (5, None, ("fgsm(linf(8/255))",))
    assert isinstance(recipe.ema, float)
    assert isinstance(recipe.clip, float)
    assert hash(recipe)


@pytest.mark.parametrize("value", ["-1", "'none.such'", "[0, 0]", str(2**64)])
def test_a_field_that_a_flag_overrides_is_looked_at_too(value: str, tmp_path: Path) -> None:
    path = write(tmp_path, BASE + f"max_steps = {value}\n")
    with pytest.raises(UserError, match="max_steps"):
        load_recipe(path, max_steps=1)
    path = write(tmp_path, BASE.replace("epochs = 3", ""))
    assert load_recipe(path, epochs=2).epochs == 2, "what a flag says need not stand in the file"


def test_fields_survive_a_round_trip_through_a_dict(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), attacks=["a", "b(1)"], val_limit=7)
    assert Recipe(**dataclasses.asdict(recipe)) == recipe


@pytest.mark.parametrize(
    "line, message",
    [
        ("epoch = 4", r"digits.toml: unknown field 'epoch'; did you mean 'epochs'"),
        ("batch_size = '8'", r"batch_size: expected int or 'auto', got '8' \(str\)"),
        ("batch_size = true", r"batch_size: expected int or 'auto', got True \(bool\)"),
        ("batch_size = 0", "batch_size must be at least 1; got 0"),
        ("ema = 1.0", "ema must be at least 0 and below 1; got 1.0"),
        ("clip = -1", "clip must be 0 or more"),
        ("precision = 'fp8'", "precision: expected one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ("attacks = 'pgd'", "attacks: expected list of str, got 'pgd'"),
        ("attacks = ['pgd(']", "attacks: cannot read"),
        ("optimizer = 'sgd(lr=0.1'", "optimizer: cannot read .*never closed"),
        ("max_steps = 0", "max_steps must be at least 1"),
        ("epochs = 4", "is not a TOML file: Cannot overwrite a value"),
        ("[train]", "unknown field 'train'"),
    ],
)
def test_a_bad_line_is_named_in_one_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, BASE + line + "\n"))
    assert "\n" not in str(caught.value)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say data, method, epochs"):
        load_recipe(write(tmp_path, 'model = "resnet18"\n'))


def test_bare_names_are_looked_for_in_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "recipes")
    assert resolve("digits") == resolve("digits.toml") == resolve("recipes/digits") == Path("recipes/digits.toml")
    assert load_recipe("digits", epochs=1).epochs == 1
    with pytest.raises(UserError, match=r"there is no recipe 'digit'; did you mean 'digits'"):
        resolve("digit")
    with pytest.raises(UserError, match=r"there is no recipe 'recipes/digit.toml'; did you mean 'recipes/digits.toml'"):
        resolve("recipes/digit.toml")
    with pytest.raises(UserError, match=r"no recipe 'nowhere/x.toml'; there are no recipes beside it"):
        resolve("nowhere/x.toml")
    with pytest.raises(UserError, match="is a folder"):
        resolve("recipes")


def test_not_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"x.toml is not a TOML file"):
        load_recipe(file)


def test_every_field_has_a_help_text() -> None:
    hints: dict[str, Any] = hints_of(Recipe)
    assert list(hints) == [f.name for f in dataclasses.fields(Recipe)]
    assert all(len(hint.__metadata__) == 1 and hint.__metadata__[0] for hint in hints.values())


def test_a_bare_name_may_stand_in_a_folder_inside_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "recipes")
    inner = write(tmp_path / "recipes" / "grid", name="cell.toml").relative_to(tmp_path)
    assert resolve("cell") == resolve("cell.toml") == resolve("recipes/grid/cell") == inner
    write(tmp_path / "recipes" / "grid")
    assert resolve("digits") == Path("recipes/digits.toml"), "the one that is not in a folder comes first"
    with pytest.raises(UserError, match=r"there is no recipe 'cel'; did you mean 'cell'"):
        resolve("cel")
    with pytest.raises(UserError, match="there is no recipe 'recipes/cell'"):
        resolve("recipes/cell")
