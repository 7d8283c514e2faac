"""How the curve of a dual model over alpha is read: its numbers, its table, its section of the report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from robustmoe.analysis import Paired, Rate, alpha_change, blend_summary
from robustmoe.errors import UserError
from robustmoe.records import Blend
from robustmoe.reporting import report
from robustmoe.reporting.style import css
from test_dissection import record
from test_report import HOSTILE, Page, made, make_header, make_run

ALPHAS = [0.0, 0.5, 0.8, 1.0]
RIGHT = [9, 8, 7, 6]
"""Of ten images of class 0, how many (the first) each alpha gets right."""
BROKEN = [
    [0, 0, 0, 0, 0, 0, 1, 1, -1, -2],  # left: 8
    [0, 0, 0, 0, 1, -1, -1, -1, -2, -2],  # left: 5, 6, 7
    [0, 0, 1, -1, -1, -1, -1, -2, -2, -2],  # left: 3, 4, 5, 6
    [0, -1, -1, -1, -1, -1, -2, -2, -2, -2],  # left: 1, 2, 3, 4, 5
]
PROVEN = [[], [], [3], [1, 2, 3]]


def make_blend(**changes: Any) -> Blend:
    """The curve above; any field can be changed, ``header`` by a dict of its fields."""
    header = {"run": "dual", "model": "dual(ensemble(cnn), ensemble(cnn), alpha=0.8)", "method": None, "n": 10,
              "classes": ["a", "b"], "command": "robustmoe blend runs/standard runs/robust",
              **changes.pop("header", {})}  # fmt: skip
    values: dict[str, Any] = {
        "standard": "runs/standard", "robust": "runs/robust", "mix": "probabilities", "sharpen": "", "alphas": ALPHAS,
        "index": list(range(10)), "labels": [0] * 10, "attacks": ["pgd", "transition"], "broken": BROKEN,
        # an image that is wrong is of class 1, or its logits are not finite (-1)
        "predicted": [[0] * right + [1 if at else -1] * (10 - right) for at, right in enumerate(RIGHT)],
        "certified": [[image in proven for image in range(10)] for proven in PROVEN],
        "validation": [0.9, 0.8, 0.7, 0.6], "wanted": 0.7, "chosen": 0.8, "attacked": 4, "seconds": 90.0,
    }  # fmt: skip
    return Blend(header=make_header(**header), **{**values, **changes})


def make_folder(tmp_path: Path, name: str = "dual", **changes: Any) -> Path:
    """A run folder with nothing measured in it but the curve."""
    run = tmp_path / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({"model": "dual(...)"}))
    (run / "model.safetensors").write_bytes(b"")
    make_blend(**changes).write(run)
    return run


PLAIN: dict[str, Any] = {"certified": [], "validation": [], "wanted": None, "chosen": None}


# ---------------------------------------------------------------------------------------------------- the numbers


def test_the_points_of_a_curve_worked_by_hand() -> None:
    points = blend_summary(make_blend()).points
    assert [point.alpha for point in points] == ALPHAS
    assert [point.clean for point in points] == [Rate(right, 10) for right in RIGHT]
    assert [point.robust for point in points] == [Rate(left, 10) for left in (1, 3, 4, 5)]
    assert [point.certified for point in points] == [Rate(proven, 10) for proven in (0, 0, 1, 3)]
    counts = [(6, 2), (4, 1), (2, 1), (1, 0)]
    assert [point.broke for point in points] == [{"pgd": a, "transition": b} for a, b in counts]
    assert [point.validation for point in points] == [0.9, 0.8, 0.7, 0.6]
    # (1 - alpha) / alpha; up to alpha 0.5 it is 1 or more, which no margin exceeds
    assert [point.threshold for point in points] == [math.inf, 1.0, pytest.approx(0.25), 0.0]
    assert [point.provable for point in points] == [False, False, True, True]
    # images 6, 7, 8 and so on are right at this alpha and not at 1; none the other way
    assert [point.clean_change for point in points] == [Paired(gained, 0, 10) for gained in (3, 2, 1, 0)]
    # left at 1: images 1 to 5; {8}, {5, 6, 7} and {3, 4, 5, 6} against it
    pairs = [(1, 5), (2, 4), (1, 2), (0, 0)]
    assert [point.robust_change for point in points] == [Paired(*pair, 10) for pair in pairs]
    assert [point.disproven for point in points] == [0, 0, 0, 0]


def test_two_alphas_are_compared_image_by_image() -> None:
    blend = make_blend()
    assert alpha_change(blend, 1, 2) == Paired(0, 1, 10)  # image 7 is lost
    assert alpha_change(blend, 1, 2, attacked=True) == Paired(2, 1, 10)  # 3 and 4 gained, 7 lost
    assert alpha_change(blend, 2, 1, attacked=True) == Paired(1, 2, 10)
    change = Paired(1, 2, 10)
    assert change.value == pytest.approx(-0.1)
    # half an image more in each of the four cells: 1.5 and 2.5 of 12; the variance of a difference of two shares
    p, q = 1.5 / 12, 2.5 / 12
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 12)
    assert change.interval == pytest.approx((p - q - half, p - q + half))
    low, high = Paired(0, 0, 500).interval
    assert low == -high < 0, "no difference seen is not no difference"
    assert Paired(3, 0, 3).interval[1] <= 1
    assert math.isnan(Paired(0, 0, 0).value)


def test_logits_have_no_margin_that_is_enough() -> None:
    assert [point.threshold for point in blend_summary(make_blend(mix="logits")).points] == [None, None, None, 0.0]
    assert not blend_summary(make_blend(mix="logits")).points[2].provable


@pytest.mark.parametrize(
    "changes, place",
    [
        ({}, 2),  # chosen
        ({"chosen": 0.5}, 1),
        ({"chosen": None}, 2),  # 0.8 is nearer to 0.7 than 0.5
        ({"chosen": None, "alphas": [0.0, 0.6, 0.8, 1.0]}, 2),  # as near: the larger
        ({"chosen": None, "attacked": 1}, 3),  # alone attacked
        ({"chosen": None, "attacked": 0}, 2),
        ({"chosen": 0.5, "attacked": 1}, 1),  # chosen by clean accuracy, so attacked or not
    ],
)
def test_the_alpha_to_look_at_first(changes: dict[str, Any], place: int) -> None:
    blend = make_blend(**changes)
    assert blend_summary(blend).shown == blend.alphas[place]


def test_only_attacked_alphas_have_robust_accuracy() -> None:
    points = blend_summary(make_blend(attacked=2)).points
    assert [point.robust for point in points] == [None, None, Rate(4, 10), Rate(5, 10)]
    assert [point.broke is None for point in points] == [True, True, False, False]
    assert [point.robust_change is None for point in points] == [True, True, False, False]
    assert all(point.clean_change is not None for point in points)
    assert alpha_change(make_blend(attacked=2), 1, 3, attacked=True) is None


def test_a_broken_certificate_is_counted() -> None:
    certified = [[False] * 10, [False] * 10, [True] * 4 + [False] * 6, [True] * 7 + [False] * 3]
    points = blend_summary(make_blend(certified=certified)).points
    # at 0.8 images 0, 1, 2 were broken; at 1 image 0 was broken and image 6 is wrong when clean
    assert [point.disproven for point in points] == [0, 0, 3, 2]
    # without attacks at 0.8 only clean images speak
    assert [point.disproven for point in blend_summary(make_blend(certified=certified, attacked=1)).points] == [
        0,
        0,
        0,
        2,
    ]
    assert len(re.findall("^! ", str(make_blend(certified=certified)), flags=re.M)) == 2


# ------------------------------------------------------------------------------------------------------- the page

STOP = re.compile(
    r'<input type="radio" name="(?P<name>[^"]+)" id="(?P<id>[^"]+)"(?P<checked> checked)?/>'
    r'<label for="(?P<of>[^"]+)"(?P<chosen> class="chosen")?>(?P<alpha>[^<]+)</label><div class="panel">'
)


def panels(source: str) -> list[str]:
    """The text of each alpha's panel."""
    starts = [found.end() for found in STOP.finditer(source)]
    ends = [*(found.start() for found in STOP.finditer(source)), source.index("</fieldset>", starts[-1])][1:]
    bodies = (source[start:end] for start, end in zip(starts, ends, strict=True))
    return [" ".join(re.sub(r"<[^>]+>", " ", body).split()) for body in bodies]


