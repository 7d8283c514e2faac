"""Rows to small tables of numbers. Pure: nothing is read, nothing is written, nothing is drawn.

An image counts as robust when the exact model is right on the clean image and on the attacked one. The headline is
the worst case: an image survives only if it survives every attack of the same threat. Rates are in [0, 1].
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from robustmoe.errors import UserError
from robustmoe.records import Checks, Header, Result, Row

BALL_TOLERANCE = 1e-5  # relative, and 1e-7 beside it: the rounding of float32 pixels
MONOTONE_TOLERANCE = 0.005  # accuracy may rise by half a point between neighbouring eps before we say so
ROUTER_OBJECTIVES = ("joint", "router_only")
SAME_IMAGES = ("model_hash", "data_hash", "split", "index_hash")
SAME_THREAT = (*SAME_IMAGES, "norm", "eps")


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion of ``k`` successes in ``n`` trials (E. B. Wilson, JASA 22, 1927, 209-212).

    ``z`` = 1.959964 gives 95 %. It stays inside [0, 1] and is not empty at k = 0 or k = n; without trials it is (0, 1).
    ValueError unless 0 <= k <= n."""
    if not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    share = k / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if k == 0 else (centre - half) / scale
    high = 1.0 if k == n else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n`` images."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share, nan without images."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(self.count, self.n)


@dataclass(frozen=True)
class Summary:
    """One rows file in numbers. ``robust`` and what follows is None without an attack; ``router_exposed`` (attacked
    route, clean image) and ``experts_exposed`` (clean route, attacked image) are None for a dense model too.
    ``rerouted``: mean share of items that changed expert, per router. ``rerouted_broken``: images that the attack
    both rerouted and broke. ``max_size``: in the header's norm, pixels of [0, 1]. ``failed`` and ``incomplete``:
    sentences that say why not to believe it."""

    attack: str | None
    objective: str | None
    norm: str
    eps: float
    role: str
    n: int
    planned: int
    clean: Rate
    robust: Rate | None
    router_exposed: Rate | None
    experts_exposed: Rate | None
    rerouted: dict[str, float]
    rerouted_broken: Rate | None
    max_size: float
    router_attacked: bool | None
    failed: tuple[str, ...]
    incomplete: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Every planned image has its row, and the checks were run."""
        return not self.incomplete

    @property
    def rerouted_mean(self) -> float | None:
        """The mean over the routers; None without a router or an attack."""
        return sum(self.rerouted.values()) / len(self.rerouted) if self.rerouted else None


@dataclass(frozen=True)
class Adds:
    """What one attack gives to the worst case: the right images it breaks, and those that it alone breaks."""

    name: str
    broken: int
    alone: int


@dataclass(frozen=True)
class WorstCase:
    """The per-image worst over several attacks of one model, one set of images and one threat."""

    norm: str
    eps: float
    clean: Rate
    robust: Rate
    adds: tuple[Adds, ...]
    partial: tuple[str, ...]  # attacks that have not seen all of these images: the number can still fall


@dataclass(frozen=True)
class Verdict:
    """Can the worst case be quoted? ``router_attacked`` is None for a dense model; ``reason`` says why it is what it
    is; the others are sentences, empty if all is well."""

    router_attacked: bool | None
    reason: str
    failed: tuple[str, ...]
    warned: tuple[str, ...]
    incomplete: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Nothing failed, nothing is missing, and the router (if there is one) was attacked."""
        return not self.failed and not self.incomplete and self.router_attacked is not False


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps on the same ``n`` images, eps rising from 0 (clean)."""

    name: str
    norm: str
    n: int
    points: tuple[tuple[float, Rate], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Shares of the items of each class (by true label) that each expert of one router gets; rows are classes, in
    the header's order, and a class without images is a row of zeros. ``dead``: experts that get nothing on clean
    images; ``images``: how many images each class has."""

    router: str
    classes: tuple[str, ...]
    images: tuple[int, ...]
    clean: tuple[tuple[float, ...], ...]
    adversarial: tuple[tuple[float, ...], ...]
    total_clean: tuple[float, ...]
    total_adversarial: tuple[float, ...]
    dead: tuple[int, ...]


# One file --------------------------------------------------------------------------------------------------------


def right(row: Row) -> bool:
    """The exact model is right on the clean image."""
    return row.clean == row.label


def robust(row: Row) -> bool:
    """The exact model is right on the clean and on the attacked image."""
    return row.clean == row.label and row.adversarial == row.label


