"""The verdict card: the checks as plain text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from robustmoe.records import Check
from robustmoe.reporting.grid import WIDTH

MARKS = {"fail": "! fail", "warn": "  warn"}


def card(checks: Sequence[Check]) -> str:
    """Returns failures first, then warnings, each with its sentence, then how many passed and which were not run and
    why.

    Checks keep their order within a status; sentences are wrapped at 80 columns."""
    shown = [check for status in MARKS for check in checks if check.status == status]
    head = max((len(f"{check.id}  {check.name}") for check in shown), default=0)
    lines = []
    for check in shown:
        start = f"{MARKS[check.status]}  {f'{check.id}  {check.name}':{head}}  "
        lines += textwrap.wrap(check.sentence, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [
            start
        ]
    reasons: dict[str, list[str]] = {}
    for check in checks:
        if check.status == "not run":
            reasons.setdefault(check.sentence, []).append(check.id)
    counts = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail", "not run")}
    lines.append(
        f"{len(checks)} checks: {counts['fail']} failed, {counts['warn']} warned, {counts['pass']} passed, "
        f"{counts['not run']} not run"
    )
    for sentence, ids in reasons.items():
        start = f"not run  {', '.join(ids)}: "
        lines += textwrap.wrap(start + sentence, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
