"""Can this number be believed? Each check gives pass, warn, fail or not run, a value, and a sentence (docs/checks.md).

A check is a function with the decorator `check`, which puts it into the table `CHECKS`: H, the harness (`harness`); G,
gradients and the attack's strength (`gradients`, `strength`, `published`); R, routing (`routing`, `routers`). The cheap
ones stand at every evaluation (`before` and `after` the attack). `deep` answers all on a few images, `check_run` for a
run folder.
"""

from __future__ import annotations

from robustmoe.evaluation.checks.fingerprints import fingerprint, identity, weights_hash
from robustmoe.evaluation.checks.published import label
from robustmoe.evaluation.checks.registry import CHECKS, Answer, check, ids, not_run
from robustmoe.evaluation.checks.run import after, before, check_run, deep
from robustmoe.evaluation.checks.subject import Finished, Subject

__all__ = [
    "CHECKS",
    "Answer",
    "Finished",
    "Subject",
    "after",
    "before",
    "check",
    "check_run",
    "deep",
    "fingerprint",
    "identity",
    "ids",
    "label",
    "not_run",
    "weights_hash",
]
