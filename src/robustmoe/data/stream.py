"""Image files decoded with pillow: one by one, many at once by a small pool of threads, or on demand (`Streamed`)."""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from robustmoe.data.base import Batch, ImageSet, InMemory, as_positions
from robustmoe.errors import UserError

_WORKERS = min(8, os.cpu_count() or 1)
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="robustmoe-decode")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _pixels(image: Image.Image, channels: int, name: str) -> Image.Image:
    """Decoded, in RGB or in grey. EXIF rotation is not applied and transparency is dropped."""
    if image.mode not in _EIGHT_BIT:
        raise UserError(f"{name} has pixels of mode {image.mode!r}, expected 8 bits a channel; convert the file")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _fit(image: Image.Image, h: int, w: int, zoom: float | None, name: str) -> Image.Image:
    """Returns the centre (h, w) of the image resized (bilinear, in proportion) to just cover ``zoom`` times (h, w)."""
    have_w, have_h = image.size
    if zoom is None:
        if (have_h, have_w) != (h, w):
            raise UserError(
                f"{name} is {have_h} x {have_w} pixels, expected {h} x {w}; "
                "resize it, or give a size= where one is taken"
            )
        return image
    cover_h, cover_w = round(h * zoom), round(w * zoom)
    if have_w * cover_h >= cover_w * have_h:  # wide: the height decides
        new_h, new_w = cover_h, max(cover_w, have_w * cover_h // have_h)
    else:
        new_h, new_w = max(cover_h, have_h * cover_w // have_w), cover_w
    if (new_h, new_w) != (have_h, have_w):
        image = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    left, top = round((new_w - w) / 2), round((new_h - h) / 2)
    return image if image.size == (w, h) else image.crop((left, top, left + w, top + h))


def decode(source: Path | bytes, name: str, shape: tuple[int, int, int], zoom: float | None = None) -> np.ndarray:
    """Decodes one image file, or its bytes, to uint8 (h, w, ch).

    ``shape`` is (ch, h, w). ``zoom`` None: the file must have that size. A number: the file is resized so that it
    just covers ``zoom`` times that size, and its centre is cut out (1: as much as fits; 256 / 224: ImageNet's
    custom). `UserError`, with ``name``, on a file that is missing, damaged, not an image or not 8 bits a channel.
    """
    ch, h, w = shape
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.asarray(_fit(_pixels(image, ch, name), h, w, zoom, name)).reshape(h, w, ch)
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"there is no image file {name}; restore it, or read the folder anew") from e
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise UserError(f"{name} cannot be read as an image ({e}); replace or remove the file") from e


def decode_all(
    count: int,
    source: Callable[[int], tuple[Path | bytes, str]],
    shape: tuple[int, int, int],
    zoom: float | None = None,
) -> UInt8[Tensor, "n ch h w"]:
    """``count`` images, decoded by a few threads, a contiguous run each. ``source(i)``: file or bytes, name."""
    ch, h, w = shape
    out = np.empty((count, h, w, ch), dtype=np.uint8)

    def run(places: range) -> None:
        for i in places:
            out[i] = decode(*source(i), shape, zoom)

    edges = [count * k // _WORKERS for k in range(_WORKERS + 1)]
    for done in [_pool().submit(run, range(a, b)) for a, b in itertools.pairwise(edges) if a < b]:
        done.result()
    return torch.from_numpy(out.transpose(0, 3, 1, 2).copy())


def image_size(path: Path) -> tuple[int, int]:
    """(h, w) of an image file, from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} cannot be read as an image ({e}); replace or remove the file") from e


class Streamed(ImageSet):
    """Image files, decoded when they are asked for.

    ``files`` are N paths relative to ``root``; ``shape`` is (ch, h, w), ch 1 (grey) or 3 (RGB); ``zoom`` is as in
    `decode`. A file that cannot be read raises `UserError` when its batch is made.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Int64[Tensor, " N"],
        shape: tuple[int, int, int],
        zoom: float | None = None,
        index: Int64[Tensor, " N"] | None = None,
    ) -> None:
        super().__init__(labels, index)
        self.root = root
        self.files = files
        self.zoom = zoom
        self._shape = shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._shape

    def _decoded(self, positions: list[int]) -> UInt8[Tensor, "n ch h w"]:
        def source(i: int) -> tuple[Path | bytes, str]:
            path = self.root / self.files[positions[i]]
            return path, str(path)

        return decode_all(len(positions), source, self._shape, self.zoom)

    def batch(self, positions: Int64[Tensor, " n"] | list[int]) -> Batch:
        where = as_positions(positions)
        x = self._decoded(where.tolist()).to(torch.float32).div_(255)
        return Batch(x, self.labels[where], self.index[where])

    def subset(self, positions: Int64[Tensor, " n"] | list[int]) -> Streamed:
        where = as_positions(positions)
        files = [self.files[i] for i in where.tolist()]
        return Streamed(self.root, files, self.labels[where], self._shape, self.zoom, self.index[where])

    def in_memory(self) -> InMemory:
        """Decodes all of it once, as uint8: N ch h w bytes."""
        return InMemory(self._decoded(list(range(len(self)))), self.labels, self.index)

    def _contents(self) -> Iterator[Any]:
        yield repr(self.zoom).encode()
        for file in self.files:
            try:
                size = (self.root / file).stat().st_size
            except OSError as e:
                raise UserError(
                    f"there is no image file {self.root / file}; restore it, or read the folder anew"
                ) from e
            yield f"{file}\0{size}\0".encode()
