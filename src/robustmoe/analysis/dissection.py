"""A dissection in numbers: how well the routers keep the route, how well each expert keeps the label, and which gives
way first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from robustmoe.analysis.labels import router_names
from robustmoe.analysis.load import Load, load_by_class
from robustmoe.analysis.rates import Rate, mean, rate, right, robust, wilson
from robustmoe.records import Dissection, RouterInfo, Row
from robustmoe.records.dissection import CLEAN

Table = tuple[tuple[float, ...], ...]
Weaker = Literal["router", "experts", "neither", "unclear"]


@dataclass(frozen=True)
class RouterPart:
    """One router; ``short``: its name in tables. By attack: ``consistency``, images all of whose items keep their
    experts; ``kept``, the mean share of items that do; ``load``, the share of the items that each expert gets ("clean"
    too; the items of one image are not independent, so with several of them the interval is too narrow); ``iou``, the
    mean of :func:`route_iou`.

    ``classes``: who gets which class, clean and under the router-margin attack, and ``class_iou`` the IoU of each class
    and expert there (nan: neither has images). ``transitions``: [from][to] images under that attack; None for routers
    that do not choose one expert an image. ``gap_median``, ``gap_max``, ``ties``: of the gap between the weakest chosen
    logit and the best that is not chosen; None for a router that chooses all. ``entropy``: mean over images, nats.
    ``residue``: accuracy on y mod E, clean and attacked (AdvMoE's released number); None where it was not asked."""

    name: str
    short: str
    info: RouterInfo
    consistency: dict[str, Rate]
    kept: dict[str, float]
    load: dict[str, tuple[Rate, ...]]
    iou: dict[str, float]
    classes: Load
    class_iou: Table
    transitions: tuple[tuple[int, ...], ...] | None
    gap_median: float | None
    gap_max: float | None
    ties: Rate | None
    entropy: float
    residue: tuple[Rate, Rate] | None


@dataclass(frozen=True)
class ExpertPart:
    """One expert, forced at every router on all images: ``clean`` and, under an attack on it alone, ``robust``.

    ``own`` and ``others``: router -> clean accuracy on the images that this router sends wholly to this expert, and on
    the rest. ``own_residue``, ``other_residues``: clean accuracy on the classes with y mod E = k, and on the rest (E:
    the experts that all routers have)."""

    k: int
    clean: Rate
    robust: Rate
    own: dict[str, Rate]
    others: dict[str, Rate]
    own_residue: Rate
    other_residues: Rate


@dataclass(frozen=True)
class DissectionSummary:
    """A routed model taken apart; every rate is over the same ``n`` images.

    ``clean``: SA. ``robust``: attack -> images right before and after it, by the model as it is: RA under "prediction",
    live RA-E under "experts", live RA-R under "router". ``routing_fixed``: RA-E of the model whose routing is fixed at
    the clean one, under the attack on it. ``routing_transplanted``: RA-R of the model whose experts' answers are fixed
    at the clean ones (right before, and the clean image right on the route that the attack on the router alone leads
    to). ``misrouted``: the same on the route that the router-margin attack leads to. ``worst``: right under every
    attack of the dissection, RA by union. ``disagreement``: pair of experts -> clean images on which their classes
    differ. ``weaker``: which part gives way first, see :func:`weaker_part`. ``mean_expert``: mean of RA_k over the
    experts; ``mean_disagreement``: over the pairs of experts; nan for a single one. (SA, RA, RA-E, RA-R: names of Zhang
    et al., ICML 2025.)"""

    n: int
    clean: Rate
    robust: dict[str, Rate]
    routing_fixed: Rate
    routing_transplanted: Rate
    misrouted: Rate
    worst: Rate
    routers: tuple[RouterPart, ...]
    experts: tuple[ExpertPart, ...]
    disagreement: dict[tuple[int, int], Rate]
    weaker: Weaker
    mean_expert: float
    mean_disagreement: float

    @property
    def undercut(self) -> tuple[str, ...]:
        """Returns the attacks on one part, "experts" and "router", that leave the model as it is fewer images than the
        attack on the whole model, which was too weak then: RA <= min(RA-E, RA-R), both live, holds for one that is
        worth its name."""
        whole = self.robust["prediction"].count
        return tuple(attack for attack in ("experts", "router") if self.robust[attack].count < whole)

    def consistency(self, attack: str) -> Rate:
        """Returns the lowest route consistency of any router under that attack."""
        return min((router.consistency[attack] for router in self.routers), key=lambda kept: kept.value)


def dissection_summary(record: Dissection) -> DissectionSummary:
    """Returns the numbers of a dissection that is done."""
    rows = {attack: rows_under(record, attack) for attack in record.under}
    attacks = [attack for attack in rows if attack != CLEAN]
    routing_fixed = _kept(rows["experts"], "experts_exposed")
    routing_transplanted = _kept(rows["router"], "router_exposed")
    experts = tuple(_expert(record, k) for k in range(len(record.forced)))
    disagreement = {
        (i, j): rate([a != b for a, b in zip(record.forced[i], record.forced[j], strict=True)])
        for i, j in combinations(range(len(record.forced)), 2)
    }
    return DissectionSummary(
        n=record.header.n,
        clean=rate([right(row) for row in rows[CLEAN]]),
        robust={attack: rate([robust(row) for row in rows[attack]]) for attack in attacks},
        routing_fixed=rate(routing_fixed),
        routing_transplanted=rate(routing_transplanted),
        misrouted=rate(_kept(rows["margin"], "router_exposed")),
        worst=rate([all(map(robust, same)) for same in zip(*rows.values(), strict=True)]),
        routers=tuple(_router(record, rows, name) for name in record.header.routers),
        experts=experts,
        disagreement=disagreement,
        weaker=weaker_part(routing_fixed, routing_transplanted, [right(row) for row in rows[CLEAN]]),
        mean_expert=mean([expert.robust.value for expert in experts]),
        mean_disagreement=mean([share.value for share in disagreement.values()]),
    )


def rows_under(record: Dissection, attack: str) -> list[Row]:
    """Returns the answers under one attack as the rows of an evaluation. (Of "expert k", ``experts_exposed`` is the
    forced expert's class.)"""
    clean, after, n = record.under[CLEAN], record.under[attack], len(record.labels)
    return [
        Row(
            index=record.index[i],
            label=record.labels[i],
            clean=clean.predicted[i],
            adversarial=after.predicted[i],
            size={record.header.norm: after.size[i]},
            rerouted={name: shares[i] for name, shares in after.moved.items()},
            router_exposed=after.routing_transplanted[i],
            experts_exposed=after.routing_fixed[i],
            route_clean={name: routes[i] for name, routes in clean.routes.items()},
            route_adversarial={name: routes[i] for name, routes in after.routes.items()},
        )
        for i in range(n)
    ]


def weaker_part(experts: Sequence[bool], router: Sequence[bool], clean: Sequence[bool]) -> Weaker:
    """Returns which part gives way first, on the images that are right: those broken by the experts alone (the routing
    fixed) against those broken by the router alone (the experts' answers fixed).

    Only images broken by one of the two decide (McNemar's pairing): "unclear" unless the Wilson interval of their
    shares leaves out one half; "neither" where nothing breaks."""
    pairs = [(not f, not m) for f, m, c in zip(experts, router, clean, strict=True) if c]
    by_experts, by_router = sum(f and not m for f, m in pairs), sum(m and not f for f, m in pairs)
    if not any(f or m for f, m in pairs):
        return "neither"
    low, high = wilson(by_experts, by_experts + by_router)
    return "experts" if low > 0.5 else "router" if high < 0.5 else "unclear"


def route_iou(
    labels: Sequence[int], before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], classes: int, experts: int
) -> Table:
    """Returns class by expert: |A and B| / |A or B| of the images of that class of which the expert gets an item, A
    before and B after an attack; nan where both are empty. ``before``, ``after``: image -> items of each expert."""
    table = []
    for label in range(classes):
        mine = [i for i, own in enumerate(labels) if own == label]
        line = []
        for k in range(experts):
            a, b = ({i for i in mine if routes[i][k]} for routes in (before, after))
            line.append(len(a & b) / len(a | b) if a | b else math.nan)
        table.append(tuple(line))
    return tuple(table)


