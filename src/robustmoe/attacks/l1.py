"""The l1 ball inside the pixel box: the nearest point of both (Croce and Hein 2021, arXiv 2103.01208)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SLACK = 5e-6
"""By this share of the radius an image may leave its ball, before moves are undone (see `fitted`): half of what check
H2 allows, and more than the roundings of a small image come to, so that there the original's results stay its own."""


def l1_excess(
    x: Float[Tensor, "n ch h w"] | None,
    delta: Float[Tensor, "n ch h w"],
    eps: float | Float[Tensor, " n"],
    wide: bool = True,
) -> Float[Tensor, "n ch h w"]:
    """What to take from ``delta`` so that x + delta is the nearest point of the l1 ball of radius ``eps`` (of all
    images, or an image its own) around x *and* of the box [0, 1] (2021, proposition 2.1). x lies in the box; without x
    there is no box.

    Each coordinate loses min(max(level, lo), hi): at least lo, by which it leaves the box, at most hi = |delta|. The
    total is piecewise linear in the level, with slope + 1 from each lo and - 1 from each hi; the level is where what
    is left has norm eps (0 if lo alone does it). Only the breaks above 0 are sorted. ``wide``: sums in float64, so the
    norm is eps to float32's rounding; else in x's own dtype, as the original.
    """
    if len(delta) == 0:
        return delta
    dtype = torch.float64 if wide else delta.dtype
    flat, hi = delta.flatten(1), delta.flatten(1).abs()
    lo = torch.zeros_like(hi)
    if x is not None:
        base = x.flatten(1)
        lo = torch.minimum(1 - base - flat, base + flat).clamp_(max=0.0).neg_()
    removed = lo.sum(1, keepdim=True, dtype=dtype)
    needed = hi.sum(1, keepdim=True, dtype=dtype) - (eps[:, None] if isinstance(eps, Tensor) else eps)
    breaks = torch.cat([lo, hi], 1)
    count = min(int((breaks > 0).sum(1).max()) + 1, breaks.shape[1])
    at, index = breaks.topk(count, dim=1)
    at, index = at.flip(1), index.flip(1)
    turn = 1.0 - 2.0 * (index >= hi.shape[1]).to(at.dtype)
    slope = turn.cumsum(1) - turn.sum(1, keepdim=True)  # all turns sum to 0: those left out are minus those here
    rise = ((at[:, 1:] - at[:, :-1]) * slope[:, :-1]).cumsum(1, dtype=dtype)
    total = torch.cat([removed, removed + rise], 1)  # removed at each break
    last = (torch.searchsorted(total, needed) - 1).clamp_(0, max(count - 2, 0))
    level = (needed - total.gather(1, last)) / slope.gather(1, last) + at.gather(1, last)
    level = torch.where(removed < needed, level, 0.0).to(delta.dtype)
    return (flat.sign() * torch.clamp(level.expand_as(lo), lo, hi)).view_as(delta)


def onto_l1(
    x: Float[Tensor, "n ch h w"],
    delta: Float[Tensor, "n ch h w"],
    x_adv: Float[Tensor, "n ch h w"],
    eps: float,
    original: bool = False,
) -> Float[Tensor, "n ch h w"]:
    """The nearest point to ``x_adv`` = x + ``delta`` in the l1 ball of radius ``eps`` (pixels) around x and the box.

    In the ``original``'s order of sums an unmoved coordinate may differ from x, and a clipped one leave the box, by a
    rounding, and a large image its ball; in ours neither.
    """
    excess = l1_excess(x, delta, eps, wide=not original)
    return x_adv - excess if original else fitted(x, (delta - excess).add_(x).clamp_(0.0, 1.0), eps)


def fitted(x: Float[Tensor, "n ch h w"], x_adv: Float[Tensor, "n ch h w"], eps: float) -> Float[Tensor, "n ch h w"]:
    """The images, inside the l1 ball as it is measured: the roundings of x + delta add up over the pixels of a large
    image. Where they come to more than `SLACK`, the smallest moves are undone, as few as it takes.
    """
    moves = (x_adv - x).flatten(1).abs()
    over = moves.sum(1, dtype=torch.float64) - eps
    rows = torch.nonzero(over > SLACK * eps)[:, 0]
    if len(rows) == 0:
        return x_adv
    smallest, order = moves[rows].sort(dim=1)
    enough = smallest.cumsum(1, dtype=torch.float64) - smallest < over[rows, None]  # without it, still too far
    undone = torch.zeros_like(enough).scatter_(1, order, enough).view(-1, *x.shape[1:])
    x_adv = x_adv.clone()
    x_adv[rows] = torch.where(undone, x[rows], x_adv[rows])
    return x_adv
