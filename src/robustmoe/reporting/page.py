"""The HTML page, put together from its sections. One file, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.reporting import (
    blend,
    certificates,
    dissection,
    experts,
    lipschitz,
    provenance,
    sweep,
    tables,
    training,
    verdict,
)
from robustmoe.reporting.collect import View
from robustmoe.reporting.style import css
from robustmoe.reporting.words import plural

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(views: Sequence[View]) -> str:
    """The whole page as text."""
    parts = [
        ("verdict", "Verdict", verdict.section(views)),
        ("attacks", "Attacks", tables.section(views)),
        ("eps", "Accuracy against eps", training.eps_section(views)),
        ("certificates", "Certificates", certificates.section(views)),
        ("sweep", "Sweep", sweep.section(views)),
        ("blend", "Over alpha", blend.section(views)),
        ("training", "Training", training.section(views)),
        ("routers", "Router health", training.health_section(views)),
        ("experts", "Experts", experts.load_section(views)),
        ("dissection", "Dissection", dissection.section(views)),
        ("lipschitz", "Lipschitz", lipschitz.section(views)),
        ("images", "Images", experts.image_section(views)),
        ("checks", "Checks", provenance.check_section(views)),
        ("made", "How it was made", provenance.made_section(views)),
    ]
    there = [(anchor, name, body) for anchor, name, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in there)
    title = " and ".join(view.name for view in views) if len(views) < 4 else f"{len(views)} runs"
    sections = "".join(f'<section id="{anchor}">{body}</section>' for anchor, _, body in there)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} – robustness report</title><style>{css()}</style></head><body>"
        f'<header class="top"><p class="eyebrow">Robustness report</p><h1>{escape(title)}</h1>'
        f"<nav>{links}</nav></header>"
        f"<main>{sections}</main>"
        f"<footer>Made by robustmoe from {_files(views)}. "
        "The same numbers are in the .md and .json files beside this page.</footer></body></html>\n"
    )


def _files(views: Sequence[View]) -> str:
    files = sum(len(view.results) for view in views)
    rows = sum(len(result.rows) for view in views for result in view.results)
    others = (
        (sum(view.dissected is not None for view in views), "dissection"),
        (sum(view.blended is not None for view in views), "curve"),
        (sum(view.swept is not None for view in views), "sweep"),
        (sum(view.measured is not None for view in views), "Lipschitz file"),
        (sum(len(view.certified) for view in views), "file of certificates"),
    )
    made = [f"the rows of {plural(files, 'evaluation')} ({rows:,} rows)"] if files else []
    return escape(" and ".join(made + [plural(number, word) for number, word in others if number]))
