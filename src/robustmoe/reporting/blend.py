"""The curve of a dual model over alpha as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.analysis import AlphaPoint, BlendSummary, Paired, Rate, blend_summary
from robustmoe.records import Blend
from robustmoe.reporting.figures import LARGE, NORMAL, Axes, Bar, Cross, Series, Size, colour, crosses, lines
from robustmoe.reporting.grid import Entry, Grid, rated
from robustmoe.reporting.panel import DATA, Kind, Panel, Shown, apart
from robustmoe.reporting.words import count, interval, percent, plural, threat

Blended = Shown[Blend, BlendSummary]
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


def story(shown: Blended) -> str:
    """Returns what the blend keeps at the alpha to look at first, what the halves have alone, and the floor, as plain
    text."""
    point, record = shown.summary.point, shown.record
    text = f"At {_named(point)} ({why(shown)}) the blend gets {percent(point.clean)} right"
    text += f" and keeps {percent(point.robust)}." if point.robust is not None else "; it is not attacked yet."
    for alpha, half in ((0.0, "standard"), (1.0, "robust")):
        alone = [other for other in shown.summary.points if other.alpha == alpha and other is not point]
        if alone:
            kept = f", {percent(alone[0].robust)} attacked" if alone[0].robust is not None else ""
            text += f" The {half} half alone: {percent(alone[0].clean)} clean{kept}."
    text += f" {floor(shown)}"
    if len(shown.summary.attacked) < len(shown.summary.points):
        which = ", ".join(f"{other.alpha:g}" for other in shown.summary.attacked)
        done = f"{len(shown.summary.attacked)} of {plural(len(shown.summary.points), 'alpha')}"
        text += f" Unfinished: {done} attacked{f' ({which})' if which else ''}; "
        text += "the same robustmoe blend command goes on."
    return text if record.attacks or not shown.summary.attacked else f"{text} No attack was made."


def why(shown: Blended) -> str:
    """Returns how the alpha to look at first came to be that."""
    record = shown.record
    if record.chosen == shown.summary.shown:
        if record.wanted is None:
            return "the chosen one"
        return f"the largest with at least {percent(record.wanted)} clean on the validation images"
    near = "the nearest to 0.7" + (
        " of those attacked" if 0 < len(shown.summary.attacked) < len(shown.summary.points) else ""
    )
    if record.wanted is not None:
        return f"{near}; none has the wanted {percent(record.wanted)} clean on the validation images"
    return f"{near}; none was chosen"


def floor(shown: Blended) -> str:
    """Returns what is proven, as a sentence."""
    point = shown.summary.point
    if point.certified is None:
        return "Nothing was certified: the proven floor is 0%."
    if not any(other.certified.count for other in shown.summary.points if other.certified is not None):
        return "The certificate proves no image at any alpha: the proven floor is 0%."
    return f"The certificate proves {percent(point.certified)}, the floor."


def setting(record: Blend) -> str:
    """Returns of what, on what, and against what."""
    header = record.header
    sharpened = f", the robust half sharpened by {record.sharpen}" if record.sharpen else ""
    where = f"{plural(len(record.index), 'image')} of {header.data} ({header.split}), {threat(header.norm, header.eps)}"
    made = f"; attacks made from {header.attack}" if header.attack else ""
    return (
        f"Standard half: {record.standard}; robust half: {record.robust}; {record.mix} mixed{sharpened}; {where}{made}."
    )


def doubts(shown: Blended) -> list[str]:
    """Returns certified images that did not hold, as sentences."""
    return [
        f"At {_named(point)}, {plural(point.disproven, 'image')} counted as proven did not hold: the certificate is "
        "wrong."
        for point in shown.summary.points
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
    """Returns "−2.0 points", its interval; a dash where it is not known."""
    if change is None:
        return "–", ""
    low, high = (_signed(edge) for edge in change.interval)
    return f"{_signed(change.value)} points", f"{low} to {high}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


# Tables ----------------------------------------------------------------------------------------------------------


def grids(shown: Blended) -> list[Grid]:
    """Returns every alpha; what broke it; and against the largest alpha, image by image."""
    return [
        _rates(shown),
        *([_breaks(shown)] if shown.record.attacks and shown.summary.attacked else []),
        _changes(shown),
    ]


def _row(point: AlphaPoint, *entries: Entry) -> tuple[Entry, ...]:
    return ((f"{point.alpha:g}", _half(point.alpha)), *entries)


def _rates(shown: Blended) -> Grid:
    record = shown.record
    head = ["Alpha", "Clean", "Robust"]
    head += ["Certified"] if record.certified else []
    head += ["Margin needed"] + (["Clean, validation"] if record.validation else [])
    rows = []
    for point in shown.summary.points:
        entries = [rated(point.clean), rated(point.robust) if point.robust is not None else ("not attacked yet", "")]
        entries += [rated(point.certified)] if record.certified else []
        entries += [_needed(point)] + ([(percent(point.validation), "")] if record.validation else [])
        rows.append(_row(point, *entries))
    strong = f"{shown.summary.shown:g}"
    return Grid("Each alpha", tuple(head), tuple(rows), f"In bold: {why(shown)}. {floor(shown)}", strong)


def _breaks(shown: Blended) -> Grid:
    rows = []
    for point in shown.summary.attacked:
        assert point.robust is not None
        assert point.broke is not None
        wrong = point.clean.n - point.clean.count
        numbers = [wrong, *(number for number in point.broke.values()), point.robust.count]
        rows.append(_row(point, *((count(number), "") for number in numbers)))
    head = ("Alpha", "Wrong when clean", *shown.record.attacks, "Left")
    return Grid("Images broken first by", head, tuple(rows), "", f"{shown.summary.shown:g}")


def _changes(shown: Blended) -> Grid:
    rows = []
    for point in shown.summary.points[:-1]:
        entries = []
        for change in (point.clean_change, point.robust_change):
            counts = [count(change.gained), count(change.lost)] if change is not None else ["–", "–"]
            entries += [*((text, "") for text in counts), _points(change)]
        rows.append(_row(point, *entries))
    head = ("Alpha", "Clean gained", "Clean lost", "Clean change", "Robust gained", "Robust lost", "Robust change")
    return Grid(f"Against {_last(shown)}", head, tuple(rows), "", f"{shown.summary.shown:g}")


def _last(shown: Blended) -> str:
    point = shown.summary.points[-1]
    half = _half(point.alpha)
    return _named(point) + (f", {half}" if half else "")


def comparison(every: Sequence[Blended]) -> Grid | None:
    """Returns the curves side by side, at the alpha to look at first; None for fewer than two."""
    if len(every) < 2:
        return None
    rows = []
    for shown in every:
        point = shown.summary.point
        proven = rated(point.certified) if point.certified is not None else ("–", "floor 0%")
        picked = "chosen" if point.alpha == shown.record.chosen else "none chosen"
        entries = [(f"{point.alpha:g}", picked), rated(point.clean), rated(point.robust), proven]
        rows.append(((shown.run, f"{shown.record.standard} with {shown.record.robust}"), *entries))
    reasons = apart(
        "curves",
        every,
        DATA,
        ("images", lambda shown: shown.record.index),
        ("threats", lambda shown: (shown.record.header.norm, shown.record.header.eps)),
        ("attacks", lambda shown: (shown.record.header.attack, shown.record.attacks)),
    )
    return Grid("The curves side by side", ("Run", "Alpha", "Clean", "Robust", "Certified"), tuple(rows), reasons)


# The page --------------------------------------------------------------------------------------------------------


def panel(shown: Blended) -> Panel:
    """Returns everything that is said of a curve over alpha."""
    return Panel(
        story(shown),
        setting(shown.record),
        grids(shown),
        TERMS,
        card=lambda: _dial(shown),
        figures=lambda: _figures(shown),
    )


def _figures(shown: Blended) -> str:
    drawn = _trade([shown], NORMAL) + _against_alpha(shown, NORMAL)
    return f'<div class="plots wide" style="margin-top:20px">{drawn}</div>'


def _joint(every: Sequence[Blended]) -> str:
    return f'<div class="joint">{_trade(every, LARGE)}</div>' if len(every) > 1 else ""


def _bar(rate: Rate) -> Bar:
    low, high = rate.interval
    return 100 * rate.value, 100 * low, 100 * high


def _trade(every: Sequence[Blended], size: Size) -> str:
    """Returns robust against clean accuracy, one cross an attacked alpha; certified floors dashed."""
    named = len(every) > 1
    curves, floors, bare = [], [], []
    runs: dict[str, int] = {}
    for shown in every:
        first = shown.summary.point
        marks = [
            Cross(f"{point.alpha:g}", _bar(point.clean), _bar(point.robust), point is first)
            for point in shown.summary.attacked
            if point.robust is not None
        ]
        proven = [
            (100 * p.clean.value, 100 * p.certified.value) for p in shown.summary.points if p.certified is not None
        ]
        who = f"{shown.run}: " if named else ""
        runs |= {f"{who}{what}": shown.at for what in ("under attack", "certified") if named}
        curves += [(f"{who}under attack", colour(shown.at), marks)] if marks else []
        if any(y for _, y in proven):
            floors.append((f"{who}certified", colour(shown.at) if named else 3, proven))
        else:
            bare.append(shown.run)
    if not curves:
        return ""
    whose = f" of {' and '.join(bare)}" if named and bare else ""
    note = f"Beside each point its alpha; ringed: {'the alphas' if named else 'the alpha'} to look at first."
    note += f" Nothing{whose} is certified: the proven floor is 0%." if bare else ""
    return crosses("Robust against clean accuracy", curves, floors, AXES, note, size, runs)


def _against_alpha(shown: Blended, size: Size) -> str:
    """Draws clean, robust, certified and validation accuracy against alpha."""

    def series(name: str, number: int, pairs: Sequence[tuple[float, Rate | None]]) -> Series:
        bars = [(alpha, _bar(rate)) for alpha, rate in pairs if rate is not None]
        band = tuple((alpha, low, high) for alpha, (_, low, high) in bars)
        return Series(name, tuple((alpha, bar[0]) for alpha, bar in bars), number, band)

    drawn = [
        series("clean", 1, [(point.alpha, point.clean) for point in shown.summary.points]),
        series("robust", 2, [(point.alpha, point.robust) for point in shown.summary.points]),
        series("certified", 3, [(point.alpha, point.certified) for point in shown.summary.points]),
    ]
    held = tuple(
        (point.alpha, 100 * point.validation) for point in shown.summary.points if point.validation is not None
    )
    drawn.append(Series("clean, validation images", held, 4, dashed=True))
    at = shown.summary.shown
    note = f"Upright: alpha {at:g}, {why(shown)}."
    axes = Axes("alpha", unit="%", y_range=(0.0, 100.0), mark=at)
    return lines("Accuracy against alpha", drawn, axes, note=note, size=size)


# The dial --------------------------------------------------------------------------------------------------------


def _dial(shown: Blended) -> str:
    """Returns one radio button an alpha, drawn as the stops of a slider, and its panel, shown while it is the one
    checked."""
    stops = "".join(
        f'<input type="radio" name="alpha-{shown.at}" id="alpha-{shown.at}-{place}"'
        f"{' checked' if point is shown.summary.point else ''}/>"
        f'<label for="alpha-{shown.at}-{place}"{_stop_kind(shown, point)}>{point.alpha:g}</label>'
        f'<div class="panel">{_panel(shown, point)}</div>'
        for place, point in enumerate(shown.summary.points)
    )
    return f'<fieldset class="dial"><legend>Move alpha</legend><div class="stops">{stops}</div></fieldset>'


def _stop_kind(shown: Blended, point: AlphaPoint) -> str:
    return ' class="chosen"' if point.alpha == shown.record.chosen else ""


def _panel(shown: Blended, point: AlphaPoint) -> str:
    chips = [text for text in (_half(point.alpha), "chosen" if point.alpha == shown.record.chosen else "") if text]
    chips += ["not attacked yet"] if point.robust is None else []
    said = "".join(f' <span class="chip">{escape(text)}</span>' for text in chips)
    more = f'<div class="more">{_broken(point)}{_changed(shown, point)}</div>'
    return f"<h3>Alpha {point.alpha:g}{said}</h3>{_shares(point)}{_numbers(point)}{more}"


def _shares(point: AlphaPoint) -> str:
    """Draws clean, robust and certified accuracy as one bar."""
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


def _changed(shown: Blended, point: AlphaPoint) -> str:
    """Returns what changes against the largest alpha, image by image."""
    if point is shown.summary.points[-1]:
        return ""
    body = ""
    for name, change in (("clean", point.clean_change), ("robust", point.robust_change)):
        value, between = _points(change)
        note = "" if change is None else f"{count(change.gained)} gained, {count(change.lost)} lost; 95 %: {between}"
        body += f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
    return f'<div><h4>Against {escape(_last(shown))}</h4><dl class="figures">{body}</dl></div>'


def _broken(point: AlphaPoint) -> str:
    """Returns where the images go: wrong when clean, broken first by each attack, left."""
    if point.robust is None or point.broke is None:
        return ""
    n = point.clean.n
    numbers = [("wrong when clean", n - point.clean.count), *point.broke.items(), ("left", point.robust.count)]
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


KIND = Kind(
    Blend,
    "Clean against robust, over alpha",
    "A standard and a robust model answer together; alpha is the robust one’s share. Bars and bands: 95 % Wilson "
    "intervals.",
    lambda record, evaluations: blend_summary(record),
    panel,
    comparison,
    _joint,
    lambda record: "" if record.alphas and record.index else "empty",
    doubts=doubts,
    link="Over alpha",
)
