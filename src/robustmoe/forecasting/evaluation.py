"""The forecast of an evaluation: its attacks are made on a few images for a few seconds, and the survivors counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustmoe import memory
from robustmoe.analysis import wilson
from robustmoe.attacks import Attack, Surrogate, Threat, at_radius
from robustmoe.data import Batch
from robustmoe.evaluation import checks
from robustmoe.evaluation.attacked import Attacked, examples_of, predictions, rows_of
from robustmoe.evaluation.choosing import radii_of, spec_or_repr
from robustmoe.evaluation.engine import EXAMPLES, plan_of
from robustmoe.evaluation.fitting import fit
from robustmoe.evaluation.measuring import CURVE_LIMIT, chosen_attacks
from robustmoe.evaluation.session import Session
from robustmoe.forecasting.counting import counted
from robustmoe.forecasting.probing import Costs, Trace, costs_of, probed
from robustmoe.forecasting.timing import Seconds, Stopwatch
from robustmoe.records.forecast import Forecast, ForecastPart

FEWEST = 16
"""Images of a probe, at least: the share that survives is told by them."""

PASSES_SEEN = 0.2
"""Of an attack's passes, those that a probe has time for at least, on a network that is fast enough."""

CURVE_SHARE = 0.25
"""Of the time for the probes, what the curve takes."""


class ProbedStage(NamedTuple):
    """A part of an attack on all images. ``entering``: as many of them come to it; ``seen``: images of the probe that
    its share is told by, those that never came to it too; ``left``: share of the probe that stands behind it.
    """

    name: str
    trace: Trace
    entering: int
    seen: int
    left: float


@dataclass
class Probe:
    """The first images, what is known of them, and of the model. ``pace``: see `Trace.pace`, where it is known from
    more images than these.
    """

    session: Session
    batch: Batch
    costs: Costs
    right: Tensor
    judging: Seconds
    rows: Seconds
    pace: Seconds | None = None

    def attack(self, attack: Attack, budget: float) -> tuple[list[ProbedStage], Tensor]:
        """Each part of an attack on the images of the probe that the parts before it left, and which are broken."""
        session, n = self.session, len(self.batch)
        plan = plan_of(attack, session.output, session.images)
        broken = ~self.right if plan.suite else torch.zeros_like(self.right)
        stages = []
        parts = [stage for stage in plan.stages if stage.attack is not None]
        shares = [math.sqrt(1 + part.attack.queries(session.output)) for part in parts if part.attack is not None]
        for at, part in enumerate(parts):
            clock = Stopwatch(session.device)
            assert part.attack is not None
            some = torch.nonzero(~broken)[:, 0]
            entering = round(len(session.images) * (len(some) / n if len(some) else 0.5 / (n + 1)))
            size = min(session.options.batch_size, max(1, entering))
            together = max(1, round(session.options.batch_size * max(1, len(some)) / size))
            some_batch = self.batch[some]
            trace, lost = probed(
                session, part.attack, some_batch, part.name, together, budget * shares[at] / sum(shares[at:])
            )
            broken[some[lost]] = True
            stages.append(ProbedStage(part.name, trace, entering, n, 1 - float(broken.double().mean())))
            budget = max(0.0, budget - clock.read().main(session.device))
        return stages, broken

    def part(self, name: str, stage: ProbedStage, unit: str = "images") -> ForecastPart:
        """What a stage takes, its judging included, with the range that the size of the probe leaves."""
        images, batch_size = stage.entering, self.session.options.batch_size
        trace = stage.trace
        pace = self.pace or trace.pace(self.costs)
        likely = trace.scaled(self.costs, pace, images, batch_size) + self.judging * images
        most = trace.scaled(self.costs, pace, images, batch_size, unbroken=True) + self.judging * images
        low, high = 1.0, 1.0
        if stage.seen < len(self.session.images):  # else the probe is all there is
            share = min(1.0, trace.passes * trace.images / max(1, trace.likely) / stage.seen)
            ends = wilson(round(share * stage.seen), stage.seen)
            low, high = (min(1.0, ends[0] / share), max(1.0, ends[1] / share)) if share else (0.0, 2.0)
        return ForecastPart(
            name,
            images,
            unit,
            cpu=likely.cpu,
            wall=likely.wall,
            low=likely.cpu * low,
            high=max(likely.cpu, min(likely.cpu * high, most.cpu)),
            most=max(most.cpu, likely.cpu),
            passes=trace.passes,
            most_passes=trace.cost or None,
            left=stage.left,
        )


