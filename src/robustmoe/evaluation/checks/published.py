"""What was run (check G14), and the published name that it may be called by."""

from __future__ import annotations

import hashlib
from typing import Any, cast

from robustmoe import spec as specs
from robustmoe.attacks import Attack, Joint
from robustmoe.attacks.apgd import APGD, TargetedAPGD
from robustmoe.attacks.fab import FAB
from robustmoe.attacks.square import Square
from robustmoe.errors import UserError
from robustmoe.evaluation.checks.registry import Answer, check
from robustmoe.evaluation.checks.subject import (
    Subject,
)
from robustmoe.models.base import Output


@check("G14", "attack identity", "model", "cheap")
def attack_identity(case: Subject) -> Answer:
    """The attack's text and that of its parts, hashed; the label "AutoAttack standard" only where every part is
    the definition's.
    """
    attack, output = case.main, case.output
    text = " + ".join([_written(attack), *(f"{name}: {_written(part)}" for name, part in attack.parts(output) if name)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    named = label(attack, output)
    said = f"this is {named}" if named else "no published name is claimed for it"
    return Answer("pass", {"text": text, "hash": digest, "label": named}, f"{text} ({digest}): {said}")


def _written(attack: Attack) -> str:
    try:
        return specs.text(attack)
    except UserError:
        return repr(attack) if hasattr(attack, "__dataclass_fields__") else type(attack).__name__


def label(attack: Attack, output: Output) -> str | None:
    """The published name that the parts of ``attack`` are entitled to, for a model that gave ``output``: "AutoAttack
    standard", or None. Croce and Hein (2020) and the released ``version="standard"`` of each norm, every number of it.
    Batch size, stream of random numbers and what is returned do not change what is broken, so they are free.
    """
    classes, norm = output.logits.shape[1], attack.threat.norm
    if classes < 4:  # the released targeted DLR does not exist
        return None
    large = norm == "l1"
    towards = min(5 if large else 9, classes - 1)
    climb = {"steps": 100, "rho": 0.75, "eot": 1}
    definition: list[tuple[type[Attack], dict[str, Any]]] = [
        (APGD, {**climb, "restarts": 5 if large else 1, "objective": Joint("ce")}),
        (TargetedAPGD, {**climb, "restarts": 1, "targets": towards, "loss": "dlr"}),
        (
            FAB,
            {"steps": 100, "restarts": 1, "targets": min(9, classes - 1), "alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
        ),
        (Square, {"steps": 5000, "restarts": 1, "p_init": 0.8, "rescale": False, "loss": "margin"}),
    ]
    parts = [part for _, part in attack.parts(output)]
    if len(parts) != len(definition):
        return None
    for part, (kind, fields) in zip(parts, definition):
        told = {name: getattr(part, name, None) for name in fields}
        if "targets" in told:
            told["targets"] = min(cast(int, told["targets"] or 0), classes - 1)
        wide = getattr(part, "largereps", None)
        if type(part) is not kind or part.threat != attack.threat or told != fields or wide not in (None, large):
            return None
    return "AutoAttack standard"
