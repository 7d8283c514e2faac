"""What a long job says while it runs, on stderr: `progress` is a bar on a terminal (else nothing), `note` a plain line.

Under torchrun only the first process speaks. rich is imported with the first bar.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from robustmoe.errors import printable

T = TypeVar("T")

_display: Any = None  # the one rich.progress.Progress on the screen; bars are its tasks
_open_bars = 0


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

    Where there is no terminal, the same calls do nothing.
    """

    def __init__(self, items: Iterable[T], total: int | None, description: str, unit: str) -> None:
        self.items, self.total, self.description, self.unit = items, total, printable(description), unit
        self._display: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar[T]:
        global _display, _open_bars
        if first_process() and sys.stderr.isatty():
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
        global _display, _open_bars
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
        if self._display is not None:
            self._display.update(self._task, advance=n)

    def expect(self, total: int) -> None:
        """There is less (or more) to do than was thought: ``total`` in all, what is done included."""
        self.total = total
        if self._display is not None:
            self._display.update(self._task, total=total)

    def say(self, text: str) -> None:
        """Show ``text`` at the end of the bar: a loss, a count."""
        if self._display is not None:
            self._display.update(self._task, extra=printable(text))


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
