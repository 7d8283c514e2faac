"""Fewer passes, the same verdicts: attacks that leave, and a curve that asks no image again whose answer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustmoe import records
from robustmoe.analysis import robust
from robustmoe.attacks import FAB, FMN, PGD, Attack, Joint, Viewed, at_radius, build_attack, linf
from robustmoe.evaluation import evaluate
from robustmoe.evaluation.curve import broken_below, nearest_within
from robustmoe.models import RoutedModel
from robustmoe.records.types import misfits

EPS = 0.02
RADII = (0.005, 0.01, 0.04, 0.08)
SHAPE = (3, 8, 8)


@pytest.fixture
def asked(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> tuple[RoutedModel, Tensor, Tensor]:
    """A routed model, images, and labels that are mostly its own answers: some stand, some break, some are wrong."""
    model, x = tiny("ensemble_hard"), images(24, *SHAPE)
    y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 4
    return model, x, y


def verdicts(result: records.Evaluation) -> dict[int, bool]:
    return {row.index: robust(row) for row in result.rows}


def queries(result: records.Evaluation) -> int:
    assert result.checks is not None
    return result.checks.queries


@pytest.mark.parametrize(
    "attack",
    [
        PGD(linf(EPS), steps=5, restarts=2),
        Viewed(build_attack("through(soft(0.3), pgd(linf(0.1)))").view, PGD(linf(EPS), steps=5)),  # type: ignore[attr-defined]
        PGD(linf(EPS), steps=3, objective=build_attack("pgd(linf(0.1), objective=diluted)").objective),
    ],
    ids=["pgd", "through a view", "diluted"],
)
def test_an_evaluation_lets_broken_images_go_and_says_so(
    attack: Attack, asked: tuple[RoutedModel, Tensor, Tensor]
) -> None:
    """Image by image the verdict of ``keep=best``, which a user who writes it gets."""
    model, x, y = asked
    inner = attack.inner if isinstance(attack, Viewed) else attack
    kept = replace(inner, keep="best")
    best = replace(attack, attack=kept) if isinstance(attack, Viewed) else kept
    [default], [explicit] = (evaluate(model, x, y, attacks=each) for each in (attack, best))
    assert "keep=first" in (default.header.attack or "")
    assert "keep=best" in (explicit.header.attack or "")
    assert verdicts(default) == verdicts(explicit)
    assert 0 < sum(verdicts(default).values()) < 21, "some of the right ones stand, some break"
    assert queries(default) < queries(explicit)


def test_where_more_than_the_verdict_counts_nothing_leaves(asked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    """Of an attack on the experts or the routers alone, how far it moves them is the result."""
    model, x, y = asked
    for result in evaluate(model, x[:4], y[:4]):
        if (result.header.attack or "").startswith("pgd"):
            assert result.header.objective is not None
            assert result.header.objective.aims_at_all == ("keep=first" in (result.header.attack or ""))


def curve_of(results: list[records.Evaluation]) -> dict[float, records.Evaluation]:
    return {result.header.eps: result for result in results if result.header.role == "curve"}


def test_the_curve_attacks_only_what_no_smaller_radius_broke(asked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    """Beside each radius attacked on its own: what breaks there is broken here, and nothing that breaks at a smaller
    radius stands.
    """
    model, x, y = asked
    attack = PGD(linf(EPS), steps=5)
    whole, *_ = results = evaluate(model, x, y, attacks=attack, curve=RADII)
    points = {**curve_of(results), EPS: whole}
    reused: Counter[float] = Counter()
    standing = set(range(24))
    for eps, result in sorted(points.items()):
        [alone] = evaluate(model, x, y, attacks=at_radius(attack, eps))
        lost = {index for index, stands in verdicts(result).items() if not stands}
        assert {row.index for row in alone.rows if not robust(row)} <= lost
        assert {row.index for row in result.rows if robust(row)} <= standing
        if eps != EPS:
            standing -= lost
        reused[eps] = sum(row.part == "smaller eps" for row in result.rows)
        for row in result.rows:
            assert row.size["linf"] <= eps * (1 + 1e-5)
            own = next(other for other in alone.rows if other.index == row.index)
            assert (row.clean, row.label, row.route_clean) == (own.clean, own.label, own.route_clean)
            if row.part == "":
                assert row == own, "who is attacked beside an image does not count"
    assert reused[0.005] == reused[EPS] == 0 < reused[0.01] < reused[0.04] < reused[0.08]
    assert all(len(result.rows) == 24 and result.checks is not None for result in points.values())


def test_a_killed_curve_goes_on_with_the_same_rows(asked: tuple[RoutedModel, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = asked
    attack = PGD(linf(EPS), steps=3)
    whole = evaluate(model, x, y, attacks=attack, curve=RADII[::2], out=tmp_path / "a", batch_size=8)
    evaluate(model, x, y, attacks=attack, curve=RADII[::2], out=tmp_path / "b", batch_size=8)
    for path in (tmp_path / "b").glob("*curve.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: len(lines) // 2]))
    again = evaluate(model, x, y, attacks=attack, curve=RADII[::2], out=tmp_path / "b", batch_size=8)
    assert [result.rows for result in again] == [result.rows for result in whole]


@pytest.mark.parametrize(
    "attack",
    [FMN(linf(EPS), steps=8), FAB(linf(EPS), steps=4, keep="best"), FAB(linf(EPS), steps=4, targets=1, keep="best")],
    ids=repr,
)
def test_a_search_for_the_nearest_gives_the_curve_at_once(
    attack: Attack, asked: tuple[RoutedModel, Tensor, Tensor]
) -> None:
    """Each row is that of the attack at this radius alone, and the search is made at the largest radius only."""
    model, x, y = asked
    results = evaluate(model, x, y, attacks=attack, curve=RADII[1:])
    standing = []
    for eps, result in sorted(curve_of(results).items()):
        [alone] = evaluate(model, x, y, attacks=at_radius(attack, eps))
        assert (queries(result) > 0) == (eps == max(RADII))
        assert [replace(row, part="") for row in result.rows] == alone.rows
        assert {row.part for row in result.rows} == {"" if eps == max(RADII) else "larger eps"}
        standing.append(sum(verdicts(result).values()))
    assert standing == sorted(standing, reverse=True)
    assert standing[0] > standing[-1]


@pytest.mark.parametrize(
    "attack", ["fmn(linf(0.1), start=random)", "fab(linf(0.1))", "fab(linf(0.1), keep=best, targets=2)", "pgd(linf(1))"]
)
def test_a_search_that_knows_the_radius_is_made_at_each(attack: str) -> None:
    assert not build_attack(attack).finds_nearest
    assert not Viewed(build_attack("through(exact, fgsm(linf(0.1)))").view, build_attack(attack)).finds_nearest  # type: ignore[attr-defined]


def test_rows_of_other_radii(asked: tuple[RoutedModel, Tensor, Tensor]) -> None:
    """Nothing is taken from a larger radius, from an attack bound to its batches, or of other images."""
    model, x, y = asked
    [done] = evaluate(model, x, y, attacks=PGD(linf(EPS), steps=3))
    lost = {row.index for row in done.rows if not robust(row)}
    row = broken_below(2 * EPS, [done], range(24))[0]
    assert not list(misfits(row, replace(done.header, role="curve")))
    assert list(misfits(row, done.header)), "of a curve alone"
    assert {row.index for row in broken_below(2 * EPS, [done], range(24))} == lost
    assert broken_below(EPS, [done], range(24)) == [] == broken_below(EPS / 2, [done], range(24))
    assert {row.index for row in broken_below(2 * EPS, [done], range(6))} == {index for index in lost if index < 6}
    bound = replace(done, header=replace(done.header, attack="apgd(linf(0.02), rng=autoattack)"))
    assert broken_below(2 * EPS, [bound], range(24)) == []
    for row in nearest_within(0.0, "linf", done.rows):
        assert row.size == {"linf": 0.0, "l2": 0.0, "l1": 0.0, "box": 0.0}
        assert row.adversarial == row.clean
        assert row.router_exposed == row.experts_exposed == row.clean
        assert row.route_adversarial == row.route_clean
        assert set(row.rerouted.values()) == {0.0}


def test_what_an_attack_is_in_an_evaluation() -> None:
    keep = {text: getattr(build_attack(text).for_verdict(), "keep", None) for text in (
        "pgd(linf(0.1))", "pgd(linf(0.1), keep=best)", "pgd(linf(0.1), keep=last)",
        "pgd(linf(0.1), objective=experts_only)", "pgd(linf(0.1), objective=router_hinge)", "fgsm(linf(0.1))",
    )}  # fmt: skip
    assert list(keep.values()) == ["first", "best", "last", None, None, None]
    assert torch.equal(
        PGD(linf(0.1), steps=2)(lambda x: x.flatten(1)[:, :3], torch.full((2, *SHAPE), 0.5), [0, 1]),
        PGD(linf(0.1), steps=2, keep="best")(lambda x: x.flatten(1)[:, :3], torch.full((2, *SHAPE), 0.5), [0, 1]),
    )
    assert Joint().aims_at_router
    assert Joint().aims_at_experts
