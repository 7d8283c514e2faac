"""Attacks that move the route on purpose: towards every expert in turn, across each router's boundaries, through sets
of items.

A break counts only where the exact model misses the label on the route that it takes itself.
"""

from robustmoe.attacks.routes.beam import RouteBeam
from robustmoe.attacks.routes.elsewhere import OtherRoutes
from robustmoe.attacks.routes.flip import Flip, RouteFlip
from robustmoe.attacks.routes.misroute import Misroute, Misrouting, countable
from robustmoe.attacks.routes.objectives import JointNormalised, RouterHinge, RoutingLoss, router_hinge
from robustmoe.attacks.routes.regions import Goal, Steering, Target, decisions, router_logits
from robustmoe.attacks.routes.transition import ExpertTransition

__all__ = [
    "ExpertTransition",
    "Flip",
    "Goal",
    "JointNormalised",
    "Misroute",
    "Misrouting",
    "OtherRoutes",
    "RouteBeam",
    "RouteFlip",
    "RouterHinge",
    "RoutingLoss",
    "Steering",
    "Target",
    "countable",
    "decisions",
    "router_hinge",
    "router_logits",
]
