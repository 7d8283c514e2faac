"""The file of deep checks in a run folder: what `robustmoe check` found, and of which model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records.files import explained, write_atomic
from robustmoe.records.types import Check, build


@dataclass(frozen=True)
class Audit:
    """The checks of one model (``model_hash``) against the ``attacks`` in question, on ``n`` images with ``seed``."""

    model_hash: str
    attacks: list[str]
    n: int
    seed: int
    checks: list[Check]


def audit_path(run: str | os.PathLike[str]) -> Path:
    """``RUN/checks.json``."""
    return Path(run) / "checks.json"


def write_audit(run: str | os.PathLike[str], audit: Audit) -> None:
    """Write the run's file, atomically."""
    data: dict[str, Any] = {**vars(audit), "checks": [dict(vars(check)) for check in audit.checks]}
    write_atomic(audit_path(run), json.dumps(data, indent=1) + "\n")


def read_audit(run: str | os.PathLike[str]) -> Audit | None:
    """What the run's file holds; None without one. UserError if it is not such a file."""
    path = audit_path(run)
    if not path.is_file():
        return None
    with explained("read", path):
        text = path.read_bytes()
    try:
        return build(Audit, json.loads(text))
    except ValueError as error:  # UserError is one
        raise UserError(f"{path}: {error}; `robustmoe check {run}` makes it anew") from None
