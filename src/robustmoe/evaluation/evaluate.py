"""Attack a data set and write rows: `evaluate` for a model in hand, `evaluate_run` for a run folder."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustmoe import provenance, records
from robustmoe import spec as specs
from robustmoe.analysis import Summary, summary
from robustmoe.attacks import PGD, Attack, Objective, Threat, build_attack, experts_only, joint, linf, router_only
from robustmoe.data import Batch, Data, ImageSet, batches, from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import checks
from robustmoe.evaluation.attacked import attack_batch, examples_of, rows_of
from robustmoe.models.base import RoutedModel, as_routed
from robustmoe.progress import note, progress
from robustmoe.records import Check, Header, RouterInfo, Row, Writer
from robustmoe.report import summary_table
from robustmoe.training.checkpoint import load_model, read_config

EXAMPLES = 10
PROBE = 32
"""Images the checks of a model look at."""

CURVE = (0.25, 0.5, 1.5, 2.0)
"""Radii of the accuracy curve, as multiples of the attack's own, unless told."""

CURVE_LIMIT = 256
BATCH = 128


def evaluate(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    attacks: Sequence[str | Attack] = (),
    num_classes: int | None = None,
    batch_size: int = BATCH,
    limit: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    about: dict[str, Any] | None = None,
) -> list[Summary]:
    """Attack ``model`` on images and give one `Summary` an attack: clean, robust, the router's part, the experts' part, checks.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c). ``x``, ``y``: images (n, ch, h, w) in [0, 1] with labels (n), or one of the
    project's data sets (its test split). ``attacks``: specs or attacks; by default PGD-20 at linf 8/255 on the whole model, and for a routed model on
    its experts alone and its routers alone. ``out``: a folder for the rows (resumable; by default temporary). Raises UserError for images outside
    [0, 1], labels out of range, a model whose output is not (n, c).
    """
    routed = as_routed(model)
    where = provenance.pick_device(device)
    routed.to(where)
    images = x.test if isinstance(x, Data) else x if isinstance(x, ImageSet) else None
    if images is None:
        if y is None:
            raise UserError("images were given without labels; expected y, one integer an image")
        images = from_arrays(x, y, num_classes)  # type: ignore[arg-type]
    images = images.head(limit)
    _check_outputs(routed, images, where)
    chosen = _attacks(routed, images, attacks, linf(8 / 255), where)
    about = about or {"run": "", "model": type(model).__name__, "data": x.name if isinstance(x, Data) else "arrays", "split": "test"}
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for attack in chosen:
            path = Path(out or scratch) / f"{slug(attack)}.jsonl"
            header, rows, verdict = measure(routed, images, attack, path, where, batch_size, about)
            results.append(summary(header, rows, verdict))
    return results


def evaluate_run(
    run: str | Path,
    attacks: Sequence[str] | None = None,
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    curve: Sequence[float] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
) -> str:
    """Evaluate a run folder with each attack into ``RUN/rows`` (or ``out``), one file an attack, and give the table to print.

    ``attacks``: specs; by default those of the run's recipe, else PGD-20 at the radius it was trained for, on the whole model, the experts alone and the routers
    alone. ``curve``: radii, in pixels, at which the first whole-model attack is run again on at most 256 images; by default a quarter to twice its own; empty: none.
    What is already in a file is kept, and only missing images are attacked.
    """
    run = Path(run)
    config = read_config(run)
    where = provenance.pick_device(device)
    model = load_model(run, where)
    source: Data = specs.build(data or config["data"], "data")
    if split not in ("test", "val", "train"):
        raise UserError(f"split must be test, val or train; got {split!r}")
    if source.num_classes != config["num_classes"] or list(source.image_shape) != config["image_shape"]:
        raise UserError(
            f"{run} is a model for {config['num_classes']} classes and images {tuple(config['image_shape'])}; the data have "
            f"{source.num_classes} classes and images {source.image_shape}"
        )
    images: ImageSet = getattr(source, split).head(limit)
    wanted = [dataclasses.replace(attack, seed=seed) for attack in _attacks(model, images, attacks or config.get("attacks") or (), _threat(config), where)]  # type: ignore[type-var]
    about = {
        "run": str(run),
        "model": config["model"],
        "data": data or config["data"],
        "split": split,
        "method": config.get("method"),
        "classes": list(source.classes),
    }
    folder = Path(out) if out is not None else run / "rows"
    batch_size = batch_size or BATCH
    results = [measure(model, images, a, folder / f"{slug(a)}.jsonl", where, batch_size, about) for a in wanted]
    for attack in _curve(wanted, curve):
        few = images.head(CURVE_LIMIT)
        path = folder / f"{slug(attack)}-curve.jsonl"
        results.append(measure(model, few, attack, path, where, batch_size, about, role="curve"))
    return summary_table(results)


def measure(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack,
    path: Path,
    device: torch.device,
    batch_size: int,
    about: dict[str, Any],
    role: str = "main",
) -> records.Result:
    """One attack on every image, row by row into ``path``; images that stand there already are skipped, checks are run anew."""
    model.eval()
    header = _header(model, images, attack, device, about, role)
    with Writer(path, header) as writer:
        missing = torch.tensor([i for i, index in enumerate(images.index.tolist()) if index not in writer.done], dtype=torch.long)
        if not len(missing) and records.read(path).checks is not None:
            return records.read(path)
        started = time.monotonic()
        probe = images.batch(torch.arange(min(PROBE, len(images)))).to(device)
        found = checks.before(model, attack, probe)
        as_found = checks.fingerprint(model)
        with progress(len(images), header.attack or "clean", unit="images") as bar:
            bar.advance(len(images) - len(missing))
            for batch in batches(images, batch_size, missing, device):
                rows = _one_batch(model, attack, batch, path)
                writer.write(rows)
                bar.advance(len(batch))
        rows = records.read(path).rows
        found.append(checks.ball_and_box(rows, attack.threat.norm, attack.threat.eps))
        found.append(checks.unchanged(as_found, checks.fingerprint(model)))
        writer.finish(_in_order(found), time.monotonic() - started)
    return records.read(path)


