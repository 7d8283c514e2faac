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
from robustmoe.certification import Certifier, build_certifier
from robustmoe.data import Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation import engine
from robustmoe.evaluation.alphas import (
    STANDING,
    WRONG,
    Margins,
    State,
    Work,
    alphas_of,
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
from robustmoe.evaluation.measuring import BATCH, borrowed, first_look, header_of, images_of
from robustmoe.models import DualModel, Sharpening
from robustmoe.models.base import Output, as_routed
from robustmoe.models.dual import Mix
from robustmoe.progress import note, progress
from robustmoe.records import Blend
from robustmoe.training.checkpoint import read_weights, save_weights

LIMIT, STEPS = 500, 20
"""Images, and steps of each attack, unless told."""


# ------------------------------------------------------------------------------------------------ public functions


def blend(
    standard: Callable[[Tensor], Tensor],
    robust: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray | ImageSet | Data,
    y: Tensor | np.ndarray | list[int] | None = None,
    *,
    alphas: str | Sequence[float] = "0..1",
    attack: str | Attack | None = None,
    mix: Mix = "probabilities",
    sharpen: str | Sharpening | None = None,
    clean: float | None = None,
    val: ImageSet | None = None,
    certified: Margins | str | Certifier | None = None,
    num_classes: int | None = None,
    batch_size: int = BATCH,
    limit: int | None = None,
    device: str = "auto",
) -> Blend:
    """The curve over alpha of two models in hand, each alpha attacked adaptively: see `Blend`, and
    `analysis.alpha_curve` for numbers.

    ``standard``, ``robust``: `RoutedModel`s or callables from images to logits (n, c). ``x``, ``y``: images
    (n, ch, h, w) in [0, 1] with labels (n), or a data set of the project (its test split; its val split is then
    ``val``). ``alphas``: the robust half's shares in [0, 1]; "0..1" is `ALPHAS`. ``attack``: a `PGD` on the whole
    model, from which the others are made (PGD-20 at linf 8/255). ``mix``, ``sharpen``: see `DualModel`. ``clean``: the
    clean accuracy wanted on ``val``; the largest alpha that has it is chosen.

    ``certified``: a certifier of the attacked ball, such as "bounds(linf(2/255), search=0)", which then bounds both
    halves at every alpha (P8 of docs/certification.md); or for each image, (n,) or {index: margin}, a lower bound over
    the whole ball of the robust half's probability of its class minus that of any other, by a certifier that the caller
    answers for; of the sharpened half where there is ``sharpen``. A blend of probabilities is proven where it exceeds
    (1 - alpha) / alpha, whatever the standard half is (Bai et al., arXiv 2301.12554). UserError if an attack breaks a
    proven image: one of the two is wrong. Both models keep their modes and devices.
    """
    sharpening: Sharpening | None = specs.build(sharpen, "sharpening") if isinstance(sharpen, str) else sharpen
    base = pgd_on_the_whole(attack, PGD(linf(8 / 255), steps=STEPS), "a blend")
    _check_clean(clean)
    where = distributed.local_device(provenance.pick_device(device))
    dual = DualModel(as_routed(standard), as_routed(robust), mix=mix, sharpen=sharpening)
    names = [type(model).__name__ for model in (standard, robust)]
    about = {"run": "", "model": f"dual({', '.join(names)})", "split": "test"}
    about["data"] = x.name if isinstance(x, Data) else "arrays"
    val = x.val if isinstance(x, Data) and val is None else val
    images = images_of(x, y, num_classes).head(limit)
    with borrowed(dual, where):
        work = Work(dual, images, base, alphas_of(alphas), where, batch_size)
        return _curve(work, names, about, val, clean, certified)


def blend_run(
    standard: str | Path,
    robust: str | Path | None = None,
    *,
    alphas: str | Sequence[float] = "0..1",
    attack: str | None = None,
    mix: Mix | None = None,
    sharpen: str | None = None,
    clean: float | None = None,
    certified: Margins | str | Certifier | None = None,
    limit: int | None = LIMIT,
    batch_size: int = BATCH,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
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
    shares = alphas_of(alphas)
    _check_clean(clean)
    halves = halves_of(runs, mix, None if sharpen is None else specs.build(sharpen, "sharpening"))
    folder = out_of(runs, out)
    default = PGD(threat_of(halves.config), steps=STEPS)
    base = seeded(pgd_on_the_whole(attack, default, "a blend"), seed)
    assert isinstance(base, PGD)
    where = distributed.local_device(provenance.pick_device(device))
    data: Data = specs.build(halves.config["data"], "data")
    about = {
        "run": str(folder),
        "model": halves.model,
        "data": halves.config["data"],
        "split": "test",
        "method": halves.config.get("method"),
        "classes": list(data.classes),
    }
    work = Work(halves.build(where), data.test.head(limit), base, shares, where, batch_size)
    place = _Place(folder, halves, data.classes)
    return _curve(work, [halves.standard, halves.robust], about, data.val, clean, certified, place)


def _check_clean(clean: float | None) -> None:
    if clean is not None and not 0 <= clean <= 1:
        raise UserError(f"the clean accuracy wanted is {clean:g}, expected a share from 0 to 1, such as 0.9")


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
        keep = None if state.near is None else self.start(state.found.done)
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
        left = 0 < old.done < len(old.alphas)
        if other is None and left and not self.start(old.done).is_file():
            other = "pass, whose warm starts are gone"
        if other is not None:
            note(f"{path} is of another {other.replace('_', ' ')}; it is made anew")
            return None
        return State(old, read_weights(self.start(old.done))["near"] if left else None)


# ------------------------------------------------------------------------------------------------ the work


def _curve(
    work: Work,
    names: Sequence[str],
    about: dict[str, Any],
    val: ImageSet | None,
    clean: float | None,
    certified: Margins | str | Certifier | None,
    place: _Place | None = None,
) -> Blend:
    """All alphas; what stands in the folder's file is not done again. The model is on the device."""
    clock = time.monotonic()
    if work.batch_size < 1:
        raise UserError(f"the batch size is {work.batch_size}, expected at least 1")
    if clean is not None and val is None:
        raise UserError("alpha is chosen on validation images, and there are none; expected val beside clean")
    outputs = _first_looks(work)
    attacks = [attacks_at(work, alpha, output.trace) for alpha, output in zip(work.alphas, outputs)]
    fresh = _nothing_yet(work, names, about, attacks)
    certifier = build_certifier(certified) if isinstance(certified, str | Certifier) else None
    bounds = None if certified is None or isinstance(certified, str | Certifier) else bounds_of(work, certified)
    state = None if place is None else place.taken_up(fresh)
    state = state or State(_untouched(work, fresh, val))
    state.found = _chosen(replace(state.found, wanted=clean))
    if bounds is not None:
        state.found = replace(state.found, certified=certified_by(work, state.found, bounds))
    if certifier is not None:
        state.found = replace(state.found, certified=proven_by(work, state.found, certifier))
    believe(state.found)
    if place is not None:
        write_run(place.folder, place.halves, state.found.chosen, work.base, place.classes)
        place.save(state)
    if state.found.done == len(work.alphas):
        return state.found
    costs = [sum(a.queries(output) for a in each.values()) for each, output in zip(attacks, outputs)]
    meter, climbed = engine.Meter(), climbed_halves(work)
    with progress(_ahead(state.found, costs), "blend", unit="passes") as bar:
        meter.bar = bar
        while state.found.done < len(work.alphas):
            k = len(work.alphas) - state.found.done - 1
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
        done=0,
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
    left = list(zip(costs, found.broken))[: len(costs) - found.done]
    return sum(cost * row.count(STANDING) for cost, row in left)
