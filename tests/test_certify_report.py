"""Certificates as numbers, words, figures and alarms, of records worked by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from robustmoe import records
from robustmoe.analysis import Rate, certificates_summary, refuted
from robustmoe.analysis.certificates import POINTS
from robustmoe.records import Certificates, Evaluation, Proof, RouterInfo, Row
from robustmoe.reporting import text as told_text
from robustmoe.reporting.certificates import doubts
from robustmoe.reporting.panel import Shown
from test_report import made, make_header, make_run

EPS = 0.1

RULE = "all reachable experts"


def proof(index: int, radius: float = 0.0, **changes: Any) -> Proof:
    """An image of class 1; by default right, and not certified because two of two experts fail."""
    values: dict[str, Any] = {
        "label": 1,
        "prediction": 1,
        "rule": RULE if radius else "",
        "reachable": 2,
        "proven": 0,
    }
    values |= {"stable": 0.0, "reason": "" if radius >= EPS else "no", "seconds": 0.5}
    return Proof(index=index, radius=radius, **{**values, **changes})


ROWS = [
    proof(0, 0.2, reachable=1, proven=1, stable=1.0),
    proof(1, 0.1, rule="each reachable expert alone", proven=2),  # certified, though the route is not stable
    proof(2, 0.05, proven=1),  # the other expert within reach is not proven: the route is what is missing
    proof(3),
    proof(4),
    proof(5, reachable=1, stable=1.0),  # stable, and the network's own bound fails
    proof(6, 0.3, prediction=0, reachable=1, proven=1, stable=1.0),  # certified to be wrong
    proof(7, prediction=-1),
]


def record(rows: list[Proof] | None = None, **changes: Any) -> Certificates:
    rows = ROWS if rows is None else rows
    header = make_header(n=len(rows), attack=None, objective=None, eps=EPS, routers={"router": RouterInfo(2, 1, 1)})
    values = {"header": header, "certifier": "bounds(linf(0.1))", "subject": "model", "rows": rows}
    return Certificates(**{**values, **changes})


def attacked(broken: dict[int, float], eps: float = EPS, n: int = 8, **changes: Any) -> Evaluation:
    """An attack that breaks the images ``broken`` with perturbations of those sizes; what it leaves has size eps."""
    header = make_header(eps=eps, n=n, attack=f"pgd(linf({eps}), steps=5)", **changes)
    rows = [
        Row(i, 1, ROWS[i].prediction, 2 if i in broken else ROWS[i].prediction,
            {"linf": broken.get(i, eps), "l2": 9.0, "l1": 9.0}, {}, None, None, {}, {})
        for i in range(n)
    ]  # fmt: skip
    return Evaluation(header, rows, None)


# ------------------------------------------------------------------------------------------------ numbers


def test_the_numbers_of_eight_images() -> None:
    found = certificates_summary(record())
    assert (found.right, found.certified) == (Rate(6, 8), Rate(2, 8)), "images 0 to 5; images 0 and 1"
    assert (found.unstable, found.abstained) == (Rate(1, 8), Rate(1, 8))
    assert found.mean_radius == pytest.approx((0.2 + 0.1 + 0.05) / 8)
    assert (found.reachable, found.experts, found.stable) == ((1 + 2 + 2 + 2 + 2 + 1 + 1 + 2) / 8, 2, 3 / 8)
    assert found.crowd == 2.0, "of images 2, 3 and 4"
    assert found.rules == {"each reachable expert alone": Rate(1, 8), "all reachable experts": Rate(3, 8)}
    assert found.obstacles == {"route": Rate(1, 4), "experts": Rate(2, 4), "network": Rate(1, 4)}
    assert found.largest == 0.2, "the radius 0.3 is of a wrong prediction"
    assert (found.seconds, found.against, found.refuted) == (0.5, (), ())


def test_the_curve_falls_at_each_radius() -> None:
    shares = dict(certificates_summary(record()).curve)
    assert [shares[radius].count for radius in (0.0, 0.05, EPS, 0.2)] == [6, 3, 2, 1]
    assert (shares[0.0125].count, shares[0.15000000000000002].count) == (3, 1), "between two radii, the farther one's"
    many = certificates_summary(record([proof(i, 0.001 * i) for i in range(1, 1000)])).curve
    assert len(many) <= POINTS + 10
    for radius, share in many[1:]:
        assert share.count == 1000 - math.ceil(1000 * radius - 1e-6), "images i of 1 to 999 with i / 1000 >= radius"


def test_a_radius_of_float32_counts_as_eps() -> None:
    """float32(8/255) is below 8/255."""
    header = dataclasses.replace(record().header, eps=8 / 255)
    rows = [proof(0, 0.03137254714965820), proof(1, 0.0313)]
    assert rows[0].radius < 8 / 255
    assert certificates_summary(record(rows, header=header)).certified == Rate(1, 2)


def test_a_dense_model_and_two_halves_have_no_number_of_experts() -> None:
    for routers in ({}, {"standard.router": RouterInfo(3, 1, 1)}, dict.fromkeys("ab", RouterInfo(3, 1, 1))):
        assert (
            certificates_summary(record(header=dataclasses.replace(record().header, routers=routers))).experts is None
        )


# ------------------------------------------------------------------------------------------------ attacks


def test_attacks_on_the_same_images() -> None:
    """Two attacks at eps, one of which saw four images only, and one at half of it."""
    some = [attacked({3: 0.09, 4: 0.1}), attacked({2: 0.1}, n=4), attacked({3: 0.05}, eps=0.05)]
    found = certificates_summary(record(), some)
    half, whole = found.against
    assert (half.eps, half.robust, half.certified, half.clean) == (0.05, Rate(5, 8), Rate(3, 8), Rate(6, 8))
    assert (whole.robust, whole.certified) == (Rate(2, 4), Rate(2, 4)), "images 0 to 3, of which 2 and 3 are broken"
    assert len(whole.attacks) == 1, "one name"
    assert (found.refuted, found.at(EPS), found.at(0.3)) == ((), whole, None)


@pytest.mark.parametrize(
    "broken, eps, wrong",
    [
        ({0: 0.19}, 0.2, [0]),  # inside the radius 0.2
        ({0: 0.21}, 0.25, []),  # outside
        ({0: 0.2}, 0.25, []),  # at the radius itself, of a larger ball: rounding decides
        ({1: 0.1 + 1e-8}, 0.1, [1]),  # the ball that was certified was attacked, and the image is in it up to rounding
        ({2: 0.08}, 0.1, []),  # certified up to 0.05 alone
        ({3: 0.0001}, 0.1, []),  # not certified
        ({6: 0.1}, 0.1, [6]),  # certified to stay wrong in one way, and made wrong in another
    ],
)
def test_what_refutes_a_certificate(broken: dict[int, float], eps: float, wrong: list[int]) -> None:
    assert [one.index for one in refuted(record(), [attacked(broken, eps)])] == wrong


def test_another_prediction_on_the_clean_image_refutes_it() -> None:
    result = attacked({})
    rows = [dataclasses.replace(row, clean=5, adversarial=5) if row.index == 0 else row for row in result.rows]
    (one,) = refuted(record(), [dataclasses.replace(result, rows=rows)])
    assert (one.index, one.prediction, one.answer, one.size) == (0, 1, 5, 0.0)


@pytest.mark.parametrize(
    "change",
    [{"model_hash": "another"}, {"norm": "l2"}, {"split": "val"}, {"data": "digits"}, {"attack": None}],
)
def test_other_work_refutes_nothing(change: dict[str, Any]) -> None:
    result = attacked({0: 0.01})
    assert refuted(record(), [result])
    header = dataclasses.replace(result.header, **change)
    found = certificates_summary(record(), [dataclasses.replace(result, header=header)])
    assert (found.refuted, found.against) == ((), ())


def test_images_without_a_name_are_told_apart_by_their_hash() -> None:
    header = dataclasses.replace(record().header, data="arrays")
    result = attacked({0: 0.01}, data="arrays")
    assert refuted(record(header=header), [result])
    other = dataclasses.replace(result.header, data_hash="other")
    assert not refuted(record(header=header), [dataclasses.replace(result, header=other)])


def test_a_smoothed_model_is_not_compared() -> None:
    found = certificates_summary(record(subject="smoothed model"), [attacked({0: 0.01})])
    assert (found.refuted, found.against) == ((), ())


# ------------------------------------------------------------------------------------------------ words


def test_what_is_in_the_way() -> None:
    small = certificates_summary(record([proof(0, 0.02, proven=1), proof(1)]))
    assert (small.certified.count, small.largest) == (0, 0.02)
    none = certificates_summary(record([proof(0), proof(1)]))
    assert (none.largest, none.obstacles, none.crowd) == (0.0, {"experts": Rate(2, 2)}, 2.0)
    dense = record([proof(0, reachable=1, stable=1.0)])
    dense = dataclasses.replace(dense, header=dataclasses.replace(dense.header, routers={}))
    assert certificates_summary(dense).obstacles == {"network": Rate(1, 1)}
    assert certificates_summary(record([proof(0, 0.1, proven=2)])).obstacles == {}
    assert certificates_summary(record([proof(0, proven=None)])).obstacles == {"formula": Rate(1, 1)}
    smoothed = {"reachable": None, "proven": None}
    rows = [
        proof(0, 0.3, stable=0.9, **smoothed),
        proof(1, 0.1, stable=0.5, **smoothed),
        proof(2, prediction=-1, **smoothed),
    ]
    found = certificates_summary(record(rows, subject="smoothed model"))
    assert (found.right, found.abstained, found.certified) == (Rate(2, 3), Rate(1, 3), Rate(2, 3))
    assert (found.obstacles, found.reachable, found.crowd) == ({}, None, None)
    assert found.stable == pytest.approx((0.9 + 0.5 + rows[2].stable) / 3)


def test_doubts_are_told_one_by_one_up_to_five() -> None:
    rows = [proof(i, 0.2) for i in range(8)]
    found = record(rows)
    result = attacked(dict.fromkeys(range(8), 0.05))
    result = dataclasses.replace(result, rows=[dataclasses.replace(row, clean=1) for row in result.rows])
    told = doubts(Shown(found, certificates_summary(found, [result])))
    assert told[0] == "Certified accuracy 100.0% is above what the attacks leave, 0.0%, within L∞ ≤ 0.1."
    assert told[1].startswith("Image 0 is certified as 1 up to L∞ 0.2, but ")
    assert told[1].endswith("makes it 2 with 0.05.")
    assert (len(told), told[-1]) == (7, "3 more certificates of other images or attacks are disproved.")
    assert doubts(Shown(found, certificates_summary(found))) == []
    assert "! Certified accuracy 100.0%" in told_text(found, [result])


# ------------------------------------------------------------------------------------------------ the page


def of_run(header: Any, rows: list[Proof]) -> Certificates:
    about = {"attack": None, "objective": None, "n": len(rows)}
    return Certificates(dataclasses.replace(header, **about), "bounds(linf(8/255))", "model", rows)


def the_runs_own(run: Path) -> Evaluation:
    return records.read(next(path for path in records.rows_files(run) if path.stem == "attack0"))


def test_the_page_shows_it(tmp_path: Path) -> None:
    """Certificates below what the attacks of this made-up run leave."""
    run = make_run(tmp_path)
    every = [records.read(path) for path in records.rows_files(run)]
    safe = set.intersection(*({r.index for r in one.rows if r.adversarial == r.clean == r.label} for one in every))
    first = every[0]
    eps = first.header.eps
    rows = [
        Proof(r.index, r.label, r.clean, eps if r.index in safe else 0.0,
              RULE if r.index in safe else "", 2, 1, 0.0,
              "" if r.index in safe else "2 of 4 experts can be used", 0.1)
        for r in the_runs_own(run).rows
    ]  # fmt: skip
    of_run(the_runs_own(run).header, rows).write(run)
    page, numbers, text, source = made(run, tmp_path)
    assert "certificates" in page.ids
    assert page.missing_alt == 0
    assert "://" not in source
    assert '<div class="alarm"' not in source
    assert "> **†**" not in text
    (found,) = numbers["runs"][0]["certificates"]
    assert (found["certified"]["count"], found["certified"]["n"]) == (len(safe & {r.index for r in rows}), 80)
    at = next(one for one in found["against"] if one["eps"] == eps)
    assert at["robust"]["count"] >= at["certified"]["count"]
    assert found["refuted"] == []


def test_a_wrong_certificate_is_an_alarm(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = the_runs_own(run)
    rows = [Proof(r.index, r.label, r.clean, first.header.eps, RULE, 1, 1, 1.0, "", 0.1) for r in first.rows]
    broken = next(r.index for r in first.rows if r.adversarial != r.clean)
    of_run(first.header, rows).write(run)
    _, numbers, text, source = made(run, tmp_path)
    assert source.count('<div class="alarm"') == 1
    assert "> **†** Certified accuracy" in text
    assert any("cannot be quoted" in note for note in numbers["runs"][0]["notes"])
    assert broken in [one["index"] for one in numbers["runs"][0]["certificates"][0]["refuted"]]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model_hash": "another"}, "is of other weights than the evaluation and is left out"),
        ({"rows": []}, "is without an image yet and is left out"),
        ({"n": 90}, "is not complete; the same `robustmoe certify` goes on with it"),
    ],
)
def test_what_does_not_belong_is_left_out_and_said(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = of_run(the_runs_own(run).header, [proof(0)] if "rows" not in change else [])
    header = dataclasses.replace(found.header, **{name: value for name, value in change.items() if name != "rows"})
    dataclasses.replace(found, header=header).write(run)
    _, numbers, _, _ = made(run, tmp_path)
    assert any(why in note for note in numbers["runs"][0]["notes"])
    assert len(numbers["runs"][0]["certificates"]) == ("n" in change)


def test_certificates_alone_make_a_report_and_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text("{}")
        for eps in (EPS, 0.2):
            found = record(header=dataclasses.replace(record().header, eps=eps), certifier=f"bounds(linf({eps}))")
            found.write(run)
        runs.append(run)
    page, numbers, text, _ = made(runs, tmp_path)
    assert page.ids == ["show-0", "show-1", "verdict", "certificates", "made"]
    assert text.count("| two (bounds(linf(0.1))) | 75.0% (40.9–92.9) | 25.0% (L∞ ≤ 0.1) |") == 1
    assert [len(run["certificates"]) for run in numbers["runs"]] == [2, 2]
