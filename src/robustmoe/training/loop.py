"""A recipe becomes a run folder: epochs, validation, the best weights kept, and a checkpoint to go on from, bit for
bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmoe import compat, distributed, generators, memory, provenance, repeatable
from robustmoe.attacks import NotFiniteError
from robustmoe.attacks.base import looked_at
from robustmoe.data import Batch, ImageSet, batches
from robustmoe.models import RoutedModel
from robustmoe.noise import Noise
from robustmoe.progress import Bar, Pace, note, progress, span
from robustmoe.recipe import Recipe
from robustmoe.records import Resumed, append_json, check_folder, restarted, write_atomic, writing
from robustmoe.records.versions import entries, tell
from robustmoe.training import checkpoint, compiled, health, parted, scaling
from robustmoe.training.fitting import before_fitting, fitted
from robustmoe.training.health import RouterLine
from robustmoe.training.lines import EpochLine, said
from robustmoe.training.parts import Given, RunParts, build_parts, check_same_run, config_of
from robustmoe.training.phases import MiniBatch, StepResult, TrainingStopped, train_step
from robustmoe.training.recalibration import recalibrate
from robustmoe.training.resuming import TrainingState, examined, restore
from robustmoe.training.sharding import apart, explained, whole_state

ORDER, AUGMENT, TRAIN, RECALIBRATE = 1, 2, 3, 4
"""Keys under which a run draws its random numbers, beside its seed and the epoch (see `robustmoe.noise`)."""

SECOND = 1
"""Further key of a step's second mini-batch."""

PACED = 20
"""Steps after which it is told how fast they are."""


