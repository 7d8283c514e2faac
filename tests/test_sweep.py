"""The sweep over eps: every number against one worked by hand, its file, its page, its verb; and the paper's attack."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustmoe as rm
from robustmoe import analysis, records, spec
from robustmoe.analysis import Rate, sweep_summary
from robustmoe.attacks import PGD, at_radius, build_attack, linf, vmoe_pgd
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation import evaluate, sweep, sweep_run
from robustmoe.models import RoutedModel
from robustmoe.records import Override, RouterInfo, Sweep, SweepAnswers
from robustmoe.reporting.panel import Shown
from robustmoe.reporting.sweep import grids
from robustmoe.routing import Routing, Tape
from test_dissection import make_trained
from test_report import Page, made, make_header, make_run

sweeping = importlib.import_module("robustmoe.evaluation.sweeping")


def summaries_of(*given: Any, **options: Any) -> list[analysis.EvaluationSummary]:
    """Numbers of what `evaluate` gives."""
    return [record.summary() for record in evaluate(*given, **options)]


class Tokens(RoutedModel):
    """An image is the pixels a, b and c; b and c are its two items. An item above 1/2 goes to expert 1, which adds 0.3,
    else to expert 0, which adds nothing; below 0.1 it has no room. Class 0 where 1/2 - a + (b + c) / 100 + what the
    experts add is above 0, else class 1. So an attack moves a one way and b and c the other.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1)
        items = pixels[:, 1:].detach()
        logits = torch.stack([0.5 - items, items - 0.5], -1)
        index = (items > 0.5).long()[..., None]
        routing = tape("router", Routing(logits, index, (items >= 0.1).to(x.dtype)[..., None]))
        added = (routing.weight * 0.3 * routing.index).sum((1, 2))
        score = 0.5 - pixels[:, 0] + pixels[:, 1:].sum(1) / 100 + added
        return torch.stack([score, -score], 1)


POINTS = [
    (0.20, 0.35, 0.35), (0.45, 0.30, 0.30), (0.70, 0.55, 0.30), (0.20, 0.05, 0.30),
    (0.20, 0.15, 0.05), (0.70, 0.30, 0.30), (0.45, 0.30, 0.30), (0.80, 0.20, 0.20),
]  # fmt: skip
X, Y = torch.tensor(POINTS).view(-1, 1, 1, 3), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
"""Counted from 0: 5 and 6 are wrong. Within 0.1, 1 breaks by a alone, 2 as b leaves expert 1; 3 has one item without
room before and after, 4 one before and after and one after."""

WEAK, STRONG = "vmoe_pgd(linf(0.1), steps=2)", "pgd(linf(0.1), steps=2, step_size=0.1)"
"""Both go to the corner of the ball: the gradient has the same sign everywhere."""


@pytest.fixture(scope="module")
def tokens() -> analysis.SweepSummary:
    return sweep(Tokens(), X, Y, attacks=[WEAK, STRONG], eps=[0.1, 0.2], draws=2).summary()


# ------------------------------------------------------------------------------------------------ by hand


def test_accuracies(tokens: analysis.SweepSummary) -> None:
    assert tokens.clean == Rate(6, 8)
    assert [curve.attack for curve in tokens.curves] == [WEAK, STRONG]
    for curve in tokens.curves:
        first, second = curve.points
        assert (first.eps, second.eps) == (0.1, 0.2)
        assert first.right == first.robust == Rate(4, 8), "0, 3, 4 and 7"
        assert second.right == second.robust == Rate(4, 8)
        assert first.changed == Rate(2, 8), "1 and 2"
        assert first.routing_fixed == Rate(5, 8), "2 is saved: 1/2 - 0.8 + 0.0065 + 0.3 is above 0"
        assert first.routing_transplanted == Rate(5, 8), "2 without expert 1 is wrong, 1 is not"
    assert tokens.worst == {0.1: Rate(4, 8), 0.2: Rate(4, 8)}


def test_losses(tokens: analysis.SweepSummary) -> None:
    """log(1 + exp(-2 s)) for label 0, with s written out for each image, and exp(2 s) for label 1."""
    clean = [0.307, 0.056, 0.1085, 0.3035, 0.302, -0.194, 0.056, -0.296]
    moved = [0.205, -0.046, -0.2935, 0.202, 0.2005, -0.296, 0.158, -0.194]  # 3 and 4 stop at the box, at 0
    for found, scores in ((tokens.loss, clean), (tokens.curves[0].points[0].loss, moved)):
        signs = [1 if label == 0 else -1 for label in Y.tolist()]
        wanted = sum(math.log1p(math.exp(-2 * s * sign)) for s, sign in zip(scores, signs)) / 8
        assert found == pytest.approx(wanted, rel=1e-5)


