"""Attack a data set and write rows: `evaluate` for a model in hand, `evaluate_run` for a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustmoe import provenance, records
from robustmoe import spec as specs
from robustmoe.analysis import Summary, robust, summary
from robustmoe.attacks import PGD, Attack, Objective, Threat, build_attack, experts_only, joint, linf, router_only
from robustmoe.data import Data, ImageSet, batches, from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import checks
from robustmoe.evaluation.attacked import attack_batch, examples_of, rows_of
from robustmoe.models.base import Output, RoutedModel, as_routed
from robustmoe.progress import note, progress
from robustmoe.records import Check, Header, Result, RouterInfo, Writer
from robustmoe.routing import Tape, Trace
from robustmoe.training.checkpoint import load_model, read_config

SPLITS = ("test", "val", "train")
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
    """Attack ``model`` on images and give one `Summary` an attack: clean, robust, the router's part, the experts'
    part, checks.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c). ``x``, ``y``: images (n, ch, h, w) in
    [0, 1] with labels (n), or one of the project's data sets (its test split). ``attacks``: specs or attacks; by
    default PGD-20 at linf 8/255 on the whole model, and for a routed model on its experts alone and its routers
    alone. ``out``: a folder for the rows (resumable; by default temporary). Raises UserError for images outside [0,
    1], labels out of range, a model that fails or whose output is not (n, c). The model keeps its modes and device.
    """
    chosen = [build_attack(attack) for attack in attacks]
    where = provenance.pick_device(device)
    images = _images(x, y, num_classes).head(limit)
    about = {
        "run": "",
        "model": type(model).__name__,
        "data": x.name if isinstance(x, Data) else "arrays",
        "split": "test",
        **(about or {}),
    }
    routed = as_routed(model)
    with tempfile.TemporaryDirectory() as scratch, _borrowed(routed, where):
        output = _look(routed, images, where)
        chosen = _attacks(output.trace, chosen, linf(8 / 255))
        paths = [Path(out or scratch) / f"{slug(attack)}.jsonl" for attack in chosen]
        return [
            summary(*measure(routed, images, attack, path, where, batch_size, about))
            for attack, path in zip(chosen, paths)
        ]


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
) -> list[Result]:
    """Evaluate a run folder with each attack into ``RUN/rows`` (or ``out``), one file an attack; gives their
    contents.

    ``attacks``: specs; by default those of the run's recipe, else PGD-20 at the radius it was trained for, on the
    whole model, the experts alone and the routers alone. ``curve``: radii, in pixels, at which the attack that left
    the fewest images standing is run again, on at most 256 images; by default a quarter to twice its own; empty:
    none. ``seed``: of the attacks whose spec gives none. What is already in a file is kept, and only missing images
    are attacked.
    """
    if split not in SPLITS:
        raise UserError(f"split must be {', '.join(SPLITS)}; got {split!r}")
    run = Path(run)
    config = read_config(run)
    chosen = [build_attack(attack) for attack in attacks or config.get("attacks") or ()]
    where = provenance.pick_device(device)
    model = load_model(run, where)
    source: Data = specs.build(data or config["data"], "data")
    if source.num_classes != config["num_classes"] or list(source.image_shape) != config["image_shape"]:
        raise UserError(
            f"{run} is a model for {config['num_classes']} classes and images "
            f"{tuple(config['image_shape'])}; the data have "
            f"{source.num_classes} classes and images {source.image_shape}"
        )
    images: ImageSet = getattr(source, split).head(limit)
    chosen = [_seeded(a, seed) for a in _attacks(_look(model, images, where).trace, chosen, _threat(config))]
    radii = {attack.threat: _radii(attack.threat, curve) for attack in chosen}
    about = {
        "run": str(run),
        "model": config["model"],
        "data": data or config["data"],
        "split": split,
        "method": config.get("method"),
        "classes": list(source.classes),
    }
    folder = Path(out) if out is not None else run / "rows"
    end = "" if split == "test" else f"-{split}"
    batch_size = BATCH if batch_size is None else batch_size
    results = [measure(model, images, a, folder / f"{slug(a)}{end}.jsonl", where, batch_size, about) for a in chosen]
    few = images.head(CURVE_LIMIT)
    strongest, _ = min(zip(chosen, results), key=lambda pair: sum(map(robust, pair[1].rows)))
    for attack in [_at(strongest, radius) for radius in radii[strongest.threat]]:
        path = folder / f"{slug(attack)}{end}-curve.jsonl"
        results.append(measure(model, few, attack, path, where, batch_size, about, role="curve"))
    return results


def measure(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack,
    path: Path,
    device: torch.device,
    batch_size: int,
    about: dict[str, Any],
    role: str = "main",
) -> Result:
    """One attack on every image, row by row into ``path``; images that stand there already are skipped, checks are
    run anew.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}, expected at least 1")
    model.eval()
    header = _header(model, images, attack, device, about, role)
    with Writer(path, header) as writer:
        done, lap = writer.done, time.monotonic()
        missing = [i for i, index in enumerate(images.index.tolist()) if index not in done]
        if not missing and writer.checks is not None:
            return writer.result
        found = checks.before(model, attack, images.batch(list(range(min(PROBE, len(images))))).to(device))
        as_found = checks.fingerprint(model)
        show = not done or not records.examples_path(path).exists()
        with progress(len(images), header.attack or "clean", unit="images") as bar:
            bar.advance(len(done))
            for batch in batches(images, batch_size, torch.tensor(missing, dtype=torch.long), device):
                attacked = attack_batch(model, attack, batch)
                rows = rows_of(model, attacked)
                if show:
                    records.write_examples(records.examples_path(path), examples_of(attacked, rows, EXAMPLES))
                show, now = False, time.monotonic()
                writer.write(rows, now - lap)
                lap = now
                bar.advance(len(batch))
        found.append(checks.ball_and_box(writer.result.rows, attack.threat.norm, attack.threat.eps))
        found.append(checks.unchanged(as_found, checks.fingerprint(model)))
        writer.finish(_in_order(found), writer.seconds + time.monotonic() - lap)
        return writer.result


