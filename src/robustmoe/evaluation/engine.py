"""The engine of an evaluation: part by part, batch by batch, shared by the processes, taken up where it stopped.

An attack is a list of parts (`Attack.parts`). For each part in turn the images that are not broken yet, in the order
of the set, are cut into batches, as AutoAttack does (Croce and Hein 2020): the batches of a part depend on the
survivors of the part before and on the batch size, and on nothing else. So a killed evaluation that goes on, and one
that is shared by W processes (process r takes the batches r, r + W, ... of each part), do the very same batches and
write the very same rows. After each round of batches every process hears what the others found; the first alone writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from robustmoe import memory, records
from robustmoe.analysis import right, robust
from robustmoe.attacks import Attack
from robustmoe.attacks.base import part_noise
from robustmoe.attacks.together import room_for
from robustmoe.data import Batch, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import Attacked, attack_batch, clean_forward, examples_of, rows_of
from robustmoe.evaluation.meters import Clock, Meter
from robustmoe.evaluation.peers import Peers
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.progress import Pace, progress
from robustmoe.records import Example, Passed, Row, Writer
from robustmoe.records.types import CERTIFIED, CLEAN

EXAMPLES = 10
PACED = 2
"""Batches of an attack after which it is told how fast they are."""


# ------------------------------------------------------------------------------------------------ what is to be done


class WorkStage(NamedTuple):
    """One walk over the images left: an attack, or (None) one pass on the clean images. ``cost``: forward passes an
    image; ``final``: every image that comes here gets its row.
    """

    name: str
    attack: Attack | None
    cost: int
    final: bool


@dataclass(frozen=True)
class Plan:
    """The stages of one attack on one model. ``suite``: the images wrong from the start are not attacked, and one that
    no part breaks is returned as it was; a simple attack is asked about every image, and its answer is taken.
    ``certified``: images that are not attacked if they are right. ``seed``: of the noise.
    """

    stages: tuple[WorkStage, ...]
    suite: bool
    certified: frozenset[int]
    seed: int

    @property
    def parts(self) -> list[str]:
        """The names of a suite's attacks, for the header; [] for a simple attack."""
        return [stage.name for stage in self.stages if stage.attack is not None] if self.suite else []

    @property
    def certified_hash(self) -> str:
        """Returns the hash of the indices of the certified images, for the header; "" without any."""
        return hashlib.sha256(repr(sorted(self.certified)).encode()).hexdigest() if self.certified else ""


def plan_of(attack: Attack, output: Output, images: ImageSet, certified: Mapping[int, float] | None = None) -> Plan:
    """What to do for ``attack`` on a model that gave ``output``. ``certified``: index of an image -> radius, in the
    norm of the attack, up to which its prediction is proven to hold.
    """
    parts = attack.parts(output)
    names = [name for name, _ in parts]
    suite = names != [""]
    if suite and (not names or len(set(names)) < len(names) or {"", CLEAN, CERTIFIED} & set(names)):
        raise UserError(
            f"the parts of {type(attack).__name__} are named {names}; expected a name for each, all different, none of "
            f"them empty, {CLEAN!r} or {CERTIFIED!r}"
        )
    known = certified or {}
    safe = frozenset(i for i in images.index.tolist() if known.get(i, -1.0) >= attack.threat.eps)
    stages = [WorkStage(name, part, part.queries(output), i == len(parts)) for i, (name, part) in enumerate(parts, 1)]
    if suite or safe:
        stages.insert(0, WorkStage(CLEAN, None, 0, False))
    return Plan(tuple(stages), suite, safe, attack.seed)


# ------------------------------------------------------------------------------------------------ the work

Share = tuple[int, int]
"""Which share of how many, from 1."""


