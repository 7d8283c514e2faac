"""A model to climb and the exact one that judges: gradients come from the first, success from the second.

Every attack asks `missed` whether an image is broken, so an attack on a `Surrogate` (a half-precision copy, an attack
view) is never believed on the surrogate's own word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe import asking
from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing, Tape


class Surrogate(RoutedModel):
    """``climbed`` stands in for ``exact``: the same images, classes and router names; an attack differentiates the
    first and is judged by the second.

    ``close``: the surrogate's answers are nearly the exact ones (another precision), so that the exact model is asked
    only where the surrogate says "broken"; otherwise (a view) it is asked every time. ``on_pass(n, gradient)`` is
    called with the number of images of each pass and whether a gradient will be taken, for progress and counts.
    """

    def __init__(
        self,
        climbed: RoutedModel,
        exact: RoutedModel,
        close: bool = False,
        on_pass: Callable[[int, bool], None] | None = None,
    ) -> None:
        super().__init__()
        self.climbed = climbed
        self.exact = exact_of(exact)
        self.close = close
        self.on_pass = on_pass

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        if self.on_pass is not None:
            self.on_pass(len(x), torch.is_grad_enabled() and x.requires_grad)
        return self.climbed.ask(x, tape)

    @torch.no_grad()
    def confirm(
        self,
        x_adv: Float[Tensor, "n ch h w"],
        y: Int[Tensor, " n"],
        claim: Bool[Tensor, " n"],
        forced: Mapping[str, Routing] | None = None,
    ) -> Bool[Tensor, " n"]:
        """Which images the exact model (on the route ``forced``, if given) misses; ``claim`` is the surrogate's
        own answer.
        """
        if not self.close:
            return self.verdict(x_adv, y, forced)

        def confirming(rows: Tensor) -> Tensor:
            held = None if forced is None else {name: routing[rows] for name, routing in forced.items()}
            return self.verdict(x_adv[rows], y[rows], held)

        later = _UNCONFIRMED.get()
        if later is not None and later.confirming is None and not asking.free(claim):
            later.claim, later.confirming = claim, confirming
            return claim
        [rows] = asking.places(claim)
        if len(rows) == 0:
            return asking.nowhere(claim)
        wrong = torch.zeros_like(claim)
        wrong[rows] = confirming(rows)
        return wrong

    @torch.no_grad()
    def verdict(
        self, x_adv: Float[Tensor, "n ch h w"], y: Int[Tensor, " n"], forced: Mapping[str, Routing] | None = None
    ) -> Bool[Tensor, " n"]:
        """Which images the exact model misses, whatever the surrogate says of them."""
        if self.on_pass is not None:
            self.on_pass(len(x_adv), False)
        return _wrong(self.exact.run(x_adv.detach(), forced=forced).logits, y)


_UNJUDGED: ContextVar[bool] = ContextVar("unjudged", default=False)


@contextlib.contextmanager
def unjudged() -> Iterator[None]:
    """Inside, nobody reads which images are broken (of an attack that gives its last iterate): no exact model is asked
    for it.
    """
    token = _UNJUDGED.set(True)
    try:
        yield
    finally:
        _UNJUDGED.reset(token)


@dataclass
class Unconfirmed:
    """What a close surrogate said inside `unconfirmed`: its own ``claim`` (n,), and ``confirming``, which gives the
    exact model's word on the images ``rows`` of that pass.
    """

    claim: Tensor | None = None
    confirming: Callable[[Tensor], Tensor] | None = None


_UNCONFIRMED: ContextVar[Unconfirmed | None] = ContextVar("unconfirmed", default=None)


@contextlib.contextmanager
def unconfirmed() -> Iterator[Unconfirmed]:
    """Inside, where asking waits for the device, the first claim of a close surrogate is given as it is, to be
    confirmed afterwards.
    """
    token = _UNCONFIRMED.set(later := Unconfirmed())
    try:
        yield later
    finally:
        _UNCONFIRMED.reset(token)


def exact_of(model: RoutedModel) -> RoutedModel:
    """The model whose word counts: the exact one of a `Surrogate` (at any depth), any other model itself."""
    return model.exact if isinstance(model, Surrogate) else model


def missed(
    model: RoutedModel,
    x_adv: Float[Tensor, "n ch h w"],
    logits: Float[Tensor, "n c"],
    y: Int[Tensor, " n"],
    forced: Mapping[str, Routing] | None = None,
) -> Bool[Tensor, " n"]:
    """Which images are broken. ``logits`` are ``model``'s own on x_adv; where it is a `Surrogate`, the exact model
    decides.
    """
    claim = _wrong(logits, y)
    if isinstance(model, Surrogate) and not _UNJUDGED.get():
        return model.confirm(x_adv, y, claim, forced)
    return claim


def _wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.detach().argmax(1) != y
