"""The dissection of a routed model as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from robustmoe.analysis import Anatomy, ExpertPart, Rate, RouterPart
from robustmoe.records import Dissection
from robustmoe.reporting.collect import Dissected, View
from robustmoe.reporting.figures import bars, colour, heat
from robustmoe.reporting.tables import Entry, cell
from robustmoe.reporting.verdict import alarm
from robustmoe.reporting.words import interval, percent, plural, threat

ROUTERS_SHOWN = 8
WIDE = 5  # columns: beyond them, small print stands below its value
MANY = 5  # experts: beyond them, heat maps stand two in a row
WORST = "worst case of all"
WORDS = {
    "clean": "no attack",
    "prediction": "on the prediction",
    "frozen": "on the experts, route held",
    "steering": "into each expert’s cell",
    "margin": "on the router’s margin",
    "flip": "across router boundaries",
    "residue": "on the router’s y mod E",
}
TERMS = (
    ("route kept", "the share of images whose every item goes to the same experts before and after the attack."),
    (
        "route held",
        "the attack and the judge both see the experts of the clean image’s route, whatever the router would now say. "
        "It is the experts’ robustness, not the model’s.",
    ),
    (
        "misrouted",
        "the clean image, sent along the route that the attack on the router’s margin leads to: what wrong routes "
        "cost, with experts that see nothing attacked.",
    ),
    ("expert alone", "all images are forced to this one expert; attacked: the attack sees this expert alone."),
    (
        "IoU",
        "of the images of a class that an expert gets before and after the attack: those in both over those in "
        "either. 1: no image of the class moved; the mean leaves out experts that never get the class.",
    ),
    (
        "y mod E",
        "the expert that AdvMoE’s released code teaches its router to choose. Its accuracy says nothing of a router "
        "that was not trained for it, and it is not stability.",
    ),
    ("†", "an expert that gets no clean image."),
    ("disagree", "the share of clean images on which two experts, each forced, say different classes."),
)


@dataclass(frozen=True)
class Grid:
    """A table: the first entry of each row is its name; an entry is a value and its small print. ``strong``: the name
    of the row to be read first."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    strong: str = ""


# Words -----------------------------------------------------------------------------------------------------------


def story(one: Dissected) -> str:
    """Which part gives way first, as plain text; and whether the attack on the whole model alone would mislead."""
    parts = one.parts
    held = f"with the route held, an attack on the experts takes it to {percent(parts.frozen)}"
    wrong = f"wrong routes alone (clean images, misrouted) take it to {percent(parts.misrouted)}"
    moved = 1 - parts.consistency("margin").value
    moves = f"the attack on the router moves {percent(moved)} of the routes"
    start = f"From {percent(parts.clean)} clean accuracy, "
    said = {
        "experts": f"The experts give way first. {start}{held}; {wrong}, though {moves}.",
        "router": f"The router gives way first. {start}{wrong}; {held}; {moves}.",
        "unclear": f"Neither part clearly gives way first on {plural(parts.clean.n, 'image')}. {start}{held}; {wrong}; "
        f"{moves}.",
        "neither": f"Neither part gives way under these attacks. {start}{held}; {wrong}; {moves}.",
    }[parts.weaker]
    easy, worst = parts.robust["prediction"], parts.worst
    if worst.interval[1] < easy.interval[0]:
        said += f" The attack on the prediction alone leaves {percent(easy)}, all attacks together {percent(worst)}."
    return said


def setting(found: Dissection) -> str:
    """On what, and against what."""
    header = found.header
    where = f"{plural(header.n, 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    return f"{where}; every attack is made from {header.attack}."


def attack_words(name: str) -> str:
    """ "on the router’s margin", "on expert 1 alone"."""
    return WORDS.get(name, f"on {name} alone")


