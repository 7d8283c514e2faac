"""Images decoded once: kept in the user's cache folder, under the SHA-256 of the file that they come from.

The folder may be emptied at any time. Two processes may write one file: each writes its own, and the last to end takes
the place whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustmoe.data.reading import GIB, read_file, shown
from robustmoe.errors import UserError
from robustmoe.progress import note

LEAST = 2**20
"""Bytes of a file that it is worth the place for."""

A_DAY = 86_400.0

VERSION = "decoded 1"
"""Of what is kept; another one finds nothing."""


def folder() -> Path:
    """Where decoded images are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "robustmoe" / "decoded"


def decoded(
    path: Path, shape: tuple[int, int, int], classes: int, how: str, make: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What ``make`` gives of the file: images (n, *shape) uint8 and labels (n,) int64 below ``classes``; where it was
    made before, what was kept. ``how``: all else that it depends on.
    """
    content = _digest(path)
    if content is None:
        return make()
    place = folder() / f"{hashlib.sha256(repr((VERSION, content, shape, classes, how)).encode()).hexdigest()}.npz"
    images, labels = _read(place, shape, classes) or make()
    if not place.exists() and _digest(path) == content:
        _write(place, path, images, labels)
    return images, labels


def _digest(path: Path) -> str | None:
    """None of a file that is too small, or not there."""
    try:
        return hashlib.sha256(read_file(path, 4 * GIB)).hexdigest() if path.stat().st_size >= LEAST else None
    except (OSError, UserError):
        return None  # whoever reads it says what is wrong


def _read(place: Path, shape: tuple[int, int, int], classes: int) -> tuple[Tensor, Tensor] | None:
    """What is kept; None where nothing is, and where it is damaged (its archive has checksums): then it goes."""
    if not place.is_file():
        return None
    try:
        with np.load(io.BytesIO(read_file(place, 16 * GIB)), allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, UserError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        images = labels = np.empty(0)
    fits = (images.dtype, images.shape[1:], labels.dtype) == (np.uint8, shape, np.int64)
    if fits and labels.shape == (len(images),) and 0 <= labels.min(initial=0) <= labels.max(initial=0) < classes:
        return torch.from_numpy(images), torch.from_numpy(labels)
    with contextlib.suppress(OSError):
        place.unlink()
    return None


def _write(place: Path, path: Path, images: Tensor, labels: Tensor) -> None:
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                np.savez(file, images=images.numpy(), labels=labels.numpy())
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        for left in place.parent.glob(".*.tmp"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > A_DAY:
                left.unlink()
    except OSError as error:
        note(f"the decoded images of {shown(str(path))} are not kept ({error.strerror or error}); nothing is lost")
