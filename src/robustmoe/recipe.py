"""A recipe: everything that decides a training run, in one flat TOML file; its fields are flags of ``train``.

Beside the fields a file may say ``base``, the recipe whose fields it takes but for those that it has itself, and in
``[[claimed]]`` what others say that this training gives (`Claim`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from robustmoe import spec
from robustmoe.errors import UserError, nearest
from robustmoe.options import Inputs, hints_of

THREADS = 1024
"""More than any machine has cores; where threads cannot be made, OpenMP ends the process."""

SEEDS = 1000
"""More trainings than anybody starts at once; a slip such as 0..10**9 must not fill the memory."""

LATER: Mapping[str, str | None] = {"inputs": "data", "recalibrate": None, "sharding": "none"}
"""Fields that recipes of older runs do not have, and what those runs did."""


def said_by(config: Mapping[str, Any], name: str) -> Any:
    """Returns a recipe's field in a run's ``config.json``, which may be older than the field."""
    value = config.get(name)
    return LATER.get(name) if value is None else value


SPECS = ("model", "data", "method", "optimizer", "schedule", "augment", "val_attack", "val_certifier")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Things are written as calls (see `robustmoe.spec`)."""

    model: Annotated[str, "the model, such as pathway(resnet18, experts=2)"]
    data: Annotated[str, "the data set, such as cifar10"]
    method: Annotated[str, "the training method, such as at(pgd(linf(8/255), steps=10))"]
    optimizer: Annotated[str, "the optimiser of each phase"] = "sgd(lr=0.1, momentum=0.9, weight_decay=5e-4)"
    schedule: Annotated[str, "how the learning rate moves over the run"] = "cosine"
    epochs: Annotated[int, "passes over the training images"]
    batch_size: Annotated[
        int | Literal["auto"], "images a step, over all processes together; auto = as many as the memory holds"
    ] = 128
    augment: Annotated[str | None, "what is done to training images, such as crop_flip(padding=4)"] = None
    inputs: Annotated[
        Inputs,
        "how the model takes its images: data = less the training images' mean, over their deviation; centred = in "
        "[-1, 1]; raw = pixels in [0, 1]",
    ] = "data"
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        "number format of the network in training; attacked pixels stay fp32; fp16, for GPUs without bf16, scales the "
        "loss and leaves out steps whose gradients overflow",
    ] = "fp32"
    ema: Annotated[float, "decay of the averaged weights; 0 = off"] = 0.0
    recalibrate: Annotated[
        Literal["clean", "attacked"] | None,
        "BatchNorm's statistics taken anew for the weights that are validated and kept, on clean images or on those of "
        "the method's attack; none = the running ones",
    ] = None
    clip: Annotated[float, "largest norm of the gradient; 0 = off"] = 0.0
    sharding: Annotated[
        Literal["none", "full", "experts"],
        "what the processes of torchrun hold: none = each the whole model; full = each its share of every weight "
        "(FSDP); experts = each its share of the experts of token-routed layers (vit_moe), which tokens travel to",
    ] = "none"
    seed: Annotated[int, "decides every random draw"] = 0
    init: Annotated[
        str | None,
        "what training starts from: a run folder, a .safetensors file, or several for parts of the model, such as "
        "'standard=runs/std, robust=runs/rt'; one network fills every expert, all equal at first; none = random "
        "weights",
    ] = None
    val_attack: Annotated[
        str | None, "attack on the validation images after each epoch; none = clean accuracy only"
    ] = None
    val_certifier: Annotated[
        str | None, "what certifies validation images after each epoch; the most certified weights are kept"
    ] = None
    val_limit: Annotated[int | None, "validate on this many images at most"] = None
    checkpoint_every: Annotated[int, "steps between checkpoints; 0 = one at the end of each epoch"] = 0
    device: Annotated[str, "cpu, cuda, cuda:1; auto takes the best there is"] = "auto"
    threads: Annotated[int | None, "CPU threads; none = what torch takes"] = None
    deterministic: Annotated[
        bool, "the same bits in every run on the same GPU, more slowly; a CPU gives them anyway"
    ] = False
    compile: Annotated[
        bool, "torch.compile for the networks that train and are climbed; what judges is never compiled"
    ] = False
    attacks: Annotated[tuple[str, ...], "an attack that `robustmoe evaluate` runs by default"] = ()
    max_steps: Annotated[int | None, "stop after this many steps (for a smoke run)"] = None

    def __post_init__(self) -> None:
        for name in SPECS:
            _check_spec(name, getattr(self, name))
        if isinstance(self.attacks, str):  # not its letters
            raise UserError(f"attacks must be a list of specs; got {self.attacks!r}")
        for attack in self.attacks:
            _check_spec("attacks", attack)
        for name in ("epochs", "batch_size", "val_limit", "threads", "max_steps"):
            value = getattr(self, name)
            _require(value is None or value == "auto" or value >= 1, name, "at least 1", value)
        for name in ("checkpoint_every", "clip", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.threads is None or self.threads <= THREADS, "threads", f"at most {THREADS}", self.threads)
        _require(self.clip < math.inf, "clip", "a finite number", self.clip)
        _require(self.seed < 2**63, "seed", "below 2**63", self.seed)
        _require(0 <= self.ema < 1, "ema", "at least 0 and below 1", self.ema)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What others say that a recipe's training gives: a row of a paper's table, or a run of its code. A recipe that is
    nobody's but this package's says so with ``paper = "ours"``.

    ``values``: what was measured, by name, as numbers in per cent or in the words of the source ("+1 to +4"); empty
    where they are not known. ``source``: where it was read, if not there.
    """

    paper: Annotated[str, "the paper, or who says it"]
    place: Annotated[str, "table, section, or what else of it"]
    row: Annotated[str, "the row, in words"]
    values: Annotated[Mapping[str, float | str], "what was measured"] = dataclasses.field(default_factory=dict)
    source: Annotated[str, "where it was read"] = ""

    @property
    def said(self) -> str:
        """The values in one line."""
        nothing = "nothing" if self.paper == "ours" else "not known"
        shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in self.values.items()}
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or nothing


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise UserError(f"{name} must be {wanted}; got {value}")


def _check_spec(name: str, text: str | None) -> None:
    if text is not None:
        try:
            spec.canonical(text)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Returns the recipe in the TOML file ``path`` (or the bare name of one in ``recipes/``).

    ``overrides`` win over what the file says. Where a field may be None, the text "none" says so.
    """
    file = resolve(path)
    fields = _written(file)
    try:
        _of({**overrides, **fields})  # so that what the file says is looked at, also where it does not win
        return _of({**fields, **overrides})
    except UserError as e:
        raise UserError(f"{file}: {e}") from None


