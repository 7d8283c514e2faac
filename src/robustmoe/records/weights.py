"""What a safetensors file of ours says of itself: the model that it is of, and the SHA-256 of all that it holds. Read
without torch, and without its tensors being made."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself takes no longer one."""


def split(content: bytes) -> tuple[dict[str, Any], int, bytes]:
    """Returns the header of a safetensors file, and where its tensors start."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start, content


def digest(header: dict[str, Any], tensors: BinaryIO | io.BufferedIOBase) -> str:
    """Returns the SHA-256 of a safetensors file's header, without the entry that holds it, and of its tensors."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "sha256"}
    start = json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode()
    hashed = hashlib.sha256(start)
    while piece := tensors.read(1 << 20):
        hashed.update(piece)
    return hashed.hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a safetensors file holds what it was written with; True of a file that does not say, such as another
    tool's.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.get("__metadata__") or {}
        ours = "sha256" in metadata or ("model" in metadata and len(metadata) > 1)  # also where that name is damaged
        return not ours or metadata.get("sha256") == digest(header, file)


def model_of(path: Path) -> str | None:
    """Returns the model whose weights these are, of a whole file that we wrote; None of any other, such as a pickle."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
            metadata = header["__metadata__"]
            return str(metadata["model"]) if metadata["sha256"] == digest(header, file) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
