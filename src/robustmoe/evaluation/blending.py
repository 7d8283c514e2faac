"""A standard and a robust model blended at every alpha: clean and robust accuracy of the whole curve in one pass.

The dual model of Zhang et al. (ICML 2025) has one number, alpha, between the accuracy of one half and the robustness of
the other; how it was attacked there is not known to us. Here each alpha is attacked as the model that it is, and every
attacked image, whichever alpha it was made for, is put to all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustmoe import distributed, provenance, records
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Attack, linf
from robustmoe.certification import build_certifier
from robustmoe.data import Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation import engine
from robustmoe.evaluation.alphas import (
    STANDING,
    WRONG,
    State,
    Work,
    at,
    attack_alpha,
    attacks_at,
    believe,
    bounds_of,
    certified_by,
    classes_of,
    climbed_halves,
    judged,
    proven_by,
)
from robustmoe.evaluation.choosing import pgd_on_the_whole, seeded, threat_of
from robustmoe.evaluation.halves import Halves, halves_of, out_of, write_run
from robustmoe.evaluation.measuring import borrowed, first_look, header_of, images_of
from robustmoe.models import DualModel, Sharpening
from robustmoe.models.base import Output, as_routed
from robustmoe.options import BlendOptions, takes
from robustmoe.progress import note, progress
from robustmoe.records import Blend
from robustmoe.training.checkpoint import read_weights, save_weights

STEPS = 20
"""Steps of each attack, unless told."""


# ------------------------------------------------------------------------------------------------ public functions


@takes(BlendOptions, limit=None)
def blend(
    standard: Callable[[Tensor], Tensor],
    robust: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    options: BlendOptions,
    val: ImageSet | None = None,
    num_classes: int | None = None,
) -> Blend:
    """The curve over alpha of two models in hand, each alpha attacked adaptively: see `Blend`, and
    `.summary()` for numbers.

    ``standard``, ``robust``: `RoutedModel`s or callables from images to logits (n, c). ``x``, ``y``: images
    (n, ch, h, w) in [0, 1] with labels (n), or a data set of the project (its test split; its val split is then
    ``val``). ``attack`` is by default PGD-20 at linf 8/255. ``mix``, ``sharpen``: see `DualModel`.

    A ``certifier`` of the attacked ball bounds both halves at every alpha (CERT-8 of docs/certification.md).
    ``margins`` are of the sharpened half where there is ``sharpen``; a blend of probabilities is proven where an
    image's margin exceeds (1 - alpha) / alpha, whatever the standard half is (Bai et al., arXiv 2301.12554). UserError
    if an attack breaks a proven image: one of the two is wrong. Both models keep their modes and devices.
    """
    base = seeded(pgd_on_the_whole(options.attack, PGD(linf(8 / 255), steps=STEPS), "a blend"), options.seed)
    where = distributed.local_device(provenance.pick_device(options.device))
    mix, sharpening = options.mix or "probabilities", _sharpening(options)
    dual = DualModel(as_routed(standard), as_routed(robust), mix=mix, sharpen=sharpening)
    names = [type(model).__name__ for model in (standard, robust)]
    about = {"run": "", "model": f"dual({', '.join(names)})", "split": "test"}
    about["data"] = x.name if isinstance(x, Data) else "arrays"
    val = x.val if isinstance(x, Data) and val is None else val
    images = images_of(x, y, num_classes).head(options.limit)
    with borrowed(dual, where):
        work = Work(dual, images, base, options.alphas, where, options.batch_size)
        return _curve(work, names, about, val, options)


@takes(BlendOptions)
def blend_run(
    standard: str | Path, robust: str | Path | None = None, *, options: BlendOptions, out: str | Path | None = None
) -> Blend:
    """The curve over alpha of the models of two run folders, or of the halves of one run of a dual model, on the first
    ``limit`` test images; alpha is chosen on the whole validation split. The rest: see `blend`.

    ``out`` (default runs/blend-… by the runs' names; its name is in the result's header) becomes a run folder of the
    dual model at the chosen alpha, with ``blend.json`` in it. That is written after each alpha, and a rerun goes on
    with the missing ones. ``attack``: the spec of a pgd; default PGD-20 at the threat of the robust run. ``mix``,
    ``sharpen``: by default those of the dual run, else probabilities and none. ``seed``: of the attacks, unless the
    spec gives one.
    """
    runs = [Path(run) for run in (standard, robust) if run is not None]
    shares = options.alphas
    halves = halves_of(runs, options.mix, _sharpening(options))
    folder = out_of(runs, out)
    default = PGD(threat_of(halves.config), steps=STEPS)
    base = seeded(pgd_on_the_whole(options.attack, default, "a blend"), options.seed)
    where = distributed.local_device(provenance.pick_device(options.device))
    data: Data = specs.build(halves.config["data"], "data")
    about = {
        "run": str(folder),
        "model": halves.model,
        "data": halves.config["data"],
        "split": "test",
        "method": halves.config.get("method"),
        "classes": list(data.classes),
    }
    work = Work(halves.build(where), data.test.head(options.limit), base, shares, where, options.batch_size)
    place = _Place(folder, halves, data.classes)
    return _curve(work, [halves.standard, halves.robust], about, data.val, options, place)


def _sharpening(options: BlendOptions) -> Sharpening | None:
    built: Sharpening | None = options.sharpen
    return specs.build(options.sharpen, "sharpening") if isinstance(options.sharpen, str) else built


# ------------------------------------------------------------------------------------------------ the file


class _Place(NamedTuple):
    """The run folder of a blend, and what is in it."""

    folder: Path
    halves: Halves
    classes: Sequence[str]

    def start(self, done: int) -> Path:
        """Where the warm starts are kept of the alpha that comes after ``done`` others."""
        return self.folder / f"blend-start-{done}.safetensors"

    def save(self, state: State) -> None:
        """The warm starts first: without them a blend.json could not be gone on from as if it had never stopped."""
        keep = None if state.near is None else self.start(state.found.attacked)
        if keep is not None and state.near is not None:
            save_weights(keep, {"near": state.near}, self.halves.model)
        state.found.write(self.folder)
        for old in self.folder.glob("blend-start-*.safetensors"):
            if old != keep:
                old.unlink()

    def taken_up(self, fresh: Blend) -> State | None:
        """What stands in the folder, if it is of the same work as ``fresh``."""
        old, path = records.Blend.read(self.folder), records.Blend.path(self.folder)
        if old is None:
            return None
        other = records.difference(old.header, fresh.header)
        if (old.alphas, old.attacks) != (fresh.alphas, fresh.attacks):
            other = other or ("list of alphas" if old.alphas != fresh.alphas else "list of attacks")
        left = 0 < old.attacked < len(old.alphas)
        if other is None and left and not self.start(old.attacked).is_file():
            other = "pass, whose warm starts are gone"
        if other is not None:
            note(f"{path} is of another {other.replace('_', ' ')}; it is made anew")
            return None
        return State(old, read_weights(self.start(old.attacked))["near"] if left else None)


# ------------------------------------------------------------------------------------------------ the work


def _curve(
    work: Work,
    names: Sequence[str],
    about: dict[str, Any],
    val: ImageSet | None,
    options: BlendOptions,
    place: _Place | None = None,
) -> Blend:
    """All alphas; what stands in the folder's file is not done again. The model is on the device."""
    clock = time.monotonic()
    if options.clean is not None and val is None:
        raise UserError("alpha is chosen on validation images, and there are none; expected val beside clean")
    outputs = _first_looks(work)
    attacks = [attacks_at(work, alpha, output.trace) for alpha, output in zip(work.alphas, outputs)]
    fresh = _nothing_yet(work, names, about, attacks)
    certifier = None if options.certifier is None else build_certifier(options.certifier)
    bounds = None if options.margins is None else bounds_of(work, options.margins)
    state = None if place is None else place.taken_up(fresh)
    state = state or State(_untouched(work, fresh, val))
    state.found = _chosen(replace(state.found, wanted=options.clean))
    if bounds is not None:
        state.found = replace(state.found, certified=certified_by(work, state.found, bounds))
    if certifier is not None:
        state.found = replace(state.found, certified=proven_by(work, state.found, certifier))
    believe(state.found)
    if place is not None:
        write_run(place.folder, place.halves, state.found.chosen, work.base, place.classes)
        place.save(state)
    if state.found.attacked == len(work.alphas):
        return state.found
    costs = [sum(a.queries(output) for a in each.values()) for each, output in zip(attacks, outputs)]
    meter, climbed = engine.Meter(), climbed_halves(work)
    with progress(_ahead(state.found, costs), "blend", unit="passes") as bar:
        meter.bar = bar
        while state.found.attacked < len(work.alphas):
            k = len(work.alphas) - state.found.attacked - 1
            bar.say(f"alpha {work.alphas[k]:g}")
            attack_alpha(work, climbed, state, attacks[k], meter)
            seconds, clock = state.found.seconds + time.monotonic() - clock, time.monotonic()
            state.found = replace(state.found, seconds=seconds)
            believe(state.found)
            if place is not None:
                place.save(state)
            bar.expect(meter.queries + _ahead(state.found, costs))
    return state.found


