"""The files under docs/results: what a command measured, and all that its number depends on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustmoe import provenance

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def described(command: str, **more: Any) -> dict[str, Any]:
    """Where numbers measured now come from."""
    return {
        "command": command,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(torch.device("cpu")),
        "versions": provenance.versions(),
        **more,
    }


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 of one value), least, largest and count of ``values``."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def write(path: Path, about: Mapping[str, Any], numbers: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """Writes one results file, whole or not at all."""
    text = json.dumps({"about": about, "numbers": numbers, "runs": runs}, indent=1, default=float) + "\n"
    half = path.with_suffix(".part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)
