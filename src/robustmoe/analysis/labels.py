"""What an attack is called in tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from robustmoe.records import Header


def attack_name(header: Header) -> str:
    """Returns a name for tables: the attack's spec, and the objective where the spec does not say it."""
    if header.attack is None:
        return "no attack"
    objective = header.objective
    if objective is None or objective.aims_at_all or objective.name in header.attack:
        return header.attack
    return f"{header.attack}, {objective.name}"


def names(headers: Sequence[Header]) -> list[str]:
    """Returns :func:`attack_name` of each, with the seed (or a number) added where two would be the same."""
    plain = [attack_name(header) for header in headers]
    seeded = [
        f"{name}, seed {header.seed}" if plain.count(name) > 1 else name
        for name, header in zip(plain, headers, strict=True)
    ]
    return [
        f"{name} ({seeded[: position + 1].count(name)})" if seeded.count(name) > 1 else name
        for position, name in enumerate(seeded)
    ]


def router_names(names: Sequence[str]) -> dict[str, str]:
    """Returns router -> a short name: "block 3" of network.blocks.3.mlp.router, and else what tells it from the others;
    every table of a report calls a router the same."""
    blocks = [re.fullmatch(r"network\.blocks\.(\d+)\.mlp\.router", name) for name in names]
    if all(blocks):
        return {name: f"block {block[1]}" for name, block in zip(names, blocks, strict=True) if block}
    parts = [name.split(".") for name in names]
    same = len({len(each) for each in parts}) == 1 and len(names) > 1
    short = {}
    for name, own in zip(names, parts, strict=True):
        apart = [at for at in range(len(own)) if not same or len({each[at] for each in parts}) > 1]
        inner = ".".join(own[at] for at in apart)
        kind = own[apart[0] - 1] if same and len(apart) == 1 and apart[0] else ""
        short[name] = f"{kind.removesuffix('s')} {inner}" if inner.isdigit() and kind else inner or name
    return short
