"""The table of attacks, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from robustmoe import analysis
from robustmoe.records import Evaluation
from robustmoe.reporting.boxes import run_part
from robustmoe.reporting.collect import Group, RunView, numbered, strongest
from robustmoe.reporting.grid import Entry, Grid, cell, grid_html, rated, run_key
from robustmoe.reporting.words import GLOSSARY, aim, count, duration, gap_text, interval, percent, plural, threat


def section(views: Sequence[RunView]) -> str:
    """Shows the comparison first (several runs), then one table a threat and a run, then the words explained; ""
    without rows."""
    if not any(view.results for view in views):
        return ""
    parts = ["<h2>What each attack leaves</h2>"]
    if len(views) > 1:
        parts.append('<p class="lead">The runs side by side; every attack on its own is listed below.</p>')
        parts.append(_comparison(views))
    parts += [run_part(run, _one(view, run)) for run, view in numbered(views)]
    parts.append(_terms(any(view.routed for view in views)))
    return "".join(parts)


def _one(view: RunView, run: int | None) -> str:
    """Returns the tables of one run, one a threat."""
    heading = (
        "" if run is None else f"<h3>{run_key(run)}{escape(view.name)}{'' if view.routed else ' (no router)'}</h3>"
    )
    parts = [heading]
    for group in view.groups:
        if len(view.groups) > 1:
            parts.append(f"<h3>{escape(threat(group.worst.norm, group.worst.eps))}</h3>")
        parts.append(_attacks(group, view.routed))
        parts += [_suite(*pair) for pair in zip(group.names, group.results, strict=True) if pair[1].header.parts]
    if not view.groups:
        parts.append(f'<p class="lead">{"No attack was run." if view.results else "It has no rows."}</p>')
    return "".join(parts)


def _terms(routed: bool) -> str:
    skip = () if routed else ("router’s part", "experts’ part", "rerouted")
    items = "".join(
        f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in GLOSSARY if term not in skip
    )
    return f'<dl class="terms">{items}</dl>'


# One run ---------------------------------------------------------------------------------------------------------


def _attacks(group: Group, routed: bool) -> str:
    columns = ["Attack", "Clean", "Robust"]
    columns += ["Router’s part", "Experts’ part", "Rerouted"] if routed else []
    columns += ["Broken by it alone", "Images"]
    notes = {
        "Router’s part": "routing transplanted:<br>clean image",
        "Experts’ part": "routing fixed:<br>attacked image",
    }
    head = "".join(
        f'<th scope="col">{escape(name)}{f"<small>{notes[name]}</small>" if name in notes else ""}</th>'
        for name in columns
    )
    body = "".join(
        _attack_row(name, summary, adds, routed)
        for name, summary, adds in zip(group.names, group.summaries, group.worst.adds, strict=True)
    )
    return (
        f'<div class="scroll"><table class="data stack attacks"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot>{_worst_row(group, routed)}</tfoot></table></div>"
    )


def _attack_row(name: str, summary: analysis.EvaluationSummary, adds: analysis.Adds, routed: bool) -> str:
    note = aim(summary.objective) if routed and summary.objective is not None else ""
    state = "" if summary.complete else ' <span class="chip warn">incomplete</span>'
    state += ' <span class="chip fail">check failed</span>' if summary.failed else ""
    first = f'<th scope="row"><code>{escape(name)}</code>{state}<small>{escape(note)}</small></th>'
    cells = [cell("Clean", percent(summary.clean), interval(summary.clean))]
    cells.append(cell("Robust", percent(summary.robust), interval(summary.robust)))
    if routed:
        cells.append(cell("Router’s part", percent(summary.router_exposed), interval(summary.router_exposed)))
        cells.append(cell("Experts’ part", percent(summary.experts_exposed), interval(summary.experts_exposed)))
        broken = f"{percent(summary.rerouted_broken)} broken" if summary.rerouted_broken else ""
        cells.append(cell("Rerouted", percent(summary.rerouted_mean), broken))
    cells.append(cell("Broken by it alone", count(adds.alone), f"of {count(adds.broken)} broken"))
    cells.append(
        cell("Images", count(summary.n), "" if summary.n >= summary.planned else f"of {count(summary.planned)}")
    )
    return f"<tr>{first}{''.join(cells)}</tr>"


def _worst_row(group: Group, routed: bool) -> str:
    worst = group.worst
    trusted = group.verdict.trusted
    title = "Worst case over all of them" if len(group.results) > 1 else "Worst case (one attack)"
    why = "" if trusted else "† doubtful, see the verdict"
    cells = [cell("Clean", percent(worst.clean), interval(worst.clean))]
    cells.append(cell("Robust", percent(worst.robust) + ("" if trusted else "†"), interval(worst.robust)))
    cells += [cell("", "", kind="none")] * (3 if routed else 0)
    cells.append(cell("", "", kind="none"))
    cells.append(cell("Images", count(worst.robust.n)))
    return f'<tr class="worst"><th scope="row">{title}<small>{why}</small></th>{"".join(cells)}</tr>'


def _suite(name: str, result: Evaluation) -> str:
    """Returns the parts of a suite, in order; with attacks that know the router: under two heads, and what they
    cost."""
    title = f'<h3 class="suite"><code>{escape(name)}</code> part by part</h3>'
    parts = analysis.by_part(result)
    if not parts:
        return f'{title}<p class="lead">Told once every image has its row.</p>'
    gap = analysis.routing_gap(result)
    clean = analysis.evaluation_summary(*result).clean
    start = f'<tr><th scope="row">clean</th><td></td>{_left(clean)}</tr>'
    blocks = [("", parts)]
    if gap is not None:
        plain = [part.name in analysis.AUTOATTACK_PARTS for part in parts].index(False)
        blocks = [("AutoAttack", parts[:plain]), ("Attacks that know the router", parts[plain:])]
    body = "".join(
        (f'<tr class="head"><th colspan="4" scope="rowgroup">{head}</th></tr>' if head else "")
        + "".join(_suite_row(part) for part in block)
        for head, block in blocks
    )
    said = f'<p class="gap">{escape(gap_text(gap))}</p>' if gap is not None else ""
    columns = '<th scope="col">Part</th><th scope="col">Broke</th><th scope="col">Left</th>'
    columns += '<th scope="col">95 %</th>'
    return (
        f'{title}<p class="lead">Each part attacks only the images that those above it left.</p>{said}'
        f'<div class="scroll fit"><table class="data tight parts"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{start}{body}</tbody></table></div>"
    )


def _suite_row(part: analysis.Part) -> str:
    kind = "" if part.broken else ' class="idle"'
    return f'<tr{kind}><th scope="row">{escape(part.name)}</th><td>{count(part.broken)}</td>{_left(part.left)}</tr>'


def _left(rate: analysis.Rate) -> str:
    return f'<td>{percent(rate)}</td><td class="soft">{interval(rate)}</td>'


# Several runs ----------------------------------------------------------------------------------------------------


def _comparison(views: Sequence[RunView]) -> str:
    """Returns the runs, one a row; and the attacks, one a row, with what each leaves of each run."""
    columns: list[tuple[str, Callable[[RunView], Entry]]] = [
        ("Clean", lambda view: rated(view.clean) if view.results else ("not measured", "")),
        ("Robust, worst case", _worst_entry),
        ("Router’s part", lambda view: _part(view, "router_exposed")),
        ("Experts’ part", lambda view: _part(view, "experts_exposed")),
        ("Rerouted", _moved),
        ("Router attacked", _attacked),
        ("Threat", _threat),
        ("Parameters", lambda view: (count(view.header.parameters), "")),
        ("Time", lambda view: (duration(view.seconds) if view.seconds else "–", "")),
    ]
    routed = any(view.routed for view in views)
    if not routed:
        columns = [each for each in columns if "part" not in each[0] and "oute" not in each[0]]
    rows = tuple(((view.name, ""), *(entry(view) for _, entry in columns)) for view in views)
    note = "Router’s part, experts’ part and rerouted: under the strongest attack of each run. " if routed else ""
    note += "Time: of the evaluations."
    places = range(len(views))
    tables = grid_html(Grid("Run by run", ("Run", *(name for name, _ in columns)), rows, note), rows=places)
    attacks = list(dict.fromkeys(name for view in views for name in (view.groups[0].names if view.groups else [])))
    if len(attacks) < 2:
        return tables
    by_attack = tuple(((name, ""), *(_under(name, view) for view in views)) for name in attacks)
    head = ("Robust accuracy under", *(view.name for view in views))
    return tables + grid_html(Grid("Attack by attack", head, by_attack), columns=places)


def _threat(view: RunView) -> Entry:
    if not view.results:
        return "–", ""
    return threat(view.header.norm, view.header.eps) if view.groups else "no attack", plural(view.clean.n, "image")


def _worst_entry(view: RunView) -> Entry:
    if not view.groups:
        return "not measured", ""
    group = view.groups[0]
    return percent(group.worst.robust) + ("" if group.verdict.trusted else "†"), interval(group.worst.robust)


def _under(name: str, view: RunView) -> Entry:
    if not view.groups or name not in view.groups[0].names:
        return "–", ""
    summary = view.groups[0].summaries[view.groups[0].names.index(name)]
    return percent(summary.robust), interval(summary.robust) + ("" if summary.complete else ", incomplete")


def _part(view: RunView, field: str) -> Entry:
    if not view.routed or not view.groups:
        return "–", ""
    rate = getattr(view.groups[0].summaries[strongest(view.groups[0])], field)
    return percent(rate), interval(rate)


def _moved(view: RunView) -> Entry:
    if not view.routed or not view.groups:
        return "–", ""
    return percent(view.groups[0].summaries[strongest(view.groups[0])].rerouted_mean), ""


def _attacked(view: RunView) -> Entry:
    if not view.routed:
        return "no router", ""
    return ("yes" if view.groups and view.groups[0].verdict.router_attacked else "no", "")
