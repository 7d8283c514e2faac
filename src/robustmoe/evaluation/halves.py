"""The two halves of a blend: from two run folders, or one of a dual model; and the run folder of the blend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmoe import provenance
from robustmoe import spec as specs
from robustmoe.attacks import PGD
from robustmoe.errors import UserError
from robustmoe.evaluation.choosing import spec_or_repr
from robustmoe.models import Dual, DualModel, Sharpening, build_model
from robustmoe.models.dual import Mix
from robustmoe.records import contents, write_atomic
from robustmoe.training.checkpoint import load_weights, read_config, read_weights, run_weights, save_weights

DEFAULT_ALPHA = Dual.alpha


@dataclass(frozen=True)
class Halves:
    """What is blended. ``standard``, ``robust``: where the halves came from; ``spec``: of the dual model; ``config``:
    of the run that the rest is taken from (the robust one's); ``weights``: of both halves, by the dual model's names.
    """

    standard: str
    robust: str
    spec: Dual
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def model(self) -> str:
        """The dual model's spec, without its alpha."""
        return specs.text(replace(self.spec, alpha=DEFAULT_ALPHA))

    def build(self, device: torch.device) -> DualModel:
        """The dual model, in eval mode."""
        config = self.config
        channels, height, width = config["image_shape"]
        shape, means = (channels, height, width), (tuple(config["mean"]), tuple(config["std"]))
        model = build_model(self.spec, config["num_classes"], shape, *means)
        load_weights(model, self.weights, Path(self.robust))
        assert isinstance(model, DualModel)
        return model.to(device)


def halves_of(runs: Sequence[Path], mix: Mix | None, sharpen: Sharpening | None) -> Halves:
    """The halves of one run of a dual model, or of two runs, the standard one first. ``mix``, ``sharpen``: None for
    those of the dual run, else the defaults of `models.Dual`. UserError for runs that do not fit together.
    """
    halves = _of_dual_run(runs[0]) if len(runs) == 1 else _of_two_runs(*runs)
    spec = replace(halves.spec, mix=mix or halves.spec.mix, sharpen=sharpen or halves.spec.sharpen)
    return replace(halves, spec=spec)


def _of_dual_run(run: Path) -> Halves:
    config = read_config(run)
    spec = specs.build(config["model"], "model")
    if not isinstance(spec, Dual):
        raise UserError(
            f"{run} is of one model, {specs.text(spec)}, expected a dual model; or name two runs: robustmoe blend "
            "STANDARD ROBUST"
        )
    return Halves(f"{run}, standard", f"{run}, robust", spec, config, read_weights(run / "model.safetensors"))


def _of_two_runs(standard: Path, robust: Path) -> Halves:
    first, second = read_config(standard), read_config(robust)
    for field, words in (("data", "data"), ("num_classes", "classes"), ("image_shape", "images")):
        mine, other = (_plain(config.get(field)) for config in (first, second))
        if mine != other:
            raise UserError(
                f"{standard} and {robust} are of different {words}, {mine} and {other}; expected two runs of the same "
                "data, classes and image shape"
            )
    parts = [specs.build(config["model"], "model") for config in (first, second)]
    weights = {
        f"{half}.{name}": tensor
        for half, run in (("standard", standard), ("robust", robust))
        for name, tensor in run_weights(run).items()
    }
    kept = {name: value for name, value in second.items() if name not in ("method", "threat")}  # nothing trained both
    return Halves(str(standard), str(robust), Dual(parts[0], parts[1]), kept, weights)


def _plain(value: Any) -> str:
    return specs.canonical(value) if isinstance(value, str) else str(value)


def out_of(runs: Sequence[Path], out: str | Path | None) -> Path:
    """The blend's folder: ``out``, or runs/blend-… by the names of the runs. UserError where something else stands."""
    folder = Path(out) if out is not None else Path("runs") / "-".join(["blend", *(run.resolve().name for run in runs)])
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, not a run folder; choose another --out")
    if contents(folder):
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        if "halves" not in config:
            raise UserError(f"{str(folder)!r} is not empty, and no blend's; choose another --out")
    return folder


def write_run(folder: Path, halves: Halves, alpha: float | None, base: PGD, classes: Sequence[str]) -> None:
    """The blend at ``alpha`` (None: as the halves' run has it, else the default of `models.Dual`) as a run folder."""
    spec = halves.spec if alpha is None else replace(halves.spec, alpha=alpha)
    text = specs.text(spec)
    shared = ("data", "method", "threat", "num_classes", "image_shape", "mean", "std")
    config = {
        "model": text,
        "files": specs.files(text, halves.config.get("data")),
        "threat": specs.text(base.threat),
        **{name: halves.config[name] for name in shared if name in halves.config},
        "classes": list(classes),
        "attacks": halves.config.get("attacks") or [],
        "val_attack": spec_or_repr(base),
        "halves": {"standard": halves.standard, "robust": halves.robust},
        "versions": {**specs.packages(), **provenance.versions()},
        "commit": provenance.commit(),
        "command": provenance.command(),
    }
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    save_weights(folder / "model.safetensors", halves.weights, text)
