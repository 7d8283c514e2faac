"""FGSM and projected gradient ascent (Goodfellow et al. 2015; Madry et al. 2018), over any objective and threat."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks.base import Attack
from robustmoe.attacks.finite import require_finite
from robustmoe.attacks.late import Late, Pending
from robustmoe.attacks.objectives import Inner, Joint, Objective, Score
from robustmoe.attacks.surrogate import unjudged
from robustmoe.attacks.threat import Threat
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise


def ascend(inner: Inner, x_adv: Tensor, rows: Tensor | None = None) -> tuple[Score, Tensor]:
    """The score at x_adv and the gradient of what it climbs, image by image, in the dtype of x_adv. ``rows``: see
    `Inner`.

    Where no path from the image to the loss is differentiable the gradient is zero, and the attack stays at its start;
    evaluation's check G1 marks what such an attack finds. Raises `NotFiniteError`.
    """
    x_adv = x_adv.detach().requires_grad_(True)
    score = inner(x_adv) if rows is None else inner(x_adv, rows)
    climbed = score.climbed
    scale = _scale(x_adv.device)
    total = climbed.sum() if scale == 1 else climbed.sum() * scale
    slope = torch.autograd.grad(total, x_adv, allow_unused=True)[0] if climbed.requires_grad else None
    gradient = torch.zeros_like(x_adv) if slope is None else slope if scale == 1 else slope / scale
    require_finite(score.loss, gradient)
    return Score(score.loss.detach(), score.fooled, climbed.detach()), gradient


FP16 = 256.0
"""By how much a loss is multiplied before its gradient at the images is taken in fp16, in which small ones round to
zero; they are divided afterwards.
"""


def _scale(device: torch.device) -> float:
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return FP16 if half else 1.0


@dataclass
class _Best:
    """The best iterate so far, image by image: fooled before not fooled, then the higher loss."""

    x_adv: Tensor
    score: Score

    def offer(self, x_adv: Tensor, score: Score) -> None:
        old = self.score
        better = (score.fooled & ~old.fooled) | ((score.fooled == old.fooled) & (score.loss > old.loss))
        self.x_adv = torch.where(better[:, None, None, None], x_adv, self.x_adv)
        self.score = Score(torch.where(better, score.loss, old.loss), old.fooled | score.fooled)


class _Standing(NamedTuple):
    """The images that have not left: their ``place`` in the batch, what the pass at ``now`` gave, who fell there."""

    place: Tensor
    now: Tensor
    loss: Tensor
    gradient: Tensor
    fallen: Pending

    def left(self, fooled: Tensor, best: _Best) -> _Standing:
        """Those that stay where the images ``fooled`` leave, which is noted in ``best``."""
        if asking.is_nowhere(fooled):
            return self
        best.score.fooled[self.place] = fooled
        [stay] = asking.places(~fooled)
        place, now, loss, gradient = (each[stay] for each in (self.place, self.now, self.loss, self.gradient))
        return _Standing(place, now, loss, gradient, self.fallen.of(stay))


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent with random start (Madry et al. 2018).

    ``step_size`` in pixels; by default eps / 4 (the field's 2/255 at 8/255), or eps for a single step. ``restarts``:
    later ones attack only the images not yet fooled. ``keep``: "best" returns the best iterate (one forward pass
    more), "last" the final one, as adversarial training usually does; with "first" an image leaves the batch as soon
    as it is fooled (the same images break as with "best", in fewer passes; the rest return their last iterate). By
    default "best", and "first" where an evaluation attacks the whole model (see `Attack.for_verdict`).
    ``start``: "random" in the ball, "clean", or "near", a normal step of deviation 0.001 (TRADES, Zhang et al. 2019).
    """

    threat: Threat
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    keep: Literal["best", "last", "first"] | None = None
    start: Literal["random", "clean", "near"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1; got {self.steps} and {self.restarts}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UserError(f"step_size must be above 0, in pixels of [0, 1]; got {self.step_size}")

    def _step_size(self) -> float:
        if self.step_size is not None:
            return self.step_size
        return self.threat.eps if self.steps == 1 else self.threat.eps / 4

    @property
    def _kept(self) -> str:
        return self.keep or "best"

    def for_verdict(self) -> PGD:
        whole = self.objective.aims_at_router and self.objective.aims_at_experts
        return replace(self, keep="first") if self.keep is None and whole else self

    def queries(self, output: Output) -> int:
        return self.restarts * (3 * self.steps + (self.keep != "last" or self.restarts > 1))

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        inner = self.objective(model, x, y)
        best = self._climb(inner, x, self._start(x, noise.fold(0)))
        for restart in range(1, self.restarts):
            rest = torch.nonzero(~best.score.fooled)[:, 0]
            if len(rest) == 0:
                break
            start = self._start(x[rest], noise[rest].fold(restart))
            again = self._climb(inner, x[rest], start, rest)
            x_adv, loss, fooled = best.x_adv.clone(), best.score.loss.clone(), best.score.fooled.clone()
            x_adv[rest], loss[rest], fooled[rest] = again.x_adv, again.score.loss, again.score.fooled
            best.offer(x_adv, Score(loss, fooled))
        return best.x_adv

    def climb(self, model: RoutedModel, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """One climb from the images ``start`` (n, ch, h, w), brought into the ball of x first; nothing is drawn. The
        model is in eval mode, as for `perturb`.
        """
        return self._climb(self.objective(model, x, y), x, self.threat.project(start, x)).x_adv

    def _start(self, x: Tensor, noise: Noise) -> Tensor:
        if self.start == "random":
            return self.threat.start(x, noise)
        if self.start == "near":
            return self.threat.project(x + 1e-3 * noise.normal(*x.shape[1:]).to(x.dtype), x)
        return x

    def _climb(self, inner: Inner, x: Tensor, x_adv: Tensor, rows: Tensor | None = None) -> _Best:
        """``rows``: which images of the objective's batch these are (None: all)."""
        if self.keep == "first":
            return self._until_fooled(inner, x, x_adv, rows)
        best: _Best | None = None
        unread = self.keep == "last" and self.restarts == 1
        with unjudged() if unread else contextlib.nullcontext():
            for _ in range(self.steps):
                score, gradient = ascend(inner, x_adv, rows)
                if best is None:
                    best = _Best(x_adv, score)
                elif self._kept == "best":
                    best.offer(x_adv, score)
                x_adv = self.threat.project(x_adv + self._step_size() * self.threat.direction(gradient, x_adv), x)
        assert best is not None
        if unread:
            best.x_adv = x_adv
            return best
        with torch.no_grad():
            final = inner(x_adv) if rows is None else inner(x_adv, rows)
        if self._kept == "best":
            best.offer(x_adv, final)
            return best
        return _Best(x_adv, final)

    def _until_fooled(self, inner: Inner, x: Tensor, x_adv: Tensor, rows: Tensor | None) -> _Best:
        """The climb in which a fooled image leaves the batch; where passes ask the device by themselves, behind the
        next one, with which it is asked who fell.
        """
        place, now = torch.arange(len(x), device=x.device), x_adv
        best = _Best(x_adv.clone(), Score(x.new_zeros(len(x)), torch.zeros_like(place, dtype=torch.bool)))
        late, before, question = Late(inner), None, None
        with asking.together() as asked:
            for step in range(self.steps + 1):
                questions, some = asked.questions, place if rows is None else rows[place]
                if step < self.steps:
                    score, gradient = ascend(late, now, some)
                else:
                    with torch.no_grad():
                        score, gradient = late(now, some), now
                asks = asked.questions > questions
                still = _Standing(place, now, score.loss, gradient, late.last)
                if before is not None and question is not None:
                    still = still.left(before.settled(question.count()), best)
                best.x_adv[still.place], best.score.loss[still.place] = still.now, still.loss
                if asks and step < self.steps:
                    before, question = still.fallen, asked.later(still.fallen.fooled)
                else:
                    before, still = None, still.left(still.fallen.settled(), best)
                if step == self.steps or len(still.place) == 0:
                    break
                place, gradient = still.place, still.gradient
                move = self._step_size() * self.threat.direction(gradient, still.now)
                now = self.threat.project(still.now + move, x[place])
        return best


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of size eps from the clean image, no random start (Goodfellow et al. 2015)."""

    threat: Threat
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    seed: int = 0

    def queries(self, output: Output) -> int:
        return 3

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        _, gradient = ascend(self.objective(model, x, y), x)
        return self.threat.project(x + self.threat.eps * self.threat.direction(gradient, x), x)


def vmoe_pgd(threat: Threat, steps: int = 40, seed: int = 0) -> PGD:
    """V-MoE's attack (Puigcerver et al. 2022): ``steps`` of eps / ``steps``, clean start; weak, for comparison only.

    The schedule of the released code (vmoe/projects/adversarial_attacks), with its cross-entropy; the last iterate
    counts. No step can be taken back and nothing is started anew: quote `PGD` with restarts or AutoAttack. The released
    code climbs the batch's mean loss, whose gradient has in each pixel the sign of the image's own, and does not clip
    to [0, 1]; here the box holds, as in every attack.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    step_size = threat.eps / steps if threat.eps > 0 else None
    return PGD(threat, steps, step_size=step_size, keep="last", start="clean", seed=seed)
