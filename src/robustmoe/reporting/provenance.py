"""Whether to believe it (checks) and how to make it again (provenance)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from robustmoe import analysis
from robustmoe.records import Check, Header, Resumed
from robustmoe.reporting.boxes import run_part
from robustmoe.reporting.collect import RunView, numbered
from robustmoe.reporting.figures import colour, of_run
from robustmoe.reporting.kinds import KINDS
from robustmoe.reporting.panel import named
from robustmoe.reporting.words import count, duration, number, plain, plural, short, threat

RECIPE = (
    "method", "optimizer", "schedule", "epochs", "batch_size", "augment", "precision", "ema", "clip", "val_attack",
    "selection", "hardware",
)  # fmt: skip


_TRAINING = {"batch_size": "training batch size", "precision": "training precision"}  # an evaluation has its own
_PRECISIONS = {
    "strict": "strict (attacks climb a float32 copy, the model confirms)",
    "fast": "fast (attacks climb a half-precision copy, the model confirms)",
    "fp32": "fp32 (attacks climb the model itself)",
}
OPEN = ("fail", "warn")
FOLDED = {"pass": "passed", "not run": "not run"}
"""The answers that are shown at once, and those that are folded away."""


def merged(view: RunView) -> list[tuple[Check, list[str]]]:
    """Returns the run's checks, worst first and then by id, with the attacks they were found under; equal answers are
    told once."""
    checks: dict[tuple[str, str, str], tuple[Check, list[str]]] = {}
    for name, check in view.checks:
        checks.setdefault((check.id, check.status, check.sentence), (check, []))[1].append(name)
    order = (*OPEN, *FOLDED)
    return sorted(checks.values(), key=lambda pair: (order.index(pair[0].status), *_by_number(pair[0].id)))


def _by_number(id: str) -> tuple[str, int]:
    """Returns a key by which G2 comes before G10."""
    letters = id.rstrip("0123456789")
    return letters, int(id[len(letters) :] or 0)


def check_section(views: Sequence[RunView]) -> str:
    """Returns the table of checks, one a run; "" if none was run."""
    body = ""
    for run, view in numbered(views):
        if checks := merged(view):
            title = f"<h3>{escape(view.name)}</h3>" if run is not None else ""
            loud = [pair for pair in checks if pair[0].status in OPEN]
            part = title + (_checks(view, loud) if loud else '<p class="lead">No check failed or warned.</p>')
            for status, words in FOLDED.items():
                if quiet := [pair for pair in checks if pair[0].status == status]:
                    number_of = plural(len(tally(view)[status]), "check")
                    part += f"<details><summary>{number_of} {words}</summary>{_checks(view, quiet)}</details>"
            body += run_part(run, part)
    if not body:
        return ""
    return (
        '<h2>Can the numbers be believed?</h2><p class="lead">An evaluation answers some of these before its number '
        "is shown, <code>robustmoe check</code> the others. A failed check marks the number; a check that was not run "
        f"proves nothing.</p>{body}"
    )


def _checks(view: RunView, checks: Sequence[tuple[Check, list[str]]]) -> str:
    head = '<th scope="col">Check</th><th class="left" scope="col">Answer</th>'
    head += '<th class="left" scope="col">What it found</th><th scope="col">Value</th>'
    rows = "".join(_check(view, check, names) for check, names in checks)
    return (
        f'<div class="scroll"><table class="data stack"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def tally(view: RunView) -> dict[str, list[str]]:
    """Returns the ids of the checks by answer, each once, by its worst (one that ran anywhere is not "not run")."""
    order = ("not run", "pass", "warn", "fail")
    verdict = view.groups[0].verdict if view.groups else None
    worst = analysis.worst_answers([check for _, check in view.checks], verdict)
    return {status: sorted((id for id in worst if worst[id] == status), key=_by_number) for status in order}


def where_found(view: RunView, names: Sequence[str]) -> str:
    """Returns under which attacks a check gave its answer, if not under all; and whether `robustmoe check` gave it."""
    attacks = analysis.names([result.header for result in view.results])
    deep = [name for name in names if name not in attacks]
    under = [name for name in names if name in attacks]
    if len(under) == len(attacks):
        return ""
    return "; ".join([*(["under " + "; ".join(under)] if under else []), *deep])


def _check(view: RunView, check: Check, names: list[str]) -> str:
    where = where_found(view, names)
    small = f"<small>{escape(where)}</small>" if where else ""
    status = check.status.replace(" ", "")
    return (
        f'<tr><th scope="row">{escape(check.name)} <code>{escape(check.id)}</code></th>'
        f'<td class="left"><span class="chip {status}">{escape(check.status)}</span></td>'
        f'<td class="left" style="min-width:260px">{escape(check.sentence)}{small}</td>'
        f'<td style="white-space:nowrap" data-label="Value">{escape(short(check.value))}</td></tr>'
    )


def made_section(views: Sequence[RunView]) -> str:
    """Shows commands, recipe, versions, hashes: one card a run."""
    cards = "".join(
        f'<div class="card{of_run(run)}">{_title(view, run)}{_commands(view)}<dl class="made">'
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(view))
        + "</dl></div>"
        for run, view in numbered(views)
    )
    return f'<h2>How it was made</h2><div class="cards">{cards}</div>'


def _title(view: RunView, run: int | None) -> str:
    return "" if run is None else f'<h2><i class="dotkey b{colour(run)}"></i>{escape(view.name)}</h2>'


def commands(view: RunView) -> list[str]:
    """Returns the commands that made the run, without repeats: training, evaluations, then the records of each kind."""
    first = [view.config["command"]] if isinstance(view.config.get("command"), str) else []
    return list(dict.fromkeys([*first, *(header.command for header in view.headers)]))


def _commands(view: RunView) -> str:
    return "".join(f"<pre>{escape(command)}</pre>" for command in commands(view) if command)


def _ordered(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _evaluation_time(view: RunView) -> str:
    if view.seconds is not None:
        return duration(view.seconds)
    return "unfinished" if view.results else ""


def _times(view: RunView) -> list[tuple[str, str]]:
    """Returns how long the records of each kind took."""
    took = [(kind, sum(shown.record.seconds for shown in view.shown[kind.name])) for kind in KINDS]
    return [(f"time, {kind.title}", duration(seconds)) for kind, seconds in took if seconds]


def _resumed(entry: Resumed) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in entry.versions.items())
    return f"after {entry.done}, by {versions}, commit {(entry.commit or 'unknown')[:12]}"


def _resumptions(view: RunView) -> list[tuple[str, str]]:
    """Returns which measurements, and the training, went on under other versions, and under which."""
    training = [Resumed(**each) for each in view.config.get("resumed") or ()]
    rows = [result.header for result in view.results]
    every = [("training", training), *zip(analysis.names(rows), (header.resumed for header in rows), strict=True)]
    for kind in KINDS:
        every += [(named(kind, shown), shown.record.header.resumed) for shown in view.shown[kind.name]]
    return [(f"resumed, {name}", "; ".join(map(_resumed, entries))) for name, entries in every if entries]


def _files(headers: Sequence[Header]) -> list[tuple[str, str]]:
    """Returns the hashes of the files that parts of a user's own came from."""
    files = {path: sha256 for header in headers for path, sha256 in header.files.items()}
    return [(f"hash of {path}", sha256) for path, sha256 in files.items()]


def facts(view: RunView) -> list[tuple[str, str]]:
    """Returns names and values, as text; what is not known is left out."""
    header, config = view.header, view.config
    headers = [result.header for result in view.results] or view.headers
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
    pairs += [
        (_TRAINING.get(name, name.replace("_", " ")), plain(config[name]))
        for name in RECIPE
        if config.get(name) is not None
    ]
    pairs += [
        ("training seed", plain(config.get("seed"))),
        ("training time", duration(training) if training else "–"),
        ("evaluation seed", str(header.seed)),
        ("evaluation time", _evaluation_time(view)),
        *_times(view),
        ("evaluation precision", "; ".join(_ordered(_PRECISIONS[each.precision] for each in headers))),
        ("evaluation batch size", ", ".join(_ordered(str(each.batch_size) for each in headers if each.batch_size))),
        ("evaluated on", f"{header.device}, {plural(header.threads, 'thread')}"),
        ("started", header.started),
        ("versions", plain(header.versions)),
        ("commit", header.commit or "unknown"),
        *_resumptions(view),
        ("model hash", header.model_hash),
        ("data hash", header.data_hash),
        ("image list hash", header.index_hash),
        *_files(headers),
    ]
    return [(name, value) for name, value in pairs if value not in ("–", "")]
