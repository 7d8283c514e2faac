"""Losses of the logits, image by image, and what an attack climbs where float32 leaves such a loss no gradient."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustmoe import asking

Loss = Literal["ce", "margin", "dlr", "kl"]

FLAT, USUAL = 2.0**-10, 16.0
"""Logits whose range (highest minus lowest) is below the first say nothing through a softmax: float32 has 4,000 values
for the cross-entropy there, and its gradient pulls at all classes alike. Where a softmax says nothing, it is asked at
the second range, which is an ordinary network's."""

EXTREME, MOST = 40, 110
"""Logits whose range is below 2^-40 or above 2^40 are scaled by a power of two before they are differentiated, at most
2^110, so that the derivatives behind them neither vanish nor overflow."""

DLR_CLASSES, TARGETED_DLR_CLASSES = 3, 4
"""The fewest classes that can be chosen with which the two losses are defined; with fewer the margin stands in."""


def loss_of(
    kind: Loss,
    logits: Float[Tensor, "n c"],
    y: Int[Tensor, " n"],
    clean: Float[Tensor, "n c"] | None = None,
    every: bool = False,
) -> Float[Tensor, " n"]:
    """Per image: "ce" cross-entropy; "margin" best wrong logit minus the label's (above 0: fooled); "dlr" the margin
    over the distance from the best to the third best logit (Croce and Hein 2020, eq. 6; the margin itself where fewer
    than 3 classes can be chosen); "kl" KL(clean || attacked), in log space. Classes at -inf are never chosen;
    ``every``: there are none.
    """
    if kind == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if kind == "margin":
        label = y[:, None]
        return logits.scatter(1, label, -torch.inf).amax(1) - logits.gather(1, label)[:, 0]
    if kind == "dlr":
        if logits.shape[1] < DLR_CLASSES:
            return loss_of("margin", logits, y)
        there = logits if every else _lifted(logits)
        ordered, order = there.sort(dim=1)
        right = (order[:, -1] == y).to(logits.dtype)
        rival = ordered[:, -2] * right + ordered[:, -1] * (1 - right)
        dlr = -(there.gather(1, y[:, None])[:, 0] - rival) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
        if every:
            return dlr
        return torch.where(_choosable(logits) < DLR_CLASSES, loss_of("margin", there, y), dlr)
    if clean is None:
        raise ValueError("the kl loss needs the clean logits")
    return kl(clean, logits)


def targeted_loss(
    kind: Literal["dlr", "margin"],
    logits: Float[Tensor, "n c"],
    y: Int[Tensor, " n"],
    target: Int[Tensor, " n"],
    every: bool = False,
) -> Float[Tensor, " n"]:
    """Per image: "margin" the target's logit minus the label's; "dlr" that over the distance from the best logit to the
    mean of the third and fourth (Croce and Hein 2020, eq. 7; the margin itself where fewer than 4 classes can be
    chosen). ``every``: all can.
    """
    if kind == "dlr" and not every:
        few = _choosable(logits) < TARGETED_DLR_CLASSES
        logits = _lifted(logits)
    pair = logits.gather(1, torch.stack([y, target], 1))
    loss = -(pair[:, 0] - pair[:, 1])
    if kind == "margin" or logits.shape[1] < TARGETED_DLR_CLASSES:
        return loss
    ordered = logits.sort(dim=1).values
    scale = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return loss / scale if every else torch.where(few, loss, loss / scale)


def kl(target: Float[Tensor, "n ... c"], logits: Float[Tensor, "n ... c"]) -> Float[Tensor, "n ..."]:
    """KL(softmax(target) || softmax(logits)) over the last axis, in log space: finite wherever both logits are, and
    where both are -inf.
    """
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(logits, -1)
    never = torch.isneginf(target) & torch.isneginf(logits)
    return (log_p.exp() * (log_p - log_q).masked_fill(never, 0.0)).sum(-1)


class Ascent(NamedTuple):
    """Per image: ``loss`` (n,), by which iterates are compared, and ``climbed`` (n,), whose gradient is taken."""

    loss: Tensor
    climbed: Tensor


def climb(
    kind: Loss,
    logits: Float[Tensor, "n c"],
    y: Int[Tensor, " n"],
    clean: Float[Tensor, "n c"] | None = None,
) -> Ascent:
    """`loss_of`, made free of the logits' scale for the images whose loss has no gradient in float32. For any other
    image both parts are the loss to the bit; NaN and +inf among the logits stay what they are.

    Where a cross-entropy or a KL is saturated (the label's softmax rounds to 1, of a KL the clean image's too: then
    the loss no longer pulls at the label, and of two logits at none that matters), overflows or is flat (see `FLAT`),
    the cross-entropy of the logits at the range `USUAL` stands in, minus log(classes): below 0 for an image that is
    right, as no cross-entropy is, so that a saturated iterate compares with one that is not. Where the logits are
    `EXTREME` the gradient is that of the logits times a power of two.
    """
    if kind != "kl" and ordinary(logits):
        loss = loss_of(kind, logits, y, every=True)
        if kind != "ce" or not bool((loss == 0).any()):
            return Ascent(loss, loss)
    extent = Extent.of(logits)
    scaled = logits * extent.factor[:, None]
    if kind == "dlr":
        loss = loss_of(kind, scaled, y)
        return Ascent(loss, loss * extent.weight)
    plain = extent.bounded(loss_of("margin", logits, y))
    if kind == "margin":
        return Ascent(plain, extent.bounded(loss_of("margin", scaled, y)))
    loss = loss_of(kind, logits, y, clean)
    certain = _certain(logits, y)
    if kind == "kl" and clean is not None:
        certain = certain & _certain(clean, y)
    lost = (extent.flat | certain | (extent.factor != 1) | ~torch.isfinite(loss)) & extent.sound
    enlarged = torch.where(lost & (extent.range > 0), USUAL / extent.range, 1.0)
    usual = extent.bounded(loss_of("ce", scaled * enlarged[:, None], y))
    worth = torch.where(lost, usual - math.log(logits.shape[1]), loss)
    return Ascent(worth, torch.where(lost, usual / enlarged, loss))


