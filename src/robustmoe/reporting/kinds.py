"""The kinds of records that a report shows, beside evaluations, and how one record is told alone. A new kind is one
line in the table.

Records are written below this layer; their ``summary``, ``print`` and notebook view find the functions here by name."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from robustmoe.errors import UserError
from robustmoe.records import Audit, Evaluation, Forecast, Told
from robustmoe.reporting import blend, certificates, dissection, evaluation, lipschitz, sweep
from robustmoe.reporting.card import card
from robustmoe.reporting.forecast import forecast_text
from robustmoe.reporting.grid import wrapped
from robustmoe.reporting.panel import Kind, Shown, as_text, section
from robustmoe.reporting.style import css
from robustmoe.reporting.terminal import summary_table

KINDS: tuple[Kind, ...] = (
    certificates.KIND,
    sweep.KIND,
    blend.KIND,
    dissection.KIND,
    lipschitz.KIND,
)
"""In the order of the report."""


def kind_of(record: Told) -> Kind:
    """Returns how a record is reported."""
    return next(kind for kind in (*KINDS, evaluation.KIND) if isinstance(record, kind.record))


def summary(record: Told, evaluations: Sequence[Evaluation] = ()) -> Any:
    """Returns the numbers of a record, beside the evaluations of the same model. UserError if it has none yet."""
    kind = kind_of(record)
    if unfit := kind.unfit(record):
        raise UserError(f"the record of {kind.name} is {unfit}")
    return kind.summarise(record, evaluations)


def story(record: Told, evaluations: Sequence[Evaluation] = ()) -> str:
    """Returns what the numbers say, as lines of at most 80 columns."""
    return "\n".join(wrapped(kind_of(record).panel(Shown(record, summary(record, evaluations))).story))


def text(record: Told, evaluations: Sequence[Evaluation] = ()) -> str:
    """Returns a record as lines of at most 80 columns: what it says, then every number."""
    if isinstance(record, Audit):
        return card(record.checks)
    if isinstance(record, Forecast):
        return forecast_text(record)
    if isinstance(record, Evaluation):
        return summary_table([record])
    kind = kind_of(record)
    if unfit := kind.unfit(record):
        return f"the record of {kind.name} is {unfit}"
    return as_text(kind, Shown(record, summary(record, evaluations)))


def together(records: Sequence[Told]) -> str:
    """Returns several records as lines of at most 80 columns: the evaluations in one table, then the others."""
    attacks = [record for record in records if isinstance(record, Evaluation)]
    tables = [summary_table(attacks)] if attacks else []
    return "\n\n".join([*tables, *(text(record) for record in records if not isinstance(record, Evaluation))])


def html(record: Told) -> str:
    """Returns a record as the report shows it, in a frame of its own, so that its style touches nothing else."""
    if isinstance(record, Audit | Forecast):
        return f"<pre>{escape(text(record))}</pre>"
    kind = kind_of(record)
    shown = "" if kind.unfit(record) else section(kind, [Shown(record, summary(record))])
    body = shown or f"<p>{escape(text(record))}</p>"
    page = f"<!DOCTYPE html><meta charset=utf-8><style>{css()}</style><main><section>{body}</section></main>"
    frame = f'style="width:100%;height:640px;border:0" title="{escape(kind.title)}"'
    return f'<iframe srcdoc="{escape(page)}" {frame}></iframe>'
