"""A sweep over eps as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from robustmoe.analysis import Rate, Spare, SweepCurve, SweepPoint, SweepSummary
from robustmoe.records import Sweep
from robustmoe.records.sweep import KEPT, OTHER_K, RANDOM, WITHOUT
from robustmoe.reporting.collect import Swept, View
from robustmoe.reporting.figures import LARGE, NORMAL, Series, colour, lines
from robustmoe.reporting.tables import Entry, Grid, grid_html, rated
from robustmoe.reporting.verdict import alarm
from robustmoe.reporting.words import NORM_NAMES, eps_text, percent, plural, threat

WEAK = "vmoe_pgd("
DRAWN, SHARED = 8, 6
"""Routers drawn, and radii in the comparison of runs, at most."""

TERMS = (
    ("right", "attacked images that the model gets right, whatever it said of the clean one: the paper’s accuracy."),
    (
        "robust",
        "right on the clean image and under the attack at this and every smaller eps of the sweep. What broke an image "
        "at a small eps is in the larger ball too, so this can only fall.",
    ),
    ("loss", "mean cross-entropy, in nats."),
    ("class changes", "the share of images whose class changes, right or wrong: the paper’s prediction changes."),
    ("clean route held", "the attacked image, with every item sent to the experts of the clean image."),
    ("attacked route", "the clean image, with every item sent to the experts of the attacked image."),
    (
        "routes moved",
        "1 minus intersection over union of an item’s experts before and after, mean over items and images. Items that "
        "go to no expert both times (a full expert, or experts that choose) are left out; V-MoE’s code counts them as "
        "changed, which is the paper’s rule.",
    ),
    (
        "random experts",
        "every item goes to as many experts as before, drawn uniformly; weighted by the layer’s own rule (with V-MoE "
        "gates that is little, as the router did not choose them), or by the weights of the route they stand in for.",
    ),
    (
        "one expert removed",
        "as if the layer had been built without it: the next best takes over, weighted by the layer’s own rule. Every "
        "chosen expert has room in all of these.",
    ),
)


# Words -----------------------------------------------------------------------------------------------------------


def attack_name(text: str) -> str:
    """The spec without the radius that it was given with: "pgd(linf(eps), steps=50)"."""
    return re.sub(r"\b(linf|l2|l1)\([^()]*\)", r"\1(eps)", text, count=1)


def story(one: Swept) -> str:
    """What the weak and the strong attack leave at the largest eps, how far routes move, and what choice is worth."""
    numbers, header = one.numbers, one.record.header
    best = numbers.strongest
    assert best is not None, "a sweep is shown once something was attacked"
    point, eps = best.points[-1], best.points[-1].eps
    text = f"From {percent(numbers.clean)} clean accuracy, with {threat(header.norm, eps)}: "
    left = [(curve, at) for curve in numbers.curves for at in curve.points if at.eps == eps]
    text += ", ".join(f"{attack_name(curve.attack)} leaves {percent(at.robust)}" for curve, at in left)
    text += f"; all together {percent(numbers.worst[eps])}." if len(left) > 1 else "."
    text += _weakness(left, best)
    if point.held is not None:
        moved = ", ".join(f"{percent(share)} in {name}" for name, share in _shorter(point.moved).items())
        text += f" Under {attack_name(best.attack)} the routes move by {moved}. It leaves {percent(point.right)} right,"
        text += f" with the clean route held {percent(point.held)}."
        text += f" Clean images on the attacked routes: {percent(point.swapped)}."
    return text + _choice(numbers.spare)


def _weakness(left: Sequence[tuple[SweepCurve, SweepPoint]], best: SweepCurve) -> str:
    """What the paper's schedule overstates."""
    weak = [at for curve, at in left if curve.attack.startswith(WEAK)]
    if weak and len(weak) == len(left):
        return " Only the paper’s schedule was run, which is weak: this is no robust accuracy to quote."
    gap = weak[0].robust.value - next(at.robust.value for curve, at in left if curve is best) if weak else 0.0
    return f" The paper’s schedule leaves {100 * gap:.1f} points more than the strongest attack." if gap > 0 else ""


def _choice(spare: Sequence[Spare]) -> str:
    random = next((found for found in spare if (found.rule, found.router) == (RANDOM, "")), None)
    removed = _worst_removal(spare)
    said = [f"random experts keep {percent(random.mean)}"] if random is not None else []
    said += [f"the worst expert to lose leaves {percent(removed)}"] if removed is not None else []
    return f" Clean images, other routes: {'; '.join(said)}." if said else ""


