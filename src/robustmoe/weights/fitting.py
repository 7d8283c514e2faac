"""Which tensors of a file are which of a model's: one attempt for each group of the file and each layout, and what is
said of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustmoe.weights.pairs import Counterpart, Layout
from robustmoe.weights.reading import Group

ALWAYS_IGNORED = (r"num_batches_tracked$",)
"""Counts of batches: BatchNorms with a momentum never read them, and some code does not write them."""


NO_WEIGHTS = r"(^|/)(opt|optim|opt_state|mu|nu|\w*optimi[sz]er\w*)(/|$)"
"""Groups of what an optimiser remembers, which is often laid out as the weights are."""


@dataclass(frozen=True)
class Fit:
    """One way to read a file: its group ``group`` without the start ``prefix`` of each name, in the layout ``layout``.

    ``given``: the model's tensors that it gives. ``missing``: names that the layout has and the file has not;
    ``left``: names of the file that nothing asked for; ``wrong``: sentences of what does not fit, by name; ``ignored``:
    names that are known not to be weights; ``changed``: how many tensors were changed in which way.
    """

    layout: str
    group: str
    prefix: str
    given: Mapping[str, Tensor]
    missing: tuple[str, ...]
    left: tuple[str, ...]
    wrong: tuple[str, ...]
    ignored: tuple[str, ...]
    changed: Mapping[str, int]

    @property
    def whole(self) -> bool:
        return bool(self.given) and not (self.missing or self.left or self.wrong)

    @property
    def lacks(self) -> int:
        return len(self.missing) + len(self.left) + len(self.wrong)

    def where(self) -> str:
        """What stands before the names in the file, such as "state_dict/module.", "" for nothing."""
        return "/".join(filter(None, (self.group, self.prefix)))

    def problems(self) -> str:
        """What is wrong, the first of each kind by name."""
        said = list(self.wrong[:1])
        if len(self.wrong) > 1:
            said.append(f"{len(self.wrong) - 1} more do not fit")
        if self.missing:
            said.append(f"{len(self.missing)} of the tensors wanted are missing, such as {self.missing[0]!r}")
        if self.left:
            said.append(f"{len(self.left)} of the file's are left over, such as {self.left[0]!r}")
        return "; ".join(said)


def fits(groups: Mapping[str, Group], model: nn.Module, layouts: Mapping[str, Layout]) -> list[Fit]:
    """Every attempt, the best first: those with fewest problems, then with the shortest names of group and prefix."""
    asked = [(name, layout, layout.pairs(model)) for name, layout in layouts.items()]
    attempts = [
        _fit(name, layout, pairs, model, group, prefix, short)
        for group, tensors in groups.items()
        if len(groups) == 1 or not re.search(NO_WEIGHTS, group)
        for prefix, short in _stripped(tensors)
        for name, layout, pairs in asked
        if pairs and any(theirs in short for pair in pairs for theirs in pair.theirs)
    ]
    return sorted(attempts, key=lambda fit: (fit.lacks, len(fit.group), len(fit.prefix)))


PIXELS = re.compile(r"(.*\.)?(mean|std|mu|sigma|new_mean|new_std)")
"""Names of what the images are normalised by, which often stands beside a network and not in it."""

AGAIN = re.compile(r"(.*\.)?attacker\.")
"""Names of a network's second place in MadryLab's robustness, which attacks it there: the same tensors."""


def _stripped(tensors: Group) -> list[tuple[str, Group]]:
    """The group under its own names, and without each start that all its names share (but for `PIXELS`). What
    torch.compile puts into names never counts.
    """
    own = {name: value for name, value in tensors.items() if not AGAIN.match(name)}
    names = {name.replace("_orig_mod.", ""): value for name, value in own.items()}
    names = names if len(names) == len(own) else own  # no name may stand for two tensors
    out, prefix = [("", names)], ""
    while True:
        inside = [name for name in names if not PIXELS.fullmatch(name)]
        starts = {re.match(r"[^./]*[./]|", name)[0] for name in inside}  # type: ignore[index]
        if len(starts) != 1 or starts == {""}:
            return out
        prefix += (start := starts.pop())
        names = {name.removeprefix(start): value for name, value in names.items()}
        out.append((prefix, names))


def _fit(
    name: str, layout: Layout, pairs: Sequence[Counterpart], model: nn.Module, group: str, prefix: str, tensors: Group
) -> Fit:
    own = model.state_dict()
    given: dict[str, Tensor] = {}
    missing: list[str] = []
    wrong: list[str] = []
    changed: dict[str, int] = {}
    for pair in pairs:
        lacking = [theirs for theirs in pair.theirs if theirs not in tensors]
        if lacking:
            missing += [] if pair.optional else [theirs for theirs in lacking if not _matches(ALWAYS_IGNORED, theirs)]
            continue
        problem = _put(pair, tensors, own, given)
        if problem:
            wrong.append(problem)
        elif pair.change:
            changed[pair.change] = changed.get(pair.change, 0) + 1
    used = {theirs for pair in pairs for theirs in pair.theirs}
    rest = [theirs for theirs in tensors if theirs not in used]
    ignored = [theirs for theirs in rest if _matches((*layout.ignored, *ALWAYS_IGNORED), theirs)]
    left = [theirs for theirs in rest if theirs not in set(ignored)]
    return Fit(name, group, prefix, given, tuple(missing), tuple(left), tuple(wrong), tuple(ignored), changed)


def _put(pair: Counterpart, tensors: Group, own: Mapping[str, Tensor], given: dict[str, Tensor]) -> str:
    """Puts what the pair gives into ``given``; returns what does not fit, in words, or ""."""
    more = f" and {len(pair.theirs) - 1} more" if len(pair.theirs) > 1 else ""
    said = f"{pair.theirs[0]}{more}" if pair.theirs else "nothing"
    shapes = [tuple(tensors[theirs].shape) for theirs in pair.theirs]
    for theirs in pair.theirs:
        if odd := _not_plain(tensors[theirs]):
            return f"{theirs!r} {odd}"
    try:
        values = list(pair.read([tensors[theirs] for theirs in pair.theirs]))
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        return f"{said!r} of shape {shapes[0]} cannot be read: {error}"
    for ours, value in zip(pair.ours, values, strict=True):
        place = own[ours]
        if value.shape != place.shape:
            made, wanted = tuple(value.shape), tuple(place.shape)
            return f"{said!r} of shape {shapes[0]} gives {made}, the model's {ours!r} is {wanted}"
        if value.is_floating_point() != place.is_floating_point():
            return f"{said!r} is of {value.dtype}, the model's {ours!r} of {place.dtype}"
        value = value.to(place.dtype)
        if value.is_floating_point() and not value.isfinite().all():
            return f"{said!r} holds numbers that are not finite in {place.dtype}"
        given[ours] = value
    return ""


def _not_plain(value: Tensor) -> str:
    """Why a tensor is not simply its numbers, in words, or ""."""
    if value.is_nested or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return "is sparse, quantised, nested or without numbers; expected a plain tensor"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"stands for {value.numel():,} numbers, of which few are stored; expected all (tensor.contiguous())"
    return ""


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
