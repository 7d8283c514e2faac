"""Auto-PGD over any objective (Croce and Hein 2020, arXiv 2003.01690; for l1 Croce and Hein 2021, arXiv 2103.01208).

Written from the papers; where they leave room, the numbers are those of the authors' code (AutoAttack).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robustmoe import asking
from robustmoe.attacks.base import Attack
from robustmoe.attacks.climbing import Climbing, Collected, as_column, length_of
from robustmoe.attacks.l1 import fitted, onto_l1
from robustmoe.attacks.objectives import Inner, Joint, Objective, Score, Targeted, towards
from robustmoe.attacks.pgd import ascend
from robustmoe.attacks.surrogate import missed
from robustmoe.attacks.threat import Threat
from robustmoe.attacks.together import Together, next_climbs
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise

MOMENTUM = 0.75
"""Weight of the new step; the rest repeats the last one (2020, section 3)."""

FIRST_CHECK, CHECK_SHRINK, SHORTEST_CHECK = 0.22, 0.03, 0.06
"""Share of the steps before the first checkpoint, by how much each next interval is shorter, and the shortest one."""

L1_CHECK = 0.04
"""For l1 (2021, section 3.2): share of the steps between checkpoints."""

SCHEDULE = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""(multiple of eps, share of the steps) of the climbs of ``largereps``, each from the last one's best."""