def train_recipe(recipe: Recipe, out: Path, resume: bool, given: Given) -> Path:
    """Trains as ``recipe`` says, with what is ``given`` in Python, into the run folder ``out``; returns it. See
    `robustmoe.training.train`.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = distributed.local_device(provenance.pick_device(recipe.device))
    resume = resume or (restarted() and (out / "config.json").is_file())
    check_folder(out, resume)
    # The seed is for a model's own draws (dropout); ours come from robustmoe.noise.
    exact, held = repeatable.deterministic(recipe.deterministic), compiled.held(recipe.compile)
    with distributed.session(device), writing(out), generators.seeded(recipe.seed), exact, held, looked_at():
        if distributed.rank() == 0:
            check_folder(out, resume)  # another writer may have been in it until now
        number = before_fitting(recipe, out if resume else None)
        fresh = not (resume and (out / "state.pt").exists())
        _run(build_parts(number, device, fresh, given), out, resume, recipe.batch_size == "auto" and not resume)
    return out


def _run(parts: RunParts, out: Path, resume: bool, fits: bool) -> None:
    """The epochs that are left, of a run that is new or resumed. ``fits``: with a batch size that is found first."""
    parts = fitted(parts) if fits else parts
    state = _prepare(parts, out, resume)
    if parts.autocast is not None and not compat.multiplies(parts.device, parts.autocast):
        kind, precision = parts.device.type, parts.recipe.precision
        note(f"precision={precision}: this {kind} has no such products, and steps take several times those of fp32")
    pace = Pace(PACED)
    while state.epoch < parts.recipe.epochs and (state.step or _steps_to_do(parts, state)):
        _epoch(parts, state, out, pace)
        if state.step < parts.steps:
            break
        state = TrainingState(epoch=state.epoch + 1, best=state.best)
        save(parts, state, out)
    if "model" in parts.given.objects:
        _take_best(parts.model, out)


def _take_best(model: RoutedModel, out: Path) -> None:
    """The weights that were best on validation into the model, on every process."""
    if distributed.rank() == 0:
        checkpoint.load_weights(model, checkpoint.read_weights(out / "model.safetensors"), out)
    distributed.broadcast(list(model.state_dict().values()))


def _prepare(parts: RunParts, out: Path, resume: bool) -> TrainingState:
    """Makes a fresh folder, or returns the state to go on from."""
    config = config_of(parts)
    state = TrainingState()
    if resume:
        old = checkpoint.read_config(out)
        check_same_run(out, old, config)
        there = examined(parts, out, old)
        state = there.state
        if there.saved is not None:
            (restore if parts.recipe.sharding == "none" else parted.restore)(parts, there.saved, out / "state.pt")
        if distributed.rank() == 0:
            _take_up(out, old, config, state.epoch * parts.steps + state.step)
            write_atomic(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in there.lines))
        again = " (there is no state.pt: from the first step again)" if there.saved is None else ""
        note(f"going on from epoch {state.epoch + 1}, step {state.step}{again}")
    elif distributed.rank() == 0:
        write_atomic(out / "config.json", json.dumps(config, indent=2) + "\n")
    if parts.recipe.sharding == "none":
        distributed.broadcast(list(parts.model.state_dict().values()))
    return state


def _take_up(out: Path, old: dict[str, Any], new: dict[str, Any], done: int) -> None:
    """Says, and writes into ``config.json``, that other versions go on after ``done`` steps, where they do."""
    resumed, words = entries([Resumed(**each) for each in old.get("resumed") or ()], old, new, done)
    if words:
        tell(out, words)
        config = {**old, "resumed": [dataclasses.asdict(each) for each in resumed]}
        write_atomic(out / "config.json", json.dumps(config, indent=2) + "\n")


def save(parts: RunParts, state: TrainingState, out: Path) -> None:
    """Writes the checkpoint into the run folder."""
    kept = {
        "rng": torch.get_rng_state(),
        "device_rng": generators.state_on(parts.device),
        "progress": dataclasses.asdict(_over_processes(parts, state)),
        "run": parts.run_hash,
    }
    if parts.recipe.sharding != "none":
        parted.save(parts, out, kept)
    elif distributed.rank() == 0:
        checkpoint.save_state(
            out / "state.pt",
            {
                "model": parts.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in parts.optimisers],
                "average": parts.average.state_dict() if parts.average is not None else None,
                **kept,
            },
        )


def _over_processes(parts: RunParts, state: TrainingState) -> TrainingState:
    """Returns the state, its losses and counts as means over the processes, so that any of them (or another number) can
    go on from it.
    """
    mine = [state.correct, state.seen, *(sums["loss"] for sums in state.sums.values())]
    total = torch.tensor(mine, dtype=torch.float64, device=parts.device if parts.device.type == "cuda" else "cpu")
    correct, seen, *losses = (distributed.all_reduce_sum(total) / distributed.world()).tolist()
    sums = {name: {**sums, "loss": loss} for (name, sums), loss in zip(state.sums.items(), losses)}
    return dataclasses.replace(state, correct=correct, seen=seen, sums=sums)


def _steps_to_do(parts: RunParts, state: TrainingState) -> int:
    """Returns how many batches of this epoch are left, up to ``max_steps``."""
    last = parts.steps
    if parts.recipe.max_steps is not None:
        last = min(last, parts.recipe.max_steps - state.epoch * parts.steps)
    return max(0, last - state.step)


def training_batches(parts: RunParts, state: TrainingState, *key: int) -> Iterator[Batch]:
    """This process's share of the batches to do in this epoch: rank r has the r-th part of each. ``key``: another
    order and augmentation of the same images.
    """
    order = parts.data.train.order(parts.steps, parts.batch_size, parts.recipe.seed, ORDER, state.epoch, *key)
    shared = order.view(parts.steps, distributed.world(), -1)
    mine = shared[state.step : state.step + _steps_to_do(parts, state), distributed.rank()]
    for batch in batches(parts.data.train, mine.shape[1], mine.reshape(-1), parts.device):
        x = batch.x
        if parts.augment is not None:
            x = parts.augment(x, Noise.of(batch.index, parts.recipe.seed, AUGMENT, state.epoch, *key))
        yield Batch(x, batch.y, batch.index)


def paired_batches(parts: RunParts, state: TrainingState) -> Iterator[tuple[Batch, Batch | None]]:
    """The batches to do in this epoch, each with the step's second one where the method wants that."""
    others = training_batches(parts, state, SECOND) if parts.method.two_batches else itertools.repeat(None)
    return zip(training_batches(parts, state), others)


