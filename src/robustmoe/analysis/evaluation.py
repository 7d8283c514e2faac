"""One rows file in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import attack_name
from robustmoe.analysis.rates import Rate, largest, mean, rate, right, robust
from robustmoe.analysis.verdict import judge
from robustmoe.errors import UserError
from robustmoe.records import Checks, Evaluation, Header, ObjectiveInfo, Row


@dataclass(frozen=True)
class EvaluationSummary:
    """One rows file in numbers. ``robust`` and what follows is None without an attack; ``router_exposed`` (attacked
    route, clean image) and ``experts_exposed`` (clean route, attacked image) are None for a dense model too.
    ``rerouted``: mean share of items that changed expert, per router. ``rerouted_broken``: images that the attack
    both rerouted and broke. ``max_size``: in the header's norm, pixels of [0, 1]. ``failed`` and ``incomplete``:
    sentences that say why not to believe it; ``warned``: what to look at first."""

    attack: str | None
    objective: ObjectiveInfo | None
    norm: str
    eps: float
    role: str
    n: int
    planned: int
    clean: Rate
    robust: Rate | None
    router_exposed: Rate | None
    experts_exposed: Rate | None
    rerouted: dict[str, float]
    rerouted_broken: Rate | None
    max_size: float
    router_attacked: bool | None
    failed: tuple[str, ...]
    warned: tuple[str, ...]
    incomplete: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Returns every planned image has its row, and the checks were run."""
        return not self.incomplete

    @property
    def rerouted_mean(self) -> float | None:
        """Returns the mean over the routers; None without a router or an attack."""
        return sum(self.rerouted.values()) / len(self.rerouted) if self.rerouted else None


def evaluation_summary(header: Header, rows: Sequence[Row], checks: Checks | None) -> EvaluationSummary:
    """Returns one rows file in numbers; UserError if it has no rows."""
    if not rows:
        raise UserError(f"no rows yet for {attack_name(header)}; `robustmoe evaluate RUN` makes them")
    attacked = header.attack is not None
    routed = attacked and bool(header.routers)
    verdict = judge([Evaluation(header, list(rows), checks)])
    return EvaluationSummary(
        attack=header.attack,
        objective=header.objective,
        norm=header.norm,
        eps=header.eps,
        role=header.role,
        n=len(rows),
        planned=header.n,
        clean=rate([right(row) for row in rows]),
        robust=rate([robust(row) for row in rows]) if attacked else None,
        router_exposed=rate([row.router_exposed == row.label for row in rows]) if routed else None,
        experts_exposed=rate([row.experts_exposed == row.label for row in rows]) if routed else None,
        rerouted={name: mean([row.rerouted.get(name, 0.0) for row in rows]) for name in header.routers if routed},
        rerouted_broken=rate([_rerouted_and_broken(row) for row in rows]) if routed else None,
        max_size=largest(row.size.get(header.norm, math.nan) for row in rows),
        router_attacked=verdict.router_attacked,
        failed=verdict.failed,
        warned=verdict.warned,
        incomplete=verdict.incomplete,
    )


def _rerouted_and_broken(row: Row) -> bool:
    return right(row) and row.adversarial != row.label and any(share > 0 for share in row.rerouted.values())
