"""Planted models: tiny routed classifiers whose weak spot is known exactly, to test evaluations with, ours included.

All read the same images: 32 of 3 x 6 x 6, ten classes, eps = 8/255 in linf, every pixel at least 0.2 from the box.
Channel 0 spells the class: pixel y is 0.7, the others 0.3. The *right expert* has the logits z(x) = 8 * (the first ten
pixels): its margin is 3.2, and no perturbation takes more than 16 eps = 0.5 of it, so it cannot be broken. A *wrong
expert* gives the same logits, shifted by one class or more: it is never right, whatever the perturbation.

What is left to the adversary is the route. Channels 1 and 2 hold a random texture that is orthogonal to fixed random
patterns of +-1, one a channel. u_i(x) = <pattern_i, channel i - 0.5> / 36 is 0 on every clean image and eps at most
within the ball; a route changes where u_i > 0.9 eps, for which at least 35 of the 36 pixels have to be at +eps or -eps
with the right signs. One sign step on u_i does it. Nothing else does: a random start has u_i = 0 +- 0.1 eps (a sum of
36 uniform numbers), and a query of Square, all whose pixels are at +-eps, has the signs right by chance in 37 of 2^36
cases. So an attack that has no gradient of u_i reports 100 % robust, and the truth is 0 %.

``python -m tests.planted`` writes docs/planted.md: what pyautoattack and we say of each. What is expected stands in the
records below (`PLANTED`), and tests/test_planted.py asserts it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustmoe.attacks import PGD, Attack, Objective, Suite, Threat, linf
from robustmoe.attacks.autoattack import AutoAttackRouting
from robustmoe.data import Batch
from robustmoe.evaluation.checks import CHECKS, Subject, ids
from robustmoe.models import RoutedModel
from robustmoe.models.base import Output
from robustmoe.models.plain import Plain, as_routed
from robustmoe.noise import Noise
from robustmoe.records import Check
from robustmoe.routing import Routing, Tape, straight_through, top_k

N, CLASSES, SIDE = 32, 10, 6
PIXELS = SIDE * SIDE
EPS = 8 / 255
THRESHOLD = 0.9
"""Of eps: the u at which a route changes."""

STEEP = 4.0 / EPS
"""Router logits a unit of u: the logit of a rival is -3.6 on clean images and at most 0.4 in the ball."""


def _signs(seed: int, *shape: int) -> Tensor:
    """Fixed random +-1."""
    return torch.where(Noise.of(torch.tensor([seed])).uniform(*shape)[0] < 0.5, -1.0, 1.0)


PATTERNS = _signs(0, 2, SIDE, SIDE)


def images(*orthogonal: Tensor) -> tuple[Tensor, Tensor]:
    """x (32, 3, 6, 6), y (32,): the class in channel 0; in channels 1 and 2 a texture within 0.5 +- 0.2, orthogonal to
    the patterns, and to every ``orthogonal`` (2, 6, 6).
    """
    y = torch.arange(N) % CLASSES
    x = torch.full((N, 3, SIDE, SIDE), 0.3)
    x[:, 0].flatten(1).scatter_(1, y[:, None], 0.7)
    texture = (0.2 * Noise.of(torch.arange(N), 1).uniform(2 * PIXELS) - 0.1).double()
    first, second = torch.zeros(2, 2, SIDE, SIDE)
    first[0], second[1] = PATTERNS
    basis = torch.linalg.qr(torch.stack([first, second, *orthogonal]).flatten(1).double().T).Q
    texture = texture - texture @ basis @ basis.T
    x[:, 1:] = (0.5 + texture).float().unflatten(1, (2, SIDE, SIDE))
    return x, y


def u(x: Tensor, channel: int) -> Tensor:
    """(n,) how far channel 1 or 2 is along its pattern; within +-eps around a clean image."""
    return ((x[:, channel] - 0.5) * PATTERNS[channel - 1].to(x)).flatten(1).mean(1)


def rival(x: Tensor, channel: int = 2, threshold: float = THRESHOLD) -> Tensor:
    """(n,) a router logit that is positive where u > threshold * eps."""
    return STEEP * (u(x, channel) - threshold * EPS)


def against_zero(*logits: Tensor) -> Tensor:
    """(n, 1, e) router logits: 0 for the right expert, and those given."""
    return torch.stack([torch.zeros_like(logits[0]), *logits], 1)[:, None]


def right(x: Tensor) -> Tensor:
    """z (n, 10): the right expert."""
    return 8.0 * x[:, 0].flatten(1)[:, :CLASSES]


def wrong(x: Tensor, by: int = 1) -> Tensor:
    """(n, 10): a wrong expert, whose class is ``by`` beside the true one."""
    return right(x).roll(by, 1)


def mixed(routing: Routing, experts: list[Tensor]) -> Tensor:
    """(n, c): weight times output, summed over the chosen of ``experts`` (n, c) each."""
    chosen = torch.stack(experts, 1)[torch.arange(len(routing.index))[:, None], routing.index[:, 0]]
    return (routing.weight[:, 0, :, None] * chosen).sum(1)


# ------------------------------------------------------------------------------------------------ the models


class HardTop1(RoutedModel):
    """The router enters through an argmax only (the published code of RT-ER). No loss of the output has a gradient of
    u_2, so every gradient attack leaves channel 2 at its random start; Square: see above. Broken by climbing the
    router's logits.
    """

    rule: Callable[[Tensor], Routing] = staticmethod(lambda logits: top_k(logits, 1, "hard"))

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        return mixed(tape("router", self.rule(against_zero(rival(x)))), [right(x), wrong(x)])


class Renormalised(HardTop1):
    """Gates normalised over the one chosen expert: a softmax over one number, which is 1 and has the gradient
    1 * (g - g * 1) = 0, exactly. Otherwise `HardTop1`.
    """

    rule = staticmethod(lambda logits: top_k(logits, 1, "renormalised"))


class GateScaled(HardTop1):
    """The control: the chosen output is multiplied by its gate, p = 1 / (1 + exp(rival)). Cross-entropy of p * z falls
    with p, so APGD-CE climbs u_2 and breaks every image: here AutoAttack is right. (DLR is scale-invariant and sees
    nothing of p.)
    """

    rule = staticmethod(lambda logits: top_k(logits, 1, "vmoe"))


class Saturated(RoutedModel):
    """`GateScaled` with router logits 100 times as large: the rival's is -360 on clean images and below -104 wherever
    u_2 < 0.64 eps, so its softmax is exactly 0 in float32, and so is the gradient of the gate. Broken by climbing the
    logits, which are as linear as before; by a gate of higher temperature, too.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = against_zero(100.0 * rival(x))
        return mixed(tape("router", top_k(logits, 1, "vmoe")), [right(x), wrong(x)])


