"""A sweep over eps as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from robustmoe.analysis import Rate, Spare, SweepCurve, SweepPoint, SweepSummary, router_names, sweep_summary
from robustmoe.records import Sweep
from robustmoe.records.sweep import KEPT, OTHER_K, RANDOM, WITHOUT
from robustmoe.reporting.figures import LARGE, NORMAL, Axes, Series, colour, lines
from robustmoe.reporting.grid import Entry, Grid, rated
from robustmoe.reporting.panel import DATA, IMAGES, NORM, Kind, Panel, Shown, apart
from robustmoe.reporting.words import NORM_NAMES, eps_axis, eps_text, percent, plural, threat

Swept = Shown[Sweep, SweepSummary]
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
    ("routing fixed", "the attacked image, with every item sent to the experts of the clean image."),
    ("routing transplanted", "the clean image, with every item sent to the experts of the attacked image."),
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
    """Returns the spec without the radius that it was given with: "pgd(linf(eps), steps=50)"."""
    return re.sub(r"\b(linf|l2|l1)\([^()]*\)", r"\1(eps)", text, count=1)


def story(shown: Swept) -> str:
    """Returns what the weak and the strong attack leave at the largest eps, how far routes move, and what choice is
    worth."""
    numbers, header = shown.summary, shown.record.header
    best = numbers.strongest
    assert best is not None, "a sweep is shown once something was attacked"
    point, eps = best.points[-1], best.points[-1].eps
    text = f"From {percent(numbers.clean)} clean accuracy, with {threat(header.norm, eps)}: "
    left = [(curve, at) for curve in numbers.curves for at in curve.points if at.eps == eps]
    text += ", ".join(f"{attack_name(curve.attack)} leaves {percent(at.robust)}" for curve, at in left)
    text += f"; all together {percent(numbers.worst[eps])}." if len(left) > 1 else "."
    text += _weakness(left, best)
    if point.routing_fixed is not None:
        moved = ", ".join(f"{percent(share)} in {name}" for name, share in _shorter(point.moved).items())
        text += f" Under {attack_name(best.attack)} the routes move by {moved}. It leaves {percent(point.right)} right,"
        text += f" with the routing fixed {percent(point.routing_fixed)}."
        text += f" Clean images with the routing transplanted: {percent(point.routing_transplanted)}."
    return text + _choice(numbers.spare)


def _weakness(left: Sequence[tuple[SweepCurve, SweepPoint]], best: SweepCurve) -> str:
    """Returns what the paper's schedule overstates."""
    weak = [at for curve, at in left if curve.attack.startswith(WEAK)]
    if weak and len(weak) == len(left):
        return " Only the paper’s schedule was run, which is weak: this is no robust accuracy to quote."
    gap = weak[0].robust.value - next(at.robust.value for curve, at in left if curve is best) if weak else 0.0
    return f" The paper’s schedule leaves {100 * gap:.1f} points more than the strongest attack." if gap > 0 else ""


def _choice(spare: Sequence[Spare]) -> str:
    random = next((spared for spared in spare if (spared.rule, spared.router) == (RANDOM, "")), None)
    removed = _worst_removal(spare)
    said = [f"random experts keep {percent(random.mean)}"] if random is not None else []
    said += [f"the worst expert to lose leaves {percent(removed)}"] if removed is not None else []
    return f" Clean images, other routes: {'; '.join(said)}." if said else ""


def _worst_removal(spare: Sequence[Spare]) -> float | None:
    """Returns the lowest clean accuracy without one expert of one layer."""
    removed = [spared for spared in spare if spared.rule == WITHOUT]
    single = [spared for spared in removed if spared.router] or removed
    return min((spared.lowest[1].value for spared in single), default=None)


def setting(record: Sweep) -> str:
    """Returns on what, and how."""
    header = record.header
    where = f"{plural(header.n, 'image')} of {header.data} ({header.split}), {NORM_NAMES.get(header.norm, header.norm)}"
    return f"{where}; every attack is made again at each eps, a step size that it names scaled with it."


def _shorter(values: dict[str, float]) -> dict[str, float]:
    """Returns the values by short names of the routers."""
    names = router_names(list(values))
    return {names[name]: value for name, value in values.items()}


# Tables ----------------------------------------------------------------------------------------------------------