def _rate(rate: Rate | None) -> Entry:
    return percent(rate), interval(rate)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Dissected) -> list[Grid]:
    """Everything measured, as tables: the whole model, each router, the experts."""
    routers = one.parts.routers
    tables = [_whole(one.parts), *(_router(router, len(routers) > 1) for router in routers[:ROUTERS_SHOWN])]
    if len(routers) > ROUTERS_SHOWN:
        more = plural(len(routers) - ROUTERS_SHOWN, "more router")
        tables[-1] = replace(tables[-1], note=f"{tables[-1].note} {more} in the JSON of the report.")
    experts = [_experts(one.parts, router.name, len(routers) > 1) for router in routers[:ROUTERS_SHOWN]]
    return [*tables, *experts, *([_pairs(one.parts)] if one.parts.disagreement else [])]


def _whole(parts: Anatomy) -> Grid:
    rows: list[tuple[Entry, ...]] = [(("no attack", ""), _rate(parts.clean), ("", ""))]
    rows += [
        ((attack_words(name), ""), _rate(rate), _rate(parts.consistency(name))) for name, rate in parts.robust.items()
    ]
    rows.append(((WORST, ""), _rate(parts.worst), ("", "")))
    rows.append((("experts alone, route held", "another model"), _rate(parts.frozen), ("", "")))
    rows.append((("clean images, misrouted", "the router alone"), _rate(parts.misrouted), ("", "")))
    kept = "Route kept" if len(parts.routers) == 1 else "Route kept (lowest router)"
    return Grid(
        "The whole model under each attack", ("Attack", "Right, clean and attacked", kept), tuple(rows), strong=WORST
    )


def _router(router: RouterPart, several: bool) -> Grid:
    experts = range(router.info.experts)
    head = ["Attack", "Route kept", *(["Items kept"] if router.info.items > 1 else []), "IoU of routes"]
    rows: list[tuple[Entry, ...]] = []
    for name, load in router.load.items():
        entries: list[Entry] = [(attack_words(name), "")]
        if name in router.consistency:
            kept = [(percent(router.kept[name]), "")] if router.info.items > 1 else []
            entries += [_rate(router.consistency[name]), *kept, (_number(router.iou[name]), "")]
        else:
            entries += [("", "")] * (len(head) - 1)
        rows.append((*entries, *(_rate(share) for share in load)))
    title = f"Router {router.name}" if several else "The router"
    return Grid(title, (*head, *(f"To expert {k}" for k in experts)), tuple(rows), _state(router))


def _state(router: RouterPart) -> str:
    """Gap, ties, entropy, residue of a router on clean images, as sentences."""
    if router.ties is None:
        text = "It always uses all its experts, so no route can move."
    else:
        text = (
            f"Gap from the last chosen logit to the next: median {_number(router.gap_median)}, largest "
            f"{_number(router.gap_max)}; tied on {percent(router.ties)} ({interval(router.ties)}) of the images."
        )
    top = math.log(router.info.experts)
    text += f" Entropy of its softmax: {router.entropy:.3g} nats, of at most {top:.3g}."
    if router.residue is not None:
        clean, attacked = router.residue
        text += (
            f" On y mod E (AdvMoE’s released number): {percent(clean)} ({interval(clean)}) clean, {percent(attacked)} "
            f"({interval(attacked)}) attacked; guessing gives about {percent(1 / router.info.experts)}."
        )
    return text


def _experts(parts: Anatomy, router: str, several: bool) -> Grid:
    def row(expert: ExpertPart) -> tuple[Entry, ...]:
        load = next(one.load["clean"] for one in parts.routers if one.name == router)
        return (
            (f"expert {expert.k}", ""),
            _rate(load[expert.k]),
            _rate(expert.clean),
            _rate(expert.robust),
            _rate(expert.own[router]),
            _rate(expert.others[router]),
            _rate(expert.own_residue),
            _rate(expert.other_residues),
        )

    head = (
        "Expert", "Load", "Alone, clean", "Alone, attacked", "Clean, on its own images", "Clean, on the others’",
        "Clean, classes y mod E = k", "Clean, other classes",
    )  # fmt: skip
    title = f"Each expert alone, its own images those of router {router}" if several else "Each expert alone"
    note = "Its own images are those that the router sends wholly to it; all others are the others’."
    return Grid(title, head, tuple(row(expert) for expert in parts.experts), note)


