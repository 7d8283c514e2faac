"""What a router said, and the codec that reads and writes it: `Said`, `Codec`, and what all codecs do with tensors.

A codec is two functions. ``read(said)`` makes the routing of what a router said; ``write(said, routing)`` makes what
the router would have said, had it decided so. To write one: subclass `Codec`, or give the two functions as a pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustmoe.models.norm import at_least_float32
from robustmoe.routing import Gate, Routing

Scores = Literal["logits", "probabilities"]
FAR = 1e4
"""How far below the chosen experts' logits those of the others are written: exp(-FAR) is 0 in every precision."""


@dataclass(frozen=True)
class Said:
    """What a router said in one call, and what is known beside it.

    ``output``: what the module, or the intercepted call, returned. ``images``: how many images the pass is of.
    ``logits``: the scores (..., e) of the codec's ``logits``, where they are not in the output; None where they are not
    known. ``chosen_by``: the scores that a top-k inside the router was given, where these were seen. ``swapped``: the
    items of an image do not stand together (sequence first). ``same``: an item that goes to fewer experts than the code
    takes goes to its last one again, with weight 0, else to others with weight 0. ``wide``: the code takes more experts
    an item than the router chooses.
    """

    output: Any
    images: int
    logits: Tensor | None = None
    chosen_by: Tensor | None = None
    swapped: bool = False
    same: bool = True
    wide: bool = False

    def entry(self, place: int | None) -> Tensor:
        """Returns the output itself, or its entry at ``place``. ValueError where there is no such tensor."""
        values = list(self.output.values()) if isinstance(self.output, dict) else self.output
        try:
            value = values if place is None else values[place]
        except (IndexError, TypeError):
            value = None
        if not isinstance(value, Tensor) or (isinstance(values, Tensor) and place is not None):
            where = "the output" if place is None else f"entry {place} of the output"
            raise ValueError(f"{where} is no tensor, the router gives {described(self.output)}")
        return value

    def items(self, value: Tensor) -> Tensor:
        """(..., m) as (n, t, m): the items of each image together. ValueError where they are not of whole images."""
        rows = value.shape[:-1].numel()
        if self.images == rows == 0:
            return value.reshape(0, 1, value.shape[-1])
        if self.images == 0 or rows % self.images:
            raise ValueError(f"{rows} decisions for {self.images} images; expected a multiple of the number of images")
        if self.swapped:
            return value.reshape(rows // self.images, self.images, value.shape[-1]).transpose(0, 1)
        return value.reshape(self.images, rows // self.images, value.shape[-1])

    def back(self, value: Tensor, like: Tensor) -> Tensor:
        """(n, t, m) as ``like`` is laid out, (..., m), in its dtype."""
        value = value.transpose(0, 1) if self.swapped else value
        return value.reshape(*like.shape[:-1], value.shape[-1]).to(like.dtype)


class Codec(ABC):
    """How a router's answer is read and written. ``logits``: where the scores are found that it chooses by: an entry of
    the output (a number), the output of another module (its path), or None: the scores that the softmax or top-k inside
    the router was given. ``call``: the name of the call in which the decision is taken, "" where it is what the module
    returns.
    """

    logits: int | str | None = None
    call: ClassVar[str] = ""

    @abstractmethod
    def read(self, said: Said) -> Routing:
        """Returns the decision of what was said. ValueError where it is not what the codec is for."""

    @abstractmethod
    def write(self, said: Said, routing: Routing) -> Any:
        """Returns ``said.output`` with this decision in it. ValueError where it cannot be said."""

    def scores(self, said: Said, kind: Scores) -> Tensor | None:
        """The router's logits (n, t, e), in float32 or wider; None where they are not known."""
        value = said.entry(self.logits) if isinstance(self.logits, int) else said.logits
        if value is None:
            return None
        scores = at_least_float32(said.items(value))
        return logarithm(scores) if kind == "probabilities" else scores


def best_first(routing: Routing) -> Routing:
    """The same decision, the experts of each item by falling weight."""
    order = torch.argsort(routing.weight.detach(), dim=-1, descending=True, stable=True)
    return Routing(routing.logits, routing.index.gather(-1, order), routing.weight.gather(-1, order))


def of_dense(weight: Tensor, k: int, logits: Tensor | None) -> Routing:
    """The ``k`` experts with the largest weights (n, t, e); among those without weight the ones with higher logits."""
    weight = at_least_float32(weight)
    logits = logarithm(weight) if logits is None else logits
    by_logits = torch.argsort(logits.detach(), dim=-1, descending=True, stable=True)
    order = torch.argsort(weight.detach().gather(-1, by_logits), dim=-1, descending=True, stable=True)
    index = by_logits.gather(-1, order)[..., :k]
    return Routing(logits, index, weight.gather(-1, index))


def dense(routing: Routing) -> Tensor:
    """The weights as (n, t, e), 0 for the experts that are not chosen."""
    empty = torch.zeros_like(routing.logits, dtype=routing.weight.dtype)
    return empty.scatter_add(-1, routing.index, routing.weight)


def logarithm(p: Tensor) -> Tensor:
    """log p, finite also at 0."""
    return torch.log(p.clamp(min=torch.finfo(p.dtype).tiny))


def written_logits(routing: Routing, gating: Gate) -> Tensor:
    """Scores (n, t, e) of which code that takes the best and weights them by ``gating`` makes this decision."""
    log = logarithm(routing.weight)
    rest = torch.full_like(routing.logits, -FAR) + log.detach().amin(-1, keepdim=True)
    if gating == "vmoe":
        others = routing.num_experts - routing.k
        left = 1 - routing.weight.detach().sum(-1, keepdim=True)
        share = logarithm(left.clamp(min=0) / max(others, 1)).expand_as(rest)
        enough = left > 1e-5
        if bool((enough & (share[..., :1] > log.detach().amin(-1, keepdim=True) + 1e-6)).any()):
            raise ValueError("logits cannot say so little weight for what is chosen; wrap the call: call('topk')")
        rest = torch.where(enough, share, rest)
    return rest.to(log.dtype).scatter(-1, routing.index, log)


def fitted(routing: Routing, k: int, said: Said) -> Routing:
    """The decision with ``k`` experts an item, as the code after the router takes them; the weights beyond are 0."""
    if routing.k == k or (routing.k > k and said.wide):
        return routing
    if routing.k > k:
        best = best_first(routing)
        if bool((best.weight[..., k:] != 0).any()):
            raise ValueError(f"the code after the router takes {k} experts; expected no more, got {routing.k}")
        return Routing(best.logits, best.index[..., :k], best.weight[..., :k])
    if said.same:
        more = routing.index[..., -1:].expand(*routing.index.shape[:-1], k - routing.k)
    else:
        free = routing.logits.detach().masked_fill(routing.chosen(), -torch.inf)
        more = torch.argsort(free, dim=-1, descending=True, stable=True)[..., : k - routing.k]
    return Routing(
        routing.logits,
        torch.cat([routing.index, more], -1),
        torch.cat([routing.weight, torch.zeros_like(more, dtype=routing.weight.dtype)], -1),
    )


def replaced(output: Any, entries: dict[Any, Any]) -> Any:
    """``output``, a tensor, tuple, list or dict, with other tensors at these places (None: the output itself)."""
    if None in entries:
        return entries[None]
    if isinstance(output, dict):
        names = list(output)
        made = type(output)(**output) if hasattr(output, "to_tuple") else type(output)(output)
        for place, value in entries.items():
            made[names[place]] = value
        return made
    values = list(output)
    for place, value in entries.items():
        values[place] = value
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def described(value: Any) -> str:
    """A value's shape, as a person would say it: "(4, 8)", or "a tuple of (4, 8), (4, 2)"."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, tuple | list) else None
    if values is None:
        return f"a {type(value).__name__}"
    inside = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values)
    return f"a {type(value).__name__} of {inside}"
