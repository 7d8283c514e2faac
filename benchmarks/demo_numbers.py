"""The numbers of `make demo`, over seeds and instruction sets: one trained model is one draw, and rounding alone
(another instruction set) makes another of the same seed.

python benchmarks/demo_numbers.py [--out runs/demo_numbers] [--seeds 1 2 3 4 5]

Runs `robustmoe demo --seed S` natively and held to the oldest instructions that torch's kernels have, one after the
other, about 130 seconds of one core each, and writes docs/results/demo.json after each. A run that is there already is
not done again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import RESULTS, described, spread_of, write
from robustmoe import analysis, records
from robustmoe.demo import CERTIFIED

LOWER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETS: dict[str, dict[str, str]] = {"native": {}, "lower": LOWER}

PARTS = {
    "experts_only": "experts_only",
    "router_only": "router_only",
    "transition": "transition",
    "targeted(loss": "towards_second",
    "targeted(rank=3": "towards_third",
    "margin": "margin",
}
"""What an attack's text has that another's has not, in turn: what its number is called; PGD-20 has none of it."""

PROBE = """
import torch
torch.nn.functional.conv2d(torch.ones(64, 16, 32, 32), torch.ones(16, 16, 3, 3))
print("ATen", torch.backends.cpu.get_cpu_capability())
"""


def instructions(extra: dict[str, str]) -> str:
    """What torch's own kernels and oneDNN say that they use under these variables."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **extra, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    aten = next(line.removeprefix("ATen ") for line in done if line.startswith("ATen "))
    onednn = next(line.split("isa:", 1)[1] for line in done if "cpu,isa:" in line)
    return f"torch {aten}, oneDNN {onednn}"


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """The numbers of one demo: per cent of the test images; of the certified run, counts of `CERTIFIED` images."""
    pathway, dense = (accuracies(folder / run) for run in ("pathway", "dense"))
    [certificates] = records.Certificates.read_all(folder / "certified")
    proven = analysis.certificates_summary(certificates, attacked(folder / "certified"))
    beside = proven.at(certificates.header.eps)
    assert beside is not None
    assert beside.certified.n == CERTIFIED
    return {
        "pathway": pathway,
        "dense": dense,
        "more_than_dense": {name: pathway[name] - dense[name] for name in ("clean", "pgd", "worst")},
        "hidden": {"worst": pathway["pgd"] - pathway["worst"]},
        "certified": {"not_broken": beside.robust.count, "proven": beside.certified.count, "right": beside.clean.count},
    }


def attacked(run: Path) -> list[records.Evaluation]:
    """The attacks of a run at its radius."""
    results = [records.read(path) for path in records.rows_files(run)]
    return [result for result in results if result.header.role == "main"]


def accuracies(run: Path) -> dict[str, float]:
    """Clean and under each attack, by its objective or name, and in the worst case."""
    results = attacked(run)
    found = {}
    for result in results:
        summary = analysis.evaluation_summary(result.header, result.rows, result.checks)
        text = summary.attack or ""
        assert summary.robust is not None
        found[next((name for part, name in PARTS.items() if part in text), "pgd")] = 100 * summary.robust.value
    worst = analysis.worst_case([(result.header, result.rows) for result in results])
    return {"clean": 100 * worst.clean.value, **found, "worst": 100 * worst.robust.value}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_numbers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    given = parser.parse_args()
    used = {name: instructions(extra) for name, extra in SETS.items()}
    about = described("python benchmarks/demo_numbers.py", instruction_sets=used)
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        for name, extra in SETS.items():
            folder = given.out / f"{name}-{seed}"
            if not (folder / "report.html").exists():
                command = [sys.executable, "-m", "robustmoe", "demo", "--out", str(folder), "--seed", str(seed)]
                subprocess.run(command, env={**os.environ, **extra}, check=True)
            runs.append({"seed": seed, "set": name, **measure(folder)})
            numbers = {
                part: {name: spread_of([run[part][name] for run in runs]) for name in values}
                for part, values in measure(folder).items()
            }
            numbers["runs"] = {"count": len(runs), "seeds": len({run["seed"] for run in runs})}
            about["seeds"] = sorted({run["seed"] for run in runs})
            write(RESULTS / "demo.json", about, numbers, runs=runs)


if __name__ == "__main__":
    main()
