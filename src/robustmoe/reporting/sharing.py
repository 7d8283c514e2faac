"""A run as a folder to give away: its weights, what they are, and a model card with what was measured."""

from __future__ import annotations

import os
from pathlib import Path

from robustmoe.errors import UserError, printable
from robustmoe.records import contents, read_config, write_atomic, writing
from robustmoe.records.files import explained
from robustmoe.reporting.collect import collect
from robustmoe.reporting.markdown import markdown
from robustmoe.reporting.words import threat

FILES = ("config.json", "model.safetensors")


def model_card(run: str | os.PathLike[str], repo: str | None = None) -> str:
    """Returns a model card (Markdown, with the head that hubs read) of a run folder: what the model is, how to load it
    (from ``repo``, OWNER/NAME on the hub, or else from the folder that the card is in), and the report of what was
    measured, with what speaks against the numbers. UserError where nothing was measured.
    """
    config = read_config(run)
    name = Path(run).resolve().name if repo is None else repo.rpartition("/")[2]
    where = '"path/to/this/folder"' if repo is None else f'rm.pull("{repo}")'
    head = ["---", "library_name: robustmoe", "pipeline_tag: image-classification", "tags:"]
    head += [f"- {tag}" for tag in ("robustness", "mixture-of-experts")]
    install = "" if repo is None else "pip install 'robustmoe[hub]'\n"
    then = f"robustmoe evaluate {'path/to/this/folder' if repo is None else f'hub:{repo}'}"
    use = [
        *("```", *f"{install}{then}".split("\n"), "```", ""),
        "```python",
        "import robustmoe as rm",
        "",
        "# images (n, ch, h, w) in [0, 1] -> logits",
        f"model = rm.load_model({where})",
        "```",
    ]
    about = f"`{config['model']}`, for images {tuple(config['image_shape'])} of {config['num_classes']} classes."
    origin = config.get("imported")
    if origin:
        about += f" Its weights were trained elsewhere ({origin.get('file')}, SHA-256 {origin.get('sha256')})."
    elif config.get("method"):
        about += f" Trained on {config['data']} by `{config['method']}`."
    views = collect([run])
    verdicts = [
        f"**Verdict** on the worst of {len(group.names)} at {threat(group.worst.norm, group.worst.eps)}: "
        f"{group.verdict.said}.\n"
        for group in views[0].groups
    ]
    return printable("\n".join([*head, "---", "", f"# {name}", "", about, "", *use, "", *verdicts, markdown(views)]))


def share(run: str | os.PathLike[str], out: str | os.PathLike[str], repo: str | None = None) -> list[Path]:
    """Writes the folder ``out``: model.safetensors, config.json and README.md, the model card (for ``repo`` on the
    hub). It is a run folder itself. UserError where it is there already, or the run has no weights of its own.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or contents(folder)):
        raise UserError(f"{str(folder)!r} is there already, and holds something; choose another --out")
    if read_config(run).get("brings_weights"):
        raise UserError(f"{run} is of a model of your own, whose weights are not in it; share them with its code")
    texts = {"README.md": model_card(run, repo).encode()}
    for name in FILES:
        with explained("read", Path(run) / name):
            texts[name] = (Path(run) / name).read_bytes()
    with writing(folder):
        for name, content in texts.items():
            write_atomic(folder / name, content)
    return [folder / name for name in texts]
