"""Recipes side by side, each over its seeds, and paired on the images that all runs have seen."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from robustmoe.analysis import ImagesLeft, Paired, Rate, Spread, paired, paired_bootstrap, welch, worst_images
from robustmoe.errors import UserError
from robustmoe.options import several
from robustmoe.recipe import Recipe, said_by
from robustmoe.records import Evaluation
from robustmoe.reporting.collect import Group, RunView, collect
from robustmoe.reporting.grid import Entry, Grid, grid_html, grid_lines, wrapped
from robustmoe.reporting.words import plural, threat

SEED_ALONE = ("seed", "device", "threads", "checkpoint_every")
"""Fields of a recipe in which runs of one recipe may differ."""

Hits = Callable[[ImagesLeft], set[int]]
MEASURES: tuple[tuple[str, Hits], ...] = (("clean", lambda left: left.clean), ("worst case", lambda left: left.kept))


@dataclass(frozen=True)
class Trained:
    """One run: its attacks of the shared threat, and what they left of its images."""

    view: RunView
    group: Group
    left: ImagesLeft

    @property
    def seed(self) -> int | None:
        """Returns the seed it was trained with, where that is known."""
        return self.view.config.get("seed")

    def survivors(self, attack: str, images: set[int]) -> set[int] | None:
        """Returns which of the images one attack left; None where it has not seen them all."""
        results = dict(zip(self.group.names, self.group.results, strict=True))
        if attack not in results or not images <= {row.index for row in results[attack].rows}:
            return None
        return images & _left_by(results[attack]).kept


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe."""

    name: str
    runs: tuple[Trained, ...]

    def spread(self, hits: Hits, images: set[int]) -> Spread:
        """Returns the share of the images, one value a run."""
        return Spread(tuple(len(hits(run.left) & images) / len(images) for run in self.runs))

    @property
    def attacks(self) -> dict[str, None]:
        """Returns the attacks that every run has met, in the order of the first."""
        return {name: None for name in self.runs[0].group.names if all(name in run.group.names for run in self.runs)}


@dataclass(frozen=True)
class Difference:
    """What ``arm`` has more than ``base`` of one measure, as a share of the same images. ``images``: the 95 % interval
    over images (paired bootstrap, the trainings as they are). ``seeds``: over trainings (Welch); None for one training
    of either. ``pair``: both models image by image, where each recipe has one run.
    """

    arm: str
    base: str
    measure: str
    value: float
    images: tuple[float, float]
    seeds: tuple[float, float] | None
    pair: Paired | None

    @property
    def decided(self) -> bool:
        """Says whether 0 lies outside every interval that there is."""
        return all(low > 0 or high < 0 for low, high in (self.images, self.seeds or self.images))