def _pairs(parts: Anatomy) -> Grid:
    rows = tuple(((f"experts {i} and {j}", ""), _rate(rate)) for (i, j), rate in parts.disagreement.items())
    note = f"Mean over the pairs: {percent(parts.mean_disagreement)}." if len(rows) > 1 else ""
    return Grid("How often experts disagree on clean images", ("Pair", "Disagree"), rows, note)


def comparison(views: Sequence[View]) -> Grid | None:
    """The dissected runs side by side; None for fewer than two."""
    both = [(view, view.dissected.parts) for view in views if view.dissected is not None]
    if len(both) < 2:
        return None
    head = (
        "Run", "Clean", "Attacked prediction", "Route kept, prediction", "Route kept, router’s margin",
        "Experts, route held", "Worst case", "Expert alone, mean", "Disagree, mean", "Gives way first",
    )  # fmt: skip
    rows = tuple(
        (
            (view.name, ""),
            _rate(parts.clean),
            _rate(parts.robust["prediction"]),
            _rate(parts.consistency("prediction")),
            _rate(parts.consistency("margin")),
            _rate(parts.frozen),
            _rate(parts.worst),
            (percent(parts.mean_expert), _span([expert.robust.value for expert in parts.experts])),
            (percent(parts.mean_disagreement), ""),
            (parts.weaker, ""),
        )
        for view, parts in both
    )
    return Grid("The runs side by side", head, rows, "; ".join(_apart(views)))