def largest(sizes: Iterable[float]) -> float:
    """The maximum, nan if any is nan (the built-in ``max`` may lose one)."""
    sizes = list(sizes)
    return math.nan if any(math.isnan(size) for size in sizes) else max(sizes)


def inside(size: float, eps: float) -> bool:
    """Whether a perturbation of that size is in the ball, up to the rounding of float32; False for nan."""
    return size <= eps * (1 + BALL_TOLERANCE) + 1e-7


def _rate(hits: Sequence[bool]) -> Rate:
    return Rate(sum(hits), len(hits))


def summary(header: Header, rows: Sequence[Row], checks: Checks | None) -> Summary:
    """One rows file in numbers; UserError if it has no rows."""
    if not rows:
        raise UserError(f"no rows yet for {attack_name(header)}; `robustmoe evaluate RUN` makes them")
    attacked = header.attack is not None
    routed = attacked and bool(header.routers)
    verdict = judge([Result(header, list(rows), checks)])
    return Summary(
        attack=header.attack,
        objective=header.objective,
        norm=header.norm,
        eps=header.eps,
        role=header.role,
        n=len(rows),
        planned=header.n,
        clean=_rate([right(row) for row in rows]),
        robust=_rate([robust(row) for row in rows]) if attacked else None,
        router_exposed=_rate([row.router_exposed == row.label for row in rows]) if routed else None,
        experts_exposed=_rate([row.experts_exposed == row.label for row in rows]) if routed else None,
        rerouted={name: _mean([row.rerouted.get(name, 0.0) for row in rows]) for name in header.routers if routed},
        rerouted_broken=_rate([_rerouted_and_broken(row) for row in rows]) if routed else None,
        max_size=largest(row.size.get(header.norm, math.nan) for row in rows),
        router_attacked=verdict.router_attacked,
        failed=verdict.failed,
        incomplete=verdict.incomplete,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rerouted_and_broken(row: Row) -> bool:
    return right(row) and row.adversarial != row.label and any(share > 0 for share in row.rerouted.values())


def attack_name(header: Header) -> str:
    """A name for tables: the attack's spec, and the objective where the spec does not say it."""
    if header.attack is None:
        return "no attack"
    says = header.objective in (None, "joint") or str(header.objective) in header.attack
    return header.attack if says else f"{header.attack}, {header.objective}"


def names(headers: Sequence[Header]) -> list[str]:
    """:func:`attack_name` of each, with the seed (or a number) added where two would be the same."""
    plain = [attack_name(header) for header in headers]
    seeded = [
        f"{name}, seed {header.seed}" if plain.count(name) > 1 else name
        for name, header in zip(plain, headers, strict=True)
    ]
    return [
        f"{name} ({seeded[: position + 1].count(name)})" if seeded.count(name) > 1 else name
        for position, name in enumerate(seeded)
    ]


# Several files -----------------------------------------------------------------------------------------------------


def judge(results: Sequence[Result]) -> Verdict:
    """Whether the numbers of these files, taken together, can be quoted.

    The router counts as attacked only if some file with all its rows has an attack whose objective is ``joint`` or
    ``router_only`` and whose own check R1 (some gradient reaches the image through the router) does not fail. If one
    is there, a failure of R1 in another file is a warning: that attack does not see the router, and the first does."""
    attacked, reason = _router_attacked(results)
    failed: dict[str, None] = {}
    warned: dict[str, None] = {}
    incomplete: list[str] = []
    for name, (header, rows, checks) in zip(names([result.header for result in results]), results, strict=True):
        if len(rows) < header.n:
            incomplete.append(f"{name}: {len(rows)} of {header.n} images")
        elif checks is None:
            incomplete.append(f"{name}: not finished, its checks were not run")
        for check in checks.checks if checks is not None else ():
            if check.status in ("fail", "warn"):
                severe = check.status == "fail" and not (check.id == "R1" and attacked)
                sentence = f"{check.id} {check.name}: {check.sentence}"
                (failed if severe else warned)[sentence if check.id != "R1" else f"{sentence} ({name})"] = None
        if header.attack is not None and rows:
            size = largest(row.size.get(header.norm, math.nan) for row in rows)
            if not inside(size, header.eps):
                failed[f"{name}: a perturbation of size {size:.6g} is outside {header.norm} <= {header.eps:.6g}"] = None
    return Verdict(attacked, reason, tuple(failed), tuple(warned), tuple(incomplete))


def _router_attacked(results: Sequence[Result]) -> tuple[bool | None, str]:
    if not any(result.header.routers for result in results):
        return None, "the model is dense"
    aiming = [result for result in results if result.header.attack and result.header.objective in ROUTER_OBJECTIVES]
    if not aiming:
        return False, "no attack has the objective joint or router_only"
    blind = [result for result in aiming if _r1(result) == "fail"]
    seeing = [result for result in aiming if _r1(result) != "fail"]
    if not seeing:
        sentences = [
            check.sentence for result in blind if result.checks for check in result.checks.checks if check.id == "R1"
        ]
        return False, f"check R1 failed: {sentences[0]}"
    if all(len(result.rows) < result.header.n for result in seeing):
        return False, "no attack on the router has seen all its images"
    if blind:
        which = " and ".join(sorted({str(result.header.objective).replace("_", " ") for result in blind}))
        proof = f"check R1: the {which} attack does not see the router"
    else:
        worst = min((_r1(result) for result in seeing), key=("warn", "not run", "pass").index)
        proof = {"warn": "check R1 warns", "not run": "check R1 was not run", "pass": "check R1 passed"}[worst]
    return True, f"{len(seeing)} of {len(results)} attacks aim at the router; {proof}"


def _r1(result: Result) -> str:
    """The status of check R1 in one file."""
    found = [check.status for check in result.checks.checks if check.id == "R1"] if result.checks else []
    return found[0] if found else "not run"


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """The attacked main files that may be put together (same model, images and threat), the largest group first: most
    images, then most attacks, then smallest eps."""
    found: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        if result.header.attack is not None and result.header.role == "main" and result.rows:
            found.setdefault(tuple(getattr(result.header, name) for name in SAME_THREAT), []).append(result)
    size = {key: max(len(result.rows) for result in group) for key, group in found.items()}
    return [
        found[key] for key in sorted(found, key=lambda key: (-size[key], -len(found[key]), found[key][0].header.eps))
    ]


def worst_case(files: Sequence[tuple[Header, Sequence[Row]]]) -> WorstCase:
    """The per-image worst over several attacks.

    Taken over the images that every finished file has (if none is finished, that every file has). An unfinished attack
    counts with the images that it has broken already. UserError if the files differ in model, images or threat."""
    if not files:
        raise UserError("worst case of no attack: give at least one rows file")
    first = files[0][0]
    for header, _ in files:
        for name in SAME_THREAT:
            if getattr(header, name) != getattr(first, name):
                raise UserError(
                    f"attacks cannot be put together: {name} is {getattr(first, name)!r} in one and "
                    f"{getattr(header, name)!r} in another"
                )
    tables = [{row.index: row for row in rows} for _, rows in files]
    whole = [table for (header, _), table in zip(files, tables, strict=True) if len(table) >= header.n]
    images = set.intersection(*(set(table) for table in whole or tables))
    clean = {i for i in images if all(right(table[i]) for table in tables if i in table)}
    broken = [{i for i in clean & set(table) if not robust(table[i])} for table in tables]
    every = set().union(*broken)
    adds = []
    labels = names([header for header, _ in files])
    for position, name in enumerate(labels):
        others = set().union(*(part for at, part in enumerate(broken) if at != position))
        adds.append(Adds(name, len(broken[position]), len(broken[position] - others)))
    return WorstCase(
        norm=first.norm,
        eps=first.eps,
        clean=Rate(len(clean), len(images)),
        robust=Rate(len(clean - every), len(images)),
        adds=tuple(adds),
        partial=tuple(name for name, table in zip(labels, tables, strict=True) if not images <= set(table)),
    )


def family(header: Header) -> str:
    """The attack's spec with its eps replaced and its step size (which goes with eps) left out, so that the files of
    one curve have one name."""
    name = re.sub(r"\b(linf|l2|l1)\([^()]*\)", r"\1(eps)", attack_name(header))
    return re.sub(r", step_size=[^,()]*", "", name)


def eps_curve(files: Sequence[tuple[Header, Sequence[Row]]]) -> list[Curve]:
    """Accuracy against eps, one curve an attack family; files of one eps only give none.

    All points are taken on the images that every finished file of the family has (an unfinished one joins if it has
    them too), and eps = 0 is the clean accuracy on them.
    Two files of one eps count with the worse outcome for each image."""
    families: dict[tuple[object, ...], list[tuple[Header, Sequence[Row]]]] = {}
    for header, rows in files:
        if header.attack is not None and rows:
            key = (family(header), header.norm, header.model_hash, header.data_hash, header.split)
            families.setdefault(key, []).append((header, rows))
    curves = [_curve(str(key[0]), members) for key, members in families.items()]
    return [curve for curve in curves if curve is not None]


def _curve(name: str, members: list[tuple[Header, Sequence[Row]]]) -> Curve | None:
    if len({header.eps for header, _ in members}) < 2:
        return None
    whole = [(header, rows) for header, rows in members if len(rows) >= header.n]
    if len({header.eps for header, _ in whole}) < 2:
        whole = members
    images = set.intersection(*({row.index for row in rows} for _, rows in whole))
    members = [(header, rows) for header, rows in members if images <= {row.index for row in rows}]
    if not images:
        return None
    clean = {row.index for row in members[0][1] if row.index in images and right(row)}
    standing: dict[float, set[int]] = {0.0: clean}
    for header, rows in members:
        kept = {row.index for row in rows if row.index in images and robust(row)}
        standing[header.eps] = standing.get(header.eps, kept) & kept
    points = tuple((eps, Rate(len(standing[eps]), len(images))) for eps in sorted(standing))
    warnings = tuple(
        f"accuracy rises from {100 * low.value:.1f}% at eps {a:.4g} to {100 * high.value:.1f}% at eps {b:.4g}: "
        "the attack is too weak at the larger eps"
        for (a, low), (b, high) in itertools.pairwise(points)
        if high.value > low.value + MONOTONE_TOLERANCE
    )
    return Curve(name, members[0][0].norm, len(images), points, warnings)


def warnings(results: Sequence[Result]) -> list[str]:
    """What does not fit together in the files of one run, in sentences; empty if all is well."""
    found: list[str] = []
    attacked = [result for result in results if result.header.attack is not None and result.rows]
    for curve in eps_curve([(result.header, result.rows) for result in attacked]):
        found += [f"{curve.name}: {sentence}" for sentence in curve.warnings]
    seen: dict[tuple[str, str, int], int] = {}
    changed: set[int] = set()
    for header, rows, _ in results:
        for row in rows:
            key = (header.model_hash, header.data_hash, row.index)
            if seen.setdefault(key, row.clean) != row.clean:
                changed.add(row.index)
    if changed:
        found.append(
            f"{len(changed)} clean images are predicted differently in two files of the same model: "
            "it is not deterministic, or depends on the batch"
        )
    for group in groups(results):
        found += _weaker_joint(group)
    return found


def _weaker_joint(group: list[Result]) -> list[str]:
    """A joint attack may do whatever a narrower one does, so it should not break fewer images (half a point)."""
    rates = {kind: [_rate([robust(row) for row in result.rows]).value for result in group if _whole(result, kind)]
             for kind in ("joint", "experts_only", "router_only")}  # fmt: skip
    return [
        f"the {kind.replace('_', ' ')} attack leaves {100 * min(rates[kind]):.1f}%, the joint one "
        f"{100 * min(rates['joint']):.1f}%: the joint attack is not at its strongest"
        for kind in ("experts_only", "router_only")
        if rates[kind] and rates["joint"] and min(rates[kind]) < min(rates["joint"]) - MONOTONE_TOLERANCE
    ]


def _whole(result: Result, objective: str) -> bool:
    return result.header.objective == objective and len(result.rows) >= result.header.n


# Experts -----------------------------------------------------------------------------------------------------------


def load_by_class(header: Header, rows: Sequence[Row], router: str) -> Load:
    """Who gets the items of each class, on clean and on attacked images. UserError if there is no such router."""
    if router not in header.routers:
        raise UserError(
            f"no router {router!r}; known: {', '.join(sorted(header.routers)) or 'none, the model is dense'}"
        )
    experts = header.routers[router].experts
    total = max(len(header.classes), 1 + max((row.label for row in rows), default=-1))
    classes = tuple(header.classes) + tuple(str(label) for label in range(len(header.classes), total))
    clean = [[0] * experts for _ in range(total)]
    adversarial = [[0] * experts for _ in range(total)]
    images = [0] * total
    for row in rows:
        images[row.label] += 1
        for table, route in ((clean, row.route_clean), (adversarial, row.route_adversarial)):
            for expert, items in enumerate(route.get(router, [])[:experts]):
                table[row.label][expert] += items
    total_clean = _shares([sum(column) for column in zip(*clean)])
    return Load(
        router=router,
        classes=classes,
        images=tuple(images),
        clean=tuple(_shares(counts) for counts in clean),
        adversarial=tuple(_shares(counts) for counts in adversarial),
        total_clean=total_clean,
        total_adversarial=_shares([sum(column) for column in zip(*adversarial)]),
        dead=tuple(expert for expert, share in enumerate(total_clean) if share == 0),
    )


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    whole = sum(counts)
    return tuple(count / whole if whole else 0.0 for count in counts)