@dataclass(frozen=True)
class RunComparison:
    """Recipes side by side: ``print`` it, or ``write`` it as a file. The first arm is what the others are compared
    with. ``images``: those that every run has seen; ``notes``: what to bear in mind.
    """

    arms: tuple[Arm, ...]
    images: frozenset[int]
    notes: tuple[str, ...]

    @property
    def setting(self) -> str:
        """Returns on what the numbers are."""
        header = self.arms[0].runs[0].group.results[0].header
        return (
            f"On the {plural(len(self.images), 'image')} of {header.data} ({header.split}) that all runs have seen, "
            f"{threat(header.norm, header.eps)}. Per cent; over several trainings the mean, its standard deviation, "
            "and Student's 95 % interval; of one training Wilson's, over images."
        )

    def differences(self) -> list[Difference]:
        """Returns each later arm minus the first, clean and in the worst case."""
        return [self._difference(arm, *measure) for arm in self.arms[1:] for measure in MEASURES]

    def _difference(self, arm: Arm, measure: str, hits: Hits) -> Difference:
        base = self.arms[0]
        columns = [[hits(run.left) for run in each.runs] for each in (base, arm)]
        first, second = ([sum(i in column for column in side) / len(side) for i in self.images] for side in columns)
        single = len(base.runs) == len(arm.runs) == 1
        return Difference(
            arm=arm.name,
            base=base.name,
            measure=measure,
            value=(sum(second) - sum(first)) / len(self.images),
            images=paired_bootstrap([b - a for a, b in zip(first, second, strict=True)]),
            seeds=welch(*(each.spread(hits, set(self.images)) for each in (base, arm))),
            pair=paired(map(bool, first), map(bool, second)) if single else None,
        )

    def verdicts(self) -> list[str]:
        """Returns what the differences in the worst case decide, a sentence each."""
        return [_verdict(each) for each in self.differences() if each.measure == "worst case"]

    def grids(self) -> list[Grid]:
        """Returns the tables: what each recipe keeps, and the differences to the first."""
        tables = [self._kept()]
        return [*tables, self._paired()] if len(self.arms) > 1 else tables

    def _kept(self) -> Grid:
        images = set(self.images)
        attacks = list(dict.fromkeys(name for arm in self.arms for name in arm.attacks))
        rows = []
        for arm in self.arms:
            doubted = any(not run.group.verdict.trusted for run in arm.runs)
            clean, worst = (_entry(arm.spread(hits, images), len(images)) for _, hits in MEASURES)
            each = [_of_attack(arm, attack, images) for attack in attacks]
            worst = (worst[0] + " †", worst[1]) if doubted else worst
            rows.append(((arm.name, _seeds(arm)), clean, *each, worst))
        return Grid("What each keeps", ("recipe", "clean", *attacks, "worst case"), tuple(rows))

    def _paired(self) -> Grid:
        rows = []
        for each in self.differences():
            seeds = "" if each.seeds is None else _points(each.seeds)
            p = "" if each.pair is None else f"{each.pair.p:.2g}"
            texts = (f"{each.arm}, {each.measure}", f"{100 * each.value:+.1f}", _points(each.images), seeds, p)
            rows.append(tuple((text, "") for text in texts))
        return Grid(
            f"Minus {self.arms[0].name}, in points, on the same images",
            ("recipe", "difference", "95 % over images", "95 % over seeds", "McNemar p"),
            tuple(rows),
            note="Over images: paired bootstrap, the trainings as they are. Over seeds: Welch.",
        )

    def __str__(self) -> str:
        lines = [*wrapped(self.setting), *(line for grid in self.grids() for line in grid_lines(grid)), ""]
        lines += [line for sentence in self.verdicts() for line in wrapped(sentence)]
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note, "note: "))]).rstrip()

    def _repr_html_(self) -> str:
        tables = "".join(grid_html(grid) for grid in self.grids())
        said = [*self.verdicts(), *(f"note: {note}" for note in self.notes)]
        return f"<p>{escape(self.setting)}</p>{tables}" + "".join(f"<p>{escape(line)}</p>" for line in said)

    def numbers(self) -> dict[str, object]:
        """Returns everything as plain JSON: each run's shares, and the differences."""
        images = set(self.images)
        arms = [
            {
                "name": arm.name,
                "runs": [{"run": str(run.view.folder), "seed": run.seed} for run in arm.runs],
                **{name: list(arm.spread(hits, images).values) for name, hits in MEASURES},
            }
            for arm in self.arms
        ]
        pairs = [{**dataclasses.asdict(each), "p": each.pair and each.pair.p} for each in self.differences()]
        return {
            "setting": self.setting,
            "images": len(images),
            "arms": arms,
            "differences": pairs,
            "notes": list(self.notes),
        }


