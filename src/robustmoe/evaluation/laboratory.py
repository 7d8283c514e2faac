"""The Lipschitz laboratory on a model: every quantity of `robustmoe.lipschitz`, image by image, router by router.

Puigcerver et al. (NeurIPS 2022) explain the robustness of sparse models by a smaller Lipschitz constant; what that is
for a routed layer, and how much of it the router has, is measured here on trained networks (docs/lipschitz.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from robustmoe import analysis, distributed, provenance
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Attack, Surrogate, build_attack, linf
from robustmoe.data import Batch, Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation import engine
from robustmoe.evaluation.attacked import Attacked, attack_batch, check_inside, routes
from robustmoe.evaluation.choosing import seeded, threat_of
from robustmoe.evaluation.folders import about_images, about_run, taken_up
from robustmoe.evaluation.measuring import PROBE, borrowed, first_look, header_of, images_of
from robustmoe.evaluation.precision import frozen, in_float32
from robustmoe.lipschitz import norms
from robustmoe.lipschitz.inputs import layer_inputs
from robustmoe.lipschitz.norms import PathNorms
from robustmoe.lipschitz.parts import expert_bound
from robustmoe.lipschitz.quantities import Quantities, of_layer, of_model, of_networks, of_pixels, within
from robustmoe.models.base import RoutedModel, as_routed
from robustmoe.noise import Noise
from robustmoe.options import LipschitzOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Header, Lipschitz
from robustmoe.records.lipschitz import MULTIPLES
from robustmoe.training.checkpoint import load_model, read_config

STEPS = 20
"""Steps of every iteration (attack, stretch, power iteration), unless told."""

WHOLE_CLASSES = 64
"""Classes up to which the model's Jacobian is written out (a backward pass a class), and its norm is exact."""

NEAREST = 32
"""Items an image whose distance to a routing boundary is measured, those with the smallest margins first."""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ the public functions


@takes(LipschitzOptions)
def measure_lipschitz(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    options: LipschitzOptions,
    num_classes: int | None = None,
) -> analysis.LipschitzSummary:
    """How much a model can move, and through which of its parts, on images (n, ch, h, w) in [0, 1] with labels (n), or
    on a data set of the project (its test split).

    ``attack``: the one whose changes are split; its norm and eps are those of all radii; default PGD-20 at linf 8/255.
    A dense model has the numbers of the whole model alone. Weights in half precision are measured in a float32 copy.
    The model keeps its modes and device. Raises UserError where `evaluate` does.
    """
    base = PGD(linf(8 / 255), steps=STEPS) if options.attack is None else build_attack(options.attack)
    base = seeded(base, options.seed)
    routed, where = in_float32(as_routed(model)), distributed.local_device(provenance.pick_device(options.device))
    images = images_of(x, y, num_classes).head(options.limit)
    about = about_images(model, x)
    with borrowed(routed, where):
        return analysis.lipschitz_summary(_measured(routed, images, base, about, where, options.batch_size))


@takes(LipschitzOptions)
def lipschitz_run(run: str | Path, *, options: LipschitzOptions) -> Lipschitz:
    """Measure the model of a run folder on its first ``limit`` test images; writes ``RUN/lipschitz.json`` after each
    batch, and a rerun goes on with the images that are missing.

    ``attack``: a spec; default PGD-20 at the threat the run was trained for. ``seed``: of the attack, unless the spec
    gives one, and of every iteration's start. `analysis.lipschitz_summary` makes numbers of the result.
    """
    run = Path(run)
    config = read_config(run)
    base = PGD(threat_of(config), steps=STEPS) if options.attack is None else build_attack(options.attack)
    base = seeded(base, options.seed)
    where = distributed.local_device(provenance.pick_device(options.device))
    model = in_float32(load_model(run, where))
    data: Data = specs.build(config["data"], "data")
    about = about_run(run, config, data)
    return _measured(model, data.test.head(options.limit), base, about, where, options.batch_size, run)


# ------------------------------------------------------------------------------------------------ the work