class Climb(NamedTuple):
    """One climb of a restart: ``steps`` in the ball of radius ``eps`` (pixels). ``dense``: l1 starts by moving a fixed
    share of coordinates, else by the support of where it starts. ``last``: no climb of the restart follows.
    """

    eps: float
    steps: int
    dense: bool
    last: bool


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
        return self.climb_each([self.objective], model, x, y, noise)

    def stages(self) -> list[tuple[float, int]]:
        """(eps, steps) of each climb of a restart; the steps sum to ``steps``."""
        eps, steps = self.threat.eps, self.steps
        if not (self.threat.norm == "l1" if self.largereps is None else self.largereps):
            return [(eps, steps)]
        counts = [math.ceil(share * steps) for _, share in SCHEDULE[:-1]]
        counts.append(steps - sum(counts))
        return [(factor * eps, count) for (factor, _), count in zip(SCHEDULE, counts, strict=True)]

    def climb_each(
        self, objectives: Sequence[Objective], model: RoutedModel, x: Tensor, y: Tensor, noise: Noise
    ) -> Tensor:
        """``restarts`` of each objective in turn, on the images not yet fooled."""
        generator = None
        result = Collected.none(x)
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
        return self._ended(x, result.x_adv)

    def climb_towards(
        self, targets: Tensor, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise, loss: Literal["dlr", "margin"]
    ) -> Tensor:
        """`climb_each` of the classes ``targets`` (n, k) of each image, as many at once as there is room for."""
        result = Collected.none(x)
        waiting: Sequence[tuple[int, int]] = [
            (number, restart) for number in range(targets.shape[1]) for restart in range(self.restarts)
        ]
        while waiting:
            left = torch.nonzero(~result.fooled)[:, 0]
            if len(left) == 0:
                break
            climbs, waiting = next_climbs(waiting, len(left), x[0].numel())
            rows = left.repeat(len(climbs))
            inner = towards(model, y[rows], torch.cat([targets[left, number] for number, _ in climbs]), loss)
            streams = torch.cat([noise[left].fold(*climb).state for climb in climbs])
            together = Together.of(len(left), len(climbs), x.device)
            for climbed in self._restart(inner, x[rows], None, Noise(streams), None, together).split(len(left)):
                still = torch.nonzero(~result.fooled[left])[:, 0]
                result.take(left[still], climbed[still])
        return self._ended(x, result.x_adv)

    def _ended(self, x: Tensor, x_adv: Tensor) -> Tensor:
        x_adv = x_adv.clamp(0.0, 1.0)
        return fitted(x, x_adv, self.threat.eps) if self.threat.norm == "l1" else x_adv

    def _restart(
        self,
        inner: Inner,
        x: Tensor,
        rows: Tensor | None,
        noise: Noise,
        generator: torch.Generator | None,
        together: Together | None = None,
    ) -> Collected:
        """From one random start to the end. ``rows``: which images of the objective's batch these are (None: all);
        ``together``: what tells which of the images are the same.
        """
        stages = self.stages()
        random, original = self._draw(x, noise, generator), generator is not None
        if len(stages) == 1:
            eps = self.threat.eps
            if self.threat.norm == "l1":
                x_adv = onto_l1(x, random, x + random, eps, original)
            else:
                length = length_of(random) if self.threat.norm == "l2" else random.flatten(1).abs().amax(1)
                x_adv = x + eps * (random / (as_column(length, x) + 1e-12))
            climb = Climb(eps, self.steps, dense=True, last=True)
            return self._climb(inner, x, rows, x_adv.clamp_(0.0, 1.0), climb, together)
        x_adv = x + random
        x_adv = onto_l1(x, x_adv - x, x_adv, stages[0][0], original)
        for number, (eps, steps) in enumerate(stages):
            if original:
                self._draw(x, noise, generator)  # the original draws a start, and goes on from here nevertheless
            x_adv = onto_l1(x, x_adv - x, x_adv, eps, original).clamp_(0.0, 1.0)
            climb = Climb(eps, steps, dense=False, last=number == len(stages) - 1)
            collected = self._climb(inner, x, rows, x_adv, climb, together)
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
        climb: Climb,
        together: Together | None = None,
    ) -> Collected:
        """The steps of ``climb`` from x_adv: steps + 1 gradients.

        In the last climb of a restart fooled images leave, or are kept (see ``keep``); before it, in a larger ball,
        every image returns its iterate of highest loss.
        """
        collected = Collected.none(x)
        leave, note = climb.last and self.keep == "first", climb.last and self.keep == "best"
        now = Climbing.start(self.threat, x, x_adv, climb.eps, climb.dense, self.rng == "autoattack")
        checkpoints = self._checkpoints(climb.steps)
        for step in range(climb.steps + 1):
            if step > 0:
                now.move(MOMENTUM if step > 1 else 1.0)
            score = self._gradient(inner, now, rows)
            now.offer(score.loss, counted=step > 0)
            if leave and not self._let_go(now, score, collected, together):
                return collected
            if note:
                now.note(score.fooled)
            if step in checkpoints:
                if self.threat.norm == "l1":
                    now.check_l1()
                else:
                    now.check(checkpoints[step])
        collected.put(now.place, torch.where(as_column(now.fooled, x), now.noted, now.best), now.best_loss, now.fooled)
        return collected

    def _let_go(self, now: Climbing, score: Score, collected: Collected, together: Together | None) -> bool:
        """The fooled images leave, and with them the climbs that they make needless; whether any go on."""
        if asking.is_nowhere(score.fooled):
            return True
        staying = ~score.fooled
        if together is not None:
            together.broke(now.place, score.fooled)
            staying &= together.wanted(now.place)
        gone, stay = asking.places(score.fooled, staying)
        if len(gone):
            collected.put(now.place[gone], now.x_adv[gone], score.loss[gone], True)
            now.narrow(stay)
        return len(now.place) > 0

    def _checkpoints(self, steps: int) -> dict[int, float]:
        """The steps after which a checkpoint comes, the same for every image, and how many of the steps before it have
        to have raised the loss (unused for l1).
        """
        l1 = self.threat.norm == "l1"
        interval = max(int((L1_CHECK if l1 else FIRST_CHECK) * steps), 1)
        shrink, shortest = max(int(CHECK_SHRINK * steps), 1), max(int(SHORTEST_CHECK * steps), 1)
        step, checkpoints = interval, {}
        while step < steps:
            checkpoints[step] = self.rho * interval
            interval = interval if l1 else max(interval - shrink, shortest)
            step += interval
        return checkpoints

    def _gradient(self, inner: Inner, now: Climbing, rows: Tensor | None) -> Score:
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

    An image leaves as soon as a climb has fooled it. Where there is room for more images than are left, several targets
    are climbed at once, with the same results (not with rng="autoattack"). ``loss``: the targeted DLR loss (2020, eq.
    7; with fewer than 4 classes the margin) or the "margin" between the target's logit and the label's. The rest is as
    for `APGD`; the result of an image that is not fooled is its iterate of highest loss over all targets.
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
        _ = self.single  # checks the numbers that the two attacks share

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """Towards the first target; the others differ in the rank alone."""
        return Targeted(2, self.loss)

    def queries(self, output: Output) -> int:
        original = int(self.rng == "autoattack")
        climbs = self.single.queries(output) - original
        return 1 + original + len(self._ranks(output)) * (original + climbs)  # once for the targets, there for each

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        original = self.rng == "autoattack"
        with torch.no_grad():
            output = model.run(x[:1] if original else x)
        ranks = self._ranks(output)
        if original:
            return self.single.climb_each([Targeted(rank, self.loss) for rank in ranks], model, x, y, noise)
        targets = output.logits.sort(dim=1).indices[:, [-rank for rank in ranks]]
        return self.single.climb_towards(targets, model, x, y, noise, self.loss)

    def _ranks(self, output: Output) -> range:
        return range(2, min(self.targets, output.logits.shape[1] - 1) + 2)

    @property
    def single(self) -> APGD:
        """The climb at the first target: the same numbers in every field that `APGD` has."""
        return APGD(**{field.name: getattr(self, field.name) for field in fields(APGD)})
