"""Dissection: every number against one worked by hand or found another way, its file, its page, its verb."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import robustmoe as rm
from robustmoe import analysis, records
from robustmoe.analysis import Rate, dissection_summary, route_iou, weaker_part
from robustmoe.attacks import PGD, linf
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.evaluation import dissect, dissect_run, evaluate
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.base import Dense
from robustmoe.models.convolution import RoutedConv
from robustmoe.models.norm import BatchNorm2d
from robustmoe.noise import Noise
from robustmoe.records import Answers, Dissection, RouterInfo
from robustmoe.routing import Tape, straight_through
from robustmoe.training.checkpoint import save_weights
from test_report import CLASSES, Page, made, make_header, make_run

dissection = importlib.import_module("robustmoe.evaluation.dissection")
CORNER = "pgd(linf(0.1), steps=2, step_size=0.1)"


def summaries_of(*given: Any, **options: Any) -> list[analysis.EvaluationSummary]:
    """Numbers of what `evaluate` gives."""
    return [record.summary() for record in evaluate(*given, **options)]


class Corners(RoutedModel):
    """An image is its pixels p and q. Expert 0 where p <= 1/2, else expert 1, by the gap |2p - 1|. Expert 0 says class
    0 where q < 1/2, else class 1; expert 1 says the opposite. ``nan``: a router that is broken.
    """

    def __init__(self, nan: bool = False) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(torch.nan if nan else 0.5))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        p, q = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        routing = tape("router", straight_through(torch.stack([self.middle - p, p - self.middle], 1)[:, None]))
        experts = torch.stack([0.5 - q, q - 0.5, q - 0.5, 0.5 - q], 1).view(-1, 2, 2)
        chosen = experts.gather(1, routing.index[:, 0, :, None].expand(-1, -1, 2))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


POINTS = [(0.2, 0.2), (0.45, 0.2), (0.2, 0.45), (0.8, 0.8), (0.8, 0.2), (0.55, 0.8), (0.2, 0.8), (0.8, 0.55)]
X, Y = torch.tensor(POINTS).view(-1, 1, 1, 2), torch.tensor([0, 0, 0, 0, 0, 0, 1, 0])
"""Counted from 0, and within 0.1: the route of 1 and 5 can be moved, the expert's answer to 2 and 7; 4 is wrong. Two
steps of 0.1 reach the corner of the ball from any start."""


@pytest.fixture(scope="module")
def corners() -> analysis.DissectionSummary:
    return dissect(Corners(), X, Y, attack=CORNER).summary()


# ------------------------------------------------------------------------------------------------ by hand


def test_the_whole_model(corners: analysis.DissectionSummary) -> None:
    """Right: all but 4. Route held: 2 and 7 break. Misrouted: 1 and 5 meet the other expert, which says the opposite.
    Steering, like all attacks together, leaves 0, 3 and 6.
    """
    assert corners.clean == Rate(7, 8)
    assert corners.routing_fixed == Rate(5, 8)
    assert corners.routing_transplanted == corners.misrouted == Rate(5, 8)
    assert corners.robust["steering"] == corners.worst == Rate(3, 8)
    assert corners.weaker == "unclear", "two images each"


def test_the_router(corners: analysis.DissectionSummary) -> None:
    (router,) = corners.routers
    assert router.consistency["margin"] == router.consistency["flip"] == Rate(6, 8)
    assert router.kept["margin"] == 6 / 8
    assert router.load["clean"] == router.load["margin"] == (Rate(4, 8), Rate(4, 8)), "0 1 2 6; then 0 2 5 6"
    assert router.transitions == ((3, 1), (1, 3))
    assert router.gap_median == pytest.approx(0.6)
    assert router.gap_max == pytest.approx(0.6)
    assert router.ties == Rate(0, 8)
    gate = [1 / (1 + math.exp(-gap)) for gap in (0.6, 0.1)]
    entropy = [-g * math.log(g) - (1 - g) * math.log(1 - g) for g in gate]
    assert router.entropy == pytest.approx((6 * entropy[0] + 2 * entropy[1]) / 8, rel=1e-5)
    assert router.residue == (Rate(3, 8), Rate(2, 8)), "expert y mod 2 gets 0, 1, 2; 1 can be moved away"


def test_where_the_routes_of_a_class_go(corners: analysis.DissectionSummary) -> None:
    """Class 0: expert 0 had {0, 1, 2}, then {0, 2, 5}; expert 1 had {3, 4, 5, 7}, then {1, 3, 4, 7}. Class 1: {6}, {6};
    expert 1 never gets it.
    """
    (router,) = corners.routers
    assert router.class_iou[0] == (2 / 4, 3 / 5)
    assert router.class_iou[1][0] == 1
    assert math.isnan(router.class_iou[1][1])
    assert router.iou["margin"] == pytest.approx((2 / 4 + 3 / 5 + 1) / 3)
    assert router.classes.clean == ((3 / 7, 4 / 7), (1.0, 0.0))


def test_the_experts(corners: analysis.DissectionSummary) -> None:
    """Expert 0 alone is right on 0, 1, 2, 4, 6, of which 2 is near; expert 1 on 3, 5, 7, of which 7 is near."""
    first, second = corners.experts
    assert (first.clean, first.robust) == (Rate(5, 8), Rate(4, 8))
    assert (second.clean, second.robust) == (Rate(3, 8), Rate(2, 8))
    assert (first.own, first.others) == ({"router": Rate(4, 4)}, {"router": Rate(1, 4)})
    assert (second.own, second.others) == ({"router": Rate(3, 4)}, {"router": Rate(0, 4)})
    assert (first.own_residue, first.other_residues) == (Rate(4, 7), Rate(1, 1))
    assert (second.own_residue, second.other_residues) == (Rate(0, 1), Rate(3, 7))
    assert corners.mean_expert == (4 / 8 + 2 / 8) / 2
    assert corners.disagreement == {(0, 1): Rate(8, 8)}
    assert corners.mean_disagreement == 1


def test_route_iou_worked() -> None:
    """Class 0: images 0, 1, 2; expert 0 had {0, 1}, keeps {1} and gains {2}: 1 of 3. Class 1: image 3, whose two items
    were shared and then all went to expert 1: 0 of 1, and 1 of 1.
    """
    before, after = [[2, 0], [2, 0], [0, 2], [1, 1]], [[0, 2], [2, 0], [2, 0], [0, 2]]
    assert route_iou([0, 0, 0, 1], before, after, 2, 2) == ((1 / 3, 0 / 2), (0.0, 1.0))


@pytest.mark.parametrize(
    "experts, router, both, answer",
    [(0, 0, 0, "neither"), (3, 0, 0, "unclear"), (4, 0, 5, "experts"), (0, 4, 5, "router"), (0, 0, 7, "unclear")],
)
def test_which_part_gives_way(experts: int, router: int, both: int, answer: str) -> None:
    """Broken by one part alone, 4 to 0 is the fewest whose Wilson interval leaves out one half: with z^2 = 3.84 its end
    is z^2 / (n + z^2), 0.56 for 3 and 0.49 for 4. Images that were wrong do not count.
    """
    frozen = [False] * experts + [True] * router + [False] * both + [True, False, False]
    misrouted = [True] * experts + [False] * router + [False] * both + [True, True, True]
    clean = [True] * (experts + router + both + 1) + [False] * 2
    assert weaker_part(frozen, misrouted, clean) == answer


# ------------------------------------------------------------------------------------------------ another way


ATTACK = "pgd(linf(0.05), steps=2, seed=2)"


STAGED = "pathway(resnet8(width=4), experts=2, routers=stage, router=linear)"


class Case(NamedTuple):
    """A tiny pathway of three experts, which is right on all its images."""

    model: RoutedModel
    x: Tensor
    y: Tensor


@pytest.fixture
def case(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> Case:
    model, x = tiny("pathway").eval(), images(12)
    return Case(model, x, model(x).argmax(1))


def static(model: RoutedModel, k: int) -> Dense:
    """Expert k's pathway as an ordinary network: each routed convolution is that expert's."""
    network = copy.deepcopy(model.network)

    def narrow(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, RoutedConv):
                setattr(module, name, child.experts[k])
            else:
                narrow(child)

    assert isinstance(network, nn.Module)
    narrow(network)
    assert isinstance(model.normalise, nn.Module)
    return Dense(network, model.normalise).eval()


def test_the_same_attacks_as_an_evaluation_and_as_on_the_slim_networks(case: Case) -> None:
    model, x, y = case
    found = dissect(model, x, y, attack=ATTACK, num_classes=4).summary()
    steering = "expert_transition(linf(0.05), steps=2, seed=2)"
    specs = [ATTACK, ATTACK.replace("seed=2", "objective=experts_only, seed=2"), steering]
    whole, held, steered = summaries_of(model, x, y, attacks=specs, num_classes=4)
    assert (found.clean, found.robust["prediction"]) == (whole.clean, whole.robust)
    assert found.routers[0].kept["prediction"] == pytest.approx(1 - whole.rerouted["router"])
    assert (found.robust["experts"], found.routing_fixed) == (held.robust, held.experts_exposed)
    assert found.robust["steering"] == steered.robust
    assert 0 < found.worst.count <= min(rate.count for rate in found.robust.values()) < 12
    attack = PGD(linf(0.05), steps=2, seed=2)
    for k, expert in enumerate(found.experts):
        slim = static(model, k)
        right = slim(x).argmax(1) == y
        x_adv = attack(slim, x, y, Noise.of(torch.arange(12), 2))
        assert expert.clean == Rate(int(right.sum()), 12)
        assert expert.robust == Rate(int((right & (slim(x_adv).argmax(1) == y)).sum()), 12)
    assert len({expert.robust for expert in found.experts} | {expert.clean for expert in found.experts}) > 2


def test_equal_experts_make_the_route_matter_nothing(case: Case) -> None:
    model, x, y = case
    for module in model.modules():
        if isinstance(module, RoutedConv):
            for expert in module.experts:
                expert.load_state_dict(module.experts[0].state_dict())
    y = model(x).argmax(1)
    found = dissect(model, x, y, attack=ATTACK, num_classes=4).summary()
    assert set(found.disagreement.values()) == {Rate(0, 12)}
    assert {expert.robust for expert in found.experts} == {found.routing_fixed}
    assert found.misrouted == found.clean == Rate(12, 12)
    assert found.routers[0].consistency["margin"].count < 12, "the route can be moved; it changes nothing"
    assert 0 < found.routing_fixed.count < 12


def test_the_batch_size_decides_nothing(corners: analysis.DissectionSummary) -> None:
    again = dissect(Corners(), X, Y, attack=CORNER, batch_size=3).summary()
    assert again.robust == corners.robust
    assert again.experts == corners.experts


def test_the_margin_attack_keeps_what_moves_the_route() -> None:
    """Image 0 is broken by a step of q, and moved by p: an attack that kept what breaks would leave the route."""
    x, y = torch.tensor([[0.45, 0.45]]).view(1, 1, 1, 2), torch.tensor([0])
    for seed in (0, 1):
        found = dissect(
            Corners(), x, y, attack=f"pgd(linf(0.1), steps=2, step_size=0.1, seed={seed})", num_classes=2
        ).summary()
        assert found.routers[0].consistency["margin"] == Rate(0, 1)


@pytest.mark.parametrize("name", ["ensemble_k2", "ensemble_soft", STAGED])
def test_routers_of_other_kinds(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor], labels: Callable[[int], Tensor]
) -> None:
    found = dissect(tiny(name), images(2), labels(2), attack="pgd(linf(0.03), steps=1)", num_classes=4).summary()
    assert [router.name for router in found.routers] == (
        [f"routers.{i}" for i in range(3)] if name == STAGED else ["router"]
    )
    assert len(found.experts) == (2 if name == STAGED else 3)
    for router in found.routers:
        assert sum(share.value for share in router.load["clean"]) == pytest.approx(1)
        assert (router.transitions is not None) == (router.residue is not None) == (name == STAGED)
        if name == "ensemble_soft":
            assert (router.gap_median, router.ties) == (None, None)
            assert set(router.consistency.values()) == {Rate(2, 2)}


class Twice(RoutedModel):
    """Router a reads pixel p, router b, of two items, the pixels q and r; each sends what is above 1/2 to expert 1. The
    class is expert 1's share of the three decisions, against 1/2.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1)
        logits = torch.stack([0.5 - pixels, pixels - 0.5], -1)
        a, b = tape("a", straight_through(logits[:, :1])), tape("b", straight_through(logits[:, 1:]))
        share = torch.cat([(r.weight * (2.0 * r.index - 1))[..., 0] for r in (a, b)], 1).mean(1)
        return torch.stack([-share, share], 1)


