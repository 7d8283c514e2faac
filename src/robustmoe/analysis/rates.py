"""One image: did the exact model hold? And how sure is a share of such images?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from robustmoe.records import Row

BALL_TOLERANCE = 1e-5  # relative, and 1e-7 beside it: the rounding of float32 pixels


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the score interval of a proportion of ``k`` successes in ``n`` trials (E. B. Wilson, JASA 22, 1927,
    209-212).

    ``z`` = 1.959964 gives 95 %. It stays inside [0, 1] and is not empty at k = 0 or k = n; without trials it is (0, 1).
    ValueError unless 0 <= k <= n."""
    if not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    share = k / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if k == 0 else (centre - half) / scale
    high = 1.0 if k == n else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n`` images."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """Returns the share, nan without images."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns Wilson's 95 % interval."""
        return wilson(self.count, self.n)


def rate(hits: Sequence[bool]) -> Rate:
    """Returns how many of these images are hits."""
    return Rate(sum(hits), len(hits))


def mean(values: Sequence[float | int]) -> float:
    """Returns the arithmetic mean, nan without values; infinities count."""
    return statistics.fmean(values) if values else math.nan


def right(row: Row) -> bool:
    """Says whether the exact model is right on the clean image."""
    return row.clean == row.label


def robust(row: Row) -> bool:
    """Says whether the exact model is right on the clean and on the attacked image."""
    return row.clean == row.label and row.adversarial == row.label


def largest(sizes: Iterable[float]) -> float:
    """Returns the maximum, nan if any is nan (the built-in ``max`` may lose one)."""
    sizes = list(sizes)
    return math.nan if any(math.isnan(size) for size in sizes) else max(sizes)


def ball_limit(eps: float) -> float:
    """The largest size that still counts as inside a ball of that radius: up to the rounding of float32."""
    return eps * (1 + BALL_TOLERANCE) + 1e-7


def inside(size: float, eps: float) -> bool:
    """Says whether a perturbation of that size is in the ball, up to the rounding of float32; False for nan."""
    return size <= ball_limit(eps)
