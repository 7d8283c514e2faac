"""How long a training, an evaluation or a certification will take, and how much memory: `forecast`."""

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
from robustmoe.forecasting.certifying import forecast_certification
from robustmoe.forecasting.evaluation import forecast_evaluation
from robustmoe.forecasting.timing import Stopwatch, alone
from robustmoe.forecasting.training import forecast_training
from robustmoe.models import ModelSpec
from robustmoe.options import CertifyOptions, EvaluateOptions, SharedOptions, read
from robustmoe.recipe import Recipe
from robustmoe.records.forecast import Forecast
from robustmoe.training.given import asked

BUDGET = 10.0
"""Seconds that a forecast measures by default."""


def forecast(
    work: Recipe | str | Path | nn.Module | Callable[[Any], Any],
    x: Any = None,
    y: Any = None,
    *,
    seconds: float | None = None,
    **fields: Any,
) -> Forecast:
    """Returns how long a training, an evaluation or a certification will take, part by part, and its peak of memory.
    Nothing is kept.

    ``work``: a recipe, its name or file (``fields``: those of `Recipe`, as `train` takes them); a run folder
    (``fields``: the options of `evaluate_run`, and its ``data``; with ``certifiers`` those of `certify_run`); or a
    model and its images ``x``, ``y`` as `train` and `evaluate` take them: with ``method`` it is trained, else it is
    evaluated.

    For about ``seconds`` (by default 10; more where a single step takes longer) real steps, validations and attacks are
    made, on copies, and timed; the rest is their number. What an attack costs depends on the images that survive it: a
    probe of the first ones tells their share, and each part has a range. ``.summary()`` has the numbers, in seconds of
    the CPU and on the clock and in bytes; print it for a table. Raises UserError where `train` and `evaluate` do, and
    under torchrun.
    """
    alone()
    seconds = BUDGET if seconds is None else seconds
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise UserError(f"seconds is {seconds!r}; expected a number above 0, such as {BUDGET:g}")
    if not (isinstance(work, Recipe | str | os.PathLike | nn.Module | ModelSpec) or callable(work)):
        raise UserError(
            f"cannot forecast a {type(work).__name__}; expected a recipe, its name or file, a run folder, or a model"
        )
    if isinstance(work, Recipe) or (isinstance(work, str | os.PathLike) and not is_run(work)) or "method" in fields:
        recipe, given, _ = asked(work, x, y, None, fields)
        return forecast_training(recipe, given, seconds)
    return _of_measurement(work, x, y, seconds, fields)


def _of_measurement(work: Any, x: Any, y: Any, seconds: float, fields: dict[str, Any]) -> Forecast:
    clock = Stopwatch(torch.device("cpu"))
    if isinstance(work, str | os.PathLike):
        if x is not None or y is not None:
            raise UserError("a run folder has its own images; give others as data=, a spec")
        if "certifiers" in fields or isinstance(fields.get("options"), CertifyOptions):
            return forecast_certification(str(work), _certify_options(fields), seconds)
        data = fields.pop("data", None)
        opened: Any = session_on(str(work), _options(fields), data)
    else:
        num_classes = fields.pop("num_classes", None)
        opened = in_hand(work, x, y, _options({"curve": (), **fields}), num_classes)
    with opened as there:
        session, threat = there if isinstance(there, tuple) else (there, linf(8 / 255))
        return forecast_evaluation(session, threat, seconds, clock)


def _options(fields: dict[str, Any]) -> EvaluateOptions:
    given = fields.get("options")
    options = given if isinstance(given, EvaluateOptions) else read(EvaluateOptions, fields)
    _require_all(options)
    return options


def _certify_options(fields: dict[str, Any]) -> CertifyOptions:
    given = fields.get("options")
    options = given if isinstance(given, CertifyOptions) else read(CertifyOptions, fields)
    _require_all(options)
    return options


def _require_all(options: SharedOptions) -> None:
    if options.shard is not None:
        raise UserError("a forecast is of all images; leave shard out, and divide by the number of shards")


def is_run(work: str | os.PathLike[str]) -> bool:
    """Whether a text or path means a run, and not a recipe."""
    return str(work).startswith((zoo.PREFIX, hub.PREFIX)) or Path(work).is_dir()


__all__ = ["BUDGET", "Forecast", "forecast"]
