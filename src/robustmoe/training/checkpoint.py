"""What a run folder keeps of a model: ``config.json`` and ``model.safetensors`` (to load anywhere), ``state.pt`` (to
go on training).

Every write is atomic: a run killed in the middle of one still has the file before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
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
from robustmoe.records.files import explained
from robustmoe.records.weights import digest, is_whole, split
from robustmoe.runs import named


def save_weights(path: Path, state: dict[str, Tensor], spec: str) -> None:
    """The weights as safetensors, with the model's spec and the SHA-256 of all that they are in the file's metadata.
    Equal weights are equal files.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    header, start, content = split(safetensors.torch.save(plain, metadata={"model": spec}))
    header["__metadata__"]["sha256"] = digest(header, io.BytesIO(content[start:]))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, len(text).to_bytes(8, "little") + text + content[start:])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is missing, a pickle, or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the weights of a run (model.safetensors), or another safetensors file"
        )
    try:
        with explained("read", path):
            path.open("rb").close()
        weights = safetensors.torch.load_file(path)
        if not is_whole(path):
            raise ValueError("its SHA-256 is not the one that it was written with")
        return weights
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(10)
        pickled = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b'{"'  # a length may be 0x80 too
        if pickled:
            raise UserError(
                f"{path}: this is a pickle (a file of torch.save), which could run code when loaded; expected "
                "safetensors. Convert it with safetensors.torch.save_file(state_dict, path)"
            ) from error
        raise UserError(
            f"{path}: the file is damaged ({error}); expected the safetensors file that training wrote. Copy it again, "
            "or train anew"
        ) from error


def misfits(model: nn.Module, weights: Any) -> list[str]:
    """What of a state does not fit the model, in words: tensors missing, unknown, or of another shape or kind."""
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        return ["it holds something else than tensors"]
    return [
        *(f"{name!r} is missing" for name in own if name not in weights),
        *(f"{name!r} is not part of the model" for name in weights if name not in own),
        *(
            f"{name!r} has shape {tuple(weights[name].shape)}, the model's is {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
        *(
            f"{name!r} is of {weights[name].dtype}, the model's of {own[name].dtype}"
            for name in own
            if name in weights and other_kind(weights[name], own[name])
        ),
    ]


def other_kind(given: Tensor, own: Tensor) -> bool:
    """Whether one of them holds real numbers and the other truth values, whole or complex numbers, so that a copy would
    mean something else.
    """
    return given.is_floating_point() != own.is_floating_point()


def check_weights(model: nn.Module, weights: Any, source: Path) -> None:
    """Raises UserError naming the first tensor that does not fit the model (see `misfits`)."""
    problems = misfits(model, weights)
    if problems:
        raise UserError(
            f"{source}: these are the weights of another architecture: {problems[0]} ({len(problems)} "
            "differences); check the run's config.json"
        )


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Every tensor into its place, exactly. Raises UserError where one does not fit; the model is then as before."""
    check_weights(model, weights, source)
    model.load_state_dict(weights)


def load_model(run: str | Path, device: str | torch.device = "cpu") -> RoutedModel:
    """The model of a run folder, in eval mode: the weights that were best on validation, or those that a model of a
    user's own brings. Needs no model flags.
    """
    run = named(run)
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
    check_classes(run, config, data, "restore them, or name another data set with --data")
    if config.get("data_hash") not in (None, data.train.fingerprint):
        note(
            f"warning: the training images of {config['data']} have changed since {run} was trained; where test images "
            "are cut from the same folder, some may have been trained on"
        )
    return data


def check_classes(run: str | Path, config: Mapping[str, Any], data: Data, remedy: str) -> None:
    """UserError where the classes that a run was trained on are not those of its data set."""
    before, now = config.get("classes"), list(data.classes)
    if before is not None and before != now:
        odd = next((pair for pair in zip(before, now) if pair[0] != pair[1]), (len(before), len(now)))
        raise UserError(
            f"{run} was trained on other classes than {config.get('data')} has now (such as {odd[0]!r}, now "
            f"{odd[1]!r}), so labels would mean others; {remedy}"
        )


def run_weights(run: str | Path) -> dict[str, Tensor]:
    """The weights of a run folder, by name: of its file, or those that a model of a user's own brings."""
    path = Path(run)
    if read_config(path).get("brings_weights"):
        return load_model(path).state_dict()
    return read_weights(path / "model.safetensors")


_OF_ALL = {"rng", "progress", "run"}
_FIELDS = ({"model", "optimisers", "average", *_OF_ALL}, {"parts", "files", "averaged", *_OF_ALL})
"""Of a checkpoint in one file, and of one whose parts lie in a folder (`robustmoe.training.parted`)."""
_LATER = {"device_rng"}
"""Fields that older checkpoints do not have."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of a training run: tensors, numbers, strings and containers of them only. The file is what torch.save
    writes, after a line with its SHA-256.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, _signature(buffer.getbuffer()) + buffer.getbuffer())


def _signature(content: bytes | memoryview) -> bytes:
    return f"robustmoe state 1, sha256 {hashlib.sha256(content).hexdigest()}\n".encode()


def read_state(path: Path) -> dict[str, Any]:
    """A state as `save_state` wrote it, loaded without running code. Raises UserError where it is missing or is not, to
    the last bit, what was written.
    """
    if not path.is_file():
        what = "is not a regular file, or a link to none" if os.path.lexists(path) else "is not there"
        raise UserError(f"{path} {what}: no checkpoint to resume from; put it back, or start anew in another --out")
    with explained("read", path):
        content = path.read_bytes()
    start = len(_signature(b""))
    saved = memoryview(content)[start:]
    if content[:start] != _signature(saved):
        raise damaged(path, "its SHA-256 is not the one that it was written with")
    try:
        state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for what it does not load; all mean the same to the user
        raise damaged(path, type(error).__name__) from error
    if not isinstance(state, dict) or set(state) - _LATER not in _FIELDS:
        raise damaged(path, "it has not the fields of a checkpoint")
    return state


def damaged(path: Path, why: str) -> UserError:
    """What is said of a checkpoint that no run can go on from."""
    return UserError(
        f"{path}: the checkpoint is damaged ({why}); expected the file that training wrote. Start the run anew in "
        "another --out"
    )
