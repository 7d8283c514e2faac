"""Codecs: what the routers in use return, and the calls in which others decide (see `robustmoe.wrapping.said`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustmoe import spec as specs
from robustmoe.models.norm import at_least_float32
from robustmoe.routing import Gate, Routing, choose, soft
from robustmoe.wrapping.said import (
    Codec,
    Said,
    Scores,
    best_first,
    dense,
    fitted,
    of_dense,
    replaced,
    written_logits,
)


@dataclass(frozen=True)
class LogitsCodec(Codec):
    """A module that gives its scores (..., e) alone, as a plain Linear does; the code after it takes the ``k`` best.

    ``gating``: how that code weights them (see `robustmoe.routing`): by softmax over the chosen ("renormalised"), over
    all ("vmoe", "soft"), or not at all ("hard"). ``output``: the entry with the scores, where there are several.
    """

    k: int = 1
    gating: Gate = "renormalised"
    output: int | None = None

    def read(self, said: Said) -> Routing:
        return choose(at_least_float32(said.items(said.entry(self.output))), self.gating, self.k)

    def write(self, said: Said, routing: Routing) -> Any:
        if routing.k > self.k and self.gating != "soft":
            raise ValueError(f"the code after the router takes {self.k} experts; expected no more, got {routing.k}")
        logits = written_logits(routing, self.gating)
        return replaced(said.output, {self.output: said.back(logits, said.entry(self.output))})


class _IndexAndWeight(Codec):
    """A tuple with index and weights (m, k) at two of its places."""

    index: int
    weight: int
    scores_are: Scores

    def read(self, said: Said) -> Routing:
        return _of_pair(self, said, self.index, self.weight, self.scores_are)

    def write(self, said: Said, routing: Routing) -> Any:
        return _pair_of(said, routing, self.index, self.weight)


@dataclass(frozen=True)
class TripleCodec(_IndexAndWeight):
    """(logits (m, e), weights (m, k), index (m, k)), in the order that the numbers say: the routers of transformers 5.

    ``logits``, ``weight``, ``index``: where each stands in what the module gives, from 0. What stands at ``logits`` may
    also be the probabilities (``scores_are``). Where the router chooses by other scores than
    these (a bias for balance is added), those are the routing's logits.
    """

    logits: int = 0
    weight: int = 1
    index: int = 2
    scores_are: Scores = "logits"


@dataclass(frozen=True)
class PairCodec(_IndexAndWeight):
    """(index (m, k), weights (m, k), ...), in the order that the numbers say: DeepSeek's gate and its kin.

    ``index``, ``weight``: where the experts' numbers and their weights stand in what the module gives, from 0.
    """

    index: int = 0
    weight: int = 1
    logits: int | str | None = None
    scores_are: Scores = "logits"


@dataclass(frozen=True)
class DenseCodec(Codec):
    """A weight for every expert (m, e), 0 for those that are not chosen; None for ``k``: every expert is.

    ``output``: the entry with the weights, where there are several. Without ``logits`` the logarithm of the weights
    stands for them.
    """

    k: int | None = None
    output: int | None = None
    logits: int | str | None = None
    scores_are: Scores = "logits"

    def read(self, said: Said) -> Routing:
        weight = said.items(said.entry(self.output))
        return of_dense(weight, weight.shape[-1] if self.k is None else self.k, self.scores(said, self.scores_are))

    def write(self, said: Said, routing: Routing) -> Any:
        return replaced(said.output, {self.output: said.back(dense(routing), said.entry(self.output))})


@dataclass(frozen=True)
class IndexCodec(Codec):
    """The chosen expert's number (m), and no weight: what is chosen counts in full. ``experts``: how many there are,
    where no logits are known (the route's radius is not known then either). ``output``: the entry with the number,
    where there are several.
    """

    experts: int | None = None
    logits: int | str | None = None
    output: int | None = None

    def read(self, said: Said) -> Routing:
        index = said.items(said.entry(self.output)[..., None]).long()
        logits = self.scores(said, "logits")
        if logits is None:
            if self.experts is None:
                raise ValueError("an index alone does not say how many experts there are; expected index(experts=...)")
            logits = torch.nn.functional.one_hot(index[..., 0], self.experts).float()
        return Routing(logits, index, torch.ones_like(index, dtype=logits.dtype))

    def write(self, said: Said, routing: Routing) -> Any:
        if routing.k != 1:
            raise ValueError(f"the router names one expert; expected 1 an item, got {routing.k}")
        like = said.entry(self.output)
        return replaced(said.output, {self.output: said.back(routing.index, like[..., None])[..., 0]})


@dataclass(frozen=True)
class DispatchCodec(Codec):
    """(dispatch (b, t, e, c), combine (b, t, e, c), ...): which place of which expert each item takes, and with what
    weight (Mesh TensorFlow's, st-moe-pytorch, mixture-of-experts). Items without a place have weight 0.

    ``dispatch``, ``combine``: where these two stand in what the module gives. A decision that is written gets as many
    places as it needs: the capacity c is lifted.
    """

    k: int = 2
    dispatch: int = 0
    combine: int = 1
    logits: int | str | None = None
    scores_are: Scores = "logits"

    def read(self, said: Said) -> Routing:
        weight = said.items(said.entry(self.combine).sum(-1))
        return of_dense(weight, self.k, self.scores(said, self.scores_are))

    def write(self, said: Said, routing: Routing) -> Any:
        like = said.entry(self.combine)
        weight = said.back(dense(routing), like[..., 0])
        taken = said.back(routing.chosen(), like[..., 0]).bool()
        place = (taken.long().cumsum(-2) - 1).clamp(min=0)
        places = torch.nn.functional.one_hot(place, int(place.max()) + 1).to(like.dtype) * taken[..., None]
        dispatch = places.to(said.entry(self.dispatch).dtype)
        return replaced(said.output, {self.dispatch: dispatch, self.combine: places * weight[..., None]})


@dataclass(frozen=True)
class FunctionsCodec(Codec):
    """Two functions of a user's own; ``logits`` as in `Codec`."""

    reading: Callable[[Said], Routing]
    writing: Callable[[Said, Routing], Any]
    logits: int | str | None = None

    def read(self, said: Said) -> Routing:
        return self.reading(said)

    def write(self, said: Said, routing: Routing) -> Any:
        return self.writing(said, routing)


def _of_pair(codec: Codec, said: Said, index: int, weight: int, kind: Scores) -> Routing:
    chosen = said.items(said.entry(index)).long()
    given = at_least_float32(said.items(said.entry(weight)))
    logits = codec.scores(said, kind)
    if logits is None:
        raise ValueError("the router's logits were not seen; expected logits=, an entry of its output or a module path")
    if given.shape != chosen.shape:
        given = given.gather(-1, chosen)
    return best_first(Routing(_selection(said, logits, chosen), chosen, given))


def _selection(said: Said, logits: Tensor, index: Tensor) -> Tensor:
    """The scores that the router chose by: ``logits``, unless the index is of those of its own top-k alone."""
    if said.chosen_by is None or said.chosen_by.shape[-1] != logits.shape[-1] or explains(logits, index):
        return logits
    other = at_least_float32(said.items(said.chosen_by))
    shut = torch.isneginf(other)  # a limit by groups
    if bool(shut.any()) and not bool(shut.all()):
        other = other.masked_fill(shut, float(other.detach()[~shut].min()) - 1)
    return other if bool(torch.isfinite(other).all()) and explains(other, index) else logits


def explains(logits: Tensor, index: Tensor) -> bool:
    """Whether the experts ``index`` are those with the highest ``logits``, for every item."""
    lowest = logits.gather(-1, index).amin(-1)
    rest = torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, False)
    return bool((logits.masked_fill(~rest, -torch.inf).amax(-1) <= lowest).all())


def _pair_of(said: Said, routing: Routing, index: int, weight: int) -> Any:
    chosen, given = said.entry(index), said.entry(weight)
    routing = fitted(routing, chosen.shape[-1], said)
    full = given.shape[-1] != chosen.shape[-1]
    values = dense(routing) if full else routing.weight
    return replaced(said.output, {index: said.back(routing.index, chosen), weight: said.back(values, given)})


# ------------------------------------------------------------------------------------------------ intercepted calls

Intercepted = Literal["topk", "argmax", "max", "softmax", "gumbel_softmax", "one_hot"]
SOFT = frozenset({"softmax", "gumbel_softmax"})
Weights = Literal["values", "renormalised", "softmax"]


@dataclass(frozen=True)
class CallCodec(Codec):
    """A call inside the module's own forward: ``topk``, ``max`` (along a dimension) or ``argmax`` of the scores,
    ``softmax`` or ``gumbel_softmax`` (a weight for every expert), or ``one_hot`` of an index.

    ``name``: which of these calls. ``weights``: what the code after a top-k makes of its values: they are the weights,
    perhaps divided by their sum ("values", "renormalised"), or their softmax is. ``nth``: which such call in one call
    of the module, from 0; None: each of them.
    """

    name: Intercepted = "topk"
    weights: Weights = "values"
    nth: int | None = None

    @property
    def call(self) -> str:  # type: ignore[override]
        return self.name

    def read(self, said: Said) -> Routing:
        logits = said.logits
        if logits is None:
            raise ValueError(f"the scores of {self.name} were not seen")
        logits = at_least_float32(said.items(logits))
        if self.name in SOFT:
            return of_dense(said.items(said.output), logits.shape[-1], logits)
        if self.name in ("argmax", "one_hot"):
            index = said.items(self._index(said))
            return Routing(logits, index, torch.ones_like(index, dtype=logits.dtype))
        values, index = (said.items(self._wide(value, said)) for value in said.output[:2])
        return best_first(Routing(logits, index, self.weigh(values)))

    def weigh(self, values: Tensor) -> Tensor:
        """The weights that the code after a top-k makes of its values."""
        values = at_least_float32(values)
        if self.weights == "softmax":
            return torch.softmax(values, -1)
        return values / values.sum(-1, keepdim=True) if self.weights == "renormalised" else values

    def _index(self, said: Said) -> Tensor:
        """(..., 1): the chosen expert."""
        if self.name == "one_hot":
            return said.output.argmax(-1, keepdim=True)
        return self._wide(said.output, said)

    def _wide(self, value: Tensor, said: Said) -> Tensor:
        """(..., k), also where the call left out the dimension of k = 1."""
        assert said.logits is not None
        return value if value.ndim == said.logits.ndim else value[..., None]

    def write(self, said: Said, routing: Routing) -> Any:
        if self.name in SOFT:
            return said.back(dense(routing), said.output)
        if self.name in ("argmax", "one_hot"):
            if routing.k != 1:
                raise ValueError(f"{self.name} names one expert; expected 1 an item, got {routing.k}")
            index = said.back(routing.index, self._index(said))
            if self.name == "argmax":
                return index.reshape(said.output.shape)
            return torch.zeros_like(said.output).scatter(-1, index, 1)
        values, index = (self._wide(value, said) for value in said.output[:2])
        routing = fitted(routing, index.shape[-1], said)
        weight = torch.log(routing.weight.clamp(min=1e-30)) if self.weights == "softmax" else routing.weight
        new = said.back(weight, values), said.back(routing.index, index)
        if routing.k == index.shape[-1]:
            new = new[0].reshape(said.output[0].shape), new[1].reshape(said.output[1].shape)
        kind = torch.return_types.topk if self.name == "topk" else torch.return_types.max
        return kind(new)


@dataclass(frozen=True)
class SlotsCodec(Codec):
    """Soft MoE inside a module's own forward: of one tensor of logits (n, t, e, s), a softmax over the items, which
    mixes the slots, and one over all slots, which mixes the answers. ``experts``: where the logits are (n, t, e * s).

    What is said is ``logits``; what is written are the two weights, as (n, t, e, s) and (n, t, e * s).
    """

    call: ClassVar[str] = "softmax"
    experts: int | None = None

    def read(self, said: Said) -> Routing:
        logits = said.logits
        if logits is None or logits.ndim not in (3, 4) or (logits.ndim == 3 and not self.experts):
            raise ValueError("expected logits (images, items, experts, slots), or (images, items, slots) and slots(e)")
        if len(logits) != said.images:
            raise ValueError(f"the slots are of {len(logits)} groups of items, the batch of {said.images} images")
        apart = at_least_float32(logits if logits.ndim == 4 else logits.unflatten(-1, (self.experts or 1, -1)))
        fresh = soft(torch.logsumexp(apart, -1))
        return Routing(fresh.logits, fresh.index, fresh.weight, slots=apart.flatten(2))

    def write(self, said: Said, routing: Routing) -> Any:
        assert said.logits is not None
        slots = said.logits.flatten(2) if routing.slots is None else routing.slots
        apart = slots.unflatten(-1, (routing.num_experts, -1))
        combine = dense(routing)[..., None] * torch.softmax(apart, -1)
        return torch.softmax(apart, 1).to(said.logits.dtype), combine.flatten(2).to(said.logits.dtype)


CODECS: dict[str, Callable[..., Codec]] = {
    "logits": LogitsCodec,
    "triple": TripleCodec,
    "pair": PairCodec,
    "dense": DenseCodec,
    "index": IndexCodec,
    "dispatch": DispatchCodec,
    "slots": SlotsCodec,
    "call": CallCodec,
}
"""The codecs by the names that users write: ``rm.gate.triple(index=2)``, or the text "triple(index=2)"."""


def text_of(codec: Codec) -> str:
    """The codec as users write it: "triple(index=1)". Of a user's own, the names of the functions or of the class."""
    if isinstance(codec, FunctionsCodec):
        names = (getattr(part, "__qualname__", type(part).__name__) for part in (codec.reading, codec.writing))
        return f"functions({', '.join(names)})"
    return specs.text(codec, CODECS) if type(codec) in CODECS.values() else type(codec).__qualname__
