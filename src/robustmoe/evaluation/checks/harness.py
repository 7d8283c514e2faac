"""Checks of the harness (H): is what was measured what was meant? The images, the model, neighbours, precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustmoe import analysis, compat
from robustmoe.attacks import Surrogate
from robustmoe.attacks.half import LowPrecision
from robustmoe.evaluation.checks.fingerprints import fingerprint
from robustmoe.evaluation.checks.registry import Answer, check, not_run
from robustmoe.evaluation.checks.subject import Finished, Subject, doubled, few, graded, in_ball_and_box, percent
from robustmoe.models.norm import answers, difference, largest
from robustmoe.noise import Noise, permutation

PASSES = 5
LOG_POINTS, ROUNDING_POINTS = 1.0, 0.1
"""Training may have validated in half precision; a difference above the second warns, above the first fails."""


@check("H1", "input range", "model", "cheap")
def input_range(case: Subject) -> Answer:
    """Images are float32 in [0, 1], and the model has an output for every label, and no more than there are classes."""
    batch, logits = case.whole, case.output.logits
    classes = logits.shape[1]
    low, high = float(batch.x.min()), float(batch.x.max())
    fine = low >= 0 and high <= 1 and batch.x.dtype == torch.float32
    text = f"images are {batch.x.dtype} in [{low:.3g}, {high:.3g}]" + ("" if fine else "; expected float32 in [0, 1]")
    first, last = int(batch.y.min()), int(batch.y.max())
    if not 0 <= first <= last < classes:
        fine, text = False, f"{text}; labels go from {first} to {last}, the model has {classes} classes"
    known = case.run.get("classes", 0)
    if fine and classes > known > 0:
        text = f"{text}; the model has {classes} outputs, the data {known} classes: one above {known - 1} is wrong"
        return Answer("warn", [low, high], text)
    return Answer("pass" if fine else "fail", [low, high], text)


@check("H2", "ball and box", "after")
def ball_and_box(done: Finished) -> Answer:
    """Every perturbation, measured anew, is inside the ball and the image inside the box."""
    rows, norm, eps = done.rows, done.norm, done.eps
    largest = analysis.largest(row.size[norm] for row in rows)
    outside = analysis.largest(row.size["box"] for row in rows)
    fine = analysis.inside(largest, eps) and outside <= 0  # False for NaN too
    text = f"largest {norm} perturbation {largest:.6g} of {eps:.6g}, {outside:.2g} outside [0, 1]"
    return Answer("pass" if fine else "fail", largest, text)


@check("H2", "ball and box", "attack")
def balls_and_boxes(case: Subject) -> Answer:
    """What every attack left is inside its ball and the box."""
    worst, outside = 0.0, 0
    for attack in case.attacks:
        x_adv = case.outcome(attack).x_adv
        outside += int((~in_ball_and_box(attack.threat, x_adv, case.batch.x)).sum())
        worst = max(worst, float(attack.threat.size(x_adv - case.batch.x).max()))
    text = (
        f"{outside} of {len(case.attacks)} x {len(case.batch)} attacked images leave the ball or the box; the largest "
        f"{case.threat.norm} perturbation is {worst:.6g} of {case.threat.eps:.6g}"
    )
    return Answer("fail" if outside else "pass", worst, text)


@check("H3", "model unchanged", "after")
def unchanged(done: Finished) -> Answer:
    """The model is as it was before the attack."""
    return _same(*done.fingerprints)


@check("H3", "model unchanged", "model")
def unchanged_by_checks(case: Subject) -> Answer:
    """The model is as it was before the deep checks and their attacks; asked last."""
    return _same(case.fingerprint, fingerprint(case.model))


def _same(before: str, after: str) -> Answer:
    same = before == after
    text = (
        "weights, buffers and modes are as they were before the attack"
        if same
        else "the attack changed weights, buffers or modes of the model"
    )
    return Answer("pass" if same else "fail", None, text)


@check("H4", "batch of one", "model", "cheap")
@torch.no_grad()
def alone(case: Subject) -> Answer:
    """The prediction for an image does not depend on its neighbours (capacity, batch-priority routing and
    train-mode BatchNorm do): alone, in another order, among random images.
    """
    model, batch = case.model, case.whole
    n, together = len(batch), case.output.logits
    order = permutation(n, 4).to(batch.x.device)
    strangers = Noise.of(batch.index, 4).uniform(*batch.x.shape[1:]).to(batch.x)
    try:
        single = torch.cat([model.run(batch.x[i : i + 1]).logits for i in range(n)])
        moved = model.run(batch.x[order]).logits[torch.argsort(order)]
        mixed = model.run(torch.stack([strangers, batch.x], 1).flatten(0, 1)).logits[1::2]
    except Exception as error:  # such as BatchNorm in train mode: the model takes these images, but not one of them
        return Answer("fail", n, f"the model fails on an image alone ({type(error.__cause__ or error).__name__})")
    other = [(logits.argmax(1) != together.argmax(1)) for logits in (single, moved, mixed)]
    counts = [int(changed.sum()) for changed in other]
    apart = max(float(difference(together, logits).max()) for logits in (single, moved, mixed))
    apart = apart if bool(answers(single).all()) else float("nan")
    changed = int(torch.stack(other).any(0).sum())
    fine = not changed and apart <= 1e-3 * (float(largest(together)) + 1.0)  # False for NaN too
    text = (
        f"{counts[0]} of {n} predictions change when an image stands alone, {counts[1]} in another order, {counts[2]} "
        f"among random images; logits differ by at most {apart:.2g}"
    )
    return Answer("pass" if fine else "fail", changed, text)


@check("H5", "training log", "model")
def training_log(case: Subject) -> Answer:
    """The model's clean accuracy on the validation images is the one that training logged for these weights."""
    logged, images = case.run.get("logged"), case.run.get("val")
    if logged is None or images is None:
        return not_run("no training log is known for this model")
    if len(images) != logged["val_n"]:
        text = f"training logged its accuracy on {logged['val_n']} images, the validation set now has {len(images)}"
        return Answer("fail", len(images), text)
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), 128):
            batch = images.batch(list(range(start, min(start + 128, len(images))))).to(case.whole.x.device)
            right += int((case.model(batch.x).argmax(1) == batch.y).sum())
    now, then = 100 * right / len(images), 100 * logged["val_clean"]
    apart = abs(now - then)
    status = "pass" if apart <= ROUNDING_POINTS + 1e-9 else "warn" if apart <= LOG_POINTS else "fail"
    text = f"clean accuracy on {len(images)} validation images is {now:.2f} %, training logged {then:.2f} %"
    return Answer(status, apart, text)