def test_a_folder_with_nothing_but_a_curve_has_a_report(tmp_path: Path) -> None:
    page, numbers, text, _ = made(make_folder(tmp_path), tmp_path)
    assert page.ids[:3] == ["verdict", "blend", "made"]
    assert len(page.scripts) == 1, "our own"
    assert page.missing_alt == 0
    assert "1 min 30 s" in page.text
    assert "evaluation time" not in page.text
    assert numbers["runs"][0]["headline"] is None
    assert numbers["runs"][0]["clean"] is None
    found = numbers["runs"][0]["blend"]
    assert (found["wanted"], found["chosen"], found["shown"], found["attacked"]) == (0.7, 0.8, 0.8, 4)
    assert [point["robust"]["count"] for point in found["points"]] == [1, 3, 4, 5]
    assert [point["threshold"] for point in found["points"]] == [None, 1.0, pytest.approx(0.25), 0.0]
    assert found["points"][2]["broke"] == {"pgd": 2, "transition": 1}
    change = found["points"][2]["robust_change"]
    assert (change["gained"], change["lost"], change["value"]) == (1, 2, pytest.approx(-0.1))
    assert "robustmoe blend runs/standard runs/robust" in text


def test_the_dial_has_a_stop_and_a_panel_an_alpha(tmp_path: Path) -> None:
    _, _, _, source = made(make_folder(tmp_path), tmp_path)
    stops = list(STOP.finditer(source))
    assert [stop["alpha"] for stop in stops] == ["0", "0.5", "0.8", "1"]
    assert [bool(stop["checked"]) for stop in stops] == [False, False, True, False]
    assert [bool(stop["chosen"]) for stop in stops] == [False, False, True, False]
    assert all(stop["id"] == stop["of"] for stop in stops)
    assert len({stop["id"] for stop in stops}) == 4
    assert len({stop["name"] for stop in stops}) == 1
    said = panels(source)
    for words in (
        "Alpha 0.8 chosen",
        "Clean 70.0% 95 %: 39.7–89.2",
        "Robust 40.0% 95 %: 16.8–68.7",
        "Certified floor 10.0% 95 %: 1.8–40.4",
        "Margin needed above 0.25",
        "wrong when clean 3 30.0% pgd 2 20.0% transition 1 10.0% left 4 40.0%",
        "Against alpha 1, the robust half alone",
        "clean +10.0 points 1 gained, 0 lost",
        "robust −10.0 points 1 gained, 2 lost",
    ):
        assert words in said[2]
    assert "none suffices" in said[1]
    assert "Against" not in said[3], "it is what the others are compared with"
    # what shows the panel, and what prints them all
    assert ".stops>input:checked+label+.panel{display:block}" in css()
    assert ".stops>.panel{display:block!important" in css().split("@media print")[1]