def _kept(rows: Iterable[Row], field: str) -> list[bool]:
    return [right(row) and getattr(row, field) == row.label for row in rows]


def _router(record: Dissection, rows: dict[str, list[Row]], name: str) -> RouterPart:
    info, labels = record.header.routers[name], record.labels
    clean, margin = record.under[CLEAN].routes[name], record.under["margin"].routes[name]
    attacks = [attack for attack in rows if attack != CLEAN]
    tables = {
        attack: route_iou(labels, clean, record.under[attack].routes[name], len(record.header.classes), info.experts)
        for attack in attacks
    }
    moved = {attack: record.under[attack].moved[name] for attack in attacks}
    single = info.k == info.items == 1
    gaps = name in record.narrow
    return RouterPart(
        name=name,
        short=router_names(list(record.header.routers))[name],
        info=info,
        consistency={attack: rate([share == 0 for share in shares]) for attack, shares in moved.items()},
        kept={attack: 1 - mean(shares) for attack, shares in moved.items()},
        load={attack: _load(answers.routes[name]) for attack, answers in record.under.items()},
        iou={
            attack: mean([v for line in table for v in line if not math.isnan(v)]) for attack, table in tables.items()
        },
        classes=load_by_class(record.header, rows["margin"], name),
        class_iou=tables["margin"],
        transitions=_transitions(clean, margin, info.experts) if single else None,
        gap_median=statistics.median(record.narrow[name]) if gaps else None,
        gap_max=max(record.wide[name]) if gaps else None,
        ties=rate([gap == 0 for gap in record.narrow[name]]) if gaps else None,
        entropy=mean(record.entropy[name]),
        residue=_residue(labels, clean, record.under["residue"].routes[name]) if "residue" in record.under else None,
    )


