"""Readers of the published file formats: IDX, CIFAR's python archives, Hugging Face's parquet.

Each gives images (n, ch, h, w) uint8, labels (n,) int64. Whatever is wrong with a file is a `UserError` that names it.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import math
import pickle
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustmoe.arrays import as_labels
from robustmoe.data.kept import decoded
from robustmoe.data.reading import GIB, check_file, read_file, shown
from robustmoe.data.stream import decode_all
from robustmoe.errors import UserError

Arrays = tuple[Tensor, Tensor]

MOST_IMAGES = 1_000_000
"""More in one file than any of these data sets has: a size that is read is bounded before anything is allocated."""

# Published MD5 sums: of the archives at cs.toronto.edu/~kriz/cifar.html, of the files in torchvision/datasets/cifar.py.
MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


def _checked(path: Path, published: str) -> bytes:
    """Returns the bytes of a file, checked against the `MD5` of its published name."""
    content = read_file(path)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != MD5[published]:
        raise UserError(
            f"{path} has MD5 {digest}, expected {MD5[published]}: it is damaged, truncated or another file; "
            "download it again"
        )
    return content


# ---------------------------------------------------------------------------------------------------------------- IDX


def read_idx(folder: Path, name: str, each: tuple[int, ...]) -> Tensor:
    """Returns the unsigned bytes (n, *each) of the IDX file ``folder/name.gz`` or ``folder/name``: a magic number, the
    sizes, the values.

    Format: yann.lecun.com/exdb/mnist. The magic number, the sizes and the length are checked; there is no checksum in
    use.
    """
    path = folder / f"{name}.gz"
    if not path.exists():
        path = folder / name
    if not path.exists():
        raise UserError(
            f"{folder} holds neither {name}.gz nor {name}; give the folder of the four IDX files with root="
        )
    content = io.BytesIO(read_file(path))
    try:
        return _idx(gzip.GzipFile(fileobj=content) if path.suffix == ".gz" else content, path, each)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file ({e}); download it again") from e


def _idx(stream: io.BufferedIOBase, path: Path, each: tuple[int, ...]) -> Tensor:
    axes = 1 + len(each)
    start, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    head = stream.read(start)
    if len(head) < start:
        raise UserError(
            f"{path} holds {len(head)} bytes, expected at least {start}: it is truncated; download it again"
        )
    if head[:4] != magic:
        raise UserError(
            f"{path} starts with bytes {head[:4].hex()}, expected {magic.hex()} (IDX, unsigned bytes, {axes} axes); "
            "download it again"
        )
    sizes = [int(size) for size in np.frombuffer(head, ">u4", offset=4)]
    if tuple(sizes[1:]) != each or not 1 <= sizes[0] <= MOST_IMAGES:
        wanted = " x ".join(map(str, (f"1 to {MOST_IMAGES:,}", *each)))
        raise UserError(f"{path} declares {' x '.join(map(str, sizes))} bytes, expected {wanted}; download it again")
    want = math.prod(sizes)
    values = stream.read(want + 1)  # no further: what unpacks without end is not unpacked
    if len(values) != want:
        have = f"{start + len(values)}" if len(values) < want else f"more than {start + want}"
        raise UserError(
            f"{path} holds {have} bytes, expected {start + want} for the sizes {sizes} it declares; download it again"
        )
    return torch.from_numpy(np.frombuffer(values, np.uint8).reshape(sizes).copy())


# -------------------------------------------------------------------------------------------------------------- CIFAR


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays of plain values and nothing else: a pickle that names any other function is refused."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        return self.ALLOWED[module, name]


def _cifar_batch(content: bytes, source: str, label_key: str, num_classes: int) -> Arrays:
    try:
        entry = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as e:  # a damaged pickle can raise anything
        raise UserError(f"{source} is not a CIFAR batch ({e}); download it again") from e
    if not isinstance(entry, dict) or not {"data", label_key} <= entry.keys():
        raise UserError(
            f"{source} is not a CIFAR batch, expected a dict with 'data' and {label_key!r}; download it again"
        )
    data = entry["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        have = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"the images of {source} are {have}, expected uint8 (n, 3072); download it again")
    labels = as_labels(entry[label_key], len(data), num_classes, source)
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), labels


def read_cifar(
    path: Path, folder: str, splits: dict[str, list[str]], label_key: str, num_classes: int
) -> dict[str, Arrays]:
    """Returns the splits of CIFAR in its python version, from the .tar.gz or from the folder it unpacks to.

    ``splits`` maps a split to its batch files in order. MD5 sums are checked: of the archive, or of each unpacked
    file. Pickles are read by an unpickler that builds numpy arrays and refuses the rest.
    """
    if path.is_dir():
        content = {name: _checked(path / name, f"{folder}/{name}") for names in splits.values() for name in names}
    else:
        content = _members(path, folder, [name for names in splits.values() for name in names])
    out = {}
    for split, names in splits.items():
        parts = [_cifar_batch(content[name], f"{path}/{name}", label_key, num_classes) for name in names]
        out[split] = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return out


def _members(path: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Returns the named files of the archive, read in memory: nothing is unpacked to disk."""
    archive = _checked(path, "cifar-10-python.tar.gz" if folder == "cifar-10-batches-py" else "cifar-100-python.tar.gz")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            contents = {}
            for name in names:
                member = tar.extractfile(f"{folder}/{name}")
                if member is None:
                    raise KeyError(f"{folder}/{name} is not a file")
                contents[name] = member.read()
            return contents
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as e:
        raise UserError(f"{path} is not a whole archive of {folder} ({e}); download it again") from e


