"""One writer at a time: who writes into a folder says so there, and the next one is told who it is.

A writer holds a file of its own in the folder, ``.robustmoe-….lock``, for as long as it works (`filelock`: the system
lets go of it when the process ends, however it ends). It says what is written: the whole folder, or one file in it.
Two writers exclude each other where one of them writes the whole folder, or both the same file. They take turns to look
for each other, by the file ``.robustmoe.lock``. What a killed writer left goes when the next one comes.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import os
import re
import secrets
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.progress import note
from robustmoe.records.files import ELSEWHERE, explained

GATE = ".robustmoe.lock"
WHOLE = ""
"""What a writer of a whole folder writes."""

_PATIENCE = 10.0
"""Seconds to wait for another process that is looking for other writers, or clearing up."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_LEFT = re.compile(r"\.(?P<name>[\w.-]+\.(json|jsonl|pt|safetensors|html|md))\.[0-9a-f]+\.tmp")
_LOCK = re.compile(r"\.robustmoe(-[0-9a-f]+)?\.lock")
_RESULTS = ("", "rows", "certificates")
_mine: dict[tuple[Path, int], dict[str, Path]] = {}  # (folder, thread) -> what is held there, and by which lock


def contents(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns what is in a folder, by name, but for locks and the halves of files that a kill left; [] where there is
    no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    with explained("read", folder):
        return sorted(path for path in folder.iterdir() if not (_LOCK.fullmatch(path.name) or _left(path)))


def restarted() -> bool:
    """Whether torchrun has started the processes anew, after some of them died (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_folder(out: str | os.PathLike[str], resume: bool) -> None:
    """Raise UserError unless a run can start in the folder (``resume``: go on there, as it may once `restarted`)."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file, not a run folder; choose another --out")
    there = (out / "config.json").is_file()
    if resume and not there:
        raise UserError(f"{str(out)!r}: there is no run to resume (no config.json); start it without --resume")
    if there and not resume and not restarted():
        raise UserError(f"{str(out)!r} already holds a run; add --resume to go on, or choose another --out")
    strangers = [] if resume or there else contents(out)
    if strangers:
        raise UserError(
            f"{str(out)!r} is not empty (it holds {strangers[0].name}), and holds no run; choose another --out"
        )


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], what: str = WHOLE) -> Iterator[None]:
    """Be the writer of a folder, or of the file ``what`` in it, for the length of a ``with`` block. Inside the block of
    a whole folder, the same thread may ask for it again. The folder is made where it is missing; halves of files that a
    killed writer left in it are removed. The processes that torchrun starts are one writer: the first one locks. Where
    the system cannot lock files, nothing is locked, which is said.

    UserError where another writer is at work there: it says which process, where, doing what, since when."""
    folder = Path(folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        yield
        return
    with explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        key = (folder.resolve(), threading.get_ident())
    held = _mine.get(key, {})
    if WHOLE in held:
        yield
        return
    if what in held:
        raise UserError(f"{folder / what} is being written by this process already; close it first")
    with contextlib.ExitStack() as stack:
        own = folder / f".robustmoe-{secrets.token_hex(8)}.lock"
        try:
            with explained("write", folder), _gate(folder):
                _enter(stack, own, what, set(held.values()))
        except UserError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_LOCKS:
                raise
            _tell_of_no_locks(folder)
        _mine[key] = {**held, what: own}
        try:
            yield
        finally:
            del _mine[key][what]
            if not _mine[key]:
                del _mine[key]


@functools.cache
def _tell_of_no_locks(folder: Path) -> None:
    note(
        f"warning: the file system of {folder} cannot lock files: nothing keeps a second command from writing there at "
        "the same time, so run one at a time"
    )


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[None]:
    """Be the only one who looks for other writers. Its file is removed while it is held: who waits opens it anew."""
    from filelock import FileLock, Timeout

    gate = FileLock(folder / GATE, fallback_to_soft=False)
    try:
        gate.acquire(timeout=_PATIENCE)
    except Timeout:
        raise UserError(f"{folder} is being written by another process; wait for it, or {ELSEWHERE}") from None
    try:
        yield
    finally:
        _unlink(folder / GATE)
        gate.release()


def _enter(stack: contextlib.ExitStack, own: Path, what: str, mine: set[Path]) -> None:
    """Take the lock ``own``, which ``stack`` lets go of, unless another writer is in the way. The gate is held."""
    from filelock import FileLock

    for path in set(own.parent.glob(".robustmoe-*.lock")) - mine:
        _pass(path, what)
    _clear(own.parent, what)
    stack.callback(_unlink, own)
    with contextlib.suppress(OSError):  # no space: a lock that says nothing still locks
        own.write_text(json.dumps(_said(what)))
    stack.enter_context(FileLock(own, timeout=0, fallback_to_soft=False))


def _pass(path: Path, what: str) -> None:
    """Remove the lock of a writer that is gone. UserError where one that is at work is in the way."""
    from filelock import FileLock, Timeout

    try:
        other = json.loads(path.read_text())
    except (OSError, ValueError):
        other = {}
    other = other if isinstance(other, dict) else {}
    try:
        with FileLock(path, timeout=0, fallback_to_soft=False):
            _unlink(path)
    except Timeout:
        theirs = str(other.get("what", WHOLE))
        if WHOLE in (what, theirs) or what == theirs:
            raise UserError(
                f"{path.parent / theirs} is being written by another process ({_told(other)}); wait for it, or "
                f"{ELSEWHERE}"
            ) from None


def _said(what: str) -> dict[str, Any]:
    name = Path(sys.argv[0]).name
    return {
        "what": what,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": shlex.join(["robustmoe" if name == "__main__.py" else name, *sys.argv[1:]]),
    }


def _told(other: dict[str, Any]) -> str:
    """Returns what a writer said of itself, as one line of printable text."""
    if not {"pid", "host", "since", "command"} <= set(other):
        return "which did not say who it is"
    text = "process {pid} on {host}, since {since}: {command}".format_map(other)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])


def _clear(folder: Path, what: str) -> None:
    """Remove the halves of files that killed writers left: of the file, or of all results in the folder."""
    file = folder / what
    places = [folder / name for name in _RESULTS] if what == WHOLE else [file.parent]
    for path in [path for place in places for path in place.glob(".*.tmp")]:
        name = _left(path)
        if name is not None and (what == WHOLE or name in (file.name, f"{file.stem}.examples.jsonl")):
            _unlink(path)


def _left(path: Path) -> str | None:
    """Returns the name of the file of which this is a half that a kill left; None where it is no such half."""
    match = _LEFT.fullmatch(path.name)
    return None if match is None else match["name"]


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def at_work(folder: str | os.PathLike[str]) -> bool:
    """Whether a process is writing in the folder. Where that cannot be asked, as in a folder that is somebody else's,
    a lock that is there is believed.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    locks = list(folder.glob(".robustmoe-*.lock"))
    if not locks:
        return False
    try:
        with _gate(folder):
            for path in locks:
                if path.exists():
                    with FileLock(path, timeout=0, fallback_to_soft=False):
                        pass
    except (Timeout, OSError, UserError):
        return True
    return False
