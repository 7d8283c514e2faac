"""RA-E and RA-R: each part attacked alone, on models whose answers are known beforehand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustmoe import records
from robustmoe.analysis import Rate, dissection_summary
from robustmoe.attacks import PGD, Threat, l2, linf
from robustmoe.attacks.routes import Misroute, Misrouting, countable
from robustmoe.attacks.routes.misroute import misrouted
from robustmoe.evaluation import dissect, dissect_run
from robustmoe.evaluation.dissection import parts_of
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise
from robustmoe.records import Dissection
from robustmoe.routing import Gate, Tape, Trace, choose, straight_through
from test_dissection import make_trained, record

EPS = 0.1
CORNER = f"pgd(linf({EPS}), steps=2, step_size={EPS})"
"""Two steps of eps reach a corner of the ball from any start."""


class Planes(RoutedModel):
    """A linear router, of as many experts as ``router`` (e, d) has rows, and linear experts ``answers`` (e, c): the
    logits of expert k are its row plus ``fragile`` * (1/2 - last pixel) for class 0.
    """

    def __init__(
        self, router: list[list[float]], answers: list[list[float]], gate: Gate = "straight_through", fragile: float = 0
    ) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.tensor(router))
        self.answers = nn.Parameter(torch.tensor(answers))
        self.gate, self.fragile = gate, fragile

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1) - 0.5
        routing = tape("router", choose((pixels @ self.router.T)[:, None], self.gate, 1))
        first = torch.eye(self.answers.shape[1], device=x.device)[0]
        experts = self.answers - self.fragile * pixels[:, -1, None, None] * first
        chosen = experts.gather(1, routing.index[:, 0, :, None].expand(-1, -1, experts.shape[2]))
        return (routing.weight[:, 0, :, None] * chosen).sum(1)


def points(*pixels: tuple[float, ...]) -> Tensor:
    return torch.tensor(pixels).view(len(pixels), 1, 1, -1)


P, STILL = [[-1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
"""Routers of 2 experts: expert 1 where the first pixel is above 1/2; always expert 0."""

X = points((0.2, 0.2), (0.39, 0.45), (0.41, 0.2), (0.405, 0.45), (0.45, 0.39), (0.495, 0.41))
"""The first pixels of images 2 to 5 are within 0.1 of 1/2, and the last pixels of 1, 3 and 5."""
Y = torch.zeros(6, dtype=torch.long)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("gate", ["straight_through", "hard", "vmoe"])
def test_constant_experts_stand_and_the_router_falls(gate: Gate) -> None:
    """Expert 0 says class 0, expert 1 class 1, whatever they see: an image falls where the boundary is within reach,
    and RA-R is the live model's own accuracy. A hard gate gives the whole-model attack no gradient.
    """
    model = Planes(P, [[1.0, 0.0], [0.0, 1.0]], gate)
    found = dissect(model, X, Y, attack=CORNER, num_classes=2).summary()
    assert found.routing_transplanted == found.robust["router"] == found.worst == Rate(2, 6)
    assert found.routing_fixed == found.clean == Rate(6, 6)
    assert found.weaker == "router", "4 images to none: see test_which_part_gives_way"
    assert found.robust["prediction"].count >= 2
    assert found.undercut == (() if found.robust["prediction"].count == 2 else ("router",))
    if gate == "hard":
        assert found.undercut == ("router",)


def test_fragile_experts_behind_a_router_that_stands() -> None:
    """Both experts say class 0 while the last pixel is below 1/2; their routes never move, and would not matter."""
    found = dissect(Planes(STILL, [[0.0, 0.0], [0.0, 0.0]], fragile=1), X, Y, attack=CORNER, num_classes=2).summary()
    assert found.clean == found.routing_transplanted == found.robust["router"] == Rate(6, 6)
    assert found.robust["prediction"] == found.routing_fixed == found.robust["experts"] == found.worst == Rate(3, 6)
    assert found.undercut == ()


def test_both_parts_apart() -> None:
    """Expert 1 says class 1 always, expert 0 class 0 while the last pixel is below 1/2. By experts alone 1, 3 and 5
    fall; by the router alone 2, 3, 4, 5. Image 0 stands.
    """
    found = dissect(Planes(P, [[0.0, 0.0], [-9.0, 0.0]], fragile=1), X, Y, attack=CORNER, num_classes=2).summary()
    assert (found.routing_fixed, found.routing_transplanted, found.worst) == (Rate(3, 6), Rate(2, 6), Rate(1, 6))
    assert found.worst.count <= min(rate.count for rate in found.robust.values())
    assert found.weaker == "unclear", "1 against 2 and 4"


@pytest.mark.parametrize("gate", ["straight_through", "hard", "soft"])
def test_equal_experts_make_ra_r_the_clean_accuracy(gate: Gate) -> None:
    """The route can be moved on 4 images. Image 0 is wrong from the start."""
    model, y = Planes(P, [[1.0, 0.0], [1.0, 0.0]], gate, fragile=1), torch.tensor([1, 0, 0, 0, 0, 0])
    found = dissect(model, X, y, attack=CORNER, num_classes=2).summary()
    assert found.routing_transplanted == found.clean == Rate(5, 6)
    if gate != "soft":
        assert found.consistency("margin") == Rate(2, 6)
        x_adv = Misroute(linf(EPS), steps=2)(model, X, y)
        assert torch.equal(x_adv, X), "no route is worse than the clean one: there is nothing to look for"


@pytest.mark.parametrize("scale", [5.0, 20.0, 80.0])
def test_a_soft_gate(scale: float) -> None:
    """Margins of the clean image for class 0: 3 by expert 0, -1 by expert 1. With weights a and 1 - a it stands while
    3a > 1 - a, so while the gate's logits differ by more than -ln 3: 2 scale (1/2 - p) > -ln 3.
    """
    router = [[scale * weight for weight in row] for row in P]
    model = Planes(router, [[3.0, 0.0], [0.0, 1.0]], "soft")
    x = points(*((p, 0.2) for p in (0.2, 0.35, 0.41, 0.43, 0.47, 0.6)))
    found = dissect(model, x, Y, attack=CORNER, num_classes=2).summary()
    border = 0.5 + math.log(3) / (2 * scale)
    stand = [p for p in (0.2, 0.35, 0.41, 0.43, 0.47, 0.6) if p + EPS < border]
    assert found.routing_transplanted.count == len(stand)
    assert found.clean.count == sum(p < border for p in (0.2, 0.35, 0.41, 0.43, 0.47, 0.6))
    assert 1 <= len(stand) <= 6
    assert found.routing_fixed == found.clean, "constant experts"
    assert found.robust["router"] == found.routing_transplanted, (
        "of constant experts the attacked model is the model itself"
    )


def test_the_worst_route_in_reach_is_kept_where_none_breaks() -> None:
    """Three experts, all right, with margins 3, 1, 2; the cells of 1 and 2 begin at p and q = 1/2."""
    model = Planes([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    x, y = points((0.45, 0.45), (0.2, 0.45), (0.2, 0.2)), torch.zeros(3, dtype=torch.long)
    found = misrouted(model, x, Misroute(linf(EPS), steps=20)(model, x, y), y)
    assert found.loss.tolist() == [-1, -2, -3]
    assert not found.fooled.any()


def dual(alpha: float = 0.5) -> DualModel:
    """The standard half's route hangs on the first pixel, the robust one's on the last. Expert 0 of each says class 0
    by 2 logits, expert 1 class 1 by 1: the blend falls where both routes are moved.
    """
    answers = [[2.0, 0.0], [0.0, 1.0]]
    return DualModel(Planes(P, answers), Planes([[0.0, -1.0], [0.0, 1.0]], answers), alpha, mix="logits")


def test_a_dual_model_falls_where_both_routes_move() -> None:
    """Both pixels are within 0.1 of 1/2 on images 3 and 5 alone, where each half's router crosses."""
    found = dissect(dual(), X, Y, attack=CORNER, num_classes=2).summary()
    assert [router.name for router in found.routers] == ["standard.router", "robust.router"]
    assert found.routing_transplanted == found.robust["router"] == Rate(4, 6)
    assert found.worst == Rate(4, 6)
    assert (found.routing_fixed, found.clean) == (Rate(6, 6), Rate(6, 6))
    assert [expert.clean for expert in found.experts] == [Rate(6, 6), Rate(0, 6)], "expert 1 of both halves"
    assert found.routers[1].consistency["router"] == Rate(3, 6), "image 1's too, whose margin falls from 2 to 1/2"
    assert found.routers[0].consistency["router"] == Rate(2, 6), "likewise 2 and 4"


