"""The numbers of README, docs and recipes are tied to results files; ``python -m tests.pages`` writes them anew.

A tie is a comment behind what it speaks of; browsers do not show it::

    The demo's model keeps 45.1 % of its images. <!-- numbers: demo pathway.worst -->

"demo" is docs/results/demo.json, and each following key a path inside its "numbers": one for each number between the
comment and the one before it (or the beginning of the paragraph, list or table), in their order. A table's comment
stands under it. In keys::

    {a,b}.{x,y}      a.x a.y b.x b.y, as the cells of a table stand
    a.*              every leaf below a, in the order of the file; a.0 is the first of a list
    a.x-b.x          a difference; also + and /, from left to right: a.macs/1e6
    other:a.x        from docs/results/other.json
    =                no key: this number is set by us, not measured

A leaf is a number or one of {mean, sd, min, max}, {value, low, high}, {count, n} (a share in per cent with its Wilson
interval). Of these ``82.3`` is the first, ``82.3 ± 0.3`` the mean and the deviation, ``82.3 (80.1-84.2)`` the first and
the interval or range. What is printed must be the file's number, rounded to the digits that are printed.

``<!-- defined -->`` in a tie's place says so of all its numbers: thresholds, settings, mathematics. ``<!-- claimed
-->``: they are a paper's; docs/papers.md alone may say so, where test_papers.py holds them to the recipes.

``<!-- output: theory -->`` before a code block: it is the "output" of that file, what a command printed, line for line.

A number counts, and needs a tie, if it has a decimal point, a thousands comma or an exponent; if %, "points", "times",
"trainings", "of N" or ± stands behind it; if it stands in a cell of a table; or if it is above 12 and no setting
(`SETTINGS`). Code, links, names (PGD-50, 8/255, E16), a table's head and first column, versions, dates, arXiv numbers,
radii ("linf 0.1") and what follows "name =" do not count. The pages of docs/studies are tied table by table: `faults`
says what their text may say.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from robustmoe.analysis import wilson

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
STUDIES = ROOT / "docs" / "studies"

SETTINGS = (
    "bits?|channels|classes|CPU cores|cores|decisions|digits|draws|epochs?|experts|fashion|filters|hidden|images?|"
    "iterations|layers|models|passes|pixels|points of|queries|random|restarts|rounds|seeds?|stages|steps?|test|"
    "threads?|tokens?|training|units|validation|words"
)
"""What stands behind a whole number that is a setting of ours, an adjective of one word between them or not."""

_N = r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?(?:e-?\d+)?"
_NAMED = r"(?:linf|l2|l1|L∞|eps|radius|sigma|alpha|ratio|width|Python|torch|numpy|pyautoattack|oneDNN|version)"
_HIDDEN = (
    r"(?ms)^```.*?^```",
    r"(?m)(?:(?<=\n\n)|\A)(?:    .*\n(?:\n(?=    ))?)+",
    r"`[^`]*`",
    r"\]\([^)]*\)",
    r"(?s)<!--.*?-->",
    r"\d{4}-\d{2}-\d{2}",
    r"\b\d{4}\.\d{4,5}\b",
    r"\b(?:19|20)\d\d\b",
    r"95 %(?=,? (?:Wilson|intervals?))",
    r"\b(?:Theorem|claims?|section|rule) \d[\d.]*(?:(?:,| and) \d[\d.]*)*",
    rf"(?i)\b{_NAMED} (?:of |v)?(?:{_N})(?:(?:,| and| to| or) (?:{_N})(?!\s?%))*",
    rf"\w+ ?= ?(?:{_N})(?:(?:,| and| to| or) (?:{_N})(?!\s?%))*",
)
_TOKEN = re.compile(
    rf"(?:(?<![\w.,/#^-])|(?<=\d-))(?P<first>[+-]?(?:{_N}))(?![\w/]|\.\d)"
    r"(?P<after>\*{0,2}(?: ?%| points?\b| times\b| trainings?\b)?\*{0,2})"
    rf"(?: ?± ?(?P<sd>{_N})| \((?P<low>[+-]?{_N}) ?(?:-|–|to) ?(?P<high>[+-]?{_N})\))?"
)
_TIE = re.compile(r"<!-- (?:numbers: (?P<keys>[^>]*?)|(?P<defined>defined|claimed)) -->")
_TELLING = re.compile(r"\*{0,2} of \d|(?:,| to| and| or) [+-]?[\d.]+(?: ?%| points?\b| times\b)")
_OUTPUT = re.compile(r"(<!-- output: (\S+) -->\n+```\n)(.*?)(\n```)", re.DOTALL)
_SETTING = re.compile(rf"[ -](?:[\w-]+ )?(?:{SETTINGS})\b")


@dataclass(frozen=True)
class Number:
    """A number of a page as it is printed, with its deviation or its two ends where they stand behind it: (place in
    the text, what is printed) of each."""

    first: tuple[int, str]
    sd: tuple[int, str] | None = None
    low: tuple[int, str] | None = None
    high: tuple[int, str] | None = None

    @property
    def start(self) -> int:
        return self.first[0]

    @property
    def end(self) -> int:
        start, text = self.high or self.sd or self.first
        return start + len(text)

    def __str__(self) -> str:
        text = self.first[1]
        if self.sd is not None:
            text += f" ± {self.sd[1]}"
        return text + (f" ({self.low[1]}-{self.high[1]})" if self.low and self.high else "")

    def true(self, leaf: Any) -> Number:
        """This number as ``leaf`` has it, in the digits of the page. KeyError where the leaf lacks a part of it."""
        whole = _whole(leaf)
        first = "mean" if "mean" in whole else "value"
        ends = ("low", "high") if "low" in whole else ("min", "max")
        parts = [(self.first, first), (self.sd, "sd"), (self.low, ends[0]), (self.high, ends[1])]
        return Number(*(None if part is None else (part[0], _like(part[1], whole[name])) for part, name in parts))  # type: ignore[arg-type]


def _whole(leaf: Any) -> dict[str, float]:
    """A leaf of a results file, its parts by name."""
    if not isinstance(leaf, dict):
        return {"value": leaf}
    if "count" not in leaf:
        return leaf
    low, high = (100 * end for end in wilson(leaf["count"], leaf["n"]))
    return {"value": 100 * leaf["count"] / leaf["n"], "low": low, "high": high}


def _like(shown: str, value: float) -> str:
    """``value`` with the digits, sign and commas of ``shown``."""
    sign = "+" if shown.startswith("+") else ""
    if "e" in shown:
        mantissa = shown.split("e")[0].lstrip("+-")
        number, power = f"{value:{sign}.{len(mantissa.partition('.')[2])}e}".split("e")
        return f"{number}e{int(power)}"
    if not value and shown[0] in "+-":
        return shown[0] + f"{0:.{len(shown.partition('.')[2])}f}"
    comma = "," if "," in shown else ""
    return f"{value:{sign}{comma}.{len(shown.partition('.')[2])}f}"


@dataclass(frozen=True)
class Segment:
    """The numbers that one tie speaks of. ``keys``: None without a tie, "" where they are defined."""

    line: int
    text: str
    numbers: list[Number]
    keys: str | None


def numbers(text: str) -> Iterator[Number]:
    """The numbers of a page that count (see the head of this file)."""
    for pattern in _HIDDEN:
        text = re.sub(pattern, lambda hit: re.sub(r"[^\n]", "\0", hit.group()), text)
    for hit in _TOKEN.finditer(text):
        first, behind = hit["first"], text[hit.end() :]
        telling = hit["after"].strip("* ") or hit["sd"] or hit["low"] or _TELLING.match(behind)
        cell = _in_a_cell(text, hit.start())
        if cell is False:
            continue
        if not (cell or telling or re.search(r"[.,e]", first)) and (int(first) <= 12 or _SETTING.match(behind)):
            continue
        yield Number(*((hit.start(name), hit[name]) if hit[name] else None for name in ("first", "sd", "low", "high")))  # type: ignore[arg-type]


def _in_a_cell(text: str, place: int) -> bool | None:
    """Whether it is a value in a table (False: in its head or first column, where names stand); None outside one."""
    start, end = text.rfind("\n", 0, place) + 1, text.find("\n", place)
    if not text.startswith("|", start):
        return None
    return text.count("|", start, place) > 1 and not text.startswith("|-", end + 1)


def segments(text: str) -> Iterator[Segment]:
    """The page cut at its ties and at the ends of its blocks; a tie that stands alone belongs to the block before."""
    every = list(numbers(text))
    ties = list(_TIE.finditer(text))
    inside = [(hit.start(), hit.end()) for hit in re.finditer(r"(?ms)^```.*?^```", text)]
    gaps = [hit.end() for hit in re.finditer(r"\n[ \t]*\n", text)]
    gaps = [
        gap for gap in gaps if not text.startswith("<!-- numbers", gap) and not text.startswith("<!-- defined", gap)
    ]
    gaps = [gap for gap in gaps if not any(start < gap < end for start, end in inside)]
    ends = sorted({len(text), *gaps, *(tie.end() for tie in ties)})
    tied = {tie.end(): tie for tie in ties}
    start = 0
    for end in ends:
        own = [number for number in every if start <= number.start < end]
        tie = tied.get(end)
        keys = None if tie is None else (tie["keys"] or "")
        if own or keys:
            line = text.count("\n", 0, own[0].start if own else end) + 1
            yield Segment(line, text[start:end], own, keys)
        start = end


# -------------------------------------------------------------------------------------------------------- the files


class Results:
    """The results files of a folder, read as they are asked for."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self.read: dict[str, dict[str, Any]] = {}

    def file(self, name: str) -> dict[str, Any]:
        if name not in self.read:
            path = self.folder / f"{name}.json"
            if not path.is_file():
                raise KeyError(f"there is no {path.name} in docs/results")
            self.read[name] = json.loads(path.read_text(encoding="utf-8"))
        return self.read[name]

    def expand(self, keys: str) -> list[str]:
        """Every single key that a tie names, each with its file before it: ``demo:pathway.worst``."""
        name, *given = re.findall(r"(?:\{[^}]*\}|[^\s{])+", keys)
        found: list[str] = []
        for key in given:
            if key == "=":
                found.append(key)
                continue
            for one in _braces(key if ":" in key else f"{name}:{key}"):
                found += self._star(one) if "*" in one else [one]
        return found

    def _star(self, key: str) -> Iterator[str]:
        file, path = key.split(":", 1)
        path = path.removesuffix("*").rstrip(".")
        top = self._at(file, path) if path else self.file(file)["numbers"]
        return (f"{file}:{leaf}" for leaf in _leaves(top, path))

    def _at(self, file: str, path: str) -> Any:
        numbers = self.file(file)["numbers"]
        try:
            return _value(numbers, path)
        except KeyError as error:
            raise KeyError(f"no {path} in {file}.json (no {error.args[0]})") from None

    def printed(self, name: str) -> set[str]:
        """All that stands in a study's file, as its page prints it, without signs and spaces."""
        file = self.file(name)
        leaves = (_value(file["numbers"], path) for path in _leaves(file["numbers"], ""))
        parts = [part for leaf in leaves for part in (leaf.values() if isinstance(leaf, dict) else [leaf])]
        measured = [part for part in parts if isinstance(part, int | float)]  # a model's spec is none
        return set(file.get("text", ())) | {f"{abs(part):.{d}f}" for part in measured for d in range(3)}

    def value(self, key: str) -> Any:
        """The leaf that a single key names, or the result of its terms."""
        file, terms = key.split(":", 1)
        first, *rest = re.findall(r"[+\-/]?[\w.]+", terms)
        if not rest:
            return self._at(file, first)
        total = _number(self._at(file, first))
        for term in rest:
            name = term[1:]
            other = float(name) if re.fullmatch(r"\d[\de.]*", name) else _number(self._at(file, name))
            total = total + other if term[0] == "+" else total - other if term[0] == "-" else total / other
        return total


