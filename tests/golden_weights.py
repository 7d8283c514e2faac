"""Weights and images made of a seed, the same in any code and on any machine, and what other code answers to them: the
golden cases in ``tests/golden/fidelity``. Benchmarks that run the other code write the cases; a test reads them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "fidelity"

Range = tuple[float, float]


@dataclass(frozen=True)
class Drawn:
    """A tensor of the other code's: numbers drawn evenly between ``low`` and ``high``. Those of one ``key`` are copies
    of each other ("" stands for the tensor's own name).
    """

    shape: tuple[int, ...]
    low: float
    high: float
    key: str = ""


@dataclass(frozen=True)
class Case:
    """One net: in the other code its ``weights``, by their names there; here ``model``, which takes ``layout``.

    ``source``: the repository and commit that answered; ``inputs``: (mean, deviation) of what it does to the pixels
    first. ``logits`` (n, classes) are its answers to `images`; ``routes``: by router of ours, the experts it chose (n,
    items, k), in any order, -1 where a choice found no room; ``double``: both answered in float64.
    """

    layout: str
    model: str
    source: str
    image_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    n: int
    inputs: tuple[tuple[float, ...], tuple[float, ...]]
    weights: Mapping[str, Drawn]
    logits: list[list[float]]
    routes: Mapping[str, list[list[list[int]]]]
    double: bool = False

    def images(self) -> np.ndarray:
        """(n, ch, h, w), pixels in [0, 1], float32."""
        generator = np.random.default_rng([self.seed, 1])
        return generator.uniform(0, 1, (self.n, *self.image_shape)).astype(np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights, float32, by the other code's names."""
        return {name: draw(self.seed, each.key or name, each) for name, each in self.weights.items()}


def draw(seed: int, key: str, drawn: Drawn) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(key.encode())])
    return generator.uniform(drawn.low, drawn.high, drawn.shape).astype(np.float32)


def drawn(shapes: Mapping[str, tuple[int, ...]], rule: Callable[[str, tuple[int, ...]], Range]) -> dict[str, Drawn]:
    """A draw for each tensor, between the bounds that ``rule`` gives for its name and shape."""
    return {name: Drawn(tuple(shape), *rule(name, tuple(shape))) for name, shape in shapes.items()}


def write_case(name: str, case: Case) -> Path:
    """Writes tests/golden/fidelity/NAME.json: numbers and names only."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    fields = {**asdict(case), "weights": {key: list(asdict(each).values()) for key, each in case.weights.items()}}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def read_case(path: Path) -> Case:
    fields = json.loads(path.read_text(encoding="utf-8"))
    weights = {name: Drawn(tuple(each[0]), *each[1:]) for name, each in fields["weights"].items()}
    mean, std = fields["inputs"]
    shape = tuple(fields["image_shape"])
    return Case(**{**fields, "weights": weights, "inputs": (tuple(mean), tuple(std)), "image_shape": shape})
