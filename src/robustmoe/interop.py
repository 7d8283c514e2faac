"""Our models in other tools' hands, and our evaluation under RobustBench's name and arguments.

foolbox and ART are imported when asked for; neither is needed for the rest. RobustBench's conventions are those of its
git repository at 78fcc9e (2025-03-31): `benchmark` in robustbench/eval.py, `update_json` in robustbench/utils.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe import analysis, records
from robustmoe.attacks import AutoAttack, Threat, l2, linf
from robustmoe.data import DATASETS, Data
from robustmoe.errors import UserError, nearest
from robustmoe.models.plain import as_routed
from robustmoe.options import EvaluateOptions
from robustmoe.progress import note
from robustmoe.records import Evaluation
from robustmoe.records.files import explained, read_json

EPS: dict[tuple[str, str], float] = {
    ("cifar10", "Linf"): 8 / 255,
    ("cifar10", "L2"): 0.5,
    ("cifar100", "Linf"): 8 / 255,
    ("imagenet", "Linf"): 4 / 255,
}
"""The radius of each of RobustBench's leaderboards, in pixels of [0, 1]."""

THREATS: dict[str, Callable[[float], Threat]] = {"Linf": linf, "L2": l2}
DATA = ("cifar10", "cifar100", "imagenet")
STANDARD = "AutoAttack standard"
"""What check G14 calls an attack that is the published definition in every number."""


# ------------------------------------------------------------------------------------------------ peers


def as_foolbox(model: Callable[[Tensor], Tensor], device: str | torch.device | None = None) -> Any:
    """``foolbox.PyTorchModel`` of the model, for images in [0, 1].

    ``model``: an nn.Module, or any callable from images to logits; it is put in eval mode. ``device``: where foolbox
    runs it; by default where its weights are (foolbox alone would take a GPU unasked).
    """
    foolbox = _peer("foolbox", "foolbox", "pip install foolbox")
    module = _module(model)
    return foolbox.PyTorchModel(module, bounds=(0.0, 1.0), device=_place(module) if device is None else device)


def as_art(
    model: Callable[[Tensor], Tensor],
    num_classes: int,
    image_shape: tuple[int, int, int],
    loss: nn.Module | None = None,
) -> Any:
    """ART's ``PyTorchClassifier`` of the model, for images in [0, 1] of ``image_shape`` (ch, h, w).

    ``model``: as for `as_foolbox`; it stays on a CPU where its weights are on one. ``loss``: what ART's attacks climb,
    by default the mean cross-entropy. ART takes and gives numpy arrays; its ``AutoAttack`` is another mix of attacks
    than the published one.
    """
    hint = "pip install adversarial-robustness-toolbox packaging"  # packaging: imported by ART 1.20.1, not declared
    art = _peer("art.estimators.classification", "ART", hint)
    module = _module(model)
    return art.PyTorchClassifier(
        model=module,
        loss=nn.CrossEntropyLoss() if loss is None else loss,
        input_shape=tuple(image_shape),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu" if _place(module).type == "cpu" else "gpu",
    )


