"""What `robustmoe list KIND` prints, written down beside this file, so that a list needs no torch.

``python -m robustmoe.spec.index`` writes it anew; a test compares it with the tables. Where installed packages offer
parts of a kind, the tables are asked.
"""

from __future__ import annotations

import json
from pathlib import Path

from robustmoe import spec
from robustmoe.spec.offered import packages

FILE = Path(__file__).with_name("index.json")


def entries(kind: str) -> list[tuple[str, str, str]]:
    """Returns for each name of a kind (name, signature, first sentence of its docstring), as `spec.describe` does."""
    if packages([kind]):
        return spec.describe(kind)
    return [(name, signature, line) for name, signature, line in json.loads(FILE.read_text(encoding="utf-8"))[kind]]


def written() -> str:
    """Returns the text of the file, as the tables have it now."""
    tables = {kind: spec.describe(kind) for kind in spec.TABLES}
    return json.dumps(tables, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