def test_two_routers_each_by_itself() -> None:
    """Within 0.1: a can be moved on images 0 and 1; b on 1 (one item of two), 2 (both) and 3 (one)."""
    points = [(0.45, 0.2, 0.8), (0.55, 0.45, 0.9), (0.1, 0.55, 0.45), (0.9, 0.9, 0.55)]
    x, y = torch.tensor(points).view(4, 1, 1, 3), torch.tensor([0, 1, 0, 1])
    found = dissect(Twice(), x, y, attack=CORNER).summary()
    a, b = found.routers
    assert (a.name, a.info, b.name, b.info) == ("a", RouterInfo(2, 1, 1), "b", RouterInfo(2, 1, 2))
    for attack in ("margin", "flip"):
        assert (a.consistency[attack], b.consistency[attack]) == (Rate(2, 4), Rate(1, 4))
    assert b.kept["margin"] == (1 + 1 / 2 + 0 + 1 / 2) / 4
    assert found.consistency("margin") == Rate(1, 4)
    assert (a.load["clean"], b.load["clean"]) == ((Rate(2, 4), Rate(2, 4)), (Rate(3, 8), Rate(5, 8)))
    assert a.transitions == ((1, 1), (1, 1))
    assert b.transitions is None, "an image has two items"
    assert a.residue is None, "b sends no image to one expert"
    assert b.gap_median == pytest.approx(0.1)
    assert b.gap_max == pytest.approx(0.8)
    assert found.experts[1].own == {"a": Rate(2, 2), "b": Rate(1, 1)}, "forced, it says class 1 of all"