def _peer(module: str, name: str, command: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported here ({error}); install it: {command}") from error


def _module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    return (model if isinstance(model, nn.Module) else as_routed(model)).eval()


def _place(model: nn.Module) -> torch.device:
    """Where the first of its weights is; a model without any is on the CPU."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ RobustBench


def benchmark(
    model: Callable[[Tensor], Tensor] | Sequence[Any],
    n_examples: int = 10_000,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str | Path | None = "./data",
    corruptions_data_dir: str | None = None,
    device: str | torch.device | Sequence[Any] | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: str | Path | None = None,
    preprocessing: str | Callable[..., Any] | None = None,
    aa_state_path: str | Path | None = None,
) -> tuple[float, float]:
    """RobustBench's ``benchmark``, argument by argument, with our AutoAttack standard: (clean, robust), shares of 1.

    Where it differs: ``eps`` may be left out (the leaderboard's radius); ``data_dir`` is the root of `cifar10`,
    `cifar100` or `imagenet`, and None downloads CIFAR from the hub; ``device`` None is where the model's weights are;
    ``aa_state_path`` is a folder of rows, from which a killed run goes on (at the same batch size). Corruptions,
    preprocessing and several models at once are refused. A failed check is said on stderr. ``to_disk`` writes
    model_info/DATASET/THREAT/NAME.json, keeping what was filled in by hand there, and over no other file; the images
    of ImageNet are not RobustBench's list of 5,000, so that is refused for them. ``log_path``: lines are added as
    AutoAttack's.
    """
    threat = _threat(dataset, threat_model, eps)
    if isinstance(model, Sequence) or not isinstance(device, str | torch.device | None):
        raise UserError("benchmark takes one model and one device; call it once for each (torchrun shares the work)")
    if preprocessing is not None:
        raise UserError("benchmark takes no preprocessing; it is part of the data set or of the model here")
    if corruptions_data_dir is not None:
        raise UserError("benchmark evaluates no corruptions; leave corruptions_data_dir out")
    _check_places(to_disk, model_name, dataset, aa_state_path)
    entry = Path("model_info") / dataset / threat_model / f"{model_name}.json"
    if to_disk:
        _entry_in(entry)  # refused now, and not after the attack
    from robustmoe.evaluation import evaluate

    data, attack = _data(dataset, data_dir), AutoAttack(threat)
    where = str(device or _place(model) if isinstance(model, nn.Module) else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(aa_state_path or scratch)
        options = EvaluateOptions(attacks=(attack,), batch_size=batch_size, limit=n_examples, device=where, curve=())
        (result,) = evaluate(model, data, options=options, name=model_name, out=out)
    for sentence in _doubts([result]):
        note(f"do not quote this number: {sentence}")
    if log_path is not None:
        _log(Path(log_path), result)
    if to_disk:
        _to_disk(entry, robustbench_json([result]))
    numbers = result.summary()
    return numbers.clean.value, numbers.robust.value


def _check_places(to_disk: bool, model_name: str | None, dataset: str, aa_state_path: str | Path | None) -> None:
    """Raises UserError where the entry or the rows cannot be written as asked."""
    if to_disk and model_name is None:
        raise UserError("to_disk needs the model_name under which the JSON is written")
    if to_disk and dataset == "imagenet":
        raise UserError("to_disk is refused for imagenet: these are not the 5,000 images of RobustBench's list")
    if aa_state_path is not None and Path(aa_state_path).is_file():
        raise UserError(f"aa_state_path is a folder of rows here; {str(aa_state_path)!r} is a file, so give another")


BY_HAND: dict[str, Any] = {
    "link": None,
    "name": None,
    "authors": None,
    "additional_data": None,
    "number_forward_passes": 1,
    "venue": None,
    "architecture": None,
    "reported": None,
    "footnote": None,
}
"""The fields of a leaderboard entry that nobody can measure."""

FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "external", "unreliable", "footnote",
)  # fmt: skip
"""Every field of a leaderboard entry, in RobustBench's order."""


def robustbench_json(results: Sequence[Evaluation], **by_hand: Any) -> dict[str, Any]:
    """An entry of RobustBench's leaderboard from the rows files of one model (`robustmoe.records.read`).

    ``clean_acc`` and ``autoattack_acc`` are per cent, as text, of the file whose attack is AutoAttack standard; where
    there is none, or it is not finished, UserError. ``external``: the worst case over all files of the same threat and
    images, where it is lower. ``unreliable``: a check failed, or the router was not attacked. ``by_hand``: the fields
    of `BY_HAND`; what is None is to be filled in later.
    """
    for name in by_hand:
        if name not in BY_HAND:
            raise UserError(f"a leaderboard entry has no field {name!r} to be filled in; {nearest(name, BY_HAND)}")
    mains = [result for result in results if result.header.role == "main"]
    standard = _standard(mains)
    numbers = standard.summary()
    alike = [result for result in mains if all(_same(result, standard, key) for key in analysis.SAME_THREAT)]
    worst = analysis.worst_case([(result.header, result.rows) for result in alike])
    measured = {
        "dataset": standard.header.data.partition("(")[0],
        "eps": _fraction(standard.header.eps),
        "clean_acc": _per_cent(numbers.clean.value),
        "autoattack_acc": _per_cent(numbers.robust.value),
        "external": _per_cent(worst.robust.value) if worst.robust.value < numbers.robust.value else None,
        "unreliable": bool(_doubts(alike)),
    }
    entry = {**BY_HAND, **by_hand, **measured}
    return {name: entry[name] for name in FIELDS}


def _standard(mains: Sequence[Evaluation]) -> Evaluation:
    """Returns the file of AutoAttack standard. UserError without one, or where it is not finished."""
    standard = next((result for result in mains if _label(result) == STANDARD), None)
    if standard is None:
        seen = ", ".join(str(result.header.attack) for result in mains) or "no rows file at all"
        raise UserError(
            f"a leaderboard entry needs a finished {STANDARD}, such as --attack 'autoattack(linf(8/255))'; got {seen}"
        )
    if len(standard.rows) < standard.header.n:
        raise UserError(
            f"{standard.header.attack} has {len(standard.rows)} of {standard.header.n} images; let it finish first"
        )
    return standard


def _threat(dataset: str, threat_model: str, eps: float | None) -> Threat:
    if dataset not in DATA:
        raise UserError(f"unknown dataset {dataset!r}; {nearest(dataset, DATA)}")
    if threat_model in ("corruptions", "corruptions_3d"):
        raise UserError(f"benchmark evaluates no {threat_model}; expected threat_model 'Linf' or 'L2'")
    if threat_model not in THREATS:
        raise UserError(f"unknown threat_model {threat_model!r}; {nearest(threat_model, THREATS)}")
    if eps is None and (dataset, threat_model) not in EPS:
        raise UserError(f"RobustBench has no {threat_model} leaderboard of {dataset}, so eps has no default; give one")
    try:
        return THREATS[threat_model](EPS[dataset, threat_model] if eps is None else eps)
    except ValueError as error:
        raise UserError(str(error)) from error


def _data(dataset: str, data_dir: str | Path | None) -> Data:
    if data_dir is None and dataset == "imagenet":
        raise UserError("imagenet cannot be downloaded; give data_dir, the folder that holds train/ and val/")
    if data_dir is not None and not os.path.exists(os.path.expanduser(data_dir)):
        raise UserError(
            f"there is no data_dir {str(data_dir)!r}; give the folder of the data set"
            + ("" if dataset == "imagenet" else ", or data_dir=None to download it from the hub")
        )
    return DATASETS[dataset](root=data_dir)


def _label(result: Evaluation) -> str | None:
    """The published name that check G14 found the attack entitled to; None before the checks were run."""
    for check in result.checks.checks if result.checks else ():
        if check.id == "G14" and isinstance(check.value, dict):
            label = check.value.get("label")
            return label if isinstance(label, str) else None
    return None


def _doubts(results: Sequence[Evaluation]) -> list[str]:
    """Why the number should not be quoted; [] if nothing speaks against it."""
    verdict = analysis.judge(results)
    return list(verdict.failed) or ([verdict.reason] if verdict.router_attacked is False else [])


def _same(a: Evaluation, b: Evaluation, field: str) -> bool:
    return bool(getattr(a.header, field) == getattr(b.header, field))


def _per_cent(share: float) -> str:
    """As RobustBench writes it: "53.42"."""
    return str(round(100 * share, 2))


def _fraction(eps: float) -> str:
    """ "8/255" where it is one of 255 levels, else the number."""
    levels = eps * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 and levels >= 0.5 else f"{eps:g}"


def _log(path: Path, result: Evaluation) -> None:
    """What AutoAttack's log says: the accuracy at the start and after each part."""
    clean = analysis.evaluation_summary(*result).clean
    lines = [f"initial accuracy: {clean.value:.2%}"]
    lines += [f"robust accuracy after {part.name.upper()}: {part.left.value:.2%}" for part in analysis.by_part(result)]
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def _to_disk(path: Path, entry: dict[str, Any]) -> None:
    """Writes the entry; what one that is there holds beside it, filled in by hand, is kept."""
    kept = {key: value for key, value in _entry_in(path).items() if entry.get(key) is None}
    records.write_atomic(path, json.dumps({**entry, **kept}, indent=2, ensure_ascii=False) + "\n")


def _entry_in(path: Path) -> dict[str, Any]:
    """The leaderboard entry in a file; {} without a file. UserError for any other file: it is not written over."""
    return read_json(path, _as_entry, "move it away, or give another model_name") or {}


def _as_entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not {"link", "clean_acc"} <= value.keys():
        raise UserError("no leaderboard entry, which has both 'link' and 'clean_acc'")
    return value
