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

from results import RESULTS, described, spread_of, write
from robustmoe import analysis, records
from robustmoe.demo import CERTIFIED

LOWER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
SETS: dict[str, dict[str, str]] = {"native": {}, "lower": LOWER}

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


def measure(folder: Path) -> dict[str, float]:
    """The numbers of one demo, in per cent of the images; counts of images where it is said."""
    numbers: dict[str, float] = {}
    for run in ("pathway", "dense"):
        results = [records.read(path) for path in records.rows_files(folder / run)]
        results = [result for result in results if result.header.role == "main"]
        for result in results:
            summary = analysis.evaluation_summary(result.header, result.rows, result.checks)
            name = "transition" if "expert_transition" in (summary.attack or "") else ""
            for part in ("experts_only", "router_only"):
                name = part if part in (summary.attack or "") else name
            assert summary.robust is not None
            numbers[f"{run}.{name or 'pgd'}"] = 100 * summary.robust.value
        worst = analysis.worst_case([(result.header, result.rows) for result in results])
        numbers |= {f"{run}.clean": 100 * worst.clean.value, f"{run}.worst": 100 * worst.robust.value}
    numbers["pathway.gap"] = numbers["pathway.pgd"] - numbers["pathway.worst"]
    numbers["pathway_minus_dense.pgd"] = numbers["pathway.pgd"] - numbers["dense.pgd"]
    numbers["pathway_minus_dense.worst"] = numbers["pathway.worst"] - numbers["dense.worst"]
    [found] = records.Certificates.read_all(folder / "certified")
    proven = analysis.certificates_summary(
        found, [records.read(path) for path in records.rows_files(folder / "certified")]
    )
    attacked = proven.at(found.header.eps)
    assert attacked is not None
    assert attacked.certified.n == CERTIFIED
    numbers["certified.not_broken"], numbers["certified.proven"] = attacked.robust.count, attacked.certified.count
    numbers["certified.right"] = attacked.clean.count
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_numbers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    given = parser.parse_args()
    used = {name: instructions(extra) for name, extra in SETS.items()}
    runs = []
    for seed in given.seeds:
        for name, extra in SETS.items():
            folder = given.out / f"{name}-{seed}"
            if not (folder / "report.html").exists():
                command = [sys.executable, "-m", "robustmoe", "demo", "--out", str(folder), "--seed", str(seed)]
                subprocess.run(command, env={**os.environ, **extra}, check=True)
            runs.append({"seed": seed, "set": name, **measure(folder)})
            names = [key for key in runs[0] if key not in ("seed", "set")]
            numbers = {key: spread_of([run[key] for run in runs]) for key in names}
            about = described("python benchmarks/demo_numbers.py", seeds=given.seeds, instruction_sets=used)
            write(RESULTS / "demo.json", about, numbers, runs)


if __name__ == "__main__":
    main()
