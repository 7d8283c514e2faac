"""The report as Markdown: verdict, tables, checks and provenance, for a README or an issue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from robustmoe import analysis
from robustmoe.records import Check, Evaluation
from robustmoe.reporting import blend, certificates, dissection, lipschitz, sweep
from robustmoe.reporting.collect import Group, View, comparable
from robustmoe.reporting.provenance import FOLDED, OPEN, commands, facts, merged, tally, where_found
from robustmoe.reporting.tables import Grid
from robustmoe.reporting.verdict import story
from robustmoe.reporting.words import GLOSSARY, eps_text, gap_text, interval, percent, plural, short, threat


def markdown(views: Sequence[View]) -> str:
    """The whole report as text."""
    parts = ["# Robustness report: " + " and ".join(_safe(view.name) for view in views)]
    if len(views) > 1:
        parts += [f"> Compare with care: {_safe(reason)}." for reason in comparable(views)]
    both = dissection.comparison(views)
    if both is not None:
        parts += ["## Dissections", *_grid(both)]
    curves = blend.comparison(views)
    if curves is not None:
        parts += ["## Curves over alpha", *_grid(curves)]
    swept = sweep.comparison(views)
    if swept is not None:
        parts += ["## Sweeps over eps", *_grid(swept)]
    proofs = certificates.comparison(views)
    if proofs is not None:
        parts += ["## Certifiers", *_grid(proofs)]
    for view in views:
        parts += _run(view)
    parts.append("## Words")
    terms = [*GLOSSARY, *(blend.TERMS if any(view.blended is not None for view in views) else ())]
    terms += certificates.TERMS if any(view.certified for view in views) else ()
    parts.append("\n".join(f"- **{term}**: {words}" for term, words in terms))
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no table cell breaks, one line."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _run(view: View) -> list[str]:
    parts = [f"## {_safe(view.name)}", _safe(story(view))]
    for group in view.groups:
        parts.append(f"### Attacks, {_safe(threat(group.worst.norm, group.worst.eps))}")
        parts.append(_attacks(group, view.routed))
        for name, result in zip(group.names, group.results, strict=True):
            parts += _suite(name, result)
        parts += [f"> **†** {_safe(sentence)}" for sentence in (*group.verdict.failed, *group.verdict.incomplete)]
        if group.verdict.router_attacked is not None:
            answer = "yes" if group.verdict.router_attacked else "**no** †"
            parts.append(f"Router attacked: {answer} ({_safe(group.verdict.reason)}).")
        else:
            parts.append("No router.")
    parts += [f"> {_safe(note)}" for note in view.notes]
    for curve in view.curves:
        points = [[eps_text(curve.norm, eps), f"{percent(rate)} ({interval(rate)})"] for eps, rate in curve.points]
        parts += [f"### Accuracy against eps, {_safe(curve.name)}", _table(["eps", f"accuracy, n = {curve.n}"], points)]
    for one in view.certified:
        parts += [f"### Certificates, {_safe(one.record.certifier)}", _safe(certificates.story(one))]
        parts.append(_safe(certificates.setting(one.record)))
        parts += [f"> **†** {_safe(sentence)}" for sentence in certificates.doubts(one)]
        parts += [text for grid in certificates.grids(one) for text in _grid(grid)]
    if view.measured is not None:
        parts += ["### Lipschitz laboratory", _safe(lipschitz.story(view.measured))]
        parts.append(_safe(lipschitz.setting(view.measured.record)))
        parts += [text for grid in lipschitz.grids(view.measured) for text in _grid(grid)]
    if view.swept is not None:
        parts += ["### Sweep over eps", _safe(sweep.story(view.swept)), _safe(sweep.setting(view.swept.record))]
        parts += [text for grid in sweep.grids(view.swept) for text in _grid(grid)]
    if view.dissected is not None:
        parts += ["### Dissection", _safe(dissection.story(view.dissected))]
        parts.append(_safe(dissection.setting(view.dissected.record)))
        parts += [text for grid in dissection.grids(view.dissected) for text in _grid(grid)]
    if view.blended is not None:
        parts += ["### Clean against robust, over alpha", _safe(blend.story(view.blended))]
        parts.append(_safe(blend.setting(view.blended.record)))
        parts += [f"> **†** {_safe(sentence)}" for sentence in blend.doubts(view.blended)]
        parts += [text for grid in blend.grids(view.blended) for text in _grid(grid)]
    parts += _checks(view)
    parts.append("### How it was made")
    parts += ["\n".join(f"    {line}" for line in command.splitlines()) for command in commands(view)]
    parts.append(_table(["what", "value"], [list(pair) for pair in facts(view)]))
    return parts


def _grid(grid: Grid) -> list[str]:
    rows = [[f"{value} ({small})" if small else value for value, small in row] for row in grid.rows]
    return [f"#### {_safe(grid.title)}", _table(grid.head, rows), *([_safe(grid.note)] if grid.note else [])]


def _suite(name: str, result: Evaluation) -> list[str]:
    found = analysis.by_part(result)
    if not found:
        return []
    clean = analysis.evaluation_summary(*result).clean
    rows = [["clean", "", f"{percent(clean)} ({interval(clean)})"]]
    rows += [[part.name, str(part.broken), f"{percent(part.left)} ({interval(part.left)})"] for part in found]
    gap = analysis.routing_gap(result)
    said = [_safe(gap_text(gap))] if gap is not None else []
    return [f"#### {_safe(name)}, part by part", *said, _table(["part", "broke", "left (95 %)"], rows)]


def _checks(view: View) -> list[str]:
    """Failures and warnings open; what passed and what was not run folded, as on the page."""

    def table(found: list[tuple[Check, list[str]]]) -> str:
        head = ["id", "check", "answer", "what it found", "where", "value"]
        rows = [
            [check.id, check.name, check.status, check.sentence, where_found(view, names), short(check.value)]
            for check, names in found
        ]
        return _table(head, rows)

    found = merged(view)
    if not found:
        return []
    loud = [pair for pair in found if pair[0].status in OPEN]
    parts = ["### Checks", table(loud) if loud else "No check failed or warned."]
    for status, words in FOLDED.items():
        if quiet := [pair for pair in found if pair[0].status == status]:
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
    for name, one, adds in zip(group.names, group.summaries, group.worst.adds, strict=True):
        cells = [name, percent(one.clean), f"{percent(one.robust)} ({interval(one.robust)})"]
        if routed:
            cells += [percent(one.router_exposed), percent(one.experts_exposed), percent(one.rerouted_mean)]
        images = str(one.n) if one.complete else f"{one.n} of {one.planned}, incomplete"
        rows.append([*cells, str(adds.alone), images])
    worst = group.worst
    mark = "" if group.verdict.trusted else " †"
    cells = ["worst case", percent(worst.clean), f"{percent(worst.robust)}{mark} ({interval(worst.robust)})"]
    rows.append([*cells, *([""] * 3 if routed else []), "", str(worst.robust.n)])
    return _table([*head, "only it breaks", "images"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(_safe(cell) for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([text[0], "| " + " | ".join(["---"] * len(head)) + " |", *text[1:]])
