"""Going on with a training: all that it needs is read and checked before anything is changed, and the log is cut last.

``state.pt`` and ``model.safetensors`` carry a SHA-256 of what they hold (see `robustmoe.training.checkpoint`), and
``state.pt`` says which run it is of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from robustmoe import distributed, generators
from robustmoe.errors import UserError
from robustmoe.progress import note
from robustmoe.records import read_metrics
from robustmoe.records.typed import Count, Finite, Length, build
from robustmoe.training import checkpoint, parted
from robustmoe.training.parts import RunParts, run_hash

Best = Annotated[float, Meta(ge=-1, le=1)]


@dataclass
class TrainingState:
    """Where a run is: ``step`` batches of epoch ``epoch`` (both from 0) are done; the sums, ``seconds`` and what the
    routers did (largest gradient norm; whether they moved) are of this epoch. ``best``: the highest accuracy in
    validation so far; -1 before the first whole epoch.
    """

    kind: ClassVar[str] = "progress"

    epoch: Count = 0
    step: Count = 0
    best: Best = -1.0
    sums: dict[str, dict[str, Finite]] = field(default_factory=dict)
    correct: Length = 0.0
    seen: Length = 0.0
    seconds: Length = 0.0
    router_grad: dict[str, float] = field(default_factory=dict)
    router_moved: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: where it was, the ``saved`` contents of its ``state.pt`` (None before the first), and
    the ``lines`` of its log up to there.
    """

    state: TrainingState
    saved: dict[str, Any] | None
    lines: list[dict[str, Any]]


def examined(parts: RunParts, out: Path, config: Mapping[str, Any]) -> Checkpoint:
    """What the run in ``out`` goes on from. UserError where a file is damaged, missing or of another run."""
    checkpoint.check_classes(out, config, parts.data, "restore them to resume, or choose another --out")
    path, saved, state = out / "state.pt", None, TrainingState()
    if os.path.lexists(path):  # else the run was stopped before its first checkpoint
        saved = checkpoint.read_state(path)
        if saved["run"] != run_hash(config):
            raise UserError(
                f"{path} is the checkpoint of another run than config.json beside it says; put back the file that is "
                "not of this run, or start anew in another --out"
            )
        if ("parts" in saved) != (parts.recipe.sharding != "none"):
            raise checkpoint.damaged(path, f"it is none of a run with sharding={parts.recipe.sharding}")
        if "parts" not in saved:
            checkpoint.check_weights(parts.model, saved["model"], path)
        elif distributed.rank() == 0:
            parted.check(saved, path)
        for problem in _problems(parts, saved):
            raise checkpoint.damaged(path, problem)
        state = _progress(parts, saved["progress"], path)
    lines: list[dict[str, Any]] = []
    if distributed.rank() == 0:
        if state.best >= 0:
            weights = out / "model.safetensors"
            checkpoint.check_weights(parts.model, checkpoint.read_weights(weights), weights)
        lines = read_metrics(out / "metrics.jsonl")
        if len(lines) > state.epoch + 1:  # one may have been written after the last checkpoint
            raise UserError(
                f"{out / 'metrics.jsonl'} tells of {len(lines)} epochs, and {path} "
                f"{'is not there' if saved is None else f'of {state.epoch}'}: the checkpoint is lost or old; put "
                "it back, or start anew in another --out"
            )
        lines = [line for line in lines if line["epoch"] <= state.epoch]
        if len(lines) < state.epoch:
            note(
                f"warning: {out / 'metrics.jsonl'} tells of {len(lines)} of the {state.epoch} epochs that are done; it "
                "goes on without the others"
            )
    return Checkpoint(state, saved, lines)


def restore(parts: RunParts, saved: Mapping[str, Any], path: Path) -> None:
    """Puts what was saved into the optimisers, the averaged weights, torch's generator and the model, in this order."""
    for optimiser, own in zip(parts.optimisers, saved["optimisers"]):
        try:
            optimiser.load_state_dict(own)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # torch's, for the state of another one
            raise checkpoint.damaged(path, f"{type(optimiser).__name__} does not take its state") from error
    if parts.average is not None:
        parts.average.load_state_dict(saved["average"])
    torch.set_rng_state(saved["rng"])
    generators.go_on(parts.device, saved.get("device_rng"))
    checkpoint.load_weights(parts.model, saved["model"], path)


def _problems(parts: RunParts, saved: Mapping[str, Any]) -> list[str]:
    """Returns what is not as `robustmoe.training.loop` saves it."""
    problems = []
    rng, here = saved["rng"], torch.get_rng_state()
    if not isinstance(rng, Tensor) or (rng.dtype, rng.shape) != (here.dtype, here.shape):
        problems.append("its random state is none of torch's")
    if not _is_state_of(parts.device, saved.get("device_rng")):
        problems.append("its random state of the GPU is none of torch's")
    if "parts" in saved:
        if type(saved["averaged"]) is not int or saved["averaged"] < 0:
            problems.append("its averaged weights are of no number of steps")
        return problems
    optimisers, average = saved["optimisers"], saved["average"]
    own = [len(optimiser.param_groups) for optimiser in parts.optimisers]
    if not isinstance(optimisers, list) or [_groups(each) for each in optimisers] != own:
        problems.append(f"it has not the {len(own)} optimisers of the method")
    if (average is None) != (parts.average is None) or not _is_average(parts, average):
        problems.append("its averaged weights are not those of the model")
    return problems


def _is_state_of(device: torch.device, state: Any) -> bool:
    """Whether a GPU's generator takes this state. Checkpoints from before it was kept, and of CPUs, have none."""
    here = None if state is None else generators.state_on(device)
    if here is None:
        return state is None or isinstance(state, Tensor)
    return isinstance(state, Tensor) and (state.dtype, state.shape) == (here.dtype, here.shape)


def _groups(optimiser: Any) -> int:
    """Returns how many groups of parameters the state of an optimiser has; -1 where it is none."""
    if not isinstance(optimiser, dict) or not isinstance(optimiser.get("state"), dict):
        return -1
    groups = optimiser.get("param_groups")
    return len(groups) if isinstance(groups, list) and all(isinstance(group, dict) for group in groups) else -1


def _is_average(parts: RunParts, average: Any) -> bool:
    if average is None:
        return True
    if not isinstance(average, dict) or type(average.get("steps")) is not int or average["steps"] < 0:
        return False
    return not checkpoint.misfits(parts.model, average.get("state"))


def _progress(parts: RunParts, progress: Any, path: Path) -> TrainingState:
    try:
        state = build(TrainingState, progress)
        for each in fields(TrainingState):
            if each.name not in progress:
                raise UserError(f"progress: field {each.name!r} is missing")
    except UserError as error:
        raise checkpoint.damaged(path, str(error)) from None
    epochs = parts.recipe.epochs
    if state.epoch > epochs or state.step > (parts.steps if state.epoch < epochs else 0):
        raise checkpoint.damaged(
            path, f"it is at epoch {state.epoch}, step {state.step}, of {epochs} epochs of {parts.steps} steps"
        )
    return state
