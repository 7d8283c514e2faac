"""The curve of a dual model over alpha as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from robustmoe.analysis import AlphaPoint, Paired, Rate
from robustmoe.records import Blend
from robustmoe.reporting.collect import Blended, View
from robustmoe.reporting.figures import LARGE, NORMAL, Bar, Cross, Series, Size, colour, crosses, lines
from robustmoe.reporting.tables import Entry, Grid, grid_html, rated
from robustmoe.reporting.verdict import alarm, held
from robustmoe.reporting.words import count, interval, percent, plural, threat

AXES = ("clean accuracy", "robust accuracy")
TERMS = (
    ("alpha", "the robust half’s share of the blend. 0: the standard half alone; 1: the robust half alone."),
    ("robust", "the share of images that are right when clean and that none of the attacks broke at that alpha."),
    (
        "broken first by",
        "the attacks come in the order of the table, each on the images that are left, so an image counts for the "
        "first that broke it.",
    ),
    (
        "certified",
        "proven right in the whole ball, against every attack: the floor under robust accuracy. Robust accuracy "
        "itself is a ceiling, which a stronger attack may lower.",
    ),
    (
        "margin needed",
        "how far the robust half’s class must lead every other, in probabilities and in the whole ball, for the blend "
        "to be proven whatever the standard half says: more than (1 − alpha) / alpha. No lead is above 1, so at alpha "
        "0.5 and below nothing can be proven this way.",
    ),
    (
        "gained, lost",
        "images that this alpha has right and the largest alpha has not, and the reverse, counted image by image. The "
        "interval of the difference is of such pairs (Agresti and Min, 2005).",
    ),
)


# Words -----------------------------------------------------------------------------------------------------------


def story(one: Blended) -> str:
    """What the blend keeps at the alpha to look at first, what the halves have alone, and the floor, as plain text."""
    point, found = one.points[one.shown], one.record
    text = f"At {_named(point)} ({why(one)}) the blend gets {percent(point.clean)} right"
    text += f" and keeps {percent(point.robust)}." if point.robust is not None else "; it is not attacked yet."
    for alpha, half in ((0.0, "standard"), (1.0, "robust")):
        alone = [other for other in one.points if other.alpha == alpha and other is not point]
        if alone:
            kept = f", {percent(alone[0].robust)} attacked" if alone[0].robust is not None else ""
            text += f" The {half} half alone: {percent(alone[0].clean)} clean{kept}."
    text += f" {floor(one)}"
    if len(one.attacked) < len(one.points):
        which = ", ".join(f"{other.alpha:g}" for other in one.attacked)
        done = f"{len(one.attacked)} of {plural(len(one.points), 'alpha')}"
        text += f" Unfinished: {done} attacked{f' ({which})' if which else ''}; "
        text += "the same robustmoe blend command goes on."
    return text if found.attacks or not one.attacked else f"{text} No attack was made."


def why(one: Blended) -> str:
    """How the alpha to look at first came to be that."""
    found = one.record
    if found.chosen == one.points[one.shown].alpha:
        if found.wanted is None:
            return "the chosen one"
        return f"the largest with at least {percent(found.wanted)} clean on the validation images"
    near = "the nearest to 0.7" + (" of those attacked" if 0 < len(one.attacked) < len(one.points) else "")
    if found.wanted is not None:
        return f"{near}; none has the wanted {percent(found.wanted)} clean on the validation images"
    return f"{near}; none was chosen"


def floor(one: Blended) -> str:
    """What is proven, as a sentence."""
    point = one.points[one.shown]
    if point.certified is None:
        return "Nothing was certified: the proven floor is 0%."
    if not any(other.certified.count for other in one.points if other.certified is not None):
        return "The certificate proves no image at any alpha: the proven floor is 0%."
    return f"The certificate proves {percent(point.certified)}, the floor."


def setting(found: Blend) -> str:
    """Of what, on what, and against what."""
    header = found.header
    sharpened = f", the robust half sharpened by {found.sharpen}" if found.sharpen else ""
    where = f"{plural(len(found.index), 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    made = f"; attacks made from {header.attack}" if header.attack else ""
    return f"Standard half: {found.standard}; robust half: {found.robust}; {found.mix} mixed{sharpened}; {where}{made}."


def doubts(one: Blended) -> list[str]:
    """Certified images that did not hold, as sentences."""
    return [
        f"At {_named(point)}, {plural(point.disproven, 'image')} counted as proven did not hold: the certificate is "
        "wrong."
        for point in one.points
        if point.disproven
    ]


def _named(point: AlphaPoint) -> str:
    return f"alpha {point.alpha:g}"


def _half(alpha: float) -> str:
    return {0.0: "the standard half alone", 1.0: "the robust half alone"}.get(alpha, "")


def _needed(point: AlphaPoint) -> Entry:
    if point.threshold is None:
        return "–", "logits: none suffices"
    return (f"above {round(point.threshold, 3):g}", "") if point.provable else ("–", "none suffices")


def _points(change: Paired | None) -> Entry:
    """ "−2.0 points", its interval; a dash where it is not known."""
    if change is None:
        return "–", ""
    low, high = (_signed(edge) for edge in change.interval)
    return f"{_signed(change.value)} points", f"{low} to {high}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Blended) -> list[Grid]:
    """Every alpha; what broke it; and against the largest alpha, image by image."""
    return [_rates(one), *([_breaks(one)] if one.record.attacks and one.attacked else []), _changes(one)]


def _row(one: Blended, point: AlphaPoint, *entries: Entry) -> tuple[Entry, ...]:
    return ((f"{point.alpha:g}", _half(point.alpha)), *entries)


def _rates(one: Blended) -> Grid:
    found = one.record
    head = ["Alpha", "Clean", "Robust"]
    head += ["Certified"] if found.certified else []
    head += ["Margin needed"] + (["Clean, validation"] if found.validation else [])
    rows = []
    for point in one.points:
        entries = [rated(point.clean), rated(point.robust) if point.robust is not None else ("not attacked yet", "")]
        entries += [rated(point.certified)] if found.certified else []
        entries += [_needed(point)] + ([(percent(point.validation), "")] if found.validation else [])
        rows.append(_row(one, point, *entries))
    strong = f"{one.points[one.shown].alpha:g}"
    return Grid("Each alpha", tuple(head), tuple(rows), f"In bold: {why(one)}. {floor(one)}", strong)


def _breaks(one: Blended) -> Grid:
    rows = []
    for point in one.attacked:
        assert point.robust is not None
        assert point.broke is not None
        wrong = point.clean.n - point.clean.count
        numbers = [wrong, *(number for _, number in point.broke), point.robust.count]
        rows.append(_row(one, point, *((count(number), "") for number in numbers)))
    head = ("Alpha", "Wrong when clean", *one.record.attacks, "Left")
    return Grid("Images broken first by", head, tuple(rows), "", f"{one.points[one.shown].alpha:g}")


def _changes(one: Blended) -> Grid:
    rows = []
    for point in one.points[:-1]:
        entries = []
        for change in (point.clean_change, point.robust_change):
            counts = [count(change.gained), count(change.lost)] if change is not None else ["–", "–"]
            entries += [*((text, "") for text in counts), _points(change)]
        rows.append(_row(one, point, *entries))
    head = ("Alpha", "Clean gained", "Clean lost", "Clean change", "Robust gained", "Robust lost", "Robust change")
    return Grid(f"Against {_last(one)}", head, tuple(rows), "", f"{one.points[one.shown].alpha:g}")


def _last(one: Blended) -> str:
    point = one.points[-1]
    half = _half(point.alpha)
    return _named(point) + (f", {half}" if half else "")


def comparison(views: Sequence[View]) -> Grid | None:
    """The curves side by side, at the alpha to look at first; None for fewer than two."""
    both = _there(views)
    if len(both) < 2:
        return None
    rows = []
    for _, view, one in both:
        point = one.points[one.shown]
        proven = rated(point.certified) if point.certified is not None else ("–", "floor 0%")
        picked = "chosen" if point.alpha == one.record.chosen else "none chosen"
        entries = [(f"{point.alpha:g}", picked), rated(point.clean), rated(point.robust), proven]
        rows.append(((view.name, f"{one.record.standard} with {one.record.robust}"), *entries))
    return Grid(
        "The curves side by side",
        ("Run", "Alpha", "Clean", "Robust", "Certified"),
        tuple(rows),
        "; ".join(_apart([one.record for _, _, one in both])),
    )


def _apart(found: Sequence[Blend]) -> list[str]:
    """Why curves cannot be compared number by number."""
    sides = (
        ("data sets", [one.header.data_hash for one in found]),
        ("images", [one.index for one in found]),
        ("threats", [(one.header.norm, one.header.eps) for one in found]),
        ("attacks", [(one.header.attack, one.attacks) for one in found]),
    )
    return [
        f"these curves are of different {words}" for words, values in sides if any(one != values[0] for one in values)
    ]


def _there(views: Sequence[View]) -> list[tuple[int, View, Blended]]:
    return [(at, view, view.blended) for at, view in enumerate(views) if view.blended is not None]


# The page --------------------------------------------------------------------------------------------------------


def section(views: Sequence[View]) -> str:
    """The curves in one figure, if there are several; then each with its dial, figures and tables; "" without any."""
    there = _there(views)
    if not there:
        return ""
    parts = [
        '<h2>Clean against robust, over alpha</h2><p class="lead">A standard and a robust model answer together; alpha '
        "is the robust one’s share. Bars and bands: 95 % Wilson intervals.</p>"
    ]
    both = comparison(views)
    if both is not None:
        parts += [alarm("Compare with care", [both.note], mild=True)] if both.note else []
        parts.append(f'<div class="joint">{_trade(there, len(views) > 1, LARGE)}</div>')
        parts.append(grid_html(replace(both, note="")))
    for at, view, one in there:
        key = f'<h2><i class="dotkey b{colour(at)}"></i><span>{escape(view.name)}</span></h2>'
        wrong = alarm("† Do not quote the certified accuracy", doubts(one)) if doubts(one) else ""
        parts.append(
            f'<div class="cards"><article class="card">{key if len(views) > 1 else ""}'
            f'<p class="story">{escape(story(one))}</p>{wrong}{_dial(at, one)}'
            f'<p class="note">{held(setting(one.record))}</p></article></div>'
        )
        if both is None:
            figures, kind = _trade([(at, view, one)], False, NORMAL) + _against_alpha(one, NORMAL), "plots wide"
        else:
            figures, kind = _against_alpha(one, LARGE), "joint"
        parts.append(f'<div class="{kind}" style="margin-top:20px">{figures}</div>')
        tables = "".join(grid_html(grid) for grid in grids(one))
        parts.append(f"<details{'' if len(there) > 1 else ' open'}><summary>All numbers</summary>{tables}</details>")
    terms = "".join(f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in TERMS)
    return f'{"".join(parts)}<dl class="terms">{terms}</dl>'


def _bar(rate: Rate) -> Bar:
    low, high = rate.interval
    return 100 * rate.value, 100 * low, 100 * high


def _trade(there: Sequence[tuple[int, View, Blended]], named: bool, size: Size) -> str:
    """Robust against clean accuracy, one cross an attacked alpha; certified floors dashed."""
    curves, floors, bare = [], [], []
    for at, view, one in there:
        shown = one.points[one.shown]
        marks = [
            Cross(f"{point.alpha:g}", _bar(point.clean), _bar(point.robust), point is shown)
            for point in one.attacked
            if point.robust is not None
        ]
        proven = [(100 * p.clean.value, 100 * p.certified.value) for p in one.points if p.certified is not None]
        who = f"{view.name}: " if named else ""
        curves += [(f"{who}under attack", colour(at), marks)] if marks else []
        if any(y for _, y in proven):
            floors.append((f"{who}certified", colour(at) if named else 3, proven))
        else:
            bare.append(view.name)
    if not curves:
        return ""
    whose = f" of {' and '.join(bare)}" if named and bare else ""
    note = f"Beside each point its alpha; ringed: {'the alphas' if len(there) > 1 else 'the alpha'} to look at first."
    note += f" Nothing{whose} is certified: the proven floor is 0%." if bare else ""
    return crosses("Robust against clean accuracy", curves, floors, AXES, note, size)


def _against_alpha(one: Blended, size: Size) -> str:
    """Clean, robust, certified and validation accuracy against alpha."""

    def series(name: str, number: int, pairs: Sequence[tuple[float, Rate | None]]) -> Series:
        bars = [(alpha, _bar(rate)) for alpha, rate in pairs if rate is not None]
        band = tuple((alpha, low, high) for alpha, (_, low, high) in bars)
        return Series(name, tuple((alpha, bar[0]) for alpha, bar in bars), number, band)

    drawn = [
        series("clean", 1, [(point.alpha, point.clean) for point in one.points]),
        series("robust", 2, [(point.alpha, point.robust) for point in one.points]),
        series("certified", 3, [(point.alpha, point.certified) for point in one.points]),
    ]
    held = tuple((point.alpha, 100 * point.validation) for point in one.points if point.validation is not None)
    drawn.append(Series("clean, validation images", held, 4, dashed=True))
    at = one.points[one.shown].alpha
    note = f"Upright: alpha {at:g}, {why(one)}."
    return lines(
        "Accuracy against alpha", drawn, "alpha", unit="%", y_range=(0.0, 100.0), note=note, size=size, mark=at
    )


# The dial --------------------------------------------------------------------------------------------------------


def _dial(at: int, one: Blended) -> str:
    """One radio button an alpha, drawn as the stops of a slider, and its panel, shown while it is the one checked."""
    stops = "".join(
        f'<input type="radio" name="alpha-{at}" id="alpha-{at}-{place}"{" checked" if place == one.shown else ""}/>'
        f'<label for="alpha-{at}-{place}"{_stop_kind(one, point)}>{point.alpha:g}</label>'
        f'<div class="panel">{_panel(one, point)}</div>'
        for place, point in enumerate(one.points)
    )
    return f'<fieldset class="dial"><legend>Move alpha</legend><div class="stops">{stops}</div></fieldset>'


def _stop_kind(one: Blended, point: AlphaPoint) -> str:
    return ' class="chosen"' if point.alpha == one.record.chosen else ""


def _panel(one: Blended, point: AlphaPoint) -> str:
    chips = [text for text in (_half(point.alpha), "chosen" if point.alpha == one.record.chosen else "") if text]
    chips += ["not attacked yet"] if point.robust is None else []
    said = "".join(f' <span class="chip">{escape(text)}</span>' for text in chips)
    more = f'<div class="more">{_broken(point)}{_changed(one, point)}</div>'
    return f"<h3>Alpha {point.alpha:g}{said}</h3>{_shares(point)}{_numbers(point)}{more}"


def _shares(point: AlphaPoint) -> str:
    """Clean, robust and certified as one bar."""
    alt = f"clean {percent(point.clean)}"
    parts = [f'<div class="fill lost b1" style="width:{100 * point.clean.value:.2f}%"></div>']
    for rate, words, number in ((point.robust, "robust", 2), (point.certified, "certified", 3)):
        if rate is not None:
            alt += f", {words} {percent(rate)}"
            parts.append(f'<div class="fill b{number}" style="width:{100 * rate.value:.2f}%"></div>')
    return f'<div class="bar"><div class="track" role="img" aria-label="{escape(alt)}">{"".join(parts)}</div></div>'


def _numbers(point: AlphaPoint) -> str:
    def of(rate: Rate | None) -> str:
        return "" if rate is None else f"95 %: {interval(rate)}"

    proven = (
        ("0%", "nothing was certified") if point.certified is None else (percent(point.certified), of(point.certified))
    )
    cells = [
        ("Clean", "big", percent(point.clean), of(point.clean), 1),
        ("Robust", "big", percent(point.robust), of(point.robust) or "not attacked yet", 2),
        ("Certified floor", "big", *proven, 3),
        ("Margin needed", "word", *_needed(point), 0),
    ]
    if point.validation is not None:
        cells.append(("Clean, validation", "word", percent(point.validation), "by which alpha is chosen", 0))
    body = ""
    for name, kind, value, note, number in cells:
        dot = f'<i class="dotkey b{number}"></i> ' if number else ""
        said = f"{escape(value)}<small>{escape(note)}</small>"
        body += f'<div><dt>{dot}{escape(name)}</dt><dd class="{kind}">{said}</dd></div>'
    return f'<dl class="figures">{body}</dl>'


def _changed(one: Blended, point: AlphaPoint) -> str:
    """What changes against the largest alpha, image by image."""
    if point is one.points[-1]:
        return ""
    body = ""
    for name, change in (("clean", point.clean_change), ("robust", point.robust_change)):
        value, between = _points(change)
        note = "" if change is None else f"{count(change.gained)} gained, {count(change.lost)} lost; 95 %: {between}"
        body += f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
    return f'<div><h4>Against {escape(_last(one))}</h4><dl class="figures">{body}</dl></div>'


def _broken(point: AlphaPoint) -> str:
    """Where the images go: wrong when clean, broken first by each attack, left."""
    if point.robust is None or point.broke is None:
        return ""
    n = point.clean.n
    numbers = [("wrong when clean", n - point.clean.count), *point.broke, ("left", point.robust.count)]
    rows = "".join(
        f'<tr class="{"plain" if number else "idle"}"><th scope="row">{escape(name)}</th><td>{count(number)}</td>'
        f"<td>{percent(number / n)}</td></tr>"
        for name, number in numbers
    )
    head = '<th scope="col">Broken first by</th><th scope="col">Images</th><th scope="col">Share</th>'
    return (
        f'<div class="scroll fit"><table class="data tight parts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
