"""The HTML page, put together from its sections. One file, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.reporting import experts, provenance, tables, training, verdict
from robustmoe.reporting.collect import RunView, of_kind
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import section
from robustmoe.reporting.style import css
from robustmoe.reporting.words import plural

MARK = '<meta name="generator" content="robustmoe">'
"""In every page, so that it is known again."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


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
        ("images", "Images", experts.image_section(views)),
        ("checks", "Checks", provenance.check_section(views)),
        ("made", "How it was made", provenance.made_section(views)),
    ]
    there = [(anchor, name, body) for anchor, name, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in there)
    title = " and ".join(view.name for view in views) if len(views) < 4 else f"{len(views)} runs"
    sections = "".join(f'<section id="{anchor}">{body}</section>' for anchor, _, body in there)
    foot = f"Made by robustmoe from {_files(views)}. The same numbers are in the .md and .json files beside this page."
    return document(f"{title} – robustness report", title, f"<nav>{links}</nav>", sections, foot, "Robustness report")


def document(name: str, heading: str, navigation: str, sections: str, foot: str, eyebrow: str = "robustmoe") -> str:
    """Returns a whole page in the report's style. ``name`` and ``heading`` are texts; the rest is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{MARK}"
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(name)}</title><style>{css()}</style></head><body>"
        f'<header class="top"><p class="eyebrow">{eyebrow}</p><h1>{escape(heading)}</h1>'
        f"{navigation}</header>"
        f"<main>{sections}</main>"
        f"<footer>{foot}</footer></body></html>\n"
    )


def _files(views: Sequence[RunView]) -> str:
    files = sum(len(view.results) for view in views)
    rows = sum(len(result.rows) for view in views for result in view.results)
    others = [(len(of_kind(views, kind.name)), kind.title) for kind in KINDS]
    made = [f"the rows of {plural(files, 'evaluation')} ({rows:,} rows)"] if files else []
    made += [f"{plural(number, 'file')} under {title}" for number, title in others if number]
    return escape(" and ".join(made))
