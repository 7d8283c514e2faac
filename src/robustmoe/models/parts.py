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


Weighting = Literal["equal", "chosen", "share", "softmax"]
"""How a router's experts are weighted: "equal", 1/k each; "chosen", by the softmax over the k chosen; "share", by the k
chosen entries of the softmax over all, which do not sum to 1 (V-MoE's); "softmax", all experts by that softmax.
"""


@dataclass(frozen=True)
class Leaf:
    """``network``: images -> logits (n, c)."""

    network: Function


@dataclass(frozen=True)
class Fork:
    """``router``: images -> its logits (n, e); ``branches``, one an expert. The ``k`` best are used, ``weighting`` them
    as `Weighting` says. ``mix``: of logits or of probabilities. ``name``: the router's in a trace.
    """

    name: str
    router: Function
    branches: tuple[Part, ...]
    k: int = 1
    weighting: Weighting = "equal"
    mix: Literal["logits", "probabilities"] = "logits"

    @property
    def soft(self) -> bool:
        """Whether every expert is used."""
        return self.weighting == "softmax"

    @property
    def total(self) -> bool:
        """Whether the weights used sum to 1."""
        return self.weighting != "share"


@dataclass(frozen=True)
class Mixed:
    """(1 - alpha) standard + alpha robust, of logits or of probabilities, ``alpha`` anywhere between the two numbers.
    The robust half's logits are times ``scale`` first.
    """

    standard: Part
    robust: Part
    alpha: tuple[float, float]
    mix: Literal["logits", "probabilities"]
    scale: float = 1.0


Part = Leaf | Fork | Mixed


def through(normalise: nn.Module, network: nn.Module) -> Function:
    """Returns the network on normalised images."""
    return lambda x: network(normalise(x))
