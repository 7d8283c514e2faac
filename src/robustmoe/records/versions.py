"""Work that another torch, robustmoe or commit takes up: said in one line, and kept in the file that it writes."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robustmoe.progress import note
from robustmoe.records.types import Header, Resumed


def taken_up(old: Header, new: Header, done: int) -> tuple[Header, str]:
    """Returns the header of work that goes on: the old one, with an entry more under ``resumed`` where the new one is
    of other versions or of another commit than the last that worked on it; and what has changed, in words, "" if
    nothing has. ``done``: how much was there before."""
    resumed, words = entries(old.resumed, vars(old), vars(new), done)
    return replace(old, resumed=resumed), words


def tell(path: str | os.PathLike[str], words: str) -> None:
    """Says in one line that the work in ``path`` goes on under other versions, if ``words`` say so."""
    if words:
        note(f"{path} goes on under other versions: {words}")


def entries(
    resumed: list[Resumed], old: Mapping[str, Any], new: Mapping[str, Any], done: int
) -> tuple[list[Resumed], str]:
    """Returns the list of those that took up a work which ``old`` began ("versions", "commit") and ``new`` goes on
    with; and what has changed, in words."""
    last = {"versions": resumed[-1].versions, "commit": resumed[-1].commit} if resumed else old
    words = _changes(last, new)
    if not words:
        return resumed, ""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return [*resumed, Resumed(dict(new["versions"]), new["commit"], now, done)], f"{words} ({done} done before)"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns "torch 2.1.0 then, 2.13.0 now", or "" where all is as it was."""
    then, now = old.get("versions") or {}, new.get("versions") or {}
    names = sorted(then.keys() | now.keys(), key=lambda name: (name not in ("robustmoe", "torch"), name))
    pairs = [(name, then.get(name, "none"), now.get(name, "none")) for name in names]
    was, here = (str(side.get("commit") or "unknown") for side in (old, new))
    pairs.append(("commit", _short(was), _short(here)))
    return "; ".join(f"{name} {was} then, {here} now" for name, was, here in pairs if was != here)


def _short(commit: str) -> str:
    """Returns the start of a commit, with the "+" that says that files differ from it."""
    return f"{commit[:12]}{'+' * commit.endswith('+')}"