class StraightThrough(RoutedModel):
    """Router logits (100 u_1, 100 u_1 + rival(u_2)): the route depends on u_2 alone. The straight-through gradient
    (AdvMoE's) moves the winner's logit only, so it aims at channel 1, where nothing is to be had, and has no part in
    channel 2. There is a gradient through the router, and it is wrong: the exact one is 0.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        winner = 100.0 * u(x, 1)
        logits = torch.stack([winner, winner + rival(x)], 1)[:, None]
        return mixed(tape("router", straight_through(logits)), [right(x), wrong(x)])


HYPERPLANES = _signs(2, 4, 2, SIDE, SIDE)


class Hyperplanes(RoutedModel):
    """A router that was never trained: four fixed random hyperplanes in pixel space, one an expert, of which the first
    is right; the largest wins, without a gate. The rivals are as far away as `THRESHOLD` says, along the pixels in
    which their hyperplane differs from the first's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("planes", HYPERPLANES.flatten(1))
        reach = (HYPERPLANES - HYPERPLANES[0]).abs().flatten(1).mean(1)
        self.register_buffer("bias", -THRESHOLD * EPS * reach)

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        scores = (x[:, 1:] - 0.5).flatten(1) @ self.planes.T / (2 * PIXELS) + self.bias
        routing = tape("router", top_k(STEEP * scores[:, None], 1, "hard"))
        return mixed(routing, [right(x), *(wrong(x, by) for by in (1, 2, 3))])


