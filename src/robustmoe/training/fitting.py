"""The batch size of a recipe that says ``auto``: found by steps that are not kept, and the number that was chosen."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from robustmoe import distributed, generators, memory
from robustmoe.errors import UserError
from robustmoe.noise import Noise
from robustmoe.progress import note
from robustmoe.recipe import Recipe
from robustmoe.training import checkpoint
from robustmoe.training.optimisation import OptimizerSpec
from robustmoe.training.parts import RunParts
from robustmoe.training.phases import MiniBatch, train_step


def before_fitting(recipe: Recipe, run: Path | None) -> Recipe:
    """Returns the recipe with a number in the place of ``auto``: the one of the ``run`` that goes on, else the first
    that is tried. UserError for several processes, which would each find another.
    """
    if recipe.batch_size != "auto":
        return recipe
    if distributed.world() > 1:
        raise UserError("batch_size=auto is found by one process; under torchrun give the number")
    number = memory.FIRST if run is None else checkpoint.read_config(run)["batch_size"]
    return dataclasses.replace(recipe, batch_size=number)


def fitted(parts: RunParts) -> RunParts:
    """Returns the run with the largest batch size, a power of two, whose step fits into the memory of the device."""
    recipe = parts.recipe
    optimizer: OptimizerSpec = parts.given.build("optimizer", recipe.optimizer, "optimizer")

    def attempt(n: int) -> None:
        model = copy.deepcopy(parts.model)
        batch = parts.data.train.batch(list(range(n))).to(parts.device)
        own = MiniBatch(batch.x, batch.y, Noise.of(batch.index, recipe.seed))
        optimisers = [optimizer.over(phase.parameters(model)) for phase in parts.method.phases]
        second = own if parts.method.two_batches else None
        train_step(model, parts.method.at(1.0), optimisers, own, second=second, autocast=parts.autocast)

    with generators.kept():
        fit = memory.largest(attempt, parts.device, len(parts.data.train))
    note(
        f"batch_size=auto: {fit} images a step. A learning rate belongs to a batch size: is that of "
        f"{recipe.optimizer} right for {fit.size}? In config.json it is a number from now on."
    )
    return dataclasses.replace(parts, recipe=dataclasses.replace(recipe, batch_size=fit.size))
