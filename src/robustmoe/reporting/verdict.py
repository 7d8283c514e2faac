"""The headline: one card a run, in plain words, with what makes its number doubtful beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe import analysis
from robustmoe.reporting.boxes import alarm, figure_list, unbroken
from robustmoe.reporting.collect import RunView, comparable, numbered
from robustmoe.reporting.figures import colour, of_run
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.provenance import tally
from robustmoe.reporting.words import interval, percent, plural, threat

_STATUSES = (("pass", "passed"), ("warn", "to look at"), ("fail", "failed"), ("not run", "not run"))


def section(views: Sequence[RunView]) -> str:
    """Returns the cards, and above them why the runs cannot be compared, if they cannot."""
    reasons = comparable(views) if len(views) > 1 else []
    warning = alarm("Compare with care", reasons, mild=True) if reasons else ""
    cards = "".join(_card(view, run) for run, view in numbered(views))
    return f'<h2 hidden>Verdict</h2>{warning}<div class="cards">{cards}</div>'


def story(view: RunView) -> str:
    """Returns the verdict as plain text: what was trained how, on what, and what survives."""
    header = view.header
    if not view.results:
        below = " and ".join(kind.title for kind in KINDS if view.shown[kind.name])
        return (
            f"{header.model} was not evaluated as it stands (robustmoe evaluate {view.folder} does that), so there is "
            f"no verdict on it. Below: {below}."
        )
    made = f"{header.model} trained by {header.method}" if header.method else header.model
    clean = view.clean
    text = f"{made} gets {percent(clean)} of {plural(clean.n, 'image')} of {header.data} ({header.split}) right"
    if not view.groups:
        return f"{text}. It was not attacked, so nothing is known about its robustness."
    group = view.groups[0]
    many = len(group.results)
    under = "under the attack below" if many == 1 else f"under the worst of {many} attacks"
    limit = threat(group.worst.norm, group.worst.eps)
    text += f", and keeps {percent(group.worst.robust)} {under}, with {limit}."
    if group.verdict.router_attacked is False:
        text += " The router was not attacked, so the true number may be far lower."
    elif group.verdict.failed:
        text += " A check failed, so this number cannot be quoted."
    elif group.verdict.incomplete:
        text += " The evaluation is incomplete, so this number can still change."
    return text


def _card(view: RunView, run: int | None) -> str:
    trusted = bool(view.groups) and view.groups[0].verdict.trusted
    number = colour(run or 0)
    name = f'<h2><i class="dotkey b{number}"></i><span>{escape(view.name)}</span></h2>' if run is not None else ""
    said = f'{name}<p class="story">{unbroken(story(view))}</p>'
    if not view.results:
        return f'<article class="card{of_run(run)}">{said}{_notes(view)}</article>'
    return (
        f'<article class="card{"" if trusted else " marked"}{of_run(run)}">{said}'
        f"{_figures(view, trusted)}{_bar(view, number, trusted)}{_chips(view)}{_alarms(view)}</article>"
    )


def _figures(view: RunView, trusted: bool) -> str:
    clean = view.clean
    cells = [("Clean accuracy", "big", percent(clean), f"95 %: {interval(clean)}")]
    if view.groups:
        group = view.groups[0]
        worst = group.worst
        mark = "" if trusted else "†"
        note = f"95 %: {interval(worst.robust)}" + ("" if trusted else "; † see below")
        cells.append(("Robust, worst case", "big" + ("" if trusted else " marked"), percent(worst.robust) + mark, note))
        cells.append(("Threat", "", threat(worst.norm, worst.eps), f"{plural(len(group.results), 'attack')}"))
        attacked = {None: "no router", True: "yes", False: "no"}[group.verdict.router_attacked]
        cells.append(("Router attacked", "", attacked, group.verdict.reason))
        cells.append(("Images", "", f"{worst.robust.n:,}", f"of {view.header.n:,} planned"))
    else:
        command = f"robustmoe evaluate {view.folder} --attack SPEC"
        cells.append(("Robust accuracy", "", "not measured", command))
    return figure_list(cells)


def _bar(view: RunView, number: int, trusted: bool) -> str:
    clean = view.clean
    parts = [f'<div class="fill lost b{number}" style="width:{100 * clean.value:.2f}%"></div>']
    alt = f"clean accuracy {percent(clean)}"
    rate: analysis.Rate = clean
    if view.groups:
        rate = view.groups[0].worst.robust
        hatch = "" if trusted else " hatch"
        parts.append(f'<div class="fill b{number}{hatch}" style="width:{100 * rate.value:.2f}%"></div>')
        alt += f", of which {percent(rate)} survives the worst case"
    low, high = rate.interval
    parts.append(f'<div class="err" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></div>')
    scale = "".join(f'<span style="left:{at}%">{at}%</span>' for at in (0, 25, 50, 75, 100))
    return (
        f'<div class="bar"><div class="track" role="img" aria-label="{escape(alt)}">{"".join(parts)}</div>'
        f'<div class="scale" aria-hidden="true">{scale}</div></div>'
    )


def _chips(view: RunView) -> str:
    answers = tally(view)
    chips = []
    for status, words in _STATUSES:
        if answers[status]:
            noun = "check" if len(answers[status]) == 1 else "checks"
            listed = f": {', '.join(answers[status])}" if status in ("warn", "fail") else ""
            chips.append((status.replace(" ", ""), f"{len(answers[status])} {noun} {words}{listed}"))
    if not view.checks:
        chips.append(("fail", "no checks were run"))
    if view.groups and view.groups[0].verdict.router_attacked is False:
        chips.append(("fail", "router not attacked"))
    if view.groups and view.groups[0].verdict.incomplete:
        chips.append(("warn", "incomplete"))
    items = "".join(f'<li class="chip {kind}">{escape(text)}</li>' for kind, text in chips)
    return f'<ul class="chips">{items}</ul>'


def _alarms(view: RunView) -> str:
    if not view.groups:
        return ""
    judged = view.groups[0].verdict
    bad = list(judged.failed)
    if judged.router_attacked is False:
        reason = "see check R1" if "R1" in judged.reason else judged.reason
        bad.insert(0, f"The router was not attacked: {reason}.")
    boxes = alarm("† Do not quote this number", bad) if bad else ""
    unfinished = [*judged.incomplete]
    if unfinished:
        boxes += alarm("Incomplete: run the same command again to finish", unfinished, mild=True)
    return boxes + _notes(view)


def _notes(view: RunView) -> str:
    return alarm("Worth a look", view.notes, mild=True) if view.notes else ""