class Decoy(RoutedModel):
    """Three experts, two of them right. The router's nearest rival is the right one: its boundary is at u_1 = 0.3 eps.
    An attack that raises the best rival crosses it and goes on: rerouted, and nothing broken. Only the third expert is
    wrong, behind u_2 = 0.9 eps, and only while the second is not preferred. Broken by trying every rival.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = against_zero(rival(x, 1, 0.3), rival(x, 2))
        return mixed(tape("router", top_k(logits, 1, "hard")), [right(x), right(x), wrong(x)])


class TwoRoutes(RoutedModel):
    """Two routers, of u_1 and of u_2; the answer is wrong only if both have gone to their second expert. Neither flip
    alone breaks anything, and each costs nearly all of its channel's eps.
    """

    hidden = False

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        first = tape("first", top_k(against_zero(rival(x, 1)), 1, "hard"))
        gone = first.index[:, 0, 0] == 1
        score = torch.where(gone, rival(x, 2), -1.0) if self.hidden else rival(x, 2)
        second = tape("second", top_k(against_zero(score), 1, "hard"))
        return mixed(second, [right(x), torch.where(gone[:, None], wrong(x), right(x))])


class HiddenRoute(TwoRoutes):
    """`TwoRoutes` in which the second router sees the image only behind the first one's flip; on the clean route its
    logits are constant (as behind an expert that gives nothing). It cannot be aimed at before the first has moved.
    """

    hidden = True


class Quantised(RoutedModel):
    """The image is rounded to multiples of 1/16 before anything sees it: no gradient at all. The clean images (see
    `_quantised`) lie eps / 2 from the next level along the pattern, so that a step of eps along it moves all 36 pixels
    of channel 2 up by one level, and u_2 by 1/16; fewer than 35 of them are not enough.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        x = torch.round(16.0 * x) / 16.0
        logits = against_zero(16.0 * u(x, 2) - 34.5 / PIXELS)
        return mixed(tape("router", top_k(logits, 1, "hard")), [right(x), wrong(x)])


class Capacity(RoutedModel):
    """Each of two experts takes int(n / 2) images of a batch of n, first come, first served; what is left over goes to
    the other one, and where that is full too, nowhere (logits 0). The route is by channel 1, which is bright or dark,
    and out of reach of eps; each expert is right on its own kind and wrong on the other. A batch with as many bright as
    dark images is right, and stays right under attack; an image alone gets no answer.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        score = STEEP * (x[:, 1].flatten(1).mean(1) - 0.5)
        wish, room = (score > 0).long(), torch.full((2,), len(x) // 2)
        given = torch.empty_like(wish)
        for i, expert in enumerate(wish.tolist()):
            given[i] = next((e for e in (expert, 1 - expert) if room[e] > 0), -1)
            if given[i] >= 0:
                room[given[i]] -= 1
        weight = (given >= 0).to(x.dtype)
        routing = tape("router", Routing(against_zero(score), given.clamp(min=0)[:, None, None], weight[:, None, None]))
        own, other = right(x), wrong(x)
        bright = (wish == 1)[:, None]
        return mixed(routing, [torch.where(bright, other, own), torch.where(bright, own, other)])


class Stale(RoutedModel):
    """The scores of one call are kept on the module and used by the next, if it has as many images (AdvMoE's code keeps
    scores on its layers). Routes and experts as in `Capacity`, without the capacity. The same images in the same order
    are right, and so is their attack; after any other batch the answers follow that batch's routes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: Tensor | None = None

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        fresh = STEEP * (x[:, 1].flatten(1).mean(1) - 0.5)
        used = fresh if self.scores is None or len(self.scores) != len(x) else self.scores
        self.scores = fresh.detach()
        routing = tape("router", top_k(against_zero(used), 1, "hard"))
        own, other = right(x), wrong(x)
        bright = (fresh > 0)[:, None]
        return mixed(routing, [torch.where(bright, other, own), torch.where(bright, own, other)])


class Noisy(RoutedModel):
    """The router's training noise is left on: uniform in +-0.1 on each logit, from torch's global generator, in eval
    mode. The gate, which the output is multiplied by, is cut from the graph. The noise moves the gate, not the route:
    on clean images the logits are 3.6 apart, and at u_2 = eps they are 0.4 apart the other way. pyautoattack's test
    for randomness divides the outputs by their norm, and so does not see the gate.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = against_zero(rival(x))
        noisy = top_k(logits + 0.2 * torch.rand_like(logits) - 0.1, 1, "vmoe")
        routing = tape("router", Routing(logits, noisy.index, noisy.weight.detach()))
        return mixed(routing, [right(x), wrong(x)])


class Dead(RoutedModel):
    """Router logits that do not depend on the image: everything goes to one expert, which is right. Nothing to break:
    the robust accuracy is true, of a network with one expert.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = against_zero(torch.full_like(x[:, 0, 0, 0], -1.0))
        return mixed(tape("router", top_k(logits, 1, "hard")), [right(x), wrong(x)])


