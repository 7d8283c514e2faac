"""The dissection of a routed model as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from robustmoe.analysis import DissectionSummary, ExpertPart, Rate, RouterPart
from robustmoe.records import Dissection
from robustmoe.reporting.collect import Dissected, View
from robustmoe.reporting.figures import bars, colour, heat
from robustmoe.reporting.tables import Entry, Grid, grid_html, rated
from robustmoe.reporting.verdict import alarm
from robustmoe.reporting.words import interval, percent, plural, threat

NAMES = {"frozen": "RA-E, live", "router": "RA-R, live"}
ROUTERS_SHOWN = 8
MANY = 5  # experts: beyond them, heat maps stand two in a row
WORST, UNION = "worst case of all", "RA, union"
EXPERTS_ALONE = "the experts attacked; alone: each image keeps its clean route, so only the experts can fail"
ROUTER_ALONE = "the router attacked; alone: the experts answer as on the clean image, so only the route can fail"
WORDS = {
    "clean": "no attack",
    "prediction": "on the prediction",
    "frozen": "on the experts, route held",
    "router": "on the router, experts held",
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
        "experts held",
        "the attack and the judge both see the experts’ answers to the clean image, on the route of the attacked one: "
        "the clean image, misrouted. It is the router’s robustness, not the model’s.",
    ),
    ("live", "the model as it is, asked about the image that the attack on one part made."),
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


# Words -----------------------------------------------------------------------------------------------------------


def story(one: Dissected) -> str:
    """Which part gives way first, as plain text; and whether the attack on the whole model alone would mislead."""
    parts = one.parts
    held = f"with the route held, an attack on the experts takes it to {percent(parts.frozen)}"
    wrong = f"wrong routes alone (clean images, misrouted) take it to {percent(parts.swapped)}"
    moved = 1 - parts.consistency("margin").value
    moves = f"the attack on the router’s margin moves {percent(moved)} of the routes"
    start = f"From {percent(parts.clean)} clean accuracy, "
    said = {
        "experts": f"The experts give way first. {start}{held}; {wrong}, though {moves}.",
        "router": f"The router gives way first. {start}{wrong}; {held}; {moves}.",
        "unclear": f"Neither part clearly gives way first on {plural(parts.clean.n, 'image')}. {start}{held}; {wrong}; "
        f"{moves}.",
        "neither": f"Neither part gives way under these attacks. {start}{held}; {wrong}; {moves}.",
    }[parts.weaker]
    easy, worst = parts.robust["prediction"], parts.worst
    if parts.undercut:
        found = " and ".join(f"{percent(parts.robust[name])} ({NAMES[name]})" for name in parts.undercut)
        said += (
            f" Warning: the attack on the whole model was too weak. It leaves {percent(easy)}, an attack on one part "
            f"leaves the same model {found}; quote the union of all, {percent(worst)}."
        )
    elif worst.interval[1] < easy.interval[0]:
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


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Dissected) -> list[Grid]:
    """Everything measured, as tables: the parts against the whole, each attack, each router, the experts."""
    routers = one.parts.routers
    tables = [
        _components(one.parts),
        _whole(one.parts),
        *(_router(router, len(routers) > 1) for router in routers[:ROUTERS_SHOWN]),
    ]
    if len(routers) > ROUTERS_SHOWN:
        more = plural(len(routers) - ROUTERS_SHOWN, "more router")
        tables[-1] = replace(tables[-1], note=f"{tables[-1].note} {more} in the JSON of the report.")
    experts = [_experts(one.parts, router.name, len(routers) > 1) for router in routers[:ROUTERS_SHOWN]]
    return [*tables, *experts, *([_pairs(one.parts)] if one.parts.disagreement else [])]


def _components(parts: DissectionSummary) -> Grid:
    """SA, RA, RA-E and RA-R, a sentence each."""
    live, none = parts.robust, ("", "")
    rows: tuple[tuple[Entry, ...], ...] = (
        (("SA", "no attack"), none, rated(parts.clean)),
        (("RA", "one attack climbs the whole model, as is usual"), none, rated(live["prediction"])),
        (("RA-E", EXPERTS_ALONE), rated(parts.frozen), rated(live["frozen"])),
        (("RA-R", ROUTER_ALONE), rated(parts.swapped), rated(live["router"])),
        (
            (UNION, "right under every attack of this dissection; never above another of this column"),
            none,
            rated(parts.worst),
        ),
    )
    return Grid("Which part breaks", ("Measure", "That part alone", "The model as it is (live)"), rows, strong=UNION)


def _whole(parts: DissectionSummary) -> Grid:
    rows: list[tuple[Entry, ...]] = [(("no attack", ""), rated(parts.clean), ("", ""))]
    rows += [
        ((attack_words(name), ""), rated(rate), rated(parts.consistency(name))) for name, rate in parts.robust.items()
    ]
    rows.append(((WORST, ""), rated(parts.worst), ("", "")))
    rows.append((("clean images, misrouted", "by the margin’s attack"), rated(parts.misrouted), ("", "")))
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
            entries += [rated(router.consistency[name]), *kept, (_number(router.iou[name]), "")]
        else:
            entries += [("", "")] * (len(head) - 1)
        rows.append((*entries, *(rated(share) for share in load)))
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


def _experts(parts: DissectionSummary, router: str, several: bool) -> Grid:
    def row(expert: ExpertPart) -> tuple[Entry, ...]:
        load = next(one.load["clean"] for one in parts.routers if one.name == router)
        return (
            (f"expert {expert.k}", ""),
            rated(load[expert.k]),
            rated(expert.clean),
            rated(expert.robust),
            rated(expert.own[router]),
            rated(expert.others[router]),
            rated(expert.own_residue),
            rated(expert.other_residues),
        )

    head = (
        "Expert", "Load", "Alone, clean", "Alone, attacked", "Clean, on its own images", "Clean, on the others’",
        "Clean, classes y mod E = k", "Clean, other classes",
    )  # fmt: skip
    title = f"Each expert alone, its own images those of router {router}" if several else "Each expert alone"
    note = "Its own images are those that the router sends wholly to it; all others are the others’."
    return Grid(title, head, tuple(row(expert) for expert in parts.experts), note)


def _pairs(parts: DissectionSummary) -> Grid:
    rows = tuple(((f"experts {i} and {j}", ""), rated(rate)) for (i, j), rate in parts.disagreement.items())
    note = f"Mean over the pairs: {percent(parts.mean_disagreement)}." if len(rows) > 1 else ""
    return Grid("How often experts disagree on clean images", ("Pair", "Disagree"), rows, note)


def comparison(views: Sequence[View]) -> Grid | None:
    """The dissected runs side by side; None for fewer than two."""
    both = [(view, view.dissected.parts) for view in views if view.dissected is not None]
    if len(both) < 2:
        return None
    head = (
        "Run", "Clean", "Attacked prediction", "Route kept, prediction", "Route kept, router’s margin",
        "Experts, route held", "Router, experts held", "Worst case", "Expert alone, mean", "Disagree, mean",
        "Gives way first",
    )  # fmt: skip
    rows = tuple(
        (
            (view.name, ""),
            rated(parts.clean),
            rated(parts.robust["prediction"]),
            rated(parts.consistency("prediction")),
            rated(parts.consistency("margin")),
            rated(parts.frozen),
            rated(parts.swapped),
            rated(parts.worst),
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
        parts.append(grid_html(replace(both, note="")))
    for at, view, one in there:
        name = (
            f'<h2><i class="dotkey b{colour(at)}"></i><span>{escape(view.name)}</span></h2>' if len(views) > 1 else ""
        )
        parts.append(f'<div class="cards"><article class="card">{name}{_card(one)}</article></div>')
        first, *rest = grids(one)
        parts += [grid_html(first), _figures(one)]
        tables = "".join(grid_html(grid) for grid in rest)
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
        ("Router alone: RA-R", "big", percent(parts.swapped), f"95 %: {interval(parts.swapped)}; experts held"),
        ("Experts alone: RA-E", "big", percent(parts.frozen), f"95 %: {interval(parts.frozen)}; route held"),
        ("Whole model: RA, union", "word", percent(parts.worst), f"95 %: {interval(parts.worst)}"),
        ("Clean: SA", "word", percent(parts.clean), f"95 %: {interval(parts.clean)}"),
        ("Route kept", "word", percent(kept), f"95 %: {interval(kept)}; the router’s margin attacked"),
        ("An expert alone, attacked", "word", percent(parts.mean_expert), f"mean; {_span(robust)}".rstrip("; ")),
    )
    body = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="{kind}">{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, kind, value, note in cells
    )
    return (
        f'<p class="story">{escape(story(one))}</p><dl class="figures">{body}</dl>'
        f'<p class="note">{escape(setting(one.record))}</p>'
    )


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
