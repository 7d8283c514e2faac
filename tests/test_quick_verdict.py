"""quick_verdict: its parts and what they cost, whose word counts, what it breaks, what is said of its number; and the
order in which parts are learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from benchmarks.quick_verdict import FILE, SUITES, in_order
from torch import Tensor

from planted import PLANTED
from robustmoe.analysis.parts import QUICK_NETS
from robustmoe.attacks import (
    AutoAttack,
    AutoAttackRouting,
    QuickVerdict,
    Surrogate,
    Threat,
    build_attack,
    l1,
    l2,
    linf,
    quick,
)
from robustmoe.attacks.base import part_noise
from robustmoe.evaluation.meters import Meter
from robustmoe.models import Output, Plain, RoutedModel
from robustmoe.noise import Noise
from robustmoe.spec import index

EPS = 8 / 255
SUITE = QuickVerdict(linf(EPS))
LINEAR = "ensemble(linear, experts=3, router=linear, gate=hard)"
DENSE = ["margin", "targets", "square"]
ROUTED = ["margin", "experts held", "regions", "soft 1", "targets", "soft targets", "regions margin", "square"]
DUAL = [*ROUTED[:4], "half standard", "half robust", *ROUTED[4:]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps of each part."""
    for name, few in (("SHORT", 4), ("FLIPS", 2), ("LONG", 4), ("QUERIES", 20)):
        monkeypatch.setattr(quick, name, few)


def names(output: Output) -> list[str]:
    return [name for name, _ in SUITE.parts(output)]


