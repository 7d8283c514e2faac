"""The summary as a plain text table for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from robustmoe import analysis
from robustmoe.records import STATUSES, Audit, Blend, Certificates, Dissection, Evaluation, Lipschitz, Sweep
from robustmoe.reporting import blend, certificates, dissection, lipschitz, sweep
from robustmoe.reporting.card import WIDTH
from robustmoe.reporting.collect import Blended, Certified, Dissected, Measured, Swept
from robustmoe.reporting.tables import Grid
from robustmoe.reporting.words import eps_text, gap_text, interval, percent, plural, threat


def summary_table(results: Sequence[Evaluation], audit: Audit | None = None) -> str:
    """The attacks of each threat, their worst case and the verdict card beside it, as lines of text. Files without
    rows are named, not shown. ``audit``: what `robustmoe check` found of the same model."""
    lines: list[str] = []
    for group in analysis.groups(results):
        lines += [*_block(group, audit), ""]
    for result in results:
        name = analysis.attack_name(result.header)
        if not result.rows:
            lines.append(f"{name}: no rows yet")
        elif result.header.attack is None:
            rate = analysis.evaluation_summary(*result).clean
            lines.append(f"clean accuracy {percent(rate)} ({interval(rate)}), {plural(rate.n, 'image')}, no attack")
    for curve in analysis.eps_curve([(result.header, result.rows) for result in results]):
        lines.append(f"{curve.name}, accuracy at eps (n = {curve.n}):")
        lines.append("  " + "   ".join(f"{eps_text(curve.norm, eps)}: {percent(rate)}" for eps, rate in curve.points))
    lines += [f"note: {sentence}" for sentence in analysis.warnings(results)]
    return "\n".join(lines).rstrip()


def dissection_table(found: Dissection) -> str:
    """A dissection that is done: which part gives way first, and every number, as lines of text."""
    one = Dissected(found, analysis.dissection_summary(found))
    lines = [*textwrap.wrap(dissection.story(one), WIDTH), *textwrap.wrap(dissection.setting(found), WIDTH)]
    return "\n".join([*lines, *(line for grid in dissection.grids(one) for line in _grid(grid))])


def blend_table(found: Blend) -> str:
    """A curve over alpha: what is kept at the alpha to look at first, and every number, as lines of text."""
    one = Blended(found, analysis.alpha_curve(found), analysis.alpha_shown(found))
    lines = [*textwrap.wrap(blend.story(one), WIDTH), *textwrap.wrap(blend.setting(found), WIDTH)]
    lines += [f"! {sentence}" for sentence in blend.doubts(one)]
    return "\n".join([*lines, *(line for grid in blend.grids(one) for line in _grid(grid))])


def lipschitz_table(found: Lipschitz) -> str:
    """What the laboratory measured: the whole model, then its layers side by side, as lines of text."""
    one = Measured(found, analysis.lipschitz_summary(found))
    lines = [*textwrap.wrap(lipschitz.story(one), WIDTH), *textwrap.wrap(lipschitz.setting(found), WIDTH)]
    return "\n".join([*lines, *(line for grid in lipschitz.grids(one) for line in _grid(grid))])


def certificates_story(found: Certificates, results: Sequence[Evaluation] = ()) -> str:
    """What a certifier proves, beside what the attacks in ``results`` leave, in a few sentences on lines of text."""
    one = Certified(found, analysis.certificates_summary(found, results))
    return "\n".join(textwrap.wrap(certificates.story(one), WIDTH))


def certificates_table(found: Certificates, results: Sequence[Evaluation] = ()) -> str:
    """What a certifier proves, beside what the attacks in ``results`` leave, as lines of text."""
    one = Certified(found, analysis.certificates_summary(found, results))
    lines = [*textwrap.wrap(certificates.story(one), WIDTH), *textwrap.wrap(certificates.setting(found), WIDTH)]
    lines += [f"! {sentence}" for sentence in certificates.doubts(one)]
    return "\n".join([*lines, *(line for grid in certificates.grids(one) for line in _grid(grid))])


def sweep_table(found: Sweep) -> str:
    """A sweep: what the weak and the strong attack leave, and every number, as lines of text."""
    one = Swept(found, analysis.sweep_summary(found))
    lines = [*textwrap.wrap(sweep.story(one), WIDTH), *textwrap.wrap(sweep.setting(found), WIDTH)]
    return "\n".join([*lines, *(line for grid in sweep.grids(one) for line in _grid(grid))])


def _grid(grid: Grid) -> list[str]:
    """A table of the report, after an empty line."""
    table = [[f"{value} ({small})" if small else value for value, small in row] for row in grid.rows]
    return ["", grid.title, *aligned([list(grid.head), *table], last=False), *textwrap.wrap(grid.note, WIDTH)]


def _block(group: list[Evaluation], audit: Audit | None) -> list[str]:
    worst = analysis.worst_case([(result.header, result.rows) for result in group])
    verdict = analysis.judge(group, audit)
    routed = bool(group[0].header.routers)
    head = ["attack", "clean", "robust", "95 %"]
    head += ["router's", "experts'", "rerouted"] if routed else []
    table = [[*head, "only it", "images"]]
    for name, result, adds in zip(analysis.names([r.header for r in group]), group, worst.adds, strict=True):
        one = analysis.evaluation_summary(*result)
        cells = [name, percent(one.clean), percent(one.robust), interval(one.robust)]
        if routed:
            cells += [percent(one.router_exposed), percent(one.experts_exposed), percent(one.rerouted_mean)]
        images = f"{one.n}" if one.n >= one.planned else f"{one.n} of {one.planned}"
        table.append([*cells, str(adds.alone), images])
    mark = "" if verdict.trusted else " !"
    cells = [f"worst of {len(group)}", percent(worst.clean), percent(worst.robust) + mark, interval(worst.robust)]
    table.append([*cells, *([""] * 3 if routed else []), "", str(worst.robust.n)])
    lines = [f"threat {threat(worst.norm, worst.eps)}", *aligned(table)]
    for name, result in zip(analysis.names([r.header for r in group]), group, strict=True):
        if parts := analysis.by_part(result):
            lines += [f"{name}, part by part:", f"  clean {percent(analysis.evaluation_summary(*result).clean)}"]
            width = max(len(part.name) for part in parts)
            lines += [
                f"  {part.name.ljust(width)}  broke {part.broken:>5}, left {percent(part.left)} ({interval(part.left)})"
                for part in parts
            ]
            if gap := analysis.routing_gap(result):
                lines.append(f"  {gap_text(gap)}")
    lines.append(f"verdict: {'no check speaks against this number' if verdict.trusted else 'do NOT quote this number'}")
    if verdict.router_attacked is None:
        lines.append("no router declared: the model is dense, or hides its routing")
    else:
        lines.append(f"router attacked: {'yes' if verdict.router_attacked else 'NO'} ({verdict.reason})")
    lines += [f"! fail  {sentence}" for sentence in verdict.failed]
    lines += [f"! incomplete  {sentence}" for sentence in verdict.incomplete]
    lines += [f"  warn  {sentence}" for sentence in verdict.warned]
    checks = [check for result in group if result.checks is not None for check in result.checks.checks]
    if audit is not None and audit.model_hash == group[0].header.model_hash:
        checks += audit.checks
    found = analysis.worst_answers(checks, verdict)
    counts = {status: sum(one == status for one in found.values()) for status in STATUSES}
    skipped = ", ".join(sorted(key for key, status in found.items() if status == "not run"))
    lines.append(
        f"{plural(len(found), 'check')}: {counts['fail']} failed, {counts['warn']} warned, "
        f"{counts['pass']} passed, {counts['not run']} not run" + (f" ({skipped})" if skipped else "")
    )
    return lines


def aligned(table: list[list[str]], last: bool = True) -> list[str]:
    """Columns of equal width, a rule below the head and, with ``last``, above the last row."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    rule = "-" * sum([*widths, 2 * (len(widths) - 1)])
    return [lines[0], rule, *lines[1:-1], *([rule] if last else []), lines[-1]]
