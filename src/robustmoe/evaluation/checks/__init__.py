"""Can this number be believed? Each check gives pass, warn, fail or not run, a value, and a sentence (docs/checks.md).

H, the harness (`harness`); G, gradients and the attack's strength (`strength`); R, routing (`routing`). The cheap ones
stand at every evaluation: `before` the attack, `ball_and_box` and `unchanged` after it. `deep` answers all 41 on a few
images, `check_run` for a run folder.
"""

from __future__ import annotations

import torch

from robustmoe.attacks import Attack
from robustmoe.data import Batch
from robustmoe.evaluation.checks.harness import (
    alone,
    ball_and_box,
    determinism,
    dynamic,
    fingerprint,
    identity,
    input_range,
    outputs,
    unchanged,
    weights_hash,
)
from robustmoe.evaluation.checks.routing import load, random_module, router_in_sight
from robustmoe.evaluation.checks.run import check_run, deep
from robustmoe.evaluation.checks.strength import attack_identity, gradients, label
from robustmoe.evaluation.checks.subject import ALL, NAMES, Subject
from robustmoe.models.base import RoutedModel
from robustmoe.records import Check

__all__ = [
    "ALL",
    "NAMES",
    "Subject",
    "alone",
    "attack_identity",
    "ball_and_box",
    "before",
    "check_run",
    "deep",
    "determinism",
    "dynamic",
    "fingerprint",
    "gradients",
    "identity",
    "input_range",
    "label",
    "load",
    "outputs",
    "random_module",
    "router_in_sight",
    "unchanged",
    "weights_hash",
]


def before(model: RoutedModel, attack: Attack, batch: Batch) -> list[Check]:
    """The checks that ask the model itself, on one small batch (n, ch, h, w); the attack is not run."""
    with torch.no_grad():
        output = model.run(batch.x)
        found = [input_range(batch), outputs(model, batch), determinism(model, batch), alone(model, batch)]
    found += [dynamic(model, batch), gradients(model, attack, batch), attack_identity(attack, output)]
    some = batch[:4]
    return [*found, router_in_sight(model, attack, batch), random_module(model, some), load(model, batch)]
