"""Seconds of work: on the clock, and of the CPU in all threads (which another job on the machine does not lengthen)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from robustmoe.errors import EverywhereError
from robustmoe.records.forecast import ForecastPart


@dataclass(frozen=True)
class Seconds:
    """How long something took, or will take."""

    cpu: float = 0.0
    wall: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(max(0.0, self.cpu - other.cpu), max(0.0, self.wall - other.wall))

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.cpu * times, self.wall * times)

    def main(self, device: torch.device) -> float:
        """The seconds that tell how long it takes here: on the clock where a GPU works, else those of the CPU."""
        return self.wall if device.type == "cuda" else self.cpu

    def part(self, name: str, count: int, unit: str) -> ForecastPart:
        """A part of a forecast that takes so long in all, with nothing to guess."""
        return ForecastPart(name, count, unit, self.cpu, self.wall, self.cpu, self.cpu, self.cpu)


class Stopwatch:
    """Reads both clocks, once the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> Seconds:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Seconds(time.process_time(), time.monotonic())

    def read(self) -> Seconds:
        """The time since it was made, or since the last `lap`."""
        return self._now() - self.start

    def lap(self) -> Seconds:
        """The same, and it starts anew."""
        now = self._now()
        took, self.start = now - self.start, now
        return took


def alone() -> None:
    """EverywhereError under torchrun: how long a share takes is told by one process that has a share."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EverywhereError(
            "a forecast is made by one process; leave torchrun out, and give --batch-size the share of one process"
        )
