"""`robustmoe theory`: every experiment, small, holds; and does not once what it checks is broken."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustmoe import cli, theory
from robustmoe.errors import UserError
from robustmoe.lipschitz import parts
from robustmoe.records.theory import Comparison, Experiment
from robustmoe.reporting import figures
from robustmoe.reporting import theory as reporting
from robustmoe.theory import draws, fixed, radius, slots, split, trained

SMALL: dict[str, Callable[..., Experiment]] = {
    "X1": lambda: fixed.x1(experts=(1, 4, 8), draws=2, width=8),
    "X1b": lambda: fixed.x1b(experts=(2, 8), width=8),
    "X1c": lambda: fixed.x1c(experts=4, width=8, out=8, draws=2),
    "X2": lambda: fixed.x2(widths=(32, 256), draws=2, experts=4),
    "X3": lambda: fixed.x3(points=6, width=8),
    "X4": lambda: split.x4(items=3),
    "X5": lambda: split.x5(points=20_001),
    "X6": lambda: split.x6(items=16),
    "X7": lambda: radius.x7(routers=30, tries=8),
    "X8": lambda: radius.x8(separations=(0.25, 1.0), n=320, experts=4),
    "X9": lambda: trained.x9(seed=1, seeds=1, steps=400),
    "X10": lambda: split.x10(cases=14),
    "X11": lambda: slots.x11(scales=(0.0, 5.0, 100.0), tokens=4, width=6),
}


def failed(one: Experiment) -> list[str]:
    return [row.setting for row in one.rows if not row.holds]


def test_every_experiment_has_a_small_one() -> None:
    assert set(SMALL) == set(theory.EXPERIMENTS)


@pytest.mark.parametrize("name", SMALL)
def test_it_holds(name: str) -> None:
    one = SMALL[name]()
    assert one.id == name
    assert not failed(one)
    assert sum(row.kind != "measured only" for row in one.rows) >= 2


# ------------------------------------------------------------------------------------------------ broken on purpose


def no_mass(made: parts.Split) -> parts.Split:
    """LIP-3 without the term that only softmax weights which do not add up to 1 have."""
    return made._replace(mass=0 * made.mass)


BROKEN: dict[str, tuple[object, str, Callable[..., object], str]] = {
    "X1": (fixed, "_squared_norms", lambda x, y: (x * x).sum((1, 2)), "E=4"),
    "X1b": (fixed, "mirrored", lambda x, seed: x * torch.linspace(1, 2, x.shape[-1]).double(), "E=2"),
    "X1c": (fixed, "unit", lambda x: x, "random"),
    "X2": (fixed, "block_coherence", lambda x, group: 0.0, "d=32: outside"),
    "X3": (fixed, "steepest", lambda x, y: x.new_ones(x.shape[:-2]), "rods, centre norm 0.5"),
    "X4": (split, "jacobian_split", lambda *a: no_mass(parts.jacobian_split(*a)), "vmoe: A + R"),
    "X5": (split, "_fixed_point", lambda: 1.2, "experts +-x, beta=1:"),
    "X6": (split, "jump", lambda *a: 1.01 * parts.jump(*a), "hard, k=1: jump"),
    "X7": (radius, "routing_radius", lambda *a: 1.01 * parts.routing_radius(*a), "l2: routes moved"),
    "X8": (
        radius,
        "nearest_wrong",
        lambda made: made.x - 0.9 * made.y[:, None] * made.teachers[made.own],
        "D=1: search",
    ),
    "X9": (
        trained,
        "train",
        lambda x, y, e, decay, steps, lr, seed: (x[:, :e] * 0, x[:, :e] * 0),
        "decay: mean squared",
    ),
    "X10": (
        split,
        "popoviciu_bound",
        lambda *a: parts.MixingBound(*(0.3 * b for b in parts.popoviciu_bound(*a))),
        "||R||",
    ),
    "X11": (slots, "at_scale_0", lambda made, tokens: 0.5, "scale 0: ||J||, that"),
}
"""Experiment -> where, what is put in the place of what, and how the row begins that has to notice."""


@pytest.mark.parametrize("name", BROKEN)
def test_it_fails_when_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, what, wrong, row = BROKEN[name]
    monkeypatch.setattr(home, what, wrong)
    assert any(setting.startswith(row) for setting in failed(SMALL[name]()))


def test_every_experiment_is_broken_once() -> None:
    assert set(BROKEN) == set(theory.EXPERIMENTS)


def test_models_that_are_no_interpolants_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of two models that do not fit says nothing, even where it comes out right (both are 1 % too short)."""
    right = fixed.minimum_norm
    monkeypatch.setattr(fixed, "minimum_norm", lambda x, y: 0.99 * right(x, y))
    assert failed(SMALL["X1"]()) == ["worst difference or misfit in any draw"]
    assert failed(SMALL["X1b"]()) == ["E=2: ratio", "E=8: ratio"]


