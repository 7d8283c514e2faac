"""Where the route of one image moved: patches coloured and numbered by their expert, clean beside attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from robustmoe.analysis import router_names
from robustmoe.records import Example, Header
from robustmoe.reporting.figures import COLOURS, Key, colour, legend
from robustmoe.reporting.words import plural, route_text

ROUTERS_DRAWN = 12
CELLS = 16_000
"""Patches drawn in one run's pictures, at most: they take half a megabyte, or one where experts have two digits."""

Items = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Patches:
    """How the items of an image lie on it: ``prefix`` class tokens, then ``rows`` times ``columns``, row by row."""

    prefix: int
    rows: int
    columns: int


def patches(items: int, height: int, width: int) -> Patches | None:
    """Returns how so many items cut an image of that size into squares, with a class token before them or without;
    None where they do not."""
    for prefix in (0, 1):
        rows = math.isqrt(max(items - prefix, 0) * height // width)
        if rows and rows * rows * width == (items - prefix) * height:
            return Patches(prefix, rows, (items - prefix) // rows)
    return None


def of_tokens(header: Header, example: Example) -> list[str]:
    """Returns the routers whose choice of experts was kept item by item, of several items an image."""
    return [name for name in example.experts_clean if header.routers[name].items > 1][:ROUTERS_DRAWN]


def columns(header: Header, example: Example, shape: tuple[int, int]) -> int:
    """Returns how many patches stand side by side at most."""
    lies = [patches(header.routers[name].items, *shape) for name in of_tokens(header, example)]
    return max((lie.columns for lie in lies if lie is not None), default=0)


def moved(clean: Items, attacked: Items) -> list[int]:
    """Returns the places of the items that go to other experts than before."""
    return [at for at, (was, now) in enumerate(zip(clean, attacked, strict=True)) if set(was) != set(now)]


def hops(header: Header, example: Example) -> str:
    """Returns, for each router that no picture shows, where the image went before and after."""
    names = router_names(list(header.routers))
    drawn = of_tokens(header, example)
    left = [name for name in example.route_clean if name not in drawn]
    rows = [
        (
            names[name],
            route_text({name: example.route_clean[name]}),
            route_text({name: example.route_adversarial[name]}),
        )
        for name in left
    ]
    if len(rows) < 2 or all(was == now for _, was, now in rows):
        said = [f"{was} → {now}" if was != now else f"{was}, unchanged" for _, was, now in rows[:1]]
        if len(rows) > 1:
            said = ["every router sends it where it was"]
        return "".join(f'<span class="route">{escape(text)}</span>' for text in said)
    items = "".join(
        f'<li class="{"same" if was == now else "moved"}"><span>{escape(name)}</span> '
        f"{escape(was if was == now else f'{was} → {now}')}</li>"
        for name, was, now in rows
    )
    gone = sum(was != now for _, was, now in rows)
    return f'<span class="route">{gone} of {plural(len(rows), "router")} moved:</span><ul class="hops">{items}</ul>'


def key(header: Header, names: Sequence[str]) -> str:
    """Returns the legend of the pictures of these routers."""
    experts = max(header.routers[name].experts for name in names)
    entries = [Key(f"expert {at}", colour(at)) for at in range(min(experts, COLOURS))]
    more = f"Colours repeat every {COLOURS} experts; the numbers tell them apart." if experts > COLOURS else ""
    return legend(entries) + (f'<p class="note">{more}</p>' if more else "")


def pictures(header: Header, example: Example, shape: tuple[int, int], ids: tuple[str, str]) -> str:
    """Returns a pair of pictures a router. ``shape``: height and width of the image; ``ids``: of the clean and the
    attacked image on the page, which stand below the patches."""
    names = router_names(list(header.routers))
    return "".join(
        _pair(names[name], example.experts_clean[name], example.experts_adversarial[name], shape, ids)
        for name in of_tokens(header, example)
    )


def _pair(name: str, clean: Items, attacked: Items, shape: tuple[int, int], ids: tuple[str, str]) -> str:
    gone = moved(clean, attacked)
    said = f"{len(gone)} of {plural(len(clean), 'item')} moved" if gone else "nothing moved"
    lie = patches(len(clean), *shape)
    drawn = ""
    if lie is not None:
        drawn = "".join(
            _picture((name, side), items, gone, lie, id)
            for side, items, id in (("clean", clean, ids[0]), ("attacked", attacked, ids[1]))
        )
        drawn = f'<div class="pair">{drawn}</div>'
    return f'<div class="layer-route"><p class="routed"><b>{escape(name)}</b> {said}</p>{drawn}</div>'


def _picture(title: tuple[str, str], items: Items, gone: Sequence[int], lie: Patches, image: str) -> str:
    """Draws one image's patches, each in the colour of its best expert; those that moved are outlined."""
    places = [(-1.5, 0.0)] * lie.prefix + [
        (float(row), float(column)) for row in range(lie.rows) for column in range(lie.columns)
    ]
    cells: dict[str, str] = {}
    for item, (row, column) in zip(items, places, strict=True):
        kind = f"f{colour(item[0])}" if item else "nowhere"
        cells[kind] = cells.get(kind, "") + f"M{column:g} {row:g}h1v1h-1z"
    body = "".join(f'<path class="cell {kind}" d="{path}"/>' for kind, path in cells.items())
    inset = "".join(f"M{places[at][1] + 0.07:g} {places[at][0] + 0.07:g}h.86v.86h-.86z" for at in gone)
    body += f'<path class="gone under" d="{inset}"/><path class="gone" d="{inset}"/>' if gone else ""
    body += _labels(items, places)
    body += '<text class="said" x="1.25" y="-1">class token</text>' if lie.prefix else ""
    top = -1.5 if lie.prefix else 0.0
    side = title[1]
    alt = f"{', '.join(title)}: {_shares(items)}; {len(gone) or 'nothing'} moved"
    data = f'data-side="{side}" data-lie="{lie.prefix} {lie.columns}"'
    data += f' data-experts="{" ".join(map(_label, items))}"'
    return (
        f'<figure class="bare"><figcaption>{side}</figcaption>'
        f'<svg class="patches" viewBox="-.1 {top - 0.1:g} {lie.columns + 0.2:g} {lie.rows - top + 0.2:g}" role="img" '
        f'aria-label="{escape(alt)}" {data}><use href="#{image}" '
        f'transform="scale({lie.columns} {lie.rows})"/>{body}</svg></figure>'
    )


def _label(item: Sequence[int]) -> str:
    return "+".join(map(str, sorted(item))) or "–"


def _short(item: Sequence[int]) -> str:
    """Returns what fits on a patch: every expert, or the best one and a plus."""
    return _label(item) if len(_label(item)) <= 3 else f"{item[0]}+"


def _labels(items: Items, places: Sequence[tuple[float, float]]) -> str:
    """Returns the numbers of the experts: those of one digit row by row, so that the page stays small."""
    lines: dict[float, list[tuple[float, str]]] = {}
    drawn = ""
    for item, (row, column) in zip(items, places, strict=True):
        label = _short(item)
        if len(label) == 1:
            lines.setdefault(row, []).append((column, label))
        else:
            kind = ' class="long"' if len(label) > 2 else ""
            drawn += f'<text{kind} x="{column + 0.5:g}" y="{row + 0.5:g}">{label}</text>'
    for row, line in lines.items():
        x = " ".join(f"{column + 0.5:g}" for column, _ in line)
        drawn += f'<text x="{x}" y="{row + 0.5:g}">{"".join(label for _, label in line)}</text>'
    return drawn


def _shares(items: Items) -> str:
    counts: dict[int, int] = {}
    for item in items:
        for expert in item:
            counts[expert] = counts.get(expert, 0) + 1
    return ", ".join(f"{plural(counts[expert], 'item')} to expert {expert}" for expert in sorted(counts))


def shown_in_full(header: Header, example: Example, radii: int, images: int) -> tuple[int, bool]:
    """Returns of how many of so many images the routes are drawn, and whether at every radius or at the attack's own
    alone, so that the page stays small."""
    cells = sum(len(example.experts_clean[name]) for name in of_tokens(header, example))
    if not cells:
        return 0, True
    every = 2 * cells * radii <= CELLS
    each = 2 * cells * (radii if every else 1)
    return max(1, min(images, CELLS // each)), every


def image_definitions(pictures: Mapping[str, str]) -> str:
    """Returns images by their ids, drawn nowhere themselves, one unit high and wide."""
    inside = "".join(
        f'<image id="{id}" width="1" height="1" preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="{data}"/>'
        for id, data in pictures.items()
    )
    return f'<svg class="definitions" aria-hidden="true"><defs>{inside}</defs></svg>'
