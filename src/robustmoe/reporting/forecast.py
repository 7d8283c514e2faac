"""A forecast as lines of text."""

from __future__ import annotations

from robustmoe.records.forecast import Forecast, ForecastPart
from robustmoe.reporting.grid import aligned, wrapped
from robustmoe.reporting.words import plural


def forecast_text(forecast: Forecast) -> str:
    """Returns what a forecast says, as lines of at most 80 columns."""
    threads = "" if forecast.device != "cpu" else f", {plural(forecast.threads, 'thread')}"
    title = f"forecast of the {forecast.job} of {forecast.what}, batches of {forecast.batch_size}, {forecast.device}"
    guessed = any(part.low != part.high for part in forecast.parts)
    head = ["part", "times", "CPU", "clock", *(["CPU from-to", "at most"] if guessed else [])]
    table = [head, *(_row(part, guessed) for part in forecast.parts), _total(forecast, guessed)]
    lines = [*wrapped(title + threads), *aligned(table), *_memory(forecast)]
    lines += [line for part in forecast.parts for line in _passes(part)]
    for note in forecast.notes:
        lines += wrapped(note)
    lines += wrapped(f"CPU: seconds of all threads together. This forecast took {span(forecast.measured)} of them.")
    return "\n".join(lines)


def _row(part: ForecastPart, guessed: bool) -> list[str]:
    cells = [part.name, f"{part.count:,}", span(part.cpu), span(part.wall)]
    if not guessed:
        return cells
    return [*cells, *(["", ""] if part.passes is None else [f"{span(part.low)}-{span(part.high)}", span(part.most)])]


def _total(forecast: Forecast, guessed: bool) -> list[str]:
    cells = ["all", "", span(forecast.cpu), span(forecast.wall)]
    low, high, most = (sum(getattr(part, name) for part in forecast.parts) for name in ("low", "high", "most"))
    return [*cells, *([f"{span(low)}-{span(high)}", span(most)] if guessed else [])]


def _passes(part: ForecastPart) -> list[str]:
    """Returns what an attack asks of the model, and what it leaves."""
    if part.passes is None:
        return []
    most = "" if part.most_passes is None else f" of at most {part.most_passes:,}"
    left = "" if part.left is None else f", {100 * part.left:.0f} % of the probe stand behind it"
    return wrapped(f"{part.name}: {part.passes:,.0f}{most} passes an image (a gradient counts as 3){left}.")


def _memory(forecast: Forecast) -> list[str]:
    peak = "not told by this system" if forecast.peak is None else size(forecast.peak)
    room = "" if forecast.room is None else f" of {size(forecast.room)} that there are"
    files = f"; files of {size(forecast.files)}" if forecast.files else ""
    macs = f"; {forecast.macs / 1e9:.4g} GMAC an image and pass" if forecast.macs else ""
    return wrapped(f"memory peak: {peak}{room}{files}{macs}")


def span(seconds: float) -> str:
    """Returns a time in two digits or so: "0.4s", "38s", "12m", "3.4h"."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g}{unit}" if seconds < 10 * length else f"{seconds / length:.0f}{unit}"
    return f"{seconds:.2g}s" if seconds < 10 else f"{seconds:.0f}s"


def size(count: int) -> str:
    """Returns a number of bytes: "412 MB", "3.1 GB" (a thousand MB)."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
