"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) and its extension by the attacks that know what a router is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.base import Attack, Suite
from robustmoe.attacks.fab import FAB
from robustmoe.attacks.objectives import ExpertsOnly, Joint, Objective
from robustmoe.attacks.routes import (
    ExpertTransition,
    JointNormalised,
    RouteBeam,
    RouteFlip,
    RouterHinge,
    RoutingLoss,
)
from robustmoe.attacks.square import Square
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.views import (
    HalfView,
    Soft,
    StraightThrough,
    View,
    Viewed,
    each_expert,
    halves,
    image_routers,
    sole_router,
)
from robustmoe.models.base import Output

Version = Literal["standard", "plus", "rand"]
PARTS: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
TARGETS, TARGETS_L1, RESTARTS, EOT = 9, 5, 5, 20
"""The released definition (fra31/auto-attack, `_set_version`): classes aimed at, restarts of "plus" and of l1, passes a
gradient of "rand"."""


@dataclass(frozen=True)
class AutoAttack(Suite):
    """The ensemble of Croce and Hein (2020), with the iterations, restarts and targets of the released code.

    ``version``: "standard", APGD on cross-entropy, targeted APGD on DLR, targeted FAB, Square with 5,000 queries;
    "plus", five restarts, and untargeted APGD on DLR and FAB; "rand", APGD on both losses, each gradient the mean of 20
    passes. Targets are the 9 (l1: 5) most likely wrong classes, or all there are; DLR needs 3 classes, its targeted
    form 4: with fewer the margin stands in (see `losses.loss_of`), and the run is not called AutoAttack standard.
    ``rng``: "image" draws from each image's own stream (results do not depend on the batch) and lets broken images
    leave at once; "autoattack" reproduces the original's random stream and runs every image to the end, so that the
    robust images are the original's at equal batches.
    """

    threat: Threat
    version: Version = "standard"
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return Joint()

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        classes = output.logits.shape[1]
        return [(name, self._part(name, classes)) for name in PARTS[self.version]]

    def _part(self, name: str, classes: int) -> Attack:
        """The part that the released code calls ``name``, for a model of so many classes."""
        l1, standard = self.threat.norm == "l1", self.version == "standard"
        keep: Literal["first", "best"] = "best" if self.rng == "autoattack" else "first"
        if name == "square":
            return Square(self.threat, rng=self.rng, seed=self.seed)
        if name in ("fab", "fab-t"):
            targets, restarts = (0, RESTARTS) if name == "fab" else (min(TARGETS, classes - 1), 1)
            return FAB(self.threat, restarts=restarts, targets=targets, keep=keep, rng=self.rng, seed=self.seed)
        if name == "apgd-t":
            return TargetedAPGD(
                self.threat,
                targets=min(TARGETS_L1 if l1 and standard else TARGETS, classes - 1),
                loss="dlr" if classes >= 4 else "margin",
                keep=keep,
                largereps=l1 and standard,
                rng=self.rng,
                seed=self.seed,
            )
        return APGD(
            self.threat,
            restarts=RESTARTS if self.version == "plus" or (l1 and standard) else 1,
            objective=Joint("ce" if name == "apgd-ce" else "dlr" if classes >= 3 else "margin"),
            eot=EOT if self.version == "rand" else 1,
            keep=keep,
            largereps=l1 and standard,
            rng=self.rng,
            seed=self.seed,
        )


@dataclass(frozen=True)
class AutoAttackRouting(Suite):
    """`AutoAttack`, then the attacks that know what a router is, on what it left standing.

    In order: the experts on the held route; the routers alone; both losses at equal gradient size; the model seen with
    straight-through and with soft gates at each of ``temperatures``; of a dual model, each half alone; transfer from
    every single expert; route flips; with token routers, several routers or k above 1 a beam over the cheapest
    boundaries; where every router picks one expert an image, the transition into their regions. Each success is the
    exact model's own error on its own routing. ``steps``: of each routing attack.

    Without a router it is AutoAttack, also on a dual model of two dense networks, which leaves no trace to be known
    by: ``through(half(robust), apgd(...))`` is the attack on a half there.
    """

    threat: Threat
    version: Version = "standard"
    steps: int = 50
    temperatures: tuple[float, ...] = (0.3, 1.0, 4.0)
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            Soft(temperature)  # says what is wrong with it before anything is attacked

    @property
    def needs_router(self) -> bool:
        return False

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return RoutingLoss()

    def parts(self, output: Output) -> list[tuple[str, Attack]]:
        return [*self.autoattack.parts(output), *self.routing_parts(output)]

    @property
    def autoattack(self) -> AutoAttack:
        """The first half."""
        return AutoAttack(self.threat, self.version, self.rng, self.seed)

    def routing_parts(self, output: Output) -> list[tuple[str, Attack]]:
        """The second half: none for a dense model."""
        if not any(routing.num_experts > 1 for routing in output.trace.values()):
            return []

        def apgd(objective: Objective) -> APGD:
            return APGD(self.threat, steps=self.steps, objective=objective, seed=self.seed)

        views: list[tuple[str, View]] = [("straight-through", StraightThrough())]
        views += [(f"soft {temperature:g}", Soft(temperature)) for temperature in self.temperatures]
        if halves(output.trace):
            views += [("half standard", HalfView("standard")), ("half robust", HalfView("robust"))]
        parts: list[tuple[str, Attack]] = [
            ("experts held", apgd(ExpertsOnly())),
            ("routers", apgd(RouterHinge())),
            ("joint normalised", apgd(JointNormalised())),
            *((name, Viewed(view, apgd(Joint()))) for name, view in views),
            *each_expert(apgd(Joint()), output),
            ("flip", RouteFlip(self.threat, steps=self.steps, seed=self.seed)),
        ]
        if sole_router(output.trace) is None:
            parts.append(("beam", RouteBeam(self.threat, steps=self.steps, seed=self.seed)))
        if image_routers(output.trace):
            parts.append(("transition", ExpertTransition(self.threat, steps=self.steps, seed=self.seed)))
        return parts
