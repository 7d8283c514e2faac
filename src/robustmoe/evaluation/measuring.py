"""Attack a data set and write rows: `evaluate` for a model in hand, `evaluate_run` for a run folder."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustmoe import distributed, provenance
from robustmoe import spec as specs
from robustmoe.analysis import robust
from robustmoe.attacks import (
    Attack,
    Surrogate,
    Threat,
    at_radius,
    build_attack,
    linf,
)
from robustmoe.data import Batch, Data, ImageSet, from_arrays
from robustmoe.errors import UserError
from robustmoe.evaluation import checks, engine
from robustmoe.evaluation.choosing import attacks_for, one_norm, radii_of, seeded, slug, threat_of, written
from robustmoe.evaluation.precision import frozen
from robustmoe.models.base import Output, RoutedModel, as_routed
from robustmoe.options import EvaluateOptions, takes
from robustmoe.records import Check, Evaluation, Header, ObjectiveInfo, RouterInfo, Writer, examples_path
from robustmoe.routing import Tape
from robustmoe.training.checkpoint import load_model, read_config

PROBE = 32
"""Images the checks of a model look at."""

CURVE_LIMIT = 256


@takes(EvaluateOptions, curve=())
def evaluate(
    model: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data | str,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    options: EvaluateOptions,
    num_classes: int | None = None,
    name: str | None = None,
    out: str | Path | None = None,
) -> list[Evaluation]:
    """Attack ``model`` on images and give what each attack left, image by image.

    `analysis.evaluation_summary` makes numbers of it.

    ``model``: a `RoutedModel`, or any callable from images to logits (n, c). ``x``, ``y``: images (n, ch, h, w) in
    [0, 1] with labels (n), or one of the project's data sets or its spec (its test split). ``attacks``: specs or
    attacks; by default PGD-20 at linf 8/255 on the whole model; for a routed model also on its experts alone and on its
    routers alone, and `ExpertTransition` into every expert's cell (with token routers `RouteBeam`). ``name``: what
    tables call the model. ``out``: a folder for the rows (resumable; by default temporary). Under torchrun the
    processes share the work. Raises UserError for images outside [0, 1], labels out of range, a model that fails or
    whose output is not (n, c). The model keeps its modes and device.

    A ``curve`` runs the simple attack that left the fewest images standing again at its radii, on at most 256 images.
    """
    source: Any = specs.build(x, "data") if isinstance(x, str) else x
    about = {
        "run": "",
        "model": name or type(model).__name__,
        "data": x if isinstance(x, str) else x.name if isinstance(x, Data) else "arrays",
        "split": options.split,
        **({"classes": list(source.classes)} if isinstance(source, Data) else {}),
    }
    images = images_of(source, y, num_classes, options.split).head(options.limit)
    with tempfile.TemporaryDirectory() as scratch:
        return _evaluated(model, images, Path(out or scratch), options, linf(8 / 255), about)


@takes(EvaluateOptions)
def evaluate_run(
    run: str | Path, *, options: EvaluateOptions, data: str | None = None, out: str | Path | None = None
) -> list[Evaluation]:
    """Evaluate a run folder with each attack into ``RUN/rows`` (or ``out``), one file an attack; gives their
    contents.

    ``attacks``: by default those of the run's recipe, else `evaluate`'s at the radius it was trained for. ``data``:
    another data set than the run's. What is already in a file is kept, and only missing images are attacked. The rest:
    see `evaluate`; the ``curve`` is by default at a quarter to twice the attack's own radius (suites are never run
    again).
    """
    run = Path(run)
    config = read_config(run)
    model = load_model(run, distributed.local_device(provenance.pick_device(options.device)))
    source: Data = specs.build(data or config["data"], "data")
    if source.num_classes != config["num_classes"] or list(source.image_shape) != config["image_shape"]:
        raise UserError(
            f"{run} is a model for {config['num_classes']} classes and images "
            f"{tuple(config['image_shape'])}; the data have "
            f"{source.num_classes} classes and images {source.image_shape}"
        )
    about = {
        "run": str(run),
        "model": config["model"],
        "data": data or config["data"],
        "split": options.split,
        "method": config.get("method"),
        "classes": list(source.classes),
    }
    images: ImageSet = getattr(source, options.split).head(options.limit)
    options = replace(options, attacks=options.attacks or tuple(config.get("attacks") or ()))
    return _evaluated(model, images, Path(out or run / "rows"), options, threat_of(config), about)


def _evaluated(
    model: Callable[[Tensor], Tensor],
    images: ImageSet,
    out: Path,
    options: EvaluateOptions,
    threat: Threat,
    about: dict[str, Any],
) -> list[Evaluation]:
    """Every attack, and the curve of one of them. ``threat``: of the default attacks."""
    given = [build_attack(attack) for attack in options.attacks]
    where = distributed.local_device(provenance.pick_device(options.device))
    end = "" if options.split == "test" else f"-{options.split}"
    routed = as_routed(model)
    with borrowed(routed, where), distributed.session(where):
        output = first_look(routed, images, where)
        chosen = [seeded(attack, options.seed) for attack in attacks_for(output.trace, given, threat)]
        one_norm(chosen, options.certified)
        simple = [len(attack.parts(output)) == 1 for attack in chosen]  # a suite at every radius would take hours
        if options.curve and not any(simple):
            raise UserError("a curve needs a simple attack beside the suite; add --attack, such as one of kind pgd")
        radii = {attack.threat: radii_of(attack.threat, options.curve) for attack in chosen}

        def one(attack: Attack, images: ImageSet, end: str, role: str) -> Evaluation:
            path = out / f"{slug(attack)}{end}.jsonl"
            return measure(routed, images, attack, path, where, options, about, role)

        results = [one(attack, images, end, "main") for attack in chosen]
        curves: list[Attack] = []
        if any(simple):
            pairs = [pair for pair, alone in zip(zip(chosen, results), simple) if alone]
            strongest, _ = min(pairs, key=lambda pair: sum(map(robust, pair[1].rows)))
            curves = [at_radius(strongest, radius) for radius in radii[strongest.threat]]
        few = images.head(CURVE_LIMIT)
        return results + [one(attack, few, f"{end}-curve", "curve") for attack in curves]


def measure(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack,
    path: Path,
    device: torch.device,
    options: EvaluateOptions,
    about: dict[str, Any],
    role: str = "main",
) -> Evaluation:
    """One attack on every image, row by row into ``path``; images that stand there already are skipped, checks are
    run anew.

    ``precision``: what the attack climbs: "strict" a frozen copy of the model in float32, "fast" one in half precision
    (see `robustmoe.evaluation.precision`), "fp32" the model itself; the exact model judges every row. ``certified``:
    index of an image -> radius, in the attack's norm, up to which its prediction is proven to hold (by a certifier
    that the caller answers for): images right and certified up to eps are not attacked. Called by every process of a
    `distributed.session`; the first one writes, and each gives the whole result.
    """
    batch_size, precision, certified = options.batch_size, options.precision, options.certified
    model.eval()
    peers = engine.Peers()
    probe = images.batch(list(range(min(PROBE, len(images))))).to(device)
    with torch.no_grad():
        plan = engine.plan(attack, model.run(probe.x), images, certified)

    def header(n: int) -> Header:
        some = images.head(n)
        whole = n == len(images) or not plan.certified
        work = plan if whole else engine.plan(attack, model.run(probe.x), some, certified)
        return header_of(model, some, attack, work, device, batch_size, about, role, precision)

    with contextlib.ExitStack() as stack:
        writer: Writer | None = None

        def begin() -> engine.Ledger | None:
            nonlocal writer
            writer = stack.enter_context(Writer(path, header(len(images)), header))
            if len(writer.done) == len(images) and writer.checks is not None:
                return None
            return engine.Ledger.of(writer, examples_path(path))

        def finish() -> Evaluation:
            assert writer is not None
            if ledger is not None:
                found.extend(
                    checks.after(checks.Finished(writer.result.rows, attack.threat.norm, attack.threat.eps, changed))
                )
                writer.finish(_in_order(found), writer.seconds + time.monotonic() - lap)
            return writer.result

        lap = time.monotonic()
        ledger = peers.first(begin)
        if ledger is not None:
            found = peers.first(lambda: checks.before(model, attack, probe))
            as_found, meter = checks.fingerprint(model), engine.Meter()
            _same_everywhere(peers, as_found, images)
            climbed = _climbed(model, probe, precision, meter)
            work = engine.Work(model, climbed, images, plan, batch_size, device, meter)
            lap = engine.run(work, ledger, writer, peers, written(attack), lap)
            each = peers.gather((as_found, checks.fingerprint(model)))
            changed = next((pair for pair in each if pair[0] != pair[1]), each[0])
        return peers.first(finish)


def _same_everywhere(peers: engine.Peers, fingerprint: str, images: ImageSet) -> None:
    """UserError where the processes came with different weights or images: their rows would be of different work."""
    if peers.world > 1 and len(set(peers.gather((fingerprint, images.fingerprint)))) > 1:
        raise UserError(
            "the processes hold different models or images; build and load them alike in each (one seed, one file)"
        )


def _climbed(model: RoutedModel, probe: Batch, precision: str, meter: engine.Meter) -> Surrogate:
    """What the attack sees in ``model``'s place."""
    if precision == "fp32":
        return Surrogate(model, model, close=True, on_pass=meter.on_pass)
    return frozen(model, probe.x, "fast" if precision == "fast" else "strict", on_pass=meter.on_pass)


