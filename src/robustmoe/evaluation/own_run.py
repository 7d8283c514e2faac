"""`own_run`: the run folder of a model that was not trained here. Every measurement takes it like a trained one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from robustmoe import provenance
from robustmoe import spec as specs
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.models import OwnModel
from robustmoe.records import contents, file_stem, write_atomic, writing
from robustmoe.training.checkpoint import read_config
from robustmoe.wrapping import WrappedSpec


def own_run(
    model: str, data: str, out: str | Path | None = None, more: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Makes the run folder of ``model``, a model of a user's own such as "my_file.py:make_model", on the data set
    ``data``; or returns the one that is there.

    ``out``: the folder (default: runs/ and the names of file and model). It holds the specs, the SHA-256 of the files
    and what the images are; the weights are those that the model brings whenever it is made. ``more``: entries of
    ``config.json``, such as the threat that measurements take by default. Raises UserError for a model of ours, which
    has no weights yet, and where the folder holds results of another model, file or data set.
    """
    model, data = specs.canonical(model), specs.canonical(data)
    if not isinstance(specs.build(model, "model"), OwnModel | WrappedSpec):
        raise UserError(
            f"{model} is a model without weights; expected one of your own that brings them, such as "
            "my_file.py:make_model, or a run folder: robustmoe train makes one"
        )
    folder = Path(out) if out is not None else default_folder(model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file, not a run folder; choose another --out")
    source: Data = specs.build(data, "data")
    config = {**_config(model, data, source), **more}
    with writing(folder):
        there = contents(folder)
        old = read_config(folder) if there else None
        if old is not None and "brings_weights" not in old:
            raise UserError(f"{str(folder)!r} holds something else than a model of your own; choose another --out")
        if old is not None and len(there) > 1:
            _check_same(folder, old, config)
        else:
            write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def default_folder(model: str) -> Path:
    """``dir/my_file.py:make_model(width=8)`` -> runs/my-file-make-model-width-8."""
    return Path("runs") / file_stem(re.sub(r"[^\s(,=\[]*?([^/\s(,=\[]+)\.py:", r"\1-", model))


def _config(model: str, data: str, source: Data) -> dict[str, Any]:
    return {
        "model": model,
        "data": data,
        "brings_weights": True,
        "files": specs.files(model, data),
        "num_classes": source.num_classes,
        "classes": list(source.classes),
        "image_shape": list(source.image_shape),
        "mean": list(source.mean),
        "std": list(source.std),
        "attacks": [],
        "versions": {**specs.packages(), **provenance.versions()},
        "commit": provenance.commit(),
        "command": provenance.command(),
    }


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in ("model", "data"):
        if old[name] != new[name]:
            raise UserError(
                f"{str(folder)!r} is of the {name} {old[name]}, this command says {new[name]}; choose another --out"
            )
    for path, now in new["files"].items():
        then = (old.get("files") or {}).get(path, "none")
        if then != now:
            raise UserError(
                f"{str(folder)!r} holds results of {path} of SHA-256 {then[:12]}, the file is now {now[:12]}; choose "
                "another --out, or delete the folder"
            )
