"""What a model is made of, for those who bound it: a network, a fork by a router, or a blend of two.

`robustmoe.models.RoutedModel.parts` says it. Every function is of the same images (n, ch, h, w) in [0, 1], and none
looks at more than one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Leaf:
    """``network``: images -> logits (n, c)."""

    network: Function


@dataclass(frozen=True)
class Fork:
    """``router``: images -> its logits (n, e); ``branches``, one an expert. The ``k`` best are used, or all of them
    where ``soft``, by the softmax of all logits. ``total``: whether the weights used sum to 1 (V-MoE's do not, at
    k < e). ``equal``: whether they are 1/k each. ``mix``: of logits or of probabilities. ``name``: the router's in a
    trace.
    """

    name: str
    router: Function
    branches: tuple[Part, ...]
    k: int = 1
    soft: bool = False
    total: bool = True
    mix: Literal["logits", "probabilities"] = "logits"
    equal: bool = False


@dataclass(frozen=True)
class Blended:
    """(1 - alpha) standard + alpha robust, of logits or of probabilities, ``alpha`` anywhere between the two numbers.
    The robust half's logits are times ``scale`` first.
    """

    standard: Part
    robust: Part
    alpha: tuple[float, float]
    mix: Literal["logits", "probabilities"]
    scale: float = 1.0


Part = Leaf | Fork | Blended


def through(normalise: nn.Module, network: nn.Module) -> Function:
    """The network on normalised images."""
    return lambda x: network(normalise(x))
