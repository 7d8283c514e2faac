"""The forecast of a certification: each certifier on a few images, timed."""

from __future__ import annotations

from pathlib import Path

import torch

from robustmoe import memory
from robustmoe.certification.bounds import telling
from robustmoe.evaluation.certifying import Certifying, chosen_certifiers
from robustmoe.evaluation.choosing import spec_or_repr, threat_of
from robustmoe.evaluation.session import on_run
from robustmoe.forecasting.timing import Seconds, Stopwatch
from robustmoe.options import CertifyOptions
from robustmoe.progress import progress
from robustmoe.records.forecast import Forecast
from robustmoe.runs import named
from robustmoe.training.checkpoint import read_config

FEWEST = 4
"""Images that a certifier is timed on, where one does not take all the time."""


def forecast_certification(run: str | Path, options: CertifyOptions, seconds: float) -> Forecast:
    """Returns the forecast of certifying the model of a run, from about ``seconds`` of CPU time of its own work."""
    whole = Stopwatch(torch.device("cpu"))
    certifiers = chosen_certifiers(options, threat_of(read_config(named(run))))
    with on_run(run, options, float32=True, writes=False) as session:
        device, n = session.device, len(session.images)
        memory.restart_peak(device)
        clock, parts, seen = Stopwatch(device), [], []
        _ = session.output
        for certifier in certifiers:
            each, images = timed(Certifying(session, certifier), seconds / len(certifiers))
            parts.append((each * float(n)).part(spec_or_repr(certifier), n, "images"))
            seen.append(images)
        spent = clock.read()
        least, most = min(seen), max(seen)
        return Forecast(
            job="certification",
            what=f"{session.about.run} on {n} images of {session.about.data}",
            device=str(device),
            threads=torch.get_num_threads(),
            batch_size=options.batch_size,
            parts=((whole.read() - spent).part("set-up", 1, "time"), *parts),
            peak=memory.peak(device),
            room=memory.room(device),
            files=0,
            measured=whole.read().cpu,
            notes=(
                f"Timed: the first {least if least == most else f'{least} to {most}'} of {n} images. Images differ in "
                "what they cost, by the experts that can be used near them; images that are done are not taken off.",
            ),
        )


def timed(certifying: Certifying, budget: float) -> tuple[Seconds, int]:
    """What an image takes, and how many of them it was timed on: one, which may take all the time there is; else a few,
    then as many, in whole batches, as there is time for.
    """
    session = certifying.session
    n, batch_size = len(session.images), session.options.batch_size
    took = _proven(certifying, 0, 1)  # cold
    budget -= took.main(session.device)
    images = min(FEWEST, n, batch_size)
    if budget <= 0 or images == 1:
        return took, 1
    took = _proven(certifying, 0, images)
    each = took.main(session.device) / images
    more = min(n, int((budget - took.main(session.device)) / max(each, 1e-9)))
    more = more // batch_size * batch_size or min(more, batch_size)
    if more <= images:
        return took * (1 / images), images
    took = sum((_proven(certifying, at, min(at + batch_size, more)) for at in range(0, more, batch_size)), Seconds())
    return took * (1 / more), more


def _proven(certifying: Certifying, first: int, end: int) -> Seconds:
    session = certifying.session
    batch = session.images.batch(list(range(first, end))).to(session.device)
    with progress(1, f"forecast, {spec_or_repr(certifying.certifier)}") as bar, telling(tell=bar.within):
        clock = Stopwatch(session.device)
        certifying.proofs(batch)
        return clock.read()