def test_a_hard_half_beside_a_soft_one() -> None:
    """The soft half's margin is 2a - (1 - a) = 3a - 1, a = sigmoid(20 (1 - 2p)); the hard half's 2 or -1. Their sum is
    below 0 where the hard route moves (last pixel within 0.1) and 3a < 2: 20 (1 - 2p) < ln 2, p > 0.48 after +0.1.
    """
    answers = [[2.0, 0.0], [0.0, 1.0]]
    soft = Planes([[-20.0, 0.0], [20.0, 0.0]], answers, "soft")
    model = DualModel(soft, Planes([[0.0, -1.0], [0.0, 1.0]], answers), 0.5, mix="logits")
    assert not countable(model.run(X).trace)
    found = dissect(model, X, Y, attack=CORNER, num_classes=2).summary()
    assert found.routing_transplanted.count == 6 - sum(
        p + EPS > 0.5 - math.log(2) / 40 and q + EPS > 0.5 for p, q in X[:, 0, 0]
    )


class Vote(RoutedModel):
    """A router of three items, the pixels, each sent to expert 1 above 1/2. The class is the majority's."""

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        pixels = x.flatten(1) - 0.5
        routing = tape("router", straight_through(torch.stack([-pixels, pixels], -1)))
        share = (routing.weight * (2.0 * routing.index - 1)).sum(-1).mean(1)
        return torch.stack([-share, share], 1)