@check("H6", "outputs", "model", "cheap")
@torch.no_grad()
def outputs(case: Subject) -> Answer:
    """The model gives one finite logits tensor, finite router logits, and logits rather than probabilities."""
    output, logits = case.output, case.output.logits
    broken = [name for name, routing in output.trace.items() if not torch.isfinite(routing.logits).all()]
    if not answers(logits).all() or broken:
        where = f"the logits of router {broken[0]!r}" if broken else "the logits"
        return Answer("fail", None, f"{where} are not finite: every attack on this model is blind")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return Answer("warn", None, "the outputs look like probabilities; attacks expect logits")
    masked = int((logits == -torch.inf).any(0).sum())
    text = f"{masked} of {logits.shape[1]} classes are masked (-inf), never chosen; the others" if masked else "logits"
    return Answer("pass", float(largest(logits)), f"{text} and router logits are finite, one tensor (n, c)")


@check("H7", "determinism", "model", "cheap")
@torch.no_grad()
def determinism(case: Subject, passes: int = PASSES) -> Answer:
    """The model gives the same logits in several passes."""
    model, batch = case.model, case.whole
    first = case.output.logits
    apart = max(float(difference(model.run(batch.x).logits, first).max()) for _ in range(passes - 1))
    fine = apart <= 1e-4 * float(largest(first))  # False for NaN too
    text = f"{passes} passes differ by at most {apart:.2g} in the logits"
    text += "" if fine else "; a random model needs attacks over its randomness"
    return Answer("pass" if fine else "fail", apart, text)


