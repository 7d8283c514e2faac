"""Numbers as words: percentages, eps, times. Used by the page, the Markdown and the terminal alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from robustmoe.analysis import Rate
from robustmoe.records import ObjectiveInfo

NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}
GLOSSARY = (
    ("clean accuracy", "the share of untouched test images that the model gets right."),
    (
        "robust accuracy",
        "the share it gets right both untouched and after the attack changed the image as much as the threat allows.",
    ),
    (
        "worst case",
        "an image counts only if it survives every attack listed. This is the number to quote; a stronger attack may "
        "still lower it.",
    ),
    (
        "router’s part",
        "accuracy on the clean image when it is sent through the experts that the attacked image was sent to. If it "
        "falls, the attack gains by choosing the wrong experts.",
    ),
    (
        "experts’ part",
        "accuracy on the attacked image when it is sent through the experts of the clean image. If it falls, the "
        "experts themselves are fooled.",
    ),
    (
        "rerouted",
        "the share of an image’s items (the image, or its tokens) that the attack sent to another expert; below it, "
        "the share of images that were both rerouted and broken.",
    ),
    ("interval", "95 % Wilson score interval: how far the number could move with another draw of as many images."),
)


def percent(rate: Rate | float | None, digits: int = 1) -> str:
    """Returns "47.4%" from a rate or a share in [0, 1]; "–" for None or nan."""
    value = rate.value if isinstance(rate, Rate) else rate
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}%"


def interval(rate: Rate | None) -> str:
    """Returns "44.3–50.5" (per cent), Wilson; "" for None."""
    if rate is None:
        return ""
    low, high = rate.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def gap_text(gap: tuple[Rate, Rate]) -> str:
    """Returns what AutoAttack alone left and what knowing the router costs (:func:`robustmoe.analysis.routing_gap`), as
    one sentence."""
    alone, left = gap
    lost = Rate(alone.count - left.count, left.n)
    return (
        f"AutoAttack alone leaves {percent(alone)} ({interval(alone)}); with the attacks that know the router "
        f"{percent(left)} ({interval(left)}) are left: knowing the router costs {100 * lost.value:.1f} points "
        f"({count(lost.count)} of {plural(lost.n, 'image')})."
    )


def eps_text(norm: str, eps: float) -> str:
    """Returns the eps as users write it: a short decimal such as "0.1" where it is one; else, in the sup-norm, "8/255"
    where it is (a hundredth of) a whole number of grey levels."""
    levels = eps * 255
    whole = abs(levels - round(levels, 2)) < 1e-6
    if norm == "linf" and eps > 0 and whole and abs(float(f"{eps:.4g}") - eps) > 1e-9 * eps:
        return f"{round(levels, 2):g}/255"
    return f"{eps:g}"


def eps_axis(norm: str, radii: Iterable[float]) -> tuple[float, str]:
    """Returns what the eps of a figure are multiplied by, and the label of the axis: grey levels where users write one
    of them as "8/255"."""
    if any(eps_text(norm, eps).endswith("/255") for eps in radii):
        return 255.0, "eps, in grey levels of 255"
    return 1.0, f"eps, {NORM_NAMES.get(norm, norm)}"


def threat(norm: str, eps: float) -> str:
    """Returns "L∞ ≤ 8/255"."""
    return f"{NORM_NAMES.get(norm, norm)} ≤ {eps_text(norm, eps)}"


def duration(seconds: float) -> str:
    """Returns "1 h 02 min", "3 min 20 s" or "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int) -> str:
    """Returns a number such as "11,173,962"."""
    return f"{number:,}"


def plural(number: int, word: str) -> str:
    """Returns "1 image", "2 images"."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def route_text(route: dict[str, list[int]]) -> str:
    """Returns where an image went: "expert 1" for one item, "e0 ×12, e3 ×4" for several; several routers are named."""
    parts = []
    for name, counts in route.items():
        used = [(expert, items) for expert, items in enumerate(counts) if items]
        if all(items == 1 for _, items in used):
            text = "expert " + "+".join(str(expert) for expert, _ in used) if used else "–"
        else:
            text = ", ".join(f"e{expert} ×{items}" for expert, items in used)
        parts.append(f"{name}: {text}" if len(route) > 1 else text)
    return "; ".join(parts)


def number(value: Any) -> float | None:
    """Returns a finite float, or None for anything else (JSON's null, nan, a text)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def short(value: Any) -> str:
    """Returns :func:`plain`, or where to find it if that does not fit into a cell."""
    text = plain(value)
    return text if len(text) <= 24 else "see JSON"


def plain(value: Any) -> str:
    """Returns a setting or a check's value as one short text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def aim(objective: ObjectiveInfo) -> str:
    """Returns what an attack aims at, from what its objective declares."""
    if not objective.aims_at_all:
        return f"aims at the {'router' if objective.aims_at_router else 'experts'} only"
    return "made for routed models" if objective.needs_router else "aims at router and experts"
