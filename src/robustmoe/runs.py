"""Which folder a run is that was named: a folder, zoo:NAME or hub:OWNER/NAME."""

from __future__ import annotations

import os
from pathlib import Path

from robustmoe import hub, zoo
from robustmoe.errors import UserError, nearest


def named(run: str | os.PathLike[str]) -> Path:
    """Return the path of a run: that of zoo:NAME and hub:OWNER/NAME, which are copied into runs/, else what it says.
    UserError where the zoo or the hub has none of that name."""
    if isinstance(run, str) and run.startswith(zoo.PREFIX):
        return zoo.zoo_model(run)
    if isinstance(run, str) and run.startswith(hub.PREFIX):
        return hub.pull(run)
    return Path(run)


def run_folder(run: str, begun: bool = True) -> Path:
    """Return the run folder of that name. UserError where there is none, unless it is one that has not ``begun``."""
    folder = named(run)
    if folder.is_dir() or not (begun or folder.exists()):
        return folder
    if folder.exists():
        raise UserError(f"{run!r} is a file, not a run folder")
    near = {str(f.parent) for place in (folder.parent, Path("runs")) for f in place.glob("*/config.json")}
    raise UserError(f"there is no run folder {run!r}" + (f"; {nearest(run, near)}" if near else ""))
