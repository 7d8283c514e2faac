"""Transfer from another run: an attack climbs that run's model, and the model attacked says what is broken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from robustmoe.attacks import Attack, Surrogate, Wrapped, exact_of
from robustmoe.errors import UserError
from robustmoe.models import Output, RoutedModel
from robustmoe.noise import Noise
from robustmoe.runs import named
from robustmoe.training.checkpoint import load_model

Stamp = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class FromRun(Wrapped):
    """``attack`` on the model of the run folder ``run``, such as the dense net of the same training; what breaks the
    model that is attacked counts. Another net's gradient goes where a gate's own may lead nowhere.

    The attack is of the whole model: an objective that needs a route would need that run's. Raises UserError for
    these, and for a run of other images or classes.
    """

    run: str
    attack: Attack

    def __post_init__(self) -> None:
        if self.inner.objective.needs_router:
            raise UserError(
                "from_run takes attacks of the whole model, such as pgd(linf(8/255)); the route of another run is not "
                "the model's own"
            )

    def queries(self, output: Output) -> int:
        return self.attack.queries(output) + self.attack.queries(output) // 3

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        source = _model(self.run, _stamp(self.run), str(x.device)).to(x.dtype)
        with torch.no_grad():
            theirs, ours = _answer(source, x[:1], self.run), exact_of(model).run(x[:1]).logits
        if theirs.shape != ours.shape:
            raise UserError(f"the run {self.run} has {theirs.shape[1]} classes, the model {ours.shape[1]}")
        on_pass = model.on_pass if isinstance(model, Surrogate) else None
        return self.attack(Surrogate(source, exact_of(model), on_pass=on_pass), x, y, noise)


def _answer(source: RoutedModel, x: Tensor, run: str) -> Tensor:
    try:
        return source.run(x).logits
    except RuntimeError as error:
        raise UserError(f"the run {run} does not take images {tuple(x.shape[1:])}: {error}") from error


def _stamp(run: str) -> Stamp:
    """Returns when the files of a run were written last: a run that is trained on is read again."""
    folder = named(run)
    files = [folder / name for name in ("config.json", "model.safetensors")]
    return tuple((file.name, file.stat().st_mtime_ns) for file in files if file.exists())


@lru_cache(maxsize=4)
def _model(run: str, stamp: Stamp, device: str) -> RoutedModel:
    return load_model(run, device).requires_grad_(False)


ATTACKS = {"from_run": FromRun}
