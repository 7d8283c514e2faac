"""What every attack is: a frozen value, called as attack(model, x, y) -> x_adv, that leaves the model as found."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from robustmoe import asking
from robustmoe.arrays import as_images, as_labels
from robustmoe.attacks.finite import in_the_end
from robustmoe.attacks.objectives import Objective
from robustmoe.attacks.surrogate import missed
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.together import room, room_for
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.foreign import awaited, blaming_backward, require_weights, to_eval
from robustmoe.models.plain import as_routed
from robustmoe.noise import Noise


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule is in eval mode inside and in its own former mode afterwards; gradients are enabled, also within
    `torch.no_grad` and `torch.inference_mode`. Buffers cannot move meanwhile. Raises UserError for weights that cannot
    be used (see `require_weights`), and where a gradient cannot be taken through a foreign model.
    """
    require_weights(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        to_eval(model)
        with torch.inference_mode(False), torch.enable_grad(), blaming_backward(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


_LOOKED: ContextVar[bool] = ContextVar("looked", default=False)


@contextlib.contextmanager
def looked_at() -> Iterator[None]:
    """Inside, attacks do not look at their images, labels and model once more: whoever calls them has done it, as an
    evaluation, a training and the attack around them have.
    """
    token = _LOOKED.set(True)
    try:
        yield
    finally:
        _LOOKED.reset(token)


_REMEMBERED: ContextVar[Callable[[Callable[[], Tensor], int], Tensor] | None] = ContextVar("remembered", default=None)


@contextlib.contextmanager
def remembering(made: list[Tensor], again: bool = False) -> Iterator[None]:
    """Inside, what every attack makes is added to ``made``; with ``again`` it is taken from there, in the same order,
    and not made anew, where it has as many images. What attacks call inside them is left alone.
    """
    left = iter(list(made))

    def remembered(make: Callable[[], Tensor], n: int) -> Tensor:
        if again and (known := next(left, None)) is not None and len(known) == n:
            return known
        fresh = make()
        if not again:
            made.append(fresh)
        return fresh

    token = _REMEMBERED.set(remembered)
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def _made(make: Callable[[], Tensor], n: int) -> Tensor:
    """``make()``, or what is remembered of it."""
    remembered = _REMEMBERED.get()
    token = _REMEMBERED.set(None)
    try:
        return make() if remembered is None else remembered(make, n)
    finally:
        _REMEMBERED.reset(token)


def ordinary(value: Tensor) -> Tensor:
    """The tensor, cut from its graph; a copy where it was made in inference mode, and could take no gradient."""
    return value.clone() if value.is_inference() else value.detach()


UNASKED: Any = object()
"""In the place of labels: what is called has none."""


class Taken(NamedTuple):
    """What a direct call was given, as the code relies on it: the ``model`` as a routed one, images ``x`` (n, ch, h,
    w), labels ``y`` (n,), or (0,) where none were asked for, and one random stream an image.
    """

    model: RoutedModel
    x: Tensor
    y: Tensor
    noise: Noise


@contextlib.contextmanager
def entered(
    model: Callable[[Tensor], Tensor],
    x: Any,
    y: Any = UNASKED,
    noise: Noise | None = None,
    seed: int = 0,
    climbs: bool = False,
) -> Iterator[Taken]:
    """How everything begins that a user can call with a model and images: inside, these are as `robustmoe.evaluate`
    takes them, with its errors (UserError), and the caller's own stay as they are (see `evaluating` for the model).

    Images and labels are copies, in float32 (float64 where the weights are, too) and int64, unless the caller has
    looked at them (`looked_at`). The model's first pass is looked at: it has an output for each label and, if it
    ``climbs``, a gradient. ``noise``: by default by position in the batch and ``seed``.
    """
    routed, known = as_routed(model), _LOOKED.get()
    with evaluating(routed):
        x = ordinary(x) if known else _given_images(routed, x)
        y = ordinary(y) if known and y is not UNASKED else _given_labels(y, x)
        noise = Noise.of(torch.arange(len(x), device=x.device), seed) if noise is None else noise
        _require_streams(noise, len(x))
        highest = -1 if known or len(y) == 0 else int(y.max())
        look = contextlib.nullcontext() if known else awaited(routed, highest, climbs)
        with look, looked_at(), room_for(room() or len(x)), in_the_end():
            yield Taken(routed, x, y, noise)


def _given_images(model: RoutedModel, x: Any) -> Float[Tensor, "n ch h w"]:
    x = as_images(x)
    kinds = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    wide = x.dtype == torch.float64 and kinds <= {torch.float64}
    return x.to(torch.float64 if wide else torch.float32, copy=True)


def _given_labels(y: Any, x: Tensor) -> Int64[Tensor, " n"]:
    if y is UNASKED:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    return as_labels(y, len(x), None, "the batch").to(x.device, copy=True)


def _require_streams(noise: Any, n: int) -> None:
    """UserError unless there is one random stream an image."""
    if not isinstance(noise, Noise):
        raise UserError(f"the noise is a {type(noise).__name__}; expected robustmoe.noise.Noise.of(torch.arange({n}))")
    if len(noise) != n:
        raise UserError(f"there are {n} images and {len(noise)} streams of noise; expected one an image")


def no_images(x: Any) -> TypeGuard[Tensor]:
    """Whether a batch of images is an empty one, which an attack gives back."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.numel() == 0 and len(x) == 0


class Attack(ABC):
    """attack(model, x, y) -> x_adv, inside the threat's ball and the box, same shape and device as x; nothing else
    changes.

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

    @property
    def needs_gradient(self) -> bool:
        """Whether it climbs, so that on a model without a gradient it stays where it starts."""
        return True

    @property
    def finds_nearest(self) -> bool:
        """Whether it looks for the nearest broken image by a search that does not depend on ``threat.eps``, so that one
        run answers for every smaller radius too.
        """
        return False

    def for_verdict(self) -> Attack:
        """The attack as an evaluation makes it, which asks whether an image breaks and not how badly: one that breaks
        the same images in fewer passes, where there is one and the user did not say otherwise.
        """
        return self

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
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray | list[int],
        noise: Noise | None = None,
    ) -> Float[Tensor, "n ch h w"]:
        """The attacked images, in float32 (float64 where images and weights are). ``model``: a `RoutedModel` or any
        callable from images to logits (n, c). ``x``: images (n, ch, h, w) in [0, 1], ``y``: labels (n,), as
        `robustmoe.evaluate` takes them, and with its errors (UserError); neither is changed.

        ``noise``: one random stream an image (default: by position in the batch and ``seed``). A stream an image of
        its own makes the result independent of the batch it stands in.
        """
        if no_images(x):
            return x.detach().clone()
        with entered(model, x, y, noise, self.seed, self.needs_gradient) as given:
            return _made(lambda: asking.hoped(lambda: self.perturb(*given).detach()), len(given.x))

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

    @property
    def needs_gradient(self) -> bool:
        return self.attack.needs_gradient

    @property
    def finds_nearest(self) -> bool:
        return self.attack.finds_nearest

    def for_verdict(self) -> Attack:
        return self.around(self.attack.for_verdict())

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