class NotANumber(RoutedModel):
    """Router logits that are NaN (0 / 0): the sort that ranks them gives expert 0 to every image, and the output is
    finite and right. The route is no function of the image any more.
    """

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        nothing = 0.0 * rival(x)
        logits = against_zero(nothing) + (nothing / nothing)[:, None, None]
        return mixed(tape("router", top_k(logits, 1, "hard")), [right(x), wrong(x)])


# ------------------------------------------------------------------------------------------------ hidden ones


class Shifted(nn.Module):
    """An expert with weights: the right logits, moved by so many classes. Alike, but for the weights."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(CLASSES).roll(by, 1))

    def forward(self, x: Tensor) -> Tensor:
        return right(x) @ self.weight


class Gate(nn.Module):
    """Router logits of the right expert, 0, and of the wrong one."""

    def forward(self, x: Tensor) -> Tensor:
        return against_zero(rival(x))[:, 0]


class HiddenTop1(nn.Module):
    """`HardTop1` as anybody would write it: a gate, a list of experts, an argmax. It tells no route."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), nn.ModuleList([Shifted(0), Shifted(1)])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), CLASSES, dtype=x.dtype, device=x.device)
        chosen = self.gate(x).argmax(1)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            out[mine] = expert(x[mine])
        return out


class HiddenPathway(nn.Module):
    """One decision picks the filters of every layer (AdvMoE's pathway): two linear layers with a bank of filters an
    expert; the second expert's undo each other's class for none, and give another class together. It tells no route.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = Gate()
        eye = torch.eye(CLASSES)
        self.first = nn.Parameter(torch.stack([eye, eye.roll(3, 1)]))
        self.second = nn.Parameter(torch.stack([eye, eye.roll(-2, 1)]))

    def forward(self, x: Tensor) -> Tensor:
        path = nn.functional.one_hot(self.router(x).argmax(1), 2).to(x)
        for bank in (self.first, self.second):
            filters = torch.einsum("ne,ecd->ncd", path, bank)
            x = torch.einsum("nc,ncd->nd", right(x) if x.ndim == 4 else x, filters)
        return x


class HiddenSoftMoE(nn.Module):
    """Soft MoE of images: each expert has a slot, which takes its mixture of the tokens (an image is one), and each
    token takes its mixture of the slots. The logits are those of `Saturated`, so that the softmax has no gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(), nn.ModuleList([Shifted(0), Shifted(1)])

    def forward(self, x: Tensor) -> Tensor:
        logits = 100.0 * self.gate(x)[:, None]
        tokens = x.flatten(1)[:, None]
        slots = torch.einsum("nts,ntd->nsd", logits.softmax(1), tokens)
        out = torch.stack(
            [expert(slot.unflatten(1, x.shape[1:])) for expert, slot in zip(self.experts, slots.unbind(1))], 1
        )
        return torch.einsum("nts,nsc->ntc", logits.softmax(2), out)[:, 0]


class Tilted(nn.Module):
    """An expert that adds, times u_2 / eps, what leads from the right class to the next. It is wrong from 0.97 eps on,
    for which all 36 pixels have to be right: Square can climb this loss, and gets to 35.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(CLASSES).roll(1, 1) - torch.eye(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return u(x, 2)[:, None] / (2 * 0.97 * EPS) * (right(x) @ self.weight)


class OffExperts(nn.Module):
    """Experts that run under `torch.no_grad` in eval mode, as in DeepSeek's ``moe_infer`` and its copies, beside a path
    that is always on. Both experts are broken by one step along the gradient, if there were one. Which of them
    an image takes says its brightness, out of reach of eps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Tilted(), Tilted()])

    def forward(self, x: Tensor) -> Tensor:
        return right(x) + (self.mixture(x) if self.training else self.infer(x))

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return self.mixture(x)

    def mixture(self, x: Tensor) -> Tensor:
        bright = x[:, 1].flatten(1).mean(1) - 0.5
        index = torch.stack([-bright, bright], 1).topk(1, -1).indices[:, 0]
        out = torch.zeros(len(x), CLASSES, dtype=x.dtype, device=x.device)
        for number, expert in enumerate(self.experts):
            mine = (index == number).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(x[mine]))
        return out