def test_the_model_comes_back_as_it_was(case: Case) -> None:
    model = case.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rm.dissect(model, case.x[:2], case.y[:2], attack="pgd(linf(0.03), steps=1)", num_classes=4)
    assert all(module.training for module in model.modules())
    assert all(bool(torch.equal(value, before[name])) for name, value in model.state_dict().items())
    assert any(isinstance(module, BatchNorm2d) for module in model.modules())


# ------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    "attack",
    ["apgd(linf(0.1))", "pgd(linf(0.1), objective=router_only)", "expert_transition(linf(0.1))"],
)
def test_an_attack_that_others_cannot_be_made_from(attack: str) -> None:
    with pytest.raises(UserError, match=r"makes its attacks from one pgd on the whole model; got .*, expected such as"):
        dissect(Corners(), X, Y, attack=attack)


def test_what_cannot_be_taken_apart() -> None:
    with pytest.raises(UserError, match="the model has no router, so there is nothing to take apart"):
        dissect(lambda x: x.flatten(1), X, Y)
    with pytest.raises(UserError, match="the batch size is 0, expected at least 1"):
        dissect(Corners(), X, Y, batch_size=0)
    with pytest.raises(UserError, match="the limit on images is 0, expected at least 1"):
        dissect(Corners(), X, Y, limit=0)
    with pytest.raises(UserError, match="stopped: the attack's loss or gradient is not finite"):
        dissect(Corners(nan=True), X, Y, attack=CORNER)


