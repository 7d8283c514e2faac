"""The tiny models of the fixtures `tiny`, `model` and `routed`, for tests that choose among them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE_SHAPE, CLASSES = (3, 8, 8), 4

TINY = {
    "dense": "resnet8(width=4)",
    "ensemble_hard": "ensemble(small_cnn(width=4), experts=3, gate=hard, router=small_cnn(width=4))",
    "ensemble_soft": "ensemble(small_cnn(width=4), experts=3, gate=soft, router=small_cnn(width=4))",
    "ensemble_k2": "ensemble(small_cnn(width=4), experts=3, k=2, gate=vmoe, router=small_cnn(width=4))",
    "ensemble_straight": "ensemble(small_cnn(width=4), experts=3, gate=straight_through, router=small_cnn(width=4))",
    "pathway": "pathway(resnet8(width=4), experts=3, router=small_cnn(width=4))",
    "dual": (
        "dual(ensemble(small_cnn(width=4), experts=3, gate=soft, router=small_cnn(width=4)), "
        "ensemble(small_cnn(width=4), experts=3, gate=straight_through, router=linear))"
    ),
    "vit_moe": "vit_moe(patch=4, width=16, depth=2, heads=2, experts=3, k=2, placement=(1,))",
}
"""Models of every kind, at most a few thousand parameters; "dense" is the one without a router, "dual" has two."""


def in_turn(first: Sequence[Any], second: Sequence[Any], every: int = 0) -> list[tuple[Any, ...]]:
    """Returns pairs in which every value of both stands: of each value's pairs every third, say, in turn.

    Without a number the values of the shorter take turns, so that each of the longer stands in one pair. A pair of the
    first is put flat: its two values and the second's.
    """
    every = every or min(len(first), len(second))
    assert 0 < every <= min(len(first), len(second)), "some value would stand nowhere"
    pairs = [(a, b) for i, a in enumerate(first) for j, b in enumerate(second) if (i + j) % every == 0]
    return [(*(a if isinstance(a, tuple) else (a,)), b) for a, b in pairs]