def test_an_attack_on_the_experts_alone_misses_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds the route fixed finds a radius a where it is min(a, D/2): the search of X8 has to notice."""

    def in_the_cell(made: radius.Clusters) -> torch.Tensor:
        margin = made.y * made.outputs(made.x).gather(1, made.own[:, None])[:, 0]
        return made.x - ((margin + 1e-9) * made.y)[:, None] * made.teachers[made.own]

    monkeypatch.setattr(radius, "nearest_wrong", in_the_cell)
    assert "D=0.25, eps=0.2: MoE robust accuracy" in failed(SMALL["X8"]())


# ------------------------------------------------------------------------------------------------ claims by hand


def test_the_nearest_wrong_point_by_hand() -> None:
    """Two clusters in the plane of (own coordinate 0, own coordinate 1, centre axes): a point with margin 0.3 and
    centres 2 apart falls by 0.3 in its cell; with margin 5 it falls by crossing at distance 1.
    """
    teachers = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).double()
    centres = torch.tensor([[0.0, 0, math.sqrt(2), 0], [0, 0, 0, math.sqrt(2)]]).double()
    x = torch.tensor([[0.3, 0, math.sqrt(2), 0], [5.0, 0, math.sqrt(2), 0]]).double()
    made = radius.Clusters(x, torch.ones(2).double(), torch.zeros(2).long(), teachers, centres, 2.0)
    size = (radius.nearest_wrong(made) - x).norm(dim=1)
    assert size.tolist() == pytest.approx([0.3, 1.0], abs=1e-7)


def test_steepest_by_hand() -> None:
    """Points 0, 1, 3 with values 0, 2, 3: slopes 2, 1, 1/2."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    assert float(fixed.steepest(x, torch.tensor([0.0, 2.0, 3.0]))) == 2.0


def test_draws_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(3)
    one = draws.normal(1, "a", 4, 2)
    torch.manual_seed(4)
    assert torch.equal(one, draws.normal(1, "a", 4, 2))
    assert not torch.equal(one, draws.normal(2, "a", 4, 2))
    assert not torch.equal(one, draws.normal(1, "b", 4, 2))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    SMALL["X11"]()
    assert torch.equal(before, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "kind, measured, expected, upper, tolerance, holds",
    [
        ("equal", 1.05, 1.0, math.nan, 0.1, True),
        ("equal", 1.2, 1.0, math.nan, 0.1, False),
        ("equal", 0.8, 1.0, math.nan, 0.1, False),
        ("at most", -9.0, 1.0, math.nan, 0.0, True),
        ("at most", 1.1, 1.0, math.nan, 0.0, False),
        ("at least", 9.0, 1.0, math.nan, 0.0, True),
        ("at least", 0.9, 1.0, math.nan, 0.0, False),
        ("between", 1.5, 1.0, 2.0, 0.0, True),
        ("between", 2.5, 1.0, 2.0, 0.0, False),
        ("between", 0.5, 1.0, 2.0, 0.0, False),
        ("measured only", 7.0, math.nan, math.nan, 0.0, True),
        *((kind, math.nan, 1.0, 2.0, 1.0, False) for kind in ("equal", "at most", "at least", "between")),
        ("measured only", math.nan, math.nan, math.nan, 0.0, False),
    ],
)
def test_when_a_row_holds(
    kind: str, measured: float, expected: float, upper: float, tolerance: float, holds: bool
) -> None:
    assert Comparison("", kind, measured, expected, upper, tolerance).holds is holds  # type: ignore[arg-type]


