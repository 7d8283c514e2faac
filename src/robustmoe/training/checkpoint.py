"""What a run folder keeps of a model: ``config.json`` and ``model.safetensors`` (to load anywhere), ``state.pt`` (to
go on training).

Every write is atomic: a run killed in the middle of one still has the file before it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robustmoe import spec as specs
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.progress import note
from robustmoe.records import read_config, write_atomic


def save_weights(path: Path, state: dict[str, Tensor], spec: str) -> None:
    """The weights as safetensors, with the model's spec in the file's metadata (one entry: safetensors writes several
    in random order, and equal weights should be equal files).
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_atomic(path, safetensors.torch.save(plain, metadata={"model": spec}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is missing, a pickle, or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the weights of a run (model.safetensors), or another safetensors file"
        )
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            pickled = file.read(4).startswith((b"PK\x03\x04", b"\x80"))
        if pickled:
            raise UserError(
                f"{path}: this is a pickle (a file of torch.save), which could run code when loaded; expected "
                "safetensors. Convert it with safetensors.torch.save_file(state_dict, path)"
            ) from error
        raise UserError(
            f"{path}: the file is damaged ({error}); expected the safetensors file that training wrote. Copy it again, "
            "or train with --resume"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Every tensor into its place, exactly. Raises UserError naming the first that is missing, unknown or of another
    shape.
    """
    own = model.state_dict()
    problems = [f"{name!r} is missing" for name in own if name not in weights]
    problems += [f"{name!r} is not part of the model" for name in weights if name not in own]
    problems += [
        f"{name!r} has shape {tuple(weights[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise UserError(
            f"{source}: these are the weights of another architecture: {problems[0]} ({len(problems)} "
            "differences); check the run's config.json"
        )
    model.load_state_dict(weights)


def load_model(run: str | Path, device: str | torch.device = "cpu") -> RoutedModel:
    """The model of a run folder, in eval mode: the weights that were best on validation, or those that a model of a
    user's own brings. Needs no model flags.
    """
    run = Path(run)
    config = read_config(run)
    if "model" in (config.get("in_python") or ()):
        raise UserError(
            f"{run} was trained from a {config['model']} in Python, which no spec builds; expected the module itself: "
            "robustmoe.evaluate(model, x, y). A model is loaded where it is a spec, such as my_file.py:make_model"
        )
    shape = config["image_shape"]
    model = build_model(
        config["model"],
        config["num_classes"],
        (shape[0], shape[1], shape[2]),
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    for file, now in specs.files(config["model"]).items():
        then = (config.get("files") or {}).get(file)
        if then not in (None, now):
            note(f"{run}: {file} has changed since the run was made (SHA-256 {then[:12]} then, {now[:12]} now)")
    if not config.get("brings_weights"):
        path = run / "model.safetensors"
        load_weights(model, read_weights(path), path)
    return model.to(device)


def run_data(run: str | Path, config: dict[str, Any]) -> Data:
    """The data set of a run folder. UserError where its classes are no longer those that the run was trained on; a note
    where its training images are not.
    """
    if "data" in (config.get("in_python") or ()):
        raise UserError(
            f"{run} was trained on images in Python, which no spec builds; expected a data set (robustmoe evaluate RUN "
            "--data SPEC), or robustmoe.evaluate(model, x, y)"
        )
    if config.get("data") is None:
        raise UserError(f"{run} does not say on which images it was trained; expected 'data' in its config.json")
    data: Data = specs.build(config["data"], "data")
    before, now = config.get("classes"), list(data.classes)
    if before is not None and before != now:
        odd = next((pair for pair in zip(before, now) if pair[0] != pair[1]), (len(before), len(now)))
        raise UserError(
            f"{run} was trained on other classes than {config['data']} has now (such as {odd[0]!r}, now {odd[1]!r}), "
            "so labels would mean others; restore them, or name another data set with --data"
        )
    if config.get("data_hash") not in (None, data.train.fingerprint):
        note(
            f"warning: the training images of {config['data']} have changed since {run} was trained; where test images "
            "are cut from the same folder, some may have been trained on"
        )
    return data


def run_weights(run: str | Path) -> dict[str, Tensor]:
    """The weights of a run folder, by name: of its file, or those that a model of a user's own brings."""
    path = Path(run)
    if read_config(path).get("brings_weights"):
        return load_model(path).state_dict()
    return read_weights(path / "model.safetensors")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of a training run: tensors, numbers, strings and containers of them only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """A state as `save_state` wrote it, loaded without running code. Raises UserError where it is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint to resume from; start the run without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimisers", "average", "rng", "progress"} - set(state)
        if missing:
            raise ValueError(f"{sorted(missing)} are missing")
        return state
    except Exception as error:  # torch raises many types for damaged files; all mean the same to the user
        raise UserError(
            f"{path}: the checkpoint is damaged ({type(error).__name__}); expected the file that "
            "training wrote. Start the run anew in another --out"
        ) from error
