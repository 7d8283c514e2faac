"""The page's style sheet."""

from __future__ import annotations

from pathlib import Path


def css() -> str:
    """Returns the whole style sheet: light, dark, narrow and printed."""
    return Path(__file__).with_name("report.css").read_text("utf-8")