def _worst_removal(spare: Sequence[Spare]) -> float | None:
    """The lowest clean accuracy without one expert of one layer."""
    removed = [found for found in spare if found.rule == WITHOUT]
    single = [found for found in removed if found.router] or removed
    return min((found.lowest[1].value for found in single), default=None)


def setting(found: Sweep) -> str:
    """On what, and how."""
    header = found.header
    where = f"{plural(header.n, 'image')} of {header.data} ({header.split}), {NORM_NAMES.get(header.norm, header.norm)}"
    return f"{where}; every attack is made again at each eps, a step size that it names scaled with it."


def _shorter(values: dict[str, float]) -> dict[str, float]:
    """The values by short names of the routers."""
    return dict(zip(short_names(list(values)), values.values(), strict=True))


def short_names(names: Sequence[str]) -> list[str]:
    """Routers' names without what all have in common: "block 3" for network.blocks.3.mlp.router."""
    parts = [name.split(".") for name in names]
    found = []
    for name, own in zip(names, parts, strict=True):
        same = len({len(each) for each in parts}) == 1 and len(names) > 1
        apart = [at for at in range(len(own)) if not same or len({each[at] for each in parts}) > 1]
        inner = ".".join(own[at] for at in apart)
        kind = own[apart[0] - 1] if same and len(apart) == 1 and apart[0] else ""
        found.append(f"{kind.removesuffix('s')} {inner}" if inner.isdigit() and kind else inner or name)
    return found


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Swept) -> list[Grid]:
    """Everything measured, as tables: all attacks, each attack, its routes, redundancy."""
    numbers, norm = one.numbers, one.record.header.norm
    tables = [_together(numbers, norm)] if len(numbers.curves) > 1 else []
    for curve in numbers.curves:
        tables.append(_curve(numbers, curve, norm))
        tables += [_routes(curve, norm)] if curve.points[0].moved else []
    return tables + ([_redundancy(one)] if numbers.spare or one.record.left_out else [])


def _together(numbers: SweepSummary, norm: str) -> Grid:
    head = ("eps", *(attack_name(curve.attack) for curve in numbers.curves), "All together")
    rows: list[tuple[Entry, ...]] = [(("no attack", ""), *[rated(numbers.clean)] * (len(head) - 1))]
    for eps, worst in numbers.worst.items():
        found = [next((p.robust for p in curve.points if p.eps == eps), None) for curve in numbers.curves]
        rows.append(((eps_text(norm, eps), ""), *((rated(each) if each else ("", "")) for each in found), rated(worst)))
    return Grid("Robust accuracy, weak beside strong", head, tuple(rows))


def _curve(numbers: SweepSummary, curve: SweepCurve, norm: str) -> Grid:
    routed = curve.points[0].held is not None
    routes = ("Right, clean route held", "Clean images, attacked route") if routed else ()
    head = ("eps", "Right", "Robust", "Loss", "Class changes", *routes)
    clean = rated(numbers.clean)
    rows: list[tuple[Entry, ...]] = [
        (("no attack", ""), clean, clean, (f"{numbers.loss:.3g}", ""), ("", ""), *([("", "")] * 2 if routed else []))
    ]
    for point in curve.points:
        rows.append(
            (
                (eps_text(norm, point.eps), ""),
                rated(point.right),
                rated(point.robust),
                (f"{point.loss:.3g}", ""),
                rated(point.changed),
                *((rated(point.held), rated(point.swapped)) if routed else ()),
            )
        )
    return Grid(f"Under {attack_name(curve.attack)}", head, tuple(rows))


def _routes(curve: SweepCurve, norm: str) -> Grid:
    names = list(curve.points[0].moved)
    idle = any(share > 0 for point in curve.points for share in point.idle.values())
    rows = []
    for point in curve.points:
        paper = [f"paper’s {percent(point.moved_paper[name])}, idle {percent(point.idle[name])}" for name in names]
        shown = [(percent(point.moved[name]), small if idle else "") for name, small in zip(names, paper, strict=True)]
        rows.append(((eps_text(norm, point.eps), ""), *shown))
    note = "Small print: by the paper’s rule; and the share of items that go to no expert both times, which it counts."
    note = note if idle else "No item goes to no expert, so the paper’s rule gives the same."
    return Grid(f"Routes moved by {attack_name(curve.attack)}", ("eps", *short_names(names)), tuple(rows), note)


