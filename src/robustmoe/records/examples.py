"""The file of images to show, beside a rows file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from robustmoe.errors import UserError
from robustmoe.records.files import dump_line, read_jsonl, write_own
from robustmoe.records.typed import Answer, Count, build
from robustmoe.records.types import Header, misfits


@dataclass(frozen=True)
class Example:
    """One image to show: ``before`` and ``after`` are base64 text of PNG files."""

    index: Count
    label: Count
    clean: Answer
    adversarial: Answer
    route_clean: dict[str, list[Count]]
    route_adversarial: dict[str, list[Count]]
    before: str
    after: str


def examples_path(rows: str | os.PathLike[str]) -> Path:
    """Returns ``RUN/rows/<slug>.examples.jsonl`` for ``RUN/rows/<slug>.jsonl``."""
    return Path(rows).with_suffix(".examples.jsonl")


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write the examples file, atomically. UserError where another file stands there."""
    text = b"".join(dump_line(example) for example in examples).decode()
    write_own(path, text, '{"index":')


def read_examples(path: str | os.PathLike[str], header: Header) -> list[Example]:
    """Returns the examples of a file beside rows of that header; UserError names a bad line."""
    examples = []
    for number, value in enumerate(read_jsonl(path), 1):
        try:
            examples.append(build(Example, value))
            for problem in misfits(examples[-1], header):
                raise UserError(problem)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; delete that line or the file") from None
    return examples
