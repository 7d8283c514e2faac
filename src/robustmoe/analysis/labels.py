"""What an attack is called in tables."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe.records import Header


def attack_name(header: Header) -> str:
    """A name for tables: the attack's spec, and the objective where the spec does not say it."""
    if header.attack is None:
        return "no attack"
    objective = header.objective
    if objective is None or objective.aims_at_all or objective.name in header.attack:
        return header.attack
    return f"{header.attack}, {objective.name}"


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
