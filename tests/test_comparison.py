"""Recipes side by side over seeds, and paired on the same images: the numbers, their files, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import robustmoe as rm
from objective_infos import EXPERTS_ONLY, JOINT
from robustmoe import cli
from robustmoe.analysis import Paired, Rate, Spread, paired, paired_bootstrap, welch
from robustmoe.records import Check, Header, Row, Writer
from robustmoe.reporting.comparison import compare
from robustmoe.reporting.formats import grid_latex
from robustmoe.reporting.grid import Grid

PGD, EXPERTS = "pgd(linf(8/255), steps=20)", "pgd(linf(8/255), steps=20, objective=experts_only)"
SIZE = {"linf": 8 / 255, "l2": 1.0, "l1": 9.0, "box": 0.0}
CONFIG = {"data": "digits", "method": "at(pgd(linf(8/255)))", "epochs": 2, "threat": "linf(8/255)"}


def make_run(
    folder: Path, clean: Sequence[bool], kept: dict[str, Sequence[bool]], config: Any = None, **changes: Any
) -> Path:
    """A run folder: which images are right when clean, and which each attack leaves."""
    folder.mkdir(parents=True)
    settings = {**CONFIG, "model": "resnet8", **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    for at, (attack, survivors) in enumerate(kept.items()):
        values: dict[str, Any] = {
            "run": folder.name, "model": settings["model"], "data": "digits", "split": "test", "attack": attack,
            "objective": EXPERTS_ONLY if attack == EXPERTS else JOINT, "norm": "linf", "eps": 8 / 255, "role": "main",
            "method": settings.get("method"), "n": len(survivors), "seed": 0, "data_hash": "d0", "index_hash": "1d",
            "model_hash": folder.name, "commit": "0123abc", "device": "cpu", "threads": 1, "precision": "fp32",
            "versions": {"torch": "2.13.0"}, "command": "robustmoe evaluate", "classes": ["0", "1"], "routers": {},
            "parameters": 10, "started": "2026-11-29T10:00:00", **changes,
        }  # fmt: skip
        rows = [
            Row(i, 0, int(not right), int(not (right and robust)), SIZE, {}, None, None, {}, {})
            for i, (right, robust) in enumerate(zip(clean, survivors))
        ]
        with Writer(folder / "rows" / f"{at}.jsonl", Header(**values)) as writer:
            writer.write(rows)
            writer.finish([Check("H2", "inside the ball", "pass", 0.03, "Inside.")], 1.0)
    return folder


def hits(seed: int, share: float, n: int = 60) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < share for _ in range(n)]


def arm(root: Path, name: str, share: float, **config: Any) -> list[Path]:
    """Three seeds of a recipe."""
    runs = []
    for seed in range(3):
        kept = hits(100 * len(name) + seed, share)
        runs.append(make_run(root / f"{name}-seed{seed}", [True] * 60, {PGD: kept}, {**config, "seed": seed}))
    return runs


# --------------------------------------------------------------------------------------------- against scipy's own


def test_the_interval_of_a_mean_is_students() -> None:
    values = (0.42, 0.47, 0.40, 0.51)
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert Spread(values).interval == pytest.approx((low, high))
    assert Spread(values).sd == pytest.approx(np.std(values, ddof=1))
    assert Spread((0.4,)).interval is None
    assert math.isnan(Spread((0.4,)).sd)


def test_the_interval_of_a_difference_over_trainings_is_welchs() -> None:
    first, second = (0.42, 0.47, 0.40, 0.51), (0.55, 0.53, 0.61)
    expected = scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert welch(Spread(first), Spread(second)) == pytest.approx(tuple(expected))
    assert welch(Spread(first), Spread((0.5,))) is None
    assert welch(Spread((0.5, 0.5)), Spread((0.6, 0.6))) is None, "no spread over seeds: nothing is known"


@pytest.mark.parametrize("gained, lost", [(0, 0), (8, 0), (3, 9), (20, 20), (0, 1)])
def test_the_test_of_a_pair_is_mcnemars_exact_one(gained: int, lost: int) -> None:
    expected = scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert Paired(gained, lost, 100).p == pytest.approx(expected)


def test_the_bootstrap_over_images_is_scipys() -> None:
    """Draws differ, so the ends agree to the bootstrap's own noise: a tenth of the interval's width."""
    draw = np.random.default_rng(3)
    differences = draw.choice([-1.0, -1 / 3, 0.0, 1 / 3, 1.0], p=[0.1, 0.1, 0.5, 0.15, 0.15], size=200)
    peer = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = paired_bootstrap(differences.tolist())
    assert ours == pytest.approx((peer.low, peer.high), abs=0.1 * (peer.high - peer.low))
    assert paired_bootstrap([0.25] * 9) == (0.25, 0.25)


# ----------------------------------------------------------------------------------------------------- comparisons


def test_pairs_decide_where_two_intervals_say_nothing(tmp_path: Path) -> None:
    """Ten images of 200 are gained and none is lost: the intervals of the two rates overlap widely."""
    first = [i < 90 for i in range(200)]
    second = [i < 100 for i in range(200)]
    runs = [
        make_run(tmp_path / name, [True] * 200, {PGD: kept}, {"model": name})
        for name, kept in (("resnet8", first), ("resnet18", second))
    ]
    (_, high), (low, _) = Rate(90, 200).interval, Rate(100, 200).interval
    assert high > low
    comparison = compare(runs)
    worst = comparison.differences()[1]
    assert (worst.value, worst.decided) == (pytest.approx(0.05), True)
    assert worst.images[0] > 0
    assert worst.pair == paired(first, second) == Paired(10, 0, 200)
    assert worst.pair is not None
    assert worst.pair.p == pytest.approx(2 / 2**10)
    said = str(comparison)
    assert "resnet18 keeps 5.0 points more than resnet8 in the worst case." in said
    assert "of other seeds nothing is known" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


def test_three_seeds_a_side(tmp_path: Path) -> None:
    runs = [*arm(tmp_path, "dense", 0.4), *arm(tmp_path, "routed", 0.6, model="pathway(resnet8, experts=2)")]
    comparison = compare(runs)
    dense, routed = comparison.arms
    assert (dense.name, routed.name) == ("dense", "routed")
    shares = {name: [np.mean(hits(100 * len(name) + seed, share)) for seed in range(3)]
              for name, share in (("dense", 0.4), ("routed", 0.6))}  # fmt: skip
    kept, pairs = comparison.grids()
    assert kept.rows[0][0] == ("dense", "seeds 0, 1, 2")
    assert (
        kept.rows[1][-1][0] == f"{100 * np.mean(shares['routed']):.1f} ± {100 * np.std(shares['routed'], ddof=1):.1f}"
    )
    worst = comparison.differences()[1]
    assert worst.value == pytest.approx(np.mean(shares["routed"]) - np.mean(shares["dense"]))
    assert worst.seeds == pytest.approx(welch(Spread(tuple(shares["dense"])), Spread(tuple(shares["routed"]))))
    assert worst.pair is None, "McNemar's test is of two models"
    assert [row[0][0] for row in pairs.rows] == ["routed, clean", "routed, worst case"]


def test_a_difference_of_the_images_that_seeds_do_not_bear_out_is_not_decided(tmp_path: Path) -> None:
    """Ten images each seed, but one seed of the second recipe is as bad as it gets."""
    n = 400
    runs = []
    for name, lots in (("a", (200, 200, 204)), ("b", (260, 258, 180))):
        runs += [
            make_run(
                tmp_path / f"{name}{seed}",
                [True] * n,
                {PGD: [i < lot for i in range(n)]},
                {"seed": seed, "model": name},
            )
            for seed, lot in enumerate(lots)
        ]
    worst = compare(runs).differences()[1]
    assert worst.images[0] > 0
    assert worst.seeds is not None
    assert worst.seeds[0] < 0 < worst.seeds[1]
    assert not worst.decided
    assert "is not decided" in str(compare(runs))


def test_only_images_that_all_runs_have_seen_count_and_that_is_said(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", [True] * 20, {PGD: [True] * 10 + [False] * 10})
    long = make_run(tmp_path / "long", [True] * 50, {PGD: [True] * 15 + [False] * 35}, {"model": "resnet18"})
    comparison = compare([short, long])
    assert len(comparison.images) == 20
    assert comparison.differences()[1].value == pytest.approx(0.25)
    assert comparison.notes == ("30 images of long left out: not all runs have seen them",)


def test_it_is_said_where_one_met_more_attacks(tmp_path: Path) -> None:
    one = make_run(tmp_path / "dense", [True] * 9, {PGD: [True] * 5 + [False] * 4})
    two = make_run(
        tmp_path / "routed",
        [True] * 9,
        {PGD: [True] * 6 + [False] * 3, EXPERTS: [True] * 3 + [False] * 6},
        {"model": "x"},
    )
    comparison = compare([one, two])
    assert len(comparison.notes) == 1
    assert comparison.notes[0].startswith("not attacked alike: routed met 1 attack that dense did not (pgd(linf(8/255)")
    table = comparison.grids()[0]
    assert table.head == ("recipe", "clean", PGD, EXPERTS, "worst case")
    assert [row[3][0] for row in table.rows] == ["", "33.3"]


def test_runs_of_one_recipe_differ_in_their_seed_alone(tmp_path: Path) -> None:
    kept = {PGD: [True] * 5 + [False] * 4}
    seeds = [
        make_run(tmp_path / f"run{seed}", [True] * 9, kept, {"seed": seed, "threads": seed + 1}) for seed in range(2)
    ]
    longer = make_run(tmp_path / "longer", [True] * 9, kept, {"seed": 0, "epochs": 20})
    own = make_run(tmp_path / "own", [True] * 9, kept, {"method": None})
    assert [arm.name for arm in compare([*seeds, longer, own]).arms] == ["run", "longer", "own"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"norm": "l2", "eps": 0.5}, "share no data set and threat"),
        ({"data_hash": "e1"}, "share no data set and threat"),
        ({"model_hash": "first"}, "hold the same weights; name one of them"),
        ({"attack": None, "objective": None}, "was not attacked"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path / "first", [True] * 9, {PGD: [True] * 9})
    second = make_run(tmp_path / "second", [True] * 9, {PGD: [True] * 9}, {"model": "x"}, **change)
    assert cli.main(["compare", str(first), str(second)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_run_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [True] * 9, {PGD: [True] * 9})
    with pytest.raises(rm.UserError, match="hold the same weights; name one of them"):
        compare([run, run])


# ----------------------------------------------------------------------------------------------------------- files


def test_every_format_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*arm(tmp_path, "dense", 0.4), *arm(tmp_path, "routed_100%", 0.6, model="pathway(resnet8, experts=2)")]
    for ending in ("md", "csv", "tex", "json"):
        for _ in range(2):  # an earlier file of ours is written over
            assert cli.main(["compare", *map(str, runs), "--out", str(tmp_path / f"t.{ending}")]) == 0
    assert "written to" in capsys.readouterr().out
    kept, pairs = compare(runs).grids()
    cells = {(row[0][0], name): cell for row in kept.rows for name, cell in zip(kept.head[1:], row[1:])}
    with (tmp_path / "t.csv").open() as file:
        read = {(line["row"], line["column"]): (line["value"], line["interval"])
                for line in csv.DictReader(file) if line["table"] == kept.title}  # fmt: skip
    assert read == cells
    markdown = (tmp_path / "t.md").read_text()
    tex = (tmp_path / "t.tex").read_text()
    value, interval = cells["routed_100%", "worst case"]
    assert f"| {value} ({interval}) |" in markdown
    assert value.replace("±", "+-") + " & {" + interval.replace(" to ", r"\textendash{}") + "}" in tex
    assert r"{routed\_100\%}" in tex
    assert "Minus dense, in points" in tex
    assert "seeds 0, 1, 2" in tex, "a mean needs its number of trainings"
    assert len(rows_of_latex(tex)) == len([kept, pairs])
    assert "all runs have seen" in tex
    assert "all runs have seen" in markdown
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["arms"][1]["worst case"] == [np.mean(hits(100 * 11 + seed, 0.6)) for seed in range(3)]
    assert numbers["differences"][1]["value"] == pytest.approx(compare(runs).differences()[1].value)


def rows_of_latex(tex: str) -> list[list[list[str]]]:
    """The cells of each table, as TeX splits them; what TeX would stop at fails here."""
    plain = re.sub(r"\\[\\{}&%$#_]", "", tex)
    depth = 0
    for mark in plain:
        depth += {"{": 1, "}": -1}.get(mark, 0)
        assert depth >= 0
    assert depth == 0
    text = re.sub(r"\$[^$]*\$", "", "\n".join(line for line in plain.splitlines() if not line.startswith("%"))).replace(
        ">{", ""
    )
    assert set(text) & set('%#$~^_"<>|†≤∞±‖→ε') == set()
    tables = []
    for kinds, body in re.findall(r"\\begin\{tabular\}\{([^\n]*)\}\n(.*?)\\end\{tabular\}", tex, re.DOTALL):
        lines = [line for line in body.splitlines() if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        assert all(line.endswith(r" \\") for line in lines)
        cells = [re.split(r"(?<!\\)&", line) for line in lines]
        columns = re.findall(
            r"[lS]", re.sub(r"\[.*?\]|>\{.*?\}p\{.*?\}", lambda it: "l" * it[0].startswith(">"), kinds)
        )
        assert {len(row) for row in cells} == {len(columns)}, "every row has as many cells as there are columns"
        tables.append(cells)
    return tables


@pytest.mark.parametrize(
    "name", [r"50%_of {all} #1 & $x$ ~a^b\\c", "[first]", "*star", "a--b", '<"|">', "α ≤ ε × σ → ‖x‖ ∞ ± †"]
)
def test_any_name_is_text_to_latex(name: str) -> None:
    grid = Grid(name, ("recipe", name, "p"), (((name, name), ("+1.0", name), ("1.7e-21", "")),), note=name)
    (table,) = rows_of_latex(grid_latex(grid, about=name))
    assert not any(row[0].lstrip().startswith(("[", "*")) for row in table), (
        "TeX would read an argument of the line before"
    )
    assert "1.7e-21" in "".join(table[-1])


@pytest.mark.parametrize(
    "values, kind",
    [
        (("1.0", "100.0"), "S[table-format=3.1]"),
        (("+1.5", "-0.2"), "S[table-format=+1.1,retain-explicit-plus]"),
        (("", "45.0 †"), "S[table-format=2.1]"),
        (("98.3 ± 0.0", ""), "S[table-alignment-mode=none,"),
        (("seven", "7"), "l"),
    ],
)
def test_a_column_of_numbers_is_aligned_at_its_points(values: tuple[str, ...], kind: str) -> None:
    tex = grid_latex(
        Grid("t", ("recipe", "x"), tuple(((f"r{at}", ""), (value, "")) for at, value in enumerate(values)))
    )
    assert f"{{l{kind}" in tex
    assert rows_of_latex(tex)[0][1 + values.index(values[-1])][1].strip(" \\") in (
        values[-1].replace(" †", r"{\rlap{$^\dagger$}}"), f"{{{values[-1]}}}", r"num{7}"
    )  # fmt: skip


def test_a_wide_table_lies_on_its_side_and_empty_columns_are_left_out() -> None:
    attacks = tuple(f"pgd(linf(8/255), steps={steps}, objective=experts_only)" for steps in (10, 20, 50, 100, 200))
    entries = (("10.0", "5.0 to 15.0"), ("9.0 ± 1.0", "-1.0 to 11.0"), ("", ""), *[("8.0", "4.0 to 14.0")] * 2)
    rows = tuple(((name, f"seeds {name}"), *entries) for name in ("x", "y"))
    turned = rows_of_latex(grid_latex(Grid("t", ("recipe", *attacks), rows)))[0]
    assert [row[0].strip() for row in turned[1:]] == [name.replace("_", r"\_") for name in (*attacks[:2], *attacks[3:])]
    assert turned[2][1].strip() == "9.0 +- 1.0"
    narrow = grid_latex(Grid("t", ("recipe", *attacks), tuple((*row[:3], *[("", "")] * 3) for row in rows)))
    assert r" & {A} & {95 \%} & " in narrow
    assert f"A: {attacks[0]}".replace("_", r"\_") in narrow
    assert "x: seeds x; y: seeds y." in narrow


@pytest.mark.parametrize(
    "name, said", [("t.xlsx", "tables are written as .md, .csv, .tex, .json"), ("t.csv", "did not write it")]
)
def test_another_ending_or_anothers_file_is_refused_before_the_work(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("name,age\n")
    assert cli.main(["compare", str(tmp_path), "--out", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "t.csv").read_text() == "name,age\n"


def test_a_frame_has_every_image_and_attack(tmp_path: Path) -> None:
    runs = arm(tmp_path, "dense", 0.4)
    frame = rm.frame(runs)
    assert len(frame) == 3 * 60
    shares = frame.groupby("seed")["robust"].mean()
    assert shares.tolist() == [np.mean(hits(500 + seed, 0.4)) for seed in range(3)]
    assert isinstance(frame, pd.DataFrame)
    assert set(frame["attack"]) == {PGD}


# ----------------------------------------------------------------------------------------------------------- seeds


def test_train_with_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    text = 'model = "small_cnn(width=2)"\ndata = "digits"\nmethod = "standard"\n'
    recipe.write_text(f"{text}epochs = 1\nmax_steps = 1\nval_limit = 8\nthreads = 1\n")
    out = str(tmp_path / "run")
    assert cli.main(["train", str(recipe), "--out", out, "--seeds", "0..1"]) == 0
    said = capsys.readouterr().out
    assert f"robustmoe compare {out}-seed*" in " ".join(said.split())
    assert [json.loads((tmp_path / f"run-seed{seed}" / "config.json").read_text())["seed"] for seed in (0, 1)] == [0, 1]
    weights = [(tmp_path / f"run-seed{seed}" / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    assert cli.main(["train", str(recipe), "--out", out, "--seeds", "0,1"]) == 2, "they are there"
    assert cli.main(["train", str(recipe), "--out", out, "--seeds", "0..2", "--resume"]) == 0, "goes on, and adds one"
    assert (tmp_path / "run-seed2" / "model.safetensors").is_file()
    assert [(tmp_path / f"run-seed{seed}" / "model.safetensors").read_bytes() for seed in (0, 1)] == weights


@pytest.mark.parametrize("seeds", ["", "a", "3..1", "1,1", "0..99999999999", "0...3", "-1..2"])
def test_bad_seeds_are_one_line(seeds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "digits_hard_moe", "--out", str(tmp_path / "r"), f"--seeds={seeds}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
