"""The figures of a page, each as an SVG that needs no page: colours and fonts of its own, title, legend and note drawn,
the alternative text kept.

They are read from the page itself, so a figure that a section gains is there without another line here."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree.ElementTree import Element, SubElement, TreeBuilder, tostring

from robustmoe.reporting.style import css

FONT = "'Liberation Sans', Arial, Helvetica, 'DejaVu Sans', sans-serif"
MARGIN, BIG, TEXT, SMALL = 14.0, 14.0, 12.0, 11.0  # units of the drawing; the last three are sizes of letters
WIDE = 0.54  # of a letter, of its size, in the middle
CELL, NAMES, SHOT = (38.0, 24.0), 160.0, 84.0  # a heat map's cell and its widest row name; the side of a picture
VOID = ("meta", "link", "img", "br", "input", "hr")
DRAWN = (
    "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap",
    "opacity", "font-size", "font-weight", "text-anchor",
)  # fmt: skip
"""Properties of the page's style sheet that a drawing has as attributes."""


@dataclass(frozen=True)
class Drawing:
    """A figure: a name for its file, a title, what is seen in words, and the drawing."""

    name: str
    title: str
    alt: str
    svg: str


def drawings(page: str, runs: Sequence[str]) -> list[Drawing]:
    """Returns every figure of a report's page, in its order. ``runs``: the names of its runs."""
    made: list[Drawing] = []
    names: set[str] = set()
    tree = parsed(page)
    pictures = {picture.get("id", ""): picture for picture in tree.iter("image")}
    for section in tree.iter("section"):
        run = runs[0] if len(runs) == 1 else ""
        for element in section.iter():
            text = words(element)
            if element.tag in ("h2", "h3") and any(text == name or text.startswith(f"{name}: ") for name in runs):
                run = text
            canvas = _drawn(element, section, run, pictures)
            if canvas is not None:
                title = canvas.title if not run or canvas.title.startswith(run) else f"{run}: {canvas.title}"
                name = _name(section.get("id", ""), title, names)
                made.append(Drawing(name, title, canvas.alt, canvas.text(title)))
    return made


def _drawn(element: Element, section: Element, run: str, pictures: Mapping[str, Element]) -> _Canvas | None:
    kinds = element.get("class", "").split()
    if element.tag == "figure" and "bare" not in kinds and element.find(".//svg") is not None:
        return _figure(element)
    if element.tag == "table" and "heat" in kinds:
        return _heat(element)
    if element.tag == "div" and "strip" in kinds:
        return _strip(element)
    if element.tag == "article" and element.find(".//svg[@class='patches']") is not None:
        return _routes(element, pictures)
    if element.tag == "div" and "cards" in kinds and section.get("id") == "verdict":
        return _verdict(element, run)
    return None


def _name(section: str, title: str, taken: set[str]) -> str:
    text = f"{section} {title}".lower().replace("∞", "inf").replace("%", "percent")
    stem = re.sub(r"\W+", "-", text).strip("-")[:100]
    name = next(name for n in range(1, 10_000) if (name := stem if n == 1 else f"{stem}-{n}") not in taken)
    taken.add(name)
    return name


