"""Whole files and JSON lines: written to the disk or not at all, read without what a kill left half-written.

Failed reads and writes are one-line :class:`~robustmoe.errors.UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from robustmoe.errors import UserError
from robustmoe.progress import first_process, note
from robustmoe.records.typed import encode, parse

T = TypeVar("T")

ELSEWHERE = "write to another place (--out, or a copy of the run)"
"""What helps where a place cannot be written: verbs that go on in a run have no --out."""
_NO_ROOM, _NOT_YOURS = f"free some space, or {ELSEWHERE}", f"ask for the right to write there, or {ELSEWHERE}"
_NO_FOLDER = f"a part of that path is a file; move it away, or {ELSEWHERE}"
_WRITING = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: _NO_ROOM,
    errno.EACCES: _NOT_YOURS,
    errno.EPERM: _NOT_YOURS,
    errno.EROFS: ELSEWHERE,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "that path is a folder; name a file",
}
_READING = {
    errno.EACCES: "ask its owner for the right to read it, or make a copy that you may read",
    errno.EPERM: "ask its owner for the right to read it, or make a copy that you may read",
    errno.ENOTDIR: "a part of that path is a file; check the path",
    errno.EISDIR: "that path is a folder; name a file",
}


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError of what is done (``verb``: "read" or "write") into a one-line UserError that says what to do."""
    try:
        yield
    except OSError as error:
        hints = _READING if verb == "read" else _WRITING
        hint = hints.get(error.errno or 0, "check the path and its permissions")
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}; {hint}") from error


def file_stem(text: str) -> str:
    """Returns a file name, without its ending, from a spec: at most 150 of the characters a-z, 0-9, "." and "-"."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return name if len(name) <= 150 else f"{name[:140]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. UserError if it cannot be written, and
    then the old file is as it was. Missing folders are made."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def assert_ours(path: str | os.PathLike[str], mark: str) -> None:
    """Raise UserError where a file stands at the path that robustmoe did not write: one without ``mark`` in its first
    kilobyte, white space apart. An empty file is nobody's."""
    path = Path(path)
    with explained("read", path):
        if not os.path.lexists(path) or path.is_dir():
            return
        head = b""
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(1024)
            if not head:
                return
    if "".join(mark.split()).encode() not in b"".join(head.split()):
        raise UserError(
            f"{path} is there, and robustmoe did not write it, so it was left alone; move it away, or {ELSEWHERE}"
        )


def write_own(path: str | os.PathLike[str], content: str, mark: str) -> None:
    """Write a whole file, over nothing but an earlier file of ours. ``mark``: what such files, and ``content``, have in
    their first kilobyte. UserError where another file stands there (see :func:`assert_ours`)."""
    known = "".join(mark.split()) in "".join(content[:1024].split())
    assert known or not content, f"{path} would not be known again by {mark!r}"
    assert_ours(path, mark)
    write_atomic(path, content)


def set_aside(path: Path, other: str) -> None:
    """Keeps a result of other work (``other``: what differs) under a name of its own, so that a new one takes its place
    and nothing is lost; says so. Of several processes the first one does."""
    if not first_process():
        return
    name = next(name for n in itertools.count(1) if not os.path.lexists(path.with_name(name := f"{path.name}.old{n}")))
    with explained("write", path):
        os.replace(path, path.with_name(name))
    note(f"{path} is of another {other}; it is kept as {name} and made anew")


def whole_lines(path: Path) -> list[bytes]:
    """Returns the lines that end with a newline, without it; what a killed writer left after the last newline is
    dropped."""
    with explained("read", path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; name a .jsonl file")
        return path.read_bytes().split(b"\n")[:-1]


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Returns the object of one line; UserError names the file and the line."""
    try:
        value = parse(line)
    except UserError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: not a JSON object; delete that line or the file")
    return value


def dump_line(value: Any) -> bytes:
    """Returns an object, such as a dataclass, as one line."""
    return json.dumps(encode(value), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def read_json(path: Path, make: Callable[[Any], T], remedy: str) -> T | None:
    """Returns what ``make`` builds of the JSON in a file; None without one. UserError if the file cannot be read, is no
    JSON or is refused by ``make`` (ValueError); ``remedy`` says what to do then."""
    if not path.is_file():
        if os.path.lexists(path):
            raise UserError(f"{path} is not a regular file, or a link to none; {remedy}")
        return None
    with explained("read", path):
        text = path.read_bytes()
    try:
        return make(parse(text))
    except ValueError as error:  # UserError is one
        raise UserError(f"{path}: {error}; {remedy}") from None


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file, without a half-written last line. UserError on any other bad line."""
    path = Path(path)
    return [parse_line(line, path, number) for number, line in enumerate(whole_lines(path), 1)]


def append_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Append one object as a line and flush it to the disk; a half-written last line left by a kill is cut first.
    UserError if it cannot be written."""
    path = Path(path)
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        with open(path, "ab") as file:
            file.write(dump_line(value))
            file.flush()
            with contextlib.suppress(OSError):  # a pipe or a device has nothing to synchronise
                os.fsync(file.fileno())
