"""FAB, the Fast Adaptive Boundary attack (Croce and Hein 2020, arXiv 1907.02044): the nearest adversarial image, found
by projecting onto linearised decision boundaries. Untargeted, or FAB-T, the part of AutoAttack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks.base import Attack
from robustmoe.attacks.boundary import dual_size, projection
from robustmoe.attacks.finite import require_finite
from robustmoe.attacks.losses import scale_of
from robustmoe.attacks.objectives import Joint
from robustmoe.attacks.surrogate import Surrogate, missed
from robustmoe.attacks.threat import Norm, Threat, size
from robustmoe.attacks.together import Together, next_climbs
from robustmoe.errors import UserError
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise

SMALLEST_MOVE = 1e-8
"""A projection's length counts as at least this in the mixture of eq. 9, so that 0 / 0 does not arise."""


class _Boundary(NamedTuple):
    """The nearest linearised boundary of each image: its logit ``gap`` (m,) and the ``slope`` (m, ch, h, w) of it."""

    gap: Tensor
    slope: Tensor


class _Run(NamedTuple):
    """What a run has so far: of each row its label ``y`` (m,), the ``nearest`` broken image (m, ch, h, w), ``least``
    distance (m,), and which rows are the same image.
    """

    y: Tensor
    nearest: Tensor
    least: Tensor
    together: Together


