"""What a recipe builds, and what a run folder says of it in ``config.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from robustmoe import distributed, memory, provenance
from robustmoe import spec as specs
from robustmoe.attacks import Attack, evaluating
from robustmoe.certification import Certifier
from robustmoe.data import Data, ImageSet
from robustmoe.data.base import resident
from robustmoe.errors import UserError
from robustmoe.models import BatchNorm2d, ModelSpec, Normalise, RoutedModel, build_model
from robustmoe.models.foreign import blaming, check_classes, require_weights, runs_foreign
from robustmoe.options import Inputs
from robustmoe.recipe import LATER, SPECS, Recipe, said_by
from robustmoe.training import compiled, sharding, starting
from robustmoe.training.optimisation import Average, OptimizerSpec, Schedule
from robustmoe.training.phases import Method

FREE = {"device", "threads", "deterministic", "compile", "checkpoint_every", "attacks", "max_steps", "data"}
"""Recipe fields that may differ between a run and its continuation; the data are compared by their contents."""


@dataclass(frozen=True)
class Given:
    """What Python gives in the place of a recipe's texts: ``objects``, by the recipe's fields; among them the ``model``
    that is trained where it is. ``switched``: layers of it that are of another class meanwhile, and their own.
    """

    objects: dict[str, Any] = field(default_factory=dict)
    switched: dict[nn.Module, type] = field(default_factory=dict)

    def build(self, name: str, text: str, kind: str) -> Any:
        """Returns the object of a field, or what its text names."""
        return self.objects[name] if name in self.objects else specs.build(text, kind)


@dataclass(frozen=True)
class RunParts:
    """What a recipe builds."""

    recipe: Recipe
    data: Data
    model: RoutedModel
    method: Method
    optimisers: list[torch.optim.Optimizer]
    base_lr: float
    schedule: Schedule
    augment: Any
    val: ImageSet
    val_attack: Attack | None
    val_certifier: Certifier | None
    average: Average | None
    device: torch.device
    given: Given = field(default_factory=Given)

    @property
    def autocast(self) -> torch.dtype | None:
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.recipe.precision]

    @property
    def batch_size(self) -> int:
        assert self.recipe.batch_size != "auto", "see robustmoe.training.fitting"
        return min(self.recipe.batch_size, len(self.data.train))

    @cached_property
    def run_hash(self) -> str:
        """See `run_hash`."""
        return run_hash({**dataclasses.asdict(self.recipe), "data_hash": self.data.train.fingerprint})

    @property
    def steps(self) -> int:
        """Batches an epoch; the last, short one is left out."""
        return len(self.data.train) // self.batch_size


def build_parts(recipe: Recipe, device: torch.device, fresh: bool, given: Given) -> RunParts:
    """``fresh``: no checkpoint will be loaded over the model's first weights."""
    method = _method(recipe, given)
    optimizer: OptimizerSpec = given.build("optimizer", recipe.optimizer, "optimizer")
    schedule: Schedule = given.build("schedule", recipe.schedule, "schedule")
    augment = given.build("augment", recipe.augment, "augment") if recipe.augment else None
    val_attack = given.build("val_attack", recipe.val_attack, "attack") if recipe.val_attack else None
    sharding.check(recipe, method, val_attack, "model" in given.objects)
    described = given.build("model", recipe.model, "model")  # a misspelt model should not wait for the data
    data: Data = given.build("data", recipe.data, "data")
    model = described if isinstance(described, RoutedModel) else _fresh_model(described, recipe, data)
    if distributed.world() > 1:
        given.switched.update(share_statistics(model))
    require_weights(model)
    _start(model, recipe, data, fresh, isinstance(described, RoutedModel))
    model, data = _placed(model, recipe, device), _resident(data, device)
    parts = RunParts(
        recipe=recipe,
        data=data,
        model=model,
        method=method,
        optimisers=[optimizer.over(phase.parameters(model)) for phase in method.phases],
        base_lr=optimizer.lr,
        schedule=schedule,
        augment=augment,
        val=data.val.head(recipe.val_limit),
        val_attack=val_attack,
        val_certifier=given.build("val_certifier", recipe.val_certifier, "certifier") if recipe.val_certifier else None,
        average=Average(model, recipe.ema) if recipe.ema else None,
        device=device,
        given=given,
    )
    if parts.batch_size % distributed.world():
        raise UserError(
            f"batch_size {parts.batch_size} cannot be shared by {distributed.world()} processes; "
            "expected a multiple of that number"
        )
    data.verify()  # a damaged image is told of before the first step, not in the last epoch
    look_at(model, data, device)
    return parts


def _placed(model: RoutedModel, recipe: Recipe, device: torch.device) -> RoutedModel:
    """The model on the device: whole or its share, and to be compiled where the recipe says so."""
    placed = sharding.placed(model, recipe.sharding, device)
    if recipe.compile:
        compiled.prepare(placed, device)
    return placed


def _resident(data: Data, device: torch.device) -> Data:
    """The data with the images that are trained and validated on on the device, where there is room for them."""
    room = memory.room(device)
    return dataclasses.replace(data, train=resident(data.train, device, room), val=resident(data.val, device, room))


def _method(recipe: Recipe, given: Given) -> Method:
    compiled.check(recipe, "model" in given.objects)
    method: Method = given.build("method", recipe.method, "method")
    if recipe.recalibrate == "attacked" and method.attack is None:
        raise UserError("recalibrate=attacked takes the method's attack, and this method has none; expected clean")
    return method


