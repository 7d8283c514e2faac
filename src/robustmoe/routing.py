"""What a router decided, as a value: `Routing`, `Trace`, `Tape`, and the rules that turn router logits into a
decision.

Letters for shapes, here and everywhere in the project: n images, t items an image (1 for an image router, tokens for
a ViT), e experts, k chosen, c classes, ch h w an image, d features.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from robustmoe import asking
from robustmoe.noise import Noise

Gating = Literal["renormalised", "vmoe", "hard"]
Gate = Literal["straight_through", "renormalised", "vmoe", "hard", "soft"]


@dataclass(frozen=True)
class Routing:
    """The decision of one router for a batch.

    ``logits`` (n, t, e): the router's scores, in float32 or wider. ``index`` (n, t, k): the experts chosen, best first.
    ``weight`` (n, t, k): what each chosen expert's output is multiplied by; 0: that expert does not get the item (it is
    full, or it chose other items). ``noisy`` (n, t, e): the logits by which a router with training noise chose.
    ``slots`` (n, t, s): Soft MoE's logits of items and slots, expert by expert, which also say what each slot is mixed
    of.
    """

    logits: Float[Tensor, "n t e"]
    index: Int[Tensor, "n t k"]
    weight: Float[Tensor, "n t k"]
    noisy: Float[Tensor, "n t e"] | None = None
    slots: Float[Tensor, "n t s"] | None = None
    known: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What the host has asked of index and weight, and need not ask again."""

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def k(self) -> int:
        return self.index.shape[-1]

    def detach(self) -> Routing:
        noisy, slots = (None if value is None else value.detach() for value in (self.noisy, self.slots))
        return Routing(self.logits.detach(), self.index, self.weight.detach(), noisy, slots).knowing(self.known)

    def __getitem__(self, select: Tensor | slice) -> Routing:
        """Returns the decisions for some of the images."""
        noisy, slots = (None if value is None else value[select] for value in (self.noisy, self.slots))
        return Routing(self.logits[select], self.index[select], self.weight[select], noisy, slots)

    def replayed(self, fresh: Routing) -> Routing:
        """Returns this decision beside what the router says of another input."""
        slots = fresh.slots if self.slots is None else self.slots
        return Routing(fresh.logits, self.index, self.weight, fresh.noisy, slots).knowing(self.known)

    def knowing(self, known: dict[str, Any]) -> Routing:
        """Returns this decision, of which the host knows so much: of another one of equal index and weight."""
        object.__setattr__(self, "known", known)
        return self

    def sizes(self) -> list[int]:
        """Returns how many pairs of an item and a chosen expert each expert has; asked once, however often the decision
        is replayed.
        """
        if "sizes" not in self.known:
            self.known["sizes"] = asking.told(asking.tally(self.index.reshape(-1), self.num_experts))
        sizes: list[int] = self.known["sizes"]
        return sizes

    def chosen(self) -> Tensor:
        """(n, t, e) bool: which experts each item goes to."""
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter_(-1, self.index, self.weight != 0)


Trace = dict[str, Routing]
"""One entry a router, keyed by its module path; empty for a dense model."""


