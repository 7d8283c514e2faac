"""Small pieces of the page that several sections use."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from robustmoe.reporting.figures import of_run


def alarm(title: str, sentences: Sequence[str], *, mild: bool = False) -> str:
    """Returns a box that cannot be overlooked."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="alarm{" mild" if mild else ""}" role="note"><b>{escape(title)}</b><ul>{items}</ul></div>'


def run_part(run: int | None, html: str) -> str:
    """Returns what belongs to one of several runs, so that it goes when a reader leaves the run out; ``run`` None: the
    only one."""
    return html if run is None or not html else f'<div class="part{of_run(run)}">{html}</div>'


def unbroken(text: str) -> str:
    """Returns the text escaped; a threat in it is not broken across lines."""
    return escape(text).replace(" ≤ ", "&nbsp;≤&nbsp;")


def term_list(terms: Sequence[tuple[str, str]]) -> str:
    """Returns words and what they mean."""
    items = "".join(f"<div><dt>{escape(term)}:</dt> <dd>{escape(words)}</dd></div>" for term, words in terms)
    return f'<dl class="terms">{items}</dl>'


def figure_list(cells: Sequence[tuple[str, str, str, str]]) -> str:
    """Returns a list of large numbers: (name, kind of size, value, small print)."""
    body = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="{kind or "word"}">{escape(value)}<small>{escape(note)}</small></dd>'
        "</div>"
        for name, kind, value, note in cells
    )
    return f'<dl class="figures">{body}</dl>'
