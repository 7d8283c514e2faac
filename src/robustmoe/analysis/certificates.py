"""Certificates in numbers: certified accuracy against radius, what stands in the way, and what attacks say to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from robustmoe.analysis.labels import attack_name
from robustmoe.analysis.rates import Rate, inside, mean, rate, right, robust
from robustmoe.records import Certificates, Evaluation, Header, Proof, Row

HAIR = 1e-6
"""Relative: the rounding of a radius that was computed in float32."""

POINTS = 200
"""Radii of a curve, about."""

MULTIPLES = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0)
"""The radii of a table, in eps."""

OBSTACLES = ("route", "experts", "network", "formula", "votes")
"""Why an image that is right is not certified at eps. "route": several experts are reachable, some of them proven on
their own, others not; "experts": several are, and none is proven; "network": the route is the same everywhere, or there
is none, or it is bounded inside the network, and what it leads to is not proven; "formula": the constants of a bound on
the whole mixture are too large, and no expert is asked on its own; "votes": too few of the noisy copies agree."""


@dataclass(frozen=True)
class Refuted:
    """An image whose certificate is wrong: ``attack`` makes the model say ``answer`` instead of ``prediction`` with a
    perturbation of ``size``, inside the certified ``radius``. Size 0: without an attack."""

    index: int
    prediction: int
    radius: float
    attack: str
    answer: int
    size: float


@dataclass(frozen=True)
class Against:
    """The attacks at one eps, on the images that they and the certifier share: the shares that are right, right under
    every one of ``attacks``, and right and certified at that eps."""

    eps: float
    attacks: tuple[str, ...]
    clean: Rate
    robust: Rate
    certified: Rate


@dataclass(frozen=True)
class CertificatesSummary:
    """What a certifier proves of ``n`` images. ``right``: images whose certified prediction is the label (of a model's
    own certificates: its clean accuracy); ``certified``: at the certifier's eps too; ``unstable``: that, though the
    route is not the same in the whole ball; ``abstained``: no prediction. ``curve``: (radius, share right and certified
    there), rising, from 0. ``mean_radius``: 0 where the prediction is wrong.

    ``radii``: those of the curve for a table. ``reachable``: mean number of reachable experts at eps, of
    ``experts``; ``crowd``: the same on images with the obstacle "route" or "experts"; None where not known. ``stable``:
    share of images whose route is the same in the whole ball, or (smoothed) of the noise that keeps it. ``rules``:
    images by the rule that proves their radius. ``obstacles``: of the images that are right and not certified, by
    `OBSTACLES`. ``seconds``: an image. ``against``: the attacks of the same model, by eps; ``refuted``: what they
    disprove."""

    n: int
    right: Rate
    certified: Rate
    unstable: Rate
    abstained: Rate
    curve: tuple[tuple[float, Rate], ...]
    radii: tuple[float, ...]
    mean_radius: float
    reachable: float | None
    crowd: float | None
    experts: int | None
    stable: float | None
    rules: dict[str, Rate]
    obstacles: dict[str, Rate]
    seconds: float
    against: tuple[Against, ...]
    refuted: tuple[Refuted, ...]

    @property
    def largest(self) -> float:
        """Returns the largest radius at which an image is right and certified; 0 without one."""
        return max((radius for radius, share in self.curve if share.count), default=0.0)

    def at(self, eps: float) -> Against | None:
        """Returns the attacks at that eps."""
        return next((attacks for attacks in self.against if abs(attacks.eps - eps) <= HAIR * eps), None)


def certificates_summary(record: Certificates, results: Sequence[Evaluation] = ()) -> CertificatesSummary:
    """Returns the numbers of the images that are done. ``results``: evaluations of the run; those of the same model,
    images and norm are compared."""
    rows, eps = record.rows, record.header.eps
    good = [row.right and covers(row, eps) for row in rows]
    missing = [row for row, sure in zip(rows, good, strict=True) if row.right and not sure]
    kinds = [obstacle(row) for row in missing]
    results = _same(record, results)
    radii = tuple(eps * multiple for multiple in MULTIPLES)
    return CertificatesSummary(
        n=len(rows),
        right=rate([row.right for row in rows]),
        certified=rate(good),
        unstable=rate([sure and row.stable is not None and row.stable < 1 for row, sure in zip(rows, good)]),
        abstained=rate([row.prediction < 0 for row in rows]),
        curve=_curve(rows, (*radii, *(result.header.eps for result in results))),
        radii=radii,
        mean_radius=mean([row.radius if row.right else 0.0 for row in rows]) if rows else 0.0,
        reachable=_known([row.reachable for row in rows if row.reachable is not None]),
        crowd=_known([row.reachable or 0 for row, kind in zip(missing, kinds) if kind in ("route", "experts")]),
        experts=_experts(record),
        stable=_known([row.stable for row in rows if row.stable is not None]),
        rules={name: rate([row.rule == name for row in rows]) for name in sorted({row.rule for row in rows} - {""})},
        obstacles={kind: rate([each == kind for each in kinds]) for kind in OBSTACLES if kind in kinds},
        seconds=record.seconds / max(len(rows), 1),
        against=tuple(_against(record, results)),
        refuted=tuple(refuted(record, results)),
    )


def covers(row: Proof, eps: float) -> bool:
    """Says whether the image's certificate reaches eps."""
    return row.radius >= eps * (1 - HAIR)


