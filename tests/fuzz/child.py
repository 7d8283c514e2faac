"""One case in a process of its own: forked from one that has torch imported, watched from outside, judged by what it
says and how it ends.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS, WALL_SECONDS, MEMORY = 40.0, 150.0, 4 * 2**30
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal's number), what it said, and why it was killed ("" where it
    was not).
    """

    code: int
    out: str
    err: str
    killed: str
    seconds: float


def run(work: Callable[[], int | None], folder: Path) -> Ended:
    """``work()`` in a forked child whose working directory is ``folder``, its output in files beside it."""
    out, err = folder.parent / "stdout", folder.parent / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _work(work, folder, out, err)
    killed, status = _watch(pid, started)
    code = os.waitstatus_to_exitcode(status)
    texts = [file.read_bytes()[:200_000].decode("utf-8", "replace") for file in (out, err)]
    return Ended(code, *texts, killed, time.monotonic() - started)


def _work(work: Callable[[], int | None], folder: Path, out: Path, err: Path) -> None:
    code = 1
    try:
        os.setsid()
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        code = work() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 255)


def _watch(pid: int, started: float) -> tuple[str, int]:
    """Why the child was killed, and its status."""
    pause, killed = 0.002, ""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return killed, status
        cpu, memory = _used(pid)
        if cpu > CPU_SECONDS or time.monotonic() - started > WALL_SECONDS:
            killed = "hang"
        elif memory > MEMORY:
            killed = "memory"
        if killed:
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return killed, os.waitpid(pid, 0)[1]
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def _used(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0, 0
    return (int(fields[11]) + int(fields[12])) / _TICK, pages * _PAGE


RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
"""Characters that can make a terminal do something."""


def judged(ended: Ended, valid: bool) -> str:
    """The kind of an end. "one line": exit code 2, and one line of ours that is the last on stderr; "ok": a valid input
    that was taken; "accepted": another that was; all other kinds are faults.
    """
    if ended.killed:
        return ended.killed
    if "Traceback (most recent call last)" in ended.err:
        return "traceback"
    if RAW.search(ended.err + ended.out):
        return "raw characters"
    if ended.code == 0:
        return "ok" if valid else "accepted"
    said = ended.err.splitlines()
    ours = [line for line in said if line.startswith("robustmoe: ")]
    if ended.code == 2 and len(ours) == 1 and said[-1] == ours[0]:
        return "refused though valid" if valid else "one line"
    return "interrupted" if ended.code in (130, 143) else f"exit {ended.code}"