def _first_looks(work: Work) -> list[Output]:
    """Of the blend at every alpha on a few images. UserError where a half does not take them, or the halves do not
    have the same classes.
    """
    dual, images, device = work.dual.eval(), work.images, work.device
    counts = [first_look(half, images, device).logits.shape[1] for half in (dual.standard, dual.robust)]
    if counts[0] != counts[1]:
        raise UserError(f"the halves have {counts[0]} and {counts[1]} classes; expected two models of the same classes")
    return [first_look(at(dual, alpha), images, device) for alpha in work.alphas]


def _nothing_yet(
    work: Work, names: Sequence[str], about: dict[str, Any], attacks: Sequence[dict[str, Attack]]
) -> Blend:
    """The record before anything was asked."""
    plan = engine.plan(work.base, first_look(work.dual, work.images, work.device), work.images)
    header = header_of(work.dual, work.images, work.base, plan, work.device, work.batch_size, about, "main", "strict")
    return Blend(
        header=header,
        standard=names[0],
        robust=names[1],
        mix=work.dual.mix,
        sharpen="" if work.dual.sharpen is None else specs.text(work.dual.sharpen),
        alphas=list(work.alphas),
        index=work.images.index.tolist(),
        labels=work.images.labels.tolist(),
        predicted=[],
        attacks=list(dict.fromkeys(name for each in sorted(attacks, key=len, reverse=True) for name in each)),
        broken=[],
        certified=[],
        validation=[],
        wanted=None,
        chosen=None,
        attacked=0,
        seconds=0.0,
    )


