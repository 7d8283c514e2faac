"""H1 to H10: is what was measured what was meant? The images, the model, the neighbours, the numbers' precision."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe import analysis
from robustmoe.attacks import Surrogate
from robustmoe.data import Batch
from robustmoe.evaluation.checks.subject import Subject, check, doubled, few, graded, not_run, percent
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise, permutation
from robustmoe.records import Check, Row
from robustmoe.routing import Tape

PASSES = 5
LOG_POINTS, ROUNDING_POINTS = 1.0, 0.1
"""H5: training may have validated in half precision; a difference above the second warns, above the first fails."""


def input_range(batch: Batch, classes: int | None = None) -> Check:
    """H1: images in float32 in [0, 1], labels that the model has an output for."""
    low, high = float(batch.x.min()), float(batch.x.max())
    fine = low >= 0 and high <= 1 and batch.x.dtype == torch.float32
    text = f"images are {batch.x.dtype} in [{low:.3g}, {high:.3g}]" + ("" if fine else "; expected float32 in [0, 1]")
    first, last = int(batch.y.min()), int(batch.y.max())
    if classes is not None and not 0 <= first <= last < classes:
        fine, text = False, f"{text}; labels go from {first} to {last}, the model has {classes} classes"
    return check("H1", "pass" if fine else "fail", [low, high], text)


def ball_and_box(rows: Sequence[Row], norm: str, eps: float) -> Check:
    """H2: every perturbation, measured anew, is inside the ball and the image inside the box."""
    largest = analysis.largest(row.size[norm] for row in rows)
    outside = analysis.largest(row.size["box"] for row in rows)
    fine = analysis.inside(largest, eps) and outside <= 0  # False for NaN too
    text = f"largest {norm} perturbation {largest:.6g} of {eps:.6g}, {outside:.2g} outside [0, 1]"
    return check("H2", "pass" if fine else "fail", largest, text)


def unchanged(fingerprint_before: str, fingerprint_after: str) -> Check:
    """H3."""
    same = fingerprint_before == fingerprint_after
    text = (
        "weights, buffers and modes are as they were before the attack"
        if same
        else "the attack changed weights, buffers or modes of the model"
    )
    return check("H3", "pass" if same else "fail", None, text)


@torch.no_grad()
def alone(model: RoutedModel, batch: Batch) -> Check:
    """H4: the prediction for an image does not depend on its neighbours (capacity, batch-priority routing and
    train-mode BatchNorm do): alone, in another order, among random images.
    """
    n, together = len(batch), model.run(batch.x).logits
    order = permutation(n, 4).to(batch.x.device)
    strangers = Noise.of(batch.index, 4).uniform(*batch.x.shape[1:]).to(batch.x)
    try:
        single = torch.cat([model.run(batch.x[i : i + 1]).logits for i in range(n)])
        moved = model.run(batch.x[order]).logits[torch.argsort(order)]
        mixed = model.run(torch.stack([strangers, batch.x], 1).flatten(0, 1)).logits[1::2]
    except Exception as error:  # such as BatchNorm in train mode: the model takes these images, but not one of them
        return check("H4", "fail", n, f"the model fails on an image alone ({type(error).__name__})")
    other = [(logits.argmax(1) != together.argmax(1)) for logits in (single, moved, mixed)]
    counts = [int(changed.sum()) for changed in other]
    apart = max(float((together - logits).abs().max()) for logits in (single, moved, mixed))
    apart = apart if bool(torch.isfinite(single).all()) else float("nan")
    changed = int(torch.stack(other).any(0).sum())
    fine = not changed and apart <= 1e-3 * (float(together.abs().max()) + 1.0)  # False for NaN too
    text = (
        f"{counts[0]} of {n} predictions change when an image stands alone, {counts[1]} in another order, {counts[2]} "
        f"among random images; logits differ by at most {apart:.2g}"
    )
    return check("H4", "pass" if fine else "fail", changed, text)


def training_log(case: Subject) -> Check:
    """H5: the model's clean accuracy on the validation images is the one that training logged for these weights."""
    logged, images = case.run.get("logged"), case.run.get("val")
    if logged is None or images is None:
        return not_run("H5", "no training log is known for this model")
    if len(images) != logged["val_n"]:
        text = f"training logged its accuracy on {logged['val_n']} images, the validation set now has {len(images)}"
        return check("H5", "fail", len(images), text)
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), 128):
            batch = images.batch(list(range(start, min(start + 128, len(images))))).to(case.whole.x.device)
            right += int((case.model(batch.x).argmax(1) == batch.y).sum())
    now, then = 100 * right / len(images), 100 * logged["val_clean"]
    apart = abs(now - then)
    status = "pass" if apart <= ROUNDING_POINTS + 1e-9 else "warn" if apart <= LOG_POINTS else "fail"
    text = f"clean accuracy on {len(images)} validation images is {now:.2f} %, training logged {then:.2f} %"
    return check("H5", status, apart, text)


