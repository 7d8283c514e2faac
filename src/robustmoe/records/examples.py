"""The file of images to show, beside a rows file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.records.files import dump_line, read_jsonl, write_atomic
from robustmoe.records.typed import build


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
        """Returns the JSON object of one line."""
        return dict(vars(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Example:
        """Returns the inverse of :meth:`to_dict`; UserError names the field that is wrong."""
        return build(Example, data)


def examples_path(rows: str | os.PathLike[str]) -> Path:
    """Returns ``RUN/rows/<slug>.examples.jsonl`` for ``RUN/rows/<slug>.jsonl``."""
    return Path(rows).with_suffix(".examples.jsonl")


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write the examples file, atomically."""
    write_atomic(path, b"".join(dump_line(example.to_dict()) for example in examples))


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Returns the examples of a file; UserError on a bad line."""
    return [Example.from_dict(value) for value in read_jsonl(path)]
