"""Certificates: bounds of routed models over whole balls, and randomised smoothing."""

from __future__ import annotations

from collections.abc import Callable

from robustmoe import spec as specs
from robustmoe.certification.bounds import Ball, Bounded, Bounding
from robustmoe.certification.certify import ABSTAIN, Bounds, Certificate, Certifier
from robustmoe.certification.margins import Worst, router_bounds, worst_margins
from robustmoe.certification.routes import exact_margin, reachable_exactly, route_radius
from robustmoe.certification.smoothing import Smoothing, predict
from robustmoe.certification.theorem import SoftLipschitz, Theorem54

CERTIFIERS: dict[str, Callable[..., Certifier]] = {
    "bounds": Bounds,
    "smoothing": Smoothing,
    "soft_lipschitz": SoftLipschitz,
    "theorem_5_4": Theorem54,
}


def build_certifier(spec: str | Certifier) -> Certifier:
    """The certifier written as ``spec``: ``build_certifier("bounds(linf(2/255))")``."""
    certifier: Certifier = specs.build(spec, "certifier") if isinstance(spec, str) else spec
    return certifier


__all__ = [
    "ABSTAIN",
    "CERTIFIERS",
    "Ball",
    "Bounded",
    "Bounding",
    "Bounds",
    "Certificate",
    "Certifier",
    "Smoothing",
    "SoftLipschitz",
    "Theorem54",
    "Worst",
    "build_certifier",
    "exact_margin",
    "predict",
    "reachable_exactly",
    "route_radius",
    "router_bounds",
    "worst_margins",
]
