"""`make fuzz`: spoilt inputs of every kind, each given to the program in a process of its own.

    python tests/fuzz [--scale 1] [--only rows,data] [--jobs 2] [--out runs/fuzz.json] [--show accepted]

Hypothesis draws the cases from a fixed seed, so that the same commit has the same cases; ``--scale 10`` draws ten
times as many, others among them. A case must end with exit code 2 and one line, or be taken; what was taken is in the
JSON file, to be read by a person (``--show`` prints the cases of a kind: what was changed, and what was said).
Tracebacks, hangs, memory beyond 4 GiB, raw characters on the terminal, other exit codes and anything that is executed
are faults, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st

import artefacts
import child
import datasets
import files
import objects
import words
from case import Case

Section = Callable[[Path, Any, str], Case]
SECTIONS: dict[str, tuple[Section, int, tuple[str, ...]]] = {
    "recipes": (words.recipe, 200, ()),
    "spec text": (words.spec_text, 260, ("run", "other", "images", "own.py")),
    "flags, paths": (words.flags, 200, ("run", "other", "images")),
    "rows": (files.rows, 180, ("run",)),
    "other records": (files.records, 180, ("run", "other", "blend")),
    "config.json": (files.config, 160, ("run",)),
    "metrics.jsonl": (files.metrics, 60, ("run",)),
    "model.safetensors": (files.weights, 80, ("run",)),
    "state.pt": (files.state, 80, ("run",)),
    "data": (datasets.data, 220, ()),
    "--model files": (objects.model_file, 120, ()),
    "arrays in Python": (objects.api, 200, ()),
}
"""Section -> what makes a case, how many at scale 1, and what it needs a copy of."""

CHUNK = 20
BAD = ("traceback", "hang", "memory", "raw characters", "executed", "refused though valid")
COLUMNS = ("one line", "ok", "accepted", "interrupted", *BAD)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz.json"))
    parser.add_argument("--show", default="", choices=["", *COLUMNS])
    options = parser.parse_args()
    started = time.monotonic()
    _prepare()
    wanted = [name for name in SECTIONS if not options.only or any(part in name for part in options.only.split(","))]
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as place:
        base = Path(place) / "base"
        artefacts.build(base)
        print(f"artefacts made in {time.monotonic() - started:.0f} s", flush=True)
        tasks = [
            (name, number, min(CHUNK, count - number * CHUNK), Path(place))
            for name in wanted
            for count in [max(1, round(SECTIONS[name][1] * options.scale))]
            for number in range(-(-count // CHUNK))
        ]
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            done = [case for cases in pool.imap_unordered(_chunk, tasks) for case in cases]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps(sorted(done, key=lambda case: (case["section"], case["kind"], case["change"])), indent=1)
    )
    print(table(done), f"\n{len(done)} cases in {time.monotonic() - started:.0f} s; each of them in {options.out}")
    faults = [case for case in done if case["kind"] not in ("one line", "ok", "accepted", "interrupted")]
    for case in [*(case for case in done if case["kind"] == options.show), *faults]:
        print(told(case))
    return 1 if faults else 0


def told(case: dict[str, Any]) -> str:
    """What was changed, and the last that was said, printable."""
    lines = [f"{case['kind']}: {case['section']}: {case['change']}"]
    lines += [f"    {line[:200]}" for text in (case["err"], case["out"]) for line in text.strip().splitlines()[-1:]]
    return "\n".join(line.encode("unicode_escape").decode() for line in lines)


def _prepare() -> None:
    """Imports what the commands import, once, for all the children."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    import robustmoe

    for module in pkgutil.walk_packages(robustmoe.__path__, "robustmoe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("sklearn.datasets", "pyarrow.parquet", "PIL.Image", "rich.console", "scipy.stats"):
        importlib.import_module(name)
    for kind in (torch.optim.SGD, torch.optim.AdamW):  # the first step of an optimiser imports half of torch
        parameter = torch.zeros(1, requires_grad=True)
        parameter.grad = torch.zeros(1)
        kind([parameter]).step()
    os.environ.pop("RANK", None)


def _chunk(task: tuple[str, int, int, Path]) -> list[dict[str, Any]]:
    """Some cases of a section."""
    name, number, count, place = task
    done: dict[str, dict[str, Any]] = {}

    @seed(1000 * list(SECTIONS).index(name) + number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def play(data: st.DataObject) -> None:
        case = _played(name, data.draw, place, done)
        done[case["change"]] = case

    play()
    return list(done.values())


def _played(name: str, draw: Any, place: Path, done: Container[str]) -> dict[str, Any]:
    """One case, in a folder of its own that is removed afterwards; another is drawn for one that is ``done``."""
    section, _, needs = SECTIONS[name]
    outer = Path(tempfile.mkdtemp(dir=place))
    folder, canaries = outer / "here", outer / "canaries"
    canaries.mkdir()
    try:
        artefacts.copy(place / "base", folder, needs)
        case = section(folder, draw, "../canaries/executed")
        if case.change in done:
            reject()
        ended = child.run(lambda: _work(case), folder)
        kind = child.judged(ended, case.valid)
        if any(canaries.iterdir()):
            kind = "executed"
        return {
            "section": name,
            "change": case.change,
            "argv": case.work if isinstance(case.work, list) else None,
            "kind": kind,
            "code": ended.code,
            "seconds": round(ended.seconds, 2),
            "err": ended.err[-3000:],
            "out": ended.out[-800:],
        }
    finally:
        artefacts.forget(outer)


def _work(case: Case) -> int:
    """In the child: the command line, or the function with a `UserError` told as the command line tells it."""
    from robustmoe.errors import UserError

    if isinstance(case.work, list):
        return artefacts.command(case.work)
    try:
        case.work()
    except UserError as e:
        print(f"robustmoe: {e}", file=sys.stderr)
        return 2
    return 0


def table(done: list[dict[str, Any]]) -> str:
    """How the cases of each section ended."""
    columns = [*COLUMNS, *sorted({case["kind"] for case in done} - set(COLUMNS))]
    lines = ["| section | tried | " + " | ".join(columns) + " | seconds |", "|---" * (len(columns) + 3) + "|"]
    for name in [*SECTIONS, "sum"]:
        cases = [case for case in done if name in (case["section"], "sum")]
        if cases:
            kinds = Counter(case["kind"] for case in cases)
            numbers = [
                len(cases),
                *(kinds[column] or "" for column in columns),
                round(sum(c["seconds"] for c in cases)),
            ]
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
