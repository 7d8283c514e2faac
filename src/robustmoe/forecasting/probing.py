"""What one attack costs: it is made for real on a few images, for a while, and its passes are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustmoe.attacks import Attack, Surrogate
from robustmoe.attacks.base import part_noise
from robustmoe.attacks.schedule import heard_by
from robustmoe.attacks.together import room_for
from robustmoe.data import Batch
from robustmoe.evaluation.attacked import attacked_images, predictions
from robustmoe.evaluation.session import Session
from robustmoe.forecasting.timing import Seconds, Stopwatch
from robustmoe.noise import Noise

GRADIENT = 3
"""Forward passes that a gradient counts as."""


WARM = 6
"""Calls of an attack that pay for what is made once, such as the plan of a convolution for a batch of a new size: they
tell nothing of the others.
"""


class _TimeIsUp(Exception):
    """The time for a probe is over."""


@dataclass(frozen=True)
class PassCost:
    """What a pass on n images costs, ``of_call`` + n ``of_image``, in seconds; only ratios of it are used."""

    of_call: float
    of_image: float

    def of(self, calls: float, images: float) -> float:
        return calls * self.of_call + images * self.of_image


Costs = Mapping[bool, PassCost]
"""Of a pass with a gradient (True), and without one."""


def costs_of(session: Session, climbed: Surrogate, images: int, budget: float) -> Costs:
    """Times passes on few images and on as many as ``images``, or on fewer where that would take too long."""
    batch = session.images.batch(list(range(images))).to(session.device)
    small = min(4, images)
    costs = {}
    for gradient in (True, False):
        few = _pass_time(session, climbed, batch[:small], gradient, budget / 8)
        large = max(small, min(images, int(budget / 8 / max(few, 1e-9) * small)))
        many = few if large == small else _pass_time(session, climbed, batch[:large], gradient, budget / 8)
        slope = (many - few) / (large - small) if large > small else 0.0
        slope = slope if slope > 0 else many / large
        costs[gradient] = PassCost(max(0.0, few - slope * small), slope)
    return costs


def _pass_time(session: Session, climbed: Surrogate, batch: Batch, gradient: bool, budget: float) -> float:
    """Seconds of one pass, the least of several: of the CPU, or on the clock where a GPU does the work."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < budget):
        clock = Stopwatch(session.device)
        x = batch.x.clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = climbed(x)
            if gradient:
                torch.autograd.grad(cross_entropy(logits, batch.y), x)
        times.append(clock.read().main(session.device))
        if times[0] > budget:
            break
    return min(times)