# Reading the page ------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.builder = TreeBuilder()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self.builder.end(tag)
        if tag == "br":
            self.builder.data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        self.builder.end(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.builder.end(tag)
        if tag in ("p", "div"):
            self.builder.data(" ")

    def handle_data(self, data: str) -> None:
        self.builder.data(data)


def parsed(page: str) -> Element:
    """Returns a page of ours as a tree."""
    reader = _Reader()
    reader.feed(page[page.index("<html") :])
    reader.close()
    return reader.builder.close()


def words(element: Element | None) -> str:
    """Returns the text of an element, on one line."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def _styles() -> tuple[dict[str, str], list[tuple[frozenset[str], dict[str, str]]]]:
    """Returns the variables of the light page, and the style of each set of classes, in their order."""
    sheet = re.sub(r"/\*.*?\*/", "", css(), flags=re.S)
    sheet = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", sheet)
    rules = [(names, _declared(body)) for names, body in re.findall(r"([^{}]+)\{([^{}]*)\}", sheet)]
    variables = next(style for names, style in rules if names.strip() == ":root")
    styles = [
        (frozenset(re.findall(r"[\w-]+", name)), style)
        for names, style in rules
        for name in (names.split()[-1] for names in names.split(","))
        if re.fullmatch(r"(\.[\w-]+)+", name)
    ]
    return variables, styles


def _declared(body: str) -> dict[str, str]:
    pairs = (part.partition(":") for part in body.split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs}


VARIABLES, STYLES = _styles()
SOFT, MIDDLE = {"fill": VARIABLES["--soft"]}, {"text-anchor": "middle"}


def _value(text: str) -> str:
    return re.sub(r"var\((--[\w-]+)\)", lambda match: VARIABLES[match[1]], text).removesuffix("px")


def _attributes(kinds: Sequence[str], own: str = "") -> dict[str, str]:
    """Returns what an element of these classes looks like, as attributes; ``own``: its own style."""
    style: dict[str, str] = {}
    for names, declared in STYLES:
        if names <= set(kinds):
            style |= declared
    return {name: _value(value) for name, value in (style | _declared(own)).items() if name in DRAWN}


# Drawing ---------------------------------------------------------------------------------------------------------


class _Canvas:
    """A drawing that grows downwards below its title."""

    def __init__(self, title: str, alt: str, width: float) -> None:
        self.title, self.alt, self.width = title, alt, width
        self.body = Element("g")
        self.height = 0.0

    def write(self, text: str, x: float, y: float, size: float = TEXT, look: Mapping[str, str] = SOFT) -> None:
        """Writes a line of text."""
        line = {"x": f"{x:g}", "y": f"{y:g}", "font-size": f"{size:g}", "fill": VARIABLES["--ink"]}
        SubElement(self.body, "text", line | dict(look)).text = text.replace("‖", "||")  # fonts lack it, or it is serif

    def box(self, x: float, y: float, size: tuple[float, float], look: Mapping[str, str]) -> None:
        """Draws a rectangle."""
        place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{size[0]:g}", "height": f"{size[1]:g}"}
        SubElement(self.body, "rect", place | dict(look))

    def paragraph(self, text: str, size: float, look: Mapping[str, str] = SOFT) -> None:
        """Writes text below what is there, in as many lines as it takes."""
        for line in textwrap.wrap(text, int(self.width / (WIDE * size))):
            self.write(line, 0.0, self.height + size, size, look)
            self.height += 1.3 * size

    def text(self, title: str) -> str:
        """Returns the whole SVG."""
        head = _Canvas(title, "", self.width)
        head.paragraph(title, BIG, {"font-weight": "bold"})
        down = head.height + 6
        width, height = self.width + 2 * MARGIN, self.height + down + 2 * MARGIN
        size = {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
        root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONT, "role": "img"})
        SubElement(root, "title").text = title
        SubElement(root, "desc").text = self.alt
        SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
        for canvas, y in ((head, MARGIN), (self, MARGIN + down)):
            canvas.body.set("transform", f"translate({MARGIN:g} {y:g})")
            root.append(canvas.body)
        return tostring(root, encoding="unicode") + "\n"


def _figure(element: Element) -> _Canvas:
    """Draws a figure with its legend above and its note below."""
    svg = next(element.iter("svg"))
    _, _, width, height = map(float, svg.get("viewbox", "0 0 420 236").split())
    canvas = _Canvas(words(element.find("figcaption")), svg.get("aria-label", ""), width)
    x = 0.0
    for item in element.iter("li"):
        key, name = item.find("i"), words(item)
        long = 22 + WIDE * TEXT * len(name)
        if x and x + long > width:
            x, canvas.height = 0.0, canvas.height + 18
        kinds = [] if key is None else key.get("class", "").split()
        colour = next((number for kind in kinds if (number := kind.removeprefix("b")).isdigit()), "1")
        dashed = {"stroke-dasharray": "4 3"} if "dashed" in kinds else {}
        line = {"d": f"M{x:g} {canvas.height + 8:g}h16", "stroke": VARIABLES[f"--c{colour}"], "stroke-width": "4"}
        SubElement(canvas.body, "path", line | dashed)
        canvas.write(name, x + 22, canvas.height + 12)
        x += long + 14
    canvas.height += 24 if x else 0
    group = SubElement(canvas.body, "g", {"transform": f"translate(0 {canvas.height:g})"})
    group.extend(list(map(_plain, svg)))
    canvas.height += height
    for note in element.iter("p"):
        canvas.paragraph(words(note), SMALL)
    return canvas


def _plain(element: Element) -> Element:
    """Returns an element of a drawing with its look as attributes."""
    kinds, own = element.get("class", "").split(), element.get("style", "")
    kept = {
        name: value
        for name, value in element.items()
        if name not in ("class", "style", "tabindex", "role") and not name.startswith("data-")
    }
    plain = Element(element.tag, kept | _attributes(kinds, own))
    plain.text, plain.tail = element.text, element.tail
    plain.extend(list(map(_plain, element)))
    return plain


def _heat(table: Element) -> _Canvas:
    """Draws a heat map."""
    head = [words(cell) for cell in table.iterfind("thead/tr/th")]
    rows = [(words(row.find("th")), row.findall("td")) for row in table.iterfind("tbody/tr")]
    left = min(NAMES, 16 + WIDE * TEXT * max((len(name) for name, _ in rows), default=0))
    title = words(table.find("caption"))
    canvas = _Canvas(title, f"{title}. {_said(head, rows)}", max(240.0, left + CELL[0] * len(head)))
    for at, name in enumerate(head):
        canvas.write(name, left + CELL[0] * (at + 0.5), 14.0, look=SOFT | MIDDLE)
    canvas.height = 22.0
    for name, cells in rows:
        short = textwrap.shorten(name, int(left / (WIDE * TEXT)), placeholder="…") if len(name) > 20 else name
        canvas.write(short, 0.0, canvas.height + 16)
        for at, cell in enumerate(cells):
            share = float(_declared(cell.get("style", "")).get("--v", "0")) * float(VARIABLES["--most"])
            heat = f"rgb({','.join(VARIABLES['--heat'].split())})"
            x = left + CELL[0] * at
            look = {"fill": heat, "fill-opacity": f"{share:.3g}", "rx": "3"}
            canvas.box(x + 1, canvas.height + 1, (CELL[0] - 2, CELL[1] - 2), look)
            canvas.write(words(cell), x + CELL[0] / 2, canvas.height + 16, look=MIDDLE)
        canvas.height += CELL[1]
    return canvas


def _said(head: Sequence[str], rows: Sequence[tuple[str, list[Element]]]) -> str:
    """Returns a heat map's numbers in words."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{column} {words(cell)}" for column, cell in zip(head, cells)) for name, cells in rows
    )


