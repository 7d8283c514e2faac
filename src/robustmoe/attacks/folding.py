"""Copies of a model in eval mode whose BatchNorms are part of the convolutions before them, compared with the model on
a few images.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustmoe import compat
from robustmoe.attacks.base import Attack, Wrapped, evaluating
from robustmoe.attacks.half import LowPrecision
from robustmoe.attacks.surrogate import Surrogate
from robustmoe.models.base import Output, RoutedModel, to_channels_last
from robustmoe.models.block import replace
from robustmoe.models.convolution import FoldedRoutedConv, Handed, folded
from robustmoe.models.norm import Foldable, difference, largest
from robustmoe.models.plain import Plain, sharded
from robustmoe.noise import Noise
from robustmoe.routing import Tape, Trace, detach, to_expert

STRICT_DEVIATION = 1e-4
"""How far any logit (also a router's) of a strict copy may be off on the probe, relative to the batch's largest."""

PROBE, FEW = 32, 4
"""Images of the probe batch that are used at most: on the model's own routes, and on each expert alone."""


Pair = tuple[nn.Module, nn.BatchNorm2d]
"""A layer of convolutions, and the BatchNorm behind it."""


class Probed(NamedTuple):
    """What the model says of the images ``x`` on the routes ``forced`` ({}: its own)."""

    x: Tensor
    forced: Trace
    output: Output


def answers_of(source: RoutedModel, probe: Tensor, known: Output | None) -> tuple[list[Probed], str]:
    """The model's own pass on the probe, and of a few of its images one forced to each expert in turn (at the routers
    that have it), so that none is left out; and a note where a model does not take these.
    """
    free = source.run(probe) if known is None else known
    answers = [Probed(probe, {}, free)]
    few: Trace = {name: routing.detach()[:FEW] for name, routing in free.trace.items()}
    for expert in range(max((routing.num_experts for routing in few.values()), default=0)):
        forced = to_expert({name: r for name, r in few.items() if expert < r.num_experts}, expert)
        try:
            answers.append(Probed(probe[:FEW], forced, source.run(probe[:FEW], forced=forced)))
        except Exception as error:  # a user's model may ask more of a route than the tape does
            return answers, f"; the experts not seen one by one ({reason_of(error)})"
    return answers, ""


def copy_of(source: RoutedModel) -> RoutedModel:
    """Deep, in the modes of the source, without gradients, the filters in channels-last memory."""
    made = copy.deepcopy(source).requires_grad_(False)
    for parameter in made.parameters():
        parameter.grad = None
    for module in made.modules():
        if isinstance(module, nn.Conv2d) and _has_weight(module):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return Compact(made) if isinstance(made, Plain) else made


class Compact(RoutedModel):
    """``model`` on images in channels-last memory, which our own models see to themselves."""

    def __init__(self, model: RoutedModel) -> None:
        super().__init__()
        self.model = model

    def body(self, x: Float[Tensor, "n ch h w"], tape: Tape) -> Float[Tensor, "n c"]:
        return self.model.ask(to_channels_last(x), tape)


def deviation(made: RoutedModel, answers: list[Probed]) -> Float[Tensor, " m"]:
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


def reason_of(error: Exception) -> str:
    """What went wrong, in the words of the model's own error where there is one."""
    first = error.__cause__ or error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {text[:160]}"


# ------------------------------------------------------------------------------------------------ folding


class _Folded(nn.Module):
    """What stands in the place of a BatchNorm that is part of the convolution before it."""

    def forward(self, x: Tensor, segments: Handed | None = None) -> Tensor:
        return x


def fold_norms(model: RoutedModel, answers: list[Probed]) -> list[Pair]:
    """Every BatchNorm that directly follows a convolution, into that convolution; returns which."""
    pairs = pairs_of(model, answers)
    for conv, norm in pairs:
        scale, shift = affine(norm)
        replace(model, conv, folded(conv, scale, shift).eval())
        replace(model, norm, _Folded().eval())
    return pairs


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The BatchNorm in eval mode as scale * x + shift, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def pairs_of(model: RoutedModel, answers: list[Probed]) -> list[Pair]:
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


# ------------------------------------------------------------------------------------------------ in training


@dataclass(frozen=True)
class Folded(Wrapped):
    """``attack`` made on a copy of the model in eval mode whose BatchNorms are part of the convolutions before them,
    brought up to the model's weights and statistics at each call: cheaper examples for training.

    The copy's logits are the model's but for rounding, so the attack is the same and its images differ where the sign
    of a gradient near 0 does. A model that has no such BatchNorm, or cannot be copied, is attacked as it is; so is a
    `Surrogate` (what evaluation attacks, which is folded already: see its ``precision``).
    """

    attack: Attack

    def queries(self, output: Output) -> int:
        return self.attack.queries(output)

    def perturb(self, model: RoutedModel, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        if isinstance(model, LowPrecision):
            return self.attack(LowPrecision(refreshed_twin(model.model, x)).eval(), x, y, noise)
        return self.attack(model if isinstance(model, Surrogate) else refreshed_twin(model, x), x, y, noise)


@dataclass(frozen=True)
class Twin:
    """A folded copy of a model, and where each of its tensors comes from. ``alike``: (of the copy, of the model);
    ``convolutions``: of the copy and of the model, under the model's BatchNorm; ``shifts``: what else the copy holds of
    a BatchNorm.
    """

    model: RoutedModel
    alike: list[tuple[Tensor, Tensor]]
    convolutions: list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]]
    shifts: list[tuple[Tensor, nn.BatchNorm2d]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the copy up to the model, in place."""
        for held, origin in self.alike:
            held.copy_(origin)
        lines = {norm: affine(norm) for norm in {norm for _, _, norm in self.convolutions}}
        for ours, theirs, norm in self.convolutions:
            scale, shift = lines[norm]
            assert ours.bias is not None
            ours.weight.copy_(theirs.weight.double() * scale[:, None, None, None])
            ours.bias.copy_(shift if theirs.bias is None else theirs.bias.double() * scale + shift)
        for held, norm in self.shifts:
            held.copy_(lines[norm][1])


_TWINS: WeakKeyDictionary[RoutedModel, Twin | None] = WeakKeyDictionary()


def refreshed_twin(model: RoutedModel, x: Float[Tensor, "n ch h w"]) -> RoutedModel:
    """The model's folded copy, made at the first call, with its weights of now; the model itself where it has none."""
    if model not in _TWINS:
        _TWINS[model] = _twin(model, x)
    twin = _TWINS[model]
    if twin is None:
        return model
    twin.refresh()
    return twin.model


def _twin(model: RoutedModel, x: Tensor) -> Twin | None:
    """None where there is nothing to fold, or a copy does not give the model's logits on a few images."""
    if isinstance(model, Plain) or sharded(model):
        return None
    full = torch.autocast(x.device.type, enabled=False)
    try:
        with evaluating(model), torch.no_grad(), full:
            answers, _ = answers_of(model, x[:PROBE].detach(), None)
            made = copy_of(model)
            names = {module: name for name, module in made.named_modules()}
            pairs = [(names[conv], names[norm]) for conv, norm in fold_norms(made, answers)]
            twin = _tied(model, made.eval(), pairs)
            if twin is not None:
                twin.refresh()
                twin = twin if deviation(twin.model, answers).max().item() <= STRICT_DEVIATION else None
    except Exception:  # a user's module may raise anything here; all mean that it is attacked as it is
        return None
    return twin


def _tied(model: RoutedModel, made: RoutedModel, pairs: list[tuple[str, str]]) -> Twin | None:
    """None where nothing was folded, or it is not known where a tensor of the copy comes from."""
    convolutions: list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]] = []
    shifts: list[tuple[Tensor, nn.BatchNorm2d]] = []
    for conv, norm_name in pairs:
        norm, ours, theirs = model.get_submodule(norm_name), made.get_submodule(conv), model.get_submodule(conv)
        assert isinstance(norm, nn.BatchNorm2d)
        convolutions += [(a, b, norm) for a, b in zip(_convolutions(ours), _convolutions(theirs), strict=True)]
        if isinstance(ours, FoldedRoutedConv):
            shifts.append((ours.shift, norm))
    known = {id(each) for ours, _, _ in convolutions for each in (ours.weight, ours.bias)}
    known |= {id(held) for held, _ in shifts}
    left = {name: tensor for name, tensor in _tensors(made).items() if id(tensor) not in known}
    of_model = _tensors(model)
    if not pairs or any(name not in of_model or of_model[name].shape != left[name].shape for name in left):
        return None
    return Twin(made, [(tensor, of_model[name]) for name, tensor in left.items()], convolutions, shifts)


def _convolutions(layer: nn.Module) -> list[nn.Conv2d]:
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
