"""What a run folder keeps of a model: ``config.json`` and ``model.safetensors`` (to load anywhere), ``state.pt`` (to
go on training).

Every write is atomic: a run killed in the middle of one still has the file before it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robustmoe.errors import UserError, nearest
from robustmoe.models import RoutedModel, build_model
from robustmoe.models.pruned import reset_scores
from robustmoe.models.vit import ViTNetwork, resample_positions
from robustmoe.progress import note
from robustmoe.records import write_atomic


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


class _Source(NamedTuple):
    """Weights to start from: the ``file`` as it is written in messages, its tensors, and whether it came as a run."""

    file: Path
    weights: dict[str, Tensor]
    is_run: bool


def start_from(model: RoutedModel, init: str | Path) -> None:
    """Weights that training starts from into a fresh model; what they do not name stays as it is. Says with `note` what
    went where.

    ``init``: a run folder, a safetensors file (timm's names fit our `ViT`), or sources of parts of the model,
    "standard=runs/std, robust=runs/rt", a part being a module's path. Where a tensor's name is one of the model's (or
    the part's), it goes there. Where none is, the weights are of a network inside: they fill every submodule that has
    all of their names (``head.`` apart), such as each expert of an ensemble, all of which then start equal (as in
    sparse upcycling, Komatsuzaki et al. 2023), and both halves of a dual model. Routers are filled only where they are
    named as the part. A dense run's ``network.`` counts as such weights, and its normalisation goes with it.

    Of a file (not of a run), a ``head`` of another number of classes is left out, and position embeddings of a square
    grid are interpolated to the model's. Scores of pruned convolutions that are not given are made anew from the loaded
    weights. Raises UserError where a source cannot be read, a part is unknown or named twice, no tensor fits, a shape
    is another, or two sources differ in one tensor; the model is then as before.
    """
    own = model.state_dict()
    given: dict[str, Tensor] = {}
    origin: dict[int, tuple[str, Path]] = {}  # by memory: modules may be shared under several names
    for part, path in _sources(str(init)):
        source = _read_source(path)
        for name, value in _placed(model, own, part, source).items():
            key = own[name].data_ptr() if own[name].numel() else id(own[name])
            other, file = origin.setdefault(key, (name, source.file))
            if other in given and not torch.equal(given[other], value.to(given[other].dtype)):
                raise UserError(f"init: {file} and {source.file} both give {name!r}, and differ in it")
            given[name] = value.to(own[name].dtype)
    model.load_state_dict(given, strict=False)
    reset_scores(model, frozenset(given))


_PART = r"\s*[A-Za-z_][\w.]*\s*="


def _sources(init: str) -> list[tuple[str, Path]]:
    """(part, path) of each source; the part "" is the whole model."""
    if os.path.exists(init) or not re.match(_PART, init):
        return [("", Path(init))]
    found: dict[str, Path] = {}
    for piece in re.split(rf",(?={_PART})", init):
        part, path = (text.strip() for text in piece.split("=", 1))
        if not path:
            raise UserError(f"init: {part!r} has no source; expected {part}=RUN or {part}=FILE.safetensors")
        if part in found:
            raise UserError(f"init: the part {part!r} is named twice; expected each part once")
        found[part] = Path(path)
    return list(found.items())


def _read_source(path: Path) -> _Source:
    if path.is_file() or path.suffix == ".safetensors":
        return _Source(path, read_weights(path), False)
    read_config(path)
    return _Source(path / "model.safetensors", read_weights(path / "model.safetensors"), True)


def _placed(model: RoutedModel, own: dict[str, Tensor], part: str, source: _Source) -> dict[str, Tensor]:
    """The source's tensors under the names, in the model, that they go to."""
    inside = _submodule(model, part).state_dict()
    names = {name: name for name in source.weights if not name.startswith("normalise.")}
    if any(name in inside for name in names):
        targets = {_join(part, name): name for name in inside if name in source.weights}
        places = [part]
    else:
        if all(name.startswith("network.") for name in names):
            names = {_dense(name): name for name in names}
        places = _places(model, part, set(names), source.file)
        targets = {name: names[short] for place in places for name, short in _under(place, own) if short in names}
        targets |= _normalisation(own, places, source.weights)
    remarks: dict[str, None] = {}  # in order, each once
    fitted = {target: _fitted(model, target, name, source, own, remarks) for target, name in targets.items()}
    absent = [name for place in places for name, _ in _under(place, own) if name not in fitted]
    if absent:
        remarks[f"{len(absent)} tensors there are not in it, such as {absent[0]!r}"] = None
    note(f"init: {'; '.join([f'{source.file} into {_named(places)}', *remarks])}")
    return {target: value for target, value in fitted.items() if value is not None}


def _places(model: RoutedModel, part: str, names: set[str], file: Path) -> list[str]:
    """The submodules of the part that have all the names, those of a head apart; routers of models are left out."""
    needed = {name for name in names if not name.startswith("head.")} or names
    missing = {}
    for path, module in _submodule(model, part).named_modules():
        if not {"router", "routers", "mixer"} & set(path.split(".")):
            missing[_join(part, path)] = needed - module.state_dict().keys()
    places = [place for place, lacking in missing.items() if not lacking]
    if needed and places:
        return places
    whole, expected = f"part {part!r}" if part else "model", "expected the run of a model with the same layers"
    closest = min(missing, key=lambda place: len(missing[place]))
    lacking = missing[closest]
    if len(lacking) == len(needed):
        raise UserError(f"init: {file} has no tensor of the {whole}'s; {expected}")
    raise UserError(
        f"init: {file} fits nowhere in the {whole}: {_named([closest])} lacks {min(lacking)!r} ({len(lacking)} of "
        f"{len(needed)} names); {expected}"
    )


def _normalisation(own: dict[str, Tensor], places: list[str], weights: dict[str, Tensor]) -> dict[str, str]:
    """Where a run's normalisation goes: to what normalises the images of the modules that its network fills."""
    names = [name for name in weights if name.startswith("normalise.")]
    found: dict[str, str] = {}
    for place in places:
        parents = place.split(".")
        for length in range(len(parents), -1, -1):
            outer = ".".join(parents[:length])
            if any(_join(outer, name) in own for name in names):
                found |= {_join(outer, name): name for name in names if _join(outer, name) in own}
                break
    return found


def _fitted(
    model: RoutedModel, target: str, name: str, source: _Source, own: dict[str, Tensor], remarks: dict[str, None]
) -> Tensor | None:
    """The source's tensor ``name`` in the shape of the model's ``target``; None for a head that is left out."""
    value, place = source.weights[name], own[target]
    if value.shape == place.shape:
        return value
    owner_path, _, last = target.rpartition(".")
    if not source.is_run and _dense(name).startswith("head.") and value.shape[1:] == place.shape[1:]:
        remarks[f"but not its head of {len(value)} classes: that of {len(place)} stays as initialised"] = None
        return None
    if not source.is_run and last == "pos_embed" and value.ndim == 3 and value.shape[::2] == place.shape[::2]:
        owner = model.get_submodule(owner_path)
        if isinstance(owner, ViTNetwork):
            return _interpolated(value, owner.grid, f"init: {source.file}: {name!r}", remarks)
    if target.endswith("patch_embed.proj.weight") and value.shape[:2] == place.shape[:2]:
        raise UserError(
            f"init: {source.file}: {name!r} is for patches of {value.shape[-1]} pixels, the model's are of "
            f"{place.shape[-1]}; expected the same patch (for smaller images: resized(vit_small, size=224))"
        )
    raise UserError(
        f"init: {source.file}: {name!r} has shape {tuple(value.shape)}, the model's is {tuple(place.shape)}; expected "
        "the run of a model with the same layers"
    )


def _interpolated(value: Tensor, grid: tuple[int, int], said: str, remarks: dict[str, None]) -> Tensor:
    try:
        found = resample_positions(value, grid)
    except ValueError as error:
        raise UserError(f"{said}: {error}") from error
    side = math.isqrt(value.shape[1] - 1)
    remarks[f"pos_embed interpolated from {side} x {side} to {grid[0]} x {grid[1]} patches"] = None
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = {_outer(name) for name, _ in model.named_modules()}
        outer = _outer(path)
        while outer not in known:
            outer = _outer(outer)
        children = [_join(outer, name) for name, _ in model.get_submodule(outer).named_children()]
        raise UserError(f"init: the model has no part {path!r}; {nearest(path, children)}") from None


def _dense(name: str) -> str:
    """A tensor's name in the network of a dense run."""
    return name.removeprefix("network.")


def _outer(path: str) -> str:
    return path.rpartition(".")[0]


def _under(place: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """Of the names those of the place's tensors, and what they are called in it."""
    start = f"{place}." if place else ""
    return [(name, name.removeprefix(start)) for name in names if name.startswith(start)]


def _join(outer: str, name: str) -> str:
    return ".".join(filter(None, (outer, name)))


def _named(places: list[str]) -> str:
    return ", ".join(place or "the model" for place in places)


def read_config(run: Path) -> dict[str, Any]:
    """A run's ``config.json``. Raises UserError where the folder is not a run."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(
            f"{run}: not a run folder (it has no config.json); expected the folder that robustmoe train made"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: the file is damaged ({error}); expected the JSON that training wrote") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: the file is damaged (not a JSON object); expected the JSON that training wrote")
    missing = {"model", "num_classes", "image_shape", "mean", "std"} - set(config)
    if missing:
        raise UserError(
            f"{path}: the fields {sorted(missing)} are missing; expected the config.json that training wrote"
        )
    return config


def load_model(run: str | Path, device: str | torch.device = "cpu") -> RoutedModel:
    """The model of a run folder, in eval mode: the weights that were best on validation. Needs no model flags."""
    run = Path(run)
    config = read_config(run)
    shape = config["image_shape"]
    model = build_model(
        config["model"],
        config["num_classes"],
        (shape[0], shape[1], shape[2]),
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    path = run / "model.safetensors"
    load_weights(model, read_weights(path), path)
    return model.to(device)


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
