"""The expert-transition attack: for each expert, be there and be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from robustmoe.attacks import schedule
from robustmoe.attacks.routes.base import RouteAttack
from robustmoe.attacks.routes.flip import RouteFlip
from robustmoe.attacks.routes.regions import GRID, Goal, RouteLoss, Survivors, climbable, free_trace
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.views import image_routers
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Routing, Trace


@dataclass(frozen=True)
class ExpertTransition(RouteAttack):
    """For models whose routers send an image to one expert each: for each region in turn, ascend the loss of its expert
    inside it (see `Steering`).

    With one router the regions are its experts, from the clean first choice to the last, or only the first ``experts``.
    With several (a dual model's two) they are combinations of one expert a router, by the sum of their ranks at the
    clean image, equal sums as `by_sum` has them: the first ``regions``. Routers that use all their experts stay free.

    The clean region's turn is an attack on the experts alone that knows where the region ends. A broken image leaves at
    once; one that is never broken comes back as the end of its last climb. Restart 0 starts at the clean image, later
    ones at random. ``step_size``: eps / 4 by default. Tokens or k above 1: `RouteFlip`, with one rival fewer than
    ``experts``. Where every gate uses all experts there are no regions: the loss is ascended freely.
    """

    threat: Threat
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    grid: tuple[float, ...] = GRID
    loss: RouteLoss = "ce"
    experts: int | None = None
    seed: int = 0
    regions: int = 16

    def __post_init__(self) -> None:
        self._check()
        if self.experts is not None and self.experts < 1:
            raise ValueError(f"experts must be at least 1; got {self.experts}")
        if self.regions < 1:
            raise ValueError(f"regions must be at least 1; got {self.regions}")

    def _general(self, trace: Trace) -> RouteFlip:
        most = max(routing.num_experts for routing in trace.values())
        rivals = max(1, (most if self.experts is None else self.experts) - 1)
        return RouteFlip(
            self.threat, self.steps, rivals, self.step_size, self.restarts, self.grid, self.loss, self.seed
        )

    def _regions(self, routers: Trace) -> list[tuple[int, ...]]:
        """The regions to try, as the rank of each router's expert."""
        tries = [min(self.experts or r.num_experts, r.num_experts) for r in routers.values()]
        return list(islice(by_sum(tries), None if len(tries) == 1 else self.regions))

    def queries(self, output: Output) -> int:
        """A step: one forward pass, two gradients from it, and the judge's; with several routers, also the passes that
        look where a step of each lambda leads.
        """
        routers = image_routers(output.trace)
        if not routers:
            return self._general(output.trace).queries(output) if output.trace else 0
        step = 6 if len(routers) == 1 else 6 + len(self.grid) - 1
        return 2 + self.restarts * len(self._regions(routers)) * (step * self.steps + 1)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        model = climbable(model)
        trace = free_trace(model, x, "expert_transition")
        routers = image_routers(trace)
        if not routers:
            return self._general(trace).perturb(model, x, y, noise)
        steer, ranked = self._steering(), {name: ranking(clean) for name, clean in routers.items()}
        survivors, regions = Survivors(model, x, y), self._regions(routers)
        for restart in range(self.restarts):
            for number, ranks in enumerate(regions):
                rows = survivors.rows
                if len(rows) == 0:
                    return survivors.x_adv
                start = x[rows] if restart == 0 else self.threat.start(x[rows], noise[rows].fold(restart, number))
                target = {}
                for (name, clean), rank in zip(routers.items(), ranks):
                    index = ranked[name][rows, :, rank : rank + 1]
                    target[name] = Goal.of(clean[rows], index)
                done = restart * len(regions) + number
                with schedule.part(float(done), done + 1.0, float(self.restarts * len(regions))):
                    survivors.record(rows, *steer(model, x[rows], y[rows], start, target))
        return survivors.x_adv


def ranking(routing: Routing) -> Int[Tensor, "n 1 e"]:
    """All experts of an image router of one choice: the chosen one, then the others from best to worst."""
    order = torch.argsort(routing.logits, dim=-1, descending=True, stable=True)
    return torch.cat([routing.index, order[order != routing.index].view(len(order), 1, -1)], -1)


def by_sum(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every tuple of numbers, one below each of ``sizes``, by their sum; those of equal sum in the order of numbers
    read from the left: (0, 0), (0, 1), (1, 0), (0, 2), ...
    """
    for total in range(sum(sizes) - len(sizes) + 1):
        yield from _adding_to(total, sizes)


def _adding_to(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    most = sum(sizes[1:]) - len(sizes) + 1  # what the others can add
    for first in range(max(0, total - most), min(total, sizes[0] - 1) + 1):
        for rest in _adding_to(total - first, sizes[1:]):
            yield (first, *rest)
