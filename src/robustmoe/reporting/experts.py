"""Who gets which class, clean and attacked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.analysis import Load, router_names
from robustmoe.reporting.boxes import run_part
from robustmoe.reporting.collect import RunView, numbered
from robustmoe.reporting.figures import heat
from robustmoe.reporting.words import plural

ROUTERS_SHOWN, MANY = 8, 10
"""Routers whose tables are shown; experts beyond which the two tables of one are not side by side."""


def load_section(views: Sequence[RunView]) -> str:
    """Returns heat maps of class by expert, under the strongest attack; "" for dense models."""
    body = ""
    for run, view in numbered(views):
        if view.loads:
            names = router_names([load.router for load in view.loads])
            title = f"<h3>{escape(view.name)}</h3>" if run is not None else ""
            part = title + "".join(_pair(names[load.router], load) for load in view.loads[:ROUTERS_SHOWN])
            more = len(view.loads) - ROUTERS_SHOWN
            part += f'<p class="note">{plural(more, "more router")} in the JSON.</p>' if more > 0 else ""
            body += run_part(run, part)
    if not body:
        return ""
    return (
        "<h2>Who handles what</h2>"
        '<p class="lead">Per cent of each class’s items that go to each expert (rows sum to 100), on clean images and '
        "under the strongest attack. Two alike tables mean that the attack leaves the routes alone; a column marked † "
        "belongs to an expert that gets nothing on clean images.</p>" + body
    )


def _pair(router: str, load: Load) -> str:
    kept = [at for at, images in enumerate(load.images) if images]
    names = [load.classes[at] for at in kept] + ["all classes"]
    clean = [load.clean[at] for at in kept] + [load.total_clean]
    attacked = [load.adversarial[at] for at in kept] + [load.total_adversarial]
    boxes = "".join(
        f'<div class="heatbox" tabindex="0">{heat(f"{router}, {words}", names, table, load.dead)}</div>'
        for words, table in (("clean", clean), ("attacked", attacked))
    )
    kind = "heats stacked" if len(load.total_clean) > MANY else "heats"
    return f'<div class="{kind}" style="margin-bottom:20px">{boxes}</div>'