# ------------------------------------------------------------------------------------------------------------ parquet


def _table(path: Path, columns: list[tuple[str, ...]]) -> list[list[Any]]:
    """Returns the values of each column, which may have one of several names."""
    try:
        pq = importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        raise UserError(
            f"reading {path} needs pyarrow, which is not installed; run: pip install 'robustmoe[parquet]'"
        ) from e
    check_file(path, 4 * GIB)
    try:
        with pq.ParquetFile(path) as file:
            have, rows = file.schema_arrow.names, file.metadata.num_rows
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            if not 1 <= rows <= MOST_IMAGES or size > 4 * GIB:
                raise UserError(
                    f"{path} holds {rows:,} rows ({size:,} bytes unpacked), expected 1 to {MOST_IMAGES:,} (4 GiB)"
                )
            names = [next((name for name in either if name in have), "") for either in columns]
            for name, either in zip(names, columns):
                if not name:
                    raise UserError(f"{path} has columns {have}, expected one named {' or '.join(either)}")
            table = file.read(columns=names)
            return [table.column(name).to_pylist() for name in names]
    except UserError:
        raise
    except Exception as e:  # pyarrow's errors share no base of their own
        raise UserError(f"{path} is not a whole parquet file ({e}); download it again") from e


def _numbered(labels: list[Any], classes: tuple[str, ...], path: Path) -> list[Any]:
    """Labels as numbers: texts are numbers in digits, or names of ``classes``."""
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(labels)} rows of {path} have no label (the first is row {missing[0]}); "
            "add the labels, or remove these rows"
        )
    if not all(isinstance(label, str) for label in labels):
        return labels
    known = {name: number for number, name in enumerate(classes)}
    known |= {str(number): number for number in range(len(classes))}
    for row, label in enumerate(labels):
        if label not in known:
            raise UserError(
                f"the label of row {row} of {path} is {shown(label[:50])!r}, which is none of the {len(classes)} "
                f"classes ({classes[0]}, {classes[1]}, ...) and no number from 0 to {len(classes) - 1}"
            )
    return [known[label] for label in labels]


def _parquet(path: Path, label: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Arrays:
    images, labels = _table(path, [("img", "image"), (label,)])
    if any(not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes) for image in images):
        raise UserError(f"the images of {path} are not encoded files, expected a struct with 'bytes' in each row")
    y = as_labels(_numbered(labels, classes, path), len(images), len(classes), str(path))
    return decode_all(len(images), lambda i: (images[i]["bytes"], f"image {i} of {path}"), shape), y


def parquet_files(folder: Path, start: str = "") -> list[Path]:
    """Parquet files whose names begin with ``start``, in ``folder`` and at most two folders deeper, sorted."""
    return sorted(path for deeper in ("", "*/", "*/*/") for path in folder.glob(f"{deeper}{start}*.parquet"))


def read_parquet(folder: Path, label: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> dict[str, Arrays]:
    """Returns the splits train and test in Hugging Face's layout: train-*.parquet and test-*.parquet in ``folder`` or
    at most two folders deeper.

    Columns ``img`` or ``image`` (struct of ``bytes``, an encoded image of ``shape``) and ``label``: numbers, numbers
    in digits, or names of ``classes``. Only the structure is checked, for no checksum is published: the copy may be a
    recompressed one. Large files are decoded once (see `robustmoe.data.kept`).
    """
    out = {}
    for split in ("train", "test"):
        files = parquet_files(folder, f"{split}-")
        if not files:
            raise UserError(f"{folder} holds no {split}-*.parquet, expected both train-*.parquet and test-*.parquet")
        parts = [
            decoded(file, shape, len(classes), f"{label} {classes}", partial(_parquet, file, label, classes, shape))
            for file in files
        ]
        out[split] = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return out


def hub_folder(repo: str) -> Path:
    """Returns the parquet files of a Hugging Face data set, downloaded once into its cache."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as e:
        raise UserError(
            f"downloading {repo} needs huggingface_hub, which is not installed; run: pip install 'robustmoe[hub]', "
            "or give a folder or archive with root="
        ) from e
    try:
        return Path(hub.snapshot_download(repo, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as e:  # no network, refused, not found: each library below raises its own
        raise UserError(f"cannot download {repo} ({type(e).__name__}: {e}); give a folder or archive with root=") from e