def test_when_a_published_number_came_out_again() -> None:
    assert Comparison("", "measured only", 1.0).reproduced is None
    assert Comparison("", "measured only", 1.0, published=1.04, near=0.05).reproduced is True
    assert Comparison("", "measured only", 1.0, published=1.06, near=0.05).reproduced is False
    assert Comparison("", "measured only", 1.0, published=1.06, near=None).reproduced is None


# ------------------------------------------------------------------------------------------------ verb, table, figures


def test_the_verb_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "x1B", "X6", "X3", "--seed", "5", "--out", str(tmp_path / "figures")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    titles = [line.split()[0] for line in lines if line.startswith("X") and ":" not in line.split()[0]]
    assert titles == ["X1b", "X3", "X6"]
    assert any(line.split() == ["E=2:", "ratio", "1.41421", "±1e-06", "1.41421", "1.41421", "holds"] for line in lines)
    assert "does not hold" not in out
    page = tmp_path / "figures" / "figures.html"
    assert lines[-1] == f"figures: {page}"
    drawn = page.read_text()
    assert [title for title in ("X1b ", "X3 ", "X6 ") if f"<h2>{title}" in drawn] == ["X3 "], "X1b and X6 have none"
    curves = sum(len(chart.curves) for chart in fixed.x3(seed=5).charts)
    assert curves > 0
    assert drawn.count('<path class="line ') == curves
    assert "nan" not in drawn[drawn.index("<main>") : drawn.index("</main>")].lower()


def test_an_unknown_experiment_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "X12"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("robustmoe: unknown experiment 'X12'; did you mean 'X")
    assert err.count("\n") == 1
    with pytest.raises(UserError, match="unknown experiment 'y'; known: X1, "):
        theory.run(["y"])


def test_the_table_says_what_does_not_hold() -> None:
    rows = (
        Comparison("good", "at most", 1.0, 2.0),
        Comparison("bad", "at least", 1.0, 2.0, published=3.0, near=0.1),
        Comparison("seen", "measured only", 1.0, published=1.5, near=None),
    )
    text = reporting.theory_table([Experiment("X0", "a title", rows, "It says so.", 0, 1.25)])
    table = [line.split() for line in text.splitlines()]
    assert ["good", "≤", "2", "1", "holds"] in table
    assert ["bad", "≥", "2", "1", "3", "!", "does", "not", "hold"] in table
    assert ["seen", "–", "1", "(1.5)", "–"] in table
    assert "1 of 2 rows hold" in text
    assert "0 of 1 came out again" in text
    assert "X0: It says so." in text


def test_a_chart_is_drawn_where_its_numbers_are() -> None:
    """A level line is level, a doubling on a logarithmic axis has one length, and what has no logarithm is left out."""
    points = ((1.0, 1.0), (10.0, 2.0), (100.0, 4.0), (1000.0, 0.0))
    drawn = figures.lines(
        "t",
        [figures.Series("level", ((1.0, 2.0), (100.0, 2.0)), 1), figures.Series("rises", points, 2)],
        figures.Axes("x", log_x=True, log_y=True),
    )
    paths = re.findall(r'class="line s\d" d="M([^"]*)"', drawn)
    level, rises = ([tuple(map(float, pair.split())) for pair in path.split("L")] for path in paths)
    assert level[0][1] == level[1][1] == rises[1][1]
    (x0, y0), (x1, y1), (x2, y2) = rises
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1


def test_dots_are_not_joined() -> None:
    series = [figures.Series("ends", ((0.0, 0.0), (1.0, 4.0)), 1, joined=False)]
    drawn = figures.lines("t", series, figures.Axes("x"))
    assert "<path" not in drawn
    assert drawn.count("<circle") == 2
