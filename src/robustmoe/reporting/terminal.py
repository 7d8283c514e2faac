"""The summary as a plain text table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe import analysis
from robustmoe.records import STATUSES, Audit, Evaluation
from robustmoe.reporting.grid import aligned, wrapped
from robustmoe.reporting.words import eps_text, gap_text, interval, percent, plural, threat


def summary_table(results: Sequence[Evaluation], audit: Audit | None = None) -> str:
    """Returns the attacks of each threat, their worst case and the verdict card beside it, as lines of text. Files
    without rows are named, not shown. ``audit``: what `robustmoe check` found of the same model."""
    lines: list[str] = []
    for group in analysis.groups(results):
        lines += [*_block(group, audit), ""]
    for result in results:
        name = analysis.attack_name(result.header)
        if not result.rows:
            lines += wrapped(f"{name}: no rows yet")
        elif result.header.attack is None:
            rate = analysis.evaluation_summary(*result).clean
            said = f"clean accuracy {percent(rate)} ({interval(rate)}), {plural(rate.n, 'image')}, no attack"
            lines += wrapped(said)
    for curve in analysis.eps_curve([(result.header, result.rows) for result in results]):
        lines += wrapped(f"{curve.name}, accuracy at eps (n = {curve.n}):")
        points = ";  ".join(f"{eps_text(curve.norm, eps)}: {percent(rate)}" for eps, rate in curve.points)
        lines += wrapped(points, "  ")
    lines += [line for sentence in analysis.warnings(results) for line in wrapped(sentence, "note: ")]
    return "\n".join(lines).rstrip()


def _block(group: list[Evaluation], audit: Audit | None) -> list[str]:
    worst = analysis.worst_case([(result.header, result.rows) for result in group])
    verdict = analysis.judge(group, audit)
    routed = bool(group[0].header.routers)
    head = ["attack", "clean", "robust", "95 %"]
    head += ["router's", "experts'", "rerouted"] if routed else []
    table = [[*head, "only it", "images"]]
    for name, result, adds in zip(analysis.names([r.header for r in group]), group, worst.adds, strict=True):
        summary = analysis.evaluation_summary(*result)
        cells = [name, percent(summary.clean), percent(summary.robust), interval(summary.robust)]
        if routed:
            cells += [percent(summary.router_exposed), percent(summary.experts_exposed), percent(summary.rerouted_mean)]
        images = f"{summary.n}" if summary.n >= summary.planned else f"{summary.n} of {summary.planned}"
        table.append([*cells, str(adds.alone), images])
    mark = "" if verdict.trusted else " !"
    cells = [f"worst of {len(group)}", percent(worst.clean), percent(worst.robust) + mark, interval(worst.robust)]
    table.append([*cells, *([""] * 3 if routed else []), "", str(worst.robust.n)])
    lines = [f"threat {threat(worst.norm, worst.eps)}", *aligned(table)]
    lines += _by_part(group)
    lines.append(f"verdict: {verdict.said}")
    if verdict.router_attacked is None:
        lines.append(_no_router(group))
    else:
        lines += wrapped(f"router attacked: {'yes' if verdict.router_attacked else 'NO'} ({verdict.reason})")
    loud = (("! fail  ", verdict.failed), ("! incomplete  ", verdict.incomplete), ("  warn  ", verdict.warned))
    lines += [line for start, sentences in loud for sentence in sentences for line in wrapped(sentence, start)]
    checks = [check for result in group if result.checks is not None for check in result.checks.checks]
    if audit is not None and audit.model_hash == group[0].header.model_hash:
        checks += audit.checks
    answers = analysis.worst_answers(checks, verdict)
    counts = {status: sum(summary == status for summary in answers.values()) for status in STATUSES}
    skipped = ", ".join(sorted(key for key, status in answers.items() if status == "not run"))
    lines += wrapped(
        f"{plural(len(answers), 'check')}: {counts['fail']} failed, {counts['warn']} warned, "
        f"{counts['pass']} passed, {counts['not run']} not run" + (f" ({skipped})" if skipped else "")
    )
    return lines


def _no_router(group: list[Evaluation]) -> str:
    """Returns what is known of a model that declares no router."""
    checks = [check for result in group if result.checks is not None for check in result.checks.checks]
    if {check.status for check in checks if check.id == "R18"} == {"pass"}:
        return "no router declared, and none was seen inside (check R18)"
    return "no router declared: the model is dense, or hides its routing"


def _by_part(group: list[Evaluation]) -> list[str]:
    """Returns what each part of a suite broke."""
    lines: list[str] = []
    for name, result in zip(analysis.names([r.header for r in group]), group, strict=True):
        if parts := analysis.by_part(result):
            lines += [
                *wrapped(f"{name}, part by part:"),
                f"  clean {percent(analysis.evaluation_summary(*result).clean)}",
            ]
            width = max(len(part.name) for part in parts)
            lines += [
                f"  {part.name.ljust(width)}  broke {part.broken:>5}, left {percent(part.left)} ({interval(part.left)})"
                for part in parts
            ]
            if gap := analysis.routing_gap(result):
                lines += wrapped(gap_text(gap), "  ")
    return lines
