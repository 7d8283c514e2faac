"""What a data set is: `Batch`, `ImageSet` (one split), `InMemory`, `Data` (three splits), and `batches` over one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from robustmoe.arrays import as_images, as_labels, as_tensor
from robustmoe.data.split import hold_out
from robustmoe.errors import UserError
from robustmoe.noise import permutation

MOST_CLASSES = 1_000_000
"""Of a user's own arrays: a label beyond it is a mistake, and each class gets a name."""


@dataclass(frozen=True)
class Batch:
    """n images: ``x`` (n, ch, h, w) in [0, 1], ``y`` (n,) labels, ``index`` (n,) stable integers (see `ImageSet`)."""

    x: Float32[Tensor, "n ch h w"]
    y: Int64[Tensor, " n"]
    index: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, select: Tensor | slice) -> Batch:
        """Returns some of the images: by a mask, by their positions, or a slice."""
        return Batch(self.x[select], self.y[select], self.index[select])

    def to(self, device: str | torch.device) -> Batch:
        """Returns the batch on the device; what lies in page-locked memory (`pinned`) is sent without waiting."""
        return Batch(*(each.to(device, non_blocking=each.is_pinned()) for each in (self.x, self.y, self.index)))

    def pinned(self, device: str | torch.device) -> Batch:
        """Returns the batch in page-locked memory, from which a GPU takes it while it works; elsewhere as it is."""
        if torch.device(device).type != "cuda" or self.x.device.type != "cpu":
            return self
        return Batch(self.x.pin_memory(), self.y.pin_memory(), self.index.pin_memory())


