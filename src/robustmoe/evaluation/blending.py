"""A standard and a robust model blended at every alpha: clean and robust accuracy of the whole curve in one pass.

The dual model of Zhang et al. (ICML 2025) has one number, alpha, between the accuracy of one half and the robustness of
the other; how it was attacked there is not known to us. Here each alpha is attacked as the model that it is, and every
attacked image, whichever alpha it was made for, is put to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from robustmoe import records
from robustmoe import spec as specs
from robustmoe.attacks import PGD, Attack, Threat, linf
from robustmoe.certification import build_certifier
from robustmoe.data import Data, ImageSet, batches
from robustmoe.errors import UserError
from robustmoe.evaluation.alphas import (
    NOT_BROKEN,
    WRONG,
    BlendState,
    BlendWork,
    assert_consistent_with_attacks,
    at,
    attack_alpha,
    attacks_at,
    bounds_of,
    certified_by,
    classes_of,
    climbed_halves,
    judged,
    proven_by,
)
from robustmoe.evaluation.choosing import pgd_on_the_whole, seeded, threat_of
from robustmoe.evaluation.halves import Halves, halves_of, out_of, write_run
from robustmoe.evaluation.meters import Meter
from robustmoe.evaluation.session import (
    Session,
    about_run,
    device_of,
    in_hand,
    validate_model,
)
from robustmoe.models import DualModel, Sharpening
from robustmoe.models.base import Output
from robustmoe.models.plain import as_routed
from robustmoe.options import BlendOptions, takes
from robustmoe.progress import first_process, note, progress
from robustmoe.records import Blend, versions
from robustmoe.runs import named
from robustmoe.training.checkpoint import read_weights, run_data, save_weights

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
    base = _base(options, linf(8 / 255))
    dual = DualModel(
        as_routed(standard), as_routed(robust), mix=options.mix or "probabilities", sharpen=_sharpening(options)
    )
    names = [type(model).__name__ for model in (standard, robust)]
    val = x.val if isinstance(x, Data) and val is None else val
    with in_hand(dual, x, y, options, num_classes, f"dual({', '.join(names)})") as session:
        return _curve(BlendWork(session, base), names, val)


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
    runs = [named(run) for run in (standard, robust) if run is not None]
    halves = halves_of(runs, options.mix, _sharpening(options))
    folder = out_of(runs, out)
    base = _base(options, threat_of(halves.config))
    device = device_of(options)
    data = run_data(folder, halves.config)
    about = about_run(folder, {**halves.config, "model": halves.model}, data)
    images = data.test.head(options.limit)
    session = Session(halves.build(device), images, device, options, about, folder, data.test)
    place = BlendFolder(folder, halves, data.classes)
    with records.writing(folder):
        out_of(runs, out)  # again: another writer may have been in it until now
        return _curve(BlendWork(session, base), [halves.standard, halves.robust], data.val, place)


def _base(options: BlendOptions, threat: Threat) -> PGD:
    return seeded(pgd_on_the_whole(options.attack, PGD(threat, steps=STEPS), "a blend"), options.seed)


def _sharpening(options: BlendOptions) -> Sharpening | None:
    built: Sharpening | None = options.sharpen
    return specs.build(options.sharpen, "sharpening") if isinstance(options.sharpen, str) else built


# ------------------------------------------------------------------------------------------------ the file


class BlendFolder(NamedTuple):
    """The run folder of a blend, and what is in it."""

    folder: Path
    halves: Halves
    classes: Sequence[str]

    def start(self, done: int) -> Path:
        """Where the warm starts are kept of the alpha that comes after ``done`` others."""
        return self.folder / f"blend-start-{done}.safetensors"

    def save(self, state: BlendState) -> None:
        """The warm starts first: without them a blend.json could not be gone on from as if it had never stopped. Of
        several processes the first one writes.
        """
        if not first_process():
            return
        keep = None if state.near is None else self.start(state.record.attacked)
        if keep is not None and state.near is not None:
            save_weights(keep, {"near": state.near}, self.halves.model)
        state.record.write(self.folder)
        for old in self.folder.glob("blend-start-*.safetensors"):
            if old != keep and old.stem.removeprefix("blend-start-").isdigit():
                old.unlink()

    def resume(self, fresh: Blend) -> BlendState | None:
        """Returns what is in the folder, if it is of the same work as ``fresh``."""
        old, path = records.Blend.read(self.folder), records.Blend.path(self.folder)
        if old is None:
            return None
        other = records.differing(old.header, fresh.header)
        if (old.alphas, old.attacks) != (fresh.alphas, fresh.attacks):
            other = other or ("list of alphas" if old.alphas != fresh.alphas else "list of attacks")
        left = 0 < old.attacked < len(old.alphas)
        if not other and left and not self.start(old.attacked).is_file():
            other = "pass, whose warm starts are gone"
        if other:
            records.set_aside(path, other)
            return None
        header, words = versions.taken_up(old.header, fresh.header, old.attacked)
        if words and old.attacked < len(old.alphas):
            versions.tell(path, words)
            old = replace(old, header=header)
        return BlendState(old, read_weights(self.start(old.attacked))["near"] if left else None)


# ------------------------------------------------------------------------------------------------ the work


def _curve(work: BlendWork, names: Sequence[str], val: ImageSet | None, place: BlendFolder | None = None) -> Blend:
    """Attacks at all alphas; what is in the folder's file is not done again."""
    options = work.options
    if options.clean is not None and val is None:
        raise UserError("alpha is chosen on validation images, and there are none; expected val beside clean")
    outputs = _validate(work)
    attacks = [
        attacks_at(work.base, alpha, output.trace, warm=alpha < work.alphas[-1])
        for alpha, output in zip(work.alphas, outputs)
    ]
    state = _start(work, _empty(work, names, attacks), val, place)
    if place is not None and first_process():
        write_run(place.folder, place.halves, state.record.chosen, work.base, place.classes)
    if place is not None:
        place.save(state)
    if state.record.attacked == len(work.alphas):
        return state.record
    costs = [sum(a.queries(output) for a in each.values()) for each, output in zip(attacks, outputs)]
    meter, climbed = Meter(), climbed_halves(work)
    with progress(_ahead(state.record, costs), "blend", unit="passes") as bar:
        meter.bar = bar
        while state.record.attacked < len(work.alphas):
            k = len(work.alphas) - state.record.attacked - 1
            bar.say(f"alpha {work.alphas[k]:g}")
            attack_alpha(work, climbed, state, attacks[k], meter)
            state.record = replace(state.record, seconds=state.record.seconds + work.session.clock.lap())
            assert_consistent_with_attacks(state.record)
            if place is not None:
                place.save(state)
            bar.expect(meter.queries + _ahead(state.record, costs))
    return state.record


