"""The tensors of files that other code wrote. Nothing in them is executed: a pickle is loaded by torch's own restricted
loader, or not at all.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.records.files import explained
from robustmoe.training.checkpoint import read_weights

KINDS = (
    "safetensors, torch's .pt, .pth and .pth.tar, numpy's .npz, flax's .msgpack, V-MoE's PREFIX.index with its "
    "PREFIX.data-00000-of-00004 files, Swin-MoE's FILE.pth.master with its FILE.pth.rank0 files"
)
DEPTH = 3
"""How deep in a file a group of weights may lie, such as checkpoint["state"]["model"]."""

Group = dict[str, Tensor]


def read_groups(path: str | Path) -> dict[str, Group]:
    """The groups of tensors of a file: everything in it as "", and each mapping inside by its name, such as
    "state_dict" or "ema". The names of nested mappings are joined by "/".

    Raises UserError for a file that is missing, damaged, of no kind that is known (`KINDS`), or that would have to be
    executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected weights: {KINDS}")
    with explained("read", path), path.open("rb") as file:
        start = file.read(16)
    groups = dict(_grouped(_reader(path, start)(path), ""))
    if not groups:
        raise UserError(f"{path} holds no tensors; expected weights: {KINDS}")
    return groups


def _reader(path: Path, start: bytes) -> Callable[[Path], Any]:
    if path.suffix == ".index":
        return _read_sharded
    if re.fullmatch(r"\.(master|rank\d+)", path.suffix):
        return _read_ranks
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        return read_weights
    if start.startswith(b"PK\x03\x04") and _is_npz(path):
        return _read_npz
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pickle
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return _read_msgpack
    raise UserError(f"{path} is no file of weights that is known; expected {KINDS}")


def _grouped(tree: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Group]]:
    """The tensors below ``tree``, and those of each mapping in it."""
    if not isinstance(tree, Mapping) or depth > DEPTH:
        return
    tensors = dict(_leaves(tree, ""))
    if tensors:
        yield name, tensors
    for key, inner in tree.items():
        yield from _grouped(inner, f"{name}/{key}" if name else str(key), depth + 1)


def _leaves(tree: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree.detach()
    elif isinstance(tree, Mapping) and depth < 64:
        for key, inner in tree.items():
            yield from _leaves(inner, f"{name}/{key}" if name else str(key), depth + 1)


# ------------------------------------------------------------------------------------------------ torch


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old formats; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for what it does not load
        wants = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if wants or "weights_only" in str(error) or "Unsupported" in str(error):
            what = f"{wants[1]!r}" if wants else "something else than tensors"
            raise UserError(
                f"{path} is a pickle that holds {what}; loading it could run code, so it was not. Where you trust it, "
                "write the tensors out in the code that made it: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(
            f"{path} is damaged ({str(error).partition(chr(10))[0]:.120}); expected a file of torch.save. Copy it again"
        ) from error


def _read_ranks(path: Path) -> Any:
    """What Swin-MoE's processes wrote: each its own experts, and one the rest (FILE.pth.master), joined by rank along
    the experts (Tutel's tensors of experts have these as their first dimension).
    """
    stem = path.with_suffix("")
    ranks = sorted(stem.parent.glob(f"{stem.name}.rank*"), key=lambda file: int(file.suffix.removeprefix(".rank")))
    numbers = [int(file.suffix.removeprefix(".rank")) for file in ranks]
    if numbers != list(range(len(ranks))) or not ranks:
        raise UserError(
            f"{stem}: the files of the processes are not whole: expected .rank0, .rank1, ...; got {numbers}"
        )
    parts = [_model_of(file) for file in ranks]
    master = stem.with_name(f"{stem.name}.master")
    whole = _model_of(master) if master.is_file() else {}
    for name in dict.fromkeys(name for part in parts for name in part):
        pieces = [part[name] for part in parts if name in part]
        if len(pieces) != len(parts):
            raise UserError(f"{stem}: only {len(pieces)} of {len(parts)} processes have {name!r}; copy all files again")
        shared = ".experts." not in name and all(torch.equal(piece, pieces[0]) for piece in pieces)
        whole[name] = pieces[0] if shared else torch.cat(pieces)
    return whole


def _model_of(path: Path) -> Group:
    groups = dict(_grouped(_read_pickle(path), ""))
    return groups.get("model") or groups.get("") or {}


# ------------------------------------------------------------------------------------------------ numpy and flax


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return _nested({name: _tensor(archive[name]) for name in archive.files})
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise UserError(f"{path} is damaged, or holds objects ({error}); expected an .npz of arrays") from error


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"params/a/b": x}`` as ``{"params": {"a": {"b": x}}}``."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split("/")
        place = tree
        for key in outer:
            inner = place.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name!r} lies inside another array")
            place = inner
        place[last] = value
    return tree


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"arrays of {array.dtype} are no weights")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


_NDARRAY, _COMPLEX, _SCALAR, _SHAPE, _SLICE, _SLICES, _INDEX = 1, 2, 3, 4, 5, 6, 8
"""Extension types: the first three are flax's (flax.serialization), the others V-MoE's (vmoe/checkpoints)."""
_CHUNKED, _SHARD = "__msgpack_chunked_array__", "__msgpack_array_chunk_a87ca2__"