def _epoch(parts: RunParts, state: TrainingState, out: Path, pace: Pace) -> None:
    """Does the rest of an epoch, or what ``max_steps`` leaves of it, and what follows it."""
    recipe = parts.recipe
    routers = routers_of(parts)
    before = {name: _router_weights(parts.model, name) for name in routers}
    left_out = scaling.left_out(parts.optimisers)
    with progress(parts.steps, f"epoch {state.epoch + 1}/{recipe.epochs}", unit="steps") as bar:
        bar.advance(state.step)
        started = time.monotonic()
        for batch, second in paired_batches(parts, state):
            result = take_step(parts, state, batch, second, list(routers))
            for name, norm in result.router_grad.items():
                state.router_grad[name] = max(state.router_grad.get(name, 0.0), float(norm))
            now = time.monotonic()
            pace.add(parts.batch_size, now - started)
            state.seconds, started = state.seconds + now - started, now
            _show(bar, parts, state, pace)
            stopping = state.step < parts.steps and not _steps_to_do(parts, state)
            if stopping or (recipe.checkpoint_every and state.step % recipe.checkpoint_every == 0):
                _note_moved(parts, state, before)
                save(parts, state, out)
    _note_moved(parts, state, before)
    if (missed := scaling.left_out(parts.optimisers) - left_out) > 0:
        note(f"fp16: {missed} steps of epoch {state.epoch + 1} had gradients that overflowed, and were left out")
    _finish_epoch(parts, state, out, routers)


def routers_of(parts: RunParts) -> dict[str, bool]:
    """Returns for each router whether a phase moves it, along a gradient that its decision passes."""
    moving = {name for phase in parts.method.phases for name in phase.parameters(parts.model)}
    trainable = health.trainable_routers(parts.model, parts.val.batch([0]).to(parts.device).x)
    return {name: passes and any(key.startswith(f"{name}.") for key in moving) for name, passes in trainable.items()}


def take_step(
    parts: RunParts, state: TrainingState, batch: Batch, second: Batch | None, routers: list[str]
) -> StepResult:
    """Takes one step of the run, and notes in ``state`` what it gave."""
    done = state.epoch * parts.steps + state.step
    progress = done / (parts.recipe.epochs * parts.steps)
    lr = parts.base_lr * parts.schedule(progress)
    for phase, optimiser in zip(parts.method.phases, parts.optimisers):
        for group in optimiser.param_groups:
            group["lr"] = lr * phase.lr
    key = (parts.recipe.seed, TRAIN, state.epoch)
    try:
        with explained(parts.recipe.sharding), compiled.at_work(parts.recipe.compile):
            result = train_step(
                parts.model,
                parts.method.at(progress),
                parts.optimisers,
                MiniBatch(batch.x, batch.y, Noise.of(batch.index, *key)),
                second=None if second is None else MiniBatch(second.x, second.y, Noise.of(second.index, *key, SECOND)),
                autocast=parts.autocast,
                clip=parts.recipe.clip,
                routers=routers,
            )
    except TrainingStopped as error:
        raise TrainingStopped(f"stopped in epoch {state.epoch + 1}, step {state.step + 1}: {error}") from None
    if parts.average is not None:
        parts.average.update(parts.model)
    for name in result.loss:
        sums = state.sums.setdefault(name, {"loss": 0.0, "grad_norm": 0.0})
        sums["loss"] += float(result.loss[name])
        sums["grad_norm"] += float(result.grad_norm[name])
    state.correct += float(result.correct)
    state.seen += result.seen
    state.step += 1
    return result


def _show(bar: Bar[Any], parts: RunParts, state: TrainingState, pace: Pace) -> None:
    """The losses, and once there is a pace: images a second, how long all epochs will take without their validations,
    and the peak of memory.
    """
    bar.advance()
    losses = "  ".join(f"{name} {sums['loss'] / state.step:.3f}" for name, sums in state.sums.items())
    if pace.rate is None:
        bar.say(f"loss {losses}")
        return
    steps = min(parts.recipe.epochs * parts.steps, parts.recipe.max_steps or math.inf)
    left = (steps - state.epoch * parts.steps - state.step) * parts.batch_size / pace.rate
    bar.say(f"loss {losses}, {pace.rate:.3g} images/s, {span(left)} left of all training{memory.told(parts.device)}")
    if pace.batches == PACED:
        bar.log()


def _router_weights(model: RoutedModel, name: str) -> Tensor:
    own = {key: distributed.own_part(p.detach()) for key, p in model.named_parameters() if key.startswith(f"{name}.")}
    return torch.cat([part.flatten() for part in own.values()]) if own else torch.empty(0)


