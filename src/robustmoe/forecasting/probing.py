"""What one attack costs: it is made for real on a few images, for a while, and its passes are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Milestone(NamedTuple):
    """How far an attack is: the ``share`` of it that is done, and what that took."""

    share: float
    calls: dict[bool, float]
    rows: dict[bool, float]
    used: float
    took: Seconds


NOTHING = Milestone(0.0, {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, 0.0, Seconds())


@dataclass
class Trace:
    """The passes of an attack on ``images`` images: how many of each kind, on how many images together, and in how many
    seconds. ``cost``: forward passes that an image costs which is never broken (0: not known); ``used``: those that
    there were time for. ``marks``: how far it was on its way, as it says itself where it ``hears`` (see
    `robustmoe.attacks.schedule`), else by what it used of its cost; ``some``: its passes are of a part of the images
    that are left.

    An attack that did not end goes on as it went in the last third of its passes: on the images that were left then,
    with the passes and in the time that its last steps took. What is made once, such as the plan of a convolution, and
    images that leave at once, are not counted again and again.
    """

    images: int
    cost: int
    calls: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    rows: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    used: float = 0.0
    took: Seconds = field(default_factory=Seconds)
    whole: bool = True
    hears: bool = False
    some: bool = False
    marks: list[Milestone] = field(default_factory=lambda: [NOTHING])

    def hear(self, done: float, of: float, took: Seconds, some: bool = False) -> None:
        """The attack has done so much of all."""
        self.some = some
        if not self.hears:
            self.hears, self.marks = True, [NOTHING]
        self.marks.append(self._mark(done / of, took))

    def count(self, n: int, gradient: bool, took: Seconds) -> None:
        """A pass on n images begins."""
        if not self.hears and self.used:
            self.marks.append(self._mark(self.used / max(1, self.cost), took))
        self.calls[gradient] += 1
        self.rows[gradient] += n
        self.used += (GRADIENT if gradient else 1) * max(1.0, n / self.images)

    def _mark(self, share: float, took: Seconds) -> Milestone:
        return Milestone(min(1.0, share), dict(self.calls), dict(self.rows), self.used, took)

    @property
    def likely(self) -> float:
        """Forward passes that an image likely costs which is never broken: less than ``cost`` where the attack leaves
        steps out, as far as it has been seen.
        """
        if not self.hears:
            return float(self.cost)
        last, step, more = self._ahead()
        return min(float(self.cost), max(self.used, 0.0 if self.whole else last.used + more * step.used))

    @property
    def passes(self) -> float:
        """Forward passes an image of the whole attack, as far as the probe can tell."""
        return self._sum(self._ended()) / max(1, self.images)

    def pace(self, costs: Costs) -> Seconds:
        """What the attack takes for each second that its passes alone would take."""
        took, alone = self.took, _alone(costs, *self._ended())
        if not self.whole and self.used:
            last, step, more = self._ahead()
            took = last.took + step.took * more
        return took * (1 / alone) if alone > 0 and self.used else Seconds(1.0, 1.0)

    def scaled(self, costs: Costs, pace: Seconds, images: int, batch_size: int, unbroken: bool = False) -> Seconds:
        """The seconds of the whole attack on ``images``, in batches. ``unbroken``: if none of them ever breaks."""
        calls, rows = self._unbroken() if unbroken else self._ended()
        batches = -(-images // batch_size)
        share = images / max(1, self.images)
        return pace * sum(costs[kind].of(calls[kind] * batches, rows[kind] * share) for kind in costs)

    def _ahead(self) -> tuple[Milestone, Milestone, float]:
        """The last mark, what came in the last third of the passes, and how many times as much is to come."""
        marks = self.marks
        if not self.hears:
            marks = [*marks, self._mark(self.used / max(1, self.cost), self.took)]
        last = marks[-1]
        before = [mark for mark in marks if mark.share < last.share]
        late = [mark for mark in before if sum(mark.rows.values()) <= 2 / 3 * sum(last.rows.values())]
        begin = late[-1] if late else before[0] if before else None
        if begin is None:
            return last, NOTHING, 0.0
        step = Milestone(
            last.share - begin.share,
            _plus(last.calls, begin.calls, -1.0),
            _plus(last.rows, begin.rows, -1.0),
            last.used - begin.used,
            last.took - begin.took,
        )
        return last, step, (1 - last.share) / step.share

    def _sum(self, counted: tuple[dict[bool, float], dict[bool, float]]) -> float:
        return GRADIENT * counted[1][True] + counted[1][False]

    def _ended(self) -> tuple[dict[bool, float], dict[bool, float]]:
        """Calls and rows, with those that there was no time for."""
        if self.whole:
            return self.calls, self.rows
        if not self.used:
            return self._unbroken()
        last, step, more = self._ahead()
        return _plus(last.calls, step.calls, more), _plus(last.rows, step.rows, more)

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

    sizes: list[int] = []

    def on_pass(n: int, gradient: bool) -> None:
        now = clock.read()
        if trace.used and now.main(session.device) > budget:
            raise _TimeIsUp
        sizes[:] = [*sizes[-3:], n]
        trace.count(n, gradient, now)

    def heard(done: float, of: float, some: bool) -> None:
        trace.hear(done, of, clock.read(), some)

    watched = Surrogate(surrogate.climbed, session.model, surrogate.close, on_pass)
    noise = part_noise(Noise.of(batch.index, attack.seed), name)
    try:
        with room_for(together), heard_by(heard):
            x_adv = attacked_images(watched, attack, batch, noise)
        trace.took = clock.read()
        with torch.no_grad():
            broken = torch.tensor(predictions(session.model.run(x_adv)), device=batch.y.device) != batch.y
    except _TimeIsUp:
        trace.took, trace.whole = clock.read(), False
        gone = 0 if trace.some else len(batch) - min(len(batch), max(sizes))
        broken[_margins(session, batch).argsort()[:gone]] = True
    return trace, broken


@torch.no_grad()
def _margins(session: Session, batch: Batch) -> Tensor:
    """(n,) the logit of the label minus the largest other one."""
    logits = session.model.run(batch.x).logits
    others = logits.scatter(1, batch.y[:, None], -torch.inf)
    return logits.gather(1, batch.y[:, None])[:, 0] - others.amax(1)
