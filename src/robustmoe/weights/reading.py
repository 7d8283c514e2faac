"""The tensors of files that other code wrote. Nothing in them is executed: a pickle is loaded by torch's own restricted
loader, or not at all.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

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

MOST_PLACES = 100_000
"""Of mappings in a file; a small one can name its own parts again and again."""

UNPACKED, SLACK = 100, 1 << 24
"""How many times its size a packed file may unpack to, and so many bytes more: numbers hardly pack at all."""

Group = dict[str, Tensor]


def read_groups(path: str | Path) -> dict[str, Group]:
    """The groups of tensors of a file: everything in it as "", and each mapping inside by its name, such as
    "state_dict" or "ema". The names of nested mappings are joined by "/".

    Raises UserError for a file that is missing, damaged, of no kind that is known (`KINDS`), or that would have to be
    executed.
    """
    path = Path(path)
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "this is no regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; expected a file of weights: {KINDS}")
    with explained("read", path), path.open("rb") as file:
        start = file.read(16)
    with _whole(path):
        groups = _grouped(_reader(path, start)(path))
    if not groups:
        raise UserError(f"{path} holds no tensors; expected weights: {KINDS}")
    return groups


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turns what goes wrong within, while a file is taken apart, into a UserError that calls it damaged."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # parsers of seven formats raise many types; all mean the same to the user
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({why:.160}); copy it again, or write it anew") from error


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


def _grouped(tree: Any) -> dict[str, Group]:
    """The tensors of ``tree``, and those below each mapping in it. ValueError for two of the same name."""
    groups: dict[str, Group] = {}
    for outer, name, tensor in _leaves(tree):
        for depth in range(min(len(outer), DEPTH) + 1):
            inside = "/".join((*outer[depth:], name))
            if groups.setdefault("/".join(outer[:depth]), {}).setdefault(inside, tensor) is not tensor:
                raise ValueError(f"two of its tensors are called {inside!r}")
    return groups


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """Every tensor: the names of the mappings around it, and its own. No mapping is looked for within itself."""
    waiting: list[tuple[tuple[str, ...], frozenset[int], Any]] = [((), frozenset(), tree)]
    seen = 0
    while waiting:
        outer, around, place = waiting.pop()
        if not isinstance(place, Mapping) or id(place) in around or len(outer) > 64:
            continue
        inner = []
        for key, value in place.items():
            if isinstance(value, Tensor):
                yield outer, str(key), value.detach()
            elif isinstance(value, Mapping):
                inner.append(((*outer, str(key)), around | {id(place)}, value))
        seen += 1
        if seen > MOST_PLACES:
            raise ValueError(f"it holds more than {MOST_PLACES:,} mappings")
        waiting += reversed(inner)


# ------------------------------------------------------------------------------------------------ torch


def _read_pickle(path: Path) -> Any:
    _check_packed(path)
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
    rank = re.compile(re.escape(stem.name) + r"\.rank(\d+)")
    files = {file: int(match[1]) for file in stem.parent.iterdir() if (match := rank.fullmatch(file.name))}
    ranks = sorted(files, key=files.__getitem__)
    numbers = [files[file] for file in ranks]
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
        try:
            whole[name] = pieces[0] if shared else torch.cat(pieces)
        except RuntimeError as error:
            raise ValueError(f"the processes' pieces of {name!r} cannot be joined: {error}") from error
    return whole


def _model_of(path: Path) -> Group:
    with _whole(path):
        groups = _grouped(_read_pickle(path))
    return groups.get("model") or groups.get("") or {}


# ------------------------------------------------------------------------------------------------ numpy and flax


def _check_packed(path: Path) -> None:
    """UserError for an archive that unpacks to far more than weights could."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > UNPACKED * path.stat().st_size + SLACK:
        raise UserError(
            f"{path} would unpack to {size:,} bytes, more than {UNPACKED} times its size, as no weights do; it was "
            "left packed. Expected a file of numpy.savez or torch.save"
        )


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path) -> Any:
    _check_packed(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.infolist()
        return _nested((name.filename.removesuffix(".npy"), _tensor(_member(archive, name))) for name in names)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array as numpy.save wrote it; as many numbers as there are, whatever it claims, and never objects."""
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(member) as file:
        shape, by_columns, dtype = header[np.lib.format.read_magic(file)](file)
        content = file.read()
    if dtype.hasobject:
        raise ValueError("it holds objects; loading these could run code, so it was not")
    return np.frombuffer(content, dtype).reshape(_sides(shape), order="F" if by_columns else "C")


def _nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """``[("params/a/b", x)]`` as ``{"params": {"a": {"b": x}}}``."""
    tree: dict[str, Any] = {}
    for name, value in pairs:
        *outer, last = name.split("/")
        place = tree
        for key in outer:
            inner = place.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name!r} lies inside another array")
            place = inner
        if last in place:
            raise ValueError(f"two of its arrays are called {name!r}, or lie in each other")
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
    with explained("read", path):
        content = path.read_bytes()
    return msgspec.msgpack.decode(content, ext_hook=_extension)


def _extension(code: int, content: memoryview) -> Any:
    if code not in (_NDARRAY, _SCALAR, _SLICE, _SLICES, _INDEX):
        return None  # shapes and complex numbers alone are no weights
    if code in (_NDARRAY, _SCALAR):
        shape, kind, numbers = msgspec.msgpack.decode(content)
        return _array(tuple(shape), str(kind), numbers)
    inner = msgspec.msgpack.decode(content)
    if code == _SLICE:
        return _bounds(inner)
    if code == _SLICES:
        return [_bounds(msgspec.msgpack.decode(each)) for each in inner]
    described, _, shards = inner
    shape, kind = msgspec.msgpack.decode(described)[:2]
    return _Place(_sides(shape), str(kind), msgspec.convert(shards, list[_Count]))


def _bounds(inner: Any) -> slice:
    start, stop, step = inner
    if step not in (None, 1):
        raise ValueError(f"a slice of step {step}")
    return slice(start, stop)


def _array(shape: Sequence[int], kind: str, numbers: bytes) -> Tensor:
    if kind == "bfloat16":
        return _array(shape, "int16", numbers).view(torch.bfloat16)
    return _tensor(np.frombuffer(numbers, dtype=np.dtype(kind)).reshape(_sides(shape)))


_Count = Annotated[int, msgspec.Meta(ge=0)]


def _sides(shape: Any) -> tuple[int, ...]:
    return msgspec.convert(shape, tuple[_Count, ...])


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
    """Where an array of a sharded checkpoint lies: of which ``shape`` and ``kind``, and in which of the ``shards``."""

    shape: tuple[int, ...]
    kind: str
    shards: list[int]


def _read_sharded(path: Path) -> Any:
    """V-MoE's checkpoints: an index, a tree of places, and files of chunks by the number of the leaf that they are of
    (vmoe/checkpoints/partitioned.py).
    """
    index = _decoded(path)
    if not isinstance(index, dict) or not {"shard_count", "index"} <= set(index):
        raise UserError(f"{path} is no index of a sharded checkpoint; expected what V-MoE's code wrote, or {KINDS}")
    leaves = list(_places(index["index"]))
    count, stem = msgspec.convert(index["shard_count"], _Count), path.with_suffix("")
    needed = {shard for _, place in leaves for shard in place.shards}
    files = [stem.with_name(f"{stem.name}.data-{shard:05d}-of-{count:05d}") for shard in sorted(needed)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its {count} data files are missing, such as {missing[0]}")
    room = sum(file.stat().st_size for file in files)
    claimed = sum(math.prod(place.shape) * _dtype(place.kind).itemsize for _, place in leaves)
    if claimed > 2 * room:  # a shard that is a little short is named when it is read
        raise UserError(f"{path} is not whole: its arrays are of {claimed:,} bytes, its data files hold {room:,}")
    whole = [_unwritten(place) for _, place in leaves]
    filled = [0] * len(whole)
    for file in files:
        with _whole(file):
            _fill(file, whole, filled)
    for (name, _), value, amount in zip(leaves, whole, filled):
        if amount != value.numel():
            raise UserError(f"{path}: {name!r} is not whole: {amount} of its {value.numel()} numbers are in the files")
    return _nested((name, value) for (name, _), value in zip(leaves, whole))


def _places(tree: Any, name: str = "") -> Iterator[tuple[str, _Place]]:
    """The leaves in the order of jax.tree_util, which sorts the keys of a mapping."""
    if isinstance(tree, _Place):
        yield name, tree
    elif isinstance(tree, dict):
        for key in sorted(tree):
            yield from _places(tree[key], f"{name}/{key}" if name else str(key))


def _unwritten(place: _Place) -> Tensor:
    """An array of NaN, or of zeros, so that what no piece writes is no number of another's."""
    dtype = _dtype(place.kind)
    return torch.full(place.shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)


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
        number = msgspec.convert(key, _Count, strict=False)
        for flat, where in pieces:
            place = whole[number][tuple(where)]
            place.copy_(torch.cat([part.flatten() for part in flat]).reshape(place.shape))
            filled[number] += place.numel()
