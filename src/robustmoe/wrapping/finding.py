"""`find_routers`: where a foreign model decides, and the codec that reads it, guessed from one watched pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustmoe.arrays import as_tensor
from robustmoe.attacks.base import evaluating
from robustmoe.errors import UserError
from robustmoe.routing import Gate
from robustmoe.wrapping.codecs import (
    SOFT,
    CallCodec,
    DenseCodec,
    DispatchCodec,
    IndexCodec,
    LogitsCodec,
    PairCodec,
    SlotsCodec,
    TripleCodec,
)
from robustmoe.wrapping.findings import Finding, RouterFindings
from robustmoe.wrapping.said import Codec, Scores
from robustmoe.wrapping.watching import Decision, Entered, Heard, Seen, tensors_of, watch

MOST = 512
"""More choices than this are no experts: pixels, tokens, a dictionary."""
NAMED = re.compile(r"gate(?!d)|gating|rout|moe|expert|switch|mixture", re.IGNORECASE)
SELECTIVE = frozenset({"topk", "argmax", "max", "one_hot"})
CODECS_OF_CALLS = SELECTIVE | SOFT


def find_routers(model: nn.Module, example: Any) -> RouterFindings:
    """Looks for the places where a model decides which of its parts an image, or a part of it, goes to.

    ``example``: a few images (n, ch, h, w); 2 to 8 are enough. One pass is watched, in eval mode, and the model is left
    as it was. The findings print as a table, with the codec that `rm.wrap` would take for each;
    `RouterFindings.routers` has them as `rm.wrap` takes them. A guess is a guess: `rm.wrap` tests it.

    A decision counts where it is made among 2 to 512 parts, for whole images or for a whole number of items an image,
    and the model has so many experts: modules of one kind in a list beside it, or stacked weights; or where a name says
    so. What is drawn at random or computed without gradient is told too, and layers whose experts choose their items,
    which no codec reads. Decisions inside a scripted or compiled module
    are not seen; its router is found where it returns the decision.
    """
    example = as_example(example)
    with evaluating(model):
        seen = seen_of(model, example, tensors=True)
    finder = Finder(model, seen, len(example))
    rows, draws = tuple(finder.findings()), tuple(dict.fromkeys(seen.draws))
    return RouterFindings(rows, seen.cuts, draws, finder.inverted)


def as_example(given: Any) -> Tensor:
    """Returns the example as a tensor: arrays and lists are taken too, their numbers as float32. UserError for none."""
    wanted = "a few images (n, ch, h, w) in [0, 1]"
    if isinstance(given, Tensor):
        example = given
    else:
        example = as_tensor(given, "the example", wanted)
        example = example.float() if example.is_floating_point() else example
    if example.ndim == 0 or len(example) == 0 or example.dtype == torch.bool:
        raise UserError(f"the example has to be {wanted}; got {example.dtype} of shape {tuple(example.shape)}")
    return example


def seen_of(model: nn.Module, example: Tensor, tensors: bool = False) -> Seen:
    """What `watch` sees of a pass on the example. UserError where the model does not take it."""
    try:
        return watch(model, example, tensors)
    except Exception as error:  # whatever the user's own model raises; its traceback stays chained
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise UserError(f"the model fails on the example, {tuple(example.shape)}: {said}") from error


@dataclass(eq=False)
class _Guess:
    """A decision with the codec that may read it, at a module."""

    entry: Entered | None
    path: str
    codec: Codec
    heard: Heard | None


class Finder:
    """What `find_routers` knows of one watched pass over ``images`` images."""

    def __init__(self, model: nn.Module, seen: Seen, images: int) -> None:
        self.model, self.seen, self.images = model, seen, images
        self.modules = dict(model.named_modules())
        self._turned = [heard for heard in seen.heard if self._inverted(heard)]
        self.heard = [heard for heard in seen.heard if self._plausible(heard) and heard not in self._turned]

    @property
    def inverted(self) -> tuple[Decision, ...]:
        """The calls by which experts choose their items."""
        return tuple(dict.fromkeys(heard.decision for heard in self._turned))

    def findings(self) -> Iterator[Finding]:
        """The router of each module that decides, in the order of the pass. What a module returns says more than a call
        inside it, and such a module's inner calls are its own affair.
        """
        guesses = [*self._guesses(), *self._silent()]
        returned = {guess.path: guess for guess in reversed(guesses) if not guess.codec.call}
        told: set[str] = set()
        for guess in guesses:
            inside = any(_inside(guess.path, path) for path in returned) and bool(guess.codec.call)
            if not inside and guess.path not in told:
                told.add(guess.path)
                yield self._finding(guess)

    def _finding(self, guess: _Guess) -> Finding:
        module = type(self.modules[guess.path]).__name__
        if guess.heard is None:
            shape = tuple(next(tensors_of(guess.entry.output if guess.entry else ())).shape)
            return Finding(guess.path, module, "returns", shape, True, guess.codec)
        decision = guess.heard.decision
        return Finding(guess.path, module, decision.call, decision.shape, decision.gradient, guess.codec)

    # -------------------------------------------------------------------------------------------- calls that choose

    def _plausible(self, heard: Heard) -> bool:
        """Whether the call may choose among experts: few enough, along the last dimension, of whole images' items."""
        decision = heard.decision
        if decision.call not in CODECS_OF_CALLS or len(decision.shape) < 2:
            return False
        if not (heard.scores.is_floating_point() or decision.call == "one_hot"):
            return False
        rows = torch.Size(decision.shape[:-1]).numel()
        last = decision.dim == len(decision.shape) - 1
        slots = decision.call == "softmax" and decision.dim == 1 and len(decision.shape) in (3, 4)
        chosen = decision.call in SOFT or decision.k < decision.choices
        return (last or slots) and 2 <= decision.choices <= MOST and chosen and rows % self.images == 0

    def _inverted(self, heard: Heard) -> bool:
        """Whether each of as many experts as another dimension has chooses some of the items."""
        decision = heard.decision
        if decision.call != "topk" or decision.k >= decision.choices or self._listed(decision.path, decision.choices):
            return False
        others = {size for dim, size in enumerate(decision.shape) if dim != decision.dim and size > 1}
        return any(self._listed(decision.path, size) for size in others)

    def _guesses(self) -> Iterator[_Guess]:
        shared = self._shared()
        taken: list[Heard] = []
        for heard in self.heard:
            if heard.decision.call in SOFT or any(heard.scores is other.scores for other in taken):
                continue
            guess = self._of_choice(heard, shared)
            if guess is not None:
                taken.append(heard)
                yield guess
        for heard in self.heard:
            if heard.decision.call in SOFT and (soft := self._of_softmax(heard)) is not None:
                yield soft

    def _of_choice(self, heard: Heard, shared: dict[int, Entered]) -> _Guess | None:
        decision, experts = heard.decision, heard.decision.choices
        if id(heard) in shared:
            source = shared[id(heard)]
            gating: Gate = "hard" if decision.call in ("argmax", "one_hot") else "renormalised"
            return _Guess(source, source.path, LogitsCodec(decision.k, gating), heard)
        if not self._evident(decision.path, experts):
            return None
        for entry in self._around(heard):
            codec = self._contract(entry, experts)
            if codec is not None:
                return _Guess(entry, entry.path, codec, heard)
        if decision.call == "one_hot":
            return None
        same = [h for h in self.seen.heard if h.entry == heard.entry and h.decision.call == decision.call]
        nth = None if len(same) == 1 else decision.nth
        weights = "softmax" if self._squashed_later(heard) else "values"
        return _Guess(None, decision.path, CallCodec(decision.call, weights, nth), heard)  # type: ignore[arg-type]

    def _squashed_later(self, heard: Heard) -> bool:
        """Whether a softmax is taken of the values of a top-k."""
        values = list(tensors_of(heard.result))
        return any(
            other.decision.call == "softmax" and other.scores is values[0] for other in self.seen.heard if values
        )

    def _shared(self) -> dict[int, Entered]:
        """Choices that several modules take of one router's scores, by the call of the module that gave these."""
        groups: list[list[Heard]] = []
        for heard in self.heard:
            if heard.decision.call in SELECTIVE:
                group = next((g for g in groups if _same(g[0].scores, heard.scores)), None)
                groups.append([heard]) if group is None else group.append(heard)
        shared = {}
        for group in groups:
            if len({heard.decision.path for heard in group}) > 1:
                source = next((e for e in self.seen.entered if _same(e.output, group[0].scores)), None)
                if source is not None:
                    shared.update({id(heard): source for heard in group})
        return shared

    def _around(self, heard: Heard) -> Iterator[Entered]:
        """The calls of modules around a call, the outermost of the nearest three first; never the whole model."""
        chain: list[Entered] = []
        number = heard.entry
        while number >= 0 and len(chain) < 3:
            entry = self.seen.entered[number]
            if entry.path:
                chain.append(entry)
            number = entry.parent
        return reversed(chain)

    # -------------------------------------------------------------------------------------------- what modules return

    def _contract(self, entry: Entered, experts: int) -> Codec | None:
        """The codec for what a module returned, if it is a decision among so many."""
        output = entry.output
        if isinstance(output, Tensor):
            return self._of_tensor(output, experts)
        values = list(output.values()) if isinstance(output, dict) else output
        if not isinstance(values, tuple | list):
            return None
        places = [(place, value) for place, value in enumerate(values) if isinstance(value, Tensor) and value.ndim > 1]
        numbers = [(place, value) for place, value in places if _integer(value)]
        floats = [(place, value) for place, value in places if value.is_floating_point()]
        for place, index in numbers:
            if index.shape[-1] < experts and self._whole(index) and int(index.max()) < experts:
                return _of_index(place, index, floats, experts)
        return self._of_pair_of_tensors(floats, experts)

    def _of_pair_of_tensors(self, floats: Sequence[tuple[int, Tensor]], experts: int) -> Codec | None:
        for (i, first), (j, second) in itertools.pairwise(floats):
            if first.shape != second.shape:
                continue
            if first.ndim >= 4 and first.shape[-2] == experts and _places(first, second):
                k = int((second != 0).any(-1).sum(-1).max())
                return DispatchCodec(max(k, 1), i, j)
            if first.shape[-1] == experts and first.ndim <= 3:
                for place, weight, other, scores in ((j, second, i, first), (i, first, j, second)):
                    k = int((weight != 0).sum(-1).max())
                    if k < experts and bool((weight >= 0).all()):
                        return DenseCodec(k, place, other, "probabilities" if _shares(scores) else "logits")
        return None

    def _of_tensor(self, output: Tensor, experts: int) -> Codec | None:
        if _integer(output):
            return IndexCodec() if output.ndim == 1 and output.shape[0] % self.images == 0 else None
        if output.ndim < 2 or output.shape[-1] != experts or not bool((output >= 0).all()) or not self._whole(output):
            return None
        k = int((output != 0).sum(-1).max())
        return DenseCodec(k) if k < experts else None

    def _whole(self, value: Tensor) -> bool:
        return value.shape[:-1].numel() % self.images == 0

    def _silent(self) -> Iterator[_Guess]:
        """Modules with a router's name that return a decision which no call here was seen to take."""
        for entry in self.seen.entered:
            if not entry.path or not (
                NAMED.search(entry.path.split(".")[-1]) or NAMED.search(type(entry.module).__name__)
            ):
                continue
            for experts in sorted(
                {t.shape[-1] for t in tensors_of(entry.output) if t.ndim > 1 and t.shape[-1] <= MOST}
            ):
                codec = self._contract(entry, experts)
                if codec is not None and self._listed(entry.path, experts):
                    yield _Guess(entry, entry.path, codec, None)

    # -------------------------------------------------------------------------------------------- soft gates

    def _of_softmax(self, heard: Heard) -> _Guess | None:
        decision = heard.decision
        partner = self._partner(heard)
        if partner is not None:
            experts = None if heard.scores.ndim == 4 else self._number(decision.path, decision.choices)
            return _Guess(None, decision.path, SlotsCodec(experts), heard)
        if decision.dim != len(decision.shape) - 1 or len(decision.shape) > 3 or self._consumed(heard):
            return None
        if not self._listed(decision.path, decision.choices) or self._attends(heard):
            return None
        for entry in self._around(heard):
            codec = self._contract(entry, decision.choices) or _gives(entry.output, heard.result)
            if codec is not None:
                return _Guess(entry, entry.path, codec, heard)
        return _Guess(None, decision.path, CallCodec(decision.call), heard)  # type: ignore[arg-type]

    def _attends(self, heard: Heard) -> bool:
        """Whether a softmax is an attention's: of a product of image with image, of every item with every item or in a
        module without a router's name.
        """
        *_, rows, columns = heard.scores.shape
        return heard.product and (rows == columns or not self._said(heard.decision.path))

    def _consumed(self, heard: Heard) -> bool:
        """Whether what a softmax gave is then chosen from, or is itself a softmax of chosen values."""
        choices = heard.decision.choices
        return any(
            other.decision.call in SELECTIVE
            and other.entry == heard.entry
            and (other.decision.choices == choices or other.decision.k == choices or other in self._turned)
            for other in self.seen.heard
        )

    def _partner(self, heard: Heard) -> Heard | None:
        """The second softmax of Soft MoE: of the same numbers, over the slots, where this one is over the items."""
        if heard.decision.dim != 1 or heard.scores.ndim < 3:
            return None
        flat = heard.scores.flatten(2)
        return next(
            (
                other
                for other in self.seen.heard
                if other.entry == heard.entry
                and other.decision.call == "softmax"
                and other.decision.dim == len(other.decision.shape) - 1
                and _same(other.scores.flatten(2) if other.scores.ndim > 3 else other.scores, flat)
            ),
            None,
        )

    # -------------------------------------------------------------------------------------------- are there experts?

    def _evident(self, path: str, experts: int) -> bool:
        """Whether so many experts are near the module, or its name says that it routes."""
        return self._listed(path, experts) or self._said(path)

    def _said(self, path: str) -> bool:
        """Whether the module's name, its parent's, or its class's is a router's."""
        names = [*path.split(".")[-2:], type(self.modules[path]).__name__]
        return any(NAMED.search(name) for name in names)

    def _listed(self, path: str, experts: int) -> bool:
        """Whether there are so many modules of one kind in a list, or so many stacked weights, are at or beside a
        module."""
        parent = path.rpartition(".")[0]
        for near in (path, parent, parent.rpartition(".")[0]) if path else ("",):
            module = self.modules[near]
            for inside in (module, *module.children(), *(g for c in module.children() for g in c.children())):
                if isinstance(inside, nn.ModuleList | nn.ModuleDict) and len(inside) == experts and _alike(inside):
                    return True
                stacked = [p for p in inside.parameters(recurse=False) if p.ndim >= 3 and p.shape[0] == experts]
                if len(stacked) >= 2:
                    return True
        return False

    def _number(self, path: str, slots: int) -> int | None:
        """How many experts a module with so many slots has."""
        return next((e for e in range(2, slots + 1) if slots % e == 0 and self._listed(path, e)), None)


