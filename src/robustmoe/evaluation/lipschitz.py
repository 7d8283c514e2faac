"""How far a model can move: every quantity of `robustmoe.lipschitz`, image by image, router by router.

Puigcerver et al. (NeurIPS 2022) explain the robustness of sparse models by a smaller Lipschitz constant; what that is
for a routed layer, and how much of it the router has, is measured here on trained networks (docs/lipschitz.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from robustmoe.attacks import PGD, Attack, Surrogate, Threat, build_attack, linf
from robustmoe.data import Batch
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import Attacked, attack_batch, check_inside, routes
from robustmoe.evaluation.choosing import seeded, threat_of
from robustmoe.evaluation.session import (
    Images,
    Labels,
    Session,
    in_hand,
    on_run,
    tell_of_gradient,
)
from robustmoe.lipschitz import norms
from robustmoe.lipschitz.inputs import layer_inputs
from robustmoe.lipschitz.norms import PathNorms
from robustmoe.lipschitz.parts import expert_bound
from robustmoe.lipschitz.quantities import Quantities, of_layer, of_model, of_networks, of_pixels, within
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.options import LipschitzOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Header, Lipschitz
from robustmoe.records.lipschitz import MULTIPLES
from robustmoe.runs import named
from robustmoe.training.checkpoint import read_config

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
    x: Images,
    y: Labels = None,
    *,
    options: LipschitzOptions,
    num_classes: int | None = None,
) -> Lipschitz:
    """Measures how much a model can move, and through which of its parts, on images (n, ch, h, w) in [0, 1] with labels
    (n), or on a data set of the project (its test split).

    The attack, whose changes are split and whose norm and eps are those of all radii, is by default PGD-20 at linf
    8/255. A dense model has the numbers of the whole model alone. Weights in half precision are measured in a float32
    copy. The model keeps its modes and device. Raises UserError where `evaluate` does.
    """
    attack = _attack(options, linf(8 / 255))
    with in_hand(model, x, y, options, num_classes, float32=True) as session:
        return _measured(session, attack)


@takes(LipschitzOptions)
def lipschitz_run(run: str | Path, *, options: LipschitzOptions) -> Lipschitz:
    """Measures the model of a run folder on its first test images; writes ``RUN/lipschitz.json`` after each batch, and
    a rerun goes on with the images that are missing.

    The attack is by default PGD-20 at the threat the run was trained for. ``seed``: also of every iteration's start.
    Raises UserError where `evaluate` does.
    """
    attack = _attack(options, threat_of(read_config(named(run))))
    with on_run(run, options, float32=True) as session:
        return _measured(session, attack)


def _attack(options: LipschitzOptions, threat: Threat) -> Attack:
    attack: Attack = PGD(threat, steps=STEPS) if options.attack is None else build_attack(options.attack)
    if not attack.threat.eps > 0:
        raise UserError(f"the attack has eps {attack.threat.eps:g}; expected a ball of a radius above 0")
    return seeded(attack, options.seed)


# ------------------------------------------------------------------------------------------------ the work


def _measured(session: Session, attack: Attack) -> Lipschitz:
    """Measures all images; those that are in the folder's file are not measured again."""
    header = session.attack_header(attack)
    classes = session.output.logits.shape[1]
    if masked := int((~session.output.logits.isfinite()).any(0).sum()):
        raise UserError(
            f"{masked} of the {classes} classes have logits that are not finite, which have no slope; expected finite "
            "ones: of a model that masks classes, pick the others (lambda x: model(x)[:, columns])"
        )
    whole = classes <= WHOLE_CLASSES
    bench = Bench(session.model, attack, None if whole else STEPS)
    record = session.resume(Lipschitz, header, lambda old: len(old.index)) or bench.empty(header)
    if record.done:
        return record
    tell_of_gradient(session.model, session.probe.x)
    climbed = session.surrogate()
    with progress(len(session.images), "lipschitz", unit="images") as bar:
        bar.advance(len(record.index))
        for batch in session.batches(torch.arange(len(record.index), len(session.images))):
            record = session.keep(bench.measure(record, batch, climbed))
            bar.advance(len(batch))
    return record


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
        clean, attacked = (layer_inputs(self.model, own, x), layer_inputs(self.model, own, x_adv)) if own else ({}, {})
        quantities = {}
        for name, pixel in pixels.items():
            if name in own:
                part = of_layer(own[name], clean[name], attacked[name], STEPS)
            else:
                part = of_networks(self.model, x, x_adv, self.steps)
            through = {"model's experts' part": splits[name].experts, "model's router's part": splits[name].router}
            kinds = {} if self.steps is None else dict.fromkeys(through, "lower bound")
            quantities[name] = Quantities(
                part.columns | through | pixel.columns,
                part.kinds | pixel.kinds | kinds,
                part.absent | pixel.absent,
                part.note,
            )
        return quantities


def _lists(columns: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: column.double().tolist() for name, column in columns.items()}


def _longer(old: dict[str, list[T]], new: dict[str, list[T]]) -> dict[str, list[T]]:
    """Each column with its new entries after the old ones."""
    return {name: old.get(name, []) + column for name, column in new.items()}
