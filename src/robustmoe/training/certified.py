"""Training for certificates: cross-entropy on bounds of the margins over the whole ball, with every expert that the
router can choose in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import Threat
from robustmoe.attacks.base import evaluating
from robustmoe.certification import Ball, Bounding, worst_margins
from robustmoe.models.base import RoutedModel
from robustmoe.models.norm import full_precision
from robustmoe.noise import Noise
from robustmoe.training.auxiliary import BalanceLoss, auxiliary, check_balance_loss
from robustmoe.training.methods import ALL, check_weight
from robustmoe.training.phases import Loss, Method, Phase, router_noise


def certified(
    threat: Threat,
    how: Bounding = "ibp",
    kappa: float = 0.5,
    warmup: float = 0.1,
    full: float = 0.6,
    stability: float = 0.0,
    balance: float = 0.0,
    balance_loss: BalanceLoss = "switch",
) -> Method:
    """Interval bound propagation (Gowal et al. 2018), or CROWN-IBP (Zhang et al. 2020), for models with routers:
    ``kappa`` CE(clean) + (1 - ``kappa``) CE(-lower bounds of the margins over the ball).

    The bounds are those of the certifier: of a hard router, of every expert that it can choose in the ball (CERT-2,
    CERT-3), the lowest class by class; of a soft one, of the worst weights (CERT-4); of a dual, of the blend (CERT-8).
    They are taken in eval mode (BatchNorm by its running statistics, which the clean pass moves). ``how``: "ibp" or
    "crown_ibp". eps and 1 - kappa grow from 0 at the share ``warmup`` of the training to their values at ``full``,
    linearly. ``stability``: weight of mean max(0, 1 - lead), lead the least difference of router logits over the ball
    between the choice and any other expert: a router that keeps its choice. It has no effect on soft routers and k > 1.
    ``balance``, ``balance_loss``: as in `standard`. None of the three papers has such a method.
    """
    if threat.norm not in ("linf", "l2"):
        raise ValueError(f"certified training is for linf and l2 balls; got {threat.norm}")
    if how not in ("ibp", "crown_ibp"):
        raise ValueError(f"how must be 'ibp' or 'crown_ibp' in training; got {how!r}")
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa must be between 0 and 1; got {kappa}")
    if not 0 <= warmup <= full <= 1:
        raise ValueError(f"expected 0 <= warmup <= full <= 1, shares of the training; got {warmup} and {full}")
    for name, weight in (("stability", stability), ("balance", balance)):
        check_weight(name, weight)
    check_balance_loss(balance_loss)
    last = CertifiedLoss(threat, how, 1 - kappa, stability, balance, balance_loss)

    def ramp(progress: float) -> tuple[Phase, ...]:
        grown = 1.0 if progress >= full else max(0.0, (progress - warmup) / (full - warmup))
        grown_threat = replace(threat, eps=grown * threat.eps)
        return (Phase("all", ALL, replace(last, threat=grown_threat, weight=grown * last.weight)),)

    return Method((Phase("all", ALL, last),), threat=threat, ramp=ramp)


@dataclass(frozen=True)
class CertifiedLoss:
    """The loss of `certified` at one moment: ``weight`` is that of the bounds."""

    threat: Threat
    how: Bounding
    weight: float
    stability: float
    balance: float
    balance_loss: BalanceLoss

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        output = model.run(x, noise=router_noise(noise))
        value = (1 - self.weight) * F.cross_entropy(output.logits, y)
        value = value + auxiliary(output.trace, self.balance, self.balance_loss)
        right = (output.logits.argmax(1) == y).sum()
        if self.threat.eps == 0:
            return Loss(value, right)
        with evaluating(model), full_precision(x):
            eps = x.new_full(x.shape[:1], self.threat.eps)
            worst = worst_margins(model.parts(), Ball(x, self.threat.norm, eps), y, self.how)
        value = value + self.weight * torch.logsumexp(-worst.lower, dim=1).mean()
        if self.stability:
            value = value + self.stability * F.relu(1 - worst.route).mean()
        return Loss(value, right)
