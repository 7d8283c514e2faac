"""Small trained models that come with the package: ``zoo:NAME`` stands wherever a run folder does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from robustmoe.errors import UserError, nearest
from robustmoe.records import check_folder, contents, write_atomic, writing

PREFIX = "zoo:"
FILES = ("config.json", "model.safetensors")
CARD = "card.json"
FOLDER = Path(__file__).parent / "zoo_models"


@dataclass(frozen=True)
class ZooModel:
    """What a card says: the run it was, and what of ``n`` test images it got right, ``clean`` and in the ``worst`` case
    of all its ``attacks`` at ``threat``, measured at ``commit`` on ``hardware``. Of a model trained for certificates,
    ``certified`` of the first ``certified_n`` are proven.
    """

    name: str
    about: str
    model: str
    data: str
    method: str
    threat: str
    n: int
    clean: int
    worst: int
    attacks: tuple[str, ...]
    command: str
    commit: str
    hardware: str
    certified: int = 0
    certified_n: int = 0


def cards() -> list[ZooModel]:
    """Returns the card of every model, by name."""
    cards = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob(f"*/{CARD}"))]
    return [ZooModel(**{**card, "attacks": tuple(card["attacks"])}) for card in cards]


def zoo_model(name: str, out: str | Path | None = None) -> Path:
    """Return a run folder of the model ``name`` (with or without "zoo:"), for `evaluate_run` and all that takes a run.

    Its files are copied to ``out``, by default runs/zoo-NAME, once; what is measured is written there beside them.
    UserError for an unknown name, or where the folder holds something else."""
    name = name.removeprefix(PREFIX)
    names = [card.name for card in cards()]
    if name not in names:
        raise UserError(
            f"there is no model {name!r} in the zoo; {nearest(name, names)}; robustmoe list zoo has them all"
        )
    source, folder = FOLDER / name, Path("runs") / f"zoo-{name}" if out is None else Path(out)
    if contents(folder):
        for file in FILES:
            path = folder / file
            if not path.is_file() or path.read_bytes() != (source / file).read_bytes():
                raise UserError(f"{folder} holds something else than the zoo's {name} ({file} differs); move it away")
        return folder
    with writing(folder):
        check_folder(folder, resume=False)
        for file in FILES:
            write_atomic(folder / file, (source / file).read_bytes())
    return folder
