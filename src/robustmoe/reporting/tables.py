"""The table of attacks, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from robustmoe import analysis
from robustmoe.records import Evaluation
from robustmoe.reporting.collect import Group, RunView, strongest
from robustmoe.reporting.figures import colour
from robustmoe.reporting.grid import Entry, cell, rated
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
    routed = any(view.routed for view in views)
    for position, view in enumerate(views):
        if len(views) > 1:
            key = f'<i class="dotkey b{colour(position)}"></i>'
            parts.append(f"<h3>{key} {escape(view.name)}{'' if view.routed else ' (no router)'}</h3>")
        for group in view.groups:
            if len(view.groups) > 1:
                parts.append(f"<h3>{escape(threat(group.worst.norm, group.worst.eps))}</h3>")
            parts.append(_attacks(group, view.routed))
            parts += [_suite(*pair) for pair in zip(group.names, group.results, strict=True) if pair[1].header.parts]
        if not view.groups:
            parts.append(f'<p class="lead">{"No attack was run." if view.results else "It has no rows."}</p>')
    parts.append(_terms(routed))
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
        f"<tbody>{body}{_worst_row(group, routed)}</tbody></table></div>"
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
    rows: list[tuple[str, Callable[[RunView], Entry], bool]] = [
        ("Clean accuracy", lambda view: rated(view.clean) if view.results else ("not measured", ""), False),
        ("Robust accuracy, worst case", _worst_entry, True),
    ]
    labels = list(dict.fromkeys(name for view in views for name in (view.groups[0].names if view.groups else [])))
    rows += [(f"under {name}", _under(name), False) for name in labels]
    rows += [
        ("Router’s part, strongest attack", lambda view: _part(view, "router_exposed"), False),
        ("Experts’ part, strongest attack", lambda view: _part(view, "experts_exposed"), False),
        ("Rerouted, strongest attack", _moved, False),
        ("Router attacked", _attacked, False),
        ("Threat", lambda view: (threat(view.header.norm, view.header.eps), ""), False),
        ("Images", lambda view: (count(view.clean.n) if view.results else "–", ""), False),
        ("Parameters", lambda view: (count(view.header.parameters), ""), False),
        ("Time of the evaluations", lambda view: (duration(view.seconds) if view.seconds else "–", ""), False),
    ]
    if not any(view.routed for view in views):
        rows = [row for row in rows if "part" not in row[0] and "oute" not in row[0]]
    head = "".join(
        f'<th scope="col"><i class="dotkey b{colour(at)}"></i> {escape(view.name)}</th>'
        for at, view in enumerate(views)
    )
    body = "".join(
        f'<tr class="{"worst" if strong else "plain"}"><th scope="row">{escape(title)}</th>'
        + "".join(cell(view.name, *entry(view)) for view in views)
        + "</tr>"
        for title, entry, strong in rows
    )
    return (
        f'<div class="scroll"><table class="data stack"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _worst_entry(view: RunView) -> Entry:
    if not view.groups:
        return "not measured", ""
    group = view.groups[0]
    note = f"{interval(group.worst.robust)}, over {plural(len(group.results), 'attack')}"
    return percent(group.worst.robust) + ("" if group.verdict.trusted else "†"), note


def _under(name: str) -> Callable[[RunView], Entry]:
    def entry(view: RunView) -> Entry:
        if not view.groups or name not in view.groups[0].names:
            return "–", ""
        group = view.groups[0]
        summary = group.summaries[group.names.index(name)]
        return percent(summary.robust), interval(summary.robust) + ("" if summary.complete else ", incomplete")

    return entry


def _part(view: RunView, field: str) -> Entry:
    if not view.routed:
        return "no router", ""
    if not view.groups:
        return "–", ""
    rate = getattr(view.groups[0].summaries[strongest(view.groups[0])], field)
    return percent(rate), interval(rate)


def _moved(view: RunView) -> Entry:
    if not view.routed:
        return "no router", ""
    return (
        (percent(view.groups[0].summaries[strongest(view.groups[0])].rerouted_mean), "") if view.groups else ("–", "")
    )


def _attacked(view: RunView) -> Entry:
    if not view.routed:
        return "no router", ""
    return ("yes" if view.groups and view.groups[0].verdict.router_attacked else "no", "")