def test_an_uncertified_unfinished_curve_says_so(tmp_path: Path) -> None:
    page, numbers, _, source = made(make_folder(tmp_path, **PLAIN, attacked=2), tmp_path)
    said = panels(source)
    assert "Alpha 0 the standard half alone not attacked yet" in said[0]
    assert "Robust – not attacked yet" in said[0]
    assert "clean +30.0 points" in said[0]
    assert "robust – " in f"{said[0]} "
    assert "Certified floor 0% nothing was certified" in said[2]
    assert source.count('class="dot f1"') == 2 + 4, "two crosses; and clean accuracy at four alphas"
    assert source.count('class="dot f2"') == 2
    assert 'class="dot f3"' not in source
    assert "validation" not in page.text
    assert [point["robust"] is None for point in numbers["runs"][0]["blend"]["points"]] == [True, True, False, False]


def test_a_wrong_certificate_is_an_alarm(tmp_path: Path) -> None:
    _, numbers, text, source = made(make_folder(tmp_path, certified=[[True] * 10] * 4), tmp_path)
    assert [point["disproven"] for point in numbers["runs"][0]["blend"]["points"]] == [9, 7, 6, 5], "proven, but broken"
    assert source.count('<div class="alarm"') == 1
    assert text.count("> **†**") == 4
    assert len(numbers["runs"][0]["notes"]) == 1


