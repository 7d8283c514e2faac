"""Trained models in the package: copied once, never over something else, and as good as their cards say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import robustmoe as rm
from robustmoe import cli, zoo
from robustmoe.analysis import right, robust, wilson
from robustmoe.evaluation import evaluate_run

CARDS = zoo.cards()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_model_is_small_and_has_its_files() -> None:
    assert {"digits_certified", "digits_dense", "digits_pathway", "fashion_mnist_dense", "cifar10_affine"} <= {
        card.name for card in CARDS
    }
    for card in CARDS:
        files = {path.name: path.stat().st_size for path in (zoo.FOLDER / card.name).iterdir()}
        assert set(files) == {*zoo.FILES, zoo.CARD}
        assert sum(files.values()) < 1_000_000
        assert 0 < card.worst <= card.clean <= card.n


@pytest.mark.parametrize("card", [card for card in CARDS if card.data == "digits"], ids=lambda card: card.name)
def test_a_model_answers_as_its_card_says(card: zoo.ZooModel) -> None:
    """On the first 40 images, clean and under the first attack. The margin is for how far 40 images may be from all."""
    folder = rm.zoo_model(card.name)
    (record,) = evaluate_run(folder, attacks=card.attacks[0], limit=40, curve=())
    low, high = wilson(card.clean, card.n)
    assert low - 0.15 < sum(map(right, record.rows)) / 40 < high + 0.15
    assert sum(map(robust, record.rows)) / 40 > wilson(card.worst, card.n)[0] - 0.15


@pytest.mark.parametrize("card", [card for card in CARDS if card.data != "digits"], ids=lambda card: card.name)
def test_a_model_of_data_that_tests_have_not_loads_and_looks_like_its_card(card: zoo.ZooModel) -> None:
    model, config = rm.load_model(f"zoo:{card.name}"), json.loads((zoo.FOLDER / card.name / "config.json").read_text())
    assert (config["model"], config["data"], config["threat"]) == (card.model, card.data, card.threat)
    assert model(torch.rand(3, *config["image_shape"])).shape == (3, 10)


def test_a_model_is_copied_once_and_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    folder = rm.zoo_model("zoo:digits_dense")
    assert folder == Path("runs/zoo-digits_dense")
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir() if path.is_file()}
    (folder / "rows").mkdir()
    assert rm.zoo_model("digits_dense") == folder
    assert {
        path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir() if path.is_file()
    } == before
    (folder / "config.json").write_text("{}")
    assert cli.main(["evaluate", "zoo:digits_dense", "--limit", "2"]) == 2
    assert "runs/zoo-digits_dense holds something else than the zoo's digits_dense" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == "{}"


def test_its_name_stands_for_a_run_in_python_too(tmp_path: Path) -> None:
    name = "zoo:digits_pathway"
    assert rm.load_model(name).training is False
    results = rm.evaluate_run(name, attacks="fgsm(linf(0.1))", limit=4, curve=())
    assert len(results[0].rows) == 4
    assert rm.certify_run(name, certifiers="smoothing(sigma=0.25, n=10)", limit=1)[0].done
    rm.export_run(name, tmp_path / "w.safetensors")
    assert rm.report([name], tmp_path / "report.html").is_file()
    with pytest.raises(rm.UserError, match="there is no model 'digits_pathwy' in the zoo; did you mean"):
        rm.load_model("zoo:digits_pathwy")


def test_a_folder_of_other_things_is_left_alone() -> None:
    Path("runs/zoo-digits_dense").mkdir(parents=True)
    Path("runs/zoo-digits_dense/notes.txt").write_text("mine")
    with pytest.raises(rm.UserError, match="something else"):
        rm.zoo_model("digits_dense")
    assert [path.name for path in Path("runs/zoo-digits_dense").iterdir()] == ["notes.txt"]


def test_the_zoo_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "zoo"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {card.name}\n" in said for card in CARDS)
    assert max(map(len, said.splitlines())) <= 80
    for name in ("digits_dense", "zoo:digits_dense"):
        assert cli.main(["list", name]) == 0
        assert capsys.readouterr().out.strip() in said
    assert cli.main(["evaluate", "zoo:digits_dens", "--limit", "2"]) == 2
    assert "there is no model 'digits_dens' in the zoo; did you mean 'digits_dense'" in capsys.readouterr().err
    arguments = ["--limit", "4", "--curve", "none", "--attack", "fgsm(linf(0.1))"]
    assert cli.main(["evaluate", "zoo:digits_dense", *arguments]) == 0
    assert "worst of 1" in capsys.readouterr().out