ABOUT = ".//div[@class='about']"


def _strip(strip: Element) -> _Canvas:
    """Draws images before and after an attack at its own eps, the change beside them."""
    shots = [_at_own_eps(shot) for shot in strip.findall("article")]
    alt = " ".join(f"{words(shot.find(ABOUT))}." for shot in shots)
    canvas = _Canvas("Images before and after the attack", alt, 3 * (SHOT + 8) + 260)
    for at, name in enumerate(words(span) for span in (list(shots[0].iterfind(".//div/span"))[:3] if shots else ())):
        canvas.write(name, at * (SHOT + 8), 12.0)
    canvas.height = 18.0
    for shot in shots:
        for at, picture in enumerate(shot.iter("img")):
            side = dict.fromkeys(("width", "height"), f"{SHOT:g}")
            place = {"x": f"{at * (SHOT + 8):g}", "y": f"{canvas.height:g}", "href": picture.get("src", "")}
            SubElement(canvas.body, "image", side | place | {"style": "image-rendering:pixelated"})
        for line, text in enumerate(textwrap.wrap(words(shot.find(ABOUT)), 40)[:6]):
            canvas.write(text, 3 * (SHOT + 8) + 6, canvas.height + 14 * (line + 1), look={})
        canvas.height += SHOT + 8
    return canvas


def _at_own_eps(element: Element, routes: bool = False) -> Element:
    """Returns an element without what is shown at other eps alone; its ``routes`` or the rest."""
    plain = Element(element.tag, element.attrib)
    plain.text, plain.tail = element.text, element.tail
    for part in element:
        kinds = part.get("class", "").split()
        if ("routes" not in kinds or routes) and ("at" not in kinds or "own" in kinds):
            plain.append(_at_own_eps(part, routes))
    return plain


