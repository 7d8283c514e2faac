"""Whole networks as experts, and an image router that mixes or picks them (the MoE of Zhang et al., ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe.models.base import ImageShape, ModelSpec, NetworkSpec, RoutedModel, to_channels_last
from robustmoe.models.mixing import mix_sparse, run_sparse
from robustmoe.models.norm import Normalise, Standardise, at_least_float32
from robustmoe.models.parts import Fork, Leaf, Part, Weighting, through
from robustmoe.models.small import SmallCNN
from robustmoe.routing import Gate, Routing, Tape, Trace, choose

WEIGHTING: dict[Gate, Weighting] = {
    "straight_through": "equal", "hard": "equal", "renormalised": "chosen", "vmoe": "share", "soft": "softmax",
}  # fmt: skip
"""How each gate weights fewer experts than there are; "chosen" and "share" of all of them are the softmax."""


class EnsembleModel(RoutedModel):
    """sum over the chosen experts of weight times output; the outputs are logits or probabilities.

    With ``mix="probabilities"`` the result is the logarithm of the mixed probabilities, in log space throughout (no
    margin is too large to have a gradient); it is a valid logits tensor.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: list[nn.Module],
        gate: Gate,
        k: int,
        mix: Literal["logits", "probabilities"],
        normalise: Normalise,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.router = router
        self.experts = nn.ModuleList(experts)
        self.rule = partial(choose, gate=gate, k=k)
        self.gate: Gate = gate
        self.k = k
        self.mix = mix

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        x = to_channels_last(self.normalise(x))
        routing = tape("router", self._decide(x))
        index, weight = routing.index[:, 0], routing.weight[:, 0]
        if self.mix == "logits":
            return mix_sparse(list(self.experts), x, index, weight, routing.sizes)
        answers = run_sparse(list(self.experts), x, index, routing.sizes)
        log_probabilities = torch.log_softmax(at_least_float32(answers), dim=-1)
        return torch.logsumexp(log_probabilities + torch.log(weight)[:, :, None], dim=1)

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        """Returns the router's decision; no expert runs."""
        tape = Tape()
        tape("router", self._decide(to_channels_last(self.normalise(x))))
        return tape.trace

    def parts(self) -> Part:
        branches = tuple(Leaf(through(self.normalise, expert)) for expert in self.experts)
        weighting = WEIGHTING[self.gate]
        if weighting != "equal" and self.k == len(branches):
            weighting = "softmax"
        return Fork("router", through(self.normalise, self.router), branches, self.k, weighting, self.mix)

    def _decide(self, x: Float[Tensor, "n ch h w"]) -> Routing:
        return self.rule(at_least_float32(self.router(x))[:, None])


@dataclass(frozen=True)
class Ensemble(ModelSpec):
    """``experts`` whole networks of kind ``network`` and one image ``router``.

    ``gate``: "straight_through" (top-k, 1/k each, with a straight-through gradient for the router), "renormalised" or
    "vmoe" (top-k softmax), "hard" (the router gets no gradient at all: the released code's), "soft" (all experts). Only
    chosen experts run. ``mix``: what of the experts is averaged, "logits" or "probabilities". ``standardise``: the
    router's logits have mean 0 and variance 1 over the training batches, so that no expert is dead at the start.
    """

    network: NetworkSpec
    experts: int = 4
    k: int = 1
    gate: Gate = "straight_through"
    router: NetworkSpec = SmallCNN()  # noqa: RUF009 (a frozen value)
    mix: Literal["logits", "probabilities"] = "logits"
    standardise: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.experts:
            raise ValueError(f"k must be between 1 and the number of experts, {self.experts}; got {self.k}")

    def build(self, num_classes: int, image_shape: ImageShape, normalise: Normalise) -> RoutedModel:
        router = self.router.network(self.experts, image_shape)
        if self.standardise:
            router = Standardise(router, self.experts)
        experts = [self.network.network(num_classes, image_shape) for _ in range(self.experts)]
        return EnsembleModel(router, experts, self.gate, self.k, self.mix, normalise)
