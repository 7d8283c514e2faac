"""The result file: one header, then one row an image, then the checks. Read, write, resume, validate, merge.

JSON lines, append-only, flushed to the disk per batch, so that a killed evaluation loses at most the batch it was
working on. Numbers that are not finite are written as Python's ``json`` writes them (``NaN``, ``Infinity``).
Bad content and failed writes raise :class:`~robustmoe.errors.UserError`, one line each.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from robustmoe.errors import UserError

VERSION = 1
OBJECTIVES = ("joint", "experts_only", "router_only")
NORMS = ("linf", "l2", "l1")
ROLES = ("main", "curve")
STATUSES = ("pass", "not run", "warn", "fail")  # best first

# Two files describe the same work when these agree; the rest of a header tells where and when it was done. Plain
# words stand before hashes, so that a difference is named in the words that the user wrote.
WORK = (
    "model", "data", "split", "n", "attack", "objective", "norm", "eps", "role", "seed", "precision", "routers",
    "model_hash", "data_hash", "index_hash",
)  # fmt: skip

T = TypeVar("T")


# Types -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterInfo:
    """One router: ``experts`` to choose from, ``k`` chosen an item, ``items`` an image (1, or tokens)."""

    experts: int
    k: int
    items: int


@dataclass(frozen=True)
class Header:
    """What was evaluated, against what, where and how. ``eps`` is in pixels of [0, 1]; ``n`` is the number of images
    planned; ``started`` is ISO 8601; ``attack`` is None for a clean evaluation, ``routers`` is {} for a dense model."""

    run: str
    model: str
    data: str
    split: str
    attack: str | None
    objective: str | None
    norm: str
    eps: float
    role: str
    method: str | None
    n: int
    seed: int
    data_hash: str
    index_hash: str
    model_hash: str
    versions: dict[str, str]
    commit: str | None
    device: str
    threads: int
    precision: str
    command: str
    classes: list[str]
    routers: dict[str, RouterInfo]
    parameters: int
    started: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file's first line."""
        routers = {name: dict(vars(info)) for name, info in self.routers.items()}
        return {"kind": "header", "version": VERSION, **vars(self), "routers": routers}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Header:
        """The inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        if data.get("kind") != "header":
            raise UserError('not a rows file: its first line must be {"kind":"header",...}')
        if data.get("version") != VERSION:
            raise UserError(
                f"rows file of version {data.get('version')!r}, this robustmoe reads version {VERSION}: "
                "install the robustmoe that wrote it, or evaluate again"
            )
        header = _build(Header, {name: value for name, value in data.items() if name != "version"})
        _choice("header", "norm", header.norm, NORMS)
        _choice("header", "role", header.role, ROLES)
        if header.objective is not None or header.attack is not None:
            _choice("header", "objective", header.objective, OBJECTIVES)
        return header


@dataclass(frozen=True)
class Row:
    """One image: its index in the data set, its label, the exact model's predictions on the clean and the attacked
    image, the perturbation's size in each norm (pixels of [0, 1]), the share of its items that changed expert, and how
    many items each expert got. ``router_exposed``: the attacked route on the clean image; ``experts_exposed``: the
    clean route on the attacked image; both None for a dense model."""

    index: int
    label: int
    clean: int
    adversarial: int
    size: dict[str, float]
    rerouted: dict[str, float]
    router_exposed: int | None
    experts_exposed: int | None
    route_clean: dict[str, list[int]]
    route_adversarial: dict[str, list[int]]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of one line."""
        return {"kind": "row", **vars(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return _build(Row, data)


@dataclass(frozen=True)
class Check:
    """One answer to "can this number be believed?": ``status`` is pass, warn, fail or not run."""

    id: str
    name: str
    status: str
    value: Any
    sentence: str

    @staticmethod
    def from_dict(data: Any) -> Check:
        """A check from its JSON object; UserError names the field that is wrong."""
        check = _build(Check, data)
        _choice("check", "status", check.status, STATUSES)
        return check


@dataclass(frozen=True)
class Checks:
    """The last line of a finished file: the checks, and the wall time of the evaluation in seconds."""

    checks: list[Check]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file's last line."""
        return {"kind": "checks", "checks": [dict(vars(check)) for check in self.checks], "seconds": self.seconds}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Checks:
        """The inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return _build(Checks, data)


@dataclass(frozen=True)
class Time:
    """A line after the rows of a batch: the seconds they took. Their sum survives a kill."""

    seconds: float


@dataclass(frozen=True)
class Example:
    """One image to show: ``before`` and ``after`` are base64 text of PNG files."""

    index: int
    label: int
    clean: int
    adversarial: int
    route_clean: dict[str, list[int]]
    route_adversarial: dict[str, list[int]]
    before: str
    after: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of one line."""
        return dict(vars(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Example:
        """The inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return _build(Example, data)


class Result(NamedTuple):
    """A whole rows file: unpacks as ``header, rows, checks``. ``checks`` is None while the evaluation is unfinished."""

    header: Header
    rows: list[Row]
    checks: Checks | None


# Validation: one reader a type, chosen by the text of a field's annotation ----------------------------------------


def _exactly(kind: type, words: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(words)
        return value

    return read


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("a number")
    return float(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _list(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def whole(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise TypeError("a list")
        return [read(item) for item in value]

    return whole


def _dict(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def whole(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError("an object")
        return {name: read(item) for name, item in value.items()}

    return whole


_int, _str = _exactly(int, "a whole number"), _exactly(str, "a text")
_READERS: dict[str, Callable[[Any], Any]] = {
    "Any": lambda value: value,
    "int": _int,
    "int | None": _optional(_int),
    "float": _float,
    "str": _str,
    "str | None": _optional(_str),
    "list[str]": _list(_str),
    "dict[str, str]": _dict(_str),
    "dict[str, float]": _dict(_float),
    "dict[str, list[int]]": _dict(_list(_int)),
    "dict[str, RouterInfo]": _dict(lambda value: _build(RouterInfo, value)),
    "list[Check]": _list(Check.from_dict),
}


def _build(cls: Callable[..., T], data: Any) -> T:
    """An instance of a dataclass from a JSON object: every field there, of its type, and no other."""
    kind = getattr(cls, "__name__", "object").lower()
    if not isinstance(data, dict):
        raise UserError(f"{kind}: expected an object, got {data!r}")
    data = {name: value for name, value in data.items() if name != "kind"}
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in data:
            raise UserError(f"{kind}: field {field.name!r} is missing")
        value = data.pop(field.name)
        try:
            values[field.name] = _READERS[str(field.type)](value)
        except TypeError as error:
            raise UserError(f"{kind}: field {field.name!r} must be {error}, got {value!r:.80}") from None
    if data:
        raise UserError(f"{kind}: unknown field {next(iter(data))!r}")
    return cls(**values)


def _choice(kind: str, field: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{kind}: field {field!r} must be one of {', '.join(allowed)}, got {value!r}")


# Files -----------------------------------------------------------------------------------------------------------

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
def _explained(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a one-line UserError that says what to do."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the path and its permissions")
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}; {hint}") from error


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. UserError if it cannot be written, and
    then the old file is as it was. Missing folders are made."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _explained("write", path):
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


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that end with a newline, without it; what a killed writer left after the last newline is dropped."""
    with _explained("read", path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; name a .jsonl file")
        return path.read_bytes().split(b"\n")[:-1]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: not a JSON object; delete that line or the file")
    return value


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a half-written last line. UserError on any other bad line."""
    path = Path(path)
    return [_parse(line, path, number) for number, line in enumerate(_whole_lines(path), 1)]


def append_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Append one object as a line and flush it to the disk; a half-written last line left by a kill is cut first.
    UserError if it cannot be written."""
    path = Path(path)
    with _explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        with open(path, "ab") as file:
            file.write(_dump(value))
            file.flush()
            with contextlib.suppress(OSError):  # a pipe or a device has nothing to synchronise
                os.fsync(file.fileno())


def examples_path(rows: str | os.PathLike[str]) -> Path:
    """``RUN/rows/<slug>.examples.jsonl`` for ``RUN/rows/<slug>.jsonl``."""
    return Path(rows).with_suffix(".examples.jsonl")


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write the examples file, atomically."""
    write_atomic(path, b"".join(_dump(example.to_dict()) for example in examples))


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """The examples of a file; UserError on a bad line."""
    return [Example.from_dict(value) for value in read_jsonl(path)]


# Rows files --------------------------------------------------------------------------------------------------------


def difference(old: Header, new: Header) -> str | None:
    """The first field of :data:`WORK` in which two headers differ; None if they describe the same work."""
    return next((name for name in WORK if getattr(old, name) != getattr(new, name)), None)


def read(path: str | os.PathLike[str]) -> Result:
    """A whole rows file, rows sorted by index. A half-written last line is ignored; any other bad line, and two
    different rows of one image, are a UserError that names the line."""
    path = Path(path)
    lines = _whole_lines(path) if path.exists() else []
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
        data = _parse(line, path, number)
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
                seconds += _build(Time, data).seconds
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
        with _explained("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _lock(self._descriptor, self.path)
            lines = self._resume()
            # Rows are kept, finishing lines are rewritten: `_end` is where the next row goes.
            kept = lines[:-1] if self.checks is not None else lines
            self._end = sum(len(line) + 1 for line in kept)
            if not lines:
                first = _dump(header.to_dict())
                self._append(first)
                self._end = len(first)
            elif self.checks is None:
                self._cut()
        except UserError:
            self.close()
            raise

    def _resume(self) -> list[bytes]:
        lines = _whole_lines(self.path)
        if not lines:
            start = self.path.read_bytes()
            expected = _dump(self.header.to_dict())[: len(b'{"kind":"header"')]
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
        with _explained("write", self.path):
            os.ftruncate(self._descriptor, self._end)

    def _append(self, data: bytes) -> None:
        """Put lines at the end, flushed to the disk. If that fails, the file is cut back to what it was."""
        with _explained("write", self.path):
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
        data = b"".join(_dump(row.to_dict()) for row in batch.values())
        if seconds:
            data += _dump({"kind": "time", "seconds": seconds})
        self._append(data)
        self._end += len(data)
        self._rows |= batch
        self.seconds += seconds
        self.checks = None

    def finish(self, checks: Sequence[Check], seconds: float) -> None:
        """Write the last line (again, if the file had one)."""
        last = Checks(list(checks), seconds)
        self._append(_dump(last.to_dict()))
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
