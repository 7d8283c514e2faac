"""Certify a data set image by image: `certify` for a model in hand, `certify_run` for a run folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustmoe import analysis, records
from robustmoe.attacks import Threat, linf
from robustmoe.attacks.base import looked_at
from robustmoe.certification import Bounds, Certificate, Certifier, build_certifier
from robustmoe.certification.bounds import telling
from robustmoe.data import Batch, ImageSet
from robustmoe.errors import UserError
from robustmoe.evaluation.choosing import files_of, spec_or_repr, threat_of
from robustmoe.evaluation.engine import assert_shared, in_share
from robustmoe.evaluation.meters import Clock
from robustmoe.evaluation.session import (
    Images,
    Labels,
    Session,
    in_hand,
    on_run,
)
from robustmoe.noise import Noise
from robustmoe.options import CertifyOptions, takes
from robustmoe.progress import progress
from robustmoe.records import Certificates, Header, Proof, Records, versions
from robustmoe.runs import named
from robustmoe.training.checkpoint import read_config


@takes(CertifyOptions, limit=None)
def certify(
    model: Callable[[Tensor], Tensor],
    x: Images,
    y: Labels = None,
    *,
    options: CertifyOptions,
    num_classes: int | None = None,
) -> Records[Certificates]:
    """Certifies a model with each certifier ("bounds(linf(2/255))", "smoothing(sigma=0.25)") on images (n, ch, h, w) in
    [0, 1] with labels (n), or on a data set of the project (its test split); by default with bounds at linf 8/255.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c), which counts as one network without a
    router. ``.radii()`` of a record is what `evaluate` takes as ``certified``. Weights in half precision are certified
    in a float32 copy. The model keeps its modes and device. Raises UserError for a model that the certifier cannot
    bound, and where `evaluate` does.
    """
    certifiers = chosen_certifiers(options, linf(8 / 255))
    with in_hand(model, x, y, options, num_classes, float32=True) as session:
        return Records(Certifying(session, certifier).run() for certifier in certifiers)


@takes(CertifyOptions)
def certify_run(run: str | Path, *, options: CertifyOptions) -> Records[Certificates]:
    """Certifies the model of a run folder on its first test images, with each certifier; writes ``RUN/certificates``,
    one file a certifier, after each batch. A rerun goes on with the images that are missing.

    By default the certifier is bounds over the ball that the run was trained for. Raises UserError where an attack on
    the same model, in ``RUN/rows``, breaks what is certified. Under torchrun every process does the whole work.
    """
    run = named(run)
    certifiers = chosen_certifiers(options, threat_of(read_config(run)))
    with on_run(run, options, float32=True) as session:
        assert_shared(len(session.images), options.batch_size, options.share)
        certified = Records(Certifying(session, certifier).run() for certifier in certifiers)
    for record in certified:
        assert_consistent_with_attacks(record, run)
    return certified


def chosen_certifiers(options: CertifyOptions, threat: Threat) -> list[Certifier]:
    """Each certifier once; bounds over the ball of ``threat`` where none is named."""
    if options.certifiers:
        return list(dict.fromkeys(build_certifier(certifier) for certifier in options.certifiers))
    if threat.norm == "l1":
        raise UserError(
            "the run was trained for l1, for which there are no bounds; name a --certifier, such as "
            "smoothing(sigma=0.25) or bounds(linf(2/255))"
        )
    return [Bounds(threat)]


def assert_consistent_with_attacks(record: Certificates, run: Path) -> None:
    """UserError where an attack in the run folder broke what is certified."""
    wrong = analysis.refuted(record, [records.read(path) for path in records.rows_files(run)])
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"ALARM: image {first.index} is certified as {first.prediction} up to {record.header.norm} "
            f"{first.radius:.6g}, but {first.attack} makes it {first.answer} with {first.size:.6g}{more}: the "
            f"certificates of {record.certifier} are wrong, or not of this model; the report shows them"
        )


@dataclass(frozen=True)
class Certifying:
    """One certifier on the model and the images of a session."""

    session: Session
    certifier: Certifier

    def header(self, images: ImageSet) -> Header:
        return self.session.header(
            images,
            attack=None,
            objective=None,
            norm=self.certifier.norm,
            eps=float(self.certifier.eps),
            files=files_of(self.certifier),
        )

    def run(self) -> Certificates:
        """Certifies all images; those that are in the folder's file are not done again."""
        session, images = self.session, self.session.images
        spec = spec_or_repr(self.certifier)
        record = self._resume() or Certificates(self.header(images), spec, self.certifier.subject, [])
        known = {row.index for row in record.rows}
        index, options = images.index.tolist(), session.options
        here = in_share(len(index), options.batch_size, options.share)
        left = torch.tensor([at for at in here if index[at] not in known]).long()
        with progress(len(here), f"certify, {spec}", unit="images") as bar, telling(tell=bar.within):
            bar.advance(len(here) - len(left))
            for batch in session.batches(left):
                record = replace(record, rows=record.rows + self.proofs(batch))
                session.write(record)
                bar.say("")
                bar.advance(len(batch))
        return record

    def _resume(self) -> Certificates | None:
        """What is in the folder's file, if it is of the same work on as many images, fewer or more of the same; a note
        says of which other.
        """
        folder, spec = self.session.folder, spec_or_repr(self.certifier)
        old = None if folder is None else Certificates.read(folder, spec)
        if folder is None or old is None:
            return None
        asked = self.header(self.session.images)
        there = asked if old.header.n == asked.n else self.header(self.session.source.head(old.header.n))
        other = records.differing(old.header, there)
        if not other and old.certifier == spec:
            self.session.recognise(old.path(folder, spec), old.images())
            left = set(self.session.images.index.tolist()) - {row.index for row in old.rows}
            header, words = versions.taken_up(old.header, asked, len(old.rows))
            if left:
                versions.tell(old.path(folder, spec), words)
            if asked.n > old.header.n:
                header = replace(header, n=asked.n, index_hash=asked.index_hash)
            return replace(old, header=header) if left else old
        records.set_aside(old.path(folder, spec), other or "certifier")
        return None

    def proofs(self, batch: Batch) -> list[Proof]:
        """Returns what is proven of the images of a batch."""
        clock = Clock()
        noise = Noise.of(batch.index, self.session.options.seed)
        with looked_at():
            certificates = self.certifier(self.session.model, batch.x, noise)
        self._sound(certificates, len(batch))
        seconds = clock.lap() / len(batch)
        triples = zip(batch.index.tolist(), batch.y.tolist(), certificates)
        return [
            Proof(
                index=index,
                label=label,
                prediction=certificate.prediction,
                radius=float(certificate.radius),
                rule=certificate.rule,
                reachable=certificate.reachable,
                proven=certificate.held,
                stable=certificate.stable,
                reason=certificate.reason,
                seconds=seconds,
            )
            for index, label, certificate in triples
        ]

    def _sound(self, certificates: list[Certificate], n: int) -> None:
        name = type(self.certifier).__name__
        if len(certificates) != n:
            raise UserError(f"{name} gives {len(certificates)} certificates for {n} images; expected one each")
        for certificate in certificates:
            if math.isnan(certificate.radius) or certificate.radius < 0:
                raise UserError(f"{name} gives a radius of {certificate.radius}; expected 0 or more")