def _number(leaf: Any) -> float:
    whole = _whole(leaf)
    return float(whole["mean" if "mean" in whole else "value"])


def _braces(key: str) -> list[str]:
    hit = re.search(r"\{([^}]*)\}", key)
    if hit is None:
        return [key]
    return [each for part in hit[1].split(",") for each in _braces(key[: hit.start()] + part + key[hit.end() :])]


PARTS = {"mean", "sd", "min", "max", "n", "value", "low", "high", "count"}


def _value(top: Any, path: str) -> Any:
    for step in path.split("."):
        if isinstance(top, list) and step.isdigit() and int(step) < len(top):
            top = top[int(step)]
        elif isinstance(top, dict) and step in top:
            top = top[step]
        else:
            raise KeyError(step)
    return top


def _leaves(top: Any, path: str) -> Iterator[str]:
    if not isinstance(top, dict | list) or (isinstance(top, dict) and set(top) <= PARTS):
        yield path
    else:
        for name, below in top.items() if isinstance(top, dict) else enumerate(top):
            yield from _leaves(below, f"{path}.{name}" if path else str(name))


# -------------------------------------------------------------------------------------------------------- the check


def faults(text: str, results: Results, study: str | None = None) -> list[str]:
    """What is wrong with a page's numbers, a line each; none: all of them are tied and true.

    ``study``: the results file of a page of docs/studies, where text without a tie may say any number of that file: of
    its tables or of its "text", the list of what the page says beside them."""
    out = []
    for hit in _OUTPUT.finditer(text):
        if hit[3].split("\n") != results.file(hit[2])["output"]:
            out.append(
                f"line {text.count(chr(10), 0, hit.start()) + 1}: the code block is not the output in {hit[2]}.json"
            )
    known = set() if study is None else results.printed(study)
    for segment in segments(text):
        at = f"line {segment.line}"
        shown = [str(number) for number in segment.numbers]
        if segment.keys == "":
            continue
        if segment.keys is None:
            untied = [said for said in shown if said.lstrip("+-") not in known]
            if untied:
                out.append(f"{at}: not tied to a results file: {', '.join(untied)}")
            continue
        try:
            keys = results.expand(segment.keys)
        except KeyError as error:
            out.append(f"{at}: {error.args[0]}")
            continue
        if len(keys) != len(shown):
            out.append(f"{at}: {len(shown)} numbers ({', '.join(shown)}) and {len(keys)} keys ({' '.join(keys)})")
            continue
        for number, said, key in zip(segment.numbers, shown, keys):
            if key == "=":
                continue
            try:
                true = str(number.true(results.value(key)))
            except KeyError as error:
                out.append(f"{at}: {key}: {error.args[0]}")
                continue
            if said != true:
                out.append(f"{at}: the page says {said}, {key} is {true}")
            out += [f"{at}: {fault}" for fault in _spec_faults(text, number, key, results)]
    return out