def grids(shown: Swept) -> list[Grid]:
    """Returns everything measured, as tables: all attacks, each attack, its routes, redundancy."""
    numbers, norm = shown.summary, shown.record.header.norm
    tables = [_together(numbers, norm)] if len(numbers.curves) > 1 else []
    for curve in numbers.curves:
        tables.append(_curve(numbers, curve, norm))
        tables += [_routes(curve, norm)] if curve.points[0].moved else []
    return tables + ([_redundancy(shown)] if numbers.spare or shown.record.left_out else [])


def _together(numbers: SweepSummary, norm: str) -> Grid:
    head = ("eps", *(attack_name(curve.attack) for curve in numbers.curves), "All together")
    rows: list[tuple[Entry, ...]] = [(("no attack", ""), *[rated(numbers.clean)] * (len(head) - 1))]
    for eps, worst in numbers.worst.items():
        rates = [next((p.robust for p in curve.points if p.eps == eps), None) for curve in numbers.curves]
        rows.append(((eps_text(norm, eps), ""), *((rated(each) if each else ("", "")) for each in rates), rated(worst)))
    return Grid("Robust accuracy, weak beside strong", head, tuple(rows))


def _curve(numbers: SweepSummary, curve: SweepCurve, norm: str) -> Grid:
    routed = curve.points[0].routing_fixed is not None
    routes = ("Right, routing fixed", "Clean images, routing transplanted") if routed else ()
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
                *((rated(point.routing_fixed), rated(point.routing_transplanted)) if routed else ()),
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
    return Grid(
        f"Routes moved by {attack_name(curve.attack)}", ("eps", *router_names(names).values()), tuple(rows), note
    )


def _redundancy(shown: Swept) -> Grid:
    clean = rated(shown.summary.clean)
    rows: list[tuple[Entry, ...]] = [(("the routers’ own", ""), clean, ("", ""), ("", ""), ("", ""))]
    names = list(shown.record.header.routers)
    short = router_names(names)
    for spared in shown.summary.spare:
        rows += _spare_rows(spared, f" in {short[spared.router]}" if spared.router else "", shown)
    note = " ".join(shown.record.left_out)
    head = ("Clean images, other routes", "Right", "Lowest", "Highest", "Same class")
    return Grid("How much the choice of experts matters", head, tuple(rows), note)


def _spare_rows(spared: Spare, where: str, shown: Swept) -> list[tuple[Entry, ...]]:
    """Returns one row; of another k one each."""
    if spared.rule == OTHER_K:
        own = {info.k for info in shown.record.header.routers.values() if info.k < info.experts}
        return [
            ((f"k = {k}{where}", "its own" if own == {k} else ""), rated(rate), ("", ""), ("", ""), _same(spared, k))
            for k, rate in spared.rates.items()
        ]
    every = "" if where or len(shown.record.header.routers) < 2 else " in every layer"
    name, small = {
        RANDOM: ("random experts", f"{plural(shown.record.draws, 'draw')}, weighted by the layer’s rule"),
        KEPT: ("random experts", f"{plural(shown.record.draws, 'draw')}, the route’s weights kept"),
        WITHOUT: ("one expert removed", "mean over the experts"),
    }[spared.rule]
    (low, worst), (high, best) = spared.lowest, spared.highest
    which = "without {}" if spared.rule == WITHOUT else "draw {}"
    return [
        (
            (f"{name}{where or every}", small),
            (percent(spared.mean), ""),
            (percent(worst), which.format(low)),
            (percent(best), which.format(high)),
            _same(spared),
        )
    ]


def _same(spared: Spare, number: int | None = None) -> Entry:
    """Returns the share of images with the model's own class."""
    rates = list(spared.agree.values()) if number is None else [spared.agree[number]]
    return percent(math.fsum(rate.value for rate in rates) / len(rates)), ""


def comparison(every: Sequence[Swept]) -> Grid | None:
    """Returns the swept runs side by side, at radii that all of them have; None for fewer than two."""
    if len(every) < 2:
        return None
    shared = sorted(set.intersection(*(set(shown.summary.worst) for shown in every)))[-SHARED:]
    norm = every[0].record.header.norm
    rows = []
    for shown in every:
        numbers = shown.summary
        random = [spared.mean for spared in numbers.spare if (spared.rule, spared.router) == (RANDOM, "")]
        rows.append(
            (
                (shown.run, ""),
                rated(numbers.clean),
                *(rated(numbers.worst[eps]) for eps in shared),
                (percent(random[0] if random else None), ""),
                (percent(_worst_removal(numbers.spare)), ""),
            )
        )
    attacks = ("attacks", lambda shown: sorted(attack_name(curve.attack) for curve in shown.summary.curves))
    reasons = apart("sweeps", every, DATA, IMAGES, NORM, attacks)
    head = ("Run", "Clean", *(eps_text(norm, eps) for eps in shared), "Random experts", "Worst removal")
    return Grid("The runs side by side, all attacks together", head, tuple(rows), reasons)


