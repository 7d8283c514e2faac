"""What the studies share: arms x seeds trained and evaluated one after the other, and tables with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from robustmoe import analysis, records
from robustmoe import spec as specs
from robustmoe.attacks import build_attack
from robustmoe.evaluation import evaluate_run
from robustmoe.recipe import Recipe
from robustmoe.records import Evaluation
from robustmoe.training import train


@dataclass(frozen=True)
class Study:
    """``recipe(arm, seed)``; ``attacks(arm)``: name -> spec; ``beside``: those that are no part of the worst case.

    A run's folder is ``out``/ARM-SEED; whatever is finished there is not done again.
    """

    out: Path
    recipe: Callable[[str, int], Recipe]
    attacks: Callable[[str], dict[str, str]]
    beside: frozenset[str] = frozenset()

    def folder(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}-{seed}"

    def train(self, arms: Iterable[str], seeds: int) -> None:
        for seed, arm in _each(arms, seeds):
            folder = self.folder(arm, seed)
            train(self.recipe(arm, seed), folder, resume=(folder / "config.json").exists())

    def trained(self, arm: str, seed: int) -> bool:
        file = self.folder(arm, seed) / "metrics.jsonl"
        return file.exists() and len(records.read_jsonl(file)) == self.recipe(arm, seed).epochs

    def evaluate(self, arms: Iterable[str], seeds: int, limit: int) -> None:
        for seed, arm in _each(arms, seeds):
            if self.trained(arm, seed):
                attacks = tuple(self.attacks(arm).values())
                evaluate_run(self.folder(arm, seed), attacks=attacks, limit=limit, precision="fast", curve=())

    def files(self, arm: str, seed: int) -> dict[str, Evaluation]:
        """The rows by the attack's name in ``attacks``."""
        names = {specs.text(build_attack(text)): name for name, text in self.attacks(arm).items()}
        paths = sorted((self.folder(arm, seed) / "rows").glob("*.jsonl"))
        read = [records.read(path) for path in paths if "examples" not in path.name]
        return {names[file.header.attack]: file for file in read if file.header.attack in names}

    def inside(self, arm: str, seed: int) -> dict[str, Evaluation]:
        """The files of the worst case; {} where an attack is missing."""
        found = self.files(arm, seed)
        if set(found) != set(self.attacks(arm)):
            return {}
        return {name: file for name, file in found.items() if name not in self.beside}

    def survivors(self, arm: str, seed: int) -> dict[int, bool]:
        """Image -> right under every attack of the worst case."""
        tables = [{row.index: analysis.robust(row) for row in file.rows} for file in self.inside(arm, seed).values()]
        return {index: all(table[index] for table in tables) for index in tables[0]}

    def difference(self, left: str, right: str, seeds: int) -> str:
        """Of the worst cases, paired, in points: each seed's, the mean, and half of its 95 % interval, by t over the
        seeds and by the normal law over all pairs of images, taken as independent.
        """
        by_seed = []
        for seed in range(seeds):
            one, other = (self.survivors(arm, seed) for arm in (left, right))
            by_seed.append([100.0 * (one[index] - other[index]) for index in one])
        means = [statistics.mean(each) for each in by_seed]
        every = [value for each in by_seed for value in each]
        over_images = 1.96 * statistics.stdev(every) / len(every) ** 0.5
        over_seeds = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(means) / seeds**0.5 if seeds > 1 else float("nan")
        each = ", ".join(f"{mean:+.1f}" for mean in means)
        return f"| {left} - {right} | {each} | {statistics.mean(means):+.1f} | {over_seeds:.1f} | {over_images:.1f} |"

    def differences(self, pairs: Iterable[tuple[str, str]], seeds: int) -> list[str]:
        """The Markdown table of those pairs whose arms are whole."""
        whole = [p for p in pairs if all(self.inside(arm, seed) for arm in p for seed in range(seeds))]
        head = ["| worst case | by seed | mean | ± over seeds | ± over images |", "|---|---|---|---|---|"]
        return [*head, *(self.difference(*pair, seeds) for pair in whole)]


def _each(arms: Iterable[str], seeds: int) -> list[tuple[int, str]]:
    """Seed by seed, so that what there is after half the time can be compared."""
    every = list(arms)
    return [(seed, arm) for seed in range(seeds) for arm in every]


def table(columns: list[str], found: dict[str, list[dict[str, float]]]) -> list[str]:
    """A Markdown row an arm: mean ± standard deviation over the runs, of each column."""
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for arm, runs in found.items():
        if runs:
            cells = [spread([run[column] for run in runs if column in run]) for column in columns]
            lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
