"""A cheaper copy of a model for an attack to climb: frozen, BatchNorm folded, channels-last, the network in bf16 if
asked. The model itself says what is broken (see `Surrogate`), so a copy can cost an attack strength, never correctness.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe import compat
from robustmoe.attacks.base import evaluating
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.models.base import Output, RoutedModel, to_channels_last
from robustmoe.models.block import replace
from robustmoe.models.convolution import Handed, folded
from robustmoe.models.norm import Foldable, difference, largest
from robustmoe.models.plain import Plain
from robustmoe.models.pruned import PrunedConv
from robustmoe.routing import Tape, Trace, detach, to_expert

Precision = Literal["strict", "fast"]

STRICT_DEVIATION = 1e-4
"""How far any logit (also a router's) of a strict copy may be off on the probe, relative to the batch's largest."""

FAST_DEVIATION = 0.05
"""The same for the median image of a bf16 copy: bf16 keeps 8 bits (a relative 0.004 a rounding)."""

PROBE, FEW = 32, 4
"""Images of the probe batch that are used at most: on the model's own routes, and on each expert alone."""


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
        answers, limit = _answers(source, x[:PROBE].detach(), known)
        made = _strict(source, answers)
        if precision == "fast":
            made = _fast(made, made.model is not source, answers)
    close = model.close if isinstance(model, Surrogate) else True
    return Frozen(made.model, model, close, on_pass, made.folded, made.note + limit)


class _Made(NamedTuple):
    model: RoutedModel
    folded: int
    note: str


class _Answer(NamedTuple):
    """What the model says of the images ``x`` on the routes ``forced`` ({}: its own)."""

    x: Tensor
    forced: Trace
    output: Output


def _answers(source: RoutedModel, probe: Tensor, known: Output | None) -> tuple[list[_Answer], str]:
    """The model's own pass on the probe, and of a few of its images one forced to each expert in turn (at the routers
    that have it), so that none is left out; and a note where a model does not take these.
    """
    free = source.run(probe) if known is None else known
    answers = [_Answer(probe, {}, free)]
    few: Trace = {name: routing.detach()[:FEW] for name, routing in free.trace.items()}
    for expert in range(max((routing.num_experts for routing in few.values()), default=0)):
        forced = to_expert({name: r for name, r in few.items() if expert < r.num_experts}, expert)
        try:
            answers.append(_Answer(probe[:FEW], forced, source.run(probe[:FEW], forced=forced)))
        except Exception as error:  # a user's model may ask more of a route than the tape does
            return answers, f"; the experts not seen one by one ({_reason(error)})"
    return answers, ""


# ------------------------------------------------------------------------------------------------ strict


def _strict(source: RoutedModel, answers: list[_Answer]) -> _Made:
    """A copy that gives the model's logits on the probe: folded, else unfolded, else the model itself."""
    if isinstance(source, Plain) and not isinstance(source.function, nn.Module):
        return _Made(source, 0, "used as it is: a plain function cannot be copied")
    try:
        plain = _copy(source)
        off = _deviation(plain, answers).max().item()
    except Exception as error:  # a user's module may raise anything here; all mean the same
        return _Made(source, 0, f"used as it is: it cannot be copied ({_reason(error)})")
    if not off <= STRICT_DEVIATION:
        return _Made(source, 0, f"used as it is: a copy differs from it by {off:.1g}")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    if not norms:
        return _Made(plain, 0, "a frozen copy, 0 of 0 BatchNorms folded")
    try:
        folded = copy.deepcopy(plain)
        count = _fold(folded, answers)
        off = _deviation(folded, answers).max().item()
    except Exception as error:
        return _Made(plain, 0, f"a frozen copy, not folded ({_reason(error)})")
    if not off <= STRICT_DEVIATION:
        return _Made(plain, 0, f"a frozen copy, not folded (folding would change it by {off:.1g})")
    return _Made(folded, count, f"a frozen copy, {count} of {norms} BatchNorms folded")


def _copy(source: RoutedModel) -> RoutedModel:
    """Deep, in the modes of the source, without gradients, the filters in channels-last memory."""
    made = copy.deepcopy(source).requires_grad_(False)
    for parameter in made.parameters():
        parameter.grad = None
    for module in made.modules():
        if isinstance(module, nn.Conv2d) and _has_weight(module):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return _Compact(made) if isinstance(made, Plain) else made


class _Compact(RoutedModel):
    """``model`` on images in channels-last memory, which our own models see to themselves."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        return self.model.ask(to_channels_last(x), tape)


def _deviation(made: RoutedModel, answers: list[_Answer]) -> Float[Tensor, " m"]:
    """Returns, for every image of every answer, how far the logits and the routers' are from the model's, relative to
    the largest of these in the batch. The model's routing is fixed, so that a tie between two experts is no difference.
    """
    off = []
    for x, forced, expected in answers:
        copied = made.run(x, forced=forced or detach(expected.trace))
        if copied.trace.keys() != expected.trace.keys():
            raise ValueError(f"the copy's routers are {sorted(copied.trace)}, the model's {sorted(expected.trace)}")
        pairs = [(copied.logits, expected.logits)]
        pairs += [(copied.trace[name].logits, routing.logits) for name, routing in expected.trace.items()]
        most = [largest(b).clamp(min=torch.finfo(b.dtype).tiny) for _, b in pairs]
        off.append(torch.stack([difference(a, b).flatten(1).amax(1) / c for (a, b), c in zip(pairs, most)]).amax(0))
    return torch.cat(off)


def _reason(error: Exception) -> str:
    """What went wrong, in the words of the model's own error where there is one."""
    first = error.__cause__ or error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {text[:160]}"


# ------------------------------------------------------------------------------------------------ folding


class _Folded(nn.Module):
    """What stands in the place of a BatchNorm that is part of the convolution before it."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return x


def _fold(model: RoutedModel, answers: list[_Answer]) -> int:
    """Every BatchNorm that directly follows a convolution, into that convolution; returns how many."""
    pairs = _pairs(model, answers)
    for conv, norm in pairs:
        scale, shift = _affine(norm)
        replace(model, conv, folded(conv, scale, shift).eval())
        replace(model, norm, _Folded().eval())
    return len(pairs)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The BatchNorm in eval mode as scale * x + shift, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _pairs(model: RoutedModel, answers: list[_Answer]) -> list[tuple[nn.Module, nn.BatchNorm2d]]:
    """(convolution, BatchNorm) where the BatchNorm's input is the convolution's output, found by running the model
    again on a few of the images answered.

    In every pass both are called equally often, each call of the BatchNorm on the output of another call of the
    convolution (a pathway model calls a shared BatchNorm once for each expert in use). A convolution whose output is
    read elsewhere besides cannot be seen from here; the caller compares logits.
    """
    watcher = _Watcher()
    watched = [module for module in model.modules() if _foldable(module)]
    handles = [module.register_forward_hook(watcher.called) for module in watched]
    try:
        for x, forced, expected in answers:
            model.run(x[:FEW], forced=forced or {name: r.detach()[:FEW] for name, r in expected.trace.items()})
            watcher.pass_is_over()
    finally:
        for handle in handles:
            handle.remove()
    readers = Counter(watcher.source.values())
    return [
        (conv, norm)
        for norm, conv in watcher.source.items()
        if isinstance(norm, nn.BatchNorm2d) and not {norm, conv} & watcher.refused and readers[conv] == 1
    ]


class _Watcher:
    """Notes which convolution's output each BatchNorm reads (``source``), and where that is not always so
    (``refused``).
    """

    def __init__(self) -> None:
        self.source: dict[nn.Module, nn.Module] = {}
        self.refused: set[nn.Module] = set()
        self._made: dict[int, nn.Module] = {}
        self._kept: list[Tensor] = []  # an id is taken anew once its object is gone
        self._calls: Counter[nn.Module] = Counter()

    def called(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Is the forward hook of every module that is watched."""
        self._calls[module] += 1
        if not isinstance(module, nn.BatchNorm2d):
            self._made[id(out)] = module
            self._kept.append(out)
            return
        conv = self._made.pop(id(args[0]), None) if args else None
        if conv is None or self.source.setdefault(module, conv) is not conv:
            self.refused.add(module)

    def pass_is_over(self) -> None:
        """Refuses BatchNorms that were called more or less often than their convolution."""
        self.refused |= {norm for norm, conv in self.source.items() if self._calls[norm] != self._calls[conv]}
        self._made.clear()
        self._kept.clear()
        self._calls.clear()


def _foldable(module: nn.Module) -> bool:
    """Whether the module is what its type says: own parameters (no parametrization, no weight norm), nobody's hooks,
    nobody's forward.
    """
    ours = isinstance(module, Foldable)
    if compat.has_hooks(module) or (isinstance(module, Foldable) and not module.foldable):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return (ours or type(module) is nn.BatchNorm2d) and module.running_var is not None
    if isinstance(module, nn.Conv2d):
        return (ours or compat.computes_as_conv2d(type(module))) and _has_weight(module)
    return ours and all(_foldable(part) for part in module.modules() if isinstance(part, nn.Conv2d))


def _has_weight(module: nn.Module) -> bool:
    """Whether its weight is a parameter of its own, and no function of others."""
    return "weight" in dict(module.named_parameters(recurse=False))


# ------------------------------------------------------------------------------------------------ fast


def _fast(strict: _Made, owned: bool, answers: list[_Answer]) -> _Made:
    """bf16 weights under autocast; where these do not work, autocast alone; where neither does, the strict copy."""
    ways: list[tuple[str, Callable[[], RoutedModel]]] = [("autocast to bf16", lambda: _float32(strict.model, owned))]
    if owned:
        ways.insert(0, ("bf16 weights", lambda: _bf16(strict.model)))
    failed = ""
    for way, build in ways:
        try:
            half = LowPrecision(build())
            off = _deviation(half, answers).median().item()
        except Exception as error:  # a user's module may raise anything here; all mean the same
            failed += f"; not {way} ({_reason(error)})"
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