# ------------------------------------------------------------------------------------------------ the file


def answers(experts: list[int], predicted: list[int], **changes: Any) -> Answers:
    """Of an image router of 2 experts: the expert and the class of each image."""
    routes = [[int(k == expert) for k in range(2)] for expert in experts]
    n = len(experts)
    common: dict[str, Any] = {
        "predicted": predicted, "routing_fixed": predicted, "routing_transplanted": predicted, "size": [0.0] * n,
        "routes": {"router": routes}, "moved": {"router": [0.0] * n},
    }  # fmt: skip
    return Answers(**{**common, **changes})


def record(**changes: Any) -> Dissection:
    """Four images of classes 0 1 2 3, all right; the router's attack moves the first; nothing else moves."""
    right = [0, 1, 2, 3]
    still = answers([0, 1, 0, 1], right)
    moved = answers([1, 1, 0, 1], right, routing_transplanted=[9, 1, 2, 3], moved={"router": [1.0, 0.0, 0.0, 0.0]})
    names = ("clean", "prediction", "experts", "steering", "flip", "residue", "expert 0", "expert 1")
    header = make_header(n=4, routers={"router": RouterInfo(2, 1, 1)}, attack="pgd(linf(8/255), steps=20)")
    numbers = {"router": [0.5, 0.0, 2.0, 1.0]}
    values: dict[str, Any] = {
        "header": header, "index": [0, 1, 2, 3], "labels": right, "forced": [[0, 1, 2, 2], [1, 1, 2, 3]],
        "narrow": numbers, "wide": numbers, "entropy": {"router": [0.1, 0.2, 0.3, 0.4]},
        "under": {**dict.fromkeys(names, still), "router": moved, "margin": moved}, "seconds": 2.5, "done": True,
    }  # fmt: skip
    return Dissection(**{**values, **changes})


