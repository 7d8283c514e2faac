"""What an attack maximises: a loss of the attacked image, through the whole model, its experts alone, or its routers
alone.

An objective is called once with the clean batch, and gives the inner function that the attack climbs: x_adv ->
`Score`. Clean quantities are computed once, outside it. An attack that goes on with some of the images only names them
(``rows``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks.losses import Ascent, Loss, climb, gate_climb, gate_residue, scale_of, targeted_climb
from robustmoe.attacks.surrogate import exact_of, missed
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.routing import Routing, Trace, detach


class Score(NamedTuple):
    """Per image: ``loss`` (n,), to be maximised, and ``fooled`` (n,) bool, whether the attacked pass misses the
    label (see `missed`). ``other`` (n,): what is differentiated in the loss's place (None: the loss itself).
    """

    loss: Tensor
    fooled: Tensor
    other: Tensor | None = None

    @property
    def climbed(self) -> Tensor:
        """What is differentiated: see `losses.climb`."""
        return self.loss if self.other is None else self.other


@runtime_checkable
class Inner(Protocol):
    """x_adv (m, ch, h, w) -> Score (m,); ``rows`` (m,) says which images of the batch these are (default: all)."""

    def __call__(self, x_adv: Tensor, rows: Tensor | None = None) -> Score: ...


def some(values: Tensor, rows: Tensor | None) -> Tensor:
    """The values of the images ``rows``; all of them for None."""
    return values if rows is None else values[rows]


def some_routes(trace: Trace, rows: Tensor | None) -> Trace:
    """The decisions for the images ``rows``; all of them for None."""
    return trace if rows is None else {name: routing[rows] for name, routing in trace.items()}


class Objective(ABC):
    """(model, x, y) -> (x_adv -> Score). Subclasses are frozen dataclasses and declare what they aim at; checks,
    verdict, tables and the choice of attacks ask these facts and know no names.

    ``name``: what files call it; objectives of one name are compared as one. ``aims_at_router``: moving the routing can
    raise the loss. ``aims_at_experts``: so can moving the experts' outputs. ``needs_router``: it says nothing new of a
    dense model.
    """

    name: ClassVar[str]
    aims_at_router: ClassVar[bool]
    aims_at_experts: ClassVar[bool] = True
    needs_router: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [fact for fact in ("name", "aims_at_router") if not hasattr(cls, fact)]
        if missing:
            raise TypeError(f"objective {cls.__name__} must declare {' and '.join(missing)}: see robustmoe.Objective")

    @abstractmethod
    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        """The inner function for this batch. The model is in the state the attack left it in (eval mode)."""


def scored(ascent: Ascent, fooled: Tensor) -> Score:
    """The score of an image whose loss and what is climbed are told apart."""
    return Score(ascent.loss, fooled, ascent.climbed)


@dataclass(frozen=True)
class Joint(Objective):
    """The whole model: a loss of ``model(x_adv)``, the route live, its gradient as the model declares it."""

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        clean = _clean_logits(model, x) if self.loss == "kl" else None

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            logits, label = model.run(x_adv).logits, some(y, rows)
            before = None if clean is None else some(clean, rows)
            return scored(climb(self.loss, logits, label, before), missed(model, x_adv, logits, label))

        return inner


@dataclass(frozen=True)
class Diluted(Objective):
    """The whole model and its routers at once, as AdvMoE's released code attacks (``train_moe.py``): not a measure of
    robustness.

    ``loss``: "ce", its evaluation: CE(f(x_adv), y) + ``weight`` * CE(router logits, y mod E), with weight 6. "kl", its
    training: KL(f clean || f attacked) + ``weight`` * KL(router clean || attacked), with weight 1. Both KL in log space
    and of the model as it is (the released code compares with the router's train-mode logits). Where the router's term
    owns the gradient, the budget goes into the route and the prediction is spared. Means over routers and items.
    """

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True
    loss: Literal["ce", "kl"] = "ce"
    weight: float = 6.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"weight must be 0 or more, and finite; got {self.weight}")

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        clean = None
        if self.loss == "kl":
            with torch.no_grad():
                clean = exact_of(model).run(x)

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            output, label = model.run(x_adv), some(y, rows)
            before = None if clean is None else some(clean.logits, rows)
            loss, climbed = climb(self.loss, output.logits, label, before)
            parts = []
            for name, routing in output.trace.items():
                if clean is None:
                    parts.append(gate_residue(routing.logits, label % routing.num_experts))
                else:
                    parts.append(gate_climb(some(clean.trace[name].logits, rows), routing.logits))
            if parts:
                of_loss, of_climbed = (
                    torch.stack([part.mean(-1) for part in each]).mean(0) for each in zip(*parts, strict=True)
                )
                loss, climbed = loss + self.weight * of_loss, climbed + self.weight * of_climbed
            return Score(loss, missed(model, x_adv, output.logits, label), climbed)

        return inner


@dataclass(frozen=True)
class Targeted(Objective):
    """The whole model, towards the class that is ``rank``-th most likely on the clean image (2: the first rival).

    "dlr": the targeted DLR loss (Croce and Hein 2020, eq. 7), with fewer than 4 classes the margin; "margin": the
    target's logit minus the label's.
    """

    name: ClassVar[str] = "joint"
    aims_at_router: ClassVar[bool] = True
    rank: int = 2
    loss: Literal["dlr", "margin"] = "dlr"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        clean = _clean_logits(model, x)
        classes = clean.shape[1]
        if not 2 <= self.rank <= classes:
            raise UserError(f"rank must be from 2 to the number of classes, {classes}; got {self.rank}")
        return towards(model, y, clean.sort(dim=1).indices[:, -self.rank], self.loss)


def towards(model: RoutedModel, y: Tensor, target: Tensor, loss: Literal["dlr", "margin"]) -> Inner:
    """The inner function of `Targeted`, towards the classes ``target`` (n,)."""

    def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
        logits, label = model.run(x_adv).logits, some(y, rows)
        aimed = targeted_climb(loss, logits, label, some(target, rows))
        return scored(aimed, missed(model, x_adv, logits, label))

    return inner


@dataclass(frozen=True)
class ExpertsOnly(Objective):
    """The experts alone: the clean image's route is held, so nothing is gained by moving it. ``fooled`` is of this
    frozen model.
    """

    name: ClassVar[str] = "experts_only"
    aims_at_router: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        logits = None
        with torch.no_grad():
            if self.loss == "kl":
                logits, trace = exact_of(model).run(x)
            else:
                trace = exact_of(model).route(x)
        return _on_route(model, y, detach(trace), self.loss, logits)


@dataclass(frozen=True)
class Held(Objective):
    """A loss of the model on the given route of each image (a training method's; it has no spec). ``fooled`` is of the
    model on that route.
    """

    name: ClassVar[str] = "experts_only"
    aims_at_router: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    forced: Trace
    loss: Loss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        clean = None
        if self.loss == "kl":
            with torch.no_grad():
                clean = model.run(x, forced=self.forced).logits
        return _on_route(model, y, self.forced, self.loss, clean)


def _on_route(model: RoutedModel, y: Tensor, trace: Trace, kind: Loss, clean: Tensor | None) -> Inner:
    """The inner function of a loss on the route ``trace``."""

    def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
        held, label = some_routes(trace, rows), some(y, rows)
        logits = model.run(x_adv, forced=held).logits
        before = None if clean is None else some(clean, rows)
        return scored(climb(kind, logits, label, before), missed(model, x_adv, logits, label, held))

    return inner


@dataclass(frozen=True)
class RouterOnly(Objective):
    """The routers alone: push their decisions off the clean ones, whatever the experts then say.

    Per router and item, averaged: the best unchosen logit minus the worst chosen one (above 0: rerouted), where k <
    e; where every expert is chosen (soft gates), KL(clean || attacked) of the gate. The label is not used for the
    ascent; ``fooled`` is of the exact model.
    """

    name: ClassVar[str] = "router_only"
    aims_at_router: ClassVar[bool] = True
    aims_at_experts: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        with torch.no_grad():
            trace = detach(exact_of(model).route(x))
        if not trace:
            raise UserError("router_only needs a model with a router; this model is dense")

        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            output = model.run(x_adv)
            held = some_routes(trace, rows)
            parts = [_departure(routing, output.trace[name].logits) for name, routing in held.items()]
            loss, climbed = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
            return Score(loss, missed(model, x_adv, output.logits, some(y, rows)), climbed)

        return inner


def _departure(clean: Routing, logits: Float[Tensor, "n t e"]) -> Ascent:
    """Of one router, scaled by its clean logits where these are extreme."""
    if clean.k == clean.num_experts:
        return Ascent(*(each.mean(-1) for each in gate_climb(clean.logits, logits)))
    chosen, logits = clean.chosen(), logits * scale_of(clean.logits)[:, None, None]
    rival = logits.masked_fill(chosen, -torch.inf).amax(-1)
    gap = rival - logits.masked_fill(~chosen, torch.inf).amin(-1)
    loss = gap.where(chosen.any(-1), 0.0).mean(-1)  # no choice of an item found room: it can leave none
    return Ascent(loss, loss)


def _clean_logits(model: RoutedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.run(x).logits


def joint(loss: Loss = "ce") -> Joint:
    """A loss of the whole model, route and experts."""
    return Joint(loss)


def targeted(rank: int = 2, loss: Literal["dlr", "margin"] = "dlr") -> Targeted:
    """A targeted loss of the whole model, towards the ``rank``-th most likely class of the clean image."""
    return Targeted(rank, loss)


def experts_only(loss: Loss = "ce") -> ExpertsOnly:
    """A loss of the model whose route is held at the clean one."""
    return ExpertsOnly(loss)


def router_only() -> RouterOnly:
    """The departure of the routers' decisions from the clean ones."""
    return RouterOnly()
