"""How much memory work takes at its peak, and how much there is; in bytes.

On CUDA it is what torch's allocator held. On the CPU it is the largest resident size of the whole process, python and
torch themselves included.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from robustmoe import heap
from robustmoe.errors import UserError, out_of_memory

FIRST = 8
"""Images of the first batch that is tried."""

MOST = {"cpu": 256}
"""Images of the largest batch that is tried: on a CPU more are no faster."""

MOST_ELSEWHERE = 4096
SHARE = 0.8
"""Of the memory that there is, what a batch may take at its peak."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Where a container says how much it may have, and has."""


def restart_peak(device: torch.device) -> None:
    """The peak is that of what comes now. (Where a system cannot forget the peak so far, it stays.)"""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        heap.give_back()
        with contextlib.suppress(OSError):
            _RESET.write_text("5")  # Linux: the high-water mark becomes the size of now


def peak(device: torch.device) -> int | None:
    """The largest number of bytes held since `restart_peak` (or since the process began); None where the system does
    not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = _status("VmHWM")
    if size is not None:
        return size
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(device: torch.device) -> int | None:
    """The bytes held now; None where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def room(device: torch.device) -> int | None:
    """The bytes that this process can have in all: what it holds, and what is free. None where the system does not
    say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    available = _number(Path("/proc/meminfo"), "MemAvailable:")
    free = free if available is None else 1024 * available
    for limit, used in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free + (held(device) or 0)


@dataclass(frozen=True)
class FittingBatch:
    """A batch size, its peak and the room that there was (None where the system does not say)."""

    size: int
    peak: int | None
    room: int | None

    def __str__(self) -> str:
        of = f" of {text(self.room)}" if self.room is not None else ""
        return f"{self.size}" if self.peak is None else f"{self.size} (a peak of {text(self.peak)}{of})"


def largest(attempt: Callable[[int], None], device: torch.device, images: int) -> FittingBatch:
    """Returns the largest batch size, `FIRST` doubled, for which ``attempt(n)`` has memory enough: the peak is at most
    `SHARE` of the room. Where even the first does not fit, it is halved. At most ``images``. UserError where there is
    no room for one image.
    """
    there, size = room(device), min(FIRST, images)
    most = min(images, MOST.get(device.type, MOST_ELSEWHERE))
    best = _fit(attempt, size, device, there)
    if best is not None:
        while 2 * size <= most and (more := _fit(attempt, 2 * size, device, there)) is not None:
            best, size = more, 2 * size
        return best
    while size > 1:
        size //= 2
        best = _fit(attempt, size, device, there)
        if best is not None:
            return best
    raise UserError("there is no memory for a batch of one image; expected a smaller model, or smaller images")


def _fit(attempt: Callable[[int], None], size: int, device: torch.device, there: int | None) -> FittingBatch | None:
    """A batch of this size, if it has memory enough."""
    restart_peak(device)
    try:
        attempt(size)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error) is None:
            raise
        return None
    finally:
        high = peak(device)
        restart_peak(device)
    return FittingBatch(size, high, there) if high is None or there is None or high <= SHARE * there else None


def text(size: int) -> str:
    """A number of bytes for a person, such as "412 MB" or "3.1 GB" (a thousand MB)."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def told(device: torch.device) -> str:
    """The peak so far as the end of a line: ", memory peak 412 MB"; "" where the system does not say."""
    high = peak(device)
    return "" if high is None else f", memory peak {text(high)}"


def _status(name: str) -> int | None:
    kilobytes = _number(_STATUS, f"{name}:")
    return None if kilobytes is None else 1024 * kilobytes


def _number(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
