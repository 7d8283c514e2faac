"""The engine of an evaluation: part by part, batch by batch, shared by the processes, taken up where it stopped.

An attack is a list of parts (`Attack.parts`). For each part in turn the images that are not broken yet, in the order
of the set, are cut into batches, as AutoAttack does (Croce and Hein 2020): the batches of a part depend on the
survivors of the part before and on the batch size, and on nothing else. So a killed evaluation that goes on, and one
that is shared by W processes (process r takes the batches r, r + W, ... of each part), do the very same batches and
write the very same rows. After each round of batches every process hears what the others found; the first alone writes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from robustmoe import distributed, records
from robustmoe.analysis import right, robust
from robustmoe.attacks import Attack
from robustmoe.attacks.base import part_noise
from robustmoe.data import Batch, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import Attacked, attack_batch, examples_of, look, rows_of
from robustmoe.models.base import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.progress import Bar, progress
from robustmoe.records import Example, Passed, Row, Writer

T = TypeVar("T")

CLEAN, CERTIFIED = "clean", "certified"
"""Parts of a row that are no attack: wrong from the start; covered by a certificate."""

EXAMPLES = 10
PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest batch of a round. (A peer that dies is noticed at once.)"""


# ------------------------------------------------------------------------------------------------ what is to be done


class Stage(NamedTuple):
    """One walk over the images left: an attack, or (None) a look at the clean images. ``cost``: forward passes an
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

    stages: tuple[Stage, ...]
    suite: bool
    certified: frozenset[int]
    seed: int

    @property
    def parts(self) -> list[str]:
        """The names of a suite's attacks, for the header; [] for a simple attack."""
        return [stage.name for stage in self.stages if stage.attack is not None] if self.suite else []

    @property
    def certified_hash(self) -> str:
        """Of the indices of the certified images, for the header; "" without any."""
        return hashlib.sha256(repr(sorted(self.certified)).encode()).hexdigest() if self.certified else ""


def plan(attack: Attack, output: Output, images: ImageSet, certified: Mapping[int, float] | None = None) -> Plan:
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
    stages = [Stage(name, part, part.queries(output), i == len(parts)) for i, (name, part) in enumerate(parts, 1)]
    if suite or safe:
        stages.insert(0, Stage(CLEAN, None, 0, False))
    return Plan(tuple(stages), suite, safe, attack.seed)


# ------------------------------------------------------------------------------------------------ who does it


