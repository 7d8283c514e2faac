"""Evaluation: attack a data set, write one row an image, and check whether the number can be believed."""

from __future__ import annotations

from robustmoe.evaluation.auditing import audit
from robustmoe.evaluation.blending import blend, blend_run
from robustmoe.evaluation.certifying import certify, certify_run
from robustmoe.evaluation.dissection import dissect, dissect_run
from robustmoe.evaluation.lipschitz import lipschitz_run, measure_lipschitz
from robustmoe.evaluation.measuring import evaluate, evaluate_run
from robustmoe.evaluation.sweeping import sweep, sweep_run

__all__ = [
    "audit",
    "blend",
    "blend_run",
    "certify",
    "certify_run",
    "dissect",
    "dissect_run",
    "evaluate",
    "evaluate_run",
    "lipschitz_run",
    "measure_lipschitz",
    "sweep",
    "sweep_run",
]