def look_at(model: RoutedModel, data: Data, device: torch.device) -> None:
    """UserError for a model with code of a user's own that does not answer images of the data with an output for each
    class. The models of this package were built for them.
    """
    if not runs_foreign(model):
        return
    x = data.train.batch([0, 1] if len(data.train) > 1 else [0]).x.to(device)
    with evaluating(model), torch.no_grad(), blaming(model, x):
        check_classes(model.run(x).logits, data.num_classes - 1)


def _fresh_model(described: ModelSpec, recipe: Recipe, data: Data) -> RoutedModel:
    return build_model(described, data.num_classes, data.image_shape, *pixels(recipe.inputs, data), recipe.seed)


def pixels(inputs: Inputs, data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns what a model takes off the pixels of each channel, and what it then divides them by."""
    return (data.mean, data.std) if inputs == "data" else fixed_pixels(inputs, data.image_shape[0])


def fixed_pixels(inputs: Literal["centred", "raw"], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `pixels`, of models that ask for no data set."""
    return ((0.5,) * channels, (0.5,) * channels) if inputs == "centred" else ((0.0,) * channels, (1.0,) * channels)


def _start(model: RoutedModel, recipe: Recipe, data: Data, fresh: bool, brought: bool) -> None:
    """Gives a ``fresh`` model the weights that it starts from. UserError where the recipe says how images are taken,
    and the model, which may be ``brought``, or what it started from says otherwise.
    """
    if recipe.init is not None and fresh:
        starting.start_from(model, recipe.init)
    if recipe.inputs == "data":
        return
    own = [module for module in model.modules() if isinstance(module, Normalise)]
    if brought or not own:
        raise UserError(
            f"inputs={recipe.inputs} is for models of this package; one of your own takes pixels in [0, 1] as they are"
        )
    expected = [torch.tensor(values).view(-1, 1, 1) for values in pixels(recipe.inputs, data)]
    for module in own:
        buffers = (module.mean[0].cpu(), module.std[0].cpu())
        if any(not torch.equal(buffer, wanted) for buffer, wanted in zip(buffers, expected, strict=True)):
            raise UserError(
                f"inputs={recipe.inputs}, but what init={recipe.init} gives was trained on images of another mean; "
                "leave inputs out, and its own is kept"
            )


def share_statistics(model: nn.Module) -> dict[nn.Module, type]:
    """Makes the project's of torch's own BatchNorms in a model (see `BatchNorm2d`), whose statistics would be those of
    one process; returns these layers and the class they were of.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.BatchNorm2d]
    for layer in layers:
        layer.__class__ = BatchNorm2d
    return dict.fromkeys(layers, nn.BatchNorm2d)


def config_of(parts: RunParts) -> dict[str, Any]:
    data, recipe = parts.data, parts.recipe
    mean, std = pixels(recipe.inputs, data)
    score = f"accuracy under {recipe.val_attack}" if recipe.val_attack else "clean accuracy"
    score = f"accuracy certified by {recipe.val_certifier}" if recipe.val_certifier else score
    return {
        **dataclasses.asdict(recipe),
        "threat": threat_trained_for(parts.method, parts.val_attack),
        "files": _files(recipe, parts.given),
        "in_python": sorted(parts.given.objects),
        "num_classes": data.num_classes,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(mean),
        "std": list(std),
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "selection": f"best {score} on {len(parts.val)} images held out of train; the test set is never seen",
        "images": {"train": len(data.train), "val": len(parts.val), "test": len(data.test)},
        "data_hash": data.train.fingerprint,
        "versions": {**specs.packages(), **provenance.versions()},
        "commit": provenance.commit(),
        "hardware": provenance.hardware(parts.device),
        "processes": distributed.world(),
        "command": provenance.command(),
    }


def threat_trained_for(method: Method, val_attack: Attack | None) -> str | None:
    """The ball that a run is trained for, as a spec: the method's, else that of the attack in validation."""
    threat = method.threat
    for attack in (method.attack, val_attack):
        threat = threat or (attack.threat if attack is not None else None)
    return None if threat is None else specs.text(threat)


def _files(recipe: Recipe, given: Given) -> dict[str, str]:
    """The files of a user's own that a recipe names, and their SHA-256."""
    texts = [getattr(recipe, name) for name in SPECS if name not in given.objects]
    return specs.files(*texts, *recipe.attacks)


def compared() -> list[str]:
    """The fields of ``config.json`` in which a run and its continuation agree."""
    return sorted({item.name for item in dataclasses.fields(Recipe)} - FREE | {"data_hash"})


def run_hash(config: Mapping[str, Any]) -> str:
    """The SHA-256 of what makes a run this run and no other, in its ``config.json``."""
    known = {name: said_by(config, name) for name in compared()}
    known = {name: value for name, value in known.items() if name not in LATER or value != LATER[name]}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def check_same_run(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError where the run in ``out`` is another one than this command's."""
    for name in compared():
        before, now = said_by(old, name), new[name]
        if before != now:
            raise UserError(
                f"{out} was trained with {name} = {before!r}, this command says {now!r}; resume with "
                "the same recipe, or choose another --out"
            )
    fixed = [new[name] for name in SPECS if name not in FREE and name not in new["in_python"]]
    for path, now in specs.files(*fixed).items():
        before = (old.get("files") or {}).get(path)
        if before != now:
            raise UserError(
                f"{out} was trained with {path} of SHA-256 {str(before)[:12]}, the file is now {now[:12]}; restore it "
                "to resume, or choose another --out"
            )
