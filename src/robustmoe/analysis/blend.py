"""The curve of a dual model over alpha, in numbers: what each alpha gets right, keeps, proves and loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.paired import Paired, paired
from robustmoe.analysis.rates import Rate, rate
from robustmoe.records import Blend

DEFAULT_ALPHA = 0.7  # the paper's, and that of `models.dual`


@dataclass(frozen=True)
class AlphaPoint:
    """The blend at one alpha; every rate is over the same images.

    ``threshold``: the margin in probabilities (top class against any other, over the whole ball) that the robust half
    must exceed for the blend to be proven whatever the standard half says, (1 - alpha) / alpha (Bai et al., arXiv
    2301.12554). No margin exceeds 1, so up to alpha 0.5 nothing can be proven so; inf at alpha 0. None where logits are
    mixed: there no margin is enough (at alpha 1 nothing is mixed, and any is).

    ``clean``; ``robust``: right when clean and broken by no attack; ``broke``: attack -> images it broke first; both
    None while this alpha is not attacked. ``certified``: proven right in the whole ball; None where no certificate was
    given. ``disproven``: certified images that are wrong when clean, or that an attack broke: 0, or the certificate is
    wrong. ``validation``: clean accuracy on the validation images; None without.

    ``clean_change``, ``robust_change``: against the largest alpha (the robust half alone, where that is 1);
    ``robust_change`` is None unless both are attacked."""

    alpha: float
    threshold: float | None
    clean: Rate
    robust: Rate | None
    broke: dict[str, int] | None
    certified: Rate | None
    disproven: int
    validation: float | None
    clean_change: Paired
    robust_change: Paired | None

    @property
    def provable(self) -> bool:
        """Says whether some margin of the robust half can prove the blend."""
        return self.threshold is not None and self.threshold < 1


@dataclass(frozen=True)
class BlendSummary:
    """A curve over alpha of ``n`` images: ``points``, one an alpha, rising; ``shown``: the alpha to look at first."""

    n: int
    points: tuple[AlphaPoint, ...]
    shown: float

    @property
    def point(self) -> AlphaPoint:
        """Returns the point to look at first."""
        return next(point for point in self.points if point.alpha == self.shown)

    @property
    def attacked(self) -> tuple[AlphaPoint, ...]:
        """Returns the points whose robust accuracy is known."""
        return tuple(point for point in self.points if point.robust is not None)


def blend_summary(blend: Blend) -> BlendSummary:
    """Returns the numbers of a curve with at least one alpha and one image."""
    points = tuple(_point(blend, at) for at in range(len(blend.alphas)))
    return BlendSummary(len(blend.index), points, blend.alphas[_first_to_see(blend)])


def alpha_change(blend: Blend, first: int, second: int, attacked: bool = False) -> Paired | None:
    """Returns what the alpha at place ``second`` has that the one at ``first`` lacks, image by image: clean accuracy,
    or robust accuracy with ``attacked`` (None unless both alphas are attacked)."""
    if attacked and not (_attacked(blend, first) and _attacked(blend, second)):
        return None
    hits = _robust if attacked else _right
    return paired(hits(blend, first), hits(blend, second))


def _first_to_see(blend: Blend) -> int:
    """Returns the place of the alpha to look at first: the chosen one; without, of those that are attacked (of all, if
    none is) the nearest to the paper's 0.7, the larger of two as near."""
    if blend.chosen in blend.alphas:
        return blend.alphas.index(blend.chosen)
    some = [at for at in range(len(blend.alphas)) if _attacked(blend, at)] or range(len(blend.alphas))
    return min(some, key=lambda at: (round(abs(blend.alphas[at] - DEFAULT_ALPHA), 9), -blend.alphas[at]))


def _threshold(alpha: float, mix: str) -> float | None:
    """Returns the margin of an :class:`AlphaPoint`."""
    if mix == "logits":
        return 0.0 if alpha == 1 else None
    return (1 - alpha) / alpha if alpha > 0 else math.inf


def _attacked(blend: Blend, at: int) -> bool:
    """Says whether the alpha is attacked: the last ``attacked`` are."""
    return at >= len(blend.alphas) - blend.attacked


def _right(blend: Blend, at: int) -> list[bool]:
    return [answer == label for answer, label in zip(blend.predicted[at], blend.labels, strict=True)]


def _robust(blend: Blend, at: int) -> list[bool]:
    return [hit and attack == -1 for hit, attack in zip(_right(blend, at), blend.broken[at], strict=True)]


def _point(blend: Blend, at: int) -> AlphaPoint:
    last, attacked = len(blend.alphas) - 1, _attacked(blend, at)
    right = _right(blend, at)
    alive = _robust(blend, at) if attacked else right
    proven = blend.certified[at] if blend.certified else [False] * len(right)
    return AlphaPoint(
        alpha=blend.alphas[at],
        threshold=_threshold(blend.alphas[at], blend.mix),
        clean=rate(right),
        robust=rate(alive) if attacked else None,
        broke=_broke(blend, right, at) if attacked else None,
        certified=rate(proven) if blend.certified else None,
        disproven=sum(claim and not holds for claim, holds in zip(proven, alive, strict=True)),
        validation=blend.validation[at] if blend.validation else None,
        clean_change=paired(_right(blend, last), right),
        robust_change=alpha_change(blend, last, at, attacked=True),
    )


def _broke(blend: Blend, right: Sequence[bool], at: int) -> dict[str, int]:
    """Returns attack -> images that it broke first, of those that are right when clean."""
    first = [attack for attack, hit in zip(blend.broken[at], right, strict=True) if hit]
    return {name: first.count(place) for place, name in enumerate(blend.attacks)}
