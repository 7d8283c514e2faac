"""Checkpoints of a run whose model is spread over processes: each writes what it holds, with
torch.distributed.checkpoint, and any number of processes goes on from it.

``state.pt`` names the folder of the parts, and the SHA-256 of each file there. It is written last, and older parts go
afterwards, so a kill at any point leaves a whole checkpoint. The parts are safetensors: torch's own metadata would be a
pickle, which could run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robustmoe import distributed, generators
from robustmoe.errors import UserError
from robustmoe.records.files import explained
from robustmoe.training import checkpoint
from robustmoe.training.parts import RunParts

_FOLDER = re.compile(r"state-\d+-\d+")
_FILE = re.compile(r"[\w.-]+\.safetensors")


def save(parts: RunParts, out: Path, kept: Mapping[str, Any]) -> None:
    """Writes the checkpoint of all processes: the parts of the run's tensors, and what else is ``kept`` of it, with its
    "progress".
    """
    import torch.distributed.checkpoint as dcp

    progress = kept["progress"]
    folder = out / f"state-{progress['epoch']}-{progress['step']}"
    first = distributed.rank() == 0
    if first and folder.exists():
        shutil.rmtree(folder)  # half of it, left by a kill
    _meet()
    # Files take no channels-last weights, as one process has them.
    tensors = {name: value.contiguous() for name, value in _tensors(parts).items() if isinstance(value, Tensor)}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _maybe_alone():
            dcp.save(tensors, storage_writer=writer, no_dist=not distributed.active())
    except dcp.CheckpointException as error:  # what went wrong in any process, told to all
        ((why, _), *_) = error.failures.values()
        raise UserError(f"cannot write {folder}: {why}; the checkpoint before it is kept") from error
    _meet()
    if first:
        steps = 0 if parts.average is None else parts.average.steps
        files = {file.name: _digest(file) for file in sorted(folder.iterdir())}
        checkpoint.save_state(out / "state.pt", {**kept, "parts": folder.name, "files": files, "averaged": steps})
        for other in out.iterdir():
            if _FOLDER.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)


def check(saved: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless the parts that a ``state.pt`` names are there as they were written."""
    name, files = saved["parts"], saved["files"]
    if not isinstance(name, str) or not _FOLDER.fullmatch(name) or not isinstance(files, dict) or not files:
        raise checkpoint.damaged(path, "it names no parts")
    folder = path.parent / name
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    for file, digest in files.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file) or file not in there:
            raise checkpoint.damaged(folder, f"the file {str(file)[:80]!r} is missing")
        if _digest(folder / file) != digest:
            raise checkpoint.damaged(folder / file, "its SHA-256 is not the one that it was written with")
    if there != set(files):
        raise checkpoint.damaged(folder, "it holds files that no process wrote")


def restore(parts: RunParts, saved: Mapping[str, Any], path: Path) -> None:
    """Puts what was saved into the model, the optimisers, the averaged weights and torch's generator."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _tensors(parts)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    reader = dcp.HuggingFaceStorageReader(str(path.parent / saved["parts"]))
    try:
        with _maybe_alone():
            dcp.load(tensors, storage_reader=reader, no_dist=not distributed.active())
    except (dcp.CheckpointException, ValueError, KeyError, RuntimeError) as error:
        raise checkpoint.damaged(path, "its parts are not those of this model") from error
    state.update(tensors)
    parts.model.load_state_dict(_under("model.", state))
    for number, optimiser in enumerate(parts.optimisers):
        own = _under(f"optimiser{number}.", state)
        set_optimizer_state_dict(parts.model, optimiser, optim_state_dict=own, options=_flat())
    if parts.average is not None:
        parts.average.load_state_dict({"steps": saved["averaged"], "state": _under("average.", state)})
    torch.set_rng_state(saved["rng"])
    generators.go_on(parts.device, saved.get("device_rng"))


def _tensors(parts: RunParts) -> dict[str, Any]:
    """Everything of the run by name: the tensors of the model, the optimisers and the averaged weights, and the
    optimisers' numbers.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = {f"model.{name}": value for name, value in parts.model.state_dict().items()}
    for number, optimiser in enumerate(parts.optimisers):
        own = get_optimizer_state_dict(parts.model, optimiser, options=_flat())
        state |= {f"optimiser{number}.{name}": value for name, value in own.items()}
    if parts.average is not None:
        state |= {f"average.{name}": value for name, value in parts.average.state.items()}
    return state


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def _under(start: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _digest(file: Path) -> str:
    with explained("read", file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextlib.contextmanager
def _maybe_alone() -> Iterator[None]:
    """Without the warning that one process, which was said to be alone, is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _meet() -> None:
    if distributed.active():
        dist.barrier()