def _note_moved(parts: RunParts, state: TrainingState, before: dict[str, Tensor]) -> None:
    moved = [not torch.equal(weights, _router_weights(parts.model, name)) for name, weights in before.items()]
    anywhere = distributed.all_reduce_sum(torch.tensor(moved, dtype=torch.float32, device=parts.device))
    for name, times in zip(before, anywhere.tolist()):
        state.router_moved[name] = state.router_moved.get(name, False) or times > 0


def _finish_epoch(parts: RunParts, state: TrainingState, out: Path, routers: dict[str, bool]) -> None:
    """Validates, keeps the weights if they are the best so far, and writes the epoch's line.

    Part of an epoch (``max_steps``) is no candidate: its weights are kept only until a whole epoch is done.
    """
    started = time.monotonic()
    whole = state.step == parts.steps
    with judged_model(parts, state) as judged:
        result = _validated(parts, state, judged)
        score = next(rate for rate in (result.certified, result.robust, result.clean) if rate is not None)
        best = score > state.best if whole else state.best < 0
        if best:
            weights = whole_state(judged)
            if distributed.rank() == 0:
                checkpoint.save_weights(out / "model.safetensors", weights, parts.recipe.model)
    router_lines = health.router_health(result, state.router_grad, state.router_moved, routers)
    line = _line(parts, state, result, router_lines, best)
    line["seconds"] = state.seconds + time.monotonic() - started
    if best and whole:
        state.best = score
    if distributed.rank() == 0:
        append_json(out / "metrics.jsonl", line)
    note(said(line, parts.recipe.epochs))
    for complaint in health.complaints(line["routers"]):
        note(complaint)


def _validated(parts: RunParts, state: TrainingState, judged: RoutedModel) -> health.Validation:
    """Returns the validation of these weights. Raises TrainingStopped where the model's answers are not finite."""
    try:
        return validated(parts, judged, parts.val)
    except NotFiniteError as error:
        raise TrainingStopped(f"stopped in the validation after epoch {state.epoch + 1}: {error}") from error


def validated(parts: RunParts, judged: RoutedModel, images: ImageSet) -> health.Validation:
    """Returns the run's validation of a model, on these images."""
    return health.validate(
        judged,
        images,
        parts.val_attack,
        parts.batch_size,
        parts.device,
        parts.recipe.seed,
        parts.autocast,
        parts.val_certifier,
    )


def _line(
    parts: RunParts, state: TrainingState, result: health.Validation, routers: dict[str, RouterLine], best: bool
) -> EpochLine:
    """Returns the epoch's line; losses and counts are over all processes. The seconds are those of training alone."""
    shared = _over_processes(parts, state)
    return {
        "epoch": state.epoch + 1,
        "step": state.epoch * parts.steps + state.step,
        "seconds": state.seconds,
        "lr": {phase.name: o.param_groups[0]["lr"] for phase, o in zip(parts.method.phases, parts.optimisers)},
        "loss": {name: sums["loss"] / state.step for name, sums in shared.sums.items()},
        "grad_norm": {name: sums["grad_norm"] / state.step for name, sums in state.sums.items()},
        "train_accuracy": shared.correct / shared.seen if shared.seen else None,
        "val_clean": result.clean,
        "val_robust": result.robust,
        "val_certified": result.certified,
        "val_n": result.n,
        "routers": routers,
        "best": best,
    }


@contextlib.contextmanager
def judged_model(parts: RunParts, state: TrainingState) -> Iterator[RoutedModel]:
    """The model as it is validated and kept: with the averaged weights where there are any, and where the recipe says
    so with BatchNorm's statistics taken anew, on the batches with which the epoch began. Afterwards it is as before.
    """
    recipe, model = parts.recipe, parts.model
    if parts.average is None and recipe.recalibrate is None:
        yield model
        return
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        apart(model)
        if parts.average is not None:
            model.load_state_dict(parts.average.state)
        if recipe.recalibrate is not None:
            key = (recipe.seed, RECALIBRATE, state.epoch)
            again = training_batches(parts, dataclasses.replace(state, step=0))
            given = (MiniBatch(batch.x, batch.y, Noise.of(batch.index, *key)) for batch in again)
            attack = parts.method.attack if recipe.recalibrate == "attacked" else None
            recalibrate(model, given, attack, parts.autocast)
        yield model
    finally:
        apart(model)
        model.load_state_dict(before)