def test_a_record_by_hand() -> None:
    found = dissection_summary(record())
    assert (found.clean, found.routing_fixed, found.worst) == (Rate(4, 4), Rate(4, 4), Rate(4, 4))
    assert found.routing_transplanted == found.misrouted == Rate(3, 4)
    (router,) = found.routers
    assert (router.gap_median, router.gap_max, router.ties) == (0.75, 2.0, Rate(1, 4))
    assert router.entropy == pytest.approx(0.25)
    assert router.transitions == ((1, 1), (0, 2))
    assert router.residue == (Rate(4, 4), Rate(4, 4))
    assert found.disagreement == {(0, 1): Rate(2, 4)}
    assert found.experts[0].own_residue == Rate(2, 2)
    assert found.experts[0].other_residues == Rate(1, 2)


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert records.Dissection.read(tmp_path) is None
    record().write(tmp_path)
    assert records.Dissection.read(tmp_path) == record()
    assert [file.name for file in tmp_path.iterdir()] == ["dissection.json"]


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("kind",), "audit", "not of the kind dissection: expected"),
        (("version",), 9, "dissection of version 9, this robustmoe reads version 3"),
        (("header", "n"), "four", "field 'header.n' must be a whole number"),
        (("header",), 3, "field 'header' must be an object"),
        (("under",), {}, "field 'under' must begin with 'clean'"),
        (("under", "margin", "routes"), {}, r"under\['margin'\].routes is of the routers \[\], expected \['router'\]"),
        (("under", "margin", "routes", "router"), [[1]] * 4, r"routes\['router'\]\[0\] must have 2 numbers, got 1"),
        (("under", "flip", "routing_fixed"), [1], r"under\['flip'\].routing_fixed has 1 entries, expected 4"),
        (("under", "flip", "size"), "big", r"field 'under\[flip\].size' must be a list"),
        (("labels",), [0, 1, 2, 10], "field 'labels' must be from 0 to 9"),
        (("forced",), [], "field 'forced' is of 0 experts, expected 2"),
        (("extra",), 1, "unknown field 'extra'"),
    ],
)
def test_a_damaged_file_gets_one_line(place: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(record().to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "dissection.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        records.Dissection.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("makes it anew")


def test_a_file_cut_short_and_one_that_lacks_answers(tmp_path: Path) -> None:
    (tmp_path / "dissection.json").write_text(json.dumps(record().to_dict())[:99])
    with pytest.raises(UserError, match="delete it, and `robustmoe dissect"):
        records.Dissection.read(tmp_path)
    some = {"clean": record().under["clean"]}
    record(under=some).write(tmp_path)
    with pytest.raises(UserError, match="it is done, but there are no answers under 'prediction'"):
        records.Dissection.read(tmp_path)
    record(under=some, done=False).write(tmp_path)
    assert records.Dissection.read(tmp_path) == record(under=some, done=False)


# ------------------------------------------------------------------------------------------------ run folders

SMALL = "ensemble(linear, experts=2, router=linear, gate=straight_through)"


def make_trained(folder: Path, model: str = SMALL) -> Path:
    """A run folder of a model that was not trained."""
    config = {
        "model": model, "data": "digits", "method": "at(pgd(linf(0.05), steps=1))", "threat": "linf(0.05)",
        "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.3], "attacks": [], "val_attack": None,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(folder / "model.safetensors", build_model(model, 10, (1, 8, 8)).state_dict(), model)
    return folder


def test_a_stopped_dissection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, attack, stop = make_trained(tmp_path / "run"), "pgd(linf(0.05), steps=2)", True
    asked: list[str] = []
    real = dissection.run_attack

    def counted(*args: Any) -> Any:
        asked.append(args[3])
        if stop and args[3] == "router":
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(dissection, "run_attack", counted)
    with pytest.raises(KeyboardInterrupt):
        dissect_run(run, attack=attack, limit=8)
    left = records.Dissection.read(run)
    assert left is not None
    assert (list(left.under), left.done) == (["clean", "prediction", "experts"], False)
    stop = False
    asked.clear()
    whole = dissect_run(run, attack=attack, limit=8)
    assert asked == ["router", "steering", "margin", "flip", "residue", "expert 0", "expert 1"]
    assert records.Dissection.read(run) == whole
    assert whole.done
    assert whole.seconds > left.seconds
    asked.clear()
    assert dissect_run(run, attack=attack, limit=8, batch_size=3) == whole, "the batch size is not part of the work"
    assert asked == []
    (run / "dissection.json").unlink()
    assert dissect_run(run, attack=attack, limit=8).under == whole.under, "as if never stopped"


def test_the_default_is_the_threat_of_the_run(tmp_path: Path) -> None:
    found = dissect_run(make_trained(tmp_path / "run"), limit=1)
    assert (found.header.attack, found.header.norm, found.header.eps) == ("pgd(linf(0.05), steps=20)", "linf", 0.05)


def test_other_work_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run")
    before = dissect_run(run, limit=4, attack="pgd(linf(0.05), steps=1)")
    found = dissect_run(run, limit=4, attack="pgd(linf(0.05), steps=2)", seed=3)
    assert (found.header.attack, found.header.seed) == ("pgd(linf(0.05), steps=2, seed=3)", 3)
    said = "dissection.json is of another attack; it is kept as dissection.json.old1 and made anew"
    assert said in capsys.readouterr().err
    assert json.loads((run / "dissection.json.old1").read_text()) == json.loads(json.dumps(before.to_dict()))
    dissect_run(run, limit=3, attack="pgd(linf(0.05), steps=2)", seed=3)
    assert sorted(path.name for path in run.glob("*.old*")) == ["dissection.json.old1", "dissection.json.old2"]
    assert Dissection.read(run).header.n == 3


def test_the_verb_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run")
    flags = ["--limit", "12", "--attack", "pgd(linf(0.05), steps=2)"]
    assert main(["dissect", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert "12 images of digits (test), L∞ ≤ 0.05" in out
    assert out.rstrip().endswith(f"written to {run}/dissection.json; report shows it")
    assert all(len(line) <= 80 for line in out.splitlines()[:-1]), "the last names a path"
    assert main(["evaluate", str(run), "--limit", "12", "--curve", "none", "--attack", "pgd(linf(0.05), steps=2)"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    numbers = json.loads((tmp_path / "page.json").read_text())["runs"][0]
    assert numbers["dissection"]["robust"]["prediction"] == numbers["headline"]["robust"]
    assert "dissection" in Page((tmp_path / "page.html").read_text()).ids


@pytest.mark.parametrize(
    "words, message",
    [
        (["--attack", "pgd("], "cannot read 'pgd\\("),
        (["--attack", "square(linf(0.1))"], "makes its attacks from one pgd"),
        (["--limit", "0"], "the limit on images is 0"),
        (["--limit", "some"], "--limit must be int or None; got 'some'"),
        (["--step", "3"], "unknown option '--step'"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trained(tmp_path / "run")
    assert main(["dissect", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(message, err)
    assert not (run / "dissection.json").exists()


def test_a_dense_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_trained(tmp_path / "run", "linear")
    assert main(["dissect", str(run)]) == 2
    assert capsys.readouterr().err.startswith("robustmoe: the model has no router, so there is nothing to take apart")


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record().write(run)
    page, numbers, _, source = made(run, tmp_path)
    assert "dissection" in page.ids
    assert "://" not in source
    assert page.missing_alt == 0
    found = numbers["runs"][0]["dissection"]
    assert (found["misrouted"]["count"], found["n"], found["weaker"]) == (3, 4, "unclear")
    assert found["disagreement"]["0-1"]["count"] == 2
    assert found["routers"][0]["class_iou"][5] == [None, None], "no image of that class"
    assert '<td class="strong" style="--v:1.000">100</td>' in source, "class 1 goes to expert 1"
    assert "<title>clean, expert 1: 75.0% (30.1–95.4)</title>" in source, "the bar of an expert that is right on 3 of 4"


def test_a_class_name_cannot_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    classes = ['<b>"cat"|', *CLASSES[1:]]
    found = record()
    dataclasses.replace(found, header=dataclasses.replace(found.header, classes=classes)).write(run)
    _, _, _, source = made(run, tmp_path)
    assert "<b>" not in source.replace("<b>Worth", "")


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name, curve=False, examples=False, n=10) for name in ("at", "advmoe", "plain")]
    record().write(runs[0])
    other = record()
    dataclasses.replace(other, header=dataclasses.replace(other.header, attack="b")).write(runs[1])
    page, numbers, text, _ = made(runs, tmp_path)
    head = "| Run | Clean | Attacked prediction | Route kept, prediction | Route kept, router’s margin |"
    assert head in text
    row = "| at | 100.0% (51.0–100.0) | 100.0% (51.0–100.0) | 100.0% (51.0–100.0) | 75.0% (30.1–95.4) |"
    assert row in text
    assert "these dissections are of different attacks" in page.text
    assert [run["dissection"] is None for run in numbers["runs"]] == [False, False, True]


@pytest.mark.parametrize(
    "changes, why", [({"done": False}, "not finished"), ({"header": "other"}, "of other weights than the evaluation")]
)
def test_what_does_not_belong_is_left_out_and_said(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    run, found = make_run(tmp_path), record()
    if "header" in changes:
        changes = {"header": dataclasses.replace(found.header, model_hash="another")}
    dataclasses.replace(found, **changes).write(run)
    page, numbers, _, _ = made(run, tmp_path)
    assert "dissection" not in page.ids
    assert numbers["runs"][0]["dissection"] is None
    assert any(f"dissection.json is {why} and is left out" in note for note in numbers["runs"][0]["notes"])
