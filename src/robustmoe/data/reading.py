"""Files of a data set as they are opened: regular files only, of a bounded size.

A pipe, a device or a socket under the name of an image would hold a run up for ever; a file without end would fill the
memory. Nothing in `robustmoe.data` opens a file but through this module.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from robustmoe.errors import UserError

GIB = 2**30


def existing(root: str | Path, remedy: str = "give the path of the data set with root=") -> Path:
    """``root`` as a path, with ~ expanded; `UserError`, with what to do, where nothing is there."""
    try:
        path = Path(root).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as e:  # nothing there, no such user, a zero byte in the name
        why = "" if isinstance(e, FileNotFoundError) else f" ({getattr(e, 'strerror', None) or e})"
        raise UserError(f"there is no file or folder {shown(str(root))}{why}; {remedy}") from None
    return path


def shown(name: str) -> str:
    r"""A file's name as text that can be printed and stored: bytes that are not UTF-8, and characters that do not
    print, are written as \x...
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unreadable(path: Path, error: OSError) -> UserError:
    """What is said where a file of a data set cannot be read."""
    return UserError(
        f"cannot read {shown(str(path))} ({error.strerror or error}); it is one of the files of the data set, "
        "so restore it"
    )


def check_file(path: Path, limit: int, status: os.stat_result | None = None) -> os.stat_result:
    """Returns the status of a file; `UserError` unless it is a regular one of at most ``limit`` bytes."""
    try:
        status = path.stat() if status is None else status
    except OSError as e:
        raise unreadable(path, e) from e
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{shown(str(path))} is not a regular file; remove it from the data set")
    if status.st_size > limit:
        raise UserError(
            f"{shown(str(path))} holds {status.st_size:,} bytes, expected at most {limit:,}; replace or remove it"
        )
    return status


def read_file(path: Path, limit: int = GIB, count: int | None = None) -> bytes:
    """Returns the bytes of a regular file of at most ``limit`` bytes, or the first ``count`` of them; `UserError` on
    anything else, at once.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer is opened, not waited for

    check_file(path, limit)  # before it is opened: that alone can have effects on a device
    try:
        with open(path, "rb", opener=opener) as file:
            size = check_file(path, limit, os.fstat(file.fileno())).st_size
            return file.read(size if count is None else min(size, count))
    except OSError as e:
        raise unreadable(path, e) from e