def foreign(kind: type[nn.Module]) -> Callable[[], RoutedModel]:
    """Makes a module as an evaluation takes it."""
    return lambda: as_routed(kind().eval())


# ------------------------------------------------------------------------------------------------ their images


def _beside_hyperplanes() -> tuple[Tensor, Tensor]:
    """Orthogonal to the differences of the hyperplanes."""
    return images(*(HYPERPLANES[1:] - HYPERPLANES[0]))


def _bright_and_dark() -> tuple[Tensor, Tensor]:
    """Every second image has a bright channel 1, the others a dark one."""
    x, y = images()
    x[:, 1] += torch.where(torch.arange(N) % 2 == 1, 0.1, -0.1)[:, None, None]
    return x, y


def _quantised() -> tuple[Tensor, Tensor]:
    """Channel 2 at 1/2 + (1/32 - eps/2) * pattern: it rounds to 1/2, and past 1/32 to the next level."""
    x, y = images()
    x[:, 2] = 0.5 + (1 / 32 - EPS / 2) * PATTERNS[1]
    return x, y


# ------------------------------------------------------------------------------------------------ the records


class Case(NamedTuple):
    """A model, images (32, 3, 6, 6) and labels, all right on clean, and the radius in linf."""

    model: RoutedModel
    x: Tensor
    y: Tensor
    eps: float

    def robust(self, x_adv: Tensor) -> float:
        """The share of ``x_adv`` that the model gets right."""
        with torch.no_grad():
            return float((self.model(x_adv).argmax(1) == self.y).float().mean())


Witness = Callable[[Case], Tensor]
"""The images that prove the truth, made by hand: inside the ball, and all wrong."""


def _along(*channels: int) -> Witness:
    """One step of eps along the pattern of each channel."""

    def step(case: Case) -> Tensor:
        x_adv = case.x.clone()
        for channel in channels:
            x_adv[:, channel] += case.eps * PATTERNS[channel - 1]
        return x_adv

    return step


def _across(case: Case) -> Tensor:
    """One step from the first hyperplane towards the second."""
    step = torch.zeros_like(case.x)
    step[:, 1:] = (HYPERPLANES[1] - HYPERPLANES[0]).sign()
    return case.x + case.eps * step


@dataclass(frozen=True)
class Planted:
    """One planted model and the truth about it.

    ``autoattack``: the robust accuracy that AutoAttack standard reports. ``witness``: breaks every image, by one step
    of eps; None where the images cannot be broken, or not by changing them. ``broken_by``: which of our attacks break
    every image ("joint", "routers", "flip", "transition", "beam"). ``fires``: the checks that warn or fail on the
    number of a PGD on the whole model. ``plain``: those that do for the model as a plain function x -> logits, which
    hides the router; () where nothing can see it.
    """

    name: str
    model: Callable[[], RoutedModel]
    data: Callable[[], tuple[Tensor, Tensor]]
    autoattack: float
    witness: Witness | None
    broken_by: tuple[str, ...]
    fires: tuple[str, ...]
    plain: tuple[str, ...] = ()

    def make(self) -> Case:
        x, y = self.data()
        return Case(self.model().eval(), x, y, EPS)


EVERY = ("routers", "flip", "transition", "beam")
SECOND, BOTH = _along(2), _along(1, 2)

