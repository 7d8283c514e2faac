"""Where a number comes from: versions, commit, hardware and command, as they are written beside every result."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from robustmoe.errors import UserError, first_line


def versions() -> dict[str, str]:
    """Versions of robustmoe, torch, numpy and python."""
    versions_here = {name: metadata.version(name) for name in ("robustmoe", "numpy")}
    return {**versions_here, "torch": torch.__version__, "python": platform.python_version()}


@functools.cache
def commit() -> str | None:
    """The git commit of the package's own checkout, with "+" where files differ from it; None for an installed
    package. Asked once a process, as its sources are read once.
    """
    here = Path(__file__).parent
    try:
        if subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True).returncode:
            return None
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git: the version number has to do
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")


def hardware(device: torch.device) -> str:
    """One line: processor, cores and threads in use, and the GPU if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    line = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{line}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else line


def command() -> str:
    """The command line of this process, with the program's bare name."""
    name = Path(sys.argv[0]).name
    return shlex.join(["robustmoe" if name == "__main__.py" else name, *sys.argv[1:]])  # python -m robustmoe


UNFIT = {
    "meta": "its tensors hold no numbers",
    "mps": "Apple's GPUs have no float64, in which validation, checks and certificates compute",
}
"""Devices that torch has and we refuse, and why."""


def pick_device(name: str) -> torch.device:
    """``auto``: the first CUDA device where there is one, else the CPU. Raises UserError for a device that is not
    there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in UNFIT:
            raise RuntimeError(UNFIT[device.type])
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's three ways to say "not here"
        raise UserError(
            f"device {name!r} cannot be used here ({first_line(error)}); expected auto, cpu, cuda or cuda:N"
        ) from error
    return device
