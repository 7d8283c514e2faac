"""The notebooks of examples/: ``python -m tests.notebooks`` runs them and writes what they show (extra
``notebooks``)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def executed(path: Path, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The notebook run in the folder by a kernel of this Python, one thread, with what it shows; what it says of its
    progress (stderr) is left out.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    paths = os.pathsep.join([str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ROBUSTMOE_PROGRESS": "off"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [shown(output) for output in cell.outputs if output.get("name") != "stderr"]
    return json.loads(nbformat.writes(notebook))  # type: ignore[no-any-return]


def shown(output: Any) -> Any:
    """An output without what differs from run to run and is not looked at."""
    if "metadata" in output:
        output.metadata = {}
    if "data" in output and "image/png" in output.data:
        output.data.pop("text/plain", None)
        output.data.pop("image/jpeg", None)
    return output


def main() -> None:
    """Run all, or those named, and write what they show into them."""
    for path in NOTEBOOKS:
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                made = executed(path, folder)
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path.name)


if __name__ == "__main__":
    main()