def _routes(shot: Element, pictures: Mapping[str, Element]) -> _Canvas:
    """Draws which expert gets each patch of one image, layer by layer, clean and under the attack at its own eps."""
    shot = _at_own_eps(shot, routes=True)
    drawn = [svg for svg in shot.iter("svg") if svg.get("class") == "patches"]
    name = next(shot.iter("img")).get("alt", "").removesuffix(" before the attack").removesuffix(",")
    canvas = _Canvas(
        f"{name}: the expert of each patch", "; ".join(svg.get("aria-label", "") for svg in drawn), 3.8 * SHOT
    )
    for at, side in enumerate(("clean", "attacked")):
        canvas.write(side, at * 1.9 * SHOT, 12.0)
    canvas.height = 18.0
    for layer in shot.iterfind(".//div[@class='layer-route']"):
        name = words(layer.find("p/b"))
        canvas.write(f"{name}:{words(layer.find('p')).removeprefix(name)}", 0.0, canvas.height + 13, look={})
        canvas.height += 20
        tall = 0.0
        for at, svg in enumerate(layer.iter("svg")):
            left, top, width, height = map(float, svg.get("viewbox", "0 0 1 1").split())
            scale = 1.7 * SHOT / width
            moved = f"translate({at * 1.9 * SHOT:g} {canvas.height:g}) scale({scale:.5g}) translate({-left:g} {-top:g})"
            group = SubElement(canvas.body, "g", {"transform": moved})
            group.extend([_patch(part, pictures) for part in svg])
            tall = max(tall, scale * height)
        canvas.height += tall + 10
    return canvas


def _patch(part: Element, pictures: Mapping[str, Element]) -> Element:
    """Returns a part of a picture of patches: the image below them itself, and numbers in the middle of their patch."""
    if part.tag == "use":
        picture = pictures[part.get("href", "").removeprefix("#")]
        place = {"width": "1", "height": "1", "preserveAspectRatio": "none", "opacity": ".34"}
        look = {"transform": part.get("transform", ""), "href": picture.get("href", "")}
        return Element("image", place | look | {"style": "image-rendering:pixelated"})
    plain = _plain(part)
    if part.tag == "text":
        said = part.get("class") == "said"
        look = {
            "font-size": ".36" if part.get("class") == "long" else ".46",
            "font-weight": "400" if said else "600",
            "dy": ".16",
        }
        plain.attrib |= look | (SOFT if said else MIDDLE | {"fill": VARIABLES["--ink"]})
    return plain


def _verdict(cards: Element, run: str) -> _Canvas:
    """Draws clean and worst-case accuracy of each run."""
    rows = list(_bars(cards, run))
    left = min(NAMES, 16 + WIDE * TEXT * max((len(name) for name, *_ in rows), default=0))
    canvas = _Canvas(
        "Clean and worst-case accuracy", "; ".join(f"{name}: {alt}" for name, alt, _ in rows), left + 320.0
    )
    for at, (name, _, parts) in enumerate(rows):
        canvas.write(textwrap.shorten(name, 22, placeholder="…"), 0.0, canvas.height + 17, look={})
        for kinds, start, share in parts:
            x, width = left + 3 * start, 3 * share
            if "err" in kinds:
                whisker = f"M{x:g} {canvas.height + 5:g}v16m0 -8h{width:g}m0 -8v16"
                look = {"fill": "none", "stroke": VARIABLES["--ink"], "stroke-width": "2"}
                SubElement(canvas.body, "path", {"d": whisker, **look})
            else:
                look = _attributes(kinds) | {"fill": VARIABLES[f"--c{at % 8 + 1}"]}
                canvas.box(x, canvas.height + 6, (width, 14.0), look)
        canvas.height += 28
    for share in (0, 25, 50, 75, 100):
        canvas.write(f"{share}%", left + 3.0 * share, canvas.height + 12, look=SOFT | MIDDLE)
    canvas.height += 18
    canvas.paragraph("Pale: clean; full: what the worst case leaves, with its 95 % interval.", SMALL)
    if any(DOUBTED in name for name, *_ in rows):
        canvas.paragraph(f"{DOUBTED.strip()} do not quote: a check speaks against the number (see the report).", SMALL)
    return canvas


Part = tuple[list[str], float, float]  # classes, start and width in per cent
DOUBTED = " †"


def _bars(cards: Element, run: str) -> Iterator[tuple[str, str, list[Part]]]:
    for card in cards.findall("article"):
        for track in (element for element in card.iter("div") if element.get("class") == "track"):
            styles = [(part.get("class", "").split(), _declared(part.get("style", ""))) for part in track]
            parts = [(kinds, _percent(style, "left"), _percent(style, "width")) for kinds, style in styles]
            doubted = DOUBTED if any("hatch" in kinds for kinds, *_ in parts) else ""
            yield (words(card.find("h2")) or run) + doubted, track.get("aria-label", ""), parts


def _percent(style: Mapping[str, str], name: str) -> float:
    return float(style.get(name, "0").rstrip("%"))