@dataclass
class Trace:
    """The passes of an attack on ``images`` images: how many of each kind, on how many images together, and in how many
    seconds. ``cost``: forward passes that an image costs which is never broken (0: not known); ``used``: those that
    there were time for; ``last``: images of the last passes; ``first``: passes and seconds of the first `WARM` calls;
    ``heard``: what an attack that leaves steps out said last (`robustmoe.attacks.schedule`), and what was used then.
    """

    images: int
    cost: int
    calls: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    rows: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    used: float = 0.0
    last: list[int] = field(default_factory=list)
    took: Seconds = field(default_factory=Seconds)
    whole: bool = True
    first: tuple[dict[bool, float], dict[bool, float], Seconds] | None = None
    heard: tuple[float, float, float] | None = None

    def hear(self, done: float, of: float) -> None:
        """An attack has likely made so many of its passes."""
        self.heard = done, of, self.used

    @property
    def likely(self) -> float:
        """Forward passes that an image likely costs which is never broken: less than ``cost`` where the attack leaves
        steps out, as far as it has been seen.
        """
        if self.heard is None:
            return float(self.cost)
        done, of, used = self.heard
        return min(float(self.cost), max(self.used, used * of / done))

    def count(self, n: int, gradient: bool) -> None:
        self.calls[gradient] += 1
        self.rows[gradient] += n
        self.used += (GRADIENT if gradient else 1) * max(1.0, n / self.images)
        self.last = [*self.last[-3:], n]

    @property
    def passes(self) -> float:
        """Forward passes an image of the whole attack, as far as the probe can tell."""
        return self._sum(self._ended()) / max(1, self.images)

    def pace(self, costs: Costs) -> Seconds:
        """What the attack took for each second that its passes alone would have taken; of an attack that did not end
        without its first calls, which would count again and again.
        """
        took, alone = self.took, _alone(costs, self.calls, self.rows)
        if not self.whole and self.first is not None and sum(self.calls.values()) >= 2 * WARM:
            took, alone = took - self.first[2], alone - _alone(costs, *self.first[:2])
        return took * (1 / alone) if alone > 0 else Seconds(1.0, 1.0)

    def scaled(self, costs: Costs, pace: Seconds, images: int, batch_size: int, unbroken: bool = False) -> Seconds:
        """The seconds of the whole attack on ``images``, in batches. ``unbroken``: if none of them ever breaks."""
        calls, rows = self._unbroken() if unbroken else self._ended()
        batches = -(-images // batch_size)
        share = images / max(1, self.images)
        return pace * sum(costs[kind].of(calls[kind] * batches, rows[kind] * share) for kind in costs)

    def _sum(self, counted: tuple[dict[bool, float], dict[bool, float]]) -> float:
        return GRADIENT * counted[1][True] + counted[1][False]

    def _ended(self) -> tuple[dict[bool, float], dict[bool, float]]:
        """Calls and rows, with those that there was no time for: on the images that were left at last."""
        if self.whole or not self.used:
            return (self.calls, self.rows) if self.whole else self._unbroken()
        more = max(0.0, self.likely - self.used) / self.used
        left = min(self.images, max(self.last))
        return _plus(self.calls, self.calls, more), _plus(self.rows, self.calls, more * left)

    def _unbroken(self) -> tuple[dict[bool, float], dict[bool, float]]:
        if not self.used:  # no pass was made: gradients alone
            calls = {True: self.cost / GRADIENT, False: 0.0}
            return calls, {kind: n * max(1, self.images) for kind, n in calls.items()}
        times = max(1.0, self.cost / self.used)
        calls = {kind: n * times for kind, n in self.calls.items()}
        return calls, {kind: max(n * self.images, self.rows[kind]) for kind, n in calls.items()}


def _alone(costs: Costs, calls: Mapping[bool, float], rows: Mapping[bool, float]) -> float:
    """The seconds of so many passes alone."""
    return sum(costs[kind].of(calls[kind], rows[kind]) for kind in costs)


def _plus(these: dict[bool, float], others: dict[bool, float], times: float) -> dict[bool, float]:
    return {kind: n + times * others[kind] for kind, n in these.items()}


def probed(
    session: Session, attack: Attack, batch: Batch, name: str, together: int, budget: float
) -> tuple[Trace, Tensor]:
    """Makes an attack on the batch until the budget is spent. Returns its passes, and which images (n,) are broken; of
    an attack that did not end, as many as its last passes left out, those with the smallest margin.

    ``together``: how many images it may ask about at a time.
    """
    trace = Trace(len(batch), attack.queries(session.output))
    broken = torch.zeros(len(batch), dtype=torch.bool, device=batch.y.device)
    if len(batch) == 0:
        return trace, broken
    surrogate = session.surrogate(precision=session.options.precision)
    clock = Stopwatch(session.device)

    def on_pass(n: int, gradient: bool) -> None:
        if trace.used and clock.read().main(session.device) > budget:
            raise _TimeIsUp
        if sum(trace.calls.values()) == WARM:
            trace.first = dict(trace.calls), dict(trace.rows), clock.read()
        trace.count(n, gradient)

    watched = Surrogate(surrogate.climbed, session.model, surrogate.close, on_pass)
    noise = part_noise(Noise.of(batch.index, attack.seed), name)
    try:
        with room_for(together), heard_by(trace.hear):
            x_adv = attacked_images(watched, attack, batch, noise)
        trace.took = clock.read()
        with torch.no_grad():
            broken = torch.tensor(predictions(session.model.run(x_adv)), device=batch.y.device) != batch.y
    except _TimeIsUp:
        trace.took, trace.whole = clock.read(), False
        gone = len(batch) - min(len(batch), max(trace.last))
        broken[_margins(session, batch).argsort()[:gone]] = True
    return trace, broken


@torch.no_grad()
def _margins(session: Session, batch: Batch) -> Tensor:
    """(n,) the logit of the label minus the largest other one."""
    logits = session.model.run(batch.x).logits
    others = logits.scatter(1, batch.y[:, None], -torch.inf)
    return logits.gather(1, batch.y[:, None])[:, 0] - others.amax(1)
