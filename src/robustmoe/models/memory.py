"""Whether a network fits: asked while it is built, before its weights are drawn and memory is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from robustmoe.errors import UserError

OVERHEAD = 4096
"""Bytes that Python keeps for a tensor of a module, beside its numbers; about that."""


@contextlib.contextmanager
def fitting_memory() -> Iterator[None]:
    """UserError as soon as what is built inside has more weights than this machine has memory. (Fresh memory is given
    when it is first written to, so that the tensor which is too much costs nothing yet.)
    """
    room, needed = memory(), 0

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal needed
        needed += 0 if value is None else value.nbytes + OVERHEAD
        if needed > room:
            raise UserError(
                f"the model needs more than {needed / 2**30:.1f} GiB for its weights, this machine has "
                f"{room / 2**30:.1f} GiB; expected fewer experts, or a smaller width or depth"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def memory() -> int:
    """The bytes of memory that this process may use: the machine's, or the limit of its control group."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            room = min(room, int(file.read_text()))
    return room
