"""The file of images to show, beside a rows file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robustmoe.errors import UserError
from robustmoe.records.files import dump_line, read_jsonl, write_own
from robustmoe.records.typed import Answer, Count, build
from robustmoe.records.types import Header, misfits

Experts = dict[str, list[list[Count]]]


@dataclass(frozen=True)
class Example:
    """One image to show: ``before`` and ``after`` are base64 text of PNG files. ``experts_clean``,
    ``experts_adversarial``: router -> for each of the image's items the experts that it went to, best first; routers
    that send every item to all their experts are left out. ``layout``: of the line; older lines say none and have no
    experts by item."""

    index: Count
    label: Count
    clean: Answer
    adversarial: Answer
    route_clean: dict[str, list[Count]]
    route_adversarial: dict[str, list[Count]]
    before: str
    after: str
    experts_clean: Experts = field(default_factory=dict)
    experts_adversarial: Experts = field(default_factory=dict)
    layout: Literal[2] = field(default=2, kw_only=True)


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
            for problem in (*misfits(examples[-1], header), *_misrouted(examples[-1], header)):
                raise UserError(problem)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}; delete that line or the file") from None
    return examples


def _misrouted(example: Example, header: Header) -> Iterator[str]:
    """Yields what cannot be: experts of other routers, items or numbers than the header's."""
    if example.experts_clean.keys() != example.experts_adversarial.keys():
        yield "fields 'experts_clean' and 'experts_adversarial' are of different routers"
    for name in ("experts_clean", "experts_adversarial"):
        for router, items in getattr(example, name).items():
            info = header.routers.get(router)
            if info is None:
                yield f"field '{name}' is of a router {router!r}, expected {sorted(header.routers)}"
            elif len(items) != info.items:
                yield f"field '{name}[{router}]' is of {len(items)} items, expected {info.items}"
            elif any(max(item, default=0) >= info.experts or len(set(item)) < len(item) for item in items):
                yield f"field '{name}[{router}]' must be of different experts from 0 to {info.experts - 1}"