def test_two_curves_stand_in_one_figure(tmp_path: Path) -> None:
    runs = [make_folder(tmp_path, "joint"), make_folder(tmp_path, "apart", **PLAIN, attacks=["pgd", "square"])]
    page, numbers, text, source = made(runs, tmp_path)
    assert page.text.count("Robust against clean accuracy") == 3, "of both together, and of each"
    for words in ("joint: under attack", "apart: under attack", "joint: certified"):
        assert words in page.text
    assert source.count('<div class="alarm mild"') == 1, "their attacks differ"
    assert "different attacks" in text
    stops = list(STOP.finditer(source))
    assert [stop["name"] for stop in stops] == ["alpha-0"] * 4 + ["alpha-1"] * 4
    assert len({stop["id"] for stop in stops}) == 8
    assert [bool(stop["checked"]) for stop in stops] == [False, False, True, False] * 2
    assert [run["blend"]["standard"] for run in numbers["runs"]] == ["runs/standard"] * 2
    *_, same = made([runs[0], make_folder(tmp_path, "twin")], tmp_path)
    assert '<div class="alarm mild"' not in same


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    changes = {"standard": HOSTILE, "robust": HOSTILE, "sharpen": HOSTILE, "attacks": [HOSTILE, "b"]}
    header = {"model": HOSTILE, "attack": HOSTILE, "data": HOSTILE, "command": HOSTILE}
    runs = [make_folder(tmp_path, name, **changes, header=header) for name in ("a", "b")]
    page, _, text, source = made(runs, tmp_path)
    assert HOSTILE in page.text
    assert source.count("<script") == len(page.scripts) == 1, "our own"
    assert "onerror=1>" not in source
    assert "<script" not in re.sub(r"^    .*$", "", text, flags=re.M)  # commands are indented code


def test_a_curve_beside_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False, examples=False)
    make_blend().write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert page.ids[:3] == ["verdict", "attacks", "blend"]
    assert "4 evaluations (80 rows)" in page.text
    assert numbers["runs"][0]["clean"]["n"] == 20
    _, numbers, _, _ = made([run, make_folder(tmp_path)], tmp_path)
    assert numbers["not_comparable"] == [], "there is one evaluation: nothing to compare"
    assert [run["headline"] is None for run in numbers["runs"]] == [False, True]


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"header": {"model_hash": "0ther"}}, "of other weights than the evaluation"),
        ({name: [] for name in ("index", "labels")} | {name: [[]] * 4 for name in ("predicted", "broken", "certified")},
         "empty"),
    ],
)  # fmt: skip
def test_a_curve_that_is_left_out_says_why(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    run = make_run(tmp_path, n=20, curve=False, training=False, examples=False)
    make_blend(**changes).write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert "blend" not in page.ids
    assert numbers["runs"][0]["blend"] is None
    (note,) = numbers["runs"][0]["notes"]
    assert f"blend.json is {why} and is left out" in note


def test_a_dissection_alone_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "taken-apart"
    run.mkdir()
    (run / "config.json").write_text("{}")
    record().write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert page.ids[:3] == ["verdict", "dissection", "made"]
    assert numbers["runs"][0]["dissection"] is not None
    replace(record(), done=False).write(run)
    with pytest.raises(UserError, match="has no rows yet"):
        report([run], tmp_path / "out.html")


def test_pages_are_well_formed_at_the_edges(tmp_path: Path) -> None:
    """One alpha; all images wrong; nothing attacked."""
    one = {"alphas": [0.7], "predicted": [[1] * 10], "broken": [[-2] * 10], "certified": [], "validation": []}
    page, numbers, _, _ = made(make_folder(tmp_path, "one", **one, chosen=None, wanted=None, attacked=1), tmp_path)
    assert isinstance(page, Page)
    (point,) = numbers["runs"][0]["blend"]["points"]
    assert (numbers["runs"][0]["blend"]["shown"], point["clean"]["count"], point["robust"]["count"]) == (0.7, 0, 0)
    page, _, _, source = made(make_folder(tmp_path, "none", attacked=0), tmp_path)
    assert "Robust against clean accuracy" not in page.text
    assert len(list(STOP.finditer(source))) == 4