def _one_batch(model: RoutedModel, attack: Attack, batch: Batch, path: Path) -> list[Row]:
    done = attack_batch(model, attack, batch)
    rows = rows_of(model, done)
    if not records.examples_path(path).exists():
        records.write_examples(records.examples_path(path), examples_of(done, rows, EXAMPLES))
    return rows


def _in_order(found: list[Check]) -> list[Check]:
    return sorted(found, key=lambda check: (check.id[0], int(check.id[1:])))


def _check_outputs(model: RoutedModel, images: ImageSet, device: torch.device) -> None:
    """The model takes these images and the labels fit its outputs."""
    with torch.no_grad():
        logits = model.eval().run(images.batch([0]).to(device).x).logits
    if logits.ndim != 2:
        raise UserError(f"the model gives a tensor of shape {tuple(logits.shape)}; expected logits (n, c)")
    highest = int(images.labels.max())
    if highest >= logits.shape[1]:
        raise UserError(f"label {highest} is out of range: the model has {logits.shape[1]} classes; expected labels 0 to {logits.shape[1] - 1}")


def _attacks(
    model: RoutedModel, images: ImageSet, given: Sequence[str | Attack], threat: Threat, device: torch.device
) -> list[Attack]:
    """The attacks to run: the given ones, or the default; those that need a router are left out for a dense model, and that is said."""
    objectives: tuple[Objective, ...] = (joint(), experts_only(), router_only())
    wanted: list[Attack] = [build_attack(attack) for attack in given] or [PGD(threat, steps=20, objective=o) for o in objectives]
    with torch.no_grad():
        has_router = bool(model.run(images.batch([0]).to(device).x).trace)
    if has_router:
        return wanted
    whole = [attack for attack in wanted if attack.objective.name == "joint"]
    if not whole:
        raise UserError("the model has no router, and every attack asked for is on the routers or the experts alone; add one on the whole model, such as pgd(linf(8/255), steps=20)")
    if given and len(whole) < len(wanted):
        note(f"the model has no router: {len(wanted) - len(whole)} attack(s) on experts or routers alone left out")
    return whole


def _threat(config: dict[str, Any]) -> Threat:
    """The threat a run was trained for, as its recipe says it; linf 8/255 where it says none."""
    method = specs.build(config["method"], "method") if config.get("method") else None
    if method is not None and method.attack is not None:
        threat: Threat = method.attack.threat
        return threat
    return build_attack(config["val_attack"]).threat if config.get("val_attack") else linf(8 / 255)


def _curve(attacks: list[Attack], radii: Sequence[float] | None) -> list[Attack]:
    """The first whole-model attack at each other radius, its step size in proportion."""
    base = next((attack for attack in attacks if attack.objective.name == "joint"), None)
    if base is None:
        return []
    eps = base.threat.eps
    wanted = [eps * factor for factor in CURVE] if radii is None else [r for r in radii if r > 0]
    if base.threat.norm == "linf":
        wanted = [r for r in wanted if r <= 1]
    return [_at(base, radius) for radius in wanted if abs(radius - eps) > 1e-12]


def _at(attack: Attack, eps: float) -> Attack:
    changes: dict[str, Any] = {"threat": dataclasses.replace(attack.threat, eps=eps)}
    step = getattr(attack, "step_size", None)
    if step is not None:
        changes["step_size"] = step * eps / attack.threat.eps
    return dataclasses.replace(attack, **changes)  # type: ignore[type-var]


def slug(attack: Attack) -> str:
    """A file name from the attack's spec."""
    return re.sub(r"[^a-z0-9.]+", "-", specs.text(attack).lower()).strip("-")


def _header(
    model: RoutedModel, images: ImageSet, attack: Attack, device: torch.device, about: dict[str, Any], role: str
) -> Header:
    with torch.no_grad():
        output = model.run(images.batch([0]).to(device).x)
    routers = {
        name: RouterInfo(experts=routing.num_experts, k=routing.k, items=routing.index.shape[1])
        for name, routing in output.trace.items()
    }
    classes = about.get("classes") or [str(c) for c in range(output.logits.shape[1])]
    return Header(
        run=about["run"],
        model=about["model"],
        data=about["data"],
        split=about["split"],
        attack=specs.text(attack),
        objective=attack.objective.name,
        norm=attack.threat.norm,
        eps=attack.threat.eps,
        role=role,
        method=about.get("method"),
        n=len(images),
        seed=attack.seed,
        data_hash=images.fingerprint,
        index_hash=hashlib.sha256(images.index.numpy().tobytes()).hexdigest(),
        model_hash=checks.weights_hash(model),
        versions=provenance.versions(),
        commit=provenance.commit(),
        device=str(device),
        threads=torch.get_num_threads(),
        precision="fp32",
        command=provenance.command(),
        classes=classes,
        routers=routers,
        parameters=sum(p.numel() for p in model.parameters()),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
