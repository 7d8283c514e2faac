"""How often the host waits for the device in a step, counted on a device that is not there (tests/sync_counts.py).

python benchmarks/syncs.py [--before PATH_OF_AN_OLDER_CHECKOUT]

Counts, no times: the same on every machine. With --before the same counts are made of the sources of another checkout.
Without it those of the file stay. Writes docs/results/syncs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from results import RESULTS, described, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import sync_counts  # noqa: E402
from robustmoe import provenance  # noqa: E402

FILE = RESULTS / "syncs.json"


def key(name: str) -> str:
    """A name as results files have it: "PGD, keep=last" -> "pgd_last"."""
    return name.lower().replace("keep=", "").replace("-", "_").replace(", ", "_").replace(" ", "_")


def counts() -> dict[str, dict[str, dict[str, Any]]]:
    """By work and net: what is counted of a step."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for net in sync_counts.NETS:
        for name, work in sync_counts.ATTACKS.items():
            if net != "dense" or not name.startswith(("expert", "route")):
                rows.setdefault(key(name), {})[key(net)] = asdict(sync_counts.attack(net, work))
        for name, method in sync_counts.TRAININGS.items():
            if net != "dense" or name == "AT":
                rows.setdefault(key(name), {})[key(net)] = asdict(sync_counts.training(net, method))
        print(net, {name: round(of[key(net)]["syncs"], 2) for name, of in rows.items() if key(net) in of})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an older commit, whose sources are counted too")
    parser.add_argument("--print", action="store_true", help="print the counts as JSON and write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.print:
        sys.stdout, out = sys.stderr, sys.stdout
        print(json.dumps({"rows": counts(), "commit": provenance.commit()}), file=out)
        return
    if args.before is not None:
        env = {**os.environ, "PYTHONPATH": str(args.before.resolve() / "src")}
        told = subprocess.run([sys.executable, __file__, "--print"], env=env, stdout=subprocess.PIPE, check=True)
        before = json.loads(told.stdout)
    else:
        kept = json.loads(FILE.read_text(encoding="utf-8"))
        rows = {
            name: {net: {"syncs": both["before"]} for net, both in of.items()} for name, of in kept["numbers"].items()
        }
        before = {"rows": rows, "commit": kept["about"]["before"]}
    about = described("python benchmarks/syncs.py", before=before["commit"], seeds=[0])
    after = counts()
    was = {"at_undivided": before["rows"]["at"], **before["rows"]}  # beside the same training as it was
    numbers = {
        name: {net: {"before": was[name][net]["syncs"], "after": step["syncs"]} for net, step in of.items()}
        for name, of in after.items()
    }
    write(FILE, about, numbers, after=after)


if __name__ == "__main__":
    main()