def _measured(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack,
    about: dict[str, Any],
    device: torch.device,
    batch_size: int,
    folder: Path | None = None,
) -> Lipschitz:
    """All images; those that stand in the folder's file are not measured again. The model is on the device."""
    if not attack.threat.eps > 0:
        raise UserError(f"the attack has eps {attack.threat.eps:g}; expected a ball of a radius above 0")
    output = first_look(model.eval(), images, device)
    plan = engine.plan(attack, output, images)
    header = header_of(model, images, attack, plan, device, batch_size, about, "main", "strict")
    bench = Bench(model, attack, None if output.logits.shape[1] <= WHOLE_CLASSES else STEPS)
    found = taken_up(folder, header, Lipschitz) or bench.empty(header)
    if found.done:
        return found
    climbed = frozen(model, images.batch(list(range(min(PROBE, len(images))))).to(device).x)
    left = torch.arange(len(found.index), len(images))
    clock = time.monotonic()
    with progress(len(images), "lipschitz", unit="images") as bar:
        bar.advance(len(found.index))
        for batch in batches(images, batch_size, left, device):
            found = bench.measure(found, batch, climbed)
            seconds, clock = found.seconds + time.monotonic() - clock, time.monotonic()
            found = replace(found, seconds=seconds)
            if folder is not None:
                found.write(folder)
            bar.advance(len(batch))
    return found


@dataclass(frozen=True)
class Bench:
    """One model under measurement. ``steps``: of power iteration on the model's Jacobian; None: it is written out."""

    model: RoutedModel
    attack: Attack
    steps: int | None

    def empty(self, header: Header) -> Lipschitz:
        """The record before the first image."""
        bounds = {
            name: expert_bound(layer.experts.w1.detach(), layer.experts.w2.detach()).tolist()
            for name, layer in self.model.layers().items()
        }
        names = list(header.routers)
        columns: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        absent: dict[str, dict[str, str]] = {name: {} for name in names}
        load: dict[str, list[list[int]]] = {name: [] for name in names}
        return Lipschitz(header, [], [], {}, columns, load, {}, bounds, {}, absent, {}, 0.0)

    def measure(self, so_far: Lipschitz, batch: Batch, climbed: Surrogate) -> Lipschitz:
        """The record with one batch more."""
        threat, noise = self.attack.threat, Noise.of(batch.index, self.attack.seed)
        done = attack_batch(self.model, self.attack, batch, noise, climbed)
        check_inside(threat, batch.x, done.x_adv, self.attack.objective.name)
        splits = norms.routing_split(self.model, batch.x, self.steps, noise)
        whole = of_model(self.model, batch.x, batch.y, done.x_adv, threat, splits, self.steps, noise)
        radii = norms.pixel_radius(self.model, batch.x, threat.norm, NEAREST) if splits else {}
        pixels = of_pixels(self.model, batch.x, radii, noise) if splits else {}
        parts = self._layers(done, pixels, splits)
        limits = threat.eps * torch.tensor(MULTIPLES, device=batch.x.device, dtype=batch.x.dtype)
        kinds = dict(whole.kinds)
        for part in parts.values():
            kinds |= part.kinds
        return replace(
            so_far,
            index=so_far.index + batch.index.tolist(),
            labels=so_far.labels + batch.y.tolist(),
            model=_longer(so_far.model, _lists(whole.columns)),
            layers={name: _longer(so_far.layers[name], _lists(part.columns)) for name, part in parts.items()},
            load=_longer(so_far.load, routes(done.clean.trace)),
            boundary=_longer(so_far.boundary, {name: within(own, limits).tolist() for name, own in radii.items()}),
            kinds=so_far.kinds | kinds,
            absent={name: so_far.absent[name] | part.absent for name, part in parts.items()},
            notes={name: part.note for name, part in parts.items()},
        )

    def _layers(
        self, done: Attacked, pixels: dict[str, Quantities], splits: dict[str, PathNorms]
    ) -> dict[str, Quantities]:
        """Every router's quantities, those in the pixels and those of its layer."""
        x, x_adv, own = done.batch.x, done.x_adv, self.model.layers()
        clean, after = ({}, {}) if not own else (layer_inputs(self.model, own, x), layer_inputs(self.model, own, x_adv))
        found = {}
        for name, pixel in pixels.items():
            if name in own:
                part = of_layer(own[name], clean[name], after[name], STEPS)
            else:
                part = of_networks(self.model, x, x_adv, self.steps)
            through = {"model's experts' part": splits[name].experts, "model's router's part": splits[name].router}
            kinds = {} if self.steps is None else dict.fromkeys(through, "lower bound")
            found[name] = Quantities(
                part.columns | through | pixel.columns,
                part.kinds | pixel.kinds | kinds,
                part.absent | pixel.absent,
                part.note,
            )
        return found


def _lists(columns: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: column.double().tolist() for name, column in columns.items()}


def _longer(old: dict[str, list[T]], new: dict[str, list[T]]) -> dict[str, list[T]]:
    """Each column with its new entries after the old ones."""
    return {name: old.get(name, []) + column for name, column in new.items()}
