"""The blends of two models at many alphas: what attacks each of them, what all answer, and what is proven of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustmoe.attacks import (
    PGD,
    Attack,
    ExpertTransition,
    RouteBeam,
    Surrogate,
    Wrapped,
    image_routers,
    joint,
    part_noise,
)
from robustmoe.attacks.losses import loss_of
from robustmoe.certification import Certifier
from robustmoe.data import ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import attacked_images, check_inside, predictions
from robustmoe.evaluation.choosing import climb_of
from robustmoe.evaluation.meters import Meter
from robustmoe.evaluation.precision import frozen_copy
from robustmoe.evaluation.session import Session, tell_of_gradient
from robustmoe.models import DualModel
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.dual import SHIFT
from robustmoe.noise import Noise
from robustmoe.options import BlendOptions
from robustmoe.progress import progress
from robustmoe.records import Blend
from robustmoe.routing import Trace

NOT_BROKEN, WRONG = -1, -2
"""In the place of an attack that broke an image: none did; none was needed."""

WARM = "warm start"
HALVES = {"standard half": "standard", "robust half": "robust"}
"""Attacks that climb one half alone: which."""

Margins = Mapping[int, float] | Sequence[float] | Tensor


# ------------------------------------------------------------------------------------------------ what is attacked


@dataclass(frozen=True)
class BlendWork:
    """A session on a dual model (its own alpha does not matter), and the attack that the others are made from."""

    session: Session
    base: PGD

    @property
    def dual(self) -> DualModel:
        assert isinstance(self.session.model, DualModel)
        return self.session.model

    @property
    def options(self) -> BlendOptions:
        options: BlendOptions = self.session.options
        return options

    @property
    def alphas(self) -> tuple[float, ...]:
        """The robust half's shares, rising."""
        return self.options.alphas

    @property
    def images(self) -> ImageSet:
        return self.session.images

    @property
    def device(self) -> torch.device:
        return self.session.device


@dataclass(frozen=True)
class From(Wrapped):
    """``attack`` from the images ``near`` (n, ch, h, w) instead of its own start, once (no restarts)."""

    attack: PGD
    near: Tensor

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.attack.climb(model, x, y, self.near)


def at(dual: DualModel, alpha: float) -> RoutedModel:
    """The blend at ``alpha``; at 0 and 1 the half itself."""
    if alpha in (0.0, 1.0):
        return dual.robust if alpha else dual.standard
    return dual.at(alpha)


def attacks_at(base: PGD, alpha: float, trace: Trace, warm: bool) -> dict[str, Attack]:
    """The attacks at one alpha by name, in order, all with the threat and the steps of ``base``; ``trace``: of the
    blend there.

    That attack itself; the same from where the alpha above left off, if ``warm`` (not at the last alpha); with the
    margin loss; on the routes, where there are routers; and, between 0 and 1, through each half alone.
    """
    attacks: dict[str, Attack] = {"pgd": base}
    if warm:
        attacks[WARM] = base
    attacks["margin"] = replace(base, objective=joint("margin"))
    if trace:
        common = climb_of(base)
        attacks["routes"] = ExpertTransition(**common) if image_routers(trace) else RouteBeam(**common)
    if 0 < alpha < 1:
        attacks |= dict.fromkeys(HALVES, base)
    return attacks


def seen_by(name: str, work: BlendWork, climbed: DualModel, alpha: float, meter: Meter) -> Surrogate:
    """What the attack of that name climbs, the blend at ``alpha`` being the judge. ``climbed``: stands in for the dual
    model.
    """
    exact = at(work.dual, alpha)
    if name in HALVES:
        return Surrogate(getattr(climbed, HALVES[name]), exact, on_pass=meter.on_pass)
    return Surrogate(at(climbed, alpha), exact, close=True, on_pass=meter.on_pass)


@torch.no_grad()
def judged(dual: DualModel, alphas: Sequence[float], x: Tensor) -> list[Tensor]:
    """The exact logits (n, c) at every alpha; one pass of each half."""
    standard, robust = dual.standard.run(x).logits, dual.robust.run(x).logits
    return [dual.at(alpha).blended(x, standard, robust) for alpha in alphas]


def classes_of(logits: Tensor) -> list[int]:
    """Returns the class of each image (see `predictions`)."""
    return predictions(Output(logits, {}))


def climbed_halves(work: BlendWork) -> DualModel:
    """Frozen copies of both halves, blended alike."""
    dual, probe = work.dual, work.session.probe.x
    for half in (dual.standard, dual.robust):
        tell_of_gradient(half, probe)
    standard, robust = (frozen_copy(half, probe).climbed for half in (dual.standard, dual.robust))
    return DualModel(standard, robust, mix=dual.mix, sharpen=dual.sharpen, mixer=dual.mixer).eval()


# ------------------------------------------------------------------------------------------------ one alpha


@dataclass
class BlendState:
    """What a pass has record, and goes on from. ``near`` (n, ch, h, w), on the CPU: where the next alpha's warm starts
    begin; None before the first and after the last.
    """

    record: Blend
    near: Tensor | None = None