def _untouched(work: Work, fresh: Blend, val: ImageSet | None) -> Blend:
    """With what is asked of clean images."""
    predicted = _predicted(work, work.images)
    broken = [[STANDING if a == b else WRONG for a, b in zip(each, fresh.labels)] for each in predicted]
    validation: list[float] = []
    if val is not None:
        labels = val.labels.tolist()
        hits = [sum(a == b for a, b in zip(each, labels)) for each in _predicted(work, val)]
        validation = [hit / len(labels) for hit in hits]
    return replace(fresh, predicted=predicted, broken=broken, validation=validation)


def _predicted(work: Work, images: ImageSet) -> list[list[int]]:
    """The class of each image at every alpha."""
    found: list[list[int]] = [[] for _ in work.alphas]
    for batch in batches(images, work.batch_size, torch.arange(len(images)), work.device):
        for each, logits in zip(found, judged(work.dual, work.alphas, batch.x)):
            each += classes_of(logits)
    return found


def _chosen(found: Blend) -> Blend:
    """With the largest alpha whose clean accuracy on validation is at least the one wanted."""
    if found.wanted is None:
        return replace(found, chosen=None)
    enough = [alpha for alpha, value in zip(found.alphas, found.validation) if value >= found.wanted]
    if not enough:
        best = max(found.validation)
        note(
            f"no alpha has a clean accuracy of {100 * found.wanted:.4g} % on the validation images (the best has "
            f"{100 * best:.4g} %); none is chosen"
        )
    return replace(found, chosen=max(enough, default=None))


def _ahead(found: Blend, costs: Sequence[int]) -> int:
    """Forward passes to come if no other image breaks."""
    left = list(zip(costs, found.broken))[: len(costs) - found.attacked]
    return sum(cost * row.count(STANDING) for cost, row in left)