class Tape:
    """Carried down one forward pass. ``tape(name, fresh)`` records a decision, or replays a forced one, and returns
    what to use.

    A replayed decision keeps the forced ``index``, ``weight`` and ``slots`` and records the fresh ``logits`` beside
    them (what this router would have said of this input). Routers that ``forced`` does not name decide freely.
    ``noise``: one random stream an image, for routers that are noisy in training; without it none is. ``read``: False
    where nobody asks for the decisions afterwards; a model with soft gates need not rank its experts then.
    ``openly``: whether the pass is one that bounds are made of: routed layers compute the same, without a decision on
    the tape, by operations that bounds know.
    """

    read: bool = True
    openly: bool = False

    def __init__(
        self,
        forced: Mapping[str, Routing] | None = None,
        noise: Noise | None = None,
        read: bool = True,
        openly: bool = False,
    ) -> None:
        self.read, self.openly = read, openly
        self.forced: Mapping[str, Routing] = forced or {}
        self.noise = noise
        self.trace: Trace = {}
        self._prefix = ""

    def draws(self, name: str) -> Noise | None:
        """Returns the random streams of the router ``name`` in this pass."""
        return None if self.noise is None else self.noise.fold(zlib.crc32(f"{self._prefix}{name}".encode()))

    def under(self, prefix: str) -> Tape:
        """Returns the same tape, with ``prefix.`` before every name."""
        inner = copy.copy(self)
        inner._prefix = f"{self._prefix}{prefix}."
        return inner

    def __call__(self, name: str, fresh: Routing) -> Routing:
        name = self._prefix + name
        if name in self.trace:
            raise ValueError(
                f"two routers are named {name!r} in one pass; give each its own name, or use tape.under(prefix)"
            )
        used = fresh
        if name in self.forced:
            forced = self.forced[name]
            if forced.index.shape[:2] != fresh.index.shape[:2]:
                raise ValueError(
                    f"the forced routing of {name!r} is for (images, items) = {tuple(forced.index.shape[:2])}, "
                    f"this batch has {tuple(fresh.index.shape[:2])}"
                )
            if forced.num_experts != fresh.num_experts:
                raise ValueError(
                    f"the forced routing of {name!r} has {forced.num_experts} experts, the model {fresh.num_experts}"
                )
            used = forced.replayed(fresh)
        self.trace[name] = used
        return used


def _ranked(logits: Float[Tensor, "... e"]) -> Int[Tensor, "... e"]:
    """Experts from best to worst; ties go to the lower index, on every device."""
    return torch.argsort(logits, dim=-1, descending=True, stable=True)


def _check_k(logits: Tensor, k: int) -> None:
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of experts, {logits.shape[-1]}; got {k}")


def top_k(logits: Float[Tensor, "n t e"], k: int = 1, gating: Gating = "renormalised") -> Routing:
    """Chooses the k best experts.

    ``gating`` says what their outputs are weighted by. "renormalised": softmax over the chosen (at k = 1 this is the
    constant 1: the router then gets no gradient from the output). "vmoe": softmax over all experts, the chosen
    entries (V-MoE, Riquelme et al. 2021). "hard": 1/k each, a pure decision.
    """
    _check_k(logits, k)
    index = _ranked(logits)[..., :k]
    return Routing(logits, index, _weights(logits, index, gating))


def _weights(logits: Float[Tensor, "*n e"], index: Int[Tensor, "*n k"], gating: Gating) -> Float[Tensor, "*n k"]:
    """Returns what the experts of ``index`` are weighted by."""
    if gating == "hard":
        return torch.full_like(logits[..., : index.shape[-1]], 1.0 / index.shape[-1])
    if gating == "vmoe":
        return torch.softmax(logits, dim=-1).gather(-1, index)
    if gating == "renormalised":
        return torch.softmax(logits.gather(-1, index), dim=-1)
    raise ValueError(f"gating must be 'renormalised', 'vmoe' or 'hard'; got {gating!r}")


def straight_through(
    logits: Float[Tensor, "n t e"], k: int = 1, surrogate: Literal["identity", "softmax"] = "identity"
) -> Routing:
    """Chooses the k best experts, weighted 1/k forward, with a gradient to the router that the exact function does not
    have.

    Backward, the weight of a chosen expert moves as its logit ("identity": AdvMoE's released code copies the gradient
    of the one-hot to the scores) or as its softmax probability ("softmax"). The exact output is piecewise constant in
    the logits, so this gradient is biased by construction; it is declared here and nowhere else.
    """
    _check_k(logits, k)
    index = _ranked(logits)[..., :k]
    score = logits if surrogate == "identity" else torch.softmax(logits, dim=-1)
    score = score.gather(-1, index)
    moving = score - score.detach()  # zero in value, NaN only where the logits are not finite
    return Routing(logits, index, moving + 1.0 / k)


def noisy_top_k(
    logits: Float[Tensor, "n t e"], noise: Float[Tensor, "n t e"], k: int = 1, gating: Gating = "renormalised"
) -> Routing:
    """`top_k` of ``logits + noise`` (V-MoE, Riquelme et al. 2021, uses normal noise of deviation 1/e while training).

    The noise is an argument: draw it with `robustmoe.noise.Noise`, so that it belongs to the image. The recorded
    logits are the clean ones, those with noise stand beside them.
    """
    noisy = top_k(logits + noise, k, gating)
    return Routing(logits, noisy.index, noisy.weight, noisy.logits)


