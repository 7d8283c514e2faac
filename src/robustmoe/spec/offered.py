"""Parts that installed packages offer, by entry points: the group is "robustmoe." and the kind, such as
"robustmoe.attack", the name is the one that users write, the value is what a name of ours stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from robustmoe.errors import UserError
from robustmoe.spec.own import OwnPart, said

PREFIX = "robustmoe."


@functools.cache
def _entries(kind: str) -> metadata.EntryPoints:
    """Those of a kind; the files of all installed packages are read for it."""
    return metadata.entry_points(group=PREFIX + kind)


@functools.cache
def parts_offered(kind: str) -> dict[str, OwnPart]:
    """The parts of a kind that installed packages offer, by name."""
    return {entry.name: _part(entry) for entry in _entries(kind)}


def packages(kinds: Iterable[str]) -> dict[str, str]:
    """The installed packages that offer parts of these kinds, and their versions."""
    entries = [entry for kind in kinds for entry in _entries(kind)]
    return {entry.dist.name: entry.dist.version for entry in entries if entry.dist is not None}


def _part(entry: metadata.EntryPoint) -> OwnPart:
    """What the entry point names. One that cannot be loaded says so when it is asked for, and hinders nothing else."""
    try:
        return OwnPart(entry.name, entry.load())
    except (Exception, SystemExit) as error:  # whatever it is, it is the package's own
        package = entry.value if entry.dist is None else entry.dist.name
        message = f"{entry.name!r} of the package {package} cannot be loaded: {said(error)}"

    def broken(*args: Any, **kwargs: Any) -> Any:
        """(cannot be loaded)"""
        raise UserError(message)

    return OwnPart(entry.name, broken)
