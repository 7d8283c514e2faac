"""Auto-PGD over any objective (Croce and Hein 2020, arXiv 2003.01690; for l1 Croce and Hein 2021, arXiv 2103.01208).

Written from the papers; where they leave room, the numbers are those of the authors' code (AutoAttack).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from robustmoe.attacks.base import Attack
from robustmoe.attacks.objectives import Inner, Joint, Objective, Score, Targeted
from robustmoe.attacks.pgd import ascend
from robustmoe.attacks.surrogate import missed
from robustmoe.attacks.threat import Threat
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise

MOMENTUM = 0.75
"""Weight of the new step; the rest repeats the last one (2020, section 3)."""

FIRST_CHECK, CHECK_SHRINK, SHORTEST_CHECK = 0.22, 0.03, 0.06
"""Share of the steps before the first checkpoint, by how much each next interval is shorter, and the shortest one."""

L1_CHECK, L1_SHARE, L1_SHRUNK, L1_SLOWER, L1_SLOWEST = 0.04, 0.2, 0.95, 1.5, 10.0
"""For l1 (2021, section 3.2): share of the steps between checkpoints; share of the coordinates a step moves at first;
support ratio below which the climb goes back to its best iterate at full speed; else the step is divided by the next,
down to eps over the last."""

SCHEDULE = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""(multiple of eps, share of the steps) of the climbs of ``largereps``, each from the last one's best."""


