"""What a measurement counts while it runs: time, and passes of the model."""

from __future__ import annotations

import time

from robustmoe.progress import Bar


class Clock:
    """The time that goes by between two readings."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """The seconds since the last call, or since the clock was made."""
        before, self._last = self._last, time.monotonic()
        return self._last - before


class Meter:
    """The passes an attack asks for, an image each; a gradient counts as 3. ``bar``, if it is set, shows them live."""

    def __init__(self) -> None:
        self.queries = 0
        self.bar: Bar[int] | None = None

    def on_pass(self, n: int, gradient: bool) -> None:
        """Counts one pass on ``n`` images (see `Surrogate`)."""
        cost = n * (3 if gradient else 1)
        self.queries += cost
        if self.bar is not None:
            self.bar.advance(cost)
