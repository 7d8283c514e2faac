"""`export_run`: the weights of a run as a file that other code reads, in its own names and shapes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from robustmoe.errors import UserError, nearest
from robustmoe.records import read_config, write_atomic
from robustmoe.runs import named
from robustmoe.training.checkpoint import load_model
from robustmoe.weights.layouts import LAYOUTS
from robustmoe.weights.loading import is_normalisation, notes
from robustmoe.weights.onnx import write_onnx


def export_run(run: str | Path, out: str | Path, layout: str | None = None) -> str:
    """Writes the model of a run folder to the file ``out``; returns what was written, in words.

    By its ending: .safetensors, .pt, .pth and .npz hold the weights in the layout of other code (``layout``; by default
    that which they were imported in, else the model's own names); .onnx the model, which is compared with torch on 64
    images. Raises UserError where the file is there already, or the layout has no such model.
    """
    path = Path(out)
    if os.path.lexists(path):
        raise UserError(f"{path} is there already; choose another --out")
    if path.suffix != ".onnx" and path.suffix not in WRITERS:
        endings = ", ".join([*WRITERS, ".onnx"])
        raise UserError(f"{path}: expected an --out that ends in one of {endings}; without an ending it is a folder")
    if path.suffix == ".onnx" and layout is not None:
        raise UserError("an .onnx file holds the whole model, in no layout; leave --layout out")
    run = named(run)
    config = read_config(run)
    chosen = layout if layout is not None else (config.get("imported") or {}).get("layout", "own")
    if chosen not in LAYOUTS:
        raise UserError(f"there is no layout {chosen!r}; {nearest(chosen, LAYOUTS)}; say which as --layout")
    model = load_model(run)
    if path.suffix == ".onnx":
        channels, height, width = config["image_shape"]
        return write_onnx(model, path, (channels, height, width))
    tensors = written(model, chosen)
    write_atomic(path, WRITERS[path.suffix](tensors))
    lines = [f"{path}: {len(tensors)} tensors in the layout {chosen!r}"]
    if not any(map(is_normalisation, tensors)) and set(config["mean"]) | set(config["std"]) != {0.0, 1.0}:
        lines.append(f"note: not in it: the model takes (pixels - {config['mean']}) / {config['std']}")
    return "\n".join([*lines, *(f"note: {sentence}" for sentence in notes(model, chosen))])


def written(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """The model's tensors by the names, and in the shapes, of a layout. UserError where it has no such model."""
    state = model.state_dict()
    pairs = LAYOUTS[layout].pairs(model)
    if not pairs:
        raise UserError(f"the code of the layout {layout!r} has no such model; see robustmoe list layouts")
    lost = set(state) - {ours for pair in pairs for ours in pair.ours}
    if named := sorted(name for name in lost if not is_normalisation(name)):
        raise UserError(f"the layout {layout!r} has no place for {len(named)} tensors, such as {named[0]!r}")
    tensors: dict[str, Tensor] = {}
    for pair in (pair for pair in pairs if not pair.beside):
        values = pair.write([state[ours] for ours in pair.ours])
        tensors |= zip(pair.theirs, (value.detach().cpu().contiguous().clone() for value in values), strict=True)
    return tensors


def _torch_file(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _npz_file(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: value.numpy() for name, value in tensors.items()})
    return buffer.getvalue()


WRITERS: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    ".safetensors": safetensors.torch.save,
    ".pt": _torch_file,
    ".pth": _torch_file,
    ".npz": _npz_file,
}
"""By a file's ending."""