def test_routes_by_both_rules(tokens: analysis.SweepSummary) -> None:
    """Image 2 moves one of two items; 3 has one item that goes nowhere twice, left out or counted; of 4 one item loses
    its expert and one has none twice: 1 of 1, or 2 of 2. The others keep theirs.
    """
    point = tokens.curves[0].points[0]
    assert point.moved == {"router": (1 / 2 + 0 + 1) / 8}
    assert point.moved_paper == {"router": (1 / 2 + 1 / 2 + 1) / 8}
    assert point.idle == {"router": (1 / 2 + 1 / 2) / 8}


def test_redundancy(tokens: analysis.SweepSummary) -> None:
    """Without expert 1, image 2 is lost; with it alone, 0.6 is added and 5 is won, 7 lost; with both, half of that."""
    spare = {(one.rule, one.router): one for one in tokens.spare}
    assert set(spare) == {("random", ""), ("without", ""), ("k", "")}, "weights kept: the same where they are constant"
    assert spare["without", ""].rates == {0: Rate(6, 8), 1: Rate(5, 8)}
    assert spare["without", ""].agree == {0: Rate(6, 8), 1: Rate(7, 8)}
    assert spare["without", ""].lowest == (1, Rate(5, 8))
    assert spare["k", ""].rates == {1: Rate(6, 8), 2: Rate(6, 8)}
    assert spare["k", ""].agree == {1: Rate(8, 8), 2: Rate(6, 8)}
    assert set(spare["random", ""].rates) == {0, 1}


def test_the_union_over_smaller_eps_can_only_fall() -> None:
    """An attack that breaks images 0 and 1 at a small eps, and 1 and 2 at a larger one: raw 2 and 2 of 4 left, by union
    2 and 1. The other attack breaks 3 at an eps between.
    """
    found = sweep_summary(record())
    weak, strong = found.curves
    assert [point.right for point in weak.points] == [Rate(2, 4), Rate(2, 4)]
    assert [point.robust for point in weak.points] == [Rate(2, 4), Rate(1, 4)]
    assert [point.robust for point in strong.points] == [Rate(3, 4)]
    assert found.worst == {0.1: Rate(2, 4), 0.2: Rate(1, 4), 0.3: Rate(0, 4)}
    assert found.strongest is weak, "the one that goes furthest"


# ------------------------------------------------------------------------------------------------ another way