def _start(work: BlendWork, empty: Blend, val: ImageSet | None, place: BlendFolder | None) -> BlendState:
    """What is in the folder's file or was asked of clean images, with the alpha that is chosen and what is proven."""
    options = work.options
    certifier = None if options.certifier is None else build_certifier(options.certifier)
    bounds = None if options.margins is None else bounds_of(work, options.margins)
    state = None if place is None else place.resume(empty)
    if state is not None and place is not None:
        work.session.recognise(Blend.path(place.folder), state.record.images())
    state = state or BlendState(measure_clean(work, empty, val))
    state.record = _chosen(replace(state.record, wanted=options.clean))
    if bounds is not None:
        state.record = replace(state.record, certified=certified_by(work, state.record, bounds))
    if certifier is not None:
        state.record = replace(state.record, certified=proven_by(work, state.record, certifier))
    assert_consistent_with_attacks(state.record)
    return state


def _validate(work: BlendWork) -> list[Output]:
    """What the blend answers at every alpha to the first images. UserError where a half does not take them, or the
    halves do not have the same classes.
    """
    dual, probe, images = work.dual, work.session.probe, work.images
    counts = [validate_model(half, probe, images).logits.shape[1] for half in (dual.standard, dual.robust)]
    if counts[0] != counts[1]:
        raise UserError(f"the halves have {counts[0]} and {counts[1]} classes; expected two models of the same classes")
    return [validate_model(at(dual, alpha), probe, images) for alpha in work.alphas]


def _empty(work: BlendWork, names: Sequence[str], attacks: Sequence[dict[str, Attack]]) -> Blend:
    """The record before anything was asked."""
    return Blend(
        header=work.session.attack_header(work.base),
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


def measure_clean(work: BlendWork, empty: Blend, val: ImageSet | None) -> Blend:
    """The record with what is asked of clean images."""
    predicted = _predicted(work, work.images)
    broken = [[NOT_BROKEN if a == b else WRONG for a, b in zip(each, empty.labels)] for each in predicted]
    validation: list[float] = []
    if val is not None:
        labels = val.labels.tolist()
        hits = [sum(a == b for a, b in zip(each, labels)) for each in _predicted(work, val)]
        validation = [hit / len(labels) for hit in hits]
    return replace(empty, predicted=predicted, broken=broken, validation=validation)


def _predicted(work: BlendWork, images: ImageSet) -> list[list[int]]:
    """The class of each image at every alpha."""
    predicted: list[list[int]] = [[] for _ in work.alphas]
    for batch in batches(images, work.options.batch_size, device=work.device):
        for each, logits in zip(predicted, judged(work.dual, work.alphas, batch.x)):
            each += classes_of(logits)
    return predicted


def _chosen(record: Blend) -> Blend:
    """Returns the record with the largest alpha whose clean accuracy on validation is at least the one wanted."""
    if record.wanted is None:
        return replace(record, chosen=None)
    enough = [alpha for alpha, value in zip(record.alphas, record.validation) if value >= record.wanted]
    if not enough:
        best = max(record.validation)
        note(
            f"no alpha has a clean accuracy of {100 * record.wanted:.4g} % on the validation images (the best has "
            f"{100 * best:.4g} %); none is chosen"
        )
    return replace(record, chosen=max(enough, default=None))


def _ahead(record: Blend, costs: Sequence[int]) -> int:
    """Forward passes to come if no other image breaks."""
    left = list(zip(costs, record.broken))[: len(costs) - record.attacked]
    return sum(cost * row.count(NOT_BROKEN) for cost, row in left)
