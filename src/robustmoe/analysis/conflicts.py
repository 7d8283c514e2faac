"""What does not fit together in the files of one run, and what a number is not."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe.analysis.curves import MONOTONE_TOLERANCE, eps_curve
from robustmoe.analysis.parts import upper_bound
from robustmoe.analysis.rates import rate, robust
from robustmoe.analysis.worst import groups
from robustmoe.records import Evaluation, Header, Record


def warnings(results: Sequence[Evaluation]) -> list[str]:
    """Returns what does not fit together in the files of one run, and which number is an upper bound, in sentences;
    empty if all is well."""
    sentences: list[str] = []
    attacked = [result for result in results if result.header.attack is not None and result.rows]
    for curve in eps_curve([(result.header, result.rows) for result in attacked]):
        sentences += [f"{curve.name}: {sentence}" for sentence in curve.warnings]
    seen: dict[tuple[str, str, int], int] = {}
    changed: set[int] = set()
    for header, rows, _ in results:
        for row in rows:
            key = (header.model_hash, header.data_hash, row.index)
            if seen.setdefault(key, row.clean) != row.clean:
                changed.add(row.index)
    if changed:
        sentences.append(
            f"{len(changed)} clean images are predicted differently in two files of the same model: "
            "it is not deterministic, or depends on the batch"
        )
    for group in groups(results):
        sentences += _weaker_joint(group)
        sentences += filter(None, [upper_bound(group)])
    return sentences


def other_labels(records: Sequence[Evaluation | Record]) -> list[str]:
    """Says where two files about one data set name different classes of the same image."""
    seen: dict[tuple[str, str, int], tuple[int, str]] = {}
    conflicts: dict[tuple[str, str], list[str]] = {}
    for record in records:
        header: Header = record.header  # type: ignore[union-attr]
        for index, label in record.images() if header.data != "arrays" else ():
            then, kind = seen.setdefault((header.data, header.split, index), (label, record.kind))
            if then != label:
                conflicts.setdefault((kind, record.kind), []).append(f"image {index}: {then} and {label}")
    return [
        f"{first} and {second} name different classes of {len(images)} images ({images[0]}): one of the files was "
        "changed, or the data were between them"
        for (first, second), images in conflicts.items()
    ]


def _weaker_joint(group: list[Evaluation]) -> list[str]:
    """Says where a narrower attack is stronger. An attack on the whole model may do whatever a narrower one does, so it
    should not break fewer images (half a point)."""
    whole: list[float] = []
    narrow: dict[str, list[float]] = {}
    for header, rows, _ in group:
        if header.objective is None or len(rows) < header.n:
            continue
        value = rate([robust(row) for row in rows]).value
        if not header.objective.aims_at_all:
            narrow.setdefault(header.objective.name, []).append(value)
        elif not header.objective.needs_router:
            whole.append(value)
    return [
        f"the {kind.replace('_', ' ')} attack leaves {100 * min(values):.1f}%, the joint one "
        f"{100 * min(whole):.1f}%: the joint attack is not at its strongest"
        for kind, values in sorted(narrow.items())
        if whole and min(values) < min(whole) - MONOTONE_TOLERANCE
    ]