def _inside(path: str, other: str) -> bool:
    """Whether a module is another one, or a part of it."""
    return path == other or path.startswith(f"{other}.")


def _of_index(place: int, index: Tensor, floats: Sequence[tuple[int, Tensor]], experts: int) -> Codec | None:
    rows = index.shape[:-1].numel()
    weights = [(p, v) for p, v in floats if v.shape == index.shape]
    scores = [(p, v) for p, v in floats if v.shape[-1] == experts and v.shape[:-1].numel() == rows]
    if weights and scores:
        kind: Scores = "probabilities" if _shares(scores[0][1]) else "logits"
        return TripleCodec(scores[0][0], weights[0][0], place, kind)
    if len(scores) == 2:  # dense weights beside the logits
        return TripleCodec(scores[0][0], scores[1][0], place)
    return PairCodec(place, weights[0][0]) if weights else None


def _gives(output: object, weights: Tensor) -> Codec | None:
    """The codec of a module that returns these dense weights, alone or among others."""
    if isinstance(output, Tensor):
        return DenseCodec() if _same(output, weights) else None
    values = output if isinstance(output, tuple | list) else ()
    return next((DenseCodec(output=place) for place, value in enumerate(values) if _same(value, weights)), None)


def _integer(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32)


def _same(a: object, b: object) -> bool:
    """Whether two values are tensors of equal numbers."""
    if a is b:
        return isinstance(a, Tensor)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _shares(value: Tensor) -> bool:
    """Whether each row is of shares that sum to 1."""
    sums = value.detach().float().sum(-1)
    return bool((value >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _places(dispatch: Tensor, combine: Tensor) -> bool:
    """Whether two tensors (b, t, e, c) say who takes which place: 0 or 1 in the first (up to the rounding of a
    straight-through estimate), no weight elsewhere in the second.
    """
    nothing, full = dispatch == 0, (dispatch - 1).abs() < 1e-5
    return bool((nothing | full).all()) and bool((combine[nothing] == 0).all())


def _alike(modules: nn.ModuleList | nn.ModuleDict) -> bool:
    """Whether the modules are of one class with parameters of one shape, and have any."""
    parts = list(modules.values()) if isinstance(modules, nn.ModuleDict) else list(modules)
    kinds = {(type(part), tuple(tuple(p.shape) for p in part.parameters())) for part in parts}
    return len(kinds) == 1 and bool(next(iter(kinds))[1])
