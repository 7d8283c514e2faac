"""What a long job says while it runs, on stderr: `progress` is a bar on a terminal and in a notebook, and elsewhere, as
in a log file, a line at most every 30 seconds with the time left; `note` is a plain line.

Under torchrun only the first process speaks. rich is imported with the first bar. The variable ROBUSTMOE_PROGRESS says
how many seconds are between two lines, or "off".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from importlib import import_module
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from robustmoe.errors import printable

T = TypeVar("T")

_display: Any = None  # the one rich.progress.Progress on the screen; bars are its tasks
_open_bars = 0

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""

_IN_NOTEBOOK = 0.5
"""Seconds between two looks of a bar in a notebook."""

_VARIABLE = "ROBUSTMOE_PROGRESS"
_bars: list[Any] = []  # those that are open where there is no terminal, the outermost first
_told = 0.0  # when something was last shown of them
_closed = 0.0  # when the last of them was closed
_PAUSE = 5.0
"""Seconds after which a bar begins a job of its own, whose first line comes after a whole interval."""

_area: Any = None  # the output of a notebook that shows them


def first_process() -> bool:
    """Whether this process is the one that speaks: always, but in a torchrun worker of a rank above 0."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str, file: Any) -> None:
    """Print text, with what the terminal would obey, or cannot show, written as escapes: it may come from a file."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def note(text: str) -> None:
    """Print a plain line to stderr, above the bar if there is one."""
    if not first_process():
        return
    if _display is not None:
        _display.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    else:
        show(text, sys.stderr)


class Bar(Generic[T]):
    """One bar. Iterate over it, or use it as a context manager and `advance` it; `say` sets the text at its end,
    `expect` the total.

    Where there is no terminal, the same calls show a line now and then (see the head of this module).
    """

    def __init__(self, items: Iterable[T], total: int | None, description: str, unit: str) -> None:
        self.items, self.total, self.description, self.unit = items, total, printable(description), unit
        self._display: Any = None
        self._task: Any = None
        self._done, self._said = 0, ""
        self._began: tuple[float, int] | None = None  # after the first step: what a resume has done took no time

    def __enter__(self) -> Bar[T]:
        global _display, _open_bars, _told
        if not first_process() or os.environ.get(_VARIABLE) == "off":
            return self
        if not sys.stderr.isatty():
            if not _bars and time.monotonic() - _closed > _PAUSE:
                _told = time.monotonic()
            _bars.append(self)
        else:
            if _display is None:
                _display = _new_display()
                _display.start()
            _open_bars += 1
            self._display = _display
            self._task = _display.add_task(self.description, total=self.total, unit=self.unit, extra="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _display, _open_bars, _closed
        if self in _bars:
            _bars.remove(self)
            if not _bars:
                _closed = time.monotonic()
                _clear()
        if self._display is None:
            return
        self._display.remove_task(self._task)
        self._display = None
        _open_bars -= 1
        if _open_bars == 0:
            _display.stop()
            _display = None

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                yield item
                self.advance()

    def advance(self, n: int = 1) -> None:
        """``n`` more are done."""
        self._done += n
        self._began = self._began or (time.monotonic(), self._done)
        if self._display is not None:
            self._display.update(self._task, advance=n)
        elif self in _bars:
            _tell()

    def expect(self, total: int) -> None:
        """There is less (or more) to do than was thought: ``total`` in all, what is done included."""
        self.total = total
        if self._display is not None:
            self._display.update(self._task, total=total)

    def say(self, text: str) -> None:
        """Show ``text`` at the end of the bar: a loss, a count."""
        self._said = printable(text)
        if self._display is not None:
            self._display.update(self._task, extra=self._said)

    def within(self, text: str) -> None:
        """Inside an item that takes long: ``text`` at the end of the bar, and a line of it where it is time for one."""
        self.say(text)
        self.advance(0)

    def log(self) -> None:
        """Show the line now, where lines are shown: in a log file. Elsewhere it is to be seen anyway."""
        if self in _bars and not _kernel():
            show(self.line(), sys.stderr)

    def line(self) -> str:
        """How far it is, as a line: "epoch 3/10: 120/352 steps, 8:02 left, loss 0.31"."""
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.description}: {self._done}{of} {self.unit}".rstrip()]
        if self._began is not None and self.total is not None and self._done > self._began[1]:
            pace = (time.monotonic() - self._began[0]) / (self._done - self._began[1])
            parts.append(f"{span(pace * max(0, self.total - self._done))} left")
        return ", ".join([*parts, *([self._said] if self._said else [])])


class Pace:
    """Images a second, once ``after`` batches are done; the first of them, which pays for what is made once, does not
    count.
    """

    def __init__(self, after: int) -> None:
        self.after, self.batches = after, 0
        self._images, self._seconds = 0, 0.0

    def add(self, images: int, seconds: float) -> None:
        """A batch is done."""
        self.batches += 1
        if self.batches > 1:
            self._images, self._seconds = self._images + images, self._seconds + seconds

    @property
    def rate(self) -> float | None:
        """Images a second; None as long as too few batches are done."""
        return self._images / self._seconds if self.batches >= self.after and self._seconds else None


def span(seconds: float) -> str:
    """Returns a time as a clock shows it: "8:02", "1:08:02"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _kernel() -> bool:
    """Whether this is a notebook: a kernel of Jupyter, whose stderr is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _tell() -> None:
    """Shows the open bars, if it is time."""
    global _told, _area
    now = time.monotonic()
    notebook = _kernel()
    if now - _told < (_IN_NOTEBOOK if notebook else _interval()):
        return
    _told = now
    text = "; ".join(bar.line() for bar in _bars)
    if not notebook:
        show(text, sys.stderr)
    elif _area is None:
        _area = import_module("IPython.display").display({"text/plain": text}, raw=True, display_id=True)
    else:
        _area.update({"text/plain": text}, raw=True)


def _interval() -> float:
    try:
        return float(os.environ.get(_VARIABLE, EVERY))
    except ValueError:
        return EVERY


def _clear() -> None:
    """Takes the bars off the notebook."""
    global _area
    if _area is not None:
        _area.update({"text/plain": ""}, raw=True)
        _area = None


@overload
def progress(items: int, description: str, total: int | None = None, unit: str = "") -> Bar[int]: ...
@overload
def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "") -> Bar[T]: ...
def progress(items: Iterable[Any] | int, description: str, total: int | None = None, unit: str = "") -> Bar[Any]:
    """A bar over ``items`` (or over a number of steps), with the time left.

    ``for x in progress(loader, "epoch 3", unit="batches")``, or ``with progress(100, "attack") as bar`` with
    ``bar.advance()`` and ``bar.say("loss 0.31")``.
    """
    if isinstance(items, int):
        return Bar(range(items), items if total is None else total, description, unit)
    if total is None and isinstance(items, Sized):
        total = len(items)
    return Bar(items, total, description, unit)


def _new_display() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}", markup=False),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
