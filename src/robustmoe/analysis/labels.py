"""What an attack is called in tables."""

from __future__ import annotations

from collections.abc import Sequence

from robustmoe.records import Header


def attack_name(header: Header) -> str:
    """A name for tables: the attack's spec, and the objective where the spec does not say it."""
    if header.attack is None:
        return "no attack"
    says = header.objective in (None, "joint", "routing") or str(header.objective) in header.attack
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
