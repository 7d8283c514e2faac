"""Randomised smoothing (Cohen, Rosenfeld and Kolter, ICML 2019): l2 certificates of any model, from its answers to
noisy copies of an image.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.base import entered
from robustmoe.attacks.threat import Norm
from robustmoe.certification.certify import ABSTAIN, Certificate, Certifier
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise
from robustmoe.routing import rerouted

SELECT, COUNT, PREDICT, DRAW = (zlib.crc32(name) for name in (b"select", b"count", b"predict", b"draw"))


@dataclass(frozen=True)
class Smoothing(Certifier):
    """CERTIFY of Cohen et al. 2019: the class that the model answers most often under noise N(0, sigma^2), and the l2
    radius within which that stays so.

    The certified classifier is the smoothed one (see `predict`), not the model on the image itself. Of ``n0`` noisy
    copies the most frequent class is taken; of ``n`` further ones its share of the answers is bounded from below
    (Clopper and Pearson), wrong with probability ``alpha`` at most for each image; `radius` says how far that reaches.
    Nothing is asked of the model, so hard routers may be inside. The copies are not clipped to [0, 1]: the theorem is
    about Gaussian noise (which is here in float32 and, by how it is drawn, within 5.8 sigma in each pixel).

    ``sigma``, ``eps`` and the radii are l2, in pixels of [0, 1]; ``eps``: the radius that is asked about. ``batch``:
    noisy copies a forward pass; the result does not depend on it. In a certificate, ``stable`` is the share of the
    ``n`` copies that every router treats as it does the image; ``reachable`` is None: noise goes everywhere.

    ``of``: "model", or "robust", which is for duals that mix probabilities with a constant share a > 1/2 of the robust
    half (CERT-10). What is certified is argmax_j E[(1 - a) S_j + a R_j] under noise, whatever the standard half S says;
    only R is asked. With h = E R, every Phi^-1(h_j) is 1 / sigma Lipschitz (Salman et al. 2019, lemma 2), and y stays
    on top where h_y - h_j > (1 - a) / a (CERT-7), which h_y > 1 / (2 a) implies: hence the ``least`` share of `radius`.
    Clopper and Pearson bound counts, not means of probabilities: of each copy one class is drawn by R's probabilities,
    and how often it is y has the binomial distribution of h_y exactly.
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    eps: float = 0.25
    of: Literal["model", "robust"] = "model"
    batch: int = 1000

    def __post_init__(self) -> None:
        for name in ("sigma", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, in pixels of [0, 1] (l2); got {getattr(self, name)}")
        for name in ("n0", "n", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is the probability of a wrong certificate, between 0 and 1; got {self.alpha}")
        if lower_bound(self.n, self.n, self.alpha) <= 0.5:
            needed = math.floor(-math.log2(self.alpha)) + 1
            raise ValueError(f"n={self.n} copies certify nothing at alpha={self.alpha}; expected {needed} or more")

    @property
    def norm(self) -> Norm:
        return "l2"

    @property
    def subject(self) -> Literal["model", "smoothed model"]:
        return "smoothed model"

    def certify(self, model: RoutedModel, x: Float[Tensor, "n ch h w"], noise: Noise) -> list[Certificate]:
        asked, least, rule = model, 0.5, "Cohen"
        answer: Answer = _most_likely
        if self.of == "robust":
            dual = _dual(model)
            asked, least, rule, answer = dual.robust, 1 / (2 * dual.alpha), "smoothed robust half", _Drawn(dual)
        chosen = self._ask(asked, answer, x, noise.fold(SELECT), self.n0).votes.argmax(1)
        counts = self._ask(asked, answer, x, noise.fold(COUNT), self.n)
        votes = counts.votes.gather(1, chosen[:, None])[:, 0].tolist()
        return [
            self._certificate(y, lower_bound(k, self.n, self.alpha), least, rule, same / self.n)
            for y, k, same in zip(chosen.tolist(), votes, counts.same.tolist())
        ]

    def _certificate(self, y: int, share: float, least: float, rule: str, stable: float) -> Certificate:
        said = f"class {y} has at least {share:.4f} of the answers under noise"
        if share <= least:
            return Certificate(ABSTAIN, 0.0, "", None, stable, f"{said}; more than {least:.4f} is needed")
        proven = radius(share, self.sigma, least)
        reason = "" if proven >= self.eps else f"{said}, enough for radius {proven:.3g}"
        return Certificate(y, proven, rule, None, stable, reason)

    def _ask(self, model: RoutedModel, answer: Answer, x: Tensor, noise: Noise, copies: int) -> _Answers:
        """The answers to ``copies`` noisy copies of each image. Each copy has a stream of its own, so what shares a
        pass with it changes nothing.
        """
        noise = Noise(noise.state.to(x.device))
        clean = model.run(x)
        votes = torch.zeros_like(clean.logits, dtype=torch.int64)
        same = votes.new_zeros(len(x))
        for piece in torch.arange(len(x) * copies, device=x.device).split(self.batch):
            image = piece // copies
            own = noise[image].fold(piece % copies)
            output = model.run(x[image] + self.sigma * own.normal(*x.shape[1:]).to(x))
            number = output.logits.logsumexp(1).isfinite()  # without it, an answer is a vote for no class
            votes.index_put_((image, answer(output.logits, own)), number.long(), accumulate=True)
            changes = rerouted({name: routing[image] for name, routing in clean.trace.items()}, output.trace)
            kept = torch.stack([*(change == 0 for change in changes.values()), torch.ones_like(number)]).all(0)
            same.index_add_(0, image, kept.long())
        return _Answers(votes, same)


def _dual(model: RoutedModel) -> DualModel:
    """The model, where CERT-10 holds for it. Raises UserError where it does not."""
    if not isinstance(model, DualModel):
        raise UserError(f"smoothing(of=robust) is for dual models; got {type(model).__name__}: leave of= out")
    if model.mix != "probabilities":
        raise UserError(
            "smoothing(of=robust) needs a dual that mixes probabilities: in logits the standard half outweighs any "
            "robust one; leave of= out"
        )
    if model.mixer is not None:
        raise UserError("smoothing(of=robust) needs a constant alpha; this dual has a mixer: leave of= out")
    if not model.alpha > 0.5:
        raise UserError(
            f"smoothing(of=robust) needs a dual's alpha above 1/2, or the standard half decides; got {model.alpha}: "
            "raise alpha, or leave of= out"
        )
    return model


class _Answers(NamedTuple):
    """To the noisy copies of n images: how many were of each class, how many had every route of the clean image."""

    votes: Int[Tensor, "n c"]
    same: Int[Tensor, " n"]


Answer = Callable[[Float[Tensor, "n c"], Noise], Int[Tensor, " n"]]
"""(logits, one random stream a row) -> classes."""


def _most_likely(logits: Float[Tensor, "n c"], noise: Noise) -> Int[Tensor, " n"]:
    return logits.argmax(1)


def _by_chance(logits: Float[Tensor, "n c"], noise: Noise) -> Int[Tensor, " n"]:
    """A class a row, drawn by its probability."""
    up_to = torch.softmax(logits.double(), 1).cumsum(1)
    drawn = noise.fold(DRAW).uniform().to(up_to)
    return (up_to <= drawn[:, None]).sum(1).clamp(max=logits.shape[1] - 1)


@dataclass(frozen=True)
class _Drawn:
    """A class drawn by the probabilities that the dual gives its robust half, whose logits are given."""

    dual: DualModel

    def __call__(self, logits: Float[Tensor, "n c"], noise: Noise) -> Int[Tensor, " n"]:
        sharpen = self.dual.sharpen if self.dual.alpha < 1 else None  # at 1 the dual leaves the half as it is
        return _by_chance(logits if sharpen is None else sharpen(logits), noise)


def predict(
    model: Callable[[Tensor], Tensor], x: Tensor | np.ndarray, noise: Noise | None, smoothing: Smoothing
) -> Int[Tensor, " n"]:
    """What the smoothed classifier says of images x in [0, 1], or `robustmoe.certification.ABSTAIN` (PREDICT of Cohen
    et al. 2019), from ``smoothing.n`` noisy copies of each. ``model``, ``x`` and ``noise`` as for a `Certifier`.

    It abstains unless a two-sided binomial test tells the two most frequent answers apart at the level
    ``smoothing.alpha``; what it says is wrong with that probability at most. With ``of="robust"`` the answers are drawn
    by the probabilities of the whole dual. The draws are others than those of the certificate.
    """
    from scipy.stats import binomtest

    with entered(model, x, noise=noise) as given, torch.no_grad():
        asked, answer = given.model, _most_likely
        if smoothing.of == "robust":
            asked, answer = _dual(asked), _by_chance
        votes = smoothing._ask(asked, answer, given.x, given.noise.fold(PREDICT), smoothing.n).votes
    count, index = votes.topk(min(2, votes.shape[1]))
    first, second = count[:, 0].tolist(), count[:, 1:].sum(1).tolist()
    sure = [a > 0 and bool(binomtest(a, a + b, 0.5).pvalue <= smoothing.alpha) for a, b in zip(first, second)]
    return torch.where(torch.tensor(sure, dtype=torch.bool, device=votes.device), index[:, 0], ABSTAIN)


def lower_bound(k: int, n: int, alpha: float) -> float:
    """The one-sided lower bound of Clopper and Pearson for the probability of what happened k times of n: above the
    true one with probability ``alpha`` at most.
    """
    from scipy.special import betaincinv

    return float(betaincinv(k, n - k + 1, alpha)) if k else 0.0


def radius(share: float, sigma: float, least: float = 0.5) -> float:
    """sigma (Phi^-1(share) - Phi^-1(least)): how far, in l2, a function with values in [0, 1] whose mean under noise
    N(0, sigma^2) is ``share`` here keeps its mean above ``least`` (Cohen et al. 2019, theorem 1, at least = 1/2).

    With least = 1 / (2 a) it is that of a dual with the robust share a (see `Smoothing`): never less than what CERT-10
    gives in docs/certification.md, sigma Phi^-1(a share), which ends at sigma Phi^-1(a).
    """
    from scipy.special import ndtri

    return sigma * float(ndtri(share) - ndtri(least)) if share > least else 0.0
