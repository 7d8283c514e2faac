"""Asking the checks: the cheap ones around an evaluation, all of them on a few images of a model or of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robustmoe import provenance, records
from robustmoe.attacks import Attack, NotFiniteError, build_attack, evaluating
from robustmoe.attacks.base import looked_at
from robustmoe.data import Batch
from robustmoe.errors import UserError, nearest
from robustmoe.evaluation.checks import gradients, harness, hidden, passing, published, routers, routing, strength  # noqa: F401
from robustmoe.evaluation.checks.fingerprints import fingerprint, weights_hash
from robustmoe.evaluation.checks.registry import CHECKS, Answer, Registered, ids, not_run
from robustmoe.evaluation.checks.subject import Finished, Subject
from robustmoe.evaluation.choosing import attacks_for, seeded, spec_or_repr, threat_of
from robustmoe.evaluation.precision import whole_float32
from robustmoe.models.base import Output, RoutedModel
from robustmoe.options import CheckOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Audit, Check
from robustmoe.runs import named
from robustmoe.training.checkpoint import load_model, read_config, run_data

NOT_ASKED = "not asked for"

FIRST, LAST = "H6", "H3"
"""Where the logits are not finite (H6) no attack is run; whether the model is as it was (H3) is asked after all."""


def before(
    model: RoutedModel, attack: Attack, batch: Batch, output: Output | None = None, classes: int = 0
) -> list[Check]:
    """The cheap checks: they ask the model on one small batch (n, ch, h, w), and do not run the attack. ``output``:
    what the model answered to the batch, where it was asked already. ``classes``: of the data, 0 where not known.
    """
    case = Subject(model, (attack,), batch, batch, run={"classes": classes}, answered=output)
    with evaluating(model), torch.no_grad():
        return [CHECKS[id].asked["cheap"](case) for id in ids("cheap")]


def after(done: Finished) -> list[Check]:
    """The checks of what a finished evaluation left."""
    return [CHECKS[id].asked["after"](done) for id in ids("after")]


def deep(
    model: RoutedModel,
    batch: Batch,
    attacks: Sequence[Attack],
    seed: int = 0,
    only: Sequence[str] = (),
    run: dict[str, Any] | None = None,
) -> list[Check]:
    """Every check on the images of ``batch`` (64 are enough), in the order of `ids`.

    ``attacks``: those of the evaluation; the first on the whole model is the main one. ``only``: ids of the checks to
    run (default: all); the others answer "not run". What more is known of a ``run`` (``logged``, ``val``, ``metrics``,
    ``classes``: see `check_run`) makes H5 and R10 possible. Where the logits are not finite (H6) no attack is run. The
    model is in eval mode meanwhile and is left as it was (H3 says whether it is). Raises UserError without an attack,
    or for an unknown id.
    """
    if not attacks:
        raise UserError("no attack to check; expected at least one, such as pgd(linf(8/255), steps=20)")
    _known(only)
    asked = ids("model", "attack")
    order = [FIRST, *(id for id in asked if id not in (FIRST, LAST)), LAST]
    checks: dict[str, Check] = {}
    bars = progress(len(order), "checks", unit="checks")
    with evaluating(model), looked_at(), whole_float32(), torch.no_grad(), bars as bar:
        case = Subject.of(model, attacks, batch, seed, run, fingerprint(model))
        for id in order:
            bar.say(id)
            wanted = not only or id in only or id in (FIRST, LAST)
            checks[id] = _answer(CHECKS[id], case, checks.get(FIRST)) if wanted else not_asked(id)
            bar.advance()
    return [checks[id] for id in asked]


def not_asked(id: str) -> Check:
    """The answer of a check that ``only`` leaves out."""
    return CHECKS[id].says(not_run(NOT_ASKED))


def _known(only: Sequence[str]) -> None:
    unknown = [id for id in only if id not in CHECKS]
    if unknown:
        raise UserError(f"there is no check {unknown[0]!r}; {nearest(unknown[0], ids())}")


def _answer(entry: Registered, case: Subject, outputs: Check | None) -> Check:
    if "attack" in entry.asked:
        if outputs is not None and outputs.status == "fail":
            return entry.says(not_run(f"no attack can be run: {outputs.sentence}"))
        if not len(case.batch):
            return entry.says(not_run(f"the model gets none of {len(case.whole)} images right: nothing can be broken"))
    ask = entry.asked.get("attack") or entry.asked["model"]
    try:
        return ask(case)
    except NotFiniteError as error:
        return entry.says(Answer("fail", None, f"the attack stopped: {error}"))


@takes(CheckOptions)
def check_run(run: str | Path, *, options: CheckOptions) -> Audit:
    """Every check on the first test images of a run folder, in order. ``attacks``: by default what `evaluate_run` would
    run. Takes minutes on one thread.
    """
    _known(options.only)
    folder = named(run)
    config = read_config(folder)
    where = provenance.pick_device(options.device)
    model = load_model(folder, where)
    data = run_data(folder, config)
    images = data.test.head(options.limit)
    batch = images.batch(list(range(len(images)))).to(where)
    given = [build_attack(text) for text in options.attacks or config.get("attacks") or ()]
    chosen = attacks_for(model.run(batch.x[:2]), given, threat_of(config))
    chosen = [seeded(attack, options.seed) for attack in chosen]
    metrics = records.read_metrics(folder / "metrics.jsonl")
    best = [line for line in metrics if line.get("best")]
    more = {
        "classes": data.num_classes,
        "metrics": metrics,
        "val": data.val.head(config.get("val_limit")),
        "logged": best[-1] if best else None,
    }
    checks = deep(model, batch, chosen, options.seed, options.only, more)
    return Audit(weights_hash(model), [spec_or_repr(attack) for attack in chosen], len(images), options.seed, checks)
