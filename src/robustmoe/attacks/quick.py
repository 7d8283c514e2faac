"""A verdict for few passes: the parts of the suites that break nearly all, short, in the order learned from rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.base import Attack, Suite
from robustmoe.attacks.losses import TARGETED_DLR_CLASSES
from robustmoe.attacks.objectives import ExpertsOnly, Joint, Objective
from robustmoe.attacks.routes import ExpertTransition, RouteFlip, RoutingLoss
from robustmoe.attacks.routes.regions import RouteLoss
from robustmoe.attacks.square import Square
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.views import HalfView, Soft, Viewed, halves, image_routers
from robustmoe.models.base import Output

SHORT, FLIPS, LONG, TARGETS, NEAREST, QUERIES = 20, 10, 50, 3, 4, 1000
"""Steps of a climb of the whole model or inside a region, of a flip, of a climb towards a class; classes aimed at;
regions that the margin is climbed in; passes of Square.
"""


@dataclass(frozen=True)
class QuickVerdict(Suite):
    """An upper bound of the robust accuracy for a fraction of `AutoAttackRouting`'s passes, for looking at many models:
    for a paper's table run autoattack_routing.

    In order: APGD on the margin; the experts on the held route; where every router picks one expert an image, the
    transition into their regions, with other routers the route flips; the model seen with soft gates; of a dual model,
    each half alone; the 3 likeliest wrong classes in turn, of a routed model also with soft gates; the regions again,
    by the margin; Square with 1,000 queries. The order was learned from rows: what breaks most for a pass of what is
    left comes next (benchmarks/quick_verdict.py). Each success is the exact model's own error on its own routing.
    """

    threat: Threat
    seed: int = 0

    @property
    def needs_router(self) -> bool:
        return False

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return RoutingLoss("margin")

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        routed = any(routing.num_experts > 1 for routing in output.trace.values())
        classes = output.logits.shape[1]
        parts: list[tuple[str, Attack]] = [("margin", self._apgd(Joint("margin")))]
        if routed:
            parts += [("experts held", self._apgd(ExpertsOnly())), ("regions", self._regions(output, "ce", None))]
            parts += [("soft 1", Viewed(Soft(1.0), self._apgd(Joint())))]
        if halves(output.trace):
            parts += [("half standard", Viewed(HalfView("standard"), self._apgd(Joint())))]
            parts += [("half robust", Viewed(HalfView("robust"), self._apgd(Joint())))]
        parts.append(("targets", self._towards(classes, LONG)))
        if routed:
            parts += [("soft targets", Viewed(Soft(1.0), self._towards(classes, SHORT)))]
            parts += [("regions margin", self._regions(output, "margin", NEAREST))]
        return [*parts, ("square", Square(self.threat, steps=QUERIES, seed=self.seed))]

    def _apgd(self, objective: Objective) -> APGD:
        return APGD(self.threat, steps=SHORT, objective=objective, seed=self.seed)

    def _towards(self, classes: int, steps: int) -> TargetedAPGD:
        loss: Literal["dlr", "margin"] = "dlr" if classes >= TARGETED_DLR_CLASSES else "margin"
        return TargetedAPGD(self.threat, min(TARGETS, classes - 1), steps, loss=loss, seed=self.seed)

    def _regions(self, output: Output, loss: RouteLoss, experts: int | None) -> Attack:
        if image_routers(output.trace):
            return ExpertTransition(self.threat, steps=SHORT, loss=loss, experts=experts, seed=self.seed)
        return RouteFlip(self.threat, steps=FLIPS, loss=loss, seed=self.seed)