@check("H8", "autograd inside forward", "model", "cheap")
def dynamic(case: Subject) -> Answer:
    """The forward pass takes no gradient of its own (a defence that does answers an attack's query differently from
    the image it protects). Two passes: calls of `torch.autograd` are counted, then saved tensors that are unpacked
    before the pass is over, which a backward pass bound under any name does.
    """
    model, x = case.model, case.whole.x[:2].detach().requires_grad_(True)
    with torch.enable_grad(), _counted() as calls:
        model.run(x)
    if not calls:
        unpacked: list[None] = []

        def unpack(value: Tensor) -> Tensor:
            unpacked.append(None)
            return value

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
            model.run(x)
        calls = ["a backward pass"] * bool(unpacked)
    if not calls:
        return Answer("pass", 0, "0 gradients are taken inside the forward pass")
    text = f"the forward pass takes {len(calls)} gradient(s) of its own ({calls[0]}): a dynamic defence"
    return Answer("fail", len(calls), f"{text}, which needs attacks made for it")


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    """Names of the functions of `torch.autograd` that are called inside."""
    calls: list[str] = []
    names = ("grad", "backward")
    real = {name: getattr(torch.autograd, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(f"torch.autograd.{name}")
            return real[name](*args, **more)

        return call

    for name in names:
        setattr(torch.autograd, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(torch.autograd, name, real[name])


@check("H9", "noise of the image", "attack")
def belongs(case: Subject, images: int = 16) -> Answer:
    """The attack's draws belong to the image: in another order and in two halves it leaves the same images. A sign
    of a gradient within rounding of zero may flip, so that 1 % of an image's values may differ.
    """
    attack = case.main
    costly = attack.queries(case.clean) > 2000
    part = few(case, 4 if costly else images)
    n, x, y = len(part.batch), part.batch.x, part.batch.y
    if n < 2:
        return not_run(f"it needs 2 images that the model gets right, there are {n}")
    noise = part.noise(attack.seed)
    whole = part.outcome(attack)
    order = permutation(n, 9).to(x.device)
    back = torch.argsort(order)
    moved = attack(case.model, x[order], y[order], noise[order])[back]
    halves = [attack(case.model, x[rows], y[rows], noise[rows]) for rows in torch.arange(n, device=x.device).chunk(2)]
    differ = torch.zeros(n, dtype=torch.bool, device=x.device)
    share = 0.0
    for again in (moved, torch.cat(halves)):
        differ |= part.wrong(again) != part.wrong(whole.x_adv)
        share = max(share, float(((again - whole.x_adv).abs() > 1e-5).float().mean()))
    count = int(differ.sum())
    status = "fail" if count else "warn" if share > 0.01 else "pass"
    text = f"{count} of {n} answers change when the batch is split or in another order, {percent(share)} of the pixels"
    return Answer(status, count, text)


@check("H10", "precision", "attack")
def precision(case: Subject) -> Answer:
    """In float64 the model confirms what float32 calls broken, and the attack on a bfloat16 copy, confirmed in
    float32, breaks as many. The first decides (no more than 0.1 point of the images); the second warns, for those who
    attack in half precision, and is left out on a device without products of bf16, where nobody does.
    """
    n, attack = len(case.batch), case.climber
    exact = case.outcome(attack)
    wide = doubled(case.model, case.batch.x)
    apart, said = 0, "float64 could not be asked"
    if wide is not None:
        with torch.no_grad():
            sure = wide.run(exact.x_adv.double()).logits.argmax(1) != case.batch.y
        apart = int((sure != case.wrong(exact.x_adv)).sum())
        said = f"float64 disagrees with float32 on {apart} of {n} attacked images"
    status = graded(apart, n, 0.1)
    if not compat.multiplies(case.batch.x.device, torch.bfloat16):
        return Answer(
            status, {"float64": apart}, f"{said}; this {case.batch.x.device.type} has no products of bfloat16"
        )
    fast = case.outcome(attack, Surrogate(LowPrecision(case.model), case.model, close=True))
    with torch.no_grad():
        claimed = LowPrecision(case.model).run(fast.x_adv).logits.argmax(1) != case.batch.y
    unconfirmed = int((claimed & ~fast.broken).sum())
    fewer = int(exact.broken.sum()) - int(fast.broken.sum())
    if status == "pass" and graded(fewer, n, 0.1) == "fail":
        status = "warn"
    text = (
        f"{said}; climbing a bfloat16 copy breaks {int(fast.broken.sum())} images against {int(exact.broken.sum())}, "
        f"and {unconfirmed} of its successes are not confirmed"
    )
    return Answer(status, {"float64": apart, "fewer": fewer, "unconfirmed": unconfirmed}, text)
