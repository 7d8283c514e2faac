"""The dissection of a routed model as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from robustmoe.analysis import DissectionSummary, ExpertPart, Rate, RouterPart, dissection_summary
from robustmoe.records import Dissection
from robustmoe.reporting.boxes import figure_list
from robustmoe.reporting.figures import bars, heat
from robustmoe.reporting.grid import Entry, Grid, rated
from robustmoe.reporting.panel import DATA, IMAGES, Kind, Panel, Shown, apart
from robustmoe.reporting.words import interval, percent, plural, threat

Dissected = Shown[Dissection, DissectionSummary]
NAMES = {"experts": "RA-E, live", "router": "RA-R, live"}
ROUTERS_SHOWN = 8
MANY = 5  # experts: beyond them, heat maps stand two in a row
WORST, UNION = "worst case of all", "RA, union"
EXPERTS_ALONE = "the experts attacked; alone: each image keeps its clean routing, so only the experts can fail"
ROUTER_ALONE = "the router attacked; alone: the experts answer as on the clean image, so only the route can fail"
WORDS = {
    "clean": "no attack",
    "prediction": "on the prediction",
    "experts": "on the experts, routing fixed",
    "router": "on the router, experts fixed",
    "steering": "into each expert’s region",
    "margin": "on the router’s margin",
    "flip": "across router boundaries",
    "residue": "on the router’s y mod E",
}
TERMS = (
    ("route kept", "the share of images whose every item goes to the same experts before and after the attack."),
    (
        "routing fixed",
        "the attack and the judge both see the experts of the clean image’s route, whatever the router would now say. "
        "It is the experts’ robustness, not the model’s.",
    ),
    (
        "experts fixed",
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


def story(shown: Dissected) -> str:
    """Returns which part gives way first, as plain text; and whether the attack on the whole model alone would
    mislead."""
    parts = shown.summary
    fixed = f"with the routing fixed, an attack on the experts takes it to {percent(parts.routing_fixed)}"
    wrong = f"wrong routes alone (clean images, misrouted) take it to {percent(parts.routing_transplanted)}"
    moved = 1 - parts.consistency("margin").value
    moves = f"the attack on the router’s margin moves {percent(moved)} of the routes"
    start = f"From {percent(parts.clean)} clean accuracy, "
    said = {
        "experts": f"The experts give way first. {start}{fixed}; {wrong}, though {moves}.",
        "router": f"The router gives way first. {start}{wrong}; {fixed}; {moves}.",
        "unclear": f"Neither part clearly gives way first on {plural(parts.n, 'image')}. {start}{fixed}; {wrong}; "
        f"{moves}.",
        "neither": f"Neither part gives way under these attacks. {start}{fixed}; {wrong}; {moves}.",
    }[parts.weaker]
    easy, worst = parts.robust["prediction"], parts.worst
    if parts.undercut:
        parts_left = " and ".join(f"{percent(parts.robust[name])} ({NAMES[name]})" for name in parts.undercut)
        said += (
            f" Warning: the attack on the whole model was too weak. It leaves {percent(easy)}, an attack on one part "
            f"leaves the same model {parts_left}; quote the union of all, {percent(worst)}."
        )
    elif worst.interval[1] < easy.interval[0]:
        said += f" The attack on the prediction alone leaves {percent(easy)}, all attacks together {percent(worst)}."
    return said


def setting(record: Dissection) -> str:
    """Returns on what, and against what."""
    header = record.header
    where = f"{plural(header.n, 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    return f"{where}; every attack is made from {header.attack}."


def attack_words(name: str) -> str:
    """Returns "on the router’s margin", "on expert 1 alone"."""
    return WORDS.get(name, f"on {name} alone")


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


# Tables ----------------------------------------------------------------------------------------------------------


def grids(shown: Dissected) -> list[Grid]:
    """Returns everything measured, as tables: the parts against the whole, each attack, each router, the experts."""
    routers = shown.summary.routers
    tables = [
        _components(shown.summary),
        _whole(shown.summary),
        *(_router(router, len(routers) > 1) for router in routers[:ROUTERS_SHOWN]),
    ]
    if len(routers) > ROUTERS_SHOWN:
        more = plural(len(routers) - ROUTERS_SHOWN, "more router")
        tables[-1] = replace(tables[-1], note=f"{tables[-1].note} {more} in the JSON of the report.")
    experts = [_experts(shown.summary, router, len(routers) > 1) for router in routers[:ROUTERS_SHOWN]]
    return [*tables, *experts, *([_pairs(shown.summary)] if shown.summary.disagreement else [])]


def _components(parts: DissectionSummary) -> Grid:
    """Returns SA, RA, RA-E and RA-R, a sentence each."""
    live, none = parts.robust, ("", "")
    rows: tuple[tuple[Entry, ...], ...] = (
        (("SA", "no attack"), none, rated(parts.clean)),
        (("RA", "one attack climbs the whole model, as is usual"), none, rated(live["prediction"])),
        (("RA-E", EXPERTS_ALONE), rated(parts.routing_fixed), rated(live["experts"])),
        (("RA-R", ROUTER_ALONE), rated(parts.routing_transplanted), rated(live["router"])),
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
    title = f"Router {router.short}" if several else "The router"
    return Grid(title, (*head, *(f"To expert {k}" for k in experts)), tuple(rows), _state(router))


def _state(router: RouterPart) -> str:
    """Returns gap, ties, entropy, residue of a router on clean images, as sentences."""
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


def _experts(parts: DissectionSummary, router: RouterPart, several: bool) -> Grid:
    def row(expert: ExpertPart) -> tuple[Entry, ...]:
        load = router.load["clean"]
        return (
            (f"expert {expert.k}", ""),
            rated(load[expert.k]),
            rated(expert.clean),
            rated(expert.robust),
            rated(expert.own[router.name]),
            rated(expert.others[router.name]),
            rated(expert.own_residue),
            rated(expert.other_residues),
        )

    head = (
        "Expert", "Load", "Alone, clean", "Alone, attacked", "Clean, on its own images", "Clean, on the others’",
        "Clean, classes y mod E = k", "Clean, other classes",
    )  # fmt: skip
    title = f"Each expert alone, its own images those of router {router.short}" if several else "Each expert alone"
    note = "Its own images are those that the router sends wholly to it; all others are the others’."
    return Grid(title, head, tuple(row(expert) for expert in parts.experts), note)


def _pairs(parts: DissectionSummary) -> Grid:
    rows = tuple(((f"experts {i} and {j}", ""), rated(rate)) for (i, j), rate in parts.disagreement.items())
    note = f"Mean over the pairs: {percent(parts.mean_disagreement)}." if len(rows) > 1 else ""
    return Grid("How often experts disagree on clean images", ("Pair", "Disagree"), rows, note)


def comparison(every: Sequence[Dissected]) -> Grid | None:
    """Returns the dissected runs side by side; None for fewer than two."""
    if len(every) < 2:
        return None
    head = (
        "Run", "Clean", "Attacked prediction", "Route kept, prediction", "Route kept, router’s margin",
        "Experts, routing fixed", "Router, experts fixed", "Worst case", "Expert alone, mean", "Disagree, mean",
        "Gives way first",
    )  # fmt: skip
    rows = tuple(
        (
            (run, ""),
            rated(parts.clean),
            rated(parts.robust["prediction"]),
            rated(parts.consistency("prediction")),
            rated(parts.consistency("margin")),
            rated(parts.routing_fixed),
            rated(parts.routing_transplanted),
            rated(parts.worst),
            (percent(parts.mean_expert), _span([expert.robust.value for expert in parts.experts])),
            (percent(parts.mean_disagreement), ""),
            (parts.weaker, ""),
        )
        for run, parts in ((shown.run, shown.summary) for shown in every)
    )
    reasons = apart("dissections", every, DATA, IMAGES, ("attacks", lambda shown: shown.record.header.attack))
    return Grid("The runs side by side", head, rows, reasons)


def _span(values: Sequence[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}" if len(values) > 1 else ""


# The page --------------------------------------------------------------------------------------------------------


def panel(shown: Dissected) -> Panel:
    """Returns everything that is said of a dissection."""
    dead = any(router.classes.dead for router in shown.summary.routers)
    terms = [(term, words) for term, words in TERMS if dead or term != "†"]
    return Panel(
        story(shown),
        setting(shown.record),
        grids(shown),
        terms,
        open=1,
        card=lambda: _card(shown.summary),
        figures=lambda: _figures(shown),
    )


def _card(parts: DissectionSummary) -> str:
    router, experts = parts.routing_transplanted, parts.routing_fixed
    kept, robust = parts.consistency("margin"), [expert.robust.value for expert in parts.experts]
    cells = (
        ("Router alone: RA-R", "big", percent(router), f"95 %: {interval(router)}; experts fixed"),
        ("Experts alone: RA-E", "big", percent(experts), f"95 %: {interval(experts)}; routing fixed"),
        ("Whole model: RA, union", "word", percent(parts.worst), f"95 %: {interval(parts.worst)}"),
        ("Clean: SA", "word", percent(parts.clean), f"95 %: {interval(parts.clean)}"),
        ("Route kept", "word", percent(kept), f"95 %: {interval(kept)}; the router’s margin attacked"),
        ("An expert alone, attacked", "word", percent(parts.mean_expert), f"mean; {_span(robust)}".rstrip("; ")),
    )
    return figure_list(cells)


def _figures(shown: Dissected) -> str:
    parts = shown.summary
    series = [
        ("clean", 1, [_bar(expert.clean) for expert in parts.experts]),
        ("attacked", 2, [_bar(expert.robust) for expert in parts.experts]),
    ]
    names = [str(expert.k) for expert in parts.experts]
    loads = [
        (attack_words(name), at, [_bar(share) for share in parts.routers[0].load[name]])
        for at, name in ((1, "clean"), (2, "prediction"), (3, "margin"))
    ]
    which = f", {parts.routers[0].short}" if len(parts.routers) > 1 else ""
    experts = [str(k) for k in range(parts.routers[0].info.experts)]
    body = bars("Right, each expert alone", names, series, "expert", note="Whiskers: 95 % intervals.")
    body += bars(f"Who gets the images{which}", experts, loads, "expert", note="The share that each expert gets.")
    heats = "".join(_heats(router, len(parts.routers) > 1) for router in parts.routers[:ROUTERS_SHOWN])
    return f'<div class="plots wide" style="margin-top:20px">{body}</div>{heats}'


def _bar(rate: Rate) -> tuple[float, float, float]:
    low, high = rate.interval
    return 100 * rate.value, 100 * low, 100 * high


def _heats(router: RouterPart, several: bool) -> str:
    """Returns class by expert, clean and attacked; which images of a class stay; expert by expert."""
    load, who = router.classes, f"{router.short}: " if several else ""
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


KIND = Kind(
    Dissection,
    "Dissection",
    "The router and the experts attacked apart, to see which of them gives way. Small print: 95 % Wilson intervals, in "
    "per cent.",
    lambda record, evaluations: dissection_summary(record),
    panel,
    comparison,
    unfit=lambda record: "" if record.done else "not finished",
)