def obstacle(row: Proof) -> str:
    """Returns which of `OBSTACLES` it is for an image that is not certified."""
    if row.reachable is None:
        return "votes"
    if row.proven is None:
        return "formula"
    if row.stable == 1 or row.reachable == 1:
        return "network"
    return "route" if row.proven else "experts"


def _curve(rows: Sequence[Proof], asked: Sequence[float]) -> tuple[tuple[float, Rate], ...]:
    radii = sorted({row.radius for row in rows if row.right and 0 < row.radius < math.inf})
    step = max(1, math.ceil(len(radii) / POINTS))
    some = sorted({0.0, *asked, *radii[::-step]})
    return tuple((radius, rate([row.right and row.radius >= radius * (1 - HAIR) for row in rows])) for radius in some)


def _known(values: Sequence[float | int]) -> float | None:
    """Returns the mean; None where nothing is known."""
    return mean(values) if values else None


def _experts(record: Certificates) -> int | None:
    """Returns how many experts there are; None of a dense model, and where several routers or halves count together."""
    routers = record.header.routers
    if len(routers) != 1 or next(iter(routers)).startswith(("standard.", "robust.")):
        return None
    return next(iter(routers.values())).experts


# Against attacks -------------------------------------------------------------------------------------------------


def refuted(record: Certificates, results: Sequence[Evaluation]) -> list[Refuted]:
    """Returns the certificates that the model itself contradicts: it says something else on the clean image, or an
    attack changes what it says with a perturbation below the radius, or inside a ball that is certified. Certificates
    of a smoothed model say nothing of the model that was attacked: [] for them."""
    proofs = {row.index: row for row in record.rows if row.radius > 0}
    wrong = []
    for header, rows, _ in _same(record, results):
        for row in rows:
            proof = proofs.get(row.index)
            if proof is None or proof.label != row.label:
                continue
            size, name = row.size[header.norm], attack_name(header)
            certain = size <= proof.radius * (1 - HAIR) or (covers(proof, header.eps) and inside(size, header.eps))
            if row.clean != proof.prediction:
                wrong.append(Refuted(row.index, proof.prediction, proof.radius, name, row.clean, 0.0))
            elif row.adversarial != row.clean and certain:
                wrong.append(Refuted(row.index, proof.prediction, proof.radius, name, row.adversarial, size))
    return sorted(wrong, key=lambda each: (each.index, each.size))


def _against(record: Certificates, results: Sequence[Evaluation]) -> Iterable[Against]:
    """Yields the attacks, by eps. ``results``: those of `_same`."""
    proofs = {row.index: row for row in record.rows}
    for eps in sorted({result.header.eps for result in results}):
        some = [result for result in results if result.header.eps == eps]
        tables: list[dict[int, Row]] = [{row.index: row for row in result.rows} for result in some]
        images = sorted(set(proofs).intersection(*tables))
        if images:
            yield Against(
                eps=eps,
                attacks=tuple(dict.fromkeys(attack_name(result.header) for result in some)),
                clean=rate([all(right(table[i]) for table in tables) for i in images]),
                robust=rate([all(robust(table[i]) for table in tables) for i in images]),
                certified=rate([proofs[i].right and covers(proofs[i], eps) for i in images]),
            )


def _same(record: Certificates, results: Sequence[Evaluation]) -> list[Evaluation]:
    """Returns the attacked files of the same model, images and norm."""

    def images(header: Header) -> tuple[str, ...]:
        return (header.data, header.split, header.data_hash if header.data == "arrays" else "")

    mine = record.header
    if record.subject != "model":
        return []
    return [
        result
        for result in results
        if result.header.attack is not None
        and (result.header.model_hash, result.header.norm) == (mine.model_hash, mine.norm)
        and images(result.header) == images(mine)
    ]
