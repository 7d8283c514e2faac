"""Runs as a table for pandas: one row an image and attack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robustmoe.analysis import names, right, robust
from robustmoe.errors import UserError
from robustmoe.options import several
from robustmoe.records import Header, Row
from robustmoe.reporting.collect import collect

if TYPE_CHECKING:
    import pandas


def frame(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> pandas.DataFrame:
    """Return a pandas DataFrame with one row an image and attack, of all attacks of these run folders (needs the extra
    ``frame``).

    Columns: ``run``, ``model``, ``method``, ``seed`` (of the training), ``attack``, ``norm``, ``eps`` and ``size`` (of
    the change, in that norm, pixels of [0, 1]), ``role`` (main, or curve for other radii), ``data``, ``split``,
    ``index`` (of the image), ``label``, ``clean`` and ``adversarial`` (the classes predicted), ``right``, ``robust``,
    ``rerouted`` (share of items that changed expert, mean over the routers; nan for a dense model)."""
    try:
        import pandas
    except ImportError:
        raise UserError("rm.frame needs pandas; pip install 'robustmoe[frame]'") from None
    rows = []
    for view in collect(several(runs)):
        headers = [result.header for result in view.results]
        for name, (header, images, _) in zip(names(headers), view.results, strict=True):
            about = {
                "run": view.name, "model": header.model, "method": header.method, "seed": view.config.get("seed"),
                "attack": name, "norm": header.norm, "eps": header.eps, "role": header.role, "data": header.data,
                "split": header.split,
            }  # fmt: skip
            rows += [{**about, **_of_row(row, header)} for row in images]
    return pandas.DataFrame(rows)


def _of_row(row: Row, header: Header) -> dict[str, Any]:
    moved = list(row.rerouted.values())
    return {
        "index": row.index, "label": row.label, "clean": row.clean, "adversarial": row.adversarial,
        "right": right(row), "robust": None if header.attack is None else robust(row),
        "size": row.size.get(header.norm), "rerouted": sum(moved) / len(moved) if moved else None,
    }  # fmt: skip
