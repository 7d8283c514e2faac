"""JTDMoE (Zhang et al., ICML 2025): the robust half of a dual model on its own robust loss, the standard half through
the blend, in turn on each batch.

The paper's Algorithm 1 could not be read; "released" is the authors' code, without its defects (see docs/footguns.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustmoe.attacks import Attack, evaluating
from robustmoe.errors import UserError
from robustmoe.models.base import RoutedModel
from robustmoe.models.dual import DualModel
from robustmoe.noise import Noise
from robustmoe.training.methods import check_weight
from robustmoe.training.phases import Loss, Method, Pair, Phase, router_noise
from robustmoe.training.rt_er import RTER, Label, Protect, check_objective

ROBUST, STANDARD = r"robust\.", r"standard\.|mixer\."
"""The halves' parameters by their names; a mixer moves with the standard half."""

NEEDS = "a dual model, such as dual(resnet8, resnet8)"

PROTECT: dict[str, Protect] = {"released": "all", "paper": "second"}


def jtdmoe(
    attack: Attack,
    beta: float = 6.0,
    variant: Literal["released", "paper"] = "released",
    loss: Label = "kl",
    gamma: float = 0.0,
) -> Method:
    """JTDMoE, for a `dual` model: on each batch its robust half moves on the RT-ER loss (see `rt_er`), then its
    standard half on the cross-entropy of the clean blend at the model's alpha.

    ``variant``: which experts of the robust half are protected, "released": every one, on the whole batch; "paper": the
    second-ranked. ``loss``, ``beta``: as in `rt_er`. ``gamma`` (not the paper's): weight of the blend's cross-entropy
    under attack in the standard half's loss, in which otherwise nothing keeps that half from breaking the blend. Each
    half is in train mode in its own phase alone, and in eval mode in the other: no phase moves a weight or a statistic
    of the other half. Start from trained halves with the recipe's ``init``.
    """
    for name, weight in (("beta", beta), ("gamma", gamma)):
        check_weight(name, weight)
    check_objective("jtdmoe", attack)
    robust = _Robust(RTER(attack, beta, PROTECT[variant], loss))
    phases = (
        Phase("robust", ROBUST, robust, needs=NEEDS),
        Phase("standard", STANDARD, _Standard(attack, gamma), needs=NEEDS),
    )
    return Method(phases, attack)


def _dual(model: RoutedModel) -> DualModel:
    if not isinstance(model, DualModel):
        raise UserError(f"jtdmoe trains {NEEDS}; got a {type(model).__name__}")
    return model


@dataclass(frozen=True)
class _Robust:
    loss: RTER

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """Returns the RT-ER loss of the robust half; the standard one takes no part."""
        return self.loss(_dual(model).robust, x, y, noise)._replace(correct=None)


@dataclass(frozen=True)
class _Standard:
    attack: Attack
    gamma: float

    def __call__(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Loss:
        """CE of the clean blend + gamma * CE of the attacked one, the robust half in eval mode."""
        dual = _dual(model)
        logits = _through_standard(dual, x, noise)
        value, right = F.cross_entropy(logits, y), (logits.argmax(1) == y).sum()
        if not self.gamma:
            return Loss(value, right)
        x_adv = self.attack(model, x, y, noise)
        value = value + self.gamma * F.cross_entropy(_through_standard(dual, x_adv, noise), y)
        return Loss(value, right, Pair(x, x_adv))


def _through_standard(dual: DualModel, x: Tensor, noise: Noise) -> Tensor:
    """Returns the blend's logits, whose gradient stops at the robust half; that one in eval mode, without noise."""
    with evaluating(dual.robust), torch.no_grad():
        robust = dual.robust(x)
    return dual.blended(x, dual.standard.run(x, noise=router_noise(noise)).logits, robust)
