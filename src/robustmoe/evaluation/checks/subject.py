"""What the checks share: the `Subject` they look at, and how an image more or less is judged."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustmoe.analysis import ball_limit
from robustmoe.attacks import PGD, Attack, Joint, changed, missed, size
from robustmoe.attacks.losses import loss_of
from robustmoe.attacks.threat import Threat
from robustmoe.data import Batch
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.foreign import check_classes
from robustmoe.models.norm import answers
from robustmoe.noise import Noise
from robustmoe.records import Row
from robustmoe.routing import Tape

NO_ROUTER = "the model has no router"
STANDS_NONE = "no image stands after the attacks, so there is nothing that they could have missed"
MOST_EXPERTS = 8
"""Checks that try every expert try so many."""
CHEAP_QUERIES = 400
"""An attack of more forward passes an image than this is not run again and again: PGD-20 stands in for it."""


def graded(images: int, n: int, points: float) -> str:
    """The status where ``images`` of ``n`` are counted against us and ``points`` per cent are allowed: one image alone
    only warns, because on 64 images it is 1.6 points, more than any of the thresholds.
    """
    if images <= 0 or 100 * images / n <= points:
        return "pass"
    return "warn" if images == 1 else "fail"


class Finished(NamedTuple):
    """A finished evaluation: its ``rows``, the ball that they had to stay in, and the model's `fingerprint` before and
    after.
    """

    rows: Sequence[Row]
    norm: str
    eps: float
    fingerprints: tuple[str, str]


class Outcome(NamedTuple):
    """What an attack leaves: the images, and which of them the exact model now misses."""

    x_adv: Tensor
    broken: Tensor


@dataclass(frozen=True)
class Subject:
    """A model under its attacks on a few images: what the deep checks look at.

    ``attacks``: those of the evaluation, the ``main`` one among them. ``whole``: the images; ``batch``: those of them
    that the model gets right, which are all that an attack can break. ``run``: what is known of the training (see
    `run.check_run`): {} for a model from elsewhere. ``fingerprint``: the model's before the checks began; "" where
    nobody took it. ``answered``: the model's answer on ``whole``, where it was asked already.
    """

    model: RoutedModel
    attacks: tuple[Attack, ...]
    whole: Batch
    batch: Batch
    seed: int = 0
    run: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    answered: Output | None = None
    _outcomes: dict[str, Outcome] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: RoutedModel,
        attacks: Sequence[Attack],
        batch: Batch,
        seed: int = 0,
        run: dict[str, Any] | None = None,
        fingerprint: str = "",
    ) -> Subject:
        """The subject on these images; the right ones are picked here. UserError for a label without an output."""
        with torch.no_grad():
            logits = model.run(batch.x).logits
        check_classes(logits, int(batch.y.max()))
        right = torch.nonzero((logits.argmax(1) == batch.y) & answers(logits))[:, 0]
        return cls(model, tuple(attacks), batch, batch[right], seed, run or {}, fingerprint)

    @property
    def main(self) -> Attack:
        """The first attack on the whole model; without one, the first attack."""
        return next((a for a in self.attacks if not a.objective.needs_router), self.attacks[0])

    @property
    def threat(self) -> Threat:
        return self.main.threat

    @functools.cached_property
    def output(self) -> Output:
        """The exact model's answer on all images."""
        if self.answered is not None:
            return self.answered
        with torch.no_grad():
            return self.model.run(self.whole.x)

    @functools.cached_property
    def clean(self) -> Output:
        """The exact model's answer on ``batch``."""
        with torch.no_grad():
            return self.model.run(self.batch.x)

    @property
    def climber(self) -> Attack:
        """An attack to run many times: the main one where it is a cheap climb, else PGD-20 on the whole model."""
        main = self.main
        if isinstance(main, PGD) and main.queries(self.clean) <= CHEAP_QUERIES:
            return main
        return PGD(main.threat, steps=20, seed=main.seed)

    @property
    def quick(self) -> Attack:
        """The climber, a broken image leaving at once (it breaks the same images in fewer passes)."""
        return changed(self.climber, keep="first")

    def noise(self, seed: int) -> Noise:
        return Noise.of(self.batch.index, seed)

    def outcome(self, attack: Attack, model: RoutedModel | None = None) -> Outcome:
        """Returns what ``attack`` leaves of ``batch``, climbing ``model`` (default: the exact one); the exact model
        judges. A perturbation outside the threat's ball breaks nothing (check H2 says so).
        """
        key = repr(attack)
        if model is None and key in self._outcomes:
            return self._outcomes[key]
        x, y = self.batch.x, self.batch.y
        x_adv = attack(model or self.model, x.clone(), y.clone(), self.noise(attack.seed)).to(x)
        outcome = Outcome(x_adv, self.wrong(x_adv) & in_ball_and_box(attack.threat, x_adv, x))
        if model is None:
            self._outcomes[key] = outcome
        return outcome

    def wrong(self, x: Tensor) -> Tensor:
        """(n,) bool: which images of ``batch``, changed to ``x``, the exact model misses."""
        with torch.no_grad():
            return missed(self.model, x, self.model.run(x).logits, self.batch.y)

    @property
    def broken(self) -> Tensor:
        """(n,) bool: which images of ``batch`` some attack of the evaluation breaks."""
        return torch.stack([self.outcome(attack).broken for attack in self.attacks]).any(0)

    def gained(self, broken: Tensor) -> int:
        """How many of these images no attack of the evaluation breaks."""
        return int((broken & ~self.broken).sum())


