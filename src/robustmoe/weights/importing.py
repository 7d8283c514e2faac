"""`import_run`: a run folder of weights that other code made. Every measurement takes it like a trained one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from robustmoe import provenance, records
from robustmoe import spec as specs
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.models import build_model
from robustmoe.models.base import ImageShape
from robustmoe.models.foreign import require_weights
from robustmoe.options import ImportOptions, Inputs, takes
from robustmoe.records.files import explained
from robustmoe.training.checkpoint import save_weights
from robustmoe.training.parts import fixed_pixels, pixels
from robustmoe.weights.layouts import LAYOUTS
from robustmoe.weights.loading import Loaded, is_normalisation, load_weights, put


class Imported(NamedTuple):
    """The run ``folder``, what was ``loaded`` into its model, and how this takes its images."""

    folder: Path
    loaded: Loaded
    inputs: Inputs

    def __repr__(self) -> str:
        return f"{self.loaded}\nimages: {self.inputs}\nrun folder: {self.folder}"


@takes(ImportOptions)
def import_run(file: str | Path, model: str, *, options: ImportOptions, out: str | Path) -> Imported:
    """Makes the run folder ``out`` of ``model``, a spec of this package's, with the weights in ``file``.

    Nothing in the file is executed. It is read in the layout that fits to the last tensor (`load_weights`), and its
    images go in as that code takes them, unless ``inputs`` says otherwise. Raises UserError where the file does not
    fit, or the folder holds something.
    """
    text = specs.canonical(model)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or records.contents(folder)):
        raise UserError(f"{str(folder)!r} is there already, and holds something; choose another --out")
    source: Data | None = None if options.data is None else specs.build(options.data, "data")
    shape, classes = _images(source, options)
    loaded = load_weights(build_model(text, classes, shape), file, options.layout, options.group, options.partial)
    inputs = options.inputs or LAYOUTS[loaded.fit.layout].inputs
    given = dict(loaded.fit.given)
    if options.inputs is None and "normalise.mean" in given:  # a file of ours says it itself
        mean, std = (tuple(given[f"normalise.{name}"].flatten().tolist()) for name in ("mean", "std"))
    else:
        mean, std = _pixels(inputs, source, shape[0])
        given = {name: value for name, value in given.items() if not is_normalisation(name)}
    network = build_model(text, classes, shape, mean, std)
    put(network, given)
    require_weights(network)
    config = {
        **_described(text, options, source),
        "num_classes": classes,
        "image_shape": list(shape),
        "mean": list(mean),
        "std": list(std),
        "imported": {**_read(Path(file), loaded), "inputs": inputs},
    }
    with records.writing(folder):
        save_weights(folder / "model.safetensors", network.state_dict(), text)
        records.write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return Imported(folder, loaded, inputs)


def _described(model: str, options: ImportOptions, source: Data | None) -> dict[str, Any]:
    return {
        "model": model,
        "data": None if options.data is None else specs.canonical(options.data),
        "files": specs.files(model, options.data),
        "classes": None if source is None else list(source.classes),
        "attacks": [],
        "versions": {**specs.packages(), **provenance.versions()},
        "commit": provenance.commit(),
        "command": provenance.command(),
    }


def _read(file: Path, loaded: Loaded) -> dict[str, str]:
    with explained("read", file), file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return {"file": file.name, "sha256": sha256, "layout": loaded.fit.layout, "under": loaded.fit.where()}


def _images(source: Data | None, options: ImportOptions) -> tuple[ImageShape, int]:
    if source is not None:
        return source.image_shape, source.num_classes
    assert options.image_shape is not None  # ImportOptions has seen to it
    assert options.classes is not None
    channels, height, width = map(int, options.image_shape)
    return (channels, height, width), options.classes


def _pixels(inputs: Inputs, source: Data | None, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if source is not None:
        return pixels(inputs, source)
    if inputs == "data":
        raise UserError(
            "nets of this layout take images normalised by their data set; expected --data, or --inputs raw or centred"
        )
    return fixed_pixels(inputs, channels)
