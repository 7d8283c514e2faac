"""Fixed, stratified splits: the same images are held out on every machine and in every run."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.noise import permutation

# What a permutation is for. Changing a key changes every published split.
VALIDATION, TEST, ORDER = 101, 102, 103


def hold_out(
    labels: Int64[Tensor, " n"], share: float, key: int = VALIDATION
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
    """Returns positions kept and positions held out, both ascending, drawn by ``labels`` and ``key`` alone.

    Of each class, ``share`` of its images are held out (rounded to the nearest whole number, at least 1 and never
    all; a class of a single image keeps it). `UserError` on a share outside (0, 1), or where nothing could be held
    out.
    """
    if not 0 < share < 1:
        raise UserError(
            f"the share to hold out is {share}, expected a number between 0 and 1, both excluded, such as 0.1"
        )
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[permutation(len(members), key, label)[:count]]] = True
    if not bool(held.any()):
        raise UserError("nothing can be held out: no class has two images; add images")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
