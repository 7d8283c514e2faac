"""Certify a data set image by image: `certify` for a model in hand, `certify_run` for a run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustmoe import analysis, distributed, provenance, records
from robustmoe import spec as specs
from robustmoe.attacks import linf
from robustmoe.certification import Bounds, Certificate, Certifier, build_certifier
from robustmoe.data import Batch, Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation.choosing import threat_of, written
from robustmoe.evaluation.folders import about_images, about_run
from robustmoe.evaluation.measuring import borrowed, first_look, headed, images_of
from robustmoe.evaluation.precision import in_float32
from robustmoe.models.base import RoutedModel, as_routed
from robustmoe.noise import Noise
from robustmoe.options import CertifyOptions, takes
from robustmoe.progress import note, progress
from robustmoe.records import Certificates, Header, Proof
from robustmoe.training.checkpoint import load_model, read_config


@takes(CertifyOptions, limit=None)
def certify(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    options: CertifyOptions,
    num_classes: int | None = None,
) -> list[Certificates]:
    """What each certifier ("bounds(linf(2/255))", "smoothing(sigma=0.25)") proves of a model on images (n, ch, h, w) in
    [0, 1] with labels (n), or on a data set of the project (its test split); by default bounds at linf 8/255.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c), which counts as one network without a
    router. ``.radii()`` of a result is what `evaluate` takes as ``certified``; `analysis.certificates_summary`
    makes numbers of it. Weights in half precision are certified in a float32 copy. The model keeps its modes and
    device. Raises UserError for a model that the certifier cannot bound, and where `evaluate` does.
    """
    chosen = [build_certifier(each) for each in options.certifiers] or [Bounds(linf(8 / 255))]
    routed, where = in_float32(as_routed(model)), distributed.local_device(provenance.pick_device(options.device))
    images, about = images_of(x, y, num_classes).head(options.limit), about_images(model, x)
    with borrowed(routed, where):
        return [Work(routed, each, about, where, options).on(images) for each in dict.fromkeys(chosen)]


@takes(CertifyOptions)
def certify_run(run: str | Path, *, options: CertifyOptions) -> list[Certificates]:
    """Certify the model of a run folder on its first ``limit`` test images, with each certifier; writes
    ``RUN/certificates``, one file a certifier, after each batch. A rerun goes on with the images that are missing.

    ``certifiers``: specs; default: bounds over the ball that the run was trained for. ``seed``: of every random draw.
    Raises UserError where an attack on the same model, in ``RUN/rows``, breaks what is certified. Under torchrun every
    process does the whole work.
    """
    run = Path(run)
    config = read_config(run)
    chosen = [build_certifier(each) for each in options.certifiers] or [_usual(config)]
    where = distributed.local_device(provenance.pick_device(options.device))
    model = in_float32(load_model(run, where)).eval()
    data: Data = specs.build(config["data"], "data")
    about = about_run(run, config, data)
    found = []
    for certifier in dict.fromkeys(chosen):
        work = Work(model, certifier, about, where, options)
        found.append(work.on(data.test.head(options.limit), run, data.test))
    for one in found:
        believe(one, run)
    return found


def _usual(config: dict[str, Any]) -> Certifier:
    """Bounds over the ball that a run was trained for."""
    threat = threat_of(config)
    if threat.norm == "l1":
        raise UserError(
            "the run was trained for l1, for which there are no bounds; name a --certifier, such as "
            "smoothing(sigma=0.25) or bounds(linf(2/255))"
        )
    return Bounds(threat)


def believe(found: Certificates, run: Path) -> None:
    """UserError where an attack in the run folder broke what is certified."""
    wrong = analysis.refuted(found, [records.read(path) for path in records.rows_files(run)])
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"ALARM: image {first.index} is certified as {first.prediction} up to {found.header.norm} "
            f"{first.radius:.6g}, but {first.attack} makes it {first.answer} with {first.size:.6g}{more}: the "
            f"certificates of {found.certifier} are wrong, or not of this model; the report shows them"
        )


class Work:
    """One certifier and one model in eval mode, on its device."""

    def __init__(
        self,
        model: RoutedModel,
        certifier: Certifier,
        about: dict[str, Any],
        device: torch.device,
        options: CertifyOptions,
    ) -> None:
        self.model, self.certifier, self.about, self.device = model, certifier, about, device
        self.batch_size, self.seed = options.batch_size, options.seed

    def header(self, images: ImageSet) -> Header:
        return headed(
            self.model,
            images,
            self.device,
            self.batch_size,
            self.about,
            attack=None,
            objective=None,
            norm=self.certifier.norm,
            eps=float(self.certifier.eps),
            role="main",
            seed=self.seed,
            precision="strict",
        )

    def on(self, images: ImageSet, folder: Path | None = None, source: ImageSet | None = None) -> Certificates:
        """All images; those that stand in the folder's file are not done again. ``source``: what ``images`` are the
        first of.
        """
        first_look(self.model, images, self.device)
        found = None if folder is None else self._taken_up(folder, images, source or images)
        found = found or Certificates(self.header(images), written(self.certifier), self.certifier.subject, [])
        known = {row.index for row in found.rows}
        left = torch.tensor([at for at, index in enumerate(images.index.tolist()) if index not in known]).long()
        with progress(len(images), f"certify, {found.certifier}", unit="images") as bar:
            bar.advance(len(images) - len(left))
            for batch in batches(images, self.batch_size, left, self.device):
                found = replace(found, rows=found.rows + self._proofs(batch))
                if folder is not None:
                    found.write(folder)
                bar.advance(len(batch))
        return found

    def _taken_up(self, folder: Path, images: ImageSet, source: ImageSet) -> Certificates | None:
        """What stands in the file, if it is of the same work on as many images, fewer or more of the same; a note says
        of which other.
        """
        old = Certificates.read(folder, written(self.certifier))
        if old is None:
            return None
        asked = self.header(images)
        there = asked if old.header.n == asked.n else self.header(source.head(old.header.n))
        other = records.difference(old.header, there)
        if other is None and old.certifier == written(self.certifier):
            return old if old.header.n >= asked.n else replace(old, header=asked)
        note(f"{old.path(folder, old.which)} is of another {(other or 'certifier').replace('_', ' ')}; it is made anew")
        return None

    def _proofs(self, batch: Batch) -> list[Proof]:
        clock = time.monotonic()
        found = self.certifier(self.model, batch.x, Noise.of(batch.index, self.seed))
        self._sound(found, len(batch))
        seconds = (time.monotonic() - clock) / len(batch)
        pairs = zip(batch.index.tolist(), batch.y.tolist(), found)
        return [
            Proof(
                index=index,
                label=label,
                prediction=one.prediction,
                radius=float(one.radius),
                rule=one.rule,
                reachable=one.reachable,
                proven=one.held,
                stable=one.stable,
                reason=one.reason,
                seconds=seconds,
            )
            for index, label, one in pairs
        ]

    def _sound(self, found: list[Certificate], n: int) -> None:
        name = type(self.certifier).__name__
        if len(found) != n:
            raise UserError(f"{name} gives {len(found)} certificates for {n} images; expected one each")
        for one in found:
            if math.isnan(one.radius) or one.radius < 0:
                raise UserError(f"{name} gives a radius of {one.radius}; expected 0 or more")
