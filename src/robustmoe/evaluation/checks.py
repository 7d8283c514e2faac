"""Can this number be believed? Each check gives pass, warn, fail or not run, a value, and a sentence (ids as in
docs/checks.md).

Before the attack: H1 input, H4 one image at a time, H6 outputs, H7 determinism, G1 does the attack have a gradient, R1
does it see the router.
After it: H2 ball and box, H3 the model is as it was. A failed check marks the number in every table.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe import analysis
from robustmoe.attacks import Attack, ExpertsOnly, RouterOnly, evaluating
from robustmoe.data import Batch
from robustmoe.models.base import RoutedModel
from robustmoe.noise import Noise
from robustmoe.records import Check, Row
from robustmoe.routing import Trace, detach

ROUNDING, FAINT = 1e-6, 1e-2
"""Check R1: a share of the gradient below the first is the noise of two float32 passes; one below the second hardly
aims at the router (a saturated gate)."""

ZERO_SHARE = 0.05
"""Check G1: a larger share of images without gradient fails."""


def before(model: RoutedModel, attack: Attack, batch: Batch) -> list[Check]:
    """The checks that ask the model itself, on one small batch (n, ch, h, w)."""
    with torch.no_grad():
        found = [input_range(batch), outputs(model, batch), determinism(model, batch), alone(model, batch)]
    return [*found, gradients(model, attack, batch), router_in_sight(model, attack, batch)]


def input_range(batch: Batch) -> Check:
    """H1."""
    low, high = float(batch.x.min()), float(batch.x.max())
    fine = low >= 0 and high <= 1 and batch.x.dtype == torch.float32
    return Check(
        "H1",
        "input range",
        "pass" if fine else "fail",
        [low, high],
        f"images are {batch.x.dtype} in [{low:.3g}, {high:.3g}]" + ("" if fine else "; expected float32 in [0, 1]"),
    )


def outputs(model: RoutedModel, batch: Batch) -> Check:
    """H6: one finite logits tensor, finite router logits, and logits rather than probabilities."""
    output = model.run(batch.x)
    logits = output.logits
    if logits.ndim != 2 or len(logits) != len(batch):
        return Check(
            "H6",
            "outputs",
            "fail",
            list(logits.shape),
            f"the model gives a tensor of shape {tuple(logits.shape)}, expected (n, c)",
        )
    broken = [name for name, routing in output.trace.items() if not torch.isfinite(routing.logits).all()]
    if not torch.isfinite(logits).all() or broken:
        where = f"the logits of router {broken[0]!r}" if broken else "the logits"
        return Check("H6", "outputs", "fail", None, f"{where} are not finite: every attack on this model is blind")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return Check("H6", "outputs", "warn", None, "the outputs look like probabilities; attacks expect logits")
    return Check(
        "H6", "outputs", "pass", float(logits.abs().max()), "logits and router logits are finite, one tensor (n, c)"
    )


def determinism(model: RoutedModel, batch: Batch, passes: int = 3) -> Check:
    """H7."""
    first = model.run(batch.x).logits
    apart = max(float((model.run(batch.x).logits - first).abs().max()) for _ in range(passes - 1))
    fine = apart <= 1e-4 * float(first.abs().max())  # False for NaN too
    text = f"{passes} passes differ by at most {apart:.2g} in the logits"
    return Check(
        "H7",
        "determinism",
        "pass" if fine else "fail",
        apart,
        text + ("" if fine else "; a random model needs attacks over its randomness"),
    )


def alone(model: RoutedModel, batch: Batch) -> Check:
    """H4: the prediction for an image does not depend on its neighbours (capacity, batch-priority routing and
    train-mode BatchNorm do).
    """
    together = model.run(batch.x).logits
    try:
        single = torch.cat([model.run(batch.x[i : i + 1]).logits for i in range(len(batch))])
    except Exception as error:  # such as BatchNorm in train mode: the model takes these images, but not one of them
        said = f"the model fails on an image alone ({type(error).__name__})"
        return Check("H4", "batch of one", "fail", len(batch), said)
    changed = int((together.argmax(1) != single.argmax(1)).sum())
    apart = float((together - single).abs().max())
    fine = not changed and apart <= 1e-3 * (float(together.abs().max()) + 1.0)  # False for NaN too
    return Check(
        "H4",
        "batch of one",
        "pass" if fine else "fail",
        changed,
        f"{changed} of {len(batch)} predictions change when an image stands alone; logits differ by at most "
        f"{apart:.2g}",
    )


def gradients(model: RoutedModel, attack: Attack, batch: Batch) -> Check:
    """G1: the share of images at which the attack's own loss has no gradient, at its random start (a KL is flat at the
    clean image). Such an image is not attacked, and reads as robust (Athalye et al. 2018).
    """
    with evaluating(model):
        inner = attack.objective(model, batch.x, batch.y)
        start = attack.threat.start(batch.x, Noise.of(batch.index, attack.seed))
        flat = _gradient(lambda x: inner(x).loss, start).flatten(1).abs().sum(1) == 0
    share = float(flat.float().mean())
    status = "pass" if share == 0 else "warn" if share <= ZERO_SHARE else "fail"
    text = f"the attack's loss has no gradient at {100 * share:.3g} % of {len(batch)} images"
    return Check("G1", "gradient", status, share, text)


def router_in_sight(model: RoutedModel, attack: Attack, batch: Batch) -> Check:
    """R1: the share of the loss's image gradient that goes through the routers (whole gradient against the one with
    the route held). For an attack on the routers alone: the share of images at which its own loss has a gradient.
    """
    with torch.no_grad():
        trace = detach(model.run(batch.x).trace)
    if not trace:
        return _r1("not run", None, "the model has no router")
    if isinstance(attack.objective, ExpertsOnly):
        return _r1("not run", None, "this attack holds the route by design; it says nothing of the router")
    with evaluating(model):
        if isinstance(attack.objective, RouterOnly):
            share = 1.0 - float(gradients(model, attack, batch).value)
            text = f"the routers' own logits move with {100 * share:.3g} % of the images"
            return _r1("pass" if share > 0.5 else "warn" if share > 0 else "fail", share, text)
        whole, held = (_gradient(_loss(model, batch.y, forced), batch.x) for forced in (None, trace))
    share = float((whole - held).norm() / whole.norm().clamp(min=1e-30))
    if not share > ROUNDING:
        blind = "no gradient reaches the image through the router, so this attack cannot aim at the route"
        return _r1("fail", share, f"routing unattacked: {blind}")
    status = "pass" if share >= FAINT else "warn"
    return _r1(status, share, f"{100 * share:.2g} % of the gradient's norm goes through the router")


def _r1(status: str, value: float | None, sentence: str) -> Check:
    return Check("R1", "router attacked", status, value, sentence)


def _loss(model: RoutedModel, y: Tensor, forced: Trace | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(model.run(x, forced=forced).logits, y, reduction="none")


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of the summed loss at x; zero where no path leads from the image to the loss."""
    x = x.detach().requires_grad_(True)
    value = loss(x).sum()
    found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(x) if found is None else found


def ball_and_box(rows: Sequence[Row], norm: str, eps: float) -> Check:
    """H2: every perturbation, measured anew, is inside the ball and the image inside the box."""
    largest = analysis.largest(row.size[norm] for row in rows)
    outside = analysis.largest(row.size["box"] for row in rows)
    fine = analysis.inside(largest, eps) and outside <= 0  # False for NaN too
    text = f"largest {norm} perturbation {largest:.6g} of {eps:.6g}, {outside:.2g} outside [0, 1]"
    return Check("H2", "ball and box", "pass" if fine else "fail", largest, text)


def unchanged(fingerprint_before: str, fingerprint_after: str) -> Check:
    """H3."""
    same = fingerprint_before == fingerprint_after
    return Check(
        "H3",
        "model unchanged",
        "pass" if same else "fail",
        None,
        "weights, buffers and modes are as they were before the attack"
        if same
        else "the attack changed weights, buffers or modes of the model",
    )


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
