"""Certificates as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.analysis import Against, CertificatesSummary, Rate
from robustmoe.records import Certificates
from robustmoe.reporting.collect import Certified, View
from robustmoe.reporting.figures import Series, colour, lines
from robustmoe.reporting.tables import Entry, Grid, grid_html, rated
from robustmoe.reporting.verdict import alarm, held
from robustmoe.reporting.words import NORM_NAMES, duration, eps_text, percent, plural, threat

MOST_DOUBTS = 5
"""Wrong certificates that are told one by one."""

OBSTACLES = {
    "route": "the route: another expert within reach is proven, this one is not",
    "experts": "several experts within reach, none proven",
    "network": "the bounds of the network that answers",
    "formula": "the constants of the mixture",
    "votes": "too few noisy copies agree",
}

TERMS = (
    (
        "certified accuracy at r",
        "the share of images that are right and proven to stay right in the whole ball of radius r. No attack in that "
        "ball can get below it; what attacks leave can only be more.",
    ),
    (
        "within reach",
        "an expert that the bounds do not exclude: somewhere in the ball the router may choose it. A proof must hold "
        "for each of them, or show that the route is the same everywhere.",
    ),
    (
        "smoothed model",
        "another model: the class that the model gives most often under Gaussian noise. Its certificates are true with "
        "the stated probability, and say nothing of the model without the noise.",
    ),
)


# Words -----------------------------------------------------------------------------------------------------------


def story(one: Certified) -> str:
    """What is proven, what stands in the way, and what attacks leave, as plain text."""
    found, numbers = one.record, one.numbers
    said = _smoothed(found, numbers) if found.subject != "model" else _proven(found, numbers)
    return " ".join([said, *_why(found, numbers), *_attacked(found, numbers)])


def _proven(found: Certificates, numbers: CertificatesSummary) -> str:
    header = found.header
    said = (
        f"Of {plural(len(found.rows), 'image')} {percent(numbers.right)} are right, and {percent(numbers.certified)} "
        f"are proven to stay right within {threat(header.norm, header.eps)}."
    )
    if numbers.unstable.count:
        said += f" {percent(numbers.unstable)} are proven although the route is not the same in the whole ball."
    if not numbers.certified.count:
        largest = numbers.largest
        said += (
            f" The largest radius that is proven on any image is {eps_text(header.norm, largest)} "
            f"({percent(largest / header.eps)} of that)."
            if largest
            else " No radius that was tried is proven on any image."
        )
    return said


def _smoothed(found: Certificates, numbers: CertificatesSummary) -> str:
    header = found.header
    said = (
        f"Of {plural(len(found.rows), 'image')} the smoothed model is right on {percent(numbers.right)}, abstains on "
        f"{percent(numbers.abstained)}, and is proven to stay right within {threat(header.norm, header.eps)} on "
        f"{percent(numbers.certified)}."
    )
    if header.routers and numbers.stable is not None:
        said += f" {percent(numbers.stable)} of the noisy copies take the clean image’s routes."
    return said


def _why(found: Certificates, numbers: CertificatesSummary) -> list[str]:
    """What keeps the right images from being certified, the greatest obstacle first."""
    if not numbers.obstacles:
        return []
    missing = next(iter(numbers.obstacles.values())).n
    shares = {kind: numbers.obstacles.get(kind, Rate(0, missing)) for kind in OBSTACLES}
    crowd = Rate(shares["route"].count + shares["experts"].count, missing)
    said: dict[str, int] = {}
    if crowd.count:
        many = "" if numbers.crowd is None else f" ({numbers.crowd:.1f}{_of(numbers)} on average)"
        sentence = (
            f"on {percent(crowd)} several experts are within reach{many}, and at least one of them is not proven to "
            f"say the label: no bound on the chosen expert alone can help"
        )
        if shares["route"].count:
            sentence += f" (on {percent(shares['route'])} another one is proven, so the route is all that is missing)"
        said[sentence] = crowd.count
    if shares["network"].count:
        share = percent(shares["network"])
        sentence = (
            f"on {share} the route is the same in the whole ball, and the bounds of what it leads to are too loose"
            if found.header.routers
            else f"on {share} the bounds of the network are too loose"
        )
        said[f"{sentence}: it needs tighter bounds, or training for certificates"] = shares["network"].count
    if shares["formula"].count:
        sentence = f"on {percent(shares['formula'])} the constants of the mixture are too large for its margin"
        said[sentence] = shares["formula"].count
    if shares["votes"].count:
        said[f"on {percent(shares['votes'])} too few of the noisy copies agree"] = shares["votes"].count
    ordered = sorted(said, key=lambda sentence: -said[sentence])
    return [f"Of the {plural(missing, 'right image')} without a proof: {'; '.join(ordered)}."]


def _of(numbers: CertificatesSummary) -> str:
    return "" if numbers.experts is None else f" of {numbers.experts}"


def _attacked(found: Certificates, numbers: CertificatesSummary) -> list[str]:
    header = found.header
    if found.subject != "model":
        return [
            "These certificates are of the smoothed model, not of the model that is attacked above: the two are not "
            "compared."
        ]
    one = numbers.at(header.eps)
    if one is None:
        return [
            f"No attack within {threat(header.norm, header.eps)} was made on these images, so how much more may be "
            "true is not known."
        ]
    images = "these images" if one.robust.n == len(found.rows) else f"{plural(one.robust.n, 'image')} of these"
    return [
        f"The worst of {plural(len(one.attacks), 'attack')} leaves {percent(one.robust)} of {images} right, and "
        f"{percent(one.certified)} of the same images are certified: the truth is between."
    ]


def doubts(one: Certified) -> list[str]:
    """What attacks disprove: sentences, none if the certificates stand."""
    numbers, norm = one.numbers, one.record.header.norm
    said = [
        f"Certified accuracy {percent(each.certified)} is above what the attacks leave, {percent(each.robust)}, within "
        f"{threat(norm, each.eps)}."
        for each in numbers.against
        if each.certified.count > each.robust.count
    ]
    said += [
        f"Image {wrong.index} is certified as {wrong.prediction} up to {NORM_NAMES[norm]} {wrong.radius:.6g}, but "
        + (f"{wrong.attack} makes it {wrong.found} with {wrong.size:.6g}." if wrong.size else
           f"the model says {wrong.found} of the clean image ({wrong.attack}).")
        for wrong in numbers.refuted[:MOST_DOUBTS]
    ]  # fmt: skip
    more = len(numbers.refuted) - MOST_DOUBTS
    said += [f"{plural(more, 'more certificate')} of other images or attacks are disproved."] if more > 0 else []
    return said


def setting(found: Certificates) -> str:
    """By what, on what."""
    header = found.header
    done = "" if found.done else f" of {header.n:,} planned"
    return (
        f"{found.certifier} on {plural(len(found.rows), 'image')}{done} of {header.data} ({header.split}), of the "
        f"{found.subject}; {duration(found.seconds / max(len(found.rows), 1))} an image."
    )


# Tables ----------------------------------------------------------------------------------------------------------


def grids(one: Certified) -> list[Grid]:
    """Everything that is proven, as tables: the whole, against radius, what stands in the way, by which rule."""
    found, numbers = one.record, one.numbers
    tables = [_whole(found, numbers), _by_radius(found, numbers)]
    if numbers.obstacles:
        rows = tuple(((OBSTACLES[kind], ""), rated(share)) for kind, share in numbers.obstacles.items())
        missing = next(iter(numbers.obstacles.values())).n
        note = f"Of the {plural(missing, 'image')} that are right and not certified at eps."
        tables.append(Grid("What stands in the way", ("Obstacle", "Images"), rows, note))
    if numbers.rules:
        rows = tuple(((name, ""), rated(share)) for name, share in numbers.rules.items())
        tables.append(Grid("By which rule", ("Rule", "Images"), rows, "The rule that proves an image’s own radius."))
    return tables


def _whole(found: Certificates, numbers: CertificatesSummary) -> Grid:
    header, model = found.header, found.subject == "model"
    rows: list[tuple[Entry, ...]] = [
        (("right", "clean" if model else "smoothed"), rated(numbers.right)),
        (("right and certified", threat(header.norm, header.eps)), rated(numbers.certified)),
    ]
    if header.routers and model:
        rows.append((("certified, route not stable", ""), rated(numbers.unstable)))
        if numbers.reachable is not None:
            rows.append((("experts within reach", "mean"), (f"{numbers.reachable:.2f}{_of(numbers)}", "")))
    if header.routers and numbers.stable is not None:
        words = "images of one route in the whole ball" if model else "noisy copies on the clean routes"
        rows.append(((words, ""), (percent(numbers.stable), "")))
    if not model:
        rows.append((("abstains", ""), rated(numbers.abstained)))
    mean = (f"{numbers.mean_radius:.4g}", f"{NORM_NAMES[header.norm]}, pixels")
    rows += [(("mean radius", "0 where wrong"), mean), (("largest radius", ""), (f"{numbers.largest:.4g}", ""))]
    return Grid(f"What {found.certifier} proves", ("Quantity", "Value"), tuple(rows))


def _by_radius(found: Certificates, numbers: CertificatesSummary) -> Grid:
    """Certified accuracy at a few radii, and at each eps that was attacked."""
    norm, shares = found.header.norm, dict(numbers.curve)
    wanted = sorted({*numbers.radii, *(one.eps for one in numbers.against if one.eps in shares)})
    attacked = bool(numbers.against)
    rows = tuple(
        (
            (eps_text(norm, radius), "the certifier’s eps" if radius == found.header.eps else ""),
            rated(shares[radius]),
            *([_left(numbers.at(radius))] if attacked else []),
        )
        for radius in wanted
    )
    head = (f"Radius ({NORM_NAMES[norm]})", "Certified", *(["Attacked"] if attacked else []))
    note = "Attacked: right under every attack at that eps, of the images that were both attacked and certified."
    return Grid("Certified accuracy against radius", head, rows, note if attacked else "")


def _left(one: Against | None) -> Entry:
    return (
        ("–", "")
        if one is None
        else (percent(one.robust), f"of {one.robust.n:,}, {plural(len(one.attacks), 'attack')}")
    )


def comparison(views: Sequence[View]) -> Grid | None:
    """The certifiers side by side; None with fewer than two."""
    there = _there(views)
    if len(there) < 2:
        return None
    rows = tuple(
        (
            (view.name if len(views) > 1 else one.record.certifier, one.record.certifier if len(views) > 1 else ""),
            rated(one.numbers.right),
            (percent(one.numbers.certified), threat(one.record.header.norm, one.record.header.eps)),
            _left(one.numbers.at(one.record.header.eps)),
            (f"{one.numbers.mean_radius:.4g}", NORM_NAMES[one.record.header.norm]),
            (one.record.subject, ""),
        )
        for view, one in there
    )
    head = ("Run" if len(views) > 1 else "Certifier", "Right", "Certified", "Attacked", "Mean radius", "Of the")
    return Grid("The certifiers side by side", head, rows)


def _there(views: Sequence[View]) -> list[tuple[View, Certified]]:
    return [(view, one) for view in views for one in view.certified]


# The page --------------------------------------------------------------------------------------------------------


def section(views: Sequence[View]) -> str:
    """The curves, a card and tables a certifier; "" without any."""
    there = _there(views)
    if not there:
        return ""
    parts = [
        '<h2>Certificates</h2><p class="lead">What no attack within a radius can change, proven; and what stands in '
        "the way of more.</p>"
    ]
    both = comparison(views)
    parts += [grid_html(both)] if both is not None else []
    figures = "".join(_figure(some) for some in _by_threat(there))
    parts.append(f'<div class="plots wide" style="margin-top:20px">{figures}</div>')
    for view, one in there:
        key = f'<i class="dotkey b{colour(views.index(view))}"></i>' if len(views) > 1 else ""
        name = f"{view.name}: {one.record.certifier}" if len(views) > 1 else one.record.certifier
        wrong = alarm("† These certificates are wrong", doubts(one)) if doubts(one) else ""
        tables = "".join(grid_html(grid) for grid in grids(one))
        parts.append(
            f'<div class="cards"><article class="card{" marked" if wrong else ""}">'
            f"<h2>{key}<span>{escape(name)}</span></h2>"
            f'<p class="story">{held(story(one))}</p>{wrong}<p class="note">{held(setting(one.record))}</p></article>'
            f"</div><details{'' if len(there) > 1 else ' open'}><summary>All numbers</summary>{tables}</details>"
        )
    terms = "".join(f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in TERMS)
    return f'{"".join(parts)}<dl class="terms">{terms}</dl>'


def _by_threat(there: Sequence[tuple[View, Certified]]) -> list[list[tuple[View, Certified]]]:
    found: dict[tuple[str, float], list[tuple[View, Certified]]] = {}
    for view, one in there:
        found.setdefault((one.record.header.norm, one.record.header.eps), []).append((view, one))
    return list(found.values())


def _figure(there: Sequence[tuple[View, Certified]]) -> str:
    """Certified accuracy against radius, of certifiers of one norm and eps; dashed: what attacks leave of the same
    images.
    """
    header = there[0][1].record.header
    scale, unit = (255.0, " of 1/255") if header.norm == "linf" else (1.0, "")
    several = len({view.name for view, _ in there}) > 1
    end = 1.05 * max([header.eps, *(one.numbers.largest for _, one in there)])
    series = []
    for at, (view, one) in enumerate(there):
        name = f"{view.name}, {one.record.certifier}" if several else one.record.certifier
        series.append(Series(name, _steps(one.numbers, scale, end), colour(at), dots=False))
        left = [(scale * each.eps, 100 * each.robust.value) for each in one.numbers.against if each.eps <= end]
        if left:
            clean = (0.0, 100 * one.numbers.against[0].clean.value)
            series.append(Series(f"{name}: attacked", (clean, *left), colour(at), dashed=True))
    label = f"{NORM_NAMES[header.norm]} radius in pixels{unit}"
    note = "Right and certified at that radius; the upright line is the certifier’s eps."
    if any(one.dashed for one in series):
        note += " Dashed: right under every attack, of the same images."
    title = f"Certified accuracy against radius, {threat(header.norm, header.eps)}"
    return lines(title, series, label, unit="%", y_range=(0.0, 100.0), note=note, mark=scale * header.eps)


def _steps(numbers: CertificatesSummary, scale: float, end: float) -> tuple[tuple[float, float], ...]:
    """The corners of the step curve: a share holds up to its own radius, and from the last one on there is none."""
    points: list[tuple[float, float]] = []
    before = 0.0
    for radius, share in numbers.curve:
        if radius <= end:
            points += [(scale * before, 100 * share.value), (scale * radius, 100 * share.value)]
            before = radius
    last = 0.0 if numbers.largest <= before else points[-1][1]
    return (*points, (scale * before, last), (scale * end, last))
