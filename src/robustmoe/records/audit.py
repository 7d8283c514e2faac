"""The file of deep checks in a run folder: what `robustmoe check` found, and of which model."""

from __future__ import annotations

from dataclasses import dataclass

from robustmoe.records.record import Record
from robustmoe.records.typed import Count, Whole
from robustmoe.records.types import Check


@dataclass(frozen=True)
class Audit(Record, kind="checks", file="checks.json", version=1, verb="check"):
    """The checks of one model (``model_hash``) against the ``attacks`` in question, on ``n`` images with ``seed``."""

    model_hash: str
    attacks: list[str]
    n: Count
    seed: Whole
    checks: list[Check]
