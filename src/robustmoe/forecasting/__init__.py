"""How long a training or an evaluation will take, and how much memory, before it is begun: `forecast`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustmoe import hub, zoo
from robustmoe.attacks import linf
from robustmoe.errors import UserError
from robustmoe.evaluation.measuring import session_on
from robustmoe.evaluation.session import in_hand
from robustmoe.forecasting.evaluation import forecast_evaluation
from robustmoe.forecasting.timing import Stopwatch, alone
from robustmoe.forecasting.training import forecast_training
from robustmoe.options import EvaluateOptions, read
from robustmoe.recipe import Recipe
from robustmoe.records.forecast import Forecast
from robustmoe.training.given import asked

BUDGET = 5.0
"""Seconds that a forecast measures by default."""


def forecast(
    work: Recipe | str | Path | nn.Module | Callable[[Any], Any],
    x: Any = None,
    y: Any = None,
    *,
    seconds: float | None = None,
    **fields: Any,
) -> Forecast:
    """Returns how long a training or an evaluation will take, part by part, and its peak of memory. Nothing is kept.

    ``work``: a recipe, its name or file (``fields``: those of `Recipe`, as `train` takes them); a run folder
    (``fields``: the options of `evaluate_run`, and its ``data``); or a model and its images ``x``, ``y`` as `train` and
    `evaluate` take them: with ``method`` it is trained, else evaluated.

    For about ``seconds`` (by default 5; more where a single step takes longer) real steps, validations and attacks are
    made, on copies, and timed; the rest is their number. What an attack costs depends on the images that survive it: a
    probe of the first ones tells their share, and each part has a range. ``.summary()`` has the numbers, in seconds of
    the CPU and on the clock and in bytes; print it for a table. Raises UserError where `train` and `evaluate` do, and
    under torchrun.
    """
    alone()
    seconds = BUDGET if seconds is None else seconds
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise UserError(f"seconds is {seconds!r}; expected a number above 0, such as {BUDGET:g}")
    if isinstance(work, Recipe) or (isinstance(work, str | os.PathLike) and not is_run(work)) or "method" in fields:
        recipe, given, _ = asked(work, x, y, None, fields)
        return forecast_training(recipe, given, seconds)
    clock = Stopwatch(torch.device("cpu"))
    if isinstance(work, str | os.PathLike):
        if x is not None or y is not None:
            raise UserError("a run folder has its own images; give others as data=, a spec")
        data = fields.pop("data", None)
        opened: Any = session_on(work, _options(fields), data)
    else:
        num_classes = fields.pop("num_classes", None)
        opened = in_hand(work, x, y, _options({"curve": (), **fields}), num_classes)
    with opened as there:
        session, threat = there if isinstance(there, tuple) else (there, linf(8 / 255))
        return forecast_evaluation(session, threat, seconds, clock)


def _options(fields: dict[str, Any]) -> EvaluateOptions:
    given = fields.get("options")
    options = given if isinstance(given, EvaluateOptions) else read(EvaluateOptions, fields)
    if options.shard is not None:
        raise UserError("a forecast is of all images; leave shard out, and divide by the number of shards")
    return options


def is_run(work: str | os.PathLike[str]) -> bool:
    """Whether a text or path means a run, and not a recipe."""
    return str(work).startswith((zoo.PREFIX, hub.PREFIX)) or Path(work).is_dir()


__all__ = ["BUDGET", "Forecast", "forecast"]