@pytest.mark.parametrize(
    "name, parts, regions",
    [
        ("dense", DENSE, None),
        ("ensemble_hard", ROUTED, "ExpertTransition"),
        ("pathway", ROUTED, "ExpertTransition"),
        ("ensemble_k2", ROUTED, "RouteFlip"),
        ("vit_moe", ROUTED, "RouteFlip"),
        ("ensemble_soft", ROUTED, "RouteFlip"),
        ("dual", DUAL, "ExpertTransition"),
    ],
)
def test_its_parts_fit_the_model_and_cost_a_third_at_most(
    name: str, parts: list[str], regions: str | None, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """By what each part says that an image costs which is never broken."""
    output = tiny(name).run(images(2))
    assert names(output) == parts
    assert regions is None or type(dict(SUITE.parts(output))["regions"]).__name__ == regions
    assert 3 * SUITE.queries(output) <= AutoAttackRouting(linf(EPS)).queries(output)


def test_the_passes_are_what_it_says(
    short: None, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Counted one by one, of images that stand since the ball is nothing: hardly more than each part says, and of all
    parts half of it at least (a region that holds is searched less).
    """
    model, x, meter, before = tiny(LINEAR), images(2), Meter(), 0
    output = model.run(x)
    seen = Surrogate(model, model, close=True, on_pass=meter.on_pass)
    for name, part in QuickVerdict(linf(1e-9)).parts(output):
        assert (model(part(seen, x, output.logits.argmax(1))).argmax(1) == output.logits.argmax(1)).all()
        assert meter.queries - before <= 1.2 * len(x) * part.queries(output), name  # Square asks several at once
        before = meter.queries
    assert 2 * meter.queries >= len(x) * QuickVerdict(linf(1e-9)).queries(output)


def test_the_exact_model_judges(short: None, images: Callable[..., Tensor]) -> None:
    """Through a surrogate that calls everything broken, nothing is."""
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    never = Plain(lambda x: torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum((1, 2, 3))[:, None])
    always = Plain(lambda x: torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum((1, 2, 3))[:, None])
    assert torch.equal(SUITE(Surrogate(always, never, close=True), x, y), x)


@pytest.mark.parametrize("name", ["hard top-1", "hidden second route"])
def test_it_breaks_routes_that_hide_from_autoattack(name: str, short: None) -> None:
    """AutoAttack's first two parts leave every image (docs/planted.md has them all); the truth is that none stands."""
    case = next(planted for planted in PLANTED if planted.name == name).make()
    output = case.model.run(case.x)
    for _, part in AutoAttack(linf(case.eps)).parts(output)[:2]:
        short = replace(part, steps=10)  # type: ignore[type-var]
        assert case.robust(short(case.model, case.x, case.y)) == 1.0
    x_adv = QuickVerdict(linf(case.eps))(case.model, case.x, case.y)
    assert case.robust(x_adv) == 0.0
    assert float((x_adv - case.x).abs().max()) <= case.eps * (1 + 1e-5)


def test_what_holds_is_not_broken(short: None) -> None:
    case = next(planted for planted in PLANTED if planted.name == "dead router").make()
    assert torch.equal(QuickVerdict(linf(case.eps))(case.model, case.x, case.y), case.x)


@pytest.mark.parametrize("threat, classes", [(l2(0.5), 3), (l1(4.0), 2)])
def test_any_norm_and_few_classes(
    threat: Threat, classes: int, short: None, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    routed, x = tiny(LINEAR), images(3)
    model = Plain(lambda x: routed(x)[:, :classes])
    y = model(x).argmax(1)
    assert (threat.size(QuickVerdict(threat)(model, x, y) - x) <= threat.eps * (1 + 1e-5)).all()
    for name, part in QuickVerdict(threat).parts(model.run(x)):
        assert (threat.size(part(model, x, y) - x) <= threat.eps * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("name", ["linear", LINEAR])
def test_the_verdict_does_not_depend_on_the_batch(
    name: str, short: None, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """In batches of 2 and of 7, at a radius at which some images break and some do not."""
    model, x = tiny(name), images(7)
    y, noise, suite = model(x).argmax(1), Noise.of(torch.arange(7)), QuickVerdict(linf(0.02))
    whole = model(suite(model, x, y, noise)).argmax(1)
    parts = [
        suite(model, x[at : at + 2], y[at : at + 2], noise[torch.arange(at, min(at + 2, 7))]) for at in (0, 2, 4, 6)
    ]
    assert torch.equal(model(torch.cat(parts)).argmax(1), whole)
    assert 0 < int((whole != y).sum()) < 7


def test_a_net_without_gradient_is_searched(images: Callable[..., Tensor]) -> None:
    """Its pixels are rounded to tenths, the class is that of the brighter half: every climb is blind, Square is not. In
    the suite it draws as it does alone.
    """
    x = 0.5 + 0.02 * images(3)
    x[:, :, :4] += 0.02

    def rounded(x: Tensor) -> Tensor:
        halves = (x * 20).round().unflatten(2, (2, -1)).mean((1, 3, 4))
        return torch.cat([halves, halves - 9], 1)

    model = Plain(rounded)
    y = model(x).argmax(1)
    suite = QuickVerdict(linf(0.06), seed=2)
    parts = dict(suite.parts(model.run(x)))
    for name in ("margin", "targets"):
        assert torch.equal(model(parts[name](model, x, y)).argmax(1), y), name
    x_adv = suite(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    noise = part_noise(Noise.of(torch.arange(3), 2), "square")
    assert torch.equal(x_adv, parts["square"](model, x, y, noise))


# ------------------------------------------------------------------------------------------------ what is said


def test_as_many_nets_as_said_were_measured() -> None:
    """And of each as many images stand as under autoattack_routing, for a third of the passes at most."""
    told = json.loads(FILE.read_text(encoding="utf-8"))
    agree = [
        net
        for net, row in told["numbers"].items()
        if net in told["judging"] and row["quick"]["stand"] == row["whole"]["stand"] and row["share"] <= 100 / 3
    ]
    assert len(agree) == QUICK_NETS[0]
    assert len(told["judging"]) == QUICK_NETS[1]
    for net, each in told["judging"].items():
        quick, whole = (each[suite] for suite in SUITES)
        passes = [sum(part["passes"] for part in suite["parts"].values()) for suite in (quick, whole)]
        assert told["numbers"][net]["share"] == pytest.approx(100 * passes[0] / passes[1])


def test_it_is_written_as_others_are() -> None:
    assert build_attack("quick_verdict(linf(8/255), seed=3)") == QuickVerdict(linf(EPS), seed=3)
    [said] = [line for name, _, line in index.entries("attack") if name == "quick_verdict"]
    assert said.startswith("An upper bound of the robust accuracy")
    assert said.endswith("for a paper's table run autoattack_routing.")


# ------------------------------------------------------------------------------------------------ learning


def test_the_order_is_greedy_by_breaks_a_pass() -> None:
    """Two nets of three images. "cheap" breaks two for 2 passes and 1 for the one that it does not; "dear" all three of
    a net for 30 each; "late" what is left. By hand: cheap first (2 of 6 images in 2 + 4 passes), then late (1 break for
    1 pass and 3 x 1 that it does not break), then dear.
    """
    cheap = {"broken": [1, 1, 0], "passes": 3, "stood": 1}
    none = {"broken": [0, 0, 0], "passes": 3, "stood": 1}
    dear = {"broken": [1, 1, 1], "passes": 90, "stood": 100}
    late = {"broken": [0, 0, 1], "passes": 3, "stood": 1}
    nets = [
        {"n": 3, "parts": {"dear": dear, "cheap": cheap, "late": late}},
        {"n": 3, "parts": {"dear": dear, "cheap": none, "late": none}},
    ]
    order = in_order(nets)
    assert [each["name"] for each in order] == ["cheap", "late", "dear"]
    assert [(each["broke"], each["passes"]) for each in order] == [(2, 6), (1, 4), (3, 90)]