def test_a_router_of_several_items() -> None:
    """By hand: 0 falls by its first item, 1 by either of two, 2 by its third; 3 loses one vote of three."""
    x = points((0.45, 0.2, 0.8), (0.55, 0.45, 0.9), (0.1, 0.7, 0.45), (0.9, 0.9, 0.55))
    found = dissect(Vote(), x, torch.tensor([0, 1, 0, 1]), attack=CORNER).summary()
    assert found.routing_transplanted == found.robust["router"] == Rate(1, 4)


# ------------------------------------------------------------------------------------------------ another way


@pytest.mark.parametrize("threat", [linf(0.03), l2(0.1)])
def test_two_experts_by_the_distance_to_the_plane(threat: Threat, images: Callable[..., Tensor]) -> None:
    """An image falls if the other expert is wrong on it and its cell is within |gap| / ||w||, in the dual norm; the
    pixels are far from 0 and 1.
    """
    model = build_model("ensemble(linear, experts=2, router=linear, gate=hard)", 3, (1, 4, 4), seed=1).eval()
    x = 0.25 + 0.5 * images(64, 1, 4, 4)
    with torch.no_grad():
        model.router.head.bias -= model.run(x).trace["router"].logits[:, 0].median(0).values
        zero, *rows = model.run(torch.cat([torch.zeros(1, 16), torch.eye(16)]).view(17, 1, 4, 4)).trace["router"].logits
        rows = torch.cat(rows) - zero
        logits = x.flatten(1) @ rows + zero
        says = torch.stack([expert(model.normalise(x)).argmax(1) for expert in model.experts], 1)
    chosen = logits.argmax(1)
    weight = (rows[:, 0] - rows[:, 1]).norm(p=1 if threat.norm == "linf" else 2)
    near = (logits[:, 0] - logits[:, 1]).abs() / weight < threat.eps
    y = says.gather(1, chosen[:, None])[:, 0]
    falls = near & (says.gather(1, 1 - chosen[:, None])[:, 0] != y)
    found = misrouted(model, x, Misroute(threat, steps=10)(model, x, y), y)
    assert torch.equal(found.fooled, falls)
    assert 5 < int(falls.sum()) < int(near.sum()) < 60


