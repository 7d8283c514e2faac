"""Whether to believe it (checks) and how to make it again (provenance)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.records import Check
from robustmoe.reporting.collect import View
from robustmoe.reporting.figures import colour
from robustmoe.reporting.words import count, duration, number, plain, threat

RECIPE = (
    "method", "optimizer", "schedule", "epochs", "batch_size", "augment", "precision", "ema", "clip", "val_attack",
    "selection", "hardware",
)  # fmt: skip


def merged(view: View) -> list[tuple[Check, list[str]]]:
    """The run's checks, worst first, with the attacks they were found under; equal answers are told once."""
    found: dict[tuple[str, str, str], tuple[Check, list[str]]] = {}
    for name, check in view.checks:
        found.setdefault((check.id, check.status, check.sentence), (check, []))[1].append(name)
    return list(found.values())


def check_section(views: Sequence[View]) -> str:
    """The table of checks, one a run; "" if none was run."""
    body = ""
    for view in views:
        rows = "".join(_check(view, check, names) for check, names in merged(view))
        if rows:
            title = f"<h3>{escape(view.name)}</h3>" if len(views) > 1 else ""
            head = '<th scope="col">Check</th><th class="left" scope="col">Answer</th>'
            head += '<th class="left" scope="col">What it found</th><th scope="col">Value</th>'
            body += (
                f'{title}<div class="scroll"><table class="data stack"><thead><tr>{head}</tr></thead>'
                f"<tbody>{rows}</tbody></table></div>"
            )
    if not body:
        return ""
    return (
        '<h2>Can the numbers be believed?</h2><p class="lead">An evaluation answers these before its number is shown. '
        f"A failed check marks the number; a check that was not run proves nothing.</p>{body}"
    )


def _check(view: View, check: Check, names: list[str]) -> str:
    attacks = len(view.results)
    where = "" if len(names) == attacks or attacks == 1 else "under " + "; ".join(names)
    small = f"<small>{escape(where)}</small>" if where else ""
    status = check.status.replace(" ", "")
    return (
        f'<tr><th scope="row">{escape(check.name)} <code>{escape(check.id)}</code></th>'
        f'<td class="left"><span class="chip {status}">{escape(check.status)}</span></td>'
        f'<td class="left" style="min-width:260px">{escape(check.sentence)}{small}</td>'
        f'<td data-label="Value">{escape(plain(check.value))}</td></tr>'
    )


def made_section(views: Sequence[View]) -> str:
    """Commands, recipe, versions, hashes: one card a run."""
    cards = "".join(
        f'<div class="card">{_title(view, at, len(views) > 1)}{_commands(view)}<dl class="made">'
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(view))
        + "</dl></div>"
        for at, view in enumerate(views)
    )
    return f'<h2>How it was made</h2><div class="cards">{cards}</div>'


def _title(view: View, position: int, several: bool) -> str:
    return f'<h2><i class="dotkey b{colour(position)}"></i>{escape(view.name)}</h2>' if several else ""


def commands(view: View) -> list[str]:
    """The commands that made the run, without repeats: training, then evaluations."""
    first = [view.config["command"]] if isinstance(view.config.get("command"), str) else []
    return list(dict.fromkeys([*first, *(result.header.command for result in view.results)]))


def _commands(view: View) -> str:
    return "".join(f"<pre>{escape(command)}</pre>" for command in commands(view) if command)


def facts(view: View) -> list[tuple[str, str]]:
    """Names and values, as text; what is not known is left out."""
    header, config = view.header, view.config
    times = [number(line.get("seconds")) for line in view.metrics]
    training = sum(time for time in times if time is not None)
    pairs: list[tuple[str, str]] = [
        ("model", header.model),
        ("parameters", count(header.parameters)),
        ("data", f"{header.data} ({header.split})"),
        ("threat", threat(header.norm, header.eps) if header.attack else "none"),
    ]
    if header.method and "method" not in config:
        pairs.append(("method", header.method))
    pairs += [(name.replace("_", " "), plain(config[name])) for name in RECIPE if config.get(name) is not None]
    pairs += [
        ("training seed", plain(config.get("seed"))),
        ("training time", duration(training) if training else "–"),
        ("evaluation seed", str(header.seed)),
        ("evaluation time", duration(view.seconds) if view.seconds is not None else "unfinished"),
        ("evaluated on", f"{header.device}, {header.threads} threads, {header.precision}"),
        ("started", header.started),
        ("versions", plain(header.versions)),
        ("commit", header.commit or "unknown"),
        ("model hash", header.model_hash),
        ("data hash", header.data_hash),
        ("image list hash", header.index_hash),
    ]
    return [(name, value) for name, value in pairs if value not in ("–", "")]
