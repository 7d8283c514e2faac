"""What the attacks on the route share."""

from __future__ import annotations

import math

from robustmoe.attacks.base import Attack
from robustmoe.attacks.objectives import Objective
from robustmoe.attacks.routes.objectives import RoutingLoss
from robustmoe.attacks.routes.regions import RouteLoss, Steering
from robustmoe.errors import UserError


class RouteAttack(Attack):
    """An attack on the route: a ``step_size`` in pixels (eps / 4 by default), the ``grid`` of `Steering`
    and the ``loss`` that is ascended behind a boundary ("ce" or "margin").
    """

    steps: int
    step_size: float | None
    restarts: int
    grid: tuple[float, ...]
    loss: RouteLoss

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return RoutingLoss(self.loss)

    def _steering(self) -> Steering:
        step_size = self.threat.eps / 4 if self.step_size is None else self.step_size
        return Steering(self.threat, self.steps, step_size, self.grid, self.loss)

    def _check(self) -> None:
        """ValueError for numbers that no such attack can have."""
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1; got {self.steps} and {self.restarts}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UserError(f"step_size must be above 0, in pixels of [0, 1]; got {self.step_size}")
        if not self.grid or list(self.grid) != sorted(self.grid) or not self.grid[0] >= 0:
            raise ValueError(f"grid must be numbers from 0 up, in rising order; got {self.grid}")
