"""What `robustmoe theory` prints, for docs/theory.md: writes docs/results/theory.json.

python benchmarks/theory_output.py     # half a minute
"""

from __future__ import annotations

import subprocess
import sys
import time

from results import RESULTS, described, write


def main() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "robustmoe", "theory"], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    about = described("python benchmarks/theory_output.py", seeds=[0])
    write(RESULTS / "theory.json", about, {"seconds": seconds}, output=done.stdout.rstrip("\n").split("\n"))


if __name__ == "__main__":
    main()
