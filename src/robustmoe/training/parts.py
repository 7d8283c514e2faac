"""What a recipe builds, and what a run folder says of it in ``config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustmoe import distributed, provenance
from robustmoe import spec as specs
from robustmoe.attacks import Attack
from robustmoe.certification import Certifier, build_certifier
from robustmoe.data import Data, ImageSet
from robustmoe.errors import UserError
from robustmoe.models import RoutedModel, build_model
from robustmoe.recipe import SPECS, Recipe
from robustmoe.training import starting
from robustmoe.training.optimisation import Average, OptimizerSpec, Schedule
from robustmoe.training.phases import Method

FREE = {"device", "threads", "checkpoint_every", "attacks", "max_steps", "data"}
"""Recipe fields that may differ between a run and its continuation; the data are compared by their contents."""


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

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.recipe.precision == "bf16" else None

    @property
    def batch_size(self) -> int:
        return min(self.recipe.batch_size, len(self.data.train))

    @property
    def steps(self) -> int:
        """Batches an epoch; the last, short one is left out."""
        return len(self.data.train) // self.batch_size


def build_parts(recipe: Recipe, device: torch.device, fresh: bool) -> RunParts:
    """``fresh``: no checkpoint will be loaded over the model's first weights."""
    described = {
        kind: specs.build(text, kind)
        for kind, text in (("method", recipe.method), ("optimizer", recipe.optimizer), ("schedule", recipe.schedule))
    }
    method: Method = described["method"]
    optimizer: OptimizerSpec = described["optimizer"]
    augment = specs.build(recipe.augment, "augment") if recipe.augment else None
    val_attack = specs.build(recipe.val_attack, "attack") if recipe.val_attack else None
    specs.build(recipe.model, "model")  # a misspelt model should not wait for the data
    data: Data = specs.build(recipe.data, "data")
    model = build_model(recipe.model, data.num_classes, data.image_shape, data.mean, data.std, recipe.seed).to(device)
    if recipe.init is not None and fresh:
        starting.start_from(model, recipe.init)
    parts = RunParts(
        recipe=recipe,
        data=data,
        model=model,
        method=method,
        optimisers=[optimizer.make(phase.parameters(model).values()) for phase in method.phases],
        base_lr=optimizer.lr,
        schedule=described["schedule"],
        augment=augment,
        val=data.val.head(recipe.val_limit),
        val_attack=val_attack,
        val_certifier=build_certifier(recipe.val_certifier) if recipe.val_certifier else None,
        average=Average(model, recipe.ema) if recipe.ema else None,
        device=device,
    )
    if parts.batch_size % distributed.world():
        raise UserError(
            f"batch_size {parts.batch_size} cannot be shared by {distributed.world()} processes; "
            "expected a multiple of that number"
        )
    return parts


def config_of(parts: RunParts) -> dict[str, Any]:
    data, recipe = parts.data, parts.recipe
    score = f"accuracy under {recipe.val_attack}" if recipe.val_attack else "clean accuracy"
    score = f"accuracy certified by {recipe.val_certifier}" if recipe.val_certifier else score
    return {
        **dataclasses.asdict(recipe),
        "threat": threat_trained_for(parts.method, parts.val_attack),
        "files": specs.files(*_texts(recipe).values(), *recipe.attacks),
        "num_classes": data.num_classes,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
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


def _texts(recipe: Recipe) -> dict[str, str | None]:
    """The fields of a recipe that are written as calls."""
    return {name: getattr(recipe, name) for name in SPECS}


def check_same_run(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = {item.name for item in dataclasses.fields(Recipe)} - FREE | {"data_hash"}
    for name in sorted(names):
        before, now = old.get(name), new[name]
        if before != now:
            raise UserError(
                f"{out} was trained with {name} = {before!r}, this command says {now!r}; resume with "
                "the same recipe, or choose another --out"
            )
    fixed = [new[name] for name in SPECS if name not in FREE]
    for path, now in specs.files(*fixed).items():
        before = (old.get("files") or {}).get(path)
        if before != now:
            raise UserError(
                f"{out} was trained with {path} of SHA-256 {str(before)[:12]}, the file is now {now[:12]}; restore it "
                "to resume, or choose another --out"
            )