def _read_msgpack(path: Path) -> Any:
    return _joined(_decoded(path))


def _decoded(path: Path) -> Any:
    try:
        with explained("read", path):
            content = path.read_bytes()
        return msgspec.msgpack.decode(content, ext_hook=_extension)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged ({error}); expected what flax.serialization wrote. Copy it again"
        ) from error


def _extension(code: int, content: memoryview) -> Any:
    if code in (_NDARRAY, _SCALAR):
        shape, kind, numbers = msgspec.msgpack.decode(content)
        return _array(tuple(shape), str(kind), numbers)
    inner = msgspec.msgpack.decode(content)
    if code == _SLICE:
        return _bounds(inner)
    if code == _SLICES:
        return [_bounds(msgspec.msgpack.decode(each)) for each in inner]
    if code == _INDEX:
        described, slices, shards = inner
        shape, kind = msgspec.msgpack.decode(described)[:2]
        kept = [[_bounds(msgspec.msgpack.decode(each)) for each in msgspec.msgpack.decode(every)] for every in slices]
        return _Place(tuple(shape), str(kind), kept, list(shards))
    return None  # shapes and complex numbers alone are no weights


def _bounds(inner: Any) -> slice:
    start, stop, step = inner
    if step not in (None, 1):
        raise ValueError(f"a slice of step {step}")
    return slice(start, stop)


def _array(shape: tuple[int, ...], kind: str, numbers: bytes) -> Tensor:
    dtype = torch.bfloat16 if kind == "bfloat16" else None
    if dtype is None:
        return _tensor(np.frombuffer(numbers, dtype=np.dtype(kind)).reshape(shape))
    return torch.frombuffer(bytearray(numbers), dtype=dtype).reshape(shape)


def _joined(tree: Any, depth: int = 0) -> Any:
    """The tree, in which arrays that flax cut into chunks are whole again."""
    if not isinstance(tree, dict) or depth > 64:
        return tree
    if _CHUNKED not in tree:
        return {key: _joined(inner, depth + 1) for key, inner in tree.items()}
    shape = [tree["shape"][str(place)] for place in range(len(tree["shape"]))]
    chunks = [tree["chunks"][str(place)] for place in range(len(tree["chunks"]))]
    return torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)


class _Place(msgspec.Struct):
    """Where an array of a sharded checkpoint lies: of which ``shape`` and ``kind``, and which of its ``slices`` is in
    which of the ``shards``.
    """

    shape: tuple[int, ...]
    kind: str
    slices: list[list[slice]]
    shards: list[int]


def _read_sharded(path: Path) -> Any:
    """V-MoE's checkpoints: an index, a tree of places, and files of chunks by the number of the leaf that they are of
    (vmoe/checkpoints/partitioned.py).
    """
    index = _decoded(path)
    if not isinstance(index, dict) or not {"shard_count", "index"} <= set(index):
        raise UserError(f"{path} is no index of a sharded checkpoint; expected what V-MoE's code wrote, or {KINDS}")
    leaves = list(_places(index["index"]))
    count, stem = int(index["shard_count"]), path.with_suffix("")
    files = [stem.with_name(f"{stem.name}.data-{shard:05d}-of-{count:05d}") for shard in range(count)]
    needed = sorted({shard for _, place in leaves for shard in place.shards})
    missing = [files[shard].name for shard in needed if shard >= count or not files[shard].is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its {count} data files are missing, such as {missing[0]}")
    whole = [torch.empty(place.shape, dtype=_dtype(place.kind)) for _, place in leaves]
    filled = [0] * len(whole)
    for shard in needed:
        _fill(files[shard], whole, filled)
    for (name, _), value, amount in zip(leaves, whole, filled):
        if amount != value.numel():
            raise UserError(f"{path}: {name!r} is not whole: {amount} of its {value.numel()} numbers are in the files")
    return _nested({name: value for (name, _), value in zip(leaves, whole)})


def _places(tree: Any, name: str = "") -> Iterator[tuple[str, _Place]]:
    """The leaves in the order of jax.tree_util, which sorts the keys of a mapping."""
    if isinstance(tree, _Place):
        yield name, tree
    elif isinstance(tree, dict):
        for key in sorted(tree):
            yield from _places(tree[key], f"{name}/{key}" if name else str(key))


def _dtype(kind: str) -> torch.dtype:
    if kind == "bfloat16":
        return torch.bfloat16
    return _tensor(np.empty(0, dtype=np.dtype(kind))).dtype


def _fill(file: Path, whole: list[Tensor], filled: list[int]) -> None:
    chunks = _decoded(file)
    if not isinstance(chunks, dict) or _SHARD not in chunks:
        raise UserError(f"{file} is no data file of a sharded checkpoint; copy it again")
    for key, pieces in chunks.items():
        if key == _SHARD:
            continue
        try:
            for flat, where in pieces:
                place = whole[int(key)][tuple(where)]
                place.copy_(torch.cat([part.flatten() for part in flat]).reshape(place.shape))
                filled[int(key)] += place.numel()
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(f"{file} is damaged (array {key}: {error}); copy it again") from error
