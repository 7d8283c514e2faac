"""How low the probability margin of a class can get in a ball: what a blend's certificate is made from."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.attacks.base import evaluating
from robustmoe.attacks.threat import Threat
from robustmoe.certification.bounds import Ball, Bounding
from robustmoe.certification.certify import SLACK
from robustmoe.certification.margins import others, worst_margins
from robustmoe.models.base import RoutedModel


@torch.no_grad()
def probability_floor(
    model: RoutedModel,
    x: Float[Tensor, "n ch h w"],
    y: Int[Tensor, " n"],
    threat: Threat,
    how: Bounding = "crown_ibp",
) -> Float[Tensor, " n"]:
    """A lower bound, over the ball around each image x in [0, 1], of p_y minus the largest other probability (P0 of
    bounds in float64); from -1 to 1.

    Of the robust half of a dual it is what ``robustmoe.blend(certified=...)`` takes: the dual is proven where it is
    above (1 - alpha) / alpha (P7). Raises UserError for a model that has no bounds. The model stays as it was.
    """
    with evaluating(model):
        exact = copy.deepcopy(model).double()
    x = x.double()
    ball = Ball(x, threat.norm, torch.full_like(x[:, 0, 0, 0], threat.eps))
    worst = worst_margins(exact.parts(), ball, y, how, SLACK[torch.float64], "probabilities")
    return others(worst.lower, y).amin(1)
