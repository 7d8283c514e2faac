"""The rows file: read, write, resume.

Append-only, each batch at once and flushed to the disk, so that a killed evaluation loses at most the batch it was
working on. A line {"kind":"time",...} ends a batch; what stands after the last one is no whole batch, and is done
again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.evaluation import Evaluation
from robustmoe.records.files import dump_line, explained, parse_line, whole_lines, write_atomic
from robustmoe.records.locks import writing
from robustmoe.records.typed import build
from robustmoe.records.types import Check, Checks, Header, Passed, Row, Time, misfits, unknown_part
from robustmoe.records.versions import taken_up

# Two files describe the same work when these agree; the rest of a header tells where and when it was done. Plain
# words stand before hashes, so that a difference is named in the words that the user wrote.
WORK = (
    "model", "data", "split", "shard", "n", "attack", "objective", "norm", "eps", "role", "seed", "precision", "parts",
    "routers", "files", "model_hash", "data_hash", "index_hash", "certified_hash",
)  # fmt: skip


def difference(old: Header, new: Header) -> str | None:
    """Returns the first field of :data:`WORK` in which two headers differ; None if they describe the same work. Where
    the rows depend on the batches, the batch size belongs to the work too. Shards that were merged are the whole."""
    names: tuple[str, ...] = (*WORK, "batch_size") if new.bound_to_batches else WORK
    shards = (header.shard.endswith(" shards") and not other.shard for header, other in ((old, new), (new, old)))
    if any(shards):
        names = tuple(name for name in names if name != "shard")
    return next((name for name in names if getattr(old, name) != getattr(new, name)), None)


def differing(old: Header, new: Header) -> str:
    """Returns the first field in which the work of two headers differs, in words; "" if it is the same work."""
    name = difference(old, new)
    return "" if name is None else told(name, old, new)


def told(name: str, old: Header, new: Header) -> str:
    """Returns a field in which two headers differ, in words: "index hash", "content of mine.py (...)"."""
    if name != "files":
        return name.replace("_", " ")
    path = next(path for path in {**old.files, **new.files} if old.files.get(path) != new.files.get(path))
    then, now = (header.files.get(path, "none")[:12] for header in (old, new))
    return f"content of {path} (SHA-256 {then} then, {now} now)"


def read(path: str | os.PathLike[str]) -> Evaluation:
    """Returns a whole rows file, rows sorted by index. A half-written last line is ignored; any other bad line, and two
    different rows of one image, are a UserError that names the line."""
    path = Path(path)
    lines = whole_lines(path) if path.exists() else []
    if not lines:
        raise UserError(f"no rows in {path}; `robustmoe evaluate RUN` makes them")
    contents = _contents(path, lines)
    return _result(contents.header, contents.rows, contents.checks)


def rows_files(run: str | os.PathLike[str]) -> list[Path]:
    """Returns the rows files of a run folder, by name; those in which nothing is yet are left out. (What is no file,
    such as a link to one that is gone, is told when it is read.)"""
    files = sorted(path for path in (Path(run) / "rows").glob("*.jsonl") if not path.name.endswith(".examples.jsonl"))
    return [path for path in files if not path.is_file() or path.stat().st_size > 0]


_LINES: dict[str, type[Row | Passed | Time | Checks]] = {"row": Row, "part": Passed, "time": Time, "checks": Checks}


def _result(header: Header, rows: dict[int, Row], checks: Checks | None) -> Evaluation:
    return Evaluation(header, [rows[index] for index in sorted(rows)], checks)


@dataclass
class _Contents:
    """What a file holds. ``rows`` by index; ``passed``: for each part, the images that it did not break; ``seconds``
    and ``queries`` spent on them."""

    header: Header
    rows: dict[int, Row] = field(default_factory=dict)
    passed: dict[str, set[int]] = field(default_factory=dict)
    checks: Checks | None = None
    seconds: float = 0.0
    queries: int = 0

    def add(self, data: dict[str, Any]) -> None:
        """Add one line more."""
        if self.checks is not None:
            raise UserError("lines after the checks, which end a file")
        if data.get("kind") not in _LINES:
            raise UserError(f"unknown kind {data.get('kind')!r:.80}; known: header, {', '.join(_LINES)}")
        line = build(_LINES[data["kind"]], data)
        if isinstance(line, Row):
            self._take(line)
        elif isinstance(line, Passed):
            for problem in unknown_part(line.part, self.header):
                raise UserError(f"part: {problem}")
            self.passed.setdefault(line.part, set()).add(line.index)
        elif isinstance(line, Checks):
            self.checks = line
        else:
            self.seconds += line.seconds
            self.queries += line.queries

    def _take(self, row: Row) -> None:
        for problem in misfits(row, self.header):
            raise UserError(f"row: {problem}")
        _put(self.rows, row)
        if len(self.rows) > self.header.n:
            raise UserError(f"this is row {len(self.rows)} of the {self.header.n} images that the file is about")


def _contents(path: Path, lines: list[bytes]) -> _Contents:
    contents: _Contents | None = None
    for number, line in enumerate(lines, 1):
        data = parse_line(line, path, number)
        try:
            if contents is None:
                contents = _Contents(Header.from_dict(data))
            else:
                contents.add(data)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    assert contents is not None  # `lines` is not empty, and its first line is read as a header
    return contents


def _whole_batches(path: Path, lines: list[bytes]) -> list[bytes]:
    """Returns the lines up to the end of the last whole batch."""
    end = len(lines)
    while end > 1 and parse_line(lines[end - 1], path, end).get("kind") not in ("time", "checks"):
        end -= 1
    return lines[:end]


def _put(rows: dict[int, Row], row: Row) -> None:
    if rows.setdefault(row.index, row) != row:
        raise UserError(f"image {row.index} has two different rows; delete one of them")


def _shown(name: str, value: Any) -> str:
    """Returns a header's value in a message; of a hash, its start."""
    return repr(value[:12] if name.endswith("_hash") else value)


