"""The page's style sheet."""

from __future__ import annotations

import re
from pathlib import Path


def css() -> str:
    """Returns the whole style sheet, without its comments: light, dark, narrow and printed."""
    return re.sub(r"/\*.*?\*/\s*", "", Path(__file__).with_name("report.css").read_text("utf-8"), flags=re.DOTALL)
