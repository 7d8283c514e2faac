"""Images before and after an attack, with the change made visible and the experts that their patches went to."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from robustmoe.records import Example
from robustmoe.reporting import routes
from robustmoe.reporting.boxes import run_part
from robustmoe.reporting.collect import RunView, numbered
from robustmoe.reporting.kept import AtRadius, Kept
from robustmoe.reporting.words import eps_text, plural

EXAMPLES_SHOWN = 12
RADII_SHOWN = 8
FINE = 8  # patches side by side, beyond which their pictures are larger
MOST_PIXELS = 2**24
SIDE, SMALLER_SIDE = 96, 64  # pixels: larger images are shown smaller, so that the page stays small


@dataclass(frozen=True)
class Shot:
    """One image: ``before``, and what each radius made of it, by its place among the radii."""

    example: Example
    before: np.ndarray
    after: dict[int, tuple[AtRadius, np.ndarray]]


def image_section(views: Sequence[RunView]) -> str:
    """Shows before, after and the difference made visible, and where routes moved; "" without examples."""
    body = "".join(run_part(run, _of_run(view, run)) for run, view in numbered(views))
    if not body:
        return ""
    return (
        '<h2>What the attack does to an image</h2><p class="lead">The eye hardly sees the change; beside '
        "it, the same change is amplified. Where a model routes patches, each is drawn in the colour and with the "
        "number of its expert, and outlined where the attack sends it to another.</p>" + body
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


def _png(array: np.ndarray, side: int) -> str:
    image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _of_run(view: RunView, run: int | None) -> str:
    kept = view.kept
    if kept is None:
        return ""
    radii = sorted(sorted(kept.at, key=lambda eps: eps != kept.header.eps)[:RADII_SHOWN])
    shown = kept.examples[:EXAMPLES_SHOWN]
    shots = [shot for example in shown if (shot := _shot(kept, example, radii)) is not None]
    damaged = len(shown) - len(shots)
    strip = _Strip(view, kept, radii, shots, f"{run or 0}")
    words = f"Under {escape(kept.header.attack or 'no attack')}. Difference × {strip.factor}, grey is no change."
    words += f" {plural(damaged, 'damaged example')} left out." if damaged else ""
    title = f"<h3>{escape(view.name)}</h3>" if run is not None else ""
    return f'{title}<p class="note">{words}{strip.note}</p>{strip.html()}'


def _shot(kept: Kept, example: Example, radii: Sequence[float]) -> Shot | None:
    """Returns an image's pictures; None where one of them is none, or of another size."""
    before = decode(example.before)
    after = {
        place: (kept.at[eps][example.index], decode(kept.at[eps][example.index].example.after))
        for place, eps in enumerate(radii)
        if example.index in kept.at[eps]
    }
    good = {place: (made, array) for place, (made, array) in after.items() if array is not None}
    if before is None or len(good) < len(after) or any(array.shape != before.shape for _, array in good.values()):
        return None
    return Shot(example, before, good)


