"""The expert-transition attack: for each expert, be there and be wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustmoe.attacks.routes.base import RouteAttack
from robustmoe.attacks.routes.cells import GRID, Goal, RouteLoss, Standing, climbable, free_trace
from robustmoe.attacks.routes.flip import RouteFlip
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.views import sole_router
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Trace


@dataclass(frozen=True)
class ExpertTransition(RouteAttack):
    """For models with one router that sends the image to one expert: for each expert in turn, from the clean router's
    first choice to its last (or only the first ``experts``), ascend the loss of that expert inside its cell (see
    `Steering`).

    The clean expert's turn is an attack on the experts alone that knows where the cell ends. A broken image leaves at
    once; one that is never broken comes back as the end of its last climb. Restart 0 starts at the clean image, later
    ones at random. ``step_size``: eps / 4 by default. Several routers, tokens or k above 1: `RouteFlip`, with one rival
    fewer than ``experts``. A gate that always uses all experts has no cells: the loss is ascended freely.
    """

    threat: Threat
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "ce"
    experts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check()
        if self.experts is not None and self.experts < 1:
            raise ValueError(f"experts must be at least 1; got {self.experts}")

    def _general(self, trace: Trace) -> RouteFlip:
        most = max(routing.num_experts for routing in trace.values())
        rivals = max(1, (most if self.experts is None else self.experts) - 1)
        return RouteFlip(
            self.threat, self.steps, rivals, self.step_size, self.restarts, self.grid, self.loss, self.seed
        )

    def _tries(self, num_experts: int) -> int:
        return num_experts if self.experts is None else min(self.experts, num_experts)

    def queries(self, output: Output) -> int:
        """A step: one forward pass, two gradients from it, and the judge's."""
        name = sole_router(output.trace)
        if name is None:
            return self._general(output.trace).queries(output) if output.trace else 0
        return 2 + self.restarts * self._tries(output.trace[name].num_experts) * (6 * self.steps + 1)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        model = climbable(model)
        trace = free_trace(model, x, "expert_transition")
        name = sole_router(trace)
        if name is None:
            return self._general(trace).perturb(model, x, y, noise)
        clean, steer = trace[name], self._steering()
        order = torch.argsort(clean.logits, dim=-1, descending=True, stable=True)
        order = torch.cat([clean.index, order[order != clean.index].view(len(x), 1, -1)], -1)
        standing = Standing(model, x, y)
        for restart in range(self.restarts):
            for rank in range(self._tries(clean.num_experts)):
                rows = standing.rows
                if len(rows) == 0:
                    return standing.x_adv
                start = x[rows] if restart == 0 else self.threat.start(x[rows], noise[rows].fold(restart, rank))
                index = order[rows, :, rank : rank + 1]
                goal = Goal.of(clean[rows], index, torch.ones_like(index[..., 0], dtype=torch.bool))
                standing.record(rows, *steer(model, x[rows], y[rows], start, {name: goal}))
        return standing.x_adv
