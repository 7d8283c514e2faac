"""The file of deep checks in a run folder: what `robustmoe check` found, and of which model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmoe.records.files import read_json, write_atomic
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
    return read_json(audit_path(run), lambda data: build(Audit, data), f"`robustmoe check {run}` makes it anew")
