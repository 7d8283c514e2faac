"""Geometry of the minimal-norm attacks: the nearest point of a hyperplane inside the pixel box, and balls with a radius
an image.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks.l1 import l1_excess
from robustmoe.attacks.threat import Norm, size

TINY_WEIGHT = 1e-8
"""A coordinate whose weight is below this share of the largest one does not move: it could not close the gap."""

UNASKED = 7
"""Rounds of Newton's method that are made, where asking waits for the device, before it is asked whether they are
enough (in the end of the attack: see `asking.surely`): more change nothing."""


def projection(
    norm: Norm, points: Float[Tensor, "n d"], w: Float[Tensor, "n d"], b: Float[Tensor, " n"], by_sort: bool = True
) -> Float[Tensor, "n d"]:
    """The smallest move delta (n, d), in ``norm``, that brings each point onto its hyperplane <w, z> = b inside the box
    [0, 1] (Croce and Hein 2020, eq. 6); where the two do not meet, the move to the corner nearest in value.

    ``points`` lie in the box; points + delta does, up to rounding. Cost: one sort of the coordinates; without
    ``by_sort`` the level of linf is found by Newton's method instead (the same up to rounding, several times faster).
    Only the
    direction of (w, b) matters: it is scaled by an exact power of two, so gradients of any smallness will do (the
    original drops weights below 1e-8, we those below 1e-8 of the largest).

    All three norms are one problem. With the gap c = |<w, t> - b|, weights v = |w| and rooms u (how far a coordinate
    can go until the box stops it), find moves 0 <= m <= u of least norm with <v, m> = c:
    linf m = min(level, u); l2 m = v min(level, u / v); l1 fills up the heaviest coordinates first.
    """
    exponent = torch.frexp(w.abs().amax(1)).exponent.clamp(-126, 126)
    w, b = torch.ldexp(w, -exponent[:, None]), torch.ldexp(b, -exponent)
    gap = (w * points).sum(1) - b
    side = 1 - 2 * (gap < 0).to(w.dtype)
    w, gap = w * side[:, None], gap * side
    weight, room = w.abs(), torch.where(w < 0, 1 - points, points)
    closest = {"linf": _linf if by_sort else _linf_newton, "l2": _l2, "l1": _l1}[norm]
    move = closest(weight, room, gap[:, None])
    return torch.where(weight > TINY_WEIGHT, -w.sign() * move, torch.zeros_like(move))


def _linf(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """min(level, room), where the level closes the ``gap`` (n, 1): what is closed is piecewise linear in the level,
    with its breaks at the rooms.
    """
    order = room.argsort(dim=1).flip(1)  # the roomiest first: the first k are those that a level leaves unfilled
    slope = weight.gather(1, order).cumsum(1)
    full = (weight * room).sum(1, keepdim=True)
    filled = full - (weight * room).gather(1, order).cumsum(1)
    last = ((filled + slope * room.gather(1, order) > gap).sum(1, keepdim=True) - 1).clamp(min=0)
    rise = slope.gather(1, last)
    level = ((gap - filled.gather(1, last)) / rise).clamp(min=0.0)
    return torch.minimum(level.masked_fill((gap >= full) | (rise <= 0), torch.inf), room)


def _linf_newton(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """As `_linf`. What a level closes is concave and piecewise linear in it, so Newton's method from 0 rises to the
    root and reaches it in finitely many steps (a handful; each is one pass over the coordinates).
    """
    product = weight * room
    full = product.sum(1, keepdim=True)
    level = torch.zeros_like(gap)
    unasked = 0 if asking.free(room) else UNASKED
    for turn in itertools.count():
        stopped = room <= level
        rise = weight.masked_fill(stopped, 0.0).sum(1, keepdim=True)
        filled = product.masked_fill(~stopped, 0.0).sum(1, keepdim=True)
        higher = torch.where((rise > 0) & (gap < full), (gap - filled) / rise, level).maximum(level)
        if turn >= unasked and asking.surely((room <= higher).eq(stopped).all()):
            break
        level = higher
    return torch.minimum(higher.masked_fill((gap >= full) | (rise <= 0), torch.inf), room)


def _l2(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """weight * min(level, room / weight); the breaks are at room / weight."""
    infinite = weight <= TINY_WEIGHT
    stop = (room / weight).masked_fill(infinite, torch.inf)
    at, order = stop.sort(dim=1)
    real = at.isfinite()
    square = weight.square().gather(1, order)
    total = square.sum(1, keepdim=True)
    slope = total - square.cumsum(1)  # of what is closed, past each break
    rise = ((at[:, 1:] - at[:, :-1]) * slope[:, :-1]).masked_fill(~real[:, 1:], 0.0)
    first = total * at[:, :1]
    closed = torch.cat([first, first + rise.cumsum(1)], 1).masked_fill(~real, torch.inf)
    passed = (closed < gap).sum(1, keepdim=True)
    last = (passed - 1).clamp(min=0)
    start = at.gather(1, last)
    level = ((gap - closed.gather(1, last)) / slope.gather(1, last) + start).maximum(start)
    level = torch.where(passed > 0, level, gap / total)
    level = level.masked_fill(gap >= (weight * room).sum(1, keepdim=True), torch.inf)
    return weight * torch.minimum(level, stop)


def _l1(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """The heaviest coordinates to the end of their rooms, the next one part of the way, the others not at all."""
    order = (1 / weight).clamp(max=1e12).argsort(dim=1)  # by price
    left = torch.cat([gap, -(weight * room).gather(1, order)], 1).cumsum(1)  # of the gap, before each coordinate
    count = weight.shape[1]
    last = ((left > 0).sum(1, keepdim=True) - 1).clamp(0, count - 1)
    at = order.gather(1, last)
    place = torch.zeros_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    move = torch.where(place < last, room, torch.zeros_like(room))
    part = torch.minimum(left.gather(1, last) / weight.gather(1, at), room.gather(1, at))
    return torch.where(left[:, -1:] < 0, move.scatter(1, at, part), room)


def into_ball(norm: Norm, delta: Float[Tensor, "n ch h w"], radius: Float[Tensor, " n"]) -> Float[Tensor, "n ch h w"]:
    """The nearest perturbation (in l2) of at most ``radius``, an image its own, in ``norm``."""
    wide = radius[:, None, None, None]
    if norm == "linf":
        return torch.minimum(torch.maximum(delta, -wide), wide)
    if norm == "l2":
        return delta * (wide / size("l2", delta).clamp(min=1e-12)[:, None, None, None]).clamp(max=1.0)
    return (delta - l1_excess(None, delta, radius)) * (wide > 0)  # a ball of radius 0 is a point to the bit


def dual_size(norm: Norm, gradient: Float[Tensor, "n ch h w"]) -> Float[Tensor, " n"]:
    """The norm in which a gradient says how fast a unit step of ``norm`` can climb."""
    dual: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
    return size(dual[norm], gradient)
