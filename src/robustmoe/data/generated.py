"""Generated images beside the real ones: of every batch a share (Gowal et al. 2021; Rebuffi et al. 2021; Wang et al.
2023), read from the files that they publish.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from robustmoe.data.base import Batch, Data, ImageSet, as_positions
from robustmoe.data.reading import GIB, check_file, existing, shown
from robustmoe.errors import UserError
from robustmoe.noise import Noise

GENERATED = 104
"""The key of the draws of generated images, beside the seed and epoch of a training."""

FIRST = 2**40
"""The index of the first generated image: far from those of any real one."""

_MOST_BYTES, _AT_ONCE = 1024 * GIB, 16 * GIB


def generated(data: Data, file: str | Path, share: float = 0.7) -> Data:
    """``data`` of whose training batches a ``share`` are generated images, those of the .npz ``file``: arrays ``image``
    (N, h, w, ch) uint8 and ``label`` (N,). Validation and test stay real.

    An epoch has as many batches as without; of its real images it sees the rest of the share. Generated ones are drawn
    with replacement, by the seed, the epoch and their place in the batch order. An uncompressed file is not loaded, but
    read where it lies. UserError for what is no such file, or does not fit the data.
    """
    if not 0 < share < 1:
        raise UserError(f"share is {share}, expected a number between 0 and 1, both excluded, such as 0.7")
    path = existing(file, "give the .npz of generated images with file=")
    images, labels = (_array(path, name) for name in ("image", "label"))
    ch, h, w = data.image_shape
    if (
        images.dtype != np.uint8
        or images.shape[1:] != (h, w, ch)
        or labels.shape != images.shape[:1]
        or not len(images)
    ):
        raise UserError(
            f"{shown(str(path))} holds image {images.dtype} {images.shape} and label {labels.shape}; expected image "
            f"uint8 (N, {h}, {w}, {ch}) and label (N,)"
        )
    if labels.dtype.kind not in "iu" or not 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes:
        raise UserError(f"{shown(str(path))}: label must be integers from 0 to {data.num_classes - 1}")
    return dataclasses.replace(data, train=WithGenerated(data.train, images, labels, share))


class WithGenerated(ImageSet):
    """The images of ``real``, at positions below its length, and behind them generated ones, ``images`` (N, h, w, ch)
    uint8 with ``made`` (N,) labels. Its length, labels and index are those of the real ones.
    """

    def __init__(self, real: ImageSet, images: np.ndarray, made: np.ndarray, share: float) -> None:
        super().__init__(real.labels, real.index)
        self.real, self.images, self.made, self.share = real, images, made, share

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.real.image_shape

    def order(self, steps: int, batch_size: int, *key: int) -> Int64[Tensor, " n"]:
        """Returns the positions of an epoch's batches: of each the real images, then the generated ones."""
        count = min(batch_size - 1, max(1, round(self.share * batch_size)))
        real = self.real.order(steps, batch_size, *key).view(steps, batch_size)[:, count:]
        draws = Noise.of(torch.arange(steps * count), GENERATED, *key).bits()
        chosen = (draws & (2**62 - 1)) % len(self.images)
        return torch.cat([real, len(self) + chosen.view(steps, count)], 1).flatten()

    def batch(self, positions: Int64[Tensor, " n"] | list[int]) -> Batch:
        where = as_positions(positions)
        made = where >= len(self)
        x = torch.empty(len(where), *self.image_shape)
        y, index = torch.empty_like(where), torch.empty_like(where)
        if not bool(made.all()):
            real = self.real.batch(where[~made])
            x[~made], y[~made], index[~made] = real.x.cpu(), real.y.cpu(), real.index.cpu()
        places = where[made] - len(self)
        levels = np.ascontiguousarray(self.images[places.numpy()].transpose(0, 3, 1, 2))
        x[made] = torch.from_numpy(levels).float() / 255
        y[made] = torch.from_numpy(self.made[places.numpy()].astype(np.int64))
        index[made] = FIRST + places
        return Batch(x, y, index)

    def subset(self, positions: Int64[Tensor, " n"] | list[int]) -> ImageSet:
        """Returns a set of some of the real images alone."""
        return self.real.subset(positions)

    def glance(self) -> None:
        self.real.glance()

    def verify(self) -> None:
        self.real.verify()

    def _contents(self) -> Iterator[Any]:
        """Of the generated images their number, labels and share: they are too many to be hashed."""
        yield self.real.fingerprint.encode()
        yield repr((self.images.shape, self.share)).encode()
        yield np.ascontiguousarray(self.made, np.int64)


def _array(path: Path, name: str) -> np.ndarray:
    """Returns an array of an .npz: where it lies in the file, or loaded if it is compressed there."""
    check_file(path, _MOST_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                if member.file_size > _AT_ONCE:
                    raise UserError(
                        f"{shown(str(path))}: {name} is compressed and {member.file_size:,} bytes large; expected at "
                        f"most {_AT_ONCE:,}: write it again with numpy.savez"
                    )
                with archive.open(member) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
        return _mapped(path, member.header_offset, member.file_size)
    except KeyError:
        raise UserError(f"{shown(str(path))} has no array {name!r}; expected an .npz of image and label") from None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{shown(str(path))} is damaged, or no .npz of arrays ({error})") from error


def _mapped(path: Path, offset: int, size: int) -> np.ndarray:
    """Returns the array whose entry in the archive begins at ``offset``: 30 bytes, name, extra field, the array."""
    with open(path, "rb") as file:
        file.seek(offset)
        head = file.read(30)
        file.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), 1)
        begin = file.tell()
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        start = file.tell()
    if dtype.hasobject or by_columns or start - begin + dtype.itemsize * int(np.prod(shape, dtype=object)) != size:
        raise ValueError("an array of objects, of columns, or of another length than its header says")
    return np.memmap(path, dtype, "r", start, tuple(shape))