def compare(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RunComparison:
    """Put runs side by side: those of one recipe, that differ in their seed alone, are one row; each later recipe is
    compared with the first, on the images that all have seen, at the threat that all were attacked with.

    UserError where a run was not attacked, where two hold the same weights, or where they share no images or threat."""
    views = collect(several(runs))
    groups = _shared(views)
    runs_ = [Trained(view, group, _left(group)) for view, group in zip(views, groups, strict=True)]
    hashes: dict[str, str] = {}
    for run in runs_:
        if twin := hashes.get(run.view.header.model_hash):
            raise UserError(f"{twin} and {run.view.folder} hold the same weights; name one of them")
        hashes[run.view.header.model_hash] = str(run.view.folder)
    images = frozenset.intersection(*(frozenset(run.left.seen) for run in runs_))
    if not images:
        raise UserError("these runs were attacked on no image in common; evaluate them with the same --limit")
    arms: dict[str, list[Trained]] = {}
    for run in runs_:
        arms.setdefault(_recipe(run.view), []).append(run)
    made = tuple(Arm(_name(members), tuple(members)) for members in arms.values())
    return RunComparison(made, images, tuple(_notes(made, len(images))))


def _shared(views: Sequence[RunView]) -> list[Group]:
    """Returns of each run its attacks of the first threat and images that all runs have."""

    def key(group: Group) -> tuple[object, ...]:
        header = group.results[0].header
        return header.data_hash, header.split, header.norm, header.eps

    for view in views:
        if not view.groups:
            raise UserError(f"{view.folder} was not attacked; `robustmoe evaluate {view.folder}` does that")
    tables = [{key(group): group for group in reversed(view.groups)} for view in views]
    for group in views[0].groups:
        if all(key(group) in table for table in tables):
            return [table[key(group)] for table in tables]
    told = [f"{view.name}: {view.header.data} ({view.header.split}), {_threats(view)}" for view in views]
    raise UserError(
        f"these runs share no data set and threat ({'; '.join(told)}); evaluate them with the same --attack"
    )


def _threats(view: RunView) -> str:
    return " and ".join(threat(group.worst.norm, group.worst.eps) for group in view.groups)


def _left(group: Group) -> ImagesLeft:
    return worst_images([(result.header, result.rows) for result in group.results])


def _left_by(result: Evaluation) -> ImagesLeft:
    return worst_images([(result.header, result.rows)])


def _recipe(view: RunView) -> str:
    """Returns what runs of one recipe have in common. A model of a user's own has no recipe: it stands for itself."""
    if not view.config.get("method"):
        return view.header.model_hash
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name not in SEED_ALONE]
    return json.dumps([*(said_by(view.config, name) for name in fields), view.config.get("files")], sort_keys=True)


def _name(runs: Sequence[Trained]) -> str:
    """Returns the name of the only folder; of several what their names have in common before the seed, else the
    first's."""
    names = {re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", Path(run.view.name).name) for run in runs}
    return names.pop() if len(runs) > 1 and len(names) == 1 and "" not in names else runs[0].view.name


def _seeds(arm: Arm) -> str:
    told = ", ".join("?" if run.seed is None else str(run.seed) for run in arm.runs)
    return f"seed{'' if len(arm.runs) == 1 else 's'} {told}"


def _entry(spread: Spread, n: int) -> Entry:
    if len(spread.values) == 1:
        rate = Rate(round(spread.mean * n), n)
        return f"{100 * rate.value:.1f}", _points(rate.interval)
    assert spread.interval is not None
    return f"{100 * spread.mean:.1f} ± {100 * spread.sd:.1f}", _points(spread.interval)


def _of_attack(arm: Arm, attack: str, images: set[int]) -> Entry:
    kept = [run.survivors(attack, images) for run in arm.runs]
    shares = tuple(len(each) / len(images) for each in kept if each is not None)
    return _entry(Spread(shares), len(images)) if len(shares) == len(kept) else ("", "")


def _points(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _verdict(each: Difference) -> str:
    if not each.decided:
        return f"Whether {each.arm} keeps more or less than {each.base} is not decided: 0 lies in an interval."
    more = "more" if each.value > 0 else "fewer"
    alone = "" if each.seeds is not None else " These are these trainings: of other seeds nothing is known."
    return f"{each.arm} keeps {100 * abs(each.value):.1f} points {more} than {each.base} in the worst case.{alone}"


def _notes(arms: Sequence[Arm], n: int) -> Iterator[str]:
    for run in (run for arm in arms for run in arm.runs):
        for doubt in (*run.group.verdict.failed, *run.group.verdict.incomplete)[:1]:
            yield f"the numbers of {run.view.name} cannot be quoted (†): {doubt}"
        if fewer := len(run.left.seen) - n:
            yield f"{plural(fewer, 'image')} of {run.view.name} left out: not all runs have seen them"
    for arm in arms[1:]:
        for more, less in ((arm, arms[0]), (arms[0], arm)):
            extra = [name for name in more.attacks if name not in less.attacks]
            if extra:
                yield (
                    f"not attacked alike: {more.name} met {plural(len(extra), 'attack')} that {less.name} did not "
                    f"({'; '.join(extra)}), and can only be lower for it"
                )