def soft(logits: Float[Tensor, "n t e"], temperature: float = 1.0) -> Routing:
    """Chooses all experts, weighted by softmax(logits / temperature), best first."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    index = _ranked(logits)
    return Routing(logits, index, torch.softmax(logits / temperature, dim=-1).gather(-1, index))


def choose(logits: Float[Tensor, "n t e"], gate: Gate, k: int) -> Routing:
    """Decides by the rule of that name: `soft`, `straight_through`, or `top_k` with that gating."""
    if gate == "soft":
        return soft(logits)
    if gate == "straight_through":
        return straight_through(logits, k)
    return top_k(logits, k, gate)


def chosen_shares(logits: Float[Tensor, "*n e"], k: int) -> Float[Tensor, "*n e"]:
    """Returns 1/k for each item's k best experts and 0 for the others, expert by expert: the weights of hard gates, as
    one function of torch's kind, so that bounds know it (`robustmoe.certification`).
    """
    return chosen_weights(logits, k, "hard")


def chosen_weights(logits: Float[Tensor, "*n e"], k: int, gating: Gating) -> Float[Tensor, "*n e"]:
    """Returns the weights of `top_k`, expert by expert, 0 for those that are not chosen: as one function of torch's
    kind, so that bounds know it.
    """
    if has_torch_function_unary(logits):
        weights: Tensor = handle_torch_function(chosen_weights, (logits,), logits, k, gating)
        return weights
    index = _ranked(logits)[..., :k]
    return torch.zeros_like(logits).scatter(-1, index, _weights(logits, index, gating))


def to_rank(trace: Trace, rank: int | Int[Tensor, " n"]) -> Trace:
    """Sends every item to its expert of the given rank alone: 0 is the best, 1 the second (RT-ER's "second expert");
    ``rank`` is one for all, or one an image.
    """
    out: Trace = {}
    for name, routing in trace.items():
        images, items = routing.logits.shape[:2]
        ranks = torch.as_tensor(rank, device=routing.logits.device).expand(images)
        wrong = ranks[(ranks < 0) | (ranks >= routing.num_experts)]
        if len(wrong):
            raise ValueError(f"rank {int(wrong[0])} does not exist at {name!r}: it has {routing.num_experts} experts")
        index = _ranked(routing.logits).gather(-1, ranks[:, None, None].expand(images, items, 1))
        out[name] = Routing(routing.logits, index, torch.ones_like(routing.logits[..., :1]))
    return out


def to_expert(trace: Trace, expert: int) -> Trace:
    """Sends every item to the one given expert, with weight 1, at every router."""
    out: Trace = {}
    for name, routing in trace.items():
        if not 0 <= expert < routing.num_experts:
            raise ValueError(
                f"expert {expert} does not exist at {name!r}: it has experts 0 to {routing.num_experts - 1}"
            )
        ones = torch.ones_like(routing.logits[..., :1])
        out[name] = Routing(routing.logits, torch.full_like(ones, expert, dtype=torch.long), ones)
    return out


def detach(trace: Trace) -> Trace:
    """Returns the same decisions, cut from the graph."""
    return {name: routing.detach() for name, routing in trace.items()}


def rerouted(before: Trace, after: Trace, empty: Literal["left out", "changed"] = "left out") -> dict[str, Tensor]:
    """Returns for each router, per image (n,), the share of items whose chosen set changed: 1 - IoU of the chosen sets,
    averaged over items.

    For top-1 this is the fraction of items sent elsewhere. An item that goes to no expert, before and after (both times
    none had room), has no such share: it is ``empty`` = "left out" of the average (0 where all are), or counted as
    "changed", as V-MoE's code does.
    """
    out = {}
    for name, routing in before.items():
        a, b = routing.chosen(), after[name].chosen()
        both, either = (a & b).sum(-1), (a | b).sum(-1)
        change = 1.0 - both / either.clamp(min=1)
        counted = torch.ones_like(change) if empty == "changed" else (either > 0).to(change.dtype)
        out[name] = (change * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    return out
