"""What a forecast says: how long a job will take, part by part, and how much memory. It is no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robustmoe.records.record import Told


@dataclass(frozen=True)
class ForecastPart:
    """A part of a job. ``count``: how often it is done (steps, images); ``cpu`` and ``wall``: seconds in all, of which
    each process time of all threads, and time on the clock. ``low`` and ``high``: as far as ``cpu`` may lie off where
    the probe was small; ``most``: where no image breaks. All are ``cpu`` where there is nothing to guess. ``passes``:
    forward passes an image, a gradient counting as 3, and ``most_passes``, where it never breaks; None where they are
    not counted. ``left``: the share of the probe's images that stands behind the part.
    """

    name: str
    count: int
    unit: str
    cpu: float
    wall: float
    low: float
    high: float
    most: float
    passes: float | None = None
    most_passes: int | None = None
    left: float | None = None


@dataclass(frozen=True)
class Forecast(Told):
    """A forecast of a training, an evaluation or a certification. ``peak``: bytes of memory at the most (``room``: that
    there are; None where the system does not say); ``files``: bytes that the job will write at the most; ``measured``:
    CPU seconds that the forecast itself took; ``macs``: multiply-adds an image and pass, None where they cannot be
    counted.
    """

    job: Literal["training", "evaluation", "certification"]
    what: str
    device: str
    threads: int
    batch_size: int
    parts: tuple[ForecastPart, ...]
    peak: int | None
    room: int | None
    files: int
    measured: float
    macs: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def cpu(self) -> float:
        """CPU seconds in all."""
        return sum(part.cpu for part in self.parts)

    @property
    def wall(self) -> float:
        """Seconds on the clock in all, if the machine is as busy as it was when this was measured."""
        return sum(part.wall for part in self.parts)

    def summary(self, evaluations: Sequence[Any] = ()) -> dict[str, Any]:
        """Returns the numbers, ready for JSON: seconds in all and by part, memory and files in bytes."""
        parts = [
            {
                "name": part.name,
                "count": part.count,
                "unit": part.unit,
                "cpu_seconds": part.cpu,
                "wall_seconds": part.wall,
                "cpu_seconds_from": part.low,
                "cpu_seconds_to": part.high,
                "cpu_seconds_at_most": part.most,
                "passes": part.passes,
                "passes_at_most": part.most_passes,
                "left": part.left,
            }
            for part in self.parts
        ]
        return {
            "job": self.job,
            "what": self.what,
            "device": self.device,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "cpu_seconds": self.cpu,
            "cpu_seconds_from": sum(part.low for part in self.parts),
            "cpu_seconds_to": sum(part.high for part in self.parts),
            "cpu_seconds_at_most": sum(part.most for part in self.parts),
            "wall_seconds": self.wall,
            "peak_bytes": self.peak,
            "room_bytes": self.room,
            "files_bytes": self.files,
            "macs": self.macs,
            "parts": parts,
            "notes": list(self.notes),
            "measured_cpu_seconds": self.measured,
        }
