"""Which folder a run is that was named: a folder, zoo:NAME or hub:OWNER/NAME."""

from __future__ import annotations

from pathlib import Path

from robustmoe import hub, zoo
from robustmoe.errors import UserError, nearest


def run_folder(run: str, begun: bool = True) -> Path:
    """Return the run folder of that name. UserError where there is none, unless it is one that has not ``begun``."""
    if run.startswith(zoo.PREFIX):
        return zoo.zoo_model(run)
    if run.startswith(hub.PREFIX):
        return hub.pull(run)
    folder = Path(run)
    if folder.is_dir() or not (begun or folder.exists()):
        return folder
    if folder.exists():
        raise UserError(f"{run!r} is a file, not a run folder")
    near = {str(f.parent) for place in (folder.parent, Path("runs")) for f in place.glob("*/config.json")}
    raise UserError(f"there is no run folder {run!r}" + (f"; {nearest(run, near)}" if near else ""))