def forecast_evaluation(session: Session, threat: Threat, seconds: float, begun: Stopwatch) -> Forecast:
    """Returns the forecast of an evaluation, from about ``seconds`` of CPU time of its own work. ``threat``: of the
    default attacks; ``begun``: the clocks, since before the session was made.
    """
    device, n = session.device, len(session.images)
    memory.restart_peak(device)
    base = memory.held(device) or 0
    attacks = chosen_attacks(session, threat)
    fit(session, attacks)
    options = session.options
    climbed = session.surrogate(precision=options.precision)
    opened = begun.read()
    parts, probed_images = _measured(session, attacks, climbed, seconds)
    macs, uncounted = counted(session.model, tuple(session.probe.x.shape[1:]))
    return Forecast(
        job="evaluation",
        what=f"{session.about.run or session.about.model} on {n} images of {session.about.data}",
        device=str(device),
        threads=torch.get_num_threads(),
        batch_size=options.batch_size,
        parts=(opened.part("set-up", 1, "time"), *parts),
        peak=_peak(device, base, max(probed_images), min(options.batch_size, n)),
        room=memory.room(device),
        files=0,
        measured=begun.read().cpu,
        macs=macs,
        notes=(_note(min(probed_images), max(probed_images), n), *uncounted),
    )


def _measured(
    session: Session, attacks: Sequence[Attack], climbed: Surrogate, seconds: float
) -> tuple[list[ForecastPart], list[int]]:
    """All parts but the set-up, and the images that each attack was probed on."""
    options, n = session.options, len(session.images)
    costs = costs_of(session, climbed, min(options.batch_size, n), 0.2 * seconds)
    simple = [attack for attack in attacks if len(attack.parts(session.output)) == 1]
    for_curve = CURVE_SHARE if simple and options.curve != () and options.shard is None else 0.0
    share = 0.8 * seconds * (1 - for_curve) / len(attacks)
    parts, sizes, fixed, candidates = [], [], [], []
    for attack in attacks:
        probe = _probe(session, attack, costs, share)
        sizes.append(len(probe.batch))
        fixed.append(_fixed(session, attack))
        stages, lost = probe.attack(attack, share)
        parts += _parts_of(probe, attack, stages)
        if attack in simple and for_curve:
            candidates.append((attack, lost, stages[0].trace.pace(costs)))
    curve = _curve(session, candidates, costs, for_curve * 0.8 * seconds)
    each = max(fixed, key=lambda took: took.cpu)
    checked = (sum(fixed, Seconds()) + each * len(curve)).part("checks", len(fixed) + len(curve), "times")
    return [*parts, *curve, checked], sizes


def _parts_of(probe: Probe, attack: Attack, stages: Sequence[ProbedStage]) -> list[ForecastPart]:
    """The parts of an attack, its rows among them."""
    name, n = spec_or_repr(attack), len(probe.session.images)
    kind = name.partition("(")[0]
    parts = [probe.part(f"{kind}: {stage.name}" if stage.name else name, stage) for stage in stages]
    return [*parts, (probe.rows * n).part("its rows", n, "images")]


def _peak(device: torch.device, base: int, probe: int, batch: int) -> int | None:
    """The peak of batches of ``batch`` images, where that of ``probe`` images was seen: above ``base`` it grows with
    them.
    """
    peak = memory.peak(device)
    return peak if peak is None or probe >= batch else base + round((peak - base) * batch / probe)


