"""Who gets which class, clean and attacked; and a strip of images before and after."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from robustmoe.analysis import Load
from robustmoe.records import Example
from robustmoe.reporting.collect import RunView
from robustmoe.reporting.figures import heat
from robustmoe.reporting.words import plural, route_text

ROUTERS_SHOWN = 8
EXAMPLES_SHOWN = 12
MOST_PIXELS = 2**24
SIDE = 96  # pixels: larger images are shown smaller, so that the page stays small


def load_section(views: Sequence[RunView]) -> str:
    """Returns heat maps of class by expert, under the strongest attack; "" for dense models."""
    body = ""
    for view in views:
        if view.loads:
            title = f"<h3>{escape(view.name)}</h3>" if len(views) > 1 else ""
            body += title + "".join(_pair(load) for load in view.loads[:ROUTERS_SHOWN])
            more = len(view.loads) - ROUTERS_SHOWN
            body += f'<p class="note">{plural(more, "more router")} in the JSON.</p>' if more > 0 else ""
    if not body:
        return ""
    return (
        "<h2>Who handles what</h2>"
        '<p class="lead">Per cent of each class’s items that go to each expert (rows sum to 100), on clean images and '
        "under the strongest attack. Two alike tables mean that the attack leaves the routes alone; a column marked † "
        "belongs to an expert that gets nothing on clean images.</p>" + body
    )


def _pair(load: Load) -> str:
    kept = [at for at, images in enumerate(load.images) if images]
    names = [load.classes[at] for at in kept] + ["all classes"]
    clean = [load.clean[at] for at in kept] + [load.total_clean]
    attacked = [load.adversarial[at] for at in kept] + [load.total_adversarial]
    boxes = "".join(
        f'<div class="heatbox" tabindex="0">{heat(f"{load.router}, {words}", names, table, load.dead)}</div>'
        for words, table in (("clean", clean), ("attacked", attacked))
    )
    return f'<div class="heats" style="margin-bottom:20px">{boxes}</div>'


# Images ----------------------------------------------------------------------------------------------------------


def image_section(views: Sequence[RunView]) -> str:
    """Shows before, after and the difference made visible; "" without examples."""
    body = ""
    for view in views:
        strip, factor, damaged = _strip(view)
        if strip or damaged:
            title = f"<h3>{escape(view.name)}</h3>" if len(views) > 1 else ""
            words = f"Difference × {factor}, grey is no change."
            words += f" {plural(damaged, 'damaged example')} left out." if damaged else ""
            body += f'{title}<p class="note">{words}</p><div class="strip">{strip}</div>'
    if not body:
        return ""
    return (
        '<h2>What the attack does to an image</h2><p class="lead">The eye hardly sees the change; beside '
        f"it, the same change is amplified.</p>{body}"
    )


def decode(text: str) -> np.ndarray | None:
    """Returns a base64 PNG as an array of grey levels, ``(h, w, 3)`` of int16; None if it is not a picture, or one that
    says it is larger than any that a model is attacked on.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height <= MOST_PIXELS:
                return np.asarray(image.convert("RGB")).astype(np.int16)
    except Exception:  # a damaged picture can raise anything; the page says that it is left out
        pass
    return None


def _png(array: np.ndarray) -> str:
    image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _strip(view: RunView) -> tuple[str, int, int]:
    """The pictures, by how much their change is amplified, how many examples are no pictures."""
    shown = view.examples[:EXAMPLES_SHOWN]
    shots: list[tuple[Example, np.ndarray, np.ndarray]] = []
    for example in shown:
        before, after = decode(example.before), decode(example.after)
        if before is not None and after is not None and before.shape == after.shape:
            shots.append((example, before, after))
    largest = max((int(np.abs(after - before).max()) for _, before, after in shots), default=0)
    factor = max(1, 120 // max(largest, 1))
    return "".join(_shot(view, *shot, factor) for shot in shots), factor, len(shown) - len(shots)


def _shot(view: RunView, example: Example, before: np.ndarray, after: np.ndarray, factor: int) -> str:
    classes = view.header.classes

    def name(label: int) -> str:
        return classes[label] if 0 <= label < len(classes) else str(label)

    pictures = "".join(
        f'<div><span>{words}</span><img alt="{escape(alt)}" src="{_png(array)}"></div>'
        for words, array, alt in (
            ("before", before, f"image {example.index}, a {name(example.label)}, before the attack"),
            ("after", after, f"the same image after the attack, seen as {name(example.adversarial)}"),
            (f"change × {factor}", 128 + factor * (after - before), "the change, amplified"),
        )
    )
    fooled = example.adversarial != example.label
    seen = f'<span class="{"now" if fooled else "was"}">{escape(name(example.adversarial))}</span>'
    clean = f'<span class="{"was" if example.clean == example.label else "now"}">{escape(name(example.clean))}</span>'
    route = ""
    if example.route_clean:
        was, now = route_text(example.route_clean), route_text(example.route_adversarial)
        words = f"{was} → {now}" if was != now else f"{was}, unchanged"
        route = f'<br><span style="color:var(--soft)">{escape(words)}</span>'
    return (
        f'<article class="shot"><div class="three">{pictures}</div>'
        f'<p>{clean} → {seen} <span style="color:var(--soft)">(true: {escape(name(example.label))})</span>{route}</p>'
        "</article>"
    )