def _redundancy(one: Swept) -> Grid:
    clean = rated(one.numbers.clean)
    rows: list[tuple[Entry, ...]] = [(("the routers’ own", ""), clean, ("", ""), ("", ""), ("", ""))]
    names = list(one.record.header.routers)
    short = dict(zip(names, short_names(names), strict=True))
    for found in one.numbers.spare:
        rows += _spare_rows(found, f" in {short[found.router]}" if found.router else "", one)
    note = " ".join(one.record.left_out)
    head = ("Clean images, other routes", "Right", "Lowest", "Highest", "Same class")
    return Grid("How much the choice of experts matters", head, tuple(rows), note)


def _spare_rows(found: Spare, where: str, one: Swept) -> list[tuple[Entry, ...]]:
    """One row; of another k one each."""
    if found.rule == OTHER_K:
        own = {info.k for info in one.record.header.routers.values() if info.k < info.experts}
        return [
            ((f"k = {k}{where}", "its own" if own == {k} else ""), rated(rate), ("", ""), ("", ""), _same(found, k))
            for k, rate in found.rates.items()
        ]
    every = "" if where or len(one.record.header.routers) < 2 else " in every layer"
    name, small = {
        RANDOM: ("random experts", f"{plural(one.record.draws, 'draw')}, weighted by the layer’s rule"),
        KEPT: ("random experts", f"{plural(one.record.draws, 'draw')}, the route’s weights kept"),
        WITHOUT: ("one expert removed", "mean over the experts"),
    }[found.rule]
    (low, worst), (high, best) = found.lowest, found.highest
    which = "without {}" if found.rule == WITHOUT else "draw {}"
    return [
        (
            (f"{name}{where or every}", small),
            (percent(found.mean), ""),
            (percent(worst), which.format(low)),
            (percent(best), which.format(high)),
            _same(found),
        )
    ]


def _same(found: Spare, number: int | None = None) -> Entry:
    """The share of images with the model's own class."""
    rates = list(found.agree.values()) if number is None else [found.agree[number]]
    return percent(math.fsum(rate.value for rate in rates) / len(rates)), ""


def comparison(views: Sequence[View]) -> Grid | None:
    """The swept runs side by side, at radii that all of them have; None for fewer than two."""
    both = [(view, view.swept.numbers) for view in views if view.swept is not None]
    if len(both) < 2:
        return None
    shared = sorted(set.intersection(*(set(numbers.worst) for _, numbers in both)))
    shown = shared[-SHARED:]
    norm = next(view.swept.record.header.norm for view in views if view.swept is not None)
    rows = []
    for view, numbers in both:
        random = [found.mean for found in numbers.spare if (found.rule, found.router) == (RANDOM, "")]
        rows.append(
            (
                (view.name, ""),
                rated(numbers.clean),
                *(rated(numbers.worst[eps]) for eps in shown),
                (percent(random[0] if random else None), ""),
                (percent(_worst_removal(numbers.spare)), ""),
            )
        )
    head = ("Run", "Clean", *(eps_text(norm, eps) for eps in shown), "Random experts", "Worst removal")
    return Grid("The runs side by side, all attacks together", head, tuple(rows), "; ".join(_apart(views)))


def _apart(views: Sequence[View]) -> list[str]:
    """Why sweeps cannot be compared number by number."""
    found = [view.swept for view in views if view.swept is not None]
    headers = [one.record.header for one in found]
    fields = (("data_hash", "data sets"), ("index_hash", "images"), ("norm", "norms"))
    reasons = [
        f"these sweeps are of different {words}"
        for field, words in fields
        if len({getattr(header, field) for header in headers}) > 1
    ]
    attacks = {tuple(sorted(attack_name(curve.attack) for curve in one.numbers.curves)) for one in found}
    return reasons + (["these sweeps are of different attacks"] if len(attacks) > 1 else [])


# The page --------------------------------------------------------------------------------------------------------