class Peers:
    """The processes of one evaluation, made in each of them at the same time; alone, every call is about oneself.

    Objects travel over gloo, also beside nccl.
    """

    def __init__(self) -> None:
        self.rank, self.world = distributed.rank(), distributed.world()
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed.active() else None

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of the processes."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in each process; a `UserError` in one of them is raised in all."""
        value: T | None = None
        error: UserError | None = None
        try:
            value = work()
        except UserError as raised:
            error = raised
        answers = self.gather((value, None if error is None else str(error)))
        if error is not None:
            raise error
        for _, said in answers:
            if said is not None:
                raise UserError(said)
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def first(self, work: Callable[[], T]) -> T:
        """The first process alone does it; everyone gets what came out, or its `UserError`."""
        return self.agree(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


class Meter:
    """The passes an attack asks for, an image each; a gradient counts as 3. ``bar``, if it is set, shows them live."""

    def __init__(self) -> None:
        self.queries = 0
        self.bar: Bar[int] | None = None

    def on_pass(self, n: int, gradient: bool) -> None:
        """See `Surrogate`."""
        cost = n * (3 if gradient else 1)
        self.queries += cost
        if self.bar is not None:
            self.bar.advance(cost)


# ------------------------------------------------------------------------------------------------ the work


class Found(NamedTuple):
    """What came out of one batch: rows, the images that are still to be attacked, images to look at, passes."""

    rows: list[Row]
    passed: list[Passed]
    examples: list[Example]
    queries: int


@dataclass
class Ledger:
    """What every process knows of the work done: ``standing``: for each image that has a row, whether it is robust;
    ``passed``: see `Writer`; ``show``: examples are still to be written.
    """

    standing: dict[int, bool] = field(default_factory=dict)
    passed: dict[str, set[int]] = field(default_factory=dict)
    queries: int = 0
    show: bool = True

    @classmethod
    def of(cls, writer: Writer, examples: Path) -> Ledger:
        """Of a file that is taken up."""
        rows = writer.result.rows
        show = not examples.exists() or not any(right(row) and row.part != CERTIFIED for row in rows)
        passed = {part: set(indices) for part, indices in writer.passed.items()}
        return cls({row.index: robust(row) for row in rows}, passed, writer.queries, show)

    def add(self, found: Found) -> None:
        """One batch more."""
        self.standing |= {row.index: robust(row) for row in found.rows}
        for passed in found.passed:
            self.passed.setdefault(passed.part, set()).add(passed.index)
        self.queries += found.queries
        self.show = self.show and not found.examples


@dataclass
class Work:
    """One attack on one set of images. ``climbed`` is what the attack sees, ``model`` judges."""

    model: RoutedModel
    climbed: RoutedModel
    images: ImageSet
    plan: Plan
    batch_size: int
    device: torch.device
    meter: Meter

    def left(self, stage: Stage, ledger: Ledger) -> list[int]:
        """The positions of the images that ``stage`` has still to do, in the order of the set (once all stages before
        it are done).
        """
        passed = ledger.passed.get(stage.name, ())
        chosen = None if self.plan.suite or stage.attack is not None else self.plan.certified
        return [
            position
            for position, index in enumerate(self.images.index.tolist())
            if index not in ledger.standing and index not in passed and (chosen is None or index in chosen)
        ]

    def ahead(self, ledger: Ledger, now: Stage) -> int:
        """Forward passes to come if no other image breaks, ``now`` being done."""
        later = self.plan.stages[self.plan.stages.index(now) :]
        return sum(stage.cost * len(self.left(stage, ledger)) for stage in later)

    def batch(self, stage: Stage, batch: Batch | None, show: bool) -> Found | None:
        """One batch of one stage; None for None (this process has none in this round). ``show``: with images to look
        at, where the stage attacks.
        """
        if batch is None:
            return None
        show = show and stage.attack is not None
        before = self.meter.queries
        pieces, passed = self._look(batch) if stage.attack is None else self._attack(stage, stage.attack, batch)
        rows, examples = [], []
        for done, part in pieces:
            rows.append(rows_of(self.model, done, part))
            examples += examples_of(done, rows[-1], EXAMPLES) if show else []
        held = [Passed(index, stage.name) for index in passed.batch.index.tolist()]
        return Found([row for each in rows for row in each], held, examples[:EXAMPLES], self.meter.queries - before)

    def _look(self, batch: Batch) -> tuple[list[tuple[Attacked, str]], Attacked]:
        done = look(self.model, batch)
        held = [index in self.plan.certified for index in batch.index.tolist()]
        safe = torch.tensor(held, device=batch.y.device) & ~done.broken
        lost = done.broken & self.plan.suite
        return [(done.only(safe), CERTIFIED), (done.only(lost), CLEAN)], done.only(~safe & ~lost)

    def _attack(self, stage: Stage, attack: Attack, batch: Batch) -> tuple[list[tuple[Attacked, str]], Attacked]:
        noise = part_noise(Noise.of(batch.index, self.plan.seed), stage.name)
        done = attack_batch(self.model, attack, batch, noise, self.climbed)
        none = torch.zeros_like(done.broken)
        if not self.plan.suite:
            return [(done, "")], done.only(none)
        lost, kept = (done.only(done.broken), stage.name), done.only(~done.broken)
        return ([lost, (kept.as_they_were(), "")], done.only(none)) if stage.final else ([lost], kept)


def run(work: Work, ledger: Ledger, writer: Writer | None, peers: Peers, name: str, lap: float) -> float:
    """Do all that is left. ``writer`` is the first process's. ``lap``: `time.monotonic` when the clock was last read;
    gives when it was now.
    """
    stages = work.plan.stages
    live = all(stage.cost for stage in stages if stage.attack is not None)
    total = ledger.queries + work.ahead(ledger, stages[0]) if live else len(work.images)
    with progress(total, name, unit="passes" if live else "images") as bar:
        bar.advance(ledger.queries if live else len(ledger.standing))
        work.meter.bar = bar if live else None
        for number, stage in enumerate(stages):
            chunks = torch.tensor(work.left(stage, ledger), dtype=torch.long).split(work.batch_size)
            chunks = tuple(chunk for chunk in chunks if len(chunk))
            mine = torch.tensor([p for c in chunks[peers.rank :: peers.world] for p in c.tolist()], dtype=torch.long)
            coming = batches(work.images, work.batch_size, mine, work.device)
            for _ in range(0, len(chunks), peers.world):
                own = work.meter.queries
                answers = peers.agree(lambda s=stage, c=coming: work.batch(s, next(c, None), ledger.show))  # type: ignore[misc]
                own = work.meter.queries - own
                found = [answer for answer in answers if answer is not None]
                now = time.monotonic()
                peers.first(partial(_write, writer, found, ledger.show, now - lap))
                lap = now
                for each in found:
                    ledger.add(each)
                if live:
                    bar.advance(sum(each.queries for each in found) - own)  # the other processes'
                    bar.expect(ledger.queries + work.ahead(ledger, stage))
                else:
                    bar.advance(sum(len(each.rows) for each in found))
                bar.say(_standing(work.plan, ledger, len(work.images), number))
    if ledger.show and writer is not None:
        records.write_examples(records.examples_path(writer.path), [])
    return lap


def _write(writer: Writer | None, found: list[Found], show: bool, seconds: float) -> None:
    """The batches of one round, in their order; the time is the first one's."""
    if writer is None:
        return
    for each in found:
        if show and each.examples:
            records.write_examples(records.examples_path(writer.path), each.examples)
            show = False
        writer.write(each.rows, seconds, each.passed, each.queries)
        seconds = 0.0


def _standing(plan: Plan, ledger: Ledger, n: int, number: int) -> str:
    """Where the work stands: the part, and the robust accuracy so far (of a suite: of all images, only falling)."""
    lost = sum(not stands for stands in ledger.standing.values())
    seen = n if plan.suite else max(len(ledger.standing), 1)
    share = f"robust {100 * (seen - lost) / seen:.1f} %"
    stage = plan.stages[number]
    if not plan.suite or stage.attack is None:
        return share if plan.suite or stage.attack is not None else ""
    return f"{stage.name} {plan.parts.index(stage.name) + 1}/{len(plan.parts)}, {share}"
