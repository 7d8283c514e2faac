"""Image files decoded with pillow: one by one, many at once by a small pool of threads, or on demand (`Streamed`)."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from robustmoe import distributed
from robustmoe.data.base import Batch, ImageSet, InMemory, as_positions
from robustmoe.data.reading import check_file, read_file, shown
from robustmoe.errors import UserError
from robustmoe.progress import progress

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""What pillow may take a file for, whatever its name is. It knows others, and hands some of them to other programs."""

MOST_PIXELS = 2**26
"""Of one image, as its header says: a small file can claim to be a huge image."""

_MOST_BYTES = 4 * MOST_PIXELS
_HEAD = 2**16
"""Bytes of a file in which its header is looked for first."""
_NAMED = 8
"""Files that are named where many cannot be used; all are counted."""
_A_LOT = 1024
_WORKERS = min(8, os.cpu_count() or 1)
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="robustmoe-decode")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _Misfit(Exception):
    """An image that can be read, but not be used."""


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image file or its bytes, its header read. `UserError`, with ``name``, on whatever is wrong with it inside."""
    content = source if isinstance(source, bytes) else read_file(source, _MOST_BYTES)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _Misfit(
                    f"is {image.height} x {image.width} pixels, expected {MOST_PIXELS:,} in all at most; resize it"
                )
            if image.mode not in _EIGHT_BIT:
                raise _Misfit(f"has pixels of mode {image.mode!r}, expected 8 bits a channel; convert the file")
            yield image
    except _Misfit as e:
        raise UserError(f"{name} {e}") from None
    except Exception as e:  # a damaged file can raise anything
        why = "it is no image of a kind that is read" if isinstance(e, Image.UnidentifiedImageError) else e
        raise UserError(f"{name} cannot be read as an image ({why}); replace or remove the file") from e


def _pixels(image: Image.Image, channels: int) -> Image.Image:
    """Decoded, in RGB or in grey. EXIF rotation is not applied and transparency is dropped."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _cover(image: Image.Image, h: int, w: int, zoom: float | None) -> tuple[int, int]:
    """(h, w) that the image is resized to, in proportion: it just covers ``zoom`` times (h, w)."""
    have_w, have_h = image.size
    if zoom is None:
        if (have_h, have_w) != (h, w):
            raise _Misfit(
                f"is {have_h} x {have_w} pixels, expected {h} x {w}; resize it, or give a size= where one is taken"
            )
        return h, w
    cover_h, cover_w = round(h * zoom), round(w * zoom)
    if have_w * cover_h >= cover_w * have_h:  # wide: the height decides
        new_h, new_w = cover_h, max(cover_w, have_w * cover_h // have_h)
    else:
        new_h, new_w = max(cover_h, have_h * cover_w // have_w), cover_w
    if new_h * new_w > MOST_PIXELS:
        raise _Misfit(f"is {have_h} x {have_w} pixels, too narrow to be cut to {h} x {w}; replace or remove the file")
    return new_h, new_w


def decode(source: Path | bytes, name: str, shape: tuple[int, int, int], zoom: float | None = None) -> np.ndarray:
    """Decodes one image file, or its bytes, to uint8 (h, w, ch): the first frame, where it has several.

    ``shape`` is (ch, h, w). ``zoom`` None: the file must have that size. A number: the file is resized (bilinear) so
    that it just covers ``zoom`` times that size, and its centre is cut out (1: as much as fits; 256 / 224: ImageNet's
    custom). `UserError`, with ``name``, on a file that is missing, damaged, not an image or not 8 bits a channel.
    """
    ch, h, w = shape
    with _opened(source, name) as image:
        new_h, new_w = _cover(image, h, w, zoom)
        fitted = _pixels(image, ch)
        if fitted.size != (new_w, new_h):
            fitted = fitted.resize((new_w, new_h), Image.Resampling.BILINEAR)
        left, top = round((new_w - w) / 2), round((new_h - h) / 2)
        if fitted.size != (w, h):
            fitted = fitted.crop((left, top, left + w, top + h))
        return np.asarray(fitted).reshape(h, w, ch)


def verify(path: Path, shape: tuple[int, int, int], zoom: float | None = None) -> None:
    """`UserError` where `decode` has one. A JPEG is decoded at an eighth of its size: all of it is read, in a third of
    the time.
    """
    _, h, w = shape
    with _opened(path, shown(str(path))) as image:
        _cover(image, h, w, zoom)
        image.draft("L", (image.width // 8, image.height // 8))
        image.load()


def glance(path: Path, shape: tuple[int, int, int], zoom: float | None = None) -> None:
    """`UserError` where `verify` has one of what the header says: no image, another size, not 8 bits a channel. Of most
    files 64 KB are read, and nothing is decoded: a tenth of the time.
    """
    _, h, w = shape
    name = shown(str(path))
    try:
        with _opened(read_file(path, _MOST_BYTES, _HEAD), name) as image:
            _cover(image, h, w, zoom)
    except UserError:  # the header may be longer, or the first bytes alone be taken for another kind
        with _opened(path, name) as image:
            _cover(image, h, w, zoom)


def _failures(items: Sequence[T], work: Callable[[T], None]) -> list[tuple[T, UserError]]:
    """Does ``work`` on each item by a few threads, and returns those for which it raised a `UserError`."""
    bad: list[tuple[T, UserError]] = []

    def tried(item: T) -> None:
        try:
            work(item)
        except UserError as error:
            bad.append((item, error))

    _for_each(items, tried)
    return bad


def _for_each(items: Sequence[T], work: Callable[[T], None]) -> None:
    """``work`` on each item, by a few threads, a contiguous run each. The first error is raised."""

    def run(mine: Sequence[T]) -> None:
        for item in mine:
            work(item)

    edges = [len(items) * k // _WORKERS for k in range(_WORKERS + 1)]
    for done in [_pool().submit(run, items[a:b]) for a, b in itertools.pairwise(edges) if a < b]:
        done.result()


def decode_all(
    count: int,
    source: Callable[[int], tuple[Path | bytes, str]],
    shape: tuple[int, int, int],
    zoom: float | None = None,
) -> UInt8[Tensor, "n ch h w"]:
    """``count`` images, decoded by a few threads. ``source(i)``: file or bytes, name."""
    ch, h, w = shape
    out = np.empty((count, h, w, ch), dtype=np.uint8)

    def work(i: int) -> None:
        out[i] = decode(*source(i), shape, zoom)

    _for_each(range(count), work)
    return torch.from_numpy(out.transpose(0, 3, 1, 2).copy())


def image_size(path: Path) -> tuple[int, int]:
    """(h, w) of an image file, from its header."""
    with _opened(path, shown(str(path))) as image:
        return image.height, image.width


def _told(bad: list[tuple[Path, UserError]], of: int) -> UserError:
    """Returns what to say of files that cannot be used: the first with what is wrong, the others by name."""
    (_, first), *others = sorted(bad, key=lambda each: str(each[0]))
    if not others:
        return first
    names = ", ".join(shown(str(path)) for path, _ in others[: _NAMED - 1])
    more = len(others) - (_NAMED - 1)
    rest = f" and {more} more" if more > 0 else ""
    return UserError(f"{len(bad)} of {of} images cannot be used: {first}; the others are {names}{rest}")


class Streamed(ImageSet):
    """Image files, decoded when they are asked for.

    ``files`` are N paths relative to ``root``; ``shape`` is (ch, h, w), ch 1 (grey) or 3 (RGB); ``zoom`` is as in
    `decode`. A file that cannot be read raises `UserError` in `verify`, which training and evaluation call before they
    begin, and when its batch is made.
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
        self._glanced = self._verified = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._shape

    def _decoded(self, positions: list[int]) -> UInt8[Tensor, "n ch h w"]:
        def source(i: int) -> tuple[Path | bytes, str]:
            path = self.root / self.files[positions[i]]
            return path, shown(str(path))

        return decode_all(len(positions), source, self._shape, self.zoom)

    def batch(self, positions: Int64[Tensor, " n"] | list[int]) -> Batch:
        where = as_positions(positions)
        x = self._decoded(where.tolist()).to(torch.float32).div_(255)
        return Batch(x, self.labels[where], self.index[where])

    def subset(self, positions: Int64[Tensor, " n"] | list[int]) -> Streamed:
        where = as_positions(positions)
        files = [self.files[i] for i in where.tolist()]
        some = Streamed(self.root, files, self.labels[where], self._shape, self.zoom, self.index[where])
        some._glanced, some._verified = self._glanced, self._verified
        return some

    def in_memory(self) -> InMemory:
        """Decodes all of it once, as uint8: N ch h w bytes."""
        try:
            return InMemory(self._decoded(list(range(len(self)))), self.labels, self.index)
        except UserError:
            self.verify()  # which counts all that cannot be used
            raise

    def glance(self) -> None:
        """`UserError` for files that are no image or of another size, all of them counted, by their headers alone."""
        if not self._glanced:
            self._look("looking at the image files", glance)
            self._glanced = True

    def verify(self) -> None:
        """`UserError` for files that cannot be used, all of them counted: those that `glance` sees, or else those that
        cannot be read. Each file is read once, by one of the processes; the set remembers that it was.
        """
        if not self._verified:
            self.glance()
            self._look("reading the image files once", verify)
            self._verified = True

    def _look(self, what: str, look: Callable[..., None]) -> None:
        mine = torch.arange(len(self))[distributed.rank() :: distributed.world()]
        bad: list[tuple[Path, UserError]] = []
        with progress(len(mine), what, unit="images") as bar:
            for places in mine.split(_A_LOT):
                files = [self.root / self.files[i] for i in places.tolist()]
                bad += _failures(files, functools.partial(look, shape=self._shape, zoom=self.zoom))
                bar.advance(len(files))
        if bad:
            raise _told(bad, len(mine))

    def _contents(self) -> Iterator[Any]:
        yield repr(self.zoom).encode()
        for file in self.files:
            path = self.root / file
            yield os.fsencode(f"{file}\0{check_file(path, _MOST_BYTES).st_size}\0")
