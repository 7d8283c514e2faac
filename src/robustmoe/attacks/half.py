"""Attacks made in bf16: the network's products in half precision; the image, its gradient and the steps in full."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe import compat
from robustmoe.attacks.base import Attack, Wrapped
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Tape, Trace


class LowPrecision(RoutedModel):
    """``model`` under bf16 autocast, on float32 images; what it computes outside convolutions and products keeps its
    dtype. The weights are the model's own.
    """

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # the cache outlives an optimiser step
            return self.model.ask(x.float(), tape)

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.model.route(x.float())


@dataclass(frozen=True)
class Bf16(Wrapped):
    """``attack`` made on the network in bf16: cheaper examples for training, whose loss then asks the exact model.

    The attack itself asks the bf16 network what is fooled. A `Surrogate` (what evaluation attacks: see its
    ``precision``) is attacked as it is, and so is every model on a device that has no products of bf16: there they
    would take longer.
    """

    attack: Attack

    def queries(self, output: Output) -> int:
        return self.attack.queries(output)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        whole = isinstance(model, Surrogate) or not compat.multiplies(x.device, torch.bfloat16)
        return self.attack(model if whole else LowPrecision(model), x, y, noise)