PLANTED = (
    Planted("hard top-1", HardTop1, images, 1.0, SECOND, EVERY, ("R1", "R2", "R3")),
    Planted("gate-scaled top-1 (control)", GateScaled, images, 0.0, SECOND, ("joint", *EVERY), ()),
    Planted("renormalised top-1", Renormalised, images, 1.0, SECOND, EVERY, ("R1", "R2")),
    Planted("straight-through", StraightThrough, images, 1.0, SECOND, EVERY, ("G2", "R5"), ("G2",)),
    Planted("saturated softmax", Saturated, images, 1.0, SECOND, EVERY, ("R1", "R4")),
    Planted("random pixel hyperplanes", Hyperplanes, _beside_hyperplanes, 1.0, _across, EVERY, ("R1", "R2")),
    Planted("decoy route", Decoy, images, 1.0, SECOND, EVERY[1:], ("R1", "R3")),
    Planted("two routes", TwoRoutes, images, 1.0, BOTH, ("routers", "beam", "transition"), ("R1",)),
    Planted("hidden second route", HiddenRoute, images, 1.0, BOTH, ("routers", "transition"), ("R1",)),
    Planted("quantised input", Quantised, _quantised, 1.0, SECOND, (), ("G1",), ("G1",)),
    Planted("capacity", Capacity, _bright_and_dark, 1.0, None, (), ("H4", "R6"), ("H4",)),
    Planted("stale route", Stale, _bright_and_dark, 1.0, None, (), ("R13",), ("R13",)),
    Planted("noisy router", Noisy, images, 1.0, SECOND, EVERY, ("H7", "R7"), ("H7",)),
    Planted("dead router", Dead, images, 1.0, None, (), ("R9",)),
    Planted("NaN router", NotANumber, images, 1.0, None, (), ("H6",)),
    Planted("hidden hard top-1", foreign(HiddenTop1), images, 1.0, SECOND, (), ("R18",)),
    Planted("hidden pathway", foreign(HiddenPathway), images, 1.0, SECOND, (), ("R18",)),
    Planted("hidden Soft MoE", foreign(HiddenSoftMoE), images, 1.0, SECOND, (), ("R18",)),
    Planted("experts without gradient", foreign(OffExperts), _bright_and_dark, 1.0, SECOND, (), ("G2", "G15", "R18")),
)


def as_function(model: RoutedModel) -> Plain:
    """The same model as a plain function x -> logits, which tells no route."""
    return Plain(lambda x: model.body(x, Tape()))


# ------------------------------------------------------------------------------------------------ what is said of them


@contextlib.contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """The messages that the logger gets at WARNING, inside."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def oracle(case: Case, quick: bool = False) -> tuple[float, list[str]]:
    """AutoAttack standard as pyautoattack 0.2.0 runs it (seed 0): robust accuracy, asked of the model anew, and the
    flags that it raised, each once. ``quick``: only APGD-CE, and Square of 300 queries instead of 5,000.
    """
    import pyautoattack

    with _warnings_of("auto-attack") as flags:
        more = {"version": "custom", "attacks": ["apgd-ce", "square"]} if quick else {"version": "standard"}
        attack = pyautoattack.AutoAttack(case.model, norm="Linf", eps=case.eps, seed=0, **more)
        if quick:
            attack.apgd.n_restarts, attack.square.n_queries = 1, 300
        x_adv, _ = attack.run_standard_evaluation(case.x, case.y, batch_size=N)
    return case.robust(x_adv), list(dict.fromkeys(flag.partition("!")[0] for flag in flags))


def fired(model: RoutedModel, case: Case, wanted: Sequence[str]) -> list[Check]:
    """Those of the ``wanted`` checks that warn or fail for a PGD-20 on the whole model."""
    batch = Batch(case.x, case.y, torch.arange(len(case.x)))
    asked = Subject.of(model, (PGD(linf(case.eps), steps=20),), batch)
    with torch.no_grad():
        found = [(CHECKS[id].asked.get("attack") or CHECKS[id].asked["model"])(asked) for id in wanted]
    return [check for check in found if check.status in ("warn", "fail")]


@dataclass(frozen=True)
class RoutingHalf(Suite):
    """The second half of ``autoattack_routing``, alone: the attacks that know what a router is."""

    whole: AutoAttackRouting
    seed: int = 0

    @property
    def threat(self) -> Threat:  # type: ignore[override]
        return self.whole.threat

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return self.whole.objective

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return self.whole.routing_parts(output)


# ------------------------------------------------------------------------------------------------ the table

PAGE = Path(__file__).parents[1] / "docs" / "planted.md"
FILE = PAGE.parent / "results" / "planted.json"
ASKED = ("H4", "H6", "H7", "G1", "G2", "G15", "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R9", "R13", "R18")
HEAD = "| model | pyautoattack | truth | routing attacks | checks |"

TEXT = f"""# Planted models: what an evaluation has to find

