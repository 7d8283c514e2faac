"""Rows to numbers, against sums worked by hand and scipy's intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binomtest

from objective_infos import EXPERTS_ONLY, JOINT, ROUTER_ONLY, ROUTING
from robustmoe.analysis import (
    Adds,
    Rate,
    attack_name,
    by_part,
    eps_curve,
    evaluation_summary,
    family,
    groups,
    judge,
    load_by_class,
    names,
    other_labels,
    routing_gap,
    warnings,
    wilson,
    worst_case,
)
from robustmoe.errors import UserError
from robustmoe.records import Audit, Check, Checks, Evaluation, Header, ObjectiveInfo, RouterInfo, Row
from robustmoe.reporting import summary_table

EPS = 8 / 255
FINE = Checks([Check("R1", "router reached", "pass", 0.3, "30% of the gradient goes through the router.")], 1.0)


def make_header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "run": "a run", "model": "pathway(resnet18)", "data": "digits", "split": "test",
        "attack": "pgd(linf(8/255), steps=50)", "objective": JOINT, "norm": "linf", "eps": EPS, "role": "main",
        "method": None, "n": 4, "seed": 0, "data_hash": "d", "index_hash": "i", "model_hash": "m", "versions": {},
        "commit": None, "device": "cpu", "threads": 1, "precision": "fp32", "command": "", "classes": ["a", "b", "c"],
        "routers": {"r": RouterInfo(3, 1, 2)}, "parameters": 10, "started": "now",
    }  # fmt: skip
    return Header(**{**values, **changes})


def make_row(index: int, label: int = 0, clean: int = 0, adversarial: int = 0, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "size": {"linf": EPS, "l2": 1.0, "l1": 20.0}, "rerouted": {"r": 0.0}, "router_exposed": clean,
        "experts_exposed": adversarial, "route_clean": {"r": [2, 0, 0]}, "route_adversarial": {"r": [2, 0, 0]},
    }  # fmt: skip
    return Row(index, label, clean, adversarial, **{**values, **changes})


# right, broken, wrong from the start, and wrong made right by the attack
FOUR = [
    make_row(0, 0, 0, 0),
    make_row(1, 0, 0, 1, rerouted={"r": 0.5}, router_exposed=1, experts_exposed=0, route_adversarial={"r": [1, 1, 0]}),
    make_row(2, 1, 2, 2, router_exposed=2, experts_exposed=2),
    make_row(3, 1, 2, 1, rerouted={"r": 1.0}, router_exposed=1, experts_exposed=2, route_adversarial={"r": [0, 0, 2]}),
]


def outcomes(survives: str) -> list[Row]:
    """Rows that are right when clean; "1" survives the attack, "0" is broken, "-" has no row."""
    return [make_row(i, adversarial=int(c == "0")) for i, c in enumerate(survives) if c != "-"]


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 50), (50, 50), (1, 3), (474, 1000), (9999, 10_000)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wilson_by_hand() -> None:
    # k = 5, n = 10, z = 2: centre 1/2, half width 2 sqrt(1/40 + 4/400) / (1 + 4/10) = 0.267261
    low, high = wilson(5, 10, z=2.0)
    assert (low, high) == pytest.approx((0.232739, 0.767261), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 9)[0] == 0.0
    assert wilson(9, 9)[1] == 1.0
    for k, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="need 0 <= k <= n"):
            wilson(k, n)
    assert math.isnan(Rate(0, 0).value)


def test_summary_of_four_rows() -> None:
    one = evaluation_summary(make_header(), FOUR, FINE)
    assert one.clean == Rate(2, 4)
    assert one.robust == Rate(1, 4)  # image 3 was wrong before the attack, so it does not count
    assert one.router_exposed == Rate(2, 4)  # images 0 and 3
    assert one.experts_exposed == Rate(2, 4)  # images 0 and 1
    assert one.rerouted == {"r": (0 + 0.5 + 0 + 1) / 4}
    assert one.rerouted_mean == 0.375
    assert one.rerouted_broken == Rate(1, 4)  # image 1
    assert one.max_size == EPS
    assert (one.complete, one.router_attacked, one.failed, one.incomplete) == (True, True, (), ())
    assert (one.n, one.planned) == (4, 4)


def test_summary_of_a_dense_model_and_of_no_attack() -> None:
    dense = evaluation_summary(make_header(routers={}), outcomes("1100"), FINE)
    assert dense.robust == Rate(2, 4)
    assert (dense.router_exposed, dense.experts_exposed, dense.rerouted, dense.rerouted_mean) == (None, None, {}, None)
    assert dense.router_attacked is None
    clean = evaluation_summary(make_header(attack=None, objective=None), FOUR, FINE)
    assert (clean.clean, clean.robust, clean.router_exposed) == (Rate(2, 4), None, None)
    with pytest.raises(UserError, match=r"no rows yet for pgd\(linf\(8/255\), steps=50\); `robustmoe evaluate RUN`"):
        evaluation_summary(make_header(), [], None)


def test_worst_case_by_hand() -> None:
    joint = (make_header(), outcomes("1100"))
    other = (make_header(attack="square(linf(8/255))"), outcomes("1010"))
    worst = worst_case([joint, other])
    assert worst.clean == Rate(4, 4)
    assert worst.robust == Rate(1, 4)  # only image 0 survives both
    # joint breaks 2 and 3, square 1 and 3: each breaks one image that the other does not.
    assert worst.adds == (Adds("pgd(linf(8/255), steps=50)", 2, 1), Adds("square(linf(8/255))", 2, 1))
    assert worst.partial == ()


def test_worst_case_with_an_unfinished_attack() -> None:
    whole = (make_header(), outcomes("1110"))
    part = (make_header(seed=1), outcomes("01--"))
    worst = worst_case([whole, part])
    assert worst.robust == Rate(2, 4)  # image 0 is broken by the unfinished one, image 3 by the other
    assert worst.partial == ("pgd(linf(8/255), steps=50), seed 1",)
    assert worst_case([part]).robust == Rate(1, 2)
    third = (make_header(seed=2), outcomes("-1--"))
    assert worst_case([part, third]).robust == Rate(1, 1)  # none is finished: the images that both have


@pytest.mark.parametrize("field, value", [("model_hash", "x"), ("index_hash", "x"), ("norm", "l2"), ("eps", 0.1)])
def test_worst_case_of_what_does_not_belong_together(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"attacks cannot be put together: {field} is"):
        worst_case([(make_header(), FOUR), (make_header(**{field: value}), FOUR)])
    with pytest.raises(UserError, match="worst case of no attack"):
        worst_case([])


def test_groups_are_one_threat_each() -> None:
    files = [
        Evaluation(make_header(norm="l2", eps=0.5), outcomes("1100"), FINE),
        Evaluation(make_header(), outcomes("1100"), FINE),
        Evaluation(make_header(seed=1), outcomes("1100"), FINE),
        Evaluation(make_header(role="curve"), outcomes("1100"), FINE),
        Evaluation(make_header(attack=None, objective=None), outcomes("1111"), FINE),
        Evaluation(make_header(seed=2), [], None),
        Evaluation(make_header(index_hash="few"), outcomes("11"), FINE),
    ]
    assert [[file.header.norm for file in group] for group in groups(files)] == [["linf", "linf"], ["l2"], ["linf"]]


def verdict(objective: ObjectiveInfo, status: str | None, rows: str = "1100") -> bool | None:
    checks = Checks([Check("R1", "router reached", status, 0, "A sentence.")] if status else [], 1.0)
    return judge([Evaluation(make_header(objective=objective), outcomes(rows), checks)]).router_attacked


def test_when_the_router_counts_as_attacked() -> None:
    assert verdict(JOINT, "pass") is True
    assert verdict(ROUTER_ONLY, "warn") is True
    assert verdict(ROUTING, "pass") is True
    assert verdict(ROUTING, "fail") is False
    assert verdict(JOINT, None) is True
    assert verdict(EXPERTS_ONLY, "pass") is False
    assert verdict(JOINT, "fail") is False
    assert verdict(JOINT, "pass", rows="11") is False  # it has not seen all images
    dense = judge([Evaluation(make_header(routers={}), outcomes("1100"), FINE)])
    assert (dense.router_attacked, dense.trusted) == (None, True)


def test_verdict_says_what_is_wrong() -> None:
    bad = Checks(
        [Check("H4", "alone", "fail", 1, "One answer changed."), Check("G5", "end", "warn", 1, "Rising.")], 1.0
    )
    judged = judge(
        [Evaluation(make_header(), outcomes("1100"), bad), Evaluation(make_header(seed=1), outcomes("11"), None)]
    )
    assert judged.failed == ("H4 alone: One answer changed.",)
    assert judged.warned == ("G5 end: Rising.",)
    assert judged.incomplete == ("pgd(linf(8/255), steps=50), seed 1: 2 of 4 images",)
    assert not judged.trusted
    shared = judge([Evaluation(make_header(shard="1/2"), outcomes("1100")[:2], bad)])
    assert shared.incomplete == ("pgd(linf(8/255), steps=50): 2 of 4 images (shard 1/2; robustmoe merge joins all)",)
    unfinished = judge([Evaluation(make_header(), outcomes("1100"), None)])
    assert unfinished.incomplete == ("pgd(linf(8/255), steps=50): not finished, its checks were not run",)


@pytest.mark.parametrize(
    "size, trusted", [(EPS, True), (EPS * (1 + 0.9e-5), True), (EPS * (1 + 2e-5), False), (math.nan, False)]
)
def test_a_perturbation_outside_the_ball_is_a_failure(size: float, trusted: bool) -> None:
    rows = [make_row(i, size={"linf": size}) for i in range(4)]
    judged = judge([Evaluation(make_header(), rows, FINE)])
    assert judged.trusted is trusted
    assert trusted or "is outside linf <= 0.0313725" in judged.failed[0]


def test_names() -> None:
    plain, other = make_header(), make_header(objective=EXPERTS_ONLY)
    assert names([plain, other]) == ["pgd(linf(8/255), steps=50)", "pgd(linf(8/255), steps=50), experts_only"]
    assert names([make_header(seed=1), make_header(seed=2)]) == [f"{plain.attack}, seed 1", f"{plain.attack}, seed 2"]
    assert names([plain, plain]) == [f"{plain.attack}, seed 0 (1)", f"{plain.attack}, seed 0 (2)"]
    said = make_header(attack="pgd(linf(8/255), objective=experts_only)", objective=EXPERTS_ONLY)
    assert attack_name(said) == said.attack
    assert attack_name(make_header(attack=None, objective=None)) == "no attack"
    assert family(make_header(attack="apgd(l2(0.5), steps=9)")) == "apgd(l2(eps), steps=9)"


def test_eps_curve_by_hand() -> None:
    def point(level: int, survives: str, **changes: Any) -> tuple[Header, list[Row]]:
        attack = f"pgd(linf({level}/255), steps=50)"
        return make_header(attack=attack, eps=level / 255, role="curve", **changes), outcomes(survives)

    # The main file has four images, the curve the first two only (so another hash of them): two count.
    main = (make_header(data_hash="all four"), outcomes("1010"))
    (curve,) = eps_curve([point(16, "00"), main, point(4, "11"), (make_header(attack="square(linf(8/255))"), FOUR)])
    assert curve.name == "pgd(linf(eps), steps=50)"
    assert [(round(eps * 255), rate) for eps, rate in curve.points] == [
        (0, Rate(2, 2)), (4, Rate(2, 2)), (8, Rate(1, 2)), (16, Rate(0, 2)),
    ]  # fmt: skip
    assert (curve.n, curve.warnings) == (2, ())
    # Two files of one eps: the worse outcome of each image.
    (curve,) = eps_curve([point(4, "1110"), point(4, "0111", seed=1), point(8, "1000")])
    assert [rate.count for _, rate in curve.points] == [4, 2, 1]
    # Accuracy that rises with eps is told.
    (curve,) = eps_curve([point(4, "1000"), point(8, "1100")])
    assert curve.warnings == (
        "accuracy rises from 25.0% at eps 0.01569 to 50.0% at eps 0.03137: the attack is too weak at the larger eps",
    )
    # An unfinished file does not take images from the finished ones.
    (curve,) = eps_curve([point(4, "1110"), point(8, "1100"), point(16, "0---")])
    assert [rate for _, rate in curve.points] == [Rate(4, 4), Rate(3, 4), Rate(2, 4)]
    assert eps_curve([main]) == []
    assert eps_curve([point(4, "11--"), point(8, "--11")]) == []


def test_labels_of_two_files_are_compared() -> None:
    """Of one data set and split; of arrays in Python nothing is known."""
    one = Evaluation(make_header(), list(FOUR), FINE)
    two = Evaluation(
        make_header(attack="fgsm(linf(8/255))"), [replace(row, label=row.label + 1) for row in FOUR[1:3]], FINE
    )
    assert other_labels([one, one]) == []
    (said,) = other_labels([one, two])
    assert said.startswith("evaluation and evaluation name different classes of 2 images (image 1: 0 and 1): one of")
    for apart in ({"split": "val"}, {"data": "cifar10"}):
        assert other_labels([one, replace(two, header=make_header(**apart))]) == []
    arrays = make_header(data="arrays")
    assert other_labels([replace(one, header=arrays), replace(two, header=arrays)]) == []


def test_warnings() -> None:
    joint = Evaluation(make_header(), outcomes("1111"), FINE)
    experts = Evaluation(make_header(objective=EXPERTS_ONLY), outcomes("1100"), FINE)
    assert warnings([joint, joint]) == []
    (weak,) = warnings([joint, experts])
    assert weak.startswith("the experts only attack leaves 50.0%, the joint one 100.0%")
    moody = Evaluation(make_header(seed=1), [make_row(0, clean=1), *outcomes("-111")], FINE)
    (unsteady,) = warnings([joint, moody])
    assert unsteady.startswith("1 clean images are predicted differently")


def test_the_quick_suite_is_called_an_upper_bound() -> None:
    """In the notes under table and verdict, unless autoattack_routing stands beside it at the same radius."""
    quick, whole, far = (
        Evaluation(make_header(attack=f"{suite}(linf({eps}))", objective=ROUTING, eps=eps), outcomes("1100"), FINE)
        for suite, eps in (("quick_verdict", 0.1), ("autoattack_routing", 0.1), ("autoattack_routing", 0.2))
    )
    (note,) = warnings([quick])
    assert note.startswith("quick_verdict leaves an upper bound of the robust accuracy: on ")
    assert note.endswith("as many images as autoattack_routing, which a paper's table should use")
    assert note in " ".join(summary_table([quick, far]).split())
    assert warnings([quick, whole]) == warnings([whole]) == []


def test_load_by_class_by_hand() -> None:
    load = load_by_class(make_header(), FOUR, "r")
    assert load.images == (2, 2, 0)
    assert load.clean == ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    # class 0: [2,0,0] + [1,1,0] of 4 items; class 1: [2,0,0] + [0,0,2]
    assert load.adversarial == ((0.75, 0.25, 0.0), (0.5, 0.0, 0.5), (0.0, 0.0, 0.0))
    assert load.total_clean == (1.0, 0.0, 0.0)
    assert load.total_adversarial == (5 / 8, 1 / 8, 2 / 8)
    assert load.dead == (1, 2)
    assert load_by_class(make_header(classes=[]), FOUR, "r").classes == ("0", "1")
    with pytest.raises(UserError, match="no router 'x'; known: r"):
        load_by_class(make_header(), FOUR, "x")
    with pytest.raises(UserError, match="known: none, the model is dense"):
        load_by_class(make_header(routers={}), FOUR, "r")


def test_a_suite_is_told_part_by_part() -> None:
    """Five images: one wrong from the start, two broken by the first part, none by the second, one by the third."""
    parts = ["clean", "one", "one", "three", ""]
    rows = [
        make_row(i, 0, int(part == "clean"), int(bool(part)), part=part) for i, part in enumerate(parts)
    ]  # label 0: 1 is wrong
    header = make_header(n=5, parts=["one", "two", "three"])
    found = by_part(Evaluation(header, rows, FINE))
    assert [(part.name, part.broken, part.left) for part in found] == [
        ("one", 2, Rate(2, 5)),
        ("two", 0, Rate(2, 5)),
        ("three", 1, Rate(1, 5)),
    ]
    assert by_part(Evaluation(header, rows[:4], None)) == ()
    assert by_part(Evaluation(make_header(n=5), rows, FINE)) == ()


def test_what_knowing_the_router_costs() -> None:
    """Eight images: two wrong from the start, three broken by AutoAttack's parts, two by parts that know the router;
    so 3 of 8 after AutoAttack, 1 of 8 after all."""
    broke = ["clean", "clean", "apgd-ce", "apgd-ce", "square", "routers", "flip", ""]
    rows = [make_row(i, 0, int(part == "clean"), int(bool(part)), part=part) for i, part in enumerate(broke)]
    order = ["apgd-ce", "apgd-t", "fab-t", "square", "experts held", "routers", "flip", "transition"]
    header = make_header(n=8, attack="autoattack_routing(linf(8/255))", objective=ROUTING, parts=order)
    assert routing_gap(Evaluation(header, rows, FINE)) == (Rate(3, 8), Rate(1, 8))
    assert routing_gap(Evaluation(header, rows, None)) == (Rate(3, 8), Rate(1, 8))
    plus = ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t", "routers", "flip"]
    assert routing_gap(Evaluation(replace(header, parts=plus), rows, FINE)) == (Rate(3, 8), Rate(1, 8))
    assert routing_gap(Evaluation(header, rows[:7], None)) is None, "an image is missing"
    dense = [row for row in rows if row.part not in ("routers", "flip")]
    assert routing_gap(Evaluation(replace(header, n=6, parts=order[:4]), dense, FINE)) is None, "no part knows a router"
    assert routing_gap(Evaluation(replace(header, attack="a_suite(linf(8/255))"), rows, FINE)) is None
    assert routing_gap(Evaluation(make_header(attack=None, objective=None), FOUR, FINE)) is None


def test_deep_checks_mark_the_number_of_their_own_model() -> None:
    audit = Audit("m", ["fgsm"], 64, 0, [Check("G2", "finite differences", "fail", 0.9, "off.")])
    result = Evaluation(make_header(), FOUR, FINE)
    assert judge([result]).trusted
    assert judge([result], audit).failed == ("G2 finite differences: off. (robustmoe check)",)
    assert not judge([result], audit).trusted
    other = Evaluation(make_header(model_hash="another"), FOUR, FINE)
    assert judge([other], audit).trusted
    blind = Audit("m", ["fgsm"], 64, 0, [Check("R1", "router reached", "fail", 0.0, "blind.")])
    assert judge([result], blind).trusted, "the file's own R1 passed: one attack that sees the router is enough"
    assert judge([result], blind).warned == ("R1 router reached: blind. (robustmoe check)",)
