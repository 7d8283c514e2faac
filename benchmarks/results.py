"""The files under docs/results: what a command measured, and all that its number depends on."""

from __future__ import annotations

import json
import statistics
import subprocess
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
        "commit": _commit(),
        "hardware": provenance.hardware(torch.device("cpu")),
        "versions": provenance.versions(),
        **more,
    }


def _commit() -> str:
    """The last commit that changed the package's sources (rebasing what measures them leaves it). SystemExit where they
    differ from it.
    """
    source = Path(provenance.__file__).parent
    last = ["git", "log", "-1", "--format=%H", "--", str(source)]
    found = subprocess.run(last, cwd=source, capture_output=True, text=True, check=True).stdout.strip()
    provenance.commit.cache_clear()  # a long benchmark starts processes of its own: the sources as they are now
    if (provenance.commit() or "").endswith("+"):
        raise SystemExit(
            "the sources differ from their last commit: commit first, a results file names what it measured"
        )
    return found


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 of one value), least, largest and count of ``values``."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def write(path: Path, about: Mapping[str, Any], numbers: Mapping[str, Any], **more: Any) -> None:
    """Writes one results file, whole or not at all. ``numbers``: what pages are tied to (tests/pages.py); ``more``:
    what else is kept beside them, such as every single run."""
    text = _text({"about": about, "numbers": numbers, **more}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _text(value: Any, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each entry of the upper levels."""
    if depth == 0 or not isinstance(value, dict | list) or not any(isinstance(v, dict | list) for v in _values(value)):
        return json.dumps(value, ensure_ascii=False, default=float)
    inner = indent + " "
    if isinstance(value, list):
        lines = [inner + _text(each, depth - 1, inner) for each in value]
    else:
        lines = [f"{inner}{json.dumps(key)}: {_text(each, depth - 1, inner)}" for key, each in value.items()]
    left, right = "[]" if isinstance(value, list) else "{}"
    return f"{left}\n" + ",\n".join(lines) + f"\n{indent}{right}"


def _values(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
