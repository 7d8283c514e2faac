"""Can the numbers of these files be quoted?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import names
from robustmoe.analysis.rates import inside, largest
from robustmoe.records import Audit, Check, Evaluation


@dataclass(frozen=True)
class Verdict:
    """Can the worst case be quoted? ``router_attacked`` is None for a dense model, and False also for one that routes
    without saying so (check R18); ``reason`` says why it is what it is; the others are sentences, empty if all is well.
    """

    router_attacked: bool | None
    reason: str
    failed: tuple[str, ...]
    warned: tuple[str, ...]
    incomplete: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Nothing failed, nothing is missing, and the router (if there is one) was attacked."""
        return not self.failed and not self.incomplete and self.router_attacked is not False

    @property
    def said(self) -> str:
        """The verdict in words."""
        return "no check speaks against this number" if self.trusted else "do NOT quote this number"


def judge(results: Sequence[Evaluation], audit: Audit | None = None) -> Verdict:
    """Says whether the numbers of these files, taken together, can be quoted.

    The router counts as attacked only if some file with all its rows has an attack whose objective aims at the router
    and whose own check R1 (some gradient reaches the image through the router) does not fail. If one is there, a
    failure of R1 in another file is a warning: that attack does not see the router, and the first does."""
    attacked, reason = _router_attacked(results)
    failed: dict[str, None] = {}
    warned: dict[str, None] = {}
    incomplete: list[str] = []
    for name, (header, rows, checks) in zip(names([result.header for result in results]), results, strict=True):
        if len(rows) < header.n:
            shard = f" (shard {header.shard}; robustmoe merge joins all)" if "/" in header.shard else ""
            incomplete.append(f"{name}: {len(rows)} of {header.n} images{shard}")
        elif checks is None:
            incomplete.append(f"{name}: not finished, its checks were not run")
        for check in checks.checks if checks is not None else ():
            if check.status in ("fail", "warn"):
                severe = check.status == "fail" and not (check.id == "R1" and attacked)
                sentence = f"{check.id} {check.name}: {check.sentence}"
                (failed if severe else warned)[sentence if check.id != "R1" else f"{sentence} ({name})"] = None
        if header.attack is not None and rows:
            size = largest(row.size.get(header.norm, math.nan) for row in rows)
            if not inside(size, header.eps):
                failed[f"{name}: a perturbation of size {size:.6g} is outside {header.norm} <= {header.eps:.6g}"] = None
    if audit is not None and all(result.header.model_hash == audit.model_hash for result in results):
        for check in audit.checks:
            if check.status in ("fail", "warn"):
                severe = check.status == "fail" and not (check.id == "R1" and attacked)
                (failed if severe else warned)[f"{check.id} {check.name}: {check.sentence} (robustmoe check)"] = None
    return Verdict(attacked, reason, tuple(failed), tuple(warned), tuple(incomplete))


def _router_attacked(results: Sequence[Evaluation]) -> tuple[bool | None, str]:
    if not any(result.header.routers for result in results):
        hidden = any(_status(result, "R18") == "fail" for result in results)
        return (False, "check R18: it routes without saying so") if hidden else (None, "the model is dense")
    aiming = [result for result in results if result.header.attack and _aims(result)]
    if not aiming:
        return False, "no attack aims at the router"
    blind = [result for result in aiming if _status(result, "R1") == "fail"]
    seeing = [result for result in aiming if _status(result, "R1") != "fail"]
    if not seeing:
        sentences = [
            check.sentence for result in blind if result.checks for check in result.checks.checks if check.id == "R1"
        ]
        return False, f"check R1 failed: {sentences[0]}"
    if all(len(result.rows) < result.header.n for result in seeing):
        return False, "no attack on the router has seen all its images"
    if blind:
        which = " and ".join(sorted({_kind(result) for result in blind}))
        proof = f"check R1: the {which} attack does not see the router"
    else:
        worst = min((_status(result, "R1") for result in seeing), key=("warn", "not run", "pass").index)
        proof = {"warn": "check R1 warns", "not run": "check R1 was not run", "pass": "check R1 passed"}[worst]
    return True, f"{len(seeing)} of {len(results)} attacks aim at the router; {proof}"


def _aims(result: Evaluation) -> bool:
    objective = result.header.objective
    return objective is not None and objective.aims_at_router


def _kind(result: Evaluation) -> str:
    return "" if result.header.objective is None else result.header.objective.name.replace("_", " ")


def _status(result: Evaluation, id: str) -> str:
    """Returns the status of one check in one file."""
    answers = [check.status for check in result.checks.checks if check.id == id] if result.checks else []
    return answers[0] if answers else "not run"


def worst_answers(checks: Sequence[Check], verdict: Verdict | None) -> dict[str, str]:
    """Returns the answer of each check, by its worst over attacks (one that ran anywhere is not "not run"). A failure
    of R1 counts as a warning where another attack saw the router, as in `judge`."""
    order = ("not run", "pass", "warn", "fail")
    answers: dict[str, str] = {}
    for check in checks:
        answers[check.id] = max(answers.get(check.id, "not run"), check.status, key=order.index)
    if answers.get("R1") == "fail" and verdict is not None and verdict.router_attacked:
        answers["R1"] = "warn"
    return answers