def _spec_faults(text: str, number: Number, key: str, results: Results) -> list[str]:
    """Where a row of a table begins with a spec, a cost in it must be that spec's."""
    file, path = key.split(":", 1)
    if len(re.findall(r"[a-z_]\w*\.\w+", path)) != 1:  # a share of two costs
        return []
    spec = results.file(file).get("specs", {}).get(path.split(".")[0], {}).get("spec")
    row = text[text.rfind("\n", 0, number.start) + 1 : text.find("\n", number.end)]
    if spec is None or not row.startswith("| `") or f"`{spec}`" in row:
        return []
    return [f"{key} is the cost of `{spec}`, which does not stand in the row {row.strip()[:80]}"]


def rendered(text: str, results: Results) -> str:
    """The page with every tied number written anew from its file."""
    changes = []
    for segment in segments(text):
        with contextlib.suppress(KeyError):  # `faults` tells it
            keys = results.expand(segment.keys or "-")
            for number, key in zip(segment.numbers, keys if len(keys) == len(segment.numbers) else []):
                if key != "=":
                    true = number.true(results.value(key))
                    changes += [(*old, new[1]) for old, new in zip(astuple(number), astuple(true)) if old is not None]
    for start, old, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[start + len(old) :]
    return _OUTPUT.sub(lambda hit: hit[1] + "\n".join(results.file(hit[2])["output"]) + hit[4], text)


def pages() -> list[Path]:
    """README and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def study_of(page: Path) -> str | None:
    """The results file of a page of docs/studies."""
    return f"studies/{page.stem}" if page.parent == STUDIES else None


def main() -> int:
    results = Results()
    left = 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = rendered(old, results)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written anew")
        for fault in faults(new, results, study_of(page)):
            print(f"{page.relative_to(ROOT)}: {fault}")
            left += 1
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