@dataclass(frozen=True)
class APGD(Attack):
    """Projected gradient ascent with momentum, whose step size, image by image, halves where the climb stalls.

    From a random start on the ball's surface; ``rho`` is the share of steps between two checkpoints that must raise
    the loss; at a checkpoint that fails the image goes back to its best iterate. l1 steps move the steepest
    coordinates only, and project onto the ball and the box at once. ``restarts``: later ones attack only the images
    not yet fooled. ``eot``: each gradient is the mean of so many passes (the score is that of the last one, as in the
    original). ``largereps`` (l1 only, and there the default, as in AutoAttack standard): climb in the balls of 3 eps,
    2 eps and eps in turn, for 3, 3 and 4 tenths of the steps.

    ``keep``: with "first" an image leaves the batch as soon as it is fooled and returns that iterate; with "best" all
    run to the end, and a fooled image returns its last fooled iterate (as in the original). Both break the same
    images. An image that is not fooled returns its iterate of highest loss (the original: the clean image).

    ``rng``: "image" draws from each image's own stream. "autoattack" is the original to the bit, on CPU: one stream
    for the batch, its roundings, and an image missed when clean is left as it is. "image" differs in two roundings:
    an l2 step keeps its length for a gradient of any smallness (the original divides by the norm plus 1e-12), and the
    l1 projection sums in float64, leaves unmoved coordinates exactly as they were, and ends in the box.
    """

    threat: Threat
    steps: int = 100
    restarts: int = 1
    objective: Objective = Joint()  # noqa: RUF009 (a frozen value)
    rho: float = 0.75
    eot: int = 1
    keep: Literal["first", "best"] = "first"
    largereps: bool | None = None
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.eot < 1:
            raise ValueError(
                f"steps, restarts and eot must be at least 1; got {self.steps}, {self.restarts} and {self.eot}"
            )
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho is a share of steps, from 0 to 1; got {self.rho}")
        if self.largereps and self.threat.norm != "l1":
            raise ValueError(f"largereps is a schedule for l1; leave it out for {self.threat.norm}")
        if len(self.stages()) > 1 and self.steps < len(SCHEDULE):
            raise ValueError(
                f"largereps needs {len(SCHEDULE)} steps or more, got {self.steps}; write more, or largereps=False"
            )

    def queries(self, output: Output) -> int:
        climb = 3 * self.eot * (self.steps + len(self.stages()))
        return self.restarts * climb + (self.rng == "autoattack")

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return self._attack([self.objective], model, x, y, noise)

    def stages(self) -> list[tuple[float, int]]:
        """(eps, steps) of each climb of a restart; the steps sum to ``steps``."""
        eps, steps = self.threat.eps, self.steps
        if not (self.threat.norm == "l1" if self.largereps is None else self.largereps):
            return [(eps, steps)]
        counts = [math.ceil(share * steps) for _, share in SCHEDULE[:-1]]
        counts.append(steps - sum(counts))
        return [(factor * eps, count) for (factor, _), count in zip(SCHEDULE, counts, strict=True)]

    def _attack(
        self, objectives: Sequence[Objective], model: RoutedModel, x: Tensor, y: Tensor, noise: Noise
    ) -> Tensor:
        """``restarts`` of each objective in turn, on the images not yet fooled."""
        generator = None
        result = _Collected.none(x)
        if self.rng == "autoattack":
            generator = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                result.fooled = missed(model, x, model.run(x).logits, y)
        for number, objective in enumerate(objectives):
            left = torch.nonzero(~result.fooled)[:, 0]
            if len(left) == 0:
                break
            inner = objective(model, x[left], y[left])
            for restart in range(self.restarts):
                rows = torch.nonzero(~result.fooled[left])[:, 0]  # of ``left``, which the objective knows
                if len(rows) == 0:
                    break
                still = left[rows]
                every = None if len(rows) == len(left) else rows
                result.take(still, self._restart(inner, x[still], every, noise[still].fold(number, restart), generator))
        return result.x_adv.clamp(0.0, 1.0)

    def _restart(
        self, inner: Inner, x: Tensor, rows: Tensor | None, noise: Noise, generator: torch.Generator | None
    ) -> _Collected:
        """From one random start to the end. ``rows``: which images of the objective's batch these are (None: all)."""
        stages = self.stages()
        random, original = self._draw(x, noise, generator), generator is not None
        if len(stages) == 1:
            eps = self.threat.eps
            if self.threat.norm == "l1":
                x_adv = _onto_l1(x, random, x + random, eps, original)
            else:
                length = _length(random) if self.threat.norm == "l2" else random.flatten(1).abs().amax(1)
                x_adv = x + eps * (random / (_column(length, x) + 1e-12))
            return self._climb(inner, x, rows, x_adv.clamp_(0.0, 1.0), eps, self.steps, dense=True, last=True)
        x_adv = x + random
        x_adv = _onto_l1(x, x_adv - x, x_adv, stages[0][0], original)
        for number, (eps, steps) in enumerate(stages):
            if original:
                self._draw(x, noise, generator)  # the original draws a start, and goes on from here nevertheless
            x_adv = _onto_l1(x, x_adv - x, x_adv, eps, original).clamp_(0.0, 1.0)
            collected = self._climb(inner, x, rows, x_adv, eps, steps, dense=False, last=number == len(stages) - 1)
            x_adv = collected.x_adv
        return collected

    def _draw(self, x: Tensor, noise: Noise, generator: torch.Generator | None) -> Tensor:
        """Like x: uniform in [-1, 1) for linf, else standard normal."""
        uniform, shape = self.threat.norm == "linf", tuple(x.shape[1:])
        if generator is None:
            random = noise.uniform(*shape) if uniform else noise.normal(*shape)
        else:
            random = (torch.rand if uniform else torch.randn)(x.shape, generator=generator)
        random = random.to(x)
        return 2 * random - 1 if uniform else random

    def _climb(
        self,
        inner: Inner,
        x: Tensor,
        rows: Tensor | None,
        x_adv: Tensor,
        eps: float,
        steps: int,
        dense: bool,
        last: bool,
    ) -> _Collected:
        """``steps`` steps from x_adv in the ball of radius ``eps``: steps + 1 gradients.

        In the ``last`` climb of a restart fooled images leave, or are kept (see ``keep``); before it, in a larger ball,
        every image returns its iterate of highest loss. ``dense``: l1 starts by moving a fixed share of coordinates,
        else by the support of x_adv. Checkpoints come at the same steps for every image.
        """
        collected = _Collected.none(x)
        leave, note = last and self.keep == "first", last and self.keep == "best"
        now = _Climbing.start(self.threat, x, x_adv, eps, dense, self.rng == "autoattack")
        l1 = self.threat.norm == "l1"
        interval = max(int((L1_CHECK if l1 else FIRST_CHECK) * steps), 1)
        shrink, shortest = max(int(CHECK_SHRINK * steps), 1), max(int(SHORTEST_CHECK * steps), 1)
        check = interval
        for step in range(steps + 1):
            if step > 0:
                now.move(MOMENTUM if step > 1 else 1.0)
            score = self._gradient(inner, now, rows)
            now.offer(score.loss, counted=step > 0)
            if leave and bool(score.fooled.any()):
                gone, stay = torch.nonzero(score.fooled)[:, 0], torch.nonzero(~score.fooled)[:, 0]
                collected.put(now.place[gone], now.x_adv[gone], score.loss[gone], True)
                if len(stay) == 0:
                    return collected
                now.narrow(stay)
            elif note:
                now.note(score.fooled)
            if step == check and step < steps:
                if l1:
                    now.check_l1()
                else:
                    now.check(self.rho * interval)
                    interval = max(interval - shrink, shortest)
                check = step + interval
        collected.put(now.place, torch.where(_column(now.fooled, x), now.noted, now.best), now.best_loss, now.fooled)
        return collected

    def _gradient(self, inner: Inner, now: _Climbing, rows: Tensor | None) -> Score:
        """The score where the images are now; their gradients go into ``now``."""
        if now.left:
            rows = now.place if rows is None else rows[now.place]
        score, total = ascend(inner, now.x_adv, rows)
        for _ in range(self.eot - 1):
            score, gradient = ascend(inner, now.x_adv, rows)
            total = total + gradient
        now.gradient = total / self.eot if self.eot > 1 else total
        return score


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """`APGD` towards the ``targets`` most likely wrong classes of the clean image in turn (at most all there are).

    An image leaves as soon as a climb has fooled it. ``loss``: the targeted DLR loss (2020, eq. 7; 4 classes or more)
    or the "margin" between the target's logit and the label's. The rest is as for `APGD`; the result of an image that
    is not fooled is its iterate of highest loss over all targets.
    """

    threat: Threat
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    loss: Literal["dlr", "margin"] = "dlr"
    rho: float = 0.75
    eot: int = 1
    keep: Literal["first", "best"] = "first"
    largereps: bool | None = None
    rng: Literal["image", "autoattack"] = "image"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1; got {self.targets}")
        self._one()

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """Towards the first target; the others differ in the rank alone."""
        return Targeted(2, self.loss)

    def queries(self, output: Output) -> int:
        clean = int(self.rng == "autoattack")
        climbs = self._one().queries(output) - clean
        return (
            1 + clean + len(self._ranks(output)) * (1 + climbs)
        )  # how many classes there are, and which is the target

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            ranks = self._ranks(model.run(x[:1]))
        return self._one()._attack([Targeted(rank, self.loss) for rank in ranks], model, x, y, noise)

    def _ranks(self, output: Output) -> range:
        return range(2, min(self.targets, output.logits.shape[1] - 1) + 2)

    def _one(self) -> APGD:
        """The climb at the first target."""
        return APGD(
            self.threat,
            self.steps,
            self.restarts,
            self.objective,
            self.rho,
            self.eot,
            self.keep,
            self.largereps,
            self.rng,
            self.seed,
        )


