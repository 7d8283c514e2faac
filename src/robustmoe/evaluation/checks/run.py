"""The deep checks: all of them on a few images of a model, or of a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from robustmoe import provenance, records
from robustmoe import spec as specs
from robustmoe.attacks import Attack, NotFiniteError, build_attack
from robustmoe.data import Batch, Data
from robustmoe.errors import UserError, nearest
from robustmoe.evaluation.checks import harness, routing, strength
from robustmoe.evaluation.checks.subject import ALL, NAMES, Subject, check, inside, not_run
from robustmoe.evaluation.choosing import attacks_for, seeded, threat_of, written
from robustmoe.models.base import RoutedModel
from robustmoe.options import CheckOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Audit, Check
from robustmoe.training.checkpoint import load_model, read_config

NOT_ASKED = "not asked for"

OF_MODEL: dict[str, Callable[[Subject], Check]] = {
    "H1": lambda case: harness.input_range(case.whole, case.model(case.whole.x[:1]).shape[1]),
    "H4": lambda case: harness.alone(case.model, case.whole),
    "H5": harness.training_log,
    "H6": lambda case: harness.outputs(case.model, case.whole),
    "H7": lambda case: harness.determinism(case.model, case.whole),
    "H8": lambda case: harness.dynamic(case.model, case.whole),
    "G14": lambda case: strength.attack_identity(case.main, case.model.run(case.whole.x)),
    "R1": lambda case: _best_in_sight(case),
    "R6": routing.neighbours,
    "R7": lambda case: routing.random_module(case.model, case.whole),
    "R9": routing.load_attacked,
    "R10": routing.trained,
    "R13": routing.stale,
    "R14": routing.cost,
    "R15": routing.planted_route,
    "R16": routing.certificate,
    "R17": routing.smoothing,
}
"""Checks that need no image that the model gets right."""

OF_ATTACK: dict[str, Callable[[Subject], Check]] = {
    "H2": lambda case: _ball(case),
    "H9": harness.belongs,
    "H10": harness.precision,
    "G1": strength.flat_along,
    "G2": strength.finite_differences,
    "G3": strength.instability,
    "G4": strength.silent_success,
    "G5": strength.incomplete,
    "G6": strength.transfer,
    "G7": strength.unbounded,
    "G8": strength.radii,
    "G9": strength.converged,
    "G10": strength.black_box,
    "G11": strength.losses_agree,
    "G12": strength.seeds,
    "G13": strength.planted,
    "R2": routing.route_flip,
    "R3": routing.enumerated,
    "R4": routing.saturation,
    "R5": routing.views,
    "R8": routing.joint_vulnerability,
    "R11": routing.auxiliary,
    "R12": routing.logit_scale,
}
"""Checks of the attacks, on the images that the model gets right."""


def deep(
    model: RoutedModel, batch: Batch, attacks: Sequence[Attack], seed: int = 0, only: Sequence[str] = (), **run: Any
) -> list[Check]:
    """Every check on the images of ``batch`` (64 are enough), in order: 41 answers.

    ``attacks``: those of the evaluation; the first on the whole model is the main one. ``only``: ids of the checks to
    run (default: all); the others answer "not run". What more is known of a run
    (``logged``, ``val``, ``metrics``: see `check_run`) makes H5 and R10 possible. Where the logits are not finite (H6)
    no attack is run. The model is in eval mode meanwhile and is left as it was (H3 says whether it is).
    """
    if not attacks:
        raise UserError("no attack to check; expected at least one, such as pgd(linf(8/255), steps=20)")
    _known(only)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    as_found = harness.fingerprint(model)
    found: dict[str, Check] = {}
    try:
        case = Subject.of(model, attacks, batch, seed, **run)
        with progress(len(ALL), "checks", unit="checks") as bar:
            for key in sorted([*OF_MODEL, *OF_ATTACK], key=_order):
                bar.say(key)
                wanted = not only or key in only or key == "H6"
                found[key] = _answer(key, case, found.get("H6")) if wanted else not_run(key, NOT_ASKED)
                bar.advance()
        found["H3"] = harness.unchanged(as_found, harness.fingerprint(model))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [found[key] for key in ALL]


def _known(only: Sequence[str]) -> None:
    unknown = [key for key in only if key not in NAMES]
    if unknown:
        raise UserError(f"there is no check {unknown[0]!r}; {nearest(unknown[0], ALL)}")


def _order(key: str) -> int:
    """H6 first: where it fails, no attack is run."""
    return -1 if key == "H6" else ALL.index(key)


def _answer(key: str, case: Subject, outputs: Check | None) -> Check:
    if key in OF_MODEL:
        ask = OF_MODEL[key]
    elif outputs is not None and outputs.status == "fail":
        return not_run(key, f"no attack can be run: {outputs.sentence}")
    elif not len(case.batch):
        return not_run(key, f"the model gets none of {len(case.whole)} images right, so nothing can be broken")
    else:
        ask = OF_ATTACK[key]
    try:
        with torch.no_grad():
            return ask(case)
    except NotFiniteError as error:
        return check(key, "fail", None, f"the attack stopped: {error}")


def _ball(case: Subject) -> Check:
    """H2 for what every attack left."""
    worst, outside = 0.0, 0
    for attack in case.attacks:
        near = inside(attack.threat, case.under(attack).x_adv, case.batch.x)
        outside += int((~near).sum())
        worst = max(worst, float(attack.threat.size(case.under(attack).x_adv - case.batch.x).max()))
    text = (
        f"{outside} of {len(case.attacks)} x {len(case.batch)} attacked images leave the ball or the box; the largest "
    )
    text += f"{case.threat.norm} perturbation is {worst:.6g} of {case.threat.eps:.6g}"
    return check("H2", "fail" if outside else "pass", worst, text)


def _best_in_sight(case: Subject) -> Check:
    """R1 of the attack that sees the router best: one is enough."""
    found = [routing.router_in_sight(case.model, attack, case.whole) for attack in case.attacks]
    return min(found, key=lambda one: ("pass", "warn", "fail", "not run").index(one.status))


@takes(CheckOptions)
def check_run(run: str | Path, *, options: CheckOptions) -> Audit:
    """Every check on the first test images of a run folder, in order. ``attacks``: by default what `evaluate_run` would
    run. Takes minutes on one thread.
    """
    _known(options.only)
    folder = Path(run)
    config = read_config(folder)
    where = provenance.pick_device(options.device)
    model = load_model(folder, where)
    data: Data = specs.build(config["data"], "data")
    images = data.test.head(options.limit)
    batch = images.batch(list(range(len(images)))).to(where)
    given = [build_attack(text) for text in options.attacks or config.get("attacks") or ()]
    chosen = attacks_for(model.run(batch.x[:2]).trace, given, threat_of(config))
    chosen = [seeded(one, options.seed) for one in chosen]
    log = folder / "metrics.jsonl"
    metrics = records.read_jsonl(log) if log.exists() else []
    best = [line for line in metrics if line.get("best")]
    more = {"metrics": metrics, "val": data.val.head(config.get("val_limit")), "logged": best[-1] if best else None}
    found = deep(model, batch, chosen, options.seed, options.only, **more)
    return Audit(harness.weights_hash(model), [written(one) for one in chosen], len(images), options.seed, found)