@torch.no_grad()
def outputs(model: RoutedModel, batch: Batch) -> Check:
    """H6: one finite logits tensor, finite router logits, and logits rather than probabilities."""
    output = model.run(batch.x)
    logits = output.logits
    if logits.ndim != 2 or len(logits) != len(batch):
        text = f"the model gives a tensor of shape {tuple(logits.shape)}, expected (n, c)"
        return check("H6", "fail", list(logits.shape), text)
    broken = [name for name, routing in output.trace.items() if not torch.isfinite(routing.logits).all()]
    if not torch.isfinite(logits).all() or broken:
        where = f"the logits of router {broken[0]!r}" if broken else "the logits"
        return check("H6", "fail", None, f"{where} are not finite: every attack on this model is blind")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return check("H6", "warn", None, "the outputs look like probabilities; attacks expect logits")
    return check("H6", "pass", float(logits.abs().max()), "logits and router logits are finite, one tensor (n, c)")


@torch.no_grad()
def determinism(model: RoutedModel, batch: Batch, passes: int = PASSES) -> Check:
    """H7."""
    first = model.run(batch.x).logits
    apart = max(float((model.run(batch.x).logits - first).abs().max()) for _ in range(passes - 1))
    fine = apart <= 1e-4 * float(first.abs().max())  # False for NaN too
    text = f"{passes} passes differ by at most {apart:.2g} in the logits"
    text += "" if fine else "; a random model needs attacks over its randomness"
    return check("H7", "pass" if fine else "fail", apart, text)


def dynamic(model: RoutedModel, batch: Batch) -> Check:
    """H8: the forward pass takes no gradient of its own (a defence that does answers an attack's query differently from
    the image it protects). Two passes: calls of `torch.autograd` are counted, then saved tensors that are unpacked
    before the pass is over, which a backward pass bound under any name does.
    """
    x = batch.x[:2].detach().requires_grad_(True)
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
        return check("H8", "pass", 0, "0 gradients are taken inside the forward pass")
    text = f"the forward pass takes {len(calls)} gradient(s) of its own ({calls[0]}): a dynamic defence"
    return check("H8", "fail", len(calls), f"{text}, which needs attacks made for it")


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


def belongs(case: Subject, images: int = 16) -> Check:
    """H9: the attack's draws belong to the image: in another order and in two halves it leaves the same images. A sign
    of a gradient within rounding of zero may flip, so that 1 % of an image's values may differ.
    """
    attack = case.main
    costly = attack.queries(case.clean) > 2000
    part = few(case, 4 if costly else images)
    n, x, y = len(part.batch), part.batch.x, part.batch.y
    if n < 2:
        return not_run("H9", f"it needs 2 images that the model gets right, there are {n}")
    noise = part.noise(attack.seed)
    whole = part.under(attack)
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
    return check("H9", status, count, text)


class Half(RoutedModel):
    """``inner`` under bfloat16 autocast."""

    def __init__(self, inner: RoutedModel) -> None:
        super().__init__()
        self.inner = inner

    def body(self, x: Tensor, tape: Tape) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.inner.body(x, tape)


def precision(case: Subject) -> Check:
    """H10: float64 confirms what float32 calls broken, and the attack on a bfloat16 copy, confirmed in float32, breaks
    as many. The first decides (no more than 0.1 point of the images); the second warns, for those who attack in half
    precision.
    """
    n, attack = len(case.batch), case.climber
    exact = case.under(attack)
    fast = case.under(attack, Surrogate(Half(case.model), case.model, close=True))
    with torch.no_grad():
        claimed = Half(case.model).run(fast.x_adv).logits.argmax(1) != case.batch.y
    unconfirmed = int((claimed & ~fast.broken).sum())
    fewer = int(exact.broken.sum()) - int(fast.broken.sum())
    wide = doubled(case.model, case.batch.x)
    apart, said = 0, "float64 could not be asked"
    if wide is not None:
        with torch.no_grad():
            sure = wide.run(exact.x_adv.double()).logits.argmax(1) != case.batch.y
        apart = int((sure != case.wrong(exact.x_adv)).sum())
        said = f"float64 disagrees with float32 on {apart} of {n} attacked images"
    status = graded(apart, n, 0.1)
    if status == "pass" and graded(fewer, n, 0.1) == "fail":
        status = "warn"
    text = (
        f"{said}; climbing a bfloat16 copy breaks {int(fast.broken.sum())} images against {int(exact.broken.sum())}, "
        f"and {unconfirmed} of its successes are not confirmed"
    )
    return check("H10", status, {"float64": apart, "fewer": fewer, "unconfirmed": unconfirmed}, text)


def weights_hash(model: nn.Module) -> str:
    """sha256 over every parameter and buffer: the model's identity in a result."""
    digest = hashlib.sha256()
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: nn.Module, logits: Tensor) -> str:
    """`weights_hash`; for a plain function, which has no weights that we could see, a hash of its ``logits`` on some
    images.
    """
    if next(itertools.chain(model.parameters(), model.buffers()), None) is not None:
        return weights_hash(model)
    return hashlib.sha256(logits.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Weights, buffers, modes of every submodule, and which parameters have or want a gradient."""
    modes = "".join("t" if module.training else "e" for module in model.modules())
    grads = "".join(f"{int(p.grad is not None)}{int(p.requires_grad)}" for p in model.parameters())
    return f"{weights_hash(model)}/{hashlib.sha256((modes + grads).encode()).hexdigest()}"
