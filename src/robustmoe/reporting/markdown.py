"""The report as Markdown: verdict, tables, checks and provenance, for a README or an issue."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe import analysis
from robustmoe.records import Check, Evaluation
from robustmoe.reporting.collect import Group, RunView, comparable, heading, of_kind
from robustmoe.reporting.grid import grid_markdown, safe, table_markdown
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import as_markdown
from robustmoe.reporting.provenance import FOLDED, OPEN, commands, facts, merged, tally, where_found
from robustmoe.reporting.verdict import story
from robustmoe.reporting.words import GLOSSARY, eps_text, gap_text, interval, percent, plural, short, threat


def markdown(views: Sequence[RunView]) -> str:
    """Returns the whole report as text."""
    parts = [f"# Robustness report: {safe(heading(views))}"]
    if len(views) > 1:
        parts += [f"> Compare with care: {safe(reason)}." for reason in comparable(views)]
    for kind in KINDS:
        both = kind.compare(of_kind(views, kind.name))
        parts += [f"## {kind.title}", *grid_markdown(both)] if both is not None else []
    for view in views:
        parts += _run(view)
    parts.append("## Words")
    terms = dict.fromkeys(GLOSSARY)
    for kind in KINDS:
        terms |= dict.fromkeys(term for shown in of_kind(views, kind.name) for term in kind.panel(shown).terms)
    parts.append("\n".join(f"- **{term}**: {words}" for term, words in terms))
    return "\n\n".join(parts) + "\n"


def _run(view: RunView) -> list[str]:
    parts = [f"## {safe(view.name)}", safe(story(view))]
    for group in view.groups:
        parts.append(f"### Attacks, {safe(threat(group.worst.norm, group.worst.eps))}")
        parts.append(_attacks(group, view.routed))
        for name, result in zip(group.names, group.results, strict=True):
            parts += _suite(name, result)
        parts += [f"> **†** {safe(sentence)}" for sentence in (*group.verdict.failed, *group.verdict.incomplete)]
        if group.verdict.router_attacked is not None:
            answer = "yes" if group.verdict.router_attacked else "**no** †"
            parts.append(f"Router attacked: {answer} ({safe(group.verdict.reason)}).")
        else:
            parts.append("No router.")
    parts += [f"> {safe(note)}" for note in view.notes]
    for curve in view.curves:
        points = [[eps_text(curve.norm, eps), f"{percent(rate)} ({interval(rate)})"] for eps, rate in curve.points]
        parts += [
            f"### Accuracy against eps, {safe(curve.name)}",
            table_markdown(["eps", f"accuracy, n = {curve.n}"], points),
        ]
    for kind in KINDS:
        parts += [text for shown in view.shown[kind.name] for text in as_markdown(kind, shown)]
    parts += _checks(view)
    parts.append("### How it was made")
    parts += ["\n".join(f"    {line}" for line in command.splitlines()) for command in commands(view)]
    parts.append(table_markdown(["what", "value"], [list(pair) for pair in facts(view)]))
    return parts


def _suite(name: str, result: Evaluation) -> list[str]:
    parts = analysis.by_part(result)
    if not parts:
        return []
    clean = analysis.evaluation_summary(*result).clean
    rows = [["clean", "", f"{percent(clean)} ({interval(clean)})"]]
    rows += [[part.name, str(part.broken), f"{percent(part.left)} ({interval(part.left)})"] for part in parts]
    gap = analysis.routing_gap(result)
    said = [safe(gap_text(gap))] if gap is not None else []
    return [f"#### {safe(name)}, part by part", *said, table_markdown(["part", "broke", "left (95 %)"], rows)]


def _checks(view: RunView) -> list[str]:
    """Returns failures and warnings open; what passed and what was not run folded, as on the page."""

    def table(checks: list[tuple[Check, list[str]]]) -> str:
        head = ["id", "check", "answer", "what it found", "where", "value"]
        rows = [
            [check.id, check.name, check.status, check.sentence, where_found(view, names), short(check.value)]
            for check, names in checks
        ]
        return table_markdown(head, rows)

    checks = merged(view)
    if not checks:
        return []
    loud = [pair for pair in checks if pair[0].status in OPEN]
    parts = ["### Checks", table(loud) if loud else "No check failed or warned."]
    for status, words in FOLDED.items():
        if quiet := [pair for pair in checks if pair[0].status == status]:
            parts += [
                f"<details><summary>{plural(len(tally(view)[status]), 'check')} {words}</summary>",
                table(quiet),
                "</details>",
            ]
    return parts


def _attacks(group: Group, routed: bool) -> str:
    head = ["attack", "clean", "robust (95 %)"]
    head += ["router’s part", "experts’ part", "rerouted"] if routed else []
    rows = []
    for name, summary, adds in zip(group.names, group.summaries, group.worst.adds, strict=True):
        cells = [name, percent(summary.clean), f"{percent(summary.robust)} ({interval(summary.robust)})"]
        if routed:
            cells += [percent(summary.router_exposed), percent(summary.experts_exposed), percent(summary.rerouted_mean)]
        images = str(summary.n) if summary.complete else f"{summary.n} of {summary.planned}, incomplete"
        rows.append([*cells, str(adds.alone), images])
    worst = group.worst
    mark = "" if group.verdict.trusted else " †"
    cells = ["worst case", percent(worst.clean), f"{percent(worst.robust)}{mark} ({interval(worst.robust)})"]
    rows.append([*cells, *([""] * 3 if routed else []), "", str(worst.robust.n)])
    return table_markdown([*head, "only it breaks", "images"], rows)
