"""Attacks for which every expert runs on every image: a device is never asked how a route divides the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustmoe.attacks.base import Attack, Wrapped
from robustmoe.models import Output, RoutedModel
from robustmoe.models.mixing import undivided
from robustmoe.noise import Noise


@dataclass(frozen=True)
class Undivided(Wrapped):
    """``attack`` made while every expert runs on every image (or token), and what the route leaves out is dropped: for
    training on a device whose host would otherwise wait in every pass to know how many images each expert has.

    The model is the same function, so the attack is the same but for rounding. The experts cost as many times what they
    did as there are experts, which a CPU never gains from; whether a GPU does was not measured.
    """

    attack: Attack

    def queries(self, output: Output) -> int:
        return self.attack.queries(output)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with undivided():
            return self.attack(model, x, y, noise)