def _span(values: Sequence[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}" if len(values) > 1 else ""


def _apart(views: Sequence[View]) -> list[str]:
    """Why dissections cannot be compared number by number."""
    headers = [view.dissected.record.header for view in views if view.dissected is not None]
    fields = (("data_hash", "data sets"), ("index_hash", "images"), ("attack", "attacks"))
    return [
        f"these dissections are of different {words}"
        for field, words in fields
        if len({getattr(header, field) for header in headers}) > 1
    ]


# The page --------------------------------------------------------------------------------------------------------


def section(views: Sequence[View]) -> str:
    """The dissected runs: side by side, then a card, figures and tables each; "" without any."""
    there = [(at, view, view.dissected) for at, view in enumerate(views) if view.dissected is not None]
    if not there:
        return ""
    parts = [
        '<h2>Dissection</h2><p class="lead">The router and the experts attacked apart, to see which of them gives way. '
        "Small print: 95 % Wilson intervals, in per cent.</p>"
    ]
    both = comparison(views)
    if both is not None:
        parts += [alarm("Compare with care", [both.note], mild=True)] if both.note else []
        parts.append(_html(replace(both, note="")))
    for at, view, one in there:
        name = (
            f'<h2><i class="dotkey b{colour(at)}"></i><span>{escape(view.name)}</span></h2>' if len(views) > 1 else ""
        )
        parts.append(f'<div class="cards"><article class="card">{name}{_card(one)}</article></div>')
        parts.append(_figures(one))
        tables = "".join(_html(grid) for grid in grids(one))
        parts.append(f"<details{'' if len(there) > 1 else ' open'}><summary>All numbers</summary>{tables}</details>")
    dead = any(router.classes.dead for _, _, one in there for router in one.parts.routers)
    terms = "".join(
        f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in TERMS if dead or term != "†"
    )
    return f'{"".join(parts)}<dl class="terms">{terms}</dl>'


def _card(one: Dissected) -> str:
    parts = one.parts
    kept, robust = parts.consistency("margin"), [expert.robust.value for expert in parts.experts]
    cells = (
        ("Router: route kept", "big", percent(kept), f"95 %: {interval(kept)}; its margin attacked"),
        ("Experts: route held", "big", percent(parts.frozen), f"95 %: {interval(parts.frozen)}; they alone attacked"),
        ("An expert alone, attacked", "word", percent(parts.mean_expert), f"mean; {_span(robust)}".rstrip("; ")),
        ("Whole model, worst case", "word", percent(parts.worst), f"95 %: {interval(parts.worst)}"),
        ("Clean", "word", percent(parts.clean), f"95 %: {interval(parts.clean)}"),
        ("Experts disagree", "word", percent(parts.mean_disagreement), "of clean images, mean over pairs"),
    )
    body = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="{kind}">{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, kind, value, note in cells
    )
    return (
        f'<p class="story">{escape(story(one))}</p><dl class="figures">{body}</dl>'
        f'<p class="note">{escape(setting(one.record))}</p>'
    )


def _html(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid.head)
    body = "".join(_row(grid, row) for row in grid.rows)
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    kind = "data stack" if len(grid.head) > WIDE else "data stack tight"
    return (
        f"<h3>{escape(grid.title)}</h3>"
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _row(grid: Grid, row: tuple[Entry, ...]) -> str:
    (name, small), *entries = row
    cells = "".join(
        cell(column, *entry, kind="" if entry[0] else "none")
        for column, entry in zip(grid.head[1:], entries, strict=True)
    )
    kind = "worst" if name == grid.strong else "plain"
    return f'<tr class="{kind}"><th scope="row">{escape(name)}<small>{escape(small)}</small></th>{cells}</tr>'


def _figures(one: Dissected) -> str:
    parts = one.parts
    series = [
        ("clean", 1, [_bar(expert.clean) for expert in parts.experts]),
        ("attacked", 2, [_bar(expert.robust) for expert in parts.experts]),
    ]
    names = [str(expert.k) for expert in parts.experts]
    loads = [
        (attack_words(name), at, [_bar(share) for share in parts.routers[0].load[name]])
        for at, name in ((1, "clean"), (2, "prediction"), (3, "margin"))
    ]
    which = f", {parts.routers[0].name}" if len(parts.routers) > 1 else ""
    experts = [str(k) for k in range(parts.routers[0].info.experts)]
    body = bars("Right, each expert alone", names, series, "expert", note="Whiskers: 95 % intervals.")
    body += bars(f"Who gets the images{which}", experts, loads, "expert", note="The share that each expert gets.")
    heats = "".join(_heats(router, len(parts.routers) > 1) for router in parts.routers[:ROUTERS_SHOWN])
    return f'<div class="plots wide" style="margin-top:20px">{body}</div>{heats}'


def _bar(rate: Rate) -> tuple[float, float, float]:
    low, high = rate.interval
    return 100 * rate.value, 100 * low, 100 * high


def _heats(router: RouterPart, several: bool) -> str:
    """Class by expert, clean and attacked; which images of a class stay; expert by expert."""
    load, who = router.classes, f"{router.name}: " if several else ""
    kept = [at for at, images in enumerate(load.images) if images]
    names = [load.classes[at] for at in kept]
    boxes = [
        heat(f"{who}% of a class to each expert, clean", names, [load.clean[at] for at in kept], load.dead),
        heat(f"{who}the same, router’s margin attacked", names, [load.adversarial[at] for at in kept], load.dead),
        heat(f"{who}IoU in %, clean and attacked", names, [router.class_iou[at] for at in kept], load.dead),
    ]
    if router.transitions is not None:
        rows = [f"from {k} ({sum(line):,})" for k, line in enumerate(router.transitions)]
        shares = [[count / sum(line) if sum(line) else math.nan for count in line] for line in router.transitions]
        boxes.append(heat(f"{who}% of an expert’s images to each expert, router’s margin attacked", rows, shares))
    inside = "".join(f'<div class="heatbox" tabindex="0">{box}</div>' for box in boxes)
    kind = "heats wide" if router.info.experts > MANY else "heats"
    return f'<div class="{kind}" style="margin-top:20px">{inside}</div>'