Recognise = Callable[[Path, list[tuple[int, int]]], None]


class Writer:
    """Creates a rows file, or resumes the one that is there.

    ``done`` holds the indices of the images that have a row, ``passed`` those that a part of a suite did not break (by
    the part's name), ``checks`` the checks of a finished file (else None), ``seconds`` and ``queries`` what was spent
    so far. What a killed writer left of a batch is cut. ``shorter(n)`` gives the header that the same work would have
    on its first n images: a file of those is extended. ``recognise`` is asked, before anything is changed, about the
    images that have a row, as (index, label), and raises UserError for wrong ones. ``resumed``: what versions are
    others than those that wrote so far, in words; the header says so too. UserError if the file holds other work, is
    being written by another process, or cannot be read or written."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Header,
        shorter: Callable[[int], Header] | None = None,
        recognise: Recognise = lambda path, images: None,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.checks: Checks | None = None
        self.seconds = 0.0
        self.queries = 0
        self.passed: dict[str, set[int]] = {}
        self.resumed = ""
        self._rows: dict[int, Row] = {}
        self._descriptor = -1
        self._held = contextlib.ExitStack()
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is not a regular file; name a .jsonl file")
        folder = self.path.parent.parent if self.path.parent.name == "rows" else self.path.parent
        self._held.enter_context(writing(folder, self.path.relative_to(folder).as_posix()))
        try:
            with explained("write", self.path):
                self.path.parent.mkdir(exist_ok=True)
            self._open()
            lines = self._resume(shorter, recognise)
            # Rows are kept, finishing lines are rewritten: `_end` is where the next batch goes.
            kept = lines[:-1] if self.checks is not None else lines
            self._end = sum(len(line) + 1 for line in kept)
            if not lines:
                first = dump_line(header)
                self._append(first)
                self._end = len(first)
            elif self.checks is None:
                self._cut()
        except UserError:
            self.close()
            raise

    def _open(self) -> None:
        with explained("write", self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)

    def _resume(self, shorter: Callable[[int], Header] | None, recognise: Recognise) -> list[bytes]:
        """Take up what the file holds; its lines of whole batches."""
        lines = whole_lines(self.path)
        if not lines:
            start = self.path.read_bytes()
            expected = dump_line(self.header)[: len(b'{"kind":"header"')]
            if not expected.startswith(start[: len(expected)]):
                raise UserError(f"{self.path} is not a rows file and was left alone; choose another --out")
            return []
        lines = _whole_batches(self.path, lines)
        contents = _contents(self.path, lines)
        old, self.checks = contents.header, contents.checks
        name = difference(old, self.header)
        longer = name is not None and _extends(self.header, old, shorter)
        if name is not None and not longer:
            was, now = (_shown(name, getattr(header, name)) for header in (old, self.header))
            differs = (
                f"its {name} is {was}, this one's is {now}"
                if name != "files"
                else f"another {told(name, old, self.header)}"
            )
            raise UserError(f"{self.path} holds other work: {differs}; choose another --out or delete the file")
        recognise(self.path, [(row.index, row.label) for row in contents.rows.values()])
        self._rows, self.passed = contents.rows, contents.passed
        self.seconds, self.queries = contents.seconds, contents.queries
        header, words = taken_up(old, self.header, len(self._rows))
        if longer or (words and self.checks is None):
            self.resumed = words
            if longer:
                header = replace(self.header, versions=header.versions, commit=header.commit, resumed=header.resumed)
            self.header = header
            return self._under_this_header(lines)
        self.header = old
        return lines

    def _under_this_header(self, lines: list[bytes]) -> list[bytes]:
        """Returns the same batches in a new file under this writer's header, which takes the old one's place."""
        kept = lines[1:-1] if self.checks is not None else lines[1:]
        first = dump_line(self.header)
        self.checks = None
        write_atomic(self.path, first + b"".join(line + b"\n" for line in kept))
        os.close(self._descriptor)
        self._open()
        return whole_lines(self.path)

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
        """Returns the indices of the images that have a row."""
        return set(self._rows)

    @property
    def result(self) -> Evaluation:
        """Returns what the file holds now, as `read` would give it."""
        return _result(self.header, self._rows, self.checks)

    def write(self, rows: Iterable[Row], seconds: float = 0.0, passed: Iterable[Passed] = (), queries: int = 0) -> None:
        """Append one batch, the images that its part did not break, and the ``seconds`` and ``queries`` it took, and
        flush it to the disk. Rows of images that are done already are skipped."""
        batch: dict[int, Row] = {}
        for row in rows:
            if row.index not in self._rows:
                _put(batch, row)
        left = [each for each in passed if each.index not in self.passed.get(each.part, ())]
        if not batch and not left:
            return
        data = b"".join(map(dump_line, [*batch.values(), *left, Time(seconds, queries)]))
        self._append(data)
        self._end += len(data)
        self._rows |= batch
        for each in left:
            self.passed.setdefault(each.part, set()).add(each.index)
        self.seconds += seconds
        self.queries += queries
        self.checks = None

    def finish(self, checks: Sequence[Check], seconds: float) -> None:
        """Write the last line (again, if the file had one)."""
        last = Checks(list(checks), seconds, self.queries)
        self._append(dump_line(last))
        self.checks = last

    def close(self) -> None:
        """Close the file; a closed writer cannot be used again. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._held.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _extends(new: Header, old: Header, shorter: Callable[[int], Header] | None) -> bool:
    """Says whether the old work is the new one's beginning: the same on the first images, batches without meaning."""
    if shorter is None or new.bound_to_batches or not 0 < old.n < new.n:
        return False
    return difference(old, shorter(old.n)) is None