def claims(path: str | Path) -> tuple[Claim, ...]:
    """Returns what others say that the recipe's training gives: the entries ``[[claimed]]`` of its own file."""
    file = resolve(path)
    entries = _parsed(file).get("claimed", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: claimed is {entries!r}, expected entries that begin with [[claimed]]")
    return tuple(_claim(file, entry) for entry in entries)


def _claim(file: Path, entry: dict[str, Any]) -> Claim:
    known = {item.name for item in dataclasses.fields(Claim)}
    values = entry.get("values", {})
    for name in {"paper", "place", "row"} - set(entry) | set(entry) - known:
        raise UserError(f"{file}: an entry of claimed says {sorted(entry)}; {name!r} is too much or missing")
    numbers = isinstance(values, dict) and all(type(value) in (int, float, str) for value in values.values())
    if not numbers or any(not isinstance(entry[name], str) for name in set(entry) - {"values"}):
        raise UserError(f"{file}: claimed: expected texts, and numbers or texts in values; got {entry}")
    return Claim(**entry)


def _written(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the fields that the file says, or its base in its place."""
    fields = _parsed(file)
    fields.pop("claimed", None)
    base = fields.pop("base", None)
    if base is None:
        return fields
    if not isinstance(base, str):
        raise UserError(f"{file}: base is {base!r}, expected the name of a recipe")
    beside = file.parent / f"{base}.toml"
    origin = beside if beside.is_file() else resolve(base)
    if origin in (file, *above):
        raise UserError(f"{file}: base {base!r} leads back to this recipe; expected another one")
    return {**_written(origin, (file, *above)), **fields}


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:  # also bytes that are not UTF-8, and an integer of thousands of digits
        raise UserError(f"{file} is not a TOML file: {e}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply; expected one field a line, such as epochs = 10") from None


def typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe as it wants them. UserError for one that it does not have, or that is of another type."""
    hints = hints_of(Recipe)
    out = {}
    for name, value in fields.items():
        if name not in hints:
            raise UserError(spec.unknown("field", name, value, hints))
        if isinstance(value, str) and value.lower() == "none" and types.NoneType in typing.get_args(_bare(hints[name])):
            value = None
        try:
            out[name] = spec.conform(value, hints[name])
        except TypeError as e:
            raise UserError(f"{name}: {e}, got {value!r} ({type(value).__name__})") from None
    return out


def _of(fields: Mapping[str, Any]) -> Recipe:
    missing = [f.name for f in dataclasses.fields(Recipe) if f.default is dataclasses.MISSING and f.name not in fields]
    given = typed(fields)
    if missing:
        raise UserError(f"the recipe does not say {', '.join(missing)}")
    return Recipe(**given)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0]


def folders() -> list[Path]:
    """Returns where a bare recipe name is looked for: ``./recipes``, then those that came with the package."""
    package = Path(__file__).parent
    return [f for f in (Path("recipes"), package / "recipes", package.parents[1] / "recipes") if f.is_dir()]


def every() -> list[Path]:
    """Returns the recipes that a bare name may be of, by folder and name; the first of a name hides later ones."""
    files: dict[str, Path] = {}
    for folder in folders():
        for file in (*sorted(folder.glob("*.toml")), *sorted(folder.glob("*/*.toml"))):
            files.setdefault(file.name, file)
    return sorted(files.values(), key=lambda file: (file.parent.name, file.name))


def words(file: Path) -> str:
    """Returns the comment at the head of a recipe: what it is, what it costs, what it gave."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in takewhile(_is_comment, lines)).strip()


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def resolve(name: str | Path) -> Path:
    """Returns the file of a recipe given by path, or by bare name (``digits`` for ``recipes/digits.toml``, or for one
    in a folder inside ``recipes``).
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder, not a recipe file")
    bare = path.name == str(path)
    file_name = path.name if path.suffix == ".toml" else f"{path.name}.toml"
    outer: dict[str, Path] = {}
    inner: dict[str, Path] = {}
    for folder in folders() if bare else [path.parent]:
        outer = {file.name: file for file in sorted(folder.glob("*.toml"))} | outer
        inner = {file.name: file for file in sorted(folder.glob("*/*.toml")) if bare} | inner
    if file_name in outer | inner:
        return (inner | outer)[file_name]
    near = {file.stem if bare else str(file) for file in outer.values()}
    near.update(Path(close).stem for close in difflib.get_close_matches(file_name, inner, n=4))  # they are many
    hint = nearest(str(path), near) if near else "there are no recipes beside it; give the path of a .toml file"
    more = "; robustmoe list recipes has them all" if bare else ""
    raise UserError(f"there is no recipe {str(name)!r}; {hint}{more}")


def seeded(recipe: Recipe, folder: Path, text: str) -> dict[Path, Recipe]:
    """Returns one training a seed, and its folder: ``folder`` with "-seed0" and so on. ``text``: "0..4" (both ends) or
    "0,3,7"."""
    try:
        parts = [[int(end) for end in part.split("..", 1)] for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} are no seeds; expected such as 0..4 or 0,3,7") from None
    seeds = [seed for first, *last in parts for seed in range(first, min((last or [first])[0], first + SEEDS) + 1)]
    if not seeds or len(set(seeds)) < len(seeds) or len(seeds) > SEEDS:
        raise UserError(f"{text!r} are no seeds; expected each once, at most {SEEDS}, such as 0..4 or 0,3,7")
    return {folder.with_name(f"{folder.name}-seed{seed}"): dataclasses.replace(recipe, seed=seed) for seed in seeds}