def _in_order(found: list[Check]) -> list[Check]:
    return sorted(found, key=lambda check: (check.id[0], int(check.id[1:])))


def _images(
    x: Tensor | np.ndarray | ImageSet | Data, y: Tensor | np.ndarray | list[int] | None, num_classes: int | None
) -> ImageSet:
    if isinstance(x, Data | ImageSet):
        if y is not None:
            raise UserError("labels were given beside a data set, which has its own; expected one of them")
        return x.test if isinstance(x, Data) else x
    if y is None:
        raise UserError("images were given without labels; expected y, one integer an image")
    return from_arrays(x, y, num_classes)


@contextlib.contextmanager
def _borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The user's model on ``device`` and in eval mode inside; after, each submodule in its own former mode, and on the
    former device. A model spread over several devices is not moved.
    """
    training = {module for module in model.modules() if module.training}
    places = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        if len(places) == 1:
            model.to(device)
        model.eval()
        yield
    finally:
        for module in model.modules():
            module.training = module in training
        if len(places) == 1:
            model.to(places.pop())


def _look(model: RoutedModel, images: ImageSet, device: torch.device) -> Output:
    """One pass on the first images. UserError unless the model takes them, gives logits (n, c), and has an output for
    each label.
    """
    x = images.batch(list(range(min(2, len(images))))).to(device).x
    expected = (
        f"expected a function from images {tuple(x.shape)} in float32 to one tensor of logits ({len(x)}, classes)"
    )
    try:
        with torch.no_grad():
            found: Any = model.eval().body(x, Tape())
            output = model.run(x) if isinstance(found, Tensor) else None
    except Exception as error:  # whatever it is, it comes from the user's own model, whose traceback stays chained
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise UserError(f"the model fails on these images ({said}); {expected}") from error
    if output is None:
        raise UserError(f"the model gives a {type(found).__name__}; {expected}")
    if output.logits.ndim != 2 or len(output.logits) != len(x):
        raise UserError(f"the model gives a tensor of shape {tuple(output.logits.shape)}; {expected}")
    highest, classes = int(images.labels.max()), output.logits.shape[1]
    if highest >= classes:
        raise UserError(
            f"label {highest} is out of range: the model has {classes} classes; expected labels 0 to {classes - 1}"
        )
    return output


def _attacks(trace: Trace, given: Sequence[Attack], threat: Threat) -> list[Attack]:
    """The attacks to run, each once: the given ones, or the default; those that need a router are left out for a dense
    model, and that is said.
    """
    objectives: tuple[Objective, ...] = (joint(), experts_only(), router_only())
    wanted: list[Attack] = []
    for attack in given or [PGD(threat, steps=20, objective=o) for o in objectives]:
        if attack not in wanted:
            wanted.append(attack)
    if trace:
        return wanted
    whole = [attack for attack in wanted if attack.objective.name == "joint"]
    if not whole:
        raise UserError(
            "the model has no router, and every attack asked for is on the routers or the experts "
            "alone; add one on the whole model, such as pgd(linf(8/255), steps=20)"
        )
    if len(whole) < len(wanted):
        note(f"the model has no router: {len(wanted) - len(whole)} attack(s) on experts or routers alone left out")
    return whole


def _seeded(attack: Attack, seed: int) -> Attack:
    """With ``seed``, unless its spec gives one of its own."""
    return attack if attack.seed else dataclasses.replace(attack, seed=seed)  # type: ignore[type-var]


def _threat(config: dict[str, Any]) -> Threat:
    """The threat a run was trained for, as its recipe says it; linf 8/255 where it says none."""
    method = specs.build(config["method"], "method") if config.get("method") else None
    if method is not None and method.attack is not None:
        threat: Threat = method.attack.threat
        return threat
    return build_attack(config["val_attack"]).threat if config.get("val_attack") else linf(8 / 255)


def _radii(threat: Threat, radii: Sequence[float] | None) -> list[float]:
    """The radii of a curve around ``threat``, without its own and without 0. UserError for one its norm cannot have."""
    top = 1.0 if threat.norm == "linf" else math.inf
    if radii is None:
        radii = [threat.eps * factor for factor in CURVE if threat.eps * factor <= top]
    for radius in radii:
        if not 0 <= radius <= top or radius == math.inf:
            limits = "from 0 to 1" if threat.norm == "linf" else "0 or more"
            raise UserError(
                f"{radius:g} is no radius of the {threat.norm} curve; expected numbers {limits}, in pixels of [0, 1] "
                "(8/255)"
            )
    return [radius for radius in dict.fromkeys(radii) if radius > 0 and abs(radius - threat.eps) > 1e-12]


def _at(attack: Attack, eps: float) -> Attack:
    changes: dict[str, Any] = {"threat": dataclasses.replace(attack.threat, eps=eps)}
    step = getattr(attack, "step_size", None)
    if step is not None and attack.threat.eps > 0:
        changes["step_size"] = step * eps / attack.threat.eps
    return dataclasses.replace(attack, **changes)  # type: ignore[type-var]


def written(attack: Attack) -> str:
    """The attack's spec; for a user's own class, which has none, its representation (its name where that would hold an
    address).
    """
    try:
        return specs.text(attack)
    except UserError:
        return repr(attack) if dataclasses.is_dataclass(attack) else type(attack).__name__


def slug(attack: Attack) -> str:
    """A file name from the attack's spec."""
    text = written(attack)
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return name if len(name) <= 150 else f"{name[:140]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _header(
    model: RoutedModel, images: ImageSet, attack: Attack, device: torch.device, about: dict[str, Any], role: str
) -> Header:
    with torch.no_grad():
        output = model.run(images.batch(list(range(min(PROBE, len(images))))).to(device).x)
    routers = {
        name: RouterInfo(experts=routing.num_experts, k=routing.k, items=routing.index.shape[1])
        for name, routing in output.trace.items()
    }
    classes = about.get("classes") or [str(c) for c in range(output.logits.shape[1])]
    header = Header(
        run=about["run"],
        model=about["model"],
        data=about["data"],
        split=about["split"],
        attack=written(attack),
        objective=attack.objective.name,
        norm=attack.threat.norm,
        eps=attack.threat.eps,
        role=role,
        method=about.get("method"),
        n=len(images),
        seed=attack.seed,
        data_hash=images.fingerprint,
        index_hash=hashlib.sha256(images.index.numpy().tobytes()).hexdigest(),
        model_hash=checks.identity(model, output.logits),
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
    return Header.from_dict(json.loads(json.dumps(header.to_dict())))  # as it will be read: no work for a bad one
