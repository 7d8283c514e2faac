"""What there is, counted: writes docs/results/facts.json.

python benchmarks/facts.py

A test counts again (tests/test_pages.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from results import RESULTS, described, write

ROOT = Path(__file__).parents[1]


def facts() -> dict[str, int]:
    """The counts by name."""
    folders = {folder.name: len(list(folder.glob("*.toml"))) for folder in (ROOT / "recipes").iterdir()}
    planted = json.loads((RESULTS / "planted.json").read_text(encoding="utf-8"))["numbers"]
    missed = sum(row["pyautoattack"] == 100 for row in planted.values())
    return {"planted_missed": missed, **{f"recipes_{name}": count for name, count in folders.items() if count}}


if __name__ == "__main__":
    write(RESULTS / "facts.json", described("python benchmarks/facts.py"), facts())
