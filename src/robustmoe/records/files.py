"""Whole files and JSON lines: written to the disk or not at all, read without what a kill left half-written.

Failed reads and writes are one-line :class:`~robustmoe.errors.UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from robustmoe.errors import UserError
from robustmoe.records.typed import parse

T = TypeVar("T")

_HINTS = {
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some space or choose another --out",
    errno.EFBIG: "free some space or choose another --out",
    errno.EACCES: "choose an --out you may write to",
    errno.EPERM: "choose an --out you may write to",
    errno.EROFS: "choose an --out you may write to",
    errno.ENOTDIR: "a part of that path is a file; choose another --out",
    errno.EEXIST: "a part of that path is a file; choose another --out",
    errno.EISDIR: "that path is a folder; name a file",
}


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a one-line UserError that says what to do."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the path and its permissions")
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


def dump_line(value: Mapping[str, Any]) -> bytes:
    """Returns an object as one line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def read_json(path: Path, make: Callable[[Any], T], remedy: str) -> T | None:
    """Returns what ``make`` builds of the JSON in a file; None without one. UserError if the file cannot be read, is no
    JSON or is refused by ``make`` (ValueError); ``remedy`` says what to do then."""
    if not path.is_file():
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
