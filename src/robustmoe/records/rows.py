"""The rows file: read, merge, write, resume.

Append-only, flushed to the disk per batch, so that a killed evaluation loses at most the batch it was working on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.files import dump_line, explained, parse_line, whole_lines
from robustmoe.records.types import STATUSES, Check, Checks, Header, Result, Row, Time, build

# Two files describe the same work when these agree; the rest of a header tells where and when it was done. Plain
# words stand before hashes, so that a difference is named in the words that the user wrote.
WORK = (
    "model", "data", "split", "n", "attack", "objective", "norm", "eps", "role", "seed", "precision", "routers",
    "model_hash", "data_hash", "index_hash",
)  # fmt: skip


def difference(old: Header, new: Header) -> str | None:
    """The first field of :data:`WORK` in which two headers differ; None if they describe the same work."""
    return next((name for name in WORK if getattr(old, name) != getattr(new, name)), None)


def read(path: str | os.PathLike[str]) -> Result:
    """A whole rows file, rows sorted by index. A half-written last line is ignored; any other bad line, and two
    different rows of one image, are a UserError that names the line."""
    path = Path(path)
    lines = whole_lines(path) if path.exists() else []
    if not lines:
        raise UserError(f"no rows in {path}; `robustmoe evaluate RUN` makes them")
    header, rows, checks, _ = _contents(path, lines)
    return _result(header, rows, checks)


def _result(header: Header, rows: dict[int, Row], checks: Checks | None) -> Result:
    return Result(header, [rows[index] for index in sorted(rows)], checks)


def _contents(path: Path, lines: list[bytes]) -> tuple[Header, dict[int, Row], Checks | None, float]:
    """Header, rows by index, checks, and the seconds spent on the rows."""
    rows: dict[int, Row] = {}
    seconds = 0.0
    checks: Checks | None = None
    header: Header | None = None
    for number, line in enumerate(lines, 1):
        data = parse_line(line, path, number)
        kind = data.get("kind")
        try:
            if header is None:
                header = Header.from_dict(data)
            elif checks is not None:
                raise UserError("lines after the checks, which end a file")
            elif kind == "row":
                _put(rows, Row.from_dict(data))
            elif kind == "checks":
                checks = Checks.from_dict(data)
            elif kind == "time":
                seconds += build(Time, data).seconds
            else:
                raise UserError(f"unknown kind {kind!r}; known: header, row, checks, time")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    assert header is not None  # `lines` is not empty, and its first line is read as a header
    return header, rows, checks, seconds


def _put(rows: dict[int, Row], row: Row) -> None:
    if rows.setdefault(row.index, row) != row:
        raise UserError(f"image {row.index} has two different rows; delete one of them")


def merge(paths: Sequence[str | os.PathLike[str]]) -> Result:
    """Shards of one evaluation as one result: the same work in every header, rows disjoint or identical, otherwise a
    UserError. The checks are None until every shard has them; a check's status is the worst over the shards, seconds
    are summed."""
    if not paths:
        raise UserError("nothing to merge: give at least one rows file")
    results = [read(path) for path in paths]
    rows: dict[int, Row] = {}
    for path, result in zip(paths, results, strict=True):
        field = difference(results[0].header, result.header)
        if field is not None:
            raise UserError(f"{path} is not a shard of {paths[0]}: their headers differ in {field!r}")
        try:
            for row in result.rows:
                _put(rows, row)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    checks = _merged_checks([result.checks for result in results])
    return _result(results[0].header, rows, checks)


def _merged_checks(parts: list[Checks | None]) -> Checks | None:
    worst: dict[str, Check] = {}
    seconds = 0.0
    for part in parts:
        if part is None:
            return None
        seconds += part.seconds
        for check in part.checks:
            known = worst.setdefault(check.id, check)
            if STATUSES.index(check.status) > STATUSES.index(known.status):
                worst[check.id] = check
    return Checks(list(worst.values()), seconds)


def _shown(field: str, value: Any) -> str:
    """A header's value in a message; of a hash, its start."""
    return repr(value[:12] if field.endswith("_hash") else value)


def _lock(descriptor: int, path: Path) -> None:
    """One writer a file: two would cut each other's rows. Nothing where the system cannot lock."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process; wait for it, or choose another --out") from None
    except OSError:
        return


class Writer:
    """Creates a rows file, or resumes the one that is there.

    ``done`` holds the indices of the images that have a row, ``checks`` the checks of a finished file (else None),
    ``seconds`` the time spent on the rows so far. A half-written last line is cut. UserError if the file holds other
    work, is being written by another process, or cannot be read or written."""

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        self.path = Path(path)
        self.header = header
        self.checks: Checks | None = None
        self.seconds = 0.0
        self._rows: dict[int, Row] = {}
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is not a regular file; name a .jsonl file")
        with explained("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _lock(self._descriptor, self.path)
            lines = self._resume()
            # Rows are kept, finishing lines are rewritten: `_end` is where the next row goes.
            kept = lines[:-1] if self.checks is not None else lines
            self._end = sum(len(line) + 1 for line in kept)
            if not lines:
                first = dump_line(header.to_dict())
                self._append(first)
                self._end = len(first)
            elif self.checks is None:
                self._cut()
        except UserError:
            self.close()
            raise

    def _resume(self) -> list[bytes]:
        lines = whole_lines(self.path)
        if not lines:
            start = self.path.read_bytes()
            expected = dump_line(self.header.to_dict())[: len(b'{"kind":"header"')]
            if not expected.startswith(start[: len(expected)]):
                raise UserError(f"{self.path} is not a rows file and was left alone; choose another --out")
            return []
        old, rows, self.checks, self.seconds = _contents(self.path, lines)
        field = difference(old, self.header)
        if field is not None:
            was, now = (_shown(field, getattr(header, field)) for header in (old, self.header))
            raise UserError(
                f"{self.path} holds other work: its {field} is {was}, this one's is {now}; "
                "choose another --out or delete the file"
            )
        self.header = old
        self._rows = rows
        return lines

    def _cut(self) -> None:
        with explained("write", self.path):
            os.ftruncate(self._descriptor, self._end)

    def _append(self, data: bytes) -> None:
        """Put lines at the end, flushed to the disk. If that fails, the file is cut back to what it was."""
        with explained("write", self.path):
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(self._descriptor, view) :]
                os.fsync(self._descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
                raise

    @property
    def done(self) -> set[int]:
        """The indices of the images that have a row."""
        return set(self._rows)

    @property
    def result(self) -> Result:
        """What the file holds now, as `read` would give it."""
        return _result(self.header, self._rows, self.checks)

    def write(self, rows: Iterable[Row], seconds: float = 0.0) -> None:
        """Append one batch, and the ``seconds`` it took, and flush it to the disk. Rows of images that are done already
        are skipped."""
        batch: dict[int, Row] = {}
        for row in rows:
            if row.index not in self._rows:
                _put(batch, row)
        if not batch:
            return
        data = b"".join(dump_line(row.to_dict()) for row in batch.values())
        if seconds:
            data += dump_line({"kind": "time", "seconds": seconds})
        self._append(data)
        self._end += len(data)
        self._rows |= batch
        self.seconds += seconds
        self.checks = None

    def finish(self, checks: Sequence[Check], seconds: float) -> None:
        """Write the last line (again, if the file had one)."""
        last = Checks(list(checks), seconds)
        self._append(dump_line(last.to_dict()))
        self.checks = last

    def close(self) -> None:
        """Close the file; a closed writer cannot be used again. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