def test_three_experts_by_looking_everywhere() -> None:
    """Two pixels: every point of a grid of the ball is asked. The attack may miss what only a sliver of the ball
    reaches, and finds nothing else.
    """
    generator = torch.Generator().manual_seed(3)
    router, pixels = torch.randn(4, 2, generator=generator), torch.rand(200, 2, generator=generator)
    model = Planes(router.tolist(), [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    x = pixels.view(-1, 1, 1, 2)
    y = model(x).argmax(1)
    steps = torch.linspace(-EPS, EPS, 81)
    grid = torch.cartesian_prod(steps, steps)
    exact = torch.tensor(
        [
            bool((model((p + grid).clamp(0, 1).view(-1, 1, 1, 2)).argmax(1) != label).any())
            for p, label in zip(pixels, y)
        ]
    )
    fooled = misrouted(model, x, Misroute(linf(EPS), steps=20)(model, x, y), y).fooled
    assert 20 < int(exact.sum()) < 180
    assert not (fooled & ~exact).any()
    assert int((exact & ~fooled).sum()) <= 1


@pytest.mark.parametrize("name", ["ensemble_straight", "ensemble_soft", "ensemble_k2", "pathway"])
def test_the_answer_to_an_image_is_its_own(
    name: str, tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """Not that of the batch it stands in. By either attack the clean image loses at least what it lost before."""
    model, x, rows = tiny(name).eval(), images(8), torch.tensor([5, 2])
    y, noise = (model(x).argmax(1) + torch.arange(8) // 4) % 4, Noise.of(torch.arange(8), 0)
    attack = parts_of(PGD(linf(0.1), steps=3), model.run(x).trace)["router"]
    x_adv = attack(model, x, y, noise)
    assert torch.allclose(attack(model, x[rows], y[rows], noise[rows]), x_adv[rows], atol=1e-6)
    before, after = misrouted(model, x, x, y), misrouted(model, x, x_adv, y)
    assert not (before.fooled & ~after.fooled).any()
    assert isinstance(attack, Misroute) == (name in ("ensemble_straight", "pathway"))


def test_no_expert_wrong_means_nothing_can_fall(
    tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]
) -> None:
    """For a hard gate RA-R is at least the share of images on which all experts are right (LIP-11 of the paper's check,
    read for the clean image), and each image that falls has an expert that is wrong on it.
    """
    model, x = tiny("ensemble_straight").eval(), images(32)
    with torch.no_grad():
        says = torch.stack([expert(model.normalise(x)).argmax(1) for expert in model.experts], 1)
    y = model(x).argmax(1)
    some_wrong = (says != y[:, None]).any(1)
    fooled = misrouted(model, x, Misroute(linf(0.3), steps=20)(model, x, y), y).fooled
    assert not (fooled & ~some_wrong).any()
    assert int(fooled.sum()) > 0


def test_restarts_and_the_gradient_form_agree_with_it() -> None:
    """Seen through the smooth stand-in, a router whose routes can be counted falls on the same images."""
    model = Planes(P, [[1.0, 0.0], [0.0, 1.0]])
    counted = misrouted(model, X, Misroute(linf(EPS), steps=4, restarts=2)(model, X, Y), Y).fooled
    smooth = PGD(linf(EPS), steps=12, objective=Misrouting())(model, X, Y)
    assert counted.tolist() == misrouted(model, X, smooth, Y).fooled.tolist() == [False, False, True, True, True, True]


def test_what_cannot_be_counted_is_refused(tiny: Callable[..., RoutedModel], images: Callable[..., Tensor]) -> None:
    model, x = tiny("ensemble_k2"), images(2)
    with pytest.raises(ValueError, match="misroute needs routers of whole images, one expert each, and at most 64"):
        Misroute(linf(0.1))(model, x, torch.zeros(2, dtype=torch.long))
    trace: Trace = {f"r{i}": straight_through(torch.zeros(1, 1, 2)) for i in range(6)}
    assert countable(trace)
    assert not countable(trace | {"r6": straight_through(torch.zeros(1, 1, 2))})


# ------------------------------------------------------------------------------------------------ words, files


def weak() -> Dissection:
    """`record`, in which the attack on the router alone breaks image 0 of the live model, that on the whole none."""
    found = record()
    router = dataclasses.replace(found.under["router"], predicted=[9, 1, 2, 3])
    return dataclasses.replace(found, under={**found.under, "router": router})


def test_a_whole_model_attack_that_is_too_weak_is_said() -> None:
    assert dissection_summary(record()).undercut == ()
    assert dissection_summary(weak()).undercut == ("router",)


def test_only_the_missing_answers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without the answers to the attack "router", and not done: the rest is not asked again."""
    run, attack = make_trained(tmp_path / "run"), "pgd(linf(0.05), steps=2)"
    whole = dissect_run(run, attack=attack, limit=4)
    data = whole.to_dict()
    data["done"] = False
    del data["under"]["router"]
    (run / "dissection.json").write_text(json.dumps(data))
    old = records.Dissection.read(run)
    assert old is not None
    assert not old.done
    asked: list[Any] = []
    monkeypatch.setattr(Misroute, "perturb", _noted(asked, Misroute.perturb))
    monkeypatch.setattr(PGD, "perturb", _noted(asked, PGD.perturb))
    again = dissect_run(run, attack=attack, limit=4)
    assert [type(attack) for attack in asked] == [Misroute]
    assert (again.under, again.done) == (whole.under, True)
    assert list(again.under) == list(whole.under)
    assert json.loads((run / "dissection.json").read_text())["done"]


def _noted(asked: list[Any], real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def perturb(self: Any, *args: Any) -> Tensor:
        asked.append(self)
        return real(self, *args)

    return perturb