@dataclass(frozen=True)
class FAB(Attack):
    """Minimal-norm attack for linf, l2 and l1. An image that is not broken within ``threat.eps`` comes back clean.

    ``targets``: 0 for the untargeted attack (the gradients of all classes each step); n for FAB-T, one run towards each
    of the n most likely wrong classes in turn (at most classes - 1). A run is ``steps`` steps; each of the ``restarts``
    after the first one starts at random. A run and its restarts see only the images not yet broken; where there is room
    for more, several runs are made at once, with the same results. ``alpha_max`` bounds the pull towards the clean
    image, ``eta`` is the overshoot, ``beta`` the way back after a success (1: none).

    ``keep``: with "first" an image leaves as soon as it is broken within eps; with "best" its run goes on to the end,
    and the nearest broken image found is kept (as the original does; the same images are broken).
    ``rng``: "autoattack" draws the restarts' starts as the original does and forwards whole batches only, so that the
    images are those of pyautoattack's FAB at an equal batch; the restarts then depend on the batch.

    The plain model's logits are climbed: ``objective`` only says so. Through a `Surrogate`, the boundary is the
    surrogate's and the exact model says what is broken.
    """

    threat: Threat
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    keep: Literal["first", "best"] = "first"
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    objective = Joint("margin")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1; got {self.steps} and {self.restarts}")
        if self.targets < 0:
            raise ValueError(f"targets must be 0 (untargeted) or the number of wrong classes; got {self.targets}")
        if not 0 <= self.alpha_max <= 1:
            raise ValueError(f"alpha_max must be from 0 to 1; got {self.alpha_max}")
        if not 1 <= self.eta < math.inf:
            raise UserError(f"eta must be a number, at least 1 (no overshoot); got {self.eta}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be above 0 and at most 1; got {self.beta}")

    @property
    def finds_nearest(self) -> bool:
        return self.keep == "best" and self.restarts == 1 and self.targets <= 1  # later runs see the unbroken alone

    def queries(self, output: Output) -> int:
        classes = output.logits.shape[1]
        step = 3 + 1 if self.targets else 1 + 2 * classes + 1  # + 1: the check of a point that is moved back
        return 1 + self.restarts * max(1, min(self.targets, classes - 1)) * self.steps * step

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            logits = model.run(x).logits
            left = torch.nonzero(~missed(model, x, logits, y))[:, 0]
        classes = logits.shape[1]
        ranked = logits.scatter(1, y[:, None], torch.inf).sort(dim=1).indices  # the label last
        generator = torch.Generator().manual_seed(self.seed)
        x_adv = x.clone()
        targets = range(max(1, min(self.targets, classes - 1)))
        waiting: Sequence[tuple[int, int]] = [
            (target, restart) for target in targets for restart in range(self.restarts)
        ]
        while waiting and len(left) > 0:
            original = self.rng == "autoattack"
            runs, waiting = (waiting[:1], waiting[1:]) if original else next_climbs(waiting, len(left), x[0].numel())
            rows = left.repeat(len(runs))
            rival = torch.cat([ranked[left, -2 - target] for target, _ in runs]) if self.targets else None
            starts = [
                self._start(x[left], noise[left].fold(*run), generator) if run[1] > 0 else x[left] for run in runs
            ]
            together = Together.of(len(left), len(runs), x.device)
            nearest, distance = self._run(model, x[rows], y[rows], rival, torch.cat(starts), together)
            broken = distance.view(len(runs), -1) <= self.threat.eps
            first = torch.arange(len(left), device=x.device) + len(left) * broken.int().argmax(0)
            lost, stay = asking.places(broken.any(0), ~broken.any(0))
            x_adv[left[lost]] = nearest[first[lost]]
            left = left[stay]
        return x_adv

    def _start(self, x: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
        """A random direction's point at eps / 2 from x, clipped to the box."""
        shape, norm = x.shape[1:], self.threat.norm
        if self.rng == "autoattack":
            draw = torch.rand if norm == "linf" else torch.randn
            ray = draw(x.shape, generator=generator).to(x)
        else:
            ray = (noise.uniform(*shape) if norm == "linf" else noise.normal(*shape)).to(x)
        if norm == "linf":
            ray = 2 * ray - 1
        length = _length(norm, ray).clamp(min=torch.finfo(x.dtype).tiny)[:, None, None, None]
        return (x + self.threat.eps * ray / length * 0.5).clamp(0.0, 1.0)

    def _run(
        self, model: RoutedModel, x: Tensor, y: Tensor, rival: Tensor | None, now: Tensor, together: Together
    ) -> tuple[Tensor, Tensor]:
        """One run from ``now``: the nearest broken image found (n, ch, h, w) and its distance (n,), infinite where
        there is none. ``together``: which of the images are the same.

        Where a point is not broken, the pass that said so is also the one that the next step differentiates. Once an
        image has been broken, nearly all its later points are (97 % for linf and l2 on a digits CNN) and are moved
        back: it is then asked without a gradient (``blind``), as in the original. A close surrogate's own word moves
        the search, and its exact model is asked about the points inside the ball alone. Long for these kinds of pass.
        """
        nearest, least = x.clone(), x.new_full((len(x),), torch.inf)
        rows = torch.arange(len(x), device=x.device)
        ahead = _ahead(model, now, y, rival, self.threat.norm)
        blind, aware, ever = rows, rows[:0], torch.zeros_like(rows, dtype=torch.bool)
        for step in range(self.steps):
            clean = x[rows]
            now = self._step(clean, now, ahead)
            last = step == self.steps - 1
            if last:
                blind, aware = torch.arange(len(rows), device=x.device), rows[:0]
            broken, ahead, known = self._asked(model, _Step(clean, now, y[rows], _of(rival, rows), blind, aware))
            ever[rows] |= broken
            seen, run = ever[rows], _Run(y, nearest, least, together)
            stay, sizes = self._noted(model, now, now - clean, broken, rows, run, (seen, ~seen, ~known))
            if last:
                break
            now = torch.where(broken[:, None, None, None], clean + (now - clean) * self.beta, now)
            if self.rng == "autoattack":
                seen, sizes = (seen & stay).any().expand(len(rows)), []
            left, *sizes = sizes or asking.counts(stay, stay & seen, stay & ~seen, stay & ~known)
            if left == 0:
                break
            if left < len(rows):
                some = asking.taken(stay, left)
                now, rows, known, seen = now[some], rows[some], known[some], seen[some]
                ahead = _Boundary(ahead.gap[some], ahead.slope[some])
            blind, aware, again = (asking.taken(mask, size) for mask, size in zip((seen, ~seen, ~known), sizes))
            if len(again) > 0:
                part = rows[again]
                fresh = _ahead(model, now[again], y[part], _of(rival, part), self.threat.norm)
                ahead.gap[again], ahead.slope[again] = fresh
        return nearest, least

    def _noted(
        self,
        model: RoutedModel,
        now: Tensor,
        delta: Tensor,
        broken: Tensor,
        rows: Tensor,
        run: _Run,
        parts: tuple[Tensor, ...],
    ) -> tuple[Tensor, list[int]]:
        """Notes what is nearer now, ``delta`` from the clean image; which of the ``rows`` of the ``run`` go on. Where
        all do, and asking waits for the device, also how many rows there are, and ``parts`` of them: asked at once.
        """
        y, nearest, least, together = run
        distance = _length(self.threat.norm, delta)
        nearer = broken & (distance < least[rows])
        close = isinstance(model, Surrogate) and model.close
        if close:
            nearer &= distance <= self.threat.eps
        count, sizes = len(rows), list[int]()
        if not asking.free(nearer):
            count, *sizes = asking.counts(nearer, *parts)
            sizes.insert(0, len(rows))
        near = asking.taken(nearer, count)
        if len(near) == 0:
            return torch.ones_like(broken), sizes
        place, there = rows[near], now[near]
        right = torch.ones_like(near, dtype=torch.bool)
        if isinstance(model, Surrogate) and close:
            right = model.verdict(there, y[place])
        nearest[place] = torch.where(right[:, None, None, None], there, nearest[place])
        least[place] = torch.where(right, distance[near], least[place])
        if self.keep == "best":
            return torch.ones_like(broken), sizes
        inside = right & (distance[near] <= self.threat.eps)
        together.broke(place, inside)
        return together.wanted(rows).index_put((near,), ~inside & together.wanted(place)), []

    def _step(self, clean: Tensor, now: Tensor, ahead: _Boundary) -> Tensor:
        """Eq. 9: over the boundary from here and from the clean image, mixed by how far away it is from each."""
        both = torch.cat([now, clean]).flatten(1)
        w = ahead.slope.flatten(1)
        b = (ahead.slope * now).flatten(1).sum(1) - ahead.gap
        by_sort = self.rng == "autoattack"
        move = projection(self.threat.norm, both, w.repeat(2, 1), b.repeat(2), by_sort).view(2, *now.shape)
        here, there = (_length(self.threat.norm, part).clamp(min=SMALLEST_MOVE)[:, None, None, None] for part in move)
        alpha = (here / (here + there)).clamp(0.0, self.alpha_max)
        return ((now + self.eta * move[0]) * (1 - alpha) + (clean + move[1] * self.eta) * alpha).clamp(0.0, 1.0)

    def _asked(self, model: RoutedModel, step: _Step) -> tuple[Tensor, _Boundary, Tensor]:
        """Which images are broken (n,), the boundary ahead, and of which images it is known (n,). With
        rng="autoattack", of all or none: the original's next pass is of them all.
        """
        if self.rng == "image" and len(step.blind) and len(step.aware):
            return self._in_two_passes(model, step)
        return self._part_by_part(model, step)

    def _part_by_part(self, model: RoutedModel, step: _Step) -> tuple[Tensor, _Boundary, Tensor]:
        """The same, by a pass for each of the two kinds."""
        now = step.now
        broken, known = torch.zeros(2, len(now), dtype=torch.bool, device=now.device)
        ahead = _Boundary(now.new_zeros(len(now)), torch.zeros_like(now))
        for part, gradient in ((step.blind, False), (step.aware, True)):
            if len(part) == 0:
                continue
            at, label = now[part].requires_grad_(gradient), step.y[part]
            with torch.set_grad_enabled(gradient):
                logits = model.run(at).logits
            wrong = _claimed(model, at.detach(), logits, label)
            broken[part] = wrong
            done = wrong.any() if self.rng == "autoattack" else wrong.all()
            if gradient and not (asking.free(done) and bool(done)):
                known[part] = ~wrong & ~done
                ahead.gap[part], ahead.slope[part] = _differentiate(
                    logits, at, label, _of(step.rival, part), self.threat.norm
                )
        return broken, ahead, known

    def _in_two_passes(self, model: RoutedModel, step: _Step) -> tuple[Tensor, _Boundary, Tensor]:
        """The same where there are images of both kinds: first those that are asked blindly, then all with a gradient,
        the broken ones among them where they are moved back to. Two fuller passes stand for three.
        """
        clean, now, y, rival, blind, aware = step
        broken, known = torch.zeros(2, len(now), dtype=torch.bool, device=now.device)
        with torch.no_grad():
            broken[blind] = _claimed(model, now[blind], model.run(now[blind]).logits, y[blind])
        at = torch.where(broken[:, None, None, None], clean + (now - clean) * self.beta, now).requires_grad_(True)
        logits = model.run(at).logits
        broken[aware] = _claimed(model, at.detach()[aware], logits[aware], y[aware])
        known[blind], known[aware] = True, ~broken[aware]
        return broken, _differentiate(logits, at, y, rival, self.threat.norm), known


class _Step(NamedTuple):
    """Points of a step: ``now`` (n, ch, h, w) beside the ``clean`` images, their labels and the rivals that are meant;
    the places of those that are asked blindly, and of the others, of which it is known where they are not broken.
    """

    clean: Tensor
    now: Tensor
    y: Tensor
    rival: Tensor | None
    blind: Tensor
    aware: Tensor


def _claimed(model: RoutedModel, at: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Which images are broken: on a close surrogate's own word, else on the exact model's."""
    if isinstance(model, Surrogate) and model.close:
        return logits.detach().argmax(1) != y
    return missed(model, at, logits, y)


def _length(norm: Norm, delta: Tensor) -> Tensor:
    """`size`, with l2 and l1 summed as the original sums them (`vector_norm` differs in the last bit)."""
    flat = delta.flatten(1)
    if norm == "l2":
        return flat.square().sum(1).sqrt()
    return flat.abs().sum(1) if norm == "l1" else size(norm, delta)


def _of(rival: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if rival is None else rival[rows]


def _ahead(model: RoutedModel, x: Tensor, y: Tensor, rival: Tensor | None, norm: Norm) -> _Boundary:
    at = x.detach().requires_grad_(True)
    return _differentiate(model.run(at).logits, at, y, rival, norm)


def _differentiate(logits: Tensor, at: Tensor, y: Tensor, rival: Tensor | None, norm: Norm) -> _Boundary:
    """The boundary between the label and the ``rival``; without one the nearest of all, by one gradient a class.

    Extreme logits are scaled (see `losses.EXTREME`): only the boundary counts. Where no path from the image to the
    logits is differentiable the slope is zero, and the attack stays where it is. Raises `NotFiniteError`.
    """
    logits = logits * scale_of(logits)[:, None]
    if rival is not None:
        pair = logits.gather(1, torch.stack([rival, y], 1))
        difference = pair[:, 0] - pair[:, 1]
        return _finite(_Boundary(difference.detach().to(at.dtype), _gradient(difference, at)))
    scores, classes = logits.detach(), logits.shape[1]
    own, own_slope = scores.gather(1, y[:, None]), _gradient(logits.gather(1, y[:, None]), at, more=True)
    best, least = None, at.new_full((len(at),), torch.inf)
    for turn in range(1, classes):
        other = ((y + turn) % classes)[:, None]
        gap = (scores.gather(1, other) - own)[:, 0].to(at.dtype)
        slope = _gradient(logits.gather(1, other), at, more=turn < classes - 1) - own_slope
        here = _finite(_Boundary(gap, slope))
        distance = gap.abs() / dual_size(norm, slope).clamp(min=torch.finfo(at.dtype).tiny)
        nearer = distance < least
        if best is None:
            best, least = here, distance
        else:
            best = _Boundary(
                torch.where(nearer, gap, best.gap), torch.where(nearer[:, None, None, None], slope, best.slope)
            )
            least = torch.where(nearer, distance, least)
    assert best is not None
    return best


def _gradient(values: Tensor, at: Tensor, more: bool = False) -> Tensor:
    """The gradient of the images' values, image by image; ``more``: another one of the same pass will be asked for."""
    if not values.requires_grad:
        return torch.zeros_like(at)
    slope = torch.autograd.grad(values.sum(), at, retain_graph=more, allow_unused=True)[0]
    return torch.zeros_like(at) if slope is None else slope


def _finite(boundary: _Boundary) -> _Boundary:
    require_finite(boundary.gap, boundary.slope)
    return boundary