# The page --------------------------------------------------------------------------------------------------------


def panel(shown: Swept) -> Panel:
    """Returns everything that is said of a sweep."""
    terms = TERMS if shown.record.header.routers else TERMS[:4]
    return Panel(story(shown), setting(shown.record), grids(shown), terms, figures=lambda: _figures(shown))


def _figures(shown: Swept) -> str:
    moves = _moves(shown)
    kind = "wide" if moves else "joint"
    return f'<div class="plots {kind}" style="margin-top:20px">{_accuracy(shown, bool(moves))}{moves}</div>'


def _axis(every: Sequence[Swept]) -> tuple[float, str]:
    """Returns what an eps is multiplied by, and the label."""
    return eps_axis(every[0].record.header.norm, (point.eps for shown in every for point in shown.record.points))


def _series(
    name: str, number: int, pairs: Sequence[tuple[float, Rate]], dashed: bool = False, run: int | None = None
) -> Series:
    """Returns rates against eps, with their intervals where the line is not dashed."""
    points = tuple((eps, 100 * rate.value) for eps, rate in pairs)
    band = tuple((eps, 100 * rate.interval[0], 100 * rate.interval[1]) for eps, rate in pairs)
    return Series(name, points, number, () if dashed else band, dashed, run=run)


def _accuracy(shown: Swept, beside: bool) -> str:
    """Draws accuracy against eps. ``beside``: it has another figure at its side."""
    numbers, (unit, label) = shown.summary, _axis([shown])
    drawn = [
        _series(
            attack_name(curve.attack),
            colour(at),
            [(0.0, numbers.clean), *((unit * point.eps, point.robust) for point in curve.points)],
        )
        for at, curve in enumerate(numbers.curves)
    ]
    best = numbers.strongest
    if best is not None and best.points[0].routing_fixed is not None:
        fixed = [(unit * point.eps, point.routing_fixed) for point in best.points if point.routing_fixed is not None]
        number = colour(list(numbers.curves).index(best))
        name = f"{attack_name(best.attack)}, routing fixed: right"
        drawn.append(_series(name, number, [(0.0, numbers.clean), *fixed], dashed=True))
    size = NORMAL if beside else LARGE
    return lines("Robust accuracy against eps", drawn, Axes(label, unit="%", y_range=(0.0, 100.0)), size=size)


def _moves(shown: Swept) -> str:
    best, (unit, label) = shown.summary.strongest, _axis([shown])
    if best is None or not best.points[0].moved:
        return ""
    names = list(best.points[0].moved)
    drawn = [
        Series(short, tuple((unit * eps, 100 * share) for eps, share in [(0.0, 0.0), *_shares(best, name)]), colour(at))
        for at, (name, short) in enumerate(list(router_names(names).items())[:DRAWN])
    ]
    more = f" {plural(len(names) - DRAWN, 'more router')} in the table." if len(names) > DRAWN else ""
    note = f"Under {attack_name(best.attack)}; 1 − IoU of the chosen experts, mean.{more}"
    return lines("Routes moved, by layer", drawn, Axes(label, unit="%"), note=note)


def _shares(curve: SweepCurve, router: str) -> list[tuple[float, float]]:
    return [(point.eps, point.moved[router]) for point in curve.points]


def _side_by_side(every: Sequence[Swept]) -> str:
    """Returns every run's robust accuracy, all its attacks together."""
    if len(every) < 2:
        return ""
    unit, label = _axis(every)
    drawn = [
        _series(
            shown.run,
            colour(shown.at),
            [(0.0, shown.summary.clean), *((unit * eps, rate) for eps, rate in shown.summary.worst.items())],
            run=shown.at,
        )
        for shown in every
    ]
    title = "Robust accuracy against eps, all attacks together"
    figure = lines(title, drawn, Axes(label, unit="%", y_range=(0.0, 100.0)), size=LARGE)
    return f'<div class="plots joint">{figure}</div>'


KIND = Kind(
    Sweep,
    "Sweep over eps",
    "The protocol of Puigcerver et al. (NeurIPS 2022), with a strong attack beside theirs. Small print: 95 % Wilson "
    "intervals, in per cent.",
    lambda record, evaluations: sweep_summary(record),
    panel,
    comparison,
    _side_by_side,
    lambda record: "" if record.points else "without an attack yet",
    link="Sweep",
)
