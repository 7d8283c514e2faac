"""Two models on the same images, and one recipe over seeds: how sure is a difference?

Three sources of chance are kept apart. Over images: the paired bootstrap, which resamples images and keeps the pairs.
Over seeds: Student's t for a mean, Welch's for a difference. One model against one other: McNemar's exact test.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DRAWS = 10_000
"""Resamples of the bootstrap."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """One number of several trainings."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Returns the arithmetic mean, nan without values."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Returns the sample's standard deviation (n - 1), nan for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> Interval | None:
        """Returns the 95 % interval of the mean by Student's t; None for fewer than two values."""
        n = len(self.values)
        return None if n < 2 else _around(self.mean, self.sd / math.sqrt(n), float(n - 1))


@dataclass(frozen=True)
class Paired:
    """Two models on the same ``n`` images: how many the second has and the first lacks (``gained``), and the reverse
    (``lost``)."""

    gained: int
    lost: int
    n: int

    @property
    def value(self) -> float:
        """Returns the second's share minus the first's; nan without images."""
        return (self.gained - self.lost) / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of that difference, from the images on which the two differ: Wald's with 1/2 added
        to each of the four cells (A. Agresti and Y. Min, Statistics in Medicine 24, 2005, 729-740), inside [-1, 1]."""
        gained, lost, n = self.gained + 0.5, self.lost + 0.5, self.n + 2
        centre = (gained - lost) / n
        half = 1.959964 * math.sqrt(max(0.0, gained + lost - n * centre * centre)) / n
        return max(-1.0, centre - half), min(1.0, centre + half)

    @property
    def p(self) -> float:
        """Returns the probability of a split at least as uneven if gaining and losing were as likely, two-sided, exact
        (Q. McNemar, Psychometrika 12, 1947, 153-157, with the binomial distribution); 1 without a difference."""
        from scipy.special import bdtr

        n = self.gained + self.lost
        return min(1.0, 2 * float(bdtr(min(self.gained, self.lost), n, 0.5))) if n else 1.0


def paired(first: Iterable[bool], second: Iterable[bool]) -> Paired:
    """Returns two lists of hits on the same images, compared image by image."""
    pairs = list(zip(first, second, strict=True))
    return Paired(sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs), len(pairs))


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> Interval:
    """Returns the 95 % percentile interval of the mean of ``differences``, one an image, over draws of as many images
    (B. Efron, Ann. Statist. 7, 1979, 1-26); nan without images. How often each value is drawn is one multinomial
    draw, so images cost nothing."""
    if not differences:
        return math.nan, math.nan
    import numpy as np

    counts = Counter(differences)
    values, times = np.array(list(counts)), np.array(list(counts.values()))
    n = len(differences)
    drawn = np.random.default_rng(seed).multinomial(n, times / n, size=DRAWS)
    low, high = np.quantile(drawn @ values / n, (0.025, 0.975))
    return float(low), float(high)


def welch(first: Spread, second: Spread) -> Interval | None:
    """Returns the 95 % interval of the mean of ``second`` minus that of ``first`` over trainings (B. L. Welch,
    Biometrika 34, 1947, 28-35); None where one has fewer than two, or where neither spreads."""
    if min(len(first.values), len(second.values)) < 2:
        return None
    parts = [spread.sd**2 / len(spread.values) for spread in (first, second)]
    if not sum(parts):
        return None
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(spread.values) - 1) for part, spread in zip(parts, (first, second), strict=True)
    )
    return _around(second.mean - first.mean, math.sqrt(sum(parts)), freedom)


def _around(mean: float, error: float, freedom: float) -> Interval:
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * error
    return mean - half, mean + half
