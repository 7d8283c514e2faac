"""Checks of the gradient (G1 to G3): has the attack one, and is it that of the model?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustmoe.attacks import Attack, evaluating
from robustmoe.attacks.losses import Loss, climb, loss_of
from robustmoe.attacks.objectives import Inner
from robustmoe.attacks.threat import Threat
from robustmoe.data import Batch
from robustmoe.evaluation.checks.registry import Answer, check
from robustmoe.evaluation.checks.subject import (
    Subject,
    doubled,
    graded,
    gradient,
    percent,
)
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.routing import Trace, detach

ZERO_SHARE = 0.05
"""Check G1: a larger share of images without gradient fails."""

APART, OFTEN, OFTEN_SINGLE = 0.05, 0.1, 0.25
"""Check G2: a derivative is wrong above the first relative error; more wrong ones than the second (in float32, with its
rounding and kinks, the third) are reported."""


@check("G1", "gradient", "cheap")
def gradients(case: Subject) -> Answer:
    """The share of images at which the attack's own loss has no gradient (see `flat_share`). Such an image is not
    attacked, and reads as robust (Athalye et al. 2018).
    """
    share = flat_share(case.model, case.main, case.whole)
    status = "pass" if share == 0 else "warn" if share <= ZERO_SHARE else "fail"
    text = f"the attack's loss has no gradient at {100 * share:.3g} % of {len(case.whole)} images"
    return Answer(status, share, text)


def flat_share(model: RoutedModel, attack: Attack, batch: Batch) -> float:
    """The share of images at which the loss that ``attack`` climbs has no gradient, at its random start (a KL is flat
    at the clean image). Of an image that is missed already, clean or there, it is the margin that must have one: where
    its target is the label itself, the loss is 0 - 0.
    """
    with evaluating(model):
        inner = attack.objective(model, batch.x, batch.y)
        start = attack.threat.start(batch.x, Noise.of(batch.index, attack.seed))
        flat = is_flat(gradient(lambda x: inner(x).climbed, start))
        if bool(flat.any()):
            flat &= flat_where_missed(model, inner, batch, start)
    return float(flat.float().mean())


def flat_where_missed(model: RoutedModel, inner: Inner, batch: Batch, start: Tensor) -> Tensor:
    """(n,) bool: False for an image that is missed, clean or at ``start``, and whose margin has a gradient there."""
    with torch.no_grad():
        missed = inner(batch.x).fooled | inner(start).fooled
    if not bool(missed.any()):
        return ~missed
    margin = gradient(lambda x: climb("margin", model.run(x).logits, batch.y).climbed, start)
    return ~missed | is_flat(margin)


def is_flat(slope: Tensor) -> Tensor:
    """(n,) bool: a gradient that is zero (to the precision of its numbers), or not a number."""
    largest = slope.flatten(1).abs().amax(1)
    return (largest < torch.finfo(slope.dtype).tiny) | ~torch.isfinite(largest)


def losses_of(model: RoutedModel, x: Tensor) -> list[Loss]:
    """The losses that a model with so many classes has."""
    with torch.no_grad():
        classes = model.run(x[:1]).logits.shape[1]
    return ["ce", "margin", "dlr"] if classes >= 3 else ["ce", "margin"]


@check("G1", "gradient", "attack")
def flat_along(case: Subject) -> Answer:
    """the share of images without gradient for cross-entropy, margin and DLR, at the random start and, where
    the image still stands, at what the main attack left.
    """
    x, y, n = case.batch.x, case.batch.y, len(case.batch)
    start = case.threat.start(x, case.noise(case.main.seed))
    left = case.outcome(case.main)
    shares: dict[str, float] = {}
    worst = 0

    def value(loss: Loss, at: Tensor) -> Tensor:
        return climb(loss, case.model.run(at).logits, y).climbed

    with evaluating(case.model):
        wrong, margin_flat = case.wrong(start), is_flat(gradient(partial(value, "margin"), start))
        for loss in losses_of(case.model, x):
            at_start = is_flat(gradient(partial(value, loss), start)) & (margin_flat | ~wrong)
            at_end = is_flat(gradient(partial(value, loss), left.x_adv)) & ~left.broken
            shares[f"{loss}, start"], shares[f"{loss}, end"] = (float(f.float().mean()) for f in (at_start, at_end))
            worst = max(worst, int(at_start.sum()), int(at_end.sum()))
    which = max(shares, key=lambda name: shares[name])
    text = f"at most {worst} of {n} images have no gradient ({which} of the run), over {len(shares) // 2} losses"
    return Answer(graded(worst, n, 0.0), shares, text)


# ------------------------------------------------------------------------------------------------ the gradient itself


@check("G2", "finite differences", "attack")
def finite_differences(case: Subject, directions: int = 8) -> Answer:
    """the directional derivative of the margin by central differences against autograd, at a random point of the
    ball, in float64 (step 1e-6) where the model can be copied, else in float32 (step 1e-3); a quarter confirms.

    Straight-through estimates and masked gradients show here. Where the two agree as soon as the route is held, the
    router's gradient alone is an estimate: that is a property of the gate, declared, and warns; else the check fails.
    An error counts as relative to the derivative or to the gradient's norm, whichever is larger, so that a direction
    across the gradient is no accident.
    """
    return differences(case, directions)


def differences(case: Subject, directions: int) -> Answer:
    """The answer of G2 on the images of ``case.batch``."""
    x, y = case.batch.x, case.batch.y
    start = case.threat.start(x, case.noise(case.seed))
    wide = doubled(case.model, x)
    model, at = (case.model, start) if wide is None else (wide, start.double())
    with torch.no_grad():
        trace = detach(model.run(at).trace)
    share = _disagreement(case, model, at, y, None, directions)
    how = f"{directions} directions, {'float32' if wide is None else 'float64'}"
    text = f"autograd is more than 5 % off the finite difference at {percent(share)} of {len(x)} images x {how}"
    often = OFTEN_SINGLE if wide is None else OFTEN
    if share <= often:
        return Answer("pass", share, text)
    if trace:
        fixed = _disagreement(case, model, at, y, trace, directions)
        if fixed <= often:
            text += f"; {percent(fixed)} with the route held: the router's gradient is an estimate (straight-through)"
            return Answer("warn", share, text)
    return Answer("fail", share, f"{text}: the gradient is not that of the model")


def _disagreement(
    case: Subject, model: RoutedModel, x: Tensor, y: Tensor, forced: Trace | None, directions: int
) -> float:
    """The share of (image, direction) at which the two derivatives differ, and do so at a quarter of the step too. An
    error that shrinks with the step is that of the difference: a kink, many small ones, a steep bend.
    """
    step = 1e-3 if x.dtype == torch.float32 else 1e-6

    def margin(at: Tensor) -> Tensor:
        return loss_of("margin", model.run(at, forced=forced).logits, y)

    with evaluating(model):
        slope = gradient(margin, x)
        norm = slope.flatten(1).norm(dim=1)
        every = []
        for direction in range(directions):
            sign = 1 - 2 * (case.noise(case.seed).fold(2, direction).uniform(*x.shape[1:]) < 0.5).to(x)
            told = (slope * sign).flatten(1).sum(1)
            measured, rounding = _difference(margin, x, sign, step)
            size = torch.stack([measured.abs(), told.abs(), norm]).amax(0)
            error = (measured - told).abs()
            wrong = ~(error <= APART * size + rounding)  # NaN is wrong
            if wrong.any():
                again, coarser = _difference(margin, x, sign, step / 4)
                wrong &= ~((again - told).abs() <= torch.maximum(APART * size + coarser, 0.6 * error))
            every.append(wrong)
    return float(torch.stack(every).float().mean())


def _difference(margin: Callable[[Tensor], Tensor], x: Tensor, sign: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(n,) the central difference of the margin along ``sign``, and how far rounding can move it."""
    with torch.no_grad():
        ahead, behind = margin(x + step * sign), margin(x - step * sign)
    rounding = torch.finfo(x.dtype).eps * 10 * (ahead.abs() + behind.abs()) / step
    return (ahead - behind) / (2 * step), rounding


@check("G3", "unstable loss", "attack")
def instability(case: Subject, draws: int = 5) -> Answer:
    """how much of the loss changes under random noise of a tenth of the radius, at what the attack left: mean
    |change| over mean loss (Pintor et al. 2022, indicator 2). A gradient of a loss that jumps says nothing of the way.
    """
    x, y = case.batch.x, case.batch.y
    at = case.outcome(case.main).x_adv
    small = Threat(case.threat.norm, case.threat.eps / 10)
    with torch.no_grad():
        loss = loss_of("ce", case.model.run(at).logits, y)
        changes = []
        for draw in range(draws):
            near = case.threat.project(small.start(at, case.noise(case.seed).fold(3, draw)), x)
            changes.append((loss_of("ce", case.model.run(near).logits, y) - loss).abs())
    total = float(loss.mean())
    if total == 0:
        return Answer("warn", None, f"the cross-entropy is exactly 0 on all {len(x)} images: nothing to climb")
    change = float(torch.stack(changes).mean()) / total
    text = f"noise of a tenth of the radius changes the loss by {percent(change)} of its mean"
    return Answer("pass" if change <= 0.1 else "warn", change, text)