class ImageSet(ABC):
    """One split of a data set: N images that can be asked for by position.

    ``labels`` (N,) and ``index`` (N,) stay on the CPU. ``index`` is an image's place in the official order of the
    files of its split; a validation image, taken out of the training split, keeps its training index. So (split file,
    index) names an image for ever, whatever subset, order or batch it is seen in, and random draws are keyed by it.
    """

    def __init__(self, labels: Int64[Tensor, " N"], index: Int64[Tensor, " N"] | None = None) -> None:
        self.labels = labels.cpu()
        self.index = torch.arange(len(labels)) if index is None else index.cpu()

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(ch, h, w) of every image."""

    @abstractmethod
    def batch(self, positions: Int64[Tensor, " n"] | list[int]) -> Batch:
        """Returns the images at ``positions`` (n,), each in 0..N-1, in that order."""

    @abstractmethod
    def subset(self, positions: Int64[Tensor, " n"] | list[int]) -> ImageSet:
        """Returns a set of the images at ``positions`` (n,) alone; each keeps its index."""

    def order(self, steps: int, batch_size: int, *key: int) -> Int64[Tensor, " n"]:
        """Returns the positions of an epoch's images in training, ``steps`` batches one after the other; the random
        order depends on ``key`` alone.
        """
        return permutation(len(self), *key)[: steps * batch_size]

    def glance(self) -> None:  # noqa: B027, no work for most sets
        """`UserError` for what the headers of its files show of images that cannot be used, in seconds."""

    def verify(self) -> None:  # noqa: B027, no work for most sets
        """`UserError` for an image that cannot be read. Nothing to do for images in memory: they have been read."""

    @abstractmethod
    def _contents(self) -> Iterator[Any]:
        """Returns what is hashed of the images themselves: buffers of bytes."""

    def head(self, limit: int | None) -> ImageSet:
        """Returns the first ``limit`` images; all of them where limit is None or larger than the set. `UserError` below
        1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise UserError(
                f"the limit on images is {limit}, expected at least 1; leave it out to take all {len(self)}"
            )
        return self.subset(torch.arange(limit))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the images (streamed: relative paths and sizes), labels and indices, in order."""
        digest = hashlib.sha256(repr((type(self).__name__, self.image_shape, len(self))).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update(self.index.numpy().tobytes())
        for part in self._contents():
            digest.update(part)
        return digest.hexdigest()


def as_positions(positions: Tensor | list[int]) -> Int64[Tensor, " n"]:
    """``positions`` as int64 on the CPU."""
    return torch.as_tensor(positions, dtype=torch.int64, device="cpu")


class InMemory(ImageSet):
    """Images held as they were stored, and turned into float32 in [0, 1] a batch at a time.

    ``images`` (N, ch, h, w): uint8 levels from 0 to ``white`` (x = level / white), or float32 already in [0, 1]
    (``white`` unused).
    """

    def __init__(
        self,
        images: UInt8[Tensor, "N ch h w"] | Float32[Tensor, "N ch h w"],
        labels: Int64[Tensor, " N"],
        index: Int64[Tensor, " N"] | None = None,
        white: int = 255,
    ) -> None:
        super().__init__(labels, index)
        self.images = images
        self.white = white

    @property
    def image_shape(self) -> tuple[int, int, int]:
        ch, h, w = self.images.shape[1:]
        return ch, h, w

    def _scaled(self, images: Tensor) -> Float32[Tensor, "n ch h w"]:
        """Stored images as float32 in [0, 1]."""
        return images.to(torch.float32).div_(self.white) if images.dtype == torch.uint8 else images

    def batch(self, positions: Int64[Tensor, " n"] | list[int]) -> Batch:
        """Returns the images at ``positions`` (n,), on the device that holds the set."""
        where = as_positions(positions)
        device = self.images.device
        x = self._scaled(self.images[where.to(device)])
        return Batch(x, self.labels[where].to(device), self.index[where].to(device))

    def subset(self, positions: Int64[Tensor, " n"] | list[int]) -> InMemory:
        where = as_positions(positions)
        return InMemory(self.images[where.to(self.images.device)], self.labels[where], self.index[where], self.white)

    def to(self, device: str | torch.device) -> InMemory:
        """Returns the same set with its images on ``device``, where its batches are then made."""
        there = InMemory(self.images.to(device), self.labels, self.index, self.white)
        if "fingerprint" in self.__dict__:
            there.__dict__["fingerprint"] = self.fingerprint
        return there

    def _contents(self) -> Iterator[Any]:
        yield repr((str(self.images.dtype), self.white)).encode()
        yield self.images.cpu().contiguous().numpy()


@dataclass(frozen=True)
class Data:
    """A data set: three disjoint splits and what a model has to know of them.

    ``val`` is held out of the official training split and serves every choice made while training; ``test`` is for
    the final number alone. ``mean`` and ``std`` (one a channel, std above 0) are for the model's own normalisation:
    of the training split where it is in memory, else the customary ImageNet constants.
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def verify(self) -> None:
        """`UserError` for images, of any split, that cannot be used: what headers show in all splits comes before
        anything is decoded (see `ImageSet.glance` and `ImageSet.verify`).
        """
        parts = (self.train, self.val, self.test)
        for looks in ([part.glance for part in parts], [part.verify for part in parts]):
            wrong = []
            for look in looks:
                try:
                    look()
                except UserError as error:
                    wrong.append(str(error))
            if wrong:
                raise UserError("; ".join(wrong))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        return self.train.image_shape