def test_a_point_is_an_evaluation(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("ensemble_straight"), images(12)
    y = model(x).argmax(1)
    attack = "pgd(linf(0.05), steps=3, seed=2, keep=best)"
    found = sweep(
        model, x, y, attacks=["pgd(linf(0.02), steps=3, seed=2, keep=best)"], eps=[0.05], draws=0, num_classes=4
    ).summary()
    (whole,) = summaries_of(model, x, y, attacks=[attack], num_classes=4)
    (point,) = found.curves[0].points
    assert (found.clean, point.robust) == (whole.clean, whole.robust)
    assert (point.routing_fixed, point.routing_transplanted) == (whole.experts_exposed, whole.router_exposed)
    assert point.moved["router"] == pytest.approx(whole.rerouted["router"])
    assert found.spare == ()


def test_the_batch_size_decides_nothing(tokens: analysis.SweepSummary) -> None:
    again = sweep(Tokens(), X, Y, attacks=[WEAK, STRONG], eps=[0.1, 0.2], draws=2, batch_size=3).summary()
    assert again.spare == tokens.spare
    assert again.worst == tokens.worst
    assert again.curves[1].points[0].moved == tokens.curves[1].points[0].moved


def test_a_dense_model_has_no_routes(images: Callable[..., Tensor], labels: Callable[[int], Tensor]) -> None:
    found = rm.sweep(
        lambda x: x.flatten(1)[:, :4], images(6), labels(6), attacks=[WEAK], eps="0.05", num_classes=4
    ).summary()
    (point,) = found.curves[0].points
    assert (point.routing_fixed, point.routing_transplanted, point.moved, point.moved_paper) == (None, None, {}, {})
    assert found.spare == ()


def test_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's attack and PGD-50 at six radii; "paper" is the list of its code, there in pixels of [-1, 1]."""
    asked: list[tuple[str, float]] = []

    def stop(session: Any, climbed: Any, base: Any, name: str, eps: float) -> SweepAnswers:
        asked.append((name, eps))
        return SweepAnswers(name, eps, [0] * 8, [0.0] * 8, [0] * 8, [0] * 8, [0.0] * 8, *[{"router": [0.0] * 8}] * 3)

    monkeypatch.setattr(sweeping, "run_attack", stop)
    sweep(Tokens(), X, Y, draws=0)
    names = ["vmoe_pgd(linf(8/255))", "pgd(linf(8/255), steps=50, restarts=2)"]
    assert asked == [(name, k / 255) for name in names for k in (1, 2, 4, 8, 12, 16)]
    asked.clear()
    sweep(Tokens(), X, Y, draws=0, eps="paper", attacks=[names[0]])
    wanted = [k * 0.001 / 2 for k in range(1, 7)] + [k / 127.5 / 2 for k in range(1, 21)]
    assert [eps for _, eps in asked] == pytest.approx(wanted)


def test_the_model_comes_back_as_it_was(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model = tiny("pathway").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sweep(model, images(2), [0, 1], attacks=[WEAK], eps=[0.03], draws=1, num_classes=4)
    assert all(module.training for module in model.modules())
    assert all(bool(torch.equal(value, before[name])) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ the paper's attack


def test_the_paper_s_schedule_written_out(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    """40 steps of eps / 40 along the sign of the gradient of the batch's mean loss, clipped to the box each time. (In
    float64, where no sign is lost to rounding.)
    """
    model, clean, y = tiny("ensemble_k2").double().eval(), images(6).double(), torch.arange(6) % 4
    x_adv = clean
    for _ in range(40):
        at = x_adv.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
        x_adv = (x_adv + 0.05 / 40 * gradient.sign()).clamp(0, 1)
    found = vmoe_pgd(linf(0.05))(model, clean, y)
    assert torch.allclose(found, x_adv, atol=1e-12)
    assert float((found - clean).abs().max()) == pytest.approx(0.05)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_it_is_a_name_for_a_pgd() -> None:
    attack = build_attack("vmoe_pgd(linf(8/255))")
    assert attack == PGD(linf(8 / 255), 40, step_size=8 / 255 / 40, keep="last", start="clean")
    assert spec.text(attack) == "vmoe_pgd(linf(8/255))"
    assert spec.text(at_radius(attack, 4 / 255)) == "vmoe_pgd(linf(4/255))"
    assert spec.text(vmoe_pgd(linf(0.1), steps=7, seed=3)) == "vmoe_pgd(linf(0.1), steps=7, seed=3)"
    assert "weak, for comparison only" in next(line for name, _, line in spec.describe("attack") if name == "vmoe_pgd")
    with pytest.raises(UserError, match="steps must be at least 1; got 0"):
        build_attack("vmoe_pgd(linf(8/255), steps=0)")


# ------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eps": "0,0.1"}, "0 is no eps of a sweep of linf; expected numbers above 0 and at most 1"),
        ({"eps": [8.0]}, "8 is no eps of a sweep of linf"),
        ({"eps": []}, "a sweep needs at least one eps"),
        ({"eps": "some"}, "some"),
        ({"attacks": ["fgsm(linf(0.1))", "fgsm(l2(1))"]}, "the attacks are of l2 and linf; expected one norm"),
        ({"attacks": ["fgsm(l2(1))"]}, "these radii are of linf, the attacks of l2; expected --eps such as"),
        ({"attacks": ["fgsm(l2(1))"], "eps": "paper"}, "these radii are of linf"),
        ({"attacks": ["pgd(linf(0))"]}, "an attack of eps 0 cannot be made again at another"),
        ({"batch_size": 0}, "the batch size is 0, expected at least 1"),
        ({"draws": -1}, "the draws of random experts are -1, expected 0"),
        ({"limit": 0}, "the limit on images is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_swept(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep(Tokens(), X, Y, **given)


# ------------------------------------------------------------------------------------------------ the file


def point(attack: str, eps: float, broken: set[int], **changes: Any) -> SweepAnswers:
    """Of four images of classes 0 to 3, all right but those broken; the router moves half the items of the broken."""
    said = [9 if i in broken else i for i in range(4)]
    half = {"router": [0.5 * (i in broken) for i in range(4)]}
    values: dict[str, Any] = {
        "predicted": said, "loss": [1.0] * 4, "size": [eps] * 4,
        "routing_fixed": said, "routing_transplanted": [0, 1, 2, 9],
        "moved": half, "moved_paper": half, "idle": {"router": [0.0] * 4},
    }  # fmt: skip
    return SweepAnswers(attack, eps, **{**values, **changes})


def record(**changes: Any) -> Sweep:
    right = [0, 1, 2, 3]
    header = make_header(n=4, routers={"router": RouterInfo(2, 1, 2)}, attack=None, objective=None, eps=0.0)
    overrides = [Override("random", "", 0, right), Override("random", "", 1, [0, 9, 9, 3])]
    overrides += [Override("without", "", 0, [9, 9, 9, 3]), Override("without", "", 1, right)]
    overrides += [Override("k", "", 1, right), Override("k", "", 2, [0, 1, 2, 9])]
    points = [point(WEAK, 0.1, {0, 1}), point(WEAK, 0.3, {1, 2}), point(STRONG, 0.2, {3})]
    values: dict[str, Any] = {
        "header": header, "index": right, "labels": right, "predicted": right, "loss": [0.5] * 4, "draws": 2,
        "overrides": overrides, "left_out": ["k is not changed elsewhere."], "points": points, "seconds": 2.5,
        "done": True,
    }  # fmt: skip
    return Sweep(**{**values, **changes})


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert records.Sweep.read(tmp_path) is None
    record().write(tmp_path)
    assert records.Sweep.read(tmp_path) == record()
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("kind",), "audit", "not of the kind sweep: expected"),
        (("version",), 9, "sweep of version 9, this robustmoe reads version 2"),
        (("header", "n"), "four", "field 'header.n' must be a whole number"),
        (("points",), {}, "field 'points' must be a list"),
        (("points", 0, "eps"), 0.0, r"field 'points\[0\].eps' must be a number above 0"),
        (("points", 0, "routing_fixed"), [1], r"points\[0\].routing_fixed has 1 entries, expected 4"),
        (("points", 0, "moved"), {}, r"points\[0\].moved is of the routers \[\], expected \['router'\]"),
        (("points", 1, "eps"), 0.1, "two points are of the same attack and eps"),
        (("overrides", 0, "rule"), "swap", r"field 'overrides\[0\].rule' must be one of random, "),
        (("overrides", 0, "router"), "gate", r"overrides\[0\].router must be '' or one of \['router'\], got 'gate'"),
        (("overrides", 0, "predicted"), [], r"overrides\[0\].predicted has 0 entries, expected 4"),
        (("labels",), [0, 1, 2, 10], "field 'labels' must be from 0 to 9"),
        (("extra",), 1, "unknown field 'extra'"),
    ],
)
def test_a_damaged_file_gets_one_line(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(record().to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "sweep.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        records.Sweep.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("makes it anew")


# ------------------------------------------------------------------------------------------------ run folders

ONE, TWO = "vmoe_pgd(linf(0.05), steps=2)", "pgd(linf(0.05), steps=2)"


def test_a_stopped_sweep_goes_on_and_takes_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, stop = make_trained(tmp_path / "run"), True
    asked: list[tuple[str, float]] = []
    real = sweeping.run_attack

    def counted(*args: Any) -> Any:
        asked.append((args[3], args[4]))
        if stop and args[3] == TWO:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sweeping, "run_attack", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep_run(run, attacks=[ONE, TWO], eps=[0.05, 0.1], limit=8, draws=1)
    left = records.Sweep.read(run)
    assert left is not None
    assert ([(p.attack, p.eps) for p in left.points], left.done) == ([(ONE, 0.05), (ONE, 0.1)], False)
    assert left.overrides, "the clean images come first"
    stop = False
    asked.clear()
    whole = sweep_run(run, attacks=[ONE, TWO], eps=[0.05, 0.1], limit=8, draws=1)
    assert asked == [(TWO, 0.05), (TWO, 0.1)]
    assert whole.done
    assert whole.overrides == left.overrides
    assert records.Sweep.read(run) == whole
    asked.clear()
    assert sweep_run(run, attacks=[ONE, TWO], eps=[0.05, 0.1], limit=8, draws=0, batch_size=3) == whole
    more = sweep_run(run, attacks=[ONE], eps=[0.02], limit=8, draws=1)
    assert asked == [(ONE, 0.02)], "what is there is not asked again"
    assert [(p.attack, p.eps) for p in more.points][:3] == [(ONE, 0.02), (ONE, 0.05), (ONE, 0.1)]
    (run / "sweep.json").unlink()
    again = sweep_run(run, attacks=[ONE, TWO], eps=[0.05, 0.1], limit=8, draws=1)
    assert (again.points, again.overrides) == (whole.points, whole.overrides), "as if never stopped"
    capsys.readouterr()
    assert sweep_run(run, attacks=[ONE], eps=[0.05], limit=4, draws=0).header.n == 4
    assert "sweep.json is of another n; it is kept as sweep.json.old1 and made anew" in capsys.readouterr().err


def test_the_verb_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run")
    assert main(["sweep", str(run), "--limit", "8", "--attack", ONE, "--attack", TWO, "--eps", "0.05,0.1"]) == 0
    out = capsys.readouterr().out
    assert "8 images of digits (test), L∞; every attack is made again at each eps" in " ".join(out.split())
    assert "Under vmoe_pgd(linf(eps), steps=2)" in out
    assert "How much the choice of experts matters" in out
    assert out.rstrip().endswith(f"written to {run}/sweep.json; report shows it")
    assert all(len(line) <= 80 for line in out.splitlines()[:-1]), "the last names a path"
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    numbers = json.loads((tmp_path / "page.json").read_text())["runs"][0]
    assert numbers["headline"] is None
    assert [curve["attack"] for curve in numbers["sweep"]["curves"]] == [ONE, TWO]
    page = Page((tmp_path / "page.html").read_text())
    assert "sweep" in page.ids
    assert page.ids == ["verdict", "sweep", "made"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--attack", "pgd("], "cannot read 'pgd\\("),
        (["--eps", "8"], "8 is no eps of a sweep of linf"),
        (["--limit", "0"], "the limit on images is 0"),
        (["--draws", "some"], "--draws must be int; got 'some'"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trained(tmp_path / "run")
    assert main(["sweep", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(message, err)
    assert not (run / "sweep.json").exists()


# ------------------------------------------------------------------------------------------------ the page


def test_both_rules_are_told_apart_only_where_they_differ() -> None:
    every = [grid for grid in grids(Shown(record(), sweep_summary(record()))) if "moved" in grid.title]
    assert {small for grid in every for row in grid.rows for _, small in row} == {""}
    idle = point(WEAK, 0.1, {0}, moved_paper={"router": [0.5] * 4}, idle={"router": [0.5, 0.0, 0.0, 0.0]})
    (shown,) = (grid for grid in grids(Shown(record(), sweep_summary(record(points=[idle])))) if "moved" in grid.title)
    assert shown.rows[0][1] == ("12.5%", "paper’s 50.0%, idle 12.5%")


def test_the_page_shows_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record().write(run)
    page, numbers, _, source = made(run, tmp_path)
    assert page.ids.index("sweep") > page.ids.index("attacks")
    assert "://" not in source
    assert page.missing_alt == 0
    found = numbers["runs"][0]["sweep"]
    assert found["worst"]["0.3"]["count"] == 0
    assert found["spare"][1]["rates"]["0"]["count"] == 1
    assert found["curves"][0]["points"][0]["moved"]["router"] == 0.25
    assert "<title>vmoe_pgd(linf(eps), steps=2): 25% at 0.3</title>" in source


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name, curve=False, examples=False, n=10) for name in ("at", "moe", "plain")]
    record().write(runs[0])
    dense = record(
        header=dataclasses.replace(record().header, routers={}), overrides=[], left_out=[],
        points=[point(STRONG, 0.2, {3}, routing_fixed=[], routing_transplanted=[], moved={}, moved_paper={}, idle={})],
    )  # fmt: skip
    dense.write(runs[1])
    page, _, text, _ = made(runs, tmp_path)
    assert "| Run | Clean | 0.2 | Random experts | Worst removal |" in text
    assert "| moe | 100.0% (51.0–100.0) | 75.0% (30.1–95.4) | – | – |" in text
    assert "these sweeps are of different attacks" in page.text


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"points": []}, "without an attack yet and is left out"),
        ({"header": "other"}, "of other weights than the evaluation and is left out"),
        ({"done": False}, "sweep.json is not complete"),
    ],
)
def test_what_does_not_belong_is_said(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    run, found = make_run(tmp_path), record()
    if "header" in changes:
        changes = {"header": dataclasses.replace(found.header, model_hash="another")}
    dataclasses.replace(found, **changes).write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert ("sweep" in page.ids) == (numbers["runs"][0]["sweep"] is not None) == ("done" in changes)
    assert any(why in note for note in numbers["runs"][0]["notes"])


def test_names_of_routers() -> None:
    def short(*names: str) -> list[str]:
        return list(analysis.router_names(names).values())

    assert short("network.blocks.1.mlp.router", "network.blocks.3.mlp.router") == ["block 1", "block 3"]
    assert short("network.blocks.3.mlp.router") == ["block 3"]
    assert short("body.blocks.1.router", "body.blocks.12.router") == ["block 1", "block 12"]
    assert short("router") == ["router"]
    assert short("standard.router", "robust.router") == ["standard", "robust"]
    assert short("a.router", "b.c.router") == ["a.router", "b.c.router"]