def few(case: Subject, n: int) -> Subject:
    """The same subject with at most ``n`` of its right images."""
    return dataclasses.replace(case, batch=case.batch[:n], _outcomes={})


def in_ball_and_box(threat: Threat, x_adv: Tensor, x: Tensor) -> Tensor:
    """(n,) bool: in the ball, up to the rounding of float32, and in the box."""
    near = size(threat.norm, (x_adv - x).float()) <= ball_limit(threat.eps)
    return near & (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1)


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the summed loss at x; zero where no path leads from the image to the loss."""
    x = x.detach().requires_grad_(True)
    value = loss(x).sum()
    slope = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(x) if slope is None else slope


def with_loss(attack: Attack, loss: Any) -> Attack:
    """The attack as a climb on that loss of the whole model."""
    return changed(attack, objective=Joint(loss))


def doubled(model: RoutedModel, x: Tensor) -> RoutedModel | None:
    """A float64 copy of the model; None where it cannot be copied, or does not run in float64, also on the way that
    gradients take.
    """
    try:
        twin = copy.deepcopy(model).double()
        with torch.enable_grad():
            logits = twin.run(x[:2].detach().double().requires_grad_()).logits.detach()
    except Exception:  # a user's own model: a cache that cannot be copied, a cast of its own
        return None
    return twin if logits.dtype == torch.float64 and bool(torch.isfinite(logits).all()) else None


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


class Watched(RoutedModel):
    """``inner``, and the margin of every image of a batch in every pass (``margins``: one (n,) a pass; above 0 is
    wrong, nan where the image was not asked, or lay outside the ball). A row of a pass is the image it lies nearest to.
    """

    def __init__(self, inner: RoutedModel, x: Tensor, y: Tensor, threat: Threat) -> None:
        super().__init__()
        self.inner = inner
        self.threat = threat
        self.images = (x, y)
        self.margins: list[Tensor] = []

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        logits = self.inner.ask(x, tape)
        if not tape.forced:
            self._note(x.detach(), logits.detach())
        return logits

    @torch.no_grad()
    def _note(self, x: Tensor, logits: Tensor) -> None:
        clean, label = self.images
        row = torch.cdist(x.float().flatten(1), clean.flatten(1)).argmin(1)
        margin = loss_of("margin", logits, label[row])
        margin = torch.where(in_ball_and_box(self.threat, x, clean[row]), margin, torch.nan)
        self.margins.append(margin.new_full((len(clean),), torch.nan).scatter(0, row, margin))