def mean_std(images: InMemory) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in float64. A constant channel gets deviation 1."""
    levels = images.images.dtype == torch.uint8
    total, squares = (_level_sums if levels else _sums)(images.images)
    pixels = images.images[:, 0].numel()
    scale = images.white if levels else 1
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt() / scale
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple((mean / scale).tolist()), tuple(std.tolist())


def _sums(images: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the values and of their squares, a channel each, in float64."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in images.split(max(1, 2**23 // images[0].numel())):  # 64 MiB as float64
        x = chunk.cpu().to(torch.float64)
        total += x.sum((0, 2, 3))
        squares += x.square().sum((0, 2, 3))
    return total, squares


def _level_sums(images: Tensor) -> tuple[Tensor, Tensor]:
    """`_sums` of uint8 levels, exactly: by how often each level comes."""
    levels = torch.arange(256)
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(max(1, 2**23 // images[0].numel())):
        for channel, count in zip(chunk.cpu().unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    return (counts * levels).sum(1).double(), (counts * levels.square()).sum(1).double()


def from_arrays(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | list[int],
    num_classes: int | None = None,
    index: Tensor | np.ndarray | list[int] | None = None,
) -> InMemory:
    """Returns a user's own images as a split: ``x`` (N, ch, h, w) floating point in [0, 1], ``y`` (N,) integers from 0.

    The values are kept as float32, not quantised; rounding outside [0, 1] is clipped. ``index`` (N,) are stable names
    of the images, by default 0..N-1. `UserError` on images of another rank, outside [0, 1] or not finite, on labels
    outside 0..num_classes-1, on lengths that differ.
    """
    x = as_images(x)
    y = as_labels(y, len(x), num_classes, "the set")
    if index is not None:
        index = as_tensor(index, "index", "integers, one an image")
        if index.shape != y.shape or index.is_floating_point() or index.is_complex():
            raise UserError(
                f"index is {index.dtype} of shape {tuple(index.shape)}, expected integers of shape {tuple(y.shape)}"
            )
        index = index.to(torch.int64)
    return InMemory(x.to(torch.float32), y, index)


def as_data(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray | list[int],
    x_test: Tensor | np.ndarray | None = None,
    y_test: Tensor | np.ndarray | list[int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    val: float = 0.1,
) -> Data:
    """Returns a user's own images as a data set: ``x`` (N, ch, h, w) floating point in [0, 1] and ``y`` (N,) integers
    from 0, of which the share ``val`` of each class is held out for validation, and ``x_test``, ``y_test``.

    ``classes``: their names; by default their numbers. Without test images it can be trained on, not evaluated on.
    `UserError` where `from_arrays` has one, and for test images of another shape.
    """
    count = None if classes is None else len(classes)
    every = from_arrays(x, y, count)
    count = count or int(every.labels.max()) + 1
    if count > MOST_CLASSES:
        raise UserError(
            f"the largest label is {count - 1}, which makes {count} classes, expected at most {MOST_CLASSES}; number "
            "the classes from 0"
        )
    keep, held = hold_out(every.labels, val)
    train, test = every.subset(keep), every.subset([])
    if x_test is not None:
        test = from_arrays(x_test, [] if y_test is None else y_test, count)
    if test.image_shape != train.image_shape:
        raise UserError(f"the test images are {test.image_shape}, those of training {train.image_shape}")
    names = tuple(classes or map(str, range(count)))
    return Data("arrays", train, every.subset(held), test, names, *mean_std(train))


def batches(
    images: ImageSet,
    batch_size: int,
    order: Int64[Tensor, " n"] | None = None,
    device: str | torch.device = "cpu",
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Yields the images at positions ``order`` (n,), by default all in order, ``batch_size`` at a time, on ``device``.

    The last batch may be short; ``drop_last`` leaves it out. Sets that are not in memory are read one batch ahead, in
    a thread; to a GPU they are sent while it works.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}, expected at least 1")
    parts = (torch.arange(len(images)) if order is None else order.cpu()).split(batch_size)
    parts = tuple(part for part in parts if len(part) == batch_size or (len(part) and not drop_last))
    if isinstance(images, InMemory):
        return (images.batch(part).pinned(device).to(device) for part in parts)
    return (batch.to(device) for batch in _one_ahead(images, parts, device))


SHARE = 0.125
"""Of a device's memory, what the images of a split may take up there."""


def resident(images: ImageSet, device: torch.device, room: int | None) -> ImageSet:
    """Returns the set with its images on the device, as they are stored (most sets: a byte a level), where they take up
    a small share of the ``room``, in bytes, that there is: batches are then made there, and only their places are sent.
    Any other set, and any on the CPU, is as it was.
    """
    if not isinstance(images, InMemory) or device == torch.device("cpu") or room is None:
        return images
    return images.to(device) if images.images.nbytes <= SHARE * room else images


def _one_ahead(images: ImageSet, parts: tuple[Tensor, ...], device: str | torch.device) -> Iterator[Batch]:
    def read(part: Tensor) -> Batch:
        return images.batch(part).pinned(device)

    with ThreadPoolExecutor(1, thread_name_prefix="robustmoe-prefetch") as reader:
        ahead = None
        for part in parts:
            now, ahead = ahead, reader.submit(read, part)
            if now is not None:
                yield now.result()
        if ahead is not None:
            yield ahead.result()
