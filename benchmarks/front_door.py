"""What the README's Python prints: writes docs/results/front_door.json.

python benchmarks/front_door.py && python -m tests.pages     # seconds
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

from results import RESULTS, described, write


def main() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (RESULTS.parents[1] / "README.md").read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    about = described("python benchmarks/front_door.py", seeds=[0])
    write(RESULTS / "front_door.json", about, {}, output=done.stdout.rstrip("\n").split("\n"))


if __name__ == "__main__":
    main()
