"""A run as a folder to give away: its weights, what they are, and a model card with what was measured."""

from __future__ import annotations

import os
from pathlib import Path

from robustmoe.errors import UserError, printable
from robustmoe.records import contents, read_config, write_atomic, writing
from robustmoe.records.files import explained
from robustmoe.reporting.collect import collect
from robustmoe.reporting.markdown import markdown

FILES = ("config.json", "model.safetensors")


def model_card(run: str | os.PathLike[str]) -> str:
    """Returns a model card (Markdown, with the head that hubs read) of a run folder: what the model is, how to load it,
    and the report of what was measured, with what speaks against the numbers. UserError where nothing was measured.
    """
    config = read_config(run)
    name = Path(run).resolve().name
    head = ["---", "library_name: robustmoe", "pipeline_tag: image-classification", "tags:"]
    head += [f"- {tag}" for tag in ("robustness", "mixture-of-experts")]
    use = [
        "```python",
        "import robustmoe as rm",
        "",
        f'model = rm.load_model("{name}")  # images (n, ch, h, w) in [0, 1] -> logits',
        "```",
    ]
    about = f"`{config['model']}`, for images {tuple(config['image_shape'])} of {config['num_classes']} classes."
    origin = config.get("imported")
    if origin:
        about += f" Its weights were trained elsewhere ({origin.get('file')}, SHA-256 {origin.get('sha256')})."
    elif config.get("method"):
        about += f" Trained on {config['data']} by `{config['method']}`."
    return printable("\n".join([*head, "---", "", f"# {name}", "", about, "", *use, "", markdown(collect([run]))]))


def share(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[Path]:
    """Writes the folder ``out``: model.safetensors, config.json and README.md, the model card. It is a run folder
    itself. UserError where it is there already, or the run has no weights of its own.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or contents(folder)):
        raise UserError(f"{str(folder)!r} is there already, and holds something; choose another --out")
    if read_config(run).get("brings_weights"):
        raise UserError(f"{run} is of a model of your own, whose weights are not in it; share them with its code")
    texts = {"README.md": model_card(run).encode()}
    for name in FILES:
        with explained("read", Path(run) / name):
            texts[name] = (Path(run) / name).read_bytes()
    with writing(folder):
        for name, content in texts.items():
            write_atomic(folder / name, content)
    return [folder / name for name in texts]