def section(views: Sequence[View]) -> str:
    """The swept runs: side by side, then a story, figures and tables each; "" without any."""
    there = [(at, view, view.swept) for at, view in enumerate(views) if view.swept is not None]
    if not there:
        return ""
    parts = [
        '<h2>Sweep over eps</h2><p class="lead">The protocol of Puigcerver et al. (NeurIPS 2022), with a strong attack '
        "beside theirs. Small print: 95 % Wilson intervals, in per cent.</p>"
    ]
    both = comparison(views)
    if both is not None:
        parts += [alarm("Compare with care", [both.note], mild=True)] if both.note else []
        parts += [f'<div class="plots joint">{_side_by_side(there)}</div>', grid_html(replace(both, note=""))]
    for at, view, one in there:
        name = (
            f'<h2><i class="dotkey b{colour(at)}"></i><span>{escape(view.name)}</span></h2>' if len(views) > 1 else ""
        )
        said = f'<p class="story">{escape(story(one))}</p><p class="note">{escape(setting(one.record))}</p>'
        parts.append(f'<div class="cards"><article class="card">{name}{said}</article></div>')
        moves = _moves(one)
        kind = "wide" if moves else "joint"
        parts.append(f'<div class="plots {kind}" style="margin-top:20px">{_accuracy(one, bool(moves))}{moves}</div>')
        tables = "".join(grid_html(grid) for grid in grids(one))
        parts.append(f"<details{'' if len(there) > 1 else ' open'}><summary>All numbers</summary>{tables}</details>")
    routed = any(one.record.header.routers for _, _, one in there)
    terms = TERMS if routed else TERMS[:4]
    words = "".join(f"<div><dt>{escape(term)}:</dt> <dd>{escape(text)}</dd></div>" for term, text in terms)
    return f'{"".join(parts)}<dl class="terms">{words}</dl>'


def _axis(norm: str) -> tuple[float, str]:
    """What an eps is multiplied by, and the label."""
    return (255.0, "eps, in grey levels of 255") if norm == "linf" else (1.0, f"eps ({norm})")


def _series(name: str, number: int, pairs: Sequence[tuple[float, Rate]], dashed: bool = False) -> Series:
    """Rates against eps, with their intervals where the line is not dashed."""
    points = tuple((eps, 100 * rate.value) for eps, rate in pairs)
    band = tuple((eps, 100 * rate.interval[0], 100 * rate.interval[1]) for eps, rate in pairs)
    return Series(name, points, number, () if dashed else band, dashed)


def _accuracy(one: Swept, beside: bool) -> str:
    """``beside``: it has another figure at its side."""
    numbers, (unit, label) = one.numbers, _axis(one.record.header.norm)
    drawn = [
        _series(
            attack_name(curve.attack),
            colour(at),
            [(0.0, numbers.clean), *((unit * point.eps, point.robust) for point in curve.points)],
        )
        for at, curve in enumerate(numbers.curves)
    ]
    best = numbers.strongest
    if best is not None and best.points[0].held is not None:
        held = [(unit * point.eps, point.held) for point in best.points if point.held is not None]
        number = colour(list(numbers.curves).index(best))
        name = f"{attack_name(best.attack)}, clean route held: right"
        drawn.append(_series(name, number, [(0.0, numbers.clean), *held], dashed=True))
    size = NORMAL if beside else LARGE
    return lines("Robust accuracy against eps", drawn, label, unit="%", y_range=(0.0, 100.0), size=size)


def _moves(one: Swept) -> str:
    best, (unit, label) = one.numbers.strongest, _axis(one.record.header.norm)
    if best is None or not best.points[0].moved:
        return ""
    names = list(best.points[0].moved)
    drawn = [
        Series(short, tuple((unit * eps, 100 * share) for eps, share in [(0.0, 0.0), *_shares(best, name)]), colour(at))
        for at, (name, short) in enumerate(list(zip(names, short_names(names), strict=True))[:DRAWN])
    ]
    more = f" {plural(len(names) - DRAWN, 'more router')} in the table." if len(names) > DRAWN else ""
    note = f"Under {attack_name(best.attack)}; 1 − IoU of the chosen experts, mean.{more}"
    return lines("Routes moved, by layer", drawn, label, unit="%", note=note)


def _shares(curve: SweepCurve, router: str) -> list[tuple[float, float]]:
    return [(point.eps, point.moved[router]) for point in curve.points]


def _side_by_side(there: Sequence[tuple[int, View, Swept]]) -> str:
    """Every run's robust accuracy, all its attacks together."""
    unit, label = _axis(there[0][2].record.header.norm)
    drawn = [
        _series(
            view.name,
            colour(at),
            [(0.0, one.numbers.clean), *((unit * eps, rate) for eps, rate in one.numbers.worst.items())],
        )
        for at, view, one in there
    ]
    title = "Robust accuracy against eps, all attacks together"
    return lines(title, drawn, label, unit="%", y_range=(0.0, 100.0), size=LARGE)
