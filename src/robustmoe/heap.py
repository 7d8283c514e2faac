"""The allocator of glibc: whether memory that was freed stays with the process, and giving it back.

A pass through a network frees maps of megabytes and takes as many again. By default glibc hands large ones back to the
system, or trims its heap, and then every page of the next map is new: filled with zeros, and faulted in one by one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SIZES = (2**30, 2**25)
"""From how many bytes on memory may come from the system itself; older glibcs take no more than the second."""


def keep_freed() -> bool:
    """Freed memory stays with this process and is used again, so that its peak is as before. Returns whether it is so:
    not where the allocator is another one, or the user's environment has told it what to do.

    For a program that is all ours: a library leaves the allocator alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    return bool(any(mallopt(_MMAP_THRESHOLD, size) for size in _SIZES) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_back() -> None:
    """Memory that was freed goes back to the system."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _function(name: str) -> Callable[..., Any] | None:
    """Returns a function of glibc's allocator, or None where there is none."""
    if sys.platform != "linux":
        return None
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return function