def _in_order(found: list[Check]) -> list[Check]:
    return sorted(found, key=lambda check: (check.id[0], int(check.id[1:])))


def images_of(
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None,
    num_classes: int | None,
    split: str = "test",
) -> ImageSet:
    """What the caller gave as an `ImageSet`. UserError for labels beside a data set, or images without labels."""
    if isinstance(x, Data | ImageSet):
        if y is not None:
            raise UserError("labels were given beside a data set, which has its own; expected one of them")
        return getattr(x, split) if isinstance(x, Data) else x
    if y is None:
        raise UserError("images were given without labels; expected y, one integer an image")
    return from_arrays(x, y, num_classes)


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
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


def first_look(model: RoutedModel, images: ImageSet, device: torch.device) -> Output:
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


def header_of(
    model: RoutedModel,
    images: ImageSet,
    attack: Attack,
    plan: engine.Plan,
    device: torch.device,
    batch_size: int,
    about: dict[str, Any],
    role: str,
    precision: str,
) -> Header:
    """The header of an evaluation; ``about``: what it says of the model. One pass of the model on a few images."""
    return headed(
        model,
        images,
        device,
        batch_size,
        about,
        attack=written(attack),
        objective=ObjectiveInfo.of(attack.objective),
        norm=attack.threat.norm,
        eps=attack.threat.eps,
        role=role,
        seed=attack.seed,
        precision=precision,
        parts=plan.parts,
        certified_hash=plan.certified_hash,
    )