@torch.no_grad()
def _certain(logits: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Where the label's softmax rounds to 1."""
    return loss_of("ce", logits, y) == 0


def targeted_climb(
    kind: Literal["dlr", "margin"], logits: Float[Tensor, "n c"], y: Int[Tensor, " n"], target: Int[Tensor, " n"]
) -> Ascent:
    """`targeted_loss`, scaled as in `climb`."""
    if ordinary(logits):
        loss = targeted_loss(kind, logits, y, target, every=True)
        return Ascent(loss, loss)
    extent = Extent.of(logits)
    climbed = extent.bounded(targeted_loss(kind, logits * extent.factor[:, None], y, target))
    if kind == "dlr":
        return Ascent(climbed, climbed * extent.weight)
    return Ascent(extent.bounded(targeted_loss(kind, logits, y, target)), climbed)


def gate_climb(clean: Float[Tensor, "n t e"], logits: Float[Tensor, "n t e"]) -> Ascent:
    """KL(softmax(clean) || softmax(logits)) of each item (n, t), for comparison and for the gradient: see `climb`, with
    the expert that is best on the clean image in the label's place.
    """
    best, flat = clean.argmax(-1), logits.flatten(0, 1)
    return Ascent(*(each.view(best.shape) for each in climb("kl", flat, best.flatten(), clean.flatten(0, 1))))


def gate_residue(logits: Float[Tensor, "n t e"], expert: Int[Tensor, " n"]) -> Ascent:
    """The cross-entropy of each item (n, t) towards ``expert``, as `climb` has it."""
    target = expert[:, None].expand(logits.shape[:2])
    return Ascent(*(each.view(target.shape) for each in climb("ce", logits.flatten(0, 1), target.flatten())))


def scale_of(logits: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The power of two by which an image's logits are multiplied before they are differentiated: 1 where they are not
    `EXTREME`.
    """
    if ordinary(logits.flatten(1)):
        return torch.ones(len(logits), dtype=logits.dtype, device=logits.device)
    return Extent.of(logits.flatten(1)).factor


def ordinary(logits: Float[Tensor, "n c"]) -> bool:
    """Returns whether no image's logits are flat, `EXTREME` or infinite, as nearly always, so that none of what
    `Extent` says is needed: four operations in place of some forty. Only where asking waits for no device; False else.
    """
    if not asking.free(logits) or logits.numel() == 0:
        return False
    lowest, highest = logits.detach().aminmax(dim=1)
    least, most = (highest - lowest).aminmax()
    return bool(least >= FLAT) and bool(most <= 2.0**EXTREME)


class Extent(NamedTuple):
    """How far apart each image's logits are, those at -inf left out (all (n,), constants): the power of two that they
    are to be multiplied by (1 where they are not `EXTREME`), the ``range`` that they have then, whether they are
    ``flat``, and whether none is NaN or +inf (``sound``).
    """

    factor: Tensor
    range: Tensor
    flat: Tensor
    sound: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Float[Tensor, "n c"]) -> Extent:
        highest = logits.amax(1)
        lowest = logits.masked_fill(torch.isneginf(logits), torch.inf).amin(1)
        half = highest / 2 - lowest / 2  # the whole range may overflow
        exponent = torch.frexp(half).exponent
        extreme = ((exponent < -EXTREME) | (exponent > EXTREME)) & (half > 0)
        exponent = torch.where(extreme, -exponent, torch.zeros_like(exponent)).clamp(-MOST, MOST)
        factor = torch.ldexp(torch.ones_like(half), exponent)
        return cls(factor, 2 * (half * factor), half < FLAT / 2, highest < torch.inf)

    @property
    def weight(self) -> Tensor:
        """What a loss that is free of the scale is multiplied by before it is differentiated: 1 for ordinary logits."""
        return torch.where(self.factor == 1, 1.0, self.range)

    def bounded(self, values: Tensor) -> Tensor:
        """Infinite values (of an image's only class, or of a label at -inf) as the largest number there is."""
        most = torch.finfo(values.dtype).max
        return torch.where(self.sound, values.clamp(-most, most), values)


def _choosable(logits: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
    """How many classes are not at -inf."""
    return (~torch.isneginf(logits)).sum(1)


def _lifted(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """The logits, with the classes at -inf at the lowest of the others, by which no distance becomes infinite."""
    never = torch.isneginf(logits)
    lowest = logits.detach().masked_fill(never, torch.inf).amin(1, keepdim=True)
    return torch.where(never, lowest, logits)
