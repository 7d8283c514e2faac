"""Training: phases, methods, optimisers, the loop from a recipe to a run folder."""

from __future__ import annotations

from collections.abc import Callable

from robustmoe import spec as specs
from robustmoe.training.advmoe import advmoe
from robustmoe.training.certified import certified
from robustmoe.training.checkpoint import load_model
from robustmoe.training.consistency import consistent
from robustmoe.training.given import train
from robustmoe.training.jtdmoe import jtdmoe
from robustmoe.training.methods import at, awp, gaussian, mart, standard, trades
from robustmoe.training.optimisation import OPTIMIZERS, SCHEDULES, SGD, AdamW, OptimizerSpec
from robustmoe.training.phases import Loss, Method, MiniBatch, Pair, Phase, StepResult, TrainingStopped, train_step
from robustmoe.training.rt_er import rt_er

METHODS: dict[str, Callable[..., Method]] = {
    "standard": standard,
    "gaussian": gaussian,
    "at": at,
    "trades": trades,
    "mart": mart,
    "awp": awp,
    "advmoe": advmoe,
    "rt_er": rt_er,
    "jtdmoe": jtdmoe,
    "consistent": consistent,
    "certified": certified,
}


def build_method(spec: str | Method) -> Method:
    """Returns the method written as ``spec``: ``build_method("trades(pgd(linf(8/255)), beta=6)")``."""
    method: Method = specs.build(spec, "method") if isinstance(spec, str) else spec
    return method


__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "AdamW",
    "Loss",
    "Method",
    "MiniBatch",
    "OptimizerSpec",
    "Pair",
    "Phase",
    "StepResult",
    "TrainingStopped",
    "advmoe",
    "at",
    "awp",
    "build_method",
    "certified",
    "consistent",
    "gaussian",
    "jtdmoe",
    "load_model",
    "mart",
    "rt_er",
    "standard",
    "trades",
    "train",
    "train_step",
]
