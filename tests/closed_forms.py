"""Closed forms of docs/certification.md that certifiers are compared with."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.graph import record
from robustmoe.certification.slopes import lipschitz
from robustmoe.models.parts import Function


def soft_margin(
    margin: Float[Tensor, "n c"],
    spread: Float[Tensor, "n c"],
    slope: Float[Tensor, "n c"],
    steepness: float | Tensor,
    eps: float,
    temperature: float = 1.0,
) -> Float[Tensor, "n c"]:
    """CERT-5: margin - eps slope - spread tanh(steepness eps / (4 T)), below the soft mixture's margin in the whole
    ball.

    ``margin``: of the mixture at the image; ``spread``: largest minus smallest margin of an expert there; ``slope``:
    the largest Lipschitz constant of an expert's margin on the ball; ``steepness``: that of any difference of two
    router logits.
    """
    turn = torch.tanh(torch.as_tensor(steepness, dtype=margin.dtype, device=margin.device) * eps / (4 * temperature))
    return margin - eps * slope - spread * turn


def soft_radius(
    margin: Float[Tensor, "n c"],
    spread: Float[Tensor, "n c"],
    slope: Float[Tensor, "n c"],
    steepness: float | Tensor,
    temperature: float = 1.0,
) -> Float[Tensor, " n"]:
    """CERT-5: the radius min_j margin / (slope + steepness spread / (4 T)) over the classes j with slope or spread (the
    class itself has neither). The constants must hold on the ball of that radius. inf where no class has.
    """
    change = slope + steepness * spread / (4 * temperature)
    return torch.where(change > 0, margin / change.clamp(min=torch.finfo(change.dtype).tiny), torch.inf).amin(-1)


def margin_slopes(
    network: Function, ball: Ball, y: Int[Tensor, " n"], how: Bounding = "crown_ibp"
) -> Float[Tensor, "n c"]:
    """Lipschitz constants over the ball of the margins z_y - z_j of a network's logits (0 of the class itself).

    ``how``: of the bounds that say which way each ReLU stands. Raises UserError for a network that has none.
    """
    bounded = Bounded(record(network, ball.x), ball, how)
    c = bounded.graph.output.shape[1]
    unit = torch.eye(c, dtype=ball.x.dtype, device=ball.x.device)
    return lipschitz(bounded, unit[y][None] - unit[:, None]).T
