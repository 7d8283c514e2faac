"""Rows to small tables of numbers. Pure: nothing is read, nothing is written, nothing is drawn.

An image counts as robust when the exact model is right on the clean image and on the attacked one. The headline is
the worst case: an image survives only if it survives every attack of the same threat. Rates are in [0, 1].
"""

from robustmoe.analysis.blend import AlphaPoint, BlendSummary, alpha_change, blend_summary
from robustmoe.analysis.certificates import (
    OBSTACLES,
    Against,
    CertificatesSummary,
    Refuted,
    certificates_summary,
    refuted,
)
from robustmoe.analysis.conflicts import other_labels, warnings
from robustmoe.analysis.curves import MONOTONE_TOLERANCE, Curve, eps_curve, family
from robustmoe.analysis.dissection import (
    DissectionSummary,
    ExpertPart,
    RouterPart,
    dissection_summary,
    route_iou,
    weaker_part,
)
from robustmoe.analysis.evaluation import EvaluationSummary, evaluation_summary
from robustmoe.analysis.labels import attack_name, names, router_names
from robustmoe.analysis.lipschitz import LayerPart, LipschitzSummary, Middle, lipschitz_summary
from robustmoe.analysis.load import Load, load_by_class
from robustmoe.analysis.paired import Paired, Spread, paired, paired_bootstrap, welch
from robustmoe.analysis.parts import AUTOATTACK_PARTS, Part, by_part, routing_gap
from robustmoe.analysis.rates import BALL_TOLERANCE, Rate, ball_limit, inside, largest, right, robust, wilson
from robustmoe.analysis.sweep import Spare, SweepCurve, SweepPoint, SweepSummary, sweep_summary
from robustmoe.analysis.verdict import Verdict, judge, worst_answers
from robustmoe.analysis.worst import (
    SAME_IMAGES,
    SAME_THREAT,
    Adds,
    ImagesLeft,
    WorstCase,
    groups,
    worst_case,
    worst_images,
)

__all__ = [
    "AUTOATTACK_PARTS",
    "BALL_TOLERANCE",
    "MONOTONE_TOLERANCE",
    "OBSTACLES",
    "SAME_IMAGES",
    "SAME_THREAT",
    "Adds",
    "Against",
    "AlphaPoint",
    "BlendSummary",
    "CertificatesSummary",
    "Curve",
    "DissectionSummary",
    "EvaluationSummary",
    "ExpertPart",
    "ImagesLeft",
    "LayerPart",
    "LipschitzSummary",
    "Load",
    "Middle",
    "Paired",
    "Part",
    "Rate",
    "Refuted",
    "RouterPart",
    "Spare",
    "Spread",
    "SweepCurve",
    "SweepPoint",
    "SweepSummary",
    "Verdict",
    "WorstCase",
    "alpha_change",
    "attack_name",
    "ball_limit",
    "blend_summary",
    "by_part",
    "certificates_summary",
    "dissection_summary",
    "eps_curve",
    "evaluation_summary",
    "family",
    "groups",
    "inside",
    "judge",
    "largest",
    "lipschitz_summary",
    "load_by_class",
    "names",
    "other_labels",
    "paired",
    "paired_bootstrap",
    "refuted",
    "right",
    "robust",
    "route_iou",
    "router_names",
    "routing_gap",
    "sweep_summary",
    "warnings",
    "weaker_part",
    "welch",
    "wilson",
    "worst_answers",
    "worst_case",
    "worst_images",
]
