"""The tables of docs/papers.md, written from what the recipes claim; ``python -m tests.papers`` writes them anew.

A table stands under a heading that is the ``paper`` of its claims; all other papers are in the last one. Each row is
one row of a paper and the recipes for it, and what the recipes have of it, `Claim.said`. The last two cells, ours and
the verdict, are written by hand and kept; a new row begins with none and "not run at this size".
"""

from __future__ import annotations

import re
import sys
from itertools import takewhile
from pathlib import Path

from robustmoe.recipe import Claim, claims

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "papers.md"
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"), key=lambda file: (file.parent.name, file.name))

REST = "Elsewhere, for orientation"
"""The heading of the claims that belong to none of the papers above it."""

HEAD = "| where: row | recipes | claimed | ours, small | verdict |\n|---|---|---|---|---|\n"
OPEN = "not run at this size"
_TABLE = re.compile(r"(?m)^## (?P<paper>.*)\n(?P<text>[^|#]*)(?P<table>(?:^\|.*\n)+)")

Row = tuple[str, str, str]
"""The first three cells."""


def cell(claim: Claim) -> str:
    """The cell "claimed", its numbers marked as a paper's."""
    source = f" (from {claim.source})" if claim.source else ""
    mark = " <!-- claimed -->" if re.search(r"\d", claim.said) else ""
    return f"{claim.said}{source}{mark}"


def braced(names: list[str]) -> str:
    """The names as they are if they are two at most, else in one word: a_{b, c, e}_d."""
    if len(names) < 3:
        return ", ".join(f"`{name}`" for name in names)
    words = [name.split("_") for name in names]
    start, end = shared(words), shared([each[::-1] for each in words])
    inside = ["_".join(each[start : len(each) - end]) for each in words]
    first = words[0]
    before, after = ("_".join(part) for part in (first[:start], first[len(first) - end :]))
    return f"`{before and before + '_'}{{{', '.join(inside)}}}{after and '_' + after}`"


def shared(words: list[list[str]]) -> int:
    """How many words all begin with; fewer than the shortest has."""
    same = takewhile(lambda place: len(set(place)) == 1, zip(*words))
    return min(len(list(same)), min(map(len, words)) - 1)


def names(braces: str) -> list[str]:
    """`braced` undone."""
    hit = re.fullmatch(r"`([^{]*)\{([^}]*)\}(.*)`", braces)
    return [hit[1] + name + hit[3] for name in hit[2].split(", ")] if hit else re.findall(r"`(.*?)`", braces)


def rows(papers: list[str]) -> dict[str, list[Row]]:
    """By heading, the rows, in the order of the recipes, those of one table together; what says the same is one row."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for file in RECIPES:
        for claim in claims(file):
            heading = claim.paper if claim.paper in papers else REST
            where = f"{claim.place}: {claim.row}" if heading != REST else f"{claim.paper}, {claim.place}: {claim.row}"
            grouped.setdefault((heading, where, cell(claim)), []).append(file.stem)
    tables: dict[str, list[Row]] = {}
    for (heading, where, said), recipes in grouped.items():
        tables.setdefault(heading, []).append((where, braced(recipes), said))
    for own in tables.values():
        places = [row[0].partition(":")[0] for row in own]
        own.sort(key=lambda row: places.index(row[0].partition(":")[0]))
    return tables


def rendered(text: str) -> str:
    """The page with its tables as the recipes have them. ValueError where a paper has rows and no table."""
    headings = [hit["paper"] for hit in _TABLE.finditer(text)]
    tables = rows(headings)
    if set(tables) - set(headings):
        raise ValueError(f"papers.md has no table under {set(tables) - set(headings)}")

    def table(hit: re.Match[str]) -> str:
        kept = {}
        for line in hit["table"].splitlines()[2:]:
            where, _, _, ours, verdict = (part.strip() for part in line.strip("|").split(" | "))
            kept[where] = (ours, verdict)
        lines = (" | ".join([*row, *kept.get(row[0], ("", OPEN))]) for row in tables.get(hit["paper"], []))
        return f"## {hit['paper']}\n{hit['text']}{HEAD}" + "".join(f"| {line} |\n" for line in lines)

    return _TABLE.sub(table, text)


def main() -> int:
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
