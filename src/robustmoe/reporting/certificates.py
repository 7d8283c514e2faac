"""Certificates as words, tables and figures, for the page, the Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe.analysis import Against, CertificatesSummary, Rate, certificates_summary
from robustmoe.records import Certificates
from robustmoe.reporting.figures import Axes, Series, colour, lines
from robustmoe.reporting.grid import Entry, Grid, rated
from robustmoe.reporting.panel import Kind, Panel, Shown
from robustmoe.reporting.words import NORM_NAMES, duration, eps_axis, eps_text, percent, plural, threat

Certified = Shown[Certificates, CertificatesSummary]
MOST_DOUBTS = 5
"""Wrong certificates that are told one by one."""

OBSTACLES = {
    "route": "the routing: another reachable expert is proven, this one is not",
    "experts": "several reachable experts, none proven",
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
        "reachable expert",
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


def story(shown: Certified) -> str:
    """Returns what is proven, what stands in the way, and what attacks leave, as plain text."""
    record, numbers = shown.record, shown.summary
    said = _smoothed(record, numbers) if record.subject != "model" else _proven(record, numbers)
    return " ".join([said, *_why(record, numbers), *_attacked(record, numbers)])


def _proven(record: Certificates, numbers: CertificatesSummary) -> str:
    header = record.header
    said = (
        f"Of {plural(len(record.rows), 'image')} {percent(numbers.right)} are right, and {percent(numbers.certified)} "
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


def _smoothed(record: Certificates, numbers: CertificatesSummary) -> str:
    header = record.header
    said = (
        f"Of {plural(len(record.rows), 'image')} the smoothed model is right on {percent(numbers.right)}, abstains on "
        f"{percent(numbers.abstained)}, and is proven to stay right within {threat(header.norm, header.eps)} on "
        f"{percent(numbers.certified)}."
    )
    if header.routers and numbers.stable is not None:
        said += f" {percent(numbers.stable)} of the noisy copies take the clean image’s routes."
    return said


def _why(record: Certificates, numbers: CertificatesSummary) -> list[str]:
    """Returns what keeps the right images from being certified, the greatest obstacle first."""
    if not numbers.obstacles:
        return []
    missing = next(iter(numbers.obstacles.values())).n
    shares = {kind: numbers.obstacles.get(kind, Rate(0, missing)) for kind in OBSTACLES}
    crowd = Rate(shares["route"].count + shares["experts"].count, missing)
    said: dict[str, int] = {}
    if crowd.count:
        many = "" if numbers.crowd is None else f" ({numbers.crowd:.1f}{_of(numbers)} on average)"
        sentence = (
            f"on {percent(crowd)} several experts are reachable{many}, and at least one of them is not proven to "
            f"say the label: no bound on the chosen expert alone can help"
        )
        if shares["route"].count:
            sentence += f" (on {percent(shares['route'])} another one is proven, so the route is all that is missing)"
        said[sentence] = crowd.count
    if shares["network"].count:
        share = percent(shares["network"])
        sentence = (
            f"on {share} the route is the same in the whole ball, and the bounds of what it leads to are too loose"
            if record.header.routers
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


def _attacked(record: Certificates, numbers: CertificatesSummary) -> list[str]:
    header = record.header
    if record.subject != "model":
        return [
            "These certificates are of the smoothed model, not of the model that is attacked above: the two are not "
            "compared."
        ]
    attacks = numbers.at(header.eps)
    if attacks is None:
        return [
            f"No attack within {threat(header.norm, header.eps)} was made on these images, so how much more may be "
            "true is not known."
        ]
    images = "these images" if attacks.robust.n == len(record.rows) else f"{plural(attacks.robust.n, 'image')} of these"
    return [
        f"The worst of {plural(len(attacks.attacks), 'attack')} leaves {percent(attacks.robust)} of {images} right, "
        f"and {percent(attacks.certified)} of the same images are certified: the truth is between."
    ]


def doubts(shown: Certified) -> list[str]:
    """Returns what attacks disprove: sentences, none if the certificates stand."""
    numbers, norm = shown.summary, shown.record.header.norm
    said = [
        f"Certified accuracy {percent(each.certified)} is above what the attacks leave, {percent(each.robust)}, within "
        f"{threat(norm, each.eps)}."
        for each in numbers.against
        if each.certified.count > each.robust.count
    ]
    said += [
        f"Image {wrong.index} is certified as {wrong.prediction} up to {NORM_NAMES[norm]} {wrong.radius:.6g}, but "
        + (f"{wrong.attack} makes it {wrong.answer} with {wrong.size:.6g}." if wrong.size else
           f"the model says {wrong.answer} of the clean image ({wrong.attack}).")
        for wrong in numbers.refuted[:MOST_DOUBTS]
    ]  # fmt: skip
    more = len(numbers.refuted) - MOST_DOUBTS
    said += [f"{plural(more, 'more certificate')} of other images or attacks are disproved."] if more > 0 else []
    return said


def setting(record: Certificates) -> str:
    """Returns by what, on what."""
    header = record.header
    done = "" if record.done else f" of {header.n:,} planned"
    return (
        f"{record.certifier} on {plural(len(record.rows), 'image')}{done} of {header.data} ({header.split}), of the "
        f"{record.subject}; {duration(record.seconds / max(len(record.rows), 1))} an image."
    )


# Tables ----------------------------------------------------------------------------------------------------------


def grids(shown: Certified) -> list[Grid]:
    """Returns everything that is proven, as tables: the whole, against radius, what stands in the way, by which
    rule."""
    record, numbers = shown.record, shown.summary
    tables = [_whole(record, numbers), _by_radius(record, numbers)]
    if numbers.obstacles:
        rows = tuple(((OBSTACLES[kind], ""), rated(share)) for kind, share in numbers.obstacles.items())
        missing = next(iter(numbers.obstacles.values())).n
        note = f"Of the {plural(missing, 'image')} that are right and not certified at eps."
        tables.append(Grid("What stands in the way", ("Obstacle", "Images"), rows, note))
    if numbers.rules:
        rows = tuple(((name, ""), rated(share)) for name, share in numbers.rules.items())
        tables.append(Grid("By which rule", ("Rule", "Images"), rows, "The rule that proves an image’s own radius."))
    return tables


def _whole(record: Certificates, numbers: CertificatesSummary) -> Grid:
    header, model = record.header, record.subject == "model"
    rows: list[tuple[Entry, ...]] = [
        (("right", "clean" if model else "smoothed"), rated(numbers.right)),
        (("right and certified", threat(header.norm, header.eps)), rated(numbers.certified)),
    ]
    if header.routers and model:
        rows.append((("certified, route not stable", ""), rated(numbers.unstable)))
        if numbers.reachable is not None:
            rows.append((("reachable experts", "mean"), (f"{numbers.reachable:.2f}{_of(numbers)}", "")))
    if header.routers and numbers.stable is not None:
        words = "images of one route in the whole ball" if model else "noisy copies on the clean routes"
        rows.append(((words, ""), (percent(numbers.stable), "")))
    if not model:
        rows.append((("abstains", ""), rated(numbers.abstained)))
    mean = (f"{numbers.mean_radius:.4g}", f"{NORM_NAMES[header.norm]}, pixels")
    rows += [(("mean radius", "0 where wrong"), mean), (("largest radius", ""), (f"{numbers.largest:.4g}", ""))]
    return Grid(f"What {record.certifier} proves", ("Quantity", "Value"), tuple(rows))


def _by_radius(record: Certificates, numbers: CertificatesSummary) -> Grid:
    """Returns certified accuracy at a few radii, and at each eps that was attacked."""
    norm, shares = record.header.norm, dict(numbers.curve)
    wanted = sorted({*numbers.radii, *(each.eps for each in numbers.against if each.eps in shares)})
    attacked = bool(numbers.against)
    rows = tuple(
        (
            (eps_text(norm, radius), "the certifier’s eps" if radius == record.header.eps else ""),
            rated(shares[radius]),
            *([_left(numbers.at(radius))] if attacked else []),
        )
        for radius in wanted
    )
    head = (f"Radius ({NORM_NAMES[norm]})", "Certified", *(["Attacked"] if attacked else []))
    note = "Attacked: right under every attack at that eps, of the images that were both attacked and certified."
    return Grid("Certified accuracy against radius", head, rows, note if attacked else "")


def _left(attacks: Against | None) -> Entry:
    return (
        ("–", "")
        if attacks is None
        else (percent(attacks.robust), f"of {attacks.robust.n:,}, {plural(len(attacks.attacks), 'attack')}")
    )


def comparison(every: Sequence[Certified]) -> Grid | None:
    """Returns the certifiers side by side; None for fewer than two."""
    if len(every) < 2:
        return None
    several = every[0].several
    rows = tuple(
        (
            (shown.run, shown.record.certifier) if several else (shown.record.certifier, ""),
            rated(shown.summary.right),
            (percent(shown.summary.certified), threat(shown.record.header.norm, shown.record.header.eps)),
            _left(shown.summary.at(shown.record.header.eps)),
            (f"{shown.summary.mean_radius:.4g}", NORM_NAMES[shown.record.header.norm]),
            (shown.record.subject, ""),
        )
        for shown in every
    )
    head = ("Run" if several else "Certifier", "Right", "Certified", "Attacked", "Mean radius", "Of the")
    return Grid("The certifiers side by side", head, rows)


# The page --------------------------------------------------------------------------------------------------------


def panel(shown: Certified) -> Panel:
    """Returns everything that is said of a certifier."""
    return Panel(story(shown), setting(shown.record), grids(shown), TERMS)


def _figures(every: Sequence[Certified]) -> str:
    threats: dict[tuple[str, float], list[Certified]] = {}
    for shown in every:
        threats.setdefault((shown.record.header.norm, shown.record.header.eps), []).append(shown)
    drawn = "".join(map(_figure, threats.values()))
    return f'<div class="plots wide" style="margin-top:20px">{drawn}</div>'


def _figure(every: Sequence[Certified]) -> str:
    """Returns certified accuracy against radius, of certifiers of one norm and eps; dashed: what attacks leave of the
    same images."""
    header = every[0].record.header
    scale = eps_axis(header.norm, [header.eps])[0]
    unit = "" if scale == 1 else " of 1/255"
    several = len({shown.run for shown in every}) > 1
    end = 1.05 * max([header.eps, *(shown.summary.largest for shown in every)])
    series = []
    for at, shown in enumerate(every):
        name = f"{shown.run}, {shown.record.certifier}" if several else shown.record.certifier
        run = shown.at if shown.several else None
        series.append(Series(name, _steps(shown.summary, scale, end), colour(at), dots=False, run=run))
        left = [(scale * each.eps, 100 * each.robust.value) for each in shown.summary.against if each.eps <= end]
        if left:
            clean = (0.0, 100 * shown.summary.against[0].clean.value)
            series.append(Series(f"{name}: attacked", (clean, *left), colour(at), dashed=True, run=run))
    label = f"{NORM_NAMES[header.norm]} radius in pixels{unit}"
    note = "Right and certified at that radius; the upright line is the certifier’s eps."
    if any(line.dashed for line in series):
        note += " Dashed: right under every attack, of the same images."
    title = f"Certified accuracy against radius, {threat(header.norm, header.eps)}"
    return lines(title, series, Axes(label, unit="%", y_range=(0.0, 100.0), mark=scale * header.eps), note=note)


def _steps(numbers: CertificatesSummary, scale: float, end: float) -> tuple[tuple[float, float], ...]:
    """Returns the corners of the step curve: a share holds up to its own radius, and from the last one on there is
    none."""
    points: list[tuple[float, float]] = []
    before = 0.0
    for radius, share in numbers.curve:
        if radius <= end:
            points += [(scale * before, 100 * share.value), (scale * radius, 100 * share.value)]
            before = radius
    last = 0.0 if numbers.largest <= before else points[-1][1]
    return (*points, (scale * before, last), (scale * end, last))


KIND = Kind(
    Certificates,
    "Certificates",
    "What no attack within a radius can change, proven; and what stands in the way of more.",
    certificates_summary,
    panel,
    comparison,
    _figures,
    lambda record: "" if record.rows else "without an image yet",
    doubts=doubts,
)