def _probe(session: Session, attack: Attack, costs: Costs, budget: float) -> Probe:
    """As many of the first images as a part of the attack's passes can be made on in the time: most of the images that
    break do so early.
    """
    n, passes = len(session.images), attack.queries(session.output)
    each = costs[True].of_image * max(1, passes) / 3
    size = min(n, session.options.batch_size, max(FEWEST, int(budget / max(PASSES_SEEN * each, 1e-9))))
    batch = session.images.batch(list(range(size))).to(session.device)
    with torch.no_grad():
        session.model.run(batch.x)
        clock = Stopwatch(session.device)
        clean = session.model.run(batch.x)
        judged = Attacked(batch, batch.x, clean, clean)
        right = torch.tensor(predictions(clean), device=batch.y.device) == batch.y
    judging = clock.lap() * (2 / size)
    rows_of(session.model, judged)
    return Probe(session, batch, costs, right, judging, clock.lap() * (1 / size))


def _fixed(session: Session, attack: Attack) -> Seconds:
    """What each attack, and each radius of a curve, takes beside its images: the header, the checks before it, the
    look at the weights before and after, the images to look at.
    """
    clock = Stopwatch(session.device)
    session.attack_header(attack)
    checks.before(session.model, attack, session.probe, session.output, len(session.about.classes))
    for _ in range(3):
        checks.fingerprint(session.model)
    with torch.no_grad():
        clean = session.model.run(session.probe.x)
        done = Attacked(session.probe, session.probe.x, clean, clean)
        examples_of(done, rows_of(session.model, done), EXAMPLES)
    return clock.read()


def _curve(
    session: Session, candidates: Sequence[tuple[Attack, Tensor, Seconds]], costs: Costs, budget: float
) -> list[ForecastPart]:
    """The strongest of the simple attacks, given with the images of the probe that each breaks and its pace, at each
    radius of the curve on the images that no smaller radius broke.
    """
    if not candidates:
        return []
    options = session.options
    attack, lost, pace = max(candidates, key=lambda each: float(each[1].double().mean()))
    few = session.on(session.images.head(CURVE_LIMIT))
    radii = sorted(radii_of(attack.threat, options.curve), reverse=attack.finds_nearest)
    parts: list[ForecastPart] = []
    at_once = 1 if attack.finds_nearest else len(radii)
    probe = _probe(few, attack, costs, budget / max(1, at_once))
    size = min(len(probe.batch), len(lost))
    probe.batch, probe.right, probe.pace = probe.batch[:size], probe.right[:size], pace
    down = torch.zeros_like(probe.right)
    for at, eps in enumerate(radii):
        below = down | lost[:size] if eps > attack.threat.eps else down
        if at >= at_once:
            below = torch.ones_like(down)  # the largest radius tells all smaller ones
        entering = torch.nonzero(~below)[:, 0]
        images = round(len(few.images) * len(entering) / size)
        trace, gone = probed(
            few, at_radius(attack, eps), probe.batch[entering], "", options.batch_size, budget / len(radii)
        )
        down = below.clone()
        down[entering[gone]] = True
        stage = ProbedStage("", trace, images, size, 1 - float(down.double().mean()))
        part = probe.part(f"curve at {eps:.3g}", stage, "radius")
        rows = probe.rows * images
        parts.append(_more(part, rows))
    return parts


def _more(part: ForecastPart, seconds: Seconds) -> ForecastPart:
    return dataclasses.replace(
        part,
        cpu=part.cpu + seconds.cpu,
        wall=part.wall + seconds.wall,
        low=part.low + seconds.cpu,
        high=part.high + seconds.cpu,
        most=part.most + seconds.cpu,
    )


def _note(least: int, most: int, n: int) -> str:
    probe = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"How many images survive, and so are attacked on, is told by a probe: the first {probe} of {n}. The range is "
        "what so few images leave open (95 %); at most: if no image breaks. Images that are done are not taken off."
    )
