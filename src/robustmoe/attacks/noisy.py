"""Attacks made on a model whose routers keep their training noise, as V-MoE's adversarial training makes them."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks.base import Attack, Wrapped
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Tape, Trace

PASSES = zlib.crc32(b"noisy")


class TrainingNoise(RoutedModel):
    """``model`` with the noise and the dropout of its training in every pass, drawn anew in each from ``noise``, one
    stream an image. All else (BatchNorm's statistics, capacity) is as in the mode that the model is in.
    """

    def __init__(self, model: RoutedModel, noise: Noise) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.noise, self.passes = noise, 0

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        return self.model.ask(x, self._with_noise(x, tape))

    def route(self, x: Float[Tensor, "n ch h w"]) -> Trace:
        tape = self._with_noise(x, Tape())
        self.model.ask(x, tape)
        return tape.trace

    def _with_noise(self, x: Tensor, tape: Tape) -> Tape:
        if len(x) != len(self.noise):
            raise UserError(
                f"noisy(...) got a pass of {len(x)} of {len(self.noise)} images; expected an attack that asks for all "
                "of them in each, such as pgd(linf(8/255), keep=last)"
            )
        noisy = copy.copy(tape)  # the same trace
        noisy.noise = self.noise.fold(PASSES, self.passes)
        self.passes += 1
        return noisy


@dataclass(frozen=True)
class Noisy(Wrapped):
    """``attack`` made on the network with its routers' training noise, and its dropout, drawn anew in each pass: the
    attack in V-MoE's adversarial training (google-research/vmoe, projects/adversarial_attacks, where BatchNorm does not
    exist and capacity is training's). For training; a `Surrogate`, what evaluation attacks, is attacked as it is.
    """

    attack: Attack

    def queries(self, output: Output) -> int:
        return self.attack.queries(output)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self.attack(model if isinstance(model, Surrogate) else TrainingNoise(model, noise), x, y, noise)
