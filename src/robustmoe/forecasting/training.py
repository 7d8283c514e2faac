"""The forecast of a training: some of its steps, a validation and a checkpoint are done and timed; nothing is kept."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from robustmoe import distributed, generators, memory, provenance
from robustmoe.attacks.base import evaluating, looked_at
from robustmoe.data import Batch
from robustmoe.forecasting.counting import counted
from robustmoe.forecasting.timing import Seconds, Stopwatch
from robustmoe.models import RoutedModel
from robustmoe.recipe import Recipe
from robustmoe.records.forecast import Forecast
from robustmoe.training import checkpoint, compiled
from robustmoe.training.fitting import before_fitting, fitted
from robustmoe.training.loop import judged_model, paired_batches, routers_of, save, take_step, validated
from robustmoe.training.parts import Given, RunParts, build_parts
from robustmoe.training.resuming import TrainingState

WARM, MOST = 2, 50
"""Steps that are left out at least (one, where a step takes long); steps that are done beyond them at each moment, at
most. Of all that are done the later half is what a usual step takes: a routed model meets new sizes of its experts'
batches for some steps, and each asks for new code of the convolutions; the allocator too learns what to keep.
"""

MOMENTS = (0.0, 0.5, 0.99)
"""Of a method that changes while it trains, the shares of the training at which its steps are timed."""


class Measured(NamedTuple):
    """What one thing takes, and how often it was timed."""

    each: Seconds
    times: int


def forecast_training(recipe: Recipe, given: Given, seconds: float) -> Forecast:
    """Returns the forecast of a training, from about ``seconds`` of CPU time of its own work."""
    threads = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if isinstance(given.objects.get("model"), RoutedModel):
        given = Given({**given.objects, "model": copy.deepcopy(given.objects["model"])})
    device = distributed.local_device(provenance.pick_device(recipe.device))
    try:
        with generators.seeded(recipe.seed), torch.inference_mode(False), looked_at(), compiled.held(recipe.compile):
            return _forecast(recipe, given, device, seconds)
    finally:
        torch.set_num_threads(threads)


def _forecast(recipe: Recipe, given: Given, device: torch.device, seconds: float) -> Forecast:
    memory.restart_peak(device)
    whole = Stopwatch(device)
    clock = Stopwatch(device)
    parts = build_parts(before_fitting(recipe, None), device, fresh=True, given=given)
    parts = fitted(parts) if recipe.batch_size == "auto" else parts
    built = clock.lap()
    steps = min(recipe.epochs * parts.steps, recipe.max_steps or math.inf)
    epochs = math.ceil(steps / parts.steps)
    first, step = _steps(parts, 0.6 * seconds)
    clock.lap()
    routers_of(parts)
    judged, looked = _judged(parts)
    validation = _validation(parts, judged, 0.25 * seconds)
    state, weights, sizes = _written(parts, judged)
    states = epochs if not recipe.checkpoint_every else int(steps // recipe.checkpoint_every) + epochs
    listed = [
        (built + first).part("set-up", 1, "time"),
        (step.each * steps).part("training steps", int(steps), "steps"),
        (validation.each * epochs).part("validations", epochs, "epochs"),
        (state * states).part("checkpoints", states, "times"),
        (weights * epochs).part("weights", epochs, "times"),
    ]
    if parts.average is not None or recipe.recalibrate is not None:
        listed.insert(2, (looked * epochs).part("averaged weights", epochs, "epochs"))
    macs, uncounted = counted(parts.model, parts.data.image_shape)
    return Forecast(
        job="training",
        what=f"{recipe.model} on {recipe.data}",
        device=str(device),
        threads=torch.get_num_threads(),
        batch_size=parts.batch_size,
        parts=tuple(listed),
        peak=memory.peak(device),
        room=memory.room(device),
        files=sum(sizes),
        measured=whole.read().cpu,
        macs=macs,
        notes=(*_notes(parts, step, validation), *uncounted),
    )


def _steps(parts: RunParts, budget: float) -> tuple[Seconds, Measured]:
    """What the first steps take beyond a usual one, and what a usual one takes."""
    moments = MOMENTS if parts.method.ramp is not None else MOMENTS[:1]
    routers = list(routers_of(parts))
    first, timed = Seconds(), []
    for at, moment in enumerate(moments):
        state = TrainingState(epoch=min(int(moment * parts.recipe.epochs), parts.recipe.epochs - 1))
        clock, spent = Stopwatch(parts.device), Seconds()
        several: list[Seconds] = []
        for batch, second in _endless(parts, state):
            take_step(parts, dataclasses.replace(state, sums={}), batch, second, routers)
            several.append(clock.lap())
            spent += several[-1]
            enough = len(several) >= 2 and spent.cpu + spent.wall >= 2 * budget / len(moments)
            if enough or len(several) >= WARM + MOST:
                break
        warm = min(max(WARM, len(several) // 2), len(several) - 1)
        usual = sum(several[warm:], Seconds()) * (1 / (len(several) - warm))
        first += sum(several[:warm], Seconds()) - usual * warm if at == 0 else Seconds()
        timed.append(Measured(usual, len(several) - warm))
    each = sum((one_moment.each for one_moment in timed), Seconds()) * (1 / len(timed))
    return first, Measured(each, sum(one_moment.times for one_moment in timed))


def _endless(parts: RunParts, state: TrainingState) -> Iterator[tuple[Batch, Batch | None]]:
    """The batches of the epoch, again and again: a run may have fewer steps than are timed."""
    recipe = dataclasses.replace(parts.recipe, max_steps=None)
    return itertools.chain.from_iterable(
        paired_batches(dataclasses.replace(parts, recipe=recipe), state) for _ in itertools.count()
    )


def _judged(parts: RunParts) -> tuple[RoutedModel, Seconds]:
    """The model that an epoch validates, its own weights put back, and what it takes to put in others: of a training
    whose BatchNorm takes its statistics anew, by the batch.
    """
    clock = Stopwatch(parts.device)
    if parts.recipe.recalibrate is None:
        with judged_model(parts, TrainingState(step=1)) as judged:
            return judged, clock.lap()
    took = []
    steps = min(parts.steps, parts.recipe.max_steps or parts.steps)
    for few in (1, min(3, steps)):
        recipe = dataclasses.replace(parts.recipe, max_steps=few)
        with judged_model(dataclasses.replace(parts, recipe=recipe), TrainingState(step=few)) as judged:
            took.append(clock.lap())
    return judged, took[0] + (took[1] - took[0]) * ((steps - 1) / max(1, min(3, steps) - 1))


def _validation(parts: RunParts, judged: RoutedModel, budget: float) -> Measured:
    """What a validation takes. ``times``: the images that it was timed on."""
    n = len(parts.val)
    few = min(8, n) if parts.val_certifier is not None else min(parts.batch_size, n)
    took = _validate(parts, judged, few)
    most = max(few, int(budget / max(took.cpu, took.wall, 1e-6)) * few)
    several = min(n, most // parts.batch_size * parts.batch_size or most)
    if several > few or most >= 2 * few:  # once more, warm
        few, took = several, _validate(parts, judged, several)
    return Measured(took * (n / few), few)


def _validate(parts: RunParts, judged: RoutedModel, few: int) -> Seconds:
    clock = Stopwatch(parts.device)
    with evaluating(judged):
        validated(parts, judged, parts.val.head(few))
    return clock.read()


def _written(parts: RunParts, judged: RoutedModel) -> tuple[Seconds, Seconds, tuple[int, int]]:
    """What a checkpoint and the weights take, and their bytes: both are written once into a folder that goes."""
    with tempfile.TemporaryDirectory(prefix="robustmoe-") as folder:
        out, clock = Path(folder), Stopwatch(parts.device)
        save(parts, TrainingState(), out)
        state = clock.lap()
        checkpoint.save_weights(out / "model.safetensors", judged.state_dict(), parts.recipe.model)
        weights = clock.lap()
        return state, weights, ((out / "state.pt").stat().st_size, (out / "model.safetensors").stat().st_size)


def _notes(parts: RunParts, step: Measured, validation: Measured) -> tuple[str, ...]:
    lines = [
        f"Timed: {step.times} training steps, the later half of those that were done, and a validation of "
        f"{validation.times} of {len(parts.val)} images."
    ]
    attack = parts.method.attack
    if attack is not None:
        with evaluating(parts.model), torch.no_grad():
            passes = attack.queries(parts.model.run(parts.val.batch([0]).to(parts.device).x))
        if passes:
            lines.append(f"The method's attack takes {passes} forward passes an image (a gradient counts as 3).")
    if parts.val_attack is not None:
        lines.append("Validation was timed on a model that is hardly trained; its attack may take another time later.")
    return tuple(lines)
