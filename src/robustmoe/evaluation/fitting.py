"""The batch size of an evaluation that says ``auto``: found by the first passes of its attacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from robustmoe import distributed, memory, records
from robustmoe.attacks import Attack, Surrogate
from robustmoe.errors import UserError
from robustmoe.evaluation.attacked import attacked_images, clean_forward, rows_of
from robustmoe.evaluation.session import Session
from robustmoe.noise import Noise
from robustmoe.progress import note

PASSES = 6
"""Passes of an attack, after which it holds all that it will hold."""


class _EnoughPasses(Exception):
    """So many passes were made."""


def fit(session: Session, attacks: Sequence[Attack], files: Iterable[Path] = ()) -> None:
    """Gives the session's options a number, where their batch size is ``auto``: that of one of the ``files`` that are
    there already, else the largest, a power of two, that fits into the memory of the device.
    """
    options = session.options
    if options.batch_size != "auto":
        return
    if distributed.world() > 1 or options.shard is not None:
        raise UserError("--batch-size auto is found by one process; with shards, or under torchrun, give the number")
    there = next((file for file in files if file.exists()), None)
    size = 0 if there is None else records.read(there).header.batch_size
    if not size:
        best = memory.largest(lambda n: _attempt(session, attacks, n), session.device, len(session.images))
        note(f"--batch-size auto: {best} images at a time")
        size = best.size
    session.options = replace(options, batch_size=size)


def _attempt(session: Session, attacks: Sequence[Attack], n: int) -> None:
    batch = session.images.batch(list(range(n))).to(session.device)
    surrogate = session.surrogate(precision=session.options.precision)
    rows_of(session.model, clean_forward(session.model, batch))
    for attack in attacks:
        passes = 0

        def on_pass(n: int, gradient: bool) -> None:
            nonlocal passes
            passes += 1
            if passes > PASSES:
                raise _EnoughPasses

        watched = Surrogate(surrogate.climbed, session.model, surrogate.close, on_pass)
        try:
            attacked_images(watched, attack, batch, Noise.of(batch.index, attack.seed))
        except _EnoughPasses:
            continue