class _Strip:
    """The images of one run."""

    def __init__(self, view: RunView, kept: Kept, radii: Sequence[float], shots: Sequence[Shot], run: str) -> None:
        self.view, self.kept, self.radii, self.shots, self.run = view, kept, radii, shots, run
        changes = [np.abs(array - shot.before).max() for shot in shots for _, array in shot.after.values()]
        self.factor = max(1, 120 // max(int(max(changes, default=0)), 1))
        self.side = SIDE if len(radii) == 1 else SMALLER_SIDE
        self.drawn, self.every = 0, True
        if shots:
            self.drawn, self.every = routes.shown_in_full(kept.header, shots[0].example, len(radii), len(shots))

    @property
    def note(self) -> str:
        """Returns what of the routes is not drawn."""
        left = f" Routes are drawn of the first {self.drawn} images." if 0 < self.drawn < len(self.shots) else ""
        return left if self.every else f"{left} They are drawn at the attack’s own radius alone."

    def html(self) -> str:
        """Returns the dial over the radii and an article an image."""
        key = routes.key(self.kept.header, names) if (names := self._names()) else ""
        articles = "".join(self._article(place, shot) for place, shot in enumerate(self.shots))
        kind = "routed" if names else "three-wide" if len(self.shots) % 3 == 0 else "two-wide"
        return f'<div class="kept">{self._dial()}{key}<div class="strip {kind}">{articles}</div></div>'

    def _names(self) -> list[str]:
        return routes.of_tokens(self.kept.header, self.shots[0].example) if self.drawn else []

    def _dial(self) -> str:
        """Returns one radio button a radius, drawn as the stops of a slider."""
        if len(self.radii) == 1:
            return ""
        own = self.kept.header.eps
        stops = "".join(
            f'<input type="radio" name="eps-{self.run}" id="eps-{self.run}-{place}"{" checked" if eps == own else ""}/>'
            f'<label for="eps-{self.run}-{place}">{escape(eps_text(self.kept.header.norm, eps))}</label>'
            for place, eps in enumerate(self.radii)
        )
        return (
            f'<fieldset class="dial"><legend>Move eps of the attack</legend><div class="stops">{stops}</div></fieldset>'
        )

    def _at(self, shot: Shot, kind: str, make: Callable[[int, AtRadius, np.ndarray], str], empty: str = "") -> str:
        """Returns what is shown at each radius, all but the chosen one hidden by the style sheet."""
        if len(self.radii) == 1:
            return f'<div class="{kind}">{make(0, *shot.after[0])}</div>'
        return "".join(
            f'<div class="{kind} at at-{place}{" own" if eps == self.kept.header.eps else ""}">'
            f"{make(place, *shot.after[place]) if place in shot.after else empty}</div>"
            for place, eps in enumerate(self.radii)
        )

    def _name(self, label: int) -> str:
        classes = self.view.header.classes
        return classes[label] if 0 <= label < len(classes) else str(label)

    def _article(self, place: int, shot: Shot) -> str:
        example = shot.example
        drawn = place < self.drawn
        name = escape(f"image {example.index}, a {self._name(example.label)}, before the attack")
        before = f'<div><span>before</span><img alt="{name}" src="{_png(shot.before, self.side)}"></div>'
        gone = "<span>not attacked at this eps</span>"
        after = self._at(shot, "after", lambda at, made, array: self._after(made, array), gone)
        change = self._at(shot, "change", lambda at, made, array: self._change(shot.before, array))
        said = self._at(shot, "said", lambda at, made, array: self._said(at, made))
        pictures = self._routes(shot, place) if drawn else ""
        return (
            f'<article class="shot"><div class="three">{before}{after}{change}</div><div class="about">{said}</div>'
            f"{pictures}</article>"
        )

    def _after(self, made: AtRadius, array: np.ndarray) -> str:
        alt = escape(f"the same image after the attack, seen as {self._name(made.example.adversarial)}")
        return f'<span>after</span><img alt="{alt}" src="{_png(array, self.side)}">'

    def _change(self, before: np.ndarray, array: np.ndarray) -> str:
        source = _png(128 + self.factor * (array - before), self.side)
        return f'<span>change × {self.factor}</span><img alt="the change, amplified" src="{source}">'

    def _said(self, place: int, made: AtRadius) -> str:
        """Returns what the model said before and after, and through which experts."""
        example, norm = made.example, self.kept.header.norm
        fooled = example.adversarial != example.label
        seen = f'<span class="{"now" if fooled else "was"}">{escape(self._name(example.adversarial))}</span>'
        right = example.clean == example.label
        clean = f'<span class="{"was" if right else "now"}">{escape(self._name(example.clean))}</span>'
        eps = self.radii[place]
        at = f'<span class="route">eps {escape(eps_text(norm, eps))}' if len(self.radii) > 1 else ""
        if made.eps != eps:
            at += f": as at {escape(eps_text(norm, made.eps))}, where it was broken"
        at += "</span>" if at else ""
        route = routes.hops(self.kept.header, example) if example.route_clean else ""
        true = f'<span class="soft">(true: {escape(self._name(example.label))})</span>'
        return f"<p>{clean} → {seen} {true}</p>{at}{route}"

    def _routes(self, shot: Shot, place: int) -> str:
        """Returns the pictures of the routes, and the images that stand below the patches."""
        start = f"image-{self.run}-{place}"
        own = self.radii.index(self.kept.header.eps)
        chosen = {at: pair for at, pair in shot.after.items() if self.every or at == own}
        under = {f"{start}-before": _png(shot.before, self.side)}
        under |= {f"{start}-{at}": _png(array, self.side) for at, (_, array) in chosen.items()}

        def make(at: int, made: AtRadius, array: np.ndarray) -> str:
            if at not in chosen:
                return ""
            ids = (f"{start}-before", f"{start}-{at}")
            return routes.pictures(self.kept.header, made.example, array.shape[:2], ids)

        fine = routes.columns(self.kept.header, shot.example, shot.before.shape[:2]) > FINE
        return routes.image_definitions(under) + self._at(shot, "routes fine" if fine else "routes", make)
