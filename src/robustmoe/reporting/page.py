"""The HTML page, put together from its sections. One file, nothing loaded from anywhere; its script adds to what is
readable without it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from robustmoe.reporting import experts, images, provenance, tables, training, verdict
from robustmoe.reporting.collect import RunView, heading, of_kind
from robustmoe.reporting.figures import colour
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import section
from robustmoe.reporting.style import css
from robustmoe.reporting.words import plural

MARK = '<meta name="generator" content="robustmoe">'
"""In every page, so that it is known again."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"


def script() -> str:
    """Returns the page's script."""
    return Path(__file__).with_name("report.js").read_text("utf-8")


def page(views: Sequence[RunView]) -> str:
    """Returns the whole page as text."""
    parts = [
        ("verdict", "Verdict", verdict.section(views)),
        ("attacks", "Attacks", tables.section(views)),
        ("eps", "Accuracy against eps", training.eps_section(views)),
        *((kind.name, kind.link or kind.title, section(kind, of_kind(views, kind.name))) for kind in KINDS),
        ("training", "Training", training.section(views)),
        ("routers", "Router health", training.health_section(views)),
        ("experts", "Experts", experts.load_section(views)),
        ("images", "Images", images.image_section(views)),
        ("checks", "Checks", provenance.check_section(views)),
        ("made", "How it was made", provenance.made_section(views)),
    ]
    there = [(anchor, name, body) for anchor, name, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in there)
    title = heading(views)
    sections = "".join(f'<section id="{anchor}">{body}</section>' for anchor, _, body in there)
    foot = f"Made by robustmoe from {_files(views)}. The same numbers are in the .md and .json files beside this page."
    navigation = f'<nav aria-label="Sections">{links}</nav>'
    name = f"{title} – robustness report"
    return document(name, title, navigation, _chooser(views) + sections, foot, "Robustness report")


def _chooser(views: Sequence[RunView]) -> str:
    """Returns a box a run to tick, and the rules by which its parts go where it is not; "" for the only run."""
    if len(views) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{at}" checked> <i class="dotkey b{colour(at)}"></i>'
        f"{escape(view.name)}</label>"
        for at, view in enumerate(views)
    )
    rules = "".join(
        f"body:has(#show-{at}:not(:checked)) .run-{at}{{display:none!important}}" for at in range(len(views))
    )
    return f'<style>{rules}</style><fieldset class="chooser"><legend>Runs</legend>{boxes}</fieldset>'


def document(name: str, heading: str, navigation: str, sections: str, foot: str, eyebrow: str = "robustmoe") -> str:
    """Returns a whole page in the report's style. ``name`` and ``heading`` are texts; the rest is HTML."""
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{MARK}"
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY.format(digest))}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(name)}</title><style>{css()}</style></head><body>"
        f'<header class="top"><p class="eyebrow">{eyebrow}</p><h1>{escape(heading)}</h1>'
        f"{navigation}</header>"
        f"<main>{sections}</main><footer>{foot}</footer><script>{code}</script></body></html>\n"
    )


def _files(views: Sequence[RunView]) -> str:
    files = sum(len(view.results) for view in views)
    rows = sum(len(result.rows) for view in views for result in view.results)
    others = [(len(of_kind(views, kind.name)), kind.title) for kind in KINDS]
    made = [f"the rows of {plural(files, 'evaluation')} ({rows:,} rows)"] if files else []
    made += [f"{plural(number, 'file')} under {title}" for number, title in others if number]
    return escape(" and ".join(made))
