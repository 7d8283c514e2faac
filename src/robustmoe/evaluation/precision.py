"""A cheaper copy of a model for an attack to climb: frozen, BatchNorm folded, channels-last, the network in bf16 if
asked. The model itself says what is broken (see `Surrogate`), so a copy can cost an attack strength, never correctness.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe import compat
from robustmoe.attacks.base import evaluating
from robustmoe.attacks.folding import (
    PROBE,
    STRICT_DEVIATION,
    Probed,
    answers_of,
    copy_of,
    deviation,
    fold_norms,
    reason_of,
)
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.models.base import Output, RoutedModel
from robustmoe.models.plain import Plain
from robustmoe.models.pruned import PrunedConv

Precision = Literal["strict", "fast"]

FAST_DEVIATION = 0.05
"""The same for the median image of a bf16 copy: bf16 keeps 8 bits (a relative 0.004 a rounding)."""


class Frozen(Surrogate):
    """The `Surrogate` that `frozen_copy` makes. ``folded``: BatchNorms that are now part of the convolution before
    them; ``note``: what was done and what was not possible, one line.
    """

    def __init__(
        self,
        climbed: RoutedModel,
        exact: RoutedModel,
        close: bool,
        on_pass: Callable[[int, bool], None] | None,
        folded: int,
        note: str,
    ) -> None:
        super().__init__(climbed, exact, close, on_pass)
        self.folded = folded
        self.note = note


def in_float32(model: RoutedModel) -> RoutedModel:
    """The model itself, or a copy where weights are in half precision."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return copy.deepcopy(model).float() if half else model


def frozen_copy(
    model: RoutedModel,
    x: Float[Tensor, "n ch h w"],
    precision: Precision = "strict",
    on_pass: Callable[[int, bool], None] | None = None,
    output: Output | None = None,
) -> Frozen:
    """A frozen eval-mode copy of the model, to be climbed; the model judges. Later changes of the model do not reach
    the copy.

    ``x``: a few images on which the copy is compared with the model (at most 32 are used). "strict": the model's own
    precision, parameters without gradient, BatchNorms folded where a convolution feeds nothing else. "fast": besides,
    the network in bf16 under autocast; images, their gradient, logits and the attack's steps stay float32. What
    cannot be copied, folded or halved is used as it is, and ``note`` says why. ``on_pass``: see `Surrogate`. Of a
    `Surrogate`, what it climbs is copied. ``output``: what the model answered to ``x``, where it was asked already.
    """
    if precision not in ("strict", "fast"):
        raise ValueError(f"precision must be 'strict' or 'fast'; got {precision!r}")
    if len(x) == 0:
        raise ValueError("the copy is compared with the model on a probe batch; give at least one image, got none")
    source = model.climbed if isinstance(model, Surrogate) else model
    with evaluating(source), torch.no_grad():
        known = output if source is model and len(x) <= PROBE else None
        answers, limit = answers_of(source, x[:PROBE].detach(), known)
        made = _strict(source, answers)
        if precision == "fast":
            made = _fast(made, made.model is not source, answers)
    close = model.close if isinstance(model, Surrogate) else True
    return Frozen(made.model, model, close, on_pass, made.folded, made.note + limit)


class _Made(NamedTuple):
    model: RoutedModel
    folded: int
    note: str


# ------------------------------------------------------------------------------------------------ strict


def _strict(source: RoutedModel, answers: list[Probed]) -> _Made:
    """A copy that gives the model's logits on the probe: folded, else unfolded, else the model itself."""
    if isinstance(source, Plain) and not isinstance(source.function, nn.Module):
        return _Made(source, 0, "used as it is: a plain function cannot be copied")
    try:
        plain = copy_of(source)
        off = deviation(plain, answers).max().item()
    except Exception as error:  # a user's module may raise anything here; all mean the same
        return _Made(source, 0, f"used as it is: it cannot be copied ({reason_of(error)})")
    if not off <= STRICT_DEVIATION:
        return _Made(source, 0, f"used as it is: a copy differs from it by {off:.1g}")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    if not norms:
        return _Made(plain, 0, "a frozen copy, 0 of 0 BatchNorms folded")
    try:
        folded = copy.deepcopy(plain)
        count = len(fold_norms(folded, answers))
        off = deviation(folded, answers).max().item()
    except Exception as error:
        return _Made(plain, 0, f"a frozen copy, not folded ({reason_of(error)})")
    if not off <= STRICT_DEVIATION:
        return _Made(plain, 0, f"a frozen copy, not folded (folding would change it by {off:.1g})")
    return _Made(folded, count, f"a frozen copy, {count} of {norms} BatchNorms folded")


# ------------------------------------------------------------------------------------------------ fast


def _fast(strict: _Made, owned: bool, answers: list[Probed]) -> _Made:
    """bf16 weights under autocast; where these do not work, autocast alone; where neither does, or the device has no
    products of bf16, the strict copy.
    """
    ways: list[tuple[str, Callable[[], RoutedModel]]] = [("autocast to bf16", lambda: _float32(strict.model, owned))]
    if owned:
        ways.insert(0, ("bf16 weights", lambda: _bf16(strict.model)))
    failed, device = "", answers[0].x.device
    if not compat.multiplies(device, torch.bfloat16):
        ways, failed = [], f"; not bf16 (this {device.type} has no products of bf16, and would take longer)"
    for way, build in ways:
        try:
            half = LowPrecision(build())
            off = deviation(half, answers).median().item()
        except Exception as error:  # a user's module may raise anything here; all mean the same
            failed += f"; not {way} ({reason_of(error)})"
            continue
        if off <= FAST_DEVIATION:
            return _Made(half, strict.folded, f"{strict.note}; {way}{failed}")
        failed += f"; not {way} (the logits would be off by {off:.1g})"
    return _Made(strict.model, strict.folded, strict.note + failed)


def _float32(model: RoutedModel, owned: bool) -> RoutedModel:
    """Autocast leaves float64 alone; an owned copy is narrowed first."""
    return copy.deepcopy(model).float() if owned else model


def _bf16(model: RoutedModel) -> RoutedModel:
    """A copy whose convolutions and linear layers hold bf16 weights: cast once, not in every pass. Pruning scores stay:
    rounded, they could keep other filters.
    """
    made = _float32(model, True)
    for module in made.modules():
        if isinstance(module, PrunedConv):
            module.weight.data = module.weight.data.to(torch.bfloat16)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return made


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, float32 products on CUDA are of float32: TF32, which convolutions take by default, keeps 10 bits of their
    24, and an image's verdict would depend on the batch that it stands in. What is set is put back.
    """
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before):
            place.allow_tf32 = value
