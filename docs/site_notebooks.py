"""A hook of mkdocs: the notebooks of examples/ as pages of the site, with what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each notebook, examples/NAME.md."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, *rest = [_markdown(cell) for cell in cells]
        note = f"*This page is the notebook `examples/{path.name}`.*"
        files.append(File.generated(config, f"examples/{path.stem}.md", content="\n\n".join([title, note, *rest])))
    return files


def _markdown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    shown = [_shown(output) for output in cell["outputs"]]
    text = "".join(part for part in shown if not part.startswith("!["))
    pictures = [part for part in shown if part.startswith("![")]
    printed = [f'```text title="prints"\n{text.strip()}\n```'] if text.strip() else []
    return "\n\n".join([f"```python\n{source}\n```", *printed, *pictures])


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell above shows](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return "".join(output.get("text", data.get("text/plain", "")))