@dataclass
class _Collected:
    """What a search has for each image: an image, its loss, whether it is fooled."""

    x_adv: Tensor
    loss: Tensor
    fooled: Tensor

    @classmethod
    def none(cls, x: Tensor) -> _Collected:
        """Nothing yet: the clean images."""
        return cls(x.clone(), x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def put(self, rows: Tensor, x_adv: Tensor, loss: Tensor, fooled: Tensor | bool) -> None:
        self.x_adv[rows], self.loss[rows], self.fooled[rows] = x_adv, loss.to(self.loss), fooled

    def take(self, rows: Tensor, other: _Collected) -> None:
        """What another restart found for the images ``rows``, none of them fooled before."""
        better = other.fooled | (other.loss > self.loss[rows])
        self.put(rows[better], other.x_adv[better], other.loss[better], other.fooled[better])


@dataclass
class _Climbing:
    """The images that still climb, one row an image: all that the next step depends on."""

    threat: Threat
    eps: float
    original: bool
    left: bool  # whether images have left
    count: int  # l1: the largest number of coordinates that an image's step looks at
    place: Tensor  # (n,) which image of the climb it is
    x: Tensor
    x_adv: Tensor
    old: Tensor  # before the last step
    gradient: Tensor
    step_size: Tensor  # (n, 1, 1, 1)
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    loss: Tensor
    rises: Tensor  # (n,) steps since the last checkpoint that raised the loss
    halved: Tensor  # at the last checkpoint
    checked: Tensor  # best loss at the last checkpoint
    fooled: Tensor
    noted: Tensor  # the last fooled iterate
    lower: Tensor  # linf: ball and box
    upper: Tensor
    support: Tensor  # l1: (n,) coordinates that differed from x at the last checkpoint
    weakest: Tensor  # l1: (n,) rank, in the gradient, of the weakest coordinate that moves

    @classmethod
    def start(cls, threat: Threat, x: Tensor, x_adv: Tensor, eps: float, dense: bool, original: bool) -> _Climbing:
        n, size = len(x), x[0].numel()
        zeros, no = x.new_zeros(n), torch.zeros(n, dtype=torch.bool, device=x.device)
        linf, l1 = threat.norm == "linf", threat.norm == "l1"
        if dense:
            support, share = zeros + size, torch.full((n,), L1_SHARE, device=x.device)
        else:
            support = _support(x_adv, x)
            share = support / size / 1.5
        weakest = _weakest(share, size) if l1 else no
        return cls(
            threat=threat,
            eps=eps,
            original=original,
            left=False,
            count=int(weakest.max()) + 1 if l1 else 0,
            place=torch.arange(n, device=x.device),
            x=x,
            x_adv=x_adv,
            old=x_adv,
            gradient=x_adv,
            step_size=x.new_full((n,) + (1,) * (x.ndim - 1), eps if l1 else 2.0 * eps),
            best=x_adv,
            best_gradient=x_adv,
            best_loss=zeros - torch.inf,
            loss=zeros,  # the original counts the first step as a rise if its loss is above 0
            rises=torch.zeros_like(no, dtype=torch.long),
            halved=~no,
            checked=zeros - torch.inf,
            fooled=no,
            noted=x_adv,
            lower=(x - eps).clamp_(0.0, 1.0) if linf else no,
            upper=(x + eps).clamp_(0.0, 1.0) if linf else no,
            support=support,
            weakest=weakest,
        )

    def narrow(self, stay: Tensor) -> None:
        """Go on with the images ``stay`` (m,) alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[stay])
        self.left = True

    def move(self, fresh: float) -> None:
        """One step; ``fresh`` is the weight of the gradient's move beside the last one's (linf and l2)."""
        here, last = self.x_adv, self.old
        self.old = here
        if self.threat.norm == "l1":
            self.x_adv = self._moved_l1()
            return
        if self.threat.norm == "linf":
            step = torch.addcmul(here, self.gradient.sign(), self.step_size).clamp_(self.lower, self.upper)
        else:
            if self.original:
                unit = self.gradient / (_column(_length(self.gradient), here) + 1e-12)
            else:
                unit = self.threat.direction(self.gradient, here)
            step = self._inside_l2(unit.mul_(self.step_size).add_(here))
        step = step.sub_(here).mul_(fresh).add_(here).add_(here - last, alpha=1.0 - fresh)
        self.x_adv = step.clamp_(self.lower, self.upper) if self.threat.norm == "linf" else self._inside_l2(step)

    def _inside_l2(self, x_adv: Tensor) -> Tensor:
        """Into the ball, then into the box; overwrites its argument."""
        delta = x_adv.sub_(self.x)
        length = _column(_length(delta), delta)
        return delta.div_(length + 1e-12).mul_(length.clamp(max=self.eps)).add_(self.x).clamp_(0.0, 1.0)

    def _moved_l1(self) -> Tensor:
        """The steepest coordinates by the same amount each, step_size together; then onto ball and box."""
        strength = self.gradient.abs().flatten(1)
        least = strength.topk(self.count, dim=1).values.gather(1, self.weakest[:, None])
        sign = self.gradient.sign() * (strength >= least).view_as(self.gradient)
        moving = _column((sign != 0).flatten(1).sum(1), sign)
        delta = torch.addcmul(self.x_adv, sign, self.step_size / (moving + 1e-10)).sub_(self.x)
        return _onto_l1(self.x, delta, self.x + delta, self.eps, self.original)

    def offer(self, loss: Tensor, counted: bool) -> None:
        """The loss (n,) where the images are now. ``counted``: after a step."""
        better = loss > self.best_loss
        column = _column(better, self.x_adv)
        self.best = torch.where(column, self.x_adv, self.best)
        self.best_gradient = torch.where(column, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        if counted:
            self.rises += loss > self.loss
            self.loss = loss
        else:
            self.checked = self.best_loss

    def note(self, fooled: Tensor) -> None:
        self.fooled = self.fooled | fooled
        self.noted = torch.where(_column(fooled, self.x_adv), self.x_adv, self.noted)

    def check(self, enough: float) -> None:
        """Halve the step and go back to the best iterate where too few steps have raised the loss (not more than
        ``enough``), or where the best loss has not risen since a checkpoint that did not halve (2020, section 3).
        """
        halve = (self.rises <= enough) | (~self.halved & (self.checked >= self.best_loss))
        self.step_size = torch.where(_column(halve, self.x), self.step_size / 2.0, self.step_size)
        self.halved, self.checked, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)
        self._back(halve)

    def check_l1(self) -> None:
        """Move as many coordinates as 2/3 of the best iterate's support; where that has shrunk, at full speed again
        and from the best iterate, else more slowly (2021, algorithm 1).
        """
        support = _support(self.best, self.x)
        shrunk = support / self.support < L1_SHRUNK
        slower = torch.where(_column(shrunk, self.x), self.eps, self.step_size / L1_SLOWER)
        self.step_size = slower.clamp_(self.eps / L1_SLOWEST, self.eps)
        size = self.x[0].numel()
        self.support, self.weakest = support, _weakest(support / size / 1.5, size)
        self.count = int(self.weakest.max()) + 1
        self._back(shrunk)

    def _back(self, rows: Tensor) -> None:
        column = _column(rows, self.x_adv)
        self.x_adv = torch.where(column, self.best, self.x_adv)
        self.gradient = torch.where(column, self.best_gradient, self.gradient)


def l1_excess(
    x: Float[Tensor, "n ch h w"], delta: Float[Tensor, "n ch h w"], eps: float, wide: bool = True
) -> Float[Tensor, "n ch h w"]:
    """What to take from ``delta`` so that x + delta is the nearest point of the l1 ball of radius ``eps`` around x
    *and* of the box [0, 1] (2021, proposition 2.1). x lies in the box.

    Each coordinate loses min(max(level, lo), hi): at least lo, by which it leaves the box, at most hi = |delta|. The
    total is piecewise linear in the level, with slope + 1 from each lo and - 1 from each hi; the level is where what
    is left has norm eps (0 if lo alone does it). Only the breaks above 0 are sorted. ``wide``: sums in float64, so the
    norm is eps to float32's rounding; else in x's own dtype, as the original.
    """
    if len(x) == 0:
        return delta
    dtype = torch.float64 if wide else x.dtype
    flat, hi = delta.flatten(1), delta.flatten(1).abs()
    base = x.flatten(1)
    lo = torch.minimum(1 - base - flat, base + flat).clamp_(max=0.0).neg_()
    removed = lo.sum(1, keepdim=True, dtype=dtype)
    needed = hi.sum(1, keepdim=True, dtype=dtype) - eps
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
    level = torch.where(removed < needed, level, 0.0).to(x.dtype)
    return (flat.sign() * torch.clamp(level.expand_as(lo), lo, hi)).view_as(x)


def _onto_l1(x: Tensor, delta: Tensor, x_adv: Tensor, eps: float, original: bool) -> Tensor:
    """``x_adv`` = x + ``delta``, onto the l1 ball and the box. In the ``original``'s order of sums an unmoved
    coordinate may differ from x, and a clipped one leave the box, by a rounding; in ours neither.
    """
    excess = l1_excess(x, delta, eps, wide=not original)
    return x_adv - excess if original else (delta - excess).add_(x).clamp_(0.0, 1.0)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _length(delta: Tensor) -> Tensor:
    """The l2 norm (n,)."""
    return delta.flatten(1).square().sum(1).sqrt()


def _support(x_adv: Tensor, x: Tensor) -> Tensor:
    """(n,) the number of coordinates where they differ."""
    return (x_adv != x).flatten(1).sum(1)


def _weakest(share: Tensor, size: int) -> Tensor:
    """(n,) the rank, strongest first, of the last among a ``share`` (n,) of ``size`` coordinates."""
    return size - 1 - ((1.0 - share) * size).clamp(0, size - 1).long()
