"""The base class of what a measurement leaves in a run folder: one JSON file, read by the types of its fields."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from robustmoe.errors import UserError, printable
from robustmoe.records.files import file_stem, read_json, write_own
from robustmoe.records.typed import build, check_version, encode
from robustmoe.records.types import VERSION, Header, miscounts

Column = tuple[str, Sequence[Any], int]
R = TypeVar("R", bound="Record")
T = TypeVar("T", bound="Told", covariant=True)


class Told:
    """What can be printed, and shown in a notebook; its numbers are worked out when they are asked for."""

    def summary(self, evaluations: Sequence[Any] = ()) -> Any:
        """Returns the numbers of the record, beside the evaluations of the same model where its kind compares them.
        UserError if it has none yet."""
        return _telling().summary(self, evaluations)

    def __str__(self) -> str:
        """Returns what the record says and its numbers, as lines of at most 80 columns."""
        return printable(_telling().text(self))

    def _repr_html_(self) -> str:
        """Returns the record as the report shows it, for a notebook."""
        return str(_telling().html(self))


class Records(tuple[T, ...]):
    """Several records: a tuple that prints, and shows itself in a notebook, as its records do."""

    def summary(self) -> list[Any]:
        """Returns the numbers of each."""
        return [record.summary() for record in self]

    def __str__(self) -> str:
        """Returns the records one after the other; evaluations of one model in one table, with their worst case."""
        return printable(_telling().together(self))

    def _repr_html_(self) -> str:
        """Returns the records as the report shows them, for a notebook."""
        return "".join(record._repr_html_() for record in self)


@dataclass(frozen=True)
class Record(Told):
    """What was measured, as it was measured; a subclass adds the fields. The report asks each kind that it shows for
    ``header``, for ``done`` (whether all that was asked for is there) and for ``seconds`` of wall time.

    ``kind``: its name, which the file says. ``file``: where it stands in a run folder; a "*" in it is replaced by
    :attr:`which`, where a folder may hold several of a kind. ``version``: of the file; no other is read. ``verb``: the
    command that makes it."""

    kind: ClassVar[str]
    file: ClassVar[str]
    version: ClassVar[int]
    verb: ClassVar[str]

    def __init_subclass__(cls, *, kind: str, file: str, version: int, verb: str) -> None:
        cls.kind, cls.file, cls.version, cls.verb = kind, file, version, verb

    @property
    def which(self) -> str:
        """Returns what tells the records of one kind in a folder apart; "" where there is only one."""
        return ""

    def images(self) -> list[tuple[int, int]]:
        """Returns (index in the data set, label) of each image that is done, in the order of the file."""
        return list(zip(getattr(self, "index", ()), getattr(self, "labels", ())))

    def columns(self) -> Iterator[Column]:
        """Returns the lists that must have a certain length: (name, list, length)."""
        yield from ()

    def answers(self) -> Iterator[tuple[str, Sequence[int]]]:
        """Returns the lists of predicted classes: (name, list)."""
        yield from ()

    def problems(self) -> Iterator[str]:
        """Returns what does not fit together, in words. A subclass adds to the lengths of the columns, the classes in
        them and the images, each of which is there once."""
        for name, column, length in self.columns():
            if len(column) != length:
                yield f"{name} has {len(column)} entries, expected {length}"
        header: Header | None = getattr(self, "header", None)
        last = len(header.classes) - 1 if header is not None else 0
        labels, index = getattr(self, "labels", ()), getattr(self, "index", ())
        for least, (name, column) in [(0, ("field 'labels'", labels)), *((-1, each) for each in self.answers())]:
            if column and not least <= min(column) <= max(column) <= last:
                yield f"{name} must be from {least} to {last}"
        if len(set(index)) < len(index):
            yield "an image is there twice"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the file."""
        return {"kind": self.kind, "version": self.version, **{name: encode(item) for name, item in vars(self).items()}}

    @classmethod
    def from_dict(cls: type[R], data: Any) -> R:
        """Returns the inverse of :meth:`to_dict`; UserError says what is wrong."""
        if not isinstance(data, dict) or data.get("kind") != cls.kind:
            raise UserError(f'not of the kind {cls.kind}: expected {{"kind": "{cls.kind}", ...}}')
        check_version(cls.kind, data, cls.version, "make it anew")
        if isinstance(data.get("header"), dict):
            check_version(f"{cls.kind}: header", data["header"], VERSION, "make it anew")
        return build(cls, {name: value for name, value in data.items() if name not in ("kind", "version")})

    @classmethod
    def path(cls: type[R], folder: str | os.PathLike[str], which: str = "") -> Path:
        """Returns where the record stands in a run folder."""
        return Path(folder) / cls.file.replace("*", file_stem(which))

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file into a run folder, atomically, and return its path. UserError if it cannot be written, or if
        another file than one of this kind stands there."""
        path = self.path(folder, self.which)
        text = json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False) + "\n"
        write_own(path, text, f'{{"kind":"{self.kind}"')
        return path

    @classmethod
    def read(cls: type[R], folder: str | os.PathLike[str], which: str = "") -> R | None:
        """Returns the record of a run folder; None without one. UserError if the file is not such a record."""
        return cls._read(cls.path(folder, which))

    @classmethod
    def read_all(cls: type[R], folder: str | os.PathLike[str]) -> list[R]:
        """Returns every record of this kind in a run folder, by the name of its file."""
        paths = sorted(Path(folder).glob(cls.file)) if "*" in cls.file else [cls.path(folder)]
        every = (cls._read(path) for path in paths)
        return [record for record in every if record is not None]

    @classmethod
    def _read(cls: type[R], path: Path) -> R | None:
        return read_json(path, cls.from_dict, f"delete it, and `robustmoe {cls.verb}` makes it anew")


def _telling() -> Any:
    """Returns the module that tells records; by name, as it stands above this one."""
    return importlib.import_module("robustmoe.reporting.kinds")


def by_router(name: str, table: Mapping[str, Sequence[Any]], n: int) -> Iterator[Column]:
    """Returns the columns of a table router -> list of ``n`` entries."""
    for router, column in table.items():
        yield f"{name}[{router!r}]", column, n


def other_routers(name: str, table: Mapping[str, object], header: Header) -> Iterator[str]:
    """Returns the problem that a table has not the header's routers, if it has not."""
    if set(table) != set(header.routers):
        yield f"{name} is of the routers {sorted(table)}, expected {sorted(header.routers)}"


def strange_routers(name: str, table: Mapping[str, object], header: Header) -> Iterator[str]:
    """Returns the problem that a table has a router which is not the header's, if it has."""
    for router in table.keys() - header.routers.keys():
        yield f"{name} is of a router {router!r}, expected {sorted(header.routers)}"


def per_expert(name: str, table: Mapping[str, Sequence[list[int]]], header: Header) -> Iterator[str]:
    """Yields what cannot be: numbers of items that a router gives its experts, a list an image."""
    for router, rows in table.items():
        for at, counts in enumerate(rows):
            yield from miscounts(f"{name}[{router!r}][{at}]", counts, header.routers.get(router))
