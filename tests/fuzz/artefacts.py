"""Small valid artefacts of every kind, made once by the commands that make them; each case spoils a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import child

RECIPE = """
model = "ensemble(linear, experts=2, router=linear)"
data = "digits"
method = "at(pgd(linf(0.1), steps=1))"
optimizer = "sgd(lr=0.1, momentum=0.9)"
schedule = "cosine"
epochs = 2
batch_size = 64
precision = "fp32"
ema = 0.5
seed = 1
val_limit = 16
max_steps = 2
checkpoint_every = 1
threads = 1
device = "cpu"
attacks = ["fgsm(linf(0.1))"]
"""

OWN = '''
"""A model of a user's own."""
import torch

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    def forward(self, x):
        return self.body(x)

def make_model():
    torch.manual_seed(0)
    return Mine()
'''

COMMANDS = [
    ["train", "tiny.toml", "--out", "run"],
    ["train", "tiny.toml", "--out", "other", "--seed", "2", "--method", "standard"],
    ["evaluate", "run", "--limit", "6", "--curve", "none"],
    ["evaluate", "run", "--limit", "6", "--curve", "0,0.1", "--attack", "pgd(linf(0.1), steps=2)"],
    ["certify", "run", "--limit", "3", "--certifier", "bounds(linf(0.01), search=0)"],
    ["sweep", "run", "--limit", "4", "--eps", "0.05,0.1", "--draws", "1", "--attack", "pgd(linf(0.1), steps=1)"],
    ["dissect", "run", "--limit", "4", "--attack", "pgd(linf(0.1), steps=1)"],
    ["lipschitz", "run", "--limit", "2", "--attack", "pgd(linf(0.1), steps=1)"],
    ["check", "run", "--limit", "4"],
    ["blend", "other", "run", "--out", "blend", "--limit", "4", "--alphas", "0,0.5,1", "--attack",
     "pgd(linf(0.1), steps=1)"],
]  # fmt: skip


def build(place: Path) -> None:
    """Makes every artefact in ``place``, in a child process. RuntimeError where a command fails."""
    place.mkdir()
    (place / "tiny.toml").write_text(RECIPE)
    (place / "own.py").write_text(OWN)
    _images(place / "images")
    for argv in COMMANDS:
        ended = child.run(lambda argv=argv: command(argv), place)
        if ended.code != 0:
            raise RuntimeError(f"robustmoe {' '.join(argv)} fails:\n{ended.err}")


def command(argv: list[str]) -> int:
    """What the command line does with these words."""
    from robustmoe.cli import main

    return main(argv)


def _images(root: Path) -> None:
    from PIL import Image

    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 20 * label + i).save(root / str(label) / f"{i}.png")


def copy(base: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copies of some artefacts into ``folder``, which is made."""
    folder.mkdir()
    for name in ("tiny.toml", *names):
        if (base / name).is_dir():
            shutil.copytree(base / name, folder / name)
        else:
            shutil.copy(base / name, folder / name)


def forget(folder: Path) -> None:
    """Removes the folder of a case, whatever lies in it."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(path, name), 0o700, follow_symlinks=True) if not os.path.islink(
                os.path.join(path, name)
            ) else None
    shutil.rmtree(folder, ignore_errors=True)