def _load(routes: Sequence[Sequence[int]]) -> tuple[Rate, ...]:
    counts = [sum(column) for column in zip(*routes, strict=True)]
    return tuple(Rate(count, sum(counts)) for count in counts)


def _transitions(before: Sequence[list[int]], after: Sequence[list[int]], experts: int) -> tuple[tuple[int, ...], ...]:
    pairs = [(a.index(1), b.index(1)) for a, b in zip(before, after, strict=True)]
    return tuple(tuple(pairs.count((i, j)) for j in range(experts)) for i in range(experts))


def _residue(labels: Sequence[int], before: Sequence[list[int]], after: Sequence[list[int]]) -> tuple[Rate, Rate]:
    """Returns images sent to expert y mod E, clean and attacked (each on its own, as the released code counts)."""
    first, second = ([bool(route[y % len(route)]) for y, route in zip(labels, routes, strict=True)]
                     for routes in (before, after))  # fmt: skip
    return rate(first), rate(second)


def _expert(record: Dissection, k: int) -> ExpertPart:
    clean = [said == label for said, label in zip(record.forced[k], record.labels, strict=True)]
    after = [
        said == label for said, label in zip(record.under[f"expert {k}"].routing_fixed, record.labels, strict=True)
    ]

    routed = {
        name: _split(clean, [route[k] == sum(route) for route in routes])
        for name, routes in record.under[CLEAN].routes.items()
    }
    residue = _split(clean, [label % len(record.forced) == k for label in record.labels])
    return ExpertPart(
        k=k,
        clean=rate(clean),
        robust=rate([a and b for a, b in zip(clean, after, strict=True)]),
        own={name: pair[0] for name, pair in routed.items()},
        others={name: pair[1] for name, pair in routed.items()},
        own_residue=residue[0],
        other_residues=residue[1],
    )


def _split(hits: Sequence[bool], mine: Sequence[bool]) -> tuple[Rate, Rate]:
    """Returns the hits among the images that are mine, and among the rest."""
    pairs = list(zip(hits, mine, strict=True))
    return rate([hit for hit, own in pairs if own]), rate([hit for hit, own in pairs if not own])
