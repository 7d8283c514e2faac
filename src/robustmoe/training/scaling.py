"""Training in fp16: the loss is multiplied by a scale, so that small gradients do not round to zero, and a step whose
gradients overflow is left out (Micikevicius et al. 2018; the rule is that of torch's GradScaler).

The scale is kept in the optimiser's first group, so that it is saved and resumed with the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

START, EVERY, LEAST = 2.0**16, 2000, 2.0**-14
"""The first scale; after so many steps without an overflow it is doubled; it is halved at each, down to the least."""


class LossScale:
    """The scale of a phase's loss, and how many of its steps were left out."""

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self.group = optimiser.param_groups[0]
        self.group.setdefault("loss_scale", START)
        self.group.setdefault("since_overflow", 0)
        self.group.setdefault("left_out", 0)

    @property
    def value(self) -> float:
        return float(self.group["loss_scale"])

    @property
    def left_out(self) -> int:
        return int(self.group["left_out"])

    def stepped(self) -> None:
        """A step was taken."""
        self.group["since_overflow"] += 1
        if self.group["since_overflow"] == EVERY:
            self.group["loss_scale"] *= 2
            self.group["since_overflow"] = 0

    def overflowed(self, told: Tensor) -> bool:
        """A step had gradients that are not finite; whether a smaller scale may help, so that it is only left out. What
        is ``told`` of it is then 0 where it is not finite.
        """
        if self.value <= LEAST:
            return False
        self.group["loss_scale"] /= 2
        self.group["since_overflow"] = 0
        self.group["left_out"] += 1
        told.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return True


def left_out(optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Returns how many steps of all phases were left out; 0 where nothing is scaled."""
    return sum(int(optimiser.param_groups[0].get("left_out", 0)) for optimiser in optimisers)