def attack_alpha(
    work: BlendWork, climbed: DualModel, state: BlendState, attacks: dict[str, Attack], meter: Meter
) -> None:
    """The next alpha: every attack on the images that are not broken there, every attacked image put to
    all alphas. ``attacks``: by name, in order.

    The next warm start of an image is, of what attacked it here, the one nearest to breaking the next alpha; that of
    an image which was not attacked stays as it was, at first the clean image.
    """
    k = len(work.alphas) - state.record.attacked - 1
    broken = torch.tensor(state.record.broken)
    near = state.near
    if near is None:
        near = torch.cat([batch.x.cpu() for batch in batches(work.images, work.options.batch_size)])
    next_near = near.clone()
    models = {name: seen_by(name, work, climbed, work.alphas[k], meter) for name in attacks}
    left = torch.nonzero(broken[k] == NOT_BROKEN)[:, 0]
    parts = left.split(work.options.batch_size)
    for part, batch in zip(parts, work.session.batches(left)):
        nearest = torch.full((len(part),), -math.inf, dtype=batch.x.dtype)
        for name, attack in attacks.items():
            rows = torch.nonzero(broken[k, part] == NOT_BROKEN)[:, 0]
            if len(rows) == 0:
                break
            chosen, which = batch[rows.to(batch.x.device)], part[rows]
            if name == WARM and isinstance(attack, PGD):
                attack = From(attack, near[which].to(work.device))
            noise = part_noise(Noise.of(chosen.index, work.base.seed), f"{name} {work.alphas[k]}")
            x_adv = attacked_images(models[name], attack, chosen, noise)
            check_inside(attack.threat, chosen.x, x_adv, name)
            logits = judged(work.dual, work.alphas, x_adv)
            _mark(broken, which, logits, chosen.y, state.record.attacks.index(name))
            if k:
                value = loss_of("margin", logits[k - 1], chosen.y).to(nearest)
                better = value > nearest[rows]
                next_near[which[better]], nearest[rows[better]] = x_adv.cpu()[better], value[better]
    state.record = replace(state.record, broken=broken.tolist(), attacked=state.record.attacked + 1)
    state.near = next_near if k else None


def _mark(broken: Tensor, which: Tensor, logits: Sequence[Tensor], y: Tensor, number: int) -> None:
    """Notes that attack ``number`` broke, at every alpha, those of the images ``which`` that no attack broke before."""
    for row, each in zip(broken, logits):
        hit = (torch.tensor(classes_of(each)) != y.cpu()) & (row[which] == NOT_BROKEN)
        row[which[hit]] = number


# ------------------------------------------------------------------------------------------------ certificates


def bounds_of(work: BlendWork, margins: Margins) -> list[float]:
    """The margin of each image, -inf where none is known."""
    if work.dual.mix != "probabilities":
        raise UserError("a certificate of the robust half proves nothing of a blend of logits; expected probabilities")
    if isinstance(margins, Mapping):
        return [float(margins.get(index, -math.inf)) for index in work.images.index.tolist()]
    if len(margins) != len(work.images):
        raise UserError(f"there are {len(margins)} certified margins for {len(work.images)} images; expected one each")
    return [float(margin) for margin in margins]


def certified_by(work: BlendWork, record: Blend, bounds: Sequence[float]) -> list[list[bool]]:
    """Returns, for every alpha, which images are proven right: right when clean, with a margin above the threshold."""
    return [
        [margin > threshold(work.dual, alpha) and a == b for margin, a, b in zip(bounds, each, record.labels)]
        for alpha, each in zip(record.alphas, record.predicted)
    ]


def proven_by(work: BlendWork, record: Blend, certifier: Certifier) -> list[list[bool]]:
    """Returns, for every alpha, which images ``certifier`` proves right of the blend itself, both halves bounded
    (CERT-8). Raises UserError for a certifier of something else than the attacked ball.
    """
    threat = work.base.threat
    if certifier.subject != "model" or certifier.norm != threat.norm or certifier.eps < threat.eps:
        raise UserError(
            f"the blend is attacked in {threat.norm} with eps {threat.eps:g}; expected a certifier of that ball, such "
            f"as bounds({threat.norm}({threat.eps:g}), search=0); got {certifier}"
        )
    proven = []
    with progress(len(record.alphas) * len(work.images), "certify", unit="images") as bar:
        for alpha in record.alphas:
            row: list[bool] = []
            for batch in batches(work.images, CERTIFIED_AT_A_TIME, device=work.device):
                given = certifier(at(work.dual, alpha), batch.x, Noise.of(batch.index, work.base.seed))
                row += [
                    certificate.prediction == label and certificate.radius >= threat.eps
                    for certificate, label in zip(given, batch.y.tolist())
                ]
                bar.advance(len(batch))
            proven.append(row)
    return proven


CERTIFIED_AT_A_TIME = 32


def threshold(dual: DualModel, alpha: float) -> float:
    """What the robust half's margin must exceed for the blend to be proven: (1 - alpha) / alpha at the lowest alpha
    that a mixer can set. inf where the blend is not of the half that was certified: at 0, and, sharpened, at 1.
    """
    if alpha == 0 or (alpha == 1 and dual.sharpen is not None):
        return math.inf
    return (1 - alpha) / alpha * (1.0 if dual.mixer is None else math.exp(SHIFT))


def assert_consistent_with_attacks(record: Blend) -> None:
    """UserError where an attack broke what is certified."""
    for alpha, proven, broken in zip(record.alphas, record.certified, record.broken):
        for index, sure, attack in zip(record.index, proven, broken):
            if sure and attack >= 0:
                raise UserError(
                    f"image {index} is certified at alpha {alpha:g}, but the attack {record.attacks[attack]!r} breaks "
                    "it there: the certificate is wrong, or is not of this robust half and ball"
                )
