"""What an attack maximises: a loss of the attacked image, through the whole model, its experts alone, or its routers
alone.

An objective is called once with the clean batch, and gives the inner function that the attack climbs: x_adv ->
`Score`. Clean quantities are computed once, outside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing, detach

Loss = Literal["ce", "margin", "kl"]


class Score(NamedTuple):
    """Per image: ``loss`` (n,), to be maximised, and ``fooled`` (n,) bool, whether the attacked pass misses the
    label.
    """

    loss: Tensor
    fooled: Tensor


Inner = Callable[[Tensor], Score]


class Objective(ABC):
    """(model, x, y) -> (x_adv -> Score). Subclasses are frozen dataclasses; ``name`` is what tables call them."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        """The inner function for this batch. The model is in the state the attack left it in (eval mode)."""


def loss_of(
    kind: Loss,
    logits: Float[Tensor, "n c"],
    y: Int[Tensor, " n"],
    clean: Float[Tensor, "n c"] | None = None,
) -> Float[Tensor, " n"]:
    """Per image: "ce" cross-entropy; "margin" best wrong logit minus the label's (above 0: fooled); "kl" KL(clean ||
    attacked), in log space.
    """
    if kind == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if kind == "margin":
        label = F.one_hot(y, logits.shape[1]).bool()
        return logits.masked_fill(label, -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
    if clean is None:
        raise ValueError("the kl loss needs the clean logits")
    return kl(clean, logits)


def kl(target: Float[Tensor, "n ... c"], logits: Float[Tensor, "n ... c"]) -> Float[Tensor, "n ..."]:
    """KL(softmax(target) || softmax(logits)) over the last axis, in log space: finite wherever both logits are."""
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Joint(Objective):
    """The whole model: a loss of ``model(x_adv)``, the route live, its gradient as the model declares it."""

    name: ClassVar[str] = "joint"
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        clean = _clean_logits(model, x) if self.loss == "kl" else None

        def inner(x_adv: Tensor) -> Score:
            logits = model.run(x_adv).logits
            return Score(loss_of(self.loss, logits, y, clean), logits.argmax(1) != y)

        return inner


@dataclass(frozen=True)
class ExpertsOnly(Objective):
    """The experts alone: the clean image's route is held, so nothing is gained by moving it. ``fooled`` is of this
    frozen model.
    """

    name: ClassVar[str] = "experts_only"
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            clean = model.run(x)
        trace = detach(clean.trace)

        def inner(x_adv: Tensor) -> Score:
            logits = model.run(x_adv, forced=trace).logits
            return Score(loss_of(self.loss, logits, y, clean.logits), logits.argmax(1) != y)

        return inner


@dataclass(frozen=True)
class RouterOnly(Objective):
    """The routers alone: push their decisions off the clean ones, whatever the experts then say.

    Per router and item, averaged: the best unchosen logit minus the worst chosen one (above 0: rerouted), where k <
    e; where every expert is chosen (soft gates), KL(clean || attacked) of the gate. The label is not used for the
    ascent; ``fooled`` is of the exact model.
    """

    name: ClassVar[str] = "router_only"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            trace = detach(model.run(x).trace)
        if not trace:
            raise ValueError("router_only needs a model with a router; this model is dense")

        def inner(x_adv: Tensor) -> Score:
            output = model.run(x_adv)
            parts = [_departure(routing, output.trace[name].logits) for name, routing in trace.items()]
            return Score(torch.stack(parts).mean(0), output.logits.argmax(1) != y)

        return inner


def _departure(clean: Routing, logits: Float[Tensor, "n t e"]) -> Float[Tensor, " n"]:
    if clean.k == clean.num_experts:
        return kl(clean.logits, logits).mean(-1)
    chosen = clean.chosen()
    rival = logits.masked_fill(chosen, -torch.inf).amax(-1)
    return (rival - logits.masked_fill(~chosen, torch.inf).amin(-1)).mean(-1)


def _clean_logits(model: RoutedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.run(x).logits


def joint(loss: Loss = "ce") -> Joint:
    """A loss of the whole model, route and experts."""
    return Joint(loss)


def experts_only(loss: Loss = "ce") -> ExpertsOnly:
    """A loss of the model whose route is held at the clean one."""
    return ExpertsOnly(loss)


def router_only() -> RouterOnly:
    """The departure of the routers' decisions from the clean ones."""
    return RouterOnly()
