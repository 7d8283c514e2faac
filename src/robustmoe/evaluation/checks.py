"""Can this number be believed? Each check gives pass, warn, fail or not run, a value, and a sentence (ids as in docs/checks.md).

Before the attack: H1 input, H4 one image at a time, H6 outputs, H7 determinism, R1 does the attack see the router. After it: H2 ball and box,
H3 the model is as it was. A failed check marks the number in every table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustmoe.attacks import Attack, ExpertsOnly, RouterOnly, evaluating
from robustmoe.data import Batch
from robustmoe.models.base import RoutedModel
from robustmoe.records import Check, Row
from robustmoe.routing import detach

TOLERANCE = 1e-5
"""Relative slack of a perturbation's norm: the rounding of float32."""


def before(model: RoutedModel, attack: Attack, batch: Batch) -> list[Check]:
    """The checks that ask the model itself, on one small batch (n, ch, h, w)."""
    with torch.no_grad():
        return [input_range(batch), outputs(model, batch), determinism(model, batch), alone(model, batch)] + [
            router_in_sight(model, attack, batch)
        ]


def input_range(batch: Batch) -> Check:
    """H1."""
    low, high = float(batch.x.min()), float(batch.x.max())
    fine = 0 <= low and high <= 1 and batch.x.dtype == torch.float32
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
        return Check("H6", "outputs", "fail", list(logits.shape), f"the model gives a tensor of shape {tuple(logits.shape)}, expected (n, c)")
    broken = [name for name, routing in output.trace.items() if not torch.isfinite(routing.logits).all()]
    if not torch.isfinite(logits).all() or broken:
        where = f"the logits of router {broken[0]!r}" if broken else "the logits"
        return Check("H6", "outputs", "fail", None, f"{where} are not finite: every attack on this model is blind")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return Check("H6", "outputs", "warn", None, "the outputs look like probabilities; attacks expect logits")
    return Check("H6", "outputs", "pass", float(logits.abs().max()), "logits and router logits are finite, one tensor (n, c)")


def determinism(model: RoutedModel, batch: Batch, passes: int = 3) -> Check:
    """H7."""
    first = model.run(batch.x).logits
    apart = max(float((model.run(batch.x).logits - first).abs().max()) for _ in range(passes - 1))
    fine = apart <= 1e-4
    text = f"{passes} passes differ by at most {apart:.2g} in the logits"
    return Check("H7", "determinism", "pass" if fine else "fail", apart, text + ("" if fine else "; a random model needs attacks over its randomness"))


def alone(model: RoutedModel, batch: Batch) -> Check:
    """H4: the prediction for an image does not depend on its neighbours (capacity, batch-priority routing and train-mode BatchNorm do)."""
    together = model.run(batch.x).logits
    single = torch.cat([model.run(batch.x[i : i + 1]).logits for i in range(len(batch))])
    changed = int((together.argmax(1) != single.argmax(1)).sum())
    apart = float((together - single).abs().max())
    scale = float(together.abs().max()) + 1.0
    status = "fail" if changed or apart > 1e-3 * scale else "pass"
    return Check(
        "H4",
        "batch of one",
        status,
        changed,
        f"{changed} of {len(batch)} predictions change when an image stands alone; logits differ by at most {apart:.2g}",
    )


def router_in_sight(model: RoutedModel, attack: Attack, batch: Batch) -> Check:
    """R1: the share of the loss's image gradient that goes through the routers (whole gradient against the one with the route held)."""
    with torch.no_grad():
        trace = detach(model.run(batch.x).trace)
    name = "router attacked"
    if not trace:
        return Check("R1", name, "not run", None, "the model has no router")
    if isinstance(attack.objective, ExpertsOnly):
        return Check("R1", name, "not run", None, "this attack holds the route by design; it says nothing of the router")
    if isinstance(attack.objective, RouterOnly):
        return Check("R1", name, "pass", 1.0, "this attack climbs the routers' own logits")
    with evaluating(model):
        whole = _gradient(model, batch, None)
        held = _gradient(model, batch, trace)
    share = float((whole - held).norm() / whole.norm().clamp(min=1e-30))
    if share == 0:
        return Check("R1", name, "fail", 0.0, "routing unattacked: no gradient reaches the image through the router, so this attack cannot aim at the route")
    return Check("R1", name, "pass", share, f"{100 * share:.2g} % of the gradient's norm goes through the router")


def _gradient(model: RoutedModel, batch: Batch, forced: dict | None) -> Tensor:
    x = batch.x.detach().requires_grad_(True)
    loss = F.cross_entropy(model.run(x, forced=forced).logits, batch.y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def ball_and_box(rows: Sequence[Row], norm: str, eps: float) -> Check:
    """H2: every perturbation, measured anew, is inside the ball and the image inside the box."""
    largest = max(row.size[norm] for row in rows)
    outside = max(row.size["box"] for row in rows)
    fine = largest <= eps * (1 + TOLERANCE) + 1e-7 and outside <= 0  # False for NaN too
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
        "weights, buffers and modes are as they were before the attack" if same else "the attack changed weights, buffers or modes of the model",
    )


def weights_hash(model: nn.Module) -> str:
    """sha256 over every parameter and buffer: the model's identity in a result."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Weights, buffers and modes of every submodule."""
    modes = "".join("t" if module.training else "e" for module in model.modules())
    grads = "".join("g" if parameter.grad is not None else "-" for parameter in model.parameters())
    return f"{weights_hash(model)}/{hashlib.sha256((modes + grads).encode()).hexdigest()}"
