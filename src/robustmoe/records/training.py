"""What training, or a model of a user's own, leaves in a run folder: ``config.json``, and ``metrics.jsonl`` with a line
an epoch. Both are read as the plain objects that they are, after every field is found to be of its type and range.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from robustmoe.errors import UserError
from robustmoe.records.files import explained, parse_line, whole_lines
from robustmoe.records.typed import Count, Finite, Length, Positive, Radius, Share, build, parse
from robustmoe.records.types import Resumed

Side = Annotated[int, Meta(ge=1, le=65536)]
Channels = Annotated[list[Finite], Meta(min_length=1)]
NEEDED = ("model", "num_classes", "image_shape", "mean", "std")
"""Fields of ``config.json`` without which no model can be loaded."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """``config.json``: the recipe's fields, what is known of the images, and where the run was made. Not every run has
    all: see `training.parts.config_of`, `evaluation.own_run`, `evaluation.halves` and `weights.importing`."""

    kind: ClassVar[str] = "config"

    model: str | None = None
    data: str | None = None
    method: str | None = None
    optimizer: str | None = None
    schedule: str | None = None
    epochs: Positive | None = None
    batch_size: Positive | None = None
    augment: str | None = None
    inputs: str | None = None
    precision: str | None = None
    ema: Share | None = None
    recalibrate: str | None = None
    sharding: str | None = None
    clip: Length | None = None
    seed: Count | None = None
    init: str | None = None
    val_attack: str | None = None
    val_certifier: str | None = None
    val_limit: Positive | None = None
    checkpoint_every: Count | None = None
    device: str | None = None
    threads: Positive | None = None
    deterministic: bool | None = None
    compile: bool | None = None
    attacks: list[str] | None = None
    max_steps: Positive | None = None
    threat: str | None = None
    files: dict[str, str] | None = None
    in_python: list[str] | None = None
    num_classes: Annotated[int, Meta(ge=1, le=2**24)] | None = None
    classes: list[str] | None = None
    image_shape: Annotated[list[Side], Meta(min_length=3, max_length=3)] | None = None
    mean: Channels | None = None
    std: Annotated[list[Radius], Meta(min_length=1)] | None = None
    parameters: Count | None = None
    selection: str | None = None
    images: dict[str, Count] | None = None
    data_hash: str | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
    hardware: str | None = None
    processes: Positive | None = None
    command: str | None = None
    brings_weights: bool = False
    imported: dict[str, str] | None = None
    unwrapped: str | None = None
    halves: dict[str, str] | None = None
    resumed: list[Resumed] | None = None

    def problems(self) -> Iterator[str]:
        """Yields a normalisation that is not of the images' channels."""
        for name, column in (("mean", self.mean), ("std", self.std)):
            if column and self.image_shape and len(column) != self.image_shape[0]:
                yield f"field {name!r} has {len(column)} entries, expected {self.image_shape[0]}, one a channel"


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """What a line of ``metrics.jsonl`` says of a router; see `training.health.RouterLine`."""

    load: list[Share] | None = None
    entropy: float | None = None
    dead: list[Count] | None = None
    gap: float | None = None
    consistency: Share | None = None
    grad_norm: float | None = None
    moved: bool | None = None
    declared_fixed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A line of ``metrics.jsonl``; see `training.lines.EpochLine`."""

    epoch: Positive
    step: Count | None = None
    seconds: Length | None = None
    lr: dict[str, float] | None = None
    loss: dict[str, float] | None = None
    grad_norm: dict[str, float] | None = None
    train_accuracy: Share | None = None
    val_clean: Share | None = None
    val_robust: Share | None = None
    val_certified: Share | None = None
    val_n: Count | None = None
    routers: dict[str, RouterState] | None = None
    best: bool | None = None


def read_config(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a run's ``config.json``, of which a model can be loaded. UserError where the folder is not a run."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{run}: not a run folder (it has no config.json); expected the folder that robustmoe train or --model made"
        )
    config = read_some_config(path)
    missing = set(NEEDED) - {name for name, value in config.items() if value is not None}
    if missing:
        raise UserError(
            f"{path}: the fields {sorted(missing)} are missing; expected the config.json that training wrote"
        )
    return config


def read_some_config(path: Path) -> dict[str, Any]:
    """Returns what a ``config.json`` says, be it all that a run's does or not. UserError where the file is damaged."""
    with explained("read", path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; put back the config.json that training wrote")
        text = path.read_bytes()
    try:
        config = parse(text)
        if not isinstance(config, dict):
            raise UserError("not a JSON object")
        build(Config, config)
    except UserError as error:
        raise UserError(f"{path}: the file is damaged ({error}); expected the JSON that training wrote") from None
    return dict(config)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a ``metrics.jsonl``, without a half-written last one; none where there is no file. UserError
    names the line that is damaged, or that tells an epoch a second time."""
    path = Path(path)
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(whole_lines(path) if os.path.lexists(path) else [], 1):
        value = parse_line(line, path, number)
        try:
            epoch = build(Epoch, value).epoch
            if lines and epoch <= lines[-1]["epoch"]:
                raise UserError(f"epoch {epoch} comes after epoch {lines[-1]['epoch']}")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; delete that line or the file") from None
        lines.append(value)
    return lines
