"""The attack on other routes: hold the route of another image, be wrong there, and see whether the model is.

A soft gate, a hard one, one router or many: whatever a gradient through the gates does not show, an attack on the
experts alone may, if it looks at them on a route that is not the clean image's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustmoe.attacks.base import Attack
from robustmoe.attacks.losses import climb
from robustmoe.attacks.objectives import Inner, Objective, Score, scored, some, some_routes
from robustmoe.attacks.pgd import PGD
from robustmoe.attacks.routes.objectives import RouterHinge, RoutingLoss
from robustmoe.attacks.routes.regions import RouteLoss, Survivors, broken, climbable, decisions, free_trace
from robustmoe.attacks.surrogate import missed
from robustmoe.attacks.threat import Threat
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Trace, detach

Source = Literal["clean", "pushed", "mirrored", "negative"]

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "negative": lambda x: 1 - x,
}
"""Images made of an image alone, so that no result depends on what else is in its batch."""


@dataclass(frozen=True)
class OnRoute(Objective):
    """A loss on the route ``forced`` of each image; ``fooled`` is of the model on its own route (it has no spec)."""

    name: ClassVar[str] = "routing"
    aims_at_router: ClassVar[bool] = False
    needs_router: ClassVar[bool] = True
    forced: Trace
    loss: RouteLoss = "ce"

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor) -> Inner:
        def inner(x_adv: Tensor, rows: Tensor | None = None) -> Score:
            label = some(y, rows)
            ascent = climb(self.loss, model.run(x_adv, forced=some_routes(self.forced, rows)).logits, label)
            with torch.no_grad():
                free = model.run(x_adv).logits
            return scored(ascent, missed(model, x_adv, free, label))

        return inner


@dataclass(frozen=True)
class OtherRoutes(Attack):
    """For each of ``routes`` in turn: hold that route at every router, and ascend the loss of the experts on it; an
    image is broken where the model misses it on the route that it takes itself.

    "clean": the route of the image itself. "pushed": that of the image whose routers were pushed off their decisions
    (`RouterHinge`) for ``steps`` steps, from where the ascent then starts. "mirrored", "negative": the route of these
    other images. ``steps`` of ``step_size`` (eps / 4 by default) each; a broken image leaves at once.
    ``loss``: what is ascended.
    """

    threat: Threat
    steps: int = 20
    routes: tuple[Source, ...] = ("pushed", "mirrored", "negative")
    step_size: float | None = None
    loss: RouteLoss = "margin"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.routes if name != "pushed" and name not in OTHERS]
        if unknown or not self.routes:
            raise UserError(f"routes must be some of clean, pushed, mirrored, negative; got {self.routes}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UserError(f"step_size must be above 0, in pixels of [0, 1]; got {self.step_size}")

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return RoutingLoss(self.loss)

    def queries(self, output: Output) -> int:
        """A step: a gradient on the route, and a pass on the model's own."""
        if not output.trace:
            return 0
        pushes = self.routes.count("pushed") * 3 * self.steps
        return 2 + pushes + len(self.routes) * (4 * self.steps + 3)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        model = climbable(model)
        free_trace(model, x, "other_routes")
        survivors = Survivors(model, x, y)
        for number, source in enumerate(self.routes):
            rows = survivors.rows
            if len(rows) == 0:
                break
            images, labels, draws = x[rows], y[rows], noise[rows].fold(number)
            start = self._pushed(model, images, labels, draws) if source == "pushed" else images
            with torch.no_grad():
                route = detach(decisions(model, start if source == "pushed" else OTHERS[source](images)))
            ascent = self._ascent(OnRoute(route, self.loss), keep="first")
            now = ascent.climb(model, images, labels, start)
            survivors.record(rows, now, broken(model, now, labels))
        return survivors.x_adv

    def _ascent(self, objective: Objective, keep: Literal["best", "first"]) -> PGD:
        return PGD(self.threat, self.steps, self.step_size, objective=objective, keep=keep, seed=self.seed)

    def _pushed(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Returns the images whose routes are furthest from the clean ones."""
        return self._ascent(RouterHinge(cap=math.inf), keep="best").perturb(model, x, y, noise)