def in_share(n: int, batch_size: int, share: Share) -> list[int]:
    """The positions of the images, of a set of ``n``, that are in a share: whole batches in turn, so that a simple
    attack does the very batches that one machine would do.
    """
    number, of = share
    return [at for at in range(n) if at // batch_size % of == number - 1]


def assert_shared(n: int, batch_size: int, share: Share) -> None:
    """UserError where one of the shares, of this machine or another, has no image: they could not be merged."""
    batches = -(-n // batch_size)
    if share[1] > max(batches, 1):
        raise UserError(
            f"shard {share[0]}/{share[1]}: {n} images are {batches} {'batch' if batches == 1 else 'batches'} of "
            f"{batch_size}, so that not each of {share[1]} shards has an image; take fewer, or a smaller --batch-size"
        )


class BatchResult(NamedTuple):
    """What came out of one batch: rows, the images that are still to be attacked, images to look at, passes."""

    rows: list[Row]
    passed: list[Passed]
    examples: list[Example]
    queries: int


@dataclass
class Ledger:
    """What every process knows of the work done: ``survived``: for each image that has a row, whether it is robust;
    ``passed``: see `Writer`; ``show``: examples are still to be written.
    """

    survived: dict[int, bool] = field(default_factory=dict)
    passed: dict[str, set[int]] = field(default_factory=dict)
    queries: int = 0
    show: bool = True

    @classmethod
    def of(cls, writer: Writer, examples: Path) -> Ledger:
        """Returns the ledger of a file that is resumed."""
        rows = writer.result.rows
        show = not examples.exists() or not any(right(row) and row.part != CERTIFIED for row in rows)
        passed = {part: set(indices) for part, indices in writer.passed.items()}
        return cls({row.index: robust(row) for row in rows}, passed, writer.queries, show)

    def add(self, result: BatchResult) -> None:
        """Notes one batch more."""
        self.survived |= {row.index: robust(row) for row in result.rows}
        for passed in result.passed:
            self.passed.setdefault(passed.part, set()).add(passed.index)
        self.queries += result.queries
        self.show = self.show and not result.examples


@dataclass
class EvaluationWork:
    """One attack on one set of images. ``climbed`` is what the attack sees, ``model`` judges. ``wanted``: the images to
    look at, by index; None: any. ``share``: which of the set's batches are done here.
    """

    model: RoutedModel
    climbed: RoutedModel
    images: ImageSet
    plan: Plan
    batch_size: int
    device: torch.device
    meter: Meter
    wanted: frozenset[int] | None = None
    share: Share = (1, 1)

    @cached_property
    def here(self) -> list[tuple[int, int]]:
        """Position and index of the images that are to be done here."""
        index = self.images.index.tolist()
        return [(at, index[at]) for at in in_share(len(index), self.batch_size, self.share)]

    def left(self, stage: WorkStage, ledger: Ledger) -> list[int]:
        """The positions of the images that ``stage`` has still to do, in the order of the set (once all stages before
        it are done).
        """
        passed = ledger.passed.get(stage.name, ())
        chosen = None if self.plan.suite or stage.attack is not None else self.plan.certified
        return [
            position
            for position, index in self.here
            if index not in ledger.survived and index not in passed and (chosen is None or index in chosen)
        ]

    def ahead(self, ledger: Ledger, now: WorkStage) -> int:
        """Forward passes to come if no other image breaks, ``now`` being done."""
        later = self.plan.stages[self.plan.stages.index(now) :]
        return sum(stage.cost * len(self.left(stage, ledger)) for stage in later)

    def batch(self, stage: WorkStage, batch: Batch | None, show: bool) -> BatchResult | None:
        """One batch of one stage; None for None (this process has none in this round). ``show``: with images to look
        at, where the stage attacks.
        """
        if batch is None:
            return None
        show = show and stage.attack is not None
        before = self.meter.queries
        pieces, passed = self._clean(batch) if stage.attack is None else self._attack(stage, stage.attack, batch)
        rows, examples = [], []
        for done, part in pieces:
            rows.append(rows_of(self.model, done, part))
            examples += examples_of(done, rows[-1], EXAMPLES, self.wanted) if show else []
        left = [Passed(index, stage.name) for index in passed.batch.index.tolist()]
        queries = self.meter.queries - before
        return BatchResult([row for part_rows in rows for row in part_rows], left, examples[:EXAMPLES], queries)

    def _clean(self, batch: Batch) -> tuple[list[tuple[Attacked, str]], Attacked]:
        done = clean_forward(self.model, batch)
        certified = [index in self.plan.certified for index in batch.index.tolist()]
        safe = torch.tensor(certified, device=batch.y.device) & ~done.broken
        lost = done.broken & self.plan.suite
        return [(done.select(safe), CERTIFIED), (done.select(lost), CLEAN)], done.select(~safe & ~lost)

    def _attack(self, stage: WorkStage, attack: Attack, batch: Batch) -> tuple[list[tuple[Attacked, str]], Attacked]:
        noise = part_noise(Noise.of(batch.index, self.plan.seed), stage.name)
        with room_for(self.batch_size):
            done = attack_batch(self.model, attack, batch, noise, self.climbed)
        none = torch.zeros_like(done.broken)
        if not self.plan.suite:
            return [(done, "")], done.select(none)
        lost, kept = (done.select(done.broken), stage.name), done.select(~done.broken)
        return ([lost, (kept.unattacked(), "")], done.select(none)) if stage.final else ([lost], kept)


def run(work: EvaluationWork, ledger: Ledger, writer: Writer | None, peers: Peers, clock: Clock, name: str) -> None:
    """Does all that is left. ``writer`` is the first process's; ``clock``: what it read last is written already."""
    live = all(stage.cost for stage in work.plan.stages if stage.attack is not None)
    total = ledger.queries + work.ahead(ledger, work.plan.stages[0]) if live else len(work.here)
    with progress(total, name, unit="passes" if live else "images") as bar:
        bar.advance(ledger.queries if live else len(ledger.survived))
        work.meter.bar = bar if live else None
        first = next(stage for stage in work.plan.stages if stage.attack is not None)
        for stage in work.plan.stages:
            pace, stopwatch = Pace(PACED), Clock()
            for results, own in _rounds(work, stage, ledger, peers):
                peers.first(partial(_write, writer, results, ledger.show, clock.lap()))
                for result in results:
                    ledger.add(result)
                if live:
                    bar.advance(sum(result.queries for result in results) - own)  # the other processes'
                    bar.expect(ledger.queries + work.ahead(ledger, stage))
                else:
                    bar.advance(sum(len(result.rows) for result in results))
                pace.add(sum(len(result.rows) + len(result.passed) for result in results), stopwatch.lap())
                speed = _speed(work, stage, pace)
                bar.say(_progress_text(work.plan, ledger, len(work.here), stage) + speed)
                if pace.batches == PACED and stage == first:
                    bar.log()
    if ledger.show and writer is not None:
        records.write_examples(records.examples_path(writer.path), [])


def _rounds(
    work: EvaluationWork, stage: WorkStage, ledger: Ledger, peers: Peers
) -> Iterator[tuple[list[BatchResult], int]]:
    """The batches of a stage, one a process at a time: all their results, and the passes of this process's own."""
    chunks = torch.tensor(work.left(stage, ledger), dtype=torch.long).split(work.batch_size)
    chunks = tuple(chunk for chunk in chunks if len(chunk))
    mine = torch.tensor([p for c in chunks[peers.rank :: peers.world] for p in c.tolist()], dtype=torch.long)
    coming = batches(work.images, work.batch_size, mine, work.device)
    for _ in range(0, len(chunks), peers.world):
        before = work.meter.queries
        answers = peers.agree(lambda: work.batch(stage, next(coming, None), ledger.show))
        yield [answer for answer in answers if answer is not None], work.meter.queries - before


def _write(writer: Writer | None, results: Sequence[BatchResult], show: bool, seconds: float) -> None:
    """Writes the batches of one round, in their order; the time is the first one's."""
    if writer is None:
        return
    for result in results:
        if show and result.examples:
            records.write_examples(records.examples_path(writer.path), result.examples)
            show = False
        writer.write(result.rows, seconds, result.passed, result.queries)
        seconds = 0.0


def _speed(work: EvaluationWork, stage: WorkStage, pace: Pace) -> str:
    """How fast an attack is, once it is known, and the peak of memory."""
    if stage.attack is None or pace.rate is None:
        return ""
    return f", {pace.rate:.3g} images/s{memory.told(work.device)}"


def _progress_text(plan: Plan, ledger: Ledger, n: int, stage: WorkStage) -> str:
    """Where the work is: the part, and the robust accuracy so far (of a suite: of all images, only falling)."""
    lost = sum(not survives for survives in ledger.survived.values())
    seen = n if plan.suite else max(len(ledger.survived), 1)
    share = f"robust {100 * (seen - lost) / seen:.1f} %"
    if not plan.suite or stage.attack is None:
        return share if plan.suite or stage.attack is not None else ""
    return f"{stage.name} {plan.parts.index(stage.name) + 1}/{len(plan.parts)}, {share}"
