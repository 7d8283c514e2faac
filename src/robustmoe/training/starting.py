"""What training starts from: weights of other runs and files, put where their names fit (a recipe's ``init``)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustmoe.errors import UserError, nearest
from robustmoe.models import RoutedModel
from robustmoe.models.pruned import reset_scores
from robustmoe.models.tokens import Experts
from robustmoe.models.vit import Positioned, resample_positions
from robustmoe.progress import note
from robustmoe.runs import named
from robustmoe.training.checkpoint import other_kind, read_weights, run_weights


class _Source(NamedTuple):
    """Weights to start from: the ``file`` as it is written in messages, its tensors, and whether it came as a run."""

    file: Path
    weights: dict[str, Tensor]
    is_run: bool


def start_from(model: RoutedModel, init: str | Path) -> None:
    """Weights that training starts from into a fresh model; what they do not name stays as it is. Says with `note` what
    went where.

    ``init``: a run folder, also zoo:NAME, a safetensors file (timm's names fit our `ViT`), or sources of parts,
    "standard=runs/std, robust=runs/rt", a part being a module's path. Where a tensor's name is one of the model's (or
    the part's), it goes there. Where none is, the weights are of a network inside: they fill every submodule that has
    all of their names (``head.`` apart), such as each expert of an ensemble, all of which then start equal (as in
    sparse upcycling, Komatsuzaki et al. 2023), and both halves of a dual model. `Experts` in shared tensors also
    go by the names of the layer in whose place they are, of which each then is a copy. Routers are filled only where
    they are named as the part. A dense run's ``network.`` counts as such weights, and its normalisation goes with it.

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
        return [("", named(init))]
    sources: dict[str, Path] = {}
    for piece in re.split(rf",(?={_PART})", init):
        part, path = (text.strip() for text in piece.split("=", 1))
        if not path:
            raise UserError(f"init: {part!r} has no source; expected {part}=RUN or {part}=FILE.safetensors")
        if part in sources:
            raise UserError(f"init: the part {part!r} is named twice; expected each part once")
        sources[part] = named(path)
    return list(sources.items())


def _read_source(path: Path) -> _Source:
    if path.is_file() or path.suffix == ".safetensors":
        return _Source(path, read_weights(path), False)
    return _Source(path / "model.safetensors", run_weights(path), True)


def _placed(model: RoutedModel, own: dict[str, Tensor], part: str, source: _Source) -> dict[str, Tensor]:
    """Returns the source's tensors under the names, in the model, that they go to."""
    _submodule(model, part)
    taken = _taken(model, own)
    names = {name: name for name in source.weights if not name.startswith("normalise.")}
    places, targets = [part], {}
    if any(_join(part, name) in taken for name in names):
        names = {name: name for name in source.weights}
    else:
        if all(name.startswith("network.") for name in names):
            names = {_dense(name): name for name in names}
        places = _places(model, taken, part, set(names), source.file)
        targets = _normalisation(own, places, source.weights)
    for place in places:
        targets |= {taken[name]: names[short] for name, short in _under(place, taken) if short in names}
    remarks: dict[str, None] = {}  # in order, each once
    fitted = {target: _fitted(model, target, name, source, own, remarks) for target, name in targets.items()}
    absent = [name for place in places for name, _ in _under(place, own) if name not in fitted]
    if absent:
        remarks[f"{len(absent)} tensors there are not in it, such as {absent[0]!r}"] = None
    note(f"init: {'; '.join([f'{source.file} into {_named(places)}', *remarks])}")
    return {target: value for target, value in fitted.items() if value is not None}


def _taken(model: RoutedModel, own: Iterable[str]) -> dict[str, str]:
    """Returns the names under which the model takes a tensor, and its tensor that each goes to: its own names, and for
    experts of tokens those of the MLP in whose place they are.
    """
    taken = {name: name for name in own}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            taken |= {_join(_outer(path), name): _join(path, tensor) for tensor, name in module.dense.items()}
    return taken


def _places(model: RoutedModel, taken: Iterable[str], part: str, names: set[str], file: Path) -> list[str]:
    """Returns the submodules of the part that have all the names, those of a head apart; routers of models are left
    out.
    """
    needed = {name for name in names if not name.startswith("head.")} or names
    missing = {}
    for path, _ in _submodule(model, part).named_modules():
        if not {"router", "routers", "mixer"} & set(path.split(".")):
            place = _join(part, path)
            missing[place] = needed - {short for _, short in _under(place, taken)}
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
    """Says where a run's normalisation goes: to what normalises the images of the modules that its network fills."""
    names = [name for name in weights if name.startswith("normalise.")]
    targets: dict[str, str] = {}
    for place in places:
        parents = place.split(".")
        for length in range(len(parents), -1, -1):
            outer = ".".join(parents[:length])
            if any(_join(outer, name) in own for name in names):
                targets |= {_join(outer, name): name for name in names if _join(outer, name) in own}
                break
    return targets


def _fitted(
    model: RoutedModel, target: str, name: str, source: _Source, own: dict[str, Tensor], remarks: dict[str, None]
) -> Tensor | None:
    """Returns the source's tensor ``name`` in the shape of the model's ``target``; None for a head that is left out."""
    value, place = source.weights[name], own[target]
    owner_path, _, last = target.rpartition(".")
    owner = model.get_submodule(owner_path)
    if other_kind(value, place):
        raise UserError(
            f"init: {source.file}: {name!r} is of {value.dtype}, the model's of {place.dtype}; expected numbers of "
            "the same kind (quantised weights: written out as float32)"
        )
    copied = isinstance(owner, Experts) and last in owner.dense and not name.endswith(last)
    if copied:
        place = place[0].t()
    if value.shape == place.shape:
        if not copied:
            return value
        remarks[f"each of the {len(own[target])} experts of {_outer(owner_path)} a copy of its MLP"] = None
        return value.t().expand(own[target].shape)
    if not source.is_run and _dense(name).startswith("head.") and value.shape[1:] == place.shape[1:]:
        remarks[f"but not its head of {len(value)} classes: that of {len(place)} stays as initialised"] = None
        return None
    positions = last == "pos_embed" and value.ndim == 3 and value.shape[::2] == place.shape[::2]
    if not source.is_run and positions and isinstance(owner, Positioned):
        return _interpolated(value, owner, f"init: {source.file}: {name!r}", remarks)
    if target.endswith("patch_embed.proj.weight") and value.shape[:2] == place.shape[:2]:
        raise UserError(
            f"init: {source.file}: {name!r} is for patches of {value.shape[-1]} pixels, the model's are of "
            f"{place.shape[-1]}; expected the same patch (for smaller images: resized(vit_small, size=224))"
        )
    raise UserError(
        f"init: {source.file}: {name!r} has shape {tuple(value.shape)}, the model's is {tuple(place.shape)}; expected "
        "the run of a model with the same layers"
    )


def _interpolated(value: Tensor, owner: Positioned, said: str, remarks: dict[str, None]) -> Tensor:
    grid = owner.grid
    try:
        resampled = resample_positions(value, grid, owner.prefix)
    except ValueError as error:
        raise UserError(f"{said}: {error}") from error
    side = math.isqrt(value.shape[1] - owner.prefix)
    remarks[f"pos_embed interpolated from {side} x {side} to {grid[0]} x {grid[1]} patches"] = None
    return resampled


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
    """Returns a tensor's name in the network of a dense run."""
    return name.removeprefix("network.")


def _outer(path: str) -> str:
    return path.rpartition(".")[0]


def _under(place: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns, of the names, those of the place's tensors, and what they are called in it."""
    start = f"{place}." if place else ""
    return [(name, name.removeprefix(start)) for name in names if name.startswith(start)]


def _join(outer: str, name: str) -> str:
    return ".".join(filter(None, (outer, name)))


def _named(places: list[str]) -> str:
    return ", ".join(place or "the model" for place in places)
