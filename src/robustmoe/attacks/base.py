"""What every attack is: a frozen value, called as attack(model, x, y) -> x_adv, that leaves the model as found."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustmoe.attacks.objectives import Objective
from robustmoe.attacks.surrogate import missed
from robustmoe.attacks.threat import Threat
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.plain import as_routed
from robustmoe.noise import Noise


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule is in eval mode inside and in its own former mode afterwards; gradients are enabled, also within
    `torch.no_grad` and `torch.inference_mode`. Buffers cannot move meanwhile. Raises UserError for weights that were
    made in inference mode, which no gradient passes.
    """
    if any(weight.is_inference() for weight in itertools.chain(model.parameters(), model.buffers())):
        raise UserError(
            "the model's weights were made inside torch.inference_mode(), so that no gradient passes them; make (or "
            "load, or move) the model outside of it"
        )
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def ordinary(value: Tensor) -> Tensor:
    """The tensor, cut from its graph; a copy where it was made in inference mode, and could take no gradient."""
    return value.clone() if value.is_inference() else value.detach()


class Attack(ABC):
    """attack(model, x, y) -> x_adv, inside the threat's ball and the box, same shape, dtype and device as x; nothing
    else changes.

    Every attack has a ``threat``, the ``objective`` it climbs and a ``seed``. Subclasses are frozen dataclasses that
    write `perturb`. An attack is never trusted: `robustmoe.evaluation` measures the ball and asks the exact model
    again. Attacked through a `Surrogate`, the exact model behind it says what is broken.
    """

    threat: Threat
    objective: Objective
    seed: int

    @property
    def needs_router(self) -> bool:
        """Whether the attack has nothing to say of a model without a router."""
        return self.objective.needs_router

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        """What the attack consists of, by name, for a model that gave ``output``: each part sees the images that the
        parts before it did not break. A simple attack is its own only part, named "".
        """
        return [("", self)]

    def queries(self, output: Output) -> int:
        """Forward passes that an image costs which is never broken, for a model that gave ``output``; a gradient
        counts as 3 (for the time left). 0: not known.
        """
        return 0

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Float[Tensor, "n ch h w"],
        y: Int[Tensor, " n"],
        noise: Noise | None = None,
    ) -> Float[Tensor, "n ch h w"]:
        """The attacked images. ``model``: a `RoutedModel` or any callable from images to logits (n, c).

        ``noise``: one random stream an image (default: by position in the batch and ``seed``). A stream an image of
        its own makes the result independent of the batch it stands in.
        """
        if noise is None:
            noise = Noise.of(torch.arange(len(x), device=x.device), self.seed)
        if len(noise) != len(x):
            raise ValueError(f"there are {len(x)} images and {len(noise)} streams of noise; one an image is needed")
        if len(x) == 0:
            return x.clone()
        routed = as_routed(model)
        with evaluating(routed):
            return self.perturb(routed, ordinary(x), ordinary(y), noise).detach()

    @abstractmethod
    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The attacked images; the model is in eval mode."""


class Suite(Attack):
    """Several attacks one after the other, each on the images that those before it did not break; `parts` names them.

    An image that no part breaks comes back as it went in (as AutoAttack returns it).
    """

    @abstractmethod
    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        """The attacks, in order, each under its own name."""

    def queries(self, output: Output) -> int:
        return sum(part.queries(output) for _, part in self.parts(output))

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            output = model.run(x)
            left = torch.nonzero(~missed(model, x, output.logits, y))[:, 0]
        x_adv = x.clone()
        for name, part in self.parts(output):
            if len(left) == 0:
                break
            attacked = part(model, x[left], y[left], part_noise(noise[left], name))
            with torch.no_grad():
                broken = missed(model, attacked, model.run(attacked).logits, y[left])
            x_adv[left[broken]] = attacked[broken]
            left = left[~broken]
        return x_adv


class Wrapped(Attack):
    """``attack`` made on another model than the one it is given. Threat, objective, seed and parts are the attack's;
    `changed` reaches them. Subclasses are frozen dataclasses with a field ``attack`` and write `perturb`.
    """

    attack: Attack

    @property
    def inner(self) -> Attack:
        """What is wrapped, at any depth."""
        return self.attack.inner if isinstance(self.attack, Wrapped) else self.attack

    @property
    def threat(self) -> Threat:  # type: ignore[override]
        return self.attack.threat

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return self.attack.objective

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.attack.seed

    @property
    def needs_router(self) -> bool:
        return self.attack.needs_router

    def around(self, attack: Attack) -> Attack:
        """The same about another attack."""
        new: Attack = dataclasses.replace(self, attack=attack)  # type: ignore[type-var]
        return new

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        parts = self.attack.parts(output)
        return [("", self)] if parts == [("", self.attack)] else [(name, self.around(part)) for name, part in parts]


def changed(attack: Attack, **fields: object) -> Attack:
    """`dataclasses.replace`, which reaches the attack inside a `Wrapped` one: ``changed(attack, seed=3)``."""
    if isinstance(attack, Wrapped):
        return attack.around(changed(attack.attack, **fields))
    new: Attack = dataclasses.replace(attack, **fields)  # type: ignore[type-var]
    return new


def part_noise(noise: Noise, part: str) -> Noise:
    """The streams of one part of an attack, apart from every other part's; of a simple attack (""), as they are."""
    return noise.fold(zlib.crc32(part.encode())) if part else noise
