"""`audit`: from a model that was not made here to a report: its routers found and wrapped, checks, AutoAttack with the
attacks on the routing, a dissection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe import generators, records
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Attack, AutoAttackRouting, Threat, build_attack
from robustmoe.data import Data
from robustmoe.errors import UserError
from robustmoe.evaluation.checks.run import check_run
from robustmoe.evaluation.choosing import attacks_for, seeded, spec_or_repr
from robustmoe.evaluation.dissection import dissect_run
from robustmoe.evaluation.measuring import evaluate_run
from robustmoe.evaluation.own_run import default_folder, own_run
from robustmoe.evaluation.session import device_of
from robustmoe.models import OwnModel, RoutedModel
from robustmoe.models.plain import as_routed
from robustmoe.options import AuditOptions, takes
from robustmoe.progress import note
from robustmoe.records import Evaluation, Records
from robustmoe.training.checkpoint import load_model, read_config, run_data
from robustmoe.wrapping import find_routers, wrap
from robustmoe.wrapping.described import WrappedSpec

STEPS = 20
"""Of the attack that the dissection is made of."""

CHECKED = 64
"""Images that the checks are made on at most."""


@dataclass(frozen=True)
class Audited:
    """What an audit left: the run ``folder``, and what was attacked in it; ``unwrapped``: why a model that seems to
    route was measured as a plain callable, "" where it was not.
    """

    folder: Path
    results: Records[Evaluation]
    unwrapped: str = ""

    def __str__(self) -> str:
        return "\n".join([str(self.results), *self._beside()])

    def _repr_html_(self) -> str:
        """Returns the results as the report shows them, for a notebook."""
        return "".join(f"<p>{escape(line)}</p>" for line in self._beside()) + self.results._repr_html_()

    def _beside(self) -> list[str]:
        unseen = [f"routing was seen, but not wrapped: {self.unwrapped}"] if self.unwrapped else []
        return [*unseen, f"run folder: {self.folder}"]


@takes(AuditOptions)
def audit(
    model: str | Path, data: str | None = None, *, options: AuditOptions, out: str | Path | None = None
) -> Audited:
    """Audits ``model``, a model of a user's own such as "my_file.py:make_model", on the data set ``data``, in one run
    folder (``out``; by default in runs/, named after file and model); or the model of a run folder, there and on its
    own data set.

    Its routers are looked for (`robustmoe.find_routers`) and wrapped (`robustmoe.wrap`), unless it is a `RoutedModel`;
    a model whose routing is seen but cannot be wrapped is measured as a plain callable, and marked. Then come all
    checks, the attacks, and, of a routed model, a dissection. What is done is not done again. Raises UserError where
    these do.
    """
    given = [build_attack(attack) for attack in options.attacks]
    asked = specs.build(options.threat, "threat") if isinstance(options.threat, str) else options.threat
    threat: Threat = given[0].threat if given else asked
    folder, unwrapped = _folder(model, data, out, threat, options)
    note(f"run folder: {folder}")
    with records.writing(folder):
        shared: dict[str, Any] = {"seed": options.seed, "device": options.device}
        simple = given or _simple(folder, threat)
        note("checks")
        _checked(folder, [seeded(attack, options.seed) for attack in simple], options.limit, shared)
        note("attacks")
        suite = () if given else (AutoAttackRouting(threat),)
        sized = {**shared, "limit": options.limit, "batch_size": options.batch_size}
        results = evaluate_run(folder, attacks=(*simple, *suite), curve=(), **sized)
        if results[0].header.routers:
            note("dissection")
            dissect_run(folder, attack=PGD(threat, steps=STEPS), **sized)
    return Audited(folder, results, unwrapped)


def _folder(
    model: str | Path, data: str | None, out: str | Path | None, threat: Threat, options: AuditOptions
) -> tuple[Path, str]:
    """Returns the run folder that is audited, and why a model that seems to route is measured as a plain callable."""
    if Path(model).is_dir():
        if data is not None or out is not None:
            raise UserError(f"{model} is a run folder, with data of its own; expected neither data nor out with it")
        return Path(model), ""
    if data is None:
        raise UserError(f"{model} needs images to be attacked on; expected a data set too, such as digits")
    name = specs.canonical(str(model))
    text, unwrapped = _described(name, data, options)
    more = {"unwrapped": unwrapped, "threat": specs.text(threat)}
    return own_run(text, data, out or default_folder(name), more), unwrapped


def _simple(folder: Path, threat: Threat) -> list[Attack]:
    """What an evaluation attacks the model of a run folder with where nothing is asked for."""
    config = read_config(folder)
    with torch.no_grad():
        output = load_model(folder).run(run_data(folder, config).test.batch([0, 1]).x)
    return attacks_for(output, [], threat)


def _checked(folder: Path, attacks: Sequence[Attack], limit: int | None, shared: dict[str, Any]) -> None:
    """All checks of these attacks, unless their file is there and of the same work."""
    few = CHECKED if limit is None else min(limit, CHECKED)
    old, asked = records.Audit.read(folder), [spec_or_repr(attack) for attack in attacks]
    if old is not None and (old.attacks, old.seed) == (asked, shared["seed"]) and old.n <= few:
        return
    check_run(folder, attacks=attacks, limit=few, **shared).write(folder)


# ------------------------------------------------------------------------------------------------ routers


def _described(model: str, data: str, options: AuditOptions) -> tuple[str, str]:
    """Returns the spec of the model with its routers wrapped, and why they are not where they could not be."""
    described = specs.build(model, "model")
    if not isinstance(described, OwnModel):
        return model, ""  # wrapped(...) already; of a model of ours, the run folder says what is wrong
    source: Data = specs.build(data, "data")
    with generators.seeded(0):  # as when it is built for a measurement
        made = described.made(source.num_classes, source.image_shape)
    if not isinstance(made, nn.Module):
        note(f"{model} is no nn.Module, so no router can be looked for in it")
        return model, ""
    if _tells(made, source):
        return model, ""
    device = device_of(options)
    example = source.test.batch(list(range(min(8, len(source.test))))).x.to(device)
    return _wrapped(model, described, made.eval().to(device), example, options)


def _tells(made: nn.Module, source: Data) -> bool:
    """Whether a model tells of its routers by itself. (Of any other the output may have to be picked first.)"""
    if not any(isinstance(module, RoutedModel) for module in made.modules()):
        return False
    routed = as_routed(made).eval()
    with torch.no_grad():
        return bool(routed.run(source.test.batch([0, 1]).x).trace)


def _wrapped(
    model: str, described: OwnModel, made: nn.Module, example: Tensor, options: AuditOptions
) -> tuple[str, str]:
    findings = find_routers(made, example)
    note(str(findings))
    if not findings:
        return model, ""
    try:
        wrapped = wrap(made, findings.routers, example=example, noise=options.noise)
        for sentence in getattr(wrapped, "notes", ()):
            note(f"note: {sentence}")
        spec = WrappedSpec(described, tuple(findings.routers.items()), noise=options.noise)
        return specs.text(spec), ""
    except UserError as error:
        note(f"not wrapped: {error}; measured as a plain callable")
        return model, str(error)
