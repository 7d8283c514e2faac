"""What verbs on a run folder share: what a header says of model and images, and whether a file is of the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from robustmoe import records
from robustmoe.data import Data
from robustmoe.progress import note
from robustmoe.records import Blend, Dissection, Header, Lipschitz, Sweep

Kind = TypeVar("Kind", Blend, Dissection, Lipschitz, Sweep)


def about_run(run: Path, config: dict[str, Any], data: Data) -> dict[str, Any]:
    """Of the model of a run folder on its test images."""
    return {
        "run": str(run),
        "model": config["model"],
        "data": config["data"],
        "split": "test",
        "method": config.get("method"),
        "classes": list(data.classes),
    }


def about_images(model: object, x: object) -> dict[str, Any]:
    """Of a model in memory, on arrays or the test images of a data set."""
    data = x.name if isinstance(x, Data) else "arrays"
    return {"run": "", "model": type(model).__name__, "data": data, "split": "test"}


def taken_up(folder: Path | None, header: Header, kind: type[Kind]) -> Kind | None:
    """What stands in the folder, if it is of the same work; a note says of which other."""
    old = None if folder is None else kind.read(folder)
    if folder is None or old is None:
        return None
    other = records.difference(old.header, header)
    if other is not None:
        note(f"{kind.path(folder)} is of another {other.replace('_', ' ')}; it is made anew")
        return None
    return old
