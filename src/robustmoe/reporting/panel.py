"""What a report says of one record, described once; and how it is written as HTML, Markdown and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Generic, TypeVar

from robustmoe.records import Evaluation, Told
from robustmoe.reporting.boxes import alarm, run_part, term_list, unbroken
from robustmoe.reporting.figures import colour
from robustmoe.reporting.grid import Grid, grid_html, grid_lines, grid_markdown, safe, wrapped

R = TypeVar("R", bound=Told)
S = TypeVar("S")


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Shown(Generic[R, S]):
    """A record that a report shows, with its numbers, of the run called ``run`` at place ``at`` among ``runs``."""

    record: R
    summary: S
    run: str = ""
    at: int = 0
    runs: int = 1

    @property
    def several(self) -> bool:
        """Says whether the report is of several runs, so that their names have to be told."""
        return self.runs > 1


@dataclass(frozen=True)
class Panel:
    """What is said of one record. ``story``: what the numbers say; ``setting``: of what, on what, against what;
    ``grids``: every number, the first ``open`` of them shown at once; ``terms``: words and what they mean. ``card``,
    ``figures``: make HTML for the page alone."""

    story: str
    setting: str
    grids: Sequence[Grid]
    terms: Sequence[tuple[str, str]] = ()
    open: int = 0
    card: Callable[[], str] = _nothing
    figures: Callable[[], str] = _nothing


@dataclass(frozen=True)
class Kind:
    """How one kind of record is reported.

    ``record``: its class. ``title``, ``link``: of its section, and in the page's list of sections; ``lead``: what it is
    about. ``summarise``: its numbers, beside the run's evaluations. ``panel``: what is said of one. ``compare``:
    several side by side, None for fewer than two; the note says why they cannot be compared. ``joint``: one figure of
    all of them, as HTML. ``unfit``: why a record has nothing to show yet, in words that follow "is"; "" if it has.
    ``doubts``: why its numbers cannot be quoted."""

    record: type[Any]
    title: str
    lead: str
    summarise: Callable[[Any, Sequence[Evaluation]], Any]
    panel: Callable[[Any], Panel]
    compare: Callable[[Sequence[Any]], Grid | None] = lambda every: None
    joint: Callable[[Sequence[Any]], str] = lambda every: ""
    unfit: Callable[[Any], str] = lambda record: ""
    doubts: Callable[[Any], Sequence[str]] = lambda shown: ()
    link: str = ""

    @property
    def name(self) -> str:
        """Returns the name of the kind, as its file says it."""
        return str(self.record.kind)


def named(kind: Kind, shown: Shown[Any, Any]) -> str:
    """Returns the title of one record: "Certificates, bounds(linf(0.1))"."""
    return f"{kind.title}, {shown.record.which}" if shown.record.which else kind.title


def section(kind: Kind, every: Sequence[Shown[Any, Any]]) -> str:
    """Returns the section of the page: all records side by side, then each; "" without any."""
    if not every:
        return ""
    panels = [kind.panel(shown) for shown in every]
    parts = [f'<h2>{escape(kind.title)}</h2><p class="lead">{escape(kind.lead)}</p>']
    both = kind.compare(every)
    if both is not None and both.note:
        parts.append(alarm("Compare with care", [both.note], mild=True))
    parts.append(kind.joint(every))
    runs = [shown.at for shown in every] if every[0].several else []
    parts += [grid_html(replace(both, note=""), runs)] if both is not None else []
    parts += [_one(kind, shown, panel, len(every)) for shown, panel in zip(every, panels, strict=True)]
    terms = dict.fromkeys(term for panel in panels for term in panel.terms)
    return "".join(parts) + (term_list(list(terms)) if terms else "")


def _one(kind: Kind, shown: Shown[Any, Any], panel: Panel, many: int) -> str:
    names = [shown.run] if shown.several else []
    names += [shown.record.which] if shown.record.which else []
    key = f'<i class="dotkey b{colour(shown.at)}"></i>' if shown.several else ""
    heading = f"<h2>{key}<span>{escape(': '.join(names))}</span></h2>" if names else ""
    doubts = kind.doubts(shown)
    wrong = alarm("† Do not quote these numbers", doubts) if doubts else ""
    tables = "".join(grid_html(grid) for grid in panel.grids[panel.open :])
    rest = f"<details{'' if many > 1 else ' open'}><summary>All numbers</summary>{tables}</details>" if tables else ""
    return run_part(
        shown.at if shown.several else None,
        f'<div class="cards"><article class="card{" marked" if wrong else ""}">{heading}'
        f'<p class="story">{unbroken(panel.story)}</p>{wrong}{panel.card()}'
        f'<p class="note">{unbroken(panel.setting)}</p></article></div>'
        f"{''.join(grid_html(grid) for grid in panel.grids[: panel.open])}{panel.figures()}{rest}",
    )


def as_markdown(kind: Kind, shown: Shown[Any, Any]) -> list[str]:
    """Returns the paragraphs of one record."""
    panel = kind.panel(shown)
    doubts = [f"> **†** {safe(sentence)}" for sentence in kind.doubts(shown)]
    tables = [text for grid in panel.grids for text in grid_markdown(grid)]
    return [f"### {safe(named(kind, shown))}", safe(panel.story), safe(panel.setting), *doubts, *tables]


def as_text(kind: Kind, shown: Shown[Any, Any]) -> str:
    """Returns a record as lines of at most 80 columns."""
    panel = kind.panel(shown)
    lines = [*wrapped(panel.story), *wrapped(panel.setting)]
    lines += [line for sentence in kind.doubts(shown) for line in wrapped(sentence, "! ")]
    return "\n".join([*lines, *(line for grid in panel.grids for line in grid_lines(grid))])


Side = tuple[str, Callable[[Shown[Any, Any]], object]]

DATA: Side = ("data sets", lambda shown: shown.record.header.data_hash)
IMAGES: Side = ("images", lambda shown: shown.record.header.index_hash)
NORM: Side = ("norms", lambda shown: shown.record.header.norm)


def apart(words: str, every: Sequence[Shown[Any, Any]], *fields: Side) -> str:
    """Returns why records cannot be compared number by number, as sentences: ``fields`` are what must be the same, and
    what it is of each. "" if they can."""
    return "; ".join(
        f"these {words} are of different {name}"
        for name, value in fields
        if any(value(shown) != value(every[0]) for shown in every)
    )
