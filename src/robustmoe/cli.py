"""The command line: parse, run the verb of that name (`robustmoe.verbs`), print what it returns.

Nothing heavy is imported before a verb runs, so ``--help`` is instant. A user's mistake is one line on stderr and
exit code 2, and so is an error that comes through a file of parts of a user's own; any other exception is a bug and
shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from robustmoe import heap, spec
from robustmoe.errors import EverywhereError, UserError, nearest, out_of_memory
from robustmoe.flags import parse, summary
from robustmoe.progress import first_process, show
from robustmoe.verbs import STOPPED, VERBS


class _Terminated(BaseException):
    """SIGTERM came: unwind, say how to resume, leave."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM unwinds the stack, so that what is being written is finished or dropped."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_MORE_ROOM, _OTHER_PLACE = "free some space", "check the path"
_YOURS = "ask its owner for the right to it, or use a copy that is yours"
_NO_PLACE = {
    errno.ENOSPC: _MORE_ROOM, errno.EDQUOT: _MORE_ROOM, errno.EACCES: _YOURS, errno.EPERM: _YOURS, errno.EROFS: _YOURS,
    errno.ENOTDIR: _OTHER_PLACE, errno.ENAMETOOLONG: _OTHER_PLACE, errno.ELOOP: _OTHER_PLACE,
}  # fmt: skip
GRACE = 20.0
"""Seconds that a process waits for the first one to tell of a mistake of all."""

REPORT = "This is a fault of robustmoe; please report it, with the command and this text."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 and 143 for a stop."""
    program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if program and argv[:1] and argv[0] in STOPPED:
        heap.keep_freed()
    dry = any(word.replace("_", "-") == "--dry-run" for word in argv)
    stopped = STOPPED.get(argv[0], "stopped") if argv and not dry else "stopped"
    try:
        # SIGTERM is restored after the last line: torchrun sends it while a process says that its peer has died.
        with _terminable() if argv[:1] and argv[0] in STOPPED else contextlib.nullcontext():
            return _answered(argv, stopped)
    except _Terminated:  # while a line was being written
        return 143


def _answered(argv: Sequence[str], stopped: str) -> int:
    try:
        text = _run(argv)
        if first_process():
            show(text, sys.stdout)
        return 0
    except SystemExit as e:  # --help, or a file of a user's own that calls exit
        told = spec.blamed(e)
        return _fail(told, 2) if told else e.code if isinstance(e.code, int) else 0
    except UserError as e:
        if isinstance(e, EverywhereError) and not first_process():
            time.sleep(GRACE)  # torchrun ends it as soon as the first process has told it and gone
            return 2
        return _fail(str(e), 2)
    except (KeyboardInterrupt, _Terminated) as e:
        code = 143 if isinstance(e, _Terminated) else 130
        return _fail(stopped, code) if first_process() else code
    except BrokenPipeError:  # the reader has seen enough; point stdout elsewhere, so that the exit is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as e:
        told = spec.blamed(e) or _no_fault(e)
        if told is None:
            e.add_note(REPORT)
            raise
        return _fail(told, 2)


def _no_fault(error: BaseException) -> str | None:
    """Returns, in one line, what of this machine was not enough: its memory, its disk, the length of its names; None
    for an error that is a fault of ours.
    """
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        where = f": {error.filename!s:.200}" if error.filename else ""
        return f"{error.strerror}{where}; {_NO_PLACE[error.errno]}"
    return out_of_memory(error)


def _fail(message: str, code: int) -> int:
    show(f"robustmoe: {message}", sys.stderr)
    return code


def _run(argv: Sequence[str]) -> str:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _help()
    if argv[0] == "--version":
        return f"robustmoe {_version()}"
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
    return VERBS[argv[0]](**parse(argv[0], VERBS[argv[0]], argv[1:]))


def _version() -> str:
    from importlib.metadata import version

    return version("robustmoe")


def _help() -> str:
    verbs = "\n".join(f"  {name:10}{summary(verb)}" for name, verb in VERBS.items())
    return (
        "usage: robustmoe VERB ...\n\n"
        "Mixture-of-Experts vision models: train, attack, certify, report.\n\n"
        f"{verbs}\n\n"
        "robustmoe VERB --help lists the arguments of a verb; robustmoe --version.\n"
        "robustmoe list: what can be named; my_file.py:name(...) is one of your own.\n\n"
        "example:\n  robustmoe demo"
    )


if __name__ == "__main__":
    sys.exit(main())