Tiny routed models whose weak spot is known exactly, by construction (`tests/planted.py` says how and why): 32 images
each, all right on clean, linf 8/255. Made by `python -m tests.planted` (about a minute a model on one thread; with
names, only those), asserted by `tests/test_planted.py`.

- *pyautoattack*: the robust accuracy that AutoAttack standard reports (pyautoattack 0.2.0, its own iterations and
  queries, seed 0), and the flags that it raises.
- *truth*: what one step of eps, made by hand, leaves; – where no change of the image breaks it.
- *routing attacks*: what the second half of `autoattack_routing` leaves, without the first.
- *checks*: which of ours **fail** or warn on the number of a PGD-20 on the whole model. Asked:
  {", ".join(ASKED)}.

{HEAD}
|---|---|---|---|---|
"""

TIE = "\n<!-- numbers: planted * -->\n"
END = """
*capacity* gives no answer to an image that stands alone; *stale route* answers by the batch before; *dead router* is
one expert, which really holds; of the *NaN router*'s route nothing can be said. The control shows that nothing is
claimed against AutoAttack where it is right (its R9: every clean image goes to one expert). R3 on *two routes* is a
matter of rounding: it fails on an AMD EPYC, as here, and passes on an Intel Xeon.

The last four are no routed models: they tell no route, so that nothing can aim at it, and the routing attacks have
nothing to do. They are marked, with the place, and how to wrap them.

As plain functions from images to logits the models above hide their routers too. R18 then marks all of them but the
*dead router*, which decides nothing. What fires beside it:
{plain}.
"""


def row(planted: Planted) -> tuple[dict[str, float], str]:
    """The numbers of one model, in per cent (and the points without a gradient that pyautoattack saw), and its row."""
    case = planted.make()
    says, flags = oracle(case)
    numbers = {"pyautoattack": 100 * says}
    flat = [int(number) for flag in flags for number in re.findall(r"(\d+) points", flag)]
    if flat:
        numbers["flat_points"] = flat[0]
    if planted.witness is not None:
        numbers["truth"] = 100 * planted.make().robust(planted.witness(case))
    if fired(case.model, case, ["H6"]):
        seen = fired(case.model, case, [id for id in ASKED if id in ids("model")])
    else:
        fresh = planted.make()
        x_adv = RoutingHalf(AutoAttackRouting(linf(case.eps)))(fresh.model, fresh.x, fresh.y)
        numbers["routing_attacks"] = 100 * fresh.robust(x_adv)
        seen = fired(case.model, case, ASKED)
    checks = ", ".join(f"**{check.id}**" if check.status == "fail" else check.id for check in seen) or "none"
    told = f"{numbers['pyautoattack']:.0f}%" + (f" ({'; '.join(flags)})" if flags else "")
    truth = f"{numbers['truth']:.0f}%" if "truth" in numbers else "–"
    ours = f"{numbers['routing_attacks']:.0f}%" if "routing_attacks" in numbers else "not run"
    return numbers, f"| {planted.name} | {told} | {truth} | {ours} | {checks} |"


def main(names: Sequence[str]) -> None:
    """Make the rows of these models (default: of all) anew, in docs/results/planted.json and from it in the page, and
    leave the others as they are.
    """
    from benchmarks.results import described, write

    known = [planted.name for planted in PLANTED]
    if set(names) - set(known):
        raise SystemExit(f"unknown: {sorted(set(names) - set(known))}; known: {known}")
    plain = "; ".join(f"{planted.name} {', '.join(planted.plain)}" for planted in PLANTED if planted.plain)
    old = json.loads(FILE.read_text(encoding="utf-8"))
    numbers, rows = old["numbers"], old["rows"]
    for planted in PLANTED:
        if names and planted.name not in names:
            continue
        torch.manual_seed(0)
        key = re.sub(r"[^a-z0-9]+", "_", planted.name.lower()).strip("_")
        numbers[key], text = row(planted)
        about = described("python -m tests.planted", seeds=[0])
        rows[key] = {"text": text, **{name: about[name] for name in ("commit", "hardware", "versions")}}
        print(text, flush=True)
        write(FILE, old["about"] if names else about, numbers, rows=rows)
        table = "\n".join(rows[key]["text"] for key in numbers)
        PAGE.write_text(TEXT + table + "\n" + TIE + END.format(plain=plain), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