def headed(
    model: RoutedModel,
    images: ImageSet,
    device: torch.device,
    batch_size: int,
    about: dict[str, Any],
    **work: Any,
) -> Header:
    """The header of any ``work`` (the fields of `Header` that say what was done) on a model's images."""
    with torch.no_grad():
        output = model.run(images.batch(list(range(min(PROBE, len(images))))).to(device).x)
    routers = {
        name: RouterInfo(experts=routing.num_experts, k=routing.k, items=routing.index.shape[1])
        for name, routing in output.trace.items()
    }
    header = Header(
        run=about["run"],
        model=about["model"],
        data=about["data"],
        split=about["split"],
        method=about.get("method"),
        n=len(images),
        data_hash=images.fingerprint,
        index_hash=hashlib.sha256(images.index.numpy().tobytes()).hexdigest(),
        model_hash=checks.identity(model, output.logits),
        versions=provenance.versions(),
        commit=provenance.commit(),
        device=str(device),
        threads=torch.get_num_threads(),
        command=provenance.command(),
        classes=about.get("classes") or [str(c) for c in range(output.logits.shape[1])],
        routers=routers,
        parameters=sum(p.numel() for p in model.parameters()),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        batch_size=batch_size,
        **work,
    )
    return Header.from_dict(json.loads(json.dumps(header.to_dict())))  # as it will be read: no work for a bad one
